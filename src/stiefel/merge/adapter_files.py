"""Writing PEFT adapter folders: whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stiefel.checkpoint.swap import recover, sync_folder, take_name
from stiefel.merge.adapter_config import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE
from stiefel.merge.adapter_factors import LowRank


def free_folder(out: str | Path, overwrite: bool) -> Path:
    """``out`` as a path that may be written; what a crash left beside it is put right first.

    Raises:
        FileExistsError: something is there, not an empty folder, and not to be replaced.
    """
    folder = Path(os.path.realpath(out))
    recover(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists; give another folder or overwrite=True")
    return folder


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    weights_file: str = WEIGHTS_FILE,
) -> None:
    """Write settings, tensors and further ``texts`` (file name → content) as one folder.

    The folder is made beside ``folder``, reaches the disk, and takes its name in one step.
    """
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own around it: mkdtemp lets only the owner in, the result is for all.
    private = Path(
        tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial")
    )
    made = private / "made"
    try:
        made.mkdir()
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, made / weights_file, metadata={"format": "pt", **(metadata or {})})
        written = {CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True)} if config else {}
        for name, text in {**written, **(texts or {})}.items():
            (made / name).write_text(text + "\n", encoding="utf-8")
        for file in made.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(made)
        take_name(made, folder)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def factor_tensors(module: str, update: LowRank, dtype: torch.dtype) -> dict[str, Tensor]:
    """The two tensors of a module under PEFT's keys; the scaling goes into ``up``."""
    up, down = update.up * update.scaling, update.down
    if update.embedding:
        pair = {"lora_embedding_A": up.T, "lora_embedding_B": down.T}
    else:
        ones = (1,) * len(update.kernel)
        channels = update.shape[1]
        pair = {
            "lora_A.weight": down.reshape(update.rank, channels, *update.kernel),
            "lora_B.weight": up.reshape(*up.shape, *ones),
        }
    return {f"{KEY_PREFIX}{module}.{part}": x.to(dtype) for part, x in pair.items()}


def rank_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """r, lora_alpha and patterns under which every module has its rank and the scaling 1.

    A pattern names its module from start to end: PEFT takes the first that fits the end of a name,
    so ``layers.1.q`` alone would also catch ``encoder.layers.1.q``.
    """
    counts = list(ranks.values())
    usual = max(sorted(set(counts)), key=counts.count)
    others = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }

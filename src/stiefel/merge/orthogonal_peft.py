"""Orthogonal adapters and PEFT: export as LoRA, and the shared basis inside a PEFT model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.merge.adapter_config import CONFIG_FILE
from stiefel.merge.adapter_factors import LowRank
from stiefel.merge.adapter_files import factor_tensors, free_folder, rank_settings, write_adapter
from stiefel.merge.orthogonal_adapter import OrthogonalAdapter, Projection, Scheme
from stiefel.merge.orthogonal_handle import NOTES_FILE, OrthogonalAdapters, check_update
from stiefel.merge.orthogonal_merge import MergedAdapters
from stiefel.merge.shared_basis import Basis


def export_peft(
    adapters: OrthogonalAdapters | MergedAdapters,
    folder: str | Path,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a LoRA folder that ``PeftModel.from_pretrained`` loads as it is.

    lora_A = Bᵀ, lora_B = A. The folder of a single adapter keeps its notes beside, so that
    :func:`stiefel.merge.load_orthogonal_adapters` reads it as well and it can be merged further.

    Args:
        adapters: a handle, or a merged sum (rank Σ r_i).
        base_model: base_model_name_or_path of the settings.
        task_type: PEFT's (``"CAUSAL_LM"``); None for a plain model.

    Returns:
        The folder, which appears whole or not at all.

    Raises:
        FileExistsError: ``folder`` is there and ``overwrite`` false.
        ValueError: nothing to write, NaN, or a convolution that PEFT would run otherwise (it
            drops the dilation and the padding mode of the layer).
    """
    target = free_folder(folder, overwrite)
    if not adapters.layers:
        raise ValueError("there are no layers to export")
    texts = {}
    if isinstance(adapters, MergedAdapters):
        updates, kinds = adapters.layers, adapters.kinds
    else:
        for name, module in adapters.modules.items():
            _check_convolution(name, module)
        for name, layer in adapters.layers.items():
            check_update(name, layer.a)
        updates = {name: layer.low_rank() for name, layer in adapters.layers.items()}
        kinds = {name: layer.kind for name, layer in adapters.layers.items()}
        texts = {NOTES_FILE: adapters.notes()}
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        tensors |= _tensors(name, update)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "target_modules": sorted(updates),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": "turned" in kinds.values(),
        "inference_mode": True,
        **_scalings(updates),
    }
    write_adapter(target, config, tensors, texts=texts)
    return target


def _tensors(name: str, update: LowRank) -> dict[str, Tensor]:
    # B goes out as it is: the scaling stands in the settings.
    plain = LowRank(update.up, update.down, 1.0, update.kernel, update.embedding)
    return factor_tensors(name, plain, update.up.dtype)


def _scalings(updates: dict[str, LowRank]) -> dict[str, Any]:
    """Ranks and alphas: s = alpha / r, the usual values first and patterns for the others."""
    settings = rank_settings({name: update.rank for name, update in updates.items()})
    (scaling,) = {update.scaling for update in updates.values()} or {1.0}
    for name in ("rank_pattern", "alpha_pattern"):
        settings[name] = dict(settings[name])
    settings["alpha_pattern"] = {k: v * scaling for k, v in settings["alpha_pattern"].items()}
    alpha = settings["r"] * scaling
    settings["lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
    return settings


def _check_convolution(name: str, module: OrthogonalAdapter) -> None:
    base = module.base
    if isinstance(base, nn.Conv2d) and (
        any(step != 1 for step in base.dilation) or base.padding_mode != "zeros"
    ):
        raise ValueError(
            f"{name} has dilation {base.dilation} and padding mode {base.padding_mode!r}; PEFT "
            f"(up to 0.21) would run its factors without them, so there is no {CONFIG_FILE} for it"
        )


def share_basis(
    model: nn.Module,
    *,
    adapter_id: str | int,
    scheme: Scheme = "columns",
    basis: Basis = "dct",
    seed: int = 0,
    slot: int | None = None,
    adapter_name: str = "default",
) -> dict[str, Projection]:
    """Make the LoRA of a PEFT model orthogonal: lora_A = Bᵀ of the shared basis, and frozen.

    Call it before training, after ``get_peft_model``; lora_B starts at zero. What PEFT then
    saves is an ordinary LoRA file, and its sum with others that share the basis is that of
    :func:`stiefel.merge.merge_adapters`.

    Returns:
        Layer name (as in the base model) → its projection.

    Raises:
        ValueError: no LoRA layers of this name; an update that is not zero (training has begun,
            and another lora_A would change the model); rank or slot that do not fit.
    """
    found = {}
    for name, down, up in _lora_pairs(model, adapter_name):
        # Of an embedding PEFT starts the other factor at zero.
        if bool((up != 0).any()) and bool((down != 0).any()):
            raise ValueError(f"the update of {name} is not zero: call share_basis before training")
        m, r = down[0].numel(), down.shape[0]
        projection = Projection(m, r, adapter_id, name, scheme, basis, seed, slot)
        with torch.no_grad():
            up.zero_()
            down.copy_(projection.matrix(torch.float32).T.reshape(down.shape))
        down.requires_grad_(False)
        found[name] = projection
    if not found:
        raise ValueError(f"the model has no LoRA layers of adapter {adapter_name!r}")
    return found


def freeze_down_projections(model: nn.Module, adapter_name: str = "default") -> int:
    """Freeze every lora_A of a PEFT model that was loaded to be trained on; returns how many.

    Raises ``ValueError`` where the model has no LoRA layers of this name.
    """
    pairs = list(_lora_pairs(model, adapter_name))
    if not pairs:
        raise ValueError(f"the model has no LoRA layers of adapter {adapter_name!r}")
    for _, down, _ in pairs:
        down.requires_grad_(False)
    return len(pairs)


def _lora_pairs(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name in the base model, lora_A and lora_B of every LoRA layer."""
    for name, module in model.named_modules():
        for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            downs, ups = getattr(module, a, None), getattr(module, b, None)
            if downs is None or ups is None or adapter not in downs:
                continue
            down, up = (
                x if isinstance(x, Tensor) else x.weight for x in (downs[adapter], ups[adapter])
            )
            yield name.removeprefix("base_model.model."), down, up

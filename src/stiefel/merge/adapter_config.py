"""What adapter_config.json says: which kind of adapter, its scalings, and what cannot be taken.

Format of PEFT 0.21: keys of the tensors are ``base_model.model.MODULE.PART`` without the adapter's
name; ``MODULE`` is the module's name in the base model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
KINDS = ("LORA", "OFT")

# Where a module's tensors stand, longest suffix first.
PARTS: dict[str, tuple[str, ...]] = {
    "LORA": (
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
    ),
    "OFT": ("oft_embedding_R.weight", "oft_R.weight"),
}
# Layers that PEFT saves whole beside the adapter without naming them in modules_to_save.
EMBEDDINGS = (
    "embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out",
    "tok_embeddings",
)  # fmt: skip
# Settings under which the file is not the update of the base model's weights.
_REFUSED: dict[str, str] = {
    "use_qalora": "its factors act on pooled inputs",
    "use_bdlora": "its factors are block diagonal",
    "arrow_config": "its experts are chosen per token",
    "kasa_config": "its update passes through singular values of the base",
    "alora_invocation_tokens": "it acts from certain tokens on only, so no weight can hold it",
    "layer_replication": "its modules are copies of the base's layers",
    "target_parameters": "its factors belong to stacked experts",
    "trainable_token_indices": "it also replaces single rows of an embedding",
}
# Initialisations that move a part of the base weight into the factors.
_BASE_CHANGING = re.compile(r"^(pissa.*|olora|corda|loftq|lora_ga)$")


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of the adapter in ``folder``, every key preserved.

    Raises:
        FileNotFoundError: no adapter_config.json.
        ValueError: not a JSON object, or not of a kind or format that can be read; see the message.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: not a PEFT adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object, got {type(config).__name__}")
    check_config(config, str(folder))
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise ``ValueError`` where the settings mean something that no weight update expresses."""
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise ValueError(f"{where}: peft_type must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "OFT":
        if "oft_block_size" not in config:
            raise ValueError(
                f"{where}: an OFT adapter without oft_block_size is of PEFT before 0.14, another "
                "format; load and save it with that version's converter first"
            )
        return
    for field, why in _REFUSED.items():
        if config.get(field):
            raise ValueError(f"{where}: {field}={config[field]!r} is not supported: {why}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _BASE_CHANGING.match(start.lower()):
        raise ValueError(
            f"{where}: init_lora_weights={start!r} moved a part of the base weight into the "
            "factors, so they are no update of the base; save the adapter with "
            "path_initial_model_for_weight_conversion first"
        )


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that names ``module`` or its end, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def lora_rank(config: Mapping[str, Any], module: str) -> int:
    """Rank that the settings give to ``module``."""
    return int(pattern_value(config.get("rank_pattern"), module, config.get("r", 8)))


def lora_scaling(config: Mapping[str, Any], module: str) -> float:
    """s of ΔW = s B A: alpha / r, or alpha / √r with ``use_rslora``."""
    rank = lora_rank(config, module)
    alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@dataclass(frozen=True)
class Layout:
    """Where the tensors of an adapter file belong."""

    parts: dict[str, dict[str, str]]
    """Module → part (``lora_A.weight``) → key."""
    replaced: dict[str, str]
    """Name of a tensor of the base that is replaced whole → key."""
    unknown: tuple[str, ...]


def lay_out(keys: Iterable[str], config: Mapping[str, Any]) -> Layout:
    """Sort the keys of an adapter file by what they mean."""
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    wrapped: dict[str, str] = {}
    unknown = []
    for key in sorted(keys):
        if not key.startswith(KEY_PREFIX):
            unknown.append(key)
            continue
        name = key.removeprefix(KEY_PREFIX)
        part = next((p for p in PARTS[config["peft_type"]] if name.endswith(f".{p}")), None)
        if part is not None:
            parts.setdefault(name.removesuffix(f".{part}"), {})[part] = key
        elif ".original_module." in name:
            continue  # the untrained copy beside a module that is saved whole
        elif ".modules_to_save." in name:
            wrapped[name.replace(".modules_to_save.", ".")] = key
        elif (target := _replacement(name, config)) is not None:
            replaced[target] = key
        else:
            unknown.append(key)
    return Layout(parts, {**wrapped, **replaced}, tuple(unknown))


def _replacement(name: str, config: Mapping[str, Any]) -> str | None:
    """The base tensor that this key replaces, None if there is no reason why it should."""
    plain = name.replace(".base_layer.", ".")
    module, _, parameter = plain.rpartition(".")
    if parameter == "bias" and config.get("bias", "none") != "none":
        return plain
    saved = (*(config.get("modules_to_save") or ()), *EMBEDDINGS)
    # A saved module may have modules of its own: classifier.dense.weight.
    inside = any(re.search(rf"(^|\.){re.escape(s)}(\.|$)", module) for s in saved)
    return plain if inside else None

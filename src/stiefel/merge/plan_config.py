"""The output's configuration and the files that come with it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stiefel.checkpoint.folder import leads_out
from stiefel.merge.plan_layers import LAYER_KEYS, TEXT_PARTS, text_part
from stiefel.merge.plan_models import Model
from stiefel.merge.plan_tokens import TOKENIZER_FILES

# Beside the weights: what transformers loads. The tokenizer's files come from its own folder.
_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
# Lists with one entry a layer.
_PER_LAYER = (
    "layer_types", "mlp_layer_types", "attention_layers", "block_types", "layers_block_type",
    "no_rope_layers", "sliding_window_pattern_per_layer", "attn_layer_types",
)  # fmt: skip
# Models that differ here compute something else with the same weights.
_MEANING = (
    "model_type", "architectures", "hidden_act", "hidden_activation", "activation_function",
    "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_epsilon",
    "layer_norm_eps", "sliding_window", "hidden_size", "n_embd", "intermediate_size",
)  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "num_key_value_heads", "head_dim")


def changed_config(
    base: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
    tied: bool | None = None,
    layers: Sequence[tuple[Mapping[str, Any], int]] | None = None,
) -> dict[str, Any]:
    """``base`` with what the merge changes; key order and everything else as they are.

    Args:
        base: content of the base's config.json.
        dtype: of the output, where the recipe sets one; written under the key that is there
            (``dtype``, or ``torch_dtype`` of older files), in nested parts as well.
        rows: of the token embedding, where that changed.
        tied: whether embedding and head are one, where that changed.
        layers: for stacked slices, of each output layer the configuration it comes from and its
            index there; ``num_hidden_layers`` and lists with an entry a layer follow.
    """
    config = copy.deepcopy(dict(base))
    if dtype is not None:
        _set_dtype(config, str(dtype).removeprefix("torch."))
    if rows is not None:
        _set_rows(config, rows)
    if tied is not None:
        config["tie_word_embeddings"] = tied
        for name in TEXT_PARTS:
            part = config.get(name)
            if isinstance(part, dict) and "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = tied
    if layers is not None:
        part = text_part(config)
        assert isinstance(part, dict)  # noqa: S101 - a part of a deep copy
        for key in LAYER_KEYS:
            if isinstance(part.get(key), int):
                part[key] = len(layers)
        for key in _PER_LAYER:
            if isinstance(part.get(key), list):
                found = [_entry(source, key, index) for source, index in layers]
                part[key] = [entry for entry in found if entry is not None]
    return config


def _entry(config: Mapping[str, Any], key: str, index: int) -> Any:
    values = text_part(config).get(key)
    return values[index] if isinstance(values, list) and index < len(values) else None


def _set_dtype(config: dict[str, Any], name: str) -> None:
    for part in (config, *(config.get(p) for p in TEXT_PARTS)):
        if not isinstance(part, dict):
            continue
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name


def _set_rows(config: dict[str, Any], rows: int) -> None:
    for part in (config, *(config.get(p) for p in TEXT_PARTS)):
        if isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = rows


def files_to_copy(
    base: Model, tokenizer: Model, *, trust_remote_code: bool
) -> tuple[dict[str, Path], list[str]]:
    """Files beside the weights, and notes on what is left behind.

    Generation and processor settings come from the base, the tokenizer from its own model. Python
    files only with ``trust_remote_code``; weights, indexes and model cards never, and no file that
    a link brings in from outside: the output may be given to others.
    """
    notes: list[str] = []

    def inside(model: Model, names: Iterable[str]) -> dict[str, Path]:
        there = {n: model.folder / n for n in names if (model.folder / n).is_file()}
        for name, path in list(there.items()):
            if (outside := leads_out(path, model.folder)) is not None:
                del there[name]
                notes.append(
                    f"{model.name}: {name} is a link out of the folder, to {outside}, and is not "
                    "copied"
                )
        return there

    found = inside(base, _FILES) | inside(tokenizer, TOKENIZER_FILES)
    scripts = sorted(inside(base, (p.name for p in base.folder.glob("*.py"))).values())
    if trust_remote_code:
        found |= {path.name: path for path in scripts}
    elif scripts and "auto_map" in base.config:
        notes.append(
            f"{base.name} comes with code of its own ({', '.join(p.name for p in scripts)}), "
            "which is not copied without --trust-remote-code"
        )
    return found, notes


def compare_meaning(base: Model, other: Model) -> tuple[list[str], list[str]]:
    """Notes and problems: what two configurations say differently about the computation."""
    if not base.config or not other.config:
        return [], []
    first, second = text_part(base.config), text_part(other.config)

    def differ(keys: tuple[str, ...]) -> list[str]:
        return [
            f"{key} is {second[key]!r}, of {base.name} {first[key]!r}"
            for key in keys
            if key in first and key in second and first[key] != second[key]
        ]

    notes = [f"{other.name}: {text}" for text in differ(_MEANING)]
    problems = [f"{text}: the same numbers mean other heads" for text in differ(_HEADS)]
    return notes, problems

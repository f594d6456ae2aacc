"""OrthoMerge in the engine: the one method that needs whole matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stiefel.merge.engine_inputs import Reader
from stiefel.merge.engine_methods import each
from stiefel.merge.orthomerge import OrthoSettings, is_turned, orthomerge_tensor
from stiefel.merge.plan_types import TensorTask

ROTATIONAL = ("orthomerge",)

_SETTINGS = ("variant", "residual", "residual_scale", "map", "density", "intensity")
# Models of transformers whose layers store W as [in, out], and what those layers are called. The
# rotation acts on the input side, so these are turned over before and after.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn.weight", "c_fc.weight", "c_proj.weight", "q_attn.weight")

# orthomerge: float64 up to this many entries, residuals kept up to this many bytes, and portions
# of so many entries at once.
_FLOAT64_UP_TO = 1 << 22
_KEPT = 1 << 29
_PORTION = 1 << 21


def merge_matrix(
    task: TensorTask,
    base: Reader,
    sources: Sequence[Reader],
    seed: int,
) -> tuple[Tensor, dict[str, Any]]:
    """The merged tensor in the output's type, and what the report tells about it."""
    known = {name: task.parameters[name] for name in _SETTINGS if name in task.parameters}
    settings = OrthoSettings(**known, seed=seed)
    weights = each(task, "weight", 1.0)
    if not any(weights):  # nobody counts here, by a filter or a gradient: the base stays
        return base.whole().to(task.dtype), {}
    origin, experts = base.whole(), [source.whole() for source in sources]
    turned_over = stored_in_out(task, base.config)
    if turned_over:
        origin, experts = origin.mT, [expert.mT for expert in experts]
    out = torch.empty(origin.shape, dtype=task.dtype)
    result, report = orthomerge_tensor(
        origin, experts, settings, weights=weights, name=task.name, out=out
    )
    details: dict[str, Any] = {"residuals": list(report.residuals)}
    if report.map is not None:
        details |= {
            "rotations": list(report.norms),
            "correction": report.correction,
            "map": report.map,
        }
    return (result.mT if turned_over else result), details


def stored_in_out(task: TensorTask, config: Mapping[str, Any] | None) -> bool:
    """Whether the model, by its configuration, stores this layer as [in, out]."""
    model_type = (config or {}).get("model_type")
    layer = task.name.endswith(_CONV1D_LAYERS)
    return len(task.shape) == 2 and model_type in _CONV1D_MODELS and layer


def matrix_memory(task: TensorTask, stored: int) -> float:
    """Estimate of the bytes that :func:`merge_matrix` takes; ``stored``: of its inputs on disk."""
    numel, count = math.prod(task.shape), len(task.sources)
    residuals = numel * count * (8 if numel <= _FLOAT64_UP_TO else 4)
    if residuals > _KEPT:
        residuals = 0
    total = stored + task.nbytes + residuals + 8.0 * min(numel, _PORTION) * (count + 4)
    if len(task.shape) == 2 and is_turned(task.name, torch.empty(task.shape, device="meta")):
        side = min(task.shape[1], (count + 1) * task.shape[0])
        total += 8.0 * side**2 * (count + 6)
    return total

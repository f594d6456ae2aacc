"""The matrices that a parameter holds: their sizes, and what cannot be seen as one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stiefel.optim.distributed.geometry import is_dtensor
from stiefel.optim.groups import block_sizes, dimension_order

VIEWS = ("flatten", "batch", "transpose")


def check_matrix(group: dict[str, Any], parameter: Tensor, name: str) -> None:
    """Refuse a parameter that is no matrix in its group's view; ``name`` is for the message.

    Raises:
        ValueError: no real floating point, too few or too many dimensions, strides that need a
            copy, blocks that do not add up.
    """
    view, shape = group["view"], tuple(parameter.shape)
    needed = {"flatten": 2, "batch": 3, "transpose": 2}[view]
    if parameter.is_complex() or not parameter.is_floating_point():
        raise ValueError(f"{name} must be real floating point, got {parameter.dtype}")
    if parameter.ndim < needed or (parameter.ndim > needed and view != "flatten"):
        raise ValueError(
            f"{name} has shape {shape}, which is no matrix (view={view!r}). Put it in a group with "
            "rule='elementwise'; split_parameters(model) makes such groups"
        )
    # Shards are looked at in their own dimensions.
    if view == "flatten" and not is_dtensor(parameter) and not _flattens(parameter):
        raise ValueError(
            f"{name} has strides {parameter.stride()} for shape {shape}, which cannot be seen as a "
            "matrix without a copy; make it contiguous first"
        )
    if view != "batch":
        block_sizes(name, shape[-1 if view == "transpose" else 0], group["blocks"])


def matrix_sizes(group: dict[str, Any], parameter: Tensor) -> list[tuple[int, int]]:
    """(R, C) of every matrix that the parameter holds."""
    if group["view"] == "batch":
        count, rows, cols = parameter.shape
        return [(rows, cols)] * count
    if group["view"] == "transpose":
        cols, rows = parameter.shape
    else:
        rows = parameter.shape[0]
        cols = parameter.numel() // rows
    return [(r, cols) for r in block_sizes("parameter", rows, group["blocks"])]


def _flattens(parameter: Tensor) -> bool:
    """Whether (out, rest) is a view: an update of a copy would be lost."""
    if parameter.ndim == 2 or not parameter.numel():
        return True
    rows = parameter.detach().permute(dimension_order(parameter))
    return rows.flatten(1).data_ptr() == rows.data_ptr()

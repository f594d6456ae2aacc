"""What the optimizers with selected columns share: settings, sides, stacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stiefel.linalg._checks import compute_dtype
from stiefel.linalg.schulz import Workspace
from stiefel.optim.base import Batch, _sizes
from stiefel.optim.columns import METHODS, ColumnSelector, check_basis, resolve_rank
from stiefel.optim.groups import dimension_order
from stiefel.optim.settings import check_choice

# Trailing dimensions of a kernel in the order of memory, and their sizes.
Layout = tuple[tuple[int, ...], tuple[int, ...]]

# More matrices at a time save nothing on a CPU, and cost scratch memory.
LARGEST_STACK = 32
SIDES = ("auto", "left", "right")


def selection_defaults(
    rank: int | float,
    norm: int,
    side: str,
    basis: str | Callable[[int], Tensor],
    method: str,
) -> dict[str, Any]:
    """The settings of a group that choose columns."""
    return {"rank": rank, "norm": norm, "side": side, "basis": basis, "method": method}


def check_selection(group: dict[str, Any]) -> None:
    """Refuse settings that :class:`ColumnSelector` would refuse, and unknown sides."""
    if isinstance(group["basis"], Tensor):
        raise TypeError(
            "basis must be 'dct2', 'dct3' or a function from n to a matrix, got a tensor: it would "
            "be stored in every state_dict"
        )
    resolve_rank(group["rank"], 1)
    check_basis(group["basis"])
    check_choice(group, "norm", (1, 2))
    check_choice(group, "side", SIDES)
    check_choice(group, "method", METHODS)
    if group["method"] == "fft" and not isinstance(group["basis"], str):
        raise ValueError("method='fft' needs basis 'dct2' or 'dct3', got a function")


def warn_of_clamping(group: dict[str, Any]) -> None:
    """One warning for all matrices of a group that are narrower than the rank asked for."""
    widths = [
        _width(group, rows, cols)
        for p in group["params"]
        if p.numel()
        for rows, cols in _sizes(group, p)
    ]
    if isinstance(group["rank"], int) and min(widths, default=group["rank"]) < group["rank"]:
        warnings.warn(
            f"rank {group['rank']} is more than the width {min(widths)} of a matrix, and is the "
            "width there",
            UserWarning,
            stacklevel=4,
        )


def projects_right(group: dict[str, Any], rows: int, cols: int) -> bool:
    """Whether rows are transformed (n = C), else columns (n = R)."""
    return group["side"] == "right" or (group["side"] == "auto" and rows >= cols)


def selection(group: dict[str, Any], rows: int, cols: int) -> tuple[ColumnSelector, int]:
    """The selector for matrices of this shape, and the dimension that it works along."""
    n = _width(group, rows, cols)
    rank = resolve_rank(group["rank"], n)
    selector = _selector(n, rank, group["basis"], group["norm"], group["method"])
    return selector, -1 if projects_right(group, rows, cols) else -2


def low_shape(selector: ColumnSelector, dim: int, rows: int, cols: int) -> tuple[int, int]:
    """The shape of what is left of a matrix: (R, r) from the right, (r, C) from the left."""
    return (rows, selector.rank) if dim == -1 else (selector.rank, cols)


def uncompiled(update: Callable[..., None]) -> Callable[..., None]:
    """``update`` itself, kept out of the trace when the step is being compiled.

    Chosen columns and FFTs on the host leave nothing to gain, and a trace that stops between
    parameters can take the state of one for that of the next.
    """
    return torch.compiler.disable(update) if torch.compiler.is_compiling() else update


def column_layout(group: dict[str, Any], parameter: Tensor) -> Layout | None:
    """How a kernel's columns lie in memory, None if in their natural order (in, height, width)."""
    if group["view"] != "flatten" or parameter.ndim < 3:
        return None
    order = dimension_order(parameter)
    if order == tuple(range(parameter.ndim)):
        return None
    return order[1:], tuple(parameter.shape[d] for d in order[1:])


@contextmanager
def natural_order(batch: Batch, layout: Layout | None) -> Iterator[Batch]:
    """The batch with its columns in natural order, which a transform can tell from others.

    Where they lie otherwise (channels-last kernels) the matrices are copies, written back in the
    end.
    """
    if layout is None:
        yield batch
        return
    order, sizes = layout
    back = [1 + order.index(d) for d in range(1, len(order) + 1)]

    def views(tensors: list[Tensor]) -> list[Tensor]:
        return [t.unflatten(1, sizes).permute(0, *back) for t in tensors]

    params, momenta = views(batch.params), views(batch.momenta)
    natural = Batch(
        [t.flatten(1) for t in params],
        [t.flatten(1) for t in views(batch.grads)],
        [t.flatten(1) for t in momenta],
        batch.states,
        batch.variant,
    )
    yield natural
    for own, copies in ((params, natural.params), (momenta, natural.momenta)):
        for view, matrix in zip(own, copies, strict=True):
            view.copy_(matrix.view(view.shape))


def stack_size(count: int, rows: int, cols: int, device: torch.device) -> int:
    """How many matrices to transform at once: what stays in a core's cache, or half a gigabyte."""
    budget = (1 << 20) if device.type == "cpu" else (1 << 29)
    most = LARGEST_STACK if device.type == "cpu" else count
    return max(1, min(count, most, budget // max(1, 4 * rows * cols)))


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(k, R, C) in float32 or float64; not a copy if there is nothing to stack or convert."""
    first = tensors[0]
    stack = first[None] if len(tensors) == 1 else torch.stack(list(tensors))
    return stack.to(compute_dtype(first.dtype))


def transformed(
    space: Workspace, selector: ColumnSelector, tensors: Sequence[Tensor], dim: int
) -> Tensor:
    """S = A Q of every matrix, (k, R, C), in scratch memory that is good until the next call."""
    first = tensors[0]
    if not selector.uses_fft(selector.n, first.device):
        return selector.coefficients(stacked(tensors), dim)
    rows, cols = first.shape
    work = _scratch(space, first, len(tensors), rows, cols, dim)
    torch._foreach_copy_(list(work.unbind(0)), list(tensors))
    return selector.transform_(work, dim)


def expanded(
    space: Workspace, selector: ColumnSelector, low: Tensor, idx: Tensor, dim: int
) -> Tensor:
    """low Pᵀ of every matrix, (k, R, C), in scratch memory that is good until the next call."""
    if not selector.uses_fft(selector.rank, low.device):
        return selector.expand(low, idx, dim=dim)
    rows, cols = low.shape[1:]
    rows, cols = (rows, selector.n) if dim == -1 else (selector.n, cols)
    return selector.expand_into_(_scratch(space, low, len(low), rows, cols, dim), low, idx, dim)


def transform_flops(n: int, rows: int, cols: int) -> float:
    """Floating-point operations of a fast transform of length n there and back."""
    return 10.0 * rows * cols * max(1, n.bit_length())


def _scratch(space: Workspace, like: Tensor, count: int, rows: int, cols: int, dim: int) -> Tensor:
    # Down the columns, rows of a length that is no power of two spare the cache (see dct_).
    pad = 16 if dim == -2 and like.device.type == "cpu" else 0
    shape = (count, rows, cols + pad)
    return space.take("dct", shape, compute_dtype(like.dtype), like.device)[..., :cols]


def _width(group: dict[str, Any], rows: int, cols: int) -> int:
    return cols if projects_right(group, rows, cols) else rows


@lru_cache(maxsize=256)
def _selector(
    n: int, rank: int, basis: str | Callable[[int], Tensor], norm: int, method: str
) -> ColumnSelector:
    return ColumnSelector(n, rank, basis, norm, method)

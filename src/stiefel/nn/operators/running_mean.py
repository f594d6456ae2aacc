"""Means over neighbouring points, at a cost that grows with the logarithm of their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor


def running_mean(
    x: Shaped[Tensor, "*batch_and_grid"], widths: Sequence[int]
) -> Shaped[Tensor, "*batch_and_shorter"]:
    """Means of ``widths`` neighbours along the last axes, only where all of them exist.

    Sums of 2, 4, 8, … neighbours are made of each other: nothing is subtracted, so that precision
    is that of the plain sum.

    Args:
        x: ``[..., *grid]``.
        widths: s per axis of the grid; n points leave n − s + 1.

    Raises:
        ValueError: A width below 1, or more than there are points.
    """
    for dim, width in enumerate(widths, start=-len(widths)):
        if not 1 <= width <= x.shape[dim]:
            raise ValueError(
                f"widths must be 1 to the number of points, got {tuple(widths)} for shape "
                f"{tuple(x.shape)}"
            )
        if width > 1:
            x = _mean(x, dim, width)
    return x


def _mean(x: Tensor, dim: int, width: int) -> Tensor:
    # Tracing cannot follow forward derivatives of one's own.
    if torch.compiler.is_compiling():
        return _sums(x, dim, width) / width
    return _RunningMean.apply(x, dim, width)


class _RunningMean(torch.autograd.Function):
    """Its adjoint is itself on a field with zeros around it; nothing is kept for that."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int, width: int) -> Tensor:
        return _sums(x, dim, width) / width

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        ctx.dim, ctx.width = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ends = [0, 0] * (-ctx.dim - 1) + [ctx.width - 1] * 2
        around = torch.nn.functional.pad(grads[0], ends)
        return _RunningMean.apply(around, ctx.dim, ctx.width), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _RunningMean.apply(tangents[0], ctx.dim, ctx.width)


def _sums(x: Tensor, dim: int, width: int) -> Tensor:
    """Sums of ``width`` neighbours, of the binary digits of the number."""
    count, taken, power = x.shape[dim] - width + 1, 0, 1
    parts = []
    while power <= width:
        if width & power:
            parts.append(x.narrow(dim, taken, count))
            taken += power
        rest = x.shape[dim] - power
        if 2 * power <= width:
            x = x.narrow(dim, 0, rest) + x.narrow(dim, power, rest)
        power *= 2
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total

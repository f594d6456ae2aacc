"""A few coefficients of the Fourier series of a field, and the field of a few coefficients.

Both are linear and each is, up to factors, the adjoint of the other: derivatives are transforms of
the same cost, where the derivative of ``torch.fft.rfftn`` is a complex transform of the whole grid.
Along every axis only the kept frequencies are carried on to the next one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Up to so many frequencies, a quarter of the points at most, the last axis of a real field is
# faster as one matrix product than as a zero-padded transform (measured on a CPU, 32 to 2,048
# points), and has no temporary of the size of the grid.
_FEW = 12
_tables: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}


class Modes(NamedTuple):
    """Which coefficients are kept.

    Attributes:
        counts: Per axis. Frequencies −⌊m/2⌋ … m − ⌊m/2⌋ − 1; of the last axis of a real field
            0 … m − 1, as the others are their conjugates.
        grid: Points per axis.
        real: Whether fields are real.
    """

    counts: tuple[int, ...]
    grid: tuple[int, ...]
    real: bool


def analyze(x: Tensor, modes: Modes) -> Tensor:
    """(1/N) Σ_j x_j e^(−2πi k·j/N) for the kept k, ``[..., *counts]`` of ``[..., *grid]``."""
    # Tracing cannot follow forward derivatives of one's own; it does without the fast ones.
    return _analyze(x, modes) if torch.compiler.is_compiling() else _Analysis.apply(x, modes)


def synthesize(series: Tensor, modes: Modes) -> Tensor:
    """Σ_k c_k e^(2πi k·j/N), the real part of it for real fields, with the grid as one axis.

    Of a real field the terms of −k are added; imaginary parts of the last axis' frequency 0 and
    (N even) N/2 are dropped, whatever the backend of the transform would do with them.
    """
    if torch.compiler.is_compiling():
        return _synthesize(series, modes).flatten(-len(modes.grid))
    return _Synthesis.apply(series, modes)


class _Analysis(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, modes: Modes) -> Tensor:
        return _analyze(x, modes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Modes], output: Tensor) -> None:
        ctx.modes = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x_grad = synthesize(grad * _inverse_weight(grad, ctx.modes), ctx.modes)
        return x_grad.unflatten(-1, ctx.modes.grid), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return analyze(tangents[0], ctx.modes)


class _Synthesis(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(series: Tensor, modes: Modes) -> Tensor:
        y = _synthesize(series, modes)
        # One axis already here, and not as a view: the caller may write into it.
        return torch.ops.aten._unsafe_view(y, [*series.shape[: -len(modes.grid)], -1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Modes], output: Tensor) -> None:
        ctx.modes = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        series = analyze(grad.unflatten(-1, ctx.modes.grid), ctx.modes)
        return series / _inverse_weight(series, ctx.modes), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return synthesize(tangents[0], ctx.modes)


def _inverse_weight(series: Tensor, modes: Modes) -> Tensor:
    """1/(N w_k): w_k is 2 for a frequency of a real field that stands for −k as well, else 1."""
    points, kept, n = math.prod(modes.grid), modes.counts[-1], modes.grid[-1]
    weight = torch.full((kept,), 1 / points, dtype=series.real.dtype, device=series.device)
    if modes.real:
        weight[1 : (n + 1) // 2] /= 2
    return weight


def _analyze(x: Tensor, modes: Modes) -> Tensor:
    axes = list(range(-len(modes.grid), 0))
    if modes.real:
        last = axes.pop()
        x = torch.fft.rfft(x, dim=last, norm="forward").narrow(last, 0, modes.counts[last])
    for axis in reversed(axes):
        x = torch.fft.fft(x, dim=axis, norm="forward")
        kept, n = modes.counts[axis], modes.grid[axis]
        low = kept // 2
        if kept < n:
            x = torch.cat((x.narrow(axis, n - low, low), x.narrow(axis, 0, kept - low)), axis)
        else:
            x = x.roll(low, axis)
    return x


def _synthesize(series: Tensor, modes: Modes) -> Tensor:
    axes = list(range(-len(modes.grid), 0))
    if modes.real:
        axes.pop()
    for axis in axes:
        kept, n = modes.counts[axis], modes.grid[axis]
        low = kept // 2
        negative, positive = series.narrow(axis, 0, low), series.narrow(axis, low, kept - low)
        shape = list(series.shape)
        shape[axis] = n - kept
        # Frequency 0 first, then the others in rising order, as the inverse transform takes them.
        placed = torch.cat((positive, series.new_zeros(shape), negative), axis)
        series = torch.fft.ifft(placed, dim=axis, norm="forward")
    if not modes.real:
        return series
    n, kept = modes.grid[-1], series.shape[-1]
    if kept <= _FEW and 4 * kept <= n:
        pairs = torch.view_as_real(series.resolve_conj()).flatten(-2)
        return pairs @ _table(kept, n, pairs)
    # c2r transforms are defined for these being real only.
    alone = [0, n // 2] if 2 * (kept - 1) == n and n > 1 else [0]
    series = series.clone()
    for k in alone:
        series.select(-1, k).imag.zero_()
    return torch.fft.irfft(series, n=n, dim=-1, norm="forward")


def refit(series: Tensor, modes: Modes, grid: tuple[int, ...]) -> tuple[Tensor, Modes]:
    """Coefficients for another grid, so that the same function is sampled there.

    Frequencies that the new grid cannot hold are dropped. N/2 of an even number of points stands
    for both signs: half for each on a finer grid; and on a coarser one both fall on it.
    """
    counts = list(modes.counts)
    for axis, (old, new) in enumerate(zip(modes.grid, grid, strict=True)):
        if old == new:
            continue
        dim = axis - len(grid)
        if modes.real and axis == len(grid) - 1:
            series = _refit_one_sided(series, old, new)
        else:
            series = _refit_both_sides(series, dim, old, new)
        counts[axis] = series.shape[dim]
    return series, Modes(tuple(counts), grid, modes.real)


def _refit_one_sided(series: Tensor, old: int, new: int) -> Tensor:
    """0 … m − 1, the last axis of a real field."""
    keep = min(series.shape[-1], new // 2 + 1)
    factor = torch.ones(keep, dtype=series.real.dtype, device=series.device)
    if 2 * (keep - 1) == min(old, new):
        factor[-1] = 0.5 if new > old else 2.0
    return series[..., :keep] * factor


def _refit_both_sides(series: Tensor, dim: int, old: int, new: int) -> Tensor:
    """−⌊m/2⌋ … in rising order."""
    kept = series.shape[dim]
    low, high = kept // 2, kept - kept // 2 - 1
    if new > old:
        if kept < old or old % 2 or kept == 1:
            return series
        edge = series.narrow(dim, 0, 1) / 2
        return torch.cat((edge, series.narrow(dim, 1, kept - 1), edge), dim)
    if new // 2 > low or (new // 2 == low and new % 2):
        return series
    inside = (new - 1) // 2
    first = min(inside, low)
    middle = series.narrow(dim, low - first, first + min(inside, high) + 1)
    if new % 2:
        return middle
    edge = series.narrow(dim, low - new // 2, 1)
    if high >= new // 2:
        edge = edge + series.narrow(dim, low + new // 2, 1)
    return torch.cat((edge, middle), dim)


def _table(kept: int, n: int, like: Tensor) -> Tensor:
    """``[2 kept, n]``: rows w_k cos(2πkj/n) and −w_k sin(2πkj/n) in turn; w₀ = 1, w_k = 2."""
    key = (kept, n, like.dtype, like.device)
    # What tracing sees must not stay, nor be met by what stayed.
    plain = type(like) is Tensor and not torch.compiler.is_compiling()
    if plain and key in _tables:
        return _tables[key]
    k = torch.arange(kept, device=like.device)[:, None]
    # Whole turns are taken off in integers: large products would lose digits.
    angle = (k * torch.arange(n, device=like.device) % n).double() * (2 * math.pi / n)
    table = torch.stack((angle.cos(), -angle.sin()), dim=1) * (k.clamp(max=1) + 1)[..., None]
    table = table.flatten(0, 1).to(like.dtype)
    if plain and type(table) is Tensor:
        if len(_tables) >= 64:
            _tables.clear()
        _tables[key] = table
    return table

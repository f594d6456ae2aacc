"""The same function on another grid: by its Fourier series, or linearly between its samples.

Source: sheet of arXiv 2506.10973, "Fourier resampling"; strides and pooling of a network on
functions become this.
"""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor

from stiefel.linalg.autocast import without_autocast
from stiefel.nn.operators.checks import Sizes, check_numeric, chosen, sizes, working

MODES = ("fourier", "linear")


def resample(
    x: Shaped[Tensor, "batch channels *grid"],
    shape: Sizes,
    mode: str = "fourier",
    *,
    periodic: bool = True,
) -> Shaped[Tensor, "batch channels *other"]:
    """Samples of the same function on a grid of another ``shape``.

    Periodic grids are the points j/N, without the end point: every second sample of a grid of
    2N points is the grid of N points, and nothing is shifted by half a cell, as
    ``torch.nn.functional.interpolate`` would.

    Args:
        x: ``[batch, channels, *grid]``, real or complex; half types are computed in float32.
        shape: New sizes, one per grid axis; one integer for all of them.
        mode: ``"fourier"`` evaluates the trigonometric interpolant, dropping the frequencies that
            the new grid cannot hold; exact for band-limited functions. ``"linear"`` interpolates
            between neighbours and, going down, picks values without filtering.
        periodic: False for grids that hold both end points, as ``torch.linspace``; only for
            ``"linear"``.

    Returns:
        ``[batch, channels, *shape]`` of the dtype of ``x``; ``x`` itself where nothing changes.

    Raises:
        TypeError: Integers, or sizes that are not integers.
        ValueError: No grid axis, sizes below 1, an unknown mode, or ``"fourier"`` without period.
    """
    check_numeric(x, "x")
    if x.ndim < 3:
        raise ValueError(f"x must be [batch, channels, *grid], got shape {tuple(x.shape)}")
    chosen(mode, MODES, "mode")
    if mode == "fourier" and not periodic:
        raise ValueError(
            'mode="fourier" needs a periodic function; use mode="linear" for other boundaries'
        )
    target = sizes(shape, x.ndim - 2, "shape")
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have at least one point per axis, got shape {tuple(x.shape)}")
    if tuple(x.shape[2:]) == target:
        return x
    # Axes that shrink come first: what follows has less to do.
    order = sorted(range(len(target)), key=lambda i: target[i] / x.shape[2 + i])
    with without_autocast(x):
        y = working(x)
        for axis in order:
            if target[axis] == y.shape[2 + axis]:
                continue
            if mode == "fourier":
                y = _fourier(y, target[axis], 2 + axis)
            else:
                y = _linear(y, target[axis], 2 + axis, periodic)
        return y.to(x.dtype)


def _fourier(x: Tensor, size: int, dim: int) -> Tensor:
    """One axis. The bin at half the smaller size stands for +k and −k at once."""
    old, least = x.shape[dim], min(x.shape[dim], size)
    real = not x.is_complex()
    half = least // 2
    # norm="forward": coefficients of the series, which do not know how many samples there were.
    if real:
        series = torch.fft.rfft(x, dim=dim, norm="forward")
        kept = series.narrow(dim, 0, half + 1)
        if least % 2 == 0:
            edge = kept.narrow(dim, half, 1)
            # Up: half of the bin goes to +k, half to −k. Down: both aliases add up, a real number.
            edge = edge / 2 if size > old else torch.complex(2 * edge.real, 0 * edge.real)
            kept = torch.cat((kept.narrow(dim, 0, half), edge), dim)
        return torch.fft.irfft(kept, n=size, dim=dim, norm="forward")
    series = torch.fft.fft(x, dim=dim, norm="forward")
    odd = (least - 1) // 2
    positive = series.narrow(dim, 0, odd + 1)
    negative = series.narrow(dim, old - odd, odd)
    if least % 2:
        middle = []
        gap = size - least
    elif size > old:
        edge = series.narrow(dim, half, 1) / 2
        middle, gap = [edge], size - least - 1
        negative = torch.cat((edge, negative), dim)
    else:
        edge = series.narrow(dim, half, 1) + series.narrow(dim, old - half, 1)
        middle, gap = [edge], 0
    shape = list(x.shape)
    shape[dim] = gap
    whole = torch.cat((positive, *middle, series.new_zeros(shape), negative), dim)
    return torch.fft.ifft(whole, dim=dim, norm="forward")


def _linear(x: Tensor, size: int, dim: int, periodic: bool) -> Tensor:
    """One axis; positions are exact fractions, so that common points are copied."""
    old = x.shape[dim]
    steps = torch.arange(size, device=x.device)
    if periodic:
        top, bottom = steps * old, size
    else:
        top, bottom = steps * (old - 1), max(size - 1, 1)
    left = torch.div(top, bottom, rounding_mode="floor")
    part = ((top - left * bottom).to(torch.float64) / bottom).to(x.real.dtype)
    right = (left + 1) % old if periodic else (left + 1).clamp(max=old - 1)
    part = part.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    return torch.lerp(x.index_select(dim, left), x.index_select(dim, right), part.to(x.dtype))

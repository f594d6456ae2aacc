"""Taps of a kernel that is a function of the physical offset, on any spacing.

Source: sheet of arXiv 2506.10973, "Fixed-receptive-field conv".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from stiefel.linalg.autocast import without_autocast
from stiefel.nn.operators.checks import positive, working

Ratios = float | int | Iterable[float | int]


def hat_taps(weight: Shaped[Tensor, "*kernel"], ratio: Ratios) -> Shaped[Tensor, "*taps"]:
    """Taps of the kernel (1/h₀) Σ_m W_m Λ(δ/h₀ − m) on the spacing h₀/r, axis by axis.

    Λ(t) = max(0, 1 − |t|). With k = 2p + 1 taps in an axis,

        r > 1:  K_j = (1/r) Σ_m W_m Λ(j/r − m),  |j| ≤ ⌈(p + 1) r⌉ − 1
        r = 1:  K = W
        r < 1:  K_j = Σ_m W_m Λ(j − r m),        |j| ≤ max(1, ⌈(p + 1) r⌉ − 1)

    where the share of every W_m is scaled so that it is W_m in total: a no-op for whole r > 1, and
    it makes Σ K = Σ W, so that constants pass unchanged, for every r.

    Args:
        weight: ``[out, in, *k]``, or ``[k]``; k odd in every axis with r ≠ 1.
        ratio: r = N / N_base, one for all kernel axes, or one for each of the last axes.

    Returns:
        ``[out, in, *k']`` of the dtype of ``weight``, differentiable in it; ``weight`` itself at 1.

    Raises:
        ValueError: Even k (it has no centre tap), r not positive, too many ratios.
    """
    ratios = _per_axis(weight, ratio)
    if all(r == 1 for r in ratios):
        return weight
    with without_autocast(weight):
        taps = working(weight)
        for axis, r in enumerate(ratios, start=weight.ndim - len(ratios)):
            if r != 1:
                shares = torch.tensor(_shares(weight.shape[axis], r), dtype=torch.float64)
                shares = shares.to(device=taps.device, dtype=taps.dtype)
                taps = (taps.movedim(axis, -1) @ shares.mT).movedim(-1, axis)
        return taps.to(weight.dtype)


def official_taps(weight: Shaped[Tensor, "*kernel"], ratio: Ratios) -> Shaped[Tensor, "*taps"]:
    """Taps as in the authors' code: resized (bi)linearly to ⌊r k − r + 1⌋ points, then averaged.

    Samples count as centres of cells (``align_corners=False``); the sum is divided by new size over
    old size in each axis and is not kept. Up to three axes.

    Args:
        weight: ``[out, in, *k]``, or ``[k]``.
        ratio: As in :func:`hat_taps`.

    Raises:
        ValueError: r not positive, too many ratios, more than three of them.
    """
    ratios = _per_axis(weight, ratio)
    if len(ratios) > 3:
        raise ValueError(f"official_taps resizes at most three axes, got ratio={ratio!r}")
    if all(r == 1 for r in ratios):
        return weight
    old = weight.shape[weight.ndim - len(ratios) :]
    new = [int(r * k - r + 1) for r, k in zip(ratios, old, strict=True)]
    kernels = working(weight).reshape(1, -1, *old)
    mode = ("linear", "bilinear", "trilinear")[len(ratios) - 1]
    with without_autocast(weight):
        taps = nn.functional.interpolate(kernels, size=new, mode=mode, align_corners=False)
        taps = taps * (math.prod(old) / math.prod(new))
    return taps.reshape(*weight.shape[: weight.ndim - len(ratios)], *new).to(weight.dtype)


def tap_reach(kernel_size: int, ratio: float | int) -> int:
    """J: taps of :func:`hat_taps` are at −J … J."""
    half = kernel_size // 2
    if ratio == 1:
        return half
    # Rounded first: (p + 1) r is a whole number for whole sizes, up to the rounding of r.
    reach = math.ceil(round((half + 1) * ratio, 9)) - 1
    return reach if ratio > 1 else max(1, reach)


def _per_axis(weight: Tensor, ratio: Ratios) -> tuple[float, ...]:
    if isinstance(ratio, Iterable):
        found = tuple(positive(r, "ratio") for r in ratio)
    else:
        found = (positive(ratio, "ratio"),) * max(1, weight.ndim - 2)
    if not 1 <= len(found) <= weight.ndim:
        raise ValueError(
            f"ratio must be one number, or one for each kernel axis of weight with shape "
            f"{tuple(weight.shape)}, got {ratio!r}"
        )
    return found


@lru_cache(maxsize=256)
def _shares(kernel_size: int, ratio: float) -> tuple[tuple[float, ...], ...]:
    """``[2J + 1, k]``: how much of each tap goes to each new one; every column adds to 1."""
    if kernel_size % 2 == 0:
        raise ValueError(
            f"weight must have an odd number of taps in every axis that is resized, got "
            f"{kernel_size}: an even kernel has no centre tap; pad it to {kernel_size + 1} or use "
            'interpolation="official"'
        )
    reach, half = tap_reach(kernel_size, ratio), kernel_size // 2
    rows = range(-reach, reach + 1)
    at = (lambda j, m: j / ratio - m) if ratio > 1 else (lambda j, m: j - ratio * m)
    table = [[max(0.0, 1 - abs(at(j, m))) for m in range(-half, half + 1)] for j in rows]
    total = [sum(column) for column in zip(*table, strict=True)]
    return tuple(tuple(v / t for v, t in zip(row, total, strict=True)) for row in table)

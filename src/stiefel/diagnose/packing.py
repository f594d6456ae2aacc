"""Codes on the sphere: as many directions as asked for, with the largest overlap made small.

Source: arXiv 2606.02765, section 3 (the optimised sweep and the fits); the schedule is our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.diagnose.capacity import FORMS

# Exponent of the norm that stands for the maximum, growing along the run; first step in radians.
_POWERS, _RATE = (4.0, 128.0), 0.1
_HEAVY_BALL, _SECOND = 0.9, 0.99


def pack_directions(
    k: int,
    d: int,
    steps: int = 300,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    report: Callable[[float], None] | None = None,
) -> tuple[Float[Tensor, "k d"], float]:
    """Spread k unit vectors in d dimensions; returns them and their largest \\|cosine\\|.

    Descends log Σ |G_ij|^p on the sphere, p from 4 to 128, with one step size for all and a cosine
    schedule, and keeps the best seen. Memory k² numbers.

    Args:
        k: Directions, at least 2.
        d: Dimensions, at least 2 (in one there is nothing to turn).
        steps: Of the descent.
        seed: Of the Gaussian start.
        dtype: float32 or float64.
        report: Called now and then with the part done.

    Raises:
        ValueError: k < 2, d < 2, fewer than two steps.
    """
    for name, value, least in (("k", k, 2), ("d", d, 2), ("steps", steps, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    generator = torch.Generator().manual_seed(seed)
    u = torch.nn.functional.normalize(torch.randn(k, d, generator=generator, dtype=dtype))
    first, second = torch.zeros_like(u), torch.zeros_like(u)
    best, best_u = math.inf, u
    for step in range(steps):
        part = step / (steps - 1)
        power = _POWERS[0] * (_POWERS[1] / _POWERS[0]) ** part
        gram = u @ u.T
        gram.fill_diagonal_(0)
        size = gram.abs()
        largest = size.max()
        if float(largest) < best:
            best, best_u = float(largest), u
        size /= largest
        # |G|^(p−1) / Σ |G|^p with everything in units of the largest, so that nothing overflows.
        pull = size.pow(power - 1)
        pull *= gram.sign_()
        gradient = (2 * k / (pull.abs() * size).sum()) * (pull @ u)
        gradient -= (gradient * u).sum(1, keepdim=True) * u
        first.mul_(_HEAVY_BALL).add_(gradient, alpha=1 - _HEAVY_BALL)
        second.mul_(_SECOND).addcmul_(gradient, gradient, value=1 - _SECOND)
        scale = (second / (1 - _SECOND ** (step + 1))).sqrt_().mean() * math.sqrt(d)
        rate = _RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        move = first / ((1 - _HEAVY_BALL ** (step + 1)) * scale.clamp_min(1e-30))
        u = torch.nn.functional.normalize(u - rate * move)
        if report is not None and step % 20 == 0:
            report(step / steps)
    overlap = u @ u.T
    overlap.fill_diagonal_(0)
    last = float(overlap.abs().max())
    return (u, last) if last < best else (best_u, best)


class CapacityFit(NamedTuple):
    """A capacity formula fitted to measured overlaps.

    Attributes:
        params: ``(C,)``, or ``(C, a, b, c)`` of the full form.
        r2: Part of the variance of ε that is explained.
        mape: Mean |error| / ε, in per cent, over all cells.
        mape_above: The same over cells with k > d only: the others are orthonormal up to the
            optimiser's patience, so that relative errors there mean nothing.
        n_excluded: Cells with k ≤ d.
    """

    params: tuple[float, ...]
    r2: float
    mape: float
    mape_above: float
    n_excluded: int


def fit_capacity(
    k: Sequence[float | int],
    d: Sequence[float | int],
    eps: Sequence[float | int],
    form: str = "ratio",
) -> CapacityFit:
    """Least squares on ε (not its logarithm), as the paper fits; 0 is predicted where k ≤ d.

    Args:
        k: Directions per cell.
        d: Dimensions per cell.
        eps: Largest overlap found.
        form: ``"jl"``, ``"ratio"`` or ``"full"``.

    Raises:
        ValueError: lengths differ, fewer cells than parameters, ε not positive, another form.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    import numpy as np
    from scipy.optimize import curve_fit

    ks, ds, found = (np.asarray(v, np.float64) for v in (k, d, eps))
    if not ks.shape == ds.shape == found.shape or ks.ndim != 1:
        raise ValueError(f"k, d and eps must be as long, got {ks.shape}, {ds.shape}, {found.shape}")
    count = 4 if form == "full" else 1
    if len(ks) < count:
        raise ValueError(f"{count} cells or more are needed, got {len(ks)}")
    if not (found > 0).all() or not (ks >= 2).all() or not (ds >= 1).all():
        raise ValueError("eps must be positive, k at least 2 and d at least 1")

    def predict(cells, c, a=1.0, b=1.0, power=1.0):
        n, dim = cells
        ratio = np.log(n) if form == "jl" else a * np.log(n) - np.log(dim)
        return np.sqrt(c * np.maximum(ratio, 0.0) ** b / dim**power)

    if form == "full":
        start, bounds = (0.5, 1.0, 1.4, 1.0), ([0.0, 0.1, 0.1, 0.1], [10.0, 3.0, 3.0, 3.0])
    else:
        start, bounds = (1.0,), ([0.0], [100.0])
    params = curve_fit(
        lambda cells, *p: predict(cells, *p), (ks, ds), found, p0=start, bounds=bounds
    )[0]
    residual = predict((ks, ds), *params) - found
    above = ks > ds
    relative = 100 * np.abs(residual) / found
    spread = ((found - found.mean()) ** 2).sum()
    return CapacityFit(
        params=tuple(float(p) for p in params),
        r2=float(1 - (residual**2).sum() / spread) if spread > 0 else math.nan,
        mape=float(relative.mean()),
        mape_above=float(relative[above].mean()) if above.any() else math.nan,
        n_excluded=int((~above).sum()),
    )

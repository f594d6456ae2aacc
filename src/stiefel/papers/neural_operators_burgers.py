"""Viscous Burgers' equation on the unit circle: the data of the card of neural operators.

u_t + u u_x = ν u_xx with period 1, by Fourier collocation with the 2/3 rule in space and the
integrating-factor Runge–Kutta method of fourth order in time. All trajectories advance together.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

VISCOSITY = 0.01
END = 1.0
# Initial values: √2 Σ_k s_k (a_k cos 2πkx + b_k sin 2πkx), s_k = 25 / ((2πk)² + 25), with a and b
# standard normal.
MODES, SCALE = 64, 25.0

Real = NDArray[np.floating[Any]]


def initial_values(count: int, points: int, rng: np.random.Generator) -> Real:
    """``count`` smooth random functions ``[count, points]`` at x_j = j / points, float64.

    The draws do not depend on ``points``: the same generator gives the same functions on any grid.

    Raises:
        ValueError: fewer than 2 · 64 points, on which the functions would alias.
    """
    if points < 2 * MODES + 1:
        raise ValueError(f"points must be above {2 * MODES} for {MODES} modes, got {points}")
    k = np.arange(1, MODES + 1)
    size = math.sqrt(2) * SCALE / ((2 * math.pi * k) ** 2 + SCALE)
    a, b = rng.standard_normal((2, count, MODES))
    spectrum = np.zeros((count, points // 2 + 1), complex)
    spectrum[:, 1 : MODES + 1] = points / 2 * size * (a - 1j * b)
    return np.fft.irfft(spectrum, n=points)


def solve(u0: Real, *, viscosity: float = VISCOSITY, end: float = END, steps: int = 300) -> Real:
    """u(·, end) of every row of ``u0`` ``[count, points]``, on the same points.

    Args:
        u0: Real values at x_j = j / points.
        viscosity: ν > 0, in units of length² per time with the circle of length 1.
        end: > 0.
        steps: ≥ 1, of equal length; the error falls with its fourth power.

    Raises:
        ValueError: ``u0`` has not two axes, is empty or not finite; an argument is out of range.
        FloatingPointError: the solution blew up: too few steps.
    """
    u0 = np.asarray(u0, float)
    if u0.ndim != 2 or not u0.size:
        raise ValueError(f"u0 must be [count, points], got shape {u0.shape}")
    if not np.isfinite(u0).all():
        raise ValueError("u0 must be finite, but holds NaN or infinities")
    if not (viscosity > 0 and end > 0 and steps >= 1):
        raise ValueError(
            f"viscosity and end must be > 0 and steps ≥ 1, got {viscosity}, {end} and {steps}"
        )
    points, dt = u0.shape[1], end / steps
    k = 2 * math.pi * np.arange(points // 2 + 1)
    half = np.exp(-viscosity * k**2 * dt / 2)
    whole = half**2
    kept = np.arange(len(k)) <= points // 3
    slope = np.where(kept, -0.5j * k * dt, 0)

    def advect(v: NDArray[Any]) -> NDArray[Any]:
        """dt times the transform of −(u²/2)_x."""
        return slope * np.fft.rfft(np.fft.irfft(v, n=points) ** 2)

    v = np.fft.rfft(u0) * kept
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(steps):
            a = advect(v)
            b = advect(half * (v + a / 2))
            c = advect(half * v + b / 2)
            d = advect(whole * v + half * c)
            v = whole * v + (whole * a + 2 * half * (b + c) + d) / 6
    if not np.isfinite(v).all():
        raise FloatingPointError(f"the solution blew up within {steps} steps: take more of them")
    return np.fft.irfft(v, n=points)


def trajectories(
    count: int, seed: int, *, points: int = 512, steps: int = 300
) -> tuple[Real, Real]:
    """Initial and final values of ``count`` random trajectories, each ``[count, points]``."""
    u0 = initial_values(count, points, np.random.default_rng(seed))
    return u0, solve(u0, steps=steps)

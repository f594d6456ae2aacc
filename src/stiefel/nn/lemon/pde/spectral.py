"""Solvers in Fourier space: exact ones, integrating factor with RK4, kick–drift–kick.

Every solver takes float64 fields ``[n, N]`` and gives ``[n, times, N]``. Times start at 0, are in
the equation's own units (before relabelling) and, for the stepping solvers, equidistant.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from stiefel.nn.lemon.pde.grid import Grid, all_modes

Nonlinear = Callable[[Tensor], Tensor]
"""Spectrum of the state to spectrum of the nonlinear part, both ``[n, modes]``."""


def exact_first_order(
    initial: Float[Tensor, "n points"],
    symbol: Callable[[Tensor], Tensor],
    times: Float[Tensor, " times"],
) -> Float[Tensor, "n times points"]:
    """û(k, t) = e^{ℓ(k) t} û(k, 0): heat, advection, linear reaction.

    Args:
        initial: Fields at time 0.
        symbol: ℓ of wave numbers ``[modes]``, ``[n, modes]``.
        times: Any times.
    """
    spectrum, k = all_modes(initial)
    growth = _for_distinct(symbol(k), lambda rates: torch.exp(rates * times[:, None]))
    return torch.fft.irfft(growth * spectrum[:, None], n=initial.shape[-1])


def exact_second_order(
    initial: Float[Tensor, "n points"],
    frequency: Callable[[Tensor], Tensor],
    times: Float[Tensor, " times"],
) -> Float[Tensor, "n times points"]:
    """û(k, t) = cos(ω(k) t) û(k, 0) from rest: wave and Klein–Gordon.

    Args:
        initial: Fields at time 0; their time derivative is zero.
        frequency: ω ≥ 0 of wave numbers ``[modes]``, ``[n, modes]``.
        times: Any times.
    """
    spectrum, k = all_modes(initial)
    swing = _for_distinct(frequency(k), lambda rates: torch.cos(rates * times[:, None]))
    return torch.fft.irfft(swing * spectrum[:, None], n=initial.shape[-1])


def _for_distinct(rows: Tensor, table: Callable[[Tensor], Tensor]) -> Tensor:
    """``table`` of every row ``[n, 1, modes]``, computed once where consecutive rows are equal."""
    starts = (rows[1:] != rows[:-1]).any(-1)
    group = torch.cat([starts.new_zeros(1), starts]).cumsum(0)
    first = torch.cat([starts.new_ones(1), starts])
    values = table(rows[first][:, None])
    return values if len(values) == 1 else values[group]


def step_count(times: Tensor, longest: float | int) -> tuple[int, float]:
    """Steps between two outputs, none longer than ``longest``, and their length."""
    if len(times) < 2:
        return 1, longest
    gap = float(times[1] - times[0])
    steps = max(1, math.ceil(gap / longest * (1 - 1e-9)))
    return steps, gap / steps


def check_damping(linear: Tensor, k: Tensor) -> None:
    """Refuse a linear part that grows at the shortest waves: e^{ℓt} would overflow.

    Raises:
        ValueError: Re ℓ at the largest wave number is positive and above that of the mean.
    """
    real = linear.real if linear.is_complex() else linear
    growing = real[..., -1] > real[..., 0].clamp_min(0) + 1e-12
    if bool(growing.any()):
        raise ValueError(
            f"the linear part grows at wave number {float(k[-1]):.0f}: a viscosity is negative, "
            "or the grid is too coarse for the term that damps; such an equation is ill-posed"
        )


def integrating_factor(
    initial: Float[Tensor, "n points"],
    grid: Grid,
    linear: Inexact[Tensor, "rows modes"],
    nonlinear: Nonlinear,
    times: Float[Tensor, " times"],
    longest: float | int,
) -> Float[Tensor, "n times points"]:
    """û_t = ℓ û + N(û): the linear part exactly, RK4 for e^{−ℓt} û, 2/3 rule.

    Args:
        initial: Fields at time 0; only their modes below N/3 go on.
        grid: Of the fields.
        linear: ℓ, ``[n or 1, modes]``.
        nonlinear: N.
        times: Equidistant, from 0.
        longest: Longest step.

    Raises:
        ValueError: ℓ grows at short waves, see :func:`check_damping`.
    """
    check_damping(linear, grid.k)
    steps, dt = step_count(times, longest)
    half = torch.exp(linear * (dt / 2)).to(torch.complex128)
    into_b, into_d = half * (dt / 2), half * dt  # constants of the steps, each used once a step
    from_a, from_bc = half * half * (dt / 6), half * (dt / 3)
    state = grid.spectrum(initial)
    kept = [state]
    for _ in range(len(times) - 1):
        for _ in range(steps):
            a = nonlinear(state)
            moved = half * state
            b = nonlinear(torch.addcmul(moved, into_b, a))
            c = nonlinear(torch.add(moved, b, alpha=dt / 2))
            across = moved.mul_(half)
            d = nonlinear(torch.addcmul(across, into_d, c))
            state = across.addcmul_(from_bc, c.add_(b)).addcmul_(from_a, a).add_(d, alpha=dt / 6)
        kept.append(state)
    return grid.field(torch.stack(kept, 1))


def kick_drift_kick(
    initial: Float[Tensor, "n points"],
    grid: Grid,
    squared_frequency: Float[Tensor, "rows modes"],
    force: Nonlinear | None,
    times: Float[Tensor, " times"],
    longest: float | int,
    velocity: Float[Tensor, "n points"] | None = None,
) -> Float[Tensor, "n times points"]:
    """û_tt = −ω² û + F(û), Strang: half a kick by F, the linear wave exactly, half a kick.

    Args:
        initial: Fields at time 0.
        grid: Of the fields.
        squared_frequency: ω², ``[n or 1, modes]``.
        force: F; ``None``: a linear equation, solved exactly.
        times: Equidistant, from 0.
        longest: Longest step.
        velocity: u_t at time 0, at rest unless told.

    Raises:
        ValueError: ω² is negative somewhere: waves would grow without bound.
    """
    if bool((squared_frequency < 0).any()):
        raise ValueError(
            "ω² of the linear part must not be negative: the equation is ill-posed "
            "(is the sign of uxx right?)"
        )
    steps, dt = step_count(times, longest) if force else step_count(times, math.inf)
    omega = squared_frequency.sqrt()
    cos = torch.cos(omega * dt)
    sin_over = dt * torch.sinc(omega * (dt / math.pi))  # sin(ωdt)/ω, dt at ω = 0
    minus_sin = -omega * torch.sin(omega * dt)
    u = grid.spectrum(initial)
    v = torch.zeros_like(u) if velocity is None else grid.spectrum(velocity)
    kept = [u]
    push = force(u) * (dt / 2) if force else None
    for _ in range(len(times) - 1):
        for _ in range(steps):
            if push is not None:
                v = v + push
            u, v = cos * u + sin_over * v, minus_sin * u + cos * v
            if force:
                push = force(u) * (dt / 2)
                v = v + push
        kept.append(u)
    return grid.field(torch.stack(kept, 1))

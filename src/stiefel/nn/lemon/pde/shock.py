"""Conservation laws with shocks: finite volumes that create no new extrema.

MUSCL reconstruction with the monotonised central limiter (van Leer 1977), local Lax–Friedrichs
fluxes, SSP-RK3 in time (Shu and Osher 1988), steps of 0.4 of the time a wave needs for a cell.
Second order where the solution is smooth, total variation never grows, shocks move at the right
speed because the scheme is conservative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from stiefel.nn.lemon.pde.grid import LENGTH
from stiefel.nn.lemon.pde.spectral import step_count

COURANT = 0.4
"""Part of a cell that the fastest wave crosses in a step; TVD needs at most ½ here."""


@dataclass(frozen=True)
class Flux:
    """f of u_t + k ∂ₓf(u) = …, and what the solvers need to know about it on [0, 1]."""

    value: Callable[[Tensor], Tensor]
    speed: Callable[[Tensor], Tensor]
    """f′."""
    advection: str
    """k ∂ₓf(u) as text with ``u``, ``ux`` and the coefficient ``k``, with its sign."""
    convex: bool
    """f″ ≥ 0 on [0, 1]; else f″ ≤ 0 there."""


FLUXES = {
    "burgers": Flux(lambda u: u * u / 2, lambda u: u, "+ k*u*ux", True),
    "cubic_flux": Flux(lambda u: u * u * u / 3, lambda u: u * u, "+ k*u**2*ux", True),
    "sin_flux": Flux(torch.sin, torch.cos, "+ k*cos(u)*ux", False),
    "cos_flux": Flux(torch.cos, lambda u: -torch.sin(u), "- k*sin(u)*ux", False),
}
"""The four fluxes of the paper."""


def finite_volume(
    initial: Float[Tensor, "n cells"],
    flux: Flux,
    strength: Float[Tensor, "n 1"],
    times: Float[Tensor, " times"],
    *,
    viscosity: Float[Tensor, "n 1"] | None = None,
    periodic: bool = True,
) -> Float[Tensor, "n times cells"]:
    """u_t + k ∂ₓf(u) = d u_xx on cells of [0, 2), cell averages in, cell averages out.

    Args:
        initial: Averages at time 0.
        flux: f.
        strength: k of every sample.
        times: Equidistant, from 0.
        viscosity: d of every sample, none unless told.
        periodic: Else what leaves or enters is a copy of the outermost cell.

    Raises:
        ValueError: a negative viscosity.
    """
    if viscosity is not None and bool((viscosity < 0).any()):
        raise ValueError("viscosity must not be negative: the equation would be ill-posed")
    dx = LENGTH / initial.shape[-1]
    # No new extrema appear, so the speeds of the first values bound all later ones.
    low, high = initial.min(), initial.max()
    span = low + (high - low) * torch.linspace(0, 1, 101, dtype=initial.dtype).to(initial.device)
    fastest = float((flux.speed(span).abs().max() * strength.abs()).max())
    rate = fastest / dx / COURANT
    if viscosity is not None:
        rate += float(viscosity.max()) * 2 / dx**2
    steps, dt = step_count(times, 1 / max(rate, 1e-12))
    mode = "circular" if periodic else "replicate"

    def change(u: Tensor) -> Tensor:
        padded = pad(u, (2, 2), mode)
        half = limited_slope(padded) / 2
        left = (padded[:, 1:-1] + half)[:, :-1]
        right = (padded[:, 1:-1] - half)[:, 1:]
        wave = torch.maximum(flux.speed(left).abs(), flux.speed(right).abs())
        through = (flux.value(left) + flux.value(right) - wave * (right - left)) * (strength / 2)
        if viscosity is not None:
            through = through - viscosity * (padded[:, 2:-1] - padded[:, 1:-2]) / dx
        return (through[:, :-1] - through[:, 1:]) / dx

    u, kept = initial, [initial]
    for _ in range(len(times) - 1):
        for _ in range(steps):
            a = u + dt * change(u)
            b = 0.75 * u + 0.25 * (a + dt * change(a))
            u = u / 3 + 2 / 3 * (b + dt * change(b))
        kept.append(u)
    return torch.stack(kept, 1)


def limited_slope(padded: Tensor) -> Tensor:
    """Difference over a cell of ``[n, cells + 2]`` values: central, at most twice either side's.

    Zero at extrema (monotonised central limiter).
    """
    step = padded[:, 1:] - padded[:, :-1]
    back, ahead = step[:, :-1], step[:, 1:]
    side = 2 * torch.minimum(back.abs(), ahead.abs())
    central = (back + ahead) / 2
    same = (back * ahead > 0).to(padded.dtype)
    return same * torch.clamp(central, -side, side)

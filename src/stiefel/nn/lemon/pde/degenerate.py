"""The porous-medium equation: conservative differences, stabilised steps for stiff diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.nn.lemon.pde.grid import LENGTH
from stiefel.nn.lemon.pde.spectral import step_count

_OUTER_STEPS = 256
"""Of the whole time: at least so many steps of the stabilised method, for its accuracy."""


def porous_medium(
    initial: Float[Tensor, "n cells"],
    power: Float[Tensor, "n 1"],
    times: Float[Tensor, " times"],
) -> Float[Tensor, "n times cells"]:
    """u_t = (u^m)_xx, periodic: three-point differences of u^m, RKL2 steps.

    Second order; mass is conserved to rounding. RKL2 (Meyer, Balsara, Aslam 2014) covers
    (s² + s − 2)/4 explicit steps with s evaluations.

    Args:
        initial: Not negative.
        power: m of every sample, above 1.
        times: Equidistant, from 0.

    Raises:
        ValueError: negative values or m ≤ 1.
    """
    if bool((initial < 0).any()):
        raise ValueError("initial values of the porous-medium equation must not be negative")
    if bool((power <= 1).any()):
        raise ValueError("the power m of the porous-medium equation must be above 1")
    dx = LENGTH / initial.shape[-1]

    def change(u: Tensor) -> Tensor:
        w = u * u.abs() ** (power - 1)
        return (w.roll(1, -1) - 2 * w + w.roll(-1, -1)) / dx**2

    diffusivity = float((power * initial.amax(-1, keepdim=True) ** (power - 1)).max())
    explicit = dx**2 / (2 * diffusivity)
    steps, dt = step_count(times, float(times[-1]) / _OUTER_STEPS)
    # (s² + s − 2)/4 · explicit ≥ dt; odd s damps the shortest waves best.
    stages = max(3, math.ceil((math.sqrt(9 + 16 * dt / explicit) - 1) / 2))
    stages += 1 - stages % 2
    u, kept = initial, [initial]
    for _ in range(len(times) - 1):
        for _ in range(steps):
            u = _rkl2(u, change, dt, stages)
        kept.append(u)
    return torch.stack(kept, 1)


def _rkl2(u: Tensor, change: Callable[[Tensor], Tensor], dt: float | int, stages: int) -> Tensor:
    """One step of the Runge–Kutta–Legendre method of order 2."""

    def weight(j: int) -> float:
        return 1 / 3 if j < 2 else (j * j + j - 2) / (2 * j * (j + 1))

    scale = 4 / (stages * stages + stages - 2)
    first = change(u) * dt
    older, newer = u, u + weight(1) * scale * first
    for j in range(2, stages + 1):
        mu = (2 * j - 1) / j * weight(j) / weight(j - 1)
        nu = -(j - 1) / j * weight(j) / weight(j - 2)
        move = mu * scale * (dt * change(newer) - (1 - weight(j - 1)) * first)
        older, newer = newer, mu * newer + nu * older + (1 - mu - nu) * u + move
    return newer

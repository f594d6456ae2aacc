"""Initial fields: sums of sines, Gaussian processes, bumps, steps.

All are periodic and normalised to [0, 1] except the steps, whose values are kept. Nothing is to be
detrended: what the authors subtract, the line through both ends, is zero for periodic fields.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.nn.lemon.pde.grid import LENGTH

# Sheet: windows, absolute values, signs in 10 % of the samples; the edge of a window is ours,
# wide enough for 128 points.
WINDOW_EDGE = 0.05
# Length of the Gaussian process.
CORRELATION = 0.2
# Between them the steps jump.
BREAKS = (0.4, 1.6)


def sines(
    x: Float[Tensor, " points"],
    n: int,
    waves: int,
    generator: torch.Generator,
    rough: float | int = 0.1,
) -> Float[Tensor, "n points"]:
    """Sums of two sines with amplitudes U(0, 1), random phases, wave numbers 1 to ``waves``.

    A part ``rough`` of the samples is replaced by its absolute value, another independent part
    gets a window of tanh edges; all have a random sign; min and max become 0 and 1.
    """
    shape = (n, 2, 1)
    number = torch.randint(1, waves + 1, shape, generator=generator).double()
    size, phase, sign = (
        _uniform(shape, generator),
        _uniform(shape, generator),
        _uniform((n, 1), generator),
    )
    u = (size * torch.sin(2 * math.pi * (number * x.cpu() / LENGTH + phase))).sum(1)
    if rough > 0:
        folded, cut = _uniform((n, 1), generator), _uniform((n, 1), generator)
        ends = _uniform((2, n, 1), generator)
        u = torch.where(folded < rough, u.abs(), u)
        u = torch.where(cut < rough, u * _window(x.cpu(), ends[0], ends[1]), u)
    return normalised(torch.where(sign < 0.5, -u, u)).to(x.device)


def gaussian_process(
    x: Float[Tensor, " points"], n: int, generator: torch.Generator
) -> Float[Tensor, "n points"]:
    """Samples of :func:`gaussian_field`, min and max moved to 0 and 1."""
    return normalised(gaussian_field(x, n, generator))


def gaussian_field(
    x: Float[Tensor, " points"], n: int, generator: torch.Generator
) -> Float[Tensor, "n points"]:
    """Gaussian process of the RBF kernel of length 0.2 wrapped around the period, up to a factor.

    Sampled by its Fourier series: wave k has variance ∝ exp(−(0.2 k)²/2), 0 beyond wave 24 in
    float64. (Cut out of a process on the line, fields would jump where the period closes.)
    """
    k = 2 * math.pi / LENGTH * torch.arange(25, dtype=torch.float64)
    spread = torch.exp(-((CORRELATION * k) ** 2) / 4)
    spread[0] /= math.sqrt(2)
    a, b = torch.randn(2, n, 25, dtype=torch.float64, generator=generator) * spread
    angle = k[:, None] * x.cpu()
    return (a @ torch.cos(angle) + b @ torch.sin(angle)).to(x.device)


def bump(
    x: Float[Tensor, " points"], centre: Float[Tensor, "n 1"], width: Float[Tensor, "n 1"]
) -> Float[Tensor, "n points"]:
    """Gaussians of height 1 and given centre and standard deviation, wrapped around the period."""
    images = LENGTH * torch.arange(-2, 3, dtype=torch.float64, device=x.device)
    distance = x[:, None] - centre[..., None] + images
    return torch.exp(-((distance / width[..., None]) ** 2) / 2).sum(-1)


def steps(
    x: Float[Tensor, " points"], n: int, jumps: int, falling: bool, generator: torch.Generator
) -> Float[Tensor, "n points"]:
    """Constant between ``jumps`` places of U(0.4, 1.6), values of U(0, 1), falling or rising."""
    places = BREAKS[0] + (BREAKS[1] - BREAKS[0]) * _uniform((n, jumps), generator)
    values = _uniform((n, jumps + 1), generator).sort(-1, descending=falling).values
    right_of = (x.cpu() > places.sort(-1).values[..., None]).sum(1)
    return values.gather(1, right_of).to(x.device)


def normalised(u: Float[Tensor, "n points"]) -> Float[Tensor, "n points"]:
    """Smallest value 0, largest 1; constant fields become 0."""
    low, high = u.amin(-1, keepdim=True), u.amax(-1, keepdim=True)
    return (u - low) / (high - low).clamp_min(1e-12)


def _window(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """1 between U(.1, .45) and U(.55, .9) of the period, 0 at its ends."""
    start, end = LENGTH * (0.1 + 0.35 * left), LENGTH * (0.55 + 0.35 * right)
    return (torch.tanh((x - start) / WINDOW_EDGE) - torch.tanh((x - end) / WINDOW_EDGE)) / 2


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator)

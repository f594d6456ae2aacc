"""Noise schedules, the grids of DDIM, and diffusers' scheduler for them.

diffusers keeps ᾱ in float32. The cosine schedule ends at ᾱ = 2.4e-9, where float32 products are
off by 3e-5 of it, and near t = 0 its 1 − ᾱ = 4e-5 by 1e-3. So ᾱ is computed here in float64 and
put into the scheduler, whose arithmetic then is that of the images with exact coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stiefel.generate._checks import choice, whole

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

SCHEDULES = ("cosine", "ldm")
GRIDS = ("linspace", "ldm")
# Names of what a network predicts, here and in diffusers.
PREDICTIONS = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}
# Nichol and Dhariwal's cosine schedule: offset, and the largest β.
OFFSET, LARGEST_BETA = 0.008, 0.999
# First and last β of latent diffusion, whose square roots are equally spaced (authors' code).
LDM_BETAS = (0.0015, 0.0195)


@lru_cache(maxsize=16)
def _alpha_bars(schedule: str, timesteps: int) -> tuple[float, ...]:
    if schedule == "cosine":

        def course(t: float) -> float:
            return math.cos((t + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2

        betas = [
            min(1 - course((i + 1) / timesteps) / course(i / timesteps), LARGEST_BETA)
            for i in range(timesteps)
        ]
    else:
        first, last = (math.sqrt(beta) for beta in LDM_BETAS)
        roots = torch.linspace(first, last, timesteps, dtype=torch.float64)
        betas = roots.square().tolist()
    products, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        products.append(product)
    return tuple(products)


def alpha_bars(schedule: str = "cosine", timesteps: int = 1000) -> Float[Tensor, " T"]:
    """ᾱ_t, the share of the image's variance left at step t, in float64.

    Args:
        schedule: ``"cosine"`` (offset 0.008, β ≤ 0.999), or ``"ldm"``, latent diffusion's
            β_t = linspace(√0.0015, √0.0195, T)².
        timesteps: T.

    Raises:
        ValueError: another schedule, or T < 2.
    """
    choice(schedule, "schedule", SCHEDULES)
    return torch.tensor(_alpha_bars(schedule, whole(timesteps, "timesteps", least=2)),
                        dtype=torch.float64)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """The steps of a sampler, in rising order."""

    times: Int[Tensor, " S"]
    bars: Float[Tensor, " S"]
    """ᾱ at these times."""
    final: float
    """ᾱ that the last step leads to."""
    clip: bool
    """Whether x0 is clipped to [−1, 1], and the noise computed anew from it."""


def ddim_grid(bars: Float[Tensor, " T"], steps: int, grid: str = "linspace") -> Grid:
    """Times of DDIM with S steps.

    Args:
        bars: ᾱ of all T times.
        steps: S.
        grid: ``"linspace"``: round(linspace(0, T − 1, S + 1)) without 0, down to the clean image,
            x0 clipped. ``"ldm"``, as the authors' code: i·⌊T/S⌋ + 1, down to ᾱ_0, no clipping.

    Raises:
        TypeError: S is no whole number.
        ValueError: another grid, S < 1, or more steps than the grid has times (T − 1).
    """
    choice(grid, "grid", GRIDS)
    total = len(bars)
    steps = whole(steps, "steps", most=total - 1, why=f" for {total} time steps")
    if grid == "linspace":
        ends = torch.linspace(0, total - 1, steps + 1, dtype=torch.float64)
        times = ends.round().long()[1:]
        return Grid(times, bars[times], 1.0, clip=True)
    times = torch.arange(steps) * (total // steps) + 1
    return Grid(times, bars[times], float(bars[0]), clip=False)


def ddim_scheduler(grid: Grid, prediction: str) -> DDIMScheduler:
    """diffusers' DDIM over the steps of ``grid``: its time i stands for ``grid.times[i]``.

    So unequal steps, which DDIMScheduler does not know, are steps of one.

    Raises:
        ImportError: diffusers is not installed; names the extra.
        ValueError: another prediction.
    """
    choice(prediction, "prediction", tuple(PREDICTIONS))
    try:
        from diffusers import DDIMScheduler
    except ImportError as error:
        raise ImportError(
            "sampling needs diffusers, which is not installed: pip install 'stiefel[generate]'"
        ) from error
    steps = len(grid.times)
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=steps,
        clip_sample=grid.clip,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="leading",
        steps_offset=0,
    )
    scheduler.alphas_cumprod = grid.bars.double()
    scheduler.final_alpha_cumprod = torch.tensor(grid.final, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    return scheduler

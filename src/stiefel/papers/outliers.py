"""Outliers planted in the gradients of a run, and the remedy that people reach for first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.optim.quantile import abs_quantile

# Apart from the seeds of weights and batches.
SEED = 2_000_000


def plant(gradients: Sequence[Tensor], probability: float, factor: float, seed: int) -> None:
    """Multiply every entry by ``factor`` with ``probability``, in place.

    Args:
        gradients: Tensors of any shape; each has a mask of its own.
        probability: In [0, 1].
        factor: What a struck entry is multiplied with.
        seed: Decides the masks, on one kind of device.

    Raises:
        ValueError: ``probability`` outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must lie in [0, 1], got {probability}")
    generators: dict[torch.device, torch.Generator] = {}
    for gradient in gradients:
        device = gradient.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        drawn = torch.rand(gradient.shape, generator=generators[device], device=device)
        gradient[drawn < probability] *= factor


def pooled_quantile(gradients: Sequence[Tensor], quantile: float) -> float:
    """Quantile of the absolute values of all entries together, interpolated linearly."""
    pool = torch.cat([g.flatten() for g in gradients])
    return float(abs_quantile(pool[None, :], quantile))


def tampering(config: Mapping[str, Any], matrices: Sequence[nn.Parameter]) -> Callable[[int], None]:
    """What a run does to its gradients between the backward pass and the optimizer.

    Args:
        config: ``seed``; ``outliers``: ``probability`` and ``factor`` as in :func:`plant`, with
            masks that are new each step and matrix; ``clip_value``: a quantile, of the first
            step's gradients as they then are, to which the entries of all steps are clipped.
            Runs without the last two keys keep their gradients.
        matrices: The parameters whose gradients are changed.

    Returns:
        A function of the step's number, from 0.
    """
    outliers, quantile = config.get("outliers"), config.get("clip_value")
    limit: float | None = None

    def change(step: int) -> None:
        nonlocal limit
        if outliers is None and quantile is None:
            return
        gradients = [p.grad for p in matrices if p.grad is not None]
        if outliers is not None:
            # Far enough apart that no two runs or steps share a mask.
            seed = SEED + 100_000 * config["seed"] + step
            plant(gradients, outliers["probability"], outliers["factor"], seed)
        if quantile is not None:
            if limit is None:
                limit = pooled_quantile(gradients, quantile)
            nn.utils.clip_grad_value_(matrices, limit)

    return change

"""Matrices that are updated together, and how an update is applied to them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass
class Batch:
    """Matrices of one shape, dtype and device, in step with one another."""

    params: list[Tensor]
    """Views (R, C) into parameters."""
    grads: list[Tensor]
    momenta: list[Tensor]
    """Views (R, C); :meth:`advance` brings them up to date."""
    states: list[dict[str, Tensor]]
    """Further state, each tensor one that belongs to this matrix alone."""
    variant: Hashable = None
    """What :meth:`MatrixOptimizer._variant` says of all of them."""

    def __getitem__(self, part: slice) -> Batch:
        return Batch(
            self.params[part],
            self.grads[part],
            self.momenta[part],
            self.states[part],
            self.variant,
        )

    def __len__(self) -> int:
        return len(self.params)

    def advance(self, momentum: float) -> None:
        """M ← μ M + (1 − μ) G. Left to the update, which then finds both in the cache."""
        torch._foreach_lerp_(self.momenta, self.grads, 1 - momentum)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C), rows being output neurons."""
        return self.params[0].shape[0], self.params[0].shape[1]


def apply_update(
    params: list[Tensor], direction: Tensor, factor: Tensor | list[float] | float, decay: float
) -> None:
    """p ← decay·p − factor ∘ direction for each p, with one rounding for low-precision parameters.

    Args:
        params: k matrices (R, C).
        direction: (k, R, C), of any floating dtype.
        factor: A number, one number per matrix, or a tensor that broadcasts against ``direction``,
            one entry per matrix.
        decay: 1 − lr·weight_decay.
    """
    factors = factor if isinstance(factor, Tensor | list) else [factor] * len(params)
    for i, parameter in enumerate(params):  # one after the other: each stays in the cache
        target = parameter.float() if parameter.dtype in LOW_PRECISION else parameter
        if decay != 1.0:
            target.mul_(decay)
        own = factors[i]
        if isinstance(own, Tensor):
            target.addcmul_(own, direction[i], value=-1)
        else:
            target.add_(direction[i], alpha=-own)
        if target is not parameter:
            parameter.copy_(target)

"""The arithmetic of a race: grids of learning rates, crossings, intervals. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Grid:
    """Learning rates tried for one contestant on the windows that choose."""

    tried: dict[float, float | None] = field(default_factory=dict)
    """Rate to loss; None where the run diverged."""

    @property
    def best(self) -> float | None:
        """The rate with the least loss; None if every run diverged."""
        finite = {lr: loss for lr, loss in self.tried.items() if loss is not None}
        return min(finite, key=lambda lr: finite[lr]) if finite else None

    @property
    def bracketed(self) -> bool:
        """Whether the best rate has a worse one on both sides."""
        return self.best is not None and min(self.tried) < self.best < max(self.tried)

    def next_rate(self) -> float:
        """A factor 2 beyond the end at which the best rate lies; downwards if all diverged."""
        low, high = min(self.tried), max(self.tried)
        down = self.best is None or self.best == low
        return rounded(low / 2 if down else high * 2)


def first_grid(centre: float) -> list[float]:
    """Three rates a factor 2 apart."""
    return [rounded(centre / 2), centre, rounded(centre * 2)]


def rounded(rate: float) -> float:
    """Six digits: 4e-3, not 0.0039999999999."""
    return float(f"{rate:.6g}")


def crossing(at: Sequence[float], losses: Sequence[float], level: float) -> float | None:
    """First place at which the loss is at or below ``level``, on lines between evaluations.

    Args:
        at: Where the losses were measured, ascending: steps or seconds.
        losses: As many losses.
        level: The loss to reach.

    Returns:
        None if it is never reached.
    """
    previous: tuple[float, float] | None = None
    for place, loss in zip(at, losses, strict=True):
        if loss <= level:
            if previous is None or previous[1] == loss:
                return float(place)
            share = (previous[1] - level) / (previous[1] - loss)
            return previous[0] + share * (place - previous[0])
        previous = (place, loss)
    return None


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % Student-t interval; None for a single value.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values must not be empty")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    from scipy.special import stdtrit

    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return mean, float(stdtrit(len(values) - 1, 0.975)) * spread / math.sqrt(len(values))

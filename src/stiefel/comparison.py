"""What comparing methods takes: grids of learning rates, crossings, intervals. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


class Rates:
    """Learning rates tried, a constant factor apart, and what follows from them."""

    tried: dict[float, float | None]
    """Rate to loss on the windows that choose; None where the run diverged."""

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
        """One grid step beyond the end at which the best rate lies; downwards if all diverged.

        A grid of one rate has steps of a factor 2.
        """
        rates = sorted(self.tried)
        low = rates[:2] if len(rates) > 1 else [rates[0], 2 * rates[0]]
        high = rates[-2:] if len(rates) > 1 else [rates[0] / 2, rates[0]]
        down = self.best is None or self.best == rates[0]
        return rounded(low[0] ** 2 / low[1] if down else high[1] ** 2 / high[0])


@dataclass
class Grid(Rates):
    """The rates of one contestant."""

    tried: dict[float, float | None] = field(default_factory=dict)


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


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of ``values`` and its two-sided Student-t confidence interval ``(mean, lo, hi)``.

    With fewer than two values the interval is the whole line. Values that are all the same
    infinity (a target that no seed reached) have themselves as mean and interval; NaN, or
    infinities mixed with anything else, leave the interval the whole line.

    Raises:
        ValueError: ``confidence`` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    n = len(values)
    if n == 0 or any(math.isnan(v) for v in values):
        return math.nan, -math.inf, math.inf
    if any(math.isinf(v) for v in values):
        mean = values[0] if len(set(values)) == 1 else math.nan
        return (mean, mean, mean) if n > 1 and not math.isnan(mean) else (mean, -math.inf, math.inf)
    # Rounding must not push the mean of equal values off their value, and so across a bound.
    mean = min(max(math.fsum(values) / n, min(values)), max(values))
    if n == 1:
        return mean, -math.inf, math.inf
    from scipy.special import stdtrit  # imported here: listing papers needs none of it

    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * spread / math.sqrt(n)
    return mean, mean - half, mean + half


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the width of :func:`mean_interval`; None for a single value.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values must not be empty")
    mean, _, high = mean_interval(values)
    return mean, None if len(values) == 1 else high - mean

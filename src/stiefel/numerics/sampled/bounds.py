"""What is proved about an estimate, and whether that says anything at the size at hand.

The proofs behind the paper hold with constants that exceed any laptop's data; each result here
carries its own bound, computed with the constants that can be had, and says when it is vacuous:
when it allows as much error as an answer that looks at nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Every bound holds with probability 1 − DELTA unless told otherwise.
DELTA = 0.05


@dataclass(frozen=True)
class ErrorBound:
    """A proved bound on the error of one result."""

    value: float
    """The error is at most this with probability ``1 − delta``; infinite where nothing is known."""
    trivial: float
    """What is to be beaten: the error of the answer named in ``against``."""
    delta: float
    draws: int
    """Rows (or entries) drawn."""
    what: str
    """What the error is of."""
    against: str

    @property
    def vacuous(self) -> bool:
        """Whether the bound allows what the trivial answer reaches without any work."""
        return not self.value < self.trivial

    @property
    def needed(self) -> float:
        """About how many draws would make it hold below ``trivial``: errors fall like 1/√draws."""
        if not math.isfinite(self.value) or self.trivial <= 0:
            return math.inf
        return self.draws * (self.value / self.trivial) ** 2

    def __str__(self) -> str:
        chance = f"with probability {1 - self.delta:g}"
        if not math.isfinite(self.value):
            return f"{self.what}: no bound is known at {self.draws:,} draws. Vacuous."
        text = f"{self.what}: error at most {self.value:.3g} {chance}"
        if not self.vacuous:
            return f"{text}; {self.against} has {self.trivial:.3g}."
        more = f", about {self.needed:.2g} would be needed" if math.isfinite(self.needed) else ""
        return (
            f"{text}. Vacuous at {self.draws:,} draws: {self.against} has {self.trivial:.3g}{more}."
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Guaranteed:
    """A result with an error bound; ``print(result.guarantee)`` says it in a sentence."""

    guarantee: ErrorBound

    @property
    def bound(self) -> float:
        """The proved bound on the error."""
        return self.guarantee.value

    @property
    def vacuous(self) -> bool:
        """Whether that bound says nothing at this size."""
        return self.guarantee.vacuous


class _Number:
    """The same for numbers."""

    guarantee: ErrorBound

    @property
    def bound(self) -> float:
        """The proved bound on the error."""
        return self.guarantee.value

    @property
    def vacuous(self) -> bool:
        """Whether that bound says nothing at this size."""
        return self.guarantee.vacuous


class Estimate(_Number, float):
    """A number with its error bound."""

    @classmethod
    def of(cls, value: float, guarantee: ErrorBound) -> Estimate:
        """``value`` as an estimate."""
        found = cls(value)
        found.guarantee = guarantee
        return found


class ComplexEstimate(_Number, complex):
    """A complex number with its error bound."""

    @classmethod
    def of(cls, value: complex, guarantee: ErrorBound) -> ComplexEstimate:
        """``value`` as an estimate."""
        found = cls(value)
        found.guarantee = guarantee
        return found


def gram_factor(draws: int, delta: float | int) -> float:
    """c such that ‖RᴴR − AᴴA‖_F ≤ c ‖A‖_F² with probability 1 − δ, R of ``draws`` ℓ2 rows of A.

    The mean is at most 1/√r (exact identity of :func:`gram_error_rms`). Markov gives 1/√(r δ).
    One row in place of another moves the norm by at most √2 ‖A‖_F²/r, rank-one terms of unit norm
    being at most √2 apart, so McDiarmid gives (1 + √ln(1/δ))/√r. The smaller of the two is
    returned.
    """
    return min(1 / math.sqrt(delta), 1 + math.sqrt(math.log(1 / delta))) / math.sqrt(draws)


def gram_error_rms(fro2: float | int, gram_norm2: float | int, draws: int) -> float:
    """√E ‖RᴴR − AᴴA‖_F² = √((‖A‖_F⁴ − ‖AᴴA‖_F²) / r), exactly, for ℓ2 rows drawn independently.

    Args:
        fro2: ‖A‖_F².
        gram_norm2: ‖AᴴA‖_F², at most fro2².
        draws: r ≥ 1.
    """
    return math.sqrt(max(fro2**2 - gram_norm2, 0.0) / draws)

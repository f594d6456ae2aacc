"""Sampling access to vectors, and to linear combinations of them by rejection.

Source: arXiv 1910.06151, section 2: SQ_φ(v) means entries of v, and draws, entries and norm of some
w with |wᵢ| ≥ |vᵢ| and ‖w‖² = φ ‖v‖². A plain vector has w = v and φ = 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from stiefel.numerics.least_squares_arrays import as_generator
from stiefel.numerics.sampled.bounds import ComplexEstimate, ErrorBound, Estimate
from stiefel.numerics.sampled.checks import as_indices, as_numbers, check_count, check_positive
from stiefel.numerics.sampled.sources import absolute_squares
from stiefel.numerics.sampled.tree import SumTree

# Proposals per draw after which rejection gives up (sheet, traps).
MAX_TRIALS = 10_000
# Proposals looked at together.
_LEAST, _MOST = 64, 1 << 12


def draw_in_segments(
    cumulative: Float[np.ndarray, " m"],
    starts: Int[np.ndarray, " k_and_1"],
    which: Int[np.ndarray, " s"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " s"]:
    """One position in each of the segments ``which``, by weight within the segment.

    ``cumulative`` is the running sum of all weights; segment k lies from ``starts[k]`` up to
    ``starts[k + 1]``. Positions without weight never come.
    """
    padded = np.concatenate([[0.0], cumulative])
    low, high = padded[starts[which]], padded[starts[which + 1]]
    u = low + rng.random(len(which)) * (high - low)
    found = np.searchsorted(cumulative, u, side="right")
    # Rounding may leave u at either end of the segment.
    first = np.searchsorted(cumulative, low, side="right")
    last = np.searchsorted(cumulative, high, side="left")
    return np.clip(found, first, last)


class Oversampled(ABC):
    """A vector u whose entries can be asked for, under a w ≥ |u| that can be drawn from."""

    size: int
    accepted: int = 0
    """Draws accepted so far, over all calls."""
    tried: int = 0
    """Proposals made so far."""

    @abstractmethod
    def query(self, index: Any) -> Shaped[np.ndarray, " s"]:
        """uᵢ."""

    @abstractmethod
    def weight2(self, index: Int[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
        """wᵢ² ≥ |uᵢ|²."""

    @abstractmethod
    def propose(self, n: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Indices with chance wᵢ² / ‖w‖²."""

    @property
    @abstractmethod
    def weight_norm2(self) -> float:
        """‖w‖²."""

    def dense(self) -> Shaped[np.ndarray, " n"]:
        """u, every entry asked for."""
        return self.query(np.arange(self.size))

    @property
    def norm2(self) -> float:
        """‖u‖², exact; asks for every entry. :meth:`estimate_norm2` does not."""
        return float(absolute_squares(self.dense()).sum())

    @property
    def phi(self) -> float:
        """φ = ‖w‖² / ‖u‖²: proposals a draw, on average; infinite for u = 0."""
        size = self.norm2
        return self.weight_norm2 / size if size > 0 else math.inf

    @property
    def acceptance(self) -> float:
        """Part of the proposals accepted so far, which is 1/φ on average; NaN before any."""
        return self.accepted / self.tried if self.tried else math.nan

    def _chances(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        index = self.propose(n, rng)
        each, which = np.unique(index, return_inverse=True)  # an entry costs τ of them: ask once
        return index, (absolute_squares(self.query(each)) / self.weight2(each))[which]

    def sample(
        self, n: int | np.integer, generator: Any = None, *, max_trials: int = MAX_TRIALS
    ) -> Int[np.ndarray, " n"]:
        """``n`` independent indices with chance exactly |uᵢ|² / ‖u‖², by rejection.

        Args:
            n: How many, ≥ 1.
            generator: NumPy generator, ``torch.Generator``, seed or None.
            max_trials: Proposals per draw, on average over the n, after which it gives up.

        Raises:
            ValueError: n < 1, max_trials < 1, or w = 0.
            RuntimeError: too few proposals were accepted: the terms cancel too well.
        """
        n, most = check_count(n, "n"), n * check_count(max_trials, "max_trials")
        if self.weight_norm2 == 0:
            raise ValueError("cannot l2-sample a zero vector")
        rng = as_generator(generator)
        parts: list[np.ndarray] = []
        found = tried = 0
        while found < n:
            if tried >= most:
                raise RuntimeError(
                    f"{found} of {n} draws were accepted in {tried:,} proposals: φ is about "
                    f"{tried / found if found else math.inf:.3g}. The terms cancel; raise "
                    "max_trials or use dense()"
                )
            rate = (found + 1) / (tried + 1) if tried else 1.0
            some = int(min(max(1.1 * (n - found) / rate, _LEAST), _MOST, most - tried))
            index, chance = self._chances(some, rng)
            kept = index[rng.random(some) < chance]
            parts.append(kept)
            found, tried = found + len(kept), tried + some
        self.accepted, self.tried = self.accepted + found, self.tried + tried
        return np.concatenate(parts)[:n]

    def estimate_norm2(
        self, nu: float | int = 0.1, delta: float | int = 0.05, generator: Any = None
    ) -> Estimate:
        """‖u‖² within 1 ± ν with probability 1 − δ, from 3 φ/ν² ln(2/δ) proposals.

        X

            Raises:
                ValueError: ν or δ outside (0, 1).
                RuntimeError: fewer than one proposal in :data:`MAX_TRIALS` is accepted.
        """
        nu, delta = check_positive(nu, "nu", 1), check_positive(delta, "delta", 1)
        rng = as_generator(generator)
        wanted = 1 + math.ceil(3 * (1 + nu) * math.log(2 / delta) / nu**2)
        total = 0.0
        tried = 0
        while total < wanted:
            if tried > MAX_TRIALS * (total + 1):
                raise RuntimeError(
                    f"{tried:,} proposals met {total:.3g} acceptances: the terms cancel; use norm2"
                )
            some = int(np.clip(wanted - total, _LEAST, _MOST))
            total += float(self._chances(some, rng)[1].sum())
            tried += some
        value = self.weight_norm2 * total / tried
        return Estimate.of(
            value, ErrorBound(nu * value, value, delta, tried, "squared norm", "answering 0")
        )

    def inner(
        self,
        y: Any,
        eps: float | int = 0.1,
        delta: float | int = 0.05,
        generator: Any = None,
    ) -> Estimate | ComplexEstimate:
        """⟨u, y⟩ = Σ ūᵢ yᵢ within ε ‖u‖ ‖y‖ with probability 1 − δ.

        The median of ⌈6 ln(2/δ)⌉ means of ⌈9/ε²⌉ draws of yᵢ ‖u‖² / uᵢ (real and imaginary parts
        each). The bound is vacuous where it takes more draws than u has entries: then the exact
        product is cheaper. ‖y‖ is not known; the bound reported is in units of ‖u‖ ‖y‖.

        Args:
            y: ``(n,)``, or a vector of this module; read where u is drawn.
            eps, delta: As above, in (0, 1).
            generator: NumPy generator, ``torch.Generator``, seed or None.

        Raises:
            ValueError: y of another length, NaN or infinities in it, ε or δ out of range, u = 0.
        """
        eps, delta = check_positive(eps, "eps", 1), check_positive(delta, "delta", 1)
        if not isinstance(y, Oversampled):
            y = SampledVector(y)
        if y.size != self.size:
            raise ValueError(f"y must have {self.size} entries, got {y.size}")
        groups, each = math.ceil(6 * math.log(2 / delta)), math.ceil(9 / eps**2)
        index = self.sample(groups * each, generator)
        z = self.norm2 * y.query(index) / self.query(index)
        means = z.reshape(groups, each).mean(axis=1)
        bound = ErrorBound(
            eps, eps * self.size / (groups * each), delta, groups * each,
            "inner product, in units of ‖x‖ ‖y‖", "an exact product, which needs fewer entries",
        )  # fmt: skip
        if np.iscomplexobj(means):
            return ComplexEstimate.of(complex(np.median(means.real), np.median(means.imag)), bound)
        return Estimate.of(float(np.median(means)), bound)


class SampledVector(Oversampled):
    """A vector ``(n,)`` in memory, real or complex, with draws and updates in O(log n).

    ``v`` is not copied until the first :meth:`update`; until then it must not change.

    Raises:
        TypeError: not numbers.
        ValueError: not one-dimensional, empty, NaN, infinities, a squared norm beyond float64.
    """

    def __init__(self, v: Any) -> None:
        self._v = as_numbers(v, "v")
        if self._v.ndim != 1 or not self._v.size:
            raise ValueError(f"v must be a vector (n,) with n ≥ 1, got shape {self._v.shape}")
        self._given: bool = True
        self.size = len(self._v)
        squares = absolute_squares(self._v)
        if not np.isfinite(squares.sum()):
            raise ValueError("the squared norm of v is beyond float64: scale v down")
        self._tree = SumTree(squares)

    def query(self, index: Any) -> Shaped[np.ndarray, " s"]:
        """vᵢ."""
        return self._v[as_indices(index, self.size, "index")]

    def weight2(self, index: Int[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
        """|vᵢ|²."""
        return self._tree.weights[index]

    def propose(self, n: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Indices with chance |vᵢ|² / ‖v‖²."""
        return self._tree.draw(n, rng)

    @property
    def weight_norm2(self) -> float:
        """‖v‖²."""
        return self._tree.total

    @property
    def norm2(self) -> float:
        """‖v‖²."""
        return self._tree.total

    def update(self, index: Any, values: Any) -> None:
        """Replace entries, in O(m log n).

        Raises:
            IndexError: outside the vector.
            TypeError: complex values for a real vector.
            ValueError: an index twice, another number of values, NaN, infinities.
        """
        index = as_indices(index, self.size, "index")
        values = np.atleast_1d(as_numbers(values, "values"))
        if values.shape != index.shape or len(np.unique(index)) < len(index):
            raise ValueError(
                f"index must name {values.shape} different entries, got {index.tolist()}"
            )
        if np.iscomplexobj(values) and not np.iscomplexobj(self._v):
            raise TypeError("complex values cannot go into a real vector")
        squares = absolute_squares(values)
        if not np.isfinite(squares).all():
            raise ValueError("the square of a value is beyond float64: scale down")
        if self._given:
            self._v, self._given = self._v.copy(), False
        self._v[index] = values
        self._tree.set(index, squares)


class Combination(Oversampled):
    """u = Σ_t λ_t v_t under w² = τ Σ_t |λ_t|² w_t². See :func:`combine`."""

    def __init__(
        self, coefficients: Shaped[np.ndarray, " tau"], vectors: Sequence[Oversampled]
    ) -> None:
        self.coefficients, self.vectors = coefficients, tuple(vectors)
        self.size = self.vectors[0].size
        norms = np.array([v.weight_norm2 for v in self.vectors])
        self._parts = absolute_squares(coefficients) * norms
        self._tau = len(self.vectors)

    def query(self, index: Any) -> Shaped[np.ndarray, " s"]:
        """uᵢ, from τ entries."""
        index = as_indices(index, self.size, "index")
        terms = zip(self.coefficients, self.vectors, strict=True)
        return np.asarray(sum(c * v.query(index) for c, v in terms))

    def weight2(self, index: Int[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
        """wᵢ², from τ weights."""
        terms = zip(absolute_squares(self.coefficients), self.vectors, strict=True)
        return np.asarray(self._tau * sum(c * v.weight2(index) for c, v in terms))

    def propose(self, n: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Which vector by ‖λ_t w_t‖², then an index of it."""
        counts = rng.multinomial(n, self._parts / self._parts.sum())
        drawn = [v.propose(int(c), rng) for v, c in zip(self.vectors, counts, strict=True) if c]
        return rng.permutation(np.concatenate(drawn))

    @property
    def weight_norm2(self) -> float:
        """τ Σ_t ‖λ_t w_t‖²."""
        return float(self._tau * self._parts.sum())


def combine(coeffs: Any, vectors: Iterable[Any]) -> Combination:
    """The linear combination Σ_t λ_t v_t, to ask entries of and to draw from.

    φ = τ Σ_t φ_t ‖λ_t v_t‖² / ‖u‖², which is large where the terms cancel.

    Args:
        coeffs: λ ``(τ,)``, real or complex.
        vectors: τ vectors of one length: :class:`SampledVector`, combinations, or arrays ``(n,)``.

    Raises:
        ValueError: no vectors, another number of coefficients, vectors of different lengths, NaN.
    """
    given = as_numbers(coeffs, "coeffs")
    found = [v if isinstance(v, Oversampled) else SampledVector(v) for v in vectors]
    if not found or given.shape != (len(found),):
        raise ValueError(
            f"coeffs must be one number for each of at least one vector, got shape {given.shape} "
            f"for {len(found)} vectors"
        )
    sizes = sorted({v.size for v in found})
    if len(sizes) > 1:
        raise ValueError(f"vectors must have one length, got {sizes}")
    return Combination(given, found)


class RowCombination(Oversampled):
    """u = Σ_t λ_t R_t over the rows of one matrix ``(r, d)``: :class:`Combination`, vectorised.

    Args:
        coefficients: λ ``(r,)``.
        rows: R.
        cumulative: Running sum of |R|², row by row, where it is at hand.
    """

    def __init__(
        self,
        coefficients: Shaped[np.ndarray, " r"],
        rows: Shaped[np.ndarray, "r d"],
        cumulative: Float[np.ndarray, " r_times_d"] | None = None,
    ) -> None:
        self.coefficients, self._rows = coefficients, rows
        r, self.size = rows.shape
        if cumulative is None:
            cumulative = absolute_squares(rows).ravel().cumsum()
        self._cumulative = cumulative
        self._starts = np.arange(0, rows.size + 1, self.size)
        norms = np.diff(np.concatenate([[0.0], cumulative])[self._starts])
        self._weights = absolute_squares(coefficients)
        self._chances_of_rows = SumTree(self._weights * norms)
        self._tau = r

    def query(self, index: Any) -> Shaped[np.ndarray, " s"]:
        """uᵢ, from r entries."""
        return self.coefficients @ self._rows[:, as_indices(index, self.size, "index")]

    def dense(self) -> Shaped[np.ndarray, " d"]:
        """u."""
        return self.coefficients @ self._rows

    def weight2(self, index: Int[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
        """wᵢ², from r entries."""
        return self._tau * (self._weights @ absolute_squares(self._rows[:, index]))

    def propose(self, n: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Which row by |λ_t|² ‖R_t‖², then a column of it."""
        which = self._chances_of_rows.draw(n, rng)
        found = draw_in_segments(self._cumulative, self._starts, which, rng)
        return found - self._starts[which]

    @property
    def weight_norm2(self) -> float:
        """r Σ_t |λ_t|² ‖R_t‖²."""
        return self._tau * self._chances_of_rows.total

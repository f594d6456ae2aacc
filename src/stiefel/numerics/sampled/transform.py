"""Even singular value transformation: f(AᴴA) from a sketch of A, and rows thresholded with it.

Source: arXiv 1910.06151, the main theorem (even singular value transformation) and section 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from stiefel.numerics.sampled.bounds import ErrorBound, Guaranteed
from stiefel.numerics.sampled.checks import as_indices, as_numbers, check_positive
from stiefel.numerics.sampled.sketching import ROWS, Sketch, as_sampled, sketch
from stiefel.numerics.sampled.sources import absolute_squares
from stiefel.numerics.sampled.vector import MAX_TRIALS, Oversampled, RowCombination, combine

# Points at which slopes are measured where no Lipschitz constants are given.
_POINTS = 2001

Function = Callable[[np.ndarray], Any]


@dataclass(frozen=True, eq=False)
class LowRankFunction(Guaranteed):
    """f(AᴴA) ≈ Rᴴ U R + f(0) I, ``(d, d)``, never formed. The bound is on its Frobenius norm."""

    sketch: Sketch
    W: Shaped[np.ndarray, "r q"]
    """Eigenvectors of C Cᴴ."""
    weights: Shaped[np.ndarray, " q"]
    """f̄ of its eigenvalues: U = W diag(weights) Wᴴ."""
    f0: float | int | complex
    """f(0); real unless f is complex."""

    @property
    def R(self) -> Shaped[np.ndarray, "r d"]:
        """Rows of the sketch."""
        return self.sketch.R

    @cached_property
    def U(self) -> Shaped[np.ndarray, "r r"]:
        """f̄(C Cᴴ), f̄(x) = (f(x) − f(0))/x."""
        return (self.W * self.weights) @ self.W.conj().T

    @property
    def shape(self) -> tuple[int, int]:
        """``(d, d)``."""
        return self.R.shape[1], self.R.shape[1]

    def matmul(self, X: Any) -> Shaped[np.ndarray, "*d_and_m"]:
        """f(AᴴA) X for X ``(d, m)`` or ``(d,)``, in O(r d m).

        Raises:
            ValueError: another number of rows, NaN or infinities.
        """
        X = as_numbers(X, "X")
        if X.ndim not in (1, 2) or X.shape[0] != self.shape[0]:
            raise ValueError(f"X must be ({self.shape[0]}, m), got shape {X.shape}")
        inner = self.W.conj().T @ (self.R @ X)
        inner = (self.weights * inner.T).T
        return self.R.conj().T @ (self.W @ inner) + self.f0 * X

    def coefficients(self, X: Any) -> Shaped[np.ndarray, "*m_and_r"]:
        """λ such that X f(AᴴA) = λ R + f(0) X, for rows X ``(m, d)`` or ``(d,)``.

        Raises:
            ValueError: another number of columns, NaN or infinities.
        """
        X = as_numbers(X, "X")
        if X.ndim not in (1, 2) or X.shape[-1] != self.shape[0]:
            raise ValueError(f"X must be (m, {self.shape[0]}), got shape {X.shape}")
        return (((X @ self.R.conj().T) @ self.W) * self.weights) @ self.W.conj().T

    def rmatmul(self, X: Any) -> Shaped[np.ndarray, "*m_and_d"]:
        """X f(AᴴA) for rows X ``(m, d)`` or ``(d,)``.

        Raises:
            ValueError: as :meth:`coefficients`.
        """
        return self.coefficients(X) @ self.R + self.f0 * as_numbers(X, "X")

    def combination(self, x: Any) -> Oversampled:
        """x f(AᴴA) for one row x ``(d,)``, as a vector to draw from without forming it.

        Raises:
            ValueError: as :meth:`coefficients`.
        """
        x = as_numbers(x, "x")
        if x.shape != self.shape[:1]:
            raise ValueError(f"x must be ({self.shape[0]},), got shape {x.shape}")
        found = RowCombination(self.coefficients(x), self.R, self.sketch.cumulative)
        return found if self.f0 == 0 else combine([1.0, self.f0], [found, x])

    def row(self, i: int | np.integer) -> Shaped[np.ndarray, " d"]:
        """Row ``i`` of f(AᴴA), dense.

        Raises:
            IndexError: outside 0 … d − 1.
        """
        return self.rmatmul(self._unit(i))

    def sample_row(
        self,
        i: int | np.integer,
        n: int | np.integer,
        generator: Any = None,
        *,
        max_trials: int = MAX_TRIALS,
    ) -> Int[np.ndarray, " n"]:
        """``n`` columns drawn by the squares of row ``i``, by rejection.

        Raises:
            IndexError: outside 0 … d − 1.
            RuntimeError: too few proposals were accepted.
        """
        found = self.combination(self._unit(i))
        return found.sample(int(n), generator, max_trials=max_trials)

    def _unit(self, i: Any) -> np.ndarray:
        unit = np.zeros(self.shape[0])
        unit[as_indices(i, self.shape[0], "i")] = 1.0
        return unit


def svt(
    sketch: Sketch,
    f: Function,
    f0: float | int | complex | None = None,
    *,
    lipschitz: tuple[float | int, float | int] | None = None,
) -> LowRankFunction:
    """f(AᴴA) ≈ Rᴴ f̄(C Cᴴ) R + f(0) I with f̄(x) = (f(x) − f(0))/x.

    The error is at most L ‖RᴴR − AᴴA‖_F + ‖R‖² L̄ ‖C Cᴴ − R Rᴴ‖_F, with L and L̄ the steepest slopes
    of f and f̄. Eigenvalues below 1e-9 of the largest get f̄ = 0, where it would explode.

    Args:
        sketch: Of A, from :func:`sketch`.
        f: Takes an array of numbers ≥ 0, returns as many, real or complex.
        f0: f(0), where f cannot be asked there or only the rest is wanted. None: f is asked.
        lipschitz: L and L̄ for the error bound. None: the steepest slopes between 2,001 points from
            0 to ‖C‖², which may miss a steeper one.

    Raises:
        ValueError: f returns NaN, infinities or another number of values; f0 is not finite.
    """
    W, values = sketch.spectrum
    first = complex(_values(f, np.zeros(1))[0]) if f0 is None else complex(f0)
    if not np.isfinite(first):
        raise ValueError(f"f0 must be finite, got {f0}")
    zero = first.real if first.imag == 0 else first
    weights = (_values(f, values) - zero) / values
    guarantee = _transform_bound(sketch, f, W, weights, zero, lipschitz)
    return LowRankFunction(sketch, W, weights, zero, guarantee=guarantee)


def _values(f: Function, x: np.ndarray) -> np.ndarray:
    """f at x, checked."""
    found = np.asarray(f(x))
    if found.shape != x.shape or found.dtype.kind not in "fiubc":
        raise ValueError(
            f"f must return one number for each of {len(x)}, got shape {found.shape} of "
            f"{found.dtype}"
        )
    if not np.isfinite(found).all():
        at = x[np.flatnonzero(~np.isfinite(found))[0]]
        raise ValueError(f"f must be finite, but f({at:.6g}) is not")
    return found


def _slopes(f: Function, zero: float | int | complex, largest: float) -> tuple[float, float]:
    """Steepest measured slopes of f and f̄ on [0, largest]."""
    x = np.linspace(0, largest, _POINTS)[1:]
    y = _values(f, x)
    bar = (y - zero) / x
    step = largest / (_POINTS - 1)
    steepest = max(float(np.abs(np.diff(y)).max()), abs(complex(y[0] - zero))) / step
    return steepest, float(np.abs(np.diff(bar)).max()) / step


def _transform_bound(
    sketch: Sketch, f: Function, W: np.ndarray, weights: np.ndarray, zero: float | int | complex,
    lipschitz: tuple[float | int, float | int] | None,
) -> ErrorBound:  # fmt: skip
    largest = float(sketch.spectrum[1][0])
    steep, steep_bar = lipschitz or _slopes(f, zero, largest)
    # ‖R‖² is at most ‖C‖² and what the columns miss of it.
    norm2 = largest + sketch.column_error
    value = steep * sketch.row_error + norm2 * steep_bar * sketch.column_error
    # ‖Rᴴ U R‖_F² = tr(U K Uᴴ K) with K = R Rᴴ, of which W are the eigenvectors if C is R.
    if sketch.sampled_columns:
        image = W.conj().T @ sketch.R
        inner = absolute_squares(image @ image.conj().T)
        size = math.sqrt(max(float((weights @ inner @ weights.conj()).real), 0.0))
    else:
        size = float(np.linalg.norm(weights * sketch.spectrum[1]))
    return ErrorBound(
        value, size, sketch.delta, len(sketch.rows), "‖f(AᴴA) − (RᴴUR + f(0) I)‖_F", "f(0) I"
    )


@dataclass(frozen=True)
class Ramp:
    """t(x) = clip((x/σ² − (1 − η)) / (2 η), 0, 1): 0 below σ² (1 − η), 1 above σ² (1 + η)."""

    sigma: float
    eta: float

    def __call__(self, x: Float[np.ndarray, " q"]) -> Float[np.ndarray, " q"]:
        """t(x)."""
        return np.clip((x / self.sigma**2 - (1 - self.eta)) / (2 * self.eta), 0.0, 1.0)

    @property
    def lipschitz(self) -> tuple[float, float]:
        """Steepest slopes of t and of t(x)/x."""
        square, eta = self.sigma**2, self.eta
        rising, falling = 1 / (2 * eta * (1 - eta)), 1 / (1 + eta) ** 2
        return 1 / (2 * eta * square), max(rising, falling) / square**2


def threshold(drawn: Sketch, sigma: float | int, eta: float | int = 0.3) -> LowRankFunction:
    """t(AᴴA), t the ramp from 0 to 1 around σ²: the projection on singular vectors above σ, softly.

    Args:
        drawn: Sketch of A.
        sigma: Singular value in the middle of the ramp.
        eta: Half its relative width, in (0, 1).

    Raises:
        ValueError: sigma ≤ 0, eta outside (0, 1).
    """
    ramp = Ramp(check_positive(sigma, "sigma"), check_positive(eta, "eta", 1))
    return svt(drawn, ramp, 0.0, lipschitz=ramp.lipschitz)


@dataclass(frozen=True, eq=False)
class Recommendation(Guaranteed):
    """Row i of A t(AᴴA): every entry when asked for, or columns drawn from it.

    NumPy takes it as the dense row. The bound is on the error of that row.
    """

    vector: Oversampled
    """The row as a combination of the r rows drawn, with ``phi`` and ``acceptance``."""

    @cached_property
    def row(self) -> Shaped[np.ndarray, " d"]:
        """The dense row, in O(r d)."""
        return self.vector.dense()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = np.asarray(self.row, dtype=dtype)
        return found.copy() if copy else found

    @property
    def phi(self) -> float:
        """Proposals a draw, on average: r Σ |λ_t|² ‖R_t‖² / ‖u‖²."""
        return self.vector.phi

    def sample(
        self, n: int | np.integer, generator: Any = None, *, max_trials: int = MAX_TRIALS
    ) -> Int[np.ndarray, " n"]:
        """``n`` columns with chance |uⱼ|² / ‖u‖², by rejection: recommendations.

        Raises:
            ValueError: nothing of the row is left above the threshold.
            RuntimeError: too few proposals were accepted.
        """
        return self.vector.sample(int(n), generator, max_trials=max_trials)


def recommend(
    A: Any,
    i: int | np.integer,
    sigma: float | int,
    eta: float | int = 0.3,
    r: int | np.integer = ROWS,
    c: int | np.integer | None = None,
    generator: Any = None,
    *,
    function: LowRankFunction | None = None,
) -> Recommendation:
    """Row ``i`` of A, thresholded: what the singular vectors above ``sigma`` say about it.

    Args:
        A: :class:`SampledMatrix` ``(n, d)``; anything it is built from works, at one pass a call.
        i: Which row.
        sigma, eta: As :func:`threshold`.
        r, c, generator: As :func:`sketch`.
        function: :func:`threshold` of A at hand, in place of all of those: one sketch serves all
            rows.

    Raises:
        ValueError: sigma ≤ 0, eta outside (0, 1), r < 1.
        IndexError: ``i`` outside A.
    """
    A = as_sampled(A)
    given = A.rows(i)
    if function is None:
        function = threshold(sketch(A, r, c, generator), sigma, eta)
    vector = function.combination(given[0])
    of_all = function.guarantee
    guarantee = ErrorBound(
        of_all.value * float(np.linalg.norm(given)), float(np.linalg.norm(vector.dense())),
        of_all.delta, of_all.draws, "the thresholded row", "a row of zeros",
    )  # fmt: skip
    return Recommendation(vector, guarantee=guarantee)

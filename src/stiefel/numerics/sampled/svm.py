"""A least-squares support vector machine from rows drawn by length.

Source: arXiv 1910.06151, section 6 (SVM); Suykens and Vandewalle (1999) for the system.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from stiefel.numerics.least_squares_arrays import as_generator
from stiefel.numerics.sampled.bounds import DELTA, ErrorBound, Guaranteed, gram_factor
from stiefel.numerics.sampled.checks import (
    as_indices,
    as_numbers,
    check_count,
    check_positive,
    numbers_at,
)
from stiefel.numerics.sampled.sketching import ROWS, as_sampled


@dataclass(frozen=True, eq=False)
class LinearSVM(Guaranteed):
    """x ↦ ⟨w, x⟩ + b. The bound is on the error of (w, b) beside the machine of all rows."""

    w: Float[np.ndarray, " d"]
    b: float
    gamma: float

    def decision(self, X: Any) -> Float[np.ndarray, " m"]:
        """⟨w, x⟩ + b for rows X ``(m, d)``; the class is its sign.

        Raises:
            ValueError: another number of columns, NaN or infinities.
        """
        X = as_numbers(X, "X")
        if X.ndim != 2 or X.shape[1] != len(self.w):
            raise ValueError(f"X must be (m, {len(self.w)}), got shape {X.shape}")
        return X @ self.w + self.b

    def dual(self, A: Any, y: Any, i: Any) -> Float[np.ndarray, " m"]:
        """αᵢ = γ (yᵢ − ⟨w, Aᵢ⟩ − b) of rows i: the unknowns of the system, on demand.

        Raises:
            IndexError: outside A.
        """
        A = as_sampled(A)
        index = as_indices(i, A.shape[0], "i")
        return self.gamma * (numbers_at(y, index, A.shape[0], "y") - self.decision(A.rows(index)))


def least_squares_svm(
    A: Any,
    y: Any,
    gamma: float | int = 1.0,
    r: int | np.integer = ROWS,
    generator: Any = None,
) -> LinearSVM:
    """The machine that solves [[0, 1ᵀ], [1, AAᵀ + I/γ]] [b; α] = [0; y], w = Aᵀα, approximately.

    It minimises ‖w‖²/2 + γ/2 Σ (yᵢ − ⟨w, Aᵢ⟩ − b)². The sum is estimated from r rows of [A, 1],
    drawn by length: those of A with chance ‖A‖_F²/(‖A‖_F² + n), else any row. n does not matter.

    Args:
        A: Real :class:`SampledMatrix` ``(n, d)``; anything it is built from works, at one pass.
        y: ``(n,)``, −1 or 1, or any numbers; read at the rows drawn.
        gamma: Weight of errors, > 0.
        r: Rows drawn, ≥ 1.
        generator: NumPy generator, ``torch.Generator``, seed or None.

    Raises:
        TypeError: complex A or y.
        ValueError: gamma ≤ 0, r < 1, y of another length, NaN or infinities at the rows drawn.
    """
    A, gamma, r = as_sampled(A), check_positive(gamma, "gamma"), check_count(r, "r")
    if A.dtype.kind == "c":
        raise TypeError("a support vector machine takes real rows, got complex ones")
    n, _ = A.shape
    rng = as_generator(generator)
    index = _augmented_rows(A, r, rng)
    total = A.fro2 + n
    scale = 1 / np.sqrt(r * (A.row_norms2[index] + 1) / total)
    given = numbers_at(y, index, n, "y")
    if np.iscomplexobj(given):
        raise TypeError("y must be real, got complex numbers")
    R = scale[:, None] * A.rows(index).astype(np.float64, copy=False)
    w, b = solve_system(R, scale, scale * given, gamma)
    guarantee = _bound(R, scale, scale * given, gamma, total, w, b)
    return LinearSVM(w, b, gamma, guarantee=guarantee)


def _augmented_rows(A: Any, r: int, rng: np.random.Generator) -> np.ndarray:
    """Rows with chance (‖Aᵢ‖² + 1) / (‖A‖_F² + n)."""
    n = A.shape[0]
    by_length = int(rng.binomial(r, A.fro2 / (A.fro2 + n)))
    parts = [rng.integers(n, size=r - by_length)]
    if by_length:
        parts.append(A.sample_rows(by_length, rng)[0])
    return np.concatenate(parts)


def solve_system(
    R: Float[np.ndarray, "r d"],
    ones: Float[np.ndarray, " r"],
    y: Float[np.ndarray, " r"],
    gamma: float | int,
) -> tuple[Float[np.ndarray, " d"], float]:
    """w and b from rows R, the column beside them and targets, all scaled alike.

    The dual system, r + 1 unknowns, or the normal equations, d + 1 unknowns: the smaller one.
    """
    r, d = R.shape
    if d < r:
        gram, image = _normal_equations(R, ones, y, gamma)
        found = np.linalg.solve(gram, image)
        return found[:-1], float(found[-1])
    system = np.zeros((r + 1, r + 1))
    system[0, 1:] = system[1:, 0] = ones
    system[1:, 1:] = R @ R.T
    system[np.arange(1, r + 1), np.arange(1, r + 1)] += 1 / gamma
    found = np.linalg.solve(system, np.concatenate([[0.0], y]))
    return R.T @ found[1:], float(found[0])


def _normal_equations(
    R: np.ndarray, ones: np.ndarray, y: np.ndarray, gamma: float | int
) -> tuple[np.ndarray, np.ndarray]:
    rows = np.column_stack([R, ones])
    gram = rows.T @ rows
    diagonal = np.arange(R.shape[1])
    gram[diagonal, diagonal] += 1 / gamma
    return gram, rows.T @ y


def _bound(
    R: np.ndarray, ones: np.ndarray, y: np.ndarray, gamma: float, total: float, w: np.ndarray,
    b: float,
) -> ErrorBound:  # fmt: skip
    """‖(ŵ, b̂) − (w, b)‖ ≤ (e + ε ‖(ŵ, b̂)‖) / (λ_min(Ĝ) − ε), Ĝ the normal matrix of the sketch.

    ε bounds its error, e that of its right-hand side (Chebyshev, ‖y‖ estimated from the draws).
    """
    r, d = R.shape
    share, size = DELTA / 2, math.hypot(float(np.linalg.norm(w)), b)
    error, value = gram_factor(r, share) * total, math.inf
    # With fewer rows than columns the smallest eigenvalue is at most 1/γ.
    if d < r or error < 1 / gamma:
        gram, _ = _normal_equations(R, ones, y, gamma)
        least = float(np.linalg.eigvalsh(gram)[0])
        if error < least:
            off = math.sqrt(total / (r * share)) * float(np.linalg.norm(y))
            value = (off + error * size) / (least - error)
    return ErrorBound(value, size, DELTA, r, "‖(ŵ, b̂) − (w, b)‖", "w = 0, b = 0")

"""Feasibility of semidefinite programs by matrix multiplicative weights, on sampled constraints.

Source: arXiv 1910.06151, section 6 (SDP solving); Arora and Kale (2007) for the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from stiefel.numerics.least_squares_arrays import as_generator
from stiefel.numerics.sampled.bounds import DELTA, ErrorBound, Guaranteed
from stiefel.numerics.sampled.checks import as_numbers, check_count, check_positive
from stiefel.numerics.sampled.hamiltonian import check_hermitian
from stiefel.numerics.sampled.matrix import SampledMatrix
from stiefel.numerics.sampled.sketching import ROWS, as_sampled, of_rows, sketch

# Rows of each constraint that are compared with its columns.
_CHECKED = 200


@dataclass(frozen=True, eq=False)
class GibbsState:
    """X = (I + V diag(weights) Vᴴ) / Z, with trace 1; V ``(n, q)`` has orthonormal columns."""

    V: Shaped[np.ndarray, "n q"]
    weights: Float[np.ndarray, " q"]
    """exp(−e) − 1 > −1 for the eigenvalues e of the exponent: X is positive."""

    @property
    def partition(self) -> float:
        """Z = n + Σ weights."""
        return len(self.V) + float(self.weights.sum())

    def dense(self) -> Shaped[np.ndarray, "n n"]:
        """X, formed."""
        return (np.eye(len(self.V)) + (self.V * self.weights) @ self.V.conj().T) / self.partition


@dataclass(frozen=True, eq=False)
class SDPResult(Guaranteed):
    """What multiplicative weights ended with. The bound is on every one of ``values``."""

    feasible: bool
    """Whether all tr(A_j X) ≤ b_j + ε, as estimated. If not, no X fulfils tr(A_j X) ≤ b_j, up to
    the errors of the estimates."""
    X: GibbsState
    values: Float[np.ndarray, " m"]
    """tr(A_j X), estimated from rows that X does not depend on."""
    steps: int
    """Violated constraints that were added."""


def sdp_feasibility(
    constraints: Sequence[Any],
    b: Any,
    eps: float | int,
    r: int | np.integer = ROWS,
    generator: Any = None,
    *,
    width: float | int | None = None,
    max_steps: int | np.integer | None = None,
) -> SDPResult:
    """Find X ⪰ 0 with trace 1 and tr(A_j X) ≤ b_j + ε for all j, or say that there is none.

    X = exp(−η Σ A_j) / trace, over the constraints that were found violated, η = ε/(2 width²). If
    some X fulfils tr(A_j X) ≤ b_j, that ends after 4 width² ln n / ε² steps. Each step draws r rows
    of the sum, which give its eigenvectors and values, and r of each constraint.

    Args:
        constraints: m ≥ 1 Hermitian matrices ``(n, n)`` of low rank, as :class:`SampledMatrix` or
            anything it is built from.
        b: ``(m,)``, real.
        eps: Allowed violation, > 0.
        r: Rows drawn of each matrix in each step, ≥ 1.
        generator: NumPy generator, ``torch.Generator``, seed or None.
        width: Bound on every spectral norm. None: the largest Frobenius norm.
        max_steps: None: the number above.

    Raises:
        ValueError: no constraints, sizes that differ, b of another length, eps ≤ 0, r < 1, NaN, a
            constraint that is not Hermitian in 200 rows drawn.
    """
    matrices = [as_sampled(A) for A in constraints]
    b, eps, r = as_numbers(b, "b"), check_positive(eps, "eps"), check_count(r, "r")
    rng = as_generator(generator)
    n = _check(matrices, b, rng)
    wide = max(math.sqrt(A.fro2) for A in matrices)
    wide = wide if width is None else check_positive(width, "width")
    proved = math.ceil(4 * wide**2 * math.log(max(n, 2)) / eps**2)
    most = proved if max_steps is None else check_count(max_steps, "max_steps")
    eta = eps / (2 * wide**2)
    every = np.arange(n)
    traces = np.array([float(A.entries(every, every).real.sum()) for A in matrices])
    counts = np.zeros(len(matrices))
    for step in range(most + 1):
        X = _gibbs(matrices, counts, eta, r, rng)
        values, error = _traces(matrices, traces, X, r, rng)
        worst = int((values - b).argmax())
        if values[worst] <= b[worst] + eps or step == most:
            break
        counts[worst] += 1
    guarantee = ErrorBound(error, eps, DELTA, r, "each tr(A_j X)", "the tolerance ε allowed")
    return SDPResult(
        bool((values <= b + eps).all()), X, values, int(counts.sum()), guarantee=guarantee
    )


def _check(matrices: list[SampledMatrix], b: np.ndarray, rng: np.random.Generator) -> int:
    shapes = {A.shape for A in matrices}
    if len(shapes) != 1 or len(set(next(iter(shapes), (0, 1)))) != 1:
        raise ValueError(
            f"constraints must be one or more square matrices of one size, got {sorted(shapes)}"
        )
    if b.shape != (len(matrices),) or np.iscomplexobj(b):
        raise ValueError(f"b must be ({len(matrices)},) and real, got shape {b.shape} {b.dtype}")
    n = next(iter(shapes))[0]
    for j, A in enumerate(matrices):
        check_hermitian(sketch(A, _CHECKED, n, rng), f"constraint {j}")
    return n


def _gibbs(
    matrices: list[SampledMatrix], counts: np.ndarray, eta: float, r: int, rng: np.random.Generator
) -> GibbsState:
    """exp(−η Σ counts_j A_j), up to its trace, from r rows of the sum.

    A row comes with chance pᵢ ∝ Σ_j counts_j² ‖A_j,i‖². V spans the rows drawn; in it the sum is
    Vᴴ H V ≈ (S V)ᴴ (R V), unbiased for a V that is given.
    """
    n = matrices[0].shape[0]
    active = np.flatnonzero(counts)
    if not len(active):
        return GibbsState(np.zeros((n, 0)), np.zeros(0))
    masses = np.array([counts[j] ** 2 * matrices[j].fro2 for j in active])
    shares = rng.multinomial(r, masses / masses.sum())
    index = np.concatenate(
        [matrices[j].sample_rows(s, rng)[0] for j, s in zip(active, shares, strict=True) if s]
    )
    chances = sum(counts[j] ** 2 * matrices[j].row_norms2[index] for j in active) / masses.sum()
    taken = sum(counts[j] * matrices[j].rows(index) for j in active)
    drawn = of_rows(np.asarray(taken), index, chances, n, float(masses.sum()), rng)
    W, values = drawn.spectrum
    V, _ = np.linalg.qr(drawn.R.conj().T @ (W / np.sqrt(values)))
    inside = (drawn.scale[:, None] * V[index]).conj().T @ (drawn.R @ V)
    levels, turn = np.linalg.eigh((inside + inside.conj().T) / 2)
    return GibbsState(V @ turn, np.expm1(np.clip(-eta * levels, -700, 700)))


def _traces(
    matrices: list[SampledMatrix], traces: np.ndarray, X: GibbsState, r: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """tr(A_j X) from fresh rows, and what all are off by at most (Chebyshev, shared among them)."""
    values, error = traces / X.partition, 0.0
    if not X.V.shape[1]:
        return values, error
    share = DELTA / len(matrices)
    size = float(np.linalg.norm(X.weights)) / X.partition
    for j, A in enumerate(matrices):
        index, chances = A.sample_rows(r, rng)
        image = A.rows(index) @ X.V
        terms = (X.V[index].conj() * image * X.weights).sum(axis=1).real
        values[j] += float((terms / chances).mean()) / X.partition
        error = max(error, math.sqrt(A.fro2 / (r * share)) * size)
    return values, error

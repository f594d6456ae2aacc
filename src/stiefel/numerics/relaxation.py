"""Successive over-relaxation, and conjugate gradients preconditioned by its symmetric form.

A = D + L + Lᵀ, symmetric positive definite. How fast either method is depends on ω, and the best ω
on A; the bandits of arXiv 2310.02246 learn it from the iteration counts that are returned here.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from stiefel.numerics.least_squares_arrays import like
from stiefel.numerics.sor_operators import (
    GridOperator,
    as_csr,
    check_entries,
    check_symmetric,
    real_array,
)
from stiefel.numerics.sor_sweeps import (
    GridColours,
    MatrixColours,
    NaturalSweeps,
    Outcome,
    RedBlackSweeps,
    check_growth,
    lower_factor,
)

ORDERINGS = ("natural", "red-black")
TOL = 1e-8
MAXITER = 10_000
# Relative residuals that float32 does not reach on ordinary systems.
SINGLE_TOL = 1e-6


class SolveResult(NamedTuple):
    """What a solver found. Numbers for one right-hand side, arrays ``(B,)`` for a batch."""

    x: Any
    """Solution, in the shape of b; a tensor if b is one."""
    iterations: Any
    """Iterations done: the cost that a bandit is told. ``maxiter`` if it did not converge."""
    converged: Any
    """Whether the tolerance was met."""
    residual: Any
    """Last ‖r‖ over ‖r₀‖ (SOR) or ‖b‖ (SSOR-CG): what is held against ``tol``."""


def sor_solve(
    A: Any,
    b: Any,
    x0: Any = None,
    omega: Any = 1.5,
    tol: float | int = TOL,
    maxiter: int = MAXITER,
    ordering: str = "natural",
) -> SolveResult:
    """Solve A x = b by SOR: x += (D/ω + L)⁻¹ (b − A x) until ‖r‖ < tol · ‖r₀‖.

    Args:
        A: Symmetric positive definite ``(n, n)``: SciPy sparse, torch CSR or dense, array-like or
            :class:`GridOperator`. A list of B of them, or ``(B, n, n)``, for a batch.
        b: ``(n,)`` or a batch ``(B, n)``; of the grid's shape for a grid.
        x0: Start, of the same shape; 0 if None. The tolerance is relative to its residual.
        omega: 0 < ω < 2, or ``(B,)`` of them.
        tol: Above 0.
        maxiter: At least 1.
        ordering: ``"natural"``, the order of the rows, or ``"red-black"``: one colour after the
            other, for graphs without odd cycles. It converges at the same rate on 5- and 7-point
            stencils and is faster on a :class:`GridOperator`; its counts differ by a few.

    Returns:
        A :class:`SolveResult`. One iteration at least; b = 0 gives x = 0 in one.

    Raises:
        ValueError: A is not square, not finite, has a diagonal entry that is not positive or
            turns out not to be positive definite; shapes that do not fit; ω outside (0, 2); no
            two-colouring for red-black.
        TypeError: not real numbers.

    Symmetry is not checked. A singular A with a right-hand side in its range converges too.
    Source: arXiv 2310.02246, section 2.
    """
    if ordering not in ORDERINGS:
        raise ValueError(f"ordering must be one of {', '.join(ORDERINGS)}, got {ordering!r}")

    def sweeps(matrix: Any, weight: float, dtype: Any) -> NaturalSweeps | RedBlackSweeps:
        if ordering == "natural":
            return NaturalSweeps(_csr(matrix, dtype), weight)
        grid = isinstance(matrix, GridOperator)
        return RedBlackSweeps(
            GridColours(matrix) if grid else MatrixColours(_csr(matrix, dtype)), weight
        )

    return _solve(sweeps, A, b, x0, omega, tol, maxiter)


def ssor_pcg(
    A: Any,
    b: Any,
    x0: Any = None,
    omega: Any = 1.5,
    tol: float | int = TOL,
    maxiter: int = MAXITER,
) -> SolveResult:
    """Solve A x = b by conjugate gradients with the symmetric SOR preconditioner.

    P = Xᵀ D⁻¹ X / (ω (2 − ω)) with X = D + ωL; natural ordering. It stops when
    ‖r‖ ≤ tol · ‖b‖, relative to b and not to the start as :func:`sor_solve` does.

    Args:
        A: As for :func:`sor_solve`; symmetric, which is checked.
        b: ``(n,)`` or a batch ``(B, n)``; of the grid's shape for a grid.
        x0: Start, of the same shape; 0 if None.
        omega: 0 < ω < 2, or ``(B,)`` of them.
        tol: Above 0.
        maxiter: At least 1.

    Returns:
        A :class:`SolveResult`; 0 iterations if ``x0`` was good enough, 1 for b = 0.

    Raises:
        ValueError: as :func:`sor_solve`; A is not symmetric; a direction p with pᵀA p ≤ 0.
        TypeError: not real numbers.

    Source: arXiv 2310.02246, section 4.
    """
    return _solve(_Preconditioned, A, b, x0, omega, tol, maxiter)


class _Preconditioned:
    """SSOR-CG for one matrix and one ω."""

    def __init__(self, A: Any, omega: float, dtype: Any) -> None:
        self.A = _csr(A, dtype)
        check_symmetric(self.A)
        self.diagonal = self.A.diagonal()
        self.factor = lower_factor(self.A, self.diagonal, omega)
        self.middle = self.diagonal * (omega * (2 - omega))

    def _precondition(self, r: np.ndarray) -> np.ndarray:
        return self.factor.solve(self.middle * self.factor.solve(r, "T"))

    def solve(self, b: np.ndarray, x0: np.ndarray, tol: float, maxiter: int) -> Outcome:
        A, x = self.A, x0.copy()
        size = math.sqrt(b @ b)
        r = b - A @ x
        ratio = math.sqrt(r @ r) / size
        if ratio <= tol:
            return x, 0, True, ratio
        p, rho = np.zeros_like(r), 1.0
        for k in range(1, maxiter + 1):
            z = self._precondition(r)
            before, rho = rho, float(r @ z)
            p = z + (rho / before) * p
            image = A @ p
            curvature = float(p @ image)
            if not curvature > 0:
                raise ValueError(
                    f"A is not positive definite: pᵀAp = {curvature:.1e} for the direction p of "
                    f"iteration {k}"
                )
            x += (rho / curvature) * p
            r -= (rho / curvature) * image
            ratio = math.sqrt(r @ r) / size
            if ratio <= tol:
                return x, k, True, ratio
            check_growth(ratio, A.dtype, k)
        return x, maxiter, False, ratio


def _solve(
    method: Callable[[Any, float, Any], Any],
    A: Any,
    b: Any,
    x0: Any,
    omega: Any,
    tol: float | int,
    maxiter: int,
) -> SolveResult:
    """Check the arguments, solve one system after the other, and put the results together."""
    if not (math.isfinite(tol) and tol > 0):
        raise ValueError(f"tol must be finite and above 0, got {tol}")
    maxiter = operator.index(maxiter)
    if maxiter < 1:
        raise ValueError(f"maxiter must be at least 1, got {maxiter}")
    rhs = real_array(b, "b")
    several = isinstance(A, list | tuple) and len(A) > 0 and _is_matrix(A[0])
    several = several or getattr(A, "ndim", 0) == 3
    given = list(A) if several else [A]
    matrices = [m if isinstance(m, GridOperator) else as_csr(m) for m in given]
    rows, batched = _rows(rhs, matrices, several)
    starts = None if x0 is None else real_array(x0, "x0")
    if starts is not None and starts.shape != rhs.shape:
        raise ValueError(f"x0 must have the shape of b, {rhs.shape}, got {starts.shape}")
    for name, values in (("b", rhs), ("x0", starts)):
        if values is not None:
            check_entries(values, name)
    weights = check_omega(omega, len(rows) if batched else None)
    precision = np.result_type(rhs.dtype, *(m.dtype for m in matrices))
    if precision == np.float32 and tol < SINGLE_TOL:
        warnings.warn(
            f"tol={tol} is below what float32 reaches, about {SINGLE_TOL}; pass float64",
            RuntimeWarning,
            stacklevel=3,
        )
    rows = rows.astype(precision)
    first = np.zeros_like(rows) if starts is None else starts.reshape(rows.shape).astype(precision)
    outcomes, solver, made = [], None, None
    for i, row in enumerate(rows):
        if not row.any():
            outcomes.append((np.zeros_like(row), 1, True, 0.0))
            continue
        wanted = (i if several else 0, weights[i])
        if wanted != made:
            solver, made = method(matrices[wanted[0]], weights[i], precision), wanted
        outcomes.append(solver.solve(row, first[i], tol, maxiter))  # pyrefly: ignore
    x = like(np.stack([o[0] for o in outcomes]).reshape(rhs.shape), b)
    if not batched:
        return SolveResult(x, *outcomes[0][1:])
    return SolveResult(x, *(np.array([o[i] for o in outcomes]) for i in (1, 2, 3)))


def _csr(matrix: Any, dtype: Any) -> Any:
    made = matrix.to_csr() if isinstance(matrix, GridOperator) else matrix
    return made.astype(dtype, copy=False)


def _is_matrix(x: Any) -> bool:
    return isinstance(x, GridOperator) or getattr(x, "ndim", 0) == 2


def _rows(b: np.ndarray, matrices: list[Any], several: bool) -> tuple[np.ndarray, bool]:
    """b as ``(B, n)``, and whether it was a batch."""
    grid = matrices[0] if isinstance(matrices[0], GridOperator) else None
    sizes = {m.size if isinstance(m, GridOperator) else m.shape[0] for m in matrices}
    if len(sizes) > 1:
        raise ValueError(f"the matrices of a batch must have one size, got {sorted(sizes)}")
    (n,) = sizes
    if several:
        if b.shape[:1] != (len(matrices),) or b.size != len(matrices) * n:
            raise ValueError(f"b must have shape ({len(matrices)}, {n}), got {b.shape}")
        return b.reshape(len(matrices), n), True
    if b.shape == (n,) or (grid is not None and b.shape == grid.shape):
        return b.reshape(1, n), False
    if b.ndim == 2 and b.shape[1] == n and len(b):
        return b, True
    grid_shape = f", {grid.shape}" if grid is not None else ""
    raise ValueError(f"b must have shape ({n},){grid_shape} or (B, {n}), got {b.shape}")


def check_omega(omega: Any, batch: int | None = None) -> list[float]:
    """ω as a list, one for each system.

    Raises:
        ValueError: not inside (0, 2), or not as many as there are systems.
        TypeError: not real numbers.
    """
    values = real_array(omega, "omega")
    if values.shape not in ((), (batch,)):
        raise ValueError(
            f"omega must be a number{'' if batch is None else f' or of shape ({batch},)'}, "
            f"got shape {values.shape}"
        )
    if not ((values > 0) & (values < 2)).all():
        raise ValueError(f"omega must lie between 0 and 2, both excluded, got {omega}")
    return np.broadcast_to(values, (batch or 1,)).astype(float).tolist()


def optimal_omega(beta: float | int) -> float:
    """Best ω of SOR for a consistently ordered A: 1 + (β / (1 + √(1 − β²)))².

    Args:
        beta: Spectral radius of the Jacobi iteration I − D⁻¹A, 0 ≤ β < 1. For the Laplacian on
            k × k interior points plus c: 4 cos(π / (k + 1)) / (4 + c).

    Raises:
        ValueError: β outside [0, 1): A is not positive definite.

    Source: Young 1954; arXiv 2310.02246, section 2.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
    return 1 + (beta / (1 + math.sqrt(1 - beta**2))) ** 2


def sor_radius(omega: float | int, beta: float | int) -> float:
    """Spectral radius of SOR for a consistently ordered A: the rate at which residuals fall.

    ω − 1 from the best ω on, else ¼ (ωβ + √(ω²β² − 4(ω − 1)))².

    Args:
        omega: 0 < ω < 2.
        beta: As for :func:`optimal_omega`.

    Raises:
        ValueError: either is outside its range.
    """
    (omega,) = check_omega(omega)
    if omega >= optimal_omega(beta):
        return omega - 1
    return (omega * beta + math.sqrt((omega * beta) ** 2 - 4 * (omega - 1))) ** 2 / 4

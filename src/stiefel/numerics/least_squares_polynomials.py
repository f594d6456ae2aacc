"""Orthonormal polynomials and their tensor products: the usual spaces of polynomial chaos."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from stiefel.numerics.least_squares_arrays import as_array, check_finite

FAMILIES = ("legendre", "hermite", "jacobi")


def orthonormal_polynomials(
    x: Any, m: int, family: str = "legendre", *, a: float | int = 1.0, b: float | int = 1.0
) -> Float[np.ndarray, "*shape m"]:
    """Values of the first m orthonormal polynomials, degrees 0 to m − 1.

    Args:
        x: Points of any shape.
        m: How many, ≥ 1.
        family: ``"legendre"``: orthonormal under the uniform law on [−1, 1]; ``"hermite"``: under
            the standard normal law; ``"jacobi"``: under Beta(a, b) on [0, 1].
        a: Of the Beta law, > 0.
        b: Of the Beta law, > 0.

    Raises:
        ValueError: another family, m < 1, a or b not positive, NaN or Inf in x.
    """
    points = as_array(x, "x")
    check_finite(points, "x")
    centre, root = recurrence(m, family, a, b)
    values = np.empty((*points.shape, m))
    values[..., 0] = 1.0
    for k in range(1, m):
        values[..., k] = (points - centre[k - 1]) * values[..., k - 1]
        if k > 1:
            values[..., k] -= root[k - 2] * values[..., k - 2]
        values[..., k] /= root[k - 1]
    return values


def recurrence(
    m: int, family: str, a: float | int = 1.0, b: float | int = 1.0
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " last"]]:
    """c_k (m,) and r_k (m − 1,) of x p_k = r_{k+1} p_{k+1} + c_k p_k + r_k p_{k−1}."""
    if m < 1:
        raise ValueError(f"m must be ≥ 1, got {m}")
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    k = np.arange(1.0, m)
    if family == "legendre":
        return np.zeros(m), k / np.sqrt(4 * k * k - 1)
    if family == "hermite":
        return np.zeros(m), np.sqrt(k)
    if not (0 < a < np.inf and 0 < b < np.inf):
        raise ValueError(f"a and b must be positive, got a={a}, b={b}")
    # Jacobi polynomials on [−1, 1] have weight (1 − t)^α (1 + t)^β; here t = 2x − 1.
    alpha, beta = b - 1.0, a - 1.0
    s = 2 * k + alpha + beta
    centre = np.empty(m)
    centre[0] = (beta - alpha) / (alpha + beta + 2)
    centre[1:] = (beta**2 - alpha**2) / (s * (s + 2))
    # At k = 1 a factor k + α + β cancels one of the denominator, which may be 0.
    cancelled = np.where(k == 1, 1.0, (k + alpha + beta) / np.where(k == 1, 1.0, s - 1))
    square = 4 * k * (k + alpha) * (k + beta) * cancelled / (s**2 * (s + 1))
    return (centre + 1) / 2, np.sqrt(square) / 2


def total_degree(d: int, p: int) -> Int[np.ndarray, "m d"]:
    """Multi-indices α of d variables with α_1 + … + α_d ≤ p, by degree: (d + p choose d) rows."""
    return _index_set(d, p, lambda index: sum(index) <= p)


def hyperbolic_cross(d: int, p: int) -> Int[np.ndarray, "m d"]:
    """Multi-indices with (α_1 + 1) ⋯ (α_d + 1) ≤ p + 1: few interactions of high degree."""
    return _index_set(d, p, lambda index: np.prod([i + 1 for i in index]) <= p + 1)


def tensor_polynomials(
    X: Any, index_set: Any, family: str = "legendre"
) -> Float[np.ndarray, "n m"]:
    """Products p_{α_1}(x_1) ⋯ p_{α_d}(x_d), orthonormal under the product law.

    Args:
        X: Points ``(n, d)``.
        index_set: Multi-indices α ``(m, d)``, from :func:`total_degree` or
            :func:`hyperbolic_cross`.
        family: Of every variable, ``"legendre"`` or ``"hermite"``.

    Raises:
        ValueError: shapes that do not fit, negative degrees, another family, NaN or Inf.
    """
    points, alpha = as_array(X, "X"), np.asarray(index_set)
    if points.ndim != 2 or alpha.ndim != 2 or points.shape[1] != alpha.shape[1]:
        raise ValueError(
            "X must be (n, d) and index_set (m, d) with the same d, got shapes "
            f"{points.shape} and {alpha.shape}"
        )
    if alpha.dtype.kind not in "iu" or alpha.size == 0 or alpha.min() < 0:
        raise ValueError("index_set must hold integers ≥ 0, at least one row of them")
    if family not in ("legendre", "hermite"):
        raise ValueError(f"family must be 'legendre' or 'hermite', got {family!r}")
    values = orthonormal_polynomials(points, int(alpha.max()) + 1, family)
    found = np.ones((len(points), len(alpha)))
    for variable in range(points.shape[1]):
        found *= values[:, variable, alpha[:, variable]]
    return found


def _index_set(d: int, p: int, allowed: Any) -> np.ndarray:
    if d < 1 or p < 0:
        raise ValueError(f"d must be ≥ 1 and p ≥ 0, got d={d}, p={p}")
    found: list[tuple[int, ...]] = [()]
    for _ in range(d):  # both sets are downward closed: every prefix is allowed too
        found = [(*head, k) for head, k in product(found, range(p + 1)) if allowed((*head, k))]
    return np.array(sorted(found, key=lambda index: (sum(index), tuple(-i for i in index))))

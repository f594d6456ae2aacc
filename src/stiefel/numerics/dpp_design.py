"""Where to evaluate: designs with weights for least squares (arXiv 2312.14057).

The fit is argmin over v in the space of (1/n) Σ w_i (f(x_i) − v(x_i))². Points have the density
k(x, x)/m with respect to μ under every method here but ``uniform``, so that w = m / k makes the
empirical Gram matrix G the identity on average; without the weights the fit is biased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stiefel.numerics.dpp_sampling import sample_dpp, sample_leverage
from stiefel.numerics.least_squares_arrays import as_array, as_generator, like
from stiefel.numerics.least_squares_basis import Basis, fit_basis

METHODS = ("dpp-repeat", "dpp", "volume", "volume-repeat", "iid", "uniform")
DELTA = 0.5
MAX_TRIES = 1000
DEFAULT_REPEATS = 4
"""Points per dimension where no number is given."""
STABLE_REPEATS = 6
"""The same where λ_min(G) ≥ 1/2 is asked for: up to m = 200, DPP repetition has it in one of four
samples or more. Four per dimension have it in half of them at m = 20, in none at m = 100."""


@dataclass(frozen=True, eq=False)
class Design:
    """Which candidates to evaluate and how to weight them."""

    indices: Any
    """Candidates ``(n,)``, int64. One may come twice: evaluate it once, keep both."""
    weights: Any
    """w_i ``(n,)``, float64. Hand them to any weighted least squares."""
    lambda_min: float
    """Smallest eigenvalue of the empirical Gram matrix G, whose expectation is I."""
    tries: int
    """Whole samples drawn until the stability that was asked for held."""
    method: str = "dpp-repeat"


def sample_design(
    Phi_or_basis: Any,
    n: int | None = None,
    *,
    method: str = "dpp-repeat",
    repeats: int | None = None,
    mu: Any = None,
    delta: float | int | None = None,
    zeta: float | int = 1.0,
    generator: Any = None,
    max_tries: int = MAX_TRIES,
) -> Design:
    """Choose n of the candidates for least squares in the span of m features.

    - ``dpp-repeat``: n / m independent draws of the projection DPP, one after the other.
    - ``dpp``: one such draw, n = m.
    - ``volume``: one draw and n − m independent points, shuffled; this is volume-rescaled sampling,
      with density proportional to det G. The fit is unbiased: E f̂ = P f.
    - ``volume-repeat``: ``repeats`` independent samples of that kind, of equal size ≥ m.
    - ``iid``: independent points of density k/m, called optimal or Christoffel sampling.
    - ``uniform``: independent points of μ, unweighted; for comparison.

    Args:
        Phi_or_basis: Features ``(N, M)``, as for :func:`~stiefel.numerics.fit_basis`, or a basis.
        n: Points, ≥ m. None: ``repeats`` · m with four repeats, or six if ``delta`` is given; m for
            ``dpp``.
        method: See above.
        repeats: Draws of ``dpp-repeat`` (n = repeats · m), parts of ``volume-repeat`` (2 if None).
        mu: The candidates' weights ``(N,)``, only with features.
        delta: Draw the whole sample again until λ_min(G) ≥ 1 − δ, 0 < δ < 1. None: take the first.
        zeta: For ``iid`` and ``volume``: independent points come from ζ k/m + (1 − ζ), 0 < ζ ≤ 1,
            and the weights, 1 over that, are at most 1 / (1 − ζ).
        generator: NumPy generator, seed, ``RandomState``, ``torch.Generator`` or None.
        max_tries: Samples drawn before giving up.

    Returns:
        A :class:`Design`; tensors in it if Φ is a tensor.

    Raises:
        ValueError: n < m, n not a multiple of m where it has to be, arguments that do not fit.
        RuntimeError: λ_min stayed below 1 − δ; the message gives the best one.
    """
    given = Phi_or_basis
    if isinstance(given, Basis):
        if mu is not None:
            raise ValueError("mu belongs to the basis; pass it to fit_basis")
        basis = given
    else:
        basis = fit_basis(given, mu)
    usual = DEFAULT_REPEATS if delta is None else STABLE_REPEATS
    n, parts = sizes(basis.dimension, n, method, repeats, usual)
    if delta is not None and not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, got {delta}")
    if not 0 < zeta <= 1:
        raise ValueError(f"zeta must be above 0 and at most 1, got {zeta}")
    if zeta != 1 and method not in ("iid", "volume", "volume-repeat"):
        raise ValueError(
            f"zeta={zeta} needs method 'iid', 'volume' or 'volume-repeat': points of {method!r} "
            "have a density of their own"
        )
    if max_tries < 1:
        raise ValueError(f"max_tries must be ≥ 1, got {max_tries}")
    rng = as_generator(generator)
    best, wanted = -np.inf, -np.inf if delta is None else 1 - delta
    for tries in range(1, max_tries + 1):
        indices = _draw(basis, n, parts, method, zeta, rng)
        weights = _weights(basis, indices, method, zeta)
        smallest = float(singular_values(basis, indices, weights)[-1] ** 2)
        if smallest >= wanted:
            return Design(like(indices, given), like(weights, given), smallest, tries, method)
        best = max(best, smallest)
    m = basis.dimension
    raise RuntimeError(
        f"no sample of {n} points had lambda_min ≥ {wanted:g} in {max_tries} tries, the best "
        f"had {best:.3g}. Take more points, say n={(n // m + max(1, n // (2 * m))) * m}, a larger "
        "delta, or delta=None."
    )


def sizes(
    m: int, n: int | None, method: str, repeats: int | None, usual: int = DEFAULT_REPEATS
) -> tuple[int, int]:
    """n and the number of independent parts that a design has; ``usual`` · m points if not said.

    Raises:
        ValueError: see :func:`sample_design`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats must be ≥ 1, got {repeats}")
    if method == "dpp":
        repeats, fixed = repeats or 1, m
        if repeats != 1:
            raise ValueError(f"'dpp' is one draw, got repeats={repeats}; use 'dpp-repeat'")
    elif method == "dpp-repeat":
        if repeats is None:
            repeats = usual if n is None else max(n // m, 1)
        fixed = repeats * m
    elif method == "volume-repeat":
        repeats = repeats or 2
        fixed = None
    else:
        if repeats not in (None, 1):
            raise ValueError(f"repeats={repeats} means nothing for method {method!r}; pass n")
        repeats, fixed = 1, None
    if n is None:
        n = fixed or max(usual, repeats) * m
        n = -(-n // repeats) * repeats
    if n < m * (repeats if method == "volume-repeat" else 1):
        raise ValueError(
            f"need at least m={m} samples{' in each part' if repeats > 1 else ''}, got n={n}"
            + (f" in {repeats} parts" if method == "volume-repeat" else "")
        )
    if fixed is not None and n != fixed:
        below, above = n // m * m, -(-n // m) * m
        near = f"{below} or {above}" if below != above else str(fixed)
        raise ValueError(
            f"{method!r} takes whole draws of m={m} points, got n={n}"
            + (f" and repeats={repeats}" if repeats > 1 else "")
            + f"; pass n={m if method == 'dpp' else near}"
        )
    if n % repeats:
        raise ValueError(f"n={n} cannot be split into {repeats} equal parts")
    return n, repeats


def _draw(
    basis: Basis, n: int, parts: int, method: str, zeta: float | int, rng: np.random.Generator
) -> np.ndarray:
    if method == "iid":
        return sample_leverage(basis, n, zeta=zeta, generator=rng)
    if method == "uniform":
        return sample_leverage(basis, n, zeta=0, generator=rng)
    if method in ("dpp", "dpp-repeat"):
        return sample_dpp(basis, parts, generator=rng).ravel()
    # Volume sampling: the DPP part does not depend on ν (Cauchy–Binet), the rest is ν alone.
    draws = sample_dpp(basis, parts, generator=rng)
    others = sample_leverage(basis, n - draws.size, zeta=zeta, generator=rng).reshape(parts, -1)
    return rng.permuted(np.concatenate((draws, others), axis=1), axis=1).ravel()


def _weights(basis: Basis, indices: np.ndarray, method: str, zeta: float | int) -> np.ndarray:
    """w = 1 / (ζ k/m + 1 − ζ)."""
    if method == "uniform":
        return np.ones(len(indices))
    return 1.0 / (zeta * basis.kernel(indices) / basis.dimension + (1 - zeta))


def singular_values(basis: Basis, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of A = √(w_i / n) φ(x_i) (m,), descending; their squares are the eigenvalues of G."""
    scale = np.sqrt(weights / (len(indices) * basis.mu[indices]))
    return np.linalg.svd(scale[:, None] * basis.rows(indices), compute_uv=False)


@dataclass(frozen=True, eq=False)
class LeastSquaresFit:
    """Weighted least squares on a design."""

    coefficients: Any
    """Of the features as given, ``(M,)`` or ``(M, k)``; 0 for dropped columns."""
    orthonormal: Any
    """Of the orthonormal functions φ, ``(m,)`` or ``(m, k)``."""
    lambda_min: float
    """Smallest eigenvalue of G."""
    condition: float
    """Condition number of A = √(w_i / n) φ(x_i)."""


def solve_design(basis: Basis, design: Design, values: Any) -> LeastSquaresFit:
    """The weighted least-squares fit to what was measured at the points of a design.

    Args:
        basis: What the design was drawn from.
        design: Indices and weights.
        values: f at ``design.indices``, in that order: ``(n,)``, or ``(n, k)`` for k outputs.

    Raises:
        ValueError: another number of values, NaN or Inf, or points on which the basis is dependent.
    """
    f = as_array(values, "values")
    indices = as_array(design.indices, "indices").astype(np.int64)
    weights = as_array(design.weights, "weights")
    if f.ndim not in (1, 2) or len(f) != len(indices):
        raise ValueError(
            f"values must be ({len(indices)},) or ({len(indices)}, k), one for each index of the "
            f"design, got shape {f.shape}"
        )
    if not np.isfinite(f).all():
        bad = int((~np.isfinite(f)).sum())
        raise ValueError(f"values must be finite, but {bad} of them are NaN or infinite")
    n = len(indices)
    scale = np.sqrt(weights / (n * basis.mu[indices]))
    found, sigma, _ = weighted_solution(
        scale[:, None] * basis.rows(indices), (np.sqrt(weights / n) * f.T).T
    )
    return LeastSquaresFit(
        like(basis.feature_coefficients(found), values),
        like(found, values),
        float(sigma[-1] ** 2),
        float(sigma[0] / sigma[-1]),
    )


def weighted_solution(
    a: np.ndarray, b: np.ndarray, *, unique: bool = True
) -> tuple[np.ndarray, np.ndarray, int]:
    """argmin ‖A c − b‖ by SVD, the m singular values of A, and its rank.

    Args:
        a: ``(n, m)``.
        b: ``(n,)`` or ``(n, k)``.
        unique: Insist on full rank; else c is the shortest of all solutions.

    Raises:
        ValueError: A has not full rank though ``unique``; the message gives it.
    """
    n, m = a.shape
    if unique and n < m:
        raise ValueError(f"need at least m={m} samples, got {n}")
    u, sigma, vt = np.linalg.svd(a, full_matrices=False)
    rank = int((sigma > max(a.shape) * np.finfo(np.float64).eps * sigma[0]).sum())
    if unique and rank < m:
        raise ValueError(
            f"the {n} samples have rank {rank} in a space of dimension m={m}: "
            "they do not determine a fit. Sample more or other points, or fewer functions."
        )
    found = vt[:rank].T @ ((u[:, :rank].T @ b).T / sigma[:rank]).T
    return found, np.pad(sigma, (0, m - len(sigma))), rank

"""Orthonormal bases of features over candidates, in memory or streamed in blocks of rows.

Candidates x_1 … x_N carry weights μ_i (sum 1) and features Φ, one row each. With diag(√μ) Φ = QR,
the functions φ = Φ R⁻¹ are orthonormal: Σ μ_i φ(x_i) φ(x_i)ᵀ = I. The squared row norms of Q are
the leverages ℓ_i = μ_i k(x_i, x_i), with k(x, y) = φ(x)ᵀφ(y); they sum to m and depend on the span
of the features only. Setting of arXiv 2312.14057.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from stiefel.numerics.least_squares_arrays import as_array, check_finite, is_tensor, measure

RTOL = 1e-10
"""Columns are dependent when less than this part of them is left beside the others."""
KEPT_BYTES = 256 << 20
"""Q stays in memory up to this size; beyond, its rows are computed when they are asked for."""
_BLOCK_BYTES = 4 << 20
# Φ R⁻¹ is orthonormal to about this times 1e-16 after one pass; above it a second one follows.
_WELL_CONDITIONED = 1e3


@dataclass(frozen=True, eq=False, repr=False)
class Basis:
    """An orthonormal basis of the span of the features. :func:`fit_basis` makes it."""

    R: Float[np.ndarray, "m m"]
    """Upper triangular with positive diagonal: √μ Φ = Q R."""
    leverage: Float[np.ndarray, " N"]
    """ℓ_i, squared row norms of Q; sum m."""
    mu: Float[np.ndarray, " N"]
    """The candidates' weights, sum 1."""
    columns: Int[np.ndarray, " m"]
    """The features that span the space, ascending; all of them unless some were dropped."""
    Q: Float[np.ndarray, "N m"] | None
    """None where it is not kept in memory; :meth:`rows` gives its rows either way."""
    features: int
    """Columns that Φ had."""
    inverses: tuple[Float[np.ndarray, "m m"], ...] = field(default=())
    """R⁻¹ as factors: each pass over the rows has added one."""
    source: Any = None

    @property
    def size(self) -> int:
        """N, the number of candidates."""
        return len(self.leverage)

    @property
    def dimension(self) -> int:
        """m, the dimension of the space."""
        return len(self.R)

    @cached_property
    def cumulative(self) -> Float[np.ndarray, " N"]:
        """Running sum of the leverages, to draw by."""
        return np.cumsum(self.leverage)

    @cached_property
    def cumulative_mu(self) -> Float[np.ndarray, " N"]:
        """Running sum of μ, to draw by."""
        return np.cumsum(self.mu)

    def rows(self, indices: Any) -> Float[np.ndarray, "n m"]:
        """Rows of Q at ``indices``, integers (n,) or a slice of step 1."""
        if self.Q is not None:
            return self.Q[indices]
        if isinstance(indices, slice):
            indices = slice(*indices.indices(self.size))
        block = _read(self.source, indices, self.features)
        return rotate(block[:, self.columns] * np.sqrt(self.mu[indices])[:, None], self.inverses)

    def kernel(self, indices: Any = slice(None)) -> Float[np.ndarray, " n"]:
        """k(x, x) at the candidates ``indices``, the inverse Christoffel function; 0 where μ is."""
        mu, leverage = self.mu[indices], self.leverage[indices]
        return np.divide(leverage, mu, out=np.zeros_like(leverage), where=mu > 0)

    def evaluate(self, Phi: Any) -> Float[np.ndarray, "n m"]:
        """φ(x), orthonormal functions at points with features ``Phi`` (n, columns of Φ).

        Raises:
            ValueError: another number of columns, NaN or Inf.
        """
        values = as_array(Phi, "Phi")
        if values.ndim != 2 or values.shape[1] != self.features:
            raise ValueError(f"Phi must be (n, {self.features}), got shape {values.shape}")
        check_finite(values, "Phi")
        return rotate(values[:, self.columns], self.inverses)

    def feature_coefficients(self, coefficients: np.ndarray) -> np.ndarray:
        """Coefficients (m, …) of φ as coefficients (columns of Φ, …) of the features themselves."""
        found = coefficients
        for inverse in reversed(self.inverses):
            found = inverse @ found
        whole = np.zeros((self.features, *found.shape[1:]))
        whole[self.columns] = found
        return whole

    def project(self, values: Any) -> np.ndarray:
        """Coefficients (m, …) of P f, the best approximation, from all values f (N, …).

        What a design of a few points is compared with; costs one pass over the candidates.
        """
        f = as_array(values, "values")
        if f.shape[:1] != (self.size,):
            raise ValueError(f"values must have {self.size} rows, got shape {f.shape}")
        total = np.zeros((self.dimension, *f.shape[1:]))
        for index in blocks(self.size, self.dimension):
            weighted = (np.sqrt(self.mu[index]) * f[index].T).T
            total += self.rows(index).T @ weighted
        return total

    def __repr__(self) -> str:
        where = "in memory" if self.Q is not None else "rows on demand"
        return f"Basis({self.size} candidates, dimension {self.dimension}, {where})"


def fit_basis(
    Phi: Any,
    mu: Any = None,
    rtol: float | int = RTOL,
    *,
    rank: str = "raise",
    size: int | None = None,
    keep: bool | None = None,
) -> Basis:
    """Orthonormalise features over the candidates by QR, in blocks of rows.

    R comes from QR factorisations of row blocks, each stacked under the R of those before (TSQR);
    R⁻¹ then gives the rows of Q. Where R is ill-conditioned a second pass orthonormalises those
    again. Memory beside Φ and (if kept) Q: N numbers and one block.

    Args:
        Phi: Features ``(N, M)``: an array, a tensor, anything that slices and indexes to rows (a
            memory-mapped file), or a function of an index array ``(n,)`` that returns the rows
            ``(n, M)`` for millions of candidates that are never all in memory. Float32 and integers
            are computed in float64.
        mu: Weights ``(N,)`` of the candidates, ≥ 0, normalised here; None: uniform.
        rtol: A column is dependent when the part of it that is orthogonal to better ones is at most
            ``rtol`` of its norm.
        rank: ``"raise"`` or ``"drop"``: what to do with dependent columns.
        size: N, needed where Φ is a function.
        keep: Hold Q in memory; None: if it takes at most 256 MiB.

    Raises:
        ValueError: N < M, dependent columns (the message gives the rank), NaN or Inf in Φ or μ, μ
            negative or zero, ``rank`` or ``rtol`` not allowed.
        TypeError: Φ is not real.
    """
    if rank not in ("raise", "drop"):
        raise ValueError(f"rank must be 'raise' or 'drop', got {rank!r}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must be between 0 and 1, got {rtol}")
    source, n, width = _shape(Phi, size)
    weights = measure(mu, n)
    root = np.sqrt(weights) if mu is not None else None

    def scaled(index: slice) -> np.ndarray:
        block = _read(source, index, width)
        check_finite(block, f"Phi (rows {index.start} to {min(index.stop, n) - 1})")
        return block * (root[index, None] if root is not None else n**-0.5)

    whole = _triangle(scaled(index) for index in blocks(n, width))
    columns = _independent(whole, rtol, rank)
    r = _positive(_triangle(iter([whole[:, columns]])))
    m = len(columns)
    inverses = [_inverse(r)]
    norms = _norms(r)
    keep = n * m * 8 <= KEPT_BYTES if keep is None else keep
    q = np.empty((n, m)) if keep else None

    def orthonormal(index: slice) -> np.ndarray:
        return rotate(scaled(index)[:, columns], tuple(inverses))

    if np.linalg.cond(r / norms) > _WELL_CONDITIONED:
        again = _positive(_triangle(orthonormal(index) for index in blocks(n, m)))
        inverses.append(_inverse(again))
        r = again @ r
    leverage = np.empty(n)
    for index in blocks(n, m):
        block = orthonormal(index)
        leverage[index] = np.einsum("ij,ij->i", block, block)
        if q is not None:
            q[index] = block
    return Basis(r, leverage, weights, columns, q, width, tuple(inverses), source)


def blocks(n: int, width: int) -> Iterator[slice]:
    """Slices that cover ``range(n)``, each a few MiB of ``width`` float64 columns."""
    step = max(4 * width, _BLOCK_BYTES // (8 * width))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _shape(Phi: Any, size: int | None) -> tuple[Any, int, int]:
    """What rows are read from, N and the number of columns."""
    if is_tensor(Phi) or isinstance(Phi, list | tuple):
        Phi = as_array(Phi, "Phi")
    if callable(Phi) and not hasattr(Phi, "shape"):
        if size is None or size < 1:
            raise ValueError(
                f"size must be the number of candidates where Phi is a function: {size}"
            )
        first = as_array(Phi(np.arange(1)), "Phi")
        if first.ndim != 2:
            raise ValueError(f"Phi must return rows (n, M), got shape {first.shape} for one index")
        n, width = size, first.shape[1]
    else:
        if len(Phi.shape) != 2:
            raise ValueError(f"Phi must be (candidates, features), got shape {tuple(Phi.shape)}")
        n, width = (int(k) for k in Phi.shape)
        if size not in (None, n):
            raise ValueError(f"size is {size}, but Phi has {n} rows")
    if width < 1:
        raise ValueError("Phi has no columns; at least one feature is needed")
    if n < width:
        raise ValueError(f"need at least m={width} candidates for {width} features, got N={n}")
    return Phi, n, width


def _read(source: Any, index: Any, width: int) -> np.ndarray:
    """Rows of Φ as float64 (n, width)."""
    if callable(source) and not hasattr(source, "shape"):
        if isinstance(index, slice):
            index = np.arange(index.start, index.stop)
        block = as_array(source(index), "Phi")
        if block.shape != (len(index), width):
            raise ValueError(
                f"Phi must return rows {(len(index), width)} for {len(index)} indices, "
                f"got shape {block.shape}"
            )
        return block
    return as_array(source[index], "Phi")


def _triangle(rows: Iterator[np.ndarray]) -> np.ndarray:
    """R of all blocks stacked, one block at a time."""
    r: np.ndarray | None = None
    for block in rows:
        stacked = block if r is None else np.vstack((r, block))
        r = np.asarray(np.linalg.qr(stacked, mode="r"))
    if r is None:
        raise ValueError("Phi has no rows")
    return r


def _positive(r: np.ndarray) -> np.ndarray:
    """R with a positive diagonal: signs no longer depend on how rows were blocked."""
    return r * np.where(np.diagonal(r) < 0, -1.0, 1.0)[:, None]


def _inverse(r: np.ndarray) -> np.ndarray:
    from scipy.linalg import solve_triangular

    return np.asarray(solve_triangular(r, np.eye(len(r))))


def rotate(rows: np.ndarray, inverses: tuple[np.ndarray, ...]) -> np.ndarray:
    """Rows of Φ as rows of Φ R⁻¹, R⁻¹ given as factors."""
    for inverse in inverses:
        rows = rows @ inverse
    return rows


def _norms(r: np.ndarray) -> np.ndarray:
    """Of the columns; no square overflows or vanishes."""
    largest = np.abs(r).max(axis=0)
    return largest * np.linalg.norm(r / np.where(largest > 0, largest, 1.0), axis=0)


def _independent(r: np.ndarray, rtol: float | int, rank: str) -> np.ndarray:
    """Columns that span the space, by QR with pivoting of R with columns of unit norm."""
    from scipy.linalg import qr

    norms = _norms(r)
    unit = np.divide(r, norms, out=np.zeros_like(r), where=norms > 0)
    triangle, pivots = qr(unit, mode="r", pivoting=True)
    left = np.abs(np.diagonal(triangle))
    found = int((left > rtol).sum())
    m = r.shape[1]
    if found == m:
        return np.arange(m)
    if rank == "raise" or found == 0:
        others = ", ".join(str(c) for c in sorted(pivots[found:])[:5])
        remedy = "Leave columns out" + (
            "" if found == 0 else ", or pass rank='drop' to have it done"
        )
        raise ValueError(
            f"Phi has rank {found} with {m} columns (rtol={rtol:g}); columns such as {others} "
            f"depend on the others where mu > 0. {remedy}."
        )
    return np.sort(pivots[:found])

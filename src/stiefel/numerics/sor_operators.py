"""What the relaxation solvers take: matrices of several makes, and stencils that are never stored.

A = D + L + Lᵀ with a positive diagonal D. Everything becomes a SciPy CSR matrix in float32 or
float64, except a :class:`GridOperator`, whose red-black sweeps work on slices of arrays.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from stiefel.numerics.least_squares_arrays import is_tensor


class GridOperator:
    """A symmetric stencil on a grid, matrix-free: diagonal and one coupling per axis.

    Unknowns are numbered in C order. The 5-point Laplacian is
    ``GridOperator((nx, ny), 4.0, (-1.0, -1.0))``; with a shift c the diagonal is 4 + c.

    Args:
        shape: Points along each axis, one axis or more.
        diag: Diagonal entries: a number or an array that broadcasts to ``shape``; positive.
        couplings: For each axis a number, or an array of the matrix entries between neighbours
            along it: ``shape`` with one less along that axis. Negative for a diffusion operator.

    Raises:
        ValueError: empty or non-positive shape, couplings of another number or size, entries that
            are not finite, a diagonal that is not positive.
        TypeError: complex numbers, text or objects.
    """

    def __init__(self, shape: Sequence[int], diag: Any, couplings: Sequence[Any]) -> None:
        self.shape = tuple(operator.index(s) for s in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape must be one or more positive lengths, got {self.shape}")
        if len(couplings) != len(self.shape):
            raise ValueError(
                f"couplings must have one entry per axis, {len(self.shape)} for shape "
                f"{self.shape}, got {len(couplings)}"
            )
        given = [real_array(diag, "diag")]
        given += [real_array(c, f"couplings[{a}]") for a, c in enumerate(couplings)]
        arrays = [x.dtype for x in given if x.ndim]
        self.dtype = np.result_type(*arrays) if arrays else np.dtype(np.float64)
        try:
            full = np.broadcast_to(given[0].astype(self.dtype), self.shape)
        except ValueError:
            raise ValueError(
                f"diag must broadcast to shape {self.shape}, got shape {given[0].shape}"
            ) from None
        check_diagonal(full.ravel())
        self.diag = full
        self.couplings: list[Any] = []
        for axis, coupling in enumerate(given[1:]):
            edges = tuple(s - (a == axis) for a, s in enumerate(self.shape))
            if coupling.shape not in ((), edges):
                raise ValueError(
                    f"couplings[{axis}] must be a number or of shape {edges}, got shape "
                    f"{coupling.shape}"
                )
            check_entries(coupling, f"couplings[{axis}]")
            self.couplings.append(coupling.astype(self.dtype) if coupling.ndim else float(coupling))

    @property
    def size(self) -> int:
        """Number of unknowns n."""
        return int(np.prod(self.shape))

    def matvec(self, x: Any) -> Any:
        """A x for x ``(n,)`` or of the grid's shape; returned in the same shape.

        Raises:
            ValueError: x has another shape.
        """
        x = np.asarray(x)
        if x.shape not in ((self.size,), self.shape):
            raise ValueError(
                f"x must have shape ({self.size},) or {self.shape}, got {tuple(x.shape)}"
            )
        grid = x.reshape(self.shape)
        y = self.diag * grid
        for axis, coupling in enumerate(self.couplings):
            low, high = (
                tuple(s if a == axis else slice(None) for a in range(grid.ndim))
                for s in (slice(None, -1), slice(1, None))
            )
            y[low] += coupling * grid[high]
            y[high] += coupling * grid[low]
        return y.reshape(x.shape)

    __matmul__ = matvec

    @cached_property
    def _csr(self) -> Any:
        import scipy.sparse as sp

        index = np.arange(self.size).reshape(self.shape)
        rows, columns, values = [index.ravel()], [index.ravel()], [self.diag.ravel()]
        for axis, coupling in enumerate(self.couplings):
            low = np.delete(index, -1, axis)
            high = np.delete(index, 0, axis)
            entries = np.broadcast_to(np.asarray(coupling, self.dtype), low.shape).ravel()
            rows += [low.ravel(), high.ravel()]
            columns += [high.ravel(), low.ravel()]
            values += [entries, entries]
        triples = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
        return sp.csr_matrix(triples, shape=(self.size, self.size))

    def to_csr(self) -> Any:
        """The matrix, ``scipy.sparse.csr_matrix`` ``(n, n)``; kept once made."""
        return self._csr


def real_array(x: Any, name: str) -> np.ndarray:
    """``x`` as a float32 or float64 array; other real numbers become float64.

    Raises:
        TypeError: complex numbers, text or objects.
    """
    values = x.detach().cpu().numpy() if is_tensor(x) else np.asarray(x)
    if values.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {values.dtype}")
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


def check_entries(x: np.ndarray, name: str) -> None:
    """Raise ``ValueError`` if ``x`` holds a NaN or an infinity."""
    finite = np.isfinite(x)
    if not finite.all():
        raise ValueError(
            f"{name} must be finite, but {int(finite.size - finite.sum())} of its {finite.size} "
            "entries are NaN or infinite"
        )


def check_diagonal(diagonal: np.ndarray) -> None:
    """Raise ``ValueError`` unless every entry is finite and positive; names the first."""
    check_entries(diagonal, "the diagonal of A")
    bad = np.flatnonzero(diagonal <= 0)
    if bad.size:
        raise ValueError(
            f"SOR needs positive diagonal entries, but A[{bad[0]}, {bad[0]}] = {diagonal[bad[0]]}"
            f" ({bad.size} of {diagonal.size} are not positive)"
        )


def as_csr(A: Any) -> Any:
    """A square CSR matrix ``(n, n)`` in float32 or float64 without duplicates, rows sorted.

    Args:
        A: SciPy sparse, torch CSR, COO or dense, array-like, or a :class:`GridOperator`.

    Raises:
        ValueError: not square, empty, not finite, or a diagonal that is not positive.
        TypeError: not real numbers.
    """
    import scipy.sparse as sp

    if isinstance(A, GridOperator):
        return A.to_csr()
    if is_tensor(A):
        A = _from_torch(A)
    if not sp.issparse(A):
        dense = real_array(A, "A")
        if dense.ndim != 2:
            raise ValueError(f"A must be a matrix (n, n), got shape {dense.shape}")
        A = sp.csr_matrix(dense)
    csr = A.tocsr()
    if csr.ndim != 2 or csr.shape[0] != csr.shape[1] or not csr.shape[0]:
        raise ValueError(f"A must be square (n, n) and not empty, got shape {csr.shape}")
    if csr.dtype not in (np.float32, np.float64):
        if csr.dtype.kind not in "fiub":
            raise TypeError(f"A must hold real numbers, got dtype {csr.dtype}")
        csr = csr.astype(np.float64)
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    check_entries(csr.data, "A")
    check_diagonal(csr.diagonal())
    return csr


def _from_torch(A: Any) -> Any:
    import scipy.sparse as sp
    import torch

    if A.layout is torch.strided:
        return A.detach().cpu().numpy()
    if A.layout is torch.sparse_csr:
        parts = (A.values(), A.col_indices(), A.crow_indices())
        return sp.csr_matrix(tuple(p.detach().cpu().numpy() for p in parts), shape=tuple(A.shape))
    if A.layout is torch.sparse_coo:
        entries = A.coalesce().detach().cpu()
        places = tuple(entries.indices().numpy())
        return sp.coo_matrix((entries.values().numpy(), places), shape=tuple(A.shape))
    raise TypeError(f"A must be a dense, CSR or COO tensor, got layout {A.layout}")


def check_symmetric(A: Any) -> None:
    """Raise ``ValueError`` if a CSR matrix is not symmetric, at the price of two products.

    uᵀ(A v) = vᵀ(A u) for random u, v tells an asymmetric matrix with probability one; seeded, so
    that the answer is always the same.
    """
    u, v = np.random.default_rng(0).standard_normal((2, A.shape[0]))
    difference = abs(u @ (A @ v) - v @ (A @ u))
    size = np.linalg.norm(A.data) * np.linalg.norm(u)
    allowed = 1e-10 if A.dtype == np.float64 else 1e-5
    if difference > allowed * size:
        raise ValueError(
            f"A must be symmetric: |uᵀAv − vᵀAu| = {difference:.1e} for random u and v, "
            f"at most {allowed * size:.0e} is allowed"
        )

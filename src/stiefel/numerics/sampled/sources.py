"""Matrices that are sampled from: one way of reading for arrays, files, sparse matrices, tensors.

A source reads rows, single entries and blocks of what it was given, and copies nothing of it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from stiefel.numerics.least_squares_arrays import is_tensor

# Entries that are looked at together while a matrix is passed over: 4 MiB of float64.
BLOCK = 1 << 19
KINDS = "fiubc"


class Rows(ABC):
    """How rows of a matrix ``(n, d)`` are read."""

    shape: tuple[int, int]
    dtype: np.dtype

    @abstractmethod
    def rows(self, index: Int[np.ndarray, " s"]) -> Shaped[np.ndarray, "s d"]:
        """Rows, dense, in the dtype of the matrix."""

    @abstractmethod
    def pick(self, i: Int[np.ndarray, " s"], j: Int[np.ndarray, " s"]) -> Shaped[np.ndarray, " s"]:
        """The entries at ``(i, j)``."""

    @abstractmethod
    def stored(
        self, index: Int[np.ndarray, " s"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """What is stored of these rows: values, where each row starts, columns (None: all)."""


class Source(Rows):
    """A matrix that was given, which can be passed over as well."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[int, Any]]:
        """First row and rows, block by block."""


def as_source(a: Any) -> Source:
    """The source that reads ``a``.

    Args:
        a: NumPy array (memory-mapped or not), SciPy CSR, torch tensor (strided or CSR), or nested
            lists; two-dimensional, of numbers.

    Raises:
        TypeError: another sparse format, entries that are not numbers.
        ValueError: not two-dimensional, empty, or a sparse matrix that stores an entry twice.
    """
    if is_tensor(a):
        source = _of_tensor(a)
    elif _is_scipy_sparse(a):
        source = SparseSource(a)
    else:
        array = a if isinstance(a, np.ndarray) else np.asarray(a)
        source = DenseSource(array)
    if min(source.shape) < 1:
        raise ValueError(f"A must have at least one row and one column, got shape {source.shape}")
    return source


def square_norms(rows: np.ndarray) -> Float[np.ndarray, " n"]:
    """Squared norms of dense rows, in float64 whatever the dtype."""
    if rows.dtype.kind == "c":
        rows = rows.astype(np.complex128, copy=False)
        return square_norms(rows.real) + square_norms(rows.imag)
    rows = rows.astype(np.float64, copy=False)
    return np.einsum("ij,ij->i", rows, rows)


def absolute_squares(values: np.ndarray) -> Float[np.ndarray, "*shape"]:
    """|v|² of every entry, in float64; infinite beyond it."""
    with np.errstate(over="ignore"):
        if values.dtype.kind == "c":
            values = values.astype(np.complex128, copy=False)
            return np.square(values.real) + np.square(values.imag)
        return np.square(values.astype(np.float64, copy=False))


def check_numbers(dtype: np.dtype, name: str) -> None:
    """Raise ``TypeError`` unless entries of this dtype are numbers."""
    if dtype.kind not in KINDS:
        raise TypeError(f"{name} must hold numbers, got dtype {dtype}")


class DenseSource(Source):
    """A NumPy array, in memory or mapped from a file."""

    def __init__(self, a: np.ndarray) -> None:
        check_numbers(a.dtype, "A")
        if a.ndim != 2:
            raise ValueError(f"A must be two-dimensional (n, d), got shape {a.shape}")
        self._a = a
        self.shape = (a.shape[0], a.shape[1])
        self.dtype = a.dtype

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows, copied."""
        return np.asarray(self._a[index])

    def pick(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Single entries."""
        return np.asarray(self._a[i, j])

    def stored(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
        """All entries of the rows."""
        d = self.shape[1]
        return self.rows(index).ravel(), np.arange(0, len(index) * d + 1, d), None

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Views of the array."""
        step = max(1, BLOCK // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield start, np.asarray(self._a[start : start + step])


class TensorSource(DenseSource):
    """A dense tensor that NumPy cannot look into: on an accelerator, or bfloat16."""

    def __init__(self, a: Any) -> None:
        import torch

        self._torch = torch
        kind = torch.complex128 if a.is_complex() else torch.float64
        super().__init__(np.broadcast_to(np.zeros(1, "c16" if a.is_complex() else "f8"), a.shape))
        self._a, self._kind = a, kind

    def _out(self, part: Any) -> np.ndarray:
        return part.resolve_conj().resolve_neg().cpu().to(self._kind).numpy()

    def _index(self, index: np.ndarray) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(index)).to(self._a.device)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows, as float64 or complex128."""
        return self._out(self._a[self._index(index)])

    def pick(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Single entries."""
        return self._out(self._a[self._index(i), self._index(j)])

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Copies, one block at a time."""
        step = max(1, BLOCK // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield start, self._out(self._a[start : start + step])


class SparseSource(Source):
    """A SciPy CSR matrix or array."""

    def __init__(self, a: Any) -> None:
        if a.format != "csr":
            raise TypeError(f"sparse A must be in CSR format, got {a.format}: call A.tocsr()")
        check_numbers(a.dtype, "A")
        if a.ndim != 2:
            raise ValueError(f"A must be two-dimensional (n, d), got shape {a.shape}")
        if not a.has_canonical_format:
            raise ValueError(
                "sparse A must have the columns of every row in order, each once: "
                "call A.sum_duplicates()"
            )
        self._a = a
        self.shape = (int(a.shape[0]), int(a.shape[1]))
        self.dtype = a.dtype

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows, dense."""
        return self._a[index].toarray()

    def pick(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Single entries."""
        return np.asarray(self._a[i, j]).ravel()

    def stored(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries that are stored."""
        part = self._a[index]
        return part.data, part.indptr.astype(np.int64), part.indices

    def blocks(self) -> Iterator[tuple[int, Any]]:
        """Row ranges of about :data:`BLOCK` stored entries, as ``(values, columns, starts)``."""
        starts = self._a.indptr
        row, n = 0, self.shape[0]
        while row < n:
            stop = int(np.searchsorted(starts, starts[row] + BLOCK, side="right")) - 1
            stop = min(max(stop, row + 1), n)
            part = slice(starts[row], starts[stop])
            yield row, (
                self._a.data[part], self._a.indices[part], starts[row : stop + 1] - starts[row]
            )  # fmt: skip
            row = stop


def segment_sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of consecutive segments, empty ones included; ``starts`` has one more at the end."""
    out = np.zeros(len(starts) - 1, dtype=values.dtype)
    filled = np.flatnonzero(np.diff(starts))
    if filled.size:
        out[filled] = np.add.reduceat(values, starts[filled])
    return out


def sparse_like(rows: Any, like: Source) -> Any:
    """Rows as they are stored beside ``like``: CSR for a sparse source, else an array.

    Raises:
        TypeError: entries that are not numbers, complex rows for a real matrix.
        ValueError: another number of columns.
    """
    if is_tensor(rows):
        rows = rows.detach().cpu().to_dense().resolve_conj().resolve_neg()
        rows = (rows if rows.is_complex() else rows.double()).numpy()
    sparse = _is_scipy_sparse(rows)
    rows = rows if sparse else np.atleast_2d(np.asarray(rows))
    check_numbers(rows.dtype, "rows")
    if rows.ndim != 2 or rows.shape[1] != like.shape[1]:
        raise ValueError(
            f"rows must be (d,) or (m, d) with d = {like.shape[1]}, got shape {rows.shape}"
        )
    if rows.dtype.kind == "c" and like.dtype.kind != "c":
        raise TypeError("complex rows cannot go into a real matrix")
    if not isinstance(like, SparseSource):
        return rows.toarray() if sparse else rows  # pyrefly: ignore
    from scipy.sparse import csr_array

    found = csr_array(rows)
    found.sum_duplicates()
    return found


class GrowingRows(Rows):
    """Rows that were changed or appended, as a source of their own that grows by doubling."""

    def __init__(self, like: Source) -> None:
        self._sparse = isinstance(like, SparseSource)
        kind = np.complex128 if like.dtype.kind == "c" else np.float64
        self.shape = (0, like.shape[1])
        self.dtype = np.dtype(kind)
        self._dense = np.empty((0, 0 if self._sparse else like.shape[1]), dtype=kind)
        self._values: list[np.ndarray] = []
        self._columns: list[np.ndarray] = []

    def put(self, slots: Int[np.ndarray, " m"], rows: Any) -> None:
        """Store ``rows`` in these slots; slots from ``shape[0]`` on are new and in order."""
        size = max(self.shape[0], int(slots.max()) + 1)
        if self._sparse:
            more = size - self.shape[0]
            self._values += [np.empty(0)] * more
            self._columns += [np.empty(0, dtype=np.int64)] * more
            for k, slot in enumerate(slots):
                part = slice(rows.indptr[k], rows.indptr[k + 1])
                self._values[slot] = rows.data[part].astype(self.dtype)
                self._columns[slot] = rows.indices[part].astype(np.int64)
        else:
            if size > len(self._dense):
                room = np.empty((max(size, 2 * len(self._dense)), self.shape[1]), self.dtype)
                room[: self.shape[0]] = self._dense[: self.shape[0]]
                self._dense = room
            self._dense[slots] = rows
        self.shape = (size, self.shape[1])

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows, dense."""
        if not self._sparse:
            return self._dense[index]
        values, starts, columns = self.stored(index)
        out = np.zeros((len(index), self.shape[1]), dtype=self.dtype)
        out[np.repeat(np.arange(len(index)), np.diff(starts)), columns] = values
        return out

    def pick(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Single entries."""
        return self.rows(i)[np.arange(len(j)), j]

    def stored(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Entries that are stored."""
        if not self._sparse:
            d = self.shape[1]
            return self._dense[index].ravel(), np.arange(0, len(index) * d + 1, d), None
        values = [self._values[k] for k in index]
        starts = np.cumsum([0, *map(len, values)])
        return (
            np.concatenate([np.empty(0, self.dtype), *values]),
            starts,
            np.concatenate([np.empty(0, np.int64), *(self._columns[k] for k in index)]),
        )


def _is_scipy_sparse(a: Any) -> bool:
    """Whether ``a`` is a SciPy sparse matrix or array. Does not import SciPy."""
    scipy = sys.modules.get("scipy.sparse")
    return scipy is not None and scipy.issparse(a)


def _of_tensor(a: Any) -> Source:
    import torch

    a = a.detach()
    if a.layout is torch.sparse_csr:
        if a.device.type != "cpu" or a.dtype is torch.bfloat16:
            raise TypeError(
                f"a sparse tensor must be on the CPU and not bfloat16, got {a.dtype} on {a.device}"
            )
        from scipy.sparse import csr_array

        parts = (a.values(), a.col_indices(), a.crow_indices())
        return SparseSource(csr_array(tuple(p.numpy() for p in parts), shape=tuple(a.shape)))
    if a.layout is not torch.strided:
        raise TypeError(f"A must be a strided or CSR tensor, got {a.layout}")
    if a.ndim != 2:
        raise ValueError(f"A must be two-dimensional (n, d), got shape {tuple(a.shape)}")
    hidden = a.device.type != "cpu" or a.is_conj() or a.is_neg() or a.dtype is torch.bfloat16
    return TensorSource(a) if hidden else DenseSource(a.numpy())

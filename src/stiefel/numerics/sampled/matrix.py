"""Sampling access to a matrix: squared row norms in a tree, nothing of the matrix copied.

Source: arXiv 1910.06151, section 2 (SQ access).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from stiefel.numerics.least_squares_arrays import as_generator
from stiefel.numerics.sampled.checks import as_indices, check_count
from stiefel.numerics.sampled.sources import (
    BLOCK,
    GrowingRows,
    SparseSource,
    absolute_squares,
    as_source,
    segment_sums,
    sparse_like,
    square_norms,
)
from stiefel.numerics.sampled.tree import SumTree
from stiefel.numerics.sampled.vector import SampledVector, draw_in_segments

_ARITHMETIC = ("float32", "float64", "complex64", "complex128")


class SampledMatrix:
    """Draws rows i with chance ‖Aᵢ‖² / ‖A‖_F², then entries of a row with |Aᵢⱼ|² / ‖Aᵢ‖².

    Built in one pass of blocks; later only rows that are drawn are read. ``A`` is kept, not
    copied: a memory-mapped file may be larger than memory. Rows that are changed or appended are
    kept beside it, and never written into it.

    Args:
        A: ``(n, d)``, real or complex: NumPy array or memory map, SciPy CSR, torch tensor (strided
            or CSR), or nested lists.
        dtype: What rows come in: float32, float64, complex64 or complex128. None: float64, or
            complex128 for a complex A. Norms are float64 always.
        center: ``(d,)``, taken off every row as it is read; or ``(g, d)`` with ``groups``.
        groups: ``(n,)``, which row of ``center`` is taken off each row of A.

    Raises:
        TypeError: entries that are not numbers; a sparse format other than CSR.
        ValueError: a shape that is not ``(n, d)``, NaN or infinities, squared norms beyond float64,
            a zero matrix.
    """

    def __init__(
        self, A: Any, dtype: Any = None, *, center: Any = None, groups: Any = None
    ) -> None:
        self._base = as_source(A)
        n, d = self._base.shape
        self._d = d
        kind = np.dtype("complex128" if self._base.dtype.kind == "c" else "float64")
        self.dtype = kind if dtype is None else np.dtype(dtype)
        if self.dtype.name not in _ARITHMETIC or (kind.kind == "c" and self.dtype.kind != "c"):
            raise TypeError(
                f"dtype must be one of {', '.join(_ARITHMETIC)}, complex for a complex A, "
                f"got {self.dtype} for {self._base.dtype}"
            )
        self._center, self._groups = self._centers(center, groups, n)
        self._extra = GrowingRows(self._base)
        self._slots: np.ndarray | None = None  # where in `_extra` a row is, −1: still in A
        norms = np.empty(n)
        for start, part in self._base.blocks():
            values = self._block_norms(start, part)
            norms[start : start + len(values)] = values
        self._tree = SumTree(norms)
        if self.fro2 == 0:
            raise ValueError("cannot l2-sample a zero matrix")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, appended ones included, and columns."""
        return self._tree.size, self._d

    @property
    def row_norms2(self) -> Float[np.ndarray, " n"]:
        """‖Aᵢ‖² of every row; read-only, and follows updates."""
        return self._tree.weights

    @property
    def fro2(self) -> float:
        """‖A‖_F²."""
        return self._tree.total

    def sample_rows(
        self, s: int | np.integer, generator: Any = None
    ) -> tuple[Int[np.ndarray, " s"], Float[np.ndarray, " s"]]:
        """``s`` independent rows, with replacement, in O(s log n).

        Args:
            s: How many, ≥ 1.
            generator: NumPy generator, ``torch.Generator``, seed or None.

        Returns:
            Indices ``(s,)`` and their chances ‖Aᵢ‖² / ‖A‖_F². Zero rows never come.

        Raises:
            ValueError: s < 1, or every row has become zero by updates.
        """
        check_count(s, "s")
        if self.fro2 == 0:
            raise ValueError("cannot l2-sample a zero matrix")
        index = self._tree.draw(int(s), as_generator(generator))
        return index, self._tree.weights[index] / self.fro2

    def sample_entries(
        self, s: int | np.integer, generator: Any = None
    ) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " s"], Float[np.ndarray, " s"]]:
        """``s`` independent entries (i, j) with chance |Aᵢⱼ|² / ‖A‖_F².

        Rows are found in O(log n); of each row that was drawn the stored entries are read, once.

        Returns:
            Rows ``(s,)``, columns ``(s,)``, chances ``(s,)``.

        Raises:
            ValueError: as :meth:`sample_rows`.
        """
        rng = as_generator(generator)
        index, _ = self.sample_rows(s, rng)
        rows, which = np.unique(index, return_inverse=True)
        columns = np.empty(s, dtype=np.int64)
        weights = np.empty(s)
        step = max(1, BLOCK // self._d)
        for start in range(0, len(rows), step):
            mine = np.flatnonzero((which >= start) & (which < start + step))
            values, starts, names = self._stored(rows[start : start + step])
            squares = absolute_squares(values)
            found = draw_in_segments(squares.cumsum(), starts, which[mine] - start, rng)
            weights[mine] = squares[found]
            columns[mine] = found - starts[which[mine] - start] if names is None else names[found]
        return index, columns, weights / self.fro2

    def rows(self, index: Any) -> Shaped[np.ndarray, "s d"]:
        """Rows of A, dense, as they are now.

        Raises:
            IndexError: an index outside 0 … n − 1.
        """
        index = as_indices(index, self.shape[0], "index")
        if self._slots is None:
            out = self._base.rows(index)
        else:
            slots = self._slots[index]
            changed = slots >= 0
            out = np.empty((len(index), self._d), np.promote_types(self.dtype, self._extra.dtype))
            out[~changed] = self._base.rows(index[~changed])
            out[changed] = self._extra.rows(slots[changed])
        out = out.astype(self.dtype, copy=False)
        return out if self._center is None else out - self._centers_of(index).astype(self.dtype)

    def row(self, i: int | np.integer) -> SampledVector:
        """Row ``i`` as a vector to sample from."""
        return SampledVector(self.rows([i])[0])

    def entries(self, i: Any, j: Any) -> Shaped[np.ndarray, " s"]:
        """The entries at ``(i, j)``, one by one.

        Raises:
            IndexError: outside the matrix.
            ValueError: i and j of different lengths.
        """
        i, j = as_indices(i, self.shape[0], "i"), as_indices(j, self._d, "j")
        if len(i) != len(j):
            raise ValueError(f"i and j must have one length, got {len(i)} and {len(j)}")
        slots = np.full(len(i), -1) if self._slots is None else self._slots[i]
        changed = slots >= 0
        out = np.empty(len(i), dtype=self.dtype)
        out[~changed] = self._base.pick(i[~changed], j[~changed])
        out[changed] = self._extra.pick(slots[changed], j[changed])
        if self._center is not None:
            group = np.zeros(len(i), np.int64) if self._groups is None else self._groups[i]
            out -= self._center[group, j].astype(self.dtype)
        return out

    def update_row(self, i: Any, values: Any = None) -> None:
        """Replace row ``i``, or rows ``i`` ``(m,)`` by ``values`` ``(m, d)``, in O(m (d + log n)).

        Without ``values`` the rows are read again from A, whose owner has changed them there.
        With ``center``, values are what they are before it is taken off.

        Raises:
            IndexError: outside the matrix.
            TypeError: values that are not numbers, complex ones for a real A.
            ValueError: an index twice, a shape that does not fit, NaN or infinities; without
                ``values``, a row that is not in A.
        """
        index = as_indices(i, self.shape[0], "i")
        if len(np.unique(index)) < len(index):
            raise ValueError("i must not name a row twice")
        if not len(index):
            return
        if values is None:
            if index.max() >= self._base.shape[0]:
                raise ValueError(f"row {index.max()} was appended and is not in A: give its values")
            self._tree.set(index, self._norms_of(self._base, index, index))
            if self._slots is not None:
                self._slots[index] = -1
            return
        rows = sparse_like(values, self._base)
        if rows.shape[0] != len(index):
            raise ValueError(f"values must have {len(index)} rows, got {rows.shape[0]}")
        norms = self._norms_of(as_source(rows), np.arange(len(index)), index)
        if self._slots is None:
            self._slots = np.full(len(self._tree.weights), -1, dtype=np.int64)
        slots = self._slots[index]
        new = slots < 0
        slots[new] = self._extra.shape[0] + np.arange(int(new.sum()))
        self._extra.put(slots, rows)
        self._slots[index] = slots
        self._tree.set(index, norms)

    def append(self, rows: Any) -> None:
        """Add ``rows`` ``(m, d)`` or ``(d,)`` at the end, in O(m (d + log n)), amortised.

        Raises:
            TypeError, ValueError: as :meth:`update_row`; with ``groups`` nothing can be appended.
        """
        if self._groups is not None:
            raise ValueError("rows cannot be appended to a matrix with groups")
        rows = sparse_like(rows, self._base)
        start, more = self.shape[0], rows.shape[0]
        if not more:
            return
        norms = self._norms_of(as_source(rows), np.arange(more), np.arange(start, start + more))
        slots = self._extra.shape[0] + np.arange(more)
        old = np.full(start, -1, dtype=np.int64) if self._slots is None else self._slots[:start]
        if self._slots is None or start + more > len(self._slots):
            self._slots = np.concatenate([old, np.full(start + 2 * more, -1, dtype=np.int64)])
        self._slots[start : start + more] = slots
        self._extra.put(slots, rows)
        self._tree.append(norms)

    def _stored(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Stored entries of rows; dense ones where changed rows or a centre are mixed in."""
        if self._center is None and (self._slots is None or (self._slots[index] < 0).all()):
            return self._base.stored(index)
        rows = self.rows(index)
        return rows.ravel(), np.arange(0, rows.size + 1, self._d), None

    def _centers(self, center: Any, groups: Any, n: int) -> tuple[Any, Any]:
        if center is None:
            if groups is not None:
                raise ValueError("groups need a center")
            return None, None
        found = np.atleast_2d(np.asarray(center, dtype=self.dtype))
        if found.shape[1:] != (self._d,) or (groups is None and len(found) != 1):
            raise ValueError(
                f"center must be ({self._d},), or (g, {self._d}) with groups, "
                f"got shape {np.shape(center)}"
            )
        if not np.isfinite(found).all():
            raise ValueError("center must be finite")
        if groups is None:
            return found, None
        groups = as_indices(groups, len(found), "groups")
        if len(groups) != n:
            raise ValueError(f"groups must be ({n},), got ({len(groups)},)")
        return found, groups

    def _centers_of(self, index: np.ndarray) -> np.ndarray:
        return self._center if self._groups is None else self._center[self._groups[index]]

    def _norms_of(self, source: Any, where: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Checked squared norms of some rows of a source; ``index``: what they are called here."""
        if isinstance(source, SparseSource):
            values, starts, columns = source.stored(where)
            return self._sparse_norms((values, columns, starts), index)
        return self._dense_norms(source.rows(where), index)

    def _block_norms(self, start: int, part: Any) -> np.ndarray:
        if isinstance(part, tuple):
            return self._sparse_norms(part, np.arange(start, start + len(part[2]) - 1))
        return self._dense_norms(part, np.arange(start, start + len(part)))

    def _dense_norms(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        if self._center is not None:
            rows = rows - self._centers_of(index)
        return _checked(square_norms(rows), index, rows)

    def _sparse_norms(self, part: Any, index: np.ndarray) -> np.ndarray:
        values, columns, starts = part
        norms = segment_sums(absolute_squares(values), starts)
        if self._center is not None:
            # ‖a − c‖² = ‖a‖² + ‖c‖² − 2 Re⟨c, a⟩: a sparse row stays sparse.
            group = np.zeros(len(index), np.int64) if self._groups is None else self._groups[index]
            inner = values * self._center.conj()[np.repeat(group, np.diff(starts)), columns]
            size = square_norms(self._center)[group]
            norms = np.maximum(norms + size - 2 * segment_sums(inner, starts).real, 0.0)
        return _checked(norms, index, values)


def _checked(norms: np.ndarray, index: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Norms, if they are finite."""
    finite = np.isfinite(norms)
    if finite.all():
        return norms
    row = int(index[np.flatnonzero(~finite)[0]])
    if not np.isfinite(values).all():
        raise ValueError(f"A must be finite, but row {row} holds NaN or infinities")
    raise ValueError(f"the squared norm of row {row} is beyond float64: scale A down")

"""Banded systems along one axis of a field: factor once, then every line is a right-hand side.

Block form of Thomas' algorithm (line solves of arXiv 2606.25148): the matrix is cut in blocks of at
least its bandwidth, so that one step of the recursion is one matrix product over all lines.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Num
from torch import Tensor

from stiefel.numerics.tensor_product.axis_apply import apply_along
from stiefel.numerics.tensor_product.checks import (
    SingularOperatorError,
    check_axis,
    check_choice,
    check_count,
    check_dtype,
    check_finite,
    check_matrix,
    hidden,
)

METHODS = ("auto", "dense", "block")
DENSE_LIMIT = 48
"""Longest line for one product with the inverse: from four blocks on they do less work."""
BLOCK = 16
"""Points per block: measured the fastest of 8, 16, 32, 64 at 256 to 4,096 points per line."""
# Largest ‖P⁻¹‖ of a pivot block P whose rows of A have unit sum: beyond it no digit is right.
_LARGEST_INVERSE = 1e15


class _Blocks(NamedTuple):
    """Block k: y_k = inverse f_k - below y_{k-1}[-l:], then x_k = y_k - above x_{k+1}[:u]."""

    inverse: list[Tensor]
    below: list[Tensor]
    above: list[Tensor]


class _Border(NamedTuple):
    """The last points of a periodic line, which couple to both ends of the others."""

    inverse: Tensor
    head: Tensor
    tail: Tensor
    column: Tensor


class BandedLineSolver:
    """Solves A x = f for every line of a field along one axis; A is banded, maybe with corners.

    Args:
        bands: ``(l + u + 1, n)`` in the layout of ``scipy.linalg.solve_banded``:
            ``bands[u + i - j, j] = A[i, j]`` for the l diagonals below and the u above. Entries
            that would lie outside of A are ignored, or, if periodic, wrap around: their row is
            i modulo n.
        lower: l; half of the rows if None.
        upper: u; likewise.
        periodic: Whether the corners belong to the matrix.
        method: ``"dense"`` (product with the inverse), ``"block"`` (elimination by blocks, O(n) per
            line) or ``"auto"``: dense up to 48 points.

    The factors are computed once, in double precision. Rows are exchanged inside blocks only, as
    diagonally dominant and positive definite matrices allow. Solutions are differentiable in the
    field and in ``bands``, any number of times.

    Raises:
        SingularOperatorError: no inverse, or a pivot block without one; names the rows.
        ValueError: a shape that fits no l and u, a NaN, a bandwidth of n or more.
        TypeError: bands of integers or of half precision, lower or upper no integers.
    """

    def __init__(
        self,
        bands: Num[Tensor, "_ _"],
        lower: int | None = None,
        upper: int | None = None,
        *,
        periodic: bool = False,
        method: str = "auto",
    ) -> None:
        check_matrix(bands, "bands")
        check_choice(method, "method", METHODS)
        rows, n = bands.shape
        self.lower, self.upper = _widths(rows, lower, upper)
        width = max(self.lower, self.upper)
        self.n, self.periodic = n, periodic and width > 0
        if width >= n or (self.periodic and rows > n):
            raise ValueError(
                f"bands has {self.lower} diagonals below and {self.upper} above the main one, too "
                f"many for lines of n = {n} points" + (", with corners" if self.periodic else "")
            )
        self.bands = bands
        self._wide = bands.to(torch.complex128 if bands.is_complex() else torch.float64)
        # Rows of unit sum make the test for singularity independent of units.
        self._row_sums = self._entries(bands.detach().abs().double()).sum(0)
        if not hidden(bands) and not bool((self._row_sums > 0).all()):
            row = int((self._row_sums == 0).nonzero()[0])
            raise SingularOperatorError(f"bands is singular: row {row} of the matrix is zero")
        size = max(BLOCK, width)
        self.method = method
        if method == "auto":
            self.method = "dense" if n <= max(DENSE_LIMIT, 3 * width) else "block"
        elif method == "block" and n <= 3 * size:
            self.method = "dense"  # too short for a border and two blocks
        self._pivots: list[tuple[int, Tensor]] = []
        self._inverse: Tensor | None = None
        self._border: _Border | None = None
        if self.method == "dense":
            self._inverse = self._invert(self._dense(0, n, 0, n), 0)
        elif self.periodic:
            self._blocks = self._eliminate(n - width, size)
            self._border = self._close(width)
        else:
            self._blocks = self._eliminate(n, size)
        self._check_pivots()
        self._cast: dict[tuple[torch.dtype, torch.device], tuple] = {}

    @classmethod
    def from_matrix(cls, A: Num[Tensor, "_ _"], *, method: str = "auto") -> BandedLineSolver:
        """A solver for a dense square matrix: its bands, and whether it has corners, are looked up.

        Args:
            A: ``(n, n)``; diagonals of zeros at the outside are left out, also of gradients.
            method: As for the class; a matrix that is not banded is inverted densely.

        Raises:
            SingularOperatorError, ValueError, TypeError: as the class.
        """
        check_matrix(A, "A", square=True)
        n = A.shape[0]
        lower, upper, periodic = _find_widths(A)
        offsets = torch.arange(-upper, lower + 1, device=A.device)[:, None]
        columns = torch.arange(n, device=A.device)
        rows = columns + offsets
        inside = (rows >= 0) & (rows < n)
        bands = A[rows % n, columns]
        if not periodic:
            bands = torch.where(inside, bands, 0)
        return cls(bands, lower, upper, periodic=periodic, method=method)

    def solve(self, U: Num[Tensor, "*grid"], axis: int = -1) -> Num[Tensor, "*grid"]:
        """x with A x = U along ``axis``, for all lines at once.

        Args:
            U: Right-hand sides, any shape with n points along ``axis``; real or complex.
            axis: Of ``U``, from -ndim to ndim - 1.

        Returns:
            A field of the shape and precision of ``U``; complex if ``U`` or the bands are.

        Raises:
            ValueError: another number of points along ``axis``, a NaN.
            TypeError: integers or half precision.
            IndexError: no such axis.
        """
        return self.invert(U, self._check(U, axis))

    def invert(self, U: Tensor, dim: int) -> Tensor:
        """:meth:`solve` without checks: for inner loops."""
        inverse, blocks, border = self._factors(U)
        if inverse is not None:
            return apply_along(inverse, U, dim)
        if border is None:
            return _sweep(blocks, U, dim)
        width = border.inverse.shape[0]
        main, last = U.split([self.n - width, width], dim)
        y = _sweep(blocks, main, dim)
        head, tail = y.narrow(dim, 0, width), y.narrow(dim, self.n - 2 * width, width)
        last = last - apply_along(border.head, head, dim) - apply_along(border.tail, tail, dim)
        end = apply_along(border.inverse, last, dim)
        return torch.cat((y - apply_along(border.column, end, dim), end), dim)

    def matmul(self, U: Num[Tensor, "*grid"], axis: int = -1) -> Num[Tensor, "*grid"]:
        """A U along ``axis``, by diagonals: what :meth:`solve` undoes.

        Args, errors and result as for :meth:`solve`.
        """
        dim = self._check(U, axis)
        dtype = (
            torch.promote_types(U.dtype, torch.complex64) if self._wide.is_complex() else U.dtype
        )
        rows = self._entries(self._wide).to(U.device, dtype)
        shape = [-1 if k == dim else 1 for k in range(U.ndim)]
        total = torch.zeros_like(U, dtype=dtype)
        for k, row in enumerate(rows):
            # What comes round meets a zero unless the line is a ring.
            total = total + row.reshape(shape) * U.roll(self.lower - k, dim)
        return total

    def _check(self, U: Tensor, axis: int) -> int:
        check_dtype(U, "U")
        dim = check_axis(axis, U.ndim)
        if U.shape[dim] != self.n:
            raise ValueError(
                f"U must have {self.n} points along axis {dim}, got {U.shape[dim]} in shape "
                f"{tuple(U.shape)}"
            )
        if U.numel() == 0:
            raise ValueError(f"U is empty: shape {tuple(U.shape)}")
        check_finite(U, "U")
        return dim

    def _entries(self, bands: Tensor) -> Tensor:
        """``(l + u + 1, n)``: row l + o holds ``A[i, i + o]`` for every i, zero where outside."""
        offsets = torch.arange(-self.lower, self.upper + 1, device=bands.device)[:, None]
        columns = torch.arange(self.n, device=bands.device) + offsets
        entries = bands[self.upper - offsets, columns % self.n]
        if self.periodic:
            return entries
        return torch.where((columns >= 0) & (columns < self.n), entries, 0)

    def _dense(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """The part of A in rows ``top:bottom`` and columns ``left:right``."""
        device = self._wide.device
        columns = torch.arange(left, right, device=device)
        k = torch.arange(top, bottom, device=device)[:, None] - columns + self.upper
        if self.periodic:
            k = k % self.n
        inside = (k >= 0) & (k <= self.lower + self.upper)
        entries = self._wide[k.clamp(0, self.lower + self.upper), columns]
        return torch.where(inside, entries, 0)

    def _invert(self, block: Tensor, top: int) -> Tensor:
        """Inverse of a pivot block, to be judged later; garbage where there is none."""
        inverse, info = torch.linalg.inv_ex(block)
        scaled = inverse.detach().abs() * self._row_sums[top : top + len(block)]
        size = torch.where(info == 0, scaled.sum(1).amax(), torch.inf)
        self._pivots.append((top, size))
        return inverse

    def _check_pivots(self) -> None:
        """All in one look: a look per block would wait for the device as many times."""
        if hidden(self._wide):
            return
        sizes = torch.stack([size for _, size in self._pivots])
        bad = ~(sizes < _LARGEST_INVERSE)  # also what is not a number
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            top = self._pivots[k][0]
            end = self._pivots[k + 1][0] if k + 1 < len(self._pivots) else self.n
            raise SingularOperatorError(
                f"bands is singular to working precision: the pivot block of rows {top} to "
                f"{end - 1} of {self.n} has no inverse"
                + (
                    "; rows are exchanged inside blocks only, method='dense' exchanges all"
                    if self.method == "block"
                    else ""
                )
            )

    def _eliminate(self, n: int, size: int) -> _Blocks:
        """Block LU of the leading n rows and columns, without the corners."""
        found = _Blocks([], [], [])
        edges = [*range(0, n - size + 1, size), n]  # the last block takes what is left
        for k, (top, end) in enumerate(pairwise(edges)):
            pivot = self._dense(top, end, top, end)
            lower = self._dense(top, end, top - self.lower, top) if k else None
            if lower is not None:
                change = lower @ found.above[-1][size - self.lower :]
                pivot = pivot - torch.nn.functional.pad(change, (0, end - top - self.upper))
            inverse = self._invert(pivot, top)
            found.inverse.append(inverse)
            if lower is not None:
                found.below.append(inverse @ lower)
            if end < n:
                found.above.append(inverse @ self._dense(top, end, end, end + self.upper))
        return found

    def _close(self, width: int) -> _Border:
        """Schur complement of the last ``width`` points, after :meth:`_eliminate` of the others."""
        n = self.n
        column = _sweep(self._blocks, self._dense(0, n - width, n - width, n), 0)
        head = self._dense(n - width, n, 0, width)
        tail = self._dense(n - width, n, n - 2 * width, n - width)
        corner = self._dense(n - width, n, n - width, n)
        pivot = corner - head @ column[:width] - tail @ column[-width:]
        return _Border(self._invert(pivot, n - width), head, tail, column)

    def _factors(self, U: Tensor) -> tuple:
        """Inverse, blocks and border as ``U`` needs them; kept, unless a gradient goes through."""
        real = U.dtype.to_real() if U.is_complex() else U.dtype
        target = real.to_complex() if self._wide.is_complex() else real
        key = target, U.device
        if key in self._cast:
            return self._cast[key]

        def cast(part: Tensor) -> Tensor:
            return part.to(U.device, target)

        inverse = None if self._inverse is None else cast(self._inverse)
        blocks = border = None
        if inverse is None:
            blocks = _Blocks(*(list(map(cast, parts)) for parts in self._blocks))
        if self._border is not None:
            border = _Border(*map(cast, self._border))
        found = inverse, blocks, border
        if not (self._wide.requires_grad or hidden(U)):
            self._cast[key] = found
        return found


def _sweep(blocks: _Blocks, U: Tensor, dim: int) -> Tensor:
    """Down and up the blocks, every line at once."""
    rest = U.shape[dim + 1 :].numel()
    flat = rest == 1 or U.shape[:dim].numel() == 1
    if flat and U.dtype == blocks.inverse[0].dtype and _unwatched(U, blocks):
        return _sweep_in_place(blocks, U, rest)
    sizes = [len(inverse) for inverse in blocks.inverse]
    parts = []
    for k, f in enumerate(U.split(sizes, dim)):
        y = apply_along(blocks.inverse[k], f, dim)
        if k and blocks.below[k - 1].shape[1]:
            below = blocks.below[k - 1]
            before = parts[-1]
            ends = before.narrow(dim, before.shape[dim] - below.shape[1], below.shape[1])
            y = y - apply_along(below, ends, dim)
        parts.append(y)
    for k in range(len(parts) - 2, -1, -1):
        above = blocks.above[k]
        if above.shape[1]:
            starts = parts[k + 1].narrow(dim, 0, above.shape[1])
            parts[k] = parts[k] - apply_along(above, starts, dim)
    return torch.cat(parts, dim)


def _unwatched(U: Tensor, blocks: _Blocks) -> bool:
    """Whether nothing records what is done: results may be written in place."""
    recorded = U.requires_grad or blocks.inverse[0].requires_grad
    if hidden(U) or (torch.is_grad_enabled() and recorded):
        return False
    return torch.autograd.forward_ad.unpack_dual(U).tangent is None


def _sweep_in_place(blocks: _Blocks, U: Tensor, rest: int) -> Tensor:
    """:func:`_sweep` of lines that are the columns of a matrix, or (``rest`` is 1) its rows."""
    lines = U.reshape(-1, sum(map(len, blocks.inverse))).mT if rest == 1 else U.reshape(-1, rest)
    found = torch.empty_like(lines)  # keeps the order in memory
    start = end = 0
    for k, inverse in enumerate(blocks.inverse):
        start, end = end, end + len(inverse)
        part = found[start:end]
        torch.mm(inverse, lines[start:end], out=part)
        if k:
            below = blocks.below[k - 1]
            part.addmm_(below, found[start - below.shape[1] : start], alpha=-1)
    for inverse, above in zip(blocks.inverse[-2::-1], blocks.above[::-1], strict=True):
        end = start
        start = end - len(inverse)
        found[start:end].addmm_(above, found[end : end + above.shape[1]], alpha=-1)
    return (found.mT if rest == 1 else found).reshape(U.shape)


def _widths(rows: int, lower: int | None, upper: int | None) -> tuple[int, int]:
    """Diagonals below and above the main one, for that many rows of bands."""
    if lower is None and upper is None:
        if rows % 2 == 0:
            raise ValueError(
                f"bands has {rows} rows: say how many diagonals are below with lower, above with "
                "upper"
            )
        return rows // 2, rows // 2
    lower = rows - 1 - check_count(upper, "upper", 0) if lower is None else lower
    upper = rows - 1 - check_count(lower, "lower", 0) if upper is None else upper
    if check_count(lower, "lower", 0) + check_count(upper, "upper", 0) + 1 != rows:
        raise ValueError(
            f"bands must have lower + upper + 1 = {lower + upper + 1} rows, got {rows}"
        )
    return lower, upper


def _find_widths(A: Tensor) -> tuple[int, int, bool]:
    """Diagonals below and above of a matrix; periodic if that takes fewer of them."""
    n = A.shape[0]
    rows, columns = (A.detach() != 0).nonzero(as_tuple=True)
    if not len(rows):
        raise SingularOperatorError("A is singular: it is zero")
    offset = rows - columns
    lower, upper = (max(0, int(part.max())) for part in (offset, -offset))
    # Around the corner the short way.
    wrapped = (offset + n // 2) % n - n // 2
    around = [max(0, int(part.max())) for part in (wrapped, -wrapped)]
    if sum(around) < lower + upper and sum(around) + 1 <= n and max(around) * 4 < n:
        return around[0], around[1], True
    return lower, upper, False

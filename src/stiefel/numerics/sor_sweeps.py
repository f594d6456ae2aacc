"""Sweeps of successive over-relaxation, each of them compiled work.

Natural ordering: the triangle D/ω + L is handed to SuperLU, which has nothing to eliminate and
solves with it in a time of a few matrix products. Red-black ordering: neighbours have different
colours, so that a whole colour is updated at once, by sparse products or, on a grid, by slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from stiefel.numerics.sor_operators import GridOperator

Outcome = tuple[np.ndarray, int, bool, float]
"""x, sweeps, whether the tolerance was met, last relative residual."""


def lower_factor(A: Any, diagonal: np.ndarray, weight: float) -> Any:
    """SuperLU of diag(``diagonal``) + ``weight`` · L, L the strictly lower part of CSR ``A``."""
    import scipy.sparse as sp
    from scipy.sparse.linalg import splu

    n = A.shape[0]
    rows = np.repeat(np.arange(n, dtype=A.indices.dtype), np.diff(A.indptr))
    below = A.indices < rows
    counts = np.bincount(rows[below], minlength=n) + 1  # and the diagonal, last in its row
    indptr = np.concatenate(([0], np.cumsum(counts))).astype(A.indptr.dtype)
    last = indptr[1:] - 1
    inner = np.ones(indptr[-1], dtype=bool)
    inner[last] = False
    indices = np.empty(indptr[-1], dtype=A.indices.dtype)
    data = np.empty(indptr[-1], dtype=A.dtype)
    indices[last], data[last] = np.arange(n), diagonal
    indices[inner], data[inner] = A.indices[below], weight * A.data[below]
    triangle = sp.csr_matrix((data, indices, indptr), shape=A.shape).tocsc()
    # Threshold 0 keeps every pivot on the diagonal. Panels of one column save nine tenths of the
    # time: there is nothing to gain from blocking a matrix without fill.
    return splu(triangle, permc_spec="NATURAL", diag_pivot_thresh=0.0, relax=1, panel_size=1)


def check_growth(ratio: float, precision: Any, k: int) -> None:
    """Raise ``ValueError`` where a residual has grown as it cannot for a positive definite A.

    ‖r‖ in the norm of A⁻¹ never grows then, so ‖r‖₂ grows at most by √κ < 1/√eps.
    """
    if not ratio <= 1 / np.finfo(precision).eps:
        raise ValueError(
            f"A is not positive definite: the residual grew {ratio:.1e}-fold in {k} sweeps"
        )


class NaturalSweeps:
    """SOR in the order of the rows: x += (D/ω + L)⁻¹ (b − A x)."""

    def __init__(self, A: Any, omega: float) -> None:
        self.A = A
        self.factor = lower_factor(A, A.diagonal() / omega, 1.0)

    def solve(self, b: np.ndarray, x0: np.ndarray, tol: float, maxiter: int) -> Outcome:
        """Sweep until ‖r‖ < tol · ‖r₀‖; at least once unless r₀ = 0."""
        A, solve = self.A, self.factor.solve
        x = x0.copy()
        r = b - A @ x
        first = math.sqrt(r @ r)
        if first == 0:
            return x, 1, True, 0.0
        ratio = 1.0
        for k in range(1, maxiter + 1):
            x += solve(r)
            r = b - A @ x
            ratio = math.sqrt(r @ r) / first
            if ratio < tol:
                return x, k, True, ratio
            check_growth(ratio, A.dtype, k)
        return x, maxiter, False, ratio


class RedBlackSweeps:
    """SOR on all red unknowns, then on all black ones.

    Half of the residual is known for nothing: after its own update a colour's residual is (1 − ω)
    times what it was, and that of the other colour is what the next half sweep needs anyway.
    """

    def __init__(self, colouring: MatrixColours | GridColours, omega: float) -> None:
        self.colouring, self.omega = colouring, omega
        self.steps = [omega / d for d in colouring.diagonals]

    def solve(self, b: np.ndarray, x0: np.ndarray, tol: float, maxiter: int) -> Outcome:
        """Sweep until ‖r‖ < tol · ‖r₀‖; at least once unless r₀ = 0."""
        colours = self.colouring
        rhs, x = colours.split(b), colours.split(x0)
        r = [np.empty_like(part) for part in x]
        move = [np.empty_like(part) for part in x]
        couple = [colours.coupler(c, x[1 - c], r[c]) for c in (0, 1)]
        kept = (1 - self.omega) ** 2

        def residual(c: int) -> float:
            np.multiply(colours.diagonals[c], x[c], out=r[c])
            np.subtract(rhs[c], r[c], out=r[c])
            couple[c]()
            flat = r[c].ravel()
            return float(flat @ flat)

        def update(c: int) -> None:
            np.multiply(self.steps[c], r[c], out=move[c])
            np.add(x[c], move[c], out=x[c])

        with np.errstate(over="ignore", invalid="ignore"):
            first = math.sqrt(residual(0) + residual(1))
            if first == 0:
                return x0.copy(), 1, True, 0.0
            ratio = 1.0
            for k in range(1, maxiter + 1):
                update(0)
                black = residual(1)
                update(1)
                ratio = math.sqrt(residual(0) + kept * black) / first
                if ratio < tol:
                    return colours.join(x), k, True, ratio
                check_growth(ratio, b.dtype, k)
        return colours.join(x), maxiter, False, ratio


class MatrixColours:
    """Two colours of a CSR matrix whose graph has no odd cycle; the lowest row of a part is red.

    Raises:
        ValueError: there is no such colouring.
    """

    def __init__(self, A: Any) -> None:
        import scipy.sparse as sp
        from scipy.sparse.csgraph import connected_components, dijkstra

        entries = A.tocoo()
        off = (entries.row != entries.col) & (entries.data != 0)
        rows, columns = entries.row[off], entries.col[off]
        graph = sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=A.shape)
        _, part = connected_components(graph, directed=False)
        roots = np.unique(part, return_index=True)[1]
        far = dijkstra(graph, directed=False, indices=roots, unweighted=True, min_only=True)
        colour = far.astype(np.int64) % 2
        if (colour[rows] == colour[columns]).any():
            raise ValueError(
                "ordering='red-black' needs a matrix whose graph has no odd cycle, as 5- and "
                "7-point stencils have it; this one has. Use ordering='natural'"
            )
        self.members = [np.flatnonzero(colour == c) for c in (0, 1)]
        self.diagonals = self.split(A.diagonal())
        self.blocks = [A[self.members[c]][:, self.members[1 - c]].tocsr() for c in (0, 1)]

    def split(self, x: np.ndarray) -> list[np.ndarray]:
        """The two colours of a vector ``(n,)``, copied."""
        return [x[m] for m in self.members]

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """The vector ``(n,)`` of two colours."""
        x = np.empty(sum(map(len, parts)), dtype=parts[0].dtype)
        for members, part in zip(self.members, parts, strict=True):
            x[members] = part
        return x

    def coupler(self, colour: int, source: np.ndarray, out: np.ndarray) -> Callable[[], None]:
        """A function that subtracts what ``source``, the other colour, adds to A x."""
        block = self.blocks[colour]

        def couple() -> None:
            np.subtract(out, block @ source, out=out)

        return couple


class GridColours:
    """Two colours of a :class:`GridOperator`, each packed to half the length of the last axis.

    A row is an index of all axes but the last; its parity is that of the sum. Red is where the sum
    of all indices is even, so a row of parity p has red at columns 2k + p. A neighbour along any
    other axis then lies at the same k of the other colour, one along the last axis at the same k
    or at one beside it: every update is a sum of a few contiguous slices.
    """

    def __init__(self, grid: GridOperator) -> None:
        self.grid = grid
        self.dtype = grid.dtype
        *self.leading, self.length = grid.shape
        self.width = -(-self.length // 2)
        parity = np.indices(self.leading).sum(0) % 2 if self.leading else np.zeros((), int)
        self.odd = np.asarray(parity, dtype=bool)[..., None]
        self.rows = {0: [], 1: []}
        for corner in product((0, 1), repeat=len(self.leading)):
            self.rows[sum(corner) % 2].append(tuple(slice(c, None, 2) for c in corner))
        self.diagonals = self._pack(grid.diag, 1.0)
        scalars = {c for c in grid.couplings if isinstance(c, float)}
        plain = all(isinstance(c, float) for c in grid.couplings)
        # One number for all neighbours: the source is scaled once and then only added up.
        self.common = next(iter(scalars)) if plain and len(scalars) == 1 else None

    def _pack(self, values: np.ndarray, fill: float) -> list[np.ndarray]:
        missing = 2 * self.width - self.length
        pad = [(0, 0)] * (values.ndim - 1) + [(0, missing)]
        full = np.pad(values, pad, constant_values=fill) if missing else values
        pairs = full.reshape(*values.shape[:-1], self.width, 2)
        odd = self.odd[tuple(slice(s) for s in values.shape[:-1])]
        even, other = pairs[..., 0], pairs[..., 1]
        return [np.where(odd, other, even), np.where(odd, even, other)]

    def split(self, x: np.ndarray) -> list[np.ndarray]:
        """The two colours of a vector ``(n,)``, packed; 0 where a row has one column less."""
        return self._pack(x.reshape(self.grid.shape), 0.0)

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """The vector ``(n,)`` of two packed colours."""
        red, black = parts
        pairs = np.stack((np.where(self.odd, black, red), np.where(self.odd, red, black)), -1)
        return pairs.reshape(*self.leading, 2 * self.width)[..., : self.length].ravel()

    def coupler(self, colour: int, source: np.ndarray, out: np.ndarray) -> Callable[[], None]:
        """A function that subtracts what ``source``, the other colour, adds to A x.

        Entries of ``out`` that stand for no unknown become 0.
        """
        scaled = source if self.common == -1 else np.empty_like(source)
        spare = np.empty_like(out)
        terms = [
            (out[target], scaled[origin] if self.common is not None else source[origin],
             coefficient, spare[target])
            for target, origin, coefficient in self._terms(colour)
        ]  # fmt: skip
        missing = []
        if self.length % 2:
            missing = [out[(*rows, slice(-1, None))] for rows in self.rows[1 - colour]]
        common = self.common

        def couple() -> None:
            if common is not None and common != -1:
                np.multiply(source, -common, out=scaled)
            for target, origin, coefficient, room in terms:
                if common is None:
                    np.multiply(origin, coefficient, out=room)
                    np.subtract(target, room, out=target)
                else:
                    np.add(target, origin, out=target)
            for view in missing:
                view[...] = 0

        return couple

    def _terms(self, colour: int) -> list[tuple[tuple, tuple, Any]]:
        """Of every neighbour: where it is added, where it stands in the other colour, its entry."""
        every, found = slice(None), []
        dimensions = len(self.leading) + 1
        for axis, entries in enumerate(self.grid.couplings[:-1]):
            low, high = (
                tuple(s if a == axis else every for a in range(dimensions))
                for s in (slice(None, -1), slice(1, None))
            )
            own = entries if isinstance(entries, float) else self._pack(entries, 0.0)
            if isinstance(own, float):
                found += [(low, high, own), (high, low, own)]
            else:
                # The edge upwards is stored at the lower end, whose colour is ours or the other.
                found += [(low, high, own[colour]), (high, low, own[1 - colour])]
        edges = self.grid.couplings[-1]
        if isinstance(edges, float):
            inside = beside = edges
        else:
            pad = [(0, 0)] * (dimensions - 1) + [(0, 2 * self.width - self.length + 1)]
            full = np.pad(edges, pad)
            inside, beside = full[..., 0::2], full[..., 1:-1:2]
        found.append(((every,) * dimensions, (every,) * dimensions, inside))
        for parity in (0, 1):
            # Ours at column 2k: its other neighbour is at k − 1; ours at 2k + 1: at k + 1.
            at_even = parity == colour
            for rows in self.rows[parity]:
                here, there = slice(1, None), slice(None, -1)
                target, origin = (here, there) if at_even else (there, here)
                entry = beside if isinstance(beside, float) else beside[rows]
                found.append(((*rows, target), (*rows, origin), entry))
        return found

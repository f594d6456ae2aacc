"""Rows of a matrix drawn by length, columns of those drawn likewise.

Source: arXiv 1910.06151, section 4; Frieze, Kannan and Vempala (2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from stiefel.numerics.least_squares_arrays import as_generator
from stiefel.numerics.sampled.bounds import DELTA, gram_factor
from stiefel.numerics.sampled.checks import as_indices, check_count
from stiefel.numerics.sampled.matrix import SampledMatrix
from stiefel.numerics.sampled.sources import absolute_squares

# Up to this width all columns are kept: sampling them saves less than it costs in accuracy.
ALL_COLUMNS = 512
ROWS = 500
"""Rows drawn unless told otherwise; for a space of k directions 20 k (see ``lowrank``)."""
# Eigenvalues of C Cᴴ below this part of the largest count as zero (sheet, traps).
CUTOFF = 1e-9

SAMPLINGS = ("l2", "uniform")


@dataclass(frozen=True, eq=False)
class Sketch:
    """Rows and columns of A, scaled so that E RᴴR = AᴴA and E C Cᴴ = R Rᴴ."""

    rows: Int[np.ndarray, " r"]
    """Which rows of A, drawn with replacement."""
    probabilities: Float[np.ndarray, " r"]
    """Their chances pᵢ."""
    R: Shaped[np.ndarray, "r d"]
    """Aᵢ / √(r pᵢ)."""
    cols: Int[np.ndarray, " c"]
    """Which columns of R; all of them in order where none were drawn."""
    C: Shaped[np.ndarray, "r c"]
    """Drawn columns j of R over √(c qⱼ), qⱼ their share of ‖R‖²; R where all columns are kept."""
    fro2: float
    """‖A‖_F²."""
    sampling: str = "l2"
    delta: float = field(default=DELTA, repr=False)

    @property
    def scale(self) -> Float[np.ndarray, " r"]:
        """1/√(r pᵢ), by which what belongs to these rows is multiplied too."""
        return 1 / np.sqrt(len(self.rows) * self.probabilities)

    @property
    def sampled_columns(self) -> bool:
        """Whether columns were drawn."""
        return self.C is not self.R

    @cached_property
    def spectrum(self) -> tuple[Shaped[np.ndarray, "r q"], Float[np.ndarray, " q"]]:
        """Eigenvectors W ``(r, q)`` and eigenvalues ``(q,)`` of C Cᴴ, largest first.

        Those below 1e-9 of the largest are left out. Found from the smaller of C Cᴴ and CᴴC.
        """
        r, c = self.C.shape
        gram = self.C @ self.C.conj().T if r <= c else self.C.conj().T @ self.C
        values, vectors = np.linalg.eigh(gram)
        kept = values > CUTOFF * values[-1]
        values, vectors = values[kept][::-1], vectors[:, kept][:, ::-1]
        if r > c:
            vectors = self.C @ (vectors / np.sqrt(values))
        return vectors, values

    @cached_property
    def cumulative(self) -> Float[np.ndarray, " r_times_d"]:
        """Running sum of |R|², row by row: what draws of columns search in."""
        return absolute_squares(self.R).ravel().cumsum()

    @property
    def row_error(self) -> float:
        """ε with ‖RᴴR − AᴴA‖_F ≤ ε, with the probability of :attr:`delta` shared with columns.

        Infinite for uniform rows: what they miss depends on norms that were not looked at.
        """
        if self.sampling != "l2":
            return np.inf
        share = self.delta / 2 if self.sampled_columns else self.delta
        return gram_factor(len(self.rows), share) * self.fro2

    @property
    def column_error(self) -> float:
        """ε with ‖C Cᴴ − R Rᴴ‖_F ≤ ε, likewise; 0 where all columns are kept."""
        if not self.sampled_columns:
            return 0.0
        size = float(absolute_squares(self.R).sum())
        return gram_factor(len(self.cols), self.delta / 2) * size


def as_sampled(A: Any) -> SampledMatrix:
    """``A``, with sampling access; built here (one pass) if it has none."""
    return A if isinstance(A, SampledMatrix) else SampledMatrix(A)


def sketch(
    SA: Any,
    r: int | np.integer = ROWS,
    c: int | np.integer | None = None,
    generator: Any = None,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    cols: Sequence[int] | np.ndarray | None = None,
    sampling: str = "l2",
) -> Sketch:
    """Draw r rows of A by length and c columns of those, in O(r log n + r d).

    E ‖RᴴR − AᴴA‖_F² = (‖A‖_F⁴ − ‖AᴴA‖_F²)/r, whatever the number of rows of A.

    Args:
        SA: :class:`SampledMatrix` ``(n, d)``; anything it is built from works, at one pass a call.
        r: Rows, ≥ 1, drawn with replacement; may exceed n.
        c: Columns drawn of R, ≥ 1. None: all of them up to 512 columns, else r. From d on all are
            kept: that costs less than d draws, and is exact.
        generator: NumPy generator, ``torch.Generator``, seed or None.
        rows: Rows to take in place of drawn ones; they are weighted as if drawn.
        cols: Columns likewise.
        sampling: ``"l2"``, or ``"uniform"``: rows with equal chances, for comparison.

    Raises:
        ValueError: r < 1, c < 1, a row or column of no weight asked for, only zero rows drawn by
            ``"uniform"``.
        IndexError: ``rows`` or ``cols`` outside A.
    """
    SA = as_sampled(SA)
    n, d = SA.shape
    rng = as_generator(generator)
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be {' or '.join(SAMPLINGS)}, got {sampling!r}")
    if rows is not None:
        index = as_indices(rows, n, "rows")
        check_count(len(index), "the number of rows")
    elif sampling == "l2":
        index, _ = SA.sample_rows(check_count(r, "r"), rng)
    else:
        index = rng.integers(n, size=check_count(r, "r"))
    if sampling == "l2":
        chances = SA.row_norms2[index] / SA.fro2
        if not chances.all():
            raise ValueError(f"row {index[np.argmin(chances)]} is zero: it has no chance")
    else:
        chances = np.full(len(index), 1 / n)
    if cols is None:
        wanted = (d if d <= ALL_COLUMNS else len(index)) if c is None else check_count(c, "c")
    else:
        wanted = as_indices(cols, d, "cols")
    return of_rows(SA.rows(index), index, chances, wanted, SA.fro2, rng, sampling)


def of_rows(
    taken: Shaped[np.ndarray, "r d"],
    index: Int[np.ndarray, " r"],
    chances: Float[np.ndarray, " r"],
    columns: int | np.ndarray,
    fro2: float,
    rng: np.random.Generator,
    sampling: str = "l2",
) -> Sketch:
    """The sketch of rows already taken; ``columns``: how many to draw, or which ones."""
    r, d = taken.shape
    R = taken * (1 / np.sqrt(r * chances))[:, None].astype(taken.real.dtype)
    if not isinstance(columns, np.ndarray) and columns >= d:
        return Sketch(index, chances, R, np.arange(d), R, fro2, sampling)
    q = absolute_squares(R).sum(axis=0)
    total = q.sum()
    if total == 0:
        raise ValueError("all rows drawn are zero: there is nothing to sketch")
    if isinstance(columns, np.ndarray):
        cols = columns
        check_count(len(cols), "the number of columns")
        if not q[cols].all():
            raise ValueError(f"column {cols[np.argmin(q[cols])]} is zero in R: it has no chance")
    else:
        sums = q.cumsum()
        found = np.searchsorted(sums, rng.random(columns) * sums[-1], side="right")
        cols = np.minimum(found, np.searchsorted(sums, sums[-1], side="left"))
    scale = 1 / np.sqrt(len(cols) * q[cols] / total)
    return Sketch(index, chances, R, cols, R[:, cols] * scale.astype(R.real.dtype), fro2, sampling)

"""How many nearly orthogonal directions a space still has room for.

ε, the overlap that a model tolerates between tokens, comes from the pairwise cosines of its
embedding; a formula turns (d, ε) into a number of directions. Source: arXiv 2606.02765.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# One-parameter form ε = √(C ln(k/d)/d), fit to optimised packings; Johnson–Lindenstrauss with the
# constant of random vectors; the four-parameter form behind the paper's table.
RATIO_C = 1.293401
JL_C = 3.029480
FULL = (0.45809143, 1.0668005, 1.44738666, 0.97197234)
FORMS = ("full", "ratio", "jl")
# Section 2.4: ε is the mean plus two standard deviations; above this no number means anything.
N_SIGMA = 2.0
CAPACITY_BELOW, NOT_ORTHOGONAL_ABOVE = 0.1, 0.2


class CosineStats(NamedTuple):
    """Mean and spread of the cosines of all unordered pairs of rows.

    Attributes:
        mean, std: Of the signed cosines; std is the unbiased one.
        k: Rows that count.
        d: Their width.
        dropped_rows: Rows of zeros, which have no direction.
    """

    mean: float
    std: float
    k: int
    d: int
    dropped_rows: int

    @property
    def eps(self) -> float:
        """μ + 2σ: the overlap that is accepted. About 2 % of the pairs lie above it."""
        return self.mean + N_SIGMA * self.std

    @property
    def excess(self) -> float:
        """ε over 2/√d, what Gaussian rows have: 1 is random, 2 twice the overlap."""
        return self.eps * math.sqrt(self.d) / 2

    @property
    def orthogonality_class(self) -> int | None:
        """2: nearly orthogonal (ε < 0.1); 1: not (ε > 0.2); None between, where none was seen."""
        if self.eps < CAPACITY_BELOW:
            return 2
        return 1 if self.eps > NOT_ORTHOGONAL_ABOVE else None


class CosineMoments:
    """Σ u and Σ uuᵀ of unit rows: enough for mean and spread of all pairs, and additive.

    Σ_{i≠j} ⟨u_i, u_j⟩ = ‖Σu‖² − k and Σ_{i≠j} ⟨u_i, u_j⟩² = ‖Σuuᵀ‖²_F − k: no pair is ever formed.
    Cost O(k d²), memory O(d²), exact.

    Args:
        d: Width of the rows.
        dtype: Of the accumulators. Products are computed in float32 for float32 rows and lower.
        device: Of the accumulators.
    """

    def __init__(
        self, d: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> None:
        if d < 1:
            raise ValueError(f"d must be at least 1, got {d}")
        self.d = d
        self.sum = torch.zeros(d, dtype=dtype, device=device)
        self.gram = torch.zeros(d, d, dtype=dtype, device=device)
        self.k = 0
        self.dropped_rows = 0

    def update(
        self, rows: Float[Tensor, "n d"], center: Float[Tensor, " d"] | None = None
    ) -> CosineMoments:
        """Add rows; returns itself.

        Args:
            rows: ``[n, d]`` of any floating type.
            center: Taken off every row first.

        Raises:
            TypeError: not real floating point.
            ValueError: another width, NaN or infinity.
        """
        if not rows.is_floating_point():
            raise TypeError(
                f"rows must be real floating point, got {rows.dtype}; dequantise integers first"
            )
        if rows.ndim != 2 or rows.shape[1] != self.d:
            raise ValueError(f"rows must be [n, {self.d}], got {tuple(rows.shape)}")
        work = rows.detach()
        work = work if work.dtype == torch.float64 else work.float()
        largest = work.abs().amax(1, keepdim=True)
        if not bool(largest.isfinite().all()):
            raise ValueError(
                f"rows must be finite, but {int((~rows.isfinite()).sum())} entries are NaN or "
                "infinite"
            )
        if center is not None:
            work = work - center.to(work.dtype)
            largest = work.abs().amax(1, keepdim=True)
        kept = (largest > 0).flatten()
        if not bool(kept.all()):
            work, largest = work[kept], largest[kept]
        # By the largest entry first, so that no square overflows or vanishes.
        unit = work / largest
        unit /= torch.linalg.vector_norm(unit, dim=1, keepdim=True)
        self.sum += unit.sum(0, dtype=self.sum.dtype)
        self.gram += unit.T @ unit
        self.k += len(unit)
        self.dropped_rows += len(rows) - len(unit)
        return self

    def merge(self, other: CosineMoments) -> CosineMoments:
        """Add what another has seen, of a shard or a rank; returns itself."""
        if other.d != self.d:
            raise ValueError(f"widths differ: {self.d} and {other.d}")
        self.sum += other.sum
        self.gram += other.gram
        self.k += other.k
        self.dropped_rows += other.dropped_rows
        return self

    def stats(self) -> CosineStats:
        """Mean and spread of what has been seen.

        Raises:
            ValueError: fewer than two rows that are not zero.
        """
        if self.k < 2:
            raise ValueError(f"at least two rows that are not zero are needed, got {self.k}")
        pairs = self.k * (self.k - 1)
        mean = float((self.sum.double().square().sum() - self.k) / pairs)
        square = float((self.gram.double().square().sum() - self.k) / pairs)
        unbiased = pairs / 2 / (pairs / 2 - 1) if pairs > 2 else 1.0
        variance = max(square - mean**2, 0.0) * unbiased
        return CosineStats(mean, math.sqrt(variance), self.k, self.d, self.dropped_rows)


def cosine_moments(
    e: Tensor, *, chunk: int = 8192, center: bool = False, dtype: torch.dtype = torch.float64
) -> CosineStats:
    """Mean and spread of the cosines of all pairs of rows of an embedding, exactly.

    Args:
        e: ``[V, d]``, one row per token, of any floating type.
        chunk: Rows at a time.
        center: Take the mean row off first. That is another statistic than the paper's.
        dtype: Of the accumulators.

    Raises:
        TypeError: not real floating point.
        ValueError: not a matrix, fewer than two non-zero rows, NaN or infinity.
    """
    if not e.is_floating_point():
        raise TypeError(f"e must be real floating point, got {e.dtype}; dequantise integers first")
    if e.ndim != 2:
        raise ValueError(f"e must be a matrix [tokens, width], got shape {tuple(e.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    moments = CosineMoments(e.shape[1], dtype=dtype, device=e.device)
    mean = e.mean(0, dtype=dtype) if center else None
    for rows in e.split(chunk):
        moments.update(rows, mean)
    return moments.stats()


def accepted_deviation(e: Tensor, *, n_sigma: float | int = N_SIGMA, chunk: int = 8192) -> float:
    """ε = μ + n_sigma · σ of the pairwise cosines of an embedding ``[V, d]`` (section 2.4).

    Not the largest overlap: about 2 % of the pairs exceed it. Gaussian rows have 2/√d, whose
    "capacity" may be below the number of rows that produced it, as the formula was fitted on
    largest overlaps.
    """
    stats = cosine_moments(e, chunk=chunk)
    return stats.mean + n_sigma * stats.std


def worst_case_overlap(
    k: float | int, d: float | int, *, form: str = "full", c: float | None = None
) -> float:
    """Smallest largest overlap that k directions in d dimensions are predicted to have.

    0 where k ≤ d in the forms in k/d (an orthonormal set exists), never NaN.

    Args:
        k: Directions, at least 2.
        d: Dimensions.
        form: ``"full"`` (the paper's table), ``"ratio"`` (one constant, k/d), ``"jl"``
            (Johnson–Lindenstrauss with the constant of random vectors).
        c: Another constant for ``"ratio"`` or ``"jl"``.

    Raises:
        ValueError: k < 2, d < 1, another form.
    """
    _check(form, d)
    if not k >= 2:
        raise ValueError(f"k must be at least 2, got {k}")
    if form == "jl":
        return math.sqrt((JL_C if c is None else c) * math.log(k) / d)
    if form == "ratio":
        return math.sqrt((RATIO_C if c is None else c) * max(0.0, math.log(k / d)) / d)
    constant, a, b, power = FULL
    log_ratio = a * math.log(k) - math.log(d)
    return math.sqrt(constant * log_ratio**b / d**power) if log_ratio > 0 else 0.0


def log10_capacity(
    d: float | int, eps: float | int, *, form: str = "full", c: float | None = None
) -> float:
    """Decimal logarithm of :func:`capacity`, which it never overflows; any ε in (0, 1)."""
    _check(form, d)
    if not 0 < eps < 1:
        raise ValueError(f"eps must be in (0, 1), got {eps}")
    if form == "jl":
        natural = d * eps**2 / (JL_C if c is None else c)
    elif form == "ratio":
        natural = math.log(d) + d * eps**2 / (RATIO_C if c is None else c)
    else:
        constant, a, b, power = FULL
        natural = (math.log(d) + (eps**2 * d**power / constant) ** (1 / b)) / a
    return natural / math.log(10)


def capacity(
    d: float | int,
    eps: float | int,
    *,
    form: str = "full",
    c: float | None = None,
    force: bool = False,
) -> float:
    """Directions that fit into d dimensions with overlaps up to ε.

    Args:
        d: Dimensions.
        eps: ε in (0, 1), from :func:`accepted_deviation`.
        form: See :func:`worst_case_overlap`.
        c: Another constant for ``"ratio"`` or ``"jl"``.
        force: Give a number for ε of 0.1 and more too, where the paper calls it indeterminate.

    Returns:
        A whole number as float; ``math.inf`` beyond 1e308.

    Raises:
        ValueError: ε ≥ 0.1 without ``force``, ε outside (0, 1), d < 1, another form.
    """
    _check(form, d)
    if 1 > eps >= CAPACITY_BELOW and not force:
        raise ValueError(
            f"eps = {eps:.4g} is not below {CAPACITY_BELOW}: the directions are not nearly "
            "orthogonal, and the capacity is indeterminate (force=True computes it all the same)"
        )
    exponent = log10_capacity(d, eps, form=form, c=c)
    if exponent > 308:
        return math.inf
    exact = 10.0**exponent
    # A float that should be whole lies a rounding above or below it.
    whole = round(exact)
    return float(whole if abs(exact - whole) <= 1e-9 * exact else math.ceil(exact))


def min_dimension(
    k: float | int, eps: float | int, *, form: str = "full", c: float | None = None
) -> int:
    """Fewest dimensions in which k directions fit with overlaps up to ε, by bisection.

    Raises:
        ValueError: k < 2, ε outside (0, 1), another form.
    """
    _check(form, 1)
    if not k >= 2:
        raise ValueError(f"k must be at least 2, got {k}")
    if not 0 < eps < 1:
        raise ValueError(f"eps must be in (0, 1), got {eps}")
    # Where the prediction is surely 0, or for the form without k/d surely below ε.
    enough = {"full": k ** FULL[1], "ratio": k}
    low = 1
    high = math.ceil(enough.get(form, (JL_C if c is None else c) * math.log(k) / eps**2)) + 1
    while low < high:
        middle = (low + high) // 2
        if worst_case_overlap(k, middle, form=form, c=c) <= eps:
            high = middle
        else:
            low = middle + 1
    return low


def welch_bound(k: int, d: int) -> float:
    """No k unit vectors in d dimensions have a smaller largest overlap: √((k − d)/(d(k − 1))).

    0 for k ≤ d.

    Raises:
        ValueError: k < 2 or d < 1.
    """
    if k < 2 or d < 1:
        raise ValueError(f"k must be at least 2 and d at least 1, got {k} and {d}")
    return math.sqrt((k - d) / (d * (k - 1))) if k > d else 0.0


def _check(form: str, d: float | int) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if not 1 <= d < math.inf:
        raise ValueError(f"d must be at least 1, got {d}")

"""Two numbers per weight matrix, k and λ: the Weibull line through the middle of |w|.

On Weibull paper, ln(−ln(1 − F)) against ln |w|, the line through the middle 80 % of the mass has
the slope k and meets 0 at ln λ. Any Gaussian matrix has k = 1.2054 whatever its variance, so k says
how far training moved the shape and λ how far the scale.

Source: arXiv 2605.18898, the fit F1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from stiefel.diagnose.magnitudes import MagnitudeCounts, NonFiniteError

TRIM = 0.8
METHODS = ("auto", "exact", "bits", "npm")
# Up to here a sort costs next to nothing and has no bins at all.
EXACT_UP_TO = 2**16
# Standard error of k is this over √n for n independent Gaussian entries (400 repetitions).
_SE = 1.375
# The official package: 1,024 bins of log10 |w| from −12 to 2; below 1e-13 is set to that.
_NPM_BINS, _NPM_LOW, _NPM_HIGH, _NPM_FLOOR = 1024, -12.0, 2.0, 1e-13


class WeibullFit(NamedTuple):
    """The fit of one matrix; NaN where ``ok`` is false, and ``reason`` says why.

    Attributes:
        k: Shape.
        lam: Scale, in units of |w|.
        r2: Part of the variance of y that the line explains.
        ks: Largest distance of the two distribution functions.
        n: Finite non-zero entries.
        n_used: Points that the line goes through (entries or bins).
        zero_fraction: Part of all finite entries that is 0.
        se_k: Standard error of k if the n entries were independent.
        ok: Whether there is a fit.
        reason: Why not; empty if there is.
    """

    k: float
    lam: float
    r2: float
    ks: float
    n: int
    n_used: int
    zero_fraction: float
    se_k: float
    ok: bool
    reason: str


class Anchor(NamedTuple):
    """What a distribution gives in the limit of infinitely many entries.

    Attributes:
        k: Shape.
        lam: Scale, in units of the distribution's own scale.
        r2: Of the line.
    """

    k: float
    lam: float
    r2: float


def weibull_fit(
    w: Tensor,
    *,
    trim: float | int = TRIM,
    method: str = "auto",
    min_count: int = 100,
    nonfinite: str = "raise",
) -> WeibullFit:
    """Fit k and λ to the magnitudes of a tensor of any shape.

    Exact zeros are left out and told as ``zero_fraction``. Unchanged by permutations, signs and
    transposition; a factor c leaves k and multiplies λ by \\|c\\|.

    Args:
        w: Weights, floating point.
        trim: Part of the mass that is used, in the middle: 0.8 is the paper's.
        method: ``"exact"``: all entries, sorted, at (i − ½)/n. ``"bits"``: one pass over the
            leading 16 bits, for tensors of any size (k within 1e-3 of exact; lossless for half
            types).
            ``"npm"``: as the official package bins, for parity. ``"auto"``: exact up to 65,536
            entries, bits beyond.
        min_count: Fewer non-zero entries are not fitted.
        nonfinite: ``"raise"``, or ``"drop"`` to leave NaN and infinities out.

    Raises:
        TypeError: not real floating point.
        ValueError: trim outside (0, 1], unknown method or policy.
        NonFiniteError: NaN or infinity under ``"raise"``.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if nonfinite not in ("raise", "drop"):
        raise ValueError(f"nonfinite must be 'raise' or 'drop', got {nonfinite!r}")
    _check_trim(trim)
    if not w.is_floating_point():
        raise TypeError(f"w must be real floating point, got {w.dtype}")
    if method == "auto":
        method = "exact" if w.numel() <= EXACT_UP_TO else "bits"
    if method == "bits":
        counts = MagnitudeCounts.empty(w.dtype, w.device).update(w)
        return fit_magnitudes(counts, trim=trim, min_count=min_count, nonfinite=nonfinite)
    flat = w.detach().reshape(-1)
    finite = flat[flat.isfinite()]
    if len(finite) < len(flat) and nonfinite == "raise":
        raise NonFiniteError(_nonfinite(len(flat) - len(finite), len(flat)))
    fit = _fit_sorted if method == "exact" else _fit_npm
    return fit(finite.abs(), trim, min_count)


def fit_magnitudes(
    counts: MagnitudeCounts,
    *,
    trim: float | int = TRIM,
    min_count: int = 100,
    nonfinite: str = "raise",
) -> WeibullFit:
    """The ``"bits"`` fit of what has been counted, in one go or over chunks, shards, ranks.

    Raises:
        ValueError: trim outside (0, 1].
        NonFiniteError: NaN or infinity was counted and ``nonfinite`` is ``"raise"``.
    """
    _check_trim(trim)
    bad = counts.nonfinite
    if bad and nonfinite == "raise":
        raise NonFiniteError(_nonfinite(bad, counts.total))
    values, mass = counts.bins()
    finite = counts.total - bad
    zero_fraction = counts.zeros / finite if finite else 0.0
    return _line(values, mass, trim, min_count, zero_fraction)


def weibull_fit_counts(
    counts: Tensor, edges: Tensor, *, trim: float | int = TRIM, min_count: int = 100
) -> WeibullFit:
    """Fit a histogram of magnitudes that somebody else made.

    Args:
        counts: Entries per bin ``[b]``.
        edges: Ascending edges ``[b + 1]`` (the middle of a bin stands for it), or the ``[b]``
            values themselves. The first must not be below 0.
        trim: Part of the mass that is used.
        min_count: Fewer entries are not fitted.

    Raises:
        ValueError: sizes that do not fit, edges not ascending or negative, counts negative or not
            finite.
    """
    _check_trim(trim)
    counts, edges = counts.double(), edges.double()
    if counts.ndim != 1 or edges.ndim != 1 or len(edges) - len(counts) not in (0, 1):
        raise ValueError(
            "edges must have as many entries as counts or one more, got "
            f"{tuple(edges.shape)} and {tuple(counts.shape)}"
        )
    if not bool(edges.isfinite().all()) or bool((edges.diff() <= 0).any()) or bool(edges[0] < 0):
        raise ValueError("edges must be finite, ascending and not negative")
    if not bool(counts.isfinite().all()) or bool((counts < 0).any()):
        raise ValueError("counts must be finite and not negative")
    values = edges if len(edges) == len(counts) else (edges[1:] + edges[:-1]) / 2
    seen = (counts > 0) & (values > 0)
    return _line(values[seen], counts[seen], trim, min_count, 0.0)


def _fit_sorted(magnitudes: Tensor, trim: float | int, min_count: int) -> WeibullFit:
    """All entries at (i − ½)/n; equal ones share the mean of their places."""
    total = len(magnitudes)
    work = magnitudes.cpu()
    work = work if work.dtype in (torch.float64, torch.float32) else work.float()
    # NumPy sorts by vector instructions; torch's sort also carries the permutation.
    ordered = torch.from_numpy(_numpy_sorted(work)).double()
    ordered = ordered[int(torch.searchsorted(ordered, 0.0, right=True)) :]
    zero_fraction = 1 - len(ordered) / total if total else 0.0
    values, mass = ordered.unique_consecutive(return_counts=True)
    return _line(values, mass.double(), trim, min_count, zero_fraction)


def _numpy_sorted(values: Tensor):
    copy = values.numpy().copy()
    copy.sort()
    return copy


def _line(
    values: Tensor, mass: Tensor, trim: float | int, min_count: int, zero_fraction: float | int
) -> WeibullFit:
    """Weighted least squares of y on x through the middle of the mass."""
    n = int(mass.sum())
    if n < min_count:
        return _failed(n, 0, zero_fraction, f"{n} non-zero entries, at least {min_count} needed")
    total = mass.sum()
    upper = mass.cumsum(0)
    place = (upper - mass / 2) / total
    margin = (1 - trim) / 2
    # A hair wider, so that 0.1 and 0.9 themselves do not depend on rounding.
    used = (place >= margin - 1e-12) & (place <= 1 - margin + 1e-12) & (place < 1)
    n_used = int(used.sum())
    if n_used < 5:
        return _failed(n, n_used, zero_fraction, f"{n_used} distinct magnitudes, 5 needed")
    x, weight = values[used].log(), mass[used] / mass[used].sum()
    y = (-torch.log1p(-place[used])).log()
    dx, dy = x - weight @ x, y - weight @ y
    sxx, sxy, syy = weight @ dx**2, weight @ (dx * dy), weight @ dy**2
    k = float(sxy / sxx)
    lam = float((weight @ x - (weight @ y) / k).exp())
    if not (math.isfinite(k) and k > 0 and math.isfinite(lam) and lam > 0):
        return _failed(n, n_used, zero_fraction, "the line has no positive slope")
    model = -torch.expm1(-((values / lam) ** k))
    gap = torch.maximum((upper / total - model).abs(), ((upper - mass) / total - model).abs())
    return WeibullFit(
        k=k,
        lam=lam,
        r2=float(sxy**2 / (sxx * syy)),
        ks=float(gap.max()),
        n=n,
        n_used=n_used,
        zero_fraction=zero_fraction,
        se_k=_SE * k / half_normal_anchor(TRIM).k / math.sqrt(n),
        ok=True,
        reason="",
    )


def _fit_npm(magnitudes: Tensor, trim: float | int, min_count: int) -> WeibullFit:
    """The official package's fit, bins and guards included, in NumPy as there."""
    import numpy as np

    values = magnitudes.float().cpu().numpy()
    zero_fraction = float((values == 0).mean()) if len(values) else 0.0
    logs = np.log10(np.maximum(values, np.float32(_NPM_FLOOR)))
    edges = np.linspace(_NPM_LOW, _NPM_HIGH, _NPM_BINS + 1)
    mass = np.histogram(logs, bins=edges)[0].astype(np.float64)
    total = mass.sum()
    if total < min_count:
        reason = f"{int(total)} entries in 1e-12 to 1e2, at least {min_count} needed"
        return _failed(int(total), 0, zero_fraction, reason)
    centre = (edges[1:] + edges[:-1]) / 2
    place = (mass.cumsum() - mass / 2) / total
    margin = (1 - trim) / 2
    used = (mass > 0) & (place >= margin) & (place <= 1 - margin) & (place > 0) & (place < 1)
    if used.sum() < 5:
        return _failed(int(total), int(used.sum()), zero_fraction, "fewer than 5 bins")
    x, h = centre[used] * math.log(10), mass[used]
    y = np.log(-np.log(1 - place[used] + 1e-12))
    dx, dy = x - h @ x / h.sum(), y - h @ y / h.sum()
    k = float(h @ (dx * dy) / (h @ dx**2))
    lam = math.exp(h @ x / h.sum() - h @ y / h.sum() / k) if k > 0 else math.nan
    if not (k > 0 and 0 < lam < math.inf):
        return _failed(int(total), int(used.sum()), zero_fraction, "no positive slope")
    residual = dy - k * dx
    model = 1 - np.exp(-((10**centre / lam) ** k))
    return WeibullFit(
        k=k,
        lam=lam,
        r2=float(1 - h @ residual**2 / (h @ dy**2)),
        ks=float(np.abs(mass.cumsum() / total - model).max()),
        n=int(total),
        n_used=int(used.sum()),
        zero_fraction=zero_fraction,
        se_k=_SE * k / half_normal_anchor(TRIM).k / math.sqrt(total),
        ok=True,
        reason="",
    )


# Quantile function of |w| for F, in units of the distribution's scale.
def _half_normal(f: Tensor) -> Tensor:
    return torch.special.ndtri((1 + f) / 2)


def _truncated_normal(f: Tensor) -> Tensor:
    """Cut at two standard deviations, as timm and JAX initialise."""
    half = torch.special.ndtr(f.new_tensor(2.0)) - 0.5
    return torch.special.ndtri(0.5 + f * half)


_FAMILIES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": _half_normal,
    "uniform": lambda f: f,
    "truncnorm": _truncated_normal,
    "laplace": lambda f: -torch.log1p(-f),
}


@cache
def half_normal_anchor(trim: float | int = TRIM, family: str = "normal") -> Anchor:
    """k, λ and R² of the limit of infinitely many entries, by quadrature.

    Every F in the middle ``trim`` weighs alike, so k = Cov(x, y) / Var(x) with x = ln Q(F).

    Args:
        trim: Part of the mass that is used.
        family: ``"normal"`` (k = 1.20543, λ = 0.88749 σ), ``"uniform"`` on (−a, a), the default of
            ``nn.Linear`` (1.37512, 0.60737 a), ``"truncnorm"`` at 2 σ (1.22717, 0.83031 σ),
            ``"laplace"`` (1, b).

    Raises:
        ValueError: trim outside (0, 1], another family.
    """
    _check_trim(trim)
    if family not in _FAMILIES:
        raise ValueError(f"family must be one of {', '.join(_FAMILIES)}, got {family!r}")
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(400)
    weight = torch.from_numpy(weights / weights.sum())
    f = 0.5 + trim / 2 * torch.from_numpy(nodes)
    x, y = _FAMILIES[family](f).log(), (-torch.log1p(-f)).log()
    dx, dy = x - weight @ x, y - weight @ y
    sxx, sxy, syy = weight @ dx**2, weight @ (dx * dy), weight @ dy**2
    k = sxy / sxx
    lam = (weight @ x - (weight @ y) / k).exp()
    return Anchor(float(k), float(lam), float(sxy**2 / (sxx * syy)))


def weibull_mean(k: float | int, lam: float | int) -> float:
    """λ Γ(1 + 1/k)."""
    return lam * math.gamma(1 + 1 / k)


def weibull_std(k: float | int, lam: float | int) -> float:
    """λ √(Γ(1 + 2/k) − Γ(1 + 1/k)²), of the magnitudes."""
    return lam * math.sqrt(math.gamma(1 + 2 / k) - math.gamma(1 + 1 / k) ** 2)


def weibull_quantile(k: float | int, lam: float | int, q: float | int) -> float:
    """λ (−ln(1 − q))^{1/k} for q in [0, 1)."""
    if not 0 <= q < 1:
        raise ValueError(f"q must be in [0, 1), got {q}")
    return lam * (-math.log1p(-q)) ** (1 / k)


def _failed(n: int, n_used: int, zero_fraction: float | int, reason: str) -> WeibullFit:
    nan = math.nan
    return WeibullFit(nan, nan, nan, nan, n, n_used, zero_fraction, nan, False, reason)


def _check_trim(trim: float | int) -> None:
    if not 0 < trim <= 1:
        raise ValueError(f"trim must be in (0, 1], got {trim}")


def _nonfinite(bad: int, total: int) -> str:
    return f"w must be finite, but {bad} of its {total} entries are NaN or infinite"

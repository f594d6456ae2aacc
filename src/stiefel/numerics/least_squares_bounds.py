"""What is known beforehand about a design: stability and error. Derived for arXiv 2312.14057.

c_δ = δ + (1 − δ) ln(1 − δ), n points in dimension m, G the empirical Gram matrix,
S_δ = {λ_min(G) ≥ 1 − δ}.
"""

from __future__ import annotations

from math import ceil, exp, log, log1p


def chernoff_rate(delta: float | int = 0.5) -> float:
    """c_δ of the matrix Chernoff bound; 0.15343 for δ = 1/2."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, got {delta}")
    return delta + (1 - delta) * log1p(-delta)


def instability_bound(m: int, n: int, delta: float | int = 0.5) -> float:
    """P(not S_δ) ≤ m exp(−n c_δ / m) for n independent points of density k/m, at most 1."""
    if m < 1 or n < 1:
        raise ValueError(f"m and n must be ≥ 1, got m={m}, n={n}")
    return min(1.0, m * exp(-n * chernoff_rate(delta) / m))


def samples_for_stability(
    m: int, delta: float | int = 0.5, eta: float | int = 0.1, *, method: str = "iid"
) -> int:
    """n with P(S_δ) ≥ 1 − η for certain: n ≥ m ln(m / η) / c_δ.

    For ``"dpp-repeat"`` the proof counts draws instead of points, r ≥ m ln(m / η) / c_δ: a worst
    case that practice is far from (three to four draws do what 6 m to 10 m independent points do).

    Args:
        m: Dimension.
        delta: Between 0 and 1.
        eta: Probability of failure, between 0 and 1.
        method: ``"iid"`` or ``"dpp-repeat"``.
    """
    if m < 1:
        raise ValueError(f"m must be ≥ 1, got {m}")
    if not 0 < eta < 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    if method not in ("iid", "dpp-repeat"):
        raise ValueError(f"method must be 'iid' or 'dpp-repeat', got {method!r}")
    count = max(1, ceil(m * log(m / eta) / chernoff_rate(delta)))
    return max(count, m) if method == "iid" else count * m


def error_bound(
    m: int, n: int, delta: float | int = 0.5, *, probability: float | int = 1.0
) -> float:
    """E[‖f − f̂‖² | S_δ] ≤ (1 + (m/n) / ((1 − δ)² P(S_δ))) ‖f − P f‖².

    Holds for ``iid`` and ``dpp-repeat``. 1 + m/n is what an ideal design (G = I always) would give.

    Args:
        m: Dimension.
        n: Points.
        delta: Stability that the sample was conditioned on.
        probability: P(S_δ), in (0, 1]: 1 over the mean of ``Design.tries``.
    """
    if m < 1 or n < 1:
        raise ValueError(f"m and n must be ≥ 1, got m={m}, n={n}")
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be from 0 up to below 1, got {delta}")
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be above 0 and at most 1, got {probability}")
    return 1 + m / n / ((1 - delta) ** 2 * probability)

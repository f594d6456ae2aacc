"""Distances to the mean of many points, from a few of them.

Source: arXiv 1910.06151, section 6 (supervised clustering).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from stiefel.numerics.least_squares_arrays import as_generator
from stiefel.numerics.sampled.bounds import DELTA, ErrorBound, Estimate
from stiefel.numerics.sampled.checks import as_numbers, check_count, check_positive
from stiefel.numerics.sampled.sketching import as_sampled
from stiefel.numerics.sampled.sources import square_norms


def centroid_distance(
    p: Any,
    Q: Any,
    s: int | np.integer = 200,
    generator: Any = None,
    *,
    delta: float | int = DELTA,
) -> Estimate:
    """‖p − mean of the rows of Q‖², unbiased, from ``s`` draws of p and rows of Q, in O(s d).

    With M = [p/‖p‖; −qᵢ/(‖qᵢ‖ √n)] and w = (‖p‖, ‖qᵢ‖/√n), wM = p − mean q and ‖M‖_F² = 2. Rows
    of M drawn by length are p half of the time, else any q. Each gives an unbiased z = wᵢ Mᵢ / pᵢ
    of wM; the mean of ⟨z_a, z_b⟩ over all pairs a ≠ b is the estimate. It may be negative.

    Args:
        p: ``(d,)``.
        Q: :class:`SampledMatrix` ``(n, d)``; anything it is built from works, at one pass a call.
        s: Draws, ≥ 2.
        generator: NumPy generator, ``torch.Generator``, seed or None.
        delta: The bound (Chebyshev) holds with probability 1 − δ.

    Raises:
        ValueError: p of another length, NaN, s < 2.
    """
    p, s = as_numbers(p, "p"), check_count(s, "s", 2)
    delta = check_positive(delta, "delta", 1)
    Q = as_sampled(Q)
    n, d = Q.shape
    if p.shape != (d,):
        raise ValueError(f"p must be ({d},), got shape {p.shape}")
    rng = as_generator(generator)
    mine = int(rng.binomial(s, 0.5))
    rows = Q.rows(rng.integers(n, size=s - mine))
    value = pair_mean(p[None], mine, rows.sum(axis=0), float(square_norms(rows).sum()), s)[0]
    size2 = float(square_norms(p[None])[0]) + Q.fro2 / n
    guarantee = ErrorBound(
        distance_bound(float(value), size2, s, delta), float(value), delta, s,
        "squared distance", "answering 0",
    )  # fmt: skip
    return Estimate.of(float(value), guarantee)


def pair_mean(
    p: Shaped[np.ndarray, "m d"],
    mine: int,
    total: Shaped[np.ndarray, " d"],
    squares: float | int,
    s: int,
) -> Float[np.ndarray, " m"]:
    """Σ_{a≠b} ⟨z_a, z_b⟩ / (s (s − 1)) for points p, z = 2 p ``mine`` times and −2 q else.

    ``total`` and ``squares`` are the sums of the q drawn and of their squared norms. Sums over
    pairs are ‖Σ z‖² − Σ ‖z‖².
    """
    sums = 2 * (mine * p - total)
    return (square_norms(sums) - 4 * (mine * square_norms(p) + squares)) / (s * (s - 1))


def distance_bound(value: float, size2: float, s: int, delta: float) -> float:
    """Chebyshev for the mean over pairs; ``size2`` is ‖p‖² + mean ‖q‖² = E‖z‖²/2.

    Var ≤ 8 D size2/s + 8 size2²/(s (s − 1)) for the true D, which is at most the estimate and the
    bound together: the quadratic equation that follows is solved.
    """
    a = 8 * size2 / (s * delta)
    b = a * max(value, 0.0) + 8 * size2**2 / (s * (s - 1) * delta)
    return (a + math.sqrt(a * a + 4 * b)) / 2

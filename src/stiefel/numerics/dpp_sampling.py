"""Exact draws of the projection determinantal point process of a basis (arXiv 2312.14057).

The law of m distinct candidates {i_1 … i_m} is det(Q_I)², Q_I the m rows of Q: rows that span a
large volume are likely, equal rows never come together. Drawn one by one, the next candidate i has
a probability proportional to what is left of its row q_i beside those already drawn.

Two samplers with this law. ``rejection`` proposes by leverage ‖q_i‖² and accepts with the part of
‖q_i‖² that is left: m (1 + 1/2 + … + 1/m) proposals a draw, whatever N is. ``gram-schmidt`` keeps
what is left of every row: O(N m²) a draw, no randomness in its cost.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from stiefel.numerics.least_squares_arrays import as_generator
from stiefel.numerics.least_squares_basis import Basis

SAMPLERS = ("rejection", "gram-schmidt")
# Less than this part of a squared row norm is rounding: that row is never drawn (again).
_NOTHING = 1e-12
# Proposals that a draw looks at together, at most; bytes that draws made together may take.
_PROPOSALS = 256
_REJECTION_BYTES = 16 << 20
_GRAM_SCHMIDT_BYTES = 256 << 20


def sample_dpp(
    basis: Basis, draws: int = 1, *, generator: Any = None, sampler: str = "rejection"
) -> Int[np.ndarray, "draws m"]:
    """Independent draws of the projection DPP over the candidates of ``basis``.

    Args:
        basis: From :func:`~stiefel.numerics.fit_basis`.
        draws: How many, ≥ 1; made together, as far as memory allows.
        generator: NumPy generator, seed or None.
        sampler: ``"rejection"`` or ``"gram-schmidt"``. One law; not the same draws for a seed.

    Returns:
        Indices ``(draws, m)``, distinct within a row, in the order in which they were drawn.

    Raises:
        ValueError: draws < 1; another sampler; ``gram-schmidt`` where Q is not in memory.
    """
    if draws < 1:
        raise ValueError(f"draws must be ≥ 1, got {draws}")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    rng = as_generator(generator)
    m = basis.dimension
    if sampler == "rejection":
        size = min(ceil(m * sum(1 / k for k in range(1, m + 1))), _PROPOSALS)
        together = max(1, _REJECTION_BYTES // (8 * m * (size + m)))
        one = _rejection
    else:
        if basis.Q is None:
            raise ValueError(
                "gram-schmidt needs Q in memory; use sampler='rejection', or fit_basis(keep=True)"
            )
        size = basis.size
        together = max(1, _GRAM_SCHMIDT_BYTES // (16 * size))
        one = _gram_schmidt
    parts = [
        one(basis, min(together, draws - start), size, rng) for start in range(0, draws, together)
    ]
    return np.concatenate(parts)


def sample_leverage(
    basis: Basis, n: int, *, zeta: float | int = 1.0, generator: Any = None
) -> Int[np.ndarray, " n"]:
    """n independent candidates from ν = ζ (k/m) μ + (1 − ζ) μ: optimal for ζ = 1, μ for ζ = 0."""
    if not 0 <= zeta <= 1:
        raise ValueError(f"zeta must be between 0 and 1, got {zeta}")
    rng = as_generator(generator)
    if zeta == 1:
        return _by_weight(basis.cumulative, rng.random(n))
    optimal = rng.random(n) < zeta
    u = rng.random(n)
    found = _by_weight(basis.cumulative_mu, u)
    found[optimal] = _by_weight(basis.cumulative, u[optimal])
    return found


def _by_weight(cumulative: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Indices drawn by uniform numbers; those whose weight is 0 never come."""
    found = np.searchsorted(cumulative, u * cumulative[-1], side="right")
    # u * total may round up to the total, which is beyond the last index.
    last = np.searchsorted(cumulative, cumulative[-1], side="left")
    return np.minimum(found, last)


def _left_of(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Unit vectors (draws, m): what rows (draws, m) have beside known (draws, k, m), orthonormal.

    Projected twice: after that the result is orthogonal to ``known`` up to one rounding.
    """
    for _ in range(2):
        inner = np.matmul(known, rows[:, :, None])
        rows = rows - np.matmul(inner.swapaxes(1, 2), known)[:, 0]
    return rows / np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]


def _rejection(
    basis: Basis, draws: int, size: int, rng: np.random.Generator
) -> Int[np.ndarray, "draws m"]:
    """``draws`` at once, each looking at ``size`` proposals at a time.

    What is left of a block of proposals is kept up to date while it is walked through: accepting
    one costs a matrix-vector product for the block instead of a projection for every proposal.
    """
    m = basis.dimension
    picked = np.empty((draws, m), dtype=np.int64)
    known = np.zeros((draws, m, m))
    count = np.zeros(draws, dtype=np.int64)
    active = np.arange(draws)
    while active.size:
        index = _by_weight(basis.cumulative, rng.random(active.size * size))
        rows = basis.rows(index).reshape(active.size, size, m)
        index = index.reshape(active.size, size)
        rows = rows / np.sqrt(np.einsum("ijk,ijk->ij", rows, rows))[:, :, None]
        most = int(count[active].max())
        inner = np.matmul(rows, known[active, :most].swapaxes(1, 2))
        left = 1.0 - np.einsum("ijk,ijk->ij", inner, inner)
        threshold = rng.random((active.size, size))
        live = np.arange(active.size)
        while True:
            accepted = (threshold[live] < left[live]) & (left[live] > _NOTHING)
            first = accepted.argmax(axis=1)
            found = accepted[np.arange(live.size), first]
            live, first = live[found], first[found]
            if not live.size:
                break
            draw = active[live]
            most = int(count[draw].max())
            direction = _left_of(rows[live, first], known[draw, :most])
            known[draw, count[draw]] = direction
            picked[draw, count[draw]] = index[live, first]
            count[draw] += 1
            every = np.zeros((active.size, m))
            every[live] = direction
            # What is left only shrinks: proposals once rejected stay rejected, one accepted has 0.
            left -= np.matmul(rows, every[:, :, None])[:, :, 0] ** 2
            live = live[count[draw] < m]
        active = active[count[active] < m]
    return picked


def _gram_schmidt(
    basis: Basis, draws: int, size: int, rng: np.random.Generator
) -> Int[np.ndarray, "draws m"]:
    """What is left of all ``size`` rows, for ``draws`` at once."""
    q: Float[np.ndarray, "N m"] = basis.rows(slice(None))
    m = basis.dimension
    left = np.tile(basis.leverage, (draws, 1))
    floor = _NOTHING * basis.leverage
    picked = np.empty((draws, m), dtype=np.int64)
    known = np.zeros((draws, m, m))
    each = np.arange(draws)
    for step in range(m):
        u = rng.random(draws)
        for draw in range(draws):
            picked[draw, step] = _by_weight(np.cumsum(left[draw]), u[draw : draw + 1])[0]
        known[:, step] = _left_of(q[picked[:, step]], known[:, :step])
        left -= (known[:, step] @ q.T) ** 2
        left[left <= floor] = 0.0
        left[each[:, None], picked[:, : step + 1]] = 0.0
    return picked

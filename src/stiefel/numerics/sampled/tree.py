"""A sum tree: draws by weight, updates and appends in time logarithmic in the number of weights.

Every node holds the sum of 32 below it; sums are computed anew from there after a change, never
corrected by differences, so that rounding does not add up over updates. Draws and updates take
batches and walk the tree level by level.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

# Children of a node. Wide nodes make few levels, and NumPy is called once a level.
FAN = 32
# Draws that walk down together; bounds the memory of large samples.
_TOGETHER = 1 << 16


class SumTree:
    """Weights ``(n,)`` ≥ 0 from which indices are drawn with chance wᵢ / Σ w.

    A draw and an update touch one node on each of ⌈log₃₂ n⌉ levels. Indices of weight 0 are never
    drawn. Memory: the weights, 1/31 of them above, and up to as much again after appends.

    The caller answers for the weights: finite, ≥ 0.
    """

    def __init__(self, weights: Float[np.ndarray, " n"]) -> None:
        self.size = len(weights)
        self._levels = _build(np.asarray(weights, dtype=np.float64), len(weights))

    @property
    def weights(self) -> Float[np.ndarray, " n"]:
        """The weights, read-only; changes show."""
        view = self._levels[0][: self.size]
        view.flags.writeable = False
        return view

    @property
    def total(self) -> float:
        """Sum of the weights."""
        return float(self._levels[-1].sum())

    @property
    def depth(self) -> int:
        """Levels of the tree, the weights included."""
        return len(self._levels)

    def set(self, index: Int[np.ndarray, " m"], weights: Float[np.ndarray, " m"]) -> None:
        """Replace the weights at ``index``, each index once."""
        self._levels[0][index] = weights
        nodes = index
        for below, level in zip(self._levels, self._levels[1:], strict=False):
            nodes = np.unique(nodes // FAN)
            level[nodes] = below.reshape(-1, FAN)[nodes].sum(axis=1)

    def append(self, weights: Float[np.ndarray, " m"]) -> None:
        """Add weights at the end; room doubles when it is used up."""
        start, size = self.size, self.size + len(weights)
        if size > len(self._levels[0]):
            grown = np.concatenate([self._levels[0][:start], weights])
            self._levels = _build(grown, max(size, 2 * start))
        else:
            self.set(np.arange(start, size), weights)
        self.size = size

    def draw(self, count: int, rng: np.random.Generator) -> Int[np.ndarray, " count"]:
        """``count`` independent indices.

        Raises:
            ValueError: all weights are 0.
        """
        total = self.total
        if total <= 0:
            raise ValueError("cannot draw by weight: all weights are zero")
        found = np.empty(count, dtype=np.int64)
        for start in range(0, count, _TOGETHER):
            some = min(_TOGETHER, count - start)
            found[start : start + some] = self._descend(rng.random(some) * total)
        return found

    def _descend(self, u: Float[np.ndarray, " s"]) -> Int[np.ndarray, " s"]:
        node = np.zeros(len(u), dtype=np.int64)
        each = np.arange(len(u))
        for level in reversed(self._levels):
            sums = level.reshape(-1, FAN)[node].cumsum(axis=1)
            # Rounding may leave u at the very end: the last child of positive weight takes it.
            child = np.minimum((sums <= u[:, None]).sum(axis=1), (sums < sums[:, -1:]).sum(axis=1))
            u = u - np.where(child > 0, sums[each, child - 1], 0.0)
            node = node * FAN + child
        return node


def _build(weights: np.ndarray, room: int) -> list[np.ndarray]:
    """Levels from the weights up, each padded with zeros to whole nodes."""
    width = -(-max(room, 1) // FAN) * FAN
    level = np.zeros(width)
    level[: len(weights)] = weights
    levels = [level]
    while len(level) > FAN:
        sums = level.reshape(-1, FAN).sum(axis=1)
        level = np.zeros(-(-len(sums) // FAN) * FAN)
        level[: len(sums)] = sums
        levels.append(level)
    return levels

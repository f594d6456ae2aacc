"""Means of rows, in one pass of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from stiefel.numerics.sampled.sources import Source


def group_means(
    source: Source, groups: Int[np.ndarray, " n"], count: int
) -> tuple[Shaped[np.ndarray, "g d"], Float[np.ndarray, " g"]]:
    """Mean row of every group, and how many rows it has; a group without rows has mean 0.

    Args:
        source: Rows ``(n, d)``.
        groups: ``(n,)``, each in 0 … count − 1.
        count: g.
    """
    kind = np.complex128 if source.dtype.kind == "c" else np.float64
    sums = np.zeros((count, source.shape[1]), dtype=kind)
    for start, part in source.blocks():
        if isinstance(part, tuple):
            values, columns, starts = part
            mine = groups[start : start + len(starts) - 1]
            np.add.at(sums, (np.repeat(mine, np.diff(starts)), columns), values)
        else:
            _add_dense(sums, part, groups[start : start + len(part)])
    sizes = np.bincount(groups, minlength=count).astype(np.float64)
    return sums / np.maximum(sizes, 1)[:, None], sizes


def _add_dense(sums: np.ndarray, part: Any, groups: np.ndarray) -> None:
    """Rows of one group are brought together and added at once."""
    order = np.argsort(groups, kind="stable")
    found, starts = np.unique(groups[order], return_index=True)
    if len(found) == 1:
        sums[found[0]] += part.sum(axis=0, dtype=sums.dtype)
    else:
        sums[found] += np.add.reduceat(part[order], starts, axis=0, dtype=sums.dtype)

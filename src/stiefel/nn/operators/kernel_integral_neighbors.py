"""Which points lie in a ball around each query, found by SciPy's k-d tree."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stiefel.nn.operators.checks import check_finite_values, positive

# Queries per search of the tree: bounds what the search holds beside its result.
_QUERIES = 65_536


class Neighbors(NamedTuple):
    """Compressed rows: the neighbours of query i are ``index[row_splits[i]:row_splits[i + 1]]``.

    Attributes:
        index: ``[E]``, int64, rising inside each row.
        row_splits: ``[M + 1]``, int64, from 0 to E.
    """

    index: Tensor
    row_splits: Tensor

    def rows(self) -> Int[Tensor, " E"]:
        """The query of every entry of ``index``."""
        queries = torch.arange(len(self.row_splits) - 1, device=self.index.device)
        return queries.repeat_interleave(self.row_splits.diff())


def radius_neighbors(
    points: Float[Tensor, "N d"],
    queries: Float[Tensor, "M e"] | None = None,
    *,
    radius: float | int,
    period: float | int | None = None,
) -> Neighbors:
    """All j with |x_i − y_j| ≤ r, in time linear in points and neighbours.

    Args:
        points: y, ``[N, d]``.
        queries: x, ``[M, d]``; default: the points themselves.
        radius: r.
        period: Length of a periodic box, the same in each axis; the default is none.

    Returns:
        On the device of ``points``.

    Raises:
        ValueError: Other shapes or dimensions, NaN, radius or period not positive, a radius above
            half the period.
    """
    queries = points if queries is None else queries
    for x, name in ((points, "points"), (queries, "queries")):
        check_finite_values(x, name)
    if points.shape[1] != queries.shape[1]:
        raise ValueError(
            f"points and queries must have as many coordinates, got shapes {tuple(points.shape)} "
            f"and {tuple(queries.shape)}"
        )
    reach = positive(radius, "radius")
    box = None if period is None else positive(period, "period")
    if box is not None and reach > box / 2:
        raise ValueError(f"radius must be at most half the period {box}, got {radius}")
    from scipy.sparse import coo_matrix
    from scipy.spatial import KDTree

    def place(x: Tensor) -> np.ndarray:
        found = x.detach().to("cpu", torch.float64).numpy()
        return found if box is None else np.mod(found, box) % box

    tree = KDTree(place(points), boxsize=box)
    asked = place(queries)
    indices, counts = [], []
    for first in range(0, len(asked), _QUERIES):
        part = asked[first : first + _QUERIES]
        pairs = KDTree(part, boxsize=box).sparse_distance_matrix(tree, reach, output_type="ndarray")
        table = coo_matrix(
            (np.ones(len(pairs), dtype=np.int8), (pairs["i"], pairs["j"])),
            shape=(len(part), len(points)),
        ).tocsr()
        table.sort_indices()
        indices.append(table.indices)
        counts.append(np.diff(table.indptr))
    device = points.device
    index = np.concatenate(indices) if indices else np.empty(0)
    sizes = np.concatenate([[0], *counts])
    return Neighbors(
        torch.from_numpy(index.astype(np.int64)).to(device),
        torch.from_numpy(sizes.astype(np.int64)).cumsum(0).to(device),
    )

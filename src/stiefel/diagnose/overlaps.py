"""The distribution of all pairwise cosines, by tiles: a histogram and the largest, never k × k."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

BINS = 400
# Rows of a tile: 16 MB of cosines in float32.
TILE = 2048


class OverlapHistogram(NamedTuple):
    """Counts of the cosines of unordered pairs of rows.

    Attributes:
        counts: int64 ``[bins]`` over [−1, 1] in equal bins.
        largest: Largest |cosine|.
        close_rows: Rows with |cosine| > 0.99 to another one that was looked at: duplicates and
            tokens that were never trained.
        rows: Rows that count.
        pairs: Pairs that were counted: all, or those within a sample of rows.
        sampled: Whether ``rows`` are a sample.
    """

    counts: Int[Tensor, " bins"]
    largest: float
    close_rows: int
    rows: int
    pairs: int
    sampled: bool

    @property
    def edges(self) -> Float[Tensor, " edges"]:
        """``[bins + 1]`` from −1 to 1."""
        return torch.linspace(-1, 1, len(self.counts) + 1, dtype=torch.float64)

    def above(self, eps: float | int) -> float:
        """Part of the pairs with a cosine above ``eps``, linear within a bin."""
        position = (min(max(eps, -1.0), 1.0) + 1) / 2 * len(self.counts)
        whole = min(int(position), len(self.counts) - 1)
        below = float(self.counts[:whole].sum()) + (position - whole) * float(self.counts[whole])
        return 1 - below / self.pairs


def overlap_histogram(
    e: Tensor,
    *,
    sample: int | None = 8192,
    bins: int = BINS,
    generator: torch.Generator | None = None,
) -> OverlapHistogram:
    """Histogram of the cosines of all pairs of rows, or of all pairs within a random sample.

    The symmetric half of the tiles is computed. Rows of zeros are left out.

    Args:
        e: ``[V, d]``, floating point.
        sample: Rows to draw, without replacement; None takes all.
        bins: Over [−1, 1].
        generator: Of the draw; None: seeded with 0.

    Raises:
        ValueError: not a matrix, NaN or infinity, fewer than two non-zero rows, bins < 2.
        TypeError: not floating point.
    """
    if not e.is_floating_point():
        raise TypeError(f"e must be real floating point, got {e.dtype}")
    if e.ndim != 2 or bins < 2:
        raise ValueError(
            f"e must be [rows, width] and bins at least 2, got {tuple(e.shape)}, {bins}"
        )
    sampled = sample is not None and sample < len(e)
    if sampled:
        draw = generator or torch.Generator().manual_seed(0)
        e = e[torch.randperm(len(e), generator=draw)[:sample].sort().values.to(e.device)]
    u = e.detach() if e.dtype == torch.float64 else e.detach().float()
    largest = u.abs().amax(1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise ValueError("e must be finite, but has NaN or infinity")
    kept = (largest > 0).flatten()
    u = u[kept] / largest[kept]
    u /= torch.linalg.vector_norm(u, dim=1, keepdim=True)
    if len(u) < 2:
        raise ValueError(f"at least two rows that are not zero are needed, got {len(u)}")
    counts = torch.zeros(bins, dtype=torch.int64, device=u.device)
    close = torch.zeros(len(u), dtype=torch.bool, device=u.device)
    top = 0.0
    for i in range(0, len(u), TILE):
        for j in range(i, len(u), TILE):
            tile = u[i : i + TILE] @ u[j : j + TILE].T
            if i == j:
                # Only pairs above the diagonal count; the others leave the range of the bins.
                tile.masked_fill_(torch.ones_like(tile, dtype=torch.bool).tril(), torch.nan)
            size = tile.abs().nan_to_num_(0.0)
            top = max(top, float(size.max()))
            near = size > 0.99
            if bool(near.any()):
                close[i : i + TILE] |= near.any(1)
                close[j : j + TILE] |= near.any(0)
            place = ((tile + 1) * (bins / 2)).clamp_(0, bins - 1)
            place = place[~place.isnan()] if i == j else place.flatten()
            counts += torch.bincount(place.to(torch.int32), minlength=bins)
    pairs = len(u) * (len(u) - 1) // 2
    return OverlapHistogram(
        counts.cpu(), min(top, 1.0), int(close.sum()), len(u), pairs, bool(sampled)
    )

"""Which entries of the database stand in for a query, where there is none."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from stiefel.generate._checks import number, whole


def proposal_counts(neighbour_idx: Int[Tensor, "M k"], N: int) -> Int[Tensor, " N"]:
    """c(y): how many of M images have entry y among their k neighbours; Σ c = k·M.

    The paper's proposal is p_D(y) = c(y) / Σ c (arXiv 2204.11824, sampling without a query).

    Args:
        neighbour_idx: ``[M, k]`` rows of the database.
        N: Entries of the database.

    Raises:
        ValueError: N < 1, or a row that is not in the database.
    """
    size = whole(N, "N")
    if neighbour_idx.numel():
        low, high = (int(v) for v in neighbour_idx.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"neighbour_idx must be in 0..{size - 1}, got {low} to {high}")
    return torch.bincount(neighbour_idx.flatten().long(), minlength=size)


class Proposal:
    """Draws rows of the database: ``proposal(n)`` is ``[n]``."""

    def __init__(
        self, entries: Tensor, weights: Tensor | None, generator: torch.Generator | None
    ) -> None:
        """Draw from ``entries``, evenly or by ``weights``."""
        self.entries = entries
        """Rows that can come, those retrieved most often first."""
        self.weights = weights
        self.generator = generator

    def __call__(self, n: int) -> Int[Tensor, " n"]:
        """``[n]`` rows.

        Without weights every entry comes before any comes again, in an order drawn anew each time
        round. Every draw is uniform, and n of them represent the database better than independent
        ones, whose proportions of classes scatter. With weights draws are independent.
        """
        n = whole(n, "n")
        if self.weights is not None:
            place = torch.multinomial(self.weights, n, replacement=True, generator=self.generator)
            return self.entries[place]
        size = len(self.entries)
        rounds = [torch.randperm(size, generator=self.generator) for _ in range(-(-n // size))]
        return self.entries[torch.cat(rounds)[:n]]


def top_m(
    counts: Int[Tensor, " N"],
    m: float | int,
    *,
    weights: bool = False,
    generator: torch.Generator | None = None,
) -> Proposal:
    """The share m of the database that is retrieved most often, as a sampler of rows.

    Entries in order of falling counts, equal ones by row; the first max(1, ⌊m·N⌋) stay. Small m
    gives typical samples and few different ones.

    Args:
        counts: ``[N]`` from :func:`proposal_counts`.
        m: A float in (0, 1] is a share, an int a number of entries: ``1.0`` is all of them,
            ``1`` the first one.
        weights: Draw by count instead of evenly.
        generator: Of the draws.

    Raises:
        TypeError: ``m`` is neither float nor int.
        ValueError: no counts, negative ones, or ``weights`` where all are 0; m ≤ 0, a float above
            1, an int above N.
    """
    size = len(counts)
    if not size or int(counts.min()) < 0:
        raise ValueError(f"counts must be at least one number ≥ 0, got {counts.tolist()[:5]}")
    if isinstance(m, float):
        if not 0 < m <= 1:
            raise ValueError(
                f"m as a share must be above 0 and at most 1, got {m}; a number of entries is an "
                "int"
            )
        # ⌊.29·100⌋ is 28 in floating point; what is meant is 29.
        keep = max(1, int(number(m, "m") * size + 1e-9 * size))
    else:
        keep = whole(m, "m", most=size, why=" (the database)")
    order = counts.cpu().argsort(descending=True, stable=True)[:keep]
    chosen = None
    if weights:
        chosen = counts.cpu()[order].double()
        if float(chosen.sum()) <= 0:
            raise ValueError("weights=True, but no entry was ever retrieved: all counts are 0")
    return Proposal(order, chosen, generator)

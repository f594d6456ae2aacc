"""How well one set of vectors finds another: CMC and mean average precision, exactly.

And the order in which to re-embed a gallery, with what is gained along the way.
Source: arXiv 2509.16664, section on partial backfilling and its evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stiefel.merge.exact_search import BLOCK, unit_rows

BETAS = tuple(i / 10 for i in range(11))
METRICS = ("l2", "cosine")


def retrieval_metrics(
    Q: Float[Tensor, "m d"],
    G: Float[Tensor, "n e"],
    yq: Int[Tensor, " a"],
    yg: Int[Tensor, " b"],
    exclude_self: bool = False,
    chunk: int | None = None,
) -> dict[str, float]:
    """CMC at 1 and 5 and mean average precision of cosine retrieval, in [0, 1].

    Vectors of different widths are compared on their first min(d, e) coordinates. A query whose
    label the gallery does not have (itself left out) has no right answer: it is left out of all
    means and counted. Equal scores rank by their place in the gallery.

    Only the ranks of the right answers are needed, not the order of the rest: scores are sorted as
    values, a block of queries at a time, and the right ones looked up.

    Args:
        Q: Queries ``[m, d]``, no row zero.
        G: Gallery ``[n, e]``.
        yq: Classes of the queries ``[m]``.
        yg: Classes of the gallery ``[n]``.
        exclude_self: Query i is gallery item i and does not count as its own answer.
        chunk: Queries at a time; by default what keeps the scores under 128 MB.

    Returns:
        ``cmc1`` and ``cmc5``: part of the queries with a right answer among the first 1 or 5;
        ``map``; ``skipped``: queries without any right answer.

    Raises:
        ValueError: sizes that do not fit, a zero row, NaN or infinity, no query with an answer.
        TypeError: not floating point.
    """
    _check_labels(Q, yq, "Q")
    _check_labels(G, yg, "G")
    if exclude_self and len(Q) != len(G):
        raise ValueError(
            f"exclude_self needs the queries to be the gallery, got {len(Q)} queries and "
            f"{len(G)} items"
        )
    width = min(Q.shape[1], G.shape[1])
    q = unit_rows(Q[:, :width], "Q")
    g = unit_rows(G[:, :width].to(Q.dtype), "G")
    rows = chunk or max(1, BLOCK // max(1, len(g)))
    items = {int(c): (yg == c).nonzero().flatten() for c in yg.unique()}
    firsts: list[Tensor] = []
    precisions: list[Tensor] = []
    for label in yq.unique().tolist():
        right = items.get(label)
        if right is None:
            continue
        for part in (yq == label).nonzero().flatten().split(rows):
            ranks = _ranks(q[part], g, right, part if exclude_self else None)
            if exclude_self:  # itself, behind everything
                ranks = ranks[:, :-1]
            if ranks.shape[1]:
                places = torch.arange(1, ranks.shape[1] + 1, device=q.device)
                firsts.append(ranks[:, 0])
                precisions.append((places.double() / ranks).mean(1))
    if not firsts:
        raise ValueError("no query has its label in the gallery, so there is nothing to measure")
    first, precision = torch.cat(firsts), torch.cat(precisions)
    return {
        "cmc1": float((first <= 1).double().mean()),
        "cmc5": float((first <= 5).double().mean()),
        "map": float(precision.mean()),
        "skipped": float(len(q) - len(first)),
    }


def _ranks(q: Tensor, g: Tensor, right: Tensor, itself: Tensor | None) -> Tensor:
    """Places (from 1, ascending) of the ``right`` items in each query's ranking."""
    scores = q @ g.T
    if itself is not None:
        scores[torch.arange(len(q), device=q.device), itself] = -torch.inf
    wanted = scores[:, right]
    ordered = _sorted(scores)
    upto = torch.searchsorted(ordered, wanted, right=True)
    ranks = scores.shape[1] - upto + 1
    tied = (upto - torch.searchsorted(ordered, wanted)).amax(1) > 1
    if bool(tied.any()):
        order = scores[tied].argsort(dim=1, descending=True, stable=True)
        place = torch.empty_like(order)
        place.scatter_(1, order, torch.arange(1, len(g) + 1, device=q.device).expand_as(order))
        ranks[tied] = place[:, right]
    return ranks.sort(dim=1).values


def _sorted(scores: Tensor) -> Tensor:
    """Rows in ascending order. On a CPU by NumPy, whose vectorised sort is far faster."""
    if scores.device.type != "cpu":
        return scores.sort(dim=1).values
    values = scores.numpy().copy()
    values.sort(axis=1)
    return torch.from_numpy(values)


def backfill_order(
    F_old: Float[Tensor, "n d"], labels: Int[Tensor, " a"], metric: str = "l2"
) -> Int[Tensor, " n"]:
    """In which order to re-embed a gallery: items farthest from the mean of their class first.

    Args:
        F_old: The gallery in the new space by the forward map, F(h_old), ``[n, d]``.
        labels: Classes of the gallery ``[n]``.
        metric: ``"l2"`` (the paper) or ``"cosine"``.

    Returns:
        Row numbers, first to re-embed first; ties in gallery order.

    Raises:
        ValueError: another metric, sizes that do not fit, NaN or infinity.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    _check_labels(F_old, labels, "F_old")
    if not bool(F_old.isfinite().all()):
        raise ValueError("F_old must be finite, but has NaN or infinity")
    _, classes = labels.unique(return_inverse=True)
    sums = F_old.new_zeros(int(classes.max()) + 1, F_old.shape[1])
    means = sums.index_add_(0, classes, F_old) / classes.bincount()[:, None]
    own = means[classes]
    if metric == "l2":
        distance = torch.linalg.vector_norm(F_old - own, dim=1)
    else:
        distance = 1 - torch.cosine_similarity(F_old, own, dim=1)
    return distance.argsort(descending=True, stable=True)


class BackfillCurve(NamedTuple):
    """Quality of retrieval while a gallery is being re-embedded.

    Attributes:
        betas: Parts of the gallery that are re-embedded.
        values: The metric at each.
        area: Mean of the metric over β in [0, 1] by the trapezoid rule, the paper's M̃.
    """

    betas: list[float]
    values: list[float]
    area: float


def backfill_curve(
    queries: Float[Tensor, "m d"],
    forward: Float[Tensor, "n d"],
    backward: Float[Tensor, "o e"],
    order: Int[Tensor, " c"],
    query_labels: Int[Tensor, " a"],
    gallery_labels: Int[Tensor, " b"],
    *,
    metric: str = "map",
    betas: Sequence[float | int] = BETAS,
    exclude_self: bool = False,
) -> BackfillCurve:
    """Retrieval while the first ⌊βn⌋ items of ``order`` are re-embedded.

    Args:
        queries: New vectors B(h_new), ``[m, d]``.
        forward: The gallery before, F(h_old), ``[n, d]``.
        backward: The gallery after, B(h_new), ``[n, d]``.
        order: A permutation of the gallery, from :func:`backfill_order` or another.
        query_labels: Classes ``[m]``.
        gallery_labels: Classes ``[n]``.
        metric: ``"map"``, ``"cmc1"`` or ``"cmc5"``.
        betas: Ascending, from 0 to 1.
        exclude_self: As in :func:`retrieval_metrics`.

    Raises:
        ValueError: betas or an order that are not what they should be; else as
            :func:`retrieval_metrics`.
    """
    if metric not in ("cmc1", "cmc5", "map"):
        raise ValueError(f"metric must be one of cmc1, cmc5, map, got {metric!r}")
    steps = list(betas)
    if len(steps) < 2 or steps[0] != 0 or steps[-1] != 1 or steps != sorted(set(steps)):
        raise ValueError(f"betas must ascend from 0 to 1, got {steps}")
    if forward.shape != backward.shape:
        raise ValueError(
            f"forward and backward must have one shape, got {tuple(forward.shape)} and "
            f"{tuple(backward.shape)}"
        )
    if not torch.equal(order.sort().values, torch.arange(len(forward), device=order.device)):
        raise ValueError(f"order must be a permutation of the {len(forward)} rows of the gallery")
    values = []
    for beta in steps:
        mixed = forward.clone()
        # A hair above, as 0.7 · 10 must be 7 in floating point too.
        done = order[: int(beta * len(order) + 1e-9)]
        mixed[done] = backward[done]
        found = retrieval_metrics(
            queries, mixed, query_labels, gallery_labels, exclude_self=exclude_self
        )
        values.append(found[metric])
    area = torch.trapezoid(torch.tensor(values).double(), torch.tensor(steps).double())
    return BackfillCurve(steps, values, float(area))


def _check_labels(rows: Tensor, labels: Tensor, name: str) -> None:
    if rows.ndim != 2:
        raise ValueError(f"{name} must be a matrix [rows, width], got shape {tuple(rows.shape)}")
    if labels.shape != (len(rows),):
        raise ValueError(
            f"{name} has {len(rows)} rows, but its labels have shape {tuple(labels.shape)}"
        )

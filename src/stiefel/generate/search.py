"""Exact nearest neighbours: candidates by one matrix product in float32, decided in float64.

A float32 product finds a few candidates more than asked for. Their scores are computed anew in
float64, and a bound on the product's rounding proves that no other row can be among the first k;
where it cannot (near-ties, duplicates) more candidates are taken. So the result does not depend on
who multiplied: faiss, this module, any number of threads. Ties go to the lower row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of the database multiplied at a time; its scores for a few hundred queries fit the cache.
BLOCK = 4096
# Of each block only the largest score of so many rows is kept: no sort over the whole database.
GROUP = 16
# Rows whose maxima are held together: bounds memory to QUERIES · SPAN / GROUP numbers.
SPAN = 1 << 20
QUERIES = 512
# Candidates beyond those asked for.
SPARE = 4
# Numbers gathered at a time while deciding.
GATHER = 1 << 20
# Half an ulp of 1 in float32.
_UNIT = 2.0**-24


@dataclass(frozen=True)
class Table:
    """Rows to search in, prepared once: ``approx`` finds by inner product, ``rows`` decide."""

    rows: Tensor
    """``[N, e]`` as they are."""
    approx: Tensor
    """``[N, e]`` normalised or ``[N, e + 1]`` with −|y|²/2 at the end, in float32."""
    metric: str
    largest: float
    """Largest norm in ``approx``."""
    norms: Tensor
    """``[N]`` norms of ``rows`` in float64."""


def prepare(rows: Tensor, metric: str) -> Table:
    """A table for cosine similarity (``"cosine"``) or Euclidean distance (``"l2"``).

    Raises:
        ValueError: the rows are so large that float32 cannot hold their squares.
    """
    wide = rows.double()
    norms = wide.norm(dim=1)
    if metric == "cosine":
        approx = wide / norms[:, None]
    else:
        approx = torch.cat([wide, -0.5 * wide.square().sum(1, keepdim=True)], dim=1)
    approx = approx.float().contiguous()
    largest = float(approx.double().norm(dim=1).max())
    if not math.isfinite(largest):
        raise ValueError("embeddings are too large to compare in float32: scale them down")
    return Table(rows, approx, metric, largest, norms)


def nearest(
    table: Table,
    queries: Tensor,
    k: int,
    *,
    excluded: Callable[[Tensor, Tensor], Tensor] | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """The k first rows for every query: indices ``[Q, k]``, scores ``[Q, k]`` in float64.

    Args:
        table: From :func:`prepare`.
        queries: ``[Q, e]``, finite; with cosine not zero.
        k: At most the rows that are not excluded, for each query.
        excluded: Which candidates (``[q, c]`` rows of the table) the queries (``[q]`` positions)
            may not have, as ``[q, c]``.
        backend: ``"torch"`` or ``"faiss"``: who finds the candidates.

    Returns:
        Rows in order. Scores are similarities, falling, or with l2 distances, rising.
    """
    indices, scores = [], []
    for start in range(0, len(queries), QUERIES):
        part = queries[start : start + QUERIES]
        places = torch.arange(start, start + len(part), device=part.device)
        index, score = _decided(table, part, places, k, k + SPARE, excluded, backend)
        indices.append(index)
        scores.append(score)
    if not indices:
        empty = queries.new_zeros(0, k)
        return empty.long(), empty.double()
    score = torch.cat(scores)
    if table.metric == "l2":
        score = (-2 * score).clamp_min(0).sqrt()
    return torch.cat(indices), score


def _decided(
    table: Table,
    queries: Tensor,
    places: Tensor,
    k: int,
    count: int,
    excluded: Callable[[Tensor, Tensor], Tensor] | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Rows and exact scores of one part of the queries; asks again where it is not certain."""
    rows = len(table.rows)
    count = min(count, rows)
    asked = _prepared(table, queries)
    if count == rows:
        index = torch.arange(rows, device=queries.device).expand(len(queries), rows)
        beyond = None
    elif backend == "faiss":
        index, beyond = _faiss(table.approx, asked, count)
    else:
        index, beyond = _grouped(table.approx, asked, count)
    index = index.sort(1)[0]  # so that a stable sort by score leaves ties in order of rows
    exact = _exact(table, queries, index)
    if excluded is not None:
        exact = exact.masked_fill(excluded(index, places), -torch.inf)
    score, order = exact.sort(dim=1, descending=True, stable=True)
    index, score = index.gather(1, order[:, :k]), score[:, :k]
    if beyond is None:
        return index, score
    # |rounding of a product of n terms| ≤ n·u·|q||y|, and the rows were rounded before it.
    slack = 2 * (asked.shape[1] + 4) * _UNIT * asked.double().norm(dim=1) * table.largest
    offset = 0.5 * queries.double().square().sum(1) if table.metric == "l2" else 0.0
    unsure = score[:, -1] + offset <= beyond.double() + slack
    if bool(unsure.any()):
        again = unsure.nonzero().flatten()
        index[again], score[again] = _decided(
            table, queries[again], places[again], k, 4 * count, excluded, backend
        )
    return index, score


def _prepared(table: Table, queries: Tensor) -> Tensor:
    wide = queries.double()
    if table.metric == "cosine":
        return (wide / wide.norm(dim=1, keepdim=True)).float()
    return torch.cat([wide, torch.ones_like(wide[:, :1])], dim=1).float()


def _exact(table: Table, queries: Tensor, index: Tensor) -> Tensor:
    """Scores ``[q, c]`` in float64: the cosine, or −|q − y|²/2."""
    out = torch.empty(index.shape, dtype=torch.float64, device=index.device)
    count, e = index.shape[1], table.rows.shape[1]
    step = max(1, GATHER // (count * e))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        found = table.rows.index_select(0, index[part].flatten()).view(-1, count, e)
        asked = queries[part, None].double()
        if table.metric == "cosine":
            norms = table.norms[index[part]] * asked.norm(dim=2)
            out[part] = (found * asked).sum(2) / norms
        else:
            out[part] = -0.5 * (found - asked).square_().sum(2)
    return out


def _grouped(rows: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` candidates ``[q, count]`` and a bound ``[q]`` on every other row's product.

    The first rows lie in the groups with the largest maxima, so only those are looked into.
    """
    found, bounds = [], []
    for start in range(0, len(rows), SPAN):
        span = rows[start : start + SPAN]
        index, value, beyond = _span(span, queries, min(count, len(span)))
        found.append((index + start, value))
        bounds.append(beyond)
    beyond = torch.stack(bounds).amax(0)
    index = torch.cat([i for i, _ in found], dim=1)
    value = torch.cat([v for _, v in found], dim=1)
    if index.shape[1] > count:
        value, order = value.topk(count, dim=1)
        index = index.gather(1, order)
        beyond = torch.maximum(beyond, value[:, -1])
    return index, beyond


def _span(rows: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates, their products, and the bound on the rest, within some rows."""
    n = len(rows)
    grouped = n // GROUP * GROUP
    if grouped // GROUP <= 2 * count:  # little to leave out
        value, index = (queries @ rows.mT).topk(count, dim=1)
        return index, value, value[:, -1]
    maxima = queries.new_empty(len(queries), grouped // GROUP)
    first = torch.empty(grouped // GROUP, dtype=torch.long, device=rows.device)
    apart = torch.empty_like(first)
    scores = queries.new_empty(len(queries) * min(BLOCK, grouped))
    for start in range(0, grouped, BLOCK):
        size = min(BLOCK, grouped - start)
        width = size // GROUP
        block = scores[: len(queries) * size].view(len(queries), size)
        torch.mm(queries, rows[start : start + size].mT, out=block)
        # Row j of a block is in group j mod width: the maximum runs along whole cache lines.
        place = slice(start // GROUP, start // GROUP + width)
        torch.amax(block.view(-1, GROUP, width), 1, out=maxima[:, place])
        first[place] = torch.arange(start, start + width, device=rows.device)
        apart[place] = width
    best, group = maxima.topk(count, dim=1)
    steps = torch.arange(GROUP, device=rows.device)
    index = (first[group][:, :, None] + apart[group][:, :, None] * steps).flatten(1)
    if grouped <= BLOCK:  # all products are still there
        product = scores.view(len(queries), grouped).gather(1, index)
    else:
        product = _products(rows, queries, index)
    if grouped < n:
        rest = torch.arange(grouped, n, device=rows.device).expand(len(queries), -1)
        index = torch.cat([index, rest], dim=1)
        product = torch.cat([product, queries @ rows[grouped:].mT], dim=1)
    value, order = product.topk(count, dim=1)
    return index.gather(1, order), value, torch.maximum(best[:, -1], value[:, -1])


def _products(rows: Tensor, queries: Tensor, index: Tensor) -> Tensor:
    """Products ``[q, c]`` of each query with its own rows."""
    count, e = index.shape[1], rows.shape[1]
    step = max(1, GATHER // (count * e))
    parts = []
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        found = rows.index_select(0, index[part].flatten()).view(-1, count, e)
        parts.append((found @ queries[part, :, None]).squeeze(2))
    return torch.cat(parts)


def _faiss(rows: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same from faiss, which then holds no copy of the rows.

    Raises:
        ImportError: faiss is not installed; names the extra.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "backend='faiss' needs faiss, which is not installed: pip install 'stiefel[generate]'"
        ) from error
    value, index = faiss.knn(
        queries.detach().cpu().numpy(),
        rows.detach().cpu().numpy(),
        count,
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    return torch.from_numpy(index).to(rows.device), torch.from_numpy(value[:, -1]).to(rows.device)

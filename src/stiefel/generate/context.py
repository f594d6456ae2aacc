"""Which neighbours each image sees, in training and in sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.generate._checks import Images, as_images, check_range, whole
from stiefel.generate.proposals import proposal_counts, top_m

if TYPE_CHECKING:
    from stiefel.generate.database import ImageDatabase
    from stiefel.generate.diffusion import RetrievalDiffusion


@dataclass(frozen=True)
class Contexts:
    """The contexts of n samples; every entry that any of them needs is there once."""

    vectors: Tensor
    """``[U, e]`` embeddings."""
    places: Tensor
    """``[n, k]`` rows of ``vectors``."""
    rows: Tensor
    """``[n, k]`` rows of the database, −1 for a query."""


@dataclass(frozen=True)
class Asked:
    """What the user wants the samples to resemble; see :meth:`RetrievalDiffusion.sample`."""

    query: Images | None
    embedding: Tensor | None
    entries: Tensor | None
    include: bool
    top: float | int
    weights: bool


def contexts(
    model: RetrievalDiffusion, n: int, k: int, asked: Asked, generator: torch.Generator | None
) -> Contexts:
    """Draw stand-ins or take the queries, and look their neighbours up.

    Raises:
        TypeError, ValueError: see :meth:`RetrievalDiffusion.sample`.
    """
    db = model.database
    k = whole(k, "k")
    given = [x for x in (asked.query, asked.embedding, asked.entries) if x is not None]
    if len(given) > 1:
        raise ValueError("give only one of query, query_embedding and entries")
    queried = asked.query is not None or asked.embedding is not None
    if k > len(db) + (asked.include and queried):
        raise ValueError(f"k={k} neighbours of a database of {len(db)} images")
    if not queried:
        rows = _stand_ins(model, n, k, asked, generator)
        entries, places = rows.unique(return_inverse=True)
        return Contexts(db.embeddings[entries], places, rows)
    wanted = _queries(model, asked)
    near = k - 1 if asked.include else k
    if near:
        found, _ = db.search(wanted, near)
    else:
        found = torch.empty(len(wanted), 0, dtype=torch.long, device=wanted.device)
    entries, places = found.unique(return_inverse=True)
    vectors = db.embeddings[entries]
    if asked.include:
        own = torch.arange(len(wanted), device=places.device)[:, None]
        places = torch.cat([own, places + len(wanted)], dim=1)
        found = torch.cat([torch.full_like(own, -1), found], dim=1)
        vectors = torch.cat([wanted, vectors])
    turn = torch.arange(n, device=places.device) % len(wanted)
    return Contexts(vectors, places[turn], found[turn])


def _stand_ins(
    model: RetrievalDiffusion, n: int, k: int, asked: Asked, generator: torch.Generator | None
) -> Tensor:
    """``[n, k]``: drawn entries and their neighbours, or the neighbours alone."""
    db = model.database
    if asked.entries is not None:
        drawn = asked.entries.long()
        if len(drawn) != n:
            raise ValueError(f"entries must be one for each of {n} samples, got {len(drawn)}")
        proposal_counts(drawn[:, None], len(db))
    else:
        everyone = isinstance(asked.top, float) and asked.top == 1.0 and not asked.weights
        # Counts of a new database take a search, which a draw from all of it does not need.
        counts = torch.zeros(len(db), dtype=torch.long) if everyone else model.counts
        drawn = top_m(counts, asked.top, weights=asked.weights, generator=generator)(n)
    drawn = drawn.to(db.embeddings.device)
    if asked.include and k == 1:
        return drawn[:, None]
    entries, places = drawn.unique(return_inverse=True)
    near = k - int(asked.include)
    found, _ = db.search(db.embeddings[entries], near, exclude_ids=db.ids[entries])
    if asked.include:
        found = torch.cat([entries[:, None], found], dim=1)
    return found[places]


def _queries(model: RetrievalDiffusion, asked: Asked) -> Tensor:
    db = model.database
    if asked.embedding is not None:
        rows = asked.embedding[None] if asked.embedding.ndim == 1 else asked.embedding
        if rows.ndim != 2 or rows.shape[1] != db.width or not len(rows):
            raise ValueError(
                f"query_embedding must be [{db.width}] or [Q, {db.width}], "
                f"got {tuple(asked.embedding.shape)}"
            )
        return rows.to(db.embeddings)
    query = asked.query
    assert query is not None  # noqa: S101 - one of both was given
    if query.ndim == len(db.shape):
        query = query[None]
    images = as_images(query, "query", shape=db.shape)
    check_range(images, "query")
    return db.encode(images)


def training_neighbours(
    X: Tensor,
    database: ImageDatabase,
    k: int,
    ids: Tensor | None,
    given: Tensor | None,
) -> Tensor:
    """``[M, k]`` rows of the database, never the image itself."""
    if given is not None:
        if len(given) != len(X) or not given.shape[1]:
            raise ValueError(f"neighbours must be [{len(X)}, k], got {tuple(given.shape)}")
        proposal_counts(given, len(database))
        return given
    same = X.shape == database.images.shape and torch.equal(X, database.images.to(X))
    if ids is None and same:
        ids = database.ids
    queries = database.embeddings if same else database.encode(X)
    return database.search(queries, k, exclude_ids=ids)[0]

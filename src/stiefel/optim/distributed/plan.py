"""What a distributed step will cost, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from stiefel.optim.base import MatrixOptimizer
from stiefel.optim.distributed.engine import Engine
from stiefel.optim.distributed.exchange import Lane
from stiefel.optim.distributed.geometry import full_layout, row_layout
from stiefel.optim.distributed.placing import make_entries, needs_sums
from stiefel.optim.distributed.planner import Entry, assign, make_rounds


@dataclass(frozen=True)
class Assignment:
    """Where one matrix is updated."""

    parameter: str
    index: int
    """Which of the parameter's matrices."""
    shape: tuple[int, int]
    owner: int | None
    """Rank; None where every rank updates what it holds."""
    flops: float


@dataclass(frozen=True)
class DistributionPlan:
    """What a step costs; lists have an entry per rank of ``ranks``.

    Bytes are payload handed to collectives for other ranks. Not in it: the status words, 24 bytes
    to every other rank of a mesh wherever a step sends anything, and one number with the last
    scatter.
    """

    ranks: tuple[int, ...]
    assignments: tuple[Assignment, ...]
    gather_bytes: tuple[int, ...]
    """Sent to owners: momenta or gradients."""
    scatter_bytes: tuple[int, ...]
    """Sent by owners: updates."""
    reduce_bytes: tuple[int, ...]
    """Put into all-reduces: 8 per split row (RMNP), 16 per split matrix (AuON)."""
    flops: tuple[float, ...]
    """Of matrix rules alone."""
    owned_bytes: tuple[int, ...]
    """State that only owners have."""
    rounds: int
    """All-to-alls there, and as many back."""
    minimum_bytes: int
    """Of all ranks together: every number once to its owner, every update once to each holder."""

    @property
    def bytes_sent(self) -> tuple[int, ...]:
        """Per rank and step."""
        parts = (self.gather_bytes, self.scatter_bytes, self.reduce_bytes)
        return tuple(sum(own) for own in zip(*parts, strict=True))

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest rank, divided by the mean."""
        return max(self.flops) * len(self.flops) / sum(self.flops) if sum(self.flops) else 1.0


def distribution_plan(
    optimizer: MatrixOptimizer, world_size: int | None = None, *, replicated: bool = False
) -> DistributionPlan:
    """Owners, bytes sent and FLOPs per rank of one step in which every parameter has a gradient.

    Args:
        optimizer: Any optimizer of this home. Its parameters may be on the meta device.
        world_size: As if plain parameters were sharded by rows over that many ranks, as
            ``fully_shard`` does. None: as the parameters are, being DTensors, or after
            :meth:`MatrixOptimizer.distribute`.
        replicated: With ``world_size``: as if they were replicated and their work spread.

    Raises:
        ValueError: ``world_size`` below 1, or given for DTensors, or missing for plain parameters.
    """
    engine = optimizer._engine()
    if (world_size is None) == (engine is None):
        raise ValueError(
            f"world_size is for optimizers of plain parameters, and needed there, got {world_size} "
            f"with {'shared' if engine else 'plain'} parameters"
        )
    if engine is not None:
        lanes: Sequence[Lane] = engine.places.update()
    elif world_size is not None and world_size >= 1:
        engine, lanes = Engine(optimizer), _imagined(optimizer, world_size, replicated)
    else:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    return _summary(optimizer, engine, lanes)


def _imagined(optimizer: MatrixOptimizer, world: int, replicated: bool) -> list[Lane]:
    """Lanes of ranks that do not exist."""
    lanes: dict[torch.dtype, Lane] = {}
    loads = [0.0] * world
    for number, group in enumerate(optimizer.param_groups):
        fresh: list[Entry] = []
        for p in group["params"] if group["rule"] == "matrix" else ():
            layout = full_layout(p.shape, world) if replicated else row_layout(p.shape, world)
            entries = make_entries(optimizer, number, p, layout)
            lane = lanes.setdefault(p.dtype, Lane(tuple(range(world)), None, 0, p.dtype, p.device))
            lane.entries += entries
            fresh += entries
        assign(fresh, loads)
    return list(lanes.values())


def _summary(optimizer: MatrixOptimizer, engine: Engine, lanes: Sequence[Lane]) -> DistributionPlan:
    ranks = sorted({rank for lane in lanes for rank in lane.ranks})
    number = {rank: i for i, rank in enumerate(ranks)}
    columns: dict[str, list[Any]] = {
        key: [0] * len(ranks) for key in ("gather", "scatter", "reduce", "flops", "owned")
    }
    assignments, least, rounds = [], 0, 0
    for lane in lanes:
        place = [number[rank] for rank in lane.ranks]
        local = optimizer._sends == "nothing"
        for entry in lane.entries:
            owner = None if local else lane.ranks[entry.owner]
            shape = (entry.matrix.rows, entry.matrix.cols)
            assignments.append(Assignment(entry.name, entry.index, shape, owner, entry.flops))
            if local:
                _add_sums(optimizer, entry, place, columns)
                continue
            least += _add_messages(entry, place, lane.dtype.itemsize, columns)
            form = engine.holdings.form(optimizer.param_groups[entry.group], entry)
            columns["owned"][place[entry.owner]] += sum(
                prod(shape) * dtype.itemsize for shape, dtype in form.values() if shape
            )
        rounds += 0 if local else len(make_rounds(lane.entries, lane.world))
    columns["flops"] = list(map(float, columns["flops"]))
    gather, scatter, reduce, flops, owned = map(tuple, columns.values())
    return DistributionPlan(
        tuple(ranks), tuple(assignments), gather, scatter, reduce, flops, owned, rounds, least
    )


def _add_messages(
    entry: Entry, place: Sequence[int], item: int, columns: dict[str, list[Any]]
) -> int:
    """Count what is sent for a matrix; returns the least that could be."""
    mine = place[entry.owner]
    columns["flops"][mine] += entry.flops
    least = 0
    for rank, where in enumerate(place):
        if rank == entry.owner:
            continue
        size = entry.piece_of(rank).numel * item
        if entry.sends(rank):
            columns["gather"][where] += size
            least += size
        columns["scatter"][mine] += size
        least += size
    return least


def _add_sums(
    optimizer: MatrixOptimizer, entry: Entry, place: Sequence[int], columns: dict[str, list[Any]]
) -> None:
    """Count what is summed over ranks for a matrix that stays where it is."""
    summed = needs_sums(optimizer, entry)
    for rank, where in enumerate(place):
        columns["flops"][where] += entry.flops * entry.piece_of(rank).numel / entry.numel
        if summed and len(place) > 1:
            columns["reduce"][where] += 16 if optimizer._needs_whole_sums else 8 * entry.matrix.rows

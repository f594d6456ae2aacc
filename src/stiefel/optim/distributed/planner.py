"""Who updates which matrix, and in which rounds; pure functions, equal on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stiefel.optim.distributed.geometry import Layout, Matrix, piece

# Numbers of a round on one rank: at most these (64 MiB of float32), but for a larger matrix or
# team, which is a round of its own; fewer if that leaves so many rounds to overlap.
LARGEST_ROUND = 1 << 24
SMALLEST_ROUND = 1 << 17
_ROUNDS = 4


@dataclass(eq=False)
class Entry:
    """A matrix in the plan."""

    group: int
    """Number of its parameter group."""
    parameter: Any
    name: str
    index: int
    """Which of the parameter's matrices it is."""
    matrix: Matrix
    layout: Layout
    team: Any
    """What must be updated together with it; None: nothing."""
    flops: float
    owner: int = -1
    """Rank within the process group."""

    @property
    def numel(self) -> int:
        """R·C."""
        return self.matrix.rows * self.matrix.cols

    def piece_of(self, rank: int) -> Any:
        """What a rank holds of it."""
        return piece(self.matrix.region, self.layout.boxes[rank])

    @property
    def row_dimension(self) -> int:
        """The parameter's dimension that is the matrix's rows."""
        return 1 if self.matrix.transposed or self.matrix.batched else 0

    @cached_property
    def splits_rows(self) -> bool:
        """Whether any rank holds a part of a row."""
        pieces = map(self.piece_of, range(len(self.layout.boxes)))
        return any(
            p.numel != p.shape[self.row_dimension] * self.matrix.cols for p in pieces if p.numel
        )

    @cached_property
    def is_split(self) -> bool:
        """Whether any rank holds a part of the matrix, rather than all or nothing."""
        counts = {self.piece_of(rank).numel for rank in range(len(self.layout.boxes))}
        return not counts <= {0, self.numel}

    def sends(self, rank: int) -> bool:
        """Whether the owner gets this rank's piece, rather than that of another copy."""
        return self.layout.replicas[rank] == self.layout.replicas[self.owner]


def balance(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Owners by the longest-processing-time rule: the dearest first, each to the idlest rank.

    The largest load ends at most at 4/3 − 1/(3P) of the best possible one if ``loads`` start at 0.

    Args:
        costs: FLOPs of every job.
        loads: What every rank has to do already; brought up to date.

    Returns:
        A rank for every job. Equal costs go by position, equal loads by rank.
    """
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        owners[job] = rank
        loads[rank] = load + costs[job]
        heapq.heappush(heap, (loads[rank], rank))
    return owners


def units(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that must stay together, in order of their first."""
    found: dict[Any, list[Entry]] = {}
    for i, entry in enumerate(entries):
        key = ("alone", i) if entry.team is None else ("team", entry.group, entry.team)
        found.setdefault(key, []).append(entry)
    return list(found.values())


def assign(entries: Sequence[Entry], loads: list[float]) -> None:
    """Give every entry of one parameter group its owner."""
    jobs = units(entries)
    owners = balance([sum(e.flops for e in job) for job in jobs], loads)
    for job, owner in zip(jobs, owners, strict=True):
        for entry in job:
            entry.owner = owner


def make_rounds(entries: Sequence[Entry], world: int) -> list[list[list[Entry]]]:
    """Round → rank → what that rank updates in it: equal shapes together, the dearest first.

    Rounds are small enough that the messages of one hide behind the work of another, and no rank
    ever holds more than :data:`LARGEST_ROUND` numbers of one, or one matrix or team.
    """
    mine: list[list[list[Entry]]] = [[] for _ in range(world)]
    for unit in units(entries):
        mine[unit[0].owner].append(unit)
    totals = [sum(e.numel for unit in own for e in unit) for own in mine]
    room = min(LARGEST_ROUND, max(SMALLEST_ROUND, -(-max(totals, default=0) // _ROUNDS)))
    rounds: list[list[list[Entry]]] = []
    for rank, own in enumerate(mine):
        own.sort(key=lambda unit: (-_cost(unit), _kind(unit)))  # stable: equal on all ranks
        number, filled = 0, 0
        for unit in own:
            size = sum(e.numel for e in unit)
            if filled and filled + size > room:
                number, filled = number + 1, 0
            while len(rounds) <= number:
                rounds.append([[] for _ in range(world)])
            rounds[number][rank] += unit
            filled += size
    return rounds


def _cost(unit: Sequence[Entry]) -> float:
    return sum(e.flops for e in unit) / len(unit)


def _kind(unit: Sequence[Entry]) -> tuple[int, int, int]:
    return unit[0].group, unit[0].matrix.rows, unit[0].matrix.cols

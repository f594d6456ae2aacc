"""From parameter groups to lanes: who holds what, who owns what, who must speak with whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stiefel.optim.base import MatrixOptimizer, _sizes
from stiefel.optim.distributed.exchange import Lane, signature
from stiefel.optim.distributed.geometry import (
    Layout,
    dtensor_layout,
    full_layout,
    is_dtensor,
    matrices_of,
    mesh_ranks,
)
from stiefel.optim.distributed.planner import Entry, assign


def make_entries(
    optimizer: MatrixOptimizer, number: int, parameter: Tensor, layout: Layout
) -> list[Entry]:
    """The matrices of a parameter of group ``number``, without owners yet."""
    group = optimizer.param_groups[number]
    if not parameter.numel():
        return []
    name = optimizer._name(group, parameter)
    found = matrices_of(group["view"], parameter.shape, _sizes(group, parameter))
    return [
        Entry(
            number,
            parameter,
            name,
            i,
            matrix,
            layout,
            optimizer._team(group, parameter, i),
            optimizer._flops(group, matrix.rows, matrix.cols),
        )
        for i, matrix in enumerate(found)
    ]


def needs_sums(optimizer: MatrixOptimizer, entry: Entry) -> bool:
    """Whether a method that sends nothing must sum over ranks for a matrix."""
    return entry.is_split if optimizer._needs_whole_sums else entry.splits_rows


def needs_messages(optimizer: MatrixOptimizer, entry: Entry) -> bool:
    """Whether updating a matrix that several ranks hold takes any message."""
    return optimizer._sends != "nothing" or needs_sums(optimizer, entry)


@dataclass(eq=False)
class Ring:
    """Ranks that hold parameters together."""

    lane: Lane
    """For messages of no particular dtype."""
    params: list[tuple[int, Tensor]] = field(default_factory=list)
    """Group numbers and parameters, of both rules."""
    descriptions: list[str] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    sends: bool = False
    """Whether updating its matrices takes messages."""
    word: int = 0
    """The signature of ``descriptions``."""


class Lanes:
    """The plan of an optimizer, a function of its groups alone and so equal on every rank."""

    def __init__(self, optimizer: MatrixOptimizer, process_group: Any) -> None:
        """``process_group``: where plain parameters are spread, if anywhere."""
        self._optimizer = optimizer
        self._process_group = process_group
        self._groups_seen = 0
        self._lanes: dict[Any, Lane] = {}
        self.rings: dict[tuple[int, ...], Ring] = {}
        self.entries: dict[int, list[Entry]] = {}
        self.lane_of: dict[int, Lane] = {}

    @property
    def spreads(self) -> bool:
        """Whether the work on plain parameters is spread too."""
        return self._process_group is not None

    def involves(self, parameter: Tensor) -> bool:
        """Whether several ranks work on a parameter together."""
        return self.spreads or is_dtensor(parameter)

    @property
    def shared(self) -> bool:
        """Whether any parameter is held by several ranks."""
        return any(ring.lane.world > 1 for ring in self.rings.values())

    def speaking(self) -> list[Ring]:
        """The rings that exchange a status word before a step, in one order on every rank."""
        skipping = {
            i for i, g in enumerate(self._optimizer.param_groups) if g["nonfinite"] == "skip"
        }
        return [
            ring
            for ring in self.rings.values()
            if ring.lane.world > 1 and (ring.sends or any(i in skipping for i, _ in ring.params))
        ]

    def update(self) -> list[Lane]:
        """Plan for groups that are new; returns all lanes."""
        groups = self._optimizer.param_groups
        while self._groups_seen < len(groups):
            self._add(self._groups_seen, groups[self._groups_seen])
            self._groups_seen += 1
        return list(self._lanes.values())

    def _add(self, number: int, group: dict[str, Any]) -> None:
        fresh: dict[tuple[int, ...], list[Entry]] = {}
        teams: dict[Any, Lane] = {}
        for parameter in group["params"]:
            if not self.involves(parameter):
                continue
            ring = self._ring(parameter)
            layout = (
                dtensor_layout(parameter)
                if is_dtensor(parameter)
                else full_layout(parameter.shape, ring.lane.world)
            )
            ring.params.append((number, parameter))
            ring.descriptions.append(self._describe(group, parameter))
            ring.word = signature(ring.descriptions)
            if group["rule"] != "matrix":
                continue
            entries = make_entries(self._optimizer, number, parameter, layout)
            lane = self._lane(ring, parameter)
            self.entries[id(parameter)] = entries
            self.lane_of[id(parameter)] = lane
            lane.entries += entries
            fresh.setdefault(ring.lane.ranks, []).extend(entries)
            for entry in entries:
                if entry.team is not None and teams.setdefault(entry.team, lane) is not lane:
                    raise ValueError(
                        f"{entry.name} shares its update with matrices of another dtype, or on "
                        "another device mesh: they must be of one dtype on one mesh"
                    )
                ring.sends = ring.sends or (
                    lane.world > 1 and needs_messages(self._optimizer, entry)
                )
        for ranks, entries in fresh.items():
            assign(entries, self.rings[ranks].loads)

    def _describe(self, group: dict[str, Any], parameter: Tensor) -> str:
        places = f", {parameter.placements}" if is_dtensor(parameter) else ""  # pyrefly: ignore
        view = f", view {group['view']!r}, blocks {group['blocks']}"
        return (
            f"{self._optimizer._name(group, parameter)}: shape {tuple(parameter.shape)}, "
            f"{parameter.dtype}, rule {group['rule']!r}{view}{places}"
        )

    def _ring(self, parameter: Tensor) -> Ring:
        if is_dtensor(parameter):
            mesh = parameter.device_mesh  # pyrefly: ignore
            ranks, group = mesh_ranks(mesh), None
        else:
            mesh, group = None, self._process_group
            ranks = tuple(dist.get_process_group_ranks(group))
        if ranks not in self.rings:
            group = group if mesh is None else _process_group(mesh, ranks)
            if dist.get_rank() not in ranks:
                raise ValueError(
                    f"rank {dist.get_rank()} has a parameter of shape {tuple(parameter.shape)} on "
                    f"a mesh of ranks {ranks}: leave it out of the optimizer there"
                )
            me = ranks.index(dist.get_rank())
            lane = Lane(ranks, group, me, torch.float32, parameter.device)
            self.rings[ranks] = Ring(lane, loads=[0.0] * len(ranks))
        return self.rings[ranks]

    def _lane(self, ring: Ring, parameter: Tensor) -> Lane:
        own = ring.lane
        key = (own.ranks, parameter.dtype, parameter.device)
        if key not in self._lanes:
            self._lanes[key] = Lane(own.ranks, own.group, own.me, parameter.dtype, parameter.device)
        return self._lanes[key]


def _process_group(mesh: Any, ranks: Sequence[int]) -> Any:
    """The process group of all ranks of a mesh, made if its dimensions are several."""
    if mesh.ndim == 1:
        group = mesh.get_group()
        if tuple(dist.get_process_group_ranks(group)) == tuple(ranks):
            return group
    if tuple(ranks) == tuple(range(dist.get_world_size())):
        return dist.group.WORLD
    return dist.new_group(list(ranks), use_local_synchronization=True)

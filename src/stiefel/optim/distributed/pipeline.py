"""Gather to owners, update there once, scatter back: rounds of messages that hide behind work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stiefel.optim.base import MatrixOptimizer
from stiefel.optim.batch import LOW_PRECISION
from stiefel.optim.distributed.exchange import (
    Flight,
    Item,
    Lane,
    Round,
    launch,
    launch_copies,
    raise_together,
    schedule,
)
from stiefel.optim.distributed.geometry import own
from stiefel.optim.distributed.holdings import Holdings
from stiefel.optim.distributed.planner import Entry

# Schedules kept: one for each set of parameters that has had gradients together.
_SCHEDULES = 8

Fill = Callable[[Item, Tensor], None]


class Pipeline:
    """Runs a lane's matrices through their owners.

    Of a rank's work one round is in hand, one on its way in and one on its way out: each at most a
    quarter of what it owns (or one matrix), and at most ``planner.LARGEST_ROUND`` numbers.
    """

    def __init__(self, optimizer: MatrixOptimizer, holdings: Holdings) -> None:
        self._optimizer = optimizer
        self._holdings = holdings
        self._schedules: dict[tuple[int, ...], list[Round]] = {}

    def run(
        self,
        lane: Lane,
        entries: list[Entry],
        grads: dict[int, Tensor],
        failure: Exception | None = None,
    ) -> None:
        """One step of ``entries``; ``grads`` are this rank's shards by parameter id.

        A rank that has failed, here or before (``failure``), goes on sending zeros, so that no
        other waits for it, and says so with its last message.

        Raises:
            BaseException: what the method raised on this rank, when the others know of it. Some
                parameters may have been updated by then.
            RuntimeError: another rank's failure.
        """
        groups = self._optimizer.param_groups
        failures = [] if failure is None else [failure]
        try:
            self._holdings.begin_teams(lane, entries)
            if not failures and not self._holdings.owner_has_momentum:
                self._advance(entries, grads)
        except Exception as error:
            failures.append(error)
        decays = {
            i: 1 - float(groups[i]["lr"]) * groups[i]["weight_decay"]
            for i in {e.group for e in entries}
        }
        rounds = self._rounds(lane, entries)
        silent = all(e.layout.everywhere for e in entries)  # owners have it all
        send_back = launch_copies if silent and lane.world > 1 else launch

        def fill(item: Item, out: Tensor) -> None:
            if failures:
                out.zero_()
            else:
                self._pack(groups[item.entry.group], item, grads, out)

        arriving: Flight = launch(lane, rounds[0].gather, fill, silent=silent)
        leaving: Flight | None = None
        for k, current in enumerate(rounds):
            following = None
            if k + 1 < len(rounds):
                following = launch(lane, rounds[k + 1].gather, fill, silent=silent)
            inputs = _whole(lane, current.mine, arriving, fill)
            updates = [torch.zeros_like(u) for u in inputs]
            try:
                if not failures:
                    self._update(lane, current.mine, inputs, updates)
            except Exception as error:  # raised when the others know of it
                failures.append(error)
            inputs.clear()
            flag = None if following else lambda: bool(failures)
            flight = send_back(lane, current.scatter, _from(current.mine, updates), flag=flag)
            for entry, update in zip(current.mine, updates, strict=True):
                piece = entry.piece_of(lane.me)
                _apply(Item(entry, piece), entry.matrix.unfold(update)[piece.inside], decays)
            if leaving is not None:
                _apply_all(leaving, decays)
            leaving = flight
            if following is not None:
                arriving = following
        if leaving is not None:
            _apply_all(leaving, decays)
            if leaving.failed() or failures:
                name = type(self._optimizer).__name__
                raise_together(lane, name, failures[0] if failures else None)
        self._holdings.count(_parameters(entries))

    def _rounds(self, lane: Lane, entries: list[Entry]) -> list[Round]:
        key = tuple(map(id, entries))
        if key not in self._schedules:
            if len(self._schedules) >= _SCHEDULES:
                self._schedules.clear()
            self._schedules[key] = schedule(lane, entries)
        return self._schedules[key]

    def _advance(self, entries: list[Entry], grads: dict[int, Tensor]) -> None:
        """M ← μ M + (1 − μ) G on the shards."""
        for i in dict.fromkeys(e.group for e in entries):
            members = _parameters([e for e in entries if e.group == i])
            members = [p for p in members if own(p).numel()]
            if members:
                torch._foreach_lerp_(
                    [own(self._holdings.momentum(p)) for p in members],
                    [grads[id(p)] for p in members],
                    1 - self._optimizer._momentum(self._optimizer.param_groups[i]),
                )

    def _pack(
        self, group: dict[str, Any], item: Item, grads: dict[int, Tensor], out: Tensor
    ) -> None:
        """Write what the owner needs of a piece: the gradient, or the momentum a step ahead."""
        parameter, where = item.entry.parameter, item.piece.local
        grad = grads[id(parameter)][where]
        if self._holdings.owner_has_momentum:
            out.copy_(grad)
            return
        momentum = own(self._holdings.momentum(parameter))[where]
        if not group.get("nesterov", False):
            out.copy_(momentum)
        elif out.is_contiguous():
            torch.lerp(grad, momentum, self._optimizer._momentum(group), out=out)
        else:
            out.copy_(torch.lerp(grad, momentum, self._optimizer._momentum(group)))

    def _update(
        self, lane: Lane, mine: list[Entry], inputs: list[Tensor], updates: list[Tensor]
    ) -> None:
        """Run the method on whole matrices at zero, without decay: they become the updates.

        Where momentum is with the shards the inputs are both momentum and gradient: the method's
        own lerp(U, U) is U.
        """
        optimizer, holdings = self._optimizer, self._holdings
        for i in dict.fromkeys(e.group for e in mine):
            group = optimizer.param_groups[i]
            chosen = [n for n, e in enumerate(mine) if e.group == i]
            idle = holdings.idle_members(lane, [mine[n] for n in chosen])
            blanks = [torch.empty(0, dtype=lane.dtype, device=lane.device) for _ in idle]
            stand_ins = [(mine[n], updates[n]) for n in chosen]
            everyone = [*stand_ins, *zip(idle, blanks, strict=True)]
            views = [holdings.views(lane, group, e) for e, _ in everyone]
            worker = holdings.work_with(group, everyone)
            for (_, tensor), own_views in zip(everyone, views, strict=True):
                worker.state[tensor].update(own_views)
            for n in chosen:
                updates[n].grad = inputs[n]
                if not holdings.owner_has_momentum:
                    worker.state[updates[n]][optimizer._first_state] = inputs[n]
            try:
                worker._update_group(worker.param_groups[0], [t for _, t in stand_ins])
            finally:  # nothing of a round outlives it
                worker.state = defaultdict(dict)
                worker.param_groups = []
                for n in chosen:
                    updates[n].grad = None


def _parameters(entries: Sequence[Entry]) -> list[Tensor]:
    return list({id(e.parameter): e.parameter for e in entries}.values())


def _whole(lane: Lane, mine: list[Entry], flight: Flight, fill: Fill) -> list[Tensor]:
    """The whole matrices of a round, from the others' pieces and this rank's own."""
    inputs = [
        torch.empty(e.matrix.rows, e.matrix.cols, dtype=lane.dtype, device=lane.device)
        for e in mine
    ]
    whole = {id(e): e.matrix.unfold(u) for e, u in zip(mine, inputs, strict=True)}
    for entry in mine:
        item = Item(entry, entry.piece_of(lane.me))
        if item.piece.numel:
            fill(item, whole[id(entry)][item.piece.inside])
    for item, numbers in flight.land():
        whole[id(item.entry)][item.piece.inside] = numbers
    flight.release()
    return inputs


def _from(mine: list[Entry], updates: list[Tensor]) -> Fill:
    """What packs the pieces of updates."""
    whole = {id(e): e.matrix.unfold(u) for e, u in zip(mine, updates, strict=True)}

    def fill(item: Item, out: Tensor) -> None:
        out.copy_(whole[id(item.entry)][item.piece.inside])

    return fill


def _apply_all(flight: Flight, decays: dict[int, float]) -> None:
    for item, update in flight.land():
        _apply(item, update, decays)


def _apply(item: Item, update: Tensor, decays: dict[int, float]) -> None:
    """p ← decay·p + update, rounded once."""
    if not item.piece.numel:
        return
    part, decay = own(item.entry.parameter)[item.piece.local], decays[item.entry.group]
    target = part.float() if part.dtype in LOW_PRECISION else part
    if decay != 1.0:
        target.mul_(decay)
    target.add_(update)
    if target is not part:
        part.copy_(target)

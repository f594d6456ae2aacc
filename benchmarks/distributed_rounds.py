"""Rounds of messages and updates, and the clock that runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from distributed_machine import APPLY, PACK, SCATTER_KERNELS, ZERO, Array, Machine

from stiefel.optim.distributed.planner import Entry


@dataclass
class Round:
    """One gather, update and scatter: everything by rank."""

    send: Array
    receive: Array
    messages: Array
    """Of the gather: to owners and from holders."""
    back_send: Array
    back_packed: Array
    """What of it lies in the buffer."""
    back_receive: Array
    back_messages: Array
    held: Array
    """Bytes of the matrices that are updated."""
    own: Array
    """Bytes of these that the owner has already."""
    seconds: Array
    kernels: Array
    """Pieces packed and put in place before the update."""
    back_kernels: Array
    largest: Array
    """Bytes of the largest matrix."""


class Pieces:
    """How much of a matrix every rank holds."""

    def __init__(self) -> None:
        self._known: dict[Any, Array] = {}

    def __call__(self, entry: Entry, world: int) -> Array:
        key = (entry.matrix.region, entry.layout.shape, entry.layout.everywhere, world)
        if key not in self._known:
            counts = [entry.piece_of(rank).numel for rank in range(world)]
            self._known[key] = np.array(counts, dtype=float)
        return self._known[key]


def make_round(
    owners: Sequence[Sequence[Entry]],
    world: int,
    pieces: Pieces,
    seconds: Callable[[Entry], float],
    *,
    gathers: bool,
) -> Round:
    made = Round(*(np.zeros(world) for _ in range(13)))
    for owner, entries in enumerate(owners):
        if not entries:
            continue
        speaks = np.zeros(world, dtype=bool)
        for entry in entries:
            size = pieces(entry, world) * entry.parameter.dtype.itemsize
            others = size.copy()
            others[owner] = 0.0
            present = others > 0
            speaks |= present
            if gathers:
                made.send += others
                made.receive[owner] += others.sum()
                made.kernels += present
                made.kernels[owner] += present.sum()
            made.back_send[owner] += others.sum()
            # To replicas everywhere one copy goes out by broadcast.
            made.back_packed[owner] += others.sum() if gathers else others.max()
            made.back_receive += others
            made.back_kernels += SCATTER_KERNELS * present
            made.back_kernels[owner] += present.sum() + SCATTER_KERNELS
            whole = entry.numel * entry.parameter.dtype.itemsize
            made.held[owner] += whole
            made.own[owner] += size[owner]
            made.largest[owner] = max(made.largest[owner], whole)
            made.seconds[owner] += seconds(entry)
        # A message each way for every pair of ranks that have anything for one another.
        made.messages += speaks * gathers
        made.messages[owner] += speaks.sum() * gathers
        made.back_messages += speaks
        made.back_messages[owner] += speaks.sum()
    return made


class Clock:
    """Ranks that compute, and one queue of collectives for all of them."""

    def __init__(self, machine: Machine, world: int) -> None:
        self.machine, self.now = machine, np.zeros(world)
        self.free = self.talked = 0.0

    def compute(self, seconds: Array) -> None:
        self.now = self.now + self.machine.spread(seconds)

    def launch(self, messages: Array, sent: Array, received: Array, *, wait: bool) -> float:
        """Returns when it has arrived."""
        if not messages.any():
            return 0.0
        longest = float(self.machine.transfer(messages, np.maximum(sent, received)).max())
        self.free = max(self.free, float(self.now.max())) + longest
        self.talked += longest
        if wait:
            self.wait(self.free)
        return self.free

    def wait(self, arrival: float) -> None:
        self.now = np.maximum(self.now, arrival)

    def word(self, count: float) -> None:
        """A collective of a few bytes that all wait for, of so many hops."""
        if count:
            seconds = 1e-6 * count * (self.machine.us + self.machine.message_us)
            self.now = np.full_like(self.now, max(self.free, self.now.max()) + seconds)
            self.free, self.talked = float(self.now[0]), self.talked + seconds


def run_rounds(clock: Clock, rounds: Sequence[Round], *, overlap: bool) -> None:
    """As :class:`stiefel.optim.distributed.pipeline.Pipeline` runs them."""
    machine = clock.machine
    launch = 1e-6 * machine.launch_us

    def gather(r: Round) -> float:
        clock.compute(
            machine.passes(PACK, r.send)
            + machine.fresh(r.send + r.receive)
            + launch * r.kernels / 2
        )
        return clock.launch(r.messages, r.send, r.receive, wait=not overlap)

    def apply(r: Round) -> None:
        clock.compute(machine.passes(APPLY, r.back_receive) + launch * r.back_kernels / 2)

    arriving, leaving, before = gather(rounds[0]), 0.0, None
    for k, r in enumerate(rounds):
        following = gather(rounds[k + 1]) if k + 1 < len(rounds) and overlap else 0.0
        clock.wait(arriving)
        clock.compute(
            machine.passes(PACK, r.receive + r.own)
            + machine.passes(ZERO, r.held)
            + machine.fresh(2 * r.held)
            + launch * r.kernels / 2
            + r.seconds
        )
        clock.compute(
            machine.passes(PACK, r.back_packed)
            + machine.fresh(r.back_packed + r.back_receive)
            + launch * r.back_kernels / 2
        )
        away = clock.launch(r.back_messages, r.back_send, r.back_receive, wait=not overlap)
        clock.compute(machine.passes(APPLY, r.own))
        if before is not None:
            clock.wait(leaving)
            apply(before)
        leaving, before = away, r
        if k + 1 < len(rounds):
            arriving = following if overlap else gather(rounds[k + 1])
    if before is not None:
        clock.wait(leaving)
        apply(before)


def scratch_bytes(rounds: Sequence[Round], workspace: float) -> Array:
    """Bytes beyond parameters, gradients and state, at the worst moment."""
    most = np.zeros_like(rounds[0].held)
    for k, r in enumerate(rounds):
        held = r.send.copy()  # what this round's gather sent
        if k + 1 < len(rounds):
            held += rounds[k + 1].send + rounds[k + 1].receive
        if k:
            held += rounds[k - 1].back_packed + rounds[k - 1].back_receive
        working = 2 * r.held + workspace * r.largest
        leaving = r.held + r.back_packed + r.back_receive
        most = np.maximum(most, held + np.maximum(working, leaving))
    return most

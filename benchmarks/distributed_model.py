"""What a distributed step costs: the real plan, and a model of the time that it takes.

Owners, rounds, bytes and FLOPs are those that the optimizers themselves would use. Time is that of
the slowest rank: its passes over memory, its updates, and collectives that start when the last
rank is there and take ``latency + messages·overhead + bytes/bandwidth`` of the busiest one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import numpy as np
import torch
from distributed_machine import ADAMW, ADVANCE, CHECK, METHODS, Array, Machine
from distributed_rounds import Clock, Pieces, Round, make_round, run_rounds, scratch_bytes
from distributed_shapes import Model

from stiefel.optim import distribution_plan
from stiefel.optim.distributed.exchange import Lane
from stiefel.optim.distributed.plan import _imagined
from stiefel.optim.distributed.planner import make_rounds


@dataclass(frozen=True)
class Cost:
    """One method on so many ranks. Bytes and FLOPs are of the busiest rank, means beside."""

    method: str
    ranks: int
    seconds: float
    computing: float
    """Seconds of the busiest rank without any message."""
    communicating: float
    """Seconds of messages, one after the other."""
    hidden: float
    """Share of them that costs no time."""
    sent: int
    sent_mean: float
    flops: float
    flops_mean: float
    imbalance: float
    parameters: int
    gradients: int
    state: int
    scratch: int
    rounds: int

    @property
    def memory(self) -> int:
        """Bytes on the fullest rank."""
        return self.parameters + self.gradients + self.state + self.scratch


def _hops(world: int) -> int:
    return ceil(log2(world)) if world > 1 else 0


def cost(
    model: Model,
    name: str,
    ranks: int,
    machine: Machine,
    *,
    dtype: torch.dtype = torch.float32,
    replicated: bool = False,
) -> Cost:
    """What one step of method ``name`` costs on ``ranks`` that share ``model`` by rows.

    Args:
        model: The parameters.
        name: A key of :data:`METHODS`.
        ranks: How many, at least 1.
        machine: What each of them has.
        dtype: Of parameters, gradients, momenta and messages.
        replicated: All ranks hold everything (DDP) and share the work.
    """
    method, item = METHODS[name], dtype.itemsize
    groups = model.groups(dtype, matrices=method.matrices)
    optimizer = method.optimizer(groups)
    plan = distribution_plan(optimizer, ranks, replicated=replicated)
    lanes = _imagined(optimizer, ranks, replicated)
    gathers = optimizer._sends != "nothing"
    share = _shares(model, ranks, replicated)
    matrix = item * (share(True) if method.matrices else np.zeros(ranks))
    rest = item * (share(False) if method.matrices else share(None))
    state = 2 * rest
    if optimizer._has_momentum and optimizer._sends != "gradient":
        state = state + matrix
    if plan.owned_bytes:
        state = state + np.array(plan.owned_bytes, dtype=float)

    pieces, scratch = Pieces(), np.zeros(ranks)
    host = 1e-6 * machine.host_us * (len(plan.assignments) + _elementwise(optimizer))
    work: list[list[Round]] = []
    local = np.zeros(ranks)
    for lane in lanes:
        if gathers:
            made = [
                make_round(
                    owners, ranks, pieces, lambda e: machine.update(name, e), gathers=not replicated
                )
                for owners in make_rounds(lane.entries, ranks)
            ]
            work.append(made)
            scratch = np.maximum(scratch, scratch_bytes(made, method.workspace))
        else:
            seconds, largest = _local(lane, ranks, pieces, lambda e: machine.update(name, e))
            local += seconds
            scratch = np.maximum(scratch, method.workspace * item * largest)

    def run(*, overlap: bool) -> Clock:
        clock = Clock(machine, ranks)
        clock.compute(machine.passes(CHECK, matrix + rest) + host)
        if ranks > 1:
            if (gathers and work) or any(plan.reduce_bytes):
                clock.word(_hops(ranks))
            clock.word(4 * _hops(ranks) if any(plan.reduce_bytes) else 0)
        clock.compute(machine.passes(ADAMW, rest) + local)
        for made in work:
            if optimizer._sends == "momentum":
                clock.compute(machine.passes(ADVANCE, matrix))
            run_rounds(clock, made, overlap=overlap)
        return clock

    serial = run(overlap=False)
    taken = run(overlap=True) if machine.overlaps else serial
    total, alone = float(taken.now.max()), float(serial.now.max())
    sent = plan.bytes_sent or (0,)
    flops = plan.flops or (0.0,)
    return Cost(
        name,
        ranks,
        total,
        alone - serial.talked,
        serial.talked,
        (alone - total) / serial.talked if serial.talked else 0.0,
        max(sent),
        sum(sent) / len(sent),
        max(flops),
        sum(flops) / len(flops),
        plan.imbalance,
        int((matrix + rest).max()),
        int((matrix + rest).max()),
        int(state.max()),
        int(scratch.max()),
        plan.rounds,
    )


def _elementwise(optimizer: Any) -> int:
    """How many parameters AdamW has."""
    return sum(len(g["params"]) for g in optimizer.param_groups if g["rule"] == "elementwise")


def _local(
    lane: Lane, ranks: int, pieces: Pieces, seconds: Callable[[Entry], float]
) -> tuple[Array, Array]:
    """Seconds of updates that stay where they are, and the largest shard, by rank."""
    total, largest = np.zeros(ranks), np.zeros(ranks)
    for entry in lane.entries:
        held = pieces(entry, ranks)
        total += seconds(entry) * held / entry.numel
        largest = np.maximum(largest, held)
    return total, largest


def _shares(model: Model, ranks: int, replicated: bool) -> Callable[[bool | None], Array]:
    """Numbers that every rank holds, in matrices (True), elsewhere (False), in all (None)."""

    def share(matrix: bool | None) -> Array:
        held = np.zeros(ranks)
        for p in model.parameters:
            if matrix is not None and p.matrix != matrix:
                continue
            if replicated:
                held += p.numel
                continue
            step = -(-p.shape[0] // ranks)
            first = np.minimum(step * np.arange(ranks), p.shape[0])
            last = np.minimum(first + step, p.shape[0])
            held += (last - first) * (p.numel // p.shape[0])
        return held

    return share

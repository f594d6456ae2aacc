"""What ranks do in the tests of failures; see :mod:`ranks`."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
from distributed_jobs import gathered, place
from law_table import noise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from stiefel.optim import RMNP, AuON, NorMuon

SHAPES = ((6, 4), (4, 6), (5, 5))
BAD = 1  # the rank that fails


def parameters(where, shapes=SHAPES):
    return [
        (f"w{i}", nn.Parameter(place(noise(s, i, torch.float32), *where)))
        for i, s in enumerate(shapes)
    ]


def set_gradients(params, where, step=0):
    for i, (_, p) in enumerate(params):
        p.grad = place(noise(tuple(p.shape), 10 + 10 * step + i, torch.float32), *where)


def spoil(params, number=1, value=float("nan")):
    params[number][1].grad.to_local().view(-1)[:1] = value


def attempt(function):
    """The error's kind and text, or "fine"."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "fine"


def unchanged(params, before):
    return all(
        torch.equal(p.detach().to_local(), b) for (_, p), b in zip(params, before, strict=True)
    )


def values(params):
    return [p.detach().to_local().clone() for _, p in params]


def nan_raises(rank, where):
    params = parameters(where)
    optimizer = NorMuon(params)
    set_gradients(params, where)
    if rank == BAD:
        spoil(params)
    before = values(params)
    outcome = attempt(optimizer.step)
    state = bool(optimizer.state)
    set_gradients(params, where)
    return outcome, unchanged(params, before), state, attempt(optimizer.step)


def nan_skips(rank, where, cls):
    """As a twin that has no gradient there, on all ranks."""
    params, twins = parameters(where), parameters(where)
    optimizer, twin = cls(params, nonfinite="skip"), cls(twins)
    set_gradients(params, where)
    set_gradients(twins, where)
    if rank == BAD:
        spoil(params)
    twins[1][1].grad = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    twin.step()
    return [str(w.message) for w in caught], unchanged(params, values(twins))


def other_shape(rank, where):
    params = parameters(where, ((6, 4), (4, 6) if rank == BAD else (6, 4)))
    set_gradients(params, where)
    return attempt(NorMuon(params).step)


def other_number(rank, where):
    params = parameters(where, SHAPES[: 2 if rank == BAD else 3])
    set_gradients(params, where)
    return attempt(NorMuon(params).step)


def missing_gradient(rank, where):
    params = parameters(where)
    set_gradients(params, where)
    if rank == BAD:
        params[2][1].grad = None
    return attempt(NorMuon(params).step)


class Breaking(NorMuon):
    """Fails on the rank that is told to, in the middle of its work."""

    breaks = False

    def _update(self, group, batch):
        if Breaking.breaks:
            raise ArithmeticError("the matrix product is on fire")
        super()._update(group, batch)


def work_fails(rank, where):
    params = parameters(where)
    optimizer = Breaking(params)
    Breaking.breaks = rank == BAD
    set_gradients(params, where)
    outcome = attempt(optimizer.step)
    Breaking.breaks = False
    set_gradients(params, where)
    return outcome, attempt(optimizer.step)


class Unprepared(NorMuon):
    """Fails on the rank that is told to, where nobody else is asked anything."""

    breaks = False

    def _extra_state(self, group, sizes, parameter):
        if Unprepared.breaks and parameter.device.type == "cpu":
            raise MemoryError("no room for second moments")
        return super()._extra_state(group, sizes, parameter)


def preparation_fails(rank, where):
    params = parameters(where)
    optimizer = Unprepared(params)
    Unprepared.breaks = rank == BAD
    set_gradients(params, where)
    outcome = attempt(optimizer.step)
    Unprepared.breaks = False
    set_gradients(params, where)
    return outcome, attempt(optimizer.step)


def silent_methods(rank, where):
    """RMNP on whole rows never speaks: the others hear of it one step later."""
    params = parameters(where)
    optimizer = RMNP(params)
    set_gradients(params, where)
    if rank == BAD:
        spoil(params)
    if rank == BAD:  # the others are through with this step when it fails
        dist.barrier()
    first = attempt(optimizer.step)
    if rank != BAD:
        dist.barrier()
    dist.barrier()
    set_gradients(params, where)
    second = attempt(optimizer.step) if rank != BAD else "left"
    return first, second


def sums_fail(rank, where):
    params = parameters(where)
    optimizer = AuON(params)
    set_gradients(params, where)
    if rank == BAD:
        spoil(params, value=float("inf"))
    return attempt(optimizer.step)


def every_failure(rank, world):
    """Scenario → rank → outcome, one after the other: an error that all know of ends nothing."""
    where = (init_device_mesh("cpu", (world,)), (Shard(0),))
    found = {
        "nan raises": nan_raises(rank, where),
        "nan skips": nan_skips(rank, where, NorMuon),
        "nan skips without messages": nan_skips(rank, where, RMNP),
        "other shape": other_shape(rank, where),
        "other number": other_number(rank, where),
        "missing gradient": missing_gradient(rank, where),
        "work fails": work_fails(rank, where),
        "preparation fails": preparation_fails(rank, where),
        "silent": silent_methods(rank, where),
        "sums": sums_fail(rank, where),
    }
    every = gathered({(scenario, rank): value for scenario, value in found.items()})
    return {name: [every[name, r] for r in range(world)] for name in found}


def vanish(rank, world):
    """A rank that is gone without a word: the others get an error of their messages, no hang."""
    where = (init_device_mesh("cpu", (world,)), (Shard(0),))
    params = parameters(where)
    optimizer = NorMuon(params)
    set_gradients(params, where)
    optimizer.step()
    if rank == BAD:
        os._exit(3)
    set_gradients(params, where)
    optimizer.step()

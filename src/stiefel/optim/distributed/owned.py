"""State that lives with a matrix's owner: at rest, in state_dict(), and after loading.

At rest ``state[p][key]`` is a flat tensor of the pieces of those matrices of p that this rank
owns, one after the other, and empty on ranks that own none. ``state_dict()`` shows it whole, in
the shape that one process has, as a DTensor where p is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stiefel.optim.distributed.exchange import Lane
from stiefel.optim.distributed.geometry import is_dtensor
from stiefel.optim.distributed.planner import Entry

# Name → shape and dtype of what one matrix keeps.
Form = dict[str, tuple[tuple[int, ...], torch.dtype]]


def pieces(flat: Tensor, key: str, forms: Iterable[Form]) -> list[Tensor]:
    """The part of every matrix in a flat tensor of those that ``forms`` belong to."""
    shapes = [form[key][0] for form in forms if key in form]
    parts = flat.split([prod(s) for s in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def whole_shape(key: str, first: str, parameter: Tensor, forms: Sequence[Form]) -> tuple[int, ...]:
    """The shape of a parameter's state in one process."""
    if key == first:
        return tuple(parameter.shape)
    shapes = [form[key][0] for form in forms if key in form]
    return shapes[0] if len(shapes) == 1 else (sum(prod(s) for s in shapes),)


def collect(
    lane: Lane, entries: Sequence[Entry], forms: Sequence[Form], key: str, first: str, flat: Tensor
) -> Tensor:
    """The whole state of a parameter, on every rank: each owner sends its pieces to all."""
    parameter, device = entries[0].parameter, lane.device
    mine = iter(
        pieces(flat, key, [f for e, f in zip(entries, forms, strict=True) if e.owner == lane.me])
    )
    parts = []
    for entry, form in zip(entries, forms, strict=True):
        if key not in form:
            continue
        shape, dtype = form[key]
        part = next(mine).contiguous() if entry.owner == lane.me else None
        if part is None:
            part = torch.empty(shape, dtype=dtype, device=device)
        if lane.world > 1:
            dist.broadcast(part, lane.ranks[entry.owner], group=lane.group)
        parts.append((entry, part))
    shape = whole_shape(key, first, parameter, forms)
    if key != first:
        return torch.cat([part.flatten() for _, part in parts]).view(shape)
    whole = torch.empty(shape, dtype=parts[0][1].dtype, device=device)
    for entry, part in parts:
        region = tuple(slice(start, stop) for start, stop in entry.matrix.region)
        whole[region] = entry.matrix.unfold(part)
    return whole


def keep(
    lane: Lane, entries: Sequence[Entry], forms: Sequence[Form], key: str, first: str, whole: Tensor
) -> Tensor:
    """What this rank keeps of the whole state of a parameter: the inverse of :func:`collect`.

    Raises:
        ValueError: state of another shape.
    """
    expected = whole_shape(key, first, entries[0].parameter, forms)
    if tuple(whole.shape) != expected:
        raise ValueError(
            f"state {key!r} of {entries[0].name} has shape {tuple(whole.shape)}, not {expected}"
        )
    parts: list[Tensor] = []
    if key == first:
        for entry in entries:
            if entry.owner == lane.me:
                region = tuple(slice(start, stop) for start, stop in entry.matrix.region)
                part = whole[region]
                parts.append((part.mT if entry.matrix.transposed else part).flatten())
    else:
        holders = [e for e, f in zip(entries, forms, strict=True) if key in f]
        cut = pieces(whole.flatten(), key, forms)
        parts = [p.flatten() for e, p in zip(holders, cut, strict=True) if e.owner == lane.me]
    return torch.cat(parts) if parts else whole.new_empty(0)


def as_dtensor(whole: Tensor, like: Any, placements: Sequence[Any] | None = None) -> Tensor:
    """This rank's shard of a tensor that every rank has, on the mesh of ``like``.

    Shards lie along dimension 0 over the first mesh dimension unless ``placements`` are given.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = like.device_mesh
    if placements is None:
        placements = [Shard(0), *[Replicate()] * (mesh.ndim - 1)]
    sizes, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    part = tuple(slice(o, o + n) if n else slice(0, 0) for o, n in zip(offsets, sizes, strict=True))
    local = whole[part].reshape(sizes).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local,
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=torch.empty(whole.shape, device="meta").stride(),
    )


def everything(value: Tensor) -> Tensor:
    """A DTensor's whole value on every rank (a collective); other tensors as they are."""
    return value.full_tensor() if is_dtensor(value) else value  # pyrefly: ignore


def shard_like(value: Tensor, parameter: Any) -> Tensor:
    """State of a parameter's shape with the parameter's placements.

    Whole plain tensors, as one process saves them, are cut without any message.
    """
    if not is_dtensor(parameter):
        return everything(value)
    if is_dtensor(value):
        same = (
            value.device_mesh == parameter.device_mesh  # pyrefly: ignore
            and value.placements == parameter.placements  # pyrefly: ignore
        )
        return value if same else as_dtensor(everything(value), parameter, parameter.placements)
    return as_dtensor(value, parameter, parameter.placements)

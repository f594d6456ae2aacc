"""Which part of every matrix each rank holds: boxes, regions, and what they have in common."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

from torch import Tensor

# (start, stop) along every dimension of a tensor.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """How a parameter is spread over the ranks of a process group, in the group's order."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    boxes: tuple[Box, ...]
    """What every rank holds of it; empty ones have start == stop somewhere."""
    replicas: tuple[int, ...]
    """The copy that every rank's box belongs to: ranks of one number hold it once together."""

    @property
    def everywhere(self) -> bool:
        """Whether every rank holds the whole parameter."""
        return len(set(self.replicas)) == len(self.replicas)


@dataclass(frozen=True)
class Matrix:
    """One matrix (R, C) of a parameter: a row block, a member of a batch, or all of it."""

    rows: int
    cols: int
    region: Box
    """Where it lies in the parameter."""
    transposed: bool = False
    """Whether the parameter stores (in, out), so that its columns are the matrix's rows."""
    batched: bool = False
    """Whether it is a member of a batch (E, R, C)."""

    def unfold(self, buffer: Tensor) -> Tensor:
        """A contiguous (R, C) buffer as the parameter's dimensions see it, a view."""
        if self.transposed:
            return buffer.mT
        return buffer.view(tuple(stop - start for start, stop in self.region))


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a matrix."""

    local: tuple[slice, ...]
    """Where it lies in the rank's shard."""
    inside: tuple[slice, ...]
    """Where it lies in the matrix as :meth:`Matrix.unfold` shows it."""
    shape: tuple[int, ...]
    numel: int


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor; never imports what nobody has imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; other tensors as they are."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # pyrefly: ignore


def mesh_ranks(mesh: Any) -> tuple[int, ...]:
    """The ranks of a device mesh in ascending order, as process groups have them."""
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def dtensor_layout(tensor: Any) -> Layout:
    """The layout of a DTensor over :func:`mesh_ranks`.

    Raises:
        ValueError: placements that leave a rank with more than one box, or with partial sums.
    """
    mesh = tensor.device_mesh
    return _layout(
        tuple(tensor.shape), tuple(mesh.mesh.shape), tuple(tensor.placements), _coordinates(mesh)
    )


def full_layout(shape: Sequence[int], world: int) -> Layout:
    """Every rank holds all of it, as under DDP."""
    box = tuple((0, n) for n in shape)
    return Layout(tuple(shape), (box,) * world, tuple(range(world)))


def row_layout(shape: Sequence[int], world: int) -> Layout:
    """Shards of dimension 0 in torch.chunk's sizes, as ``fully_shard`` makes them."""
    rows, rest = shape[0], tuple((0, n) for n in shape[1:])
    step = -(-rows // world)
    cuts = [min(rows, step * r) for r in range(world + 1)]
    boxes = tuple(((cuts[r], cuts[r + 1]), *rest) for r in range(world))
    return Layout(tuple(shape), boxes, (0,) * world)


def _coordinates(mesh: Any) -> tuple[tuple[int, ...], ...]:
    ranks = mesh.mesh
    found = {int(ranks[tuple(c)]): tuple(c) for c in (ranks == ranks).nonzero().tolist()}
    return tuple(found[rank] for rank in sorted(found))


@lru_cache(maxsize=1024)
def _layout(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    placements: tuple[Any, ...],
    coordinates: tuple[tuple[int, ...], ...],
) -> Layout:
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    if any(p.is_partial() for p in placements):
        raise ValueError(f"a parameter has partial placements {placements}; redistribute it")
    boxes = []
    for coordinate in coordinates:
        sizes, offsets = _compute_local_shape_and_global_offset(
            shape, mesh, list(coordinate), placements
        )
        # The offset of an empty shard may lie anywhere.
        boxes.append(
            tuple((o, o + n) if n else (0, 0) for o, n in zip(offsets, sizes, strict=True))
        )
    for dim, extent in enumerate(shape):
        parts = sorted({box[dim] for box in boxes if box[dim][0] < box[dim][1]})
        tiled = all(a[1] == b[0] for a, b in pairwise(parts))
        if extent and not (parts and tiled and parts[0][0] == 0 and parts[-1][1] == extent):
            raise ValueError(
                f"placements {placements} give the ranks no connected blocks of dimension {dim} "
                f"of shape {shape}; redistribute the parameter to plain Shard placements"
            )
    copies = [i for i, p in enumerate(placements) if p.is_replicate()]
    numbers: dict[tuple[int, ...], int] = {}
    replicas = tuple(
        numbers.setdefault(tuple(c[i] for i in copies), len(numbers)) for c in coordinates
    )
    return Layout(shape, tuple(boxes), replicas)


def matrices_of(
    view: str, shape: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> tuple[Matrix, ...]:
    """The matrices of a parameter, in the order of the group's ``view`` and ``blocks``."""
    if view == "batch":
        rest = tuple((0, n) for n in shape[1:])
        return tuple(
            Matrix(r, c, ((i, i + 1), *rest), batched=True) for i, (r, c) in enumerate(sizes)
        )
    found, start = [], 0
    for rows, cols in sizes:
        block = (start, start + rows)
        start += rows
        if view == "transpose":
            found.append(Matrix(rows, cols, ((0, shape[0]), block), transposed=True))
        else:
            found.append(Matrix(rows, cols, (block, *((0, n) for n in shape[1:]))))
    return tuple(found)


@lru_cache(maxsize=1 << 16)
def piece(region: Box, box: Box) -> Piece:
    """What a box and a region have in common."""
    local, inside, shape = [], [], []
    for (low, high), (start, stop) in zip(region, box, strict=True):
        first, last = max(low, start), min(high, stop)
        last = max(first, last)
        shape.append(last - first)
        inside.append(slice(first - low, last - low))
        local.append(slice(first - start, last - start))
    count = prod(shape)
    if not count:  # slices that lie outside would wrap around
        empty = tuple(slice(0, 0) for _ in shape)
        return Piece(empty, empty, (0,) * len(shape), 0)
    return Piece(tuple(local), tuple(inside), tuple(shape), count)

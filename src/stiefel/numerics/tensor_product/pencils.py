"""A field over many processes, cut so that every process holds whole lines of one axis.

A field of d axes lives on a mesh of d - 1 dimensions. In pencil a, axis a is whole; the axes before
it are cut over the mesh dimension of the same number, those after it over the one before:

    pencil 0 (nx, ny/P0, nz/P1)  ↔  pencil 1 (nx/P0, ny, nz/P1)  ↔  pencil 2 (nx/P0, ny/P1, nz)

Between neighbours only groups along one mesh dimension exchange blocks, all-to-all; every GEMM and
line solve stays local. Pencil decomposition of arXiv 2606.25148.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor

from stiefel.numerics.tensor_product.axis_apply import MAX_AXES
from stiefel.numerics.tensor_product.checks import FIELD_TYPES, check_axis, check_count
from stiefel.numerics.tensor_product.pencils_transport import (
    MPITransport,
    TorchTransport,
    Transport,
)


def even_split(n: int, parts: int) -> list[int]:
    """Sizes of ``parts`` pieces of n points: the first n % parts have one more."""
    return [n // parts + (k < n % parts) for k in range(parts)]


class PencilGrid:
    """Processes on a mesh, and fields of one axis more that move between its pencils.

    Args:
        mesh: Numbers of processes (P0, P1, …), 1 to 3 of them: over MPI, rank in C order. Or a
            ``torch.distributed.device_mesh.DeviceMesh``: over its process groups.
        comm: An mpi4py communicator; all processes (``COMM_WORLD``) if None.

    Every method is collective: all processes call it, in the same order. Pieces differ by at most
    one point; no axis may be shorter than the number of processes that share it. A mistake on one
    process is an error on all of those that work with it, so that none waits for ever.

    Attributes:
        mesh: As given. coordinates: Of this process. dims: Axes of a field, ``len(mesh) + 1``.

    Raises:
        ValueError: the mesh has not as many places as there are processes; no dimension or more
            than three; a number below 1.
        ImportError: mpi4py or an MPI library is missing; names the extra.
    """

    def __init__(self, mesh: Any, comm: Any = None) -> None:
        self._transport: Transport
        if hasattr(mesh, "get_group"):
            self._transport = TorchTransport(mesh)
        else:
            self._transport = MPITransport(_check_mesh(mesh), comm)
        self.mesh = self._transport.mesh
        self.coordinates = self._transport.coordinates
        self.dims = len(_check_mesh(self.mesh)) + 1

    def __repr__(self) -> str:
        return f"PencilGrid(mesh={self.mesh}, coordinates={self.coordinates})"

    def close(self) -> None:
        """Free what MPI keeps for the groups; the grid cannot be used afterwards."""
        self._transport.close()

    def local_slices(self, shape: Sequence[int], axis: int = 0) -> tuple[slice, ...]:
        """What this process holds of a global field of that shape in pencil ``axis``.

        Raises:
            ValueError: not one size per axis, or an axis shorter than its number of processes.
            IndexError: no such axis.
        """
        axis = check_axis(axis, self.dims)
        if len(shape) != self.dims:
            raise ValueError(
                f"shape must have {self.dims} sizes for mesh {self.mesh}, got {tuple(shape)}"
            )
        found = []
        for j, n in enumerate(shape):
            if j == axis:
                found.append(slice(0, n))
                continue
            k = _mesh_dim(j, axis)
            sizes = self._split(n, k, j)
            start = sum(sizes[: self.coordinates[k]])
            found.append(slice(start, start + sizes[self.coordinates[k]]))
        return tuple(found)

    def local_block(self, U: Num[Tensor, "*grid"], axis: int = 0) -> Num[Tensor, "*block"]:
        """This process's part of a field ``(*batch, n_1, …, n_d)`` that it has whole; a copy.

        Raises:
            ValueError: fewer axes than ``dims``; and as :meth:`local_slices`.
        """
        if U.ndim < self.dims:
            raise ValueError(
                f"U must have at least {self.dims} axes for mesh {self.mesh}, got shape "
                f"{tuple(U.shape)}"
            )
        slices = self.local_slices(U.shape[U.ndim - self.dims :], axis)
        return U[(..., *slices)].clone(memory_format=torch.contiguous_format)

    def gather(self, U: Num[Tensor, "*block"], axis: int = 0) -> Num[Tensor, "*grid"]:
        """The whole field, on every process, from blocks of pencil ``axis``: for output and tests.

        Args:
            U: This process's block; no gradient goes through.

        Raises:
            ValueError: blocks that are not parts of one field.
        """
        axis = check_axis(axis, self.dims)
        shape = self._global_shape(U, axis)
        parts = self._transport.gather((self.coordinates, U.detach().cpu()))
        whole = torch.empty(*U.shape[: U.ndim - self.dims], *shape, dtype=U.dtype)
        for place, part in parts:
            slices = []
            for j, n in enumerate(shape):
                k = _mesh_dim(j, axis)
                sizes = [n] if j == axis else self._split(n, k, j)
                at = 0 if j == axis else place[k]
                slices.append(slice(sum(sizes[:at]), sum(sizes[: at + 1])))
            whole[(..., *slices)] = part
        return whole.to(U.device)

    def redistribute(
        self, U: Num[Tensor, "*block"], from_axis: int, to_axis: int
    ) -> Num[Tensor, "*moved"]:
        """The same field in another pencil.

        Args:
            U: This process's block ``(*batch, …)`` in pencil ``from_axis``: all of that axis, its
                part of the others. Real or complex.
            from_axis: Axis of the grid, 0 to ``dims - 1``, that is whole now.
            to_axis: The one to be whole; not a neighbour: by way of those between.

        Returns:
            This process's block in pencil ``to_axis``, contiguous. Differentiable: the backward
            pass is the move back, so that all processes have to run it.

        Raises:
            ValueError: blocks that do not fit together (names the process), too few points.
            TypeError: another type than float32, float64, complex64, complex128.
            IndexError: no such axis.
        """
        start, goal = (
            check_axis(axis, self.dims, name)
            for axis, name in ((from_axis, "from_axis"), (to_axis, "to_axis"))
        )
        return self.walk(U, start, goal, self._global_shape(U, start))

    def walk(self, U: Tensor, start: int, goal: int, shape: Sequence[int]) -> Tensor:
        """:meth:`redistribute` without checks, for blocks of a field of that global shape."""
        step = 1 if goal > start else -1
        for axis in range(start, goal, step):
            U = _Move.apply(U, self, axis, axis + step, tuple(shape))
        return U

    def agree(self, complaint: Exception | None) -> None:
        """Raise on every process if one of them has a complaint, of the same kind."""
        mine = None if complaint is None else (type(complaint), str(complaint))
        self._raise(self._transport.gather(mine))

    @staticmethod
    def _raise(complaints: Sequence[tuple[type[Exception], str] | None]) -> None:
        for rank, other in enumerate(complaints):
            if other is not None:
                kind, message = other
                raise kind(f"process {rank}: {message}")

    def from_all(self, value: Any) -> list[Any]:
        """``value`` of every process, by rank; small ones, they are pickled."""
        return self._transport.gather(value)

    def _complaint(self, U: Tensor) -> tuple[type[Exception], str] | None:
        if U.dtype not in FIELD_TYPES:
            kinds = "float32, float64, complex64 or complex128"
            return TypeError, f"U must be {kinds}, got {U.dtype}"
        if U.ndim < self.dims:
            sizes = f"{self.dims} axes for mesh {self.mesh}, got shape {tuple(U.shape)}"
            return ValueError, f"U must have at least {sizes}"
        return None

    def _split(self, n: int, mesh_dim: int, axis: int) -> list[int]:
        parts = self.mesh[mesh_dim]
        if n < parts:
            raise ValueError(
                f"axis {axis} has {n} points, too few for the {parts} processes that share it on "
                f"mesh {self.mesh}"
            )
        return even_split(n, parts)

    def _global_shape(self, U: Tensor, axis: int) -> tuple[int, ...]:
        """Sizes of the whole field, after a look at the blocks of all processes."""
        mine = self._complaint(U), self.coordinates, tuple(U.shape), U.dtype
        blocks = self._transport.gather(mine)
        self._raise([complaint for complaint, *_ in blocks])
        first = U.ndim - self.dims
        for rank, (_, _, other, dtype) in enumerate(blocks):
            if len(other) != U.ndim or other[:first] != U.shape[:first]:
                raise ValueError(
                    f"blocks must agree in their batch: process {rank} has shape {other}, this one "
                    f"{tuple(U.shape)}"
                )
            if dtype != U.dtype:
                raise ValueError(f"process {rank} has {dtype}, this one {U.dtype}")
        shape = []
        for j in range(self.dims):
            k = None if j == axis else _mesh_dim(j, axis)
            # The whole axis, or its pieces along the row of the mesh that begins at the corner.
            n = sum(
                other[first + j]
                for _, place, other, _ in blocks
                if not any(c for i, c in enumerate(place) if i != k)
            )
            for rank, (_, place, other, _) in enumerate(blocks):
                wanted = n if k is None else even_split(n, self.mesh[k])[place[k]]
                if other[first + j] != wanted:
                    raise ValueError(
                        f"in pencil {axis} process {rank} must hold {wanted} of {n} points of axis "
                        f"{j}, got {other[first + j]} in shape {other}"
                    )
            shape.append(n)
        return tuple(shape)

    def _move(self, U: Tensor, start: int, goal: int, shape: tuple[int, ...]) -> Tensor:
        """To a neighbouring pencil: the group along mesh dimension min(start, goal) exchanges."""
        first = U.ndim - self.dims
        group = min(start, goal)
        pieces = self._split(shape[start], group, start)
        given = self._split(shape[goal], group, goal)
        me = self.coordinates[group]
        blocks = U.split(pieces, first + start)
        send = torch.cat([block.reshape(-1) for block in blocks])
        coming = [list(blocks[me].shape) for _ in given]
        for block, size in zip(coming, given, strict=True):
            block[first + goal] = size
        wanted = [math.prod(block) for block in coming]
        counts = [block.numel() for block in blocks]
        if U.is_complex():
            send = torch.view_as_real(send.resolve_conj()).reshape(-1)
            doubled = [2 * n for n in counts], [2 * n for n in wanted]
            received = self._transport.exchange(send, *doubled, group)
            received = torch.view_as_complex(received.reshape(-1, 2))
        else:
            received = self._transport.exchange(send.resolve_neg(), counts, wanted, group)
        parts = [
            part.reshape(block) for part, block in zip(received.split(wanted), coming, strict=True)
        ]
        return torch.cat(parts, first + goal)


class _Move(torch.autograd.Function):
    """A permutation of numbers over processes: its adjoint moves them back."""

    @staticmethod
    def forward(
        ctx: Any, U: Tensor, grid: PencilGrid, start: int, goal: int, shape: tuple[int, ...]
    ) -> Tensor:
        ctx.back = grid, goal, start, shape
        return grid._move(U, start, goal, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Move.apply(gradients[0], *ctx.back), None, None, None, None


def _mesh_dim(axis: int, pencil: int) -> int:
    """Over which dimension of the mesh an axis is cut in a pencil."""
    return axis if axis < pencil else axis - 1


def _check_mesh(mesh: Any) -> tuple[int, ...]:
    try:
        extents = tuple(mesh)
    except TypeError:
        raise TypeError(f"mesh must be numbers of processes such as (2, 2), got {mesh!r}") from None
    if not 1 <= len(extents) <= MAX_AXES - 1:
        raise ValueError(f"mesh must have 1 to {MAX_AXES - 1} dimensions, got {extents}")
    return tuple(check_count(n, f"mesh[{k}]") for k, n in enumerate(extents))

"""How blocks travel between processes: over MPI (mpi4py), or over torch.distributed.

Both give a mesh of processes, rank in C order of its coordinates, and along every mesh dimension
the group of processes that differ in that coordinate only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor


class Transport(Protocol):
    """What :class:`PencilGrid` needs of a mesh of processes."""

    mesh: tuple[int, ...]
    coordinates: tuple[int, ...]

    def gather(self, value: Any, dim: int | None = None) -> list[Any]:
        """``value`` of every process of the group along ``dim`` (None: of the mesh), by rank."""
        ...

    def exchange(self, send: Tensor, counts: list[int], wanted: list[int], dim: int) -> Tensor:
        """``counts[r]`` numbers of ``send`` to process r of the group, ``wanted[r]`` from it."""
        ...

    def close(self) -> None:
        """Give the groups back."""
        ...


class MPITransport:
    """Groups by ``Comm.Split``, blocks by ``Alltoallv`` on the memory of the tensors themselves."""

    def __init__(self, mesh: Sequence[int], comm: Any = None) -> None:
        MPI = _mpi()
        self.mesh = tuple(mesh)
        self.comm = MPI.COMM_WORLD if comm is None else comm
        size, rank = self.comm.Get_size(), self.comm.Get_rank()
        wanted = math.prod(self.mesh)
        if wanted != size:
            raise ValueError(
                f"mesh {self.mesh} needs {wanted} processes, but there are {size}: start as many "
                f"with mpiexec -n {wanted}, or choose a mesh whose product is {size}"
            )
        coordinates = []
        for extent in reversed(self.mesh):
            rank, place = divmod(rank, extent)
            coordinates.insert(0, place)
        self.coordinates = tuple(coordinates)
        self.groups = []
        for dim, place in enumerate(self.coordinates):
            # One colour for all that share every other coordinate.
            others = [0 if k == dim else c for k, c in enumerate(self.coordinates)]
            colour = 0
            for extent, c in zip(self.mesh, others, strict=True):
                colour = colour * extent + c
            self.groups.append(self.comm.Split(colour, place))

    def gather(self, value: Any, dim: int | None = None) -> list[Any]:
        """By pickle: for sizes and messages, not for fields."""
        return (self.comm if dim is None else self.groups[dim]).allgather(value)

    def exchange(self, send: Tensor, counts: list[int], wanted: list[int], dim: int) -> Tensor:
        """Real numbers, contiguous. A field on an accelerator goes through main memory."""
        out = send.cpu()
        received = torch.empty(sum(wanted), dtype=send.dtype)
        self.groups[dim].Alltoallv([out.numpy(), counts], [received.numpy(), wanted])
        return received.to(send.device)

    def close(self) -> None:
        """Free the communicators of the groups."""
        for group in self.groups:
            group.Free()
        self.groups = []


class TorchTransport:
    """Groups of a ``torch.distributed.device_mesh.DeviceMesh``, blocks by ``all_to_all_single``."""

    def __init__(self, mesh: Any) -> None:
        self.device_mesh = mesh
        self.mesh = tuple(mesh.mesh.shape)
        place = mesh.get_coordinate()
        if place is None:
            raise ValueError("mesh does not contain this process")
        self.coordinates = tuple(place)

    def gather(self, value: Any, dim: int | None = None) -> list[Any]:
        """Along one dimension after the other, so that only groups of the mesh are used."""
        import torch.distributed as dist

        if dim is None:
            values = [value]
            for k in reversed(range(len(self.mesh))):
                values = [v for part in self.gather(values, k) for v in part]
            return values
        found: list[Any] = [None] * self.mesh[dim]
        dist.all_gather_object(found, value, group=self.device_mesh.get_group(dim))
        return found

    def exchange(self, send: Tensor, counts: list[int], wanted: list[int], dim: int) -> Tensor:
        """Real numbers, contiguous, on the device of the process group's backend."""
        import torch.distributed as dist

        received = send.new_empty(sum(wanted))
        group = self.device_mesh.get_group(dim)
        dist.all_to_all_single(received, send, wanted, counts, group=group)
        return received

    def close(self) -> None:
        """Nothing: the process groups belong to the mesh."""


def _mpi() -> Any:
    """``mpi4py.MPI``; loading it starts MPI."""
    try:
        return import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("mpi4py"):
            raise ImportError(
                "PencilGrid over a mesh of numbers needs mpi4py, which is not installed: "
                "pip install 'stiefel[mpi]', or pass a torch DeviceMesh"
            ) from error
        raise ImportError(
            f"mpi4py found no MPI library ({error}): pip install 'stiefel[mpi]' brings one"
        ) from error

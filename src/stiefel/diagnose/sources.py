"""Tensors by name, from files, modules or state dicts, some megabytes at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.checkpoint import Checkpoint

# Bytes of a tensor in memory at a time.
CHUNK_BYTES = 2**24


class Source(ABC):
    """Tensors by name, from wherever."""

    label: str
    names: list[str]
    config: Mapping[str, Any] | None = None

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """As stored."""

    def nbytes(self, name: str) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    @abstractmethod
    def chunks(self, name: str) -> Iterator[Tensor]:
        """Its rows in order, some at a time."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class Files(Source):
    """A checkpoint on disk."""

    def __init__(self, path: str | Path) -> None:
        self.checkpoint = Checkpoint(path)
        self.label = str(path)
        self.names = list(self.checkpoint.tensors)
        self.config = self.checkpoint.config

    def shape(self, name: str) -> tuple[int, ...]:
        """See :class:`Source`."""
        return tuple(self.checkpoint.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """See :class:`Source`."""
        return self.checkpoint.tensors[name].dtype

    def chunks(self, name: str) -> Iterator[Tensor]:
        """See :class:`Source`."""
        return self.checkpoint.chunks(name, CHUNK_BYTES)

    def __exit__(self, *exc: object) -> None:
        self.checkpoint.close()


class Memory(Source):
    """Tensors that are in memory anyway, or that their mapping makes when asked for."""

    def __init__(
        self, tensors: Mapping[str, Tensor], label: str, config: Mapping[str, Any] | None
    ) -> None:
        self.tensors, self.label, self.config = tensors, label, config
        self.names = list(tensors)
        self._kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def _kind(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype; asked for often, and making the tensor may take long."""
        if name not in self._kinds:
            tensor = self.tensors[name]
            self._kinds[name] = tuple(tensor.shape), tensor.dtype
        return self._kinds[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """See :class:`Source`."""
        return self._kind(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """See :class:`Source`."""
        return self._kind(name)[1]

    def chunks(self, name: str) -> Iterator[Tensor]:
        """See :class:`Source`."""
        tensor = self.tensors[name].detach()
        rows = max(1, CHUNK_BYTES * len(tensor) // max(self.nbytes(name), 1))
        return (part.cpu() for part in tensor.split(rows))


def open_source(source: str | Path | nn.Module | Mapping[str, Tensor]) -> Source:
    """Whatever ``diagnose`` takes, ready to be read in a ``with`` block."""
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
        settings = config.to_dict() if hasattr(config, "to_dict") else None
        return Memory(source.state_dict(), type(source).__name__, settings)
    if isinstance(source, Mapping):
        return Memory(source, "state dict", None)
    return Files(source)

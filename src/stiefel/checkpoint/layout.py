"""Where every byte of a checkpoint will lie, decided before the first is written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stiefel.checkpoint.errors import CheckpointError, quoted
from stiefel.checkpoint.header import DTYPE_NAMES, LENGTH_BYTES, MAX_HEADER_BYTES

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

Spec = tuple[str, torch.dtype, Sequence[int]]
"""Name, type and shape of a tensor to come."""


@dataclass(frozen=True)
class Slot:
    """The place of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: int
    start: int
    """Absolute offset in the shard."""
    nbytes: int

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class Shard:
    """One file: its name, the bytes before its tensors, its size."""

    file: str
    header: bytes
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """All files of a checkpoint."""

    shards: tuple[Shard, ...]
    slots: Mapping[str, Slot]
    index: str | None
    """Text of the index; None for a single file."""

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """Changes whenever a byte of any header or index would."""
        content = hashlib.sha256()
        for shard in self.shards:
            content.update(shard.file.encode() + b"\0" + shard.header)
        return content.hexdigest()


def plan_layout(
    tensors: Sequence[Spec], shard_bytes: float, metadata: Mapping[str, str] | None
) -> Layout:
    """Tensors to shards in the order given; a shard is closed before it exceeds ``shard_bytes``.

    A tensor never spans shards; one that is larger has a shard of its own. Inside a shard wider
    types come first, so that every tensor is aligned to its element size.

    Raises:
        CheckpointError: a name twice, a type that safetensors lacks, a header that is too long.
        ValueError: ``shard_bytes`` is not positive.
    """
    if not shard_bytes > 0:
        raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
    notes = {"format": "pt"} | dict(metadata or {})  # transformers insists on the format
    groups = _groups(_checked(tensors), shard_bytes)
    total = len(groups)
    shards, slots = [], {}
    for number, group in enumerate(groups):
        file = SINGLE_NAME
        if total > 1:
            file = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
        shard, held = _shard(file, number, group, notes)
        shards.append(shard)
        slots.update({slot.name: slot for slot in held})
    ordered = {name: slots[name] for name, _, _ in tensors}
    return Layout(tuple(shards), ordered, _index(shards, ordered) if total > 1 else None)


def _checked(tensors: Sequence[Spec]) -> list[tuple[str, torch.dtype, tuple[int, ...], int]]:
    seen: set[str] = set()
    checked = []
    for name, dtype, shape in tensors:
        if name in seen or name == "__metadata__":
            raise CheckpointError(f"two tensors cannot both be named {quoted(name)}")
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"tensor {quoted(name)}: safetensors has no type for {dtype}")
        seen.add(name)
        extents = tuple(int(extent) for extent in shape)
        checked.append((name, dtype, extents, math.prod(extents) * dtype.itemsize))
    return checked


def _groups(tensors: list, shard_bytes: float) -> list[list]:
    groups: list[list] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor[3] > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor[3]
    return groups


def _shard(file: str, number: int, group: list, notes: dict[str, str]) -> tuple[Shard, list[Slot]]:
    content: dict[str, object] = {"__metadata__": notes}
    position = 0
    places = []
    for name, dtype, shape, nbytes in sorted(group, key=lambda tensor: -tensor[1].itemsize):
        content[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        places.append((name, dtype, shape, position, nbytes))
        position += nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the header of {file} takes {len(text)} bytes, at most {MAX_HEADER_BYTES} are "
            "readable; choose smaller shards"
        )
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    slots = [
        Slot(name, dtype, shape, number, len(header) + start, nbytes)
        for name, dtype, shape, start, nbytes in places
    ]
    return Shard(file, header, len(header) + position), slots


def _index(shards: list[Shard], slots: Mapping[str, Slot]) -> str:
    content = {
        "metadata": {"total_size": sum(slot.nbytes for slot in slots.values())},
        "weight_map": {name: shards[slots[name].shard].file for name in sorted(slots)},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

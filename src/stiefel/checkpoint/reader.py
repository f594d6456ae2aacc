"""Reading safetensors: headers at once, tensors when asked for, nothing else ever."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from stiefel.checkpoint.errors import CheckpointError, listed, quoted
from stiefel.checkpoint.folder import Found, find_files, read_config
from stiefel.checkpoint.header import LENGTH_BYTES, TensorInfo, header_length, parse_header

_HASH_BYTES = 2**20
# Linux reads at most 2 GiB less a page at a time.
_MOST_AT_ONCE = 2**30


class Checkpoint:
    """A model on disk, of which only the headers are in memory.

    Tensors are read into memory of their own with positioned reads: nothing is mapped, so resident
    memory is what the caller holds, and threads may read at the same time. ``close`` (or leaving a
    ``with`` block) closes the files; a checkpoint that is dropped closes them as well.

    Args:
        path: A folder (single file, or shards with or without an index), an index, or one file.

    Attributes:
        path: As given.
        files: The safetensors files, sorted by name.
        tensors: Name → :class:`TensorInfo`, in the order of files and of bytes in them.
        metadata: ``__metadata__`` of all files together; where two differ, the first file's.
        config: Content of config.json beside the files; None without one.

    Raises:
        CheckpointError: whatever is wrong with the files, named.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptors: dict[Path, int] = {}
        self._states: dict[Path, tuple[int, int]] = {}
        try:
            found = find_files(self.path)
            self.files: tuple[Path, ...] = found.files
            tensors: dict[str, TensorInfo] = {}
            metadata: dict[str, str] = {}
            for file in self.files:
                held, notes = self._open(file)
                twice = sorted(tensors.keys() & held.keys())
                if twice:
                    raise CheckpointError(
                        f"{file} and {tensors[twice[0]].file} both hold {listed(twice)}"
                    )
                tensors.update(held)
                metadata = notes | metadata
            _check_index(found, tensors)
            self.config: dict[str, Any] | None = read_config(found.folder)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, in memory of its own.

        Raises:
            CheckpointError: no such tensor, or the file changed since it was opened.
        """
        info = self._info(name)
        return self._bytes(info, 0, info.nbytes, info.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """``tensor[start:stop]`` along the first dimension; no other byte is read.

        Raises:
            CheckpointError: no such tensor, a scalar, or the file changed since it was opened.
            IndexError: not 0 ≤ start ≤ stop ≤ number of rows.
        """
        info = self._info(name)
        if not info.shape:
            raise CheckpointError(f"tensor {quoted(name)} is a scalar and has no rows")
        count = info.shape[0]
        if not 0 <= start <= stop <= count:
            raise IndexError(
                f"rows {start}:{stop} of tensor {quoted(name)}, which has {count} rows"
            )
        row = info.nbytes // max(count, 1)
        return self._bytes(info, start * row, stop * row, (stop - start, *info.shape[1:]))

    def chunks(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        """The tensor's rows in order, as many at a time as fit ``max_bytes`` (at least one).

        A scalar comes as it is, in one piece. Raises as :meth:`rows` does.
        """
        info = self._info(name)
        if not info.shape:
            yield self.read(name)
            return
        count = info.shape[0]
        step = rows_within(info.nbytes, count, max_bytes)
        for start in range(0, count, step):
            yield self.rows(name, start, min(start + step, count))

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 (hexadecimal) of every file, by file name; read in pieces of 1 MiB."""
        return {file.name: self._hash(file) for file in self.files}

    def close(self) -> None:
        """Close the files; reading afterwards raises."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors)"

    def _open(self, file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        try:
            if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for its writer
                raise CheckpointError(f"{file} is not a regular file")
            descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._descriptors[file] = descriptor
            status = os.fstat(descriptor)
            self._states[file] = (status.st_size, status.st_mtime_ns)
            prefix = os.pread(descriptor, LENGTH_BYTES, 0)
            length = header_length(prefix, status.st_size, file)
            text = os.pread(descriptor, length, LENGTH_BYTES)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
        if len(text) < length:
            raise CheckpointError(f"{file} became shorter while its header was read")
        return parse_header(text, file, status.st_size)

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {quoted(name)}") from None

    def _descriptor(self, file: Path) -> int:
        try:
            return self._descriptors[file]
        except KeyError:
            raise CheckpointError(f"{self.path} is closed") from None

    def _bytes(self, info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        """Bytes start:stop of a tensor as its dtype, of ``shape``."""
        if stop == start:
            return torch.empty(shape, dtype=info.dtype)
        descriptor = self._descriptor(info.file)
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        view = buffer.numpy().data
        done = 0
        while done < len(view):
            piece = view[done : done + _MOST_AT_ONCE]
            try:
                got = os.preadv(descriptor, [piece], info.start + start + done)
            except OSError as error:
                raise CheckpointError(f"{info.file} cannot be read: {error.strerror}") from error
            if got == 0:
                break
            done += got
        self._check_unchanged(info.file)
        if done < len(view):
            raise CheckpointError(f"{info.file} ends inside tensor {quoted(info.name)}")
        if info.dtype == torch.bool and int(buffer.max()) > 1:
            raise CheckpointError(
                f"{info.file}: tensor {quoted(info.name)} holds a BOOL other than 0 and 1"
            )
        return buffer.view(info.dtype).reshape(shape)

    def _check_unchanged(self, file: Path) -> None:
        status = os.fstat(self._descriptor(file))
        if (status.st_size, status.st_mtime_ns) != self._states[file]:
            raise CheckpointError(f"{file} changed after it was opened; its tensors may be mixed")

    def _hash(self, file: Path) -> str:
        digest = hashlib.sha256()
        descriptor = self._descriptor(file)
        piece = memoryview(bytearray(_HASH_BYTES))
        position = 0
        while got := os.preadv(descriptor, [piece], position):
            digest.update(piece[:got])
            position += got
        self._check_unchanged(file)
        return digest.hexdigest()


def rows_within(nbytes: int, count: int, max_bytes: int) -> int:
    """How many of ``count`` rows that take ``nbytes`` together fit ``max_bytes``; at least one."""
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    return max(1, max_bytes * count // max(nbytes, 1))


def _check_index(found: Found, tensors: Mapping[str, TensorInfo]) -> None:
    """The index and the shards' headers tell the same."""
    if found.weight_map is None:
        return
    missing = [name for name in found.weight_map if name not in tensors]
    if missing:
        raise CheckpointError(f"{found.index} names {listed(missing)}, which no file holds")
    for name, info in tensors.items():
        said = found.weight_map.get(name)
        if said is None:
            raise CheckpointError(f"{found.index} leaves out {quoted(name)} of {info.file.name}")
        if said != info.file.name:
            raise CheckpointError(
                f"{found.index} says {quoted(name)} is in {quoted(said)}, it is in {info.file.name}"
            )

"""Writing safetensors tensor by tensor into a folder that appears whole or not at all.

Everything goes to ``OUT.partial`` beside the output. Tensors are written in any order, from any
thread, to places that the header, which comes first, has given them. What is known to be on the
disk is in a journal, so that an interrupted run goes on where it stopped. At the end the folder
takes its name in one step; until then an older output stays as it is.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from stiefel.checkpoint.errors import CheckpointError, listed, quoted
from stiefel.checkpoint.journal import JOURNAL_NAME, Journal
from stiefel.checkpoint.layout import INDEX_NAME, Slot, Spec, plan_layout
from stiefel.checkpoint.swap import (
    partial_folder,
    real_folder,
    recover,
    sync_folder,
    take_name,
)

_MOST_AT_ONCE = 2**30
_COPY_BYTES = 2**20
FLUSH_BYTES = 256_000_000
"""Tensors are forced to the disk, and entered in the journal, after this many bytes."""


class CheckpointWriter:
    """One writer of a checkpoint whose tensors are known by name, type and shape beforehand.

    ::

        with CheckpointWriter("out", [("w", torch.bfloat16, (4, 4))]) as writer:
            writer.write("w", tensor)

    Leaving the block without an error finishes the folder; leaving it with one keeps
    ``out.partial``, from which a writer with ``resume=True`` goes on.

    Args:
        folder: The output. The same tensors give the same bytes in it.
        tensors: Name, dtype and shape of each, in the order of the shards.
        shard_bytes: A file is closed before it exceeds this. More than one file get an index.
        metadata: Strings for every header, beside ``format: pt``.
        resume: Go on from ``folder.partial`` where it is there and was made for the same tensors
            and ``identity``; otherwise it is an error to find it different.
        identity: Whatever else the bytes depend on, as a string.
        overwrite: Let the output replace a folder that is not empty.
        flush_bytes: How much may have to be written again after a crash.

    Raises:
        CheckpointError: names twice, unknown types, a folder that is not empty and not to be
            overwritten, a partial output of something else, or another writer at work on it.
        OSError: the disk is too small (all space is reserved at once) or refuses.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensors: Sequence[Spec],
        *,
        shard_bytes: float = 5e9,
        metadata: Mapping[str, str] | None = None,
        resume: bool = False,
        identity: str = "",
        overwrite: bool = False,
        flush_bytes: int = FLUSH_BYTES,
    ) -> None:
        self.folder = real_folder(folder)
        self.partial = partial_folder(self.folder)
        self._layout = plan_layout(tensors, shard_bytes, metadata)
        self._flush_bytes = flush_bytes
        self._lock = threading.Lock()
        self._rows: dict[str, int] = {}
        self._notes: dict[str, dict[str, Any]] = {}
        self._whole: list[str] = []
        self._unsynced = 0
        self._descriptors: list[int] = []
        recover(self.folder)
        if not overwrite and _occupied(self.folder):
            raise CheckpointError(f"{self.folder} exists and is not empty")
        self._journal = Journal(self.partial, f"{self._layout.digest} {identity}", resume=resume)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    @property
    def done(self) -> Mapping[str, Mapping[str, Any]]:
        """Name → note of the tensors that an earlier run left whole on the disk."""
        return self._journal.entries

    @property
    def nbytes(self) -> int:
        """Size of all shards."""
        return self._layout.nbytes

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the shards."""
        return tuple(shard.file for shard in self._layout.shards)

    def write(self, name: str, tensor: Tensor, *, note: Mapping[str, Any] | None = None) -> None:
        """Write a whole tensor; see :meth:`write_rows` for ``note``.

        Raises:
            CheckpointError: unknown name, other shape or dtype than announced, or written before.
            OSError: the disk refuses.
        """
        slot = self._slot(name)
        if tuple(tensor.shape) != slot.shape:
            raise CheckpointError(
                f"tensor {quoted(name)} was announced with shape {slot.shape}, "
                f"got {tuple(tensor.shape)}"
            )
        self._put(slot, 0, slot.rows, tensor, note)

    def write_rows(
        self, name: str, start: int, tensor: Tensor, *, note: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``tensor`` as rows ``start:start + len(tensor)`` of ``name``.

        Rows may come in any order, each once; with the last of them the tensor is whole. ``note``
        (JSON-able) is then kept in the journal and is in :attr:`done` of a writer that resumes.

        Raises:
            CheckpointError: unknown name, rows that the tensor lacks, other type or row shape than
                announced, more rows than announced.
            OSError: the disk refuses.
        """
        slot = self._slot(name)
        if not slot.shape or tuple(tensor.shape[1:]) != slot.shape[1:] or tensor.ndim == 0:
            raise CheckpointError(
                f"tensor {quoted(name)} was announced with shape {slot.shape}, "
                f"got rows of shape {tuple(tensor.shape)}"
            )
        count = tensor.shape[0]
        if not 0 <= start <= start + count <= slot.rows:
            raise CheckpointError(
                f"rows {start}:{start + count} of tensor {quoted(name)}, which has {slot.rows}"
            )
        self._put(slot, start, count, tensor, note)

    def add_text(self, name: str, text: str) -> None:
        """A further file of the output (configuration, report)."""
        with open(self._beside(name), "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def add_file(self, name: str, source: str | os.PathLike[str]) -> None:
        """A further file of the output, copied from ``source``."""
        with open(source, "rb") as origin, open(self._beside(name), "wb") as file:
            shutil.copyfileobj(origin, file, _COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())

    def flush(self) -> None:
        """Force what is written to the disk and enter it in the journal."""
        with self._lock:
            self._flush()

    def commit(self) -> None:
        """Finish: all tensors are there, on the disk, and the folder takes its name.

        Raises:
            CheckpointError: tensors are missing.
            OSError: the disk refuses.
        """
        self.flush()
        missing = [name for name in self._layout.slots if name not in self._journal.entries]
        if missing:
            raise CheckpointError(f"{len(missing)} tensors were not written: {listed(missing)}")
        if self._layout.index is not None:
            self.add_text(INDEX_NAME, self._layout.index)
        sync_folder(self.partial)
        take_name(self.partial, self.folder)  # drops the journal, whose lock is held until then
        self.close()

    def close(self) -> None:
        """Close the files without finishing; ``folder.partial`` stays for a later run."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        self._journal.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.commit()
            elif not issubclass(kind, OSError):  # a disk that refuses would refuse this too
                self.flush()
        finally:
            self.close()

    def _prepare(self) -> None:
        """Files of the right size with their headers; the space is taken now, not at the end."""
        for shard in self._layout.shards:
            path = self.partial / shard.file
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._descriptors.append(descriptor)
            try:
                _reserve(descriptor, shard.nbytes)
            except OSError as error:
                raise _refused(error, path, f"{self.nbytes} bytes are needed") from error
            self._write_at(descriptor, path, memoryview(shard.header), 0)
        for slot in self._layout.slots.values():
            if slot.nbytes == 0 and slot.name not in self._journal.entries:
                self._whole.append(slot.name)

    def _slot(self, name: str) -> Slot:
        slot = self._layout.slots.get(name)
        if slot is None:
            raise CheckpointError(f"no tensor {quoted(name)} was announced")
        return slot

    def _put(
        self, slot: Slot, start: int, count: int, tensor: Tensor, note: Mapping[str, Any] | None
    ) -> None:
        name = slot.name
        if tensor.dtype != slot.dtype:
            raise CheckpointError(
                f"tensor {quoted(name)} was announced as {slot.dtype}, got {tensor.dtype}"
            )
        if slot.nbytes == 0:
            return
        if not self._descriptors:
            raise CheckpointError(f"the writer of {self.folder} is closed")
        with self._lock:
            rows = self._rows.get(name, 0) + count
            if rows > slot.rows or name in self._journal.entries:
                raise CheckpointError(f"tensor {quoted(name)} was written already")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        offset = slot.start + start * (slot.nbytes // slot.rows)
        path = self.partial / self._layout.shards[slot.shard].file
        self._write_at(self._descriptors[slot.shard], path, raw.numpy().data, offset)
        with self._lock:
            rows = self._rows.get(name, 0) + count
            self._rows[name] = rows
            if note is not None:
                self._notes[name] = dict(note)
            if rows == slot.rows:
                self._whole.append(name)
            self._unsynced += raw.numel()
            if self._unsynced >= self._flush_bytes:
                self._flush()

    def _write_at(self, descriptor: int, path: Path, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(descriptor, view[done : done + _MOST_AT_ONCE], offset + done)
            except OSError as error:
                raise _refused(error, path, "what is whole is kept for a resumed run") from error

    def _flush(self) -> None:
        """Tensors first, then the journal that vouches for them."""
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        self._journal.add({name: self._notes.pop(name, {}) for name in self._whole})
        self._whole.clear()
        self._unsynced = 0

    def _beside(self, name: str) -> Path:
        taken = {shard.file for shard in self._layout.shards} | {JOURNAL_NAME}
        if name in taken or Path(name).name != name:
            raise CheckpointError(f"{quoted(name)} cannot be the name of a further file")
        return self.partial / name


def _occupied(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _reserve(descriptor: int, nbytes: int) -> None:
    """Size and space of a file; where the system cannot reserve, only the size."""
    reserve = getattr(os, "posix_fallocate", None)
    if reserve is None:
        os.ftruncate(descriptor, nbytes)
    else:
        reserve(descriptor, 0, nbytes)


def _refused(error: OSError, path: Path, more: str) -> OSError:
    """The system's error with the path and what it means for the output."""
    return OSError(error.errno, f"{os.strerror(error.errno or 0)}; {more}", str(path))

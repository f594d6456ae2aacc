"""Which tensors of an unfinished output are whole on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stiefel.checkpoint.errors import CheckpointError

JOURNAL_NAME = ".stiefel-journal"


class Journal:
    """Lines of JSON in the partial folder: what the output is, then each tensor that is there.

    While it is open it is locked: a second process on the same output is refused, and a process
    that dies lets go of it.

    Args:
        folder: The partial folder; made if missing, emptied unless resumed.
        identity: The output that is being made; a resumed one must be the same.
        resume: Keep what is there.

    Raises:
        CheckpointError: another process holds it, it is of another output, or the folder was not
            made by a writer.
    """

    def __init__(self, folder: Path, identity: str, *, resume: bool) -> None:
        self.entries: dict[str, Mapping[str, Any]] = {}
        self._path = folder / JOURNAL_NAME
        if folder.exists() and not self._path.exists() and any(folder.iterdir()):
            raise CheckpointError(
                f"{folder} is in the way: it is no partial output; move it elsewhere"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock(folder)
            head = json.dumps({"output": hashlib.sha256(identity.encode()).hexdigest()})
            if resume and os.fstat(self._file).st_size:
                self._take_up(folder, head)
            else:
                self._start(folder, head)
        except BaseException:
            self.close()
            raise

    def add(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Enter tensors that are on the disk; returns when the entries are, too."""
        if not entries:
            return
        lines = [json.dumps({"tensor": name, "note": note}) for name, note in entries.items()]
        self._append("".join(f"{line}\n" for line in lines))
        self.entries.update(entries)

    def close(self) -> None:
        """Let go of the journal."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _lock(self, folder: Path) -> None:
        import fcntl  # POSIX only, and reading checkpoints should work without it

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is writing to {folder}") from None

    def _start(self, folder: Path, head: str) -> None:
        for entry in folder.iterdir():
            if entry.name == JOURNAL_NAME:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        os.ftruncate(self._file, 0)
        self._append(f"{head}\n")

    def _take_up(self, folder: Path, head: str) -> None:
        """Read what an earlier run entered; a last line without its end was being written."""
        text = os.pread(self._file, os.fstat(self._file).st_size, 0)
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", errors="replace").splitlines()
        if lines[:1] != [head]:
            raise CheckpointError(
                f"{folder} is the unfinished output of another recipe, other inputs or another "
                "version; start without resuming to replace it"
            )
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                self.entries[entry["tensor"]] = entry["note"]
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(
                    f"{self._path} is damaged; start without resuming to replace the output"
                ) from None
        os.ftruncate(self._file, len(whole))

    def _append(self, text: str) -> None:
        data = memoryview(text.encode())
        position = os.fstat(self._file).st_size
        while data:
            written = os.pwrite(self._file, data, position)
            data, position = data[written:], position + written
        os.fsync(self._file)

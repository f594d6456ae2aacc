"""Giving a finished folder its name in one step, and cleaning up after a crash around it."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from stiefel.checkpoint.errors import CheckpointError
from stiefel.checkpoint.journal import JOURNAL_NAME

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def real_folder(folder: str | os.PathLike[str]) -> Path:
    """``folder`` without links and dots, so that names beside it are on its file system.

    Raises:
        CheckpointError: the root of the file system, which has nothing beside it.
    """
    real = Path(os.path.realpath(folder))
    if not real.name:
        raise CheckpointError(f"{folder} cannot be an output; give a folder below it")
    return real


def partial_folder(folder: Path) -> Path:
    """Where the output ``folder`` is made."""
    return folder.with_name(f"{folder.name}.partial")


def take_name(made: Path, folder: Path) -> None:
    """Rename ``made``, which holds its journal, to ``folder`` and drop what was there.

    Linux exchanges two names in one step, so that there is a complete output at every moment.
    Elsewhere the old one steps aside first. :func:`recover` ends either after a crash.
    """
    aside = _aside(folder)
    if not folder.exists():
        os.rename(made, folder)
    else:
        os.rename(made, aside)
        if not _exchange(aside, folder):
            os.rename(aside, made)
            os.rename(folder, aside)
            os.rename(made, folder)
    sync_folder(folder.parent)
    _drop_journal(folder)
    if aside.exists():
        shutil.rmtree(aside)


def recover(folder: Path) -> None:
    """Bring an output and its partial folder back to where a crash in :func:`take_name` was.

    What stands aside is the new output if it has a journal, otherwise the old one.
    """
    aside = _aside(folder)
    if aside.exists():
        if (aside / JOURNAL_NAME).exists():
            os.rename(aside, partial_folder(folder))
        elif folder.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, folder)
    _drop_journal(folder)


def sync_folder(folder: Path) -> None:
    """Force the names in ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.stiefel-aside")


def _drop_journal(folder: Path) -> None:
    if (folder / JOURNAL_NAME).is_file():
        (folder / JOURNAL_NAME).unlink()
        sync_folder(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Whether the system swapped the two names in one step."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0

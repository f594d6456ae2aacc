"""Files on disk that are either whole or absent."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that a reader, or a crash, never sees half of it.

    Line ends stay as they are. See :func:`write_bytes`.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` so that a reader, or a crash, never sees half of it.

    Missing folders are made. The bytes go to a hidden temporary file beside ``path``, reach the
    disk, and take the name in one step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp gives 0600; results are meant to be read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, *, allow_nan: bool = False) -> None:
    """Write ``value`` as JSON, atomically.

    Args:
        path: Where to.
        value: Anything that :func:`json.dumps` takes.
        allow_nan: Write NaN and infinities as Python's JSON reads them. They are not JSON, so this
            is only for files that nothing else reads.

    Raises:
        ValueError: ``value`` holds NaN or an infinity and ``allow_nan`` is false.
        TypeError: ``value`` holds something that JSON has no word for.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=allow_nan) + "\n")

"""Real text without a download: the source of Python's own standard library."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

# The share of the text that is trained on, and how far a file boundary may lie from it.
TRAIN_SHARE = 0.9
BOUNDARY_WINDOW = (0.8, 0.95)


class MissingDataError(RuntimeError):
    """Data that should come with something installed here is not on this machine."""


@dataclass(frozen=True)
class Text:
    """Bytes as tokens (vocabulary 256), split for training and validation."""

    train: UInt8[Tensor, " train"]
    validation: UInt8[Tensor, " validation"]
    source: str
    """What the bytes are."""
    version: str
    """Version of the package they come from; other versions hold other bytes."""
    sha256: str
    """Checksum of the training bytes followed by the validation bytes."""
    licence: str
    split: Literal["file", "position"]
    """``file``: no file has bytes on both sides; ``position``: no file boundary was near."""


def python_source(limit: int | None = 2_000_000, *, folder: Path | None = None) -> Text:
    """The top-level ``*.py`` files of Python's standard library, sorted by name, as bytes.

    The last tenth is for validation. The cut is moved to the file boundary nearest to 90 %, if one
    lies between 80 % and 95 %, so that a file's repeated idioms do not stand on both sides.
    The text differs between Python versions: compare losses within one version only.

    Args:
        limit: Number of bytes, counted from the first file; None takes all of them.
        folder: Where the files are; None means this interpreter's standard library.

    Raises:
        ValueError: ``limit`` is below 10.
        MissingDataError: the folder has no ``*.py`` files or fewer than ``limit`` bytes of them, as
            with embedded, zipped or minimal Pythons.
    """
    if limit is not None and limit < 10:
        raise ValueError(f"limit must be at least 10 bytes, or None for all; got {limit}")
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    pieces: list[bytes] = []
    size = 0
    for path in sorted(folder.glob("*.py")):
        if limit is not None and size >= limit:
            break
        piece = path.read_bytes()
        pieces.append(piece if limit is None else piece[: limit - size])
        size += len(pieces[-1])
    if size < (limit or 10):
        raise MissingDataError(
            f"{folder} holds {size:,} bytes of *.py files, {limit or 10:,} are needed. This Python "
            "comes without its library's source (embedded, zipped or minimal); use a full one, "
            "on Debian and Ubuntu: apt install libpython3-stdlib"
        )

    cut, split = _boundary([len(piece) for piece in pieces], size)
    raw = b"".join(pieces)
    tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return Text(
        train=tokens[:cut],
        validation=tokens[cut:],
        source="top-level source files of Python's standard library",
        version=f"{platform.python_implementation()} {platform.python_version()}",
        sha256=hashlib.sha256(raw).hexdigest(),
        licence="PSF-2.0 (Python Software Foundation License), read in place",
        split=split,
    )


def _boundary(lengths: list[int], size: int) -> tuple[int, Literal["file", "position"]]:
    """Where to cut: the file start nearest to 90 %, or 90 % exactly if none is near."""
    target = TRAIN_SHARE * size
    low, high = (share * size for share in BOUNDARY_WINDOW)
    starts, start = [], 0
    for length in lengths:
        if low <= start <= high:
            starts.append(start)
        start += length
    if starts:
        return min(starts, key=lambda s: abs(s - target)), "file"
    return int(target), "position"

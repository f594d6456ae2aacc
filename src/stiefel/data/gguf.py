"""GGUF files (versions 2 and 3), read with suspicion: header, metadata, dequantised tensors.

A file is a magic word, a version, the counts of tensors and of metadata entries, the entries
(name, type, value), the tensors' descriptions (name, extents, type, offset), padding, and the
tensors' bytes. Everything is little-endian. Whatever the header says is checked against the size
of the file before memory is taken for it.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Of the tensors' offsets, where ``general.alignment`` does not say another."""

# Bounds on what a header may ask for. The specification allows names of 64 bytes for tensors and
# 65,535 for metadata; real vocabularies hold some 300,000 words.
MOST_TENSORS = 2**16
MOST_ENTRIES = 2**16
MOST_STRINGS = 2**21
MOST_NAME_BYTES = 2**16 - 1
MOST_DIMENSIONS = 4
MOST_ALIGNMENT = 2**16

# Metadata types with a fixed size: number in the file → NumPy type.
SCALARS: Mapping[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9


def _plain(raw: np.ndarray) -> np.ndarray:
    return raw.astype(np.float32)


def _halves(raw: np.ndarray) -> np.ndarray:
    """The two bytes at the start of each block as float16, widened: ``[blocks, 1]``."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """d·q + m: low nibbles are weights 0–15 of a block of 32, high nibbles 16–31."""
    blocks = raw.reshape(-1, 20)
    scale, least = _halves(blocks[:, :2]), _halves(blocks[:, 2:4])
    nibbles = blocks[:, 4:]
    values = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32)
    values *= scale
    values += least
    return values


def _q8_0(raw: np.ndarray) -> np.ndarray:
    """d·q with signed bytes q, 32 to a block."""
    blocks = raw.reshape(-1, 34)
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _halves(blocks[:, :2])


@dataclass(frozen=True)
class Encoding:
    """How weights are stored: ``block`` of them in ``block_bytes``."""

    name: str
    block: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]
    """Bytes to float32."""


ENCODINGS: Mapping[int, Encoding] = {
    0: Encoding("F32", 1, 4, lambda raw: _plain(raw.view("<f4"))),
    1: Encoding("F16", 1, 2, lambda raw: _plain(raw.view("<f2"))),
    3: Encoding("Q4_1", 32, 20, _q4_1),
    8: Encoding("Q8_0", 32, 34, _q8_0),
}
"""Number in the file → encoding. Others are refused by name of their number."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """As torch has it, the fastest extent last (the file holds it first)."""
    encoding: Encoding
    start: int
    """Absolute offset of its first byte."""
    stop: int


class GGUF:
    """A GGUF file: metadata at once, tensors when asked for.

    The file is mapped into memory, so only what is read is loaded. Use it as a context manager, or
    call :meth:`close`.

    Attributes:
        metadata: Name → str, int, float, bool, list of str, or NumPy array of numbers.
        tensors: Name → :class:`GGUFTensor`.

    Raises:
        ValueError: not a GGUF file, truncated, or with sizes and offsets that cannot be true.
        FileNotFoundError: no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size < 24:
                raise ValueError(f"{self.path} is not a GGUF file: it has {status.st_size} bytes")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            metadata, tensors = _Header(self._map, str(self.path)).parse()
        except BaseException:
            self.close()
            raise
        self.metadata: Mapping[str, Any] = MappingProxyType(metadata)
        self.tensors: Mapping[str, GGUFTensor] = MappingProxyType(tensors)

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` as float32, in memory of its own.

        Raises:
            KeyError: no such tensor.
            ValueError: it holds a NaN or an infinity, or the file is closed.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        info = self.tensors[name]
        raw = np.frombuffer(self._map[info.start : info.stop], dtype=np.uint8)
        values = info.encoding.decode(raw).reshape(info.shape)
        if not np.isfinite(values).all():
            raise ValueError(f"{self.path}: tensor {name!r} holds NaN or infinite weights")
        return torch.from_numpy(values)

    def close(self) -> None:
        """Unmap the file; what was read stays valid."""
        self._map.close()

    def __enter__(self) -> GGUF:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Header:
    """A cursor over the bytes that never reads past their end."""

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self.data = data
        self.path = path
        self.at = 0
        self.strings = 0

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what} (byte {self.at})")

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise self.error(
                f"{what} claims {count} bytes, only {len(self.data) - self.at} follow; the file "
                "is truncated or damaged"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str, most: int | None = None) -> str:
        count = self.number("<Q", what)
        if most is not None and count > most:
            raise self.error(f"{what} claims {count} bytes, at most {most} are allowed")
        try:
            return self.take(count, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 text: {error.reason}") from None

    def parse(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if self.take(4, "the magic word") != MAGIC:
            raise ValueError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'")
        version = self.number("<I", "the version")
        if version not in VERSIONS:
            raise self.error(f"version {version} is unknown; known are 2 and 3, little-endian")
        tensor_count = self.number("<Q", "the number of tensors")
        entry_count = self.number("<Q", "the number of metadata entries")
        for count, most, what in (
            (tensor_count, MOST_TENSORS, "tensors"),
            (entry_count, MOST_ENTRIES, "metadata entries"),
        ):
            if count > most:
                raise self.error(f"claims {count} {what}, at most {most} are allowed")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            name = self.string("the name of a metadata entry", MOST_NAME_BYTES)
            if name in metadata:
                raise self.error(f"metadata {name!r} comes twice")
            metadata[name] = self.value(self.number("<I", "a metadata type"), f"metadata {name!r}")
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if (
            type(alignment) is not int
            or not 0 < alignment <= MOST_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise self.error(
                f"general.alignment must be a power of two up to {MOST_ALIGNMENT}, "
                f"got {str(alignment)[:40]}"
            )
        described = [self.tensor() for _ in range(tensor_count)]
        start = -(-self.at // alignment) * alignment
        return metadata, self.placed(described, start, alignment)

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind in SCALARS:
            return self.numbers(kind, 1, what)[0].item()
        if kind != ARRAY:
            raise self.error(f"{what} has type {kind}, which does not exist")
        kind = self.number("<I", f"the type of {what}")
        count = self.number("<Q", f"the length of {what}")
        if kind == STRING:
            self.strings += count
            if self.strings > MOST_STRINGS:
                raise self.error(f"{what} makes more than {MOST_STRINGS} strings in the file")
            return [self.string(what) for _ in range(count)]
        if kind in SCALARS:
            return self.numbers(kind, count, what)
        raise self.error(f"{what} is an array of type {kind}; arrays of arrays are not supported")

    def numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        form = np.dtype(SCALARS[kind])
        raw = self.take(count * form.itemsize, what)
        if kind == BOOL and raw.strip(b"\0\1"):
            raise self.error(f"{what} holds a truth value other than 0 and 1")
        return np.frombuffer(raw, dtype=form)

    def tensor(self) -> tuple[str, tuple[int, ...], Encoding, int]:
        name = self.string("the name of a tensor", MOST_NAME_BYTES)
        what = f"tensor {name[:80]!r}"
        dimensions = self.number("<I", f"the dimensions of {what}")
        if dimensions > MOST_DIMENSIONS:
            raise self.error(f"{what} has {dimensions} dimensions, at most {MOST_DIMENSIONS}")
        extents = tuple(self.number("<Q", f"an extent of {what}") for _ in range(dimensions))
        if 0 in extents:
            raise self.error(f"{what} is empty: its extents are {extents}")
        kind = self.number("<I", f"the type of {what}")
        if kind not in ENCODINGS:
            known = ", ".join(f"{n} ({e.name})" for n, e in ENCODINGS.items())
            raise self.error(f"{what} has type {kind}; supported are {known}")
        encoding = ENCODINGS[kind]
        if encoding.block > 1 and (not extents or extents[0] % encoding.block):
            raise self.error(
                f"{what} is stored in blocks of {encoding.block}, which its extents {extents} "
                "do not fill"
            )
        return name, extents[::-1], encoding, self.number("<Q", f"the offset of {what}")

    def placed(
        self,
        described: list[tuple[str, tuple[int, ...], Encoding, int]],
        start: int,
        alignment: int,
    ) -> dict[str, GGUFTensor]:
        """Tensors with absolute offsets: inside the file, aligned, apart, each name once."""
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, encoding, offset in described:
            what = f"tensor {name[:80]!r}"
            size = math.prod(shape) // encoding.block * encoding.block_bytes
            if offset % alignment:
                raise self.error(f"{what} begins at {offset}, not a multiple of {alignment}")
            if start + offset + size > len(self.data):
                raise self.error(
                    f"{what} ends at byte {start + offset + size}, the file at {len(self.data)}; "
                    "it is truncated or damaged"
                )
            if name in tensors:
                raise self.error(f"{what} comes twice")
            tensors[name] = GGUFTensor(name, shape, encoding, start + offset, start + offset + size)
        ordered = sorted(tensors.values(), key=lambda info: info.start)
        for before, after in pairwise(ordered):
            if after.start < before.stop:
                raise self.error(f"tensors {before.name[:80]!r} and {after.name[:80]!r} overlap")
        return tensors

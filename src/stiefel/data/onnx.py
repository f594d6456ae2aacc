"""The stored tensors of an ONNX file: just enough of its protocol buffers, read with suspicion.

A model (field 7 of the file) is a graph whose fields 5 are named tensors: extents (field 1), type
(2), name (8) and raw little-endian bytes (9). Everything else is stepped over. Tensors in lists of
numbers, in external files or in ``Constant`` nodes are not read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

GRAPH, INITIALIZER = 7, 5
EXTENTS, TYPE, NAME, RAW, LOCATION = 1, 2, 8, 9, 14
TYPES = {1: "<f4", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_LARGEST = 2**31


def onnx_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Name → array of every float32, float16, float64, int32 and int64 initializer.

    The arrays are read-only views of one buffer.

    Raises:
        ValueError: not such a file, truncated, or a tensor whose bytes do not fit its extents.
        FileNotFoundError: no such file.
    """
    data = memoryview(Path(path).read_bytes())
    graphs = [body for field, body in _fields(data, path) if field == GRAPH]
    if len(graphs) != 1 or not isinstance(graphs[0], memoryview):
        raise ValueError(f"{path} is not an ONNX model: it has {len(graphs)} graphs")
    found: dict[str, np.ndarray] = {}
    for field, body in _fields(graphs[0], path):
        if field == INITIALIZER and isinstance(body, memoryview):
            named = _tensor(body, path)
            if named is not None:
                if named[0] in found:
                    raise ValueError(f"{path}: tensor {named[0]!r} comes twice")
                found[named[0]] = named[1]
    if not found:
        raise ValueError(f"{path} holds no tensors that can be read here")
    return found


def _tensor(body: memoryview, path: object) -> tuple[str, np.ndarray] | None:
    extents: list[int] = []
    kind, name, raw = 0, "", None
    for field, value in _fields(body, path):
        if field == EXTENTS:
            packed = isinstance(value, memoryview)
            extents += list(_varints(value, path)) if packed else [value]
        elif field == TYPE and isinstance(value, int):
            kind = value
        elif field == NAME and isinstance(value, memoryview):
            name = bytes(value).decode("utf-8", errors="replace")
        elif field == RAW and isinstance(value, memoryview):
            raw = value
        elif field == LOCATION and value:
            return None  # in a file beside this one
    if raw is None or kind not in TYPES:
        return None
    form = np.dtype(TYPES[kind])
    if len(extents) > 8 or any(not 0 <= extent < _LARGEST for extent in extents):
        raise ValueError(f"{path}: tensor {name!r} has impossible extents {extents[:8]}")
    if math.prod(extents) * form.itemsize != len(raw):
        raise ValueError(
            f"{path}: tensor {name!r} of extents {extents} and type {form} has {len(raw)} bytes"
        )
    return name, np.frombuffer(raw, dtype=form).reshape(extents)


def _fields(data: memoryview, path: object) -> Iterator[tuple[int, int | memoryview]]:
    """Number and content of each field of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at, path)
        field, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(data, at, path)
            yield field, value
            continue
        if wire == BYTES:
            size, at = _varint(data, at, path)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"{path} is not an ONNX model: wire type {wire} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"{path} is truncated or not an ONNX model: a field of {size} bytes")
        yield field, data[at : at + size]
        at += size


def _varints(data: memoryview, path: object) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at, path)
        yield value


def _varint(data: memoryview, at: int, path: object) -> tuple[int, int]:
    """Seven bits a byte, lowest first, while the top bit is set."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError(f"{path} is truncated or not an ONNX model")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"{path} is not an ONNX model: a number of more than ten bytes")

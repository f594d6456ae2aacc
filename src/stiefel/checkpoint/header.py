"""The header of a safetensors file, parsed with suspicion.

A file is 8 bytes of little-endian length N, N bytes of JSON, then the tensors' bytes. The JSON maps
each name to ``{"dtype", "shape", "data_offsets": [begin, end]}`` (relative to the end of the
header); ``__metadata__`` holds strings. Everything the header says is checked against the size of
the file before it is believed, so that no later read can miss, and the work and memory that a
hostile header costs are bounded before it is parsed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stiefel.checkpoint.errors import CheckpointError, listed, quoted

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""safetensors' names of the types that have whole bytes."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

PACKED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")
"""Several numbers share a byte; torch has no elementwise tensors of them."""

LENGTH_BYTES = 8
# A tensor takes some 110 bytes of header: room for 150,000 tensors in one file. Python's objects
# take up to 25 times their JSON, which is what bounds this.
MAX_HEADER_BYTES = 16 * 2**20
# The shortest entry, "":{"dtype":"U8","shape":[],"data_offsets":[0,0]}, has a bracket or a colon
# on 12 bytes at most; lists of empty lists would cost 60 bytes of memory for every 3 of JSON.
_BYTES_PER_BRACKET = 10
_SLACK = 64
_LARGEST = 2**63 - 1
_MOST_DIMENSIONS = 64

_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, probably a PyTorch pickle"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"version ", "a Git LFS pointer: fetch the real file with `git lfs pull`"),
    (b"<!DOCTYP", "a web page, not the download that it was meant to be"),
    (b"<html", "a web page, not the download that it was meant to be"),
    (b"\x89HDF", "an HDF5 file"),
)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, as the header says and the file's size confirms."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    """Absolute offset of the first byte."""
    stop: int
    """Absolute offset behind the last byte."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


def header_length(prefix: bytes, file_bytes: int, file: Path) -> int:
    """N from the first 8 bytes of a file, if the file can be safetensors at all.

    Raises:
        CheckpointError: too short, another format, or a length that the file does not have.
    """
    for magic, what in _FOREIGN:
        if prefix.startswith(magic):
            raise CheckpointError(f"{file} is not safetensors but {what}")
    if file_bytes < LENGTH_BYTES + 2:
        raise CheckpointError(
            f"{file} is truncated or not safetensors: it has {file_bytes} bytes, "
            "the smallest file has 10"
        )
    length = int.from_bytes(prefix, "little")
    if length < 2:
        raise CheckpointError(f"{file} is not safetensors: its header claims {length} bytes")
    if length > file_bytes - LENGTH_BYTES:
        raise CheckpointError(
            f"{file} is truncated or not safetensors: its header claims {length} bytes, "
            f"only {file_bytes - LENGTH_BYTES} follow"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: the header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )
    return length


def parse_header(
    text: bytes, file: Path, file_bytes: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors in the order of their bytes, and the metadata, of a header.

    Args:
        text: The N bytes of JSON.
        file: Named in messages and in the results.
        file_bytes: Size of the whole file.

    Raises:
        CheckpointError: anything that is not a valid header of a file of that size.
    """
    content = load_json(text, f"{file}: the header", _BYTES_PER_BRACKET)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{file}: the header must begin with '{{', not with white space")
    metadata = _metadata(content.pop("__metadata__", {}), file)
    data_start = LENGTH_BYTES + len(text)
    infos = [_tensor(name, entry, file, data_start) for name, entry in content.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_cover(infos, file, data_start, file_bytes)
    return {info.name: info for info in infos}, metadata


def load_json(text: bytes, what: str, bytes_per_bracket: int) -> dict[str, Any]:
    """A JSON object with unique keys, parsed only if its structure is as thin as it should be.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, too deep, too dense, repeated keys.
    """
    allowed = _SLACK + len(text) // bytes_per_bracket
    for sign in (b"[{", b":"):
        found = sum(text.count(bytes([byte])) for byte in sign)
        if found > allowed:
            raise CheckpointError(
                f"{what} has {found} of {sign.decode()!r} in {len(text)} bytes, far more than "
                "a list of tensors needs"
            )
    try:
        content = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8 text: {error.reason}") from None
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply") from None
    except CheckpointError as error:
        raise CheckpointError(f"{what} {error}") from None
    except ValueError as error:  # JSONDecodeError, and integers of more than 4,300 digits
        raise CheckpointError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} must be a JSON object, got {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise CheckpointError(f"names {quoted(key)} twice")
            seen.add(key)
    return found


def _no_constant(name: str) -> Any:
    raise CheckpointError(f"holds {name}, which is not JSON")


def _metadata(content: Any, file: Path) -> dict[str, str]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: __metadata__ must be an object of strings")
    bad = [key for key, value in content.items() if not isinstance(value, str)]
    if bad:
        raise CheckpointError(f"{file}: __metadata__ must hold strings; not one: {listed(bad)}")
    return content


def _tensor(name: str, entry: Any, file: Path, data_start: int) -> TensorInfo:
    where = f"{file}: tensor {quoted(name)}"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"{where} has a name that is not valid text") from None
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        got = listed(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
        raise CheckpointError(
            f"{where} must be described by dtype, shape and data_offsets, got {got}"
        )
    dtype = _dtype(entry["dtype"], where)
    shape = _whole_numbers(entry["shape"], f"{where}: shape")
    if len(shape) > _MOST_DIMENSIONS:
        raise CheckpointError(f"{where} has {len(shape)} dimensions, at most {_MOST_DIMENSIONS}")
    offsets = _whole_numbers(entry["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets must be [begin, end] with begin ≤ end, "
            f"got {quoted(list(offsets[:8]))}"
        )
    begin, end = offsets
    size = dtype.itemsize
    for extent in shape:
        size *= max(extent, 1)
        if size > _LARGEST:
            raise CheckpointError(f"{where}: shape {quoted(list(shape))} is too large to exist")
    size = 0 if 0 in shape else size
    if end - begin != size:
        raise CheckpointError(
            f"{where}: {entry['dtype']} of shape {quoted(list(shape))} takes {size} bytes, "
            f"its data_offsets span {end - begin}"
        )
    return TensorInfo(name, dtype, shape, file, data_start + begin, data_start + end)


def _dtype(name: Any, where: str) -> torch.dtype:
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        why = "packs several numbers in a byte" if name in PACKED_DTYPES else "is unknown"
        raise CheckpointError(
            f"{where}: dtype {quoted(name)} {why}; supported are {', '.join(DTYPES)}"
        )
    return dtype


def _whole_numbers(value: Any, what: str) -> tuple[int, ...]:
    # type() rather than isinstance: true and false are ints in Python.
    if not isinstance(value, list) or not all(
        type(item) is int and 0 <= item <= _LARGEST for item in value
    ):
        raise CheckpointError(f"{what} must be a list of whole numbers from 0 to 2^63 - 1")
    return tuple(value)


def _check_cover(infos: list[TensorInfo], file: Path, data_start: int, file_bytes: int) -> None:
    """The tensors fill the file from the header to its end, once."""
    position, before = data_start, "the header"
    for info in infos:
        if info.start < position:
            raise CheckpointError(
                f"{file}: tensor {quoted(info.name)} overlaps {before} "
                f"by {position - info.start} bytes"
            )
        if info.start > position:
            raise CheckpointError(
                f"{file}: {info.start - position} bytes between {before} and tensor "
                f"{quoted(info.name)} belong to no tensor"
            )
        if info.stop > file_bytes:
            raise CheckpointError(
                f"{file} is truncated: tensor {quoted(info.name)} ends at byte {info.stop}, "
                f"the file at {file_bytes}"
            )
        position, before = info.stop, f"tensor {quoted(info.name)}"
    if position != file_bytes:
        raise CheckpointError(
            f"{file}: {file_bytes - position} bytes behind {before} belong to no tensor"
        )

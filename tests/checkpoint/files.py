"""Safetensors files built byte by byte, right ones and wrong ones."""

import json
import struct
from pathlib import Path


def encode(header, data=b""):
    """A file from a header (object or raw bytes) and the tensors' bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {
    "__metadata__": {"format": "pt"},
    "a": entry("F32", [2, 2], 0, 16),
    "b": entry("BF16", [3], 16, 22),
    "c": entry("BOOL", [2], 22, 24),
}
GOOD_DATA = bytes(22) + b"\1\0"


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path

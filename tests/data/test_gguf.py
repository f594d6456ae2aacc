"""GGUF files made here, read back, and damaged in every way that a header allows."""

import struct

import numpy as np
import pytest
import torch

from stiefel.data import GGUF
from stiefel.data.gguf import MOST_STRINGS, MOST_TENSORS


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(name, kind, payload):
    return text(name) + struct.pack("<I", kind) + payload


def strings(values):
    return struct.pack("<IQ", 8, len(values)) + b"".join(text(v) for v in values)


def described(name, extents, kind, offset):
    head = text(name) + struct.pack("<I", len(extents))
    return head + struct.pack(f"<{len(extents)}Q", *extents) + struct.pack("<IQ", kind, offset)


def q8_0(rng, blocks):
    scale = rng.normal(size=blocks).astype("<f2")
    q = rng.integers(-128, 128, (blocks, 32)).astype(np.int8)
    raw = b"".join(s.tobytes() + row.tobytes() for s, row in zip(scale, q, strict=True))
    return raw, scale.astype(np.float32)[:, None] * q


def q4_1(rng, blocks):
    """Packed the slow way, one weight at a time."""
    raw, values = b"", []
    for _ in range(blocks):
        d, m = rng.normal(size=2).astype("<f2")
        q = rng.integers(0, 16, 32)
        raw += d.tobytes() + m.tobytes() + bytes(int(q[j] + 16 * q[j + 16]) for j in range(16))
        values.append([np.float32(d) * np.float32(x) + np.float32(m) for x in q])
    return raw, np.array(values, dtype=np.float32)


def build(*, entries=None, tensors=None, tail=b"", version=3, counts=None):
    """A file of two metadata entries and four tensors, or of the parts given."""
    if entries is None:
        entries = [
            entry("general.architecture", 8, text("llama")),
            entry("width", 4, struct.pack("<I", 7)),
            entry("base", 6, struct.pack("<f", 0.5)),
            entry("add", 7, b"\1"),
            entry("words", 9, strings(["a", "é", ""])),
            entry("kinds", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
        ]
    if tensors is None:
        tensors = [
            described("half", [3], 1, 0),
            described("whole", [3, 2], 0, 32),
            described("eight", [32, 2], 8, 64),
            described("four", [64, 1], 3, 160),
        ]
    counts = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*entries, *tensors])
    return head + bytes(-len(head) % 32) + tail


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    half = rng.normal(size=3).astype("<f2")
    whole = rng.normal(size=(2, 3)).astype("<f4")
    eight, eights = q8_0(rng, 2)
    four, fours = q4_1(rng, 2)
    data = b""
    for piece, offset in ((half.tobytes(), 0), (whole.tobytes(), 32), (eight, 64), (four, 160)):
        data += bytes(offset - len(data)) + piece
    expected = {"half": half, "whole": whole, "eight": eights, "four": fours.reshape(1, 64)}
    return build(tail=data), expected


def opened(tmp_path, raw):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    return GGUF(path)


def test_metadata_and_every_encoding(tmp_path, sample):
    raw, expected = sample
    with opened(tmp_path, raw) as file:
        words = file.metadata.pop("words") if isinstance(file.metadata, dict) else None
        assert words is None  # a read-only view
        assert file.metadata["general.architecture"] == "llama"
        assert (file.metadata["width"], file.metadata["base"]) == (7, 0.5)
        assert file.metadata["add"] is True
        assert file.metadata["words"] == ["a", "é", ""]
        assert file.metadata["kinds"].tolist() == [1, -2, 3]
        assert set(file.tensors) == set(expected)
        read = {name: file.read(name) for name in expected}
    for name, values in expected.items():  # after the file is closed
        assert read[name].dtype == torch.float32
        np.testing.assert_array_equal(read[name].numpy(), values.astype(np.float32))


def test_alignment_of_the_file_is_followed(tmp_path):
    entries = [entry("general.alignment", 4, struct.pack("<I", 128))]
    raw = build(entries=entries, tensors=[described("x", [2], 0, 0)])
    start = -(-len(raw.rstrip(b"\0")) // 128) * 128
    raw = raw[:start].ljust(start, b"\0") + struct.pack("<2f", 1, 2)
    with opened(tmp_path, raw) as file:
        assert file.read("x").tolist() == [1, 2]


def test_tensors_are_asked_for_by_name_and_must_be_finite(tmp_path):
    raw = build(tensors=[described("x", [2], 0, 0)], tail=struct.pack("<2f", 1, float("nan")))
    with opened(tmp_path, raw) as file:
        with pytest.raises(KeyError, match="no tensor 'y'"):
            file.read("y")
        with pytest.raises(ValueError, match="NaN or infinite"):
            file.read("x")


ONE = [described("x", [2], 0, 0)]
EIGHT = struct.pack("<2f", 1, 2)
DAMAGED = {
    "has 4 bytes": b"GGUF",
    "does not begin with 'GGUF'": build(tail=bytes(400)).replace(b"GGUF", b"GGML"),
    "version 9 is unknown": build(version=9, tail=bytes(400)),
    "version 50331648 is unknown": build(version=3 << 24, tail=bytes(400)),  # big-endian
    "claims 70000 tensors": build(counts=(70000, 0)),
    f"at most {MOST_TENSORS}": build(counts=(0, 2**63)),
    "claims 9999999 bytes": build(entries=[text("a") + struct.pack("<IQ", 8, 9999999)], tensors=[]),
    "not UTF-8": build(entries=[entry("a", 8, struct.pack("<Q", 1) + b"\xff")], tensors=[]),
    "comes twice": build(entries=[entry("a", 0, b"\1")] * 2, tensors=[]),
    "type 13, which does not exist": build(entries=[entry("a", 13, b"")], tensors=[]),
    "truth value": build(entries=[entry("a", 7, b"\2")], tensors=[]),
    "arrays of arrays": build(entries=[entry("a", 9, struct.pack("<IQ", 9, 1))], tensors=[]),
    f"more than {MOST_STRINGS} strings": build(
        entries=[entry("a", 9, struct.pack("<IQ", 8, 2**40))], tensors=[]
    ),
    "only": build(entries=[entry("a", 9, struct.pack("<IQ", 10, 2**61))], tensors=[]),
    "power of two": build(
        entries=[entry("general.alignment", 4, struct.pack("<I", 48))], tensors=ONE, tail=EIGHT
    ),
    "5 dimensions": build(tensors=[described("x", [1] * 5, 0, 0)], tail=EIGHT),
    "is empty": build(tensors=[described("x", [0], 0, 0)], tail=EIGHT),
    "has type 2; supported": build(tensors=[described("x", [32], 2, 0)], tail=bytes(40)),
    "blocks of 32": build(tensors=[described("x", [33], 8, 0)], tail=bytes(40)),
    "not a multiple of 32": build(tensors=[described("x", [2], 0, 4)], tail=bytes(40)),
    "truncated or damaged": build(tensors=[described("x", [2**62, 2], 0, 0)], tail=EIGHT),
    "tensor 'x' comes twice": build(tensors=ONE * 2, tail=EIGHT),
    "overlap": build(
        tensors=[described("x", [12], 0, 0), described("y", [2], 0, 32)], tail=bytes(64)
    ),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damage_is_named(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, DAMAGED[message])


def test_every_truncation_and_2000_mutations_end_in_a_value_error_or_a_file(tmp_path, sample):
    raw, _ = sample
    header = len(raw) - 200
    for size in range(len(raw)):
        with pytest.raises(ValueError, match=r"model\.gguf"):
            opened(tmp_path, raw[:size])
    rng = np.random.default_rng(1)
    survived = 0
    for _ in range(2000):
        damaged = bytearray(raw)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        try:
            with opened(tmp_path, bytes(damaged)) as file:
                for name in file.tensors:
                    file.read(name)
                survived += 1
        except ValueError:
            continue
    assert 0 < survived < 2000  # letters of names may change without harm

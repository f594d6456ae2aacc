"""Thousands of damaged files: each is read or refused with a CheckpointError, cheaply."""

import copy
import json
import random
import resource
import time

import pytest
import torch
from files import GOOD, GOOD_DATA, encode, entry, put

from stiefel.checkpoint import Checkpoint, CheckpointError

MUTATIONS = 12_000
VALUES = (
    0, 1, -1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64, 10**40, 1.5, 1e308, True, None, "", "F32",
    "F64", "BOOL", [], [0], [[]], {}, {"a": 1}, "\ud800", "é" * 50, "__metadata__", "x" * 500,
)  # fmt: skip


def flip_bytes(rng, content):
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def cut(rng, content):
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.choice((1, 7, len(content))) :]


def insert(rng, content):
    place = rng.randrange(len(content))
    more = rng.choice((b"{", b"[", b'"', b"\0", b"\\", b"9" * 30, b"[" * 2000, content[:place]))
    return content[:place] + more + content[place:]


def length(rng, content):
    near = len(content) - 8
    value = rng.choice((0, 1, 2, near, near + 1, near - 1, rng.getrandbits(64), 2**63, 2**24))
    return value.to_bytes(8, "little") + content[8:]


def structure(rng, content):
    header = json.loads(json.dumps(GOOD))
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(header))
        if rng.random() < 0.2 or not isinstance(header[name], dict):
            header[rng.choice(("a", "d", ""))] = copy.deepcopy(rng.choice(VALUES))
            continue
        key = rng.choice(("dtype", "shape", "data_offsets", "format", "new"))
        value = copy.deepcopy(rng.choice(VALUES))
        if key in ("shape", "data_offsets") and rng.random() < 0.7:
            value = [rng.choice(VALUES[:13]) for _ in range(rng.randrange(4))]
        header[name][key] = value
    return encode(header, GOOD_DATA)


def overlapping(rng, content):
    spans = [sorted(rng.randrange(25) for _ in range(2)) for _ in range(3)]
    header = {str(i): entry("U8", [b - a], a, b) for i, (a, b) in enumerate(spans)}
    return encode(header, GOOD_DATA)


def index(rng, content):
    """The same for the index of a folder."""
    text = json.dumps({"weight_map": dict.fromkeys("abc", "part.safetensors")}).encode()
    return rng.choice((flip_bytes, cut, insert))(rng, text)


def attempt(folder, content, kind):
    name = "model.safetensors.index.json" if kind is index else "model.safetensors"
    file = put(folder / name, content)
    try:
        with Checkpoint(file) as checkpoint:
            for tensor in checkpoint.tensors:
                checkpoint.read(tensor)
    except CheckpointError as error:
        return str(error)
    return None


def test_damaged_files(tmp_path):
    rng = random.Random(0)
    good = encode(GOOD, GOOD_DATA)
    put(tmp_path / "part.safetensors", good)
    kinds = (flip_bytes, cut, insert, length, structure, structure, overlapping, index)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest = 0.0
    messages = []
    for number in range(MUTATIONS):
        kind = kinds[number % len(kinds)]
        content = kind(rng, good)
        start = time.thread_time()
        messages.append(attempt(tmp_path, content, kind))
        slowest = max(slowest, time.thread_time() - start)
    assert slowest < 1
    # Harmless damage (a name, a number in the data) is read; most is refused.
    refused = [message.encode() for message in messages if message is not None]
    assert MUTATIONS / 2 < len(refused) < MUTATIONS
    assert max(map(len, refused)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


HOSTILE = {
    "lists of lists": b'{"a":[' + b"[]," * (2**22) + b"[]]}",
    "small integers": b'{"a":[' + b"1," * (2**23 - 16) + b"1]}",
    "many keys": b"{" + b",".join(b'"%x":1' % i for i in range(1_500_000)) + b"}",
    "open brackets": b"[" * (2**24),
    "sparse lists": b'{"a":[' + b"[],       " * (1_600_000) + b"[]]}",
    "long strings": b'{"a":"' + b"\\u0100" * (2_700_000) + b'"}',
    "wide text": b'{"a":"' + "𝟘".encode() * (2**22 - 8) + b'"}',
    "long integers": b'{"a":[' + b",".join([b"9" * 4000] * 4000) + b"]}",
    "shape of long integers": encode({"a": entry("U8", [2**62] * 60, 0, 1)})[8:],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_cost_little(name, tmp_path):
    """The largest headers allowed, filled with what is dearest in Python objects."""
    file = put(tmp_path / "model.safetensors", encode(HOSTILE[name]))
    # Address space, not resident memory: that can be limited, and a breach is a MemoryError.
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as status:
        used = int(status.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000, limits[1]))
    start = time.thread_time()
    try:
        with pytest.raises(CheckpointError):
            Checkpoint(file)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.thread_time() - start < 5


def test_many_tensors(tmp_path):
    """A header near the limit that is right."""
    count = 120_000
    header = {f"model.layers.{i}.mlp.weight": entry("U8", [1], i, i + 1) for i in range(count)}
    file = put(tmp_path / "model.safetensors", encode(header, bytes(count)))
    with Checkpoint(file) as checkpoint:
        assert len(checkpoint.tensors) == count
        assert checkpoint.read("model.layers.77.mlp.weight").dtype == torch.uint8

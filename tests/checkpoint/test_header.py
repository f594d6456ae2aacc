"""Headers that are wrong, each with its own message; and the right ones."""

import json

import pytest
import torch
from files import GOOD, GOOD_DATA, encode, entry, put

from stiefel.checkpoint import Checkpoint, CheckpointError
from stiefel.checkpoint.header import DTYPES


def with_entry(**changes):
    return {"a": entry("F32", [2, 2], 0, 16) | changes}


def named(name, value="1"):
    return f"{{{json.dumps(name)}: {value}}}".encode()


ONE = json.dumps(entry("U8", [1], 0, 1))
BAD = {
    "empty": (b"", "0 bytes"),
    "nine bytes": (b"123456789", "9 bytes"),
    "length zero": (encode(b"", b"1234"), "claims 0 bytes"),
    "length beyond the file": ((2**40).to_bytes(8, "little") + b"{}", "truncated"),
    "length of all ones": (b"\xff" * 8 + b"{}", "truncated"),
    "huge header": (encode(b" " * (2**24 + 1)), "at most 16777216"),
    "zip": (b"PK\x03\x04" + bytes(40), "PyTorch pickle"),
    "pickle": (b"\x80\x02" + bytes(40), "Python pickle"),
    "gguf": (b"GGUF" + bytes(40), "GGUF"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "not utf-8": (encode(b'{"\xff": 1}'), "not UTF-8"),
    "not json": (encode(b'{"a": }'), "not valid JSON"),
    "a list": (encode(b"[]"), "must be a JSON object, got list"),
    "leading space": (encode(b" {}"), "must begin"),
    "nan": (encode(named("a", "NaN")), "NaN, which is not JSON"),
    "giant integer": (encode(named("a", "9" * 5000)), "not valid JSON"),
    "twice": (encode(f'{{"a": {ONE}, "a": {ONE}}}'.encode(), b"1"), "names 'a' twice"),
    "key twice in an entry": (
        encode(b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [], "data_offsets": [0, 1]}}'),
        "names 'dtype' twice",
    ),
    "deep": (encode(b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}"), "dtype, shape and data_offsets"),
    "too deep": (
        encode(b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b" " * 60_000 + b"}"),
        "nested too deeply",
    ),
    "dense lists": (encode(b'{"a": [' + b"[]," * 10**5 + b"[]]}"), "far more than"),
    "dense keys": (encode(b'{"a": 1' + b',"b":1' * 10**5 + b"}"), "far more than"),
    "metadata is a list": (encode({"__metadata__": []}), "object of strings"),
    "metadata of numbers": (encode({"__metadata__": {"step": 3}}), "not one: 'step'"),
    "entry is a number": (encode({"a": 3}), "got int"),
    "entry lacks dtype": (encode({"a": {"shape": []}}), "got 'shape'"),
    "entry has more": (encode(with_entry(strides=[1])), "strides"),
    "dtype unknown": (encode(with_entry(dtype="F31")), "'F31' is unknown; supported are BOOL"),
    "dtype a list": (encode(with_entry(dtype=["F32"])), "is unknown"),
    "dtype packed": (encode(with_entry(dtype="F4")), "packs several numbers"),
    "shape negative": (encode(with_entry(shape=[-2, -2])), "whole numbers"),
    "shape of fractions": (encode(with_entry(shape=[2.0, 2])), "whole numbers"),
    "shape of booleans": (encode(with_entry(shape=[True, 4])), "whole numbers"),
    "shape a number": (encode(with_entry(shape=4)), "whole numbers"),
    "shape huge": (encode(with_entry(shape=[2**40, 2**40])), "too large to exist"),
    "shape beyond 64 bits": (encode(with_entry(shape=[10**30])), "whole numbers"),
    "shape huge beside a zero": (encode(with_entry(shape=[0, 2**62, 9])), "too large to exist"),
    "65 dimensions": (encode(with_entry(shape=[1] * 65)), "65 dimensions"),
    "offsets are three": (encode(with_entry(data_offsets=[0, 16, 16])), "begin ≤ end"),
    "offsets reversed": (encode(with_entry(data_offsets=[16, 0])), "begin ≤ end"),
    "offsets negative": (encode(with_entry(data_offsets=[-16, 0])), "whole numbers"),
    "size and shape differ": (encode(with_entry(data_offsets=[0, 15])), "takes 16 bytes"),
    "beyond the end": (encode(with_entry(), bytes(15)), "ends at byte"),
    "bytes behind": (encode(with_entry(), bytes(17)), "1 bytes behind tensor 'a'"),
    "bytes before": (
        encode(with_entry(data_offsets=[4, 20]), bytes(20)), "4 bytes between the header"
    ),
    "hole": (
        encode({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 6, 10)}, bytes(10)),
        "2 bytes between tensor 'a' and tensor 'b'",
    ),
    "overlap": (
        encode({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
        "'b' overlaps tensor 'a' by 2 bytes",
    ),
    "same bytes": (
        encode({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, bytes(4)), "overlaps"
    ),
    "surrogate": (encode(b'{"\\ud800": ' + ONE.encode() + b"}", b"1"), "not valid text"),
    "long name is cut": (encode({"x" * 10**5: 3}), "…"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_header(case, tmp_path):
    content, message = BAD[case]
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(put(tmp_path / "model.safetensors", content))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_good_header(tmp_path):
    file = put(tmp_path / "model.safetensors", encode(GOOD, GOOD_DATA))
    with Checkpoint(file) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert checkpoint.metadata == {"format": "pt"}
        a = checkpoint.tensors["a"]
        assert (a.dtype, a.shape, a.nbytes, a.numel) == (torch.float32, (2, 2), 16, 4)
        assert a.start == 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert checkpoint.read("c").tolist() == [True, False]


def test_without_tensors(tmp_path):
    for content in (encode(b"{}"), encode({"__metadata__": {}}), encode(b"{}   ")):
        assert not Checkpoint(put(tmp_path / "model.safetensors", content)).tensors


def test_a_boolean_that_is_none(tmp_path):
    file = put(tmp_path / "model.safetensors", encode(GOOD, bytes(22) + b"\1\2"))
    with Checkpoint(file) as checkpoint, pytest.raises(CheckpointError, match="other than 0 and 1"):
        checkpoint.read("c")


def test_types_are_those_of_the_format():
    from safetensors.torch import _TYPES  # the format's own table

    ours = {name: dtype for name, dtype in DTYPES.items() if name in _TYPES}
    assert ours == {name: _TYPES[name] for name in ours}
    assert len(ours) >= 15

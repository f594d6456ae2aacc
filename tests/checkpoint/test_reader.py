import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from files import GOOD, GOOD_DATA, encode, entry, put
from safetensors.torch import save_file

from stiefel.checkpoint import Checkpoint, CheckpointError
from stiefel.checkpoint.header import DTYPES


def shards(folder, parts, index=True):
    """A folder of shards, one a mapping; returns the weight map."""
    weight_map = {}
    for number, tensors in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if index:
        write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map, **more):
    text = json.dumps({"metadata": {}, "weight_map": weight_map} | more)
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.fixture
def parts(generator):
    return [
        {"a": torch.randn(7, 3, generator=generator), "b": torch.arange(4)},
        {"c": torch.randn(5, generator=generator).bfloat16()},
    ]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_comes_back(dtype, tmp_path, generator):
    raw = torch.randint(0, 2, (6 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(3, 2)
    name = next(name for name in DTYPES if DTYPES[name] == dtype)
    header = {"x": entry(name, [3, 2], 0, raw.numel())}
    file = put(tmp_path / "x.safetensors", encode(header, raw.numpy().tobytes()))
    with Checkpoint(file) as checkpoint:
        read = checkpoint.read("x")
        rows = torch.cat([checkpoint.rows("x", i, i + 1).view(torch.uint8) for i in range(3)])
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(rows, tensor.view(torch.uint8))


def test_single_file_folder_and_index_agree(tmp_path, parts):
    shards(tmp_path, parts)
    everything = {name: tensor for part in parts for name, tensor in part.items()}
    save_file(everything, tmp_path / "all.safetensors")
    for path in (
        tmp_path, tmp_path / "model.safetensors.index.json", tmp_path / "all.safetensors"
    ):  # fmt: skip
        with Checkpoint(path) as checkpoint:
            assert set(checkpoint.tensors) == set(everything)
            for name, tensor in everything.items():
                assert torch.equal(checkpoint.read(name), tensor)


def test_rows_and_chunks(tmp_path, parts):
    shards(tmp_path, parts)
    with Checkpoint(str(tmp_path)) as checkpoint:
        a = parts[0]["a"]
        assert torch.equal(checkpoint.rows("a", 2, 5), a[2:5])
        assert checkpoint.rows("a", 4, 4).shape == (0, 3)
        pieces = list(checkpoint.chunks("a", 25))
        assert [len(piece) for piece in pieces] == [2, 2, 2, 1]
        assert torch.equal(torch.cat(pieces), a)
        assert [len(piece) for piece in checkpoint.chunks("a", 1)] == [1] * 7
        assert [len(piece) for piece in checkpoint.chunks("a", 10**9)] == [7]
        for start, stop in ((-1, 2), (3, 2), (0, 8)):
            with pytest.raises(IndexError, match="which has 7 rows"):
                checkpoint.rows("a", start, stop)
        with pytest.raises(ValueError, match="max_bytes"):
            list(checkpoint.chunks("a", 0))


def test_scalars_and_empty_tensors(tmp_path):
    tensors = {"s": torch.tensor(2.5), "e": torch.empty(0, 4), "f": torch.empty(3, 0)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("s").item() == 2.5
        assert [piece.item() for piece in checkpoint.chunks("s", 1)] == [2.5]
        assert checkpoint.read("e").shape == (0, 4)
        assert checkpoint.rows("f", 1, 3).shape == (2, 0)
        assert list(checkpoint.chunks("e", 1)) == []
        with pytest.raises(CheckpointError, match="scalar"):
            checkpoint.rows("s", 0, 1)


def test_a_tensor_read_is_its_own(tmp_path, parts):
    shards(tmp_path, parts)
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.read("a").zero_()
        assert torch.equal(checkpoint.read("a"), parts[0]["a"])


def test_config_and_metadata(tmp_path, parts):
    shards(tmp_path, parts)
    assert Checkpoint(tmp_path).config is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.metadata == {"format": "pt"}
    for text, message in (("[1]", "JSON object"), ("{", "valid JSON"), ('{"a":1,"a":2}', "twice")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(tmp_path)


def test_fingerprint_is_sha256_of_the_files(tmp_path, parts):
    import hashlib

    shards(tmp_path, parts)
    with Checkpoint(tmp_path) as checkpoint:
        for name, digest in checkpoint.fingerprint().items():
            assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_unknown_names_and_closed_checkpoints(tmp_path, parts):
    shards(tmp_path, parts)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor 'z'"):
        checkpoint.read("z")
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("a")


def test_threads_read_the_same(tmp_path, generator):
    tensors = {str(i): torch.randn(300, 40, generator=generator) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    wrong = []
    with Checkpoint(tmp_path) as checkpoint:

        def work(names):
            for _ in range(5):
                wrong.extend(n for n in names if not torch.equal(checkpoint.read(n), tensors[n]))

        threads = [threading.Thread(target=work, args=(list(tensors)[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_file_that_changes_is_noticed(tmp_path):
    file = put(tmp_path / "model.safetensors", encode(GOOD, GOOD_DATA))
    checkpoint = Checkpoint(file)
    checkpoint.read("a")
    os.utime(file, ns=(1, 1))
    for read in (lambda: checkpoint.read("a"), checkpoint.fingerprint):
        with pytest.raises(CheckpointError, match="changed after it was opened"):
            read()
    checkpoint = Checkpoint(file)
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size - 12)
    for name in "ab":
        with pytest.raises(CheckpointError, match="changed"):
            checkpoint.read(name)


BAD_NAMES = {
    "../model.safetensors": "same folder",
    "/etc/x.safetensors": "same folder",
    "sub/x.safetensors": "same folder",
    "..\\x.safetensors": "same folder",
    "..": "same folder",
    "": "same folder",
    "a\0.safetensors": "same folder",
    "line\n.safetensors": "same folder",
    "pytorch_model.bin": "pickle",
    "weights.txt": "not \\*.safetensors",
    "gone.safetensors": "missing",
    "x" * 300 + ".safetensors": "missing",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_index_with_a_bad_file_name(name, tmp_path, parts):
    weight_map = shards(tmp_path, parts)
    write_index(tmp_path, weight_map | {"c": name})
    with pytest.raises(CheckpointError, match=BAD_NAMES[name]):
        Checkpoint(tmp_path)


def test_index_that_does_not_fit_its_files(tmp_path, parts):
    weight_map = shards(tmp_path, parts)
    first, second = weight_map["a"], weight_map["c"]
    for wrong, message in (
        (weight_map | {"z": first}, "names 'z', which no file holds"),
        ({"a": first, "c": second}, "leaves out 'b'"),
        (weight_map | {"b": second}, "says 'b' is in"),
        (weight_map | {"b": 3}, "got int"),
        ({}, "under the key 'weight_map'"),
        ([], "under the key 'weight_map'"),
    ):
        write_index(tmp_path, wrong)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="far more than"):
        Checkpoint(tmp_path)


def test_links(tmp_path, parts):
    """Out of the folder: refused; into the blobs of a download cache: followed."""
    outside, inside = tmp_path / "outside", tmp_path / "model"
    outside.mkdir(), inside.mkdir()
    weight_map = shards(inside, parts)
    name = weight_map["c"]
    (inside / name).rename(outside / name)
    (inside / name).symlink_to(outside / name)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        Checkpoint(inside)
    (inside / name).unlink()
    (inside / name).symlink_to(name)
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint(inside)

    snapshot, blobs = tmp_path / "models--x/snapshots/1234", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for file in shards(snapshot, parts).values():
        if not (snapshot / file).is_symlink():
            (snapshot / file).rename(blobs / file[:11])
            (snapshot / file).symlink_to(f"../../blobs/{file[:11]}")
    assert set(Checkpoint(snapshot).tensors) == {"a", "b", "c"}


def test_folders_without_an_index(tmp_path, parts):
    with pytest.raises(CheckpointError, match="it holds nothing"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="save_pretrained"):
        Checkpoint(tmp_path)
    files = sorted(set(shards(tmp_path, parts, index=False).values()))
    assert set(Checkpoint(tmp_path).tensors) == {"a", "b", "c"}
    (tmp_path / "other.safetensors").write_bytes((tmp_path / files[0]).read_bytes())
    with pytest.raises(CheckpointError, match="several safetensors files"):
        Checkpoint(tmp_path)
    (tmp_path / "other.safetensors").unlink()
    (tmp_path / files[1]).write_bytes((tmp_path / files[0]).read_bytes())
    with pytest.raises(CheckpointError, match="both hold 'a', 'b'"):
        Checkpoint(tmp_path)
    (tmp_path / files[1]).rename(tmp_path / "model-00002-of-00003.safetensors")
    (tmp_path / files[0]).rename(tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="2 of 3 shards"):
        Checkpoint(tmp_path)
    for name in ("x.safetensors.index.json", "y.safetensors.index.json"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="several indexes"):
        Checkpoint(tmp_path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "nothing")
    os.mkfifo(tmp_path / "model.safetensors")  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is a pickle"):
        Checkpoint(put(tmp_path / "model.pt", b"PK\3\4"))


MEMORY = """
import resource, sys
from pathlib import Path
from stiefel.checkpoint import Checkpoint
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with Checkpoint(sys.argv[1]) as checkpoint:
    before = peak()
    total = sum(int(piece[0, 0]) for piece in checkpoint.chunks("big", 4 * 2**20))
    checkpoint.fingerprint()
    print(peak() - before)
"""


def test_memory_stays_flat(tmp_path):
    """A tensor of 200 MB in pieces of 4 MB, and the hash of its file: less than 24 MB more."""
    rows, width = 200, 2**20
    file = tmp_path / "big.safetensors"
    header = encode({"big": entry("U8", [rows, width], 0, rows * width)})
    with open(file, "wb") as handle:
        handle.write(header)
        handle.truncate(len(header) + rows * width)  # a hole: reads as zeros
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(file)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 24 * 2**20

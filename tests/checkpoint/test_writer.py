import json
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from stiefel.checkpoint import Checkpoint, CheckpointError, CheckpointWriter, swap
from stiefel.checkpoint.journal import JOURNAL_NAME


@pytest.fixture
def tensors(generator):
    return {
        "a": torch.randn(6, 4, generator=generator),
        "b": torch.arange(3, dtype=torch.uint8),
        "c": torch.randn(5, 2, generator=generator).bfloat16(),
        "s": torch.tensor(2.0, dtype=torch.float64),
        "e": torch.empty(0, 3),
        "t": torch.tensor([True, False, True]),
        "q": torch.randn(8, generator=generator).to(torch.float8_e4m3fn),
    }


def specs(tensors):
    return [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]


def write(folder, tensors, **settings):
    with CheckpointWriter(folder, specs(tensors), **settings) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_single_file_reads_back_everywhere(tmp_path, tensors):
    write(tmp_path / "out", tensors, metadata={"by": "us"})
    assert list(contents(tmp_path / "out")) == ["model.safetensors"]
    theirs = load_file(tmp_path / "out/model.safetensors")
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.metadata == {"format": "pt", "by": "us"}
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name).double(), tensor.double())
            assert torch.equal(theirs[name].double(), tensor.double())
            # Aligned to its element: the format does not ask for it, fast readers like it.
            assert checkpoint.tensors[name].start % tensor.element_size() == 0
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_shards_and_their_index(tmp_path, tensors):
    write(tmp_path / "out", tensors, shard_bytes=32)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        for file in checkpoint.files:
            held = [info for info in checkpoint.tensors.values() if info.file == file]
            assert len(held) == 1 or sum(info.nbytes for info in held) <= 32


def test_the_order_of_writing_does_not_show(tmp_path, tensors):
    write(tmp_path / "whole", tensors, shard_bytes=64)
    with CheckpointWriter(tmp_path / "rows", specs(tensors), shard_bytes=64) as writer:
        for name in reversed(tensors):
            tensor = tensors[name]
            if tensor.ndim == 0:
                writer.write(name, tensor)
                continue
            for row in reversed(range(len(tensor))):
                writer.write_rows(name, row, tensor[row : row + 1])
    assert contents(tmp_path / "whole") == contents(tmp_path / "rows")


def test_threads(tmp_path, generator):
    tensors = {str(i): torch.randn(64, 32, generator=generator) for i in range(12)}
    with CheckpointWriter(tmp_path / "out", specs(tensors), flush_bytes=4096) as writer:

        def work(names):
            for name in names:
                for start in range(0, 64, 16):
                    writer.write_rows(name, start, tensors[name][start : start + 16])

        threads = [threading.Thread(target=work, args=(list(tensors)[i::3],)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)


def test_non_contiguous_tensors(tmp_path, generator):
    tensor = torch.randn(4, 6, generator=generator)
    with CheckpointWriter(tmp_path / "out", [("w", torch.float32, (6, 4))]) as writer:
        writer.write("w", tensor.T)
    assert torch.equal(Checkpoint(tmp_path / "out").read("w"), tensor.T)


def test_what_was_not_announced(tmp_path, tensors):
    spec = specs(tensors)
    with pytest.raises(CheckpointError, match="two tensors cannot both be named 'a'"):
        CheckpointWriter(tmp_path / "o", [*spec, spec[0]])
    with pytest.raises(CheckpointError, match="cannot both be named '__metadata__'"):
        CheckpointWriter(tmp_path / "o", [("__metadata__", torch.float32, (1,))])
    with pytest.raises(CheckpointError, match=r"no type for torch\.complex128"):
        CheckpointWriter(tmp_path / "o", [("x", torch.complex128, (1,))])
    with pytest.raises(ValueError, match="shard_bytes must be positive"):
        CheckpointWriter(tmp_path / "o", spec, shard_bytes=0)
    assert not list(tmp_path.iterdir())
    writer = CheckpointWriter(tmp_path / "o", spec)
    a = tensors["a"]
    for act, message in (
        (lambda: writer.write("z", a), "no tensor 'z' was announced"),
        (lambda: writer.write("a", a.T), r"announced with shape \(6, 4\), got \(4, 6\)"),
        (lambda: writer.write("a", a.double()), "announced as torch.float32, got torch.float64"),
        (lambda: writer.write_rows("a", 0, a[:, :2]), "got rows of shape"),
        (lambda: writer.write_rows("s", 0, tensors["s"]), "got rows of shape"),
        (lambda: writer.write_rows("a", 4, a), "rows 4:10"),
        (lambda: writer.write_rows("a", -1, a[:1]), "rows -1:0"),
        (lambda: writer.add_text("../x", ""), "cannot be the name"),
        (lambda: writer.add_text("model.safetensors", ""), "cannot be the name"),
        (writer.commit, "7 tensors were not written|6 tensors were not written"),
    ):
        with pytest.raises(CheckpointError, match=message):
            act()
    writer.write("a", a)
    with pytest.raises(CheckpointError, match="written already"):
        writer.write_rows("a", 0, a[:1])
    writer.close()
    with pytest.raises(CheckpointError, match="closed"):
        writer.write("b", tensors["b"])


def test_further_files(tmp_path, tensors):
    source = tmp_path / "tokenizer.json"
    source.write_text("{}")
    with CheckpointWriter(tmp_path / "out", []) as writer:
        writer.add_text("config.json", '{"é": 1}\n')
        writer.add_file("tokenizer.json", source)
    made = contents(tmp_path / "out")
    assert made["config.json"] == '{"é": 1}\n'.encode()
    assert made["tokenizer.json"] == b"{}"


def test_an_old_output_stays_until_the_new_one_is_whole(tmp_path, tensors):
    out = tmp_path / "out"
    write(out, tensors)
    before = contents(out)
    with pytest.raises(CheckpointError, match="not empty"):
        CheckpointWriter(out, specs(tensors))
    other = {name: tensor.clone() for name, tensor in tensors.items()} | {"a": tensors["a"] * 2}
    with CheckpointWriter(out, specs(other), overwrite=True) as writer:
        for name, tensor in other.items():
            writer.write(name, tensor)
        writer.flush()
        assert contents(out) == before
    assert torch.equal(Checkpoint(out).read("a"), other["a"])
    assert os.listdir(tmp_path) == ["out"]


def test_without_an_exchange_of_names(tmp_path, tensors, monkeypatch):
    write(tmp_path / "out", tensors)
    monkeypatch.setattr(swap, "_exchange", lambda one, other: False)
    other = tensors | {"a": tensors["a"] * 2}
    write(tmp_path / "out", other, overwrite=True)
    assert torch.equal(Checkpoint(tmp_path / "out").read("a"), other["a"])
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("step", range(1, 10))
def test_a_crash_around_the_last_renames(step, exchange, tmp_path, tensors, monkeypatch):
    """Stopped before any rename or removal, the old or new output is whole, and resuming works."""
    out = tmp_path / "out"
    write(out, tensors)
    old = contents(out)
    other = tensors | {"a": tensors["a"] * 2}
    write(tmp_path / "new", other)
    new = contents(tmp_path / "new")
    calls = []

    def counted(function):
        def call(*arguments):
            calls.append(function)
            if len(calls) == step:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        swapped = swap._exchange if exchange else lambda one, other: False
        patch.setattr(swap, "_exchange", counted(swapped))
        patch.setattr(swap.os, "rename", counted(os.rename))
        patch.setattr(swap, "_drop_journal", counted(swap._drop_journal))
        patch.setattr(swap.shutil, "rmtree", counted(swap.shutil.rmtree))
        stopped = False
        try:
            # recover() calls _drop_journal once before the work begins.
            writer = CheckpointWriter(out, specs(other), overwrite=True)
            for name, tensor in other.items():
                writer.write(name, tensor)
            writer.commit()
        except KeyboardInterrupt:
            stopped = True
            if step > 1:
                writer.close()
    assert stopped == (step <= (5 if exchange else 8))
    waiting = step > 1 and (not out.exists() or contents(out) == old)
    with CheckpointWriter(out, specs(other), overwrite=True, resume=True) as writer:
        if waiting:  # everything was written, only the name was missing
            assert set(writer.done) == set(other)
        for name in other.keys() - writer.done.keys():
            if other[name].numel():
                writer.write(name, other[name])
    assert contents(out) == new != old
    assert sorted(os.listdir(tmp_path)) == ["new", "out"]


def interrupted(out, tensors):
    writer = CheckpointWriter(out, specs(tensors), shard_bytes=64)
    writer.write("a", tensors["a"], note={"norm": 1.5})
    writer.write_rows("c", 0, tensors["c"][:2])
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_resume_goes_on(tmp_path, tensors):
    write(tmp_path / "straight", tensors, shard_bytes=64)
    out = tmp_path / "out"
    interrupted(out, tensors)
    assert not out.exists()
    with CheckpointWriter(out, specs(tensors), shard_bytes=64, resume=True) as writer:
        assert dict(writer.done) == {"a": {"norm": 1.5}, "e": {}}
        with pytest.raises(CheckpointError, match="written already"):
            writer.write("a", tensors["a"])
        for name in ("b", "c", "s", "t", "q"):
            writer.write(name, tensors[name])
    assert contents(out) == contents(tmp_path / "straight")


def test_what_cannot_be_resumed(tmp_path, tensors):
    out = tmp_path / "out"
    started = CheckpointWriter(out, specs(tensors), identity="one")
    with pytest.raises(ValueError, match="stop"), started:
        raise ValueError("stop")
    with pytest.raises(CheckpointError, match="another recipe"):
        CheckpointWriter(out, specs(tensors), identity="two", resume=True)
    with pytest.raises(CheckpointError, match="another recipe"):
        CheckpointWriter(out, specs(tensors)[1:], identity="one", resume=True)
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"tensor": "a", "no')  # the crash came in the middle of a line
    writer = CheckpointWriter(out, specs(tensors), identity="one", resume=True)
    assert "a" not in writer.done
    with pytest.raises(CheckpointError, match="another process"):
        CheckpointWriter(out, specs(tensors), identity="one", resume=True)
    writer.close()
    journal.write_bytes(whole + b"3\n")
    with pytest.raises(CheckpointError, match="damaged"):
        CheckpointWriter(out, specs(tensors), identity="one", resume=True)
    write(out, tensors, identity="two")  # without resume: from the start
    assert os.listdir(tmp_path) == ["out"]


def test_a_stranger_in_the_way(tmp_path, tensors):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no partial output"):
        CheckpointWriter(tmp_path / "out", specs(tensors))
    assert (tmp_path / "out.partial/thesis.txt").exists()
    with pytest.raises(CheckpointError, match="cannot be an output"):
        CheckpointWriter("/", specs(tensors))


def test_a_full_disk_says_so_at_once(tmp_path):
    """The limit on the size of a file stands for the disk; space is reserved before any work."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="800104 bytes are needed") as caught:
            CheckpointWriter(tmp_path / "out", [("w", torch.float32, (200_000,))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert str(caught.value.filename).endswith("out.partial/model.safetensors")
    with CheckpointWriter(tmp_path / "out", [("w", torch.float32, (200_000,))]) as writer:
        writer.write("w", torch.zeros(200_000))


KILLED = """
import sys, torch
from stiefel.checkpoint import CheckpointWriter
names = [str(i) for i in range(40)]
settings = dict(flush_bytes=2000, resume=True)
with CheckpointWriter(sys.argv[1], [(n, torch.float32, (100,)) for n in names], **settings) as w:
    print(len(w.done), flush=True)
    for name in names:
        if name not in w.done:
            w.write(name, torch.full((100,), float(name)), note={"n": int(name)})
            if int(name) == int(sys.argv[2]):
                import os, signal
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_and_resumed(tmp_path):
    done = []
    for at in ("7", "17", "30", "-1"):
        run = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / "out"), at],
            capture_output=True, text=True, check=at == "-1",
        )  # fmt: skip
        done.append(int(run.stdout))
        assert (tmp_path / "out").exists() == (at == "-1")
    assert done[0] == 0
    assert done == sorted(set(done))  # every run found more than the one before
    with Checkpoint(tmp_path / "out") as checkpoint:
        for name in checkpoint.tensors:
            assert torch.equal(checkpoint.read(name), torch.full((100,), float(name)))

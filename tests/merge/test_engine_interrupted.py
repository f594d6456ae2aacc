"""Merges that are killed, interrupted or out of disk; and how much memory they take."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_models import contents, plan, random_model, save

from stiefel.checkpoint import Checkpoint, CheckpointError
from stiefel.merge.engine import merge

EACH = [{"weight": 0.4, "density": 0.3}, {"weight": 0.8, "density": 0.5}]


def models(folder, shapes):
    base = random_model(0, shapes=shapes)
    others = [random_model(seed, base=base, shapes=shapes) for seed in (1, 2)]
    return [save(folder / n, t) for n, t in zip("bxy", (base, *others), strict=True)]


def script(name, *arguments):
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_killed_at_ten_random_moments(tmp_path):
    """The older output stays or the new one is whole; resumed, its bytes are the same."""
    models(tmp_path / "in", {f"layers.{i}.weight": (64, 150) for i in range(30)})
    results = script("interrupted.py", tmp_path, 0)
    killed, interrupted = results["kill"], results["interrupt"]
    assert len(killed) == 10
    assert sum(r["status"] == -signal.SIGKILL for r in killed) >= 6
    assert sum(r["partial"] for r in killed) >= 5
    assert sum(0 < r["resumed"] < 30 for r in killed) >= 2  # it did go on, not start anew
    assert all(r["status"] in (130, 0) for r in interrupted)
    assert any(r["status"] == 130 for r in interrupted)


@pytest.fixture
def small(tmp_path):
    folders = models(tmp_path / "in", {f"layers.{i}.weight": (8, 50) for i in range(12)})
    made = plan(folders, "ties", each=EACH, shard_bytes=3000)
    merge(made, tmp_path / "wanted")
    merge(plan(folders, "task_arithmetic", each=EACH), tmp_path / "out")
    return made, contents(tmp_path / "wanted"), contents(tmp_path / "out")


def test_no_room_at_the_start(small, tmp_path):
    made, wanted, before = small
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="bytes are needed"):
            merge(made, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert contents(tmp_path / "out") == before
    merge(made, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == wanted


@pytest.mark.parametrize("after", [5, 9, 16])
def test_a_disk_that_refuses_later(small, tmp_path, monkeypatch, after):
    """Some file systems cannot reserve: the error comes in the middle, what is whole stays."""
    made, wanted, before = small
    calls = []
    write = os.pwrite

    def refusing(descriptor, data, offset):
        calls.append(offset)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refusing)
        with pytest.raises(OSError, match="No space left") as caught:
            merge(made, tmp_path / "out", flush_bytes=1500, threads=1)
    assert caught.value.errno == errno.ENOSPC
    assert contents(tmp_path / "out") == before
    again = merge(made, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == wanted
    assert (again.resumed > 0) == (after > 5)


def test_resume_refuses_other_inputs(small, tmp_path, monkeypatch):
    made, _, before = small

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(made, tmp_path / "out", progress=stop, flush_bytes=1)
    os.utime(made.models[0].path / "model.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="another recipe, other inputs"):
        merge(made, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == before
    merge(made, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


MEMORY = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
from engine_models import plan
from stiefel.merge.engine import merge
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
method = sys.argv[2]
folders = [Path(sys.argv[1]) / name for name in ("bx" if method == "slerp" else "bxy")]
each = [{"weight": 0.5, "density": 0.2}] * (len(folders) - 1)
made = plan(folders, method, each=each, parameters={"t": 0.5} if method == "slerp" else {})
before = peak()
merge(made, Path(sys.argv[1]) / f"out-{method}", threads=2)
print(json.dumps(peak() - before))
"""


def peak_of(folder, method):
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder), method, str(Path(__file__).parent)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(run.stdout)


def zeros(folder, count, shape):
    """Models of zeros in sparse files."""
    from stiefel.checkpoint.layout import plan_layout

    specs = [(f"layers.{i}.weight", torch.bfloat16, shape) for i in range(count)]
    shard = plan_layout(specs, 1e12, None).shards[0]
    for name in "bxy":
        (folder / name).mkdir(parents=True)
        with open(folder / name / "model.safetensors", "wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)


def test_memory_does_not_grow_with_the_model(tmp_path):
    """4 and 16 tensors of 8 MB; two threads. Beyond torch less than 64 MB, as a chunk decides."""
    peaks = []
    for count in (4, 16):
        zeros(tmp_path / str(count), count, (2000, 2000))
        peaks.append(peak_of(tmp_path / str(count), "task_arithmetic"))
    assert peaks[1] - peaks[0] < 8 * 2**20
    assert peaks[1] < 64 * 2**20


def test_memory_of_a_sum_over_many_short_rows(tmp_path):
    """Slerp's three numbers a row must not scatter the heap (they took 80 MB here)."""
    zeros(tmp_path, 12, (8000, 512))
    assert peak_of(tmp_path, "slerp") < 64 * 2**20


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """One tensor of 60 MB in three models (a group of 180 MB): chunks of rows decide."""
    zeros(tmp_path, 1, (3000, 10_000))
    assert peak_of(tmp_path, "ties") < 80 * 2**20
    with Checkpoint(tmp_path / "out-ties") as result:
        assert result.rows("layers.0.weight", 2999, 3000).count_nonzero() == 0

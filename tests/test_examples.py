"""Every example runs from the command line, goes on from its checkpoint, and refuses clearly."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"tiny_gpt2"}  # imported by the others
# Training scripts, and the packages beyond the core that each asks for.
NEEDED = {
    "convert_cnn": [],
    "own_equation": [],
    "plain_loop": ["transformers"],
    "accelerate_loop": ["transformers", "accelerate"],
    "fsdp2_train": ["transformers"],
    "transformers_trainer": ["transformers", "accelerate"],
}
SCRIPTS = [ROOT / "examples" / f"{name}.py" for name in sorted(NEEDED)]
# The others: arguments of a short run, and a line that it has to print.
OTHERS = {
    "distributed_poisson.py": (("--points", "16"), r"^largest error 1\.\d+e-02$"),
    "generate/image_database.py": (
        (
            "--steps",
            "40",
        ),
        r"^written: grid\.png$",
    ),
}
UNTRAINED = 5.545  # log 256

every_example = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def start(*command, cwd):
    """A fresh Python on one thread, without the hub."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def held_out(process):
    """The loss that it ended with."""
    assert process.returncode == 0, process.stderr
    return float(re.search(r"^held-out loss (\d+\.\d+)$", process.stdout, re.MULTILINE)[1])


def test_all_examples_are_known():
    folder = ROOT / "examples"
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*.py")}
    assert there == {f"{n}.py" for n in (*NEEDED, *SHARED)} | OTHERS.keys()


@pytest.mark.parametrize("script", OTHERS)
def test_it_runs_to_its_last_line(script, tmp_path):
    arguments, line = OTHERS[script]
    done = start(ROOT / "examples" / script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(line, done.stdout, re.MULTILINE), done.stdout


@every_example
def test_it_learns_and_a_second_run_goes_on_from_the_middle(script, tmp_path):
    command = (script, "--steps", 20, "--out", "run")
    first = start(*command, cwd=tmp_path)
    assert "going on" not in first.stdout
    assert held_out(first) < UNTRAINED - 1.5

    shutil.rmtree(tmp_path / "run" / "checkpoint-20", ignore_errors=True)  # Trainer's last one
    second = start(*command, cwd=tmp_path)
    assert re.search(r"^going on from (step |checkpoint-)10$", second.stdout, re.MULTILINE)
    assert held_out(second) == held_out(first)


def run_here(monkeypatch, script, *arguments):
    """In this process, which has torch already; for what ends before any training."""
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [script.name, *arguments])
    for name in SHARED:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return ended.value.code


@every_example
def test_a_missing_package_is_named_with_its_extra(script, monkeypatch):
    for missing in NEEDED[script.stem]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            message = run_here(patch, script)
        assert message.startswith(f"This example needs {missing}. Install with: ")
        assert 'pip install "stiefel[train]"' in message


@every_example
def test_too_few_steps_are_refused(script, monkeypatch, capsys):
    assert run_here(monkeypatch, script, "--steps", "1") == 2
    assert "--steps must be at least 2, got 1" in capsys.readouterr().err


# FSDP2

FSDP2 = ROOT / "examples" / "fsdp2_train.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
AGREEMENT = 1e-4  # of losses; on the machines that we have it is 1e-6


def losses(process):
    """Step → training loss, and the held-out loss under "end"."""
    found = re.findall(r"^step (\d+): training loss (\d+\.\d+)$", process.stdout, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found} | {"end": held_out(process)}


def test_two_processes_train_as_one_and_go_on_from_each_others_checkpoints(tmp_path):
    alone, together = (FSDP2, "--steps", 20, "--out"), (*TORCHRUN, FSDP2, "--steps", 20, "--out")
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(start, *command, cwd=tmp_path)
            for command in ((*alone, "of one"), (*together, "of two"))
        ]
        one, two = (run.result() for run in runs)
        runs = [
            pool.submit(start, *command, cwd=tmp_path)
            for command in ((*alone, "of two"), (*together, "of one"))
        ]
        one_from_two, two_from_one = (run.result() for run in runs)

    expected = losses(one)
    assert expected.keys() == {5, 10, 15, 20, "end"}
    assert expected["end"] < UNTRAINED - 1.5
    assert losses(two) == pytest.approx(expected, abs=AGREEMENT)
    for later in (one_from_two, two_from_one):
        assert "going on from step 10" in later.stdout
        second_half = {key: expected[key] for key in (15, 20, "end")}
        assert losses(later) == pytest.approx(second_half, abs=AGREEMENT)


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = run_here(monkeypatch, FSDP2, "--steps", "2")
    assert message == "16 rows cannot be shared equally by 3 processes"

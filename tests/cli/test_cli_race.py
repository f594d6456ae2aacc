"""``stiefel race`` as a person meets it."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from stiefel.cli import app
from stiefel.cli_options import terminable
from stiefel.cli_race import NAMES

SIZE = {"width": 8, "blocks": 1, "heads": 2, "context": 8, "batch": 4, "steps": 6}
TINY = [word for name, value in SIZE.items() for word in (f"--{name}", str(value))]
FACTORY = """
import torch
from torch import nn

def make(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(8, 5, 4)
    return model, {"train": list(x[:4]), "validation": list(x[4:])}, loss

def loss(model, batch):
    return (model(batch) - batch[:, :2]).square().mean()

def broken(seed):
    return {}["nothing"]

def later(seed):
    model, batches, _ = make(seed)
    return model, {**batches, "train": lambda step: batches["train"][step]}, loss

def restless(seed):
    with torch.random.fork_rng():
        torch.seed()
        salt = torch.rand(()).item()
    model, batches, _ = make(seed)
    return model, batches, lambda m, b: loss(m, b) + salt

def number(seed):
    return 7
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a text and a module of factories in it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "race_models", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(120)))
    (tmp_path / "race_models.py").write_text(FACTORY)
    yield tmp_path
    sys.modules.pop("race_models", None)


def call(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["race", *map(str, arguments)])


def test_help_names_every_contestant_without_loading_them():
    from stiefel.optim.race_contestants import CONTESTANTS

    assert NAMES.split(", ") == list(CONTESTANTS)
    output = " ".join(call("--help").output.replace("│", " ").split())
    for words in (
        NAMES,
        "(model, batches, loss)",
        "Example: stiefel race --text",
        "--model my_mod",
    ):
        assert words in output
    script = (
        "import sys, atexit\nfrom stiefel.cli import main\n"
        "atexit.register(lambda: print('HEAVY', 'torch' in sys.modules))\nmain(['race', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("HEAVY False")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --text FILE... or --model MODULE:MAKE"),
        (["text.txt"], "give either --text FILE... or --model MODULE:MAKE"),
        (["--text", "text.txt", "--model", "a:b"], "give either --text"),
        (["--text", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
        (
            ["--text", "text.txt", "--context", "500"],
            "bytes to validate on, a context of 500 needs",
        ),
        (
            ["--text", "text.txt", "--optimizers", "normuom"],
            "no optimizer 'normuom'. Did you mean normuon",
        ),
        (["--text", "text.txt", "--seeds", "0,x"], "want whole numbers joined by commas"),
        (["--text", "text.txt", "--picture", "gif"], "want svg or png; got 'gif'"),
        (["--text", "text.txt", "--split", "line"], "split must be one of position, file"),
        (["--text", "text.txt", "--steps", "1"], "Invalid value for '--steps'"),
        (["--model", "nonsense"], "a model is named as module:function, got 'nonsense'"),
        (["--model", "no_such_module:make"], "cannot load 'no_such_module:make'"),
        (["--model", "race_models:number"], "race_models:number: it returned a int"),
        (["--model", "race_models:broken"], 'return {}["nothing"]'),
    ],
)
def test_bad_input_is_named_and_ends_with_2(here, arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert not (here / "race").exists()


def test_a_race_on_text_is_printed_written_drawn_and_not_run_twice(here):
    (here / "more.txt").write_text("more text, of another kind. " * 40)
    arguments = [
        "--text",
        "text.txt",
        "more.txt",
        "--optimizers",
        "muon",
        "--seeds",
        "0,1",
        "--lr",
        "0.1",
        *TINY,
    ]
    result = call(*arguments, "--jobs", "2", "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["optimizer"] for row in rows} == {"adamw", "muon"}
    assert all(len(row["final"]["values"]) == 2 for row in rows)
    content = json.loads((here / "race/race.json").read_text())
    assert content["optimizers"] == rows
    assert content["settings"]["task"]["text"] == ["text.txt", "more.txt"]
    assert content["versions"]["torch"]
    svg = (here / "race/race.svg").read_text()
    assert "CPU seconds of training" in svg
    # Each run once: every rate tried on seed 0, and the chosen ones on seed 1.
    runs = {path: path.stat().st_mtime_ns for path in (here / "race/runs").glob("*.json")}
    grid = {(row["optimizer"], point["lr"]) for row in rows for point in row["grid"]}
    joint = [lr for lr in content["settings"]["adamw_rates"] if lr != rows[0]["elementwise_lr"]]
    assert len(runs) == len(grid) + len(joint) + 2

    result = call(*arguments, "--jobs", "1", "--picture", "png")
    assert result.exit_code == 0, result.output
    assert re.search(r"muon +\d\.\d{3} ± ", result.stdout)
    assert "Written: race/race.png" in result.stdout
    assert (here / "race/race.png").read_bytes().startswith(b"\x89PNG")
    after = {path: path.stat().st_mtime_ns for path in (here / "race/runs").glob("*.json")}
    assert after == runs


def test_a_race_on_a_model_without_matplotlib(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--optimizers", "rmnp", "--seeds", "0", "--steps", "4", "--jobs", "1"]
    result = call("--model", "race_models:make", *arguments)
    assert result.exit_code == 0, result.output
    assert "rmnp" in result.stdout
    assert 'pip install "stiefel[atlas]"' in result.stderr
    assert json.loads((here / "race/race.json").read_text())["settings"]["task"] == {
        "factory": "race_models:make"
    }
    assert not list((here / "race").glob("race.svg"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("later", "a run failed: IndexError: list index out of range"),
        ("restless", "must make the same weights and batches whenever it gets the same seed"),
    ],
)
def test_what_only_shows_in_the_runs(here, name, message):
    arguments = ["--optimizers", "rmnp", "--seeds", "0", "--steps", "6", "--jobs", "1"]
    result = call("--model", f"race_models:{name}", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert ("Traceback" in result.stderr) == (name == "later")


def test_an_interrupt_keeps_what_is_finished(here):
    command = ["--text", "text.txt", "--optimizers", "muon", *TINY]
    running = subprocess.Popen(
        [sys.executable, "-m", "stiefel", "race", *command, "--steps", "9999", "--jobs", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 90
    while not list(here.glob("race/runs/*.lock")):  # at work
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    stdout, stderr = running.communicate(timeout=30)
    assert running.returncode == 130, stderr
    assert "Interrupted. What was finished is kept in race; the same command goes on" in stderr
    assert "Traceback" not in stdout + stderr
    assert not (here / "race/race.json").exists()


def test_a_termination_is_an_interrupt_too():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before

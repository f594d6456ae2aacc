"""The command line: what it prints, how it ends, what it leaves alone."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stiefel import __version__
from stiefel.cli import app

FAKES = Path(__file__).parents[1] / "atlas"
HEAVY = ("torch", "scipy", "numpy", "matplotlib", "jinja2")


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """The fake papers in place of the real ones, for this process and its children."""
    monkeypatch.syspath_prepend(FAKES)
    monkeypatch.setenv("STIEFEL_TEST_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.chdir(tmp_path)
    import fake_papers

    papers = (fake_papers.quick, fake_papers.crash, fake_papers.slow, fake_papers.unavailable)
    monkeypatch.setattr("stiefel.papers.all_papers", lambda: papers)
    monkeypatch.setattr("stiefel.atlas.page.all_papers", lambda: papers)
    return fake_papers


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def process(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "stiefel", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


COMMANDS = ["list", "show", "reproduce", "atlas"]


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)])
def test_every_help_has_an_example(command):
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Example: stiefel " in " ".join(result.output.split())
    for name in COMMANDS if not command else ():
        assert f" {name} " in result.output


def test_version():
    assert call("--version").output == f"stiefel {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["reproduce", "--help"],
        ["reproduce", "--scale", "huge"],
        ["reproduce", "--seeds", "0,x"],
        ["reproduce", "no-such-paper"],
        ["nonsense"],
        ["list"],
        ["list", "--json"],
        ["show", "rmnp"],
    ],
)
def test_nothing_heavy_is_imported_to_say_something(arguments):
    script = (
        "import sys, atexit\n"
        "from stiefel.cli import main\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY} if m in sys.modules]))\n"
        f"main({arguments})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout[-200:]


def test_help_answers_at_once():
    """Measured in CPU time, so that a busy machine does not count: at most 0.5 s."""

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process("--help").communicate(timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_list_is_a_table_or_json(fakes):
    assert "The quick paper" in call("list").output
    lines = [json.loads(line) for line in call("list", "--json").output.splitlines()]
    assert [line["slug"] for line in lines] == ["quick", "crash", "slow", "unavailable"]
    assert lines[0]["claims"] == [
        {"text": "the ratio stays small", "metric": "ratio", "relation": "≤", "bound": 0.9}
    ]


def test_show_tells_what_is_claimed_and_how_to_use_it(fakes):
    output = call("show", "quick").output
    for words in ("The quick paper", "the ratio stays small", "ratio ≤ 0.9", "import RMNP"):
        assert words in output
    assert json.loads(call("show", "quick", "--json").output)["slug"] == "quick"


@pytest.mark.parametrize("command", [["show"], ["reproduce"], ["reproduce", "quick"]])
def test_unknown_slugs_get_near_matches(fakes, command):
    result = call(*command, "quikc")
    assert result.exit_code == 2
    assert "no paper 'quikc'. Did you mean quick?" in result.stderr
    assert result.stdout == ""
    result = call(*command, "zzzzzz")
    assert result.exit_code == 2
    assert "There are: quick, crash, slow, unavailable." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "want one of smoke, laptop, paper; got 'huge'"),
        (["--seeds", "0,x"], "want whole numbers joined by commas"),
        (["--seeds", ""], "want whole numbers joined by commas"),
        (["--seeds", "-1"], "want whole numbers joined by commas"),
        (["--seeds", "1,1"], "each seed once"),
        (["--jobs", "0"], "Invalid value for '--jobs'"),
        (["quick", "quick"], "asked for twice: quick"),
        (["no.such.module:paper"], "cannot load 'no.such.module:paper'"),
        (["fake_papers:nothing"], "cannot load 'fake_papers:nothing'"),
        (["fake_papers:make"], "'fake_papers:make' is a function, not a Paper"),
    ],
)
def test_bad_input_is_named_and_ends_with_2(fakes, tmp_path, arguments, message):
    result = call("reproduce", *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "results").exists()


def test_json_is_all_there_is_on_stdout_and_strict_tells_what_does_not_hold(fakes, tmp_path):
    names = ("fake_papers:quick", "fake_papers:unavailable")
    options = ("--seeds", "0,1", "--jobs", "2")
    done = process("reproduce", *names, *options, "--json", "--page", "page")
    stdout, stderr = done.communicate(timeout=120)
    assert done.returncode == 0, stderr
    # Nothing that the experiments print gets in between.
    lines = {line["slug"]: line for line in map(json.loads, stdout.splitlines())}
    assert {slug: line["verdict"] for slug, line in lines.items()} == {
        "quick": "reproduced",
        "unavailable": "not reproduced",
    }
    assert lines["quick"]["seeds"] == [0, 1]
    assert "quick seed 0: done" in stderr
    assert "Page: page/index.html" in stderr
    assert "measured 1.5" in re.sub("<[^>]+>", "", (tmp_path / "page/index.html").read_text())
    # Everything is there now: the same again in this process, as a table.
    result = call("reproduce", "quick", *options, "--strict")
    assert result.exit_code == 0
    assert "2 of 2 results are there already" in result.output
    assert "reproduced" in result.output
    assert "Results: results" in result.output
    assert call("reproduce", "quick", "unavailable", *options).exit_code == 0
    result = call("reproduce", "quick", "unavailable", *options, "--strict")
    assert result.exit_code == 1
    assert "not reproduced" in result.output
    built = call("atlas", "--out", "elsewhere")
    assert built.output == "Page: elsewhere/index.html\n"
    assert (tmp_path / "elsewhere/papers/slow.html").exists()


def test_the_page_needs_its_packages_before_the_work_starts(fakes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for arguments in (["reproduce", "quick", "--page", "page"], ["atlas"]):
        result = call(*arguments)
        assert result.exit_code == 2
        assert 'pip install "stiefel[atlas]"' in result.stderr
    assert not (tmp_path / "results").exists()


def slow_run(tmp_path, **options):
    """A run with seed 0 finished and seed 1 at work; its pid, and that of seed 1."""
    running = process("reproduce", "fake_papers:slow", "--jobs", "2", **options)
    started = tmp_path / "started-1"
    wait_for(lambda: (tmp_path / "results/slow/laptop/0.json").exists())
    wait_for(lambda: started.exists() and started.read_text())
    return running, int(started.read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_everything_and_keeps_what_is_done(fakes, tmp_path, number):
    running, child = slow_run(tmp_path, start_new_session=True)
    start = time.monotonic()
    if number is signal.SIGINT:  # a terminal sends Ctrl-C to the whole group
        os.killpg(running.pid, number)
    else:
        running.send_signal(number)
    running.wait(timeout=20)
    took = time.monotonic() - start
    stdout, stderr = running.communicate()
    assert running.returncode == 130, stderr
    assert took < 2
    assert not alive(child)
    assert "Interrupted. What was finished is kept in results" in stderr
    assert "Traceback" not in stdout + stderr
    files = {p.name for p in (tmp_path / "results").rglob("*") if p.is_file()}
    assert files == {"0.json"}
    if number is signal.SIGINT:  # and goes on from there
        (tmp_path / "hurry").touch()
        result = call("reproduce", "slow", "--seeds", "0,1", "--json")
        assert "1 of 2 results are there already; 1 run to do." in result.stderr
        assert json.loads(result.stdout)["verdict"] == "reproduced"


def test_a_killed_run_takes_its_children_along_and_can_be_repeated(fakes, tmp_path):
    running, child = slow_run(tmp_path)
    running.kill()
    running.wait()
    wait_for(lambda: not alive(child), seconds=5)
    running.communicate()
    for path in (tmp_path / "results").rglob("*.json"):
        json.loads(path.read_text())
    (tmp_path / "hurry").touch()
    result = call("reproduce", "slow", "--seeds", "0,1", "--json")
    assert "1 of 2 results are there already" in result.stderr
    assert json.loads(result.stdout)["verdict"] == "reproduced"

"""``stiefel merge`` as a person meets it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import stiefel.cli_merge as cli_merge
import stiefel.merge
from stiefel.cli import app

DISK = Path(__file__).parents[1] / "merge"
LINEAR = """models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 3}}
merge_method: linear
base_model: base
"""
TIES = LINEAR.replace("linear", "ties").replace("weight: 1", "weight: 1, density: 0.4")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with three models and a recipe."""
    monkeypatch.syspath_prepend(DISK)
    import plan_models_on_disk as disk

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    for seed, name in enumerate(("base", "a", "b")):
        disk.write(tmp_path / name, seed=seed)
    Path("recipe.yaml").write_text(LINEAR)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, ["merge", *(str(a) for a in arguments)])


def lines(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_merge_by_the_formula(here):
    result = call("recipe.yaml", "--out", "out", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "18 tensors linear" not in result.stdout
    assert "12 tensors linear" in result.stdout
    assert "Written: out (12 tensors, " in result.stdout
    models = [load_file(here / name / "model.safetensors") for name in ("a", "b")]
    merged = load_file("out/model.safetensors")
    for name, value in merged.items():
        torch.testing.assert_close(value, (models[0][name] + 3 * models[1][name]) / 4)
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "config.json", "merge.json", "model.safetensors", "stiefel_merge.yaml",
    ]  # fmt: skip
    assert Path("out/config.json").read_bytes() == Path("base/config.json").read_bytes()


def test_a_dry_run_writes_nothing(here):
    before = sorted(Path().rglob("*"))
    result = call("recipe.yaml", "--dry-run")
    assert result.exit_code == 0
    for word in ("read", "merge", "write", "memory", "time"):
        assert word in result.stdout
    assert sorted(Path().rglob("*")) == before
    assert call("recipe.yaml", "--out", "out", "--dry-run").exit_code == 0
    assert sorted(Path().rglob("*")) == before


def test_json_has_one_object_a_line(here):
    result = call("recipe.yaml", "--out", "out", "--json", "--explain")
    assert result.exit_code == 0, result.output
    plan, merged, explained = lines(result)
    assert plan["plan"]["tensors"] == merged["merged"]["tensors"] == 12
    assert plan["plan"]["methods"] == {"linear": 12}
    assert plan["plan"]["peak_bytes"] > 0
    assert merged["merged"]["folder"] == "out"
    assert explained["explain"]["reference"] == "a"
    assert len(explained["explain"]["layers"]) == 3


def test_recipes_are_relative_to_themselves(here, monkeypatch):
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert call(here / "recipe.yaml", "--dry-run").exit_code == 0


def test_explanation_with_its_picture(here):
    Path("recipe.yaml").write_text(TIES)
    result = call("recipe.yaml", "--out", "out", "--explain")
    assert result.exit_code == 0, result.output
    assert "against base" in result.stdout
    assert result.stdout.count("merged") >= 3
    picture = Path("out.explain.svg")
    assert picture.read_text().startswith("<?xml")
    assert "Written: out.explain.svg" in result.stdout
    first = picture.read_bytes()
    call("recipe.yaml", "--out", "out", "--explain", "--resume")
    assert picture.read_bytes() == first
    result = call("recipe.yaml", "--dry-run", "--explain", "--explain-plot", "deep/x.png")
    assert result.exit_code == 0
    assert "merged" not in result.stdout
    assert Path("deep/x.png").read_bytes().startswith(b"\x89PNG")


def test_the_current_folder_is_no_output(here, monkeypatch):
    """It would be renamed away under the shell that stands in it."""
    (here / "work" / "x").mkdir(parents=True)
    monkeypatch.chdir(here / "work" / "x")
    for out in (".", "..", "../x", "/"):
        result = call(here / "recipe.yaml", "--out", out)
        assert result.exit_code == 2
        assert "would replace the current folder" in result.stderr
    assert call(here / "recipe.yaml", "--out", "../y").exit_code == 0


def test_minutes_are_announced(here, monkeypatch):
    monkeypatch.setattr(
        sys.modules["stiefel.merge.explain"], "seconds_to_explain", lambda *_: 7200.0
    )
    result = call("recipe.yaml", "--dry-run", "--explain")
    assert "--explain takes about 2.0 h of one core" in result.stderr


def test_an_interrupt_while_explaining_leaves_the_output(here, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["stiefel.merge.explain"], "explain", stop)
    result = call("recipe.yaml", "--out", "out", "--explain")
    assert result.exit_code == 130
    assert "out is written; --explain is not finished" in result.stderr
    assert Path("out/merge.json").exists()


def test_what_cannot_be_explained_is_said_before_the_work(here):
    text = "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\nmerge_method: passthrough\n"
    Path("recipe.yaml").write_text(text)
    result = call("recipe.yaml", "--out", "out", "--explain")
    assert result.exit_code == 2
    assert "nothing to explain" in result.stderr
    assert not Path("out").exists()


def test_matrices_beyond_the_limit_are_named(here):
    result = call("recipe.yaml", "--dry-run", "--explain", "--explain-size", 4)
    assert result.exit_code == 0
    assert "have more than 4 inputs" in result.stderr
    assert "–" in result.stdout


def test_without_matplotlib_only_the_picture_is_missing(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = call("recipe.yaml", "--out", "out", "--explain")
    assert result.exit_code == 0
    assert 'pip install "stiefel[atlas]"' in result.stderr
    assert not Path("out.explain.svg").exists()


# Typer itself may load Pydantic, so what needs it is taken away in its place.
@pytest.mark.parametrize("package", ["yaml", "stiefel.merge.recipe_schema"])
def test_without_the_extra_it_is_named(here, monkeypatch, package):
    monkeypatch.delattr(stiefel.merge, "recipe_schema", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    result = call("recipe.yaml", "--dry-run")
    assert result.exit_code == 2
    assert 'pip install "stiefel[merge]"' in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe.yaml"], "give --out DIR"),
        (["nothing.yaml", "--dry-run"], "nothing.yaml:\n  cannot be read: No such file"),
        (["recipe.yaml", "--out", "a"], "would replace the input"),
        (["recipe.yaml", "--dry-run", "--shard-size", "many"], "want a size such as 500MB"),
        (["recipe.yaml", "--dry-run", "--shard-size", "0"], "want a size such as 500MB"),
        (["recipe.yaml", "--dry-run", "--explain-plot", "x.gif"], "ends in .svg or .png"),
        (["recipe.yaml", "--dry-run", "--threads", "0"], "--threads"),
        (["recipe.yaml", "--out", "full"], "was not written by a merge"),
    ],
)
def test_bad_input_ends_with_two(here, arguments, said):
    Path("full").mkdir()
    Path("full/mine.txt").write_text("")
    result = call(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("recipe").exists()


def test_a_wrong_recipe_is_answered_with_lines(here):
    Path("recipe.yaml").write_text(LINEAR.replace("weight: 3", "wieght: 3").replace("b,", "c,"))
    result = call("recipe.yaml", "--dry-run")
    assert result.exit_code == 2
    assert "line 3: models[1].parameters.wieght" in result.stderr
    assert "did you mean 'weight'?" in result.stderr


def test_nan_is_found_and_named(here):
    held = load_file("a/model.safetensors")
    held["model.norm.weight"][2] = float("nan")
    save_file(held, "a/model.safetensors", metadata={"format": "pt"})
    result = call("recipe.yaml", "--out", "out")
    assert result.exit_code == 2
    assert "model.norm.weight holds 1 NaN" in result.stderr
    assert not Path("out").exists()
    Path("recipe.yaml").write_text(LINEAR + "allow_nonfinite: keep\n")
    assert call("recipe.yaml", "--out", "out").exit_code == 0


def test_notes_go_to_stderr(here):
    Path("recipe.yaml").write_text(LINEAR + "parameters: {density: 0.3}\n")
    result = call("recipe.yaml", "--dry-run", "--json")
    assert result.exit_code == 0
    assert "note: line 6: parameters.density has no effect" in result.stderr
    assert lines(result)[0]["plan"]["warnings"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_written(here, monkeypatch, number):
    assert call("recipe.yaml", "--out", "whole").exit_code == 0
    shown = cli_merge._Display.show

    def show(self, *arguments):
        monkeypatch.setattr(cli_merge._Display, "show", shown)
        os.kill(os.getpid(), number)
        import time

        time.sleep(0.2)  # a worker's; the main thread hears of it

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli_merge._Display, "show", show)
    result = call("recipe.yaml", "--out", "out", "--threads", 1)
    assert result.exit_code == 130
    assert "the same command with --resume goes on" in result.stderr
    assert not Path("out").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    result = call("recipe.yaml", "--out", "out", "--resume")
    assert result.exit_code == 0, result.output
    for file in Path("whole").iterdir():
        assert (Path("out") / file.name).read_bytes() == file.read_bytes()


def test_adapters_alone(here, monkeypatch):
    import test_plan_adapters as adapters

    adapters.lora(here / "x", 1)
    adapters.lora(here / "y", 2)
    Path("recipe.yaml").write_text(adapters.LORA)
    result = call("recipe.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "one LoRA adapter" in result.stdout
    result = call("recipe.yaml", "--out", "out", "--resume")
    assert result.exit_code == 0
    assert "adapter of 1 modules" in result.stdout
    assert "--resume has no effect" in result.stderr
    result = call("recipe.yaml", "--out", "out2", "--json")
    assert [list(line) for line in lines(result)] == [["plan"], ["merged"]]
    first = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    assert "merge.json" in first
    assert call("recipe.yaml", "--out", "out").exit_code == 0  # again, over what a merge wrote
    assert {file.name: file.read_bytes() for file in Path("out").iterdir()} == first
    Path("mine").mkdir()
    Path("mine/notes").write_text("")
    result = call("recipe.yaml", "--out", "mine")
    assert result.exit_code == 2
    assert "was not written by a merge" in result.stderr
    assert "merges adapters alone" in call("recipe.yaml", "--dry-run", "--explain").stderr


def test_the_output_is_split_into_files(here):
    result = call("recipe.yaml", "--out", "out", "--shard-size", "1KiB", "--json")
    assert result.exit_code == 0, result.output
    assert lines(result)[0]["plan"]["output_files"] == len(list(Path("out").glob("*.safetensors")))


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("1.5 kib", 1536), ("700", 700), ("2M", 2_000_000), ("1TiB", 2**40)],
)
def test_sizes(text, size):
    assert cli_merge._shard_bytes(text) == size


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:01"), (59.5, "1:00"), (75, "1:15"), (3725, "1:02:05")]
)
def test_clock(seconds, text):
    assert cli_merge._clock(seconds) == text


def test_progress_where_there_is_no_terminal(monkeypatch):
    import io

    from rich.console import Console

    out = io.StringIO()
    clock = [0.0]
    monkeypatch.setattr(cli_merge.time, "monotonic", lambda: clock[0])
    with cli_merge._Display(Console(file=out), "merge") as display:
        for now, fraction in ((1, 0.1), (12, 0.4), (13, 0.5), (30, 0.75)):
            clock[0] = float(now)
            display.show(fraction, f"[{now}] of 40 · x")
    assert out.getvalue() == (
        "merge: 40% 0:18 left [12] of 40 · x\nmerge: 75% 0:10 left [30] of 40 · x\n"
    )


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom stiefel.cli import main\n"
        "try:\n    main(['merge', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'yaml', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "stiefel merge recipe.yaml --out merged --dry-run" in done.stdout
    assert done.stdout.rstrip().endswith("[]")

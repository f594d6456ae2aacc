"""``stiefel diagnose``: output, files, exit status, bad input."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from stiefel.cli import app

runner = CliRunner()


def state(seed=0, scale=0.02):
    g = torch.Generator().manual_seed(seed)
    names = [
        f"model.layers.{i}.mlp.{kind}_proj.weight" for i in range(3) for kind in ("up", "down")
    ]
    return {name: scale * torch.randn(40, 40, generator=g) for name in names}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(state(), folder / "model.safetensors", {"format": "pt"})
    return folder


def run(*arguments):
    return runner.invoke(app, ["diagnose", *map(str, arguments)])


def test_the_terminal_has_the_summary(model):
    result = run(model)
    assert result.exit_code == 0, result.output
    for word in ("9,600 parameters", "median k", "up", "down", "Nothing unusual"):
        assert word in " ".join(result.output.split())


def test_json_is_one_object_a_line(model):
    result = run(model, "--json")
    report = json.loads(result.stdout)
    assert len(report["matrices"]) == 6
    assert report["findings"] == []


def test_the_page_is_written_whole(model, tmp_path):
    page = tmp_path / "new" / "report.html"
    result = run(model, "--html", page)
    assert result.exit_code == 0, result.output
    assert page.read_text().startswith("<!doctype html>")
    assert [p.name for p in page.parent.iterdir()] == ["report.html"]


def test_two_models_and_a_run(model, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file(state(1, 0.05), other)
    result = run(model, "--compare", other)
    assert "What differs most" in result.output
    result = run(model, other, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[2]["attribution"]["up"] in ("lambda_dominated", "mixed")
    assert "along the run" in run(model, other).output
    result = run(model, other, "--compare", other)
    assert result.exit_code == 2
    assert "--compare takes one checkpoint" in result.output


def test_damage_is_status_2_and_the_rest_is_told(model):
    weights = state()
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    result = run(model, "--json")
    assert result.exit_code == 2
    assert len(json.loads(result.stdout)["matrices"]) == 6
    assert "1 entries are NaN or infinite" in run(model).output


def test_strict_is_status_1_where_anything_is_unusual(model):
    weights = state()
    weights["model.layers.0.mlp.up_proj.weight"][:9] = 0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert run(model).exit_code == 0
    assert run(model, "--strict").exit_code == 1


def test_own_components(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"layers.0.mixer.a.weight": torch.randn(40, 40)}, file)
    report = json.loads(run(file, "--json", "--component", r"mixer\.a=up").stdout)
    assert report["matrices"][0]["kind"] == "up"
    for bad in ("mixer", "=up", "mixer=", "(=up"):
        result = run(file, "--component", bad)
        assert result.exit_code == 2
        assert "--component wants" in result.output or "regular expression" in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "safetensors"),
        (b"\x80\x04\x95", "safetensors"),
        (b"\xff" * 8 + b"{}", "safetensors"),
    ],
)
def test_bad_files_end_with_a_sentence(tmp_path, content, message):
    file = tmp_path / "x.safetensors"
    if content is not None:
        file.write_bytes(content)
    result = run(file)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_page_that_cannot_be_written(model, tmp_path):
    (tmp_path / "blocked").write_text("")
    result = run(model, "--html", tmp_path / "blocked" / "r.html")
    assert result.exit_code == 2
    assert "cannot be written" in result.output

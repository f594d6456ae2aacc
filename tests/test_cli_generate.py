"""``stiefel generate``, from a folder of images to a picture."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from stiefel.cli import app
from stiefel.generate import RetrievalDiffusion


def call(*arguments):
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of digits as image files, and a model trained on the first."""
    root = tmp_path_factory.mktemp("generate")
    images, labels = load_digits(return_X_y=True)
    for name, chosen in (("low", labels < 5), ("high", labels >= 5)):
        (root / name).mkdir()
        for i in np.flatnonzero(chosen)[:40]:
            pixels = np.uint8(images[i].reshape(8, 8) * 15)
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")
    model = root / "m.safetensors"
    status, said = call(
        "--train", root / "low", "--model", model, "--size", 8, "--grey", "--train-steps", 30,
        "--keep", 12, "--json",
    )  # fmt: skip
    assert status == 0, said
    told = json.loads(said)["trained"]
    assert told["images"] == 40
    assert 0 < told["loss"] < 2
    return root


def test_help_has_an_example():
    status, said = call("--help")
    assert status == 0
    assert "stiefel generate --train photos" in " ".join(said.split())


def test_training_leaves_a_model_and_its_database(folders):
    names = sorted(p.name for p in folders.iterdir())
    assert [n for n in names if n.endswith(".safetensors")] == [
        next(n for n in names if n.startswith("m.database-")),
        "m.safetensors",
    ]
    assert len(RetrievalDiffusion.load(folders / "m.safetensors").database) == 40


def test_samples_of_the_same_seed_and_their_neighbours(folders, tmp_path):
    out = tmp_path / "grid.png"
    common = ("--model", folders / "m.safetensors", "--count", 5, "--steps", 4, "--out", out)
    status, said = call(*common, "--json")
    assert status == 0, said
    told = json.loads(said)
    assert np.asarray(told["neighbours"]).shape == (5, 4)
    first = out.read_bytes()
    model = RetrievalDiffusion.load(folders / "m.safetensors")
    _, rows = model.sample(
        5, steps=4, generator=torch.Generator().manual_seed(0), return_neighbours=True
    )
    assert told["neighbours"] == rows.tolist()
    assert call(*common)[0] == 0
    assert out.read_bytes() == first
    assert call(*common, "--seed", 1)[0] == 0
    assert out.read_bytes() != first
    status, said = call(*common, "--database", folders / "high", "--top-m", "3", "--json")
    assert status == 0, said
    named = json.loads(said)["neighbours"]
    assert all((folders / "high" / n).is_file() for line in named for n in line)
    assert len({line[0] for line in named}) == 3
    query = next((folders / "high").iterdir())
    status, said = call(*common, "--query", query, "--neighbours", 2, "--guidance", 2, "--json")
    assert status == 0, said
    assert [line[0] for line in json.loads(said)["neighbours"]] == ["query"] * 5


def test_bad_input_ends_with_2(folders, tmp_path):
    model, out = folders / "m.safetensors", tmp_path / "o.png"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no")
    few = tmp_path / "few"
    few.mkdir()
    Image.new("L", (9, 9), 90).save(few / "a.png")
    for arguments, wanted in (
        ((), "--model"),
        (("--model", tmp_path / "none"), "does not exist"),
        (("--model", broken / "a.png"), "is damaged"),
        (("--model", model, "--database", tmp_path / "none"), "is not a folder"),
        (("--model", model, "--database", broken), "cannot be read as an image"),
        (("--model", model, "--database", few), "k=4 neighbours of a database of 1"),
        (("--model", model, "--guidance", "0.5"), "guidance must be finite, at least 1"),
        (("--model", model, "--top-m", "many"), "want a share"),
        (("--model", model, "--top-m", "1.5"), "m as a share"),
        (("--model", model, "--top-m", "41"), "at most 40"),
        (("--model", model, "--neighbours", "41"), "k=41 neighbours"),
        (("--model", model, "--steps", "1000"), "steps must be"),
        (("--model", model, "--query", broken / "a.png"), "cannot be read as an image"),
        (("--model", model, "--count", "0"), "--count"),
        (("--model", model, "--out", tmp_path / "o.jpg"), "must end in .png"),
        (("--model", tmp_path / "n", "--train", tmp_path, "--query", model), "--out FILE too"),
        (("--model", tmp_path / "n", "--train", tmp_path / "none"), "is not a folder"),
        (("--model", tmp_path / "n", "--train", few), "do images differ?"),
    ):
        if "--train" not in arguments and "--out" not in arguments:
            arguments = (*arguments, "--out", out)
        status, said = call(*arguments)
        flat = " ".join(said.replace("│", " ").split())
        assert status == 2, (arguments, said)
        assert wanted in flat, (arguments, said)
        assert not out.exists()

import numpy as np
import pytest
import torch

from stiefel.papers import Scale, UnavailableError, race, web_gpt


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def tokens(folder):
    generator = np.random.default_rng(0)
    for name, count in zip(web_gpt.FILES, (20_000, 4_000), strict=True):
        # Every token is followed by its successor, so there is something to learn.
        start = generator.integers(0, 50)
        ((np.arange(count) + start) % 50).astype("<u2").tofile(folder / name)


def test_refusal_names_everything_that_is_missing(no_cuda, monkeypatch):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="CUDA") as error:
        race.plan(Scale.PAPER)
    for word in ("STIEFEL_DATA", "train.bin", "val.bin", "uint16"):
        assert word in str(error.value)


def test_refusal_names_the_missing_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tokens(tmp_path)
    (tmp_path / "val.bin").unlink()
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError) as error:
        race.plan(Scale.PAPER)
    assert str(tmp_path / "val.bin") in str(error.value)
    assert "train.bin" not in str(error.value)
    assert "CUDA" not in str(error.value)


def test_with_both_there_it_is_gpt2_small(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tokens(tmp_path)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    plan = race.plan(Scale.PAPER)
    assert plan.trainer is web_gpt.launch
    assert plan.steps == 10_000
    assert (plan.settings["width"], plan.settings["blocks"]) == (768, 12)
    assert set(plan.grids) == set(race.LAPTOP_GRIDS)


def small(folder, **changes):
    config = {
        "width": 16,
        "blocks": 1,
        "heads": 2,
        "context": 16,
        "vocabulary": 64,
        "batch": 8,
        "micro": 2,
        "steps": 12,
        "warmup": 2,
        "every": 6,
        "windows": 6,
        "schedule": "cosine",
        "clip": 1.0,
        "folder": str(folder),
        "method": "normuon",
        "lr": 2e-2,
        "seed": 0,
    }
    return {**config, **changes}


def test_torchrun_training_is_the_same_on_one_process_and_on_two(tmp_path):
    """The whole path, small: launcher, ranks, accumulation, sharing of batches, evaluation."""
    tokens(tmp_path)
    seen = []
    one = web_gpt.launch(small(tmp_path), lambda f, m: seen.append(f), processes=1)
    two = web_gpt.launch(small(tmp_path), lambda f, m: None, processes=2)
    assert seen == [0.5, 1.0]
    assert one["steps"] == two["steps"] == [6, 12]
    assert one["final"] < one["losses"][0] < 4.2
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-3)
    assert two["select"] == pytest.approx(one["select"], abs=2e-3)


def test_a_failed_process_is_reported_with_its_output(tmp_path):
    tokens(tmp_path)
    with pytest.raises(RuntimeError, match="batch 7 is not a multiple of 1 ranks × 2"):
        web_gpt.launch(small(tmp_path, batch=7), lambda f, m: None, processes=1)

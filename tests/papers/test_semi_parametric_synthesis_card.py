import numpy as np
import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_listing_is_cheap,
    check_smoke,
    check_snippet,
)

from stiefel.generate import frechet_distance, precision_recall
from stiefel.papers import Scale, UnavailableError, get
from stiefel.papers import semi_parametric_synthesis as card
from stiefel.papers import semi_parametric_synthesis_runs as runs
from stiefel.papers.sequence_digits import CIFAR_TEST, CIFAR_TRAIN

SLUG = "semi-parametric-synthesis"


@pytest.fixture(scope="module")
def measurement():
    return check_smoke(SLUG, race=False, seconds=20)


def test_listing_is_cheap():
    check_listing_is_cheap("semi_parametric_synthesis")


def test_metrics_are_those_of_the_runs(measurement):
    m = measurement.metrics
    assert m["ratio_parametric"] == m["fd_small"] / m["fd_parametric"]
    assert m["ratio_equal"] == m["fd_retrieval"] / m["fd_unconditional"]
    assert m["ratio_random"] == m["fd_random"] / m["fd_unconditional"]
    gain = m["precision_retrieval"] - m["precision_unconditional"]
    assert m["precision_gain"] == gain
    assert m["copy_ratio"] == m["distance_retrieval"] / m["test_distance"]
    assert measurement.config["parameters"] == {
        "parametric": 201_720, "unconditional": 51_432, "retrieval": 51_432, "random": 51_432,
        "small": 32_632,
    }  # fmt: skip
    assert measurement.config["copy_warning"] is (m["copy_ratio"] < 0.9)
    assert len(measurement.series["swapped neighbours"]) == 4 * len(measurement.series["swapped"])


def test_the_judge_is_good_and_real_images_pass_it():
    here = runs.lab("digits")
    assert (len(here.images), len(here.test_images)) == (1198, 599)
    assert here.accuracy >= 0.965
    floor = frechet_distance(here.features(here.test_images), here.features(here.images))
    assert floor == pytest.approx(0.2, abs=0.05)
    real = here.features(here.test_images)
    assert float(here.features(here.images).std()) == pytest.approx(1)
    assert precision_recall(real, here.features(here.images))[0] > 0.85
    state = torch.random.get_rng_state()
    runs.lab.cache_clear()
    again = runs.lab("digits")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(again.judge[-1].weight, here.judge[-1].weight)


def test_stand_ins_come_round_evenly():
    rows = runs.drawn(7, 17, torch.Generator().manual_seed(0))
    assert rows[:14].bincount().tolist() == [2] * 7
    assert len(rows) == 17


def test_repeats_differ_and_are_averaged():
    config = {**card.STANDARD, **runs.SMOKE, "seed": 1, "repeat": 0}
    first, second = (runs.build({**config, "repeat": r}, (8, 8), 24).null.detach() for r in (0, 1))
    assert not torch.equal(first, second)
    mean = card._averaged([{"fd": 1.0, "n": 3, "share": 0.5}, {"fd": 2.0, "n": 3}])
    assert mean == {"fd": 1.5, "n": 3, "share": 0.5}


def test_swap_draws_from_unseen_classes_by_old_statistics(monkeypatch):
    seen = {}

    def stop(model, here, config):
        seen["model"] = model
        return {}

    monkeypatch.setattr(runs, "_swapped", stop)
    config = {**card.STANDARD, **runs.SMOKE, "steps": 2, "seed": 0, "repeat": 0, "classes": "seen"}
    runs.run(config, lambda part, word: None)
    here = runs.lab("digits")
    low = here.images[here.labels < 5]
    assert torch.equal(seen["model"].database.images, low)
    mean = seen["model"].database.encoder.mean
    from stiefel.generate import DCTEncoder

    assert torch.equal(mean, DCTEncoder(24).fit(low).mean)


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure_draws_what_was_measured(measurement):
    figure = check_figure(SLUG, measurement)
    drawn = [np.asarray(line.get_xdata()) for line in figure.axes[0].lines]
    for name in card.QUALITY:
        value = measurement.metrics[f"fd_{name}"]
        assert any(np.allclose(x, value) for x in drawn)
    (picture,) = figure.axes[2].images
    sheet = np.asarray(picture.get_array())
    sample = np.asarray(measurement.series["swapped"][:64]).reshape(8, 8)
    np.testing.assert_allclose(sheet[:8, :8, 0], (sample + 1) / 2, atol=1e-6)


def test_snippet_runs():
    assert check_snippet(SLUG)["samples"].shape == (4, 8, 8)


def test_metadata():
    paper = get(SLUG)
    assert (paper.arxiv, paper.published) == ("2204.11824", "2022-04")
    assert [claim.bound for claim in paper.claims] == [
        0.85, 0.70, 0.10, 0.85, 0.85, 0.10, 0.75, 0.35, 0.03, 0.9,
    ]  # fmt: skip


def test_paper_scale_is_refused_without_its_data(monkeypatch, tmp_path):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get(SLUG).experiment(Scale.PAPER, 0, None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"test_batch\.bin"):
        get(SLUG).experiment(Scale.PAPER, 0, None)


def test_experiment_is_refused_without_diffusers(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"stiefel\[generate\]"):
        runs.settings(Scale.SMOKE)


def test_colour_images_run_the_same_way(monkeypatch, tmp_path):
    """The authors' scale in small: random CIFAR records, the U-Net, on the CPU."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for file in (*CIFAR_TRAIN, *CIFAR_TEST):
        records = rng.integers(0, 256, (16, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(16) % 10
        records.tofile(tmp_path / file)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    monkeypatch.setattr(runs, "CIFAR_JUDGE", (1, "cpu"))
    runs.lab.cache_clear()
    here = runs.lab("cifar10")
    assert here.images.shape == (80, 3, 32, 32)
    assert here.features(here.images).shape == (80, 48)
    config = {
        **card.STANDARD, **runs.PAPER, "device": "cpu", "steps": 1, "batch": 2, "swapped": 50,
        "ddim": 1, "seed": 0, "repeat": 0, "size": "small", "classes": "seen",
    }  # fmt: skip
    monkeypatch.setitem(runs.UNET_SIZES, "small", (8, 8))
    monkeypatch.setattr(runs, "frechet_distance", lambda a, b: 1.0)  # too few rows here
    result = runs.run(config, lambda part, word: None)
    assert 0 <= result["share"] <= 1
    assert len(result["samples"]) == runs.SHOWN * 3072
    runs.lab.cache_clear()

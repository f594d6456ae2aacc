import numpy as np
import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.nn.poincare import PoincareResNet, dist, expmap0, frechet_mean, logmap0
from stiefel.papers import Scale, UnavailableError, get, poincare_resnet, poincare_runs


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("poincare-resnet", race=False, seconds=15)


def test_metrics_are_those_of_the_series(measurement):
    m, s = measurement.metrics, measurement.series
    assert m["identity_accuracy"] == s["accuracy identity"][1]
    assert m["normal_accuracy"] == s["accuracy normal"][1]
    start = s["norm identity"][0]
    assert m["identity_drift"] == max(abs(n / start - 1) for n in s["norm identity"])
    assert m["normal_norm"] == s["norm normal"][2]
    assert m["midpoint_gap"] == max(s["gap"])
    assert m["resnet_identity_fgsm"] == s["fgsm identity"][3]
    assert m["resnet_euclidean"] == s["fgsm euclidean"][0]


def test_signals_are_those_of_the_sheet(measurement):
    """Independent of the scale: identity 3.9 at every depth, an eighth a layer otherwise."""
    s = measurement.series
    assert s["norm identity"][0] == pytest.approx(3.9, abs=0.1)
    assert measurement.metrics["identity_drift"] < 1e-6
    falls = np.diff(np.log(s["norm normal"])) / 4
    np.testing.assert_allclose(falls, np.log(poincare_resnet.FALL), atol=0.2)


def test_foreign_images_attacks_and_scores():
    crops = poincare_runs.foreign(5, 8, 1, 0)
    assert crops.shape == (5, 1, 8, 8)
    assert crops.abs().max() <= 1
    assert poincare_runs.foreign(2, 32, 3, 0).shape == (2, 3, 32, 32)
    assert torch.equal(crops, poincare_runs.foreign(5, 8, 1, 0))
    assert poincare_runs.auroc(torch.tensor([2.0, 3]), torch.tensor([0.0, 1])) == 1
    assert poincare_runs.auroc(torch.tensor([1.0]), torch.tensor([1.0, 0])) == 0.75
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    y = torch.tensor([0, 1, 2, 0, 1])
    moved = poincare_runs.attacked(model, crops, y, 0.1)
    assert float((moved - crops).abs().max()) == pytest.approx(0.1)
    loss = torch.nn.functional.cross_entropy
    assert loss(model(moved), y) > loss(model(crops), y)
    assert torch.equal(poincare_runs.attacked(model, crops, y, 0.0), crops)


def test_networks_have_one_shape():
    config = {**poincare_runs.LAPTOP["network"], "seed": 0}
    models = {
        n: poincare_runs.network({**config, "init": n}, 10, 1) for n in poincare_resnet.NETWORKS
    }
    x = torch.zeros(2, 1, 8, 8)
    for model in models.values():
        assert model(x).shape == (2, 10)
    convolutions = sum(type(m).__name__ == "PoincareConv2d" for m in models["normal"].modules())
    assert convolutions == sum(
        isinstance(m, torch.nn.Conv2d) for m in models["euclidean"].modules()
    )
    assert isinstance(models["identity"], PoincareResNet)
    assert not torch.equal(models["identity"].head.weight, models["normal"].head.weight)


def test_means_and_their_slow_twin():
    u, points = poincare_runs.cloud(200, 4, 1.0, torch.Generator().manual_seed(0))
    radius = dist(torch.zeros(4, dtype=torch.float64), points, poincare_runs.C).mean()
    assert float(radius) == pytest.approx(1)
    slow = poincare_runs.karcher(u, tol=1e-12)
    torch.testing.assert_close(
        logmap0(frechet_mean(points, poincare_runs.C), poincare_runs.C), slow
    )
    torch.testing.assert_close(expmap0(u, poincare_runs.C), points)
    config = {**poincare_runs.SMOKE["means"], "radii": [0.1, 1.0], "seed": 0}
    gaps = poincare_runs.means(config, lambda f, m: None)["gap"]
    assert 0 < gaps[0] < gaps[1] < 0.01


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("poincare-resnet", measurement)


def test_figure_draws_the_theory(measurement):
    figure = check_figure("poincare-resnet", measurement, panels=4)
    drawn = [np.asarray(line.get_ydata(), float) for line in figure.axes[0].lines]
    start, layers = measurement.series["norm normal"][0], np.asarray(poincare_resnet.LAYERS)
    assert any(len(y) == 5 and np.allclose(y, start * 0.125**layers) for y in drawn)


def test_snippet_runs():
    assert check_snippet("poincare-resnet")["optimizer"].state


def test_metadata():
    paper = get("poincare-resnet")
    assert (paper.arxiv, paper.published) == ("2303.14027", "2023-03")
    assert [claim.bound for claim in paper.claims] == [0.93, 0.20, 1e-4, 1e-4, 1e-3]


def test_paper_scale_is_refused_without_its_data(monkeypatch):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get("poincare-resnet").experiment(Scale.PAPER, 0, None)


def test_cifar_becomes_images(monkeypatch, tmp_path):
    pixels = torch.arange(3 * 1024.0).reshape(1024, 3)[None]
    split = (pixels, torch.zeros(1), pixels, torch.zeros(1))
    monkeypatch.setattr(poincare_runs, "cifar10", lambda folder: (split, "sum"))
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    (x, _, _, _), _ = poincare_runs.images({"data": "cifar10"})
    assert x.shape == (1, 3, 32, 32)
    assert float(x[0, 1, 2, 5]) == float(pixels[0, 2 * 32 + 5, 1])

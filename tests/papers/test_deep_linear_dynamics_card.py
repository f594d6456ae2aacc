import numpy as np
import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Scale, UnavailableError, deep_linear_runs, get

SLUG = "deep-linear-dynamics"


@pytest.fixture(scope="module")
def measurement():
    return check_smoke(SLUG, race=False)


def test_ratios_are_those_of_the_times(measurement):
    m = measurement.metrics
    assert m["depth_ratio"] == m["steps_orthogonal_24"] / m["steps_orthogonal_4"]
    assert m["steps_at_24"] == m["steps_orthogonal_24"]
    assert m["gaussian_ratio"] == m["steps_gaussian_8"] / m["steps_orthogonal_8"]
    assert m["gaussian_deep_steps"] <= min(m["steps_gaussian_16"], m["steps_gaussian_24"])
    rates = [m[f"rate_orthogonal_{depth}"] for depth in (8, 16, 24)]
    assert m["rate_spread"] == max(rates) / min(rates)
    assert m["error_ratio_off_ten"] == abs(m["error_ratio"] - 10)
    depths = measurement.series["depths"]
    assert measurement.series["steps orthogonal"] == [m[f"steps_orthogonal_{d}"] for d in depths]


def test_values_of_the_sheet_that_no_random_number_touches(measurement):
    """The closed form against descent, the strengths and the pre-training criterion."""
    m = measurement.metrics
    assert m["closed_form_error"] == pytest.approx(0.0027, abs=5e-5)
    assert m["closed_form_error"] * m["error_ratio"] == pytest.approx(0.027, abs=5e-4)
    assert m["pretraining_residual"] == pytest.approx(0.2057, abs=5e-5)
    assert m["pretraining_residual_random"] == pytest.approx(0.88, abs=0.02)
    assert measurement.config["strengths"][0] == pytest.approx(0.29717, abs=5e-6)
    assert len(measurement.config["strengths"]) == 9


@pytest.mark.parametrize("depth", [2, 4])
def test_formula_predicts_the_learning_time_of_decoupled_networks(depth):
    sizes, modes = deep_linear_runs.plan(Scale.LAPTOP), deep_linear_runs.task(Scale.SMOKE).modes
    measured = deep_linear_runs.learning_times(modes, sizes, "decoupled", depth, 0)
    predicted = deep_linear_runs.predicted_time(modes, sizes, depth)
    assert measured["reached"] == 1
    assert predicted == pytest.approx(measured["steps"], abs=1 + 0.1 * measured["steps"])


def test_runs_that_do_not_arrive_count_with_the_cap():
    sizes, modes = deep_linear_runs.plan(Scale.SMOKE), deep_linear_runs.task(Scale.SMOKE).modes
    found = deep_linear_runs.learning_times(modes, sizes, "gaussian", 24, 0)
    assert found == {"steps": 60.0, "least": 60.0, "reached": 0.0, "rate": 0.0}


def test_laptop_scale_is_the_protocol_of_the_sheet():
    sizes = deep_linear_runs.plan(Scale.LAPTOP)
    assert {2, 4, 8, 16, 24} <= set(sizes.depths)
    assert (sizes.hidden, sizes.cap, sizes.width, sizes.layers) == (48, 400, 200, 100)
    np.testing.assert_allclose(deep_linear_runs.RATES, 2 * np.logspace(0.6, -1.4, 11))
    assert deep_linear_runs.TOLERANCE == 0.002


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure(measurement):
    figure = check_figure(SLUG, measurement)
    labels = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert {"orthogonal", "Gaussian", "formula"} <= labels


def test_snippet_runs():
    names = check_snippet(SLUG)
    assert names["curves"].shape == (2, 400)
    weight = names["net"][0].weight
    torch.testing.assert_close(weight @ weight.mT, torch.eye(64), rtol=0, atol=5e-6)


def test_metadata():
    paper = get(SLUG)
    assert (paper.arxiv, paper.published, paper.code) == ("1312.6120", "2013-12", None)
    assert paper.claim.at_most == 3


def test_mnist_is_read_and_checked(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (12, 28, 28), dtype=np.uint8), np.arange(12) % 10
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y)
    pixels, labels, digest = deep_linear_runs.read_mnist(tmp_path / "mnist.npz")
    assert pixels.shape == (12, 784)
    assert float(pixels.max()) <= 1
    assert labels.tolist() == list(y)
    assert len(digest) == 64
    np.savez(tmp_path / "mnist.npz", x_train=x[:5], y_train=y)
    with pytest.raises(ValueError, match="x_train"):
        deep_linear_runs.read_mnist(tmp_path / "mnist.npz")


def test_paper_scale_is_refused_without_its_data(monkeypatch):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get(SLUG).experiment(Scale.PAPER, 0, None)

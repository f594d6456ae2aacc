import numpy as np
import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Scale, UnavailableError, coloured_digits, get, rich_features
from stiefel.papers.coloured_digits import COLOURED, INVERSE, draw, small_digits

SLUG = "rich-features"


@pytest.fixture(scope="module")
def measurement():
    return check_smoke(SLUG, race=False, seconds=12)


def test_gains_are_differences_of_what_was_measured(measurement):
    m = measurement.metrics
    assert m["gain_over_random"] == m["rfc_vrex"] - m["random_vrex"]
    assert m["gain_over_erm_init"] == m["rfc_vrex"] - m["erm_init_vrex"]
    best = max(m[f"rfc_{name}"] for name in rich_features.LABELS)
    assert m["best_minus_oracle"] == best - m["oracle"]
    assert measurement.series["V-REx on rich features"] == [m["rfc_vrex"]]


def test_plain_training_follows_the_colour_even_at_this_scale(measurement):
    m = measurement.metrics
    assert m["erm"] == m["erm_against_colour"] < 0.3
    assert m["erm_with_colour"] > 0.8
    assert m["oracle"] > 0.5


def test_colours_and_labels_are_wrong_as_often_as_they_should_be():
    images = small_digits()
    data = draw(COLOURED, 0, images)
    assert (len(data.x), len(data.y_test), data.x.shape[1]) == (1347, 450, 128)
    order = np.random.RandomState(0).permutation(1797)
    below_five = (images.y[torch.from_numpy(order)] < 5).long()
    wrong = (below_five[:1347] != data.y).double().mean()
    assert float(wrong) == pytest.approx(0.25, abs=0.04)

    def colour(x):
        lit = x.reshape(-1, 2, 64).sum(-1) > 0
        assert (lit.sum(1) == 1).all()  # one channel is dark
        return lit[:, 1].long()

    for e, rate in enumerate(COLOURED.rates):
        rows = data.env == e
        share = (colour(data.x)[rows] != data.y[rows]).double().mean()
        assert float(share) == pytest.approx(rate, abs=0.05)
    for x, rate in zip(data.tests, coloured_digits.TEST_RATES, strict=True):
        share = (colour(x) != data.y_test).double().mean()
        assert float(share) == pytest.approx(rate, abs=0.07)
    grey = (colour(data.grey) != data.y).double().mean()
    assert float(grey) == pytest.approx(0.5, abs=0.05)
    # The pixels are those of the digits, whatever the colour.
    pixels = images.x[torch.from_numpy(order[:1347])]
    assert torch.equal(data.x.reshape(-1, 2, 64).sum(1), pixels)
    inverse = draw(INVERSE, 0, images)
    assert float((inverse.y != below_five[:1347]).double().mean()) == pytest.approx(0.1, abs=0.03)


def test_worst_is_the_least_of_three_accuracies():
    data = draw(COLOURED, 0, small_digits(200))

    def by_colour(x):
        halves = x.reshape(-1, 2, 64).sum(-1)
        return halves[:, 1] - halves[:, 0]

    against, along, _ = data.accuracies(by_colour)
    assert data.worst(by_colour) == against
    assert against == pytest.approx(0.1, abs=0.15)
    assert along == pytest.approx(0.9, abs=0.15)


def test_training_is_the_penalised_loss_plus_norms_divided_by_the_weight():
    data = draw(COLOURED, 0, small_digits(60))
    model = coloured_digits.new_model(128, 8, 0)
    twin = coloured_digits.new_model(128, 8, 0)
    coloured_digits.train(model, data.x, data, "vrex", 100.0, 5, 1e-3)
    optimizer = torch.optim.Adam(twin.parameters(), lr=coloured_digits.LR)
    for _ in range(5):
        z = twin(data.x)[:, 0]
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        first, second = (bce(z[data.env == e], data.y[data.env == e].float()) for e in (0, 1))
        norm = sum(p.square().sum() for p in twin.parameters())
        loss = first + second + 100 * (first - second) ** 2 / 2 + 1e-3 * norm
        optimizer.zero_grad()
        (loss / 100).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_laptop_scale_is_that_of_the_sheet():
    sizes = rich_features.plan(Scale.LAPTOP)
    assert (sizes.hidden, sizes.images.train, sizes.factor) == (128, 1347, 1.0)
    assert (sizes.from_random, sizes.from_erm) == (1000, 300)
    assert (COLOURED.erm_steps, COLOURED.dro_steps, COLOURED.synth_steps) == (51, 501, 501)
    assert (COLOURED.l2, INVERSE.l2, coloured_digits.LR) == (1.1e-3, 1e-4, 5e-4)


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure_draws_chance_and_the_ceiling_of_shape(measurement):
    figure = check_figure(SLUG, measurement)
    middle = {float(line.get_ydata()[0]) for line in figure.axes[1].lines}
    assert {0.5, 0.75} <= middle
    right = {float(line.get_ydata()[0]) for line in figure.axes[2].lines}
    assert {0.5, 0.75, 0.9} <= right
    left = {float(line.get_xdata()[0]) for line in figure.axes[0].lines}
    assert left == {0.5, measurement.metrics["erm"], measurement.metrics["oracle"]}


def test_snippet_runs():
    found = check_snippet(SLUG)["rich"]
    assert found.groups_.shape == (400, 2)


def test_metadata():
    paper = get(SLUG)
    assert (paper.arxiv, paper.published) == ("2203.15516", "2022-03")
    bounds = {c.metric: c.bound for c in paper.claims}
    assert bounds == {
        "gain_over_random": 0.25,
        "gain_over_erm_init": 0.15,
        **{f"rfc_{name}": 0.5 for name in ("vrex", "irmv1", "fishr", "spectral_decoupling")},
        "best_minus_oracle": -0.12,
        "erm": 0.2,
        "oracle": 0.6,
    }


def test_paper_scale_says_all_that_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match=r"CUDA device.*STIEFEL_DATA"):
        get(SLUG).experiment(Scale.PAPER, 0, None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"CUDA device.*mnist\.npz"):
        get(SLUG).experiment(Scale.PAPER, 0, None)


def test_mnist_is_read_at_every_second_pixel_with_its_own_test_set(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
    arrays = {
        "x_train": np.zeros((60_000, 28, 28), np.uint8),
        "y_train": rng.integers(0, 5, 60_000),
        "x_test": np.zeros((10_000, 28, 28), np.uint8),
        "y_test": rng.integers(5, 10, 10_000),
    }
    arrays["x_train"][7], arrays["x_train"][50_000] = pixels, 255
    np.savez_compressed(tmp_path / "mnist.npz", **arrays)
    images = coloured_digits.mnist()
    assert images.x.shape == (60_000, 196)
    assert (images.train, images.own_test) == (50_000, True)
    wanted = torch.from_numpy(pixels[::2, ::2].reshape(-1) / np.float32(255))
    torch.testing.assert_close(images.x[7], wanted)
    assert not images.x[50_000].any()
    # Digits below 5 are all in the training set: the test set stays what it was.
    data = draw(COLOURED, 0, images)
    assert float(data.y.double().mean()) == pytest.approx(0.75, abs=0.01)
    assert float(data.y_test.double().mean()) == pytest.approx(0.25, abs=0.02)

    np.savez_compressed(tmp_path / "mnist.npz", **(arrays | {"x_test": arrays["x_test"][:3]}))
    with pytest.raises(ValueError, match=r"x_test .* must be \(10000, 28, 28\)"):
        coloured_digits.mnist()

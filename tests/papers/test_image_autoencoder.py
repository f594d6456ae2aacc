import math

import pytest
import torch
from torch import nn

from stiefel.data import MissingDataError
from stiefel.papers import UnavailableError, image_autoencoder
from stiefel.papers.image_autoencoder import build_optimizer, first_gradient, lines, split, train

CONFIG = {"method": "dct", "rank": 8, "lr": 4e-3, "seed": 1, "steps": 5, "batch": 128}


def quiet(fraction, message):
    pass


def test_windows_are_cut_from_the_lines_every_32_pixels():
    pixels = image_autoencoder.picture().pixels.double()
    grey = pixels.mean(-1) / 255
    rows = lines()
    assert rows.shape == (427, 16, 128)
    mean = torch.stack([grey[:, 32 * i : 32 * i + 128] for i in range(16)]).mean()
    for line, window in ((0, 0), (100, 7), (426, 15)):
        expected = grey[line, 32 * window : 32 * window + 128] - mean
        torch.testing.assert_close(rows[line, window].double(), expected, rtol=0, atol=1e-7)
    assert abs(rows.double().mean().item()) < 1e-7


def test_no_line_is_on_both_sides():
    training, test = split()
    assert torch.equal(training, lines()[:341].reshape(-1, 128))
    assert torch.equal(test, lines()[341:])


@pytest.mark.parametrize("method", ["adamw", "dct", "svd", "random-basis", "random-columns"])
def test_a_run_is_determined_by_its_config_and_learns(method):
    config = {**CONFIG, "method": method}
    first, second = (train(config, quiet) for _ in range(2))
    start = train({**config, "lr": 0.0}, quiet)
    for which in ("final", "select"):
        assert first[which] == second[which] < start[which]
    assert train({**config, "seed": 2}, quiet)["final"] != first["final"]
    assert first["milliseconds"] > 0
    assert first["steps"] == [5]


def test_a_run_equals_a_plain_loop():
    got = train({**CONFIG, "method": "adamw"}, quiet)
    draws = torch.Generator().manual_seed(1)
    w1 = torch.empty(256, 128).uniform_(-(128**-0.5), 128**-0.5, generator=draws)
    w2 = torch.empty(128, 256).uniform_(-1 / 16, 1 / 16, generator=draws)
    weights = [w1.requires_grad_(), w2.requires_grad_()]
    optimizer = torch.optim.Adam(weights, lr=4e-3)
    training, test = split()
    dirty = test + 0.1 * torch.randn(test.shape, generator=draws)
    for _ in range(5):
        x = training[torch.randint(len(training), (128,), generator=draws)]
        noise = 0.1 * torch.randn(x.shape, generator=draws)
        optimizer.zero_grad()
        ((torch.relu((x + noise) @ w1.T) @ w2.T - x) ** 2).mean().backward()
        optimizer.step()
    wrong = ((torch.relu(dirty @ w1.T) @ w2.T - test) ** 2).detach()
    for offset, which in enumerate(("final", "select")):
        expected = wrong[offset::2].sum() / test[offset::2].square().sum()
        assert got[which] == pytest.approx(expected.item(), rel=1e-4)


def test_a_diverged_run_says_so():
    result = train({**CONFIG, "method": "adamw", "lr": 1e25}, quiet)
    assert result["final"] is None
    assert result["select"] is None


def test_methods_share_rank_and_rate_and_only_the_basis_differs():
    model = nn.Linear(12, 20, bias=False)
    groups = {
        method: build_optimizer({**CONFIG, "method": method}, model).param_groups[0]
        for method in ("dct", "random-basis", "svd", "random-columns")
    }
    assert {g["lr"] for g in groups.values()} == {4e-3}
    assert {g["rank"] for g in groups.values()} == {8}
    assert {tuple(g["betas"]) for g in groups.values()} == {(0.9, 0.999)}
    different = {
        k for k, v in groups["dct"].items() if k != "params" and groups["random-basis"][k] != v
    }
    assert different == {"basis"}
    basis = groups["random-basis"]["basis"](12)
    torch.testing.assert_close(basis @ basis.T, torch.eye(12))
    with pytest.raises(ValueError, match="got 'sgd'"):
        build_optimizer({**CONFIG, "method": "sgd"}, model)


def test_first_gradient_is_that_of_the_weights_before_the_last_step():
    before = torch.get_rng_state()
    gradient = first_gradient(3, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert gradient.shape == (256, 128)
    torch.manual_seed(3)
    w1, w2 = nn.Linear(128, 256), nn.Linear(256, 128)
    x = lines()[::3].reshape(-1, 128)
    assert len(x) == 143 * 16
    hidden = x @ w1.weight.T + w1.bias
    wrong = (torch.relu(hidden) @ w2.weight.T + w2.bias - x).detach()
    # d/dW1 of the mean of squares, by hand.
    delta = (2 / wrong.numel()) * (wrong @ w2.weight) * (hidden > 0)
    torch.testing.assert_close(gradient, (delta.T @ x).detach(), rtol=1e-3, atol=1e-8)
    later = first_gradient(3, 4)
    assert later.norm() < gradient.norm()
    assert math.isfinite(later.norm().item())


def test_missing_picture_makes_the_paper_unavailable(monkeypatch):
    def missing():
        raise MissingDataError("pip install scikit-learn")

    monkeypatch.setattr(image_autoencoder, "photograph", missing)
    image_autoencoder.picture.cache_clear()
    with pytest.raises(UnavailableError, match="pip install scikit-learn"):
        image_autoencoder.picture()

import math

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

from stiefel.nn.operators import convert, relative_l2
from stiefel.papers import Scale, UnavailableError, get
from stiefel.papers import neural_operators_burgers as burgers
from stiefel.papers import neural_operators_networks as networks
from stiefel.papers import neural_operators_runs as runs
from stiefel.papers.neural_operators_figure import field_figure

SLUG = "neural-operators"


@pytest.fixture(scope="module")
def measurement():
    return check_smoke(SLUG, race=False, seconds=25)


def cole_hopf(points, viscosity, time):
    """u = −2ν φ_x / φ, where φ solves the heat equation, for u₀ = sin 2πx."""
    x = np.arange(1024) / 1024
    spectrum = np.fft.rfft(np.exp(np.cos(2 * np.pi * x) / (4 * np.pi * viscosity)))
    k = 2 * np.pi * np.arange(len(spectrum))
    spectrum = spectrum * np.exp(-viscosity * k**2 * time)
    phi, slope = np.fft.irfft(spectrum), np.fft.irfft(1j * k * spectrum)
    return (-2 * viscosity * slope / phi)[:: 1024 // points]


@pytest.mark.parametrize("time", [0.1, 1.0])
def test_burgers_against_the_exact_solution(time):
    x = np.arange(512) / 512
    u0 = np.stack((np.sin(2 * np.pi * x), np.sin(2 * np.pi * (x - 0.25))))
    found = burgers.solve(u0, viscosity=0.01, end=time, steps=800)
    exact = cole_hopf(512, 0.01, time)
    np.testing.assert_allclose(found[0], exact, atol=2e-8)
    # Trajectories do not mix: the second one is the first, a quarter turn on.
    np.testing.assert_allclose(found[1], np.roll(exact, 128), atol=2e-8)


def test_burgers_is_of_fourth_order_and_converged_in_space():
    def final(points, steps):
        u0 = burgers.initial_values(4, points, np.random.default_rng(0))
        return burgers.solve(u0, steps=steps)[:, :: points // 128]

    exact = final(256, 1600)
    coarse, fine = (np.abs(final(256, n) - exact).max() for n in (100, 200))
    assert 12 < coarse / fine < 20
    np.testing.assert_allclose(final(512, 300), final(256, 300), atol=1e-15)
    assert np.abs(final(256, 300) - exact).max() < 1e-7


def test_burgers_keeps_the_mean_and_loses_energy():
    u0 = burgers.initial_values(5, 256, np.random.default_rng(1)) + 0.3
    u = burgers.solve(u0)
    np.testing.assert_allclose(u.mean(1), u0.mean(1), atol=1e-14)
    assert (np.square(u).mean(1) < np.square(u0).mean(1)).all()


def test_initial_values_are_one_function_on_every_grid():
    one, two = (burgers.initial_values(3, n, np.random.default_rng(2)) for n in (256, 512))
    np.testing.assert_allclose(two[:, ::2], one, atol=1e-15)
    many = burgers.initial_values(20_000, 130, np.random.default_rng(0))
    k = 2 * np.pi * np.arange(1, 65)
    assert many.var() == pytest.approx(2 * np.square(25 / (k**2 + 25)).sum(), rel=0.03)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: burgers.initial_values(1, 64, np.random.default_rng(0)), ValueError, "above 128"),
        (lambda: burgers.solve(np.zeros(8)), ValueError, "count, points"),
        (lambda: burgers.solve(np.full((1, 8), np.nan)), ValueError, "finite"),
        (lambda: burgers.solve(np.zeros((1, 8)), steps=0), ValueError, "steps"),
        (lambda: burgers.solve(np.zeros((1, 8)), viscosity=0), ValueError, "viscosity"),
        (
            lambda: burgers.solve(1e9 * burgers.initial_values(1, 256, np.random.default_rng(0))),
            FloatingPointError,
            "more of them",
        ),
    ],
)
def test_bad_equations(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_ratios_are_those_of_the_errors(measurement):
    m, s = measurement.metrics, measurement.series
    assert s["sizes"] == [32, 64, 128, 256, 512]
    assert m["converted_ratio"] == max(v / s["converted"][1] for v in s["converted"][2:])
    assert m["plain_ratio"] == min(v / s["plain"][1] for v in s["plain"][2:])
    assert m["fno_ratio"] == max(v / s["fno"][1] for v in s["fno"][2:])
    assert m["fno_error"] == s["fno"][1]
    assert m["identity"] == 0
    assert s["plain"][1] == s["converted"][1] == s["official"][1]
    assert s["unet plain"][1] == s["unet converted"][1]
    assert m["unet_plain_ratio"] == max(s["unet plain"][2:]) / s["unet plain"][1]
    assert s["linear weighted"][1] == pytest.approx(s["linear summed"][1], rel=1e-4)
    assert s["softmax weighted"][0] == pytest.approx(s["softmax plain"][0], rel=1e-4)


def test_point_sets_are_what_the_notes_say():
    sets = runs.point_sets(0, 64)
    for index in sets:
        assert (index.diff() > 0).all()
        assert 0 <= int(index[0]) <= int(index[-1]) < 512
    assert torch.equal(sets[0], torch.arange(0, 512, 8))
    assert set(sets[-1].diff().tolist()) == {1, 8}


@pytest.mark.parametrize("kind", ["cnn", "fno", "softmax", "linear", "unet"])
def test_networks_take_every_grid_and_start_from_their_seed(kind):
    state = torch.random.get_rng_state()
    one, two, other = (networks.build(kind, 8, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    u = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(one(u), two(u))
        assert not torch.equal(one(u), other(u))
        assert convert(one, 64)(u).shape == u.shape


def test_networks_of_two_axes():
    for kind in ("cnn", "fno"):
        net = networks.build(kind, 4, 0, ndim=2, modes=4)
        u = torch.randn(1, 1, 16, 24)
        assert net(u).shape == u.shape
        assert net.lift.in_channels == 5
    parts = networks.with_coordinates(u)
    torch.testing.assert_close(parts[0, 2, 3, 0], torch.tensor(math.cos(2 * math.pi * 3 / 16)))
    torch.testing.assert_close(parts[0, 3, 0, 5], torch.tensor(math.sin(2 * math.pi * 5 / 24)))


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure_draws_every_network(measurement):
    figure = check_figure(SLUG, measurement)
    lines = [np.asarray(line.get_ydata()) for line in figure.axes[0].lines]
    for name in ("plain", "converted", "interpolated", "fno"):
        assert any(np.array_equal(y, measurement.series[name]) for y in lines)
    field = figure.axes[1].lines
    assert [len(line.get_ydata()) for line in field] == [256] * 4
    panels = field_figure([measurement]).axes
    error = np.subtract(measurement.series["field converted"], measurement.series["field truth"])
    np.testing.assert_allclose(panels[1].lines[1].get_ydata(), error)


def test_snippet_runs(capsys):
    scope = check_snippet(SLUG)
    assert "output against 256" in capsys.readouterr().out
    x = torch.randn(1, 1, 64)
    assert torch.equal(scope["operator"](x), scope["cnn"](x))


def test_metadata():
    paper = get(SLUG)
    assert (paper.arxiv, paper.published) == ("2506.10973", "2025-06")
    assert [claim.bound for claim in paper.claims] == [1.10, 1.10, 3.0, 1e-6, 0.05]
    check_listing_is_cheap("neural_operators")


def test_paper_scale_is_refused_without_its_data(monkeypatch, tmp_path):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get(SLUG).experiment(Scale.PAPER, 0, None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"nsforcing_test_1024\.pt"):
        get(SLUG).experiment(Scale.PAPER, 0, None)


def test_fields_of_the_authors_are_read_and_learned(monkeypatch, tmp_path):
    """The path of the paper's scale, with small files of the same layout."""
    generator = torch.Generator().manual_seed(0)
    for name, count, n in zip(runs.FILES, (3, 2), (8, 32), strict=True):
        x = 2 + torch.randn(count, n, n, generator=generator)
        torch.save({"x": x, "y": x.flip(1)}, tmp_path / name)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    small = {
        **runs.PAPER, "device": "cpu", "width": 4, "modes": 4, "epochs": 1, "batch": 2, "train": 3,
        "test": 2, "base": 8, "sizes": [8, 16, 32], "seed": 0, "model": "cnn",
    }  # fmt: skip
    train_x, _, test_x, test_y = runs.fields(small)
    assert train_x.shape == (3, 1, 8, 8)
    assert test_x.shape == test_y.shape == (2, 1, 32, 32)
    assert float(train_x.mean()) == pytest.approx(0, abs=1e-6)
    raw = [torch.load(tmp_path / name, weights_only=True) for name in runs.FILES]
    x, mean, std = raw[1]["x"], raw[0]["x"].mean(), raw[0]["x"].std()
    torch.testing.assert_close(test_x[:, 0], (x - mean) / std)
    assert torch.equal(test_y[:, 0], x.flip(1))
    found = runs.trained(small, lambda fraction, message: None)
    assert found["identity"] == 0
    assert len(found["field"]["truth"]) == 32
    assert len(found["plain"]) == 3
    torch.save({"x": torch.zeros(3, 8, 8)}, tmp_path / runs.FILES[0])
    with pytest.raises(ValueError, match="must hold x and y"):
        runs.fields(small)


def test_errors_are_means_over_the_functions():
    data = tuple(torch.randn(5, 1, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    config = {**runs.LAPTOP, "sizes": [32, 64]}
    found = runs.errors(torch.nn.Identity(), data, config)
    assert found[1] == pytest.approx(float(relative_l2(*data)))
    assert found[0] == pytest.approx(float(relative_l2(data[0][..., ::2], data[1][..., ::2])))

import numpy as np
import pytest
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_listing_is_cheap,
    check_smoke,
    check_snippet,
)

from stiefel.data import MissingDataError
from stiefel.numerics import instability_bound
from stiefel.papers import Progress, Scale, UnavailableError, dpp_least_squares, get
from stiefel.papers import dpp_least_squares_runs as runs

SLUG = "dpp-least-squares"


@pytest.fixture(scope="module")
def measurement():
    return check_smoke(SLUG, race=False, seconds=15)


@pytest.mark.parametrize(
    ("name", "n", "m", "rmse"),
    [("co2", 2225, 20, 2.0993), ("china", 17_120, 36, None), ("diabetes", 442, 65, None),
     ("digits", 1797, 62, None), ("legendre 20", 20_000, 20, None)],
)  # fmt: skip
def test_spaces_are_those_of_the_card(name, n, m, rmse):
    where = runs.space(name)
    assert (where.basis.size, where.basis.dimension) == (n, m)
    phi = where.basis.rows(np.arange(n)) / np.sqrt(where.basis.mu)[:, None]
    assert where.error == pytest.approx(np.mean((where.values - phi @ where.best) ** 2), rel=1e-9)
    least = np.linalg.lstsq(phi, where.values)[0]
    np.testing.assert_allclose(where.best, least, atol=1e-7 * np.abs(least).max())
    if rmse:
        assert where.error**0.5 == pytest.approx(rmse, abs=1e-4)


def test_error_ratio_is_that_of_all_candidates():
    where = runs.space("co2")
    design = runs.sample_design(where.basis, 40, generator=0)
    fit = runs.solve_design(where.basis, design, where.values[design.indices])
    phi = where.basis.rows(np.arange(2225)) * 2225**0.5
    error = np.mean((where.values - phi @ fit.orthonormal) ** 2)
    assert runs.error_ratio(where, design) == pytest.approx(error / where.error, rel=1e-8)


def test_undetermined_fits_are_the_smallest_one():
    where = runs.space("diabetes")
    indices = np.zeros(70, dtype=np.int64)
    design = runs.sample_design(where.basis, 65, method="dpp", generator=0)
    same = type(design)(indices, np.ones(70), 0.0, 1)
    assert 1 < runs.error_ratio(where, same) < 100


def test_metrics_are_those_of_the_designs(measurement):
    m = measurement.metrics
    assert m["draws_saved"] == m["times_needed_iid"] - m["times_needed_dpp-repeat"]
    assert m["best_rmse_co2"] == pytest.approx(2.0993, abs=1e-4)
    ratios = [
        m[f"mean_{s}_dpp-repeat"] / m[f"mean_{s}_iid"]
        for s in ("co2", "china", "diabetes", "digits")
    ]
    assert m["largest_mean_ratio"] == max(ratios)
    assert m["q95_dpp"] > 1
    assert m["gap"] < 1e-12
    assert m["bias"] < 1e-12
    assert m["chi2"] < 2


def test_needed_is_the_first_that_is_enough():
    found = {("s", t, "iid"): {"stable": p} for t, p in ((2, 0.1), (4, 0.8), (8, 1.0))}
    assert dpp_least_squares._needed(found, "s", "iid", 0.8) == 4
    assert dpp_least_squares._needed(found, "s", "iid", 0.9) == 8
    found["s", 8, "iid"] = {"stable": 0.5}
    assert dpp_least_squares._needed(found, "s", "iid", 0.9) == 16


def test_a_wrong_law_would_be_seen(monkeypatch):
    """Points in place of those of the process: the exact values stay, χ² does not."""
    honest = runs.counted(0, 1, 2000)

    def uniform(basis, draws, *, generator, sampler):
        order = generator.random((draws, basis.size)).argsort(axis=1)
        return order[:, : basis.dimension]

    monkeypatch.setattr(runs, "sample_dpp", uniform)
    wrong = runs.counted(0, 1, 2000)
    assert honest["chi2"] < 1.6
    assert wrong["chi2"] > 5
    assert wrong["gap"] == honest["gap"] < 1e-12


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure_draws_theory_over_measurement(measurement):
    figure = check_figure(SLUG, measurement)
    left, middle, right = figure.axes
    times = np.asarray(measurement.series["times co2"])
    assert any(np.allclose(line.get_ydata(), 1 + 1 / times) for line in left.lines)
    theory = next(line for line in middle.lines if line.get_label() == "i.i.d., proved")
    expected = [1 - instability_bound(20, round(20 * t)) for t in theory.get_xdata()]
    np.testing.assert_allclose(theory.get_ydata(), expected)
    assert len(right.collections) == 16


def test_snippet_runs():
    scope = check_snippet(SLUG)
    assert scope["design"].lambda_min >= 0.5
    x, basis, fit = scope["x"], scope["basis"], scope["fit"]
    features = scope["orthonormal_polynomials"](x, 20)
    np.testing.assert_allclose(features @ fit.coefficients, np.exp(x), atol=1e-10)
    assert basis.dimension == 20


def test_metadata():
    paper = get(SLUG)
    assert (paper.arxiv, paper.published, paper.topic) == ("2312.14057", "2023-12", "numerics")
    assert [c.bound for c in paper.claims] == [2.6, 0.2, 0.8, 1.0, 1.0, 1e-9, 1e-9, 1.5]
    check_listing_is_cheap("dpp_least_squares")


def test_paper_scale_runs_every_space(monkeypatch):
    """The authors' experiment with its sizes made small."""
    monkeypatch.setitem(dpp_least_squares.DRAWS, Scale.PAPER, 3)
    monkeypatch.setitem(dpp_least_squares.COUNTED, Scale.PAPER, (1, 500))
    spaces = ("legendre 10", "hermite 10", "total 2 3", "cross 3 3")
    monkeypatch.setattr(dpp_least_squares, "PAPER_SPACES", spaces)
    monkeypatch.setattr(dpp_least_squares, "PAPER_TIMES", (1, 2))
    monkeypatch.setattr(runs, "CANDIDATES", {2: 3000, 3: 3000})
    metrics = get(SLUG).experiment(Scale.PAPER, 0, Progress()).metrics
    for space in spaces:
        assert metrics[f"times_needed_{space.replace(' ', '_')}_dpp-repeat"] in (1, 2, 4)
    assert all(np.isfinite(v) for v in metrics.values())


def test_paper_scale_is_refused_without_memory(monkeypatch):
    monkeypatch.setattr(runs.os, "sysconf", lambda name: 1000)
    with pytest.raises(UnavailableError, match=r"3 GiB of memory, this machine has 0\.0 GiB"):
        get(SLUG).experiment(Scale.PAPER, 0, Progress())


def test_missing_data_are_named(monkeypatch):
    def missing():
        raise MissingDataError("no record here")

    monkeypatch.setitem(runs._SPACES, "lost", missing)
    with pytest.raises(UnavailableError, match="no record here"):
        runs.space("lost")
    with pytest.raises(ValueError, match="space must be one of co2"):
        runs.space("mars")

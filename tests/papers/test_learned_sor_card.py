from statistics import fmean

import numpy as np
import pytest
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_listing_is_cheap,
    check_smoke,
    check_snippet,
)

from stiefel.numerics import optimal_omega
from stiefel.papers import get, learned_sor
from stiefel.papers import learned_sor_runs as runs

SLUG = "learned-sor"


def quiet(fraction, message):
    pass


@pytest.fixture(scope="module")
def measurement():
    return check_smoke(SLUG, race=False, seconds=15)


def test_the_heat_equation_takes_as_many_iterations_as_known():
    run = runs.heat({"nx": 25, "steps": 5000, "policy": "cg", "seed": 0}, quiet)
    assert sum(run["counts"]) == pytest.approx(85_422, rel=1e-4)


def test_every_policy_computes_the_same_heat():
    energies = [
        runs.heat({"nx": 10, "steps": 100, "policy": p, "seed": 0}, quiet)["energy"]
        for p in ("cg", 1.3, "chebcb")
    ]
    np.testing.assert_allclose(energies, energies[0], rtol=1e-6)


@pytest.mark.parametrize(("t", "kappa"), [(0.25, 0.1), (0.75, 10.0), (0.5, 0.0), (1.75, 10.0)])
def test_diffusion(t, kappa):
    assert runs.diffusion(t) == pytest.approx(kappa, abs=1e-12)


def test_smoothing_is_a_weighted_laplacian():
    patch = np.random.default_rng(0).random((5, 4))
    A = runs.smoothing_system(patch, 0.3).to_csr().toarray()
    # Rows of a Laplacian sum to zero.
    np.testing.assert_allclose(A.sum(1), 0.3, atol=1e-13)
    assert A[0, 1] == pytest.approx(-np.exp(-20 * (patch[0, 1] - patch[0, 0]) ** 2) - 1e-3)
    assert A[2, 6] == pytest.approx(-np.exp(-20 * (patch[1, 2] - patch[0, 2]) ** 2) - 1e-3)
    assert A[3, 4] == 0


def test_pictures_are_grey_and_halved():
    pictures, digest = runs.grey_pictures()
    assert [p.shape for p in pictures] == [(214, 320), (214, 320)]
    assert all(0 <= p.min() < p.max() <= 1 for p in pictures)
    assert len(digest) == 64


def test_shifts_are_the_same_for_every_policy():
    config = {"kind": "low", "every": 1, "count": 12, "seed": 3}
    star = runs.shifts({**config, "policy": "instance"}, quiet)
    one = runs.shifts({**config, "policy": 1}, quiet)
    third = runs.shifts({**config, "policy": 1, "every": 3}, quiet)
    assert star["contexts"] == one["contexts"]
    assert all(-0.15 <= c <= 0.45 for c in star["contexts"])
    assert third["counts"] == one["counts"][::3]
    expected = [optimal_omega(4 * np.cos(np.pi / 11) / (4 + c)) for c in star["contexts"]]
    assert star["omegas"] == expected
    assert max(star["counts"]) < min(one["counts"])


def test_metrics_are_those_of_the_counts(measurement):
    m = measurement.metrics
    late = [m[f"patches_omega_{p}"] for p in learned_sor.PATCH_OMEGAS]
    assert m["patches_over_fixed"] == pytest.approx(m["patches_chebcb"] / min(late))
    assert m["patches_over_instance"] == pytest.approx(m["patches_chebcb"] / m["patches_instance"])
    assert m["patches_instance"] <= min(late)
    assert m["heat_best_step_over_fixed"] <= 1
    assert m["shifts_high_instance_over_fixed"] < 1
    blocks = [fmean(measurement.series[f"patches {n}"]) for n in ("instance", "fixed")]
    assert blocks[0] < blocks[1]


def test_runs_of_a_bandit_differ_and_are_averaged():
    config = {"policy": "tsallis", "count": 6, "seed": 0}
    found = [runs.patches({**config, "run": run}, quiet) for run in (0, 1)]
    assert found[0]["contexts"] == found[1]["contexts"]
    assert found[0]["omegas"] != found[1]["omegas"]
    mean = learned_sor._mean_runs(["a", "a"], found)["a"]["counts"]
    np.testing.assert_allclose(mean, np.mean([f["counts"] for f in found], axis=0))


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure_draws_theory(measurement):
    figure = check_figure(SLUG, measurement)
    line = figure.axes[2].lines[0]
    c, omega = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    expected = [optimal_omega(4 * np.cos(np.pi / 11) / (4 + x)) for x in c]
    np.testing.assert_allclose(omega, expected)


def test_snippet_runs():
    scope = check_snippet(SLUG)
    assert len(scope["solver"].history_) == 50
    assert np.isfinite(scope["u"]).all()


def test_metadata():
    paper = get(SLUG)
    assert (paper.arxiv, paper.published, paper.topic) == ("2310.02246", "2023-10", "numerics")
    assert [c.bound for c in paper.claims] == [
        0.80, 1.15, 1.06, 0.92, 0.32, 0.86, 0.86, 1.35, 1.25,
    ]  # fmt: skip
    check_listing_is_cheap("learned_sor")

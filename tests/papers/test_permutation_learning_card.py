import math

import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.data import MissingDataError
from stiefel.papers import Scale, UnavailableError, get
from stiefel.papers import permutation_networks as networks
from stiefel.theory import ensemble_size, permutation_moments


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("permutation-learning", race=False)


def test_headline_is_the_least_of_the_three(measurement):
    m = measurement.metrics
    names = ("last_layer_8", "last_layer_10", "ntk_6")
    assert m["exact_share"] == min(m[f"share_{name}"] for name in names)
    assert m["single_share"] == max(m[f"single_{name}"] for name in names)
    assert m["trained_share"] == 1.0
    for name, k, members in zip(names, (8, 10, 6), (128, 139, 540), strict=True):
        needed = ensemble_size(k, 0.1, n_ones="all", regime=name.rsplit("_", 1)[0])
        assert m[f"have_over_needed_{name}"] == members / needed >= 1


def test_moments_are_measured_against_theory(measurement):
    for regime in ("ntk", "last_layer"):
        s = {k.split()[0]: v for k, v in measurement.series.items() if k.endswith(f" {regime}")}
        on, off, var = permutation_moments(8, range(2, 9), regime=regime)
        for name, theory in (("mu_on", on), ("mu_off", off), ("sigma2", var)):
            assert s[name] == pytest.approx(theory.tolist(), rel=1e-12)
        errors = [abs(v / t - 1) for v, t in zip(s["var"], s["sigma2"], strict=True)]
        assert s["variance_error"] == pytest.approx(errors)
    worst = max(
        measurement.series[f"variance_error {regime}"][i]
        for regime in ("ntk", "last_layer")
        for i in (0, 2, 6)
    )
    assert measurement.metrics["variance_error"] == worst


def test_moments_see_a_wrong_theory(monkeypatch):
    good = networks.moments("last_layer", 64, 256, 0)
    assert max(row["mean_ratio"] for row in good) < 1
    swapped = {"last_layer": "ntk", "ntk": "last_layer"}
    monkeypatch.setattr(
        networks,
        "permutation_moments",
        lambda k, n, *, regime: permutation_moments(k, n, regime=swapped[regime]),
    )
    bad = networks.moments("last_layer", 2048, 256, 0)
    assert max(row["mean_ratio"] for row in bad) > 1


def test_limit_is_the_union_bound_and_a_little_more():
    share = networks.limit_share(5, "last_layer", 4000, 0)
    assert 0.89 < share < 0.93
    assert networks.limit_share(5, "last_layer", 200, 0) != share


def test_stopping_size_is_the_first_number_that_suffices():
    # Recomputed from single networks, without blocks of 16.
    found = networks.stopping_size(9, 128, 0.9, seed=2, first=7)
    assert found > 2 * networks.BLOCK
    perm = networks.random_permutation(9, 9)
    pairs = torch.combinations(torch.arange(9), 2)
    inputs = torch.zeros(36, 9).scatter_(1, pairs, 1.0)
    total, count, share = 0.0, 0, 0.0
    while share < 0.9:
        one = networks.PermutationEnsemble(9, 1, 128, "last_layer", 2, first=7 + count).fit(perm)
        total, count = total + one.decision(inputs), count + 1
        share = float(((total > 0) == inputs[:, perm].bool()).all(1).double().mean())
    assert found == count


def test_bytes_are_reversed_and_errors_are_counted(monkeypatch):
    text = networks.source_text(50_000)
    result = networks.reverse_bytes(text, 128, 256, 0)
    assert result["bytes"] == 50_000
    assert result["kernel_errors"] == result["ridge_errors"] == 0
    assert result["kernel_table"] == result["ridge_table"] == 1
    assert result["single_errors"] > 1000
    monkeypatch.setattr(networks, "REVERSAL", (0, 1, 2, 3, 4, 5, 6, 7))
    wrong = networks.reverse_bytes(text, 128, 256, 0)
    raw = bytes(torch.cat([text.train, text.validation]).tolist())
    palindromes = sum(f"{b:08b}" == f"{b:08b}"[::-1] for b in raw)
    assert wrong["ridge_errors"] == 50_000 - palindromes


def test_permutations_are_never_the_identity():
    for seed in range(30):
        assert networks.random_permutation(2, seed).tolist() == [1, 0]


def test_growth_is_the_slope_of_the_table():
    result = networks.growth()
    assert result["slope_all_ntk"] == pytest.approx(math.log(113875 / 4866) / math.log(16))
    assert result["slope_single_last_layer"] == pytest.approx(math.log(10764 / 449) / math.log(16))


def test_paper_scale_is_as_wide_as_the_official_one():
    plan = networks.plan(Scale.PAPER)
    assert plan.widths["last_layer"] == 50_000
    assert plan.stopping == tuple(get("permutation-learning").figure.__globals__["OFFICIAL"])


def test_missing_source_is_said(monkeypatch):
    def missing(limit):
        raise MissingDataError("no source here")

    monkeypatch.setattr(networks, "python_source", missing)
    with pytest.raises(UnavailableError, match="no source here"):
        get("permutation-learning").experiment(Scale.SMOKE, 0, None)


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("permutation-learning", measurement)


def test_figure_draws_theory_and_measurement(measurement):
    figure = check_figure("permutation-learning", measurement)
    means = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert measurement.series["mu_on ntk"] in means
    assert measurement.series["on ntk"] in means
    assert measurement.series["off ntk"][:-1] in means
    assert 43 in figure.axes[2].lines[-2].get_ydata()


def test_snippet_runs(capsys):
    scope = check_snippet("permutation-learning")
    assert (scope["members"], scope["ensemble"].score()) == (152, 1.0)
    assert "[[0, 0, 0, 0, 1, 0, 1, 1]]" in capsys.readouterr().out


def test_metadata():
    paper = get("permutation-learning")
    assert (paper.arxiv, paper.published) == ("2502.16763", "2025-02")
    assert paper.claim.at_least == 1.0

import pytest
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Progress, Scale, UnavailableError, get, normuon


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("normuon")


def test_losses_are_differences_of_the_runs(measurement):
    m = measurement.metrics
    assert m["loss_short_minus_adamw"] == m["loss_short"] - m["loss_adamw"]
    assert m["loss_minus_muon"] == m["loss_normuon"] - m["loss_muon"]
    assert m["loss_minus_control"] == m["loss_normuon"] - m["loss_control"]
    assert m["control_minus_muon"] == m["loss_control"] - m["loss_muon"]
    assert m["behind_muon"] == float(m["loss_minus_muon"] > 0.01)


def test_the_short_run_has_its_own_schedule_over_six_tenths(measurement):
    assert measurement.series["steps short"] == [5, 10, 12]
    assert measurement.series["steps normuon"] == [5, 10, 15, 20]


def test_row_ratio_is_after_over_before(measurement):
    before = measurement.series["variation before tall"]
    after = measurement.series["variation after tall"]
    assert measurement.metrics["variation_ratio"] == pytest.approx(sum(after) / sum(before))
    assert measurement.series["probe steps"][0] >= 5  # a quarter of the run


def test_other_seeds_use_the_rates_of_the_grid_s_seed():
    asked = []

    class Watched(Progress):
        def shared(self, kind, configs, compute, *, span=(0.0, 1.0)):
            asked.append([(c["method"], c["seed"], c["lr"], c["steps"]) for c in configs])
            return super().shared(kind, configs, compute, span=span)

    result = normuon.experiment(Scale.SMOKE, 2, Watched())
    grid, own = asked
    assert len(grid) == 9
    assert {seed for _, seed, _, _ in grid} == {0}
    rates = result.config["rates"]
    assert own == [
        ("muon", 2, rates["muon"], 20),
        ("normuon", 2, rates["normuon"], 20),
        ("adamw", 2, rates["adamw"], 20),
        ("normuon", 2, rates["normuon"], 12),
        ("muon-exact-rms", 2, rates["muon"], 20),
    ]


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("normuon", measurement)


def test_figure(measurement):
    check_figure("normuon", measurement)


def test_snippet_runs():
    assert check_snippet("normuon")["optimizer"].state


def test_metadata():
    paper = get("normuon")
    assert (paper.arxiv, paper.published) == ("2510.05491", "2025-10")
    assert paper.claim.at_most == 0


def test_paper_scale_is_refused_without_its_data(monkeypatch):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get("normuon").experiment(Scale.PAPER, 0, None)

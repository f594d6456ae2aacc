import pytest
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Progress, Scale, UnavailableError, auon, get, race


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("auon")


def test_losses_are_differences_of_the_runs(measurement):
    m = measurement.metrics
    assert m["loss_minus_adamw"] == m["loss_auon"] - m["loss_adamw"]
    assert m["hybrid_minus_adamw"] == m["loss_hybrid-auon"] - m["loss_adamw"]
    assert m["hybrid_minus_muon"] == m["loss_hybrid-auon"] - m["loss_muon"]
    assert m["loss_minus_control"] == m["loss_auon"] - m["loss_control"]
    normalized = m["loss_hybrid-auon-normalized"] - m["loss_adamw"]
    assert m["normalized_minus_adamw"] == normalized


def test_the_control_runs_at_auon_s_rate(monkeypatch):
    # Rates that no other method has.
    monkeypatch.setitem(race.LAPTOP_GRIDS, "auon", (1.1e-2, 2.2e-2, 4.4e-2))
    asked = []

    class Watched(Progress):
        def shared(self, kind, configs, compute, *, span=(0.0, 1.0)):
            asked.append([(c["method"], c["seed"], c["lr"]) for c in configs])
            return super().shared(kind, configs, compute, span=span)

    rates = auon.experiment(Scale.SMOKE, 2, Watched()).config["rates"]
    grid, own = asked
    assert len(grid) == 15
    assert {seed for _, seed, _ in grid} == {0}
    assert own == [
        *((method, 2, rates[method]) for method in auon.METHODS),
        ("normalized-momentum", 2, rates["auon"]),
    ]


def test_control_is_looked_at_in_every_step_of_every_kind(measurement):
    series = measurement.series
    assert series["probe steps"] == list(range(1, 21))
    largest = max(max(series[f"difference {kind}"]) for kind in auon.KINDS)
    assert measurement.metrics["control_difference"] == largest
    # 16 × 16 matrices: r = sqrt(1 + 1/256) to first order.
    assert largest == pytest.approx(1 - (1 + 1 / 256) ** -0.5, rel=0.1)


def test_time_ratios(measurement):
    m = measurement.metrics
    assert m["time_ratio_adamw"] == m["milliseconds_auon"] / m["milliseconds_adamw"]
    assert m["time_ratio_muon"] == m["milliseconds_hybrid"] / m["milliseconds_muon"]


def test_timing_takes_medians_of_interleaved_steps(monkeypatch):
    # First steps are not timed; then muon, hybrid, adamw, auon, and again.
    ticks = iter([9.0, 4.0, 2.0, 1.0, 7.0, 6.0, 3.0, 5.0])
    names = []

    def clock(optimizer):
        names.append(type(optimizer).__name__)
        return next(ticks)

    monkeypatch.setattr(auon, "REPEATS", 2)
    monkeypatch.setattr(auon, "CHEAP_REPEATS", 1)
    monkeypatch.setattr(auon, "_cpu_seconds", clock)
    seconds = auon.step_seconds(Scale.SMOKE, 0)
    assert seconds == {"muon": 8.0, "hybrid": 5.0, "adamw": 2.5, "auon": 3.0}
    assert names == ["Muon", "HybridAuON", "AdamW", "AuON"] * 2


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("auon", measurement)


def test_figure_draws_the_bound_of_the_control(measurement):
    figure = check_figure("auon", measurement)
    levels = [line.get_ydata()[0] for line in figure.axes[1].lines]
    assert 1e-4 in levels
    assert len(figure.axes[2].patches) == 4


def test_snippet_runs():
    assert check_snippet("auon")["optimizer"].state


def test_metadata():
    paper = get("auon")
    assert (paper.arxiv, paper.published) == ("2509.24320", "2025-09-29")
    assert paper.claim.at_most == 0.06


def test_paper_scale_is_refused_without_its_data(monkeypatch):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get("auon").experiment(Scale.PAPER, 0, None)

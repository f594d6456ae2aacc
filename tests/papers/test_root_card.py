import math

import numpy as np
import pytest
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Progress, Scale, UnavailableError, get, root


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("root")


def test_losses_are_differences_of_the_runs(measurement):
    m = measurement.metrics
    assert m["noisy_minus_muon"] == m["loss_root-noisy"] - m["loss_muon-noisy"]
    assert m["loss_minus_muon"] == m["loss_root"] - m["loss_muon"]
    assert m["clip_only_noisy_minus_muon"] == m["loss_clip-noisy"] - m["loss_muon-noisy"]
    assert m["value_clip_minus_muon"] == m["loss_value-noisy"] - m["loss_muon-noisy"]
    assert m["outliers_cost_root"] == m["loss_root-noisy"] - m["loss_root"]
    coefficients = m["loss_coefficients-noisy"] - m["loss_muon-noisy"]
    assert m["coefficients_only_noisy_minus_muon"] == coefficients
    assert m["outliers_cost_muon"] != 0


def test_runs_asked_for():
    asked = []

    class Watched(Progress):
        def shared(self, kind, configs, compute, *, span=(0.0, 1.0)):
            asked.append(configs)
            return super().shared(kind, configs, compute, span=span)

    rates = root.experiment(Scale.SMOKE, 2, Watched()).config["rates"]
    grid, own = asked
    assert {c["seed"] for c in grid} == {0}
    by_name = {}
    for c in grid:
        key = (c["method"], "outliers" in c, c.get("clip_value"))
        by_name.setdefault(key, []).append(c["lr"])
    assert by_name == {
        ("muon", False, None): [7e-3, 1.4e-2, 2.8e-2],
        ("root", False, None): [7e-3, 1.4e-2, 2.8e-2],
        ("muon", True, None): [5e-3, 1e-2, 2e-2],
        ("root", True, None): [5e-3, 1e-2, 2e-2],
        ("muon", True, 0.999): [5e-3, 1e-2, 2e-2],
    }
    assert [(c["method"], c["lr"], "outliers" in c, c["seed"]) for c in own] == [
        ("muon", rates["muon"], False, 2),
        ("root", rates["root"], False, 2),
        ("muon", rates["muon-noisy"], True, 2),
        ("root", rates["root-noisy"], True, 2),
        ("muon", rates["value-noisy"], True, 2),
        ("root-clip", rates["root-noisy"], True, 2),
        ("root-coefficients", rates["muon-noisy"], True, 2),
    ]
    assert own[2]["outliers"] == {"probability": 0.001, "factor": 100.0}


def test_clean_runs_of_muon_are_those_of_the_other_cards():
    """The same config, so that the shared store has them."""
    from stiefel.papers import race

    assert root.plan(Scale.SMOKE).config("muon", 0.1, 1) == race.plan(Scale.SMOKE).config(
        "muon", 0.1, 1
    )


def mean_error(columns, triples):
    """By the density of σ = sqrt(1 + y − 2√y cos θ), y = 2048/columns, on a fine grid of θ."""
    root_y = (2048 / columns) ** 0.5
    theta = (np.arange(200_000) + 0.5) / 200_000 * np.pi
    square = 1 + root_y**2 - 2 * root_y * np.cos(theta)
    weight = np.sin(theta) ** 2 / square
    weight /= weight.sum()
    sigma = np.sqrt(square / (2048 * (weight * square).sum()))
    for a, b, c in triples:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return (weight * (sigma - 1) ** 2).sum()


def test_errors_on_the_authors_shapes():
    errors = root.shape_errors()
    classic = [mean_error(n, [(3.4445, -4.7750, 2.0315)] * 5) for _, n in root.SHAPES]
    assert errors["classic"] == pytest.approx(classic, rel=1e-3)
    wide = mean_error(8192, [(2.9794, -3.6674, 1.6207)] * 5)
    assert errors["official"][2] == pytest.approx(wide, rel=1e-3)
    # Values computed apart from this code; 2048 × 2048 by the density above.
    assert errors["classic"] == pytest.approx([4.98e-2, 3.38e-2, 3.40e-2, 4.25e-2], rel=0.005)
    assert errors["official"] == pytest.approx([3.93e-2, 1.65e-2, 1.53e-3, 4.01e-3], rel=0.005)
    assert errors["fitted"] == pytest.approx([1.49e-2, 1.70e-3, 1.75e-3, 1.78e-3], rel=0.005)


def test_guards_know_the_unstable_triple(monkeypatch):
    found = root.guards()
    assert found["guards_broken"] == 0
    assert found["image_fitted"] == pytest.approx(1.06, abs=0.01)
    assert found["image_official_2048x2048"] == pytest.approx(3.3138, abs=1e-3)
    for columns, image in ((3072, 1.24), (8192, 1.13), (16384, 1.21)):
        assert found[f"image_official_2048x{columns}"] == pytest.approx(image, abs=0.01)
    monkeypatch.setattr("stiefel.optim.root.TRIPLE", (3.4916, -4.8224, 2.1095))
    assert root.guards()["guards_broken"] == 1


def test_orthogonality_is_the_worst_of_shapes_and_recorded_matrices(measurement):
    m = measurement.metrics
    parts = (m["orthogonality_ratio_shapes"], m["orthogonality_ratio_recorded"])
    assert m["orthogonality_ratio"] == max(parts)
    assert parts[0] == pytest.approx(1.494 / 4.979, rel=1e-3)
    assert math.isfinite(parts[1])
    assert measurement.series["probe steps"] == [1, 10, 20]


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("root", measurement)


def test_figure_shows_every_part_and_shape(measurement):
    figure = check_figure("root", measurement)
    parts = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert len(parts) == 4
    places = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    assert places[:4] == ["2048×2048", "2048×3072", "2048×8192", "2048×16384"]
    assert places[4:] == ["step 1", "step 10", "step 20"]
    official = next(c for c in figure.axes[2].collections if c.get_label() == "official")
    assert official.get_offsets()[0].tolist() == pytest.approx([3.93e-2, 0], rel=0.01)


def test_snippet_runs():
    assert check_snippet("root")["optimizer"].state


def test_metadata():
    paper = get("root")
    assert (paper.arxiv, paper.published) == ("2511.20626", "2025-11")
    assert paper.claim.at_most == -0.05


def test_paper_scale_is_refused_without_its_data(monkeypatch):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get("root").experiment(Scale.PAPER, 0, None)

"""Classes, drift, growth, clock, reference models."""

import math

import pytest

from stiefel.diagnose import (
    REFERENCES,
    attention_kind,
    classify_k,
    compare_to_reference,
    growth,
    k_drift,
    training_clock,
)


@pytest.mark.parametrize(
    ("k", "options", "label"),
    [
        (1.18, {}, "transmission"),
        (1.21, {"r2": 0.95}, "transmission"),
        (1.2, {"r2": 0.94}, "no_line"),
        (1.1799, {}, "mild_selection"),
        (0.95, {}, "mild_selection"),
        (0.9499, {}, "strong_selection"),
        (1.375, {}, "above_anchor"),
        (1.17, {"se": 0.021}, "undecided"),
        (1.17, {"se": 0.01}, "mild_selection"),
        (1.23, {"se": 0.021}, "undecided"),
        (1.37, {"se": 0.021, "anchor": 1.375}, "undecided"),
        (math.nan, {}, "no_fit"),
    ],
)
def test_classes(k, options, label):
    assert classify_k(k, **options) == label


def test_drift():
    assert k_drift(1.2, 1.21).state == "invariant"
    assert k_drift(1.2, 1.0).state == "mild"
    assert k_drift(1.2, 0.6) == (pytest.approx(50.0), "strong")
    with pytest.raises(ValueError, match="k must be positive"):
        k_drift(1.2, -1.0)


def test_growth_splits_into_scale_and_shape():
    run = growth([1.2, 1.205, 1.201], [0.01, 0.02, 0.03])
    assert run.state == "lambda_dominated"
    assert run.lam_factor == pytest.approx(3)
    assert run.sigma[-1] / run.sigma[0] == pytest.approx(run.lam_factor * run.k_factor)
    assert growth([1.2, 0.7], [1.0, 1.0]).state == "k_dominated"
    assert growth([1.2, 1.1], [1.0, 1.0]).state == "mixed"
    with pytest.raises(ValueError, match="two checkpoints"):
        growth([1.2], [1.0])


def test_clock():
    clock = training_clock(1e-3, 0.01, 143_000)
    assert clock.ratio == pytest.approx(1.43)
    assert (clock.tau, clock.state, clock.fine) == (pytest.approx(1e5), "saturated", "saturated")
    states = [training_clock(1e-3, 0.1, steps).fine for steps in (8000, 4000, 2500, 1000)]
    assert states == ["near_saturated", "approaching", "partial", "transition"]
    for bad in ((0, 0.1, 1), (1e-3, -1, 1), (1e-3, 0.1, 0), (math.nan, 0.1, 1)):
        with pytest.raises(ValueError, match="must be positive"):
            training_clock(*bad)


def test_attention():
    kinds = [attention_kind(*heads) for heads in ((12, 12), (9, 3), (8, 1))]
    assert kinds == ["MHA", "GQA", "MQA"]
    for heads in ((9, 2), (0, 1), (4, 0)):
        with pytest.raises(ValueError, match="multiple of the key-value heads"):
            attention_kind(*heads)


def test_a_published_model_is_its_own_neighbour():
    for reference in REFERENCES:
        nearest = compare_to_reference(reference.k)[0]
        assert nearest.reference is reference
        assert nearest.distance == 0


def test_the_feed_forward_median_is_made_from_its_parts():
    found = compare_to_reference({"gate": 1.1887, "up": 1.1863, "down": 1.1834, "k": math.nan})
    assert found[0].kinds == ("ffn",)
    assert found[0].reference.name == "qwen3-8b"
    assert found[0].distance == pytest.approx(1.1872 - 1.1863)
    assert compare_to_reference({"conv": 1.0}) == []


def test_the_band_of_the_paper_is_that_of_the_table():
    """Medians of twelve models between 1.186 and 1.204, as the abstract says."""
    ffn = [reference.k["ffn"] for reference in REFERENCES]
    assert (min(ffn), max(ffn)) == (1.1872, 1.2039)

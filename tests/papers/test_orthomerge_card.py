import json
import math

import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_listing_is_cheap,
    check_smoke,
    check_snippet,
)
from safetensors.torch import save_file

from stiefel.papers import Scale, UnavailableError, attribute_digits, get, orthomerge
from stiefel.papers import orthomerge_lab as lab_module
from stiefel.papers.attribute_digits import MATRICES


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("orthomerge", race=False, seconds=15)


@pytest.fixture(scope="module")
def lab():
    return attribute_digits.make_lab(0, train=300, epochs=2)


def test_listing_is_cheap():
    check_listing_is_cheap("orthomerge")


def test_gains_are_differences_of_the_accuracies(measurement):
    m = measurement.metrics
    assert m["om_minus_ties"] == pytest.approx(m["task_om"] - m["task_ties"])
    assert m["om_minus_mean"] == pytest.approx(m["task_om"] - m["task_ta"])
    assert m["om_minus_dare"] == pytest.approx(m["task_om"] - m["task_dare"])
    assert m["matched_base_gain"] == pytest.approx(m["base_om"] - m["base_ta_matched"])
    free = m["task_free_om-G_ties"] - m["task_free_ties"]
    assert m["free_gain_over_ties"] == pytest.approx(free)


def test_a_merge_by_rotations_changes_no_energy_and_no_norm(measurement):
    assert measurement.metrics["om_energy_change"] < 1e-6
    assert measurement.metrics["om_spectral_change"] < 1e-5


def test_one_rotation_is_merged_to_itself_and_matching_lengths_match(lab):
    triangles = lab_module.oft_finetune(lab, "odd", 5)
    merged = lab_module.merged_oft(lab, [triangles])
    expert = lab_module.turned(lab, triangles)
    for name in MATRICES:
        torch.testing.assert_close(merged[name], expert[name], rtol=0, atol=1e-5)
    stretched = lab_module.as_far_as(lab, lab_module.merged_oft(lab, [triangles], intensity=0.1),
                                     expert)  # fmt: skip
    for name in MATRICES:
        lengths = [float((m[name] - lab.base[name]).norm()) for m in (stretched, expert)]
        assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
    assert lab_module.spectral_change(lab, expert) < 1e-5
    half = {**lab.base, "hidden.weight": 0.5 * lab.base["hidden.weight"]}
    assert lab_module.spectral_change(lab, half) == pytest.approx(0.5)
    assert lab_module.energy_change(lab, half) < 1e-6


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("orthomerge", measurement)


def test_figure(measurement):
    check_figure("orthomerge", measurement)


def test_snippet_runs():
    merged = check_snippet("orthomerge")["merged"]
    assert merged["fc.weight"].shape == (32, 64)


def test_metadata():
    paper = get("orthomerge")
    assert (paper.arxiv, paper.published, paper.topic) == ("2602.05943", "2026-02", "merging")
    assert [claim.bound for claim in paper.claims] == [
        2.0, 0.8, 2.0, 2.0, 1.5, -0.3, 1e-6, 1e-4, 0.01, 3.0,
    ]  # fmt: skip


def write_models(folder, count):
    g = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(6, 4, generator=g), "a.bias": torch.randn(6, generator=g)}
    for i, name in enumerate(["base", *(f"expert-{n}" for n in range(1, count + 1))]):
        (folder / name).mkdir(parents=True)
        noise = {k: v + i * 0.1 * torch.randn(v.shape, generator=g) for k, v in base.items()}
        save_file(noise, folder / name / "model.safetensors", metadata={"format": "pt"})


def test_paper_scale_merges_and_waits_for_scores(monkeypatch, tmp_path):
    run = get("orthomerge").experiment
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="needs STIEFEL_DATA"):
        run(Scale.PAPER, 0, lambda f, m: None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match="two experts at least"):
        run(Scale.PAPER, 0, lambda f, m: None)
    write_models(tmp_path / "orthomerge", 2)
    with pytest.raises(UnavailableError, match="Evaluate them"):
        run(Scale.PAPER, 0, lambda f, m: None)
    merged = tmp_path / "orthomerge" / "merged"
    assert len(list(merged.glob("*/model.safetensors"))) == 6
    scores = tmp_path / "orthomerge" / "scores.json"
    scores.write_text(json.dumps({"ta": 1}))
    with pytest.raises(UnavailableError, match=r"no score of .*om-G-ties"):
        run(Scale.PAPER, 0, lambda f, m: None)
    given = dict.fromkeys(("ta", "ties", "om-G-ta", "om-C-ta", "om-C-ties"), 40.0)
    scores.write_text(json.dumps({**given, "om-G-ties": 44.5}))
    found = run(Scale.PAPER, 0, lambda f, m: None)
    assert found.metrics["free_gain_over_ties"] == 4.5
    assert math.isnan(found.metrics["om_minus_ties"])
    assert get("orthomerge").judge([found] * 3)[0].verdict == "inconclusive"


def test_summary_takes_means_over_labs():
    base = {"scores": {}, "frontier": {}}
    names = ["om", "ta", "ta .3", "ta matched", "ties", "dare", "free ta", "free ties",
             "free om-G ties", "free om-C ta", "free om-C ties"]  # fmt: skip
    runs = []
    for shift in (0.0, 4.0):
        scores = {n: [50.0, 90.0] for n in names}
        scores["om"] = [51.0 + shift, 91.0]
        runs.append({
            **base, "scores": scores, "frontier": {m: [[1.0, 2.0]] * 2 for m in ("om", "ta")},
            "energy": {"om": shift, "ta": 1.0}, "spectral": {"om": 0.0, "ta": shift},
            "contradiction": {"om": shift},
        })  # fmt: skip
    metrics, series = orthomerge.summarise(runs, (0.4, 0.85))
    assert metrics["om_minus_ties"] == 3.0
    assert metrics["share_above_ties"] == 1.0
    assert metrics["om_energy_change"] == 4.0  # the worst
    assert metrics["mean_spectral_change"] == 2.0
    assert metrics["contradiction_om"] == 2.0
    assert series["frontier om task"] == [1.0, 1.0]

import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Scale, UnavailableError, get, logah_runs
from stiefel.papers.logah_runs import GPT, TARGETS, architecture, configs, gpt2_start


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("logah", race=False, seconds=30)


def test_gains_are_differences_of_losses(measurement):
    m, series = measurement.metrics, measurement.series
    ours, default, tile = (series[f"loss {s}"] for s in ("meanfield", "default", "tile"))
    assert m["first_gain"] == default[0] - ours[0]
    assert m["first_gain_over_tiles"] == tile[0] - ours[0]
    assert m["middle_gain"] == default[-3] - ours[-3]
    assert m["late_gain"] == default[-2] - ours[-2]
    assert m["late_gain_over_tiles"] == tile[-1] - ours[-2]
    assert m["end_gain"] == default[-1] - ours[-1]
    first = dict(zip(TARGETS, series["first meanfield"], strict=True))
    assert m["width_loss"] == first["256x8"] - first["96x4"]
    # The loss at step 0 is that of the first forward pass of the same start.
    assert first["128x5"] == ours[0]


def test_steps_are_those_of_the_claims():
    ours, tile, default, gpt2 = configs(Scale.LAPTOP, 0)
    assert ours["measured"][-3:] == default["measured"][-3:] == [50, 100, 200]
    assert tile["measured"][-1] == 100
    assert gpt2["measured"] == [0]
    # What is measured does not change what is trained.
    assert ours["hyper_steps"] == tile["hyper_steps"] == 700


def test_targets_are_wider_or_deeper_than_all_that_is_trained_on():
    assert max(logah_runs.WIDTHS) == 96
    assert max(logah_runs.DEPTHS) == 4
    assert sum(p.numel() for p in architecture(*TARGETS["128x5"])[0].parameters()) == 1_024_384
    for name, (width, blocks, _) in TARGETS.items():
        assert name == f"{width}x{blocks}"


def test_random_starts():
    model = GPT(64, 2, 4)
    gpt2_start(model, torch.Generator().manual_seed(0))
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].down.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (model.blocks[1].up.bias == 0).all()
    assert (model.lnf.weight == 1).all()


def test_text_keeps_the_commonest_bytes():
    train, validation, checksum = logah_runs.corpus()
    assert len(train) + len(validation) == 1_000_000
    assert int(train.max()) == int(validation.max()) == 95
    counts = torch.bincount(train)
    assert (counts[:-2] >= counts[1:-1]).all()
    assert len(checksum) == 64


def test_hypernetworks_have_the_sheets_sizes():
    sizes = {
        name: sum(p.numel() for p in logah_runs.hypernetwork(name, 0, 32).parameters())
        for name in logah_runs.HYPERNETWORKS
    }
    assert sizes["meanfield"] == pytest.approx(233_216, rel=0.001)
    assert sizes["tile"] == pytest.approx(268_656, rel=0.03)


def test_paper_scale_is_refused_with_the_reason():
    with pytest.raises(UnavailableError, match="WikiText"):
        configs(Scale.PAPER, 0)


def test_card(measurement):
    check_claims_follow_the_measurements("logah", measurement)
    check_figure("logah", measurement, panels=2)
    check_snippet("logah")
    assert get("logah").claim.metric == "first_gain"

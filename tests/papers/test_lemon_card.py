import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_listing_is_cheap,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Scale, UnavailableError, get, lemon, lemon_runs


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("lemon", race=False, seconds=15)


def test_ratios_are_those_of_the_errors(measurement):
    m = measurement.metrics
    few, many = lemon.SMOKE["few"]

    def error(start, family, count, method="full"):
        return m[f"{start}_{method}_{family}_{count}"]

    families = lemon.HELD_OUT
    ratios = [error("multi", f, few) / error("scratch", f, few) for f in families]
    assert m["ratio_few"] == pytest.approx(max(ratios))
    ratios = [error("multi", f, many) / error("scratch", f, many) for f in families]
    assert m["ratio_many"] == pytest.approx(max(ratios))
    ratios = [error("multi", f, few, "lora") / error("scratch", f, few) for f in families]
    assert m["ratio_lora"] == pytest.approx(max(ratios))
    assert m["few_over_scratch_many"] == pytest.approx(
        sum(error("multi", f, few) for f in families)
        / sum(error("scratch", f, many) for f in families)
    )
    assert m["worst_zero_shot"] == max(m[f"multi_zero_{f}"] for f in families)
    assert m["lora_share"] == 6_672 / 82_688
    assert {name for name in m if "wave" in name} == set()


def test_held_out_families_are_never_pretrained_on():
    for families in lemon.STARTS.values():
        assert not set(families) & {*lemon.HELD_OUT, "wave"}
    assert len(lemon.SEVEN) == 7


def config(**changes):
    return {**lemon.LAPTOP, **lemon.SMOKE, "seed": 0, "families": [], **changes}


def test_parts_of_the_data_differ_and_seeds_decide():
    parts = [
        lemon_runs.trajectories("burgers", 4, config(), part)
        for part in (lemon_runs.TEST, lemon_runs.TRAIN, lemon_runs.FEW)
    ]
    assert len({float(p.u_in.sum()) for p in parts}) == 3
    again = lemon_runs.trajectories("burgers", 4, config(), lemon_runs.TEST)
    assert torch.equal(again.u_in, parts[0].u_in)
    other = lemon_runs.trajectories("burgers", 4, config(seed=1), lemon_runs.TEST)
    assert not torch.equal(other.u_in, parts[0].u_in)
    assert parts[0].u_in.shape == (4, 8, 32, 1)
    torch.testing.assert_close(parts[0].t_in[0], torch.arange(8) / 8)
    torch.testing.assert_close(parts[0].t_out[0], 1 + torch.arange(8) / 8)


def test_starts_differ_and_are_averaged():
    a, b = (lemon_runs.network(config(), start) for start in (0, 1))
    assert not torch.equal(a.query, b.query)
    settings = config(held_out=["sine_gordon"], few=[4], steps=1)
    one = lemon_runs.run(settings | {"starts": 1}, lambda f, m: None)["errors"]
    two = lemon_runs.run(settings | {"starts": 2}, lambda f, m: None)["errors"]
    assert one.keys() == two.keys() == {"full sine_gordon 4"}
    assert one != two


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("lemon", measurement)


def test_figure(measurement):
    figure = check_figure("lemon", measurement)
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["0", "1", "3", "7"]


def test_snippet_runs():
    assert 0 < check_snippet("lemon")["error"] < 10


def test_listing_is_cheap():
    check_listing_is_cheap("lemon")


def test_metadata():
    paper = get("lemon")
    assert (paper.arxiv, paper.published) == ("2408.16168", "2024-08")
    assert [claim.bound for claim in paper.claims] == [0.9, 0.85, 1.0, 0.9, 0.15]


def test_paper_scale_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="GPU with 24 GB"):
        get("lemon").experiment(Scale.PAPER, 0, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = lemon.settings(Scale.PAPER)
    assert settings["held_out"][-1] == "wave"
    assert settings["layers"] == [2, 4, 8, 8]

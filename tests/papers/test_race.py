import dataclasses
import math
from itertools import pairwise

import pytest

from stiefel.papers import race
from stiefel.papers.paper import Scale
from stiefel.papers.progress import Progress
from stiefel.papers.race import Choice, Plan


def parabola(config, report):
    """A training whose loss is least at a rate given in the config."""
    if config["lr"] > config["limit"]:
        return {"select": None, "final": None, "losses": [], "steps": []}
    loss = 2 + math.log2(config["lr"] / config["best"]) ** 2
    return {"select": loss, "final": loss + 1, "losses": [loss], "steps": [1]}


def race_for(best, *, rounds=3, limit=math.inf):
    grids = {"a": (1.0, 2.0, 4.0), "b": (1.0, 2.0, 4.0)}
    return Plan("parabola", {"best": best, "limit": limit, "steps": 1}, grids, parabola, rounds)


@pytest.mark.parametrize(
    ("best", "rates", "chosen"),
    [
        (2.1, [1, 2, 4], 2),
        (9.0, [1, 2, 4, 8, 16], 8),
        (0.5, [0.25, 0.5, 1, 2, 4], 0.5),
    ],
)
def test_grids_are_extended_until_they_bracket(best, rates, chosen):
    choice = race.choose(Progress(), race_for(best), ["a"], span=(0, 1))["a"]
    assert sorted(choice.tried) == rates
    assert choice.lr == chosen
    assert choice.bracketed
    assert choice.reported[chosen] == choice.tried[chosen] + 1


def test_extension_ends_and_the_grid_is_marked():
    choice = race.choose(Progress(), race_for(1e9, rounds=2), ["a"], span=(0, 1))["a"]
    assert sorted(choice.tried) == [1, 2, 4, 8, 16]
    assert not choice.bracketed


def test_a_diverged_rate_is_the_worst_and_bounds_the_grid():
    choice = race.choose(Progress(), race_for(9.0, limit=5), ["a"], span=(0, 1))["a"]
    assert choice.tried[8.0] is None
    assert choice.lr == 4.0
    assert choice.bracketed


def test_every_rate_diverged():
    with pytest.raises(ValueError, match=r"a diverged at every rate tried: \[1.0, 2.0, 4.0\]"):
        race.choose(Progress(), race_for(1.0, limit=0.1), ["a"], span=(0, 1))


def test_all_methods_are_asked_for_in_one_call_on_the_grid_s_seed():
    calls = []

    class Watched(Progress):
        def shared(self, kind, configs, compute, *, span=(0.0, 1.0)):
            calls.append([(c["method"], c["seed"]) for c in configs])
            return super().shared(kind, configs, compute, span=span)

    race.choose(Watched(), race_for(5.0), ["a", "b"], span=(0.0, 0.5))
    assert calls == [[("a", 0)] * 3 + [("b", 0)] * 3, [("a", 0), ("b", 0)]]


def test_next_rate_is_round():
    choice = Choice("a", {1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0})
    assert choice.next_rate() == 8e-3
    assert Choice("a", {7e-3: 1.0, 1.4e-2: 2.0}).next_rate() == 3.5e-3


@pytest.mark.parametrize(("level", "step"), [(2.0, 15.0), (1.0, 20.0), (3.5, 10.0), (0.5, None)])
def test_crossing_is_linear_between_evaluations(level, step):
    run = {"steps": [10, 20, 30], "losses": [3.0, 1.0, 1.0]}
    assert race.crossing(run, level) == step


def test_a_diverged_run_has_no_final_loss():
    assert race.final({"final": 2.5}) == 2.5
    with pytest.raises(RuntimeError, match="diverged"):
        race.final({"final": None, "steps": [10]})


def test_configs_hold_the_text_and_everything_else():
    plan = race.plan(Scale.SMOKE)
    config = plan.config("muon", 0.01, 2, steps=12)
    assert len(config["text_sha256"]) == 64
    assert (config["method"], config["lr"], config["seed"], config["steps"]) == (
        "muon",
        0.01,
        2,
        12,
    )
    assert plan.config("muon", 0.01, 2)["steps"] == plan.steps == 20


def test_a_variant_is_a_method_with_settings_of_its_own():
    plan = dataclasses.replace(
        race.plan(Scale.SMOKE), variants={"noisy": {"method": "muon", "outliers": 3}}
    )
    config = plan.config("noisy", 0.01, 2, steps=12)
    assert config == plan.config("muon", 0.01, 2, steps=12) | {"outliers": 3}
    assert "outliers" not in plan.config("muon", 0.01, 2)


def test_laptop_scale_is_the_experiment_of_the_sheet():
    plan = race.plan(Scale.LAPTOP)
    expected = {
        "width": 96,
        "blocks": 3,
        "heads": 4,
        "context": 64,
        "batch": 16,
        "steps": 200,
        "warmup": 10,
        "every": 10,
        "windows": 64,
        "limit": 2_000_000,
    }
    assert expected.items() <= plan.settings.items()
    for rates in plan.grids.values():
        assert len(rates) == 3
        assert all(b / a == pytest.approx(2.0) for a, b in pairwise(rates))

"""The race: its arithmetic, its protocol against a known answer, and one real run of each kind."""

import inspect
import io
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from stiefel.comparison import Grid, crossing, first_grid, mean_and_half
from stiefel.optim import race_report, race_task, racing
from stiefel.optim.race_contestants import (
    BETAS,
    CONTESTANTS,
    chosen,
    groups_of,
    state_bytes,
    typical_inputs,
)
from stiefel.optim.race_result import RaceResult, Standing
from stiefel.optim.race_run import train
from stiefel.optim.race_task import FactoryError, build, factory, text_settings
from stiefel.optim.racing import RaceError, race
from stiefel.optim.small_gpt import GPT, GPTSize, next_token_loss, rate_factor, windows
from stiefel.papers.paper import mean_interval

TINY = {"width": 8, "blocks": 1, "heads": 2, "context": 8, "batch": 4}


def quiet(fraction, message):
    pass


def regression(seed):
    """A two-layer network on a fixed linear map: the contract of a factory, in five lines."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(12, 5, 6)
    pairs = [(rows, rows[:, :2].sin()) for rows in x]
    return model, {"train": pairs[:8], "validation": pairs[8:]}, squared_error


def squared_error(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of {i * i}\n" for i in range(120)))
    return path


# Arithmetic


def test_a_grid_is_three_rates_and_goes_on_at_the_end_where_the_best_lies():
    assert first_grid(4e-3) == [2e-3, 4e-3, 8e-3]
    assert Grid({2e-3: 3.0, 4e-3: 2.0, 8e-3: 1.0}).next_rate() == 1.6e-2
    assert Grid({2e-3: 1.0, 4e-3: 2.0, 8e-3: 3.0}).next_rate() == 1e-3
    assert Grid({2e-3: None, 4e-3: None}).next_rate() == 1e-3
    inside = Grid({2e-3: 3.0, 4e-3: 2.0, 8e-3: None})
    assert (inside.best, inside.bracketed) == (4e-3, True)
    assert not Grid({2e-3: 1.0, 4e-3: 2.0}).bracketed
    assert Grid({1.0: None}).best is None
    assert not Grid({1.0: None}).bracketed


@pytest.mark.parametrize(("level", "place"), [(2.0, 15.0), (1.0, 20.0), (3.5, 10.0), (0.5, None)])
def test_crossings_are_linear_between_evaluations(level, place):
    assert crossing([10.0, 20.0, 30.0], [3.0, 1.0, 1.0], level) == place


def test_intervals_are_student_s():
    values = [2.1, 2.3, 2.2, 2.6]
    mean, half = mean_and_half(values)
    assert (mean, mean - half, mean + half) == pytest.approx(mean_interval(values), rel=1e-12)
    assert mean_and_half([2.0]) == (2.0, None)
    with pytest.raises(ValueError, match="values must not be empty"):
        mean_and_half([])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1024**2, "1 MiB"), (3 * 10**12, "2.73 TiB")],
)
def test_sizes_have_three_digits(count, text):
    assert race_report._bytes(float(count)) == text


def test_a_standing_needs_no_run_to_be_told():
    lost = Standing("muon", 1e-3, Grid({1.0: None}), {})
    won = Standing("adamw", 1e-3, Grid({1.0: 2.0}), {0: run_of(2.0), 1: run_of(3.0)})
    half = Standing("rmnp", 1e-3, Grid({1.0: 2.0}), {0: run_of(1.0), 1: run_of(None)})
    result = RaceResult.of([lost, half, won], {})
    assert [s.name for s in result.standings] == ["adamw", "rmnp", "muon"]
    rows = {row["optimizer"]: row for row in result.to_json()["optimizers"]}
    json.dumps(rows, allow_nan=False)
    assert rows["muon"]["lr"] is None
    assert rows["rmnp"]["diverged"] == [1]
    assert rows["rmnp"]["difference_to_adamw"]["values"] == [-1.0]
    # 4 at the start, 1 after ten steps in a line: AdamW's 2 after two thirds of the way.
    assert rows["rmnp"]["steps_to_adamw"] == pytest.approx(20 / 3)
    assert rows["rmnp"]["seconds_to_adamw"] == pytest.approx(1 / 3)
    assert rows["rmnp"]["reached"] == 1
    assert rows["adamw"]["steps_to_adamw"] == 10
    text = rendered(result)
    for words in ("2.500 ± 6.353", "1.000 (1 diverged)", "−1.000", "7 (1 of 2)", "0.50×"):
        assert words in text
    narrow = rendered(result, width=79)
    assert "…" not in text + narrow
    assert all(word in narrow for word in ("2.500", "± 6.353", "(1 of 2)", "0.50×"))


def run_of(final, state=100):
    ends = {True: [4.0], False: [4.0, final]}[final is None]
    return {
        "steps": [0, 10][: len(ends)],
        "losses": ends,
        "seconds": [0.0, 0.5][: len(ends)],
        "final": final,
        "select": final,
        "step_seconds": 0.01,
        "optimizer_seconds": 0.001,
        "state_bytes": state if final != 1.0 else 0,
    }


def rendered(result, width=115):
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(result.table(narrow=width < 115))
    return console.export_text()


# Contestants


def test_names_are_matched_and_adamw_always_races():
    assert [c.name for c in chosen(["RMNP", " muon"])] == ["adamw", "rmnp", "muon"]
    assert [c.name for c in chosen(None)] == list(CONTESTANTS)
    with pytest.raises(ValueError, match=r"no optimizer 'normuom'. Did you mean normuon"):
        chosen(["normuom"])
    with pytest.raises(ValueError, match="There are: adamw, torch-muon"):
        chosen(["zzz"])
    with pytest.raises(ValueError, match="once each"):
        chosen(["muon", "muon"])
    with pytest.raises(ValueError, match="once each"):
        chosen([])


def test_centres_are_converted_from_adamw_s_rate():
    assert CONTESTANTS["adamw"].centre(1.28e-1, 64.0) == 1.28e-1
    assert (
        CONTESTANTS["muon"].centre(3e-3, 64.0) == CONTESTANTS["muon"].centre(3e-3, 4096.0) == 1.2e-2
    )
    # A Frobenius norm: 0.2 √64 = 1.6 times a rate of the root-mean-square convention.
    assert CONTESTANTS["auon"].centre(3e-3, 64.0) == pytest.approx(1.6 * 1.2e-2, rel=0.02)


def test_typical_inputs_is_the_geometric_mean_of_columns():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(27, 5), nn.Linear(5, 2))
    assert typical_inputs(groups_of(model)) == pytest.approx(math.sqrt(12 * 27))


def test_a_model_without_matrices_is_refused():
    with pytest.raises(ValueError, match="no hidden weight matrix"):
        groups_of(nn.Sequential(nn.Embedding(5, 3)))


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_moves_every_parameter_and_keeps_the_rates_apart(name, generator):
    model = GPT(GPTSize(16, 1, 2, 8), seed=0)
    optimizers = CONTESTANTS[name].build(groups_of(model), 1e-2, 1e-3)
    of = {id(p): g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    assert {of[id(p)] for p in model.matrices().values()} == {1e-2}
    assert {of[id(p)] for p in model.others()} == {1e-3}
    decays = {g["weight_decay"] for o in optimizers for g in o.param_groups}
    assert decays == {0.0}
    before = [p.detach().clone() for p in model.parameters()]
    rows = torch.randint(256, (4, 9), generator=generator)
    next_token_loss(model, rows).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_torch_s_muon_leaves_kernels_to_adamw():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(3, 3), nn.Linear(3, 2))
    muon, rest = CONTESTANTS["torch-muon"].build(groups_of(model), 0.1, 0.01)
    assert [tuple(p.shape) for g in muon.param_groups for p in g["params"]] == [(3, 3)]
    assert sum(len(g["params"]) for g in rest.param_groups) == 5
    kernels = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="torch-muon: the model has no two-dimensional"):
        CONTESTANTS["torch-muon"].build(groups_of(kernels), 0.1, 0.01)


def test_state_counts_each_storage_once():
    weight = nn.Parameter(torch.zeros(10, 10))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert state_bytes([optimizer]) == 2 * 400 + 4
    optimizer.state[weight]["views"] = [optimizer.state[weight]["exp_avg"][:2]]
    assert state_bytes([optimizer]) == 2 * 400 + 4


# Texts and factories


def test_texts_are_split_by_position_or_by_file(tmp_path):
    for name, letter in (("a", "a"), ("b", "b"), ("c", "c")):
        (tmp_path / name).write_text(letter * 40)
    files = [tmp_path / name for name in "abc"]
    for split, counts in (("position", {"a": 4, "b": 4, "c": 4}), ("file", {"c": 40})):
        settings = text_settings(files, split, context=4)
        train_part, held, _ = race_task._read(tuple(settings["text"]), split)
        found = bytes(held.tolist()).decode()
        assert {letter: found.count(letter) for letter in set(found)} == counts
        assert len(train_part) + len(held) == 120
    assert settings["sha256"] != text_settings(files, "position", context=4)["sha256"]


def test_the_slice_that_chooses_shares_no_byte_with_the_one_reported(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(1, 121)) * 9)  # every window of 9 tells where it stands
    task = build(text_settings([path], **TINY), 0, 3)
    seen = [
        {tuple(row) for rows in part for row in rows.tolist()}
        for part in (task.select, task.report)
    ]
    assert len(seen[0]) == len(seen[1]) == 4
    places = [{value for row in part for value in row} for part in seen]
    assert not places[0] & places[1]
    assert task.train(2).shape == (4, 9)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "is empty"),
        (b"good\xffbad", {}, "not UTF-8 text: byte 4 is 0xff"),
        (b"good\0bad", {}, "not text: byte 4 is zero"),
        (b"x" * 99, {}, "leaves 10 bytes to validate on, a context of 64 needs 130"),
        (b"x" * 30, {"context": 40}, "leaves 27 bytes to train on, a context of 40 needs 41"),
        (b"x" * 999, {"split": "line"}, "split must be one of position, file; got 'line'"),
        (b"x" * 999, {"split": "file"}, "needs at least two files"),
        (b"x" * 999, {"width": 10, "heads": 4}, "width must be a multiple of heads"),
        (b"x" * 999, {"blocks": 0}, "blocks must be at least 1, got 0"),
    ],
)
def test_bad_texts_are_named(tmp_path, content, options, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text_settings([path], **options)


def test_missing_and_changed_texts(tmp_path, corpus):
    with pytest.raises(FileNotFoundError):
        text_settings([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="different files, at least one"):
        text_settings([corpus, corpus])
    settings = text_settings([corpus], **TINY)
    corpus.write_text("something else, " * 200)
    with pytest.raises(ValueError, match="has changed during the race"):
        build(settings, 0, 2)


def made(model=None, batches=None, loss=squared_error):
    good = regression(0)
    return (model or good[0], good[1] if batches is None else batches, loss)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1, 2, 3], "returned a list"),
        ((1, 2), "returned a tuple of 2"),
        (made(model="net"), "the model is a str"),
        (made(batches=[1]), "the batches are list"),
        (made(batches={"train": [1]}), r"the batches are \['train'\]"),
        (made(batches={"train": [1], "validation": [1]}), '"validation" is a list of length 1'),
        (made(batches={"train": [], "validation": [1, 2]}), '"train" is a list of length 0'),
        (made(loss=3), "the loss is a int"),
        (made(loss=lambda model, batch: 3.0), "the loss of a batch is a float"),
        (made(loss=lambda model, batch: model(batch[0])), r"is a tensor of shape \(5, 2\)"),
        (made(loss=lambda model, batch: torch.zeros(())), "has no gradient"),
    ],
)
def test_what_a_factory_may_not_return(result, message):
    with pytest.raises(TypeError, match=message) as caught:
        race(model=lambda seed: result, steps=2)
    assert "make(seed) must return (model, batches, loss)" in str(caught.value)


def test_factories_are_found_by_name(monkeypatch):
    module = types.ModuleType("race_factories")
    module.good, module.number, module.two = regression, 7, lambda a, b: None
    monkeypatch.setitem(sys.modules, "race_factories", module)
    assert factory("race_factories:good") is regression
    for name, message in (
        ("race_factories", "named as module:function"),
        ("no_such_module:make", "cannot load 'no_such_module:make'"),
        ("race_factories:nothing", "cannot load 'race_factories:nothing'"),
        ("race_factories:number", "is a int, not a function"),
        ("race_factories:two", "cannot be called with a seed: missing a required argument: 'b'"),
    ):
        with pytest.raises(ValueError, match=message):
            factory(name)


def test_what_a_factory_raises_is_the_cause():
    def broken(seed):
        raise KeyError("data")

    with pytest.raises(FactoryError, match="broken raised KeyError") as caught:
        race(model=broken)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(FactoryError, match="the loss of a batch raised"):
        race(model=lambda seed: made(loss=lambda model, batch: batch["x"]))


# Runs


def test_a_run_is_the_loop_one_would_write(corpus):
    settings = text_settings([corpus], **TINY)
    config = {"task": settings, "optimizer": "adamw", "lr": 1e-2, "elementwise_lr": 3e-3}
    config |= {"seed": 5, "steps": 12}
    before = torch.random.get_rng_state()
    run = train(config, quiet)
    assert torch.equal(torch.random.get_rng_state(), before)

    model = GPT(GPTSize(8, 1, 2, 8), seed=5)
    groups = [
        {"params": list(model.matrices().values()), "lr": 1e-2},
        {"params": model.others(), "lr": 3e-3},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, 12, 1))
    data = torch.from_numpy(np.fromfile(corpus, np.uint8))
    cut = int(0.9 * len(data))
    starts = torch.randint(cut - 8, (12, 4), generator=torch.Generator().manual_seed(1_000_005))
    for step in range(12):
        optimizer.zero_grad()
        next_token_loss(model, windows(data[:cut], starts[step].tolist(), 9)).backward()
        optimizer.step()
        schedule.step()
    task = build(settings, 5, 12)
    with torch.no_grad():
        final = [next_token_loss(model, torch.cat(list(p))) for p in (task.report, task.select)]
    assert [run["final"], run["select"]] == pytest.approx([float(f) for f in final], abs=1e-4)
    assert run["steps"] == list(range(13))
    assert run["seconds"] == sorted(run["seconds"])
    assert run["step_seconds"] > run["optimizer_seconds"] > 0
    numbers = sum(p.numel() for p in model.parameters())
    assert run["state_bytes"] == 8 * numbers + 4 * len(list(model.parameters()))


def test_a_run_that_leaves_the_finite_numbers_has_no_final_loss():
    def explosive(seed):
        model, batches, _ = regression(seed)
        # Its gradient is infinite from the first step on.
        return model, batches, lambda m, b: (m(b[0]).sum() - m(b[0]).sum().detach()).abs().sqrt()

    for name in ("adamw", "muon"):
        config = {"task": {"factory": "here:explosive"}, "optimizer": name, "lr": 1e-2}
        config |= {"elementwise_lr": 1e-2, "seed": 0, "steps": 4}
        run = train(config, quiet, make=explosive)
        assert (run["final"], run["select"]) == (None, None)
        json.dumps(run, allow_nan=False)


# The protocol, against a field where the best rates are known


BEST = {"adamw": 2e-3, "muon": 0.11, "rmnp": 1.5e-3}


class Field:
    """Instead of training: a loss that is least at a known rate, and another to report."""

    def __init__(self, starts=None):
        self.asked, self.spans, self.starts = [], [], starts or {}

    def __call__(self, configs, compute, *, span):
        self.asked.append(configs)
        self.spans.append(span)
        return [self.run(config) for config in configs]

    def run(self, config):
        name, lr, rest = config["optimizer"], config["lr"], config["elementwise_lr"]
        select = 2 + math.log2(lr / BEST[name]) ** 2 + math.log2(rest / 2e-3) ** 2
        final = 9 - lr  # would choose the largest rate tried
        return {**run_of(final), "select": select, "losses": [self.starts.get(name, 4.0), final]}


def course(corpus, names=("muon", "rmnp"), **options):
    options = {"steps": 10, "lr": 8e-3, "size": TINY, "seeds": (0, 3), **options}
    return racing.plan(text=corpus, optimizers=names, **options)


def test_rates_are_chosen_on_seed_0_by_the_slice_that_is_not_reported(corpus):
    field = Field()
    result = course(corpus).run(field)
    standings = {s.name: s for s in result.standings}
    for name, standing in standings.items():
        tried = standing.grid.tried
        best = min(tried, key=lambda lr: abs(math.log2(lr / BEST[name])))
        assert standing.grid.best == best
        assert standing.grid.bracketed
        assert standing.elementwise_lr == 2e-3
        assert list(standing.runs) == [0, 3]
    assert sorted(standings["muon"].grid.tried) == pytest.approx(
        [0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256]
    )
    *grids, last = field.asked
    assert {config["seed"] for configs in grids for config in configs} == {0}
    assert {(c["optimizer"], c["seed"]) for c in last} == {
        (n, s) for n in standings for s in (0, 3)
    }
    # AdamW's first grid has one rate for all; from then on the rest of the model keeps its best.
    assert all(c["lr"] == c["elementwise_lr"] for c in field.asked[0])
    assert {c["elementwise_lr"] for configs in grids[3:] for c in configs} == {2e-3}
    # Everything else is the same for all.
    rest = [{k: c[k] for k in ("task", "steps")} for configs in field.asked for c in configs]
    assert all(r == rest[0] for r in rest)
    ends = [end for span in field.spans for end in span]
    assert ends == sorted(ends)
    assert (ends[0], ends[-1]) == (0.0, 1.0)


def test_extension_ends_and_says_so(corpus, monkeypatch):
    monkeypatch.setitem(BEST, "muon", 1e9)
    result = course(corpus, ["muon"]).run(Field())
    muon = next(s for s in result.standings if s.name == "muon")
    assert len(muon.grid.tried) == 3 + racing.EXTENSIONS
    assert not muon.grid.bracketed
    assert result.row(muon)["bracketed"] is False


def test_different_starts_are_no_race(corpus):
    with pytest.raises(RaceError, match=r"seed 0 started at losses from 4 to 4.001"):
        course(corpus).run(Field(starts={"muon": 4.001}))


def test_adamw_must_not_diverge_everywhere(corpus):
    def diverging(configs, compute, *, span):
        return [run_of(None) for _ in configs]

    with pytest.raises(RaceError, match=r"adamw diverged at every rate tried: .*give a lower lr"):
        course(corpus).run(diverging)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either text"),
        ({"text": "a", "model": regression}, "give either text"),
        ({"model": regression, "steps": 1}, "steps must be at least 2"),
        ({"model": regression, "seeds": (1, 1)}, "different non-negative integers"),
        ({"model": regression, "seeds": ()}, "different non-negative integers"),
        ({"model": regression, "lr": 0.0}, "lr must lie between 0 and 1"),
        ({"text": "a", "size": {"depth": 3}}, "size takes width, .*got depth"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        race(**options)


# For real


def test_a_race_on_a_model_of_one_s_own():
    said, calls = [], []

    def make(seed):
        calls.append(seed)
        return regression(seed)

    result = race(
        model=make,
        optimizers=["torch-muon", "rmnp"],
        steps=20,
        seeds=(0, 1),
        lr=0.02,
        on_progress=lambda fraction, message: said.append(fraction),
    )
    assert {s.name for s in result.standings} == {"adamw", "torch-muon", "rmnp"}
    assert said == sorted(said)
    assert said[-1] == pytest.approx(1.0)
    # One look, then each config once: the chosen rate on seed 0 is not trained again.
    tried = {(s.name, lr) for s in result.standings for lr in s.grid.tried}
    joint = set(result.settings["adamw_rates"]) - set(result.baseline.grid.tried)
    again = set(result.settings["adamw_rates"]) & set(result.baseline.grid.tried)
    same = {result.baseline.elementwise_lr}
    assert len(calls) == 1 + len(tried) + len(joint) + len(again - same) + 3
    for standing in result.standings:
        assert all(run["final"] < run["losses"][0] for run in standing.runs.values())
    figure = result.figure()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.split()[0] for label in labels] == [s.name for s in result.standings]
    assert [axes.get_xlabel() for axes in figure.axes] == ["steps", "CPU seconds of training"]


def test_a_race_on_text(corpus):
    result = race(text=[corpus], optimizers=["muon"], steps=8, seeds=(0,), size=TINY, lr=0.1)
    content = result.to_json()
    json.dumps(content, allow_nan=False)
    assert content["settings"]["task"]["text"] == [str(corpus)]
    assert rendered(result).count("muon") == 1
    assert content["optimizers"][0]["final"]["interval"] is None


def test_a_missing_matplotlib_is_named(monkeypatch):
    standing = Standing("adamw", 1e-3, Grid({1.0: 2.0}), {0: run_of(2.0)})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "stiefel\[atlas\]"'):
        RaceResult.of([standing], {}).figure()


def test_race_is_documented():
    for name in inspect.signature(race).parameters:
        assert f"{name}:" in race.__doc__

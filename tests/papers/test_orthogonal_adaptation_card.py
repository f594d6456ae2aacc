import itertools
from dataclasses import replace

import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_listing_is_cheap,
    check_smoke,
    check_snippet,
)

from stiefel.merge import merge_adapters
from stiefel.papers import Scale, UnavailableError, get
from stiefel.papers import orthogonal_adaptation_runs as runs
from stiefel.papers.attribute_digits import MATRICES, TASKS, accuracy, make_lab

SLUG = "orthogonal-adaptation"
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def measurement():
    return check_smoke(SLUG, race=False, seconds=15)


@pytest.fixture(scope="module")
def lab():
    return make_lab(3, width=32, train=200, epochs=2)


def test_listing_imports_nothing():
    check_listing_is_cheap("orthogonal_adaptation")


def test_metrics_are_differences_of_the_accuracies(measurement):
    m = measurement.metrics
    for name, kind, other, k in (
        ("gain", "task", "lora", 3),
        ("base_gain", "base", "lora", 3),
        ("gain_of_five", "task", "lora", 5),
        ("alone", "task", "lora", 1),
        ("gain_over_same", "task", "same", 3),
        ("gain_of_two_over_same", "task", "same", 2),
        ("gain_over_gaussian", "task", "gaussian", 3),
    ):
        wanted = m[f"{kind}_columns_{k}"] - m[f"{kind}_{other}_{k}"]
        assert m[name] == pytest.approx(wanted, abs=1e-9)
    assert m["least_gain"] <= m["gain"]
    assert m["labs_over_same"] in (0, 0.5, 1)
    assert (m["labs_ahead"] == 1) == (m["least_gain"] > 0)
    assert m["crosstalk_slots"] < 1e-6 < m["crosstalk_columns"]
    assert measurement.config["labs"] == 2


def test_training_at_once_is_training_apart(lab):
    """One method and question by itself, a dense trunk and torch's Adam: the same factors."""
    draw, rank, steps = 1, 4, 6
    # In float64, for Adam's first steps blow rounding up where a gradient is nearly zero.
    double = {part: replace(getattr(lab, part), x=getattr(lab, part).x.double()) for part in PARTS}
    states = {n: {k: v.double() for k, v in getattr(lab, n).items()} for n in ("base", "heads")}
    lab = replace(lab, **double, **states)
    together = runs.train(lab, runs.FROZEN, draw, rank=rank, steps=steps)
    for method in ("columns", "gaussian"):
        for task, name in enumerate(TASKS):
            b = {n: runs.projections(lab, method, draw, rank)[n][task].double() for n in MATRICES}
            a = {n: torch.zeros(len(lab.base[n]), rank).double() for n in MATRICES}
            a = {n: x.requires_grad_() for n, x in a.items()}
            optimizer = torch.optim.Adam(a.values(), lr=runs.LR_FROZEN)
            order = runs.batches(len(lab.train.x), 64, steps, lab.generator(1, task, draw))
            for rows in order:
                x = lab.train.x[rows]
                for n in MATRICES:
                    weight = lab.base[n] + a[n] @ b[n].T
                    x = (x @ weight.T + lab.base[n.replace("weight", "bias")]).relu()
                scores = 10 * torch.nn.functional.normalize(x, dim=-1) @ lab.heads[name].T
                labels = lab.train.labels(name)[rows]
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(scores, labels).backward()
                optimizer.step()
            for n in MATRICES:
                found = together[method][0][n][task]
                torch.testing.assert_close(found, a[n].detach(), rtol=1e-8, atol=1e-8)
                assert torch.equal(together[method][1][n][task], b[n])


def test_lora_trains_both_and_starts_at_the_base(lab):
    a, b = runs.train(lab, ("lora",), 0, rank=4, steps=5)["lora"]
    start = runs.projections(lab, "lora", 0, 4)
    for n in MATRICES:
        torch.testing.assert_close(start[n].norm(dim=1), torch.ones(5, 4))
        assert (b[n] - start[n]).abs().max() > 1e-4
        assert a[n].abs().max() > 0
    zero = runs.train(lab, ("lora",), 0, rank=4, steps=0)["lora"][0]
    assert all((x == 0).all() for x in zero.values())


def test_merged_accuracies_are_those_of_merged_adapters(lab):
    """Subsets one by one, through the library's own merge."""
    a, b = runs.train(lab, runs.FROZEN, 0, rank=4, steps=8)["columns"]
    found = runs.accuracies(lab, a, b, 0.6)
    handles, names = runs.handles(a, b), list(TASKS)
    for k in runs.SIZES:
        task, base = [], []
        for subset in itertools.combinations(range(5), k):
            chosen = [handles[i] for i in subset]
            merged = merge_adapters(chosen, 1.0 if k == 1 else 0.6)
            trunk = dict(lab.base)
            for n in MATRICES:
                trunk[n] = trunk[n] + merged.layers[n].delta()
            task.append(sum(accuracy(trunk, lab, names[i]) for i in subset) / k)
            base.append(accuracy(trunk, lab, "digit"))
        assert found["task"][k - 1] == pytest.approx(sum(task) / len(task), abs=0.2)
        assert found["base"][k - 1] == pytest.approx(sum(base) / len(base), abs=0.2)


def test_methods_overlap_as_they_say(lab):
    b = {method: runs.projections(lab, method, 0, 4) for method in runs.METHODS}
    for n in MATRICES:
        for method, shared in (("same", 4), ("half", 2), ("slots", 0)):
            for i, j in itertools.combinations(range(5), 2):
                meet = (b[method][n][i].T @ b[method][n][j]).square().sum()
                assert float(meet) == pytest.approx(shared, abs=1e-5)
        assert not torch.equal(b["columns"][n][0], b["columns"][n][1])
    other = runs.projections(lab, "columns", 1, 4)
    assert not torch.equal(other["hidden.weight"], b["columns"]["hidden.weight"])


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure_draws_every_method_and_overlap(measurement):
    figure = check_figure(SLUG, measurement)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == [
        "LoRA",
        "LoRA, rate × 3",
        "one B for all",
        "Gaussian B",
        "random columns",
        "slots",
    ]
    last = [list(line.get_ydata()) for line in figure.axes[2].lines]
    m = measurement.metrics
    assert [m[f"task_{x}_3"] for x in ("slots", "columns", "half", "same")] in last


def test_snippet_runs():
    scope = check_snippet(SLUG)
    assert scope["together"].layers["0"].rank == 4


def test_metadata():
    paper = get(SLUG)
    assert (paper.arxiv, paper.published, paper.topic) == ("2312.02432", "2023-12", "merging")
    assert [claim.bound for claim in paper.claims] == [
        2.5, 1.0, 6.0, -0.5, 2.5, 0.0, 0.8, 1e-6, 0.15, 0.3,
    ]  # fmt: skip


def test_paper_scale_is_refused_with_what_it_needs():
    with pytest.raises(UnavailableError, match=r"CUDA device, Stable Diffusion.*photographs"):
        get(SLUG).experiment(Scale.PAPER, 0, None)

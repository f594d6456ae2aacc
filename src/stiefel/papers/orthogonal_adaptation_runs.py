"""What Orthogonal Adaptation is measured by: five adapters a method, trained apart and summed.

The adapters of all questions and of all methods with a frozen B are trained at once: factors are
stacked along leading dimensions and losses are summed. No step of Adam mixes the slices, so that is
training them apart, in few calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from stiefel.merge import LayerUpdate, OrthogonalAdapters, Projection, crosstalk, shared_basis
from stiefel.merge.shared_basis import random_columns
from stiefel.papers.attribute_digits import (
    FEATURE_NORM,
    MATRICES,
    TASKS,
    Lab,
    batches,
    make_lab,
)
from stiefel.papers.paper import Scale
from stiefel.papers.progress import Report

# LoRA at a third of the frozen methods' rate is what the claims compare with; at their rate it is a
# control.
LORA = {"lora": 1e-3, "lora fast": 3e-3}
FROZEN = ("same", "half", "gaussian", "columns", "slots")
METHODS = (*LORA, *FROZEN)
SIZES = (1, 2, 3, 4, 5)
# λ of the merges; of the paper.
WEIGHT = 0.6
LR_FROZEN = 3e-3
BATCH = 64

SMOKE = {"width": 32, "train": 200, "epochs": 3, "steps": 10, "rank": 4, "draws": 1}
LAPTOP = {"width": 128, "train": 1200, "epochs": 40, "steps": 200, "rank": 8, "draws": 3}

Factors = tuple[dict[str, Tensor], dict[str, Tensor]]
"""A ``[tasks, n, rank]`` and B ``[tasks, m, rank]`` of both matrices."""


def settings(scale: Scale) -> dict[str, Any]:
    """Sizes of the lab at a scale."""
    return {**(SMOKE if scale is Scale.SMOKE else LAPTOP), "weight": WEIGHT}


def run(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train and merge every method on the lab of ``config["seed"]``: percent and crosstalk.

    Means over ``config["draws"]`` draws of all columns and starts, with training orders of their
    own; ``largest_crosstalk`` is the largest of all.
    """
    lab = make_lab(
        config["seed"], width=config["width"], train=config["train"], epochs=config["epochs"]
    )
    draws = []
    for draw in range(config["draws"]):
        report((draw + 1) / (config["draws"] + 1), f"lab {config['seed']}, draw {draw}")
        found = {}
        for methods in (*((name,) for name in LORA), FROZEN):
            trained = train(lab, methods, draw, rank=config["rank"], steps=config["steps"])
            for method, (a, b) in trained.items():
                found[method] = {**accuracies(lab, a, b, config["weight"]), **meetings(a, b)}
        draws.append(found)
    return {"sha256": lab.sha256, **{m: _mean([found[m] for found in draws]) for m in METHODS}}


def _mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task": [fmean(v) for v in zip(*(r["task"] for r in results), strict=True)],
        "base": [fmean(v) for v in zip(*(r["base"] for r in results), strict=True)],
        "crosstalk": fmean(r["crosstalk"] for r in results),
        "largest_crosstalk": max(r["largest_crosstalk"] for r in results),
    }


def projections(lab: Lab, method: str, draw: int, rank: int) -> dict[str, Tensor]:
    """B of every question and matrix at the start, ``[tasks, m, rank]``."""
    return {
        name: torch.stack([_b(lab, method, draw, rank, name, i) for i in range(len(TASKS))])
        for name in MATRICES
    }


def _b(lab: Lab, method: str, draw: int, rank: int, layer: str, task: int) -> Tensor:
    m = lab.base[layer].shape[1]
    if method in LORA:
        noise = lab.generator(2, draw, task, MATRICES.index(layer))
        b = 2 * torch.rand(m, rank, generator=noise) - 1
        return b / b.norm(dim=0)
    seed = 1000 * lab.seed + draw
    if method == "half":
        # The first half of the columns is everybody's, the rest is each one's own.
        every = random_columns(m, m, seed=seed, adapter_id="half", layer=layer)
        common, own = rank - rank // 2, rank // 2
        start = common + task * own
        return shared_basis(m, every[:common] + every[start : start + own], seed=seed)
    if method == "same":
        return Projection(m, rank, "all", layer, seed=seed).matrix()
    if method == "slots":
        return Projection(m, rank, task, layer, "slots", seed=seed, slot=task).matrix()
    scheme = "gaussian" if method == "gaussian" else "columns"
    return Projection(m, rank, task, layer, scheme, seed=seed).matrix()


def train(
    lab: Lab, methods: tuple[str, ...], draw: int, *, rank: int, steps: int
) -> dict[str, Factors]:
    """Factors of every method and question after training, all of them at once.

    ``methods`` are either one LoRA, whose B is trained as well, or some with a frozen B.
    """
    learn_b = methods[0] in LORA
    starts = [projections(lab, method, draw, rank) for method in methods]
    # [methods, tasks, m, rank]
    x = lab.train.x
    b = {n: torch.stack([s[n] for s in starts]).to(x).requires_grad_(learn_b) for n in MATRICES}
    a = {n: x.new_zeros(*b[n].shape[:2], len(lab.base[n]), rank).requires_grad_() for n in MATRICES}
    parameters = [*a.values(), *(b.values() if learn_b else ())]
    lr = LORA.get(methods[0], LR_FROZEN)
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    hidden, last = MATRICES
    before = x @ lab.base[hidden].T + lab.base["hidden.bias"]  # the base's part never changes
    bias = lab.base["features.bias"]
    labels = torch.stack([lab.train.labels(task) for task in TASKS])
    heads, closed = _heads(lab)
    order = [
        batches(len(x), BATCH, steps, lab.generator(1, task, draw)) for task in range(len(TASKS))
    ]
    for rows in zip(*order, strict=True):
        chosen = torch.stack(rows)  # [tasks, 64]
        h = (before[chosen] + (x[chosen] @ b[hidden]) @ a[hidden].mT).relu()
        h = (h @ lab.base[last].T + bias + (h @ b[last]) @ a[last].mT).relu()
        scores = FEATURE_NORM * normalize(h, dim=-1) @ heads.mT + closed
        truth = labels.gather(1, chosen).expand(len(methods), -1, -1)
        total = cross_entropy(scores.flatten(0, 2), truth.flatten(), reduction="sum")
        loss = total / chosen.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {
        method: ({n: a[n][i].detach() for n in MATRICES}, {n: b[n][i].detach() for n in MATRICES})
        for i, method in enumerate(methods)
    }


def features(lab: Lab, trunk: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Normalised features ``[..., n, width]`` of stacked matrices ``[..., out, in]``."""
    for name in MATRICES:
        bias = lab.base[name.replace("weight", "bias")]
        x = (x @ trunk[name].mT + bias).relu()
    return FEATURE_NORM * normalize(x, dim=-1)


def _heads(lab: Lab) -> tuple[Tensor, Tensor]:
    """Heads ``[tasks, classes, width]``, and -inf where a question has fewer classes."""
    classes = max(len(lab.heads[task]) for task in TASKS)
    width = lab.heads["digit"].shape[1]
    heads = lab.heads["digit"].new_zeros(len(TASKS), classes, width)
    closed = heads.new_zeros(len(TASKS), 1, classes)
    for row, task in enumerate(TASKS):
        count = len(lab.heads[task])
        heads[row, :count] = lab.heads[task]
        closed[row, :, count:] = -torch.inf
    return heads, closed


def accuracies(
    lab: Lab, a: Mapping[str, Tensor], b: Mapping[str, Tensor], weight: float
) -> dict[str, Any]:
    """Mean accuracy over the merged questions, and of the ten digits, for every number K merged.

    All subsets of K; one adapter alone is taken as it is, with λ = 1.
    """
    names = list(TASKS)
    subsets = [subset for k in SIZES for subset in combinations(range(len(names)), k)]
    members = torch.zeros(len(subsets), len(names))
    for row, subset in enumerate(subsets):
        members[row, list(subset)] = 1.0 if len(subset) == 1 else weight
    merged = {}
    for name in MATRICES:
        deltas = a[name] @ b[name].mT
        sums = (members @ deltas.flatten(1)).unflatten(1, deltas.shape[1:])
        merged[name] = lab.base[name] + sums
    with torch.no_grad():
        seen = features(lab, merged, lab.test.x)
        right = {
            task: (seen @ lab.heads[task].T).argmax(-1) == lab.test.labels(task)
            for task in (*names, "digit")
        }
    digits = right["digit"].float().mean(1)
    scores = torch.stack([right[task].float().mean(1) for task in names], 1)  # [subsets, tasks]
    asked = (members > 0).float()
    own = (scores * asked).sum(1) / asked.sum(1)
    sizes = [len(subset) for subset in subsets]
    result: dict[str, Any] = {"task": [], "base": []}
    for k in SIZES:
        chosen = [row for row, size in enumerate(sizes) if size == k]
        result["task"].append(100 * float(own[chosen].mean()))
        result["base"].append(100 * float(digits[chosen].mean()))
    return result


def handles(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[OrthogonalAdapters]:
    """The library's view of the trained factors, one handle a question."""
    found = []
    for task in range(len(TASKS)):
        layers = {}
        for name in MATRICES:
            down = b[name][task].double().T
            place = Projection(down.shape[1], down.shape[0], task, name)
            layers[name] = LayerUpdate(place, a[name][task], 1.0, down=down)
        found.append(OrthogonalAdapters(task, layers))
    return found


def meetings(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """Crosstalk of all pairs, mean and largest over pairs and matrices."""
    values = [v for pair in combinations(handles(a, b), 2) for v in crosstalk(*pair).values()]
    return {"crosstalk": fmean(values), "largest_crosstalk": max(values)}

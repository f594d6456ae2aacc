"""Fine-tunes with and without OrthoReg in the lab of the five questions, and what merging gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from stiefel.merge import (
    TaskVector,
    disentanglement_error,
    evaluate_addition,
    evaluate_negation,
)
from stiefel.papers.attribute_digits import (
    MATRICES,
    TASKS,
    Lab,
    accuracy,
    features,
    full_finetune,
    make_lab,
)
from stiefel.regularize import orthoreg_loss

Report = Callable[[float, str], None]
State = Mapping[str, Tensor]

# Strengths of both vectors at which the disentanglement error is averaged.
ERROR_ALPHAS = (0.5, 1.0)
# Those of one that a negation may take. The authors' grid ends at 1; how far a vector of another
# length then reaches is another matter, so both are reported.
FAR_ALPHAS = tuple(i / 10 for i in range(41))


@dataclass(frozen=True)
class Bench:
    """What evaluating task vectors takes."""

    theta0: State
    accuracy: Callable[[State, str, str], float]
    """Percent: of a state, on a task's ``"validation"`` or ``"test"`` part."""
    control: Callable[[State, str], float]
    """Percent: of a state, on a part of what negation must leave alone."""
    outputs: Callable[[str], Callable[[State, Tensor], Tensor]]
    """Scores under a task's head."""
    batches: Callable[[str], Iterable[Tensor]]
    """Test inputs of a task."""


def run(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """One base, and for every setting of the penalty five experts and their evaluation.

    Args:
        config: ``lab`` (its seed), ``width``, ``train``, ``validation``, ``epochs`` of the base;
            ``steps``, ``lr``, ``clip`` of the experts; ``penalties``, name → ``lam``, ``power``,
            ``target``; ``mapped`` names of them whose error is mapped over ``grid``.
        report: Progress.

    Returns:
        ``runs`` by name (see :func:`evaluate`), ``base`` accuracy and the checksum of the data.
    """
    lab = make_lab(
        config["lab"],
        width=config["width"],
        train=config["train"],
        validation=config["validation"],
        epochs=config["epochs"],
    )
    bench = bench_of(lab)
    runs = {}
    for done, (name, penalty) in enumerate(config["penalties"].items()):
        taus = experts(lab, config, penalty)
        grid = config["grid"] if name in config["mapped"] else ()
        runs[name] = evaluate(bench, taus, grid)
        share = (done + 1) / len(config["penalties"])
        report(share, f"base {config['lab']}, λ {name}: {runs[name]['absolute']:.1f} %")
    return {"runs": runs, "base": accuracy(lab.base, lab, "digit"), "sha256": lab.sha256}


def bench_of(lab: Lab) -> Bench:
    """The lab's digits; the control is the accuracy on the ten classes."""

    def answered(state: State, task: str, part: str) -> float:
        return accuracy(state, lab, task, getattr(lab, part))

    return Bench(
        lab.base,
        answered,
        lambda state, part: answered(state, "digit", part),
        lambda task: lambda state, x: features(state, x) @ lab.heads[task].T,
        lambda task: [lab.test.x],
    )


def experts(
    lab: Lab, config: Mapping[str, Any], penalty: Mapping[str, Any]
) -> dict[str, TaskVector]:
    """Full fine-tunes of the two matrices, one per question."""
    lam, power, target = penalty["lam"], penalty["power"], penalty["target"]

    def added(trunk: State) -> Tensor:
        losses = [orthoreg_loss(trunk[n] - lab.base[n], power, target=target) for n in MATRICES]
        return lam * torch.stack(losses).sum()

    found = {}
    for task in TASKS:
        trunk = full_finetune(
            lab,
            task,
            lr=config["lr"],
            steps=config["steps"],
            clip=config["clip"],
            penalty=added if lam else None,
        )
        found[task] = TaskVector(lab.base, trunk)
    return found


def evaluate(
    bench: Bench, taus: Mapping[str, TaskVector], grid: Sequence[float] = ()
) -> dict[str, Any]:
    """Merge, negate and compare; accuracies in percent, of test data.

    Strengths are chosen on validation data; negation must leave 95 % of the control.

    Returns:
        ``single`` (experts on their own tasks), ``absolute`` and ``normalised`` (merged), ``alpha``
        of the merge and ``digits``, its control accuracy; ``negated``, ``negated_before``,
        ``negated_control``, and ``negated_far`` with strengths up to 4; ``cosine`` (mean |cos|) and
        all ``cosines``; ``error``, the mean ξ over pairs of tasks; ``norm``; ``map``, ξ of the
        first two tasks over ``grid``, if there is one.
    """
    zero, tasks = bench.theta0, list(taus)
    added = evaluate_addition(bench.accuracy, zero, taus)
    merged = sum(taus.values()).apply_to(zero, added.alpha)  # pyrefly: ignore
    negated = evaluate_negation(bench.accuracy, bench.control, zero, taus).values()
    far = evaluate_negation(bench.accuracy, bench.control, zero, taus, FAR_ALPHAS).values()
    cosines = [[a.cosine(b) for b in taus.values()] for a in taus.values()]
    errors = [error_map(bench, taus, p, ERROR_ALPHAS).diagonal() for p in combinations(tasks, 2)]
    result = {
        "single": fmean(added.single.values()),
        "absolute": added.absolute,
        "normalised": 100 * added.normalised,
        "alpha": added.alpha,
        "digits": bench.control(merged, "test"),
        "negated": fmean(n.target for n in negated),
        "negated_before": fmean(n.target_before for n in negated),
        "negated_control": fmean(n.control for n in negated),
        "negated_far": fmean(n.target for n in far),
        "cosine": fmean(abs(cosines[i][j]) for i, j in combinations(range(len(taus)), 2)),
        "cosines": cosines,
        "error": float(torch.stack(errors).mean()),
        "norm": fmean(tau.norm() for tau in taus.values()),
    }
    if grid:
        result["map"] = error_map(bench, taus, tasks[:2], grid).tolist()
    return result


def error_map(
    bench: Bench, taus: Mapping[str, TaskVector], pair: Sequence[str], alphas: Sequence[float]
) -> Tensor:
    """ξ(α1, α2) of two tasks, each under its own head, on test data."""
    first, second = pair
    return disentanglement_error(
        (bench.outputs(first), bench.outputs(second)),
        bench.theta0,
        taus[first],
        taus[second],
        (bench.batches(first), bench.batches(second)),
        alphas,
    )

"""The small byte-level GPT that the optimizer papers are raced on, and one training run of it.

Three blocks of width 96 on 2 MB of Python source; 200 steps take a few seconds on one core. The
model itself is :mod:`stiefel.optim.small_gpt`, which anyone can race on a text of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from stiefel.data import MissingDataError, Text, python_source
from stiefel.optim.small_gpt import GPT as GPT
from stiefel.optim.small_gpt import GPTSize as GPTSize
from stiefel.optim.small_gpt import next_token_loss as next_token_loss
from stiefel.optim.small_gpt import project as project
from stiefel.optim.small_gpt import rate_factor as rate_factor
from stiefel.optim.small_gpt import windows as windows
from stiefel.papers.contestants import build
from stiefel.papers.outliers import tampering
from stiefel.papers.paper import UnavailableError
from stiefel.papers.probes import PROBES

Report = Callable[[float, str], None]


def build_optimizer(model: GPT, method: str, lr: float) -> torch.optim.Optimizer:
    """The optimizer of one method, without weight decay; matrices at ``lr``, the rest at 3e-3.

    Raises:
        ValueError: unknown method.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    parts = {"matrix": list(model.matrices().values()), "elementwise": model.others()}
    groups = [
        {"params": [(names[id(p)], p) for p in params], "rule": rule}
        for rule, params in parts.items()
    ]
    return build(groups, method, lr)


def fit(
    model: GPT,
    config: Mapping[str, Any],
    backward: Callable[[int], None],
    evaluate: Callable[[str], float],
    report: Report,
) -> dict[str, Any]:
    """Train ``model`` as ``config`` says.

    Args:
        model: Changed in place.
        config: ``method``, ``lr``, ``steps``, ``warmup``, ``every`` (steps between evaluations),
            ``schedule``, ``clip`` (largest gradient norm, or None); if there are outliers, what
            :func:`stiefel.papers.outliers.tampering` reads.
        backward: Computes the gradients of the step with this number.
        evaluate: Mean loss on the windows called ``"report"`` or ``"select"``.
        report: Told the fraction done and the loss.

    Returns:
        ``steps`` and ``losses`` (nats, reporting windows), ``final`` (the last of them), ``select``
        (loss at the end on the windows that choose rates), ``probes`` (see
        :mod:`stiefel.papers.probes`), ``seconds``. A run that leaves the finite numbers stops
        there, with ``final`` and ``select`` None.
    """
    started = time.thread_time()
    optimizer = build_optimizer(model, config["method"], config["lr"])
    peaks = [group["lr"] for group in optimizer.param_groups]
    probe = PROBES.get(config["method"])
    tamper = tampering(config, list(model.matrices().values()))
    at, losses, probes, finite = [], [], [], True
    for step in range(config["steps"]):
        factor = rate_factor(step, config["steps"], config["warmup"], config["schedule"])
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        backward(step)
        tamper(step)
        if config["clip"] is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
        looked = probe is not None and step + 1 in probe.steps(config["steps"])
        before = {n: p.detach().clone() for n, p in model.matrices().items()} if looked else {}
        try:
            optimizer.step()
        except FloatingPointError:  # ours refuse gradients that are not finite
            finite = False
            break
        if probe is not None and looked:
            probes.append({"step": step + 1, **probe.measure(model, optimizer, before)})
        optimizer.zero_grad()
        if (step + 1) % config["every"] == 0 or step + 1 == config["steps"]:
            loss = evaluate("report")
            finite = math.isfinite(loss)
            if not finite:
                break
            at.append(step + 1)
            losses.append(loss)
            report((step + 1) / config["steps"], f"{config['method']} loss {loss:.3f}")
    return {
        "steps": at,
        "losses": losses,
        "final": losses[-1] if finite else None,
        "select": evaluate("select") if finite else None,
        "probes": probes,
        "seconds": time.thread_time() - started,
    }


@cache
def text(limit: int) -> Text:
    """The text of the race, read once a process.

    Raises:
        UnavailableError: this Python comes without its source.
    """
    try:
        return python_source(limit)
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error


def train(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """One run on Python's source, fully determined by ``config`` (see :mod:`.race`)."""
    data = text(config["limit"])
    size = GPTSize(config["width"], config["blocks"], config["heads"], config["context"])
    length, batch = size.context + 1, config["batch"]
    model = GPT(size, config["seed"])

    generator = torch.Generator().manual_seed(1_000_000 + config["seed"])
    starts = torch.randint(
        len(data.train) - length + 1, (config["steps"], batch), generator=generator
    )
    # Every other window of the validation text chooses rates; those between are reported.
    count = 2 * config["windows"]
    spread = torch.linspace(0, len(data.validation) - length, count).long().tolist()
    held_out = {
        name: windows(data.validation, spread[offset::2], length).split(batch)
        for offset, name in enumerate(("report", "select"))
    }

    def backward(step: int) -> None:
        next_token_loss(model, windows(data.train, starts[step].tolist(), length)).backward()

    def evaluate(which: str) -> float:
        with torch.inference_mode():
            parts = [next_token_loss(model, rows) * len(rows) for rows in held_out[which]]
            return float(sum(parts)) / config["windows"]

    return fit(model, config, backward, evaluate, report)

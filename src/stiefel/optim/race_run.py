"""One run of a race: one contestant, one rate, one seed. All else is the same for all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from stiefel.optim.race_contestants import CONTESTANTS, groups_of, state_bytes
from stiefel.optim.race_task import Task, build
from stiefel.optim.small_gpt import rate_factor

Report = Callable[[float, str], None]

# Losses are measured this often in a run, and before it.
EVALUATIONS = 20
WARMUP_SHARE = 0.05


def train(config: Mapping[str, Any], report: Report, make: Any = None) -> dict[str, Any]:
    """Train one model, fully determined by ``config``.

    Args:
        config: ``task`` (see :mod:`stiefel.optim.race_task`), ``optimizer``, ``lr`` of hidden
            matrices, ``elementwise_lr`` of the rest, ``seed``, ``steps``.
        report: Told the fraction done and the loss.
        make: The factory of the task itself, where its name in ``config`` is not enough.

    Returns:
        ``steps``, ``losses`` (reported slice, from step 0) and ``seconds`` (CPU seconds of training
        up to there, all threads; wall time where the model is on an accelerator), ``final`` and
        ``select`` (loss at the end on the reported and on the choosing slice, None if the run left
        the finite numbers), ``step_seconds`` and ``optimizer_seconds`` (medians), ``state_bytes``.

    Raises:
        TypeError: the factory, or its loss, returned something else than agreed.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config["seed"])
        task = build(config["task"], config["seed"], config["steps"], make)
        return _run(task, config, report)


def _run(task: Task, config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    model, total = task.model, config["steps"]
    contestant = CONTESTANTS[config["optimizer"]]
    optimizers = contestant.build(groups_of(model), config["lr"], config["elementwise_lr"])
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    now = _clock(model)
    every = max(1, total // EVALUATIONS)
    warmup = max(1, round(WARMUP_SHARE * total))
    steps, losses, seconds = [0], [task.mean_loss(task.report)], [0.0]
    whole: list[float] = []
    stepping: list[float] = []
    label = f"{contestant.name} {config['lr']:g}, seed {config['seed']}"
    finite = math.isfinite(losses[0])
    for step in range(total if finite else 0):
        started = now()
        factor = rate_factor(step, total, warmup)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        task.loss_of(task.train(step)).backward()
        before = now()
        try:
            for optimizer in optimizers:
                optimizer.step()
        except FloatingPointError:  # ours refuse gradients that are not finite
            finite = False
            break
        for optimizer in optimizers:
            optimizer.zero_grad()
        ended = now()
        whole.append(ended - started)
        stepping.append(ended - before)
        if (step + 1) % every == 0 or step + 1 == total:
            loss = task.mean_loss(task.report)
            finite = math.isfinite(loss)
            if not finite:
                break
            steps.append(step + 1)
            losses.append(loss)
            seconds.append(math.fsum(whole))
            report((step + 1) / total, f"{label}: loss {loss:.3f}")
    select = task.mean_loss(task.select) if finite else math.nan
    finite = finite and math.isfinite(select)
    return {
        "steps": steps,
        "losses": losses,
        "seconds": seconds,
        "final": losses[-1] if finite else None,
        "select": select if finite else None,
        "step_seconds": statistics.median(whole) if whole else None,
        "optimizer_seconds": statistics.median(stepping) if stepping else None,
        "state_bytes": state_bytes(optimizers),
    }


def _clock(model: nn.Module) -> Callable[[], float]:
    """CPU seconds of this process, or wall time of an accelerator that has finished its work."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        return time.process_time

    def finished() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return finished

"""Adapting a trained network to a new operator with a few trajectories."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from stiefel.nn.lemon.checks import check_choice, check_count, check_number
from stiefel.nn.lemon.low_rank import adapters, lora
from stiefel.nn.lemon.training import (
    CLIP,
    WARM_UP,
    WEIGHT_DECAY,
    Batches,
    Data,
    Loss,
    TrainingReport,
    fit,
)
from stiefel.nn.lemon.training_data import OperatorData

# Sheet, laptop experiment: full and low-rank fine-tuning. A head alone trains as LoRA does.
RATES = {"full": 1e-3, "lora": 3e-3, "head": 3e-3}


def finetune(
    model: nn.Module,
    data: Data,
    steps: int = 100,
    method: str = "full",
    *,
    lr: float | int | None = None,
    batch: int = 32,
    rank: int = 8,
    alpha: float | int = 1.0,
    targets: str | Sequence[str] | None = None,
    head: str | None = None,
    weight_decay: float | int = WEIGHT_DECAY,
    warm_up: float | int = WARM_UP,
    clip: float | int = CLIP,
    noise: float | int = 0.02,
    bf16: bool | None = None,
    loss: Loss = nn.functional.mse_loss,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> TrainingReport:
    """Train ``model`` in place on few samples of one operator.

    Args:
        model: Any module; called as ``model(*inputs)``.
        data: OperatorData, or ``(inputs, target)`` with leading samples.
        steps: Optimizer steps.
        method: ``"full"`` trains all weights, ``"lora"`` puts adapters in (:func:`lora`) or goes on
            with those that are there, and leaves them in for :func:`merge_lora`; ``"head"`` trains
            the last part alone.
        lr: At the top of the schedule; 1e-3 (full) or 3e-3 if None.
        batch: Samples a step, at most all.
        rank, alpha, targets: As :func:`lora`.
        head: Regular expression for the parameters of ``method="head"``; ``model.head`` if there is
            one, else the last linear map.
        weight_decay, warm_up, clip, noise, bf16, loss, generator, progress: As :func:`pretrain`.

    Returns:
        Losses, seconds and counts.

    Raises:
        TypeError, ValueError: settings or data out of range, or a head that fits nothing.
        FloatingPointError: the loss is not finite.
    """
    check_choice("method", method, tuple(RATES))
    check_count("steps", steps)
    check_count("batch", batch)
    check_number("noise", noise, open_low=False)
    noise = noise if isinstance(data, OperatorData) else 0.0
    batches = Batches(data, batch, noise, generator)
    if method == "lora" and next(adapters(model), None) is None:
        lora(model, rank, alpha, targets, generator=generator)
    with _only(model, _head(model, head) if method == "head" else None):
        return fit(
            model, batches, steps, lr=RATES[method] if lr is None else lr,
            weight_decay=weight_decay, warm_up=warm_up, clip=clip, bf16=bf16, loss=loss,
            progress=progress, label=f"fine-tuning ({method})",
        )  # fmt: skip


def _head(model: nn.Module, head: str | None) -> str:
    """A pattern that fits the parameters of the head."""
    if head is not None:
        return head
    if isinstance(getattr(model, "head", None), nn.Module):
        return r"^head\."
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError("model has neither a module called head nor an nn.Linear: pass head=…")
    return f"^{re.escape(linear[-1])}\\." if linear[-1] else "."


@contextmanager
def _only(model: nn.Module, pattern: str | None) -> Iterator[None]:
    """Gradients for the parameters whose names fit only; for all as they are if None."""
    if pattern is None:
        yield
        return
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    if not any(re.search(pattern, name) for name in before):
        raise ValueError(f"head {pattern!r} fits no parameter of the model")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(re.search(pattern, name)))
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])

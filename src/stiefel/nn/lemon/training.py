"""One training loop for every recipe, for pretraining over many families, and predictions.

The loop works on any ``nn.Module``: data are :class:`OperatorData`, normalised batch by batch, or a
pair ``(inputs, target)`` for a model that is called as ``model(*inputs)``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.nn.lemon.checks import check_count, check_finite, check_number
from stiefel.nn.lemon.training_data import OperatorData, relative_l2
from stiefel.nn.lemon.training_progress import progress_bar

# Authors' AdamW.
ADAM_EPS = 1e-6
WEIGHT_DECAY = 1e-4
WARM_UP = 0.1
CLIP = 1.0

Data = OperatorData | tuple[Tensor | Sequence[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TrainingReport:
    """What a run did."""

    losses: tuple[float, ...]
    """Training loss of every step (normalised units)."""
    steps: int
    seconds: float
    trained: int
    """Numbers that were trained."""
    total: int
    """Numbers in the model."""


class Batches:
    """Rows of any data in random order, epoch after epoch, ready for ``model(*inputs)``."""

    def __init__(
        self, data: Data, batch: int, noise: float | int, generator: torch.Generator | None
    ) -> None:
        self.inputs, self.target = split(data)
        self.data = data
        if len(self.target) == 0:
            raise ValueError("data must hold at least one sample")
        self.size = min(batch, len(self.target))
        self.noise, self.generator = noise, generator
        if noise and not isinstance(data, OperatorData):
            raise ValueError("noise needs OperatorData: for other inputs add it to the data")

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        count = len(self.target)
        while True:
            order = torch.randperm(count, generator=self.generator)
            for rows in order[: count // self.size * self.size].split(self.size):
                yield self.take(rows)

    def take(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The rows as inputs and target, with noise and normalised where data are trajectories."""
        if isinstance(self.data, OperatorData):
            chosen = self.data[rows].noisy(self.noise, self.generator).normalised()[0]
            return chosen.inputs, chosen.target
        return tuple(x[rows] for x in self.inputs), self.target[rows]


def split(data: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs and target of any data, not normalised.

    Raises:
        TypeError: neither OperatorData nor a pair.
        ValueError: inputs and target of different lengths, NaN or infinities.
    """
    if isinstance(data, OperatorData):
        return data.inputs, data.target
    if not (isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor)):
        raise TypeError(
            f"data must be OperatorData or a pair (inputs, target), got {type(data).__name__}"
        )
    inputs = (data[0],) if isinstance(data[0], Tensor) else tuple(data[0])
    for i, x in enumerate(inputs):
        if len(x) != len(data[1]):
            raise ValueError(f"input {i} has {len(x)} samples but target has {len(data[1])}")
        if x.is_floating_point():
            check_finite(f"input {i}", x)
    check_finite("target", data[1])
    return inputs, data[1]


def ready(data: Data) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs and target as a model sees them: trajectories normalised by their inputs."""
    inputs, target = split(data)
    if len(target) == 0:
        raise ValueError("data must hold at least one sample")
    return split(data.normalised()[0]) if isinstance(data, OperatorData) else (inputs, target)


def pretrain(
    model: nn.Module,
    data: Data,
    steps: int = 30_000,
    *,
    batch: int = 150,
    lr: float | int = 1e-4,
    weight_decay: float | int = WEIGHT_DECAY,
    warm_up: float | int = WARM_UP,
    clip: float | int = CLIP,
    noise: float | int = 0.02,
    bf16: bool | None = None,
    loss: Loss = nn.functional.mse_loss,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> TrainingReport:
    """Train ``model`` in place on the samples of all families together.

    AdamW, warm-up and cosine, gradients clipped. Join families by :meth:`OperatorData.cat`.

    Args:
        model: Any module; called as ``model(*inputs)``.
        data: OperatorData, or ``(inputs, target)`` with leading samples.
        steps: Optimizer steps.
        batch: Samples a step, at most all.
        lr: At the top of the schedule.
        weight_decay: Of AdamW.
        warm_up: Part of the steps in which the rate rises.
        clip: Largest norm of the gradient.
        noise: Relative noise on input trajectories.
        bf16: Autocast to bfloat16; on GPUs that can, if None.
        loss: Of prediction and target, both normalised.
        generator: For the order of samples and the noise.
        progress: Show a bar for runs over two seconds; where there is a terminal if None.

    Returns:
        Losses, seconds and counts.

    Raises:
        TypeError, ValueError: settings or data out of range.
        FloatingPointError: the loss is not finite.
    """
    check_count("batch", batch)
    check_number("noise", noise, open_low=False)
    noise = noise if isinstance(data, OperatorData) else 0.0
    batches = Batches(data, batch, noise, generator)
    return fit(
        model, batches, steps, lr=lr, weight_decay=weight_decay, warm_up=warm_up, clip=clip,
        bf16=bf16, loss=loss, progress=progress, label="pretraining",
    )  # fmt: skip


def fit(
    model: nn.Module,
    batches: Batches,
    steps: int,
    *,
    lr: float | int,
    weight_decay: float | int,
    warm_up: float | int,
    clip: float | int,
    bf16: bool | None,
    loss: Loss,
    progress: bool | None,
    label: str,
) -> TrainingReport:
    """The loop behind :func:`pretrain` and :func:`finetune`: everything that requires a gradient.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`pretrain`; also if nothing is to train.
    """
    check_count("steps", steps)
    check_number("lr", lr)
    check_number("weight_decay", weight_decay, open_low=False)
    check_number("warm_up", warm_up, 0.0, 1.0, open_low=False)
    check_number("clip", clip)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model has no parameter that requires a gradient")
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, eps=ADAM_EPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps, warm_up))
    device = parameters[0].device
    losses, start = [], time.monotonic()
    was_training = model.training
    model.train()
    try:
        with progress_bar(label, steps, progress) as bar:
            for step, (inputs, target) in zip(range(steps), batches, strict=False):
                with autocast(device, bf16):
                    prediction = model(*(x.to(device) for x in inputs))
                    value = loss(prediction.to(target.dtype), target.to(device))
                number = float(value.detach())
                if not math.isfinite(number):
                    raise FloatingPointError(
                        f"the loss is {number} at step {step}; a smaller lr than {lr} may help"
                    )
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                schedule.step()
                losses.append(number)
                bar(step + 1, f"loss {number:.3g}")
    finally:
        model.train(was_training)
        optimizer.zero_grad()
    return TrainingReport(
        tuple(losses), steps, time.monotonic() - start,
        sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters()),
    )  # fmt: skip


def warm_cosine(steps: int, warm_up: float | int) -> Callable[[int], float]:
    """Factor on the rate: linear to 1 over ``warm_up · steps``, then half a cosine towards 0."""
    rising = max(1, round(warm_up * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


def autocast(device: torch.device, bf16: bool | None) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast where asked for (None: on GPUs that have it), else nothing."""
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


@torch.no_grad()
def predict(model: nn.Module, data: OperatorData, *, batch: int = 256) -> Tensor:
    """Predictions ``[n, T_out, n_x, channels]`` in physical units, in evaluation mode.

    Raises:
        ValueError: no samples, or shapes that the model refuses.
    """
    check_count("batch", batch)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    parts = []
    try:
        for start in range(0, len(data), batch):
            normal, mean, scale = data[start : start + batch].normalised()
            y = model(*(x.to(device) for x in normal.inputs)).to(mean.device)
            parts.append(mean + scale * y)
    finally:
        model.train(was_training)
    return torch.cat(parts)


def evaluate(model: nn.Module, data: OperatorData, *, batch: int = 256) -> float:
    """Mean relative L2 error of :func:`predict` over samples, in physical units."""
    return float(relative_l2(predict(model, data, batch=batch), data.u_out).mean())

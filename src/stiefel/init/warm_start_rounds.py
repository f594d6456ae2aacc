"""Training in rounds as data arrive: each round starts shrunk, perturbed, with a new optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from stiefel.init.shrink_perturb_state import PERTURB, SHRINK, check_mixture
from stiefel.init.warm_start import shrink_perturb_

MAX_EPOCHS = 350
"""The authors' code has no limit; this is the length of their longest fixed run."""
BATCH = 128

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Epoch:
    """One pass over the data, measured in training mode while the weights move."""

    number: int
    """From 1."""
    accuracy: float
    """Share of right answers, 0 to 1."""
    loss: float
    """Mean over the samples."""


@dataclass(frozen=True)
class TrainAccuracy:
    """Stop when the running training accuracy of an epoch reaches ``target``, in (0, 1]."""

    target: float | int = 0.99

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"target must be in (0, 1], got {self.target}")

    def __call__(self, epoch: Epoch) -> bool:
        """Whether the round is done."""
        return epoch.accuracy >= self.target


@dataclass(frozen=True)
class TrainLoss:
    """Stop when the mean training loss of an epoch is at most ``target``; for regression too."""

    target: float | int

    def __post_init__(self) -> None:
        if not math.isfinite(self.target):
            raise ValueError(f"target must be finite, got {self.target}")

    def __call__(self, epoch: Epoch) -> bool:
        """Whether the round is done."""
        return epoch.loss <= self.target


@dataclass(frozen=True)
class RoundReport:
    """What one round of training took and gave."""

    round: int
    """From 1."""
    acc: float
    """Running training accuracy of the last epoch, 0 to 1; NaN unless targets are classes."""
    loss: float
    """Mean training loss of the last epoch."""
    epochs: int
    steps: int
    """Gradient steps."""
    seconds: float
    """Wall-clock time of the training."""
    grad_ratio: float | None
    """||gradient on new samples|| / ||gradient on those of the round before|| after the start and
    before training; None where there is no old or no new sample."""
    stopped: bool
    """Whether the stop rule was met; otherwise ``max_epochs`` ended the round."""


class ShrinkPerturb:
    """Keeps one network up to date while its data set grows.

    Every :meth:`fit_round` gets all data seen so far. From the second round on it first shrinks
    and perturbs the network, then trains it with a new optimizer until ``stop``. A training loop
    of one's own takes :meth:`start_round` instead, which does the former two and hands over the
    optimizer.

    Args:
        model_fn: Makes a network; called once (and where a layer cannot reset itself, once more a
            round). ``model`` is it, on the device on which it is made.
        optimizer_fn: Makes an optimizer from parameters, as ``torch.optim.Adam`` does; called
            every round, so no momentum survives.
        shrink: λ, in [0, 1]. (1, 0) is a plain warm start, (0, 1) a start from scratch.
        perturb: Factor of the fresh initialisation.
        stop: Takes an :class:`Epoch`, says whether the round is done.
        max_epochs: At most so many epochs a round.
        skip_first: Leave the first initialisation as it is. False: shrink and perturb it as the
            authors' code does.
        batch_size: Samples a step.
        loss_fn: Of the network's output and the targets, mean over the batch.
        generator: Of noise and order, on the CPU; None: torch's global one.

    Raises:
        ValueError: factors, ``max_epochs`` or ``batch_size`` out of range.

    Source: arXiv 1910.08475, section 4.
    """

    def __init__(
        self,
        model_fn: Callable[[], nn.Module],
        optimizer_fn: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        shrink: float | int = SHRINK,
        perturb: float | int = PERTURB,
        stop: Callable[[Epoch], bool] | None = None,
        max_epochs: int = MAX_EPOCHS,
        skip_first: bool = True,
        *,
        batch_size: int = BATCH,
        loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
        generator: torch.Generator | None = None,
    ) -> None:
        check_mixture(shrink, perturb)
        for name, value in (("max_epochs", max_epochs), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model_fn, self.optimizer_fn = model_fn, optimizer_fn
        self.shrink, self.perturb = shrink, perturb
        self.stop = TrainAccuracy() if stop is None else stop
        self.max_epochs, self.skip_first = max_epochs, skip_first
        self.batch_size, self.loss_fn = batch_size, loss_fn
        self.generator = generator
        self.model = model_fn()
        self.rounds = 0
        self._seen = 0

    def start_round(self) -> torch.optim.Optimizer:
        """Shrink and perturb ``model`` (not before the first round, unless told to).

        Returns:
            A new optimizer of its parameters.
        """
        if self.rounds or not self.skip_first:
            fresh = None if _resets_itself(self.model) else self.model_fn
            shrink_perturb_(
                self.model, self.shrink, self.perturb, fresh=fresh, generator=self.generator
            )
        self.rounds += 1
        return self.optimizer_fn(self.model.parameters())

    def fit_round(self, dataset: Dataset | Batch) -> RoundReport:
        """One round: start, then train until the stop rule or ``max_epochs``.

        Args:
            dataset: Everything seen so far, the earlier samples first: a map-style data set of
                (input, target), or the two tensors.

        Raises:
            ValueError: an empty data set, or a loss that is not finite.
        """
        data = TensorDataset(*dataset) if isinstance(dataset, tuple) else dataset
        count = len(data)  # pyrefly: ignore
        if count == 0:
            raise ValueError("dataset is empty")
        optimizer = self.start_round()
        old, self._seen = self._seen, count
        ratio = None
        if 0 < old < count:
            ratio = gradient_balance(
                self.model,
                self.loss_fn,
                lambda: self._batches(data, torch.arange(old)),
                lambda: self._batches(data, torch.arange(old, count)),
            )
        self.model.train()
        steps, started, done = 0, time.perf_counter(), False
        epoch = Epoch(0, math.nan, math.nan)
        while not done and epoch.number < self.max_epochs:
            order = torch.randperm(count, generator=self.generator)
            epoch, taken = self._epoch(optimizer, self._batches(data, order), epoch.number + 1)
            steps += taken
            done = bool(self.stop(epoch))
        seconds = time.perf_counter() - started
        return RoundReport(
            self.rounds, epoch.accuracy, epoch.loss, epoch.number, steps, seconds, ratio, done
        )

    def _batches(self, data: Any, order: Tensor) -> Iterator[Batch]:
        device = next(self.model.parameters()).device
        for rows in order.split(self.batch_size):
            if isinstance(data, TensorDataset):
                x, y = (t[rows.to(t.device)] for t in data.tensors)
            else:
                x, y = default_collate([data[i] for i in rows.tolist()])
            yield x.to(device), y.to(device)

    def _epoch(
        self, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], number: int
    ) -> tuple[Epoch, int]:
        right = samples = steps = 0
        total, classes = 0.0, False
        for x, y in batches:
            optimizer.zero_grad()
            output = self.model(x)
            loss = self.loss_fn(output, y)
            loss.backward()
            optimizer.step()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(f"the loss became {value} in epoch {number}")
            classes = isinstance(y, Tensor) and not y.is_floating_point()
            right += int((output.argmax(1) == y).sum()) if classes else 0
            samples, steps = samples + len(y), steps + 1
            total += value * len(y)
        accuracy = right / samples if classes else math.nan
        return Epoch(number, accuracy, total / samples), steps


def _resets_itself(model: nn.Module) -> bool:
    return all(
        callable(getattr(m, "reset_parameters", None) or getattr(m, "_reset_parameters", None))
        for m in model.modules()
        if any(p is not None and p.requires_grad for p in m._parameters.values())
    )


def gradient_balance(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    old_batch: Batch | Callable[[], Iterable[Batch]],
    new_batch: Batch | Callable[[], Iterable[Batch]],
) -> float:
    """||gradient on new data|| / ||gradient on old data||, over all parameters that learn.

    After a plain warm start the old samples are fitted and hardly pull, while the new ones do:
    the ratio is well above 1. Shrinking brings it near 1 (arXiv 1910.08475, figure 6).

    Neither ``.grad`` nor buffers change; the model runs in the mode it is in.

    Args:
        model: Its output goes to ``loss_fn`` with the targets.
        loss_fn: A mean over samples.
        old_batch, new_batch: (inputs, targets), or a function that gives an iterator of such,
            for data that do not fit one pass: their gradients are averaged by samples.

    Returns:
        The ratio; infinite if only the old gradient is zero.

    Raises:
        ValueError: no parameter learns, both gradients are zero, or one is not finite.
    """
    norms = {
        name: _gradient_norm(model, loss_fn, batch, name)
        for name, batch in (("new_batch", new_batch), ("old_batch", old_batch))
    }
    if norms["old_batch"] == 0:
        if norms["new_batch"] == 0:
            raise ValueError("the gradients on old_batch and new_batch are both zero")
        return math.inf
    return norms["new_batch"] / norms["old_batch"]


def _gradient_norm(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: Batch | Callable[[], Iterable[Batch]],
    name: str,
) -> float:
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError("model has no parameter that requires a gradient")
    buffers = {n: b.clone() for n, b in model.named_buffers()}  # batch norm counts in these
    sums = [torch.zeros_like(p) for p in weights.values()]
    samples = 0
    with torch.enable_grad():
        for x, y in batch() if callable(batch) else (batch,):
            output = torch.func.functional_call(model, {**weights, **buffers}, (x,))
            loss = loss_fn(output, y)
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            samples += len(y)
            for total, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    total.add_(grad, alpha=len(y))
    if samples == 0:
        raise ValueError(f"{name} is empty")
    norm = math.hypot(*(float(torch.linalg.vector_norm(g)) for g in sums)) / samples
    if not math.isfinite(norm):
        raise ValueError(f"the gradient on {name} is not finite: {norm}")
    return norm

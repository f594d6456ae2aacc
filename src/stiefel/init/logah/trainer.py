"""Training a hypernetwork over a stream of architectures."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stiefel.init.logah.graph import NetGraph

Architecture = tuple[nn.Module, NetGraph]


class LoGAHTrainer:
    """Trains a hypernetwork (LoGAH, Section 4; AdamW, linear warm-up, cosine to zero).

    Args:
        hypernetwork: A :class:`LoGAH`, or one inside ``DistributedDataParallel``: then each
            process draws architectures of its own and gradients are averaged. Give each process
            another ``seed``.
        lr: Highest learning rate.
        weight_decay: Of AdamW.
        warmup: Steps until the highest rate; at most a tenth of all.
        clip: Largest gradient norm.
        seed: Of the architectures and of the random start of what is not predicted.
    """

    def __init__(
        self,
        hypernetwork: nn.Module,
        *,
        lr: float | int = 3e-4,
        weight_decay: float | int = 1e-2,
        warmup: int = 50,
        clip: float | int = 5.0,
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("clip", clip)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it has to be a positive number")
        if warmup < 0 or weight_decay < 0:
            raise ValueError(
                f"warmup is {warmup}, weight_decay {weight_decay}; none may be negative"
            )
        self.hypernetwork = hypernetwork
        self.lr, self.weight_decay, self.warmup, self.clip = lr, weight_decay, warmup, clip
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def fit(
        self,
        sample_arch: Callable[[np.random.Generator], Architecture],
        loss_fn: Callable[[nn.Module, dict[str, Tensor], Any], Tensor],
        data: Iterable[Any],
        steps: int,
        meta_batch: int = 1,
        gamma: float | int = 3e-5,
        on_step: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """Train.

        Args:
            sample_arch: Draws a model, best on the ``meta`` device, and its graph. Make the graph
                of each depth once and use :meth:`NetGraph.refill` for its widths.
            loss_fn: Mean loss of a model with these parameters on a batch, usually through
                ``torch.func.functional_call(model, parameters, inputs)``.
            data: Batches; started again when they end.
            steps: Updates.
            meta_batch: Architectures per update.
            gamma: Weight of the sum of the norms of the predicted tensors.
            on_step: Told the step and the loss. Without it a progress bar is shown on terminals.

        Returns:
            The loss of each step, without the norms. It jumps, as the architectures differ: look
            at its running mean.

        Raises:
            ValueError: ``steps`` or ``meta_batch`` below 1, ``gamma`` negative, no data.
            FloatingPointError: a loss is not finite; names the step and the architecture's size.
        """
        if steps < 1 or meta_batch < 1 or gamma < 0:
            raise ValueError(
                f"steps is {steps}, meta_batch {meta_batch}, gamma {gamma}; "
                "at least 1, 1 and 0 are needed"
            )
        optimizer = torch.optim.AdamW(
            self.hypernetwork.parameters(), self.lr, weight_decay=self.weight_decay, fused=True
        )
        warmup = min(self.warmup, max(1, steps // 10))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: _rate(t, warmup, steps))
        losses: list[float] = []
        self.hypernetwork.train()
        for step, batch in zip(_shown(steps, on_step is None), _endless(data), strict=False):
            mean = 0.0
            for _ in range(meta_batch):
                model, graph = sample_arch(self.rng)
                predicted = self.hypernetwork(graph)
                loss = loss_fn(model, self._completed(model, predicted), batch)
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss is {loss.item()} at step {step}, on a network of {len(graph)} "
                        f"nodes; a smaller lr than {self.lr} may help"
                    )
                ((loss + gamma * _norms(predicted)) / meta_batch).backward()
                mean += loss.item() / meta_batch
            nn.utils.clip_grad_norm_(self.hypernetwork.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(mean)
            if on_step is not None:
                on_step(step, mean)
        self.hypernetwork.eval()
        return losses

    def _completed(self, model: nn.Module, predicted: dict[str, Tensor]) -> dict[str, Tensor]:
        """With what is not predicted and lies on no real device: N(0, 0.02²), as a class token."""
        missing = {
            name: torch.empty(p.shape, dtype=p.dtype).normal_(0, 0.02, generator=self.generator)
            for name, p in model.named_parameters()
            if p.is_meta and name not in predicted
        }
        return {**predicted, **missing}


def _shown(steps: int, wanted: bool) -> Iterable[int]:
    if not (wanted and sys.stderr.isatty()):
        return range(steps)
    from rich.console import Console
    from rich.progress import track

    return track(range(steps), "hypernetwork", console=Console(stderr=True), transient=True)


def _rate(step: int, warmup: int, steps: int) -> float:
    """Share of the highest rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _endless(data: Iterable[Any]) -> Iterator[Any]:
    """The batches, again and again."""
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError("data has no batches, or is an iterator that can be read only once")


def _norms(tensors: dict[str, Tensor]) -> Tensor:
    # The gradient of a norm at zero is undefined: hence the small number.
    squares = torch.stack([t.square().sum() for t in tensors.values()])
    return (squares + 1e-12).sqrt().sum()

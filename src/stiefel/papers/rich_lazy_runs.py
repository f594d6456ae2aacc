"""Stacks of recurrent networks trained side by side, and two-layer linear networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stiefel.init import aligned_init, low_rank_init, spectrum_init
from stiefel.theory import (
    CTRNN,
    LazinessProbe,
    LazinessReport,
    Trials,
    ctrnn_states,
    expected_kernel_alignment,
    linear_kernel_alignment,
)

# Weight of the past in the running mean of the loss that says when to stop.
SMOOTHING = 0.98
# Rank 1 at full Frobenius norm explodes now and then (a gradient of 300 in the first step): longer
# gradients are shortened to this, for every network alike. Ordinary ones are 0.5 to 2.
CLIP = 10.0
Batches = Callable[[int], Trials]


@dataclass(frozen=True)
class Start:
    """How the recurrent weights of a network start."""

    rank: int
    gain: float = 1.25
    norm: str = "fro"


@dataclass(frozen=True)
class Stack:
    """Weights of R networks."""

    w_in: Tensor
    w: Tensor
    w_out: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three, each ``[R, rows, columns]``."""
        return self.w_in, self.w, self.w_out

    def to(self, device: str) -> Stack:
        """On another device."""
        return Stack(*(t.to(device) for t in self.tensors))

    def pick(self, index: Tensor | int) -> Stack:
        """Some of the networks, or one."""
        return Stack(*(t[index] for t in self.tensors))

    def outputs(self, x: Tensor, steps: slice = slice(-1, None)) -> Tensor:
        """``[R, samples, steps, outputs]`` of inputs ``[samples, steps, inputs]``, or with R."""
        h = ctrnn_states(self.w_in, self.w, x)[..., steps, :]
        return h @ self.w_out.mT.unsqueeze(-3)

    def network(self, index: int) -> CTRNN:
        """One of them as a module."""
        w_in, w, w_out = self.pick(index).tensors
        net = CTRNN(w_in.shape[1], w.shape[0], w_out.shape[0], w0=w.detach())
        with torch.no_grad():
            net.i2h.weight.copy_(w_in)
            net.h2o.weight.copy_(w_out)
        return net


def initial_stack(
    sizes: tuple[int, int, int], starts: Sequence[Start], generators: Sequence[torch.Generator]
) -> Stack:
    """A network for every generator and start, the starts of a generator side by side.

    Starts of one generator truncate the same Gaussian matrix and share W_in and W_out.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for generator in generators:
        base = CTRNN(*sizes, generator=generator)
        gaussian = torch.randn(sizes[1], sizes[1], generator=generator) / math.sqrt(sizes[1])
        for start in starts:
            w = low_rank_init(start.gain * gaussian, start.rank, norm=start.norm)
            parts.append((base.i2h.weight.detach(), w, base.h2o.weight.detach()))
    return Stack(*(torch.stack(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Trained:
    """What training a stack gave."""

    stack: Stack
    """Every network when it stopped."""
    steps: list[int]
    losses: list[float]
    """Running means when it stopped."""
    finished: list[bool]
    """Whether it reached the loss it was to stop at."""

    def unfinished(self, stop: float) -> int:
        """Networks that did not reach the loss ``stop``; none where 0 asks for all steps."""
        return self.finished.count(False) if stop > 0 else 0

    def better(self, other: Trained) -> Trained:
        """Of each network the run that ended at the lower loss."""
        later = [b < a for a, b in zip(self.losses, other.losses, strict=True)]
        mask = torch.tensor(later, device=self.stack.w.device)[:, None, None]
        pairs = zip(self.stack.tensors, other.stack.tensors, strict=True)

        def choose(mine: list, theirs: list) -> list:
            return [b if take else a for a, b, take in zip(mine, theirs, later, strict=True)]

        return Trained(
            Stack(*(torch.where(mask, b, a) for a, b in pairs)),
            choose(self.steps, other.steps),
            choose(self.losses, other.losses),
            choose(self.finished, other.finished),
        )


def train(
    stack: Stack,
    batches: Batches,
    *,
    lr: float,
    momentum: float = 0.9,
    stop_at: Sequence[float],
    steps: int,
    every: Callable[[int, float], None] = lambda step, loss: None,
) -> Trained:
    """SGD with momentum on all networks at once, each until its running mean loss is low enough.

    The gradient of a network is shortened to the norm ``CLIP`` where it is longer.

    Args:
        stack: R networks, not changed.
        batches: Step → trials; inputs ``[samples, steps, inputs]`` for all networks, or with a
            leading R; targets alike.
        lr, momentum: As ``torch.optim.SGD`` has them.
        stop_at: Of each network. 0 trains for all steps.
        steps: At most so many.
        every: Called after each step with its number and the mean running loss.

    Raises:
        FloatingPointError: a loss is not finite, with the step and the network.
    """
    live = torch.arange(len(stack.w), device=stack.w.device)
    weights = [t.clone().requires_grad_() for t in stack.tensors]
    velocity = [torch.zeros_like(t) for t in weights]
    limits = torch.as_tensor(stop_at, dtype=weights[0].dtype, device=weights[0].device)
    final = Stack(*(t.clone() for t in stack.tensors))
    running, taken = torch.full_like(limits, math.nan), [0] * len(live)
    finished, losses = [False] * len(live), [math.nan] * len(live)

    def put_away(which: Tensor, step: int) -> None:
        for place, current in zip(final.tensors, weights, strict=True):
            place[live[which]] = current.detach()[which]
        for i in which.nonzero()[:, 0].tolist():
            network = int(live[i])
            taken[network], losses[network] = step, float(running[i])
            finished[network] = bool(running[i] < limits[i])

    for step in range(1, steps + 1):
        trials = batches(step - 1)
        if trials.inputs.ndim == 4:
            trials = Trials(trials.inputs[live], trials.targets[live])
        loss = _losses(Stack(*weights), trials)
        if not bool(loss.isfinite().all()):
            network = int(live[(~loss.isfinite()).nonzero()[0, 0]])
            raise FloatingPointError(f"loss of network {network} is not finite at step {step}")
        gradients = torch.autograd.grad(loss.sum(), weights)
        with torch.no_grad():
            norm = sum(g.square().sum((-2, -1)) for g in gradients).sqrt()  # pyrefly: ignore
            clip = (CLIP / norm).clamp(max=1.0)[:, None, None]
            for weight, speed, gradient in zip(weights, velocity, gradients, strict=True):
                weight -= lr * speed.mul_(momentum).add_(clip * gradient)
            loss = loss.detach()
            smooth = SMOOTHING * running + (1 - SMOOTHING) * loss
            running = torch.where(running.isnan(), loss, smooth)
        every(step, float(running.mean()))
        done = running < limits
        if bool(done.any()):
            put_away(done, step)
            keep = ~done
            live, limits, running = live[keep], limits[keep], running[keep]
            weights = [t.detach()[keep].requires_grad_() for t in weights]
            velocity = [t[keep] for t in velocity]
            if len(live) == 0:
                break
    put_away(torch.ones_like(live, dtype=torch.bool), steps)
    return Trained(final, taken, losses, finished)


def _losses(stack: Stack, trials: Trials) -> Tensor:
    """Mean cross-entropy of each network over the steps that count."""
    counted = (trials.targets >= 0).flatten(0, -2).any(0).nonzero()[:, 0]
    steps = slice(int(counted[0]), None)
    outputs = stack.outputs(trials.inputs, steps)
    targets = trials.targets[..., steps].expand(outputs.shape[:-1])
    each = functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return each.view(len(outputs), -1).mean(-1)


def laziness(before: Stack, after: Stack, probe: Tensor) -> list[LazinessReport]:
    """The report of every network."""
    reports = []
    for index in range(len(before.w)):
        net = before.network(index)
        measure = LazinessProbe(net, probe).snapshot()
        net.load_state_dict(after.network(index).state_dict())
        reports.append(measure.compare())
    return reports


@dataclass(frozen=True)
class LinearResult:
    """Two-layer linear networks of several starts, trained on several tasks."""

    alignment: Tensor
    """KA ``[tasks, starts]``; the last start is aligned with the task."""
    representation: Tensor
    """RA, of the same shape."""
    formula: Tensor
    """KA by the closed form for each task and start."""
    expected: list[float]
    """Its mean over isotropic tasks, for each start but the aligned one."""
    residual: float
    """Largest ‖W₁ᵀw₂ − β‖ / ‖β‖ left."""


def linear_networks(
    x: Tensor,
    tasks: Tensor,
    ranks: Sequence[int],
    *,
    hidden: int,
    size: float,
    lr: float,
    steps: int,
    generator: torch.Generator,
) -> LinearResult:
    """Train f(x) = w₂ᵀW₁x on every task from weights of every rank, and from aligned ones.

    Args:
        x: ``[samples, d]``, whitened.
        tasks: β ``[tasks, d]``; targets are x β.
        ranks: Of W₁(0), with equal singular values; all tasks start from the same.
        hidden: Units.
        size: ‖W₁(0)‖_F and ‖w₂(0)‖.
        lr, steps: Of full-batch gradient descent, a fine discretisation of the gradient flow.
        generator: Source of the weights.
    """
    d = x.shape[1]
    options = {"norm": size, "generator": generator}
    starts = [spectrum_init((hidden, d), torch.ones(r, dtype=x.dtype), **options) for r in ranks]
    w1 = torch.stack(
        [torch.stack([*starts, aligned_init((hidden, d), beta, **options)]) for beta in tasks]
    )
    first = w1.clone()
    w2 = torch.randn(w1.shape[:-1], generator=generator, dtype=x.dtype)
    w2 = size * w2 / torch.linalg.vector_norm(w2, dim=-1, keepdim=True)
    metric = x.mT @ x / len(x)
    before = _tangent_metric(w1, w2)
    for _ in range(steps):
        error = ((w2[..., None, :] @ w1)[..., 0, :] - tasks[:, None]) @ metric
        step1 = w2[..., :, None] * error[..., None, :]
        w2 = w2 - lr * (w1 @ error[..., None])[..., 0]
        w1 = w1 - lr * step1
    left = (w2[..., None, :] @ w1)[..., 0, :] - tasks[:, None]
    return LinearResult(
        alignment=_cosine(metric @ before, metric @ _tangent_metric(w1, w2)),
        representation=_cosine(metric @ first.mT @ first, metric @ w1.mT @ w1),
        formula=linear_kernel_alignment(first, tasks[:, None].expand(*w1.shape[:2], d)),
        expected=[expected_kernel_alignment([1.0] * r, d) for r in ranks],
        residual=float((left.norm(dim=-1) / tasks.norm(dim=-1)[:, None]).max()),
    )


def _tangent_metric(w1: Tensor, w2: Tensor) -> Tensor:
    """M = W₁ᵀW₁ + ‖w₂‖² I of the kernel X M Xᵀ of all parameters."""
    eye = torch.eye(w1.shape[-1], dtype=w1.dtype)
    return w1.mT @ w1 + w2.square().sum(-1)[..., None, None] * eye


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of kernels X M Xᵀ by a = S M with S = XᵀX / n: ⟨X M Xᵀ, X M' Xᵀ⟩ = n² tr(S M S M')."""

    def inner(p: Tensor, q: Tensor) -> Tensor:
        return (p * q.mT).sum((-2, -1))

    return inner(a, b) / (inner(a, a) * inner(b, b)).sqrt()

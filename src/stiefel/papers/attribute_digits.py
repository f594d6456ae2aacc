"""One network of handwritten digits and five questions about them, each learned by a fine-tune.

The lab of the papers on merging: a trunk is trained to tell the ten digits apart; then, from the
same start, one expert per question (even? five or more? prime? remainder by three? has a loop?)
changes the trunk's two matrices, under a frozen random head, and the experts are merged. How well
the merged trunk answers each question, and how well it still names the digits, is what is measured.

All experts are trained at once: matrices are stacked along a leading dimension, losses are summed,
and as no step of AdamW or of per-expert clipping mixes the slices, that equals training them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, relu

from stiefel.data import MissingDataError, table
from stiefel.papers.paper import UnavailableError

Weights = Mapping[str, Tensor]
"""``first`` ``[..., width, 64]`` and ``second`` ``[..., width, width]``: the trunk's matrices."""

MATRICES = ("first", "second")
# The class of each digit 0 to 9.
TASKS: dict[str, tuple[int, ...]] = {
    "even": (1, 0, 1, 0, 1, 0, 1, 0, 1, 0),
    "five or more": (0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
    "prime": (0, 0, 1, 1, 0, 1, 0, 1, 0, 0),
    "remainder by 3": (0, 1, 2, 0, 1, 2, 0, 1, 2, 0),
    "has a loop": (1, 0, 0, 0, 0, 0, 1, 0, 1, 1),
}
FEATURE_NORM = 10.0
BASE_LR = 1e-3
BATCH = 64


@dataclass(frozen=True)
class Part:
    """Images ``x`` ``[n, 64]`` in [0, 1] and the digits ``y`` ``[n]`` that they show."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Lab:
    """The trained base, the frozen heads and the data of one seed."""

    seed: int
    base: dict[str, Tensor]
    biases: dict[str, Tensor]
    base_head: Tensor
    heads: dict[str, Tensor]
    train: Part
    validation: Part
    test: Part

    @property
    def width(self) -> int:
        """Of both hidden layers."""
        return self.base["second"].shape[-1]

    def features(self, weights: Weights, x: Tensor) -> Tensor:
        """Last hidden layer, of norm 10, ``[..., n, width]``; leading dimensions broadcast."""
        hidden = relu(x @ weights["first"].mT + self.biases["first"])
        hidden = relu(hidden @ weights["second"].mT + self.biases["second"])
        return FEATURE_NORM * normalize(hidden, dim=-1)

    def logits(self, weights: Weights, x: Tensor, task: str | None = None) -> Tensor:
        """Scores ``[..., n, classes]`` for a question; for the ten digits if ``task`` is None."""
        head = self.base_head if task is None else self.heads[task]
        return self.features(weights, x) @ head.T

    def accuracy(self, weights: Weights, task: str | None = None, part: str = "test") -> float:
        """Percent of a part's images answered rightly; ``task`` None asks for the digit itself."""
        data: Part = getattr(self, part)
        truth = data.y if task is None else targets(task, data.y)
        with torch.no_grad():
            right = self.logits(weights, data.x, task).argmax(-1) == truth
        return 100 * right.float().mean().item()

    def mean_accuracy(
        self, weights: Weights, tasks: Sequence[str] = tuple(TASKS), part: str = "test"
    ) -> float:
        """Mean of :meth:`accuracy` over questions, percent."""
        return sum(self.accuracy(weights, task, part) for task in tasks) / len(tasks)

    def stacked(self, tasks: Sequence[str] = tuple(TASKS)) -> dict[str, Tensor]:
        """The base's matrices once per question, ``[tasks, ...]``: copies to be trained."""
        return {name: self.base[name].repeat(len(tasks), 1, 1) for name in MATRICES}


def targets(task: str, digits: Tensor) -> Tensor:
    """Classes of the digits under a question."""
    return torch.tensor(TASKS[task])[digits]


def split(seed: int, train: int, validation: int) -> tuple[Part, Part, Part]:
    """Digits in an order drawn from ``seed``: training, validation and the rest to test.

    Raises:
        UnavailableError: scikit-learn, which holds them, is not installed.
    """
    try:
        content = table("digits")
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    order = torch.randperm(len(content.y), generator=torch.Generator().manual_seed(seed))
    x, y = (content.x / 16).float()[order], content.y[order]
    ends = (0, train, train + validation, len(y))
    parts = [Part(x[a:b], y[a:b]) for a, b in pairwise(ends)]
    return parts[0], parts[1], parts[2]


def prepare(
    seed: int, *, width: int = 128, train: int = 1200, validation: int = 0, epochs: int = 40
) -> Lab:
    """Train the base (Adam at 1e-3, batches of 64) and draw the heads, all from ``seed``.

    Trunk 64 – width – width with ReLU after both layers, He initialisation; the heads of the
    questions are N(0, 1/width) and stay as drawn.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    parts = split(seed, train, validation)
    generator = torch.Generator().manual_seed(1000 + seed)
    shapes = {"first": (width, 64), "second": (width, width)}
    trunk = {
        name: (torch.randn(shape, generator=generator) * (2 / shape[1]) ** 0.5).requires_grad_()
        for name, shape in shapes.items()
    }
    biases = {name: torch.zeros(width, requires_grad=True) for name in MATRICES}
    head = (torch.randn(10, width, generator=generator) / width**0.5).requires_grad_()
    heads = {
        task: torch.randn(max(classes) + 1, width, generator=generator) / width**0.5
        for task, classes in TASKS.items()
    }
    lab = Lab(seed, trunk, biases, head, heads, *parts)
    optimizer = torch.optim.Adam([*trunk.values(), *biases.values(), head], lr=BASE_LR, fused=True)
    x, y = lab.train.x, lab.train.y
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(lab.logits(trunk, x[index]), y[index]).backward()
            optimizer.step()
    for tensor in (*trunk.values(), *biases.values(), head):
        tensor.requires_grad_(False)
        tensor.grad = None
    return lab


def _batches(count: int, tasks: int, generator: torch.Generator) -> Any:
    """Endless index tensors ``[tasks, 64]``: every question goes through its own permutations."""
    while True:
        orders = torch.stack([torch.randperm(count, generator=generator) for _ in range(tasks)])
        whole = count // BATCH * BATCH
        yield from orders[:, :whole].split(BATCH, dim=1)


def _clip_each(parameters: Sequence[Tensor], limit: float) -> None:
    """Scale each question's gradient, over all its slices, to a norm of at most ``limit``."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = sum(g.flatten(1).square().sum(1) for g in gradients)
    scale = (limit / (torch.as_tensor(squares).sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient *= scale.reshape(-1, *(1,) * (gradient.ndim - 1))


def finetune(
    lab: Lab,
    parameters: Sequence[Tensor],
    weights: Callable[[], Weights],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    tasks: Sequence[str] = tuple(TASKS),
    penalty: Callable[[Weights], Tensor] | None = None,
    clip: float | None = None,
    seed: int = 0,
    report: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Train one expert per question, all at once.

    Args:
        lab: Where they start and what they see.
        parameters: What the optimizer holds; each has one slice per question in its first
            dimension.
        weights: Builds the trunk's matrices ``[tasks, ...]`` from them, with gradients.
        optimizer: Elementwise (Adam, SGD ...), so that questions stay apart.
        steps: Of 64 images each.
        tasks: The questions, in the order of the slices.
        penalty: Added to the loss: of the matrices ``[tasks, ...]``, summed over questions.
        clip: Largest norm of a question's gradient, penalty included; None leaves it.
        seed: Of the order of images, together with the lab's.
        report: Called now and then with the fraction done.

    Returns:
        The trained matrices ``[tasks, ...]``, detached.
    """
    generator = torch.Generator().manual_seed(7919 * (lab.seed + 1) + seed)
    classes = max(max(TASKS[task]) + 1 for task in tasks)
    heads = torch.zeros(len(tasks), classes, lab.width)
    # A question with fewer classes than the widest one never sees the others.
    closed = torch.zeros(len(tasks), 1, classes)
    for row, task in enumerate(tasks):
        count = len(lab.heads[task])
        heads[row, :count] = lab.heads[task]
        closed[row, :, count:] = -torch.inf
    truth = torch.stack([targets(task, lab.train.y) for task in tasks])
    rows = torch.arange(len(tasks))[:, None]
    batches = _batches(len(truth[0]), len(tasks), generator)
    for step in range(steps):
        index = next(batches)
        optimizer.zero_grad()
        now = weights()
        scores = lab.features(now, lab.train.x[index]) @ heads.mT + closed
        wanted = truth[rows, index]
        loss = cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="sum") / BATCH
        if penalty is not None:
            loss = loss + penalty(now)
        loss.backward()
        if clip is not None:
            _clip_each(parameters, clip)
        optimizer.step()
        if report is not None and step % 25 == 0:
            report(step / steps)
    return {name: tensor.detach() for name, tensor in weights().items()}


def expert(stack: Weights, row: int) -> dict[str, Tensor]:
    """The matrices of one question out of a stack."""
    return {name: stack[name][row] for name in MATRICES}

"""Five questions about one digit: a base network and experts fine-tuned from it, to be merged.

The 1,797 digits of scikit-learn; a trunk of two layers whose normalised features meet a linear head
per task. The base knows the ten classes. Heads of the five attributes are random and frozen, so all
that an expert learns is in its trunk, and a merged trunk can be asked all questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stiefel.data import MissingDataError, table
from stiefel.papers.paper import UnavailableError

PIXELS = 64
TEST_DIGITS = 597
# Features are normalised to this length before a head: the temperature of the softmax.
FEATURE_NORM = 10.0
MATRICES = ("hidden.weight", "features.weight")
"""The two matrices of a trunk, ``[out, in]``; the biases are ``hidden.bias``, ``features.bias``."""

# Class of each digit 0 … 9.
TASKS: Mapping[str, tuple[int, ...]] = {
    "odd": (0, 1, 0, 1, 0, 1, 0, 1, 0, 1),
    "at least 5": (0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
    "prime": (0, 0, 1, 1, 0, 1, 0, 1, 0, 0),
    "modulo 3": (0, 1, 2, 0, 1, 2, 0, 1, 2, 0),
    "has a loop": (1, 0, 0, 0, 0, 0, 1, 0, 1, 1),
}

Trunk = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """Some of the digits."""

    x: Tensor
    """Pixels in [0, 1], ``[n, 64]``."""
    y: Tensor
    """Digits 0 … 9, ``[n]``."""

    def labels(self, task: str) -> Tensor:
        """Classes of one of :data:`TASKS`, or the digits themselves for ``"digit"``."""
        return self.y if task == "digit" else torch.tensor(TASKS[task])[self.y]


@dataclass(frozen=True)
class Lab:
    """A base network, the heads of all tasks and the digits they are measured on."""

    seed: int
    train: Part
    validation: Part
    """Empty unless asked for."""
    test: Part
    base: dict[str, Tensor]
    """Trunk after training on the ten classes."""
    heads: dict[str, Tensor]
    """``[classes, width]`` of every task, and of ``"digit"``."""
    sha256: str
    """Checksum of the table of digits."""

    def generator(self, *stream: int) -> torch.Generator:
        """Random numbers of this seed for one purpose, e.g. the index of a task."""
        return generator(self.seed, *stream)


def generator(seed: int, *stream: int) -> torch.Generator:
    """A generator of its own for every tuple of small non-negative numbers."""
    mixed = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def make_lab(
    seed: int, *, width: int = 128, train: int = 1200, validation: int = 0, epochs: int = 40
) -> Lab:
    """Split the digits, train the base on them (Adam, rate 1e-3, batch 64), draw the heads.

    Test are the 597 digits that come last in a random order, whatever ``train`` and
    ``validation`` are; those follow from the front.

    Raises:
        UnavailableError: scikit-learn, which holds the digits, is not installed.
        ValueError: more digits are asked for than there are.
    """
    try:
        digits = table("digits")
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    x, y = (digits.x / 16).float(), digits.y
    if not 0 < train <= train + validation <= len(x) - TEST_DIGITS:
        raise ValueError(
            f"train + validation must be in 1..{len(x) - TEST_DIGITS}, got {train} + {validation}"
        )
    draw = generator(seed)
    order = torch.randperm(len(x), generator=draw)
    parts = [order[:train], order[train : train + validation], order[-TEST_DIGITS:]]
    base = {}
    for name, fan_in in (("hidden", PIXELS), ("features", width)):
        noise = torch.randn(width, fan_in, generator=draw)
        base[f"{name}.weight"] = noise * math.sqrt(2 / fan_in)
        base[f"{name}.bias"] = torch.zeros(width)
    heads = {
        task: torch.randn(max(classes) + 1, width, generator=draw) / math.sqrt(width)
        for task, classes in {"digit": range(10), **TASKS}.items()
    }
    first, second, test = (Part(x[i], y[i]) for i in parts)
    lab = Lab(seed, first, second, test, base, heads, digits.sha256)
    learned = [p.requires_grad_() for p in (*base.values(), heads["digit"])]
    fit(
        lambda: base, heads["digit"], lab.train, "digit", learned, lr=1e-3,
        steps=epochs * math.ceil(train / 64), draw=lab.generator(0),
    )  # fmt: skip
    for parameter in learned:
        parameter.requires_grad_(False)
    return lab


def features(trunk: Trunk, x: Tensor) -> Tensor:
    """Normalised features ``[n, width]``, of length :data:`FEATURE_NORM`."""
    for name in ("hidden", "features"):
        x = F.linear(x, trunk[f"{name}.weight"], trunk[f"{name}.bias"]).relu()
    return FEATURE_NORM * F.normalize(x, dim=1)


def accuracy(trunk: Trunk, lab: Lab, task: str, part: Part | None = None) -> float:
    """Per cent of a part (by default the test digits) whose class is right."""
    part = lab.test if part is None else part
    with torch.no_grad():
        scores = features(trunk, part.x) @ lab.heads[task].T
    return 100 * float((scores.argmax(1) == part.labels(task)).float().mean())


def accuracies(trunk: Trunk, lab: Lab, part: Part | None = None) -> tuple[float, float]:
    """Mean over the five tasks, each with its own head, and that of the ten classes (per cent)."""
    tasks = [accuracy(trunk, lab, task, part) for task in TASKS]
    return sum(tasks) / len(tasks), accuracy(trunk, lab, "digit", part)


def fit(
    trunk: Callable[[], Trunk],
    head: Tensor,
    part: Part,
    task: str,
    parameters: Sequence[Tensor],
    *,
    lr: float,
    steps: int,
    draw: torch.Generator,
    batch: int = 64,
    weight_decay: float = 0.0,
    clip: float | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Train ``parameters`` in place by AdamW on the cross-entropy of one task.

    Args:
        trunk: builds the trunk from the parameters, anew at every step.
        clip: largest norm of the gradient of all parameters together.
        penalty: added to the loss.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, foreach=True)
    labels = part.labels(task)
    for rows in batches(len(part.x), batch, steps, draw):
        loss = F.cross_entropy(features(trunk(), part.x[rows]) @ head.T, labels[rows])
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()


def batches(count: int, batch: int, steps: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Rows of each step: every row once before any comes again."""
    done = 0
    while done < steps:
        for rows in torch.randperm(count, generator=draw).split(batch):
            if done == steps:
                return
            yield rows
            done += 1


def full_finetune(
    lab: Lab,
    task: str,
    *,
    lr: float = 3e-4,
    steps: int = 150,
    clip: float | None = None,
    penalty: Callable[[Trunk], Tensor] | None = None,
) -> dict[str, Tensor]:
    """An expert: the base's two matrices trained on one task, its biases frozen.

    ``penalty`` of the trunk at hand is added to the loss.
    """
    trunk = {name: tensor.clone() for name, tensor in lab.base.items()}
    learned = [trunk[name].requires_grad_() for name in MATRICES]
    fit(
        lambda: trunk, lab.heads[task], lab.train, task, learned, lr=lr, steps=steps, clip=clip,
        draw=lab.generator(1, list(TASKS).index(task)),
        penalty=None if penalty is None else lambda: penalty(trunk),
    )  # fmt: skip
    return {name: tensor.detach() for name, tensor in trunk.items()}

"""Tasks of computational neuroscience in steps of 100 ms, and images read row by row.

All give :class:`Trials`. Timing and coherences are those of arXiv 2310.08513 (section 4 and the
authors' script); the noise of the stimuli and its size are ours where the paper's task library
decides it.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

# cross_entropy skips it: steps at which nothing is asked.
NO_TARGET = -100
# In percent: how far the two stimuli are apart.
COHERENCES_TWO = (0.0, 6.4, 12.8, 25.6, 51.2)
COHERENCES_CONTEXT = (5.0, 15.0, 50.0)


class Trials(NamedTuple):
    """A batch of trials."""

    inputs: Float[Tensor, "samples steps inputs"]
    targets: Int[Tensor, "samples steps"]
    """Class at every step; 0 means *wait*, −100 that the step does not count."""

    def loss(self, outputs: Float[Tensor, "samples steps classes"]) -> Float[Tensor, ""]:
        """Mean cross-entropy (nats) over the steps that count."""
        return functional.cross_entropy(outputs.flatten(0, 1), self.targets.flatten())

    def accuracy(self, outputs: Float[Tensor, "samples steps classes"]) -> float:
        """Share of right answers at the last step."""
        return float((outputs[:, -1].argmax(-1) == self.targets[:, -1]).double().mean())


def two_alternative(
    batch: int,
    generator: torch.Generator | None = None,
    *,
    noise: float | int = 0.1,
    dtype: torch.dtype = torch.float32,
) -> Trials:
    """Which of two noisy stimuli is stronger? 700 ms of stimulus, 100 ms of decision.

    Inputs (fixation, s₁, s₂) over 8 steps, all 0 in the last; s₁,₂ = 0.5 ± c · coherence / 200
    plus N(0, noise²), c = ±1, coherence one of 0, 6.4, 12.8, 25.6, 51.2 %. Targets: 0, then 1 or
    2. A fifth of the trials has no signal, so at best 0.9 can be right, less with noise.

    Raises:
        ValueError: ``batch`` below 1 or ``noise`` negative.
    """
    batch = _checked(batch, noise)
    steps, side, coherence = 7, _bits(batch, generator), _pick(COHERENCES_TWO, batch, generator)
    gap = (1 - 2 * side) * coherence / 200
    inputs = torch.zeros(batch, steps + 1, 3, dtype=dtype)
    inputs[:, :steps, 0] = 1
    means = torch.stack([0.5 + gap, 0.5 - gap], dim=-1)
    inputs[:, :steps, 1:] = means[:, None] + noise * _normal((batch, steps, 2), generator)
    return Trials(inputs, _decision(steps, 1 + side))


def delay_match(
    batch: int,
    generator: torch.Generator | None = None,
    *,
    noise: float | int = 0.1,
    dtype: torch.dtype = torch.float32,
) -> Trials:
    """Is the second stimulus the same as the first? 100 ms, 500 ms of delay, 100 ms, decision.

    Inputs (fixation, cos θ, sin θ) over 8 steps, θ = 0 or π/2 plus N(0, noise²) while a stimulus
    is shown; all 0 in the last. Targets: 0, then 1 for a match or 2.

    Raises:
        ValueError: ``batch`` below 1 or ``noise`` negative.
    """
    batch = _checked(batch, noise)
    steps, first = 7, _bits(batch, generator)
    other = _bits(batch, generator)
    second = (first + other) % 2
    inputs = torch.zeros(batch, steps + 1, 3, dtype=dtype)
    inputs[:, :steps, 0] = 1
    for t, angle in ((0, first), (steps - 1, second)):
        shown = functional.one_hot(angle, 2).to(torch.float64)
        inputs[:, t, 1:] = shown + noise * _normal((batch, 2), generator)
    return Trials(inputs, _decision(steps, 1 + other))


def context_decision(
    batch: int,
    generator: torch.Generator | None = None,
    *,
    noise: float | int = 0.1,
    dtype: torch.dtype = torch.float32,
) -> Trials:
    """Two pairs of stimuli; a context says which pair to judge. 200, 500, 100 ms.

    Inputs (fixation, pair one, pair two, context as one of two bits) over 8 steps: stimuli
    0.5 ± c · coherence / 200 plus N(0, noise²) in the first two, context and fixation in the first
    seven; coherence one of 5, 15, 50 %. Targets: 0, then 1 or 2, the stronger of the pair named.

    Raises:
        ValueError: ``batch`` below 1 or ``noise`` negative.
    """
    batch = _checked(batch, noise)
    shown, steps = 2, 7
    sides = torch.stack([_bits(batch, generator), _bits(batch, generator)], dim=-1)
    context = _bits(batch, generator)
    inputs = torch.zeros(batch, steps + 1, 7, dtype=dtype)
    inputs[:, :steps, 0] = 1
    for pair in range(2):
        gap = (1 - 2 * sides[:, pair]) * _pick(COHERENCES_CONTEXT, batch, generator) / 200
        means = torch.stack([0.5 + gap, 0.5 - gap], dim=-1)
        noisy = means[:, None] + noise * _normal((batch, shown, 2), generator)
        inputs[:, :shown, 1 + 2 * pair : 3 + 2 * pair] = noisy
    inputs[:, :steps, 5:] = functional.one_hot(context, 2)[:, None].to(dtype)
    return Trials(inputs, _decision(steps, 1 + sides.gather(1, context[:, None])[:, 0]))


def sequential_digits(
    images: Float[Tensor, "samples rows columns"],
    labels: Int[Tensor, " labels"],
    *,
    largest: float | int = 16.0,
) -> Trials:
    """Images read from top to bottom, a row a step; the class is asked at the last.

    The images are the caller's (scikit-learn's digits have values 0 to 16, hence ``largest``, by
    which all are divided).

    Raises:
        ValueError: no rows, another number of labels than images, negative labels, ``largest``
            not positive, or images that are not finite.
    """
    if images.shape[1] < 1 or labels.shape[0] != images.shape[0]:
        raise ValueError(
            f"there must be rows and as many labels as images, got images of shape "
            f"{tuple(images.shape)} and {labels.shape[0]} labels"
        )
    if not largest > 0:
        raise ValueError(f"largest must be positive, got {largest}")
    if not bool(images.isfinite().all()) or bool((labels < 0).any()):
        raise ValueError("images must be finite and labels at least 0")
    targets = torch.full(images.shape[:2], NO_TARGET, device=labels.device)
    targets[:, -1] = labels
    return Trials(images / largest, targets)


def _checked(batch: int, noise: float | int) -> int:
    batch = operator.index(batch)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    return batch


def _bits(batch: int, generator: torch.Generator | None) -> Tensor:
    return torch.randint(2, (batch,), generator=generator)


def _pick(values: tuple[float, ...], batch: int, generator: torch.Generator | None) -> Tensor:
    index = torch.randint(len(values), (batch,), generator=generator)
    return torch.tensor(values, dtype=torch.float64)[index]


def _normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _decision(steps: int, answer: Tensor) -> Tensor:
    """0 for ``steps`` steps, then the answer."""
    targets = torch.zeros(answer.shape[0], steps + 1, dtype=torch.int64)
    targets[:, -1] = answer
    return targets

"""Sizes and data of the rich-lazy experiments at each scale."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stiefel.data import MissingDataError, table
from stiefel.linalg import haar
from stiefel.papers.paper import Scale, UnavailableError
from stiefel.papers.rich_lazy_runs import (
    Start,
    Trained,
    initial_stack,
    laziness,
    train,
)
from stiefel.theory import (
    LazinessReport,
    Trials,
    context_decision,
    delay_match,
    sequential_digits,
    two_alternative,
)

NEURO_TASKS = {
    "2AF": two_alternative,
    "DMS": delay_match,
    "CXT": context_decision,
}
PROBE = 40


@dataclass(frozen=True)
class Plan:
    """Sizes of one scale."""

    hidden: int
    ranks: tuple[int, ...]
    replicas: int
    """Initialisations a seed, each with every rank."""
    control_ranks: tuple[int, ...]
    control_replicas: int
    batch: int
    rates: tuple[float, ...]
    """Learning rates; of several the one with the lowest last loss is kept."""
    stop: float
    """Running mean loss to stop at; 0 trains for all steps."""
    control_stop: float
    steps: int
    neuro: tuple[str, ...]
    neuro_ranks: tuple[int, ...]
    neuro_replicas: int
    neuro_steps: int
    device: str = "cpu"


SMOKE = Plan(
    hidden=24,
    ranks=(1, 6, 24),
    replicas=1,
    control_ranks=(1, 24),
    control_replicas=1,
    batch=50,
    rates=(0.02,),
    stop=1.8,
    control_stop=1.9,
    steps=60,
    neuro=("2AF",),
    neuro_ranks=(1, 24),
    neuro_replicas=1,
    neuro_steps=30,
)
LAPTOP = Plan(
    hidden=100,
    ranks=(1, 2, 5, 10, 30, 100),
    replicas=8,
    control_ranks=(1, 10, 100),
    control_replicas=4,
    batch=100,
    rates=(0.01,),
    stop=0.2,
    control_stop=0.3,
    steps=1500,
    neuro=("2AF",),
    neuro_ranks=(1, 10, 30, 100),
    neuro_replicas=2,
    neuro_steps=2500,
)
# Section 4 and the authors' script: all runs of equal length, the best of several rates.
PAPER = Plan(
    hidden=300,
    ranks=(5, 30, 300),
    replicas=1,
    control_ranks=(5, 30, 300),
    control_replicas=1,
    batch=200,
    rates=(0.001, 0.003, 0.01),
    stop=0.0,
    control_stop=0.0,
    steps=10_000,
    neuro=tuple(NEURO_TASKS),
    neuro_ranks=(1, 30, 100, 300),
    neuro_replicas=1,
    neuro_steps=10_000,
    device="cuda",
)
PLANS = {Scale.SMOKE: SMOKE, Scale.LAPTOP: LAPTOP, Scale.PAPER: PAPER}


@dataclass(frozen=True)
class Images:
    """Images as sequences of rows."""

    train: Trials
    test: Trials
    sha256: str


def images(scale: Scale) -> Images:
    """Digits as sequences: scikit-learn's 8 × 8, the first 1500 for training; or MNIST's 28 × 28.

    The split follows the writers: scikit-learn's digits come in runs of one writer each.

    Raises:
        UnavailableError: the data or, at paper scale, a CUDA device is missing.
    """
    if scale is Scale.PAPER:
        return _mnist()
    try:
        digits = table("digits")
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    trials = sequential_digits(digits.x.float().reshape(-1, 8, 8), digits.y)
    cut = 1500
    return Images(
        Trials(trials.inputs[:cut], trials.targets[:cut]),
        Trials(trials.inputs[cut:], trials.targets[cut:]),
        digits.sha256,
    )


def _mnist() -> Images:
    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA device (torch.cuda.is_available() is False)")
    folder = os.environ.get("STIEFEL_DATA")
    path = Path(folder or "") / "mnist.npz"
    if not folder:
        missing.append("MNIST: set STIEFEL_DATA to a folder with mnist.npz (as Keras stores it)")
    elif not path.is_file():
        missing.append(str(path))
    if missing:
        raise UnavailableError(f"the paper scale needs {'; and '.join(missing)}")
    return read_mnist(path, "cuda")


def read_mnist(path: Path, device: str) -> Images:
    """MNIST as sequences of 28 rows from ``x_train``, ``y_train``, ``x_test``, ``y_test``.

    Raises:
        ValueError: the arrays are not ``[n, 28, 28]`` with n labels.
    """
    parts = []
    with np.load(path, allow_pickle=False) as stored:
        for name in ("train", "test"):
            x, y = stored[f"x_{name}"], stored[f"y_{name}"]
            if x.shape != (len(y), 28, 28):
                raise ValueError(f"x_{name} in {path} must be ({len(y)}, 28, 28), got {x.shape}")
            pixels = torch.from_numpy(x.astype(np.float32)).to(device)
            labels = torch.from_numpy(y.astype(np.int64)).to(device)
            parts.append(sequential_digits(pixels, labels, largest=255.0))
    return Images(parts[0], parts[1], hashlib.sha256(path.read_bytes()).hexdigest())


@dataclass(frozen=True)
class Runs:
    """Reports of networks, ``[replica][start]``."""

    reports: list[list[LazinessReport]]
    steps: list[list[int]]
    accuracy: list[list[float]]
    losses: list[list[float]]
    unfinished: int
    """Networks that did not reach the loss to stop at."""

    def mean(self, key: str) -> list[float]:
        """Mean over replicas of a number of the reports, for each start."""
        rows = [[report[key] for report in row] for row in self.reports]  # pyrefly: ignore
        return torch.tensor(rows, dtype=torch.float64).mean(0).tolist()


Report = Callable[[float, str], None]


def digit_runs(
    data: Images,
    plan: Plan,
    starts: Sequence[Start],
    replicas: int,
    stop: float,
    seed: int,
    report: Report,
) -> Runs:
    """Train networks on image rows from every start and replica; measure on held-out images.

    Replicas have their own weights and their own order of batches; the starts of one replica
    share both.
    """
    per_epoch = len(data.train.inputs) // plan.batch

    def batches(seeds: Sequence[int]) -> Callable[[int], Trials]:
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        orders: list[Tensor] = []

        def batch(step: int) -> Trials:
            at = step % per_epoch
            if at == 0:
                orders[:] = [
                    torch.randperm(len(data.train.inputs), generator=g) for g in generators
                ]
            rows = torch.stack([order[at * plan.batch : (at + 1) * plan.batch] for order in orders])
            rows = rows.repeat_interleave(len(starts), 0).to(data.train.inputs.device)
            return Trials(data.train.inputs[rows], data.train.targets[rows])

        return batch

    test = data.test
    sizes = (test.inputs.shape[-1], plan.hidden, 10)
    probe = test.inputs[:PROBE]
    return _runs(
        plan, sizes, starts, replicas, stop, plan.steps, seed, batches, probe, test, report
    )


def neuro_runs(name: str, plan: Plan, seed: int, report: Report) -> Runs:
    """Train networks on fresh trials of one neuroscience task; every network sees the same."""
    task = NEURO_TASKS[name]

    def fresh(generator: torch.Generator, size: int) -> Trials:
        trials = task(size, generator)
        return Trials(trials.inputs.to(plan.device), trials.targets.to(plan.device))

    def batches(seeds: Sequence[int]) -> Callable[[int], Trials]:
        generator = torch.Generator().manual_seed(seeds[0])
        return lambda step: fresh(generator, 32)

    held_out = torch.Generator().manual_seed(1_000_000 + seed)
    probe, test = fresh(held_out, PROBE), fresh(held_out, 500)
    starts = [Start(rank) for rank in plan.neuro_ranks]
    sizes = (test.inputs.shape[-1], plan.hidden, 3)
    steps = plan.neuro_steps
    return _runs(
        plan,
        sizes,
        starts,
        plan.neuro_replicas,
        0.0,
        steps,
        seed,
        batches,
        probe.inputs,
        test,
        report,
    )


def _runs(
    plan: Plan,
    sizes: tuple[int, int, int],
    starts: Sequence[Start],
    replicas: int,
    stop: float,
    steps: int,
    seed: int,
    batches: Callable[[Sequence[int]], Callable[[int], Trials]],
    probe: Tensor,
    test: Trials,
    report: Report,
) -> Runs:
    """Train with every rate, keep the best of each network, measure."""
    seeds = [1000 * seed + replica for replica in range(replicas)]
    stack = initial_stack(sizes, starts, [torch.Generator().manual_seed(s) for s in seeds])
    stack = stack.to(plan.device)
    best: Trained | None = None
    for number, lr in enumerate(plan.rates):

        def every(step: int, loss: float, number: int = number) -> None:
            report((number + step / steps) / len(plan.rates), f"loss {loss:.2f}")

        order = [500_000 + s for s in seeds]  # of the batches: apart from the weights'
        trained = train(
            stack, batches(order), lr=lr, stop_at=[stop] * len(stack.w), steps=steps, every=every
        )
        best = trained if best is None else best.better(trained)
    if best is None:
        raise ValueError("the plan has no learning rate")
    with torch.no_grad():
        guesses = best.stack.outputs(test.inputs)[:, :, 0].argmax(-1)
    accuracy = (guesses == test.targets[:, -1]).double().mean(-1).tolist()
    reports = laziness(stack, best.stack, probe)
    n = len(starts)

    def rows(values: list) -> list[list]:
        return [values[i : i + n] for i in range(0, len(values), n)]

    return Runs(
        rows(reports), rows(best.steps), rows(accuracy), rows(best.losses), best.unfinished(stop)
    )


def whitened_diabetes() -> tuple[Tensor, Tensor, str]:
    """Inputs with XᵀX / n = I, the regression vector of the standardised target, checksum.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    try:
        rows = table("diabetes")
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    centred = rows.x - rows.x.mean(0)
    x = torch.linalg.svd(centred, full_matrices=False).U * len(centred) ** 0.5
    y = (rows.y - rows.y.mean()) / rows.y.std(correction=0)
    return x, x.mT @ y / len(x), rows.sha256


def isotropic_tasks(bases: int, d: int, size: float, generator: torch.Generator) -> Tensor:
    """``bases`` · d tasks of length ``size``: random orthonormal bases, each task uniform.

    Over a basis βᵀAβ sums to the trace of A: the mean over tasks has no sampling error.
    """
    drawn = [haar(d, generator=generator, dtype=torch.float64) for _ in range(bases)]
    return size * torch.cat(drawn)

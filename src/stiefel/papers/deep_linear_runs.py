"""Runs behind the card of deep linear dynamics: learning times, closed forms, Jacobians."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stiefel.data import MissingDataError, table
from stiefel.init import orthogonal_init_
from stiefel.papers.paper import Scale, UnavailableError
from stiefel.theory import (
    DeepLinearSimulator,
    TaskModes,
    jacobian_spectrum,
    max_stable_lr,
    mode_curve,
    pretraining_consistency,
    task_modes,
)

# Part of the zero map's excess loss that counts as learned.
TOLERANCE = 0.002
# Strength at which decoupled networks start: for learning times, and for the course of each mode.
START_OF_TIMES = 1e-2
START = 1e-3
# Learning rates times depth: eleven, from 8 down to 0.08.
RATES = tuple(2 * 10 ** (0.6 - 0.2 * k) for k in range(11))
# Gains of the Jacobians' weights.
GAINS = (0.95, 1.0, 1.05, 1.1, 1.2)


@dataclass(frozen=True)
class Plan:
    """Sizes of one scale."""

    depths: tuple[int, ...]
    hidden: int
    cap: int
    """Iterations at which a run is given up."""
    starts: int
    """Networks whose learning times are averaged."""
    networks: int
    """Small random networks whose half-learning times are averaged."""
    width: int
    """Of the tanh networks."""
    layers: int
    bases: int
    """Random bases that the pre-training criterion is compared with."""
    device: str = "cpu"


def plan(scale: Scale) -> Plan:
    """Sizes of a scale; the depths 4, 8, 16 and 24 are in all, as the claims need them.

    Raises:
        UnavailableError: the paper scale without CUDA.
    """
    if scale is Scale.SMOKE:
        return Plan((4, 8, 16, 24), 48, 60, 1, 4, 40, 20, 3)
    if scale is Scale.LAPTOP:
        return Plan((2, 4, 8, 16, 24, 48), 48, 400, 10, 100, 200, 100, 50)
    # Figures 4 and 7 of the paper; its depths count layers of neurons, 3 to 100.
    depths = (2, 4, 7, 8, 9, 13, 16, 19, 24, 27, 35, 43, 53, 63, 73, 83, 93, 99)
    return Plan(depths, 1000, 400, 1, 100, 1000, 100, 50, "cuda")


@dataclass(frozen=True)
class Task:
    """Raw inputs and outputs, centred, and their modes in the whitened inputs."""

    x: Tensor
    y: Tensor
    modes: TaskModes
    sha256: str


def task(scale: Scale) -> Task:
    """Digits (MNIST at the paper's scale), 40 principal components whitened, centred one-hot.

    Raises:
        UnavailableError: scikit-learn, or for the paper's scale CUDA or MNIST, is missing.
    """
    if scale is Scale.PAPER:
        x, labels, sha256 = _mnist()
    else:
        try:
            digits = table("digits")
        except MissingDataError as error:
            raise UnavailableError(str(error)) from error
        x, labels, sha256 = digits.x / 16, digits.y, digits.sha256
    y = nn.functional.one_hot(labels).double()
    x, y = x - x.mean(0), y - y.mean(0)
    return Task(x, y, task_modes(x, y, k=40), sha256)


def _mnist() -> tuple[Tensor, Tensor, str]:
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
    return read_mnist(path)


def read_mnist(path: Path) -> tuple[Tensor, Tensor, str]:
    """Training images ``[n, 784]`` in 0..1, their labels and the file's checksum.

    Raises:
        ValueError: ``x_train`` is not ``[n, 28, 28]`` with n labels in ``y_train``.
    """
    with np.load(path, allow_pickle=False) as stored:
        x, y = stored["x_train"], stored["y_train"]
    if x.shape != (len(y), 28, 28):
        raise ValueError(f"x_train in {path} must be ({len(y)}, 28, 28), got {x.shape}")
    pixels = torch.from_numpy(x.reshape(len(x), -1).astype(np.float64) / 255)
    labels = torch.from_numpy(y.astype(np.int64))
    return pixels, labels, hashlib.sha256(path.read_bytes()).hexdigest()


def learning_times(modes: TaskModes, sizes: Plan, init: str, depth: int, seed: int) -> dict:
    """Iterations at the best rate of each network, and that rate times depth, averaged.

    The cap counts for those that are not there at any rate; of rates the geometric mean of the
    others, 0 where there are none.
    """
    widths = [modes.V.shape[0], *[sizes.hidden] * (depth - 1), modes.U.shape[0]]
    # Bases of decoupled networks change nothing but rounding.
    count = 1 if init == "decoupled" else sizes.starts
    simulator = DeepLinearSimulator(
        widths,
        init,
        modes=modes,
        u0=START_OF_TIMES,
        seeds=range(sizes.starts * seed, sizes.starts * seed + count),
        dtype=torch.float32,
        device=sizes.device,
    )
    rates = [rate / depth for rate in RATES]
    times = simulator.learning_time(rates, sizes.cap, tolerance=TOLERANCE, first=True)
    steps, best = times.min(0)
    reached = steps.isfinite()
    steps = torch.where(reached, steps.ceil(), sizes.cap)
    chosen = [math.log(RATES[int(k)]) for k in best[reached]]
    return {
        "steps": float(steps.mean()),
        "least": float(steps.min()),
        "reached": float(reached.double().mean()),
        "rate": math.exp(math.fsum(chosen) / len(chosen)) if chosen else 0.0,
    }


def predicted_time(modes: TaskModes, sizes: Plan, depth: int) -> float:
    """What the closed form says of decoupled networks, at the best of the rates that are stable."""
    rates = torch.tensor([rate / depth for rate in RATES], dtype=torch.float64)
    rates = rates[rates < max_stable_lr(modes.S[0], depth)]
    steps = torch.arange(sizes.cap + 1, dtype=torch.float64)
    strengths = mode_curve(steps, modes.S, START_OF_TIMES, depth, rates[:, None])
    excess = (strengths - modes.S[:, None]).square().sum(1)
    there = excess <= TOLERANCE * modes.S.square().sum()
    first = torch.where(there.any(1), there.int().argmax(1), sizes.cap)
    return float(first.min())


def closed_form(modes: TaskModes, seed: int) -> dict[str, Any]:
    """Gradient descent on decoupled two-layer networks against the formula, two rates."""
    widths = [modes.V.shape[0], 64, modes.U.shape[0]]
    simulator = DeepLinearSimulator(widths, "decoupled", modes=modes, u0=START, seeds=(seed,))
    errors = {}
    series: dict[str, list[float]] = {}
    for rate in (0.02, 0.2):
        runs = simulator.run(rate, round(40 / rate))
        found, exact = runs.values[0].mT, mode_curve(runs.steps, modes.S, START, 2, rate)
        errors[rate] = float(((found - exact).abs() / modes.S[:, None]).max())
        if rate == 0.2:
            series["time"] = (rate * runs.steps).tolist()
            for k in (0, modes.S.numel() // 2, modes.S.numel() - 1):
                series[f"descent {k}"] = found[k].tolist()
                series[f"formula {k}"] = exact[k].tolist()
    return {"error": errors[0.02], "error_ratio": errors[0.2] / errors[0.02], "series": series}


def half_times(modes: TaskModes, sizes: Plan, seed: int) -> dict[str, float]:
    """Half-learning times from small Gaussian weights: do strong modes come first?"""
    widths = [modes.V.shape[0], 64, modes.U.shape[0]]
    seeds = range(1000 * seed, 1000 * seed + sizes.networks)
    simulator = DeepLinearSimulator(widths, "gaussian", std=1e-3, modes=modes, seeds=seeds)
    strengths = simulator.run(0.1, 500).values  # [networks, steps, modes]
    half = modes.S / 2
    after = (strengths >= half).int().argmax(1)
    if not bool((after > 0).all()):
        raise RuntimeError("a mode did not reach half its strength in 500 iterations")
    ends = [torch.gather(strengths, 1, (after - k)[:, None])[:, 0] for k in (1, 0)]
    times = 0.1 * (after - 1 + (half - ends[0]) / (ends[1] - ends[0]))
    mean = times.mean(0)
    single = [_correlation(t, 1 / modes.S) for t in times]
    return {
        "half_time_first": float(mean[0]),
        "half_time_last": float(mean[-1]),
        "half_time_correlation": _correlation(mean, 1 / modes.S),
        "half_time_inversions": float((mean.diff() < 0).sum()),
        "half_time_correlation_single": float(np.mean(single)),
        "half_time_inversions_single": float((times.diff() < 0).sum(1).double().mean()),
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def isometry(sizes: Plan, seed: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """End-to-end Jacobians of deep tanh networks, orthogonal and Gaussian."""
    metrics: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sizes.width, generator=generator, dtype=torch.float64).to(sizes.device)
    blocks = [
        layer
        for _ in range(sizes.layers)
        for layer in (nn.Tanh(), nn.Linear(sizes.width, sizes.width, bias=False))
    ]
    model = nn.Sequential(*blocks).double().to(sizes.device)
    for gain in GAINS:
        orthogonal_init_(model, gain=gain, generator=generator)
        values, share = jacobian_spectrum(model, x)
        metrics[f"isometry_orthogonal_{gain:g}"] = float(share)
        series[f"orthogonal {gain:g}"] = values.tolist()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise / math.sqrt(sizes.width))
    values, share = jacobian_spectrum(model, x)
    metrics["isometry_gaussian"] = float(share)
    series["gaussian"] = values.tolist()
    return metrics, series


def consistency(data: Task, sizes: Plan, seed: int) -> dict[str, float]:
    """The pre-training criterion of the task, and of random bases of as many directions."""
    generator = torch.Generator().manual_seed(seed)
    modes = task_modes(data.x, data.y, whiten=False)
    inputs, count = modes.V.shape
    residuals = []
    for _ in range(sizes.bases):
        noise = torch.randn(inputs, count, generator=generator, dtype=torch.float64)
        basis, _ = torch.linalg.qr(noise.to(modes.V.device))
        image = modes.sigma11 @ basis
        apart = image - basis * (basis * image).sum(0)
        residuals.append(float(torch.linalg.norm(apart) / torch.linalg.norm(image)))
    return {
        "pretraining_residual": pretraining_consistency(data.x, data.y),
        "pretraining_residual_random": float(np.mean(residuals)),
    }


def table_of_times(
    modes: TaskModes, sizes: Plan, seed: int, inits: Sequence[str]
) -> dict[str, list[dict]]:
    """:func:`learning_times` of every init at every depth."""
    return {
        init: [learning_times(modes, sizes, init, depth, seed) for depth in sizes.depths]
        for init in inits
    }

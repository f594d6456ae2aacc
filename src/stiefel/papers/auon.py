"""AuON and Hybrid-AuON on a small GPT, with the control that shows what the cosh does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

from stiefel.papers import race
from stiefel.papers.figures import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    LABELS,
    ORANGE,
    draw_losses,
    legend,
    mean_series,
    panels,
    title,
)
from stiefel.papers.paper import Claim, Measurement, Paper, Scale
from stiefel.papers.progress import Progress
from stiefel.papers.rmnp import benchmark_shapes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor
    from torch.optim import Optimizer

METHODS = ("adamw", "muon", "auon", "hybrid-auon", "hybrid-auon-normalized")
# AuON without its cosh, at AuON's rate.
CONTROL = "normalized-momentum"
KINDS = ("square", "tall", "wide")
# The bound on ‖AuON − control‖ / ‖control‖.
TOLERANCE = 1e-4
REPEATS = 3
# Steps without Newton–Schulz are so much cheaper that they can be measured more often.
CHEAP_REPEATS = 3


def step_seconds(scale: Scale, seed: int) -> dict[str, float]:
    """CPU seconds of one thread for a whole optimizer step: medians, interleaved.

    On the 36 matrices of a transformer of six layers, width 384, float32. ``adamw`` is torch's
    with ``foreach=True``, ``muon`` is ``torch.optim.Muon``.
    """
    import torch

    from stiefel.optim import AuON, HybridAuON

    generator = torch.Generator().manual_seed(seed)

    def weights() -> list[Tensor]:
        made = []
        for shape in benchmark_shapes(scale):
            weight = torch.randn(shape, generator=generator)
            weight.grad = torch.randn(shape, generator=generator)
            made.append(weight)
        return made

    optimizers: dict[str, Optimizer] = {
        "muon": torch.optim.Muon(weights(), lr=1e-3),
        "hybrid": HybridAuON(weights(), lr=1e-3, variant="paper"),
        "adamw": torch.optim.AdamW(weights(), lr=1e-3, foreach=True),
        "auon": AuON(weights(), lr=1e-3),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for optimizer in optimizers.values():  # first steps make state and build kernels: not timed
        optimizer.step()
    for _ in range(REPEATS):
        for name, optimizer in optimizers.items():
            for _ in range(CHEAP_REPEATS if name in ("adamw", "auon") else 1):
                times[name].append(_cpu_seconds(optimizer))
    return {name: median(values) for name, values in times.items()}


def _cpu_seconds(optimizer: Optimizer) -> float:
    start = time.thread_time()
    optimizer.step()
    return time.thread_time() - start


def experiment(scale: Scale, seed: int, progress: Progress) -> Measurement:
    """Race AuON and the hybrid against AdamW, Muon and normalised momentum; time their steps."""
    plan = race.plan(scale)
    choices = race.choose(progress, plan, METHODS, span=(0.0, 0.5))
    configs = {method: plan.config(method, choices[method].lr, seed) for method in METHODS}
    configs["control"] = plan.config(CONTROL, choices["auon"].lr, seed)
    results = progress.shared(plan.kind, list(configs.values()), plan.trainer, span=(0.5, 0.9))
    runs = dict(zip(configs, results, strict=True))
    finals = {name: race.final(run) for name, run in runs.items()}
    seconds = step_seconds(scale, seed)

    metrics = {
        "loss_minus_adamw": finals["auon"] - finals["adamw"],
        "control_difference": max(
            p[kind]["difference"] for p in runs["auon"]["probes"] for kind in KINDS
        ),
        "hybrid_minus_adamw": finals["hybrid-auon"] - finals["adamw"],
        "hybrid_minus_muon": finals["hybrid-auon"] - finals["muon"],
        "time_ratio_adamw": seconds["auon"] / seconds["adamw"],
        "time_ratio_muon": seconds["hybrid"] / seconds["muon"],
        "loss_minus_control": finals["auon"] - finals["control"],
        "normalized_minus_adamw": finals["hybrid-auon-normalized"] - finals["adamw"],
        **{f"loss_{name}": value for name, value in finals.items()},
        **{f"milliseconds_{name}": 1e3 * value for name, value in seconds.items()},
    }
    progress(1.0, f"{metrics['loss_minus_adamw']:+.3f} to AdamW")
    return Measurement(seed, metrics, _series(runs), race.settings_of(plan, choices))


def _series(runs: dict[str, race.Run]) -> dict[str, list[float]]:
    series = {f"loss {name}": run["losses"] for name, run in runs.items()}
    series |= {f"steps {name}": run["steps"] for name, run in runs.items()}
    probes = runs["auon"]["probes"]
    series["probe steps"] = [probe["step"] for probe in probes]
    for kind in KINDS:
        series[f"difference {kind}"] = [probe[kind]["difference"] for probe in probes]
    return series


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Loss curves; AuON against normalised momentum, step by step; time of a step."""
    picture, (left, middle, right) = panels(3)
    curves = {m: (LABELS[m], COLOURS[m], "-") for m in ("adamw", "auon", "hybrid-auon", "muon")}
    curves["control"] = ("control", COLOURS["control"], ":")
    draw_losses(left, measurements, curves)
    _draw_control(middle, measurements)
    _draw_times(right, measurements)
    return picture


def _draw_control(ax: Axes, measurements: Sequence[Measurement]) -> None:
    """‖AuON − normalised momentum‖ / ‖normalised momentum‖ at every step."""
    steps = mean_series(measurements, "probe steps")
    for kind, style in zip(KINDS, ("-", "-", ":"), strict=True):  # tall and wide coincide
        values = mean_series(measurements, f"difference {kind}")
        ax.plot(steps, values, style, color=COLOURS[kind], linewidth=1.6, label=kind)
    ax.axhline(TOLERANCE, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_yscale("log")
    ax.set_ylim(1e-6, 1e-2)
    ax.minorticks_off()
    ax.set_xlabel("step")
    title(ax, "AuON − control, relative")
    legend(ax)


def _draw_times(ax: Axes, measurements: Sequence[Measurement]) -> None:
    bars = (
        ("torch Muon", "muon", BLUE),
        ("Hybrid-AuON", "hybrid", GREEN),
        ("torch AdamW\n(foreach)", "adamw", GREY),
        ("AuON", "auon", ORANGE),
    )
    for y, (_, name, colour) in enumerate(bars):
        value = fmean(m.metrics[f"milliseconds_{name}"] for m in measurements)
        ax.barh(-y, value, 0.6, color=colour)
        ax.annotate(
            f"{value:.3g} ms",
            (value, -y),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xlim(low / 2, high * 8)  # room for the last label
    ax.set_yticks([-y for y in range(len(bars))], [label for label, _, _ in bars])
    ax.set_xlabel("CPU time, one thread (ms)")
    title(ax, "one step")


paper = Paper(
    slug="auon",
    title="AuON: A Linear-time Alternative to Orthogonal Momentum Updates",
    authors="Dipan Maity",
    published="2025-09-29",
    arxiv="2509.24320",
    code="https://github.com/ryyzn9/AuON",
    topic="optimizers",
    data="text",
    summary=(
        "AuON bounds the spectral norm of a step without orthogonalising: it divides the momentum "
        "by its Frobenius norm and by the root mean square of the cosh of its entries. The hybrid "
        "takes one Newton–Schulz iteration first."
    ),
    claim=Claim(
        "AuON ends within 0.06 of AdamW's final loss or below it (paired difference)",
        metric="loss_minus_adamw",
        at_most=0.06,
    ),
    others=(
        Claim(
            "Control: at every step AuON's update is Frobenius-normalised momentum to 1e-4, on "
            "every matrix (largest relative difference)",
            metric="control_difference",
            at_most=TOLERANCE,
        ),
        Claim(
            "Hybrid-AuON ends at least 0.02 below AdamW",
            metric="hybrid_minus_adamw",
            at_most=-0.02,
        ),
        Claim(
            "Hybrid-AuON ends within 0.05 of Muon's final loss or below it",
            metric="hybrid_minus_muon",
            at_most=0.05,
        ),
        Claim(
            "A whole AuON step takes at most 0.45 × the CPU time of torch's AdamW (foreach)",
            metric="time_ratio_adamw",
            at_most=0.45,
        ),
        Claim(
            "A whole Hybrid-AuON step takes at most 0.35 × the CPU time of torch.optim.Muon",
            metric="time_ratio_muon",
            at_most=0.35,
        ),
    ),
    experiment=experiment,
    figure=figure,
    snippet="""\
import torch
from stiefel.optim import AuON, split_parameters
model = torch.nn.TransformerEncoderLayer(64, 4)
optimizer = AuON(split_parameters(model), lr=2e-2)
model(torch.randn(8, 2, 64)).square().mean().backward(); optimizer.step()
""",
    notes=(
        (
            "The cosh does nothing. With N entries of square sum 1 its mean square is 1 + 1/N to "
            "first order: it scales a 96 × 96 matrix by 1 − 5e-5, a larger one by less, and every "
            "entry alike. AuON is momentum divided by its Frobenius norm, which alone bounds the "
            "spectral norm of the step. The control is that, run as a method of its own at AuON's "
            "rate."
        ),
        race.RULES,
        (
            "The hybrid is the literal one: after its iteration it is not normalised again. "
            "Normalised again (our reading that keeps AuON's bound) it is among the metrics "
            "(normalized_minus_adamw), with a grid of its own."
        ),
        (
            "The author's own table has Muon ahead of the hybrid, the hybrid ahead of AdamW, and "
            "AuON far behind all three in training loss. The code since January 2026 does "
            "something else under the same names: momentum SGD, and Muon without its size rule. "
            "Neither is raced here."
        ),
        (
            "Steps are timed on the 36 matrices of a transformer of six layers, width 384, in a "
            "process that keeps the memory it frees. By torch's defaults AdamW (foreach) pays for "
            "new pages at every step and takes about twice as long; AuON makes no such "
            "temporaries."
        ),
    ),
    seconds=90.0,
)

"""DCT columns for low-rank optimizers: how well they project, how they train, what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

from stiefel.papers import race
from stiefel.papers.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VIOLET,
    draw_losses,
    legend,
    panels,
    title,
)
from stiefel.papers.paper import Claim, Measurement, Paper, Scale
from stiefel.papers.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# On the language model, all but AdamW with error feedback and at a quarter of the rank.
LANGUAGE = ("dct-adamw", "svd-adamw", "random-columns-adamw", "adamw")
# On the photograph, without error feedback.
IMAGE = ("dct", "svd", "random-basis", "random-columns", "adamw")
# A harder rank, for what stands between the DCT and the SVD.
IMAGE_SMALL = ("dct", "svd")
IMAGE_GRID = (1e-3, 2e-3, 4e-3)
RANK, SMALL_RANK = 32, 8
BASES = ("svd", "dct2", "dct3", "random", "identity")
REPEATS = 5


def image_plan(scale: Scale, rank: int) -> race.Plan:
    """The race of autoencoders on the photograph at one rank.

    Raises:
        UnavailableError: the photograph is not on this machine.
    """
    from stiefel.papers import image_autoencoder

    smoke = scale is Scale.SMOKE
    settings = {
        "steps": 20 if smoke else 300,
        "batch": 128,
        "rank": rank,
        "picture_sha256": image_autoencoder.picture().sha256,
    }
    grids = dict.fromkeys(IMAGE, IMAGE_GRID)
    rounds = 0 if smoke else 3
    return race.Plan("image-autoencoder", settings, grids, image_autoencoder.train, rounds)


def projection_errors(scale: Scale, seed: int) -> dict[str, float]:
    """Relative error ‖G − G P Pᵀ‖ / ‖G‖ at rank 32 for a first layer's gradient G, by basis."""
    import torch

    from stiefel.linalg import haar
    from stiefel.optim import ColumnSelector, low_rank_svd_projector
    from stiefel.papers import image_autoencoder

    steps = 3 if scale is Scale.SMOKE else 60
    gradient = image_autoencoder.first_gradient(seed, steps).double()
    n = gradient.shape[1]
    generator = torch.Generator().manual_seed(seed)
    bases = {"random": haar(n, generator=generator), "identity": torch.eye(n)}
    errors = {}
    for name in BASES:
        if name == "svd":
            low = gradient @ low_rank_svd_projector(gradient, RANK)
        else:
            selector = ColumnSelector(n, RANK, basis=bases.get(name, name))
            low, _ = selector.select(gradient)
        errors[name] = float(ColumnSelector.error(gradient, low))
    return errors


def projection_seconds(scale: Scale, seed: int) -> dict[str, float]:
    """CPU seconds of one thread to bring an n × n float32 matrix to rank r: medians, interleaved.

    ``svd``: a whole decomposition; ``select_low`` and ``select_high``: DCT, column norms, the r
    largest and their coordinates, for r = n/16 and n/2; ``power_low`` and ``power_high``: Dion's
    step, A Q, QR, Aᵀ P and unit columns, for the same ranks. n is 1024.
    """
    import torch

    from stiefel.optim import ColumnSelector

    n = 64 if scale is Scale.SMOKE else 1024
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=generator)
    ranks = {"low": n // 16, "high": n // 2}

    def select(selector: ColumnSelector) -> Callable[[], object]:
        return lambda: selector.select(a)

    def power(start: torch.Tensor) -> Callable[[], object]:
        def step() -> torch.Tensor:
            left = torch.linalg.qr(a @ start).Q
            right = a.mT @ left
            return right / right.norm(dim=0)

        return step

    tasks: dict[str, Callable[[], object]] = {}
    for name, rank in ranks.items():
        tasks[f"select_{name}"] = select(ColumnSelector(n, rank))
        tasks[f"power_{name}"] = power(torch.randn(n, rank, generator=generator))
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():  # first calls choose algorithms and build tables: not timed
        task()
    for _ in range(REPEATS):
        for name, task in tasks.items():
            times[name].append(_cpu_seconds(task))
    seconds = {name: median(values) for name, values in times.items()}
    # So much slower that one measurement more would cost as much as all of the above.
    seconds["svd"] = min(_cpu_seconds(lambda: torch.linalg.svd(a)) for _ in range(2))
    return seconds


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def experiment(scale: Scale, seed: int, progress: Progress) -> Measurement:
    """Race low-rank AdamWs on text and on a photograph; project one gradient; time projections."""
    plan = race.plan(scale)
    images, small = image_plan(scale, RANK), image_plan(scale, SMALL_RANK)
    text_runs, text_choices = _race(progress, plan, LANGUAGE, seed, (0.0, 0.7))
    image_runs, image_choices = _race(progress, images, IMAGE, seed, (0.7, 0.85))
    small_runs, small_choices = _race(progress, small, IMAGE_SMALL, seed, (0.85, 0.95))
    errors = projection_errors(scale, seed)
    seconds = projection_seconds(scale, seed)

    losses = {name.removesuffix("-adamw"): race.final(run) for name, run in text_runs.items()}
    image = {name: race.final(run) for name, run in image_runs.items()}
    metrics = {
        "loss_minus_svd": losses["dct"] - losses["svd"],
        "loss_minus_random_columns": losses["dct"] - losses["random-columns"],
        "loss_minus_adamw": losses["dct"] - losses["adamw"],
        "image_minus_svd": image["dct"] - image["svd"],
        "image_over_random": image["dct"] / image["random-basis"],
        "projection_minus_svd": errors["dct2"] - errors["svd"],
        "projection_over_random": errors["dct2"] / errors["random"],
        "svd_time_ratio": seconds["svd"] / seconds["select_low"],
        "select_time_growth": seconds["select_high"] / seconds["select_low"],
        "power_time_growth": seconds["power_high"] / seconds["power_low"],
        **{f"loss_{name}": value for name, value in losses.items()},
        **{f"image_{name}": value for name, value in image.items()},
        **{f"image_{SMALL_RANK}_{name}": race.final(run) for name, run in small_runs.items()},
        **{f"projection_{name}": value for name, value in errors.items()},
        **{f"milliseconds_{name}": 1e3 * value for name, value in seconds.items()},
        **{f"milliseconds_step_{name}": run["milliseconds"] for name, run in image_runs.items()},
    }
    series = {f"loss {name}": run["losses"] for name, run in text_runs.items()}
    series |= {f"steps {name}": run["steps"] for name, run in text_runs.items()}
    config = {
        **race.settings_of(plan, text_choices),
        "image": race.settings_of(images, image_choices),
        f"image_{SMALL_RANK}": race.settings_of(small, small_choices),
    }
    progress(1.0, f"an SVD takes {metrics['svd_time_ratio']:.0f} × as long")
    return Measurement(seed, metrics, series, config)


def _race(
    progress: Progress,
    plan: race.Plan,
    methods: Sequence[str],
    seed: int,
    span: tuple[float, float],
) -> tuple[dict[str, race.Run], dict[str, race.Choice]]:
    """This seed's run of each method at the best rate of its grid, and what it was chosen from."""
    start, end = span
    middle = start + 0.6 * (end - start)
    choices = race.choose(progress, plan, methods, span=(start, middle))
    configs = [plan.config(method, choices[method].lr, seed) for method in methods]
    results = progress.shared(plan.kind, configs, plan.trainer, span=(middle, end))
    return dict(zip(methods, results, strict=True)), choices


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Loss curves with the random control; errors on the photograph; time against rank."""
    picture, (left, middle, right) = panels(3)
    draw_losses(
        left,
        measurements,
        {
            "adamw": ("AdamW, full rank", GREY, "-"),
            "svd-adamw": ("SVD", BLUE, "-"),
            "random-columns-adamw": ("random columns", GREEN, "--"),
            "dct-adamw": ("DCT columns", ORANGE, "-"),
        },
    )
    _draw_image(middle, measurements)
    _draw_times(right, measurements)
    return picture


def _draw_image(ax: Axes, measurements: Sequence[Measurement]) -> None:
    """Relative error of the autoencoders, each seed a dot, at both ranks."""
    bases = (
        ("DCT", "dct", ORANGE),
        ("SVD", "svd", BLUE),
        ("random\nbasis", "random-basis", VIOLET),
        ("random\ncols", "random-columns", GREEN),
    )
    for rank, prefix, marker in ((RANK, "image_", "o"), (SMALL_RANK, f"image_{SMALL_RANK}_", "D")):
        for x, (_, name, colour) in enumerate(bases):
            values = [
                m.metrics[f"{prefix}{name}"] for m in measurements if f"{prefix}{name}" in m.metrics
            ]
            label = f"rank {rank}" if x == 0 else None
            ax.scatter([x] * len(values), values, s=18, color=colour, marker=marker, label=label)
    level = fmean(m.metrics["image_adamw"] for m in measurements)
    ax.axhline(level, color=GREY, linewidth=0.8, linestyle=":")
    ax.annotate("full rank", (2.5, level), (0, 2), textcoords="offset points", fontsize=6.5)
    ax.set_xticks(range(len(bases)), [label for label, _, _ in bases])
    ax.set_xlim(-0.5, len(bases) - 0.5)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.15 * (high - low))  # room for the legend
    title(ax, "photograph: relative error")
    legend(ax, "upper left")


def _draw_times(ax: Axes, measurements: Sequence[Measurement]) -> None:
    """CPU time of one projection at both ranks, and of an SVD."""
    for name, label, colour in (
        ("power", "power step (Dion)", VIOLET),
        ("select", "DCT, select, project", ORANGE),
    ):
        values = [
            fmean(m.metrics[f"milliseconds_{name}_{rank}"] for m in measurements)
            for rank in ("low", "high")
        ]
        ax.plot([1 / 16, 1 / 2], values, color=colour, marker="o", markersize=3.5, label=label)
    level = fmean(m.metrics["milliseconds_svd"] for m in measurements)
    ax.axhline(level, color=BLUE, linewidth=1.4, label="SVD")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 8)  # room for the legend
    ax.set_xticks([1 / 16, 1 / 2], ["1/16", "1/2"])
    ax.set_xlabel("rank, as a share of the width")
    title(ax, "CPU time, one thread (ms)")
    legend(ax, "upper left")


paper = Paper(
    slug="dct-low-rank",
    title=(
        "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large "
        "Language Models"
    ),
    authors="Ionut-Vlad Modoranu and 5 others",
    published="2025-05",
    arxiv="2505.17967",
    code="https://github.com/IST-DASLab/ISTA-DASLab-Optimizers",
    topic="optimizers",
    data="text",
    summary=(
        "Low-rank optimizers decompose every gradient to find their subspace. Here all layers of a "
        "width share one fixed cosine transform, and each keeps the list of the columns that "
        "carry most of its gradient: no SVD, and r integers instead of a projector."
    ),
    claim=Claim(
        "On text, AdamW in selected DCT columns ends within 0.02 of AdamW in the SVD's subspace or "
        "below it (quarter of the rank, error feedback for both)",
        metric="loss_minus_svd",
        at_most=0.02,
    ),
    others=(
        Claim(
            "On a photograph at rank 32 the autoencoder's relative error is at most the SVD's "
            "plus 0.005",
            metric="image_minus_svd",
            at_most=0.005,
        ),
        Claim(
            "There it is at most 0.90 × that of a random orthogonal basis with the same selection",
            metric="image_over_random",
            at_most=0.90,
        ),
        Claim(
            "A first layer's gradient loses at most 0.05 more of its norm than with the SVD",
            metric="projection_minus_svd",
            at_most=0.05,
        ),
        Claim(
            "and at most 0.25 × what it loses in a random orthogonal basis",
            metric="projection_over_random",
            at_most=0.25,
        ),
        Claim(
            "Transform, selection and projection of a 1024 × 1024 matrix take at most a twentieth "
            "of the CPU time of its SVD (ratio)",
            metric="svd_time_ratio",
            at_least=20.0,
        ),
        Claim(
            "Their time at rank 512 is at most twice that at rank 64",
            metric="select_time_growth",
            at_most=2.0,
        ),
        Claim(
            "while that of a power iteration with QR grows at least fivefold",
            metric="power_time_growth",
            at_least=5.0,
        ),
    ),
    experiment=experiment,
    figure=figure,
    snippet="""\
import torch
from stiefel.optim import DCTAdamW, split_parameters
model = torch.nn.TransformerEncoderLayer(64, 4)
optimizer = DCTAdamW(split_parameters(model), lr=1e-3, rank=0.25)
model(torch.randn(8, 2, 64)).square().mean().backward(); optimizer.step()
""",
    notes=(
        (
            "On text the cosines themselves deserve no credit: read the headline beside the "
            "control, columns of the same basis drawn at random in every step "
            "(loss_minus_random_columns). With error feedback whatever is not projected now is "
            "projected later. Layers that see the lines of a photograph have smooth gradients, "
            "and there the DCT is what makes the difference."
        ),
        race.RULES,
        (
            "The autoencoders (128 → 256 → 128, input noise 0.1, 300 steps, no error feedback) "
            "have grids and choose rates likewise, on every other line of the test part. The "
            "photograph is one picture, from scikit-learn; JPEG compressed it with a cosine "
            "transform of its own, in blocks of 8."
        ),
        (
            "At rank 8 the autoencoder's error in the SVD's subspace is among the metrics "
            "(image_8_svd, image_8_dct): a small rank leaves the fixed basis less to choose from."
        ),
        (
            "The random orthogonal basis has the same size and selection as the DCT. The paper's "
            "authors take the basis DCT-III in one mode and DCT-II in another; here it is DCT-II, "
            "whose columns are pure frequencies (projection_dct3 has the other)."
        ),
        (
            "Trion, the paper's variant of Muon, is part of the library and not raced here, nor "
            "are memory and the billion-parameter runs: they would not fit the two minutes."
        ),
    ),
    seconds=100.0,
)

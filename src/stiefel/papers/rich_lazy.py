"""Rich or lazy: what the rank of the initial weights decides, in recurrent and in linear nets."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from stiefel.papers.figures import BLUE, GREEN, GREY, ORANGE, legend, mean_series, panels, title
from stiefel.papers.paper import Claim, Measurement, Paper, Scale
from stiefel.papers.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ranks of the linear network's first layer, 40 × 10.
LINEAR_RANKS = (1, 2, 5, 10)
LINEAR_HIDDEN, LINEAR_SIZE, LINEAR_RATE = 40, 1e-2, 0.02
# Of the start that is not small: everything should be lazy there.
LARGE_SIZE = 1.0
STYLE = {
    "digits": (ORANGE, "o", "Frobenius norm"),
    "spectral": (BLUE, "s", "spectral norm"),
    "small": (GREY, "^", "small gain"),
}


def experiment(scale: Scale, seed: int, progress: Progress) -> Measurement:
    """Recurrent nets of several ranks on digits and a neuroscience task; linear nets by theory."""
    from stiefel.papers import rich_lazy_data as data
    from stiefel.papers.rich_lazy_runs import Start

    plan = data.PLANS[scale]
    images = data.images(scale)
    metrics: dict[str, float] = {}
    series: dict[str, Sequence[float]] = {}

    def share(start: float, width: float) -> data.Report:
        return lambda fraction, message: progress(start + width * fraction, message)

    starts = [Start(rank) for rank in plan.ranks]
    main = data.digit_runs(images, plan, starts, plan.replicas, plan.stop, seed, share(0.0, 0.5))
    _record(main, "digits", plan.ranks, metrics, series)
    metrics["ka_spearman"] = _spearman(plan.ranks, series["KA digits"])
    for name, gain, norm, place in (
        ("spectral", 1.25, "spectral", 0.5),
        ("small", 0.5, "fro", 0.6),
    ):
        controls = [Start(rank, gain, norm) for rank in plan.control_ranks]
        count, stop = plan.control_replicas, plan.control_stop
        runs = data.digit_runs(images, plan, controls, count, stop, seed, share(place, 0.1))
        _record(runs, name, plan.control_ranks, metrics, series)
    for number, task in enumerate(plan.neuro):
        report = share(0.7 + 0.25 * number / len(plan.neuro), 0.25 / len(plan.neuro))
        _record(data.neuro_runs(task, plan, seed, report), task, plan.neuro_ranks, metrics, series)
    checksum = _linear(scale, seed, metrics, series)
    progress(1.0, f"rank {plan.ranks[0]} moves {metrics['dw_ratio_digits']:.2f} × as far")
    config = {
        "plan": {**vars(plan)},
        "digits_sha256": images.sha256,
        "diabetes_sha256": checksum,
        "params": ["h2h.weight"],
    }
    return Measurement(seed, metrics, series, config)


def _record(
    runs, name: str, ranks: Sequence[int], metrics: dict, series: dict[str, Sequence[float]]
) -> None:
    """Means over replicas as series, lowest rank against full rank as metrics."""
    series[f"rank {name}"] = list(ranks)
    for key in ("dW", "RA", "KA", "sign"):
        series[f"{key} {name}"] = runs.mean(key)
    for key, table in (("steps", runs.steps), ("accuracy", runs.accuracy), ("loss", runs.losses)):
        series[f"{key} {name}"] = [fmean(column) for column in zip(*table, strict=True)]
    change, ra, ka = (series[f"{key} {name}"] for key in ("dW", "RA", "KA"))
    metrics |= {
        f"dw_ratio_{name}": change[0] / change[-1],
        f"ra_gain_{name}": ra[-1] - ra[0],
        f"ka_gain_{name}": ka[-1] - ka[0],
        f"unfinished_{name}": float(runs.unfinished),
    }


def _spearman(ranks: Sequence[int], values: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(ranks, values).statistic)


def _linear(
    scale: Scale, seed: int, metrics: dict[str, float], series: dict[str, Sequence[float]]
) -> str:
    """Two-layer linear networks on whitened diabetes; returns the data's checksum."""
    import torch

    from stiefel.papers.rich_lazy_data import isotropic_tasks, whitened_diabetes
    from stiefel.papers.rich_lazy_runs import linear_networks

    x, real, checksum = whitened_diabetes()
    generator = torch.Generator().manual_seed(2_000_000 + seed)
    bases, steps = (1, 800) if scale is Scale.SMOKE else (2, 2000)
    random = isotropic_tasks(bases, x.shape[1], float(real.norm()), generator)

    def run(tasks: torch.Tensor, size: float):
        return linear_networks(
            x,
            tasks,
            LINEAR_RANKS,
            hidden=LINEAR_HIDDEN,
            size=size,
            lr=LINEAR_RATE,
            steps=steps,
            generator=generator,
        )

    result, actual = run(random, LINEAR_SIZE), run(real[None], LINEAR_SIZE)
    large = run(random, LARGE_SIZE)
    mean = result.alignment.mean(0)
    gaps = (mean[:-1] - torch.tensor(result.expected, dtype=mean.dtype)).abs()
    series["rank linear"] = list(LINEAR_RANKS)
    series["KA linear"] = mean.tolist()
    series["KA linear formula"] = list(result.expected)
    series["RA linear"] = result.representation.mean(0).tolist()
    series["KA linear real"] = actual.alignment[0].tolist()
    series["KA linear large"] = large.alignment.mean(0).tolist()
    metrics |= {
        "linear_error": float(gaps.max()),
        "linear_task_error": float((result.alignment - result.formula).abs().max()),
        "linear_aligned": float(result.alignment[:, -1].min()),
        "linear_order": float(min(mean[-1] - mean[-2], mean[-2] - mean[0])),
        "linear_real_order": float(actual.alignment[0, -1] - actual.alignment[0, :-1].max()),
        "linear_large_least": float(large.alignment.mean(0).min()),
        "linear_residual": result.residual,
    }
    return checksum


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Weight change and kernel alignment against rank; the linear theory with its measurement."""
    picture, (left, middle, right) = panels(3)
    _draw_ranks(left, measurements, "dW", ("digits", "spectral", "small"))
    title(left, "weight change ‖ΔW‖")
    legend(left)
    _draw_ranks(middle, measurements, "KA", ("digits", "spectral", "small"))
    title(middle, "tangent-kernel alignment")
    _draw_linear(right, measurements)
    for ax in (left, middle):
        ax.set_xlabel("rank of initial recurrent weights")
    return picture


def _draw_ranks(
    ax: Axes, measurements: Sequence[Measurement], key: str, names: Sequence[str]
) -> None:
    for name in names:
        colour, marker, label = STYLE[name]
        ranks = measurements[0].series[f"rank {name}"]
        for m in measurements:
            ax.plot(ranks, m.series[f"{key} {name}"], color=colour, linewidth=0.6, alpha=0.35)
        mean = mean_series(measurements, f"{key} {name}")
        ax.plot(
            ranks, mean, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=label
        )
    ranks = measurements[0].series["rank digits"]
    ax.set_xscale("log")
    ax.set_xticks(list(ranks), [f"{rank:g}" for rank in ranks])
    ax.minorticks_off()
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + (0.35 if key == "dW" else 0.05) * (high - low))  # room for the legend


def _draw_linear(ax: Axes, measurements: Sequence[Measurement]) -> None:
    from stiefel.theory import expected_kernel_alignment

    d = LINEAR_RANKS[-1]
    ranks = range(1, d + 1)
    theory = [expected_kernel_alignment([1.0] * r, d) for r in ranks]
    ax.plot(ranks, theory, color=GREY, linewidth=1.2, label="theory")
    for number, m in enumerate(measurements):
        *plain, aligned = m.series["KA linear"]
        label = "measured" if number == 0 else None
        ax.scatter(LINEAR_RANKS, plain, s=18, color=ORANGE, zorder=2, label=label)
        label = "aligned, rank 1" if number == 0 else None
        ax.scatter([1], [aligned], s=26, color=GREEN, marker="D", zorder=2, label=label)
    ax.set_xlabel("rank of the first layer")
    title(ax, "linear net: kernel alignment")
    ax.set_ylim(0.92, 1.02)
    legend(ax)


paper = Paper(
    slug="rich-lazy",
    title="How connectivity structure shapes rich and lazy learning in neural circuits",
    authors="Yuhan Helena Liu and 5 others",
    published="2023-10",
    arxiv="2310.08513",
    code="https://github.com/Helena-Yuhan-Liu/BioRNN_RichLazy",
    topic="initialisation",
    data="images",
    summary=(
        "Recurrent networks whose initial weights have low rank change more in training than "
        "those of full rank and the same Frobenius norm: they learn features, the others mostly "
        "use what they start with. Low rank that is aligned with the task is the exception."
    ),
    claim=Claim(
        "Recurrent weights of rank 1 move at least 1.2 × as far as those of full rank until both "
        "reach the same loss on row-by-row digits",
        metric="dw_ratio_digits",
        at_least=1.2,
    ),
    others=(
        Claim(
            "Full rank keeps the representation: its alignment is at least 0.1 above rank 1's",
            metric="ra_gain_digits",
            at_least=0.1,
        ),
        Claim(
            "Full rank keeps the tangent kernel: its alignment is at least 0.12 above rank 1's",
            metric="ka_gain_digits",
            at_least=0.12,
        ),
        Claim(
            "Kernel alignment rises with rank (Spearman correlation over six ranks)",
            metric="ka_spearman",
            at_least=0.8,
        ),
        Claim(
            "Two-layer linear nets: mean kernel alignment over 20 isotropic tasks is within 0.004 "
            "of the closed form at every rank",
            metric="linear_error",
            at_most=0.004,
        ),
        Claim(
            "The same for every single task and rank",
            metric="linear_task_error",
            at_most=0.004,
        ),
        Claim(
            "Rank 1 aligned with the task is the laziest of all: alignment at least 0.9999 on "
            "every task",
            metric="linear_aligned",
            at_least=0.9999,
        ),
        Claim(
            "Aligned above full rank above rank 1 (the smaller of the two gaps)",
            metric="linear_order",
            at_least=0.0,
        ),
        Claim(
            "Limitation: with the largest singular value matched in place of the Frobenius norm, "
            "full rank gains less than that 0.12 of kernel alignment over rank 1",
            metric="ka_gain_spectral",
            at_most=0.12,
        ),
    ),
    experiment=experiment,
    figure=figure,
    snippet="""\
import torch
from stiefel.init import low_rank_init
from stiefel.theory import CTRNN, LazinessProbe
net = CTRNN(3, 64, 2, w0=low_rank_init((64, 64), rank=4))
probe = LazinessProbe(net, torch.randn(16, 8, 3)).snapshot(); print(probe.compare())
""",
    notes=(
        (
            "Digits of 8 × 8 pixels, a row a step, 100 units, SGD with momentum 0.9 at rate 0.01, "
            "batches of 100; every network stops when its running mean loss is below 0.2, so all "
            "are compared at equal loss. A seed is the mean of 8 initialisations, each with every "
            "rank cut from one Gaussian matrix of gain 1.25; alignments are measured on 40 digits "
            "of other writers and with respect to the recurrent weights only. Unlike the authors' "
            "script, gradients longer than 10 are shortened: one rank-1 start in twenty is so "
            "unstable that its loss is above 4 before the first step, and diverges without it."
        ),
        (
            "The effect on the kernel is one of scale as much as of rank. At equal Frobenius norm "
            "the largest singular value of rank 1 is five times that of full rank (12.5 against "
            "about 2.5), so the networks start in other dynamical regimes. With the spectral norm "
            "matched (blue) kernel alignment hardly depends on rank; weight change and "
            "representation still do. At gain 0.5 (grey), where fewer start unstable, all effects "
            "are weak. Controls stop at loss 0.3 and have 4 initialisations a seed."
        ),
        (
            "The linear theory is derived here in the paper's setting: whitened inputs (the "
            "diabetes table), a small start of size 0.01, the kernel of all parameters. The 20 "
            "tasks are two random orthonormal bases, over which the formula's mean has no sampling "
            "error; that every single task agrees with its own formula is the sharper test. From "
            "a start of size 1 everything is lazy (linear_large_least)."
        ),
        (
            "On two-alternative choice (2AF, 2500 steps, no stop, 2 initialisations a seed) "
            "representation and kernel alignment are recorded too; weight change is no witness "
            "there. Weights from measured connectomes are left out: no such data is here."
        ),
    ),
    seconds=75.0,
)

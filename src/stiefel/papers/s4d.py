"""S4D: how far the start of the diagonal decides, what LegS approximates, and a fast kernel."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stiefel.papers.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VIOLET,
    legend,
    mean_series,
    panels,
    title,
)
from stiefel.papers.paper import Claim, Measurement, Paper, Scale
from stiefel.papers.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPLEX = ("legs", "lin", "inv")
DISCRETISED = ("legs", "lin")
STANDARD = {
    "model": "s4d", "init": "legs", "disc": "zoh", "frozen": False, "half_input": False,
}  # fmt: skip
# What is trained: name → what differs from the standard.
VARIANTS: dict[str, dict[str, Any]] = {
    "legs": {},
    "lin": {"init": "lin"},
    "inv": {"init": "inv"},
    "real": {"init": "real"},
    "legs bilinear": {"disc": "bilinear"},
    "lin bilinear": {"init": "lin", "disc": "bilinear"},
    "random": {"init": "random"},
    "legs half": {"half_input": True},
    "legs frozen": {"frozen": True},
    "gru": {"model": "gru"},
}
CONTROLS = ("legs half", "legs frozen", "gru")
# Trainings per seed and variant, from different starts on one split; controls have one.
REPEATS = 2
# Orders N at which the transfer function is compared, up to |ω| = 20.
ORDERS = (16, 32, 64, 128, 256, 512)
FIRST_DOUBLING = 32
BAND, POINTS = 20.0, 801
DATA = {"digits": "digits as sequences", "cifar10": "sequential CIFAR-10"}


def experiment(scale: Scale, seed: int, progress: Progress) -> Measurement:
    """Train every start on real sequences, compare transfer functions, time both kernels."""
    from stiefel.papers.s4d_measures import kernel_times, mode_difference, transfer_errors
    from stiefel.papers.sequence_digits import settings, train

    common = {**STANDARD, **settings(scale)}
    repeats = 1 if scale is Scale.SMOKE else REPEATS
    configs, names = [], []
    for name, change in VARIANTS.items():
        for repeat in range(1 if name in CONTROLS else repeats):
            configs.append({**common, **change, "seed": seed, "repeat": repeat})
            names.append(name)
    results = progress.shared("s4d-sequences", configs, train, span=(0.0, 0.85))
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, result in zip(names, results, strict=True):
        runs.setdefault(name, []).append(result)
    accuracy = {name: fmean(r["accuracy"] for r in found) for name, found in runs.items()}

    orders = list(ORDERS[:3] if scale is Scale.SMOKE else ORDERS)
    theory = {"orders": orders, "band": BAND, "points": POINTS}
    (errors,) = progress.shared("s4d-transfer", [theory], transfer_errors, span=(0.85, 0.9))
    first = orders.index(FIRST_DOUBLING)
    falls = [
        p / q for p, q in zip(errors["half"][first:], errors["half"][first + 1 :], strict=False)
    ]
    times = kernel_times(scale, seed)

    gains = [accuracy[init] - accuracy["real"] for init in COMPLEX]
    zoh = fmean(accuracy[init] for init in DISCRETISED)
    bilinear = fmean(accuracy[f"{init} bilinear"] for init in DISCRETISED)
    metrics = {
        "least_gain": min(gains),
        "mean_gain": fmean(gains),
        "discretisation_difference": abs(zoh - bilinear),
        "legs_lin_difference": abs(accuracy["legs"] - accuracy["lin"]),
        "least_fall": min(falls),
        "largest_fall": max(falls),
        "error_without_half": min(errors["whole"]),
        "mode_difference": mode_difference(seed),
        "speedup": min(times["speedup forward"], times["speedup both"]),
        "speedup_forward": times["speedup forward"],
        "speedup_both": times["speedup both"],
        "speedup_error_ratio": times["error block"] / times["error plain"],
        **{f"accuracy_{name.replace(' ', '_')}": value for name, value in accuracy.items()},
        "frozen_minus_trained": accuracy["legs frozen"] - runs["legs"][0]["accuracy"],
        "legs_half_minus_lin": accuracy["legs half"] - accuracy["lin"],
        "legs_minus_random": accuracy["legs"] - accuracy["random"],
    }
    series = {"orders": [float(n) for n in orders], "error": errors["half"]}
    series["error without half"] = errors["whole"]
    series["lengths"] = times["lengths"]
    for name in ("plain", "block"):
        series[f"milliseconds {name}"] = times[f"both {name}"]
    progress(1.0, f"complex starts gain {metrics['mean_gain']:.2f}")
    config = {**common, "repeats": repeats, "sha256": results[0]["sha256"]}
    return Measurement(seed, metrics, series, config)


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Accuracy by start; error of the transfer function with its slope; time of the kernels."""
    picture, (left, middle, right) = panels(3)
    _draw_accuracy(left, measurements)
    _draw_transfer(middle, measurements)
    _draw_times(right, measurements)
    return picture


def _draw_accuracy(ax: Axes, measurements: Sequence[Measurement]) -> None:
    rows = (
        ("LegS", "legs", BLUE),
        ("Lin", "lin", BLUE),
        ("Inv", "inv", BLUE),
        ("LegS, bilinear", "legs_bilinear", GREEN),
        ("Lin, bilinear", "lin_bilinear", GREEN),
        ("LegS, B/2", "legs_half", GREY),
        ("LegS, frozen", "legs_frozen", GREY),
        ("random Im A", "random", GREY),
        ("Real", "real", ORANGE),
        ("GRU", "gru", VIOLET),
    )
    for y, (_, name, colour) in enumerate(rows):
        values = [m.metrics[f"accuracy_{name}"] for m in measurements]
        ax.plot([fmean(values)] * 2, [-y - 0.3, -y + 0.3], color=colour, linewidth=1.6)
        ax.scatter(values, [-y] * len(values), s=16, color=colour, alpha=0.7)
    ax.set_yticks([-y for y in range(len(rows))], [label for label, *_ in rows])
    ax.set_xlim(0, 1)
    config = measurements[0].config
    ax.set_xlabel(f"test accuracy, epochs: {config['epochs']}")
    title(ax, f"start of A, {DATA[str(config['data'])]}")


def _draw_transfer(ax: Axes, measurements: Sequence[Measurement]) -> None:
    orders = mean_series(measurements, "orders")
    errors = mean_series(measurements, "error")
    ax.plot(
        orders,
        mean_series(measurements, "error without half"),
        color=ORANGE, marker="s", markersize=3.5, linewidth=1.2, label="B",
    )  # fmt: skip
    ax.plot(orders, errors, color=BLUE, marker="o", markersize=3.5, linewidth=1.4, label="B/2")
    slope = [errors[-1] * orders[-1] / n for n in orders]
    ax.plot(orders, slope, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), label="1/N")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(orders, [f"{n:.0f}" for n in orders])
    ax.minorticks_off()
    ax.set_ylim(1e-3, 8)  # room for the legend
    ax.set_xlabel("state size N")
    title(ax, "error of G(iω), |ω| ≤ 20")
    legend(ax)


def _draw_times(ax: Axes, measurements: Sequence[Measurement]) -> None:
    lengths = mean_series(measurements, "lengths")
    for name, label, colour, marker in (
        ("plain", "two lines", GREY, "s"),
        ("block", "in blocks", ORANGE, "o"),
    ):
        values = mean_series(measurements, f"milliseconds {name}")
        ax.plot(lengths, values, color=colour, marker=marker, markersize=3.5, label=label)
        for length, value in zip(lengths, values, strict=True):
            ax.annotate(
                f"{value:.3g}",
                (length, value),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
            )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.5, high * 8)  # room for the legend
    ax.set_xlim(lengths[0] / 1.7, lengths[-1] * 1.7)
    ax.set_xticks(lengths, [f"{n:.0f}" for n in lengths])
    ax.minorticks_off()
    ax.set_xlabel("length L")
    title(ax, "kernel and gradient, CPU ms")
    legend(ax, "upper left")


paper = Paper(
    slug="s4d",
    title="On the Parameterization and Initialization of Diagonal State Space Models",
    authors="Albert Gu and 3 others",
    published="2022-06",
    arxiv="2206.11893",
    code="https://github.com/state-spaces/s4",
    topic="layers",
    data="images",
    summary=(
        "A sequence layer of independent linear systems with a diagonal complex state matrix, "
        "trained as one long convolution and run as a recurrence. How the diagonal starts decides "
        "how well it learns; discretisation and parameterisation hardly matter."
    ),
    claim=Claim(
        "On digits read pixel by pixel, each of LegS, Lin and Inv gains at least 0.15 accuracy "
        "over a real diagonal (the smallest gain)",
        metric="least_gain",
        at_least=0.15,
    ),
    others=(
        Claim(
            "Together they gain at least 0.25 (mean over the three starts)",
            metric="mean_gain",
            at_least=0.25,
        ),
        Claim(
            "ZOH and bilinear end within 0.08 of each other (mean over LegS and Lin)",
            metric="discretisation_difference",
            at_most=0.08,
        ),
        Claim(
            "LegS and Lin end within 0.10 of each other",
            metric="legs_lin_difference",
            at_most=0.10,
        ),
        Claim(
            "With B/2 the transfer function approaches LegS like 1/N: the error falls at least "
            "1.8-fold with each doubling from N = 32",
            metric="least_fall",
            at_least=1.8,
        ),
        Claim(
            "and at most 3-fold",
            metric="largest_fall",
            at_most=3.0,
        ),
        Claim(
            "Without the factor 1/2 it does not approach at all (smallest error over N)",
            metric="error_without_half",
            at_least=0.95,
        ),
        Claim(
            "Convolution, single steps and three parts with state agree (largest difference, "
            "float32)",
            metric="mode_difference",
            at_most=1e-5,
        ),
        Claim(
            "The kernel in blocks is at least 10 × faster than the two-line Vandermonde at length "
            "4,096, forward and with backward (the smaller ratio)",
            metric="speedup",
            at_least=10.0,
        ),
        Claim(
            "at no larger error in float32 (ratio of errors)",
            metric="speedup_error_ratio",
            at_most=1.0,
        ),
    ),
    experiment=experiment,
    figure=figure,
    snippet="""\
import torch
from stiefel.nn import S4DModel, ssm_param_groups
model = S4DModel(d_input=1, d_output=10, d_model=32, n_layers=2, dt_min=4e-3, dt_max=0.4)
optimizer = torch.optim.AdamW(ssm_param_groups(model, lr=1e-2, weight_decay=0.01))
model(torch.randn(8, 64, 1)).square().mean().backward(); optimizer.step()
""",
    notes=(
        (
            "1,797 digits of 8 × 8 pixels, 64 steps each; two blocks of width 32, state 32, six "
            "epochs of AdamW at 1e-2 (dt, A, B at 1e-3), nothing tuned here. Each seed has its own "
            "stratified 500 test images and two trainings of every start. The writers of the test "
            "images are also in the training part."
        ),
        (
            "Most of LegS's lead over Lin is the size of its B: the authors' code starts at "
            "B = V* B_LegS, twice what theory asks for. With B/2 (one training a seed, row LegS, "
            "B/2) it ends where Lin does. Training A, B and dt adds next to nothing (row frozen): "
            "the start carries it."
        ),
        (
            "Random imaginary parts (row random Im A: exp of a normal number, for every channel) "
            "learn more slowly than LegS and scatter more, as the paper finds on sequences of "
            "thousands of steps, but on 64 steps they still beat a real diagonal by far."
        ),
        (
            "The GRU has the same width, depth, rate and epochs. It is far from trained after six; "
            "the row says how fast each learns, not how well a GRU can do."
        ),
        (
            "LegS here is the normal part of the HiPPO matrix. That its transfer function "
            "approaches HiPPO's holds at fixed frequencies only: between its own eigenfrequencies "
            "and up to N²/π the error stays at 2/π for every N, which the PTD paper repairs."
        ),
        (
            "Times: 64 channels, N = 64, float32, one thread. Both kernels compute the same sum; "
            "the blocks hold tables of about √L rows instead of L and take their exponents in "
            "float64. The plain one does so in float32, as published."
        ),
    ),
    seconds=60.0,
)

"""Deep linear networks: learning time against depth, the closed form, and dynamical isometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stiefel.papers.figures import BLUE, GREEN, GREY, ORANGE, VIOLET, legend, panels, title
from stiefel.papers.paper import Claim, Measurement, Paper, Scale
from stiefel.papers.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INITS = ("orthogonal", "gaussian", "xavier", "decoupled")
STYLES = {
    "orthogonal": ("orthogonal", BLUE, "o"),
    "gaussian": ("Gaussian", ORANGE, "s"),
    "xavier": ("Xavier", GREY, "^"),
    "decoupled": ("decoupled, u₀ = 0.01", GREEN, "D"),
}


def experiment(scale: Scale, seed: int, progress: Progress) -> Measurement:
    """Train at every depth from every start; hold the formula against it; measure Jacobians."""
    from stiefel.papers import deep_linear_runs as runs

    data, sizes = runs.task(scale), runs.plan(scale)
    modes = data.modes
    progress(0.05, "digits whitened")
    times = {}
    for k, init in enumerate(INITS):
        times[init] = runs.table_of_times(modes, sizes, seed, [init])[init]
        progress(0.05 + 0.15 * (k + 1), f"{init} at {len(sizes.depths)} depths")
    predicted = [runs.predicted_time(modes, sizes, depth) for depth in sizes.depths]
    closed = runs.closed_form(modes, seed)
    halves = runs.half_times(modes, sizes, seed)
    progress(0.8, "half-learning times")
    jacobians, spectra = runs.isometry(sizes, seed)

    steps = {init: dict(zip(sizes.depths, times[init], strict=True)) for init in INITS}
    orthogonal, gaussian = steps["orthogonal"], steps["gaussian"]
    deep = [depth for depth in sizes.depths if 8 <= depth <= 24]
    rates = [orthogonal[depth]["rate"] for depth in deep]
    metrics = {
        "depth_ratio": orthogonal[24]["steps"] / orthogonal[4]["steps"],
        "steps_at_24": orthogonal[24]["steps"],
        "gaussian_ratio": gaussian[8]["steps"] / orthogonal[8]["steps"],
        "gaussian_deep_steps": min(gaussian[16]["least"], gaussian[24]["least"]),
        # A rate of 0: no network was there at any.
        "rate_spread": max(rates) / min(rates) if min(rates) > 0 else math.inf,
        "closed_form_error": closed["error"],
        "error_ratio": closed["error_ratio"],
        "error_ratio_off_ten": abs(closed["error_ratio"] - 10),
        **halves,
        **jacobians,
        **runs.consistency(data, sizes, seed),
        **{
            f"steps_{init}_{depth}": found["steps"]
            for init in INITS
            for depth, found in steps[init].items()
        },
        **{f"rate_orthogonal_{depth}": orthogonal[depth]["rate"] for depth in deep},
    }
    series = {
        "depths": list(sizes.depths),
        "predicted": predicted,
        **{f"steps {init}": [found["steps"] for found in times[init]] for init in INITS},
        **{f"reached {init}": [found["reached"] for found in times[init]] for init in INITS},
        **closed["series"],
        **spectra,
    }
    progress(1.0, f"depth 24 takes {metrics['depth_ratio']:.2f} × the time of depth 4")
    config = {
        "sha256": data.sha256,
        "strengths": modes.S.tolist(),
        "dropped_energy": modes.dropped_energy,
        "hidden": sizes.hidden,
        "cap": sizes.cap,
        "rates_times_depth": list(runs.RATES),
        "tolerance": runs.TOLERANCE,
        "starts": sizes.starts,
        "networks": sizes.networks,
        "tanh_width": sizes.width,
        "tanh_layers": sizes.layers,
    }
    return Measurement(seed, metrics, series, config)


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Learning time against depth; the formula over gradient descent; Jacobian spectra."""
    picture, (left, middle, right) = panels(3)
    _draw_times(left, measurements)
    _draw_courses(middle, measurements[0])
    _draw_spectra(right, measurements[0])
    return picture


def _draw_times(ax: Axes, measurements: Sequence[Measurement]) -> None:
    depths = measurements[0].series["depths"]
    cap = float(measurements[0].config["cap"])  # pyrefly: ignore
    for init, (label, colour, marker) in STYLES.items():
        for m in measurements:
            pairs = zip(depths, m.series[f"steps {init}"], m.series[f"reached {init}"], strict=True)
            shown = [(depth, steps) for depth, steps, reached in pairs if reached == 1]
            ax.plot(
                [depth for depth, _ in shown],
                [steps for _, steps in shown],
                color=colour,
                marker=marker,
                markersize=3,
                linewidth=0.9,
                label=label if m is measurements[0] else None,
            )
    predicted = [
        (depth, steps)
        for depth, steps in zip(depths, measurements[0].series["predicted"], strict=True)
        if steps < cap
    ]
    ax.plot(*zip(*predicted, strict=True), ":", color=VIOLET, linewidth=1.6, label="formula")
    ax.axhline(cap, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.annotate(
        "given up", (max(depths), cap), (0, 2), textcoords="offset points", fontsize=6.5, ha="right"
    )
    ax.set_xscale("log", base=2)
    ax.set_xticks(depths, [f"{depth:g}" for depth in depths])
    ax.set_yscale("log")
    ax.set_ylim(3, cap * 12)  # room for the legend
    ax.minorticks_off()
    ax.set_xlabel("weight layers")
    title(ax, "iterations to learn")
    legend(ax, "upper left")


def _draw_courses(ax: Axes, m: Measurement) -> None:
    strengths = m.config["strengths"]
    time = m.series["time"]
    every = max(1, len(time) // 24)
    numbers = sorted(int(n.split()[1]) for n in m.series if n.startswith("formula "))
    for k, colour in zip(numbers, (BLUE, VIOLET, ORANGE), strict=True):
        name = f"s = {strengths[k]:.3f}"  # pyrefly: ignore
        ax.plot(time, m.series[f"formula {k}"], color=colour, linewidth=1.2, label=name)
        ax.plot(
            time[::every],
            m.series[f"descent {k}"][::every],
            color=colour,
            linestyle="none",
            marker="o",
            markersize=2.6,
            markerfacecolor="none",
        )
    ax.set_ylim(0, 0.47)
    ax.set_xlabel("time (learning rate × iterations)")
    title(ax, "mode strength: formula, descent ○")
    legend(ax, "upper left")


def _draw_spectra(ax: Axes, m: Measurement) -> None:
    curves = (
        ("orthogonal 1", "orthogonal, g = 1", BLUE),
        ("orthogonal 1.1", "orthogonal, g = 1.1", GREEN),
        ("gaussian", "Gaussian, g = 1", ORANGE),
    )
    for name, label, colour in curves:
        values = m.series[name]
        share = [(k + 1) / len(values) for k in range(len(values))]
        shown = [(x, value) for x, value in zip(share, values, strict=True) if value > 1e-9]
        ax.plot(*zip(*shown, strict=True), color=colour, linewidth=1.4, label=label)
    ax.set_yscale("log")
    ax.set_ylim(1e-9, 3e3)
    ax.minorticks_off()
    ax.set_xlabel("rank / width")
    title(ax, "Jacobian's singular values, tanh")
    legend(ax, "upper right")


paper = Paper(
    slug="deep-linear-dynamics",
    title=("Exact solutions to the nonlinear dynamics of learning in deep linear neural networks"),
    authors="Andrew M. Saxe, James L. McClelland and Surya Ganguli",
    published="2013-12",
    arxiv="1312.6120",
    code=None,
    topic="theory",
    data="images",
    summary=(
        "Gradient descent on a deep linear network is nonlinear, yet solvable: each singular mode "
        "of the task is learned along a sigmoid whose time is known for every depth. It follows "
        "that random orthogonal layers learn in a time that does not grow with depth, while scaled "
        "Gaussian layers stall."
    ),
    claim=Claim(
        "From random orthogonal weights 24 layers need at most 3 × the iterations of 4 layers "
        "(each at its best learning rate)",
        metric="depth_ratio",
        at_most=3.0,
    ),
    others=(
        Claim("24 orthogonal layers learn in at most 60 iterations", "steps_at_24", at_most=60.0),
        Claim(
            "At 8 layers Gaussian weights (1/√n) take at least 5 × as long as orthogonal ones",
            metric="gaussian_ratio",
            at_least=5.0,
        ),
        Claim(
            "At 16 and 24 layers Gaussian weights are not there after 400 iterations at any rate",
            metric="gaussian_deep_steps",
            at_least=400.0,
        ),
        Claim(
            "The best learning rate falls as 1/depth: rate × depth within a factor 2 for 8 to 24 "
            "orthogonal layers",
            metric="rate_spread",
            at_most=2.0,
        ),
        Claim(
            "The formula is within 0.005 of gradient descent, relative to each mode's strength "
            "(two layers, λ = 0.02, whole course)",
            metric="closed_form_error",
            at_most=0.005,
        ),
        Claim(
            "That error is first order in λ: ten times the rate gives 7 to 13 times the error "
            "(distance of the ratio from 10)",
            metric="error_ratio_off_ten",
            at_most=3.0,
        ),
        Claim(
            "From small random weights half-learning times are proportional to 1/s (correlation, "
            "mean of 100 networks)",
            metric="half_time_correlation",
            at_least=0.98,
        ),
        Claim(
            "They come in exact order of strength (pairs of neighbours out of order)",
            metric="half_time_inversions",
            at_most=0.0,
        ),
        Claim(
            "100 orthogonal tanh layers at gain 1 keep at least 60 % of the Jacobian's singular "
            "values within a factor 10 of the largest",
            metric="isometry_orthogonal_1",
            at_least=0.6,
        ),
        Claim("Gaussian layers keep at most 10 %", metric="isometry_gaussian", at_most=0.1),
    ),
    experiment=experiment,
    figure=figure,
    snippet="""\
import torch
from stiefel.init import orthogonal_init_
from stiefel.theory import mode_curve, mode_time
net = orthogonal_init_(torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(24)]))
curves = mode_curve(torch.arange(400), s=[0.30, 0.18], u0=1e-3, depth=5, lr=0.5)
""",
    notes=(
        (
            "Digits, centred, whitened to 40 principal components (99 % of the variance); centred "
            "one-hot targets have nine modes. Learned means 0.2 % of the zero map's excess loss, "
            "full-batch gradient descent, the best of eleven rates. A run that gives up counts "
            "with 400 iterations, so ratios against it are lower bounds. Each seed averages ten "
            "networks: times from Gaussian weights differ by a factor 2 from one to the next."
        ),
        (
            "The claim is about depth at equal width and about linear networks. Orthogonal weights "
            "start with all singular values at 1, above every strength of this task: they have to "
            "shrink, which costs the same at every depth."
        ),
        (
            "Decoupled starts need the data's singular vectors. Their learning time saturates too, "
            "but late when they start small: the delay is s/u₀ time constants. The dotted line is "
            "the formula at the best rate that is stable; no gradient step went into it."
        ),
        (
            "Half-learning times are means over networks: the second and third mode differ by "
            "0.6 % in strength, less than two random starts do, so a single network swaps them now "
            "and then (half_time_inversions_single)."
        ),
        (
            "The paper asks whether greedy pre-training can help: where the task's input modes are "
            "principal components. The residual of digits is 0.21, of random bases 0.88 "
            "(pretraining_residual)."
        ),
    ),
    seconds=35.0,
)

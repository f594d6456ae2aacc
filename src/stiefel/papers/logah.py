"""LoGAH: a hypernetwork starts a network that is wider and deeper than all it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stiefel.papers.figures import BLUE, GREEN, GREY, ORANGE, legend, mean_series, panels, title
from stiefel.papers.paper import Claim, Measurement, Paper, Scale
from stiefel.papers.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = {
    "default": ("torch's default", GREY, "s"),
    "gpt2": ("GPT-2's", GREEN, "^"),
    "tile": ("tiles", BLUE, "D"),
    "meanfield": ("low rank", ORANGE, "o"),
}


def experiment(scale: Scale, seed: int, progress: Progress) -> Measurement:
    """Train two hypernetworks on small GPTs; start larger ones with them and without."""
    from stiefel.papers.logah_runs import STARTS, TARGETS, TRAINED, configs, run

    asked = configs(scale, seed)
    results = progress.shared("logah", asked, run)
    runs = dict(zip(STARTS, results, strict=True))
    measured = {start: config["measured"] for start, config in zip(STARTS, asked, strict=True)}
    # The third and fourth points are steps 50 and 100, the last is step 200, except in a smoke run.
    steps = measured["default"]
    middle, late, end = steps[-3], steps[-2], steps[-1]

    def loss(start: str, step: int) -> float:
        return runs[start]["losses"][measured[start].index(step)]

    ours, default = runs["meanfield"], runs["default"]
    step_cost = default["seconds"] / end
    reached = [step for step in steps if loss("default", step) <= ours["first"][TRAINED]]
    metrics = {
        "first_gain": loss("default", 0) - loss("meanfield", 0),
        "first_gain_over_tiles": loss("tile", 0) - loss("meanfield", 0),
        "size_ratio": ours["hyper"]["parameters"] / runs["tile"]["hyper"]["parameters"],
        "middle_gain": loss("default", middle) - loss("meanfield", middle),
        "late_gain": loss("default", late) - loss("meanfield", late),
        "late_gain_over_tiles": loss("tile", late) - loss("meanfield", late),
        "end_gain": loss("default", end) - loss("meanfield", end),
        "width_loss": ours["first"]["256x8"] - ours["first"]["96x4"],
        "width_loss_of_tiles": runs["tile"]["first"]["256x8"] - runs["tile"]["first"]["96x4"],
        "hypernetwork_parameters": ours["hyper"]["parameters"],
        "hypernetwork_seconds": ours["hyper"]["seconds"],
        "steps_that_pay": ours["hyper"]["seconds"] / step_cost,
        "default_reaches_start_at": float(reached[0]) if reached else float(end),
    }
    series = {"targets": [float(i) for i in range(len(TARGETS))]}
    for start in STARTS:
        series[f"first {start}"] = [runs[start]["first"][name] for name in TARGETS]
        series[f"steps {start}"] = [float(s) for s in measured[start]]
        series[f"loss {start}"] = runs[start]["losses"]
    progress(1.0, f"first loss {loss('meanfield', 0):.2f} against {loss('default', 0):.2f}")
    config = {**asked[0], "targets": list(TARGETS), "sha256": ours["sha256"]}
    return Measurement(seed, metrics, series, config)


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Loss of the unseen network in training; first losses of three sizes."""
    picture, (left, right) = panels(2)
    _draw_training(left, measurements)
    _draw_first(right, measurements)
    return picture


def _draw_training(ax: Axes, measurements: Sequence[Measurement]) -> None:
    for start in ("default", "tile", "meanfield"):
        label, colour, marker = LOOKS[start]
        # Step 0 stands at the left end of a logarithmic axis.
        steps = [max(s, 4.0) for s in mean_series(measurements, f"steps {start}")]
        for m in measurements:
            ax.plot(steps, m.series[f"loss {start}"], color=colour, linewidth=0.6, alpha=0.4)
        losses = mean_series(measurements, f"loss {start}")
        ax.plot(steps, losses, color=colour, marker=marker, markersize=3.5, label=label)
    steps = mean_series(measurements, "steps default")
    ax.set_xscale("log")
    ax.set_xticks([max(s, 4.0) for s in steps], [f"{s:.0f}" for s in steps])
    ax.minorticks_off()
    ax.set_xlabel("step")
    title(ax, "loss of 128x5 (nats a byte)")
    legend(ax)


def _draw_first(ax: Axes, measurements: Sequence[Measurement]) -> None:
    places = mean_series(measurements, "targets")
    for start, (label, colour, marker) in LOOKS.items():
        for m in measurements:
            ax.scatter(places, m.series[f"first {start}"], s=8, color=colour, alpha=0.4)
        first = mean_series(measurements, f"first {start}")
        ax.plot(places, first, color=colour, marker=marker, markersize=3.5, label=label)
    targets = measurements[0].config["targets"]
    assert isinstance(targets, Sequence)  # noqa: S101 - a list in every result
    ax.set_xticks(places, [str(name) for name in targets])
    ax.set_xlim(-0.3, len(places) - 0.7)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
    ax.set_xlabel("width x blocks")
    title(ax, "loss before the first step")
    legend(ax)


paper = Paper(
    slug="logah",
    title="LoGAH: Predicting 774-Million-Parameter Transformers using Graph HyperNetworks with "
    "1/100 Parameters",
    authors="Xinyu Zhou and 3 others",
    published="2024-05",
    arxiv="2405.16287",
    code="https://github.com/Blackzxy/LoGAH",
    topic="initialisation",
    data="text",
    summary=(
        "A network that reads the graph of another network and gives all its weights, each matrix "
        "as a product of two thin factors. Trained on many small networks, it starts larger ones. "
        "Here the rows of the factors are samples of functions of their relative place, so that "
        "widths never seen can be asked for."
    ),
    claim=Claim(
        "Before its first step, a GPT that is wider and deeper than all that the hypernetwork saw "
        "is at least 1.5 nats better than with torch's own start",
        metric="first_gain",
        at_least=1.5,
    ),
    others=(
        Claim(
            "and at least 1.0 nats better than from a hypernetwork that copies tiles, as GHN-3",
            metric="first_gain_over_tiles",
            at_least=1.0,
        ),
        Claim(
            "with no more parameters in the hypernetwork (ratio)",
            metric="size_ratio",
            at_most=1.0,
        ),
        Claim(
            "After 50 steps of AdamW it is still at least 0.05 nats better than from torch's start",
            metric="middle_gain",
            at_least=0.05,
        ),
        Claim(
            "after 100 steps at least 0.02",
            metric="late_gain",
            at_least=0.02,
        ),
        Claim(
            "and at least 0.08 better than from tiles",
            metric="late_gain_over_tiles",
            at_least=0.08,
        ),
        Claim(
            "A network 2.7 times as wide as any seen (256x8) starts within 0.15 nats of one at the "
            "edge of the training sizes (96x4)",
            metric="width_loss",
            at_most=0.15,
        ),
    ),
    experiment=experiment,
    figure=figure,
    snippet="""\
import torch
from stiefel.init import LoGAH
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
hypernetwork = LoGAH(hid=32, layers=2, rank=16)   # trained by stiefel.init.LoGAHTrainer
hypernetwork.init_(model, example_inputs=torch.zeros(1, 8))
""",
    notes=(
        (
            "Trained on random GPTs of width 32 to 96 with two to four blocks, on a million bytes "
            "of Python's standard library (the 95 commonest bytes and one index for the rest, 64 "
            "bytes of context): 700 steps of AdamW at 3e-3, one architecture a step. The unseen "
            "network has width 128 and five blocks, a million parameters; all starts are trained "
            "on with AdamW at 3e-3 on the same batches. Nothing is tuned here."
        ),
        (
            "The lead is a head start. It shrinks with every step and is gone by step 200, where "
            "torch's own start is level or ahead (last points of the left panel). The paper "
            "trains on with a rate of 3e-6, which favours any warm start; its better final "
            "perplexity is not shown here."
        ),
        (
            "The predicted network is about a bigram model, 2.43 nats on this kind of text. A "
            "random start gets there in 100 to 200 steps, and training the hypernetwork costs as "
            "much as some 400 steps of the unseen network: it pays from the third network on."
        ),
        (
            "The low-rank decoder is not the paper's but ours (mean-field): rows of the factors at "
            "relative places, scale by 1 / fan-in. The paper's reads row i of a table whatever the "
            "width, so rows that no training network had are noise. It is "
            "LoGAH(decoder='reshape')."
        ),
        (
            "Tiles lose mainly because they also copy the vocabulary: tokens i and i + 24 share a "
            "row. The published code of LoGAH copies too, beyond 2,048 rows; here words have a row "
            "each or keep their own start."
        ),
    ),
    seconds=105.0,
)

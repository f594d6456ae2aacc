"""What the card on rich features shows. Matplotlib is imported inside the functions."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from stiefel.papers.coloured_digits import COLOURED, INVERSE
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
from stiefel.papers.paper import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "vrex": "V-REx",
    "irmv1": "IRMv1",
    "fishr": "Fishr",
    "spectral_decoupling": "SD",
    "iga": "IGA",
    "clove": "CLOvE",
}


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Every penalty from three starts; V-REx after warm-ups; the control on the inverse task."""
    picture, (left, middle, right) = panels(3)
    _draw_starts(left, measurements)
    _draw_warmups(middle, measurements)
    _draw_inverse(right, measurements)
    return picture


def _mean(measurements: Sequence[Measurement], name: str) -> float:
    return fmean(m.metrics[name] for m in measurements)


def _draw_starts(ax: Axes, measurements: Sequence[Measurement]) -> None:
    """Worst accuracies, a mark for each seed, between plain training and the oracle."""
    starts = (
        ("random_", "random", GREY, "s"),
        ("erm_init_", "after ERM", ORANGE, "^"),
        ("rfc_", "rich, frozen", BLUE, "o"),
    )
    for prefix, label, colour, marker in starts:
        for y, name in enumerate(LABELS):
            values = [m.metrics[f"{prefix}{name}"] for m in measurements]
            ax.scatter(
                values,
                [-y] * len(values),
                s=16,
                color=colour,
                marker=marker,
                alpha=0.8,
                linewidths=0,
                label=label if y == 0 else None,
            )
    lines = (
        (_mean(measurements, "erm"), "ERM", GREEN, "--"),
        (0.5, "chance", GREY, ":"),
        (_mean(measurements, "oracle"), "oracle", GREEN, "--"),
    )
    for value, text, colour, style in lines:
        ax.plot([value] * 2, [-len(LABELS) + 0.5, 0.45], style, color=colour, linewidth=0.9)
        ax.annotate(text, (value, 0.55), ha="center", fontsize=6.5, color=colour)
    ax.set_yticks([-y for y in range(len(LABELS))], list(LABELS.values()))
    ax.set_ylim(-len(LABELS) + 0.5, 2.9)  # room for the legend
    ax.set_xlim(0.0, 0.8)
    ax.set_xlabel("accuracy, worst environment")
    title(ax, "six penalties, three starts")
    legend(ax, "upper left")


def _draw_warmups(ax: Axes, measurements: Sequence[Measurement]) -> None:
    steps = mean_series(measurements, "warm-up steps")
    for m in measurements:
        values = m.series["V-REx after warm-up"]
        ax.plot(steps, values, color=ORANGE, linewidth=0.6, alpha=0.4)
    values = mean_series(measurements, "V-REx after warm-up")
    ax.plot(
        steps, values, color=ORANGE, linewidth=1.5, marker="^", markersize=3.5, label="after ERM"
    )
    rich = mean_series(measurements, "V-REx on rich features")[0]
    ax.axhline(rich, color=BLUE, linewidth=1.5, label="rich, frozen")
    ceiling = 1 - COLOURED.noise
    ax.axhline(ceiling, color=GREEN, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.annotate(
        "all that shape tells",
        (steps[-1], ceiling),
        (0, 2),
        ha="right",
        fontsize=6.5,
        textcoords="offset points",
        color=GREEN,
    )
    ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_ylim(0.0, 1.0)
    ax.set_xlabel("steps of ERM before V-REx")
    title(ax, "V-REx by warm-up")
    legend(ax)


def _draw_inverse(ax: Axes, measurements: Sequence[Measurement]) -> None:
    """The second feature alone and penalties on both, on either task, under 1 − label noise."""
    tasks = (("colour easier", "", COLOURED), ("shape easier", "inverse_", INVERSE))
    for x, (_, prefix, task) in enumerate(tasks):
        bars = (
            (-0.27, "second_feature", VIOLET, "second feature"),
            (0.0, "rfc_vrex", BLUE, "rich, V-REx"),
            (0.27, "erm", ORANGE, "ERM"),
        )
        for offset, metric, colour, label in bars:
            values = [m.metrics[f"{prefix}{metric}"] for m in measurements]
            ax.bar(
                x + offset,
                fmean(values),
                0.22,
                color=colour,
                alpha=0.75,
                label=label if x == 0 else None,
            )
            ax.scatter([x + offset] * len(values), values, s=5, color="black", zorder=3)
        ceiling = 1 - task.noise
        ax.plot(
            [x - 0.42, x + 0.42], [ceiling] * 2, color=GREEN, linewidth=0.9, linestyle=(0, (4, 3))
        )
    ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_xticks([0, 1], [name for name, *_ in tasks])
    ax.set_ylim(0.0, 1.3)  # room for the legend
    ax.set_yticks([0.0, 0.5, 1.0])
    title(ax, "either feature may mislead")
    legend(ax, "upper left")

"""The pictures of the card of neural operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

# Curves of the figure: series, label, colour, marker.
CURVES = (
    ("plain", "CNN", ORANGE, "s"),
    ("converted", "CNN, converted", BLUE, "o"),
    ("interpolated", "CNN, interpolated", GREY, "^"),
    ("fno", "FNO", GREEN, "D"),
)


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Error against the grid; a field with both answers; U-Nets."""
    picture, axes = panels(3)
    _draw_errors(axes[0], measurements)
    _draw_field(axes[1], measurements[0])
    _draw_others(axes[2], measurements)
    return picture


def _grids(ax: Axes, sizes: Sequence[float]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sizes, [f"{n:.0f}" for n in sizes])
    ax.minorticks_off()
    ax.set_xlabel("points per axis")


def _draw_errors(ax: Axes, measurements: Sequence[Measurement]) -> None:
    sizes = mean_series(measurements, "sizes")
    for name, label, colour, marker in CURVES:
        for m in measurements:
            ax.plot(sizes, m.series[name], color=colour, linewidth=0.6, alpha=0.35)
        ax.plot(
            sizes, mean_series(measurements, name), color=colour, marker=marker, markersize=3.5,
            linewidth=1.4, label=label,
        )  # fmt: skip
    base = float(str(measurements[0].config["base"]))
    ax.axvline(base, color=GREY, linewidth=0.7, linestyle=(0, (2, 3)))
    _grids(ax, sizes)
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.3, high * 12)  # room for the legend
    title(ax, f"relative error, trained at {base:.0f}")
    legend(ax)


def _draw_field(ax: Axes, measurement: Measurement) -> None:
    truth = measurement.series["field truth"]
    x = [i / len(truth) for i in range(len(truth))]
    for name, label, colour, style in (
        ("input", "input", GREY, (0, (1, 2))),
        ("truth", "solution", "#808080", "-"),
        ("plain", "CNN", ORANGE, "-"),
        ("converted", "CNN, converted", BLUE, (0, (4, 2))),
    ):
        values = measurement.series[f"field {name}"]
        width = 3.0 if name == "truth" else 1.2
        alpha = 0.45 if name == "truth" else 1.0
        ax.plot(x, values, color=colour, linestyle=style, linewidth=width, alpha=alpha, label=label)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.6 * (high - low))  # room for the legend
    ax.set_xlabel("x")
    title(ax, f"one test function on {len(truth)}")
    legend(ax)


def _draw_others(ax: Axes, measurements: Sequence[Measurement]) -> None:
    sizes = mean_series(measurements, "sizes")
    rows = [
        ("unet plain", "U-Net", ORANGE, "s"),
        ("unet converted", "converted", BLUE, "o"),
        ("unet official", "authors' kernels", VIOLET, "^"),
        ("unet mixed trained", "trained on 3 grids", GREEN, "D"),
    ]
    if rows[0][0] not in measurements[0].series:  # not trained at the paper's scale
        rows = [("official", "CNN, authors' kernels", VIOLET, "^")]
    for name, label, colour, marker in rows:
        ax.plot(
            sizes, mean_series(measurements, name), color=colour, marker=marker, markersize=3.5,
            linewidth=1.4, label=label,
        )  # fmt: skip
    _grids(ax, sizes)
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.3, high * 12)
    title(ax, "relative error of U-Nets" if len(rows) > 1 else "relative error")
    legend(ax)


def field_figure(measurements: Sequence[Measurement]) -> Figure:
    """One test function of each of the first three seeds: solution, answers, and their errors."""
    from matplotlib.figure import Figure

    shown = measurements[:3]
    picture = Figure(figsize=(7.2, 3.8), layout="constrained")
    rows = picture.subplots(2, len(shown), squeeze=False, sharex=True, sharey="row")
    for column, m in enumerate(shown):
        truth = m.series["field truth"]
        x = [i / len(truth) for i in range(len(truth))]
        top, bottom = rows[0][column], rows[1][column]
        top.plot(x, m.series["field input"], color=GREY, linestyle=(0, (1, 2)), linewidth=1.0,
                 label="input")  # fmt: skip
        top.plot(x, truth, color=GREY, linewidth=3.0, alpha=0.45, label="solution")
        for name, label, colour in (
            ("plain", "CNN", ORANGE), ("converted", "CNN, converted", BLUE),
        ):  # fmt: skip
            values = m.series[f"field {name}"]
            top.plot(x, values, color=colour, linewidth=1.2, label=label)
            error = [a - b for a, b in zip(values, truth, strict=True)]
            bottom.plot(x, error, color=colour, linewidth=1.2)
        title(top, f"seed {m.seed}, on {len(truth)} points")
        bottom.set_xlabel("x", fontsize=8)
        for ax in (top, bottom):
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=7)
    low, high = rows[0][0].get_ylim()
    rows[0][0].set_ylim(low, high + 0.5 * (high - low))  # room for the legend
    legend(rows[0][0])
    title(rows[1][0], "error")
    return picture

"""The picture of the orthogonal convolutions: certificates, errors by size, existence."""

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
from stiefel.papers.paper import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DATA = {"digits": "digits", "cifar10": "CIFAR-10"}
FLOOR = 1e-16
MOST_LABELS = 30


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Certified accuracy by radius; errors by size with theory; L_orth reached and its minimum."""
    picture, (left, middle, right) = panels(3)
    _draw_certified(left, measurements)
    _draw_sizes(middle, measurements)
    _draw_sweep(right, measurements)
    return picture


def _draw_certified(ax: Axes, measurements: Sequence[Measurement]) -> None:
    radii = mean_series(measurements, "radii")
    for name, label, colour in (
        ("none", "no penalty", GREY),
        ("kernel", "flat kernel, 0.1", VIOLET),
        ("0.1", "L_orth, 0.1", BLUE),
        ("1", "L_orth, 1", ORANGE),
        ("10", "L_orth, 10", GREEN),
    ):
        for m in measurements:
            ax.plot(radii, m.series[f"certified {name}"], color=colour, linewidth=0.6, alpha=0.35)
        values = mean_series(measurements, f"certified {name}")
        ax.plot(radii, values, color=colour, linewidth=1.5, label=label)
    radii = mean_series(measurements, "attack radii")
    for name, colour in (("none", GREY), ("0.1", BLUE)):
        values = mean_series(measurements, f"attacked {name}")
        ax.plot(radii, values, "x", color=colour, markersize=4.5)
    ax.plot([], [], "x", color=GREY, markersize=4.5, label="under attack")
    ax.set_xlim(0, 0.65)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("radius of the ball around an image")
    title(ax, f"certified part, {DATA[str(measurements[0].config['data'])]}")
    # The one corner that neither curves nor crosses reach.
    ax.legend(
        fontsize=6.5, frameon=False, loc="lower right", handlelength=1.1, labelspacing=0.3,
        borderpad=0.1,
    )  # fmt: skip


def _draw_sizes(ax: Axes, measurements: Sequence[Measurement]) -> None:
    sizes = mean_series(measurements, "sizes")
    for index, marker in ((1, "o"), (2, "s"), (3, "^")):
        style: dict[str, Any] = {"marker": marker, "markersize": 3.5, "linestyle": ""}
        ax.plot(sizes, mean_series(measurements, f"frobenius {index}"), color=ORANGE, **style)
        style |= {"linestyle": "-", "linewidth": 1.2}
        ax.plot(sizes, mean_series(measurements, f"spectral {index}"), color=BLUE, **style)
        root = fmean(m.series[f"lorth and bound {index}"][0] ** 0.5 for m in measurements)
        ax.plot(sizes, [n * root for n in sizes], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        bound = mean_series(measurements, f"lorth and bound {index}")[1]
        ax.axhline(bound, color=BLUE, linewidth=0.8, linestyle=(0, (1, 2)))
    rows: tuple[tuple[str, dict[str, Any]], ...] = (
        ("Frobenius norm", {"color": ORANGE, "marker": "o", "linestyle": ""}),
        ("N √L_orth", {"color": GREY, "linestyle": (0, (4, 3))}),
        ("√(α L_orth)", {"color": BLUE, "linestyle": (0, (1, 2))}),
        ("spectral norm", {"color": BLUE, "marker": "o"}),
    )
    for label, style in rows:
        ax.plot([], [], markersize=3.5, linewidth=1.0, label=label, **style)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_ylim(0.15, 1500)  # room for the legend
    ax.set_xticks(sizes, [f"{n:.0f}" for n in sizes])
    ax.minorticks_off()
    ax.set_xlabel("output size N")
    title(ax, "errors of three layers, λ = 0.1")
    legend(ax, "upper left")


def _draw_sweep(ax: Axes, measurements: Sequence[Measurement]) -> None:
    least = mean_series(measurements, "minimum")
    numbers = [mean_series(measurements, f"sweep {name}") for name in "MCkS"]
    labels = [" ".join(f"{n:.0f}" for n in row) for row in zip(*numbers, strict=True)]
    rows = [-float(y) for y in range(len(least))]
    shown = [max(value, FLOOR) for value in least]
    ax.scatter(shown, rows, s=22, marker="|", color=GREY, label="minimum")
    for m in measurements:
        for kind, colour in (("exists", BLUE), ("square", VIOLET), ("none", ORANGE)):
            found = [
                (max(value, FLOOR), y)
                for value, y, here in zip(m.series["reached"], rows, _kinds(m), strict=True)
                if here == kind
            ]
            if found:
                x, y = zip(*found, strict=True)
                ax.scatter(x, y, s=9, color=colour, alpha=0.7, linewidths=0)
    ax.axvline(1e-5, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set_xscale("log")
    ax.set_xlim(FLOOR / 3, 60)
    ax.set_xticks([FLOOR, 1e-10, 1e-5, 1], ["0", "1e-10", "1e-5", "1"])
    ax.minorticks_off()
    if len(rows) > MOST_LABELS:  # the authors' 49,152
        ax.set_yticks([])
    else:
        ax.set_yticks(rows, labels, fontsize=5.5)
    ax.set_xlabel("least L_orth found")
    title(ax, "M C k S, three starts")


def _kinds(m: Measurement) -> list[str]:
    """Of every row of the sweep: ``"none"`` or one ``"exists"``, ``"square"`` where M = C·S²."""
    names = ("sweep M", "sweep C", "sweep S", "minimum")
    kinds = []
    for out, inner, stride, least in zip(*(m.series[n] for n in names), strict=True):
        square = "square" if out == inner * stride**2 else "exists"
        kinds.append("none" if least > 0 else square)
    return kinds

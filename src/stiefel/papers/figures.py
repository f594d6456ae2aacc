"""What the papers' figures have in common. Matplotlib is imported inside the functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from stiefel.papers.paper import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Each with a contrast of 3 : 1 or more against white and against near-black; blue, orange and grey
# stay apart with every common colour vision, and green comes with a marker of its own.
BLUE, ORANGE, GREEN, VIOLET, GREY = "#2f7fd6", "#d9652b", "#2a9d6f", "#a868d6", "#808080"
COLOURS = {
    "adamw": GREY,
    "muon": BLUE,
    "normuon": ORANGE,
    "rmnp": ORANGE,
    "muon-exact-rms": VIOLET,
    "short": GREEN,
    "root": ORANGE,
    "root-clip": GREEN,
    "root-coefficients": VIOLET,
    "auon": ORANGE,
    "hybrid-auon": GREEN,
    "control": VIOLET,
    "square": BLUE,
    "tall": ORANGE,
    "wide": GREEN,
}
MARKERS = {"square": "s", "tall": "^", "wide": "o", "short": "D"}
LABELS = {
    "adamw": "AdamW",
    "muon": "Muon",
    "normuon": "NorMuon",
    "rmnp": "RMNP",
    "root": "ROOT",
    "auon": "AuON",
    "hybrid-auon": "Hybrid-AuON",
    "muon-exact-rms": "Muon, exact RMS",
}


def panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    """A transparent figure of ``count`` axes in a row, 7.2 × 2.7 inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for ax in axes:
        ax.patch.set_alpha(0.0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(False)
        ax.tick_params(labelsize=7)
        ax.xaxis.label.set_size(8)
        ax.yaxis.label.set_size(8)
    return figure, axes


def title(ax: Axes, text: str) -> None:
    """A small title, flush with the left end of the axes."""
    ax.set_title(text, fontsize=8.5, loc="left")


def legend(ax: Axes, place: Literal["upper left", "upper right"] = "upper right") -> None:
    """A legend that still fits when the figure stands on a card."""
    ax.legend(
        fontsize=6.5, frameon=False, loc=place, handlelength=1.1, labelspacing=0.3, borderpad=0.1
    )


def mean_series(measurements: Sequence[Measurement], name: str) -> list[float]:
    """Element-wise mean over seeds of one series."""
    return [fmean(values) for values in zip(*(m.series[name] for m in measurements), strict=True)]


def draw_losses(
    ax: Axes, measurements: Sequence[Measurement], curves: Mapping[str, tuple[str, str, str]]
) -> None:
    """Validation loss against steps: each seed thin, the mean thick.

    ``curves``: name of a run to its label, colour and line style; the series are ``"steps NAME"``
    and ``"loss NAME"``.
    """
    lowest, at_fifth = [], []
    for name, (label, colour, style) in curves.items():
        for m in measurements:
            steps, losses = m.series[f"steps {name}"], m.series[f"loss {name}"]
            ax.plot(steps, losses, style, color=colour, linewidth=0.6, alpha=0.35)
            lowest.append(min(losses))
            at_fifth.append(losses[len(losses) // 5])
        steps = mean_series(measurements, f"steps {name}")
        losses = mean_series(measurements, f"loss {name}")
        ax.plot(
            steps,
            losses,
            style,
            color=colour,
            linewidth=1.6,
            label=label,
            marker=MARKERS.get(name, "o"),
            markersize=3.5,
            markevery=[len(steps) - 1],  # the loss that is judged
        )
    # The first steps fall from ln 256 = 5.5 and would flatten everything after them.
    margin = 0.05 * (max(at_fifth) - min(lowest))
    ax.set_ylim(min(lowest) - margin, max(at_fifth) + margin)
    ax.set_xlabel("step")
    title(ax, "validation loss (nats)")
    legend(ax)

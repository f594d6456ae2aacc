"""Pictures of a discretisation report. Matplotlib is imported inside the functions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stiefel.nn.operators.discretization import DiscretizationReport

BLUE, ORANGE = "#2f7fd6", "#d9652b"
MOST_LAYERS = 24
LEAST = 1e-8
"""Smaller changes are drawn here: the axis is logarithmic."""


def figure(report: DiscretizationReport) -> Any:
    """Two panels: change of the output against points per axis; own errors of the layers."""
    picture = _figure()(figsize=(8, 3.2), layout="constrained")
    left, right = picture.subplots(1, 2)
    plot(report, left)
    leaves = [x for x in report.layers if x.leaf or x.name == report.layer]
    if len(leaves) > MOST_LAYERS:
        kept = sorted(leaves, key=lambda x: -x.worst)[:MOST_LAYERS]
        leaves = [x for x in leaves if x in kept]
    places = list(range(len(leaves)))
    colours = [ORANGE if x.name == report.layer else BLUE for x in leaves]
    right.barh(places, [max(x.worst, LEAST) for x in leaves], left=LEAST, color=colours)
    right.set_yticks(places, [x.name or "(whole)" for x in leaves], fontsize=7)
    right.invert_yaxis()
    right.set_xscale("log")
    right.set_xlim(LEAST, None)
    right.set_title("own error of each layer, largest of all grids", fontsize=9, loc="left")
    right.tick_params(axis="x", labelsize=8)
    right.spines[["top", "right"]].set_visible(False)
    return picture


def plot(report: DiscretizationReport, ax: Any = None) -> Any:
    """Change of the output against points per axis, both logarithmic."""
    if ax is None:
        ax = _figure()(figsize=(4, 3.2), layout="constrained").subplots()
    pairs = sorted(
        (math.prod(shape) ** (1 / len(shape)), value) for shape, value in report.table.items()
    )
    points = [p for p, _ in pairs]
    ax.plot(points, [max(v, LEAST) for _, v in pairs], color=BLUE, marker="o", markersize=4)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(points, [f"{p:.0f}" for p in points])
    ax.minorticks_off()
    ax.set_xlabel("points per axis", fontsize=9)
    finest = " × ".join(map(str, report.finest))
    ax.set_title(f"relative change against {finest}", fontsize=9, loc="left")
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install "stiefel[atlas]"') from error
    return Figure

"""An explanation as a table and as a picture. Rich and matplotlib are imported when needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from stiefel.merge.explain import Explanation

# Blue, orange, green, red, purple, brown of a palette that the colour-blind can tell apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#8c6d00")
_MERGED = "#000000"


def table(explanation: Explanation) -> Any:
    """A row a layer, as ``rich.table.Table``: each model's rotation, rest and energy."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        header_style="bold",
        padding=(0, 1, 0, 0),
        title=f"against {explanation.reference}",
        title_justify="left",
        caption="\n" + NOTE,
        caption_justify="left",
    )
    out.add_column("layer", justify="right", no_wrap=True)
    out.add_column("model", no_wrap=True)
    for name in ("angle\nlargest", "angle\nmean", "rest", "change", "energy", "energy\nof base"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in explanation.layers():
        named = {**row["experts"], **({} if row["merged"] is None else {"merged": row["merged"]})}
        for number, (name, summary) in enumerate(named.items()):
            out.add_row(
                "" if number else _layer(row["layer"]),
                name,
                *_cells(summary),
                "" if number else _number(row["energy_before"]),
                style="bold" if name == "merged" else None,
                end_section=number == len(named) - 1,
            )
    return out


NOTE = (
    "angle: of the rotation of the inputs nearest to the model's matrix, degrees. "
    "rest: what is no rotation, of ||W0||. change: ||W - W0|| / ||W0||. "
    "energy: mean inverse distance of the directions of two neurons."
)


def _layer(layer: int | None) -> str:
    return "other" if layer is None else str(layer)


def _cells(summary: Mapping[str, float | None]) -> list[str]:
    degrees = [_degrees(summary[key]) for key in ("angle_max", "angle_mean")]
    shares = [_percent(summary[key]) for key in ("residual", "difference")]
    return [*degrees, *shares, _number(summary["energy"])]


def _degrees(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}°"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.6g}"


def figure(explanation: Explanation) -> Any:
    """Angles, rest and change of energy over the layers, as ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install "stiefel[atlas]"') from error

    rows = [row for row in explanation.layers() if row["layer"] is not None]
    rows = rows or explanation.layers()
    places = list(range(len(rows)))
    picture = Figure(figsize=(10, 3.2), layout="constrained")
    panels = picture.subplots(1, 3)
    titles = (
        "largest angle, degrees",
        "rest, % of the base's norm",
        "energy, % above the base",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_xlabel("layer", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xticks(*_ticks(rows))
    names = list(dict.fromkeys(name for row in rows for name in row["experts"]))
    lines: list[tuple[str, str, Callable[[Mapping[str, Any]], Any]]] = [
        (name, _COLOURS[i % len(_COLOURS)], lambda row, name=name: row["experts"].get(name))
        for i, name in enumerate(names)
    ]
    if any(row["merged"] is not None for row in rows):
        lines.append(("merged", _MERGED, lambda row: row["merged"]))
    for name, colour, find in lines:
        style = {"color": colour, "label": name, "marker": "o", "markersize": 3, "linewidth": 1.3}
        found = [find(row) for row in rows]
        panels[0].plot(places, [_get(f, "angle_max") for f in found], **style)
        panels[1].plot(places, [100 * _get(f, "residual") for f in found], **style)
        more = [
            100 * (_get(f, "energy") / row["energy_before"] - 1)
            for f, row in zip(found, rows, strict=True)
        ]
        panels[2].plot(places, more, **style)
    panels[2].axhline(0, color="#999999", linewidth=0.8)
    for panel in panels[:2]:
        panel.set_ylim(0, max(1e-9, 1.1 * panel.dataLim.y1))
    panels[0].legend(fontsize=8, frameon=False)
    return picture


def _get(summary: Mapping[str, float | None] | None, key: str) -> float:
    value = None if summary is None else summary[key]
    return math.nan if value is None else value


def _ticks(rows: list[dict[str, Any]]) -> tuple[list[int], list[str]]:
    step = max(1, math.ceil(len(rows) / 8))
    places = list(range(0, len(rows), step))
    return places, [_layer(rows[place]["layer"]) for place in places]

"""A diagnosis as one HTML file: no script, no request to anywhere, light and dark."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

from stiefel import __version__
from stiefel.diagnose.comparison import Comparison, Trajectory
from stiefel.diagnose.report_rows import EmbeddingRow, MatrixRow, Report

# Columns of the heat map, as far as a model has them.
ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "down", "router", "conv", "other")
# Steps of colour on each side of the anchor, and how far from it the last begins.
STEPS, REACH = 5, 0.30
_LINES = ("o", "up", "down", "q")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class MissingPackageError(ImportError):
    """A package that only the page needs is not installed."""


def render(
    reports: Sequence[Report],
    *,
    comparison: Comparison | None = None,
    trajectory: Trajectory | None = None,
) -> str:
    """The page of one report, of two side by side, or of the checkpoints of a run.

    Args:
        reports: One for each section.
        comparison: Of the first two.
        trajectory: Over all of them, in order.

    Raises:
        MissingPackageError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingPackageError(
            "an HTML report needs Jinja2, which is not installed: pip install 'stiefel[atlas]'"
        ) from error
    folder = resources.files("stiefel.diagnose") / "templates"
    style = (folder / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, percent=percent, count=count, shape=shape)
    template = environment.from_string((folder / "report.html").read_text(encoding="utf-8"))
    raw = {
        "reports": [report.to_json() for report in reports],
        "comparison": comparison.to_json() if comparison else None,
        "trajectory": trajectory.to_json() if trajectory else None,
    }
    return template.render(
        sections=[_section(report, index) for index, report in enumerate(reports)],
        comparison=comparison,
        trajectory=_growth_chart(trajectory) if trajectory else None,
        run=trajectory,
        style=style,
        digest=digest,
        version=__version__,
        raw=json.dumps(raw, indent=1, ensure_ascii=False),
    )


def number(value: float | int | None, digits: int = 4) -> str:
    """A number with as many significant digits; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        power = str(int(exponent)).translate(_SUPERSCRIPT)
        return f"{mantissa} · 10{power}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def shape(k: float | int | None) -> str:
    """k with three decimals; a dash for none."""
    return "–" if k is None else f"{k:.3f}"


def percent(value: float | int | None) -> str:
    """A part as per cent."""
    return "–" if value is None else f"{100 * value:.3g} %"


def count(value: float | int) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{int(value):,}".replace(",", "\u202f")


def tint(k: float | None, anchor: float | int) -> str:
    """CSS class of a cell: ``below-1`` to ``below-5``, ``above-…``, ``at`` or ``none``."""
    if k is None:
        return "none"
    step = min(STEPS, math.floor(abs(k - anchor) / (REACH / STEPS) + 0.5))
    if step == 0:
        return "at"
    return f"{'below' if k < anchor else 'above'}-{step}"


def _section(report: Report, index: int) -> dict[str, Any]:
    kinds = {row.kind for row in report.matrices if row.block is not None}
    columns = [kind for kind in ORDER if kind in kinds]
    columns += sorted(kinds - set(ORDER))
    cells: dict[int, dict[str, list[MatrixRow]]] = {}
    for row in report.matrices:
        if row.block is not None:
            cells.setdefault(row.block, {}).setdefault(row.kind, []).append(row)
    heat = []
    for block in sorted(cells):
        line = []
        for kind in columns:
            rows = [row for row in cells[block].get(kind, []) if row.k is not None]
            ks = sorted(row.k for row in rows if row.k is not None)
            k = ks[len(ks) // 2] if ks else None
            line.append(
                {
                    "k": k,
                    "tint": tint(k, report.anchor["k"]),
                    "title": f"block {block}, {kind}: "
                    + "; ".join(
                        f"{row.name} k {number(row.k)} ± {number(row.se_k, 2)}, "
                        f"λ {number(row.lam)}, R² {number(row.r2)}"
                        for row in rows
                    ),
                }
            )
        heat.append({"block": block, "cells": line})
    return {
        "id": f"model-{index + 1}",
        "report": report,
        "columns": columns,
        "heat": heat,
        "lambda_chart": _lambda_chart(report),
        "embeddings": [{"row": row, "chart": _cosine_chart(row)} for row in report.embeddings],
        "order": [kind for kind in (*ORDER, "ffn") if kind in report.summary]
        + sorted(set(report.summary) - {*ORDER, "ffn"}),
    }


WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 46, 30


def _scale(low: float | int, high: float | int, start: float | int, end: float | int) -> Any:
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 1)


def _ticks(low: float | int, high: float | int) -> list[float]:
    """Up to six round numbers between two."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= 6:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _lambda_chart(report: Report) -> dict[str, Any] | None:
    """λ over depth, one line per kind."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in report.matrices:
        if row.block is not None and row.lam is not None and row.kind in _LINES:
            lines.setdefault(row.kind, []).append((float(row.block), row.lam))
    lines = {kind: sorted(points) for kind, points in lines.items() if len(points) > 1}
    return _chart(lines, "block") if lines else None


def _growth_chart(trajectory: Trajectory) -> dict[str, Any] | None:
    """Median λ over the checkpoints of a run, one line per kind."""
    lines = {
        kind: [(float(i), lam) for i, lam in enumerate(values) if lam is not None]
        for kind, values in trajectory.lam.items()
        if kind in (*_LINES, "ffn")
    }
    lines = {kind: points for kind, points in lines.items() if len(points) > 1}
    return _chart(lines, "checkpoint") if lines else None


def _chart(lines: dict[str, list[tuple[float, float]]], label: str) -> dict[str, Any]:
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    top = max(ys) * 1.08
    across = _scale(min(xs), max(xs), LEFT, WIDTH - 70)
    up = _scale(0.0, top, HEIGHT - BOTTOM, 8)
    drawn = []
    for place, kind in enumerate(sorted(lines, key=lambda kind: -lines[kind][-1][1])):
        points = lines[kind]
        drawn.append(
            {
                "kind": kind,
                "series": place + 1,
                "points": " ".join(f"{across(x)},{up(y)}" for x, y in points),
                "end": (across(points[-1][0]), up(points[-1][1])),
            }
        )
    _spread(drawn)
    whole = [x for x in _ticks(min(xs), max(xs)) if x == int(x)]
    return {
        "lines": drawn,
        "x_ticks": [(across(x), f"{x:.0f}") for x in whole],
        "y_ticks": [(up(y), number(y, 2)) for y in _ticks(0.0, top)],
        "label": label,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - 70,
        "base": HEIGHT - BOTTOM,
    }


def _spread(lines: list[dict[str, Any]]) -> None:
    """Move the labels at the ends of lines apart, so that they can be read."""
    last = -math.inf
    for line in sorted(lines, key=lambda line: line["end"][1]):
        at = max(line["end"][1], last + 13)
        line["label_y"] = round(at, 1)
        last = at


def _cosine_chart(row: EmbeddingRow) -> dict[str, Any]:
    """Histogram of cosines with μ and ε marked, over the range that has any."""
    counts = row.histogram
    seen = [i for i, value in enumerate(counts) if value]
    bins = len(counts)
    first, last = max(0, seen[0] - 2), min(bins, seen[-1] + 3)
    low = min(-1 + 2 * first / bins, 0.0)
    high = max(-1 + 2 * last / bins, min(row.eps * 1.1, 1.0))
    across = _scale(low, high, LEFT, WIDTH - 12)
    most = max(counts)
    up = _scale(0.0, 1.0, HEIGHT - BOTTOM, 22)
    path = [f"M{across(-1 + 2 * first / bins)},{HEIGHT - BOTTOM}"]
    for i in range(first, last):
        x0, x1 = -1 + 2 * i / bins, -1 + 2 * (i + 1) / bins
        y = up(counts[i] / most)
        path.append(f"L{across(x0)},{y}L{across(x1)},{y}")
    path.append(f"L{across(-1 + 2 * last / bins)},{HEIGHT - BOTTOM}Z")
    return {
        "path": "".join(path),
        "mean": across(row.mean),
        "eps": across(min(row.eps, high)),
        "beyond": row.eps > high,
        "random": across(2 / math.sqrt(row.width)),
        "x_ticks": [(across(x), number(x, 2)) for x in _ticks(low, high)],
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "base": HEIGHT - BOTTOM,
    }

"""A race as a table and as a picture. Rich and matplotlib are imported when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stiefel.optim.race_result import RaceResult, Standing

# Told apart by hue and lightness; AdamW is grey and dashed, torch's Muon black and dotted.
COLOURS = {
    "adamw": "#808080",
    "torch-muon": "#000000",
    "muon": "#0072b2",
    "normuon": "#56b4e9",
    "rmnp": "#009e73",
    "root": "#d55e00",
    "auon": "#e6b800",
    "hybrid-auon": "#8c6d00",
    "aro": "#cc79a7",
    "trion": "#7b3fa0",
    "dct-adamw": "#7f3b08",
}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_DASHES = {"adamw": "--", "torch-muon": ":"}
NOTE = (
    "±: 95 % intervals over seeds. To AdamW's: when its loss at the end is first reached, "
    "mean over seeds. Step: CPU time of forward, backward and update, median. "
    "State: what the optimizer keeps between steps. ×: times AdamW's."
)


def table(result: RaceResult, narrow: bool = False) -> Any:
    """A row a contestant, as ``rich.table.Table``: 115 characters wide, or 79 if ``narrow``."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = Table(
        header_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0 if narrow else (0, 1, 0, 0),
        caption="\n" + NOTE,
    )
    out.caption_justify = "left"
    out.add_column("optimizer", style="bold", no_wrap=True)
    for name in (
        "final\nloss",
        "minus\nAdamW",
        "steps to\nAdamW's",
        "CPU s to\nAdamW's",
        "step",
        "state",
        "rate",
    ):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("brack-\neted", no_wrap=True)
    for standing in result.standings:
        row = cells(result, standing)
        out.add_row(standing.name, *(row if narrow else (cell.replace("\n", " ") for cell in row)))
    return out


def cells(result: RaceResult, standing: Standing) -> list[str]:
    """What stands in a contestant's row, from the final loss on, as text.

    A line break stands before what belongs below the number where there is little room.
    """
    row, base = result.row(standing), result.row(result.baseline)
    grid = row["grid"]
    if row["lr"] is None:
        tried = f"{grid[0]['lr']:g}\nto {grid[-1]['lr']:g}"
        return ["diverged", "–", "–", "–", "–", "–", tried, "no"]
    lost = f"\n({len(row['diverged'])} diverged)" if row["diverged"] else ""
    return [
        _with_interval(row["final"], "{:.3f}", "–") + lost,
        "" if standing is result.baseline else _signed(row["difference_to_adamw"]),
        _reaching(row, "steps_to_adamw", "{:.0f}"),
        _reaching(row, "seconds_to_adamw", "{:.2f}"),
        _ratio(row, base, "step_seconds", _milliseconds),
        _ratio(row, base, "state_bytes", _bytes),
        f"{row['lr']:g}",
        "yes" if row["bracketed"] else "no",
    ]


def _with_interval(summary: dict[str, Any], form: str, nothing: str) -> str:
    if summary["mean"] is None:
        return nothing
    text = form.format(summary["mean"])
    if summary["interval"] is not None:
        text += f"\n± {summary['interval'][1] - summary['mean']:.3f}"
    return text


def _signed(summary: dict[str, Any]) -> str:
    return _with_interval(summary, "{:+.3f}", "–").replace("-", "−")


def _reaching(row: dict[str, Any], key: str, form: str) -> str:
    reached, seeds = row["reached"], len(row["seeds"])
    if not reached:
        return "never"
    text = form.format(row[key])
    return text if reached == seeds else f"{text}\n({reached} of {seeds})"


def _ratio(
    row: dict[str, Any], base: dict[str, Any], key: str, form: Callable[[float], str]
) -> str:
    if row[key] is None:
        return "–"
    text = form(row[key])
    return f"{text}\n{row[key] / base[key]:.2f}×" if base[key] else text


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _bytes(count: float) -> str:
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:  # 1,000 and more would take four digits
        count, power = count / 1024, power + 1
    return f"{count:.3g} {_UNITS[power]}"


def figure(result: RaceResult) -> Any:
    """Mean loss against steps and against CPU seconds, as ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install "stiefel[atlas]"') from error

    out = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = out.subplots(1, 2, sharey=True)
    shown = []
    for standing in result.standings:
        runs = [run for run in standing.runs.values() if run["final"] is not None]
        if not runs:
            continue
        losses = [sum(v) / len(runs) for v in zip(*(r["losses"] for r in runs), strict=True)]
        shown.append(losses)
        for axes, key in ((left, "steps"), (right, "seconds")):
            along = [sum(v) / len(runs) for v in zip(*(r[key] for r in runs), strict=True)]
            axes.plot(
                along,
                losses,
                label=f"{standing.name}  {losses[-1]:.3f}",
                color=COLOURS.get(standing.name),
                linestyle=_DASHES.get(standing.name, "-"),
                linewidth=1.5,
            )
    _frame(left, right, shown, result)
    handles, labels = left.get_legend_handles_labels()
    out.legend(handles, labels, loc="outside right center", frameon=False, title="final loss")
    return out


def _frame(left: Any, right: Any, shown: list[list[float]], result: RaceResult) -> None:
    """Axes without frames; the plunge of the first steps is cut off, so that the end is seen."""
    if shown:
        low = min(min(losses) for losses in shown)
        late = [losses[min(len(losses) // 4, len(losses) - 1)] for losses in shown]
        high = max(late)
        left.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low) or None)
    final = result.row(result.baseline)["final"]["mean"]
    for axes, label in ((left, "steps"), (right, "CPU seconds of training")):
        if final is not None:
            axes.axhline(final, color="#808080", linewidth=0.6)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("validation loss (nats)")

"""The article of one paper: every claim, every seed, what made them and what changed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stiefel.atlas.api import place
from stiefel.atlas.entry import Entry
from stiefel.atlas.highlight import highlight
from stiefel.atlas.report import issue_address, report_link, report_text
from stiefel.atlas.result import Result
from stiefel.atlas.strip import strip
from stiefel.papers.paper import Judgement, Measurement, mean_interval


@dataclass(frozen=True)
class Change:
    """A claim before and now."""

    before: Judgement
    now: Judgement

    @property
    def kind(self) -> str:
        """``verdict``, ``value`` or ``same``."""
        if self.before.verdict is not self.now.verdict:
            return "verdict"
        same = self.before.value == self.now.value and self.before.interval == self.now.interval
        return "same" if same else "value"


@dataclass(frozen=True)
class Changes:
    """What the run before had given."""

    claims: tuple[Change, ...]
    seeds: tuple[int, ...]
    date: str
    commit: str | None
    same_code: bool


def article(entry: Entry, figure: str, inventory: dict[str, str], docs: str) -> dict[str, Any]:
    """The variables of ``paper.html``.

    Args:
        entry: The paper.
        figure: Its picture, as safe markup.
        inventory: Where in the documentation each name is explained.
        docs: Address of the documentation, relative to the article, ending in ``/``.
    """
    from markupsafe import Markup

    result = entry.result
    issues = issue_address()
    box = re.match(r'<svg [^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"', figure)
    judged = result.claims if result else entry.paper.judge(())
    measurements = result.measurements if result else ()
    strips = [strip(j, [m.metrics[j.claim.metric] for m in measurements]) for j in judged]
    machines = {
        "{cpu}, {cores} cores, {system}".format(
            **{k: r.machine.get(k, "?") for k in ("cpu", "cores", "system")}
        )
        for r in entry.records
    }
    versions = {
        ", ".join(f"{name} {version}" for name, version in r.versions.items())
        for r in entry.records
    }
    return {
        "entry": entry,
        "figure": figure,
        "wide": box is not None and float(box[1]) > 2.2 * float(box[2]),
        "claims": list(zip(judged, [Markup(s) for s in strips], strict=True)),  # noqa: S704
        "margin": _words(entry.margin),
        "metrics": measured(entry, result) if result and measurements else [],
        "snippet": Markup(highlight(entry.paper.snippet)),  # noqa: S704 (escaped there)
        "api": [
            (name, None if (where := place(name, inventory)) is None else docs + where)
            for name in entry.api
        ],
        "machines": sorted(machines),
        "versions": sorted(versions),
        "commits": sorted({r.commit for r in entry.records if r.commit}),
        "changes": changes(entry),
        "report": report_text(entry),
        "report_link": report_link(entry, issues),
        "by_mail": issues is None,
    }


def measured(entry: Entry, result: Result) -> list[tuple[str, list[float | None], float, Any]]:
    """Each metric with its values by seed, mean and interval; those of claims first."""
    named = [claim.metric for claim in entry.paper.claims]
    others = sorted({name for m in result.measurements for name in m.metrics})
    rows = []
    for name in dict.fromkeys([*named, *others]):
        values = [m.metrics.get(name) for m in result.measurements]
        mean, lo, hi = mean_interval([v for v in values if v is not None])
        rows.append((name, values, mean, (lo, hi)))
    return rows


def changes(entry: Entry) -> Changes | None:
    """Every claim as it was before the present records; None where nothing was replaced."""
    if entry.result is None or not entry.records:
        return None
    now = {record.seed for record in entry.records}
    names = {claim.metric for claim in entry.paper.claims}
    earlier = [e for e in entry.earlier if e.seed in now and names <= set(e.metrics)]
    if not earlier:
        return None
    before = entry.paper.judge([Measurement(e.seed, e.metrics) for e in earlier])
    newest = max(earlier, key=lambda e: e.started)
    return Changes(
        claims=tuple(map(Change, before, entry.result.claims)),
        seeds=tuple(e.seed for e in earlier),
        date=newest.started[:10],
        commit=newest.commit,
        same_code=newest.code == entry.records[0].code,
    )


def neighbours(entries: Sequence[Entry], at: int) -> dict[str, Any]:
    """The papers before and after the one ``at`` this place of the page."""
    return {
        "before": entries[at - 1].paper if at > 0 else None,
        "after": entries[at + 1].paper if at + 1 < len(entries) else None,
    }


def _words(value: float) -> str:
    """What a margin says, as the end of a sentence; empty without one."""
    if math.isnan(value):
        return ""
    if math.isinf(value):
        side = "beyond" if value > 0 else "short of"
        return f"All seeds gave the same number, {side} the bound."
    side = "beyond" if value >= 0 else "short of"
    return f"The mean lies {abs(value):.2g} half-widths of its interval {side} the bound."

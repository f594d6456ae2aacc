"""The index: cards by topic, in each the ones with most evidence first."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stiefel.atlas.entry import NOT_RUN, Entry
from stiefel.atlas.strip import strip
from stiefel.papers.paper import Verdict

# Word on the badge: (CSS class, sign). The sign says it without colour.
BADGES = {
    Verdict.REPRODUCED.value: ("good", "✓"),
    Verdict.NOT_REPRODUCED.value: ("bad", "✕"),
    Verdict.INCONCLUSIVE.value: ("open", "?"),
    Verdict.FAILED.value: ("failed", "!"),
    NOT_RUN: ("none", "○"),
}


@dataclass(frozen=True)
class Group:
    """The papers of one topic."""

    topic: str
    anchor: str
    entries: tuple[Entry, ...]

    @property
    def feed(self) -> str:
        """Where its Atom feed is, relative to the page's folder."""
        return f"feeds/{self.anchor.removeprefix('topic-')}.xml"


def index(entries: Sequence[Entry], figure: Callable[[Entry], Any]) -> dict[str, Any]:
    """The variables of ``index.html``; ``figure`` draws the small picture of an entry."""
    from markupsafe import Markup

    verdicts = Counter(entry.verdict for entry in entries)
    strips = {}
    for entry in entries:
        if entry.headline is not None and entry.result is not None:
            metric = entry.headline.claim.metric
            values = [m.metrics[metric] for m in entry.result.measurements]
            strips[entry.paper.slug] = Markup(strip(entry.headline, values))  # noqa: S704 (numbers)
    return {
        "entries": entries,
        "groups": grouped(entries),
        "figures": {entry.paper.slug: figure(entry) for entry in entries},
        "strips": strips,
        "words": {entry.paper.slug: search_words(entry) for entry in entries},
        "margins": {entry.paper.slug: sort_key(entry.margin) for entry in entries},
        "verdicts": [(word, verdicts[word]) for word in BADGES if verdicts[word]],
        "kinds": sorted(Counter(e.paper.data for e in entries if e.paper.data).items()),
    }


def grouped(entries: Sequence[Entry]) -> list[Group]:
    """By topic in the order of first appearance; in a topic by margin, what has none last."""
    topics = list(dict.fromkeys(entry.paper.topic for entry in entries))
    groups, anchors = [], Counter()
    for topic in topics:
        anchor = "topic-" + (re.sub(r"[^a-z0-9]+", "-", topic.lower()).strip("-") or "other")
        anchors[anchor] += 1
        if anchors[anchor] > 1:
            anchor += f"-{anchors[anchor]}"
        members = [entry for entry in entries if entry.paper.topic == topic]
        members.sort(key=lambda e: -math.inf if math.isnan(e.margin) else e.margin, reverse=True)
        groups.append(Group(topic, anchor, tuple(members)))
    return groups


def search_words(entry: Entry) -> str:
    """What the search looks through, in lower case."""
    paper = entry.paper
    parts = [
        *(paper.title, paper.authors, paper.topic, paper.slug, paper.arxiv, paper.data),
        *(paper.summary, entry.verdict, *entry.api),
        *(claim.text for claim in paper.claims),
    ]
    return " ".join(" ".join(parts).lower().split())


def sort_key(value: float) -> str:
    """A number as JavaScript's ``Number`` reads it; empty for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.4g}" if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")

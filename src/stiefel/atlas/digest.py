"""What is new since a date, as an e-mail: found in the results, written as text and HTML, sent.

Cards are compared with what the same results said at the end of the day before: the history that
every result keeps (:mod:`stiefel.atlas.record`) tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, make_msgid
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stiefel import __version__
from stiefel.atlas.entry import Entry, read_entry
from stiefel.atlas.record import KEPT, error_path, load, load_history, result_path
from stiefel.atlas.result import estimate, number
from stiefel.papers.paper import Judgement, Measurement, Paper, Scale, Verdict

NEW, CHANGED = "new", "changed"
UNSENT = Address("Stiefel", "digest", "stiefel.invalid")
"""From whom a message is that was only written to a file, unless the settings say another."""


@dataclass(frozen=True)
class Item:
    """A card that is new or has changed."""

    entry: Entry
    kind: str
    """``new`` or ``changed``."""
    before: tuple[Judgement, ...] = ()
    """Its claims as they stood at the date; empty for a new card."""

    @property
    def verdict_before(self) -> str | None:
        """The word on the badge then; None for a new card."""
        return self.before[0].verdict.value if self.before else None

    def to_json(self) -> dict[str, Any]:
        """JSON-able: slug, title, what happened, the verdict then and now."""
        return {
            "slug": self.entry.paper.slug,
            "title": self.entry.paper.title,
            "kind": self.kind,
            "verdict": self.entry.verdict,
            "verdict_before": self.verdict_before,
            "measured": self.entry.updated,
        }


@dataclass(frozen=True)
class Digest:
    """What is new since a date; verdicts that changed first, then new cards, then new numbers."""

    since: datetime
    items: tuple[Item, ...]

    @property
    def subject(self) -> str:
        """Of the message: how many cards are new and how many have changed."""
        count = Counter(item.kind for item in self.items)
        said = ", ".join(f"{count[kind]} {kind}" for kind in (NEW, CHANGED) if count[kind])
        return f"Stiefel: {said or 'nothing new'} since {self.since.date().isoformat()}"


def collect(results: str | Path, papers: Sequence[Paper], since: datetime) -> Digest:
    """The cards that are new, or say something else than at ``since``.

    A card is new when nothing was measured of its paper before. It has changed when a claim's
    verdict, mean or interval has, or when a seed has crashed since. A run that repeats the numbers
    is no news.

    Args:
        results: Folder that :func:`stiefel.atlas.reproduce` has written.
        papers: Of which papers.
        since: The date, with time zone.

    Raises:
        ValueError: ``since`` has no time zone.
    """
    if since.tzinfo is None:
        raise ValueError(f"since needs a time zone, got {since.isoformat()}")
    found = [_compare(Path(results), read_entry(Path(results), paper), since) for paper in papers]
    items = [item for item in found if item is not None]
    return Digest(since, tuple(sorted(items, key=_rank)))


def message(
    digest: Digest,
    *,
    sender: Address = UNSENT,
    receivers: Sequence[Address] = (),
    page_url: str = "",
    now: datetime | None = None,
) -> EmailMessage:
    """The digest as a message of two parts that say the same: plain text and HTML.

    Args:
        digest: What is new.
        sender: From whom.
        receivers: To whom; nobody makes it a draft.
        page_url: Where the page is served, for links; empty for none but those to arXiv.
        now: Date of the message; None for the present.
    """
    mail = EmailMessage(policy=SMTP)
    mail["Subject"] = _line(digest.subject)
    mail["From"] = sender
    if receivers:
        mail["To"] = tuple(receivers)
    else:
        mail["X-Unsent"] = "1"  # mail programs open it as a draft
    mail["Date"] = format_datetime(now or datetime.now(UTC))
    mail["Message-ID"] = make_msgid(domain=sender.domain)  # the default would name this machine
    mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: no answers from holidays
    mail.set_content(text(digest, page_url))
    mail.add_alternative(html(digest, page_url), subtype="html")
    return mail


def text(digest: Digest, page_url: str = "") -> str:
    """The digest as plain text."""
    lines = [digest.subject, ""]
    if not digest.items:
        lines += ["No card is new and none has changed.", ""]
    for item in digest.items:
        paper = item.entry.paper
        lines += [f"{_heading(item)}: {_line(paper.title)}", f"  {_line(paper.summary)}"]
        for judgement, before in _claims(item):
            lines.append(f"  - {_line(judgement.claim.text)}")
            lines.append(f"    {_said(judgement)}{_was(judgement, before)}")
        lines += [f"  Seed {seed}: {_line(what)}" for seed, what in _errors(item.entry).items()]
        lines += [f"  {name}: {address}" for name, address in _links(item, page_url)]
        lines += [f"  Repeat: {item.entry.command}", ""]
    return "\n".join([*lines, f"-- \n{_foot()}", ""])


def html(digest: Digest, page_url: str = "") -> str:
    """The digest as HTML without scripts, pictures or anything from outside."""
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(digest.subject)}</title></head>",
        '<body style="font-family:sans-serif;line-height:1.45;max-width:44em">',
        f"<h1>{escape(digest.subject)}</h1>",
    ]
    if not digest.items:
        parts.append("<p>No card is new and none has changed.</p>")
    for item in digest.items:
        paper = item.entry.paper
        parts.append(f"<h2>{escape(_heading(item))}: {escape(_line(paper.title))}</h2>")
        parts.append(f"<p>{escape(_line(paper.summary))}</p><ul>")
        parts += [
            f"<li>{escape(_line(judgement.claim.text))}<br>"
            f"<strong>{escape(_said(judgement))}</strong>"
            f"{escape(_was(judgement, before))}</li>"
            for judgement, before in _claims(item)
        ]
        parts.append("</ul>")
        parts += [
            f"<p>Seed {seed}: <code>{escape(_line(what))}</code></p>"
            for seed, what in _errors(item.entry).items()
        ]
        links = [
            f'<a href="{escape(address)}">{name}</a>' for name, address in _links(item, page_url)
        ]
        parts.append(f"<p>{' · '.join(links)}</p>" if links else "")
        parts.append(f"<pre><code>{escape(item.entry.command)}</code></pre>")
    return "\n".join([*parts, f"<hr><p>{escape(_foot())}</p></body></html>", ""])


def _compare(results: Path, entry: Entry, since: datetime) -> Item | None:
    """What happened to a card since then; None if nothing did."""
    if entry.result is None:
        return None
    before = _at(results, entry, since)
    crashed = [
        seed
        for seed in entry.result.errors
        if _mtime(error_path(results, entry.paper.slug, entry.result.scale, seed)) >= since
    ]
    if not before:
        fresh = any(_when(record.started) >= since for record in entry.records)
        return Item(entry, NEW) if fresh or crashed else None
    now = entry.result.claims
    if entry.result.errors:
        return Item(entry, CHANGED, before) if crashed else None
    return None if list(map(_key, before)) == list(map(_key, now)) else Item(entry, CHANGED, before)


def _at(results: Path, entry: Entry, since: datetime) -> tuple[Judgement, ...]:
    """Every claim as the results told it at ``since``; empty where nothing had been measured.

    As on the page: the largest scale, of each seed the last run, of those the newest code.
    """
    paper = entry.paper
    for scale in (Scale.PAPER, Scale.LAPTOP, Scale.SMOKE):
        runs = [
            run
            for seed_runs in _runs(results, paper, scale).values()
            if (run := _last_before(seed_runs, since)) is not None
        ]
        if runs:
            code = max(runs, key=lambda run: run.when).code
            measurements = [Measurement(r.seed, r.metrics) for r in runs if r.code == code]
            judged = paper.judge(measurements)
            if scale is Scale.SMOKE:  # says nothing about the claim, as in combine
                judged = tuple(replace(j, verdict=Verdict.INCONCLUSIVE) for j in judged)
            return judged
    return ()


@dataclass(frozen=True)
class _Run:
    when: datetime
    code: str
    seed: int
    metrics: Mapping[str, float]


def _runs(results: Path, paper: Paper, scale: Scale) -> dict[int, list[_Run]]:
    """All that is known of each seed, the oldest first, where it answers every claim."""
    history = load_history(results, paper.slug, scale)
    folder = result_path(results, paper.slug, scale, 0).parent
    present = {int(p.stem) for p in folder.glob("*.json") if p.stem.isdecimal()}
    names = {claim.metric for claim in paper.claims}
    found = {}
    for seed in sorted(present | set(history)):
        runs = [_Run(_when(e.started), e.code, seed, e.metrics) for e in history.get(seed, ())]
        record = load(results, paper.slug, scale, seed)
        if record is not None:
            metrics = record.measurement.metrics
            runs.append(_Run(_when(record.started), record.code, seed, metrics))
        found[seed] = [run for run in runs if names <= set(run.metrics)]
    return found


def _last_before(runs: Sequence[_Run], since: datetime) -> _Run | None:
    older = [run for run in runs if run.when < since]
    if older:
        return max(older, key=lambda run: run.when)
    # More was forgotten than the history keeps: the oldest that it remembers stands for it.
    return runs[0] if len(runs) > KEPT else None


def _when(started: str) -> datetime:
    """When a run began; what cannot be read is of old."""
    try:
        when = datetime.fromisoformat(started)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _mtime(path: Path) -> datetime:
    """When a file was written; of old if it has gone meanwhile."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:
        return datetime.min.replace(tzinfo=UTC)


def _key(judgement: Judgement) -> tuple[str, str, str]:
    """What has to be equal for a claim to be unchanged; as text, since NaN is not itself."""
    return repr(judgement.value), repr(judgement.interval), judgement.verdict.value


def _rank(item: Item) -> tuple[int, str, str]:
    turned = item.kind == CHANGED and item.verdict_before != item.entry.verdict
    place = 0 if turned else 1 if item.kind == NEW else 2
    return place, item.entry.paper.topic, item.entry.paper.slug


def _heading(item: Item) -> str:
    if item.kind == NEW:
        return f"New, {item.entry.verdict}"
    if item.verdict_before != item.entry.verdict:
        return f"{item.verdict_before} → {item.entry.verdict}"
    return f"New numbers, {item.entry.verdict}"


def _claims(item: Item) -> list[tuple[Judgement, Judgement | None]]:
    now = item.entry.result.claims if item.entry.result else ()
    return list(zip(now, item.before or [None] * len(now), strict=True))


def _said(now: Judgement) -> str:
    bound = f"claimed {now.claim.relation} {number(now.claim.bound)}"
    return f"{now.verdict.value}: {estimate(now)}, {bound}"


def _was(now: Judgement, before: Judgement | None) -> str:
    """What a claim said before, if that is something else."""
    if before is None or _key(before) == _key(now):
        return ""
    verdict = "" if before.verdict is now.verdict else f"{before.verdict.value}, "
    return f" (before: {verdict}{estimate(before)})"


def _errors(entry: Entry) -> Mapping[int, str]:
    return entry.result.errors if entry.result else {}


def _links(item: Item, page_url: str) -> list[tuple[str, str]]:
    paper = item.entry.paper
    links = []
    if page_url:
        links.append(("Card", f"{page_url.rstrip('/')}/papers/{quote(paper.slug)}.html"))
    if paper.arxiv:
        links.append(("arXiv", f"https://arxiv.org/abs/{quote(paper.arxiv)}"))
    return links


def _line(words: str) -> str:
    """On one line and without control characters: what stands in a header or a list."""
    return " ".join("".join(c if c.isprintable() else " " for c in words).split())


def _foot() -> str:
    return f"stiefel {__version__}; every verdict is computed from the measurements."

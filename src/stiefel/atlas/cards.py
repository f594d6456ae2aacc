"""The cards for machines: each as JSON and as Markdown, and one index with all of them.

Addresses are stable: ``index.json``, ``cards/<slug>.json``, ``cards/<slug>.md``. Links inside a
file are relative to that file, as on the web.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stiefel import __version__
from stiefel.atlas.article import changes
from stiefel.atlas.entry import Entry
from stiefel.atlas.feeds import feeds, topic_feeds
from stiefel.atlas.report import issue_address, report_link
from stiefel.atlas.result import duration, number
from stiefel.papers.paper import Judgement
from stiefel.storage import write_text

SCHEMA = 1
"""Version of the cards' JSON. Grows when a field changes its meaning or goes; not for new ones."""

_RELATIONS = {"≤": "<=", "≥": ">="}


def write_machine_files(
    entries: Sequence[Entry], out: str | Path, *, base_url: str = ""
) -> list[Path]:
    """Write what machines read of the page: cards, their index, and the Atom feeds.

    The same entries give the same bytes. ``index.json`` is written last: who finds a card in it
    finds its files too.

    Args:
        entries: The papers with what was measured, in the order of the page.
        out: Folder of the page; other files in it are left alone.
        base_url: Where the page will be served, for absolute links in the feeds.

    Returns:
        What was written, in this order.

    Raises:
        ValueError: a slug twice.
        OSError: the folder cannot be written.
    """
    out = Path(out)
    slugs = [entry.paper.slug for entry in entries]
    twice = [slug for slug in dict.fromkeys(slugs) if slugs.count(slug) > 1]
    if twice:
        raise ValueError(f"each slug names a file, so it must be there once; twice: {twice}")
    files = {}
    for entry in entries:
        own = card(entry, root="../")
        files[f"cards/{entry.paper.slug}.json"] = dumps(own)
        files[f"cards/{entry.paper.slug}.md"] = markdown(own)
    files |= feeds(entries, base_url=base_url)
    files["index.json"] = dumps(index(entries))
    for name, text in files.items():
        write_text(out / name, text)
    return [out / name for name in files]


def index(entries: Sequence[Entry]) -> dict[str, Any]:
    """The content of ``index.json``: every card, in the order of the page."""
    return {
        "schema": SCHEMA,
        "generator": f"stiefel {__version__}",
        "updated": max((e.updated for e in entries if e.records), default=None),
        "feeds": {"all": "feed.xml", "topics": topic_feeds(entries)},
        "cards": [card(entry) for entry in entries],
    }


def dumps(value: Any) -> str:
    """``value`` as JSON in ASCII with sorted keys: the same value gives the same bytes.

    Raises:
        ValueError: ``value`` holds NaN or an infinity.
    """
    return json.dumps(value, ensure_ascii=True, sort_keys=True, indent=1, allow_nan=False) + "\n"


def card(entry: Entry, *, root: str = "") -> dict[str, Any]:
    """One card, JSON-able. None stands for what was not measured, for NaN and for infinities.

    Args:
        entry: The paper with what was measured.
        root: Way from the file that will hold the card to the page's folder: empty or ``../``.
    """
    paper, result = entry.paper, entry.result
    judged = result.claims if result else paper.judge(())
    newest = max(entry.records, key=lambda r: r.started, default=None)
    return {
        "schema": SCHEMA,
        "slug": paper.slug,
        "title": paper.title,
        "authors": paper.authors,
        "published": paper.published,
        "topic": paper.topic,
        "data": paper.data or None,
        "summary": paper.summary,
        "verdict": entry.verdict,
        "scale": entry.scale.value if entry.scale else None,
        "claims": [_claim(j, j.verdict.value if result else entry.verdict) for j in judged],
        "margin": _finite(entry.margin),
        "seeds": list(result.seeds) if result else [],
        "measurements": [
            {
                "seed": record.seed,
                "metrics": {k: _finite(v) for k, v in record.measurement.metrics.items()},
                "seconds": round(record.seconds, 3),
                "started": record.started,
            }
            for record in entry.records
        ],
        "errors": {str(k): v for k, v in result.errors.items()} if result else {},
        "seconds": round(result.seconds, 3) if result and entry.records else None,
        "peak_rss_mb": _rounded(result.peak_rss_mb) if result else None,
        "measured": entry.updated if entry.records else None,
        "machine": dict(newest.machine) if newest else None,
        "versions": dict(newest.versions) if newest else None,
        "commit": newest.commit if newest else None,
        "changes": _changes(entry),
        "command": entry.command,
        "snippet": paper.snippet.strip("\n") + "\n",
        "api": list(entry.api),
        "notes": list(paper.notes),
        "links": _links(entry, root),
    }


def markdown(card: Mapping[str, Any]) -> str:
    """A card as Markdown: what it claims, what was measured, how to use and to repeat it."""
    lines = [f"# {_words(card['title'])}", ""]
    facts = [card["authors"], card["published"], card["topic"], card["data"]]
    lines += [" · ".join(_words(fact) for fact in facts if fact), ""]
    lines += [_words(card["summary"]), "", f"**Verdict: {_words(card['verdict'])}.**", ""]
    for seed, message in card["errors"].items():
        lines += [f"Seed {seed} failed: {_words(message)}", ""]
    lines += [
        "| Claim | Metric | Mean (95 % interval) | Claimed | Verdict |",
        "| --- | --- | --- | --- | --- |",
        *(_row(claim) for claim in card["claims"]),
        "",
    ]
    if card["measurements"]:
        lines += [_measured(card), ""]
    if card["changes"]:
        lines += [f"## Since {card['changes']['date']}", ""]
        lines += [f"- {_change(change)}" for change in card["changes"]["claims"]] + [""]
    if card["notes"]:
        lines += ["## To read the verdict", "", *(f"- {_words(n)}" for n in card["notes"]), ""]
    lines += ["## Use it", "", *_fenced(card["snippet"], "python")]
    lines += ["## Repeat it", "", *_fenced(card["command"] + "\n", "")]
    links = [f"- [{name}](<{target}>)" for name, target in card["links"].items() if target]
    return "\n".join([*lines, "## Links", "", *links, ""])


def _claim(judgement: Judgement, verdict: str) -> dict[str, Any]:
    claim = judgement.claim
    return {
        "text": claim.text,
        "metric": claim.metric,
        "relation": _RELATIONS[claim.relation],
        "bound": _finite(claim.bound),
        "value": _finite(judgement.value),
        "interval": [_finite(bound) for bound in judgement.interval],
        "verdict": verdict,
    }


def _changes(entry: Entry) -> dict[str, Any] | None:
    """What the run before had given; None where none is kept."""
    found = changes(entry)
    if found is None:
        return None
    return {
        "date": found.date,
        "commit": found.commit,
        "seeds": list(found.seeds),
        "same_code": found.same_code,
        "claims": [
            {
                "metric": change.now.claim.metric,
                "kind": change.kind,
                "before": _claim(change.before, change.before.verdict.value),
                "now": _claim(change.now, change.now.verdict.value),
            }
            for change in found.claims
        ],
    }


def _links(entry: Entry, root: str) -> dict[str, str | None]:
    slug = quote(entry.paper.slug)
    return {
        "page": f"{root}papers/{slug}.html",
        "json": f"{root}cards/{slug}.json",
        "markdown": f"{root}cards/{slug}.md",
        "arxiv": f"https://arxiv.org/abs/{quote(entry.paper.arxiv)}" if entry.paper.arxiv else None,
        "code": quote(entry.paper.code, safe="%:/?#[]@!$&'()*+,;=~") if entry.paper.code else None,
        "report": report_link(entry, issue_address()),
    }


def _row(claim: Mapping[str, Any]) -> str:
    bound = f"{'≤' if claim['relation'] == '<=' else '≥'} {number(claim['bound'])}"
    cells = [claim["text"], claim["metric"], _spread(claim), bound, claim["verdict"]]
    return f"| {' | '.join(_words(cell) for cell in cells)} |"


def _spread(claim: Mapping[str, Any]) -> str:
    """Mean and interval for people; a dash where nothing was measured."""
    lo, hi = claim["interval"]
    ends = "" if lo is None or hi is None else f" ({number(lo)} to {number(hi)})"
    return number(claim["value"]) + ends


def _measured(card: Mapping[str, Any]) -> str:
    machine = card["machine"]
    place = f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores"
    count = len(card["seeds"])
    return _words(
        f"{card['scale']} scale, {count} {'seed' if count == 1 else 'seeds'}, "
        f"{duration(card['seconds'])} in all, measured {card['measured'][:10]} on {place}, "
        f"{machine.get('system', '?')}; commit {card['commit'] or 'not recorded'}."
    )


def _change(change: Mapping[str, Any]) -> str:
    metric, before, now = _words(change["metric"]), change["before"], change["now"]
    if change["kind"] == "same":
        return f"{metric}: unchanged"
    text = f"{metric}: {_words(_spread(before))} → {_words(_spread(now))}"
    if change["kind"] == "verdict":
        text += f", **{before['verdict']} → {now['verdict']}**"
    return text


def _words(text: str) -> str:
    """``text`` on one line with everything escaped that Markdown or HTML would act on."""
    text = re.sub(r"([\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    text = re.sub(r"(^|(?<= ))#", r"\\#", text)  # also what would close a heading
    text = re.sub(r"^([-+=](?=[ =-]|$))", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?= |$)", r"\1\\\2", text)


def _fenced(code: str, language: str) -> list[str]:
    """A block of code in a fence longer than any within it."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + language, *code.rstrip("\n").split("\n"), fence, ""]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

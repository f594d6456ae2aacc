"""The Atom feeds (RFC 4287): one of all papers, one of each topic; the newest measurement first.

An entry keeps its id as long as its paper is here, so that a reader of feeds shows it once, and
again when ``updated`` moves: after a new measurement.
"""

from __future__ import annotations

import re
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from urllib.parse import quote

from stiefel import __version__
from stiefel.atlas.article import Changes, changes
from stiefel.atlas.entry import Entry
from stiefel.atlas.listing import grouped
from stiefel.atlas.result import estimate, number

_ATOM = "http://www.w3.org/2005/Atom"
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


def feeds(entries: Sequence[Entry], *, base_url: str = "") -> dict[str, str]:
    """Every feed by its place in the page's folder: ``feed.xml``, then ``feeds/<topic>.xml``.

    Args:
        entries: The papers with what was measured, in the order of the page.
        base_url: Where the page will be served, for absolute links; relative if empty.
    """
    base = base_url.rstrip("/") + "/" if base_url else ""
    texts = {"feed.xml": feed(entries, base=base)}
    for topic, place in topic_feeds(entries).items():
        members = [entry for entry in entries if entry.paper.topic == topic]
        texts[place] = feed(members, topic=topic, place=place, base=base)
    return texts


def topic_feeds(entries: Sequence[Entry]) -> dict[str, str]:
    """Where the feed of each topic is, relative to the page's folder."""
    return {
        group.topic: f"feeds/{group.anchor.removeprefix('topic-')}.xml"
        for group in grouped(entries)
    }


def feed(
    entries: Sequence[Entry], *, topic: str | None = None, place: str = "feed.xml", base: str = ""
) -> str:
    """A feed of ``entries`` as XML.

    Args:
        entries: The papers with what was measured.
        topic: What they have in common, for title and id; None for the feed of all.
        place: Where the feed will be, relative to the page's folder.
        base: Address of that folder, ending in ``/``; empty for relative links.
    """
    newest = sorted(entries, key=updated, reverse=True)
    root = ET.Element("feed", {"xmlns": _ATOM, "xml:lang": "en"})
    title = "Stiefel: papers, re-checked"
    _add(root, "id", urn("atlas" if topic is None else f"topic/{topic}"))
    _add(root, "title", title if topic is None else f"{title}: {topic}")
    _add(root, "subtitle", "One entry a paper, with the verdict on its claim.")
    _add(root, "updated", _stamp(updated(newest[0]) if newest else _NEVER))
    _add(root, "generator", "stiefel", version=__version__)
    _add(_add(root, "author"), "name", "The Stiefel authors")
    up = base or "../" * place.count("/")
    own = base + place if base else place.rpartition("/")[2]
    _add(root, "link", rel="self", type="application/atom+xml", href=own)
    _add(root, "link", rel="alternate", type="text/html", href=up + "index.html")
    for entry in newest:
        _add_entry(root, entry, up)
    ET.indent(root, "")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def updated(entry: Entry) -> datetime:
    """When a paper was last measured; when it was published if it never was."""
    try:
        when = datetime.fromisoformat(entry.updated)
    except ValueError:  # of a result that something else has written
        return _NEVER
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)


def urn(name: str) -> str:
    """A name that stays the same wherever the page is served."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"stiefel/{name}").urn


def news(found: Changes | None) -> str:
    """What changed since the run before, in a sentence; empty where there was none."""
    if found is None:
        return ""
    head = found.claims[0]
    if head.kind == "same":
        same = all(change.kind == "same" for change in found.claims)
        return f"{'Unchanged' if same else 'Headline unchanged'} since {found.date}."
    before = f"{head.before.verdict.value}, {estimate(head.before)}"
    return f"Changed: on {found.date} it was {before}."


def _add_entry(root: ET.Element, entry: Entry, up: str) -> None:
    paper, found = entry.paper, changes(entry)
    element = _add(root, "entry")
    _add(element, "id", urn(f"paper/{paper.slug}"))
    _add(element, "title", f"{paper.title}: {entry.verdict}")
    _add(element, "updated", _stamp(updated(entry)))
    _add(_add(element, "author"), "name", paper.authors)
    _add(element, "category", term=paper.topic)
    address = f"{up}papers/{quote(paper.slug)}.html"
    _add(element, "link", rel="alternate", type="text/html", href=address)
    measured = ""
    if entry.headline is not None:
        bound = f"{paper.claim.relation} {number(paper.claim.bound)}"
        measured = f", {estimate(entry.headline)}, claimed {bound}"
    parts = [
        paper.summary,
        f"Claim: {paper.claim.text}",
        f"Verdict: {entry.verdict}{measured}.",
        news(found),
    ]
    _add(element, "summary", " ".join(part for part in parts if part))
    _add(element, "content", _content(entry, found), type="html")


def _content(entry: Entry, found: Changes | None) -> str:
    """The claims as HTML, which the XML escapes once more."""
    result = entry.result
    judged = result.claims if result else entry.paper.judge(())
    cells = [
        (
            judgement.claim.text,
            estimate(judgement),
            f"{judgement.claim.relation} {number(judgement.claim.bound)}",
            judgement.verdict.value if result else entry.verdict,
        )
        for judgement in judged
    ]
    head = "".join(f"<th>{name}</th>" for name in ("Claim", "Measured", "Claimed", "Verdict"))
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in cells]
    table = f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    said = news(found)
    return (
        f"<p>{escape(entry.paper.summary)}</p>{table}"
        + (f"<p>{escape(said)}</p>" if said else "")
        + f"<pre><code>{escape(entry.command)}</code></pre>"
    )


def _add(parent: ET.Element, name: str, text: str | None = None, **attributes: str) -> ET.Element:
    clean = {key: _xml(value) for key, value in attributes.items()}
    element = ET.SubElement(parent, name, clean)
    element.text = None if text is None else _xml(text)
    return element


def _xml(text: str) -> str:
    """``text`` with what XML 1.0 cannot hold (most control characters) as �."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _stamp(when: datetime) -> str:
    return when.isoformat(timespec="milliseconds")

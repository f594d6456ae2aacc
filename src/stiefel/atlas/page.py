"""The page: an index of cards, an article for each paper, a feed. Static files, no server."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from stiefel import __version__
from stiefel.atlas.highlight import highlight
from stiefel.atlas.record import Record, failed_seeds, load_all
from stiefel.atlas.result import Result, combine, duration, interval, number
from stiefel.atlas.strip import strip
from stiefel.atlas.svg import render
from stiefel.papers import all_papers
from stiefel.papers.paper import Paper, Scale, Verdict
from stiefel.storage import write_text

log = logging.getLogger(__name__)

NOT_RUN = "not run yet"

# Word on the badge: (CSS class, sign). The sign says it without colour.
_BADGES = {
    Verdict.REPRODUCED.value: ("good", "✓"),
    Verdict.NOT_REPRODUCED.value: ("bad", "✕"),
    Verdict.INCONCLUSIVE.value: ("open", "?"),
    Verdict.FAILED.value: ("failed", "!"),
    NOT_RUN: ("none", "○"),
}

_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

# Drawing is most of the work, and the page is rebuilt whenever a paper finishes.
_drawn: dict[tuple[Any, ...], str] = {}


class MissingPackageError(ImportError):
    """A package that only the page needs is not installed."""


@dataclass(frozen=True)
class Entry:
    """A paper with what there is of it under ``results``."""

    paper: Paper
    scale: Scale | None
    result: Result | None
    records: tuple[Record, ...]

    @property
    def verdict(self) -> str:
        """The word on the badge."""
        return self.result.verdict.value if self.result else NOT_RUN

    @property
    def updated(self) -> str:
        """When it last changed, RFC 3339."""
        if self.records:
            return max(record.started for record in self.records)
        return f"{self.paper.published}-01"[:10] + "T00:00:00+00:00"

    @property
    def command(self) -> str:
        """What repeats it."""
        scale = self.scale or Scale.LAPTOP
        seeds = ",".join(map(str, self.result.seeds if self.result else (0, 1, 2)))
        return f"stiefel reproduce {self.paper.slug} --scale {scale.value} --seeds {seeds}"


def build_page(
    results: str | Path = "results",
    out: str | Path = "build/atlas",
    *,
    papers: Sequence[Paper] | None = None,
    base_url: str = "",
) -> Path:
    """Build the page from ``results`` into the folder ``out``.

    Writes ``index.html``, ``papers/<slug>.html`` and ``feed.xml``: the same results and papers
    give the same bytes. Of each paper the largest scale that was run is shown.

    Args:
        results: Folder that :func:`stiefel.atlas.reproduce` has written.
        out: Folder for the page; other files in it are left alone.
        papers: What to show; None for all of Stiefel's papers.
        base_url: Where the page will be served, for absolute links in the feed; relative if empty.

    Returns:
        The path of ``index.html``.

    Raises:
        MissingPackageError: jinja2 or matplotlib is not installed.
    """
    environment = _environment()
    out = Path(out)
    entries = [
        read_entry(Path(results), paper) for paper in (all_papers() if papers is None else papers)
    ]
    shared = _shared_parts()
    base = base_url.rstrip("/") + "/" if base_url else ""
    article = environment.get_template("paper.html")
    for entry in entries:
        text = article.render(**shared, **_article(entry), root="../")
        write_text(out / "papers" / f"{entry.paper.slug}.html", text)
    index = environment.get_template("index.html").render(**shared, **_index(entries), root="")
    feed = environment.get_template("feed.xml").render(**_feed(entries), base=base)
    write_text(out / "feed.xml", feed)
    write_text(out / "index.html", index)
    return out / "index.html"


def shown_papers(extra: Sequence[Paper]) -> list[Paper]:
    """All of Stiefel's papers, then those of ``extra`` that are not among them."""
    papers = list(all_papers())
    slugs = {paper.slug for paper in papers}
    return papers + [paper for paper in extra if paper.slug not in slugs]


def read_entry(results: Path, paper: Paper) -> Entry:
    """What there is of ``paper``, at the largest scale that was run."""
    for scale in (Scale.PAPER, Scale.LAPTOP, Scale.SMOKE):
        records = [r for r in load_all(results, paper.slug, scale) if r.answers(paper)]
        errors = failed_seeds(results, paper.slug, scale)
        if records or errors:
            return Entry(paper, scale, combine(paper, scale, records, errors), tuple(records))
    return Entry(paper, None, None, ())


def _environment() -> Any:
    for package in ("jinja2", "matplotlib"):
        try:
            import_module(package)
        except ImportError as error:
            raise MissingPackageError(
                f'The page needs {package}, which is not installed: pip install "stiefel[atlas]"'
            ) from error
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stiefel.atlas"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "interval": interval,
        "duration": duration,
        "date": _date,
        "badge": _BADGES.__getitem__,
    }
    return environment


def _shared_parts() -> dict[str, Any]:
    """Style and scripts, which stand inside every file, and the policy that allows just them."""
    from markupsafe import Markup

    folder = resources.files("stiefel.atlas") / "templates"
    style, early, late = (
        (folder / name).read_text(encoding="utf-8") for name in ("style.css", "early.js", "late.js")
    )
    policy = (
        f"default-src 'none'; style-src {_sha(style)}; script-src {_sha(early)} {_sha(late)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return {
        "style": Markup(style),  # noqa: S704 (our own files)
        "early": Markup(early),  # noqa: S704
        "late": Markup(late),  # noqa: S704
        "policy": policy,
        "version": __version__,
    }


def _sha(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _index(entries: list[Entry]) -> dict[str, Any]:
    topics = Counter(entry.paper.topic for entry in entries)
    verdicts = Counter(entry.verdict for entry in entries)
    return {
        "entries": entries,
        "figures": {entry.paper.slug: _figure(entry, small=True) for entry in entries},
        "topics": sorted(topics.items()),
        "verdicts": [(word, verdicts[word]) for word in _BADGES if verdicts[word]],
    }


def _article(entry: Entry) -> dict[str, Any]:
    from markupsafe import Markup

    result = entry.result
    figure = _figure(entry)
    box = re.match(r'<svg [^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"', figure)
    metrics: list[str] = []
    if result is not None:
        named = [claim.metric for claim in entry.paper.claims]
        measured = sorted({name for m in result.measurements for name in m.metrics})
        metrics = list(dict.fromkeys([*named, *measured])) if result.measurements else []
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
        "metrics": metrics,
        "snippet": Markup(highlight(entry.paper.snippet)),  # noqa: S704 (escaped there)
        "machines": sorted(machines),
        "versions": sorted(versions),
        "commits": sorted({r.commit for r in entry.records if r.commit}),
    }


def _label(entry: Entry) -> str:
    return f"Figure of {entry.paper.title}: {entry.paper.claim.text}"


def _figure(entry: Entry, *, small: bool = False) -> Any:
    """The figure as safe markup; empty without results; a sentence if it cannot be drawn."""
    from markupsafe import Markup, escape

    if not entry.records:
        return ""
    name = f"{entry.paper.slug}-{'card' if small else 'figure'}"
    key = (
        entry.paper.figure,
        entry.paper.slug,
        small,
        *((r.key, r.started) for r in entry.records),
    )
    if key not in _drawn:
        measurements = [record.measurement for record in entry.records]
        try:
            _drawn[key] = render(
                entry.paper.figure, measurements, name=name, label=_label(entry), small=small
            )
        except Exception as error:  # one paper's drawing must not cost the others their page
            log.warning("the figure of %s cannot be drawn: %r", entry.paper.slug, error)
            text = f"The figure cannot be drawn: {type(error).__name__}: {error}"
            return Markup('<p class="muted">{}</p>').format(escape(text))
    return Markup(_drawn[key])  # noqa: S704 (matplotlib's SVG, its text escaped)


def _feed(entries: list[Entry]) -> dict[str, Any]:
    newest = sorted(entries, key=lambda entry: entry.updated, reverse=True)
    return {
        "entries": [(entry, _urn(f"paper/{entry.paper.slug}")) for entry in newest],
        "id": _urn("atlas"),
        "updated": newest[0].updated if newest else "1970-01-01T00:00:00+00:00",
    }


def _urn(name: str) -> str:
    """A name that stays the same wherever the page is served."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"stiefel/{name}").urn


def _date(published: str) -> str:
    year, month, *day = published.split("-")
    words = f"{_MONTHS[int(month) - 1]} {year}"
    return f"{int(day[0])} {words}" if day else words

"""The page: an index of cards, an article for each paper, a feed. Static files, no server."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections.abc import Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stiefel import __version__
from stiefel.atlas.api import read_inventory
from stiefel.atlas.article import article, neighbours
from stiefel.atlas.cards import write_machine_files
from stiefel.atlas.entry import Entry as Entry
from stiefel.atlas.entry import read_entry as read_entry
from stiefel.atlas.listing import BADGES, grouped, index
from stiefel.atlas.result import duration, interval, number
from stiefel.atlas.svg import render
from stiefel.papers import all_papers
from stiefel.papers.paper import Paper
from stiefel.storage import write_text

log = logging.getLogger(__name__)

_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

# Drawing is most of the work, and the page is rebuilt whenever a paper finishes.
_drawn: dict[tuple[Any, ...], str] = {}


class MissingPackageError(ImportError):
    """A package that only the page needs is not installed."""


def build_page(
    results: str | Path = "results",
    out: str | Path = "build/atlas",
    *,
    papers: Sequence[Paper] | None = None,
    base_url: str = "",
    docs: str | Path | None = None,
) -> Path:
    """Build the page from ``results`` into the folder ``out``.

    Writes ``index.html``, ``papers/<slug>.html`` and what machines read (see
    :func:`stiefel.atlas.cards.write_machine_files`): the same results, papers and documentation
    give the same bytes. Of each paper the largest scale that was run is shown.

    Args:
        results: Folder that :func:`stiefel.atlas.reproduce` has written.
        out: Folder for the page; other files in it are left alone.
        papers: What to show; None for all of Stiefel's papers.
        base_url: Where the page will be served, for absolute links in the feed; relative if empty.
        docs: Folder of the documentation as Sphinx has built it: names of the library are linked to
            it, relative to the page. None for ``docs`` beside ``out``, no links if it is not there.

    Returns:
        The path of ``index.html``.

    Raises:
        MissingPackageError: jinja2 or matplotlib is not installed.
        ValueError: ``docs`` holds an inventory that cannot be read.
    """
    environment = _environment()
    out = Path(out)
    docs = out.absolute().parent / "docs" if docs is None else Path(docs)
    inventory = read_inventory(docs)
    way = quote(Path(os.path.relpath(docs, out / "papers")).as_posix()) + "/"
    entries = [
        read_entry(Path(results), paper) for paper in (all_papers() if papers is None else papers)
    ]
    shared = _shared_parts()
    template = environment.get_template("paper.html")
    groups = grouped(entries)
    anchors = {group.topic: group.anchor for group in groups}
    ordered = [entry for group in groups for entry in group.entries]
    for at, entry in enumerate(ordered):
        parts = article(entry, _figure(entry), inventory, way) | neighbours(ordered, at)
        text = template.render(**shared, **parts, anchor=anchors[entry.paper.topic], root="../")
        write_text(out / "papers" / f"{entry.paper.slug}.html", text)
    parts = index(entries, lambda entry: _figure(entry, small=True))
    write_machine_files(entries, out, base_url=base_url)
    # Last: who waits for it finds everything it links to.
    write_text(
        out / "index.html",
        environment.get_template("index.html").render(**shared, **parts, root=""),
    )
    return out / "index.html"


def shown_papers(extra: Sequence[Paper]) -> list[Paper]:
    """All of Stiefel's papers, then those of ``extra`` that are not among them."""
    papers = list(all_papers())
    slugs = {paper.slug for paper in papers}
    return papers + [paper for paper in extra if paper.slug not in slugs]


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
        "margin": _margin,
        "date": _date,
        "badge": BADGES.__getitem__,
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


def _margin(value: float) -> str:
    """A margin on a card: with its sign, two significant digits."""
    text = number(float(f"{value:.2g}"))
    return f"+{text}" if value > 0 else text


def _date(published: str) -> str:
    year, month, *day = published.split("-")
    words = f"{_MONTHS[int(month) - 1]} {year}"
    return f"{int(day[0])} {words}" if day else words

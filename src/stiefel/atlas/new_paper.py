"""The start of a paper: module, test and page that run as they stand."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from datetime import date
from importlib import resources
from pathlib import Path
from string import Template

from stiefel.papers import all_papers
from stiefel.storage import write_text


@dataclass(frozen=True)
class NewPaper:
    """What :func:`new_paper` wrote."""

    slug: str
    files: tuple[Path, ...]
    in_checkout: bool
    """Whether it became part of a checkout of Stiefel, and not a package of its own."""


def module_name(slug: str) -> str:
    """A module's name for a slug: ``3d-lines`` → ``paper_3d_lines``."""
    name = slug.replace("-", "_")
    return f"paper_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name


def new_paper(
    slug: str,
    folder: Path,
    *,
    title: str = "",
    arxiv: str = "0000.00000",
    topic: str = "theory",
) -> NewPaper:
    """Write the start of a paper.

    In a checkout of Stiefel it becomes a module there, with its test, its page of the documents and
    its line in the list of papers. Elsewhere it becomes a package ``SLUG/`` of its own, whose entry
    point (group ``stiefel.papers``) makes the paper known wherever it is installed.

    Args:
        slug: Name in commands and addresses: lower-case words joined by hyphens.
        folder: The checkout, or where the package's folder goes.
        title: Of the paper; the slug in words if not given.
        arxiv: Its number, as ``2405.16287``.
        topic: The group on the page.

    Raises:
        ValueError: a slug that is no name or that another paper has; text that would break out of
            its place.
        FileExistsError: a file is in the way; nothing is written then.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        raise ValueError(f"slug must be lower-case words joined by hyphens, got {slug!r}")
    if slug in {paper.slug for paper in all_papers()}:
        raise ValueError(f"there is a paper {slug!r} already")
    title = title or slug.replace("-", " ").capitalize()
    for name, text in (("title", title), ("arxiv", arxiv), ("topic", topic)):
        if not text.isprintable() or set(text) & set('"\\'):
            raise ValueError(f"{name} must be printable, without quotes and backslashes: {text!r}")
    module = module_name(slug)
    words = {"slug": slug, "module": module, "title": title, "arxiv": arxiv, "topic": topic,
             "published": f"{date.today():%Y-%m}"}  # fmt: skip
    inside = (folder / "src/stiefel/papers/__init__.py").is_file()
    if inside:
        words["module"] = f"stiefel.papers.{module}"
        places = {
            "module": folder / f"src/stiefel/papers/{module}.py",
            "checks": folder / f"tests/papers/test_{module}_card.py",
            "docs": folder / f"docs/{module}.md",
        }
    else:
        root = folder / slug
        places = {
            "pyproject": root / "pyproject.toml",
            "module": root / f"{module}.py",
            "checks": root / f"tests/test_{module}.py",
            "docs": root / "README.md",
        }
    for path in places.values():
        if path.exists():
            raise FileExistsError(f"{path} is there already")
    for kind, path in places.items():
        write_text(path, Template(_template(kind)).substitute(words))
    if inside:
        _enlist(folder / "src/stiefel/papers/__init__.py", module)
    return NewPaper(slug, tuple(places.values()), inside)


def _template(kind: str) -> str:
    place = resources.files("stiefel.atlas") / "templates" / "new_paper" / f"{kind}.txt"
    return place.read_text(encoding="utf-8")


def _enlist(path: Path, module: str) -> None:
    """Add a module at the end of the list of papers."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r"^MODULES = \(\n(?:    .*\n)*?(?=\))", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} has no list MODULES; add {module!r} to it by hand")
    write_text(path, text[: found.end()] + f'    "{module}",\n' + text[found.end() :])

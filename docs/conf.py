"""Sphinx: the pages of this folder, and a reference of every public name written from the code."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import stiefel

project = "Stiefel"
author = "The Stiefel authors"
copyright = author
release = stiefel.__version__
html_title = f"Stiefel {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
exclude_patterns = ["_build"]
# Headings as anchors, as on GitHub; pages link to files of the repository too.
myst_heading_anchors = 3
# Links to files of the repository; fields of the same name in many classes.
suppress_warnings = ["myst.xref_missing", "ref.python"]
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_use_rtype = False
# Fields are members with their own text already.
napoleon_use_ivar = True

HOMES = (
    "checkpoint", "optim", "init", "theory", "nn", "nn.poincare", "nn.operators", "nn.lemon",
    "nn.lemon.pde", "regularize", "merge", "diagnose", "numerics", "numerics.sampled",
    "numerics.tensor_product", "generate", "linalg", "papers", "atlas",
)  # fmt: skip


def public_names(home: str) -> list[str]:
    """What a home offers: classes and functions of Stiefel, no modules, no private names."""
    module = importlib.import_module(f"stiefel.{home}")
    found = []
    for name in dir(module):
        if name.startswith("_"):
            continue
        value = getattr(module, name)
        ours = getattr(value, "__module__", "").startswith("stiefel")
        # Cached functions are callables around one.
        if ours and (inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value))):
            found.append(name)
    return sorted(found, key=str.lower)


def write_reference(app: Any) -> None:
    """One page for each home below ``api/``."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    lines = ["# API reference", "", "Every public name, by the module that people import it from.",
             "", "```{toctree}", ":maxdepth: 1", ""]  # fmt: skip
    seen: set[int] = set()
    for home in HOMES:
        module = importlib.import_module(f"stiefel.{home}")
        values = {name: getattr(module, name) for name in public_names(home)}
        # What a home passes on from another one is explained there.
        passed_on = [name for name, value in values.items() if id(value) in seen]
        names = [name for name in values if name not in passed_on]
        seen.update(map(id, values.values()))
        text = [f"# stiefel.{home}", "", inspect.cleandoc(module.__doc__ or ""), ""]
        if passed_on:
            text += ["Also here: " + ", ".join(f"`{name}`" for name in passed_on) + ".", ""]
        text += ["```{eval-rst}", f".. currentmodule:: stiefel.{home}", "",
                 ".. autosummary::", "   :nosignatures:", "",
                 *(f"   {name}" for name in names), ""]  # fmt: skip
        for name in names:
            kind = "class" if inspect.isclass(values[name]) else "function"
            text += [f".. auto{kind}:: {name}", *(["   :members:"] if kind == "class" else []), ""]
        page = folder / f"{home}.md"
        content = "\n".join([*text, "```", ""])
        if not page.exists() or page.read_text(encoding="utf-8") != content:
            page.write_text(content, encoding="utf-8")
        lines.append(f"{home}")
    index = "\n".join([*lines, "```", ""])
    page = folder / "index.md"
    if not page.exists() or page.read_text(encoding="utf-8") != index:
        page.write_text(index, encoding="utf-8")


def keep_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Norms and moduli stay as they are written: in reStructuredText bars would mean more."""
    for i, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[i] = "``".join(parts)


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out what scikit-learn puts into every estimator."""
    return True if name.startswith("set_") and name.endswith("_request") else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", keep_bars)
    app.connect("autodoc-skip-member", skip)
    app.connect("builder-inited", write_reference)

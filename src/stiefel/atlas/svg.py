"""A paper's figure as SVG that can stand inside a page, in light and in dark.

matplotlib draws it; what comes out is then made fit for inlining: greys become the page's own text
colour at the opacity that looks the same, style attributes (which the page's security policy
forbids) become presentation attributes, ids are made unique to the paper, and numbers are rounded.
The same measurements give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

from stiefel.papers.paper import Measurement

LIMIT = 80_000
"""Bytes that one figure may have."""

# Each keeps a contrast of 3:1 or more against both the light and the dark page.
PALETTE = ("#2f7fd6", "#d9652b", "#2a9d6f", "#a868d6", "#b5851b", "#d14f7c")

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_SMALL = (4.3, 2.5)
"""Inches, for a card. Words keep their size, so they stay readable there."""
ElementTree.register_namespace("", _SVG)

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stiefel",
    "figure.figsize": (7.2, 4.2),
    "figure.dpi": 100,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.45",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "normal",
    "axes.labelsize": 10,
    "grid.color": "0.88",
    "grid.linewidth": 0.8,
    "xtick.color": "0.45",
    "ytick.color": "0.45",
    "xtick.labelcolor": "0.3",
    "ytick.labelcolor": "0.3",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: sizes are the same everywhere
    "mathtext.fontset": "dejavusans",
    "path.simplify_threshold": 0.5,
}


def render(
    figure: Callable[[Sequence[Measurement]], Any],
    measurements: Sequence[Measurement],
    *,
    name: str,
    label: str,
    small: bool = False,
) -> str:
    """Draw ``figure(measurements)`` and return it as an ``<svg>`` element.

    Args:
        figure: Returns a matplotlib ``Figure``.
        measurements: What it draws.
        name: Prefix that makes the ids of this figure different from any other's on a page.
        label: What the figure shows, for those who do not see it.
        small: For a card: the first panel only, smaller, with words as large as before.

    Raises:
        ValueError: the figure has more than :data:`LIMIT` bytes even with its data as an image.
        Exception: whatever ``figure`` raises.
    """
    import matplotlib as mpl
    from cycler import cycler

    style = {**_STYLE, "axes.prop_cycle": cycler(color=PALETTE)}
    with mpl.rc_context({**mpl.rcParamsDefault, **style, "backend": "agg"}):
        drawn = figure(measurements)
        if drawn.get_layout_engine() is None:
            drawn.set_layout_engine("constrained")
        if small:
            _only_first_panel(drawn)
            drawn.set_size_inches(*_SMALL)
        text = _clean(_save(drawn), name, label)
        if len(text.encode()) > LIMIT:
            # Too many points for paths: the data as an image, axes and words as before.
            for axes in drawn.axes:
                for artist in (*axes.lines, *axes.collections, *axes.patches):
                    artist.set_rasterized(True)
            text = _clean(_save(drawn), name, label)
    size = len(text.encode())
    if size > LIMIT:
        raise ValueError(f"the figure has {size} bytes, at most {LIMIT} are allowed")
    return text


def _only_first_panel(figure: Any) -> None:
    """Leave of several panels the first: more do not fit a card."""
    from matplotlib.gridspec import GridSpec

    first = figure.axes[0].get_subplotspec() if figure.axes else None
    if first is None or first.get_geometry()[:2] == (1, 1):
        return
    for axes in figure.axes[1:]:
        if axes.get_subplotspec() != first:  # a twin shares the place of its sibling and stays
            axes.remove()
    whole = GridSpec(1, 1, figure=figure)[0, 0]
    for axes in figure.axes:
        axes.set_subplotspec(whole)


def _save(figure: Any) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    return buffer.getvalue()


def _clean(source: str, name: str, label: str) -> str:
    """Make matplotlib's SVG fit for the page."""
    root = ElementTree.fromstring(source)  # noqa: S314 (written by matplotlib just now)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(r"url\(#([^)]+)\)", source)) | set(re.findall(r'href="#([^"]+)"', source))
    for element in root.iter():
        _inline_style(element)
        _follow_theme(element)
        _rename(element, used, name)
        for attribute in ("d", "points", "transform"):
            if attribute in element.attrib:
                element.set(attribute, _rounded(element.get(attribute, "")))
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        for attribute in ("x", "y", "width", "height", "x1", "x2", "y1", "y2"):
            if re.fullmatch(r"-?\d+\.\d{3,}", element.get(attribute, "")):
                element.set(attribute, _rounded(element.get(attribute, "")))
        if element.text is not None and not element.text.strip():
            element.text = None
        if element.tail is not None and not element.tail.strip():
            element.tail = None
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)  # the page decides the size
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("stroke-linejoin", "round")  # what matplotlib's style sheet said
    root.set("fill", "currentColor")  # matplotlib leaves black unsaid
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode")).strip()


def _inline_style(element: ElementTree.Element) -> None:
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font":  # the short form has no attribute; the family is left to the page
            size = re.search(r"([\d.]+)px", value)
            if size:
                element.set("font-size", size[1])
            for word in ("italic", "bold"):
                if word in value.split():
                    element.set("font-style" if word == "italic" else "font-weight", word)
        elif key == "font-size":
            element.set(key, value.removesuffix("px"))
        elif key and key != "font-family":
            element.set(key, value)


def _follow_theme(element: ElementTree.Element) -> None:
    """Grey of lightness v is black on white at opacity 1 − v: say it with the text's colour."""
    for paint in ("fill", "stroke"):
        match = re.fullmatch(r"#([0-9a-f]{2})\1\1", element.get(paint, "").lower())
        if match:
            opacity = float(element.get(f"{paint}-opacity", "1")) * (1 - int(match[1], 16) / 255)
            element.set(paint, "currentColor" if opacity > 0 else "none")
            element.attrib.pop(f"{paint}-opacity", None)
            if 0 < opacity < 1:
                element.set(f"{paint}-opacity", f"{opacity:.2f}")


def _rename(element: ElementTree.Element, used: set[str], name: str) -> None:
    own = element.get("id")
    if own is not None:
        if own in used:
            element.set("id", f"{name}-{own}")
        else:
            del element.attrib["id"]
    for key, value in list(element.attrib.items()):
        if value.startswith("url(#"):
            element.set(key, value.replace("url(#", f"url(#{name}-"))
        elif key == _XLINK:
            del element.attrib[key]
            element.set("href", f"#{name}-{value[1:]}" if value.startswith("#") else value)


def _rounded(text: str) -> str:
    def short(match: re.Match[str]) -> str:
        return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")

    text = re.sub(r"-?\d+\.\d{3,}(?:e-?\d+)?", short, text)
    return " ".join(text.split())

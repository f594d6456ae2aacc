# ruff: noqa: S314 (what is parsed is our own)
"""Figures fit for a page: themes, size, sameness."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.figure import Figure

from stiefel.atlas.highlight import highlight
from stiefel.atlas.strip import strip
from stiefel.atlas.svg import LIMIT, PALETTE, render
from stiefel.papers import Claim, Measurement

NAMESPACE = "{http://www.w3.org/2000/svg}"


def chart(_):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1, 2], [1.23456789, 2, 3], label="a < b & c")
    axes.plot([0, 1, 2], [3, 2, 1], color="black", marker="o")
    axes.scatter([0, 1], [1, 2], color="0.5")
    axes.fill_between([0, 1], [0, 0], [1, 1], color="#ffffff")
    axes.set(title="loss", xlabel="steps")
    axes.legend()
    return figure


def svg(figure=chart, name="x", **options):
    return render(figure, [], name=name, label="what <it> shows", **options)


def test_greys_follow_the_theme_and_words_are_words():
    root = ET.fromstring(svg())
    assert root.get("fill") == "currentColor"
    assert root.get("aria-label") == "what <it> shows"
    texts = ["".join(t.itertext()) for t in root.iter(f"{NAMESPACE}text")]
    assert {"loss", "steps", "a < b & c"} <= set(texts)
    for element in root.iter():
        assert "style" not in element.attrib
        for paint in ("fill", "stroke"):
            assert not re.fullmatch(r"#(..)\1\1", element.get(paint, "")), ET.tostring(element)
    painted = {e.get("stroke") for e in root.iter()} | {e.get("fill") for e in root.iter()}
    assert {"currentColor", PALETTE[0]} <= painted
    half = [e for e in root.iter() if e.get("fill-opacity") == "0.50"]
    assert half, "grey 0.5 is the text's colour at half its strength"


def test_ids_belong_to_the_figure():
    ids = set(re.findall(r' id="([^"]+)"', svg()))
    assert ids
    assert all(i.startswith("x-") for i in ids)
    assert not ids & set(re.findall(r' id="([^"]+)"', svg(name="y")))


def test_the_same_drawing_gives_the_same_bytes():
    assert svg() == svg()
    assert "metadata" not in svg()


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(p * w for p, w in zip(parts, (0.2126, 0.7152, 0.0722), strict=True))


@pytest.mark.parametrize("colour", PALETTE)
@pytest.mark.parametrize("background", ["#ffffff", "#1a1c20"])
def test_colours_stand_out_in_both_themes(colour, background):
    high, low = sorted((luminance(colour), luminance(background)), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 3


def test_numbers_are_short_and_many_points_become_an_image():
    assert not re.search(r"\d\.\d{3}", svg())
    rng = np.random.default_rng(0)

    def crowd(_):
        figure = Figure()
        axes = figure.subplots()
        axes.scatter(*rng.normal(size=(2, 5000)))
        axes.set_title("crowd")
        return figure

    text = svg(crowd)
    assert len(text.encode()) <= LIMIT
    assert "data:image/png" in text
    assert ">crowd<" in text


def test_a_figure_that_stays_too_large_is_refused():
    rng = np.random.default_rng(0)

    def noise(_):
        figure = Figure()
        figure.subplots().imshow(rng.normal(size=(400, 400)), interpolation="nearest")
        return figure

    with pytest.raises(ValueError, match=rf"bytes, at most {LIMIT} are allowed"):
        svg(noise)


def test_cards_are_smaller_and_no_style_leaks():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    width = [
        float(re.search(r'viewBox="0 0 ([\d.]+)', svg(small=small))[1]) for small in (True, False)
    ]
    assert width[0] < 0.8 * width[1]
    assert dict(mpl.rcParams) == before


def test_of_several_panels_the_first_goes_on_the_card():
    def panels(_):
        figure = Figure(figsize=(10, 3), layout="constrained")
        one, two, _three = figure.subplots(1, 3, sharey=True)
        one.plot([1, 2], label="first")
        one.set_title("first panel")
        one.twinx().set_ylabel("twin")
        two.set_title("second panel")
        figure.colorbar(two.imshow([[1, 2]]), ax=two, label="bar")
        return figure

    whole, card = svg(panels), svg(panels, small=True)
    for word in ("first panel", "twin", "second panel", "bar"):
        assert f">{word}<" in whole
        assert (f">{word}<" in card) == (word in ("first panel", "twin"))
    # It fills the card: its frame is wider than a third.
    frames = [float(x) for x in re.findall(r"M ([\d.]+) ", card)]
    box = [float(x) for x in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)', card).groups()]
    assert max(frames) > 0.7 * box[0]


def judged(*values, **bound):
    return Claim("x", "m", **bound).judge([Measurement(i, {"m": v}) for i, v in enumerate(values)])


def test_strip_draws_every_seed_and_shades_the_side_that_counts():
    values = (0.5, 0.6, 0.7)
    root = ET.fromstring(strip(judged(*values, at_most=0.9), values))
    assert [e.get("class") for e in root.iter("circle")] == ["seed"] * 3
    (kept,) = root.iter("rect")
    (bound,) = [e for e in root.iter("line") if e.get("class") == "bound"]
    assert float(kept.get("x")) + float(kept.get("width")) == pytest.approx(float(bound.get("x1")))
    assert all(float(c.get("cx")) < float(bound.get("x1")) for c in root.iter("circle"))
    root = ET.fromstring(strip(judged(*values, at_least=0.65), values))
    (kept,) = root.iter("rect")
    inside = [float(c.get("cx")) > float(kept.get("x")) for c in root.iter("circle")]
    assert inside == [False, False, True]


@pytest.mark.parametrize("values", [(1.0,), (1.0, 1.0), (0.0, 1e9), (float("inf"), 1.0)])
def test_strip_stays_inside_its_box(values):
    root = ET.fromstring(strip(judged(*values, at_most=1.0), values))
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(name, 0)) <= 160
    assert strip(judged(float("nan"), at_most=1.0), (float("nan"),)) == ""


def test_highlight_marks_python_and_escapes_everything():
    assert highlight('x = "a<b"  # why & how\nif 1:\n    pass') == (
        'x = <span class="s">&quot;a&lt;b&quot;</span>  <span class="c"># why &amp; how</span>\n'
        '<span class="k">if</span> <span class="n">1</span>:\n    <span class="k">pass</span>'
    )
    assert highlight("pip install <x> 'open") == "pip install &lt;x&gt; &#x27;open"
    assert (
        highlight("'''a\nb'''\nx")
        == '<span class="s">&#x27;&#x27;&#x27;a\nb&#x27;&#x27;&#x27;</span>\nx'
    )

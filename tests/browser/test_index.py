"""The index as a reader meets it: search, filters, order, links that keep them, keyboard."""

import math
from pathlib import Path

import pytest

from stiefel.atlas.entry import read_entry
from stiefel.atlas.listing import search_words
from stiefel.papers import all_papers

RESULTS = Path(__file__).resolve().parents[2] / "results"
SHOWN = (
    "[...document.querySelectorAll('.card')].filter(c => c.checkVisibility())"
    ".map(c => c.querySelector('h3 a').getAttribute('href').slice(7, -5))"
)
FOCUS = "document.activeElement.matches('.card h3 a') ? document.activeElement.textContent : ''"


@pytest.fixture(scope="module")
def entries():
    return {paper.slug: read_entry(RESULTS, paper) for paper in all_papers()}


@pytest.fixture
def index(tab, site):
    tab.go(site / "index.html")
    return tab


def test_all_cards_stand_there_without_javascript(tab, site, entries):
    tab.look(scripts=False)
    tab.go(site / "index.html")
    tab.look(scripts=True)  # to ask; the page's own scripts have not run
    assert tab.js("document.documentElement.classList.contains('js')") is False
    assert set(tab.js(SHOWN)) == set(entries)
    assert tab.js("document.querySelector('.tools').checkVisibility()") is False
    topics = tab.js("[...document.querySelectorAll('.topic h2')].map(h => h.textContent)")
    assert topics == list(dict.fromkeys(e.paper.topic for e in entries.values()))


def test_in_each_topic_the_largest_margin_comes_first(index, entries):
    shown = index.js(SHOWN)
    assert sorted(shown) == sorted(entries)
    for topic in {e.paper.topic for e in entries.values()}:
        margins = [entries[s].margin for s in shown if entries[s].paper.topic == topic]
        known = [m for m in margins if not math.isnan(m)]
        assert known == sorted(known, reverse=True)
        assert all(math.isnan(m) for m in margins[len(known) :])


@pytest.mark.parametrize(
    "words", ["rmnp", "Orthogonal MERG", "stiefel.nn.S4DModel", "fastdiagonalization", "zzz"]
)
def test_search_as_you_type(index, entries, words):
    index.press("/")
    index.type(words)
    wanted = {
        slug
        for slug, entry in entries.items()
        if all(word in search_words(entry) for word in words.lower().split())
    }
    assert bool(wanted) == (words != "zzz")
    assert set(index.js(SHOWN)) == wanted
    assert index.js("document.getElementById('shown').textContent") == (
        f"{len(wanted)} of {len(entries)} papers"
    )
    assert index.js("document.getElementById('none').checkVisibility()") == (not wanted)
    # Topics without a card are gone too.
    heads = "[...document.querySelectorAll('.topic')].filter(t => t.checkVisibility()).length"
    assert index.js(heads) == len({entries[slug].paper.topic for slug in wanted})
    index.click("#clear")
    assert len(index.js(SHOWN)) == len(entries)


@pytest.mark.parametrize(
    ("field", "value", "of"),
    [
        ("topic", "merging", lambda e: e.paper.topic),
        ("verdict", "inconclusive", lambda e: e.verdict),
        ("data", "text", lambda e: e.paper.data),
    ],
)
def test_filters(index, entries, field, value, of):
    index.choose(f"#{field}", value)
    wanted = {slug for slug, entry in entries.items() if of(entry) == value}
    assert 0 < len(wanted) < len(entries)
    assert set(index.js(SHOWN)) == wanted


def test_order(index, entries):
    def check(sort, key, *, reverse):
        index.choose("#sort", sort)
        values = [key(entries[slug]) for slug in index.js(SHOWN)]
        known = [v for v in values if v is not None]
        assert len(values) == len(entries)
        assert known == sorted(known, reverse=reverse)
        assert all(v is None for v in values[len(known) :])

    check("date", lambda e: e.paper.published, reverse=True)
    check("margin", lambda e: None if math.isnan(e.margin) else e.margin, reverse=True)
    check("time", lambda e: round(e.result.seconds, 1) if e.records else None, reverse=False)
    assert index.js("document.querySelector('#flat h2').textContent") == "Shortest run first"
    grouped = index.js("document.querySelectorAll('.topic .card').length")
    assert grouped == 0
    index.choose("#sort", "")
    assert index.js("document.querySelectorAll('.topic .card').length") == len(entries)


def test_a_link_keeps_the_state(tab, site, entries):
    tab.go(site / "index.html")
    tab.press("/")
    tab.type("orthogonal")
    tab.choose("#topic", "layers")
    tab.choose("#verdict", "reproduced")
    tab.choose("#sort", "date")
    shown, fragment = tab.js(SHOWN), tab.js("location.hash")
    assert fragment == "#q=orthogonal&topic=layers&verdict=reproduced&sort=date"
    assert 0 < len(shown) < len(entries)
    tab.go(site / "index.html", fragment)
    assert tab.js(SHOWN) == shown
    assert tab.js("document.getElementById('search').value") == "orthogonal"
    # Going to a card and back keeps it too.
    tab.visited.add((site / "papers" / f"{shown[0]}.html").as_uri())
    tab.click(".card:not([hidden]) h3 a")
    tab.wait("document.body?.className", "paper")
    tab.js("history.back()")
    tab.wait("document.body?.className", "index")
    tab.wait("document.readyState", "complete")
    assert tab.js(SHOWN) == shown
    # And a link edited by hand takes effect; what it asks for and is not there is nothing.
    tab.js("location.hash = '#topic=merging&verdict=nonsense'")
    tab.wait("document.getElementById('search').value", "")
    merging = {slug for slug, entry in entries.items() if entry.paper.topic == "merging"}
    assert set(tab.js(SHOWN)) == merging


def test_a_topic_can_be_linked_to(tab, site):
    tab.go(site / "index.html", "#topic-numerics")
    assert abs(tab.js("document.getElementById('topic-numerics').getBoundingClientRect().y")) < 300
    tab.choose("#sort", "date")
    tab.js("location.hash = '#topic-theory'")
    tab.wait("document.getElementById('topic-theory').checkVisibility()", True)


def test_keyboard(index, entries):
    index.press("/")
    assert index.js("document.activeElement.id") == "search"
    assert index.js("document.activeElement.value") == ""  # the key itself is not typed
    index.type("muon")
    index.press("ArrowDown")
    shown = [entries[slug].paper.title for slug in index.js(SHOWN)]
    assert len(shown) > 2
    assert index.js(FOCUS) == shown[0]
    index.press("ArrowRight", "ArrowRight")
    assert index.js(FOCUS) == shown[2]
    index.press("ArrowLeft")
    assert index.js(FOCUS) == shown[1]
    index.press("Tab")
    assert index.js("document.activeElement.textContent") in ("code", "arXiv")
    index.press("/", "Escape")
    assert len(index.js(SHOWN)) == len(entries)
    assert index.js("location.hash") == ""
    index.press("Escape")
    assert index.js("document.activeElement === document.body") is True
    # Three columns: down goes to the card below, up back again.
    index.js("document.querySelector('.card h3 a').focus()")
    before = index.js("document.activeElement.getBoundingClientRect().x")
    first = index.js(FOCUS)
    index.press("ArrowDown")
    assert index.js(FOCUS) not in ("", first)
    assert index.js("document.activeElement.getBoundingClientRect().x") == before
    index.press("ArrowUp")
    assert index.js(FOCUS) == first


def test_enter_opens_the_card_and_skip_goes_to_the_content(tab, site, entries):
    tab.go(site / "index.html")
    tab.press("Tab")
    assert tab.js("document.activeElement.className") == "skip"
    tab.press("Enter")
    tab.wait("document.activeElement.id", "main")
    assert len(tab.js(SHOWN)) == len(entries)
    tab.press("/")
    tab.type("rmnp")
    tab.press("ArrowDown")
    first = tab.js(SHOWN)[0]
    tab.visited.add((site / "papers" / f"{first}.html").as_uri())
    tab.press("Enter")
    tab.wait("document.body?.className", "paper")
    assert tab.js("document.querySelector('h1').textContent") == entries[first].paper.title

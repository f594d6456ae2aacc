# ruff: noqa: S314 (what is parsed is our own)
"""The Atom feeds, held against RFC 4287: required elements, stable ids, true dates, escaping."""

import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from html.parser import HTMLParser
from urllib.parse import urljoin

import fake_papers as fakes
import pytest
from test_page import HOSTILE, hostile
from test_result import record

from stiefel.atlas.entry import read_entry
from stiefel.atlas.feeds import feed, feeds, topic_feeds, urn

ATOM = "{http://www.w3.org/2005/Atom}"
# RFC 3339, as RFC 4287 (3.3) wants it: with the T, and Z or an offset.
DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")

waiting = fakes.make("waiting", fakes.quick_experiment, published="2024-02", topic="Other things")
odd = fakes.make("odd", fakes.quick_experiment, title="bell \x07 and \ud800 end", topic="a/../b?")


def entry_of(folder, values, *, paper=fakes.quick, **changes):
    for seed, value in enumerate(values):
        record(seed, {"ratio": value}, paper=paper, **changes).save(folder)
    return read_entry(folder, paper)


@pytest.fixture
def entries(tmp_path):
    late = entry_of(
        tmp_path, [0.5, 0.6, 0.7], paper=hostile, started="2026-03-01T10:00:00.000+02:00"
    )
    return [entry_of(tmp_path, [0.5, 0.6, 0.7]), late, read_entry(tmp_path, waiting)]


def parsed(text):
    """A feed that keeps the rules of RFC 4287, as an element."""
    root = ET.fromstring(text.encode())
    assert root.tag == f"{ATOM}feed"
    for element in [root, *root.findall(f"{ATOM}entry")]:
        for name in ("id", "title", "updated"):
            assert len(element.findall(ATOM + name)) == 1
        assert DATE.fullmatch(element.findtext(f"{ATOM}updated"))
        assert element.findtext(f"{ATOM}id").startswith("urn:uuid:")
        assert len(element.findall(f"{ATOM}link[@rel='alternate']")) == 1
        assert element.findtext(f"{ATOM}author/{ATOM}name")
    assert len(root.findall(f"{ATOM}link[@rel='self']")) == 1
    ids = [element.text for element in root.iter(f"{ATOM}id")]
    assert len(ids) == len(set(ids))
    return root


def titles(root):
    return [e.findtext(f"{ATOM}title") for e in root.findall(f"{ATOM}entry")]


def times(root):
    return [
        datetime.fromisoformat(e.findtext(f"{ATOM}updated")) for e in root.findall(f"{ATOM}entry")
    ]


def test_the_newest_measurement_comes_first(entries):
    root = parsed(feed(entries))
    assert titles(root) == [
        f"{HOSTILE}: not reproduced",
        "The quick paper: reproduced",
        "The waiting paper: not run yet",
    ]
    assert times(root) == [
        datetime(2026, 3, 1, 8, tzinfo=UTC),
        datetime(2026, 1, 2, 3, 4, 2, tzinfo=UTC),
        datetime(2024, 2, 1, tzinfo=UTC),
    ]
    assert datetime.fromisoformat(root.findtext(f"{ATOM}updated")) == times(root)[0]


def test_dates_are_compared_as_times_not_as_words(tmp_path):
    early = entry_of(tmp_path, [0.5], started="2026-03-01T12:00:00+09:00")
    late = entry_of(tmp_path, [0.5], paper=hostile, started="2026-03-01T11:00:00+00:00")
    assert titles(parsed(feed([early, late])))[0].startswith("<script>")


def test_a_topic_has_a_feed_of_its_own(entries, tmp_path):
    got = feeds([*entries, read_entry(tmp_path, odd)])
    assert list(got) == [
        "feed.xml",
        "feeds/testing.xml",
        "feeds/script-alert-x-script-quoted-7-7.xml",
        "feeds/other-things.xml",
        "feeds/a-b.xml",
    ]
    assert topic_feeds(entries)["testing"] == "feeds/testing.xml"
    ids = {parsed(text).findtext(f"{ATOM}id") for text in got.values()}
    assert len(ids) == len(got)
    assert titles(parsed(got["feeds/testing.xml"])) == ["The quick paper: reproduced"]
    assert parsed(got["feeds/testing.xml"]).findtext(f"{ATOM}title").endswith(": testing")


def test_links_lead_to_the_page_from_where_the_feed_is(entries):
    own = "https://example.org/atlas/"
    for base in ("", own, own.rstrip("/")):
        for place, text in feeds(entries, base_url=base).items():
            root = parsed(text)
            (self_link,) = root.findall(f"{ATOM}link[@rel='self']")
            assert urljoin(own + place, self_link.get("href")) == own + place
            assert urljoin(own + place, root.find(f"{ATOM}link[@rel='alternate']").get("href")) == (
                own + "index.html"
            )
            for element in root.findall(f"{ATOM}entry"):
                target = urljoin(own + place, element.find(f"{ATOM}link").get("href"))
                assert re.fullmatch(own + "papers/(quick|hostile|waiting).html", target)


def test_ids_stay_and_updated_moves_when_a_paper_is_measured_again(tmp_path):
    def seen(entry):
        (element,) = parsed(feed([entry])).findall(f"{ATOM}entry")
        return element.findtext(f"{ATOM}id"), element.findtext(f"{ATOM}summary")

    first = entry_of(tmp_path, [0.8, 1.0, 1.2], started="2026-01-01T00:00:00+00:00")
    before, said = seen(first)
    assert before == urn("paper/quick") == "urn:uuid:e6576d53-465e-5390-8897-165896845856"
    assert "inconclusive" in said
    assert "Changed" not in said
    second = entry_of(tmp_path, [0.5, 0.6, 0.7], started="2026-02-01T00:00:00+00:00")
    after, said = seen(second)
    assert after == before
    assert "reproduced, 0.6 (0.3516 to 0.8484), claimed ≤ 0.9." in said
    assert "Changed: on 2026-01-01 it was inconclusive, 1 (" in said
    assert times(parsed(feed([second]))) > times(parsed(feed([first])))
    third = entry_of(tmp_path, [0.5, 0.6, 0.7], started="2026-03-01T00:00:00+00:00")
    assert "Unchanged since 2026-02-01." in seen(third)[1]


def test_hostile_words_stay_words(entries):
    texts = feeds(entries)
    (element,) = [
        e
        for e in parsed(texts["feed.xml"]).findall(f"{ATOM}entry")
        if e.findtext(f"{ATOM}title").startswith(HOSTILE)
    ]
    assert element.find(f"{ATOM}category").get("term") == HOSTILE
    content = element.find(f"{ATOM}content")
    assert content.get("type") == "html"
    tags, words = set(), []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.add((tag, *attributes))
    reader.handle_data = words.append
    reader.feed(content.text)
    reader.close()
    assert tags == {(t,) for t in ("p", "table", "tr", "th", "td", "pre", "code")}
    assert "".join(words).count(HOSTILE) == 2  # summary and claim


def test_what_xml_cannot_hold_is_replaced(tmp_path):
    (title,) = titles(parsed(feed([read_entry(tmp_path, odd)])))
    assert title == "bell � and � end: not run yet"


def test_a_feed_of_nothing_and_of_a_strange_date(tmp_path):
    assert titles(parsed(feed([]))) == []
    entry = entry_of(tmp_path, [0.5], started="yesterday")
    assert times(parsed(feed([entry]))) == [datetime(1970, 1, 1, tzinfo=UTC)]


def test_the_same_entries_give_the_same_bytes(entries):
    assert feeds(entries) == feeds(entries)

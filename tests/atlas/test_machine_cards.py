"""The cards for machines: the numbers of the results, the same bytes, valid JSON and Markdown."""

import json
import math
import re

import fake_papers as fakes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_page import HOSTILE, hostile
from test_result import record

from stiefel.atlas.cards import SCHEMA, card, dumps, index, markdown, write_machine_files
from stiefel.atlas.entry import read_entry
from stiefel.papers import Claim, Scale, Verdict

waiting = fakes.make("waiting", fakes.quick_experiment, code=None, arxiv="", data="images")


def entry_of(folder, values, *, paper=fakes.quick, **changes):
    for seed, value in enumerate(values):
        record(seed, {"ratio": value}, paper=paper, **changes).save(folder)
    return read_entry(folder, paper)


@pytest.fixture
def entries(tmp_path):
    made = [entry_of(tmp_path / "r", [0.5, 0.6, 0.7], paper=p) for p in (fakes.quick, hostile)]
    return [*made, read_entry(tmp_path / "r", waiting)]


def rendered(text):
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def words(html):
    """The text that a reader sees."""
    from html import unescape

    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_a_card_says_what_was_measured(entries):
    got = card(entries[0])
    (claim,) = got["claims"]
    assert claim["text"] == "the ratio stays small"
    assert (claim["metric"], claim["relation"], claim["bound"]) == ("ratio", "<=", 0.9)
    assert claim["value"] == pytest.approx(0.6)
    # Student's t with two degrees of freedom: 4.302653 · 0.1 / √3.
    assert claim["interval"] == pytest.approx([0.6 - 0.2484138, 0.6 + 0.2484138], abs=1e-6)
    assert claim["verdict"] == got["verdict"] == "reproduced"
    assert got["margin"] == pytest.approx(0.3 / 0.2484138, rel=1e-5)
    assert got["schema"] == SCHEMA
    assert got["seeds"] == [0, 1, 2]
    assert [m["metrics"] for m in got["measurements"]] == [{"ratio": v} for v in (0.5, 0.6, 0.7)]
    assert got["seconds"] == 33.0
    assert got["peak_rss_mb"] == 102.0
    assert got["machine"] == {"cpu": "Some CPU", "cores": 2, "system": "Linux 6 x86_64"}
    assert got["commit"] == "abc123"
    assert got["measured"] == "2026-01-02T03:04:02.000+00:00"
    assert got["command"] == "stiefel reproduce quick --scale laptop --seeds 0,1,2"
    assert got["snippet"] == fakes.quick.snippet + "\n"
    assert got["api"] == ["stiefel.optim.RMNP"]
    assert got["changes"] is None
    assert got["links"]["page"] == "papers/quick.html"
    assert got["links"]["arxiv"] == "https://arxiv.org/abs/2503.00001"
    for part in ("seed%201%3A%200.6", "abc123", "Some%20CPU"):
        assert part in got["links"]["report"]


def test_links_are_relative_to_the_file_that_has_them(entries, tmp_path):
    out = tmp_path / "page"
    write_machine_files(entries, out)
    (out / "papers").mkdir()
    for entry in entries:
        (out / f"papers/{entry.paper.slug}.html").write_text("")
    files = [(out, c) for c in json.loads((out / "index.json").read_text())["cards"]]
    files += [(p.parent, json.loads(p.read_text())) for p in (out / "cards").glob("*.json")]
    assert len(files) == 6
    for folder, got in files:
        for name in ("page", "json", "markdown"):
            assert (folder / got["links"][name]).is_file()
    feeds = json.loads((out / "index.json").read_text())["feeds"]
    assert (out / feeds["all"]).is_file()
    assert all((out / place).is_file() for place in feeds["topics"].values())


def test_a_paper_that_was_not_run_has_none_for_numbers(entries):
    got = card(entries[2])
    assert got["verdict"] == got["claims"][0]["verdict"] == "not run yet"
    assert got["claims"][0]["value"] is None
    assert got["claims"][0]["interval"] == [None, None]
    assert got["data"] == "images"
    for name in ("margin", "seconds", "measured", "machine", "commit", "scale"):
        assert got[name] is None
    assert got["seeds"] == got["measurements"] == []
    assert got["links"]["arxiv"] is got["links"]["code"] is None
    assert "not run yet" in markdown(got)


def test_what_json_cannot_say_is_null(tmp_path):
    got = card(entry_of(tmp_path, [math.inf, math.nan]))
    assert got["claims"][0]["value"] is None
    assert [m["metrics"]["ratio"] for m in got["measurements"]] == [None, None]
    json.loads(dumps(got), parse_constant=lambda c: pytest.fail(c))
    with pytest.raises(ValueError, match="JSON"):
        dumps(math.nan)


def test_crashed_seeds_are_named(tmp_path):
    folder = tmp_path / "quick/laptop"
    folder.mkdir(parents=True)
    (folder / "1.error.txt").write_text("Traceback\nValueError: a < b\n")
    got = card(read_entry(tmp_path, fakes.quick))
    assert got["verdict"] == Verdict.FAILED.value
    assert got["errors"] == {"1": "ValueError: a < b"}
    assert "Seed 1 failed: ValueError: a < b" in words(rendered(markdown(got)))


def test_changes_since_the_run_before(tmp_path):
    entry_of(tmp_path, [0.8, 1.0, 1.2], started="2026-01-01T00:00:00+00:00", code="old")
    entry = entry_of(tmp_path, [0.5, 0.6, 0.7])
    got = card(entry)["changes"]
    (change,) = got["claims"]
    assert (got["date"], got["seeds"], got["same_code"]) == ("2026-01-01", [0, 1, 2], False)
    assert change["kind"] == "verdict"
    assert change["before"]["verdict"] == "inconclusive"
    assert change["before"]["value"] == pytest.approx(1.0)
    text = words(rendered(markdown(card(entry))))
    assert "Since 2026-01-01" in text
    assert "inconclusive → reproduced" in text


def test_the_index_has_every_card_in_order(entries):
    got = index(entries)
    assert [c["slug"] for c in got["cards"]] == ["quick", "hostile", "waiting"]
    assert got["cards"] == [card(entry) for entry in entries]
    assert got["updated"] == "2026-01-02T03:04:02.000+00:00"
    assert index([])["updated"] is None


def test_files_are_ascii_sorted_and_the_same_each_time(entries, tmp_path):
    once = write_machine_files(entries, tmp_path / "a")
    again = write_machine_files(entries, tmp_path / "b")
    names = [p.relative_to(tmp_path / "a").as_posix() for p in once]
    assert names[0] == "cards/quick.json"
    assert names[-1] == "index.json"
    assert {p.relative_to(tmp_path / "b").as_posix() for p in again} == set(names)
    assert {p for p in (tmp_path / "a").rglob("*") if p.is_file()} == set(once)
    for first, second in zip(once, again, strict=True):
        assert first.read_bytes() == second.read_bytes()
        if first.suffix == ".json":
            keys = list(json.loads(first.read_bytes().decode("ascii")))
            assert keys == sorted(keys)
    assert dumps({"b": "é", "a": 1}) == '{\n "a": 1,\n "b": "\\u00e9"\n}\n'


def test_a_slug_twice_is_refused(entries, tmp_path):
    with pytest.raises(ValueError, match=r"twice: \['quick'\]"):
        write_machine_files([entries[0], entries[0]], tmp_path)
    assert list(tmp_path.glob("cards/*")) == []


def test_markdown_is_a_heading_a_table_and_code(entries):
    html = rendered(markdown(card(entries[0], root="../")))
    assert html.startswith("<h1>The quick paper</h1>")
    assert html.count("<tr>") == 2
    assert "0.6 (0.3516 to 0.8484)" in words(html)
    assert "33 s in all" in words(html)
    code = re.findall(r"<pre><code[^>]*>(.*?)</code></pre>", html, re.DOTALL)
    assert code == [
        fakes.quick.snippet + "\n",
        "stiefel reproduce quick --scale laptop --seeds 0,1,2\n",
    ]
    assert '<a href="../papers/quick.html">page</a>' in html


def test_hostile_words_stay_words(entries):
    html = rendered(markdown(card(entries[1])))
    assert "<script" not in html
    assert words(html).count(HOSTILE) == 7  # title, authors, topic, summary, claim, note, snippet
    assert html.count("<h1>") == 1


@given(st.text(alphabet="a_*`[]()<>|~&#-+=1.\\! \n", min_size=1, max_size=20))
def test_any_words_come_back_from_markdown(text):
    claim = Claim(text, "ratio", at_least=0.9)
    paper = fakes.make("any", fakes.quick_experiment, title=text, notes=(text,), claim=claim)
    from stiefel.atlas.entry import Entry

    html = rendered(markdown(card(Entry(paper, None, None, ()))))
    want = " ".join(text.split())
    for pattern in ("<h1>(.*?)</h1>", "<td>(.*?)</td>", "<ul>\n<li>(.*?)</li>\n</ul>\n<h2>Use"):
        found = re.search(pattern, html, re.DOTALL)
        assert found, (pattern, html)
        from html import unescape

        assert " ".join(unescape(found[1]).split()) == want


def test_numbers_of_the_index_are_those_of_the_results(tmp_path):
    """Another way to the same numbers: straight from the files, by definition."""
    entry_of(tmp_path, [0.2, 0.4, 0.9, 0.3])
    files = sorted((tmp_path / "quick" / Scale.LAPTOP.value).glob("?.json"))
    values = [json.loads(f.read_text())["metrics"]["ratio"] for f in files]
    mean = sum(values) / 4
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4)
    (claim,) = card(read_entry(tmp_path, fakes.quick))["claims"]
    assert claim["value"] == pytest.approx(mean)
    assert claim["interval"] == pytest.approx([mean - 3.1824463 * error, mean + 3.1824463 * error])

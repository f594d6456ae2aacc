# ruff: noqa: S314 (what is parsed is our own)
"""The page: whole, closed to the outside, and the same for the same results."""

import base64
import dataclasses
import hashlib
import re
import sys
import xml.etree.ElementTree as ET
from datetime import datetime
from html.parser import HTMLParser

import fake_papers as fakes
import pytest
from test_result import record

from stiefel.atlas import build_page
from stiefel.atlas.page import MissingPackageError, read_entry, shown_papers
from stiefel.papers import Claim, Scale

VOID = {"meta", "link", "br", "input", "hr", "img"}
HOSTILE = "<script>alert(\"x\")</script> & 'quoted' {{ 7 * 7 }}"

hostile = fakes.make(
    "hostile",
    fakes.quick_experiment,
    title=HOSTILE,
    authors=HOSTILE,
    topic=HOSTILE,
    summary=HOSTILE,
    notes=(HOSTILE,),
    snippet=HOSTILE,
    claim=Claim(HOSTILE, "ratio", at_least=0.9),
    code='https://example.org/?a=1&b="><script>',
)
waiting = fakes.make("waiting", fakes.quick_experiment, code=None, published="2024-02")


def broken_figure(measurements):
    raise ZeroDivisionError("<no> figure")


broken = fakes.make("broken", fakes.quick_experiment, figure=broken_figure, topic="other")
crashed = fakes.make("crashed", fakes.quick_experiment)
quick = dataclasses.replace(fakes.quick, data="numbers")
PAPERS = [quick, hostile, waiting, broken, crashed]


class Page(HTMLParser):
    """Checks that tags match while it reads; keeps what the tests ask about."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.raw = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            self.raw.setdefault(self.open[-1], []).append(data)
        else:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    results, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("site")
    for paper in (fakes.quick, hostile, broken):
        for seed in range(3):
            record(seed, {"ratio": 0.5 + seed / 10, "extra": 2.0}, paper=paper).save(results)
    (results / "crashed/laptop").mkdir(parents=True)
    (results / "crashed/laptop/1.error.txt").write_text("Traceback\nValueError: a < b\n")
    index = build_page(results, out, papers=PAPERS)
    assert index == out / "index.html"
    return results, out


@pytest.fixture(scope="module")
def pages(site):
    out = site[1]
    return {p.relative_to(out).as_posix(): p.read_text() for p in sorted(out.rglob("*.html"))}


def test_one_file_a_paper_an_index_and_a_feed(site):
    names = {p.relative_to(site[1]).as_posix() for p in site[1].rglob("*") if p.is_file()}
    assert {n for n in names if n.endswith(".html")} == {
        "index.html",
        *(f"papers/{p.slug}.html" for p in PAPERS),
    }
    assert "feed.xml" in names


def test_html_is_well_formed_and_asks_for_nothing_from_outside(pages):
    assert "cards/quick.json" in pages["papers/quick.html"]
    allowed = {"https://example.org/code", hostile.code, "https://arxiv.org/abs/2503.00001"}
    for name, text in pages.items():
        page = Page(text)
        for tag, attributes in page.tags:
            for attribute in ("src", "srcset", "poster", "action", "data", "xlink:href"):
                assert not attributes.get(attribute, ""), (name, tag, attribute)
            target = attributes.get("href") or ""
            if target.startswith("mailto:?"):
                assert attributes["class"] == "report"
            elif re.match(r"[a-z]+:|//", target) and not target.startswith("data:image/svg+xml,"):
                assert tag == "a", (name, tag, target)
                assert target in allowed
        assert not re.search(r"url\((?!#)", "".join(page.raw["style"]))
        assert "@import" not in text


def test_links_between_files_lead_somewhere(site, pages):
    for name, text in pages.items():
        for tag, attributes in Page(text).tags:
            target = (attributes.get("href") or "").partition("#")[0]
            if tag in ("a", "link") and target and not re.match(r"[a-z]+:", target):
                assert (site[1] / name).parent.joinpath(target).exists(), (name, target)


def test_policy_allows_just_what_is_there(pages):
    for text in pages.values():
        page = Page(text)
        (policy,) = [
            a["content"]
            for tag, a in page.tags
            if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
        ]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert rules["img-src"] == "data:"
        for kind in ("style", "script"):
            hashes = {
                f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'"
                for t in page.raw[kind]
            }
            assert set(rules[f"{kind}-src"].split()) == hashes
        for tag, attributes in page.tags:
            assert "style" not in attributes, tag  # the policy would drop it
            assert not [name for name in attributes if name.startswith("on")], tag


def test_hostile_words_stay_words(pages):
    for name in ("index.html", "papers/hostile.html"):
        page = Page(pages[name])
        assert HOSTILE in page.words
        assert len([tag for tag, _ in page.tags if tag == "script"]) == 2
        assert "49" not in page.words.split()
    assert "<script>alert" not in "".join(pages.values())


def test_ids_are_unique_and_every_reference_has_its_target(pages):
    for text in pages.values():
        page = Page(text)
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids))
        for _, attributes in page.tags:
            for value in attributes.values():
                assert set(re.findall(r"url\(#([^)]+)\)", value or "")) <= set(ids)
            if (attributes.get("href") or "").startswith("#"):
                assert attributes["href"][1:] in ids


def test_index_has_a_card_a_paper_with_all_that_belongs_on_it(pages):
    page = Page(pages["index.html"])
    cards = [a for tag, a in page.tags if tag == "li" and a.get("class") == "card"]
    # By topic, in each the largest margin first and last what has none.
    assert [(c["data-topic"], c["data-verdict"], c["data-margin"]) for c in cards] == [
        ("testing", "reproduced", "1.208"),
        ("testing", "not run yet", ""),
        ("testing", "failed", ""),
        (HOSTILE, "not reproduced", "-1.208"),
        ("other", "reproduced", "1.208"),
    ]
    assert cards[0] | {"data-text": ""} == {
        "class": "card",
        "data-topic": "testing",
        "data-verdict": "reproduced",
        "data-kind": "numbers",
        "data-date": "2025-03-14",
        "data-margin": "1.208",
        "data-seconds": "33.0",
        "data-text": "",
    }
    for word in ("the quick paper", "stiefel.optim.rmnp", "the ratio stays small", "numbers"):
        assert word in cards[0]["data-text"], word
    for word in (
        *("The quick paper", "14 March 2025", "February 2024", "A. Author and 2 others"),
        *("measured 0.6", "claimed ≤ 0.9", "not run yet", "5 papers", "2 reproduced", "1 failed"),
        *("stiefel reproduce waiting", "All topics (5)", "testing (3)", "not run yet (1)"),
        *("margin +1.2", "margin −1.2", "numbers (1)", "33 s"),
    ):
        assert word in page.words, word
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert "papers/quick.html" in links
    assert links.count("https://example.org/code") == 3
    figures = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert len(figures) == 2
    strips = [a for tag, a in page.tags if tag == "svg" and a.get("class") == "strip"]
    assert len(strips) == 3


def test_article_shows_claims_seeds_and_where_they_come_from(pages):
    words = Page(pages["papers/quick.html"]).words
    for word in (
        *("the ratio stays small", "0.6", "0.3516 to 0.8484", "≤ 0.9", "reproduced"),
        *("seed 0", "seed 2", "extra", "10 s", "102 MiB", "33 s for all seeds"),
        *("Some CPU, 2 cores, Linux 6 x86_64", "torch 2.13.0", "abc123", "2 January 2026"),
        *("from stiefel.optim import RMNP", "A summary. In two sentences.", "arXiv 2503.00001"),
        "stiefel reproduce quick --scale laptop --seeds 0,1,2",
        "The mean lies 1.2 half-widths of its interval beyond the bound.",
        "seed 0: 0.5 · seed 1: 0.6 · seed 2: 0.7",
        "stiefel.optim.RMNP",
        "Took 33 s for all seeds, one core each, on Some CPU",
        "No earlier run is kept with these results.",
        "Report a disagreeing result",
    ):
        assert word in words, word


def test_article_without_results_and_with_a_crash(pages):
    words = Page(pages["papers/waiting.html"]).words
    assert "not run yet" in words
    assert "Nothing has been measured here" in words
    assert "Authors’ code" not in words
    words = Page(pages["papers/crashed.html"]).words
    assert "failed" in words
    assert "Seed 1: ValueError: a < b" in words


def test_a_figure_that_fails_costs_only_itself(pages):
    assert (
        "cannot be drawn: ZeroDivisionError: <no> figure" in Page(pages["papers/broken.html"]).words
    )


def test_the_same_results_give_the_same_bytes(site, tmp_path, monkeypatch):
    results, out = site
    monkeypatch.setattr("stiefel.atlas.page._drawn", {})
    build_page(results, tmp_path, papers=PAPERS)
    for path in out.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(out)).read_bytes(), path


def test_feed_is_atom(site, tmp_path):
    atom = "{http://www.w3.org/2005/Atom}"
    root = ET.fromstring((site[1] / "feed.xml").read_text())
    assert root.tag == f"{atom}feed"
    for element in [root, *root.findall(f"{atom}entry")]:
        for name in ("id", "title", "updated"):
            assert len(element.findall(atom + name)) == 1
        assert datetime.fromisoformat(element.findtext(f"{atom}updated")).tzinfo is not None
        assert element.findtext(f"{atom}id").startswith("urn:uuid:")
    assert root.find(f"{atom}author/{atom}name") is not None
    entries = root.findall(f"{atom}entry")
    assert len(entries) == len({e.findtext(f"{atom}id") for e in entries}) == len(PAPERS)
    times = [e.findtext(f"{atom}updated") for e in entries]
    assert times == sorted(times, reverse=True)
    assert root.findtext(f"{atom}updated") == times[0]
    assert f"{HOSTILE}: not reproduced" in [e.findtext(f"{atom}title") for e in entries]
    build_page(site[0], tmp_path, papers=[fakes.quick], base_url="https://example.org/atlas")
    root = ET.fromstring((tmp_path / "feed.xml").read_text())
    assert [link.get("href") for link in root.iter(f"{atom}link")] == [
        f"https://example.org/atlas/{name}"
        for name in ("feed.xml", "index.html", "papers/quick.html")
    ]


def test_the_largest_scale_is_shown(tmp_path):
    assert read_entry(tmp_path, fakes.quick).verdict == "not run yet"
    for scale in (Scale.SMOKE, Scale.LAPTOP, Scale.PAPER):
        for seed in range(2):
            record(seed, scale=scale).save(tmp_path)
        entry = read_entry(tmp_path, fakes.quick)
        assert entry.scale is scale
        assert entry.verdict == ("inconclusive" if scale is Scale.SMOKE else "reproduced")


def test_records_that_do_not_answer_the_claim_are_left_out(tmp_path):
    record(0, {"something": 1.0}).save(tmp_path)
    assert read_entry(tmp_path, fakes.quick).verdict == "not run yet"


def test_no_papers_make_a_page_too(tmp_path):
    build_page(tmp_path / "none", tmp_path / "out", papers=[])
    assert "0 papers" in Page((tmp_path / "out/index.html").read_text()).words
    ET.fromstring((tmp_path / "out/feed.xml").read_text())


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError) as caught:
        build_page(tmp_path, tmp_path / "out", papers=[])
    assert str(caught.value) == (
        f'The page needs {package}, which is not installed: pip install "stiefel[atlas]"'
    )
    assert not (tmp_path / "out").exists()


def test_papers_from_elsewhere_come_after_stiefels(monkeypatch):
    monkeypatch.setattr("stiefel.atlas.page.all_papers", lambda: (waiting, fakes.quick))
    assert shown_papers([fakes.quick, hostile]) == [waiting, fakes.quick, hostile]

"""What the page is made of: margins, API names, the kept history, the report, sizes."""

import dataclasses
import json
import math
import re
import zlib
from email.message import Message
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import fake_papers as fakes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_result import record

from stiefel.atlas import build_page
from stiefel.atlas.api import api_names, place, read_inventory
from stiefel.atlas.article import changes
from stiefel.atlas.entry import margin, read_entry
from stiefel.atlas.record import KEPT, history_path, load_earlier
from stiefel.atlas.report import issue_address, report_link, report_text
from stiefel.papers import Claim, Measurement, Scale, Verdict, all_papers

ROOT = Path(__file__).resolve().parents[2]
finite = st.floats(-1e6, 1e6)


# Margins ---------------------------------------------------------------------------------------


@given(values=st.lists(finite, min_size=2, max_size=5), bound=finite, upper=st.booleans())
def test_the_margin_says_the_verdict(values, bound, upper):
    claim = Claim("c", "m", at_most=bound) if upper else Claim("c", "m", at_least=bound)
    judgement = claim.judge([Measurement(i, {"m": v}) for i, v in enumerate(values)])
    found = margin(judgement)
    near = 1e-6 * (abs(found) + 1)
    if found > 1 + near:
        assert judgement.verdict is Verdict.REPRODUCED
    elif found < -1 - near:
        assert judgement.verdict is Verdict.NOT_REPRODUCED
    elif abs(found) < 1 - near:
        assert judgement.verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    ("values", "bound", "want"),
    [
        # Student's t over two seeds: half-width 12.7062 · s / √2 = 12.7062 · 0.5.
        ([1.0, 2.0], 1.5 + 12.706204736 / 2, 1.0),
        ([1.0, 2.0], 1.5, 0.0),
        ([1.0, 2.0], 1.5 - 12.706204736, -2.0),
        ([2.0, 2.0], 2.0, 1.0),
        ([2.0, 2.0], 3.0, math.inf),
        ([2.0, 2.0], 1.0, -math.inf),
        ([2.0], 3.0, math.nan),
        ([2.0, math.nan], 3.0, math.nan),
    ],
)
def test_margin(values, bound, want):
    measurements = [Measurement(i, {"m": v}) for i, v in enumerate(values)]
    assert margin(Claim("c", "m", at_most=bound).judge(measurements)) == pytest.approx(
        want, nan_ok=True, abs=1e-8
    )


# Names of the library --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("snippet", "names"),
    [
        (
            "from stiefel.optim import RMNP, split as s",
            ("stiefel.optim.RMNP", "stiefel.optim.split"),
        ),
        ("import stiefel\nstiefel.nn.S4D(3).x.y", ("stiefel.nn.S4D",)),
        ("import stiefel.nn as nn\nnn.S4D.from_x(nn.B)", ("stiefel.nn.S4D.from_x", "stiefel.nn.B")),
        ("import torch\nfrom stiefelish import x\ntorch.nn.Linear", ()),
        ("stiefel reproduce rmnp --scale smoke", ()),
    ],
)
def test_api_names(snippet, names):
    assert api_names(snippet) == names


def inventory(folder, *lines, head=b"# Sphinx inventory version 2"):
    folder.mkdir(parents=True, exist_ok=True)
    rest = b"\n# Project: x\n# Version: 1\n# zlib\n" + zlib.compress("\n".join(lines).encode())
    (folder / "objects.inv").write_bytes(head + rest)


def test_names_are_linked_to_the_documentation(tmp_path):
    inventory(
        tmp_path / "my docs",
        "stiefel.optim.RMNP py:class 1 api/optim.html#$ -",
        "stiefel.optim py:module 0 api/optim.html#module-$ -",
        "index std:doc -1 index.html The start",
    )
    places = read_inventory(tmp_path / "my docs")
    assert places == {
        "stiefel.optim.RMNP": "api/optim.html#stiefel.optim.RMNP",
        "stiefel.optim": "api/optim.html#module-stiefel.optim",
    }
    assert place("stiefel.optim.split", places) == "api/optim.html#module-stiefel.optim"
    assert place("stiefel.nn.S4D", places) is None
    for docs, want in (("my docs", True), ("elsewhere", False)):
        build_page(tmp_path / "r", tmp_path / "out", papers=[fakes.quick], docs=tmp_path / docs)
        text = (tmp_path / "out/papers/quick.html").read_text()
        link = '<a href="../../my%20docs/api/optim.html#stiefel.optim.RMNP">'
        assert (link in text) == want
        assert "<code>stiefel.optim.RMNP</code>" in text


@pytest.mark.parametrize("content", [b"# Sphinx inventory version 1\nx", b"no line"])
def test_a_damaged_inventory_is_refused(tmp_path, content):
    (tmp_path / "objects.inv").write_bytes(content + b"\n")
    with pytest.raises(ValueError, match=r"objects\.inv"):
        read_inventory(tmp_path)
    inventory(tmp_path)
    path = tmp_path / "objects.inv"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="damaged"):
        read_inventory(tmp_path)


# What was there before -------------------------------------------------------------------------


def run(out, values, *, code, day):
    for seed, value in enumerate(values):
        record(
            seed,
            {"ratio": value},
            key=f"{code}-{seed}",
            code=code,
            commit=f"commit-{code}",
            started=f"2026-01-{day:02d}T03:04:0{seed}.000+00:00",
        ).save(out)


def test_what_is_replaced_is_kept_and_shown(tmp_path):
    run(tmp_path, [0.5, 0.51, 0.52], code="a", day=1)
    assert not history_path(tmp_path, "quick", Scale.LAPTOP).exists()
    assert changes(read_entry(tmp_path, fakes.quick)) is None
    run(tmp_path, [0.5, 0.51, 0.52], code="a", day=1)  # the same records again replace nothing
    assert load_earlier(tmp_path, "quick", Scale.LAPTOP) == []
    run(tmp_path, [1.5, 1.51, 1.52], code="b", day=2)
    found = changes(read_entry(tmp_path, fakes.quick))
    assert (found.seeds, found.date, found.commit, found.same_code) == (
        (0, 1, 2),
        "2026-01-01",
        "commit-a",
        False,
    )
    (change,) = found.claims
    assert change.kind == "verdict"
    assert change.before.value == pytest.approx(0.51)
    assert change.now.value == pytest.approx(1.51)
    build_page(tmp_path, tmp_path / "out", papers=[fakes.quick])
    text = " ".join((tmp_path / "out/papers/quick.html").read_text().split())
    for word in ("0.51 (0.4852 to 0.5348)", "1.51 (1.485 to 1.535)", "1 January 2026"):
        assert word in text
    assert "<strong>reproduced → not reproduced</strong>" in text
    run(tmp_path, [1.5, 1.51, 1.52], code="b", day=3)  # forced, with the same outcome
    found = changes(read_entry(tmp_path, fakes.quick))
    assert found.same_code
    assert [change.kind for change in found.claims] == ["same"]


def test_the_history_is_capped_and_of_one_code(tmp_path):
    for day in range(1, KEPT + 5):
        run(tmp_path, [float(day), math.inf], code=f"c{day}", day=day)
    content = json.loads(history_path(tmp_path, "quick", Scale.LAPTOP).read_text())
    assert [e["metrics"]["ratio"] for e in content["0"]] == [4.0, 5.0, 6.0, 7.0, 8.0]
    assert load_earlier(tmp_path, "quick", Scale.LAPTOP)[1].metrics == {"ratio": math.inf}
    # Seed 0 alone is run once more: what the other gave is of older code than what 0 gave.
    run(tmp_path, [1.0], code="d", day=20)
    assert [e.seed for e in load_earlier(tmp_path, "quick", Scale.LAPTOP)] == [0]


def test_a_damaged_history_costs_only_itself(tmp_path, caplog):
    run(tmp_path, [0.5, 0.6], code="a", day=1)
    history_path(tmp_path, "quick", Scale.LAPTOP).write_text('{"0": 3}')
    assert read_entry(tmp_path, fakes.quick).verdict == "inconclusive"
    assert "is not a history of results" in caplog.text
    run(tmp_path, [0.7, 0.8], code="b", day=2)
    assert [e.seed for e in load_earlier(tmp_path, "quick", Scale.LAPTOP)] == [0, 1]


# The report ------------------------------------------------------------------------------------


def test_the_report_has_machine_commit_and_numbers(tmp_path):
    run(tmp_path, [0.5, 0.6, 0.7], code="a", day=1)
    entry = read_entry(tmp_path, fakes.quick)
    text = report_text(entry)
    for line in (
        *("Verdict: reproduced", "Mean: 0.6 (95 %: 0.3516 to 0.8484)", "Commit: commit-a"),
        *("Seeds: seed 0: 0.5, seed 1: 0.6, seed 2: 0.7", "Metric: ratio ≤ 0.9"),
        *("Machine: Some CPU, 2 cores, Linux 6 x86_64", f"Command: {entry.command}", "Machine:"),
    ):
        assert line in text.splitlines(), line
    for address in (None, "https://example.org/issues"):
        parts = urlsplit(report_link(entry, address))
        assert parts.scheme == ("mailto" if address is None else "https")
        assert parts.path == ("" if address is None else "/issues/new")
        fields = parse_qs(parts.query)
        assert fields["body"][0].replace("\r\n", "\n") == text
        assert len(parts.query) < 2000  # what browsers hand on to mail programs


@pytest.mark.parametrize(
    ("urls", "want"),
    [
        ([], None),
        (["Homepage, https://example.org"], None),
        (["Issues, https://example.org/issues/"], "https://example.org/issues"),
        (["Bug Tracker, javascript:alert(1)"], None),
    ],
)
def test_only_the_project_names_its_tracker(monkeypatch, urls, want):
    message = Message()
    for url in urls:
        message["Project-URL"] = url
    monkeypatch.setattr("stiefel.atlas.report.metadata.metadata", lambda _: message)
    assert issue_address() == want


def test_the_page_uses_the_tracker(tmp_path, monkeypatch):
    monkeypatch.setattr("stiefel.atlas.article.issue_address", lambda: "https://example.org/i")
    build_page(tmp_path / "r", tmp_path / "out", papers=[fakes.quick])
    text = (tmp_path / "out/papers/quick.html").read_text()
    assert 'href="https://example.org/i/new?title=quick' in text
    assert "its receiver is yours" not in text


# The papers ------------------------------------------------------------------------------------


def test_every_paper_says_what_it_is_measured_on():
    assert {paper.slug: paper.data for paper in all_papers() if not paper.data} == {}
    kinds = {paper.data for paper in all_papers()}
    assert len(kinds) <= 8  # a filter, not a second title
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)*", kind) for kind in kinds)


def test_every_paper_names_what_to_import():
    assert {paper.slug for paper in all_papers() if not api_names(paper.snippet)} == set()


def test_the_page_of_the_reference_results_is_small(tmp_path):
    index = build_page(ROOT / "results", tmp_path).read_text()
    picture = re.compile(r'<svg [^>]*role="img".*?</svg>', re.DOTALL)
    assert len(picture.sub("", index).encode()) <= 300_000
    figures = 0
    for path in tmp_path.rglob("*.html"):
        text = path.read_text()
        assert "cannot be drawn" not in text, path.name
        for figure in picture.findall(text):
            figures += 1
            assert len(figure.encode()) <= 80_000, path.name
    measured = [p for p in all_papers() if (ROOT / "results" / p.slug).is_dir()]
    assert figures == 2 * len(measured)
    # Every headline on the page is that of the results.
    for paper in measured:
        entry = read_entry(ROOT / "results", paper)
        words = (tmp_path / "papers" / f"{paper.slug}.html").read_text()
        for m in entry.result.measurements:
            value = f"{m.metrics[paper.claim.metric]:.4g}".replace("-", "−")
            assert f"seed {m.seed}: {value}" in words


def test_papers_without_a_kind_are_shown_too(tmp_path):
    bare = dataclasses.replace(fakes.quick, data="")
    text = build_page(tmp_path / "r", tmp_path / "out", papers=[bare]).read_text()
    assert "<span>testing</span>" in text

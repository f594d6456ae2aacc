"""Running papers: results, resuming, crashes, sharing. Each run here starts real processes."""

import io
import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import fake_papers as fakes
import pytest
import torch
from rich.console import Console

from stiefel.atlas import build_page, reproduce
from stiefel.papers import Verdict

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the fake papers leave their traces."""
    path = tmp_path_factory.mktemp("traces")
    before = os.environ.get("STIEFEL_TEST_DIR")
    os.environ["STIEFEL_TEST_DIR"] = str(path)
    yield path
    if before is None:
        del os.environ["STIEFEL_TEST_DIR"]
    else:
        os.environ["STIEFEL_TEST_DIR"] = before


def run(papers, out, **options):
    console = Console(file=io.StringIO(), width=200)
    results = reproduce(papers, out=out, console=console, **options)
    return results, console.file.getvalue()


@pytest.fixture(scope="module")
def first(folder, tmp_path_factory):
    """One run of four papers, two of which fail."""
    out = tmp_path_factory.mktemp("first") / "results"
    order = []
    papers = [fakes.quick, fakes.crash, fakes.killed, fakes.local]
    results, log = run(
        papers, out, seeds=(0, 1), jobs=2, on_result=lambda result: order.append(result.slug)
    )
    return out, {r.slug: r for r in results}, log, order, [r.slug for r in results]


def test_results_come_in_the_order_asked_and_papers_finish_cheapest_first(first):
    _, _, log, order, returned = first
    assert returned == ["quick", "crash", "killed", "local"]
    starts = [line for line in log.splitlines() if line.endswith("started")]
    assert starts[:4] == [
        f"{slug} seed {seed}: started" for slug in ("killed", "crash") for seed in (0, 1)
    ]
    assert order.index("killed") < order.index("quick")


def test_a_record_says_what_made_it(first):
    out, results, *_ = first
    content = json.loads((out / "quick/laptop/1.json").read_text())
    assert content["metrics"] == {"ratio": 0.71, "nothing": "nan"}
    assert content["series"] == {"loss": [3.0, 2.0, 2.0]}
    assert content["config"] == {"threads": "1", "torch_threads": 1, "scale": "laptop"}
    assert (content["slug"], content["scale"], content["seed"]) == ("quick", "laptop", 1)
    assert content["versions"]["torch"] == torch.__version__
    assert set(content["versions"]) == {"python", "torch", "numpy", "stiefel"}
    assert set(content["machine"]) == {"cpu", "cores", "system"}
    assert content["machine"]["cores"] >= 1
    assert 0 < content["seconds"] < 60
    assert 20 < content["peak_rss_mb"] < 5000
    age = datetime.now(UTC) - datetime.fromisoformat(content["started"])
    assert 0 <= age.total_seconds() < 600
    assert results["quick"].commit == content["commit"]


def test_verdicts_and_what_went_wrong(first):
    _, results, *_ = first
    assert results["quick"].verdict is Verdict.REPRODUCED
    assert results["quick"].seeds == (0, 1)
    for slug in ("crash", "killed", "local"):
        assert results[slug].verdict is Verdict.FAILED
        assert results[slug].claims[0].verdict is Verdict.FAILED
    assert results["crash"].errors == {1: "RuntimeError: the <matrix> broke"}
    assert [m.seed for m in results["crash"].measurements] == [0]
    assert "killed by SIGKILL" in results["killed"].errors[0]
    assert "Can't pickle" in results["local"].errors[0]


def test_a_crash_leaves_its_traceback_and_the_other_seeds(first):
    out, _, log, *_ = first
    text = (out / "crash/laptop/1.error.txt").read_text()
    assert "Traceback" in text
    assert "fake_papers.py" in text
    assert text.rstrip().endswith("RuntimeError: the <matrix> broke")
    assert (out / "crash/laptop/0.json").exists()
    assert not (out / "crash/laptop/1.json").exists()
    assert "crash seed 1: failed: RuntimeError: the <matrix> broke" in log


def test_nothing_else_is_left_behind(first):
    out = first[0]
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert names == {
        "quick/laptop/0.json",
        "quick/laptop/1.json",
        "crash/laptop/0.json",
        "crash/laptop/1.error.txt",
        "killed/laptop/0.error.txt",
        "killed/laptop/1.error.txt",
        "local/laptop/0.error.txt",
        "local/laptop/1.error.txt",
    }


def test_what_is_there_is_not_made_again(first, folder):
    out = first[0]
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.json")}
    calls = (folder / "calls.txt").read_text()
    order = []
    (result,), log = run([fakes.quick], out, seeds=(0, 1), on_result=order.append)
    assert result.to_json() == first[1]["quick"].to_json()
    assert order == [result]
    assert "2 of 2 results are there already" in log
    assert (folder / "calls.txt").read_text() == calls
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.json")} == stamps


def test_only_what_is_missing_damaged_or_of_other_code_is_made(first, folder, caplog):
    out = first[0]
    path = out / "quick/laptop/0.json"
    whole = path.read_text()
    for damage in ("{", "[]", '{"slug": "quick"}', whole.replace('"quick"', '"slow"')):
        path.write_text(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build_page(out, out.parent / "page", papers=[fakes.quick])
        assert "is not a result of this program" in caplog.text
    key = json.loads(whole)["key"]
    other = out / "quick/laptop/1.json"
    other.write_text(other.read_text().replace(json.loads(other.read_text())["key"], "0" * 32))
    (folder / "calls.txt").unlink()
    (result,), _ = run([fakes.quick], out, seeds=(0, 1), jobs=2)
    assert sorted((folder / "calls.txt").read_text().splitlines()) == ["quick 0", "quick 1"]
    assert result.claims == first[1]["quick"].claims
    assert json.loads(path.read_text())["key"] == key


def test_force_makes_it_again_and_success_removes_the_traceback(first, folder):
    out = first[0]
    (folder / "mended").touch()
    before = json.loads((out / "crash/laptop/0.json").read_text())["started"]
    (result,), _ = run([fakes.crash], out, seeds=(0, 1), jobs=2, force=True)
    assert result.verdict is Verdict.REPRODUCED
    assert not list(out.rglob("crash/laptop/*.error.txt"))
    assert json.loads((out / "crash/laptop/0.json").read_text())["started"] > before


def test_what_is_unavailable_is_said_once_in_one_sentence(folder, tmp_path):
    (result,), log = run([fakes.unavailable], tmp_path, scale="paper", seeds=(0, 1, 2), jobs=1)
    assert result.verdict is Verdict.FAILED
    assert result.errors == dict.fromkeys((0, 1, 2), "needs eight GPUs, found none.")
    assert log.count("needs eight GPUs, found none.") == 1
    assert "Traceback" not in log
    assert not list(tmp_path.rglob("*.txt"))


def test_two_papers_share_what_they_both_need(folder, tmp_path):
    results, _ = run([fakes.sharing_a, fakes.sharing_b], tmp_path, seeds=(0,), jobs=2)
    assert [r.measurements[0].metrics["ratio"] for r in results] == [pytest.approx(1.3)] * 2
    assert sorted((folder / "squares.txt").read_text().split()) == ["2", "3"]
    assert len(list((tmp_path / "_shared").glob("*.json"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "huge"}, "scale must be one of smoke, laptop, paper; got 'huge'"),
        ({"seeds": ()}, "seeds must be different non-negative integers"),
        ({"seeds": (1, 1)}, "seeds must be different non-negative integers"),
        ({"seeds": (-1,)}, "seeds must be different non-negative integers"),
        ({"seeds": (0.5,)}, "seeds must be different non-negative integers"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run([fakes.quick], tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_paper_is_asked_for_once(tmp_path):
    with pytest.raises(ValueError, match="asked for twice: quick"):
        run([fakes.quick, fakes.quick], tmp_path)


def test_unknown_slugs_get_near_matches(monkeypatch, tmp_path):
    monkeypatch.setattr("stiefel.papers.all_papers", lambda: (fakes.quick, fakes.crash))
    with pytest.raises(KeyError, match=r"no paper 'quikc'\. Did you mean quick"):
        run(["quikc"], tmp_path)


def test_no_papers_give_no_results(tmp_path):
    assert run([], tmp_path)[0] == []


def test_the_environment_is_as_before(first):
    assert "NUMEXPR_NUM_THREADS" not in os.environ
    assert "stiefel.atlas.worker" in sys.modules

"""From records to a verdict, to JSON, to words."""

import json
import math

import fake_papers as fakes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiefel.atlas.record import Record, encode, failed_seeds, load, load_all, plain, result_key
from stiefel.atlas.result import combine, duration, estimate, interval, number, plus_minus
from stiefel.papers import Claim, Judgement, Measurement, Scale, Verdict

values = st.floats(allow_nan=True, allow_infinity=True)


def record(seed=0, metrics=None, *, paper=fakes.quick, scale=Scale.LAPTOP, **changes):
    fields = {
        "key": "k",
        "code": "c",
        "measurement": Measurement(
            seed, metrics or {"ratio": 0.5}, {"loss": [3.0, 2.0, 1.0]}, {"lr": 0.1}
        ),
        "seconds": 10.0 + seed,
        "peak_rss_mb": 100.0 + seed,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4", "stiefel": "0.1"},
        "machine": {"cpu": "Some CPU", "cores": 2, "system": "Linux 6 x86_64"},
        "commit": "abc123",
        "started": f"2026-01-02T03:04:0{seed}.000+00:00",
    }
    return Record(slug=paper.slug, scale=scale, seed=seed, **{**fields, **changes})


@given(
    metrics=st.dictionaries(st.text(max_size=8), values, max_size=4),
    series=st.dictionaries(st.text(max_size=8), st.lists(values, max_size=4), max_size=3),
)
def test_records_come_back_as_they_went(tmp_path_factory, metrics, series):
    out = tmp_path_factory.mktemp("out")
    want = record(measurement=Measurement(0, metrics, series, {"a": [1, "x", None]}))
    want.save(out)
    json.loads(
        (out / "quick/laptop/0.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c}")
    )
    got = load(out, "quick", Scale.LAPTOP, 0)
    assert repr(got) == repr(want)  # repr, because NaN is not itself


def test_only_records_of_the_newest_code_are_pooled(tmp_path):
    for seed, code in ((0, "new"), (1, "old"), (2, "new")):
        record(seed, code=code).save(tmp_path)
    assert [r.seed for r in load_all(tmp_path, "quick", Scale.LAPTOP)] == [0, 2]
    (tmp_path / "quick/laptop/notes.json").write_text("{}")
    assert [r.seed for r in load_all(tmp_path, "quick", Scale.LAPTOP)] == [0, 2]
    assert load_all(tmp_path, "quick", Scale.SMOKE) == []


def test_failed_seeds_are_told_with_their_last_line(tmp_path):
    folder = tmp_path / "quick/laptop"
    folder.mkdir(parents=True)
    (folder / "10.error.txt").write_text("Traceback\n  x\nValueError: ten\n\n")
    (folder / "2.error.txt").write_text("")
    assert list(failed_seeds(tmp_path, "quick", Scale.LAPTOP).items()) == [
        (2, "no message"),
        (10, "ValueError: ten"),
    ]


def test_keys_differ_by_code_scale_and_seed():
    keys = {result_key(code, scale, seed) for code in "ab" for scale in Scale for seed in range(3)}
    assert len(keys) == 18


def test_arrays_become_lists():
    import numpy as np
    import torch

    value = {
        "a": np.arange(2.0),
        "b": torch.ones(1, 2),
        "c": (np.float32(0.5), np.int64(3), torch.tensor(2)),
        4: range(2),
        "d": "text",
    }
    got = plain(value)
    assert got == {"a": [0.0, 1.0], "b": [[1.0, 1.0]], "c": [0.5, 3, 2], "4": [0, 1], "d": "text"}
    assert json.loads(json.dumps(got)) == got
    assert encode({"x": [math.inf, (-math.inf, 1.0)], "y": math.nan}) == {
        "x": ["inf", ["-inf", 1.0]],
        "y": "nan",
    }


KEYS = {
    "slug": str,
    "scale": str,
    "verdict": str,
    "claims": list,
    "seeds": list,
    "seconds": float,
    "peak_rss_mb": (float, type(None)),
    "commit": (str, type(None)),
    "measurements": list,
}


def check_line(line):
    """The JSON object that API.md gives, exactly."""
    assert list(line) == list(KEYS)
    for key, kind in KEYS.items():
        assert isinstance(line[key], kind), key
    assert line["verdict"] in {"reproduced", "not reproduced", "inconclusive", "failed"}
    for claim in line["claims"]:
        assert list(claim) == ["text", "metric", "value", "interval", "bound", "verdict"]
        assert len(claim["interval"]) == 2
    assert line["verdict"] == line["claims"][0]["verdict"]
    for measurement in line["measurements"]:
        assert list(measurement) == ["seed", "metrics"]
    json.dumps(line, allow_nan=False)


def test_json_is_what_the_contract_says():
    records = [record(1, {"ratio": 0.7, "x": math.inf}), record(0, {"ratio": 0.6, "x": math.nan})]
    line = combine(fakes.quick, Scale.LAPTOP, records).to_json()
    check_line(line)
    assert line["seeds"] == [0, 1]
    assert line["seconds"] == 21.0
    assert line["peak_rss_mb"] == 101.0
    assert line["commit"] == "abc123"
    assert line["claims"][0]["value"] == pytest.approx(0.65)
    assert line["measurements"] == [
        {"seed": 0, "metrics": {"ratio": 0.6, "x": None}},
        {"seed": 1, "metrics": {"ratio": 0.7, "x": None}},
    ]


def test_infinite_intervals_are_null():
    line = combine(fakes.quick, Scale.LAPTOP, [record()]).to_json()
    check_line(line)
    assert line["claims"][0]["interval"] == [None, None]
    assert line["verdict"] == "inconclusive"
    empty = combine(fakes.quick, Scale.LAPTOP, []).to_json()
    check_line(empty)
    assert empty["claims"][0]["value"] is None


def test_smoke_is_always_inconclusive_and_a_crash_always_failed():
    records = [record(0), record(1)]
    assert combine(fakes.quick, Scale.LAPTOP, records).verdict is Verdict.REPRODUCED
    smoke = combine(fakes.quick, Scale.SMOKE, records)
    assert smoke.verdict is smoke.claims[0].verdict is Verdict.INCONCLUSIVE
    for scale in (Scale.SMOKE, Scale.LAPTOP):
        failed = combine(fakes.quick, scale, records, {1: "RuntimeError: x", 4: "y"})
        check_line(failed.to_json())
        assert failed.verdict is Verdict.FAILED
        assert failed.seeds == (0, 1, 4)
        # A seed that crashed last time says nothing by what it gave before.
        assert [m.seed for m in failed.measurements] == [0]


def test_the_headline_decides_and_the_others_stand_beside_it():
    paper = fakes.make("two", fakes.quick_experiment, others=(Claim("b", "ratio", at_least=0.9),))
    result = combine(paper, Scale.LAPTOP, [record(0, paper=paper), record(1, paper=paper)])
    assert [j.verdict for j in result.claims] == [Verdict.REPRODUCED, Verdict.NOT_REPRODUCED]
    assert result.verdict is Verdict.REPRODUCED


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.71234, "0.7123"),
        (-3.0, "−3"),
        (1.5e-7, "1.5e−07"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


def test_intervals_and_durations_for_people():
    assert interval((0.1, 0.25)) == "0.1 to 0.25"
    assert interval((-math.inf, math.inf)) == "–"
    claim = Claim("x", "m", at_most=1.0)
    for values_, text, short in (
        ((0.5, (0.4, 0.6)), "0.5 (0.4 to 0.6)", "0.5 ± 0.1"),
        ((0.5, (-math.inf, math.inf)), "0.5", "0.5"),
        ((math.nan, (-math.inf, math.inf)), "–", "–"),
        ((math.inf, (math.inf, math.inf)), "∞", "∞"),
    ):
        judgement = Judgement(claim, *values_, Verdict.INCONCLUSIVE)
        assert (estimate(judgement), plus_minus(judgement)) == (text, short)
    spans = {0.04: "0.0 s", 9.94: "9.9 s", 12.4: "12 s", 185: "3 min 05 s", 7800: "2 h 10 min"}
    assert {s: duration(s) for s in spans} == spans

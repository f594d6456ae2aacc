"""Progress out, shared results in."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stiefel.papers import progress as module
from stiefel.papers.progress import Progress

calls = []


@pytest.fixture(autouse=True)
def _no_calls_yet():
    calls.clear()


def double(config, report):
    calls.append(config["n"])
    report(0.5, f"n={config['n']}")
    return {"value": 2 * config["n"], "pair": (1, 2), "loss": float("nan")}


def triple(config, report):
    return {"value": 3 * config["n"]}


def test_fraction_is_kept_between_nothing_and_all():
    told = []
    progress = Progress(lambda fraction, message: told.append((fraction, message)))
    progress(-1.0)
    progress(0.25, "loss 2")
    progress(7)
    assert told == [(0.0, ""), (0.25, "loss 2"), (1.0, "")]
    Progress()(0.5)  # nobody listens


@pytest.mark.parametrize("stored", [False, True])
def test_each_config_is_computed_once_in_order_asked(tmp_path, stored):
    progress = Progress(store=tmp_path if stored else None)
    results = progress.shared("double", [{"n": 3}, {"n": 1}, {"n": 3}], double)
    assert [r["value"] for r in results] == [6, 2, 6]
    assert calls == [3, 1]
    progress.shared("double", [{"n": 1}, {"n": 3}], double)
    assert calls == [3, 1]


@pytest.mark.parametrize("stored", [False, True])
def test_results_are_the_same_fresh_and_found_again(tmp_path, stored):
    progress = Progress(store=tmp_path if stored else None)
    for _ in range(2):
        (result,) = progress.shared("double", [{"n": 1}], double)
        assert result["pair"] == [1, 2]
        assert result["loss"] != result["loss"]


def test_another_process_finds_what_is_stored(tmp_path):
    Progress(store=tmp_path).shared("double", [{"n": 1}], double)
    Progress(store=tmp_path).shared("double", [{"n": 1}, {"n": 2}], double)
    assert calls == [1, 2]


def test_what_another_finishes_before_the_lock_is_ours_is_not_computed_again(tmp_path, monkeypatch):
    real = module.FileLock

    class LateLock(real):
        def __enter__(self):
            monkeypatch.setattr(module, "FileLock", real)
            Progress(store=tmp_path).shared("double", [{"n": 1}], double)
            return super().__enter__()

    monkeypatch.setattr(module, "FileLock", LateLock)
    (result,) = Progress(store=tmp_path).shared("double", [{"n": 1}], double)
    assert result["value"] == 2
    assert calls == [1]


def test_kind_function_config_fingerprint_and_versions_make_the_key(tmp_path, monkeypatch):
    def ask(kind="k", config=(("n", 1), ("m", 2)), compute=double, fingerprint=""):
        progress = Progress(store=tmp_path, fingerprint=fingerprint)
        return progress.shared(kind, [dict(config)], compute)[0]["value"]

    ask()
    ask(config=(("m", 2), ("n", 1)))  # the order of keys says nothing
    assert calls == [1]
    ask(kind="other")
    ask(fingerprint="more")
    assert ask(compute=triple) == 3
    assert ask(config=(("n", 5), ("m", 2))) == 10
    monkeypatch.setattr(module, "runtime", lambda: {"python": "9", "torch": "9"})
    ask()
    assert calls == [1, 1, 1, 5, 1]


def test_the_code_behind_compute_makes_the_key_not_who_asks(tmp_path, monkeypatch):
    package = tmp_path / "lab_shared"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "work.py").write_text("def go(config, report):\n    return {'value': config['n']}\n")
    (package / "asker.py").write_text("from lab_shared.work import go\n")
    monkeypatch.syspath_prepend(tmp_path)
    from lab_shared.asker import go as via_asker
    from lab_shared.work import go

    store = tmp_path / "store"
    first = Progress(store=store).shared("k", [{"n": 1}], go)
    second = Progress(store=store).shared("k", [{"n": 1}], via_asker)
    assert first == second
    assert len(list(store.glob("*.json"))) == 1
    (package / "asker.py").write_text("x = 1\nfrom lab_shared.work import go\n")
    Progress(store=store).shared("k", [{"n": 1}], go)
    assert len(list(store.glob("*.json"))) == 1
    (package / "work.py").write_text("def go(config, report):\n    return {'value': 7}\n")
    Progress(store=store).shared("k", [{"n": 1}], go)
    assert len(list(store.glob("*.json"))) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"config": {}}', "null", "\x00"])
def test_damaged_store_is_computed_again(tmp_path, damage):
    Progress(store=tmp_path).shared("double", [{"n": 1}], double)
    (file,) = tmp_path.glob("*.json")
    file.write_text(damage)
    (result,) = Progress(store=tmp_path).shared("double", [{"n": 1}], double)
    assert result["value"] == 2
    assert calls == [1, 1]
    assert json.loads(file.read_text())["result"]["value"] == 2


def test_span_is_the_part_of_the_bar_that_moves():
    told = []
    progress = Progress(lambda fraction, message: told.append(fraction))
    progress.shared("double", [{"n": 1}, {"n": 2}], double, span=(0.2, 0.6))
    assert told == sorted(told)
    assert told[0] == pytest.approx(0.3)  # half of the first half of the span
    assert told[-1] == pytest.approx(0.6)


def test_an_error_in_compute_comes_through_and_frees_the_lock(tmp_path):
    def broken(config, report):
        raise RuntimeError("no")

    progress = Progress(store=tmp_path)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            progress.shared("k", [{"n": 1}], broken)
    assert not list(tmp_path.glob("*.json"))


_SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from shared_twice import work
from stiefel.papers.progress import Progress
folder = Path(sys.argv[1])
print([r["value"] for r in Progress(store=folder / "store").shared(
    "work", [dict(n=n, folder=sys.argv[1], sleep=float(sys.argv[2])) for n in (1, 2)], work)])
"""


def _ask(folder, sleep=0.4):
    script = _SCRIPT.format(here=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(sleep)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_split_the_work(tmp_path):
    both = [_ask(tmp_path), _ask(tmp_path)]
    outputs = [p.communicate(timeout=60)[0] for p in both]
    assert outputs == ["[10, 20]\n"] * 2
    computed = [line.split() for line in (tmp_path / "computed.txt").read_text().splitlines()]
    assert sorted(n for n, _ in computed) == ["1", "2"]


def test_a_killed_process_frees_what_it_held(tmp_path):
    holder = _ask(tmp_path, sleep=60)
    deadline = time.monotonic() + 30
    while not (tmp_path / "computed.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(holder.pid, 9)
    holder.communicate()
    from shared_twice import work

    configs = [{"n": 1, "folder": str(tmp_path), "sleep": 60.0}]
    again = Progress(store=tmp_path / "store")
    (tmp_path / "hurry").touch()
    start = time.monotonic()
    assert again.shared("work", configs, work)[0]["value"] == 10
    assert time.monotonic() - start < 5

"""What a person sees."""

import io
import re

import fake_papers as fakes
import pytest
from rich.console import Console
from test_result import record

from stiefel.atlas import display as module
from stiefel.atlas.display import Bars, Lines, make_display, verdict_table
from stiefel.atlas.pool import Task
from stiefel.atlas.result import combine
from stiefel.papers import Claim, Scale


def console(terminal):
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=100,
        color_system="standard" if terminal else None,
        _environ={},
    )


def show(terminal):
    """A short run on a terminal or not; what was printed, with and without colours."""
    target = console(terminal)
    one, two = Task(fakes.quick, 0), Task(fakes.crash, 1)
    with make_display(target) as display:
        display.plan({one: 3.0, two: 1.0}, present=2)
        display.started(one)
        display.started(two)
        display.progress(one, 0.5, "loss [2.31]")
        display.ended(two, "RuntimeError: [red] <x>", None)
        display.ended(one, None, 12.0)
        display.result(combine(fakes.quick, Scale.LAPTOP, [record(0), record(1)]))
    raw = target.file.getvalue()
    return raw, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)


def test_a_terminal_gets_bars_anything_else_lines():
    assert isinstance(make_display(console(True)), Bars)
    assert isinstance(make_display(console(False)), Lines)


@pytest.mark.parametrize("terminal", [True, False])
def test_both_tell_what_matters(terminal):
    raw, text = show(terminal)
    assert "2 of 4 results are there already; 2 runs to do." in text
    assert "RuntimeError: [red] <x>" in text
    assert "quick: reproduced  ratio 0.5 (0.5 to 0.5), claimed ≤ 0.9" in text
    assert ("\x1b[" in raw) == terminal


def test_a_crash_is_a_red_row_and_the_bars_move():
    raw, text = show(True)
    assert re.search(r"\x1b\[1;31m✗ crash seed 1: RuntimeError", raw)
    assert "all" in text
    bars = Bars(console(True))
    one, two = Task(fakes.quick, 0), Task(fakes.crash, 1)
    with bars:
        bars.plan({one: 3.0, two: 1.0}, 0)
        bars.started(one)
        bars.progress(one, 0.5, "")
        whole, row = bars._bars.tasks
        assert (whole.completed, whole.total) == (1.5, 4.0)
        assert row.completed == 0.5
        bars.ended(one, None, 1.0)
        assert len(bars._bars.tasks) == 1
        assert bars._bars.tasks[0].completed == 3.0


def test_lines_tell_progress_now_and_then(monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    target = console(False)
    lines, task = Lines(target), Task(fakes.quick, 0)
    lines.started(task)
    for fraction in (0.1, 0.4, 0.5):
        lines.progress(task, fraction, "loss 2")
    assert target.file.getvalue() == "quick seed 0: started\nquick seed 0: 40% loss 2\n"


def test_table_has_a_row_a_claim():
    paper = fakes.make("two", fakes.quick_experiment, others=(Claim("b", "ratio", at_least=0.9),))
    target = console(False)
    target.print(
        verdict_table(
            [
                combine(paper, Scale.LAPTOP, [record(0, paper=paper), record(1, paper=paper)]),
                combine(fakes.crash, Scale.LAPTOP, [], {0: "x"}),
            ]
        )
    )
    rows = [line.split() for line in target.file.getvalue().splitlines() if "ratio" in line]
    assert rows == [
        ["two", "reproduced", "ratio", "0.5", "±", "0", "≤", "0.9"],
        ["not", "reproduced", "ratio", "0.5", "±", "0", "≥", "0.9"],
        ["crash", "failed", "ratio", "–", "≤", "0.9"],
    ]

"""What a person sees while experiments run: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from stiefel.atlas.pool import Task
from stiefel.atlas.result import Result, duration, estimate, number, plus_minus
from stiefel.papers.paper import Verdict

STYLES = {
    Verdict.REPRODUCED: "green",
    Verdict.NOT_REPRODUCED: "yellow",
    Verdict.INCONCLUSIVE: "cyan",
    Verdict.FAILED: "bold red",
}


class Display(Protocol):
    """What the runner tells."""

    def __enter__(self) -> Display: ...
    def __exit__(self, *_: object) -> None: ...
    def plan(self, weights: dict[Task, float], present: int) -> None:
        """These tasks will run, of these relative costs; so many results are there already."""
        ...

    def started(self, task: Task) -> None:
        """A process has been started."""
        ...

    def progress(self, task: Task, fraction: float, message: str) -> None:
        """A task has come so far."""
        ...

    def ended(self, task: Task, problem: str | None, seconds: float | None) -> None:
        """A task has ended; ``problem`` says in one line what went wrong, if anything did."""
        ...

    def result(self, result: Result) -> None:
        """A paper has its verdict."""
        ...


def make_display(console: Console) -> Display:
    """Bars if ``console`` is a terminal, lines if not."""
    return Bars(console) if console.is_terminal else Lines(console)


def sentence(result: Result) -> str:
    """A paper's verdict in one line of Rich markup."""
    head = result.claims[0]
    style = STYLES[result.verdict]
    text = f"[bold]{escape(result.slug)}[/]: [{style}]{result.verdict.value}[/]"
    if result.measurements:
        text += (
            f"  {escape(head.claim.metric)} {estimate(head)}, "
            f"claimed {head.claim.relation} {number(head.claim.bound)}"
        )
    return text


def present_sentence(running: int, present: int) -> str:
    """How much is left to do."""
    todo = f"{running} {'run' if running == 1 else 'runs'} to do."
    if not present:
        return todo
    return f"{present} of {running + present} results are there already; {todo}"


class Bars:
    """One bar for all, one for each running seed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=3)),
            BarColumn(bar_width=None, table_column=Column(ratio=3, min_width=8)),
            TaskProgressColumn(),
            TextColumn(
                "[cyan]{task.fields[message]}",
                table_column=Column(no_wrap=True, ratio=3, overflow="ellipsis"),
            ),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            transient=True,
            speed_estimate_period=120,
        )
        self._all: TaskID | None = None
        self._weights: dict[Task, float] = {}
        self._rows: dict[Task, TaskID] = {}
        self._fractions: dict[Task, float] = {}
        self._ended = 0

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def plan(self, weights: dict[Task, float], present: int) -> None:
        """Say how much there is to do."""
        self._say(present_sentence(len(weights), present))
        self._weights = weights
        if weights:
            self._all = self._bars.add_task("[bold]all", total=sum(weights.values()), message="")
            self._update()

    def started(self, task: Task) -> None:
        """A process has been started."""
        name = f"{escape(task.job.slug)} [dim]seed {task.seed}[/]"
        self._rows[task] = self._bars.add_task(name, total=1.0, message="starting")

    def progress(self, task: Task, fraction: float, message: str) -> None:
        """A task has come so far."""
        self._fractions[task] = fraction
        self._bars.update(self._rows[task], completed=fraction, message=escape(message))
        self._update()

    def ended(self, task: Task, problem: str | None, seconds: float | None) -> None:
        """A task has ended, well or badly."""
        self._ended += 1
        self._fractions[task] = 1.0
        if task in self._rows:
            self._bars.remove_task(self._rows.pop(task))
        if problem is not None:
            self._say(f"[bold red]✗ {escape(task.name)}: {escape(problem)}[/]")
        self._update()

    def result(self, result: Result) -> None:
        """A paper has its verdict."""
        self._say(sentence(result))

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def _update(self) -> None:
        if self._all is not None:
            done = sum(self._weights[t] * f for t, f in self._fractions.items())
            message = f"{self._ended} of {len(self._weights)} runs"
            self._bars.update(self._all, completed=done, message=message)


class Lines:
    """Plain lines, for logs and pipes: starts, ends, and progress every ten seconds."""

    EVERY = 10.0

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[Task, float] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)

    def plan(self, weights: dict[Task, float], present: int) -> None:
        """Say how much there is to do."""
        self._say(present_sentence(len(weights), present))

    def started(self, task: Task) -> None:
        """A process has been started."""
        self._told[task] = time.monotonic()
        self._say(f"{escape(task.name)}: started")

    def progress(self, task: Task, fraction: float, message: str) -> None:
        """A task has come so far."""
        now = time.monotonic()
        if now - self._told[task] >= self.EVERY:
            self._told[task] = now
            self._say(f"{escape(task.name)}: {fraction:.0%} {escape(message)}".rstrip())

    def ended(self, task: Task, problem: str | None, seconds: float | None) -> None:
        """A task has ended, well or badly."""
        if problem is not None:
            self._say(f"[bold red]{escape(task.name)}: failed: {escape(problem)}[/]")
        elif seconds is not None:
            self._say(f"{escape(task.name)}: done in {duration(seconds)}")

    def result(self, result: Result) -> None:
        """A paper has its verdict."""
        self._say(sentence(result))


def verdict_table(results: list[Result]) -> Table:
    """A row a claim: verdict, metric, mean and half its interval, bound."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("paper", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("metric", overflow="fold")
    table.add_column("mean ± 95 %", justify="right", no_wrap=True)
    table.add_column("claimed", justify="right", no_wrap=True)
    for result in results:
        for index, judgement in enumerate(result.claims):
            claim = judgement.claim
            table.add_row(
                f"[bold]{escape(result.slug)}[/]" if index == 0 else "",
                f"[{STYLES[judgement.verdict]}]{judgement.verdict.value}[/]",
                escape(claim.metric),
                plus_minus(judgement),
                f"{claim.relation} {number(claim.bound)}",
                style=STYLES[Verdict.FAILED] if result.verdict is Verdict.FAILED else None,
            )
        table.add_section()
    return table

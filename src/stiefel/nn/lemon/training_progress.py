"""A progress bar for runs longer than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

QUIET_SECONDS = 2.0


class Bar:
    """Called after every step; draws nothing before two seconds have passed."""

    def __init__(self, label: str, total: int, shown: bool) -> None:
        self._label, self._total = label, total
        self._start = time.monotonic()
        self._shown = shown
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, done: int, message: str = "") -> None:
        """``done`` steps are finished."""
        if not self._shown:
            return
        if self._bar is None:
            if time.monotonic() - self._start < QUIET_SECONDS:
                return
            self._bar = self._opened()
        self._bar.update(self._task, completed=done, message=message)

    def _opened(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[message]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        bar.start()
        self._task = bar.add_task(self._label, total=self._total, message="")
        return bar

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress_bar(label: str, total: int, shown: bool | None) -> Iterator[Bar]:
    """A :class:`Bar` on standard error; ``shown`` None: where that is a terminal."""
    bar = Bar(label, total, sys.stderr.isatty() if shown is None else shown)
    try:
        yield bar
    finally:
        bar.close()

"""What the benchmarks share: CPU time of several tasks in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

SHORT = 0.02
"""Seconds that a sample of short tasks is filled to."""


def in_turn(
    tasks: dict[str, Callable[[], object]], rounds: int, *, fill: float = 0.0
) -> dict[str, float]:
    """Median CPU seconds of every task, one after the other in each round.

    Tasks shorter than ``fill`` seconds are repeated to fill it, as a training loop would: a single
    call measures the caches that the task before it left behind.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    repeats = dict.fromkeys(tasks, 1)
    for name, task in tasks.items():
        task()  # allocation of state, dispatch caches
        if fill:
            start = time.thread_time()
            task()
            repeats[name] = max(1, round(fill / max(time.thread_time() - start, 1e-6)))
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.thread_time()
            for _ in range(repeats[name]):
                task()
            times[name].append((time.thread_time() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}

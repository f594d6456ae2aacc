"""What the benchmarks share: CPU time of several tasks in turn, and a command of sections."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def run_sections(
    title: str,
    description: str,
    sections: Mapping[str, Callable[[int], Sequence[Mapping[str, Any]]]],
    peers: Mapping[str, str],
    output: Path,
    *,
    rounds: int = 5,
    about: Mapping[str, Any] | None = None,
) -> None:
    """The command of a benchmark: run sections, print one table, write JSON.

    Args:
        title: Over the table.
        description: For ``--help``.
        sections: By name, a function of the number of rounds that returns rows of the table.
        peers: Modules compared against, and how to install them; missing ones are named.
        output: Where the JSON goes unless told.
        rounds: Per timing, unless told.
        about: What else a reader of the figures has to know; shown, and in the JSON.
    """
    import numpy as np
    import torch
    from rich.console import Console
    from rich.table import Table
    from threadpoolctl import threadpool_limits

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds per timing, at least 5")
    parser.add_argument("--json", type=Path, default=output)
    parser.add_argument("--only", choices=tuple(sections), default=None)
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    torch.set_num_threads(1)
    console = Console()
    for peer, how in peers.items():
        if not importlib.util.find_spec(peer):
            console.print(f"{peer} is left out; for it: {how}")
    for name, value in (about or {}).items():
        console.print(f"{name}: {value}")
    chosen = [options.only] if options.only else list(sections)
    with threadpool_limits(1):  # NumPy's BLAS too: the clock counts one thread
        rows = [line for name in chosen for line in sections[name](options.rounds)]
    shown = Table(title=title, title_justify="left")
    for key in rows[0] if rows else ():
        shown.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for line in rows:
        shown.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in line.values()))
    console.print(shown)
    result = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        **(about or {}),
        "rounds": options.rounds,
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    console.print(f"written to {options.json}")

"""Runs the experiments and keeps what they gave."""

from __future__ import annotations

import contextlib
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from stiefel.atlas.cluster import ClusterPool
from stiefel.atlas.display import Display, make_display
from stiefel.atlas.machine import available_cores, commit, machine, versions
from stiefel.atlas.pool import Pool, Task
from stiefel.atlas.record import (
    Record,
    code_key,
    error_path,
    last_line,
    load,
    result_key,
)
from stiefel.atlas.result import Result, combine
from stiefel.papers import all_papers, get
from stiefel.papers.paper import Measurement, Paper, Scale
from stiefel.storage import write_text


def reproduce(
    slugs: Sequence[str | Paper] | None = None,
    *,
    scale: Scale | str = "laptop",
    seeds: Sequence[int] = (0, 1, 2),
    jobs: int | None = None,
    out: str | Path = "results",
    force: bool = False,
    console: Console | None = None,
    on_result: Callable[[Result], None] | None = None,
    cluster: str | None = None,
    cluster_store: str | Path | None = None,
    retries: int = 2,
) -> list[Result]:
    """Re-check papers: run their experiments, keep the results, judge the claims.

    Each seed of each paper runs in a process of its own with one thread. Results go to
    ``out/<slug>/<scale>/<seed>.json``; one that the same code (of the experiment and all it uses),
    scale, seed and versions of Python and torch have made is not made again. A crash ends that
    seed only; its traceback goes to ``<seed>.error.txt`` beside the results.

    Args:
        slugs: Papers by slug, or :class:`Paper` objects whose experiment can be imported by module
            and name. None for all of Stiefel's.
        scale: ``"smoke"``, ``"laptop"`` or ``"paper"``.
        seeds: Non-negative and different.
        jobs: Processes at a time; None for one a CPU core, or what the cluster's workers have
            threads for.
        out: Folder of the results.
        force: Make results again that are there.
        console: Where progress goes; standard error if None. Bars on a terminal, else lines.
        on_result: Called as each paper gets its verdict, cheapest papers first.
        cluster: Address of a Dask scheduler whose workers run the experiments. The results are the
            same, and are written here.
        cluster_store: Folder that all of the cluster's workers see, for results that runs share.
            None: each worker has one of its own and computes them again.
        retries: So often a run is started again whose worker was lost. A crash of the experiment
            itself is not tried again.

    Returns:
        One :class:`Result` a paper, in the order asked.

    Raises:
        KeyError: no paper has that slug; the message names near matches.
        ValueError: an unknown scale, bad seeds, ``jobs`` below 1, ``retries`` below 0, a
            ``cluster_store`` without a cluster, or a paper asked for twice.
        ClusterError: the scheduler does not answer or was lost, its workers run other versions or
            other code, or Dask is not installed.
        KeyboardInterrupt: SIGINT or SIGTERM came. All processes are stopped, what was finished is
            kept, and the same call goes on from there.
    """
    papers = [paper if isinstance(paper, Paper) else get(paper) for paper in slugs or ()]
    if retries < 0:
        raise ValueError(f"retries must be at least 0, got {retries}")
    if cluster_store is not None and cluster is None:
        raise ValueError("cluster_store is for runs on a cluster; no cluster was given")
    run = _Run(
        papers if slugs is not None else list(all_papers()),
        scale=_scale(scale),
        seeds=_seeds(seeds),
        jobs=_jobs(jobs, cluster),
        out=Path(out),
        force=force,
        on_result=on_result,
        cluster=cluster,
        cluster_store=None if cluster_store is None else str(cluster_store),
        retries=retries,
    )
    with make_display(console or Console(stderr=True)) as display:
        return run(display)


def _scale(scale: Scale | str) -> Scale:
    try:
        return Scale(scale)
    except ValueError:
        allowed = ", ".join(s.value for s in Scale)
        raise ValueError(f"scale must be one of {allowed}; got {scale!r}") from None


def _seeds(seeds: Sequence[int]) -> list[int]:
    bad = [s for s in seeds if not isinstance(s, int) or isinstance(s, bool) or s < 0]
    if bad or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different non-negative integers, got {list(seeds)}")
    return list(seeds)


def _jobs(jobs: int | None, cluster: str | None) -> int:
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    # A cluster queues what its workers have no thread for, and may grow because of it.
    return jobs or (available_cores() if cluster is None else sys.maxsize)


class _Run:
    """One call of :func:`reproduce`."""

    def __init__(
        self,
        papers: list[Paper],
        *,
        scale: Scale,
        seeds: list[int],
        jobs: int,
        out: Path,
        force: bool,
        on_result: Callable[[Result], None] | None,
        cluster: str | None,
        cluster_store: str | None,
        retries: int,
    ) -> None:
        names = [paper.slug for paper in papers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"asked for twice: {', '.join(twice)}")
        self._papers = papers
        self._scale, self._seeds, self._jobs, self._out = scale, seeds, jobs, out
        self._force = force
        self._cluster, self._cluster_store, self._retries = cluster, cluster_store, retries
        self._on_result = on_result or (lambda _: None)
        self._codes = {paper.slug: code_key(paper) for paper in papers}
        self._records: dict[str, list[Record]] = {name: [] for name in names}
        self._errors: dict[str, dict[int, str]] = {name: {} for name in names}
        self._results: dict[str, Result] = {}
        self._started: dict[Task[Paper], str] = {}
        self._queue: deque[Task[Paper]] = deque()
        self._interrupts = _Interrupts()

    def __call__(self, display: Display) -> list[Result]:
        self._display = display
        with self._interrupts:
            self._plan()
            with self._pool() as pool:
                while self._queue or pool:
                    while self._queue and len(pool) < self._jobs:
                        self._start(pool, self._queue.popleft())
                    for task, kind, content in pool.events(timeout=0.5):
                        self._handle(task, kind, content)
        return [self._results[paper.slug] for paper in self._papers]

    def _pool(self) -> Pool[Paper] | ClusterPool:
        if self._cluster is None:
            return Pool(self._scale, self._out.absolute() / "_shared")
        papers = list({task.job.slug: task.job for task in self._queue}.values())
        return ClusterPool(
            self._cluster, self._scale, papers, store=self._cluster_store, retries=self._retries
        )

    def _plan(self) -> None:
        """Queue what is not there yet, cheapest papers first."""
        papers = sorted(self._papers, key=lambda paper: paper.seconds)
        for paper in papers:
            for seed in self._seeds:
                found = None if self._force else load(self._out, paper.slug, self._scale, seed)
                current = found is not None and found.key == self._key(paper, seed)
                if found is not None and current and found.answers(paper):
                    # A crash on the way to the same result (of code since undone) is history.
                    error_path(self._out, paper.slug, self._scale, seed).unlink(missing_ok=True)
                    self._records[paper.slug].append(found)
                else:
                    self._queue.append(Task(paper, seed))
        present = len(papers) * len(self._seeds) - len(self._queue)
        self._display.plan({t: t.job.seconds for t in self._queue}, present)
        for paper in papers:
            self._conclude(paper)

    def _key(self, paper: Paper, seed: int) -> str:
        return result_key(self._codes[paper.slug], self._scale, seed)

    def _start(self, pool: Pool[Paper] | ClusterPool, task: Task[Paper]) -> None:
        if isinstance(pool, Pool):  # a cluster tells when it has come to the task
            self._begin(task, datetime.now(UTC).isoformat(timespec="milliseconds"))
        try:
            pool.start(task)
        except (pickle.PicklingError, AttributeError, TypeError):
            self._handle(task, "crashed", traceback.format_exc())

    def _begin(self, task: Task[Paper], when: str) -> None:
        again = task in self._started
        self._started[task] = when
        if again:
            self._display.progress(task, 0.0, "started again: its worker was lost")
        else:
            self._display.started(task)

    def _handle(self, task: Task[Paper], kind: str, content: Any) -> None:
        if kind == "started":
            self._begin(task, content)
            return
        if kind == "progress":
            self._display.progress(task, *content)
            return
        slug = task.job.slug
        problem: str | None = None
        seconds: float | None = None
        error_file = error_path(self._out, slug, self._scale, task.seed)
        with self._interrupts.held_back():  # a result that is here is kept
            if kind == "done":
                try:
                    self._save(task, content)
                    seconds = content["seconds"]
                except (TypeError, ValueError):
                    kind, content = "crashed", traceback.format_exc()
            if kind == "done":
                error_file.unlink(missing_ok=True)
            else:
                reason = content if kind == "unavailable" else last_line(content)
                self._errors[slug][task.seed] = problem = reason
            if kind == "crashed":
                write_text(error_file, content)
                problem = f"{problem} (traceback: {error_file})"
            self._display.ended(task, problem, seconds)
            if kind == "unavailable":
                self._give_up(task.job, content)
        self._conclude(task.job)

    def _save(self, task: Task[Paper], content: dict[str, Any]) -> None:
        fields = ("metrics", "series", "config")
        origin = content.get("origin") or {  # of a cluster's worker; else made here
            "versions": versions(),
            "machine": machine(),
            "commit": commit(),
            "started": self._started[task],
        }
        record = Record(
            slug=task.job.slug,
            scale=self._scale,
            seed=task.seed,
            key=self._key(task.job, task.seed),
            code=self._codes[task.job.slug],
            measurement=Measurement(task.seed, **{name: content[name] for name in fields}),
            seconds=content["seconds"],
            peak_rss_mb=content["peak_rss_mb"],
            **origin,
        )
        record.save(self._out)
        self._records[task.job.slug].append(record)

    def _give_up(self, paper: Paper, why: str) -> None:
        """What is missing for one seed is missing for all: start no more of this paper."""
        for task in [t for t in self._queue if t.job is paper]:
            self._queue.remove(task)
            self._errors[paper.slug][task.seed] = why
            self._display.ended(task, None, None)

    def _conclude(self, paper: Paper) -> None:
        """Judge the paper if all its seeds are in."""
        records, errors = self._records[paper.slug], self._errors[paper.slug]
        if len(records) + len(errors) < len(self._seeds):
            return
        result = combine(paper, self._scale, records, errors)
        self._results[paper.slug] = result
        self._display.result(result)
        self._on_result(result)


class _Interrupts:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, except while something is being kept."""

    def __init__(self) -> None:
        self._holding = False
        self._came = False

    def __enter__(self) -> None:
        self._before: dict[int, Any] = {}
        # Only the main thread may set handlers; elsewhere signals are somebody else's.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._holding:
            self._came = True
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Let nothing interrupt this block; an interrupt that came meanwhile follows it."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._came:
            raise KeyboardInterrupt

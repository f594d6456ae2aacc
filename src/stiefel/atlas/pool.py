"""Experiments in processes of their own: started, listened to, stopped."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from stiefel.atlas import worker
from stiefel.papers.paper import Claim, Scale

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    # glibc gives every freed tensor back to the system otherwise, and faults it in again a moment
    # later: a training step of small matrices takes 11 to 16 % longer.
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
}
"""What the process of an experiment starts with."""
GRACE = 0.8
"""Seconds a stopped process has to free what it holds before it is killed."""


class Job(Protocol):
    """What is run: as much of a paper as a process needs."""

    @property
    def slug(self) -> str:
        """Its name."""
        ...

    @property
    def claims(self) -> Sequence[Claim]:
        """Claims whose metrics the experiment must return; there may be none."""
        ...

    @property
    def experiment(self) -> Callable[..., Any]:
        """``experiment(scale, seed, progress)``, found by module and name."""
        ...


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, eq=False)  # itself a key: two tasks are the same only if they are one
class Task(Generic[J]):
    """One seed of one job."""

    job: J
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.job.slug} seed {self.seed}"


@dataclass
class _Running(Generic[J]):
    task: Task[J]
    process: BaseProcess
    pipe: connection.Connection
    log: Path


class Pool(Generic[J]):
    """Runs tasks side by side, each in a spawned process. Use as a context manager.

    However the ``with`` block is left, no process of it is alive afterwards.
    """

    def __init__(self, scale: Scale, store: Path) -> None:
        """Run at ``scale``; shared results go to ``store``."""
        self._scale = scale
        self._store = store
        self._running: list[_Running[J]] = []
        self._logs = Path(tempfile.mkdtemp(prefix="stiefel-"))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        with _blocked_signals():
            self.stop()
            shutil.rmtree(self._logs, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._running)

    def start(self, task: Task[J]) -> None:
        """Start a process for ``task``.

        Raises:
            pickle.PicklingError, AttributeError, TypeError: the experiment cannot be found by
                module and name.
        """
        metrics = [claim.metric for claim in task.job.claims]
        payload = pickle.dumps((task.job.experiment, metrics))
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        log = self._logs / f"{task.job.slug}-{task.seed}.log"
        process = context.Process(
            target=worker.run,
            args=(theirs, payload, self._scale, task.seed, self._store, log),
            name=f"stiefel {task.name}",
        )
        # A signal in here could lose track of a process just born. The child inherits the block,
        # which also keeps a terminal's Ctrl-C from killing it before it is ready.
        with _blocked_signals(), _environment(ENVIRONMENT):
            process.start()
            self._running.append(_Running(task, process, ours, log))
        theirs.close()

    def events(self, timeout: float) -> Iterator[tuple[Task[J], str, Any]]:
        """What the processes sent within ``timeout`` seconds: (task, kind, content).

        Kinds are those of :func:`stiefel.atlas.worker.run`. A process that ends without a word
        (killed, or crashed in native code) gives ``crashed`` with what is known of it.
        """
        pipes = {r.pipe: r for r in self._running}
        for pipe in connection.wait(list(pipes), timeout):
            running = pipes[pipe]  # pyrefly: ignore
            try:
                kind, content = running.pipe.recv()
            except (EOFError, OSError):
                running.process.join()
                code = running.process.exitcode or 0
                kind, content = "crashed", last_words(running.task.name, code, running.log)
            if kind != "progress":
                self._reap(running)
            yield running.task, kind, content

    def stop(self) -> None:
        """Stop every process, within about a second."""
        for running in self._running:
            running.process.terminate()
        deadline = time.monotonic() + GRACE
        for running in list(self._running):
            running.process.join(max(deadline - time.monotonic(), 0))
            self._reap(running, patience=0)

    def _reap(self, running: _Running[J], patience: float = 2.0) -> None:
        running.pipe.close()
        running.process.join(patience)
        if running.process.is_alive():
            running.process.kill()
            running.process.join()
        running.process.close()
        self._running.remove(running)


def last_words(name: str, code: int, log: Path) -> str:
    """What is known of the process of run ``name`` that ended without a word.

    ``code`` is its exit status, ``log`` the file with what it printed.
    """
    if code < 0:
        try:
            cause = f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            cause = f"was killed by signal {-code}"
    else:
        cause = f"ended without a result, exit status {code}"
    printed = ""
    with contextlib.suppress(FileNotFoundError):
        printed = log.read_text(errors="replace")[-20_000:]
    hint = " (out of memory?)" if code == -getattr(signal, "SIGKILL", 9) else ""
    return f"{printed}\nThe process of {name} {cause}{hint}.\n".lstrip()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """``os.environ`` with ``variables`` set: what a spawned process starts with."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block is left."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # Starting the tracker unblocks signals, so it must not happen inside.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

"""Experiments on the workers of a Dask cluster.

One Dask task is one seed of one paper. The worker runs it in a process of its own, as a local run
does, so a crash of the experiment is a result and the worker lives on; the outcome comes back as
plain data and is written by whoever asked for it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

from stiefel.atlas.cluster_worker import differences, identity, work
from stiefel.atlas.pool import Task
from stiefel.papers.paper import Paper, Scale

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5
"""So long a scheduler has to answer."""


class ClusterError(RuntimeError):
    """A cluster that cannot be used, or was lost. The message is a sentence for people."""


@dataclass
class _Flight:
    """A run that the cluster has."""

    task: Task[Paper]
    order: dict[str, Any]
    future: Any = None
    attempt: int = 0
    starts: int = 0
    lost: int = 0


class ClusterPool:
    """Runs tasks on a Dask cluster; used like :class:`stiefel.atlas.pool.Pool`.

    However the ``with`` block is left, the cluster is asked to stop what is still running.
    """

    def __init__(
        self,
        address: str,
        scale: Scale,
        papers: Sequence[Paper],
        *,
        store: str | None,
        retries: int,
    ) -> None:
        """Run ``papers`` at ``scale`` on the workers of the scheduler at ``address``.

        Args:
            address: As Dask writes it, such as ``tcp://10.0.0.1:8786``.
            scale: Scale of all runs.
            papers: What will be run: their code is compared on entering.
            store: Folder for shared results that every worker sees; None for one a worker.
            retries: So often a run is started again whose worker was lost.
        """
        self._address, self._scale = address, scale
        self._store, self._retries = store, retries
        self._papers = papers
        self._topic = f"stiefel-{uuid.uuid4().hex[:12]}"
        self._flights: dict[str, _Flight] = {}
        self._inbox: queue.SimpleQueue[tuple[str, int | None, str, Any]] = queue.SimpleQueue()

    def __enter__(self) -> ClusterPool:
        self._client = _connect(self._address)
        try:
            self._compare()
            self._client.subscribe_topic(self._topic, self._hear)
        except BaseException:
            self._client.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        futures = [f.future for f in self._flights.values()]
        self._flights.clear()
        try:
            if futures and self._client.status == "running":
                self._client.cancel(futures, force=True)
        except (OSError, TimeoutError, CancelledError) as error:
            # A scheduler that is gone has nothing left to cancel.
            log.debug("could not cancel: %r", error)
        finally:
            self._client.close()

    def __len__(self) -> int:
        return len(self._flights)

    def start(self, task: Task[Paper]) -> None:
        """Hand ``task`` to the cluster.

        Raises:
            TypeError: the experiment cannot be found by module and name.
        """
        name = f"{task.job.slug}-{task.seed}"
        reference = _reference(task.job)
        order: dict[str, Any] = {
            **reference,
            "id": name,
            "title": task.name,
            "topic": self._topic,
            "scale": self._scale.value,
            "seed": task.seed,
            "metrics": [claim.metric for claim in task.job.claims],
            "store": self._store,
            "identity": identity([reference]),
        }
        self._flights[name] = flight = _Flight(task, order)
        self._submit(flight)

    def events(self, timeout: float) -> Iterator[tuple[Task[Paper], str, Any]]:
        """What the cluster told within ``timeout`` seconds: (task, kind, content).

        Kinds are those of :func:`stiefel.atlas.worker.run` and ``started`` (when, ISO 8601 in UTC),
        again if a run is started again. The content of ``done`` has a further field ``origin``:
        versions, machine and commit of the worker, and when it started.

        Raises:
            ClusterError: the scheduler was lost, or a worker that joined late runs other code.
        """
        with contextlib.suppress(queue.Empty):
            name, attempt, kind, content = self._inbox.get(timeout=timeout)
            while True:
                flight = self._flights.get(name)
                # What an earlier attempt still says, or a run that has ended, counts no more.
                if flight is not None and attempt in (None, flight.attempt):
                    yield from self._take(flight, kind, content)
                name, attempt, kind, content = self._inbox.get_nowait()

    def _submit(self, flight: _Flight) -> None:
        name = flight.order["id"]
        key = f"{self._topic}-{name}-{flight.attempt}"
        # Cheapest papers come first: later ones wait.
        flight.future = self._client.submit(work, flight.order, key=key, pure=False)
        flight.future.add_done_callback(partial(self._ended, name, flight.attempt))

    def _hear(self, event: tuple[float, Any]) -> None:
        message = event[1]  # the first is the scheduler's time
        self._inbox.put((message["id"], None, message["kind"], message["content"]))

    def _ended(self, name: str, attempt: int, future: Any) -> None:
        """A future has come to its end; called in a thread of Dask's."""
        from distributed import KilledWorker

        try:
            kind, content = future.result()
        except KilledWorker:
            kind, content = "lost", None
        except CancelledError as error:
            kind, content = "cancelled", str(error)
        except Exception as error:  # the worker could not even start it
            kind, content = (
                "crashed",
                f"The cluster could not run it.\n{type(error).__name__}: {error}",
            )
        self._inbox.put((name, attempt, kind, content))

    def _take(self, flight: _Flight, kind: str, content: Any) -> Iterator[tuple[Task, str, Any]]:
        """What one message means for the run that it is about."""
        if kind == "started":
            # Dask itself starts a run again whose worker was lost, more often than asked perhaps.
            flight.starts += 1
            flight.lost = max(flight.lost, flight.starts - 1)
            if flight.lost > self._retries:
                flight.future.cancel(force=True)
                yield self._give_up(flight)
                return
        elif kind == "lost":
            flight.lost = max(flight.lost + 1, flight.starts)
            flight.starts = flight.lost
            if flight.lost > self._retries:
                yield self._give_up(flight)
            else:
                flight.attempt += 1
                self._submit(flight)
            return
        elif kind == "cancelled":
            raise ClusterError(f"lost the runs on the cluster at {self._address}: {content}")
        elif kind == "differs":
            raise ClusterError(f"a worker cannot repeat this machine's results: {content}")
        elif kind != "progress":
            del self._flights[flight.order["id"]]
        yield flight.task, kind, content

    def _give_up(self, flight: _Flight) -> tuple[Task, str, str]:
        del self._flights[flight.order["id"]]
        times = "once" if flight.lost == 1 else f"{flight.lost} times"
        why = (
            f"The worker that ran {flight.task.name} was lost {times} (killed, or out of memory?)."
        )
        return flight.task, "crashed", f"{why}\n"

    def _compare(self) -> None:
        """Refuse workers whose results would not be ours."""
        references = []
        for paper in self._papers:
            with contextlib.suppress(TypeError):  # said when it is to be started
                references.append(_reference(paper))
        try:
            answers = self._client.run(identity, references, on_error="return")
        except Exception as error:
            raise ClusterError(
                f"the workers of {self._address} cannot tell their versions; is stiefel installed "
                f"there? {type(error).__name__}: {error}"
            ) from error
        if not answers:
            log.warning("The cluster at %s has no worker yet; runs wait for one.", self._address)
        here = identity(references)
        problems = [
            f"worker {worker}: {difference}"
            for worker, answer in sorted(answers.items())
            if (difference := differences(here, answer))
        ]
        if problems:
            raise ClusterError(
                f"the cluster cannot repeat this machine's results. {'; '.join(problems)}"
            )


def _connect(address: str) -> Any:
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("distributed", "dask"):
            raise
        raise ClusterError(
            "runs on a cluster need Dask, which is not installed: pip install 'stiefel[cluster]'"
        ) from error
    try:
        return Client(address, timeout=CONNECT_SECONDS, set_as_default=False, name="stiefel")
    except (OSError, TimeoutError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {address} within {CONNECT_SECONDS} seconds"
        ) from error
    except (ValueError, TypeError) as error:
        raise ClusterError(f"{address!r} is not the address of a scheduler: {error}") from error


def _reference(paper: Paper) -> dict[str, str]:
    """Slug of a paper, module and name of its experiment.

    Raises:
        TypeError: they do not lead to it, as with a lambda or a function inside another.
    """
    experiment = paper.experiment
    module = getattr(experiment, "__module__", "")
    name = getattr(experiment, "__qualname__", "")
    try:
        found = attrgetter(name)(import_module(module))
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not experiment or module == "__main__":
        raise TypeError(
            f"the experiment of {paper.slug} cannot be found on another machine by module and "
            f"name: {experiment!r}"
        )
    return {"module": module, "name": name, "slug": paper.slug}

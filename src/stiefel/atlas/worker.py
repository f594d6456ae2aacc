"""The process in which one experiment runs. Nothing here is called in the parent."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing import connection, parent_process
from operator import attrgetter
from pathlib import Path
from typing import Any

from stiefel.atlas.machine import peak_rss_mb
from stiefel.atlas.record import plain
from stiefel.papers.paper import Measurement, Scale, UnavailableError
from stiefel.papers.progress import Progress

Experiment = Callable[[Scale, int, Progress], Measurement]

_REPORT_EVERY = 0.1
"""Seconds between reports of progress; more would only fill the pipe."""


def run(
    pipe: connection.Connection,
    payload: bytes,
    scale: Scale,
    seed: int,
    store: Path,
    log: Path,
) -> None:
    """Run one experiment and send what came of it, as pairs (kind, content), through ``pipe``.

    ``payload`` is a pickle of (experiment, metrics that its claims name). Kinds: ``progress``
    (fraction, message), then one of ``done`` (see :func:`_measure`), ``unavailable`` (sentence),
    ``crashed`` (traceback). Whatever the experiment prints goes to the file ``log``.
    """
    _settle(log)
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        _end_after(lambda: connection.wait([sentinel]))

    def find() -> tuple[Experiment, list[str]]:
        return pickle.loads(payload)  # noqa: S301 (made by our own parent)

    pipe.send(_outcome(find, scale, seed, Progress(_reporter(pipe.send), store)))
    pipe.close()


def run_order() -> None:
    """Run the experiment that one line of JSON on standard input orders; for Dask's workers.

    The order names ``module`` and ``name`` of the experiment, ``metrics``, ``scale``, ``seed``,
    ``store`` and ``log``; see :func:`run`, whose pairs go to standard output, a line of JSON each.
    The process ends when standard input does: that its parent is gone.
    """
    order = json.loads(sys.stdin.readline())
    # What the experiment itself starts must neither read our input nor write into our output.
    parent = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    _settle(Path(order["log"]))
    _end_after(lambda: os.read(parent, 1))

    def send(message: tuple[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    def find() -> tuple[Experiment, list[str]]:
        return attrgetter(order["name"])(import_module(order["module"])), order["metrics"]

    progress = Progress(_reporter(send), Path(order["store"]))
    outcome = _outcome(find, Scale(order["scale"]), order["seed"], progress)
    try:
        send(outcome)
    except (TypeError, ValueError):  # a setting that JSON has no word for
        send(("crashed", traceback.format_exc()))


def _outcome(
    find: Callable[[], tuple[Experiment, list[str]]], scale: Scale, seed: int, progress: Progress
) -> tuple[str, Any]:
    """What came of the experiment that ``find`` gives, with the metrics that claims name."""
    try:
        experiment, wanted = find()
        return "done", _measure(experiment, wanted, scale, seed, progress)
    except UnavailableError as error:
        return "unavailable", " ".join(str(error).split())
    except SystemExit:
        raise  # the parent asked us to stop; the way out has freed locks and temporary files
    except BaseException:
        return "crashed", traceback.format_exc()


def _settle(log: Path) -> None:
    """Make this process quiet, and leave Ctrl-C to its parent."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    faulthandler.enable()  # after the redirection: it keeps the descriptor it finds

    def stop(*_: object) -> None:
        raise SystemExit(1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _end_after(wait: Callable[[], object]) -> None:
    """End this process, whatever it is doing, when ``wait`` returns: its parent is gone."""

    def watch() -> None:
        wait()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _reporter(send: Callable[[tuple[str, Any]], None]) -> Callable[[float, str], None]:
    last = -math.inf

    def report(fraction: float, message: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_EVERY:
            last = now
            send(("progress", (fraction, message)))

    return report


def _measure(
    experiment: Experiment,
    wanted: list[str],
    scale: Scale,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """The measurement with its cost: metrics, series, config, seconds, peak_rss_mb."""
    import torch  # before the clock starts: importing it is no part of an experiment

    torch.set_num_threads(1)
    start = time.perf_counter()
    measurement = experiment(scale, seed, progress)
    seconds = time.perf_counter() - start
    if not isinstance(measurement, Measurement):
        raise TypeError(f"the experiment must return a Measurement, got {type(measurement)}")
    if measurement.seed != seed:
        raise ValueError(f"the experiment was given seed {seed}, returned {measurement.seed}")
    missing = [name for name in wanted if name not in measurement.metrics]
    if missing:
        raise ValueError(
            f"a claim needs the metric {missing[0]!r}; the experiment returned "
            f"{', '.join(sorted(measurement.metrics)) or 'none'}"
        )
    return {
        "metrics": {str(k): float(v) for k, v in measurement.metrics.items()},
        "series": plain(measurement.series),
        "config": plain(measurement.config),
        "seconds": seconds,
        "peak_rss_mb": peak_rss_mb(),
    }

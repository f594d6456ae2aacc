"""The process in which one experiment runs. Nothing here is called in the parent."""

from __future__ import annotations

import faulthandler
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

from stiefel.atlas.machine import peak_rss_mb
from stiefel.atlas.record import plain
from stiefel.papers.paper import Measurement, Scale, UnavailableError
from stiefel.papers.progress import Progress

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
    report = _reporter(pipe)
    try:
        experiment, wanted = pickle.loads(payload)  # noqa: S301 (made by our own parent)
        outcome = ("done", _measure(experiment, wanted, scale, seed, Progress(report, store)))
    except UnavailableError as error:
        outcome = ("unavailable", " ".join(str(error).split()))
    except SystemExit:
        raise  # the parent asked us to stop; the way out has freed locks and temporary files
    except BaseException:
        outcome = ("crashed", traceback.format_exc())
    pipe.send(outcome)
    pipe.close()


def _settle(log: Path) -> None:
    """Make this process quiet, single-threaded, and unable to outlive its parent."""
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

    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _reporter(pipe: connection.Connection) -> Callable[[float, str], None]:
    last = -math.inf

    def report(fraction: float, message: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_EVERY:
            last = now
            pipe.send(("progress", (fraction, message)))

    return report


def _measure(
    experiment: Callable[[Scale, int, Progress], Measurement],
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

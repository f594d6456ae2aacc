"""What the worker of a Dask cluster does for one run. Dask is there whenever this is called."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import stiefel
from stiefel.atlas.machine import commit, machine, versions
from stiefel.atlas.pool import ENVIRONMENT, GRACE, last_words
from stiefel.papers.closure import code_digest, runtime

_REPORT_EVERY = 1.0
"""Seconds between reports of progress from one run: all of them pass through the scheduler."""
_LOOK_EVERY = 0.3
"""Seconds between looks whether a run is still wanted."""
_CHILD = "from stiefel.atlas.worker import run_order; run_order()"


def identity(references: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What must be the same on two machines for the same results, by name."""
    found = {"stiefel": stiefel.__version__, **runtime()}
    for reference in references:
        try:
            code = code_digest(attrgetter(reference["name"])(import_module(reference["module"])))
        except (ImportError, AttributeError, ValueError, OSError) as error:
            code = f"{type(error).__name__}: {error}"
        found[f"code of {reference['slug']}"] = code
    return found


def differences(here: Mapping[str, str], there: Any) -> str:
    """Names what differs, with both values; empty if nothing does."""
    if not isinstance(there, Mapping):
        return f"cannot tell its versions, {type(there).__name__}: {there}"
    found = []
    for name, ours in here.items():
        theirs = there.get(name, "missing")
        if theirs == ours:
            continue
        # Digests are long and say nothing; the message of an error does.
        is_digest = name.startswith("code of") and " " not in theirs
        found.append(f"{name} differs" if is_digest else f"{name} is {theirs} there, {ours} here")
    return ", ".join(found)


def work(order: dict[str, Any]) -> tuple[str, Any]:
    """Run one experiment on this worker of a cluster; called by Dask.

    Returns:
        Kind and content, see :func:`stiefel.atlas.worker.run`; also ``differs`` if this worker has
        other versions than the order asks for, and ``lost`` if the worker is closing.
    """
    from distributed import get_worker
    from distributed.core import Status

    worker = get_worker()
    key = worker.get_current_task()

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        leaving = worker.status in (Status.closing, Status.closed, Status.failed)
        return task is not None and task.state != "cancelled" and not leaving

    def tell(kind: str, content: Any) -> None:
        message = {"id": order["id"], "kind": kind, "content": content}
        worker.log_event(order["topic"], message)

    problem = differences(order["identity"], identity([order]))
    if problem:
        return "differs", f"worker {worker.address}: {problem}"
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    tell("started", started)
    store = order["store"] or str(Path(worker.local_directory) / "stiefel-shared")
    # In the worker's own folder, which Dask clears away even after a kill.
    folder = Path(tempfile.mkdtemp(prefix="stiefel-", dir=worker.local_directory))
    try:
        kind, content = _experiment({**order, "store": store}, folder / "log", tell, wanted)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if kind == "done":
        content["origin"] = {
            "versions": versions(),
            "machine": machine(),
            "commit": commit(),
            "started": started,
        }
    return kind, content


def _experiment(
    order: dict[str, Any],
    log_file: Path,
    tell: Callable[[str, Any], None],
    wanted: Callable[[], bool],
) -> tuple[str, Any]:
    """Run the experiment in a process of its own, until it ends or nobody wants it any more."""
    # Not multiprocessing: Dask's workers are daemons, which may not have children of that kind.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with log_file.open("w") as printed:
        process = subprocess.Popen(  # noqa: S603 (this interpreter, a fixed program)
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
            text=True,
            encoding="utf-8",
        )
    assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 (pipes)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(process.stdout, lines), daemon=True)
    listener.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it died: its last words say why
            process.stdin.write(json.dumps({**order, "log": str(log_file)}) + "\n")
            process.stdin.flush()
        told = 0.0
        while wanted():
            try:
                line = lines.get(timeout=_LOOK_EVERY)
            except queue.Empty:
                continue
            if line is None:
                return "crashed", last_words(order["title"], process.wait(), log_file)
            kind, content = json.loads(line)
            if kind != "progress":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2.0)
                return kind, content
            if time.monotonic() - told >= _REPORT_EVERY:
                told = time.monotonic()
                tell(kind, content)
        return "lost", None
    finally:
        _stop(process)
        listener.join()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _listen(stream: Any, lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _stop(process: subprocess.Popen[str]) -> None:
    """Stop a process, with a moment to free what it holds."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

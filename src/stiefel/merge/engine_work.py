"""Carrying out the tasks of a plan: threads, a limit on memory, one writer."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stiefel.checkpoint import CheckpointWriter
from stiefel.merge.arithmetic import all_finite
from stiefel.merge.engine_inputs import CHUNK_BYTES, Inputs, Reader, row_count
from stiefel.merge.engine_methods import passes, pieces, start_method
from stiefel.merge.engine_progress import Meter
from stiefel.merge.engine_rotation import ROTATIONAL, matrix_memory, merge_matrix
from stiefel.merge.plan_types import MergePlan, TensorTask

_SMALLEST_BUDGET = 200_000_000
_M_MMAP_THRESHOLD = -3  # of malloc.h
# Work of a matrix factorisation in units of one pass over its bytes, per row of its smaller side.
_FACTORISATION = 0.05


class NonFiniteError(ValueError):
    """NaN or infinities in the inputs, or a result that its type cannot hold."""

    def __init__(self, findings: Sequence[str], more: str) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join([*findings, more]).rstrip())


class Stopped(Exception):
    """A worker that was told to stop."""


class Gate:
    """Lets tasks in as long as the memory they take together fits a budget; one always may."""

    def __init__(self, budget: float | int) -> None:
        self._budget = budget
        self._used = 0.0
        self._change = threading.Condition()

    @contextmanager
    def hold(self, cost: float | int) -> Iterator[None]:
        """Take ``cost`` bytes of the budget, waiting for room."""
        with self._change:
            self._change.wait_for(lambda: not self._used or self._used + cost <= self._budget)
            self._used += cost
        try:
            yield
        finally:
            with self._change:
                self._used -= cost
                self._change.notify_all()


@dataclass
class Job:
    """One merge in progress."""

    plan: MergePlan
    inputs: Inputs
    writer: CheckpointWriter
    meter: Meter
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    """NaN and infinities found so far; once there is one, the rest is only looked at."""
    spoilt: bool = False
    """Whether inputs were among them, not only results that overflow."""
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        largest = max((group_bytes(self.inputs, task) for task in self.plan.tasks), default=0)
        self.gate = Gate(max(3.0 * largest, _SMALLEST_BUDGET))

    def tick(self) -> None:
        """Raise :class:`Stopped` where the merge is to stop."""
        if self.stop.is_set():
            raise Stopped

    def run(self, threads: int) -> dict[Path, str]:
        """All tasks that are not done, then the SHA-256 of every input file.

        Raises:
            NonFiniteError: NaN or infinities, in all tensors that have them.
        """
        done = self.writer.done
        todo = [task for task in self.plan.tasks if task.name not in done]
        self.notes.update({name: dict(note) for name, note in done.items()})
        hashes: dict[Path, str] = {}
        jobs: list[Callable[[], None]] = [lambda task=task: self._task(task) for task in todo]
        jobs += [lambda file=file: self._hash(file, hashes) for file in self.inputs.files]
        large = any(task.method in ROTATIONAL for task in todo)
        with _one_torch_thread(), large_blocks_given_back() if large else nullcontext():
            _in_threads(jobs, threads, self.stop)
        if self.findings:
            raise NonFiniteError(sorted(self.findings), _WAY_OUT if self.spoilt else "")
        return hashes

    def _hash(self, file: Path, hashes: dict[Path, str]) -> None:
        self.tick()
        if not self.findings:
            hashes[file] = self.inputs.digest(file)
        self.meter.add(file.stat().st_size, file.name)

    def _task(self, task: TensorTask) -> None:
        self.tick()
        with self.gate.hold(memory(self.inputs, task)):
            if self.findings:
                self._look(task)
            elif task.method in ROTATIONAL:
                self._matrix(task)
            else:
                self._rows(task)
        share = work(task) / max(1, passes(task))
        self.meter.add(share if not math.prod(task.shape) else 0.0, task.name, whole=True)

    def _readers(self, task: TensorTask) -> tuple[Reader | None, list[Reader]]:
        base = None if task.base is None else Reader(self.inputs, task.base, task.shape)
        stand_in = base if self.plan.on_nonfinite == "base" else None
        return base, [Reader(self.inputs, ref, task.shape, stand_in) for ref in task.sources]

    def _rows(self, task: TensorTask) -> None:
        """A method that works entry by entry, on a few rows at a time."""
        base, sources = self._readers(task)
        readers = [*([] if base is None else [base]), *sources]
        count = row_count(task.shape)
        each = work(task) / max(1, passes(task) * count)
        seen = 0

        chunks = sum(1 for _ in pieces(task, readers))

        def tick() -> None:
            self.tick()
            self.meter.add(work(task) / (passes(task) * max(1, chunks)), task.name)

        step, details = start_method(task, base, sources, self.plan.seed, tick)
        for start, stop in pieces(task, readers):
            self.tick()
            origin = None if base is None else base.rows(start, stop)
            parts = [reader.rows(start, stop) for reader in sources]
            out = torch.empty((stop - start, *task.shape[1:]), dtype=task.dtype)
            step(origin, parts, start, out)
            if out.is_floating_point() and not all_finite(out):
                if self.plan.on_nonfinite != "keep":
                    self._found(task, readers, start)
                    return
                seen += int((~out.isfinite()).sum())
            self._write(task, start, stop, out, details, sources, seen)
            self.meter.add(each * (stop - start), task.name)

    def _write(
        self,
        task: TensorTask,
        start: int,
        stop: int,
        out: Tensor,
        details: Mapping[str, Any],
        sources: Sequence[Reader],
        seen: int,
    ) -> None:
        note = None
        if stop == row_count(task.shape):
            note = self._note(task, details, sources, seen)
        if task.shape:
            self.writer.write_rows(task.name, start, out, note=note)
        else:
            self.writer.write(task.name, out.reshape(()), note=note)

    def _note(
        self, task: TensorTask, details: Mapping[str, Any], sources: Sequence[Reader], seen: int
    ) -> dict[str, Any]:
        note = dict(details)
        replaced = {r.ref.model: sum(r.replaced.values()) for r in sources if r.replaced}
        if replaced:
            note["replaced_by_base"] = replaced
        if seen:
            note["not_finite"] = seen
        self.notes[task.name] = note
        return note

    def _matrix(self, task: TensorTask) -> None:
        """A method that needs whole matrices."""
        base, sources = self._readers(task)
        assert base is not None  # noqa: S101 - the plan gives these methods one
        readers = [base, *sources]
        if findings := self._bad_inputs(task, readers, 0):  # no factorisation takes them
            self.findings += findings
            return
        self.tick()
        out, details = merge_matrix(task, base, sources, self.plan.seed)
        if not all_finite(out):
            self._found(task, readers, 0)
            return
        self.writer.write(task.name, out, note=self._note(task, details, sources, 0))
        self.meter.add(work(task), task.name)

    def _look(self, task: TensorTask) -> None:
        """Only look for NaN: something was found, and the user should hear of all at once."""
        base, sources = self._readers(task)
        self._found(task, [*([] if base is None else [base]), *sources], 0, only_inputs=True)

    def _found(
        self, task: TensorTask, readers: Sequence[Reader], start: int, only_inputs: bool = False
    ) -> None:
        """Enter what is not finite of a task's inputs, or else that its result is not."""
        findings = self._bad_inputs(task, readers, start)
        if not findings and not only_inputs:
            name = str(task.dtype).removeprefix("torch.")
            way_out = "choose a wider out_dtype or smaller weights"
            findings = [
                f"{task.name}: the result overflows {name} though its inputs are finite; {way_out}"
            ]
        self.findings += findings

    def _bad_inputs(self, task: TensorTask, readers: Sequence[Reader], start: int) -> list[str]:
        found = []
        for reader in readers:
            bad, numel = 0, math.prod(task.shape)
            if not reader.dtype.is_floating_point:
                continue
            for first, last in pieces(task, readers):
                self.tick()
                if last <= start:
                    continue
                rows = reader.rows(first, last)
                if not all_finite(rows):
                    bad += int((~rows.isfinite()).sum())
            if bad:
                self.spoilt = True
                found.append(
                    f"{reader.ref.model}: {reader.ref.tensor} holds {bad} NaN or infinities "
                    f"among {numel} entries"
                )
        return found


_WAY_OUT = (
    "allow_nonfinite: keep merges them as they are, allow_nonfinite: base puts the base's values "
    "in their place"
)


def group_bytes(inputs: Inputs, task: TensorTask) -> int:
    """Bytes on disk of the tensors that make one output tensor."""
    refs = [*([] if task.base is None else [task.base]), *task.sources]
    return sum(inputs.checkpoint(ref).tensors[ref.tensor].nbytes for ref in refs)


def memory(inputs: Inputs, task: TensorTask) -> float:
    """Estimate of the bytes a task takes while it runs."""
    refs = [*([] if task.base is None else [task.base]), *task.sources]
    numel = math.prod(task.shape)
    folded = sum(inputs.adapter(ref) is not None for ref in refs)
    if task.method in ROTATIONAL:
        return 4.0 * numel * folded + matrix_memory(task, group_bytes(inputs, task))
    widest = max(CHUNK_BYTES, numel // row_count(task.shape) * 4 if numel else 0)
    return 4.0 * numel * folded + 2.0 * widest * (len(refs) + 1)


def work(task: TensorTask) -> float:
    """Estimate of a task's work in bytes touched."""
    numel = math.prod(task.shape)
    touched = float(numel * task.dtype.itemsize * (len(task.sources) + 2) * passes(task))
    if task.method in ROTATIONAL and len(task.shape) == 2:
        touched *= 1 + _FACTORISATION * min(task.shape)
    return touched


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Threads are ours, one a tensor; torch's own would only compete with them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """While matrices are factorised, memory that is freed goes back to the system at once.

    glibc keeps freed blocks of up to 32 MB, for each thread; the peak would be up to 150 MB a
    thread above what is in use. Chunks of rows live from being handed out again, so this is only
    for whole matrices. Other C libraries have no such setting.
    """
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is None:
        yield
        return
    setting(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        setting(_M_MMAP_THRESHOLD, 2**25)  # where glibc's own adjustment ends


def _in_threads(jobs: Sequence[Callable[[], None]], threads: int, stop: threading.Event) -> None:
    """Run all; the first error stops the others and is raised when they have stopped."""
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="merge") as pool:
        futures: list[Future[None]] = [pool.submit(job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # Also on the way out of an interrupt: the pool waits for what is running.
            if any(not future.done() or future.exception() for future in futures):
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
    errors = [f.exception() for f in futures if not f.cancelled() and f.exception() is not None]
    real = [error for error in errors if not isinstance(error, Stopped)]
    if real and real[0] is not None:
        raise real[0]

"""A plan as numbers, as JSON and as a table: what will be read and written, memory, time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stiefel.checkpoint import Checkpoint
from stiefel.merge.adapter_config import WEIGHTS_FILE
from stiefel.merge.engine_inputs import Inputs
from stiefel.merge.engine_methods import passes
from stiefel.merge.engine_work import group_bytes, memory
from stiefel.merge.orthomerge import is_turned
from stiefel.merge.plan_adapters import AdapterPlan
from stiefel.merge.plan_types import MergePlan, TensorTask

# What Python and torch take before any tensor is read (measured: 220 to 300 MB, by build).
BARE_BYTES = 300_000_000
# CPU seconds on one core, measured with bfloat16 and three models (two of slerp and linear) on a
# virtual server: per entry and model, per byte of input that is hashed, and per cube of the longer
# side of a matrix whose rotation is found, for each expert.
SECONDS_PER_ENTRY = {
    "copy": 1.7e-9,
    "linear": 3.5e-9,
    "slerp": 4.0e-9,
    "task_arithmetic": 1.8e-9,
    "ties": 7.5e-9,
    "dare_linear": 4.8e-9,
    "dare_ties": 6.0e-9,
    "orthomerge": 7.5e-9,
}
SECONDS_PER_HASHED_BYTE = 0.7e-9
# Adapters: per byte of factors, and per entry of each dense update, for each adapter.
SECONDS_PER_FACTOR_BYTE = 5e-9
SECONDS_PER_DENSE_ENTRY = 2e-8
SECONDS_PER_CUBE = 0.9e-9


@dataclass(frozen=True)
class Estimate:
    """What a merge will take."""

    input_bytes: int
    """Of all files that are read."""
    output_bytes: int
    """Of the tensors that are written."""
    output_files: int
    """Weight files."""
    group_bytes: int
    """Of the largest group of input tensors that make one output tensor."""
    peak_bytes: int
    """Resident memory at its highest."""
    seconds: float
    """Of CPU over all threads, divided by their number; a rough guess."""


def estimate(plan: MergePlan, threads: int = 1) -> Estimate:
    """Bytes, peak memory and time of a plan; reads headers only.

    Raises:
        ValueError: ``threads`` is below 1.
        CheckpointError: an input that cannot be opened any more.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    inputs = Inputs(plan.models)
    try:
        groups = [group_bytes(inputs, task) for task in plan.tasks]
        costs = sorted((memory(inputs, task) for task in plan.tasks), reverse=True)
        size = sum(file.stat().st_size for file in inputs.files)
    finally:
        inputs.close()
    largest = max(groups, default=0)
    # The engine starts no task that would exceed its budget beside those that run.
    together = max(costs[0], min(sum(costs[:threads]), max(3.0 * largest, 2e8))) if costs else 0
    work = sum(_seconds(task) for task in plan.tasks) + size * SECONDS_PER_HASHED_BYTE
    return Estimate(
        input_bytes=size,
        output_bytes=sum(task.nbytes for task in plan.tasks),
        output_files=_file_count(plan),
        group_bytes=largest,
        peak_bytes=int(BARE_BYTES + together),
        seconds=work / min(threads, max(1, len(plan.tasks))),
    )


def _seconds(task: TensorTask) -> float:
    numel = math.prod(task.shape)
    models = len(task.sources) + (task.base is not None)
    seconds = SECONDS_PER_ENTRY[task.method] * numel * max(1, models - 1)
    if task.method == "ties" and passes(task) == 1:
        seconds /= 2
    if task.method == "orthomerge" and is_turned(task.name, torch.empty(task.shape, device="meta")):
        side = min(task.shape[1], (len(task.sources) + 1) * task.shape[0])
        seconds += SECONDS_PER_CUBE * side**3 * len(task.sources)
    return seconds


def _file_count(plan: MergePlan) -> int:
    """How many shards the writer will fill, one tensor after the other."""
    count, room = 1, plan.shard_bytes
    for task in plan.tasks:
        if task.nbytes > room and room < plan.shard_bytes:
            count, room = count + 1, plan.shard_bytes
        room -= task.nbytes
    return count


def plan_json(plan: MergePlan, estimated: Estimate) -> dict[str, Any]:
    """The plan as JSON takes it, without a line for every tensor."""
    return {
        "models": [
            {
                "name": model.name,
                "path": str(model.path),
                "adapter": None if model.adapter is None else str(model.adapter),
            }
            for model in plan.models
        ],
        "tensors": len(plan.tasks),
        "methods": dict(Counter(task.method for task in plan.tasks)),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in plan.tasks)),
        "notes": {task.name: task.note for task in plan.tasks if task.note},
        "files": sorted({*plan.files_to_copy, *plan.files_to_write}),
        "warnings": list(plan.warnings),
        **asdict(estimated),
    }


def estimate_adapters(plan: AdapterPlan) -> tuple[int, float]:
    """Peak memory in bytes, and CPU seconds, of a plan of adapters."""
    largest, count = max(plan.dense, default=0), len(plan.paths)
    memory = BARE_BYTES + 3 * plan.nbytes + 4 * largest * (count + 3)
    seconds = SECONDS_PER_FACTOR_BYTE * plan.nbytes
    return memory, seconds + SECONDS_PER_DENSE_ENTRY * sum(plan.dense) * count


def adapter_json(plan: AdapterPlan) -> dict[str, Any]:
    """A plan of adapters as JSON takes it."""
    return {
        "kind": plan.kind,
        "adapters": [
            {"name": name, "path": str(path), "weight": weight}
            for name, path, weight in zip(plan.names, plan.paths, plan.weights, strict=True)
        ],
        "method": plan.method,
        "modules": plan.modules,
        "input_bytes": plan.nbytes,
        "peak_bytes": estimate_adapters(plan)[0],
        "seconds": estimate_adapters(plan)[1],
        "warnings": list(plan.warnings),
    }


def plan_lines(plan: MergePlan, estimated: Estimate, threads: int) -> list[tuple[str, str]]:
    """The plan as pairs of a word and what it says, for a terminal."""
    methods = Counter(task.method for task in plan.tasks)
    dtypes = Counter(str(task.dtype).removeprefix("torch.") for task in plan.tasks)
    files = f"{estimated.output_files} file{'s' * (estimated.output_files != 1)}"
    names = "".join(f", {name}" for name in _names(plan))
    peak, group = bytes_text(estimated.peak_bytes), bytes_text(estimated.group_bytes)
    time = f"about {seconds_text(estimated.seconds)} on {threads} thread{'s' * (threads > 1)}"
    lines = [("read", f"{m.name}{_size_of(m.path, m.adapter)}") for m in plan.models]
    lines += [
        ("merge", ", ".join(f"{count} tensors {name}" for name, count in methods.most_common())),
        ("write", f"{bytes_text(estimated.output_bytes)} of {', '.join(dtypes)}: {files}{names}"),
        ("memory", f"about {peak}; the largest group of tensors has {group}"),
        ("time", time),
    ]
    odd = [(task.name, task.note) for task in plan.tasks if task.note]
    lines += [("note", f"{name}: {note}") for name, note in odd[:10]]
    if len(odd) > 10:
        lines.append(("note", f"{len(odd) - 10} more tensors have notes; --json lists them"))
    return lines


def adapter_lines(plan: AdapterPlan) -> list[tuple[str, str]]:
    """A plan of adapters, likewise."""
    lines = [
        ("read", f"{name}  {bytes_text((path / WEIGHTS_FILE).stat().st_size)}, weight {weight:g}")
        for name, path, weight in zip(plan.names, plan.paths, plan.weights, strict=True)
    ]
    kind = {"LORA": "LoRA", "OFT": "OFT"}[plan.kind]
    lines.append(("merge", f"{plan.modules} modules by {plan.method}"))
    lines.append(("write", f"one {kind} adapter"))
    memory, seconds = estimate_adapters(plan)
    lines.append(("memory", f"about {bytes_text(memory)}"))
    lines.append(("time", f"about {seconds_text(seconds)}"))
    return lines


def table(lines: Sequence[tuple[str, str]]) -> Any:
    """Pairs as ``rich.table.Table`` without borders."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    before = ""
    for word, text in lines:
        grid.add_row("" if word == before else word, escape(text))
        before = word
    return grid


def _names(plan: MergePlan) -> list[str]:
    extra = ["config.json"] if plan.config is not None else []
    return sorted({*plan.files_to_copy, *plan.files_to_write, *extra})


def _size_of(path: Any, adapter: Any) -> str:
    with Checkpoint(path) as checkpoint:
        size = sum(file.stat().st_size for file in checkpoint.files)
        count = len(checkpoint.tensors)
    text = f"  {bytes_text(size)}, {count} tensors"
    return text if adapter is None else f"{text}, with the adapter {adapter.name}"


def bytes_text(size: float | int) -> str:
    """A number of bytes with its unit, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def seconds_text(seconds: float | int) -> str:
    """A duration in words for people, rounded as a guess deserves."""
    if seconds < 1:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

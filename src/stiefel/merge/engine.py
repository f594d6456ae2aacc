"""Merging checkpoints on disk: a recipe in, a model folder out, a tensor at a time.

Inputs are read by rows, the output is written by rows to places that are known beforehand, so the
memory that a merge takes depends on its largest tensor and not on the model. The output folder
appears whole, by one rename; an interrupted run leaves the old one and goes on with ``resume``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stiefel.checkpoint import CheckpointError, CheckpointWriter
from stiefel.checkpoint.swap import (
    partial_folder,
    real_folder,
    recover,
    sync_folder,
    take_name,
)
from stiefel.checkpoint.writer import FLUSH_BYTES
from stiefel.merge.engine_inputs import Inputs, adapter_files, identity, sha256
from stiefel.merge.engine_progress import MergeProgress, Meter
from stiefel.merge.engine_report import (
    RECIPE_FILE,
    REPORT_FILE,
    MergeReport,
    earlier_report,
    recipe_with_inputs,
    report_content,
    report_text,
    versions,
)
from stiefel.merge.engine_work import Job, work
from stiefel.merge.lie_average import CancellationWarning
from stiefel.merge.plan_adapters import AdapterPlan, build_adapter_plan, run_adapter_plan
from stiefel.merge.plan_types import MergePlan
from stiefel.merge.turning import HalfTurnWarning

MOST_THREADS = 8


def merge(
    recipe: Any,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    threads: int | None = None,
    progress: Callable[[MergeProgress], None] | None = None,
    flush_bytes: int = FLUSH_BYTES,
    **planning: Any,
) -> MergeReport:
    """Merge the models of a recipe into the folder ``out``.

    Everything that can be wrong is found from headers before any tensor is read. Values are read as
    stored, computed in float32 (float64 where an input is), and rounded once to the output's type.
    The same recipe and inputs give the same bytes, whatever the number of threads.

    A recipe whose models are all adapters makes an adapter, in one go: nothing is resumed.

    Args:
        recipe: The path of one, a checked one, or a plan: a
            :class:`~stiefel.merge.plan_types.MergePlan` or ``AdapterPlan``.
        out: The output. What an earlier merge left there is replaced when the new one is whole; a
            folder with anything else in it is refused.
        resume: Go on where an interrupted run of the same recipe on the same files stopped; from
            the start where there is none. What is there whole already is reported as it is.
        threads: At work on different tensors; by default one a processor, at most 8.
        progress: Called now and then, never from two threads at once.
        flush_bytes: Output that a crash may cost; 256 MB by default.
        planning: For :func:`~stiefel.merge.plan.build_plan`, where ``recipe`` is no plan.

    Raises:
        RecipeError, PlanError: the recipe is wrong, or the models do not fit it.
        CheckpointError: an input changed or is damaged; the output folder holds what no merge
            wrote; nothing that could be resumed fits the recipe.
        NonFiniteError: NaN or infinities, every tensor named, or a result that overflows.
        OSError: the disk is full or refuses.
        ValueError: ``threads`` is not positive.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    start = time.monotonic()
    folder = real_folder(out)
    recover(folder)
    plan = _planned(recipe, folder, planning)
    _check_folder(folder)
    if isinstance(plan, AdapterPlan):
        return _merge_adapters(plan, folder, start)
    for model in plan.models:
        if folder in (real_folder(model.path), real_folder(model.path).parent):
            raise CheckpointError(f"the output {folder} would replace the input {model.path}")
    inputs = Inputs(plan.models)
    try:
        if resume and not partial_folder(folder).exists():
            content = _finished(folder, plan, inputs)
            if content is not None:
                return MergeReport(folder, content, time.monotonic() - start, len(plan.tasks))
        writer = CheckpointWriter(
            folder,
            [(task.name, task.dtype, task.shape) for task in plan.tasks],
            shard_bytes=plan.shard_bytes,
            resume=resume,
            identity=identity(plan, inputs, json.dumps(versions())),
            overwrite=True,
            flush_bytes=flush_bytes,
        )
        resumed = len(writer.done)
        with writer:
            content = _carry_out(plan, inputs, writer, threads or processors(), progress)
    finally:
        inputs.close()
    return MergeReport(folder, content, time.monotonic() - start, resumed)


def _planned(recipe: Any, folder: Path, planning: dict[str, Any]) -> MergePlan | AdapterPlan:
    if isinstance(recipe, MergePlan | AdapterPlan):
        return recipe
    # Here: recipes need PyYAML and Pydantic, plans do not.
    from stiefel.merge.plan import build_plan
    from stiefel.merge.recipe import read_recipe
    from stiefel.merge.recipe_types import Recipe

    options: dict[str, Any] = dict(planning)
    if not isinstance(recipe, Recipe):
        options.setdefault("folder", Path(recipe).parent)
        recipe = read_recipe(recipe)
    if recipe.merges_adapters:
        return build_adapter_plan(recipe, options.get("folder"), out=folder)
    return build_plan(recipe, out=folder, **options)


def _merge_adapters(plan: AdapterPlan, folder: Path, start: float) -> MergeReport:
    """Adapters into an adapter: small, made in one go, with the same reports beside it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    private = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial")
    made = Path(private) / "made"
    try:
        result = run_adapter_plan(plan, made)
        files = sorted(entry.name for entry in made.iterdir())
        hashes = [
            {"model": name, "files": {path.name: sha256(path) for path in adapter_files(place)}}
            for name, place in zip(plan.names, plan.paths, strict=True)
        ]
        content = {
            "versions": versions(),
            "recipe": plan.recipe_text,
            "seed": plan.seed,
            "inputs": hashes,
            "output": {
                "bytes": sum((made / name).stat().st_size for name in files),
                "tensors": len(result.modules),
                "files": sorted([*files, RECIPE_FILE, REPORT_FILE]),
            },
            "warnings": list(dict.fromkeys([*plan.warnings, *result.warnings])),
            "tensors": result.modules,
        }
        texts = {
            RECIPE_FILE: recipe_with_inputs(plan.recipe_text, hashes),
            REPORT_FILE: report_text(content),
        }
        for name, text in texts.items():
            with open(made / name, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(made)
        take_name(made, folder)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return MergeReport(folder, content, time.monotonic() - start, 0)


def _carry_out(
    plan: MergePlan,
    inputs: Inputs,
    writer: CheckpointWriter,
    threads: int,
    progress: Callable[[MergeProgress], None] | None,
) -> dict[str, Any]:
    done = writer.done
    finished = sum(work(task) for task in plan.tasks if task.name in done)
    total = sum(work(task) for task in plan.tasks)
    total += sum(file.stat().st_size for file in inputs.files)
    meter = Meter(progress, len(plan.tasks), total, len(done), finished)
    job = Job(plan, inputs, writer, meter)
    with warnings.catch_warnings():
        # The report says both, tensor by tensor, and says it again after a resumed run.
        warnings.simplefilter("ignore", CancellationWarning)
        warnings.simplefilter("ignore", HalfTurnWarning)
        hashes = inputs.hashes(job.run(threads))
    content = report_content(plan, hashes, writer.files, job.notes)
    if plan.config is not None and "config.json" not in plan.files_to_copy:
        text = json.dumps(dict(plan.config), indent=2, ensure_ascii=False) + "\n"
        writer.add_text("config.json", text)
    for name, source in plan.files_to_copy.items():
        if name not in plan.files_to_write:
            writer.add_file(name, source)
    for name, text in plan.files_to_write.items():
        writer.add_text(name, text)
    writer.add_text(RECIPE_FILE, recipe_with_inputs(plan.recipe_text, hashes))
    writer.add_text(REPORT_FILE, report_text(content))
    return content


def _check_folder(folder: Path) -> None:
    """Only what merges wrote is ever replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; the output is a folder")
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return
    earlier = earlier_report(folder)
    if earlier is None:
        raise CheckpointError(
            f"{folder} exists and was not written by a merge (no {REPORT_FILE}); "
            "choose another folder"
        )
    foreign = [name for name in names if name not in earlier["output"]["files"]]
    foreign = [name for name in foreign if not name.startswith(".stiefel")]
    if foreign:
        raise CheckpointError(
            f"{folder} holds files that no merge wrote ({', '.join(foreign[:5])}); "
            "move them or choose another folder"
        )


def _finished(folder: Path, plan: MergePlan, inputs: Inputs) -> Mapping[str, Any] | None:
    """The report of an output that is this very merge's; None if there is none."""
    earlier = earlier_report(folder)
    if earlier is None or earlier.get("recipe") != plan.recipe_text:
        return None
    if earlier.get("versions") != versions() or list(earlier.get("tensors", ())) != [
        task.name for task in plan.tasks
    ]:
        return None
    hashes = inputs.hashes({file: inputs.digest(file) for file in inputs.files})
    return earlier if earlier.get("inputs") == hashes else None


def processors() -> int:
    """Processors that this process may use, at most :data:`MOST_THREADS`."""
    allowed = getattr(os, "sched_getaffinity", None)
    return min(MOST_THREADS, len(allowed(0)) if allowed else os.cpu_count() or 1)

"""What a merge leaves behind beside the weights: merge.json and stiefel_merge.yaml."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stiefel
from stiefel.merge.lie_average import SMALLEST_SIZE
from stiefel.merge.plan_types import MergePlan, TensorRef, TensorTask

REPORT_FILE = "merge.json"
RECIPE_FILE = "stiefel_merge.yaml"

Hashes = list[dict[str, Any]]


@dataclass(frozen=True)
class MergeReport:
    """What :func:`stiefel.merge.merge` did; ``content`` is what merge.json holds."""

    folder: Path
    content: Mapping[str, Any]
    seconds: float
    resumed: int
    """Tensors that an earlier run had written."""

    @property
    def tensors(self) -> Mapping[str, Mapping[str, Any]]:
        """Per output tensor: method, dtype, shape, sources with their parameters, notes."""
        return self.content["tensors"]

    @property
    def inputs(self) -> Sequence[Mapping[str, Any]]:
        """Per model: its name and the SHA-256 of each file."""
        return self.content["inputs"]

    @property
    def warnings(self) -> Sequence[str]:
        """What a reader should know."""
        return self.content["warnings"]

    @property
    def nbytes(self) -> int:
        """Bytes of the output's tensors."""
        return self.content["output"]["bytes"]


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "stiefel": stiefel.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def tensor_entry(task: TensorTask, details: Mapping[str, Any]) -> dict[str, Any]:
    """The report on one tensor; nothing in it depends on time, threads or place."""

    def source(ref: TensorRef, parameters: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"model": ref.model}
        if ref.tensor != task.name:
            found["tensor"] = ref.tensor
        if ref.rows is not None:
            found["rows"] = "matched by token"
        return found | dict(parameters)

    given = task.source_parameters or ({},) * len(task.sources)
    entry: dict[str, Any] = {
        "method": task.method,
        "dtype": str(task.dtype).removeprefix("torch."),
        "shape": list(task.shape),
    }
    if task.base is not None:
        entry["base"] = source(task.base, {})
    entry["sources"] = [source(*pair) for pair in zip(task.sources, given, strict=True)]
    if task.parameters:
        entry["parameters"] = dict(task.parameters)
    if task.note:
        entry["note"] = task.note
    return entry | dict(details)


def report_content(
    plan: MergePlan, inputs: Hashes, shards: Sequence[str], notes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of merge.json."""
    return {
        "versions": versions(),
        "recipe": plan.recipe_text,
        "seed": plan.seed,
        "inputs": inputs,
        "output": {
            "bytes": sum(task.nbytes for task in plan.tasks),
            "tensors": len(plan.tasks),
            "files": sorted(
                {
                    *shards,
                    *(["model.safetensors.index.json"] if len(shards) > 1 else []),
                    *(["config.json"] if plan.config is not None else []),
                    *plan.files_to_copy,
                    *plan.files_to_write,
                    RECIPE_FILE,
                    REPORT_FILE,
                }
            ),
        },
        "warnings": [*plan.warnings, *_warnings(plan, notes)],
        "tensors": {task.name: tensor_entry(task, notes.get(task.name, {})) for task in plan.tasks},
    }


def _warnings(plan: MergePlan, notes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What happened during the merge that a reader should know."""
    found = []
    for task in plan.tasks:
        note = notes.get(task.name, {})
        for model, count in note.get("replaced_by_base", {}).items():
            found.append(
                f"{task.name}: {count} NaN or infinities of {model} replaced by the base's values"
            )
        if note.get("not_finite"):
            found.append(f"{task.name}: {note['not_finite']} entries of the result are not finite")
        # Rotations made of rounding, where no expert moved this layer, are no loss.
        if note.get("correction") == 0 and sum(note.get("rotations", ())) > SMALLEST_SIZE:
            found.append(f"{task.name}: the rotations cancel, the layer is not turned")
        if note.get("map") == "log" and task.parameters.get("map", "cayley") != "log":
            found.append(
                f"{task.name}: an expert turns a plane by almost π, logarithms were merged"
            )
    return found


def report_text(content: Mapping[str, Any]) -> str:
    """merge.json; a line a tensor, so that two reports can be compared."""
    head = {name: value for name, value in content.items() if name != "tensors"}
    lines = [
        f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(entry, ensure_ascii=False)}"
        for name, entry in content["tensors"].items()
    ]
    text = json.dumps(head, indent=1, ensure_ascii=False)
    return text[: text.rindex("\n}")] + ',\n "tensors": {\n' + ",\n".join(lines) + "\n }\n}\n"


def recipe_with_inputs(recipe: str, inputs: Hashes) -> str:
    """stiefel_merge.yaml: the recipe as it was, below what it was carried out with."""
    lines = [f"# {name} {version}" for name, version in versions().items()]
    for entry in inputs:
        for file, digest in entry["files"].items():
            lines.append(f"# {entry['model']}: {file} sha256 {digest}".replace("\n", " "))
    return "\n".join(lines) + "\n" + recipe + ("" if recipe.endswith("\n") else "\n")


def earlier_report(folder: Path) -> dict[str, Any] | None:
    """merge.json in ``folder``; None if there is none that a merge wrote."""
    try:
        content = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        files = content["output"]["files"]
        return content if isinstance(files, list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

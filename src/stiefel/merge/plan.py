"""The whole merge from headers alone: everything that can be wrong is found before any tensor.

``build_plan`` opens each model (headers, configuration, tokenizer), matches tensors by name, and
resolves every setting for every tensor. All problems come in one :class:`PlanError`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stiefel.merge.plan_config import changed_config, compare_meaning, files_to_copy
from stiefel.merge.plan_layers import layer_count
from stiefel.merge.plan_models import Model, Models
from stiefel.merge.plan_tensors import DTYPES, Member, Part, Tasks
from stiefel.merge.plan_types import MergePlan, PlannedModel
from stiefel.merge.plan_vocabulary import Aligner, Alignment, embedding_rows
from stiefel.merge.recipe import read_recipe
from stiefel.merge.recipe_errors import PlanError, Problem
from stiefel.merge.recipe_types import OutputSlice, Recipe, Source

SHARD_BYTES = 5_000_000_000


def build_plan(
    recipe: Recipe | str | Path,
    folder: str | Path | None = None,
    *,
    out: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    trust_remote_code: bool = False,
) -> MergePlan:
    """Plan a merge; reads headers, configurations and tokenizers, no tensor.

    Args:
        recipe: a checked recipe, or the path of one.
        folder: where relative paths of the recipe start (then the current folder is tried); by
            default the recipe's own folder.
        out: folder of the output, if known: it may not hold an input, and its disk must have room.
        shard_bytes: largest size of a file of the output.
        trust_remote_code: copy the base's Python files.

    Raises:
        RecipeError: the recipe is wrong.
        PlanError: models are missing, damaged, quantised, or do not fit one another or the recipe;
            no room on the disk. All problems at once.
        MissingPackageError: PyYAML or Pydantic is not installed.
    """
    if not isinstance(recipe, Recipe):
        folder = Path(recipe).parent if folder is None else folder
        recipe = read_recipe(recipe)
    if recipe.merges_adapters:
        text = "merges adapters into an adapter: plan it with build_adapter_plan"
        raise PlanError(recipe.name, [Problem(text)])
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ValueError(f"shard_bytes must be a whole number, at least 1, got {shard_bytes}")
    models = Models(Path(folder or "."))
    try:
        planner = _Planner(recipe, models, trust_remote_code)
        plan = planner.plan(shard_bytes)
        if out is not None and plan is not None:
            planner.problems += check_output(Path(out), plan)
        if planner.problems or plan is None:
            problems = sorted(dict.fromkeys(planner.problems), key=lambda p: p.line or 10**9)
            raise PlanError(recipe.name, problems)
        return plan
    finally:
        models.close()


class _Planner:
    """One plan in the making."""

    def __init__(self, recipe: Recipe, models: Models, trust_remote_code: bool) -> None:
        self.recipe = recipe
        self.models = models
        self.trust_remote_code = trust_remote_code
        self.problems = models.problems
        self.notes = models.notes
        self.used: list[Model] = []

    def plan(self, shard_bytes: int) -> MergePlan | None:
        """The plan; None where problems leave none to make."""
        recipe = self.recipe
        base = None if recipe.base is None else self.models.get(recipe.base)
        opened = [self._open(one, base) for one in recipe.slices]
        giver = None if recipe.tokenizer is None else self.models.get(recipe.tokenizer)
        if self.problems:
            return None
        parts = self._parts(opened)
        if self.problems:
            return None
        leader = parts[0].leader.model
        members = [member.model for part in parts for member in part.members]
        for model in (*members, *((giver,) if giver is not None else ())):
            if model.number < 0:
                model.number = len(self.used)
                self.used.append(model)
        for model in self.used:
            if model is not leader:
                notes, problems = compare_meaning(leader, model)
                self.notes += notes
                self.problems += [Problem(text, model.name, model.line) for text in problems]
        aligner = Aligner(
            leader,
            self.used,
            giver,
            with_union=recipe.union,
            policy=recipe.policies.vocabulary,
        )
        alignment = aligner.align()
        self.problems += aligner.problems
        self.notes += aligner.notes
        untie, drop_head = self._ties(parts)
        tasks = Tasks(recipe, parts, alignment, untie=untie, drop_head=drop_head)
        made = tasks.make()
        self.problems += tasks.problems
        self.notes += tasks.notes
        if not made:
            self.problems.append(Problem("there is no tensor to merge"))
        config, files, texts = self._beside(parts, alignment, giver, untie)
        return MergePlan(
            models=tuple(
                PlannedModel(m.name, m.path, None if m.adapter is None else m.adapter.path)
                for m in self.used
            ),
            tasks=made,
            config=config,
            recipe_text=recipe.text,
            files_to_copy=files,
            warnings=(*recipe.warnings, *dict.fromkeys(self.notes)),
            shard_bytes=shard_bytes,
            seed=recipe.seed,
            on_nonfinite=recipe.policies.nonfinite,
            files_to_write=texts,
        )

    # Models and layers.

    def _open(
        self, one: OutputSlice, base: Model | None
    ) -> list[tuple[Source | None, Model, bool]]:
        """Source, model, whether it is the base; the base first where no source names it."""
        if one.base is not None:
            base = self.models.get(one.base)
        found: list[tuple[Source | None, Model, bool]] = []
        for source in one.sources:
            model = self.models.get(source.ref, base if source.is_adapter else None)
            if model is not None:
                found.append((source, model, model is base))
        if base is not None and not any(is_base for _, _, is_base in found):
            found.insert(0, (None, base, True))
        return found

    def _parts(self, opened: Sequence[list[tuple[Source | None, Model, bool]]]) -> list[Part]:
        parts, first = [], 0
        for one, group in zip(self.recipe.slices, opened, strict=True):
            for _, model, _ in group:
                self._check_layers(model)
            if self.recipe.stacked:
                part = self._stack(one, group, first)
            else:
                count = next((m for _, m, is_base in group if is_base), group[0][1]).layers.count
                part = Part(one, tuple(self._member(*g, 0) for g in group), 0, count)
                self._check_counts(part)
            if part is not None:
                parts.append(part)
                first += part.count
        return parts

    def _member(self, source: Source | None, model: Model, is_base: bool, start: int) -> Member:
        merged = True
        if source is None and self.recipe.method.base != "required":
            # mergekit lets a base that is not listed take part, with the weight of all.
            merged = self.recipe.method.name == "linear" and "weight" in self.recipe.parameters
            if merged:
                self.notes.append(
                    f"{model.name} is not among the models but base_model, and takes part in the "
                    "mean with the weight that is set for all"
                )
        return Member(source, model, start, is_base, merged)

    def _stack(
        self, one: OutputSlice, group: list[tuple[Source | None, Model, bool]], first: int
    ) -> Part | None:
        members = []
        needs_base = self.recipe.method.base == "required"
        for source, model, is_base in group:
            if source is None:
                if needs_base:
                    line = one.sources[0].ref.line
                    text = f"the base {model.name} must be one of the sources, with its layers"
                    self.problems.append(Problem(text, one.key, line))
                continue
            assert source.layers is not None  # noqa: S101 - slices have ranges
            start, end = source.layers
            if end > model.layers.count:
                self.problems.append(
                    Problem(
                        f"layer_range {[start, end]} reaches beyond the {model.layers.count} "
                        f"layers of {model.name}",
                        source.key,
                        source.ref.line,
                    )
                )
                continue
            members.append(self._member(source, model, is_base, start))
        if len(members) < len(one.sources):
            return None
        layers = one.sources[0].layers
        count = 0 if layers is None else layers[1] - layers[0]
        return Part(one, tuple(members), first, count)

    def _check_layers(self, model: Model) -> None:
        said = layer_count(model.config)
        if said is not None and model.layers.count != said:
            self.problems.append(
                Problem(
                    f"its configuration says {said} layers, its tensors make {model.layers.count}",
                    model.name,
                    model.line,
                )
            )

    def _check_counts(self, part: Part) -> None:
        leader = part.leader.model
        for member in part.members:
            kinds = [m.config.get("model_type") for m in (member.model, leader)]
            one, other = ("", "") if kinds[0] == kinds[1] else (f" of {k}" for k in kinds)
            if member.model.layers.count != leader.layers.count:
                self.problems.append(
                    Problem(
                        f"has {member.model.layers.count} layers{one}, "
                        f"{leader.name} has {leader.layers.count}{other}; "
                        "slices merge chosen layers",
                        member.model.name,
                        member.model.line,
                    )
                )

    # Heads, configuration, files.

    def _ties(self, parts: Sequence[Part]) -> tuple[bool, bool]:
        """Whether the output gets a head of its own, and whether the leader's is left out."""
        leader = parts[-1].leader.model
        if not leader.is_tied:
            tied = [m.model for m in parts[-1].members if m.model.is_tied and m.model.embedding]
            if tied and leader.head is not None:
                self._differently(leader, tied)
            return False, False
        untied = [m.model for m in parts[-1].members if not m.model.is_tied and m.model.head]
        if untied:
            self._differently(leader, untied)
            return True, False
        return False, True

    def _differently(self, leader: Model, others: Sequence[Model]) -> None:
        names = ", ".join(dict.fromkeys(model.name for model in others))
        tied, untied = (leader.name, names) if leader.is_tied else (names, leader.name)
        text = f"one tensor is embedding and head of {tied}, but not of {untied}"
        if self.recipe.policies.tied == "error":
            self.problems.append(Problem(f"{text}. allow_tied: untie gives the output a head"))
        else:
            self.notes.append(
                f"{text}: the output has a head, and an embedding counts as the head of its model"
            )

    def _beside(
        self, parts: Sequence[Part], alignment: Alignment, giver: Model | None, untie: bool
    ) -> tuple[dict[str, Any] | None, dict[str, Path], dict[str, str]]:
        """Content of config.json, files to copy, files to write."""
        leader = parts[0].leader.model
        files, notes = files_to_copy(
            leader, giver or leader, trust_remote_code=self.trust_remote_code
        )
        self.notes += notes
        texts = dict(alignment.texts)
        if self.recipe.chat_template is not None:
            texts["chat_template.jinja"] = self.recipe.chat_template
        for name in texts:
            files.pop(name, None)
        if leader.checkpoint.config is None:
            self.notes.append(f"{leader.name} has no config.json, so the output has none")
            return None, files, texts
        rows = alignment.count if alignment.count != embedding_rows(leader) else None
        config = changed_config(
            leader.config,
            dtype=DTYPES[self.recipe.dtype] if self.recipe.dtype else None,
            rows=rows,
            tied=False if untie else None,
            layers=self._layers(parts) if self.recipe.stacked else None,
        )
        if config == leader.config:  # byte for byte
            files["config.json"] = leader.folder / "config.json"
        return config, files, texts

    def _layers(self, parts: Sequence[Part]) -> list[tuple[Any, int]]:
        return [
            (part.leader.model.config, part.leader.start + index)
            for part in parts
            for index in range(part.count)
        ]


def check_output(out: Path, plan: MergePlan) -> list[Problem]:
    """What speaks against writing the plan's output to ``out``: place and room."""
    problems = []
    real = out.resolve()
    if not real.name:
        return [Problem(f"{out} cannot be an output; give a folder below it")]
    for model in plan.models:
        for path in (model.path, model.adapter):
            if path is None:
                continue
            folder = (path if path.is_dir() else path.parent).resolve()
            if real == folder or real in folder.parents:
                problems.append(Problem(f"the output {out} would replace the input {path}"))
    if out.exists() and not out.is_dir():
        problems.append(Problem(f"the output {out} is a file; it must be a folder"))
    parent = real.parent
    while not parent.exists():
        parent = parent.parent
    needed = output_bytes(plan)
    made = real.with_name(f"{real.name}.partial")
    there = sum(p.stat().st_size for p in made.glob("*")) if made.is_dir() else 0
    free = shutil.disk_usage(parent).free
    if needed > free + there:
        problems.append(
            Problem(f"the output takes {needed:,} bytes, {parent} has {free:,} bytes free")
        )
    return problems


def output_bytes(plan: MergePlan) -> int:
    """Bytes of the output's files, to within a few for headers and settings."""
    tensors = sum(task.nbytes for task in plan.tasks)
    headers = sum(120 + len(task.name) for task in plan.tasks)
    copied = sum(path.stat().st_size for path in plan.files_to_copy.values())
    written = sum(len(text.encode()) for text in plan.files_to_write.values())
    return tensors + headers + copied + written

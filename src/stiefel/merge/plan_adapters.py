"""Plans of merges that make an adapter from adapters, without a model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stiefel.merge.adapter_merge import merge_lora_adapters
from stiefel.merge.oft import merge_oft_adapters
from stiefel.merge.peft_adapters import Adapter
from stiefel.merge.plan_models import Models, open_adapter
from stiefel.merge.recipe import read_recipe
from stiefel.merge.recipe_errors import PlanError, Problem
from stiefel.merge.recipe_methods import METHODS
from stiefel.merge.recipe_settings import resolve
from stiefel.merge.recipe_types import Recipe, Source


@dataclass(frozen=True)
class AdapterPlan:
    """Adapters of one kind that become one adapter."""

    kind: str
    """``LORA`` or ``OFT``."""
    names: tuple[str, ...]
    """As the recipe writes them."""
    paths: tuple[Path, ...]
    weights: tuple[float, ...]
    """As :func:`~stiefel.merge.adapter_merge.merge_lora_adapters` takes them: normalised where the
    recipe says so, and times ``lambda``."""
    method: str
    density: float | None
    intensity: float
    """Of ``orthomerge_oft``."""
    seed: int
    modules: int
    nbytes: int
    """Of all inputs together."""
    recipe_text: str
    warnings: tuple[str, ...] = ()
    dense: tuple[int, ...] = ()
    """Entries of each ΔW that the method forms; empty where it works on the factors."""


def build_adapter_plan(
    recipe: Recipe | str | Path,
    folder: str | Path | None = None,
    *,
    out: str | Path | None = None,
) -> AdapterPlan:
    """Plan the merge of a recipe whose models are all ``adapter:``; reads headers only.

    Arguments and errors as in :func:`~stiefel.merge.plan.build_plan`.
    """
    if not isinstance(recipe, Recipe):
        folder = Path(recipe).parent if folder is None else folder
        recipe = read_recipe(recipe)
    if not recipe.merges_adapters:
        raise PlanError(recipe.name, [Problem("merges models: plan it with build_plan")])
    models = Models(Path(folder or "."))
    problems, notes = models.problems, list(recipe.warnings)
    sources = recipe.slices[0].sources
    paths = [models.locate_adapter(source.ref) for source in sources]
    adapters = [
        open_adapter(path, source.ref, problems, notes)
        for path, source in zip(paths, sources, strict=True)
        if path is not None
    ]
    found = [adapter for adapter in adapters if adapter is not None]
    weights = _weights(recipe, sources, problems)
    density = _density(recipe, sources, problems)
    intensity = _plain(recipe, None, "intensity", problems)
    if not problems:
        problems += _check(recipe, found)
    if out is not None:
        problems += _check_place(Path(out), [path for path in paths if path is not None])
    if problems:
        raise PlanError(recipe.name, list(dict.fromkeys(problems)))
    bases = {str(adapter.config.get("base_model_name_or_path")) for adapter in found}
    if len(bases) > 1:
        notes.append(f"the adapters name different base models: {', '.join(sorted(bases))}")
    if recipe.base is not None:
        notes.append(
            f"base_model has no effect: the result is an adapter; a recipe with "
            f"{recipe.base}+OUTPUT folds it in"
        )
    return AdapterPlan(
        kind=found[0].kind,
        names=tuple(str(source.ref) for source in sources),
        paths=tuple(adapter.path for adapter in found),
        weights=tuple(weights),
        method=recipe.method.name,
        density=density,
        intensity=1.0 if intensity is None else float(intensity),
        seed=recipe.seed,
        modules=len({module for adapter in found for module in adapter.modules}),
        nbytes=sum(adapter.file.stat().st_size for adapter in found),
        recipe_text=recipe.text,
        warnings=tuple(dict.fromkeys(notes)),
        dense=_dense(recipe, found),
    )


@dataclass(frozen=True)
class AdapterResult:
    """What :func:`run_adapter_plan` made."""

    folder: Path
    modules: dict[str, dict[str, float | int]]
    """OFT: the correction factor c of each; LoRA: rank, and error of ties and dare."""
    warnings: tuple[str, ...]


def run_adapter_plan(
    plan: AdapterPlan, out: str | Path, *, overwrite: bool = False
) -> AdapterResult:
    """Make the adapter of ``plan`` in ``out``, a folder that appears whole or not at all.

    Raises:
        FileExistsError: ``out`` is there and ``overwrite`` is false.
        ValueError: NaN or infinities in an adapter, or files that changed since the plan.
        OSError: the disk refuses.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if plan.kind == "OFT":
            factors = merge_oft_adapters(
                plan.paths,
                out,
                weights=plan.weights,
                intensity=plan.intensity,
                overwrite=overwrite,
            )
            modules: dict[str, dict[str, float | int]] = {
                name: {"correction": factor} for name, factor in factors.items()
            }
        else:
            merged = merge_lora_adapters(
                plan.paths,
                out,
                plan.weights,
                METHODS[plan.method].low_rank,
                density=plan.density,
                seed=plan.seed,
                overwrite=overwrite,
            )
            modules = {
                name: {"rank": module.rank, "error": module.error}
                for name, module in merged.modules.items()
            }
    notes = tuple(dict.fromkeys(str(warning.message) for warning in caught))
    return AdapterResult(Path(out), modules, notes)


def _check(recipe: Recipe, adapters: Sequence[Adapter]) -> list[Problem]:
    """Whether the adapters are of the kind that the method merges."""
    wanted = "OFT" if recipe.method.adapters_only else "LORA"
    problems = []
    for adapter, source in zip(adapters, recipe.slices[0].sources, strict=True):
        line = source.ref.line
        if adapter.kind != wanted:
            text = f"is an {adapter.kind} adapter; {recipe.method.name} merges {wanted} adapters"
            if wanted == "LORA":
                text += ", orthomerge_oft merges OFT adapters"
            problems.append(Problem(text, str(source.ref), line))
        elif wanted == "LORA" and any(adapter.is_dora(module) for module in adapter.modules):
            text = "is a DoRA adapter, which no sum of updates is; put each on the base_model"
            problems.append(Problem(text, str(source.ref), line))
        elif wanted == "LORA" and adapter.replaced:
            text = (
                f"replaces {', '.join(adapter.replaced[:5])} whole, which needs the base: name "
                "the base_model"
            )
            problems.append(Problem(text, str(source.ref), line))
        first = adapters[0]
        if adapter.kind == first.kind == "OFT" and adapter is not first:
            for key in ("oft_block_size", "r", "block_share"):
                if adapter.config.get(key) != first.config.get(key):
                    text = (
                        f"has {key} {adapter.config.get(key)}, {recipe.slices[0].sources[0].ref} "
                        f"has {first.config.get(key)}: blocks have to be the same"
                    )
                    problems.append(Problem(text, str(source.ref), line))
    return problems or _check_shapes(recipe.slices[0].sources, adapters)


def _dense(recipe: Recipe, adapters: Sequence[Adapter]) -> tuple[int, ...]:
    if recipe.method.low_rank not in ("ties", "dare"):
        return ()
    shapes = {module: a.shape(module) for a in adapters for module in a.modules}
    return tuple(math.prod(shape) for shape in shapes.values())


def _check_shapes(sources: Sequence[Source], adapters: Sequence[Adapter]) -> list[Problem]:
    """Whether adapters of a module are for the same layer; all of one kind."""
    problems = []
    first: dict[str, tuple[Source, tuple[int, ...]]] = {}
    for adapter, source in zip(adapters, sources, strict=True):
        for module in adapter.modules:
            other, wanted = first.setdefault(module, (source, adapter.shape(module)))
            if adapter.shape(module) != wanted:
                text = (
                    f"{module} has shape {list(adapter.shape(module))}, in {other.ref} "
                    f"{list(wanted)}: adapters of one base model are needed"
                )
                problems.append(Problem(text, str(source.ref), source.ref.line))
    return problems


def _weights(recipe: Recipe, sources: Sequence[Source], problems: list[Problem]) -> list[float]:
    weights = [_plain(recipe, source, "weight", problems) for source in sources]
    if problems or any(weight is None for weight in weights):
        return []
    found = [float(weight) for weight in weights if weight is not None]
    if recipe.method.adapters_only and not any(found):
        problems.append(Problem("the weights are all zero", "parameters.weight"))
        return []
    scale = 1.0
    if recipe.method.parameter("lambda") is not None:
        scale = float(_plain(recipe, None, "lambda", problems) or 0.0)
    if recipe.method.parameter("normalize") is not None and recipe.method.name != "ties":
        if _plain(recipe, None, "normalize", problems):
            total = math.fsum(found)
            if abs(total) <= 1e-8 * max(1.0, *map(abs, found)):
                problems.append(Problem("the weights sum to zero", "parameters.weight"))
                return []
            scale /= total
    elif recipe.method.name == "ties" and not _plain(recipe, None, "normalize", problems):
        text = "of adapters alone is always true; name the base_model for false"
        problems.append(Problem(text, "parameters.normalize"))
    return [scale * weight for weight in found]


def _density(recipe: Recipe, sources: Sequence[Source], problems: list[Problem]) -> float | None:
    if recipe.method.parameter("density") is None or recipe.method.low_rank == "":
        return None
    densities = {_plain(recipe, source, "density", problems) for source in sources}
    if len(densities) != 1 or None in densities or 0.0 in densities:
        text = "must be one number above 0 for all adapters; different ones need the base_model"
        problems.append(Problem(text, "parameters.density"))
        return None
    return float(next(iter(densities)) or 1.0)


def _plain(
    recipe: Recipe, source: Source | None, name: str, problems: list[Problem]
) -> float | bool | str | None:
    """A parameter that is one value for all modules."""
    parameter = recipe.method.parameter(name)
    if parameter is None:
        return None
    inner = () if source is None else (source.parameters,)
    places = (*inner, recipe.slices[0].parameters, recipe.parameters)
    for place in places:
        for rule in place.get(name, ()):
            if rule.filter not in (None, "*") or isinstance(rule.value, tuple):
                where = f"{'' if source is None else source.key + '.'}parameters.{name}"
                text = "gradients and filters are for models: one number for an adapter"
                problems.append(Problem(text, where, None if source is None else source.ref.line))
                return None
    try:
        return resolve(parameter, places, "", 0.0)
    except LookupError:
        where = "parameters" if source is None else f"{source.key}.parameters"
        line = None if source is None else source.ref.line
        problems.append(Problem(f"{recipe.method.name} needs {name}", where, line))
        return None


def _check_place(out: Path, paths: Sequence[Path]) -> list[Problem]:
    real = out.resolve()
    return [
        Problem(f"the output {out} would replace the input {path}")
        for path in paths
        if real == path.resolve() or real in path.resolve().parents
    ]

"""How each method of a recipe works on chunks of rows.

``start_method`` makes the passes over the inputs that a method needs beforehand (thresholds, an
angle) and returns the step that turns the same rows of all inputs into rows of the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stiefel.merge.additive import (
    linear_rows,
    slerp_coefficients,
    slerp_moments,
    task_arithmetic_rows,
)
from stiefel.merge.arithmetic import work_dtype
from stiefel.merge.dare import dare_rows
from stiefel.merge.engine_inputs import Reader, chunk_rows, row_count
from stiefel.merge.plan_types import TensorTask
from stiefel.merge.ties import Cut, MagnitudeCounter, kept_entries, ties_rows

Step = Callable[[Tensor | None, Sequence[Tensor], int, Tensor], None]
"""``step(base, sources, first_row, out)`` fills ``out``; rows come in order, each once."""

Details = dict[str, Any]
Tick = Callable[[], None]
"""Called between chunks; raises where the merge is to stop."""


def passes(task: TensorTask) -> int:
    """How often the inputs are read."""
    if task.method == "ties" and any(each.get("density", 1) < 1 for each in task.source_parameters):
        return 3
    return 2 if task.method == "slerp" else 1


def start_method(
    task: TensorTask, base: Reader | None, sources: Sequence[Reader], seed: int, tick: Tick
) -> tuple[Step, Details]:
    """The step of the task's method, and what the report should tell about the tensor.

    Raises:
        ValueError: a method that does not work on chunks, or one that lacks its base.
    """
    if task.method == "copy":
        return _copy, {}
    if task.method == "linear":
        return _linear(task), {}
    if base is None:
        raise ValueError(f"{task.name}: {task.method} needs a base")
    if task.method == "slerp":
        return _slerp(task, base, sources[0], tick)
    if task.method == "ties":
        return _ties(task, base, sources, tick)
    if task.method == "task_arithmetic":
        return _task_arithmetic(task), {}
    if task.method in ("dare_linear", "dare_ties"):
        return _dare(task, seed), {}
    raise ValueError(f"{task.name}: no method {task.method!r} on rows")


def each(task: TensorTask, name: str, default: float | None = None) -> list[float]:
    """One parameter of every source."""
    found = [own.get(name, default) for own in task.source_parameters]
    if len(found) != len(task.sources) or None in found:
        raise ValueError(f"{task.name}: {task.method} needs {name} for each source")
    return [float(value) for value in found if value is not None]


def pieces(task: TensorTask, readers: Sequence[Reader]) -> Iterator[tuple[int, int]]:
    """First and last row of each chunk, in order."""
    count, size = row_count(task.shape), chunk_rows(task, readers)
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _copy(base: Tensor | None, sources: Sequence[Tensor], start: int, out: Tensor) -> None:
    out.copy_(sources[0])


def _linear(task: TensorTask) -> Step:
    weights, normalize = each(task, "weight"), bool(task.parameters.get("normalize", True))

    def step(base: Tensor | None, sources: Sequence[Tensor], start: int, out: Tensor) -> None:
        linear_rows(sources, weights, normalize=normalize, out=out)

    return step


def _differences(task: TensorTask, normalize: bool) -> Mapping[str, Any]:
    """What all methods on differences share."""
    return {
        "weights": each(task, "weight"),
        "normalize": bool(task.parameters.get("normalize", normalize)),
        "scale": float(task.parameters.get("lambda", 1.0)),
    }


def _task_arithmetic(task: TensorTask) -> Step:
    shared = _differences(task, normalize=False)

    def step(base: Tensor | None, sources: Sequence[Tensor], start: int, out: Tensor) -> None:
        assert base is not None  # noqa: S101 - checked when the method was started
        task_arithmetic_rows(base, sources, out=out, **shared)

    return step


def _dare(task: TensorTask, seed: int) -> Step:
    shared = dict(_differences(task, normalize=False))
    densities = each(task, "density", 1.0)
    rescale = bool(task.parameters.get("rescale", True))
    row = math.prod(task.shape[1:])

    def step(base: Tensor | None, sources: Sequence[Tensor], start: int, out: Tensor) -> None:
        assert base is not None  # noqa: S101 - checked when the method was started
        dare_rows(
            base,
            sources,
            densities=densities,
            seed=seed,
            name=task.name,
            start=start * row,
            consensus="sum" if task.method == "dare_ties" else None,
            rescale=rescale,
            out=out,
            **shared,
        )

    return step


def _slerp(task: TensorTask, base: Reader, source: Reader, tick: Tick) -> tuple[Step, Details]:
    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for start, stop in pieces(task, [base, source]):
            tick()
            yield base.rows(start, stop), source.rows(start, stop)

    moments = slerp_moments(chunks())
    factors = slerp_coefficients(float(task.parameters["t"]), moments)

    def step(base: Tensor | None, sources: Sequence[Tensor], start: int, out: Tensor) -> None:
        assert base is not None  # noqa: S101 - checked when the method was started
        linear_rows([base, sources[0]], factors, normalize=False, out=out)

    return step, {"factors": list(factors)}


def _ties(
    task: TensorTask, base: Reader, sources: Sequence[Reader], tick: Tick
) -> tuple[Step, Details]:
    shared = _differences(task, normalize=True)
    cuts = _cuts(task, base, sources, tick)
    details = {"thresholds": [None if cut is None else cut.value for cut in cuts]}

    def step(base: Tensor | None, sources: Sequence[Tensor], start: int, out: Tensor) -> None:
        assert base is not None  # noqa: S101 - checked when the method was started
        ties_rows(base, sources, cuts, out=out, **shared)

    return step, details


def _cuts(
    task: TensorTask, base: Reader, sources: Sequence[Reader], tick: Tick
) -> list[Cut | None]:
    """The limit of each source's difference, all found in the same passes over the base."""
    numel = math.prod(task.shape)
    dtype = work_dtype([torch.empty(0, dtype=r.dtype) for r in (base, *sources)])
    wanted = {
        number: (MagnitudeCounter(dtype), kept_entries(numel, density))
        for number, density in enumerate(each(task, "density", 1.0))
        if density < 1 and numel
    }
    if wanted:
        for _ in range(next(iter(wanted.values()))[0].passes):
            for start, stop in pieces(task, [base, *sources]):
                tick()
                origin = base.rows(start, stop)
                for number, (counter, _) in wanted.items():
                    counter.count(sources[number].rows(start, stop), origin)
            for counter, k in wanted.values():
                counter.narrow(k)
    return [wanted[i][0].cut() if i in wanted else None for i in range(len(sources))]

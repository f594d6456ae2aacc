"""Tasks of meta-learning: pairs of support and query, stacked so that all run at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stiefel.nn.lemon.checks import check_count
from stiefel.nn.lemon.prose import PROSE
from stiefel.nn.lemon.training import Data, split
from stiefel.nn.lemon.training_data import OperatorData

Task = tuple[Data, Data]
"""Support (what a model adapts to) and query (what the adapted model is judged by)."""


class Part(NamedTuple):
    """Support or query of several tasks: every tensor has leading axes task and sample."""

    inputs: tuple[Tensor, ...]
    target: Tensor


class Group(NamedTuple):
    """Tasks of one size, and where they stand among all."""

    support: Part
    query: Part
    places: tuple[int, ...]


def split_task(
    data: OperatorData,
    support: int = 10,
    query: int = 20,
    *,
    generator: torch.Generator | None = None,
) -> tuple[OperatorData, OperatorData]:
    """Support and query of one family, drawn without repeating a sample.

    Args:
        data: Samples of one family.
        support, query: How many of each.
        generator: For the draw.

    Raises:
        ValueError: more samples asked for than there are.
    """
    check_count("support", support)
    check_count("query", query)
    if support + query > len(data):
        raise ValueError(
            f"support + query must be at most the {len(data)} samples of data, "
            f"got {support} + {query}"
        )
    order = torch.randperm(len(data), generator=generator)
    return data[order[:support]], data[order[support : support + query]]


def examples(model: nn.Module, data: Data, name: str) -> Part:
    """Inputs and target of one side of one task; trajectories normalised by their inputs.

    :class:`PROSE` gets every equation once and an index; other models get one per sample.

    Raises:
        TypeError, ValueError: as :func:`split`; also for no samples.
    """
    inputs, target = split(data)
    if len(target) == 0:
        raise ValueError(f"{name} must hold at least one sample")
    if not isinstance(data, OperatorData):
        return Part(inputs, target)
    inputs, target = split(data.normalised()[0])
    if isinstance(model, PROSE) and model.use_symbols:
        rows, which = torch.unique(inputs[3], dim=0, return_inverse=True)
        inputs = (*inputs[:3], rows, which)
    return Part(tuple(inputs), target)


def stacked(model: nn.Module, tasks: Sequence[Any], device: torch.device) -> list[Group]:
    """Tasks of equal shapes side by side; equations of different lengths are padded.

    Raises:
        TypeError, ValueError: no tasks, a task that is no pair, or what :func:`examples` refuses.
    """
    if len(tasks) == 0:
        raise ValueError("tasks must hold at least one (support, query)")
    pairs = []
    for i, task in enumerate(tasks):
        if not (isinstance(task, tuple | list) and len(task) == 2):
            raise TypeError(f"task {i} must be a pair (support, query), got {type(task).__name__}")
        support, query = task
        pairs.append((
            examples(model, support, f"support of task {i}"),
            examples(model, query, f"query of task {i}"),
        ))  # fmt: skip
    pad = model.pad if isinstance(model, PROSE) and model.use_symbols else None
    sides = [_same_length([p[k] for p in pairs], pad) for k in (0, 1)]
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, pair in enumerate(zip(*sides, strict=True)):
        shape = tuple(x.shape for part in pair for x in (*part.inputs, part.target))
        groups.setdefault(shape, []).append(i)
    support, query = sides
    return [
        Group(
            _stack([support[i] for i in places], device),
            _stack([query[i] for i in places], device),
            tuple(places),
        )
        for places in groups.values()
    ]


def _same_length(parts: list[Part], pad: int | None) -> list[Part]:
    """Equations as long, and as many, in every part; only where there is a padding token."""
    if pad is None or any(len(p.inputs) != 5 for p in parts):
        return parts
    lengths = [int((p.inputs[3] != pad).any(0).nonzero().max()) + 1 for p in parts]
    longest, most = max(lengths), max(p.inputs[3].shape[0] for p in parts)
    found = []
    for part, length in zip(parts, lengths, strict=True):
        tokens = part.inputs[3][:, :length]
        tokens = nn.functional.pad(tokens, (0, longest - length), value=pad)
        # Rows that nobody asks for repeat the first one.
        tokens = torch.cat([tokens, tokens[:1].expand(most - len(tokens), -1)])
        found.append(Part((*part.inputs[:3], tokens, part.inputs[4]), part.target))
    return found


def _stack(parts: list[Part], device: torch.device) -> Part:
    columns = zip(*(p.inputs for p in parts), strict=True)
    inputs = tuple(torch.stack(column).to(device) for column in columns)
    return Part(inputs, torch.stack([p.target for p in parts]).to(device))

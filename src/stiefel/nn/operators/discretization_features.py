"""Features of a network on two grids: recorded by hooks, restricted to common points, compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.nn.operators.convert_grid import ATTRIBUTE, Grid, Place
from stiefel.nn.operators.resample import resample

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call of one sub-module."""

    name: str
    index: int
    """Which call of this sub-module it was."""
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor | None
    """The first tensor that it returned."""
    start: int
    """Calls that began before it."""
    leaf: bool
    places: tuple[tuple[Grid, Place], ...]
    """Where converted networks were being evaluated."""


def grids_of(module: nn.Module) -> list[Grid]:
    """Those of all converted parts."""
    found = {
        id(g): g for m in module.modules() if isinstance(g := getattr(m, ATTRIBUTE, None), Grid)
    }
    return list(found.values())


def record(module: nn.Module, x: Tensor, grids: Sequence[Grid]) -> list[Call]:
    """Every call of every sub-module while ``module(x)`` runs, in the order of their ends.

    Raises:
        RuntimeError: it failed; names the sub-module that was running.
    """
    calls: list[Call] = []
    counts: dict[str, int] = {}
    running: list[list[Any]] = []  # name, place in the order of beginnings, whether it has called
    begun = 0

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal begun
            if running:
                running[-1][2] = False
            running.append([name, begun, True])
            begun += 1

        return hook

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name, start, leaf = running.pop()
        counts[name] = index = counts.get(name, -1) + 1
        places = tuple((g, p) for g in grids if (p := g.current) is not None)
        calls.append(
            Call(name, index, module, args, kwargs, first_tensor(output), start, leaf, places)
        )

    handles = []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(child.register_forward_hook(after, with_kwargs=True))
    try:
        module(x)
    except Exception as error:
        where = running[-1][0] if running else ""
        raise RuntimeError(
            f"module fails on a field of shape {tuple(x.shape)}, in {where or 'its own code'!r}: "
            f"{error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def own_output(
    fine: Call, coarse: Call, finest: Shape, shape: Shape, periodic: bool
) -> Tensor | None:
    """What a sub-module returns for the finest grid's features at the points of a coarser one.

    None where its arguments are not features on these grids.
    """
    if len(fine.args) != len(coarse.args) or fine.kwargs.keys() != coarse.kwargs.keys():
        return None
    pairs = [*zip(fine.args, coarse.args, strict=True)]
    pairs += [(fine.kwargs[key], coarse.kwargs[key]) for key in fine.kwargs]
    values = []
    for a, b in pairs:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            a = restrict(a, b.shape, finest, shape, periodic)
            if a is None:
                return None
            values.append(a)
        else:
            values.append(b)
    count = len(fine.args)
    with ExitStack() as stack:
        for grid, place in coarse.places:
            stack.enter_context(grid.at(place))
        output = coarse.module(
            *values[:count], **dict(zip(fine.kwargs, values[count:], strict=True))
        )
    found = first_tensor(output)
    if found is None or coarse.output is None or found.shape != coarse.output.shape:
        return None
    return found


def first_tensor(output: Any) -> Tensor | None:
    """Of what a module returns: itself, or the first in a tuple, list or mapping."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        return next((x for x in output if isinstance(x, Tensor)), None)
    return None


def relative_change(x: Tensor, exact: Tensor) -> float:
    """‖x − exact‖ / ‖exact‖; ∞ where only ``exact`` is zero.

    Raises:
        ValueError: ``x`` or ``exact`` has NaN or infinities.
    """
    difference = float(torch.linalg.vector_norm(x - exact))
    size = float(torch.linalg.vector_norm(exact))
    if not (math.isfinite(difference) and math.isfinite(size)):
        raise ValueError("the network returns NaN or infinities for this function")
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


def restrict(
    x: Tensor, target: Sequence[int], finest: Shape, shape: Shape, periodic: bool
) -> Tensor | None:
    """Features of the finest grid at the points of another, as a tensor of shape ``target``.

    Axes that differ are grid axes, or one axis of all points. None where they are not.
    """
    target = tuple(target)
    if tuple(x.shape) == target:
        return x
    if x.ndim != len(target):
        return None
    axes = [i for i, (n, m) in enumerate(zip(x.shape, target, strict=True)) if n != m]
    if len(finest) > 1 and len(axes) == 1:
        axis = axes[0]
        fine, here = _level(x.shape[axis], finest), _level(target[axis], shape)
        if fine is not None and here is not None:
            y = x.unflatten(axis, fine)
            for i, n in enumerate(here):
                y = _along(y, axis + i, n, periodic)
            return y.flatten(axis, axis + len(here) - 1)
    for axis in axes:
        x = _along(x, axis, target[axis], periodic)
    return x


def _level(points: int, grid: Shape) -> Shape | None:
    """The grid of so many points that has the proportions of ``grid``."""
    for step in range(1, min(grid) + 1):
        level = tuple(n // step for n in grid)
        if math.prod(level) == points:
            return level
        if math.prod(level) < points:
            return None
    return None


def _along(x: Tensor, axis: int, size: int, periodic: bool) -> Tensor:
    """Every so many points of one axis where that gives ``size``, else resampled."""
    old, ends = x.shape[axis], 0 if periodic else 1
    if size > ends and old > size and (old - ends) % (size - ends) == 0:
        index = torch.arange(size, device=x.device) * ((old - ends) // (size - ends))
        return x.index_select(axis, index)
    if not (x.is_floating_point() or x.is_complex()):
        index = torch.arange(size, device=x.device) * max(old - ends, 0) // max(size - ends, 1)
        return x.index_select(axis, index)
    rows = x.movedim(axis, -1)
    mode = "fourier" if periodic else "linear"
    y = resample(rows.reshape(1, -1, old), size, mode, periodic=periodic)
    return y.reshape(*rows.shape[:-1], size).movedim(-1, axis)

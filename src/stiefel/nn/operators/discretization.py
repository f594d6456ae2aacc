"""How much a network's answer depends on the grid, and which of its layers makes it so.

Source: arXiv 2506.10973, "discretisation convergence"; sheet, "Proposed API".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.nn.operators.checks import Sizes, check_finite_values, sizes
from stiefel.nn.operators.convert_grid import ATTRIBUTE, Grid
from stiefel.nn.operators.discretization_features import (
    Call,
    grids_of,
    own_output,
    record,
    relative_change,
    restrict,
)

Shape = tuple[int, ...]
# A module is blamed for code of its own where its error is this many times that of all its layers.
OWN_CODE = 4.0
# The layer named is the first whose own error reaches this part of the largest.
PART = 0.5
# Errors up to so many roundings are none.
ROUNDINGS = 100


@dataclass(frozen=True)
class LayerError:
    """One sub-module on every grid."""

    name: str
    kind: str
    own: Mapping[Shape, float]
    """Relative error that it makes by itself: given the features of the finest grid at the points
    of this one, against its output there."""
    total: Mapping[Shape, float]
    """Relative change of its output in the network: all errors up to here."""
    leaf: bool
    """Whether no other sub-module ran inside it."""

    @property
    def worst(self) -> float:
        """The largest own error of all grids."""
        return max(self.own.values(), default=0.0)


@dataclass(frozen=True)
class DiscretizationReport:
    """What :func:`discretization_error` found; ``print`` shows a table."""

    finest: Shape
    table: Mapping[Shape, float]
    """Relative change of the output against the finest grid, for every other one."""
    layers: tuple[LayerError, ...]
    """In the order in which they ran."""
    layer: str | None
    """Where the error enters: the first sub-module whose own error is at least half of the largest
    (``""``: code of the network itself); None if there is no error beyond rounding."""

    def __getitem__(self, shape: Sizes) -> float:
        """The relative change at one grid, 0 at the finest. ``KeyError`` if it was not run."""
        key = sizes(shape, None, "shape")
        if len(key) == 1:
            key *= len(self.finest)
        return 0.0 if key == self.finest else self.table[key]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: finest, table and layers with grids as ``"64x64"``."""
        return {
            "finest": _text(self.finest),
            "table": {_text(shape): value for shape, value in self.table.items()},
            "layer": self.layer,
            "layers": [
                {
                    "name": x.name,
                    "kind": x.kind,
                    "leaf": x.leaf,
                    "own": {_text(shape): value for shape, value in x.own.items()},
                    "total": {_text(shape): value for shape, value in x.total.items()},
                }
                for x in self.layers
            ],
        }

    def __str__(self) -> str:
        shapes = list(self.table)
        head = ["own error of", *map(_text, shapes)]
        rows = [head]
        for x in self.layers:
            mark = "→ " if x.name == self.layer else "  "
            label = f"{mark}{x.name or '(whole)'} {x.kind}"
            rows.append([label, *(_number(x.own.get(s)) for s in shapes)])
        rows.append(
            [f"output against {_text(self.finest)}", *(_number(self.table[s]) for s in shapes)]
        )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = []
        for first, *cells in rows:
            numbers = (c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[0]), *numbers]))
        return "\n".join(lines)

    def figure(self) -> Any:
        """Change against points, and own errors of the layers, as ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from stiefel.nn.operators.discretization_plot import figure

        return figure(self)

    def plot(self, ax: Any = None) -> Any:
        """Change of the output against points per axis, into ``ax`` or a new figure; returns it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from stiefel.nn.operators.discretization_plot import plot

        return plot(self, ax)


def discretization_error(
    module: nn.Module,
    function: Callable[[Tensor], Tensor] | Tensor,
    shapes: Sequence[Sizes],
    *,
    periodic: bool | None = None,
    dtype: torch.dtype | None = None,
) -> DiscretizationReport:
    """Evaluate one function on several grids; compare outputs and features with the finest.

    A network that is an operator changes less and less as the grid is refined. One that is tied to
    its grid does not, and the report names the layer. Works for any network of fields; weights and
    mode (train, eval) stay, it runs in eval mode and without gradients.

    Args:
        module: Takes one field ``[batch, channels, *grid]``; converted or not.
        function: Takes coordinates ``[d, *grid]`` in [0, 1], returns ``[batch, channels, *grid]``
            or ``[channels, *grid]``; or that field itself on the finest grid, of which others take
            every so many points.
        shapes: At least two grids, of as many axes; one number is a grid of one axis.
        periodic: Points j/N; False: both end points. None: as ``module`` was converted, or True.
        dtype: Of the coordinates; None: that of the first parameter.

    Returns:
        A :class:`DiscretizationReport`. Values are compared where the grids have common points,
        elsewhere by :func:`resample`.

    Raises:
        TypeError: ``module`` no network, ``shapes`` not integers.
        ValueError: fewer than two grids, or of different axes; ``function`` gives something else
            than a finite field; the output of ``module`` has NaN or no tensor.
        RuntimeError: ``module`` fails on one of the grids; names the sub-module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    wanted = list(dict.fromkeys(sizes(s, None, "shapes") for s in shapes))
    if len(wanted) < 2 or len({len(s) for s in wanted}) > 1:
        raise ValueError(f"shapes must be at least two grids of as many axes, got {shapes!r}")
    grid = getattr(module, ATTRIBUTE, None)
    if periodic is None:
        periodic = grid.periodic if isinstance(grid, Grid) else True
    first = next(module.parameters(), None)
    place: dict[str, Any] = {
        "dtype": dtype or (torch.get_default_dtype() if first is None else first.real.dtype),
        "device": None if first is None else first.device,
    }
    finest = max(wanted, key=math.prod)
    coarse = [s for s in wanted if s != finest]
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            return _compare(module, function, finest, coarse, periodic, place)
    finally:
        for m, mode in modes:
            m.training = mode


def _compare(
    module: nn.Module,
    function: Callable[[Tensor], Tensor] | Tensor,
    finest: Shape,
    coarse: list[Shape],
    periodic: bool,
    place: Mapping[str, Any],
) -> DiscretizationReport:
    grids = grids_of(module)
    reference = record(module, _sample(function, finest, finest, periodic, place), grids)
    own: dict[str, dict[Shape, float]] = {c.name: {} for c in reference}
    total: dict[str, dict[Shape, float]] = {c.name: {} for c in reference}
    for shape in coarse:
        calls = record(module, _sample(function, shape, finest, periodic, place), grids)
        found = {(c.name, c.index): c for c in calls}
        for fine in reference:
            here = found.get((fine.name, fine.index))
            if here is None or fine.output is None or here.output is None:
                continue
            exact = restrict(fine.output, here.output.shape, finest, shape, periodic)
            if exact is None:
                continue
            _keep(total[fine.name], shape, relative_change(here.output, exact))
            if fine.name:
                alone = own_output(fine, here, finest, shape, periodic)
                if alone is not None:
                    _keep(own[fine.name], shape, relative_change(alone, exact))
    if any(s not in total[""] for s in coarse):
        raise ValueError(
            "the output of module must be one field whose grid follows that of the input"
        )
    own[""] = dict(total[""])  # its input has no error
    rows = _rows(reference, own, total)
    eps = torch.finfo(place["dtype"]).eps
    return DiscretizationReport(finest, total[""], rows, _blamed(rows, ROUNDINGS * eps))


def _rows(
    reference: Sequence[Call], own: Mapping[str, Any], total: Mapping[str, Any]
) -> tuple[LayerError, ...]:
    """One per name, in the order of the first calls."""
    rows: dict[str, LayerError] = {}
    for call in sorted(reference, key=lambda c: c.start):
        name, kind = call.name, type(call.module).__name__
        if name not in rows:
            rows[name] = LayerError(name, kind, own[name], total[name], call.leaf)
    return tuple(rows.values())


def _blamed(rows: Sequence[LayerError], tolerance: float) -> str | None:
    """The first candidate with half of the largest own error.

    Candidates are leaves, and modules whose error their leaves do not explain: those have code of
    their own that is tied to the grid.
    """
    candidates = []
    for row in rows:
        if not row.leaf:
            below = f"{row.name}." if row.name else ""
            inside = sum(x.worst for x in rows if x.leaf and x.name.startswith(below))
            deeper = max(
                (x.worst for x in rows if not x.leaf and x.name.startswith(below) and x != row),
                default=0.0,
            )
            if row.worst <= OWN_CODE * max(inside, deeper):
                continue
        candidates.append(row)
    largest = max((row.worst for row in candidates), default=0.0)
    if not largest > tolerance:
        return None
    return next(row.name for row in candidates if row.worst >= PART * largest)


def _keep(errors: dict[Shape, float], shape: Shape, value: float) -> None:
    """The largest of several calls."""
    errors[shape] = max(value, errors.get(shape, 0.0))


def _sample(
    function: Callable[[Tensor], Tensor] | Tensor,
    shape: Shape,
    finest: Shape,
    periodic: bool,
    place: Mapping[str, Any],
) -> Tensor:
    """The input field ``[batch, channels, *shape]``."""
    if isinstance(function, Tensor):
        if tuple(function.shape[-len(finest) :]) != finest:
            raise ValueError(
                f"function, if a tensor, must be a field on the finest grid {finest}, got shape "
                f"{tuple(function.shape)}"
            )
        target = (*function.shape[: function.ndim - len(shape)], *shape)
        x = restrict(function.to(**place), target, finest, shape, periodic)
    else:
        ends = 0 if periodic else 1
        lines = [torch.arange(n, **place) / max(n - ends, 1) for n in shape]
        x = function(torch.stack(torch.meshgrid(*lines, indexing="ij")))
    ndim = len(shape)
    if isinstance(x, Tensor) and x.ndim == ndim + 1:
        x = x[None]
    if not isinstance(x, Tensor) or x.ndim != ndim + 2 or tuple(x.shape[2:]) != shape:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"function must return [batch, channels, *grid] on the grid {shape}, got {got}"
        )
    check_finite_values(x, "what function returns")
    return x


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"

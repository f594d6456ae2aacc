"""What a network's layers do when the grid changes, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from stiefel.nn.operators.checks import Sizes
from stiefel.nn.operators.convert_grid import ATTRIBUTE, Grid
from stiefel.nn.operators.report_context import grid_sizes
from stiefel.nn.operators.report_rules import BLOCKS, UNSEEN, examine


@dataclass(frozen=True)
class LayerReport:
    """One sub-module."""

    name: str
    """As in ``named_modules``; ``""`` is the network itself."""
    kind: str
    """Its class."""
    status: str
    """``"ok"``: the same on every grid; ``"converted"``: convert replaces it, or has done so;
    ``"unseen"``: its own code calls functions that count points, which convert cannot replace;
    ``"blocks conversion"``: tied to one grid."""
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """Every sub-module of a network; ``print`` shows a table."""

    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        """The row of one sub-module. Raises ``KeyError`` if there is none of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no sub-module {name!r}")

    @property
    def blocking(self) -> tuple[LayerReport, ...]:
        """What makes :func:`convert` raise."""
        return tuple(layer for layer in self.layers if layer.status == BLOCKS)

    @property
    def unmapped(self) -> tuple[LayerReport, ...]:
        """What stays tied to the grid: it blocks, or cannot be seen from outside."""
        return tuple(layer for layer in self.layers if layer.status in (BLOCKS, UNSEEN))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: ``{"layers": [{"name", "kind", "status", "reason"}, …]}``."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        rows = [("layer", "kind", "status", "why")]
        rows += [(x.name or "(whole)", x.kind, x.status, x.reason) for x in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        )


class ConversionError(ValueError):
    """A network cannot be converted; the message names the sub-modules. ``report`` has all rows."""

    def __init__(self, report: ConversionReport) -> None:
        self.report = report
        rows = "; ".join(
            f"{x.name or 'the module'} ({x.kind}): {x.reason}" for x in report.blocking
        )
        super().__init__(f"cannot convert {rows}")


def report(module: nn.Module, base_shape: Sizes | None = None) -> ConversionReport:
    """Every sub-module: ok, converted, unseen or blocking, and why. Changes nothing.

    Args:
        module: Any network, or one that :func:`convert` returned.
        base_shape: The grid that it was trained on. Without it what is as large as that grid
            (dense layers, tables of positions) can only be told by where it stands. A converted
            network knows its own.

    Raises:
        TypeError: ``module`` is no ``nn.Module``, ``base_shape`` not integers.
        ValueError: ``base_shape`` has not as many axes as the convolutions, or sizes below 1.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    grid = getattr(module, ATTRIBUTE, None)
    interpolation = "hat"
    if isinstance(grid, Grid):
        base_shape, interpolation = grid.base_shape, grid.interpolation
    base = None if base_shape is None else grid_sizes(module, base_shape)
    rows = []
    for verdict in examine(module, base, interpolation):
        kind = type(verdict.module).__name__
        rows.append(LayerReport(verdict.name, kind, verdict.status, verdict.reason))
    return ConversionReport(tuple(rows))

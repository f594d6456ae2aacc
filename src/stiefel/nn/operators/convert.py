"""A network trained on one grid as an operator on all grids, weights unchanged.

Source: arXiv 2506.10973, the recipe block by block; sheet, "Proposed API".
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from stiefel.nn.operators.checks import Sizes, chosen
from stiefel.nn.operators.convert_grid import ATTRIBUTE, Grid
from stiefel.nn.operators.converted_layers import Converted, class_of
from stiefel.nn.operators.report import ConversionError, ConversionReport, LayerReport
from stiefel.nn.operators.report_context import grid_sizes
from stiefel.nn.operators.report_rules import BLOCKS, Verdict, examine
from stiefel.nn.operators.resample import MODES

INTERPOLATIONS = ("hat", "official")


def convert(
    module: nn.Module,
    base_shape: Sizes | None,
    *,
    interpolation: str = "hat",
    resample: str = "fourier",
    periodic: bool = True,
) -> Any:
    """A deep copy of ``module`` that takes fields on any grid.

    On ``base_shape`` it computes what ``module`` does, bit by bit; it has the same parameters and
    ``state_dict``. Elsewhere, with r = N / N_base per axis:

    - what acts at each point stays;
    - convolutions of stride 1 keep their receptive field as a length (:func:`hat_taps`);
    - strides, pooling, transposed convolutions and upsampling run on the base grid of their level
      and are resampled on both sides;
    - attention and normalisation over the grid use quadrature weights when the call has them:
      ``converted(x, weights=w)``, w of shape ``[N]``, ``[*grid]`` or with a batch axis before.

    What code of the module's own does with functions (``F.interpolate``, ``F.pad``, …) is not seen;
    ``report(converted).unmapped`` names such modules.

    Args:
        module: Called with ``[batch, channels, *grid]``; the first argument of that many axes
            decides the grid.
        base_shape: The grid that it was trained on; one integer for all axes.
        interpolation: ``"hat"`` keeps the sum of every kernel, ``"official"`` resizes kernels as
            the authors' code does and does not.
        resample: ``"fourier"`` or ``"linear"``, for what counts points.
        periodic: Grids are j/N. False: both end points belong to the grid, r counts cells, and
            ``resample`` must be ``"linear"``.

    Returns:
        The copy, an instance of the same class, in the same mode (train or eval).

    Raises:
        TypeError: ``module`` is no ``nn.Module``, ``base_shape`` not integers.
        ConversionError: a ``ValueError``: something is tied to the grid, such as a Linear over it
            or a learned table of positions; names every such sub-module and the fix.
        ValueError: ``base_shape`` missing or of other axes than the convolutions; an unknown
            choice; ``module`` is converted already.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if base_shape is None:
        raise ValueError("base_shape is missing: the grid that module was trained on, such as 64")
    chosen(interpolation, INTERPOLATIONS, "interpolation")
    chosen(resample, MODES, "resample")
    if not periodic and resample == "fourier":
        raise ValueError('resample="fourier" needs periodic=True; use resample="linear"')
    if any(hasattr(m, ATTRIBUTE) for m in module.modules()):
        raise ValueError("module is converted already; convert the original, or use it as it is")
    base = grid_sizes(module, base_shape)
    if not periodic and min(base) < 2:
        raise ValueError(f"a grid with both end points has at least 2 per axis, got {base}")
    converted = copy.deepcopy(module)
    verdicts = list(examine(converted, base, interpolation))
    if any(v.status == BLOCKS for v in verdicts):
        raise ConversionError(_rows(verdicts))
    grid = Grid(base, periodic, interpolation, resample)
    for verdict in verdicts:
        if verdict.target is not None:
            _become(verdict, verdict.target, grid)
    setattr(converted, ATTRIBUTE, grid)
    converted.register_forward_pre_hook(grid.enter, prepend=True, with_kwargs=True)
    converted.register_forward_hook(grid.leave, always_call=True)
    return converted


def _rows(verdicts: list[Verdict]) -> ConversionReport:
    return ConversionReport(
        tuple(LayerReport(v.name, type(v.module).__name__, v.status, v.reason) for v in verdicts)
    )


def _become(verdict: Verdict, target: type[Converted], grid: Grid) -> None:
    """Give a module the class with the forward that knows the grid; nothing else changes."""
    module = verdict.module
    old = type(module)
    module.__class__ = class_of(target, old)
    setattr(module, ATTRIBUTE, grid)
    module._stiefel_name = verdict.name or old.__name__  # pyrefly: ignore

"""Errors of functions, not of arrays: sums over points are integrals.

Source: sheet of arXiv 2506.10973, recipe, "loss".
"""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor

from stiefel.linalg.autocast import without_autocast
from stiefel.nn.operators.checks import (
    check_finite_values,
    check_numeric,
    check_weights,
    chosen,
    values_known,
    working,
)

REDUCTIONS = ("mean", "sum", "none")


def relative_l2(
    pred: Shaped[Tensor, "batch channels *grid"],
    target: Shaped[Tensor, "others more *points"],
    weights: Tensor | None = None,
    *,
    reduction: str = "mean",
) -> Tensor:
    """‖pred − target‖ / ‖target‖ in L², per sample, with quadrature weights in both norms.

    Args:
        pred: ``[batch, channels, *grid]`` or ``[batch, channels, N]``, real or complex.
        target: Of the same shape.
        weights: Quadrature weights, of the shape of the grid, of ``[N]``, or one row per sample
            ``[batch, *grid]``. None: all points weigh the same.
        reduction: ``"mean"`` or ``"sum"`` over samples, or ``"none"`` for ``[batch]``.

    Returns:
        A scalar, or ``[batch]``; real, half types in float32. The gradient at pred = target is 0.

    Raises:
        TypeError: Integers.
        ValueError: Shapes that differ, weights that do not fit or are not positive, NaN or
            infinities, a target that is zero everywhere (its relative error has no meaning).
    """
    for x, name in ((pred, "pred"), (target, "target")):
        check_numeric(x, name)
        check_finite_values(x, name)
    if pred.shape != target.shape or pred.ndim < 2:
        raise ValueError(
            "pred and target must both be [batch, channels, *grid], got shapes "
            f"{tuple(pred.shape)} and {tuple(target.shape)}"
        )
    chosen(reduction, REDUCTIONS, "reduction")
    with without_autocast(pred):
        difference, true = working(pred) - working(target), working(target)
        if weights is not None:
            root = point_weights(weights, pred).to(true.real.dtype).sqrt()
            difference, true = difference * root, true * root
        size = torch.linalg.vector_norm(true.flatten(1), dim=1)
        if values_known(size) and bool((size == 0).any()):
            empty = int((size == 0).nonzero()[0])
            raise ValueError(
                f"target is zero everywhere in sample {empty}: an error relative to it has no "
                "meaning; leave the sample out or use an absolute error"
            )
        ratio = torch.linalg.vector_norm(difference.flatten(1), dim=1) / size
    if reduction == "none":
        return ratio
    return ratio.mean() if reduction == "mean" else ratio.sum()


def point_weights(weights: Tensor, field: Shaped[Tensor, "batch channels *grid"]) -> Tensor:
    """``weights`` so that they multiply a field ``[batch, channels, *grid]``.

    Raises:
        TypeError, ValueError: not positive, or neither ``[*grid]`` nor ``[batch, *grid]``.
    """
    check_weights(weights)
    grid = tuple(field.shape[2:])
    if tuple(weights.shape) == grid:
        return weights
    if tuple(weights.shape) == (field.shape[0], *grid):
        return weights[:, None]
    raise ValueError(
        f"weights must have one entry per point, {grid} or {(field.shape[0], *grid)}, got shape "
        f"{tuple(weights.shape)}"
    )

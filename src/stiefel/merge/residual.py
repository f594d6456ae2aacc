"""Merging what is no rotation: plain sum, TIES, DARE or TSV-M of the experts' residuals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.merge.arithmetic import Number
from stiefel.merge.dare import dare_rows
from stiefel.merge.ties import Cut, ties_rows, ties_threshold

METHODS = ("ta", "ties", "dare", "tsvm")
Custom = Callable[[Sequence[Tensor]], Tensor]
"""From the residuals of all experts to the merged one."""


def default_scale(method: str | Custom, weights: Sequence[Number]) -> float:
    """1; for the plain sum and for DARE 1 / Σ wᵢ, which makes them means."""
    return 1 / sum(weights) if method in ("ta", "dare") else 1.0


def merge_residual_rows(
    residuals: Sequence[Float[Tensor, "*shape"]],
    method: str,
    weights: Sequence[Number],
    *,
    cuts: Sequence[Cut | None] = (),
    density: Number = 0.2,
    seed: int = 0,
    name: str = "",
    start: int = 0,
) -> Float[Tensor, "*shape"]:
    """Merge one portion of rows by ``"ta"``, ``"ties"`` or ``"dare"``, without a scale.

    Args:
        residuals: one an expert, float32 or float64.
        cuts: of TIES, one an expert; used up.
        density, seed, name, start: of DARE, as in :func:`stiefel.merge.dare_rows`.
    """
    zero = torch.zeros_like(residuals[0])
    if method == "ta":
        for residual, weight in zip(residuals, weights, strict=True):
            zero.add_(residual, alpha=weight)
        return zero
    if method == "ties":
        return ties_rows(zero, residuals, cuts, weights)
    densities = [density] * len(residuals)
    return dare_rows(zero, residuals, weights, densities, seed=seed, name=name, start=start)


def residual_cuts(residuals: Sequence[Tensor], density: Number) -> list[Cut | None]:
    """TIES limits of whole residuals."""
    return [ties_threshold(lambda r=r: [(r, None)], density, r.dtype) for r in residuals]


def tsvm(
    residuals: Sequence[Float[Tensor, "*shape"]], weights: Sequence[Number] | None = None
) -> Float[Tensor, "*shape"]:
    """TSV-M: the leading singular triplets of every residual, made orthogonal to one another.

    Of each of N residuals the top max(1, ⌊k/N⌋) triplets, k = min(out, in); all left vectors side
    by side are replaced by their polar factor, and so are the right ones; then multiplied out.

    Args:
        residuals: matrices ``[out, in]``. Of other shapes the (weighted) mean is returned instead.
        weights: factors of the singular values; 1 by default.

    Source: Gargiulo et al., "Task singular vectors", arXiv 2412.00081.
    """
    count = len(residuals)
    factors = [1.0] * count if weights is None else [float(w) for w in weights]
    if residuals[0].ndim != 2:
        mean = torch.zeros_like(residuals[0])
        for residual, weight in zip(residuals, factors, strict=True):
            mean.add_(residual, alpha=weight / math.fsum(factors))
        return mean
    keep = max(1, min(residuals[0].shape) // count)
    lefts, values, rights = [], [], []
    for residual, weight in zip(residuals, factors, strict=True):
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        lefts.append(u[:, :keep])
        values.append(weight * s[:keep])
        rights.append(vh[:keep])
    left, right = _orthonormal(torch.cat(lefts, 1)), _orthonormal(torch.cat(rights).mT)
    return (left * torch.cat(values)) @ right.mT


def _orthonormal(x: Tensor) -> Tensor:
    """Polar factor of side-by-side unit columns."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh

"""The mean of rotations in their Lie algebra, with the experts' mean intensity.

Equations of OrthoMerge (arXiv 2602.05943), part A: Q_sum = Σ Qᵢ, c = Σ‖Qᵢ‖ / ‖Q_sum‖,
Q_m = (c/N) Q_sum. Norms are Frobenius norms of the whole layer: all blocks of a block-diagonal
rotation together. A plain mean (c = 1) would shrink: nearly orthogonal Qᵢ lose a factor √N.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg import skew
from stiefel.linalg._checks import check_floating, check_skew, compute_dtype
from stiefel.merge.arithmetic import Number

SMALLEST_SIZE = 1e-8
"""Rotations of a total size below this are rounding."""


class CancellationWarning(UserWarning):
    """The rotations of a layer cancel: their sum has no direction, and the layer is not turned."""


def merge_rotations(
    Qs: Sequence[Float[Tensor, "*batch d d"]],
    weights: Sequence[Number] | None = None,
    intensity: Number = 1.0,
    correct: bool = True,
    eps: Number = SMALLEST_SIZE,
) -> Float[Tensor, "*batch d d"]:
    """Merge skew matrices: the direction of their sum, the mean of their norms.

    Q_m = intensity · (Σ wᵢ‖Qᵢ‖ / Σ wᵢ) · Σ wᵢQᵢ / ‖Σ wᵢQᵢ‖. The norms run over everything, so the
    blocks of one layer go in as one tensor ``[blocks, b, b]``. A zero Qᵢ counts in Σ wᵢ.

    Args:
        Qs: one skew tensor an expert, ``[..., d, d]``, all of one shape: Cayley coordinates or
            logarithms.
        weights: not negative, not all zero; 1 by default (the paper).
        intensity: factor of the result (the paper: 1).
        correct: False takes the plain weighted mean instead (c = 1).
        eps: a sum of a norm below this gives zero, and so does one below √(machine precision)
            of the norms that went in: a direction made of rounding.

    Returns:
        Skew, of the inputs' dtype. Computed in float32 for half types.

    Raises:
        ValueError: no Qs, shapes differ, not skew or not finite, bad weights or intensity.
        TypeError: dtypes differ or are not floating point.

    Warns:
        CancellationWarning: Qs that are not zero cancel.

    Differentiable. Source: arXiv 2602.05943, magnitude-corrected merge; weights and intensity are
    ours.
    """
    if len(Qs) == 0:
        raise ValueError("Qs must not be empty")
    for i, q in enumerate(Qs):
        check_skew(q, f"Qs[{i}]")
    merged = merge_coordinates(Qs, weights, intensity, correct, eps)
    return skew(merged).to(Qs[0].dtype)


def merge_coordinates(
    coordinates: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[Number] | None = None,
    intensity: Number = 1.0,
    correct: bool = True,
    eps: Number = SMALLEST_SIZE,
) -> Float[Tensor, "*shape"]:
    """:func:`merge_rotations` of any linear coordinates: matrices, or triangles of OFT adapters.

    A triangle's norm is 1/√2 of its matrix's, a factor that drops out. Returns at least float32.
    """
    found = check_rotation_weights(weights, len(coordinates))
    if not math.isfinite(intensity):
        raise ValueError(f"intensity must be finite, got {intensity}")
    first = coordinates[0]
    for i, x in enumerate(coordinates):
        check_floating(x, f"coordinates[{i}]")
        if x.shape != first.shape:
            raise ValueError(
                f"coordinates[{i}] has shape {tuple(x.shape)}, the first {tuple(first.shape)}"
            )
        if x.dtype != first.dtype:
            raise TypeError(f"coordinates[{i}] is {x.dtype}, the first {first.dtype}")
    dtype = compute_dtype(first.dtype)
    total = torch.zeros_like(first, dtype=dtype)
    for x, weight in zip(coordinates, found, strict=True):
        total = total + weight * x.to(dtype)
    factor = intensity / sum(found)
    if not correct:
        return factor * total
    norms = [torch.linalg.vector_norm(x.to(dtype)) for x in coordinates]
    size = torch.stack([w * n for w, n in zip(found, norms, strict=True)]).sum()
    return total * (factor * magnitude_correction(size, torch.linalg.vector_norm(total), eps))


def magnitude_correction(size: Tensor, norm: Tensor, eps: Number = SMALLEST_SIZE) -> Tensor:
    """c = Σ wᵢ‖Qᵢ‖ / ‖Σ wᵢQᵢ‖; 0 where the sum cancels, with a warning where there was something.

    ``size``: Σ wᵢ‖Qᵢ‖. ``norm``: ‖Σ wᵢQᵢ‖. A norm below √(machine
    precision) of ``size`` is no direction.
    """
    total, left = float(size.detach()), float(norm.detach())
    if left > max(eps, torch.finfo(norm.dtype).eps ** 0.5 * total):
        return size / norm
    if total > eps:
        warnings.warn(
            CancellationWarning(
                f"rotations of a total size {total:.2e} cancel to {left:.1e}: "
                "the layer is not turned"
            ),
            stacklevel=4,
        )
    return torch.zeros_like(norm)


def check_rotation_weights(weights: Sequence[Number] | None, count: int) -> list[float]:
    """One weight an expert, finite, not negative, not all zero; 1 by default."""
    if weights is None:
        return [1.0] * count
    found = [float(w) for w in weights]
    if len(found) != count:
        raise ValueError(f"weights must have one entry an expert, got {len(found)} for {count}")
    if not all(math.isfinite(w) and w >= 0 for w in found) or sum(found) == 0:
        raise ValueError(f"weights must be finite, not negative and not all zero, got {found}")
    return found

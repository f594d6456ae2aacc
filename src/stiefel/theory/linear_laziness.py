"""Closed forms for a two-layer linear network that starts small.

f(x) = w₂ᵀ W₁ x with whitened inputs and targets βᵀx, ‖W₁(0)‖_F = ‖w₂(0)‖ = σ → 0. The tangent
kernel of all parameters is X M Xᵀ with M = W₁ᵀW₁ + ‖w₂‖² I: σ² (A + I) with A = W₁ᵀW₁ / σ² at the
start and, as gradient flow ends in balance, ‖β‖ (β̂β̂ᵀ + I) at the end. Setting of
arXiv 2310.08513, theorem 1 and proposition 1; the formulas are derived here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import check_finite, check_matrix, compute_dtype, in_batch


def expected_kernel_alignment(
    singular_values_or_W: Float[Tensor, "*dims"] | Sequence[float | int], d: int
) -> float:
    """Tangent-kernel alignment of the first layer's spectrum, averaged over isotropic tasks.

    E[KA] = (d + 2 + 1/d) / (√(d + 2 + ‖A‖_F²) √(d + 3)), ‖A‖_F² = Σσ⁴ / (Σσ²)², one over the
    participation ratio of W₁(0). Higher rank is lazier.

    Args:
        singular_values_or_W: Singular values ``[r]``, r ≤ d, or W₁(0) ``[h, d]``; of any scale.
        d: Number of inputs.

    Raises:
        ValueError: ``d`` below 1, more than d singular values, W with other than d columns, a
            negative or non-finite value, or all zero.

    Source: arXiv 2310.08513, theorem 1; formula derived here.
    """
    d = _inputs(d)
    square = _square_of_gram(singular_values_or_W, d)
    return (d + 2 + 1 / d) / (math.sqrt(d + 2 + square) * math.sqrt(d + 3))


def expected_representation_alignment(
    singular_values_or_W: Float[Tensor, "*dims"] | Sequence[float | int], d: int
) -> float:
    """Representation alignment of W₁x, averaged over isotropic tasks: 1 / (d ‖A‖_F).

    √r / d for r equal singular values. Arguments and errors as for
    :func:`expected_kernel_alignment`.
    """
    d = _inputs(d)
    return 1 / (d * math.sqrt(_square_of_gram(singular_values_or_W, d)))


def linear_kernel_alignment(
    W: Float[Tensor, "*batch h d"], beta: Float[Tensor, "*tasks k"]
) -> Float[Tensor, "*out"]:
    """Tangent-kernel alignment for one task: (β̂ᵀAβ̂ + d + 2) / (√(‖A‖_F² + d + 2) √(d + 3)).

    1 for W₁(0) = σ u β̂ᵀ, aligned with the task (proposition 1). Differentiable.

    Args:
        W: First-layer weights at the start, of any scale.
        beta: The task; only its direction counts.

    Raises:
        ValueError: ``beta`` has not d entries, or either is zero or not finite.
    """
    check_matrix(W, "W")
    check_finite(W, "W")
    check_finite(beta, "beta")
    d = W.shape[-1]
    if beta.ndim < 1 or beta.shape[-1] != d:
        raise ValueError(f"beta must have {d} entries, as W has columns, got {tuple(beta.shape)}")
    for flat, name in ((W.detach().flatten(-2), "W"), (beta.detach(), "beta")):
        zero = (flat == 0).all(-1)
        if bool(zero.any()):
            raise ValueError(f"{name} must not be zero{in_batch(zero)}")
    work = compute_dtype(W.dtype)
    weights, task = _unit_scale(W.to(work), 2), _unit_scale(beta.to(work), 1)
    gram = weights.mT @ weights
    overlap = (weights @ task[..., None]).square().sum((-2, -1))
    square = gram.square().sum((-2, -1))
    return ((overlap + d + 2) / ((square + d + 2).sqrt() * math.sqrt(d + 3))).to(W.dtype)


def _unit_scale(x: Tensor, dims: int) -> Tensor:
    """Divided by its Frobenius norm; by its largest entry first, so that nothing overflows."""
    axes = tuple(range(-dims, 0))
    x = x / x.detach().abs().amax(axes, keepdim=True)
    return x / torch.linalg.vector_norm(x, dim=axes, keepdim=True)


def _inputs(d: int) -> int:
    d = operator.index(d)
    if d < 1:
        raise ValueError(f"d must be at least 1, got {d}")
    return d


def _square_of_gram(given: Tensor | Sequence[float | int], d: int) -> float:
    """‖A‖_F² = Σσ⁴ / (Σσ²)²."""
    values = torch.as_tensor(given).detach()
    check_finite(values, "singular_values_or_W")
    values = values.double().cpu()
    if values.ndim == 2:
        if values.shape[1] != d:
            raise ValueError(f"W must have {d} columns, one an input, got {tuple(values.shape)}")
        values = torch.linalg.svdvals(values)
    elif values.ndim != 1 or not 1 <= len(values) <= d:
        raise ValueError(
            f"singular_values_or_W must be 1 to {d} singular values or a matrix [h, {d}], got "
            f"shape {tuple(values.shape)}"
        )
    if bool((values < 0).any()) or not bool((values > 0).any()):
        raise ValueError("singular values must be at least 0 with one above 0")
    squares = (values / values.max()).square()
    return float(squares.square().sum() / squares.sum().square())

"""λ-orthogonality: a smooth gate that lets a matrix stray from orthogonality up to a distance λ.

Source: arXiv 2509.16664, the regulariser L_λ = σ(α(x − λ)) · x with x = ‖WWᵀ − I‖_F.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import check_finite, check_matrix, compute_dtype
from stiefel.linalg.autocast import without_autocast

# The paper has α only in a figure; this makes the gate about 0.4 wide.
ALPHA = 10.0


def orthogonality_distance(w: Tensor) -> Float[Tensor, "*batch"]:
    """x = ‖WWᵀ − I‖_F of each matrix ``[m, n]``; not squared, not divided by anything.

    A tall W (m > n) cannot reach 0: the least is √(m − n). Not for training: it has no gradient
    (:func:`lambda_orthogonality` with λ = 0 and a large α is smooth).

    Raises:
        TypeError: ``w`` is not real floating point.
        ValueError: ``w`` has fewer than two dimensions.
    """
    check_matrix(w, "w")
    with torch.no_grad(), without_autocast(w):
        work = w.to(compute_dtype(w.dtype))
        return _distance(_defect(work), work.shape[-2] - work.shape[-1]).to(w.dtype)


def lambda_orthogonality(
    W: Tensor, lam: float | int, alpha: float | int = ALPHA
) -> Float[Tensor, ""]:
    """Σ σ(α(x − λ)) · x over the matrices of ``W``, x = ‖WWᵀ − I‖_F.

    Little below λ, about x above it: a weight under this penalty keeps a distance of about λ from
    orthogonality, whatever the weight of the penalty (arXiv 2509.16664). λ is a distance of the
    whole matrix and so grows with its side: the paper's 12 at n = 1024 is 0.37 √n. λ = 0 is ½ x
    near 0; ``math.inf`` turns it off.

    The gradient is in closed form, (s + α x s (1 − s)) · 2 (WWᵀ − I) W / x with s = σ(α(x − λ)),
    and 0 where x = 0: one product of matrices more than the value. Half types are computed in
    float32, inside autocast too. Twice differentiable, but where x = 0.

    Args:
        W: Matrices ``[..., m, n]``; the rows are to be orthonormal.
        lam: λ ≥ 0.
        alpha: Steepness α > 0 of the gate.

    Returns:
        A scalar in the dtype of ``W``.

    Raises:
        TypeError: ``W`` is not real floating point.
        ValueError: ``W`` is not finite or has fewer than two dimensions, λ < 0, α ≤ 0.
    """
    check_matrix(W, "W")
    check_finite(W, "W")
    check_gate(lam, alpha)
    if math.isinf(lam):
        return W.sum() * 0.0
    with without_autocast(W):
        work = W.to(compute_dtype(W.dtype))
        return _Gate.apply(work, float(lam), float(alpha)).to(W.dtype)


def check_gate(lam: float | int, alpha: float | int) -> None:
    """Raise ``ValueError`` unless λ ≥ 0 and α is positive and finite."""
    if not lam >= 0:
        raise ValueError(f"lam must be at least 0 (math.inf: no penalty), got {lam}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")


def _defect(w: Tensor) -> Tensor:
    """Gram matrix of the smaller side, minus I."""
    gram = w @ w.mT if w.shape[-2] <= w.shape[-1] else w.mT @ w
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def _distance(defect: Tensor, excess: int) -> Tensor:
    """‖WWᵀ − I‖_F; the larger Gram matrix has ``excess`` more zero eigenvalues, 1 off each."""
    norm = torch.linalg.matrix_norm(defect)
    return norm if excess <= 0 else torch.hypot(norm, norm.new_tensor(math.sqrt(excess)))


def _gated(x: Tensor, lam: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Values σ(α(x − λ)) x, and what multiplies (WWᵀ − I) W in their gradients."""
    gate = torch.sigmoid(alpha * (x - lam))
    slope = gate + alpha * x * gate * (1 - gate)
    return gate * x, torch.where(x > 0, 2 * slope / torch.where(x > 0, x, 1.0), 0.0)


class _Gate(torch.autograd.Function):
    """The sum of gated distances, with its gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, lam: float, alpha: float) -> Tensor:
        defect = _defect(w)
        value, factor = _gated(_distance(defect, w.shape[-2] - w.shape[-1]), lam, alpha)
        ctx.save_for_backward(w, defect, factor)
        ctx.gate = lam, alpha
        return value.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        w, defect, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative: the same, as a function of w
            defect = _defect(w)
            factor = _gated(_distance(defect, w.shape[-2] - w.shape[-1]), *ctx.gate)[1]
        # (WWᵀ − I) W = W (WᵀW − I): whichever Gram matrix is the smaller.
        product = defect @ w if w.shape[-2] <= w.shape[-1] else w @ defect
        return product * (grad_outputs[0] * factor)[..., None, None], None, None

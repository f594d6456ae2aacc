"""Orthonormal factors by products and Cholesky, checked, with Householder where that fails."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stiefel.linalg._checks import check_matrix, compute_dtype
from stiefel.linalg.polar import frobenius_norm

# Largest entry of |QᵀQ − I| that counts as orthonormal.
ORTHONORMAL_TOLERANCE = 1e-3
# Part of a column, in roundings of the matrix, that counts as nothing.
_DEPENDENT = 64


def shifted_cholesky_qr(
    a: Float[Tensor, "*batch m n"], shift: float = 1e-7, passes: int = 2
) -> tuple[Float[Tensor, "*batch m n"], Bool[Tensor, "*batch"]]:
    """The Q of A = QR by Cholesky: matrix products, a factorisation and a triangular solve.

    A ← A / ‖A‖_F ;  AᵀA + shift·I = L Lᵀ ;  Q = A L⁻ᵀ. The shift keeps the factorisation alive for
    ill-conditioned A and costs orthogonality, which the second pass, on Q and without a shift,
    restores. One pass is off by 0.01 at condition 1e2 and by 0.8 at 1e4 (128 × 128, float32); two
    are exact to a few roundings up to about 1e4.

    Args:
        a: Matrices ``(..., m, n)`` with m ≥ n. Half types are computed in float32.
        shift: Added to the Gram matrix of each A / ‖A‖_F in the first pass, ≥ 0.
        passes: ≥ 1.

    Returns:
        ``(q, ok)``. Where ``ok`` is true, max |QᵀQ − I| ≤ 1e-3 and the diagonal of R is positive.
        Where it is false (rank-deficient, too ill-conditioned, NaN or Inf) the entries of that
        ``q`` mean nothing; other matrices are not affected.

    Raises:
        ValueError: m < n, a negative shift, no pass.
        TypeError: ``a`` is not real floating point.
    """
    check_matrix(a, "a")
    if a.shape[-2] < a.shape[-1]:
        raise ValueError(f"a must have at least as many rows as columns, got {tuple(a.shape)}")
    if not 0 <= shift < float("inf"):
        raise ValueError(f"shift must be finite and ≥ 0, got {shift}")
    if passes < 1:
        raise ValueError(f"passes must be ≥ 1, got {passes}")
    q = a.to(compute_dtype(a.dtype))
    if a.numel() == 0:
        return a.clone(), torch.ones(a.shape[:-2], dtype=torch.bool, device=a.device)
    norm = frobenius_norm(q)
    q = q / torch.where(norm > 0, norm, 1.0).to(q.dtype)
    ok = torch.ones(a.shape[:-2], dtype=torch.bool, device=a.device)
    for k in range(passes):
        gram = q.mT @ q
        if k == 0:
            gram.diagonal(dim1=-2, dim2=-1).add_(shift)
        factor, info = torch.linalg.cholesky_ex(gram)
        ok &= info == 0
        q = torch.linalg.solve_triangular(factor.mT, q, upper=True, left=False)
    error = q.mT @ q
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    ok &= error.abs_().amax((-2, -1)) <= ORTHONORMAL_TOLERANCE  # false for NaN
    return q.to(a.dtype), ok


def orthonormal_factor(
    a: Float[Tensor, "*batch m n"], method: str = "qr"
) -> Float[Tensor, "*batch m n"]:
    """Q of A = QR, always orthonormal.

    Args:
        a: Matrices ``(..., m, n)`` with m ≥ n, float32 or float64.
        method: ``"qr"`` (Householder) or ``"scqr"`` (:func:`shifted_cholesky_qr`, and Householder
            for those matrices alone that it reports as not orthonormal).
    """
    if method == "qr":
        return _householder(a)
    q, ok = shifted_cholesky_qr(a)
    if not bool(ok.all()):
        q[~ok] = _householder(a[~ok])
    return q


def _householder(a: Tensor) -> Tensor:
    """Q of QR, where columns that depend on those before them count as zero.

    What is left of such a column is rounding, and would be blown up to a direction that the last
    bit of ``a`` decides.
    """
    q, r = torch.linalg.qr(a)
    size = r.diagonal(dim1=-2, dim2=-1).abs()
    largest = torch.linalg.vector_norm(size, dim=-1, keepdim=True)
    dependent = size < _DEPENDENT * torch.finfo(a.dtype).eps * largest
    if bool(dependent.any()):
        dependent &= a.any(-2)  # columns that are zero already leave no rounding
        again = dependent.any(-1)
        if bool(again.any()):
            q[again] = torch.linalg.qr(a[again].masked_fill(dependent[again][:, None], 0.0))[0]
    return q

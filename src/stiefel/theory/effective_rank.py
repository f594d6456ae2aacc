"""How many directions a matrix really uses: four measures of effective rank."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import check_finite, check_matrix, compute_dtype, in_batch

KINDS = ("eig_mean", "participation", "entropy", "numeric")
# The truncation of a float32 matrix leaves singular values of up to this part of the largest.
NUMERIC_TOLERANCE = 1e-6


def effective_rank(
    W: Float[Tensor, "*batch m n"], kind: str = "eig_mean", *, rtol: float | int = NUMERIC_TOLERANCE
) -> Float[Tensor, "*batch"]:
    """Effective rank of each matrix.

    ``"eig_mean"``
        Σ|λ| / (n |λ₁|) of a square matrix with eigenvalues λ, the largest modulus first: a share
        in (0, 1], 1 where all have one modulus.
    ``"participation"``
        (Σσ²)² / Σσ⁴, 1 to min(m, n).
    ``"entropy"``
        exp(−Σ p ln p) with p = σ / Σσ, 1 to min(m, n).
    ``"numeric"``
        The number of singular values above ``rtol`` · σ₁; 0 for a zero matrix. No gradient.

    The others are differentiable. bfloat16 and float16 are computed in float32.

    Raises:
        ValueError: another ``kind``; W is not finite, not a matrix, not square for ``"eig_mean"``;
            it is zero (or nilpotent, for ``"eig_mean"``) where the measure divides by its size;
            ``rtol`` outside [0, 1).
        TypeError: W is not real floating point.

    Source: ``"eig_mean"`` arXiv 2310.08513, figures; ``"entropy"`` Roy and Vetterli, "The
    effective rank", EUSIPCO 2007.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol must be in [0, 1), got {rtol}")
    check_matrix(W, "W")
    check_finite(W, "W")
    m, n = W.shape[-2:]
    if m == 0 or n == 0:
        raise ValueError(f"W must have rows and columns, got shape {tuple(W.shape)}")
    work = W.to(compute_dtype(W.dtype))
    if kind == "eig_mean":
        if m != n:
            raise ValueError(f"eig_mean needs square matrices, got shape {tuple(W.shape)}")
        sizes = torch.linalg.eigvals(work).abs()
    else:
        sizes = torch.linalg.svdvals(work)
    largest = sizes.amax(-1, keepdim=True)
    if kind == "numeric":
        return (sizes > rtol * largest).sum(-1).to(W.dtype)
    zero = largest[..., 0] == 0
    if bool(zero.any()):
        raise ValueError(f"W has no effective rank{in_batch(zero)}: all its {kind} terms are zero")
    share = sizes / largest
    if kind == "eig_mean":
        return (share.sum(-1) / n).to(W.dtype)
    if kind == "participation":
        squares = share.square()
        return (squares.sum(-1).square() / squares.square().sum(-1)).to(W.dtype)
    p = share / share.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp().to(W.dtype)

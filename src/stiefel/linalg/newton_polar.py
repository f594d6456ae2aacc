"""Polar factors of square matrices by Newton's iteration, with inverses made of matrix products.

About twice as fast as a singular value decomposition where matrices are large, and more accurate in
float32: the iteration corrects itself, a decomposition does not.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Matrices up to this size are inverted by LAPACK (and as one batch).
_LEAF = 256
# From here on the recursion pays (measured: 1.3 × at 768, 2 × at 4,096, one thread).
_RECURSE_FROM = 512
# Scaled Newton needs 9 or 10 steps from any condition number that double precision can hold.
_STEPS = 30


class PolarError(ArithmeticError):
    """The iteration did not find the polar factor: the matrix is singular to working precision."""


def newton_polar(
    x: Float[Tensor, "*batch n n"], *, rtol: float = 0.0, ridge: bool = False
) -> Float[Tensor, "*batch n n"]:
    """Orthogonal polar factor of invertible matrices; the determinant keeps its sign.

    X ← (γX + X⁻ᵀ/γ) / 2 with γ⁴ = ‖X⁻¹‖₁‖X⁻¹‖_∞ / (‖X‖₁‖X‖_∞): quadratic, six to nine steps.

    Args:
        x: ``[..., n, n]``, float32 or float64, finite.
        rtol: matrices of a condition number above 1/rtol count as singular; 0 takes them as they
            are.
        ridge: to singular ones add rtol times their size times the identity: the polar factor
            then comes close to the identity in the null space, as the rule "closest" of
            :func:`stiefel.linalg.procrustes_rotation` asks. Needs an ``rtol`` far above rounding.

    Raises:
        PolarError: singular (and no ``ridge``), or no convergence.

    Not differentiable. Source: Higham, "Computing the polar decomposition", SIAM J. Sci. Stat.
    Comput. 7 (1986); the scaling is his (3.8).
    """
    flat = x.detach().reshape(-1, *x.shape[-2:])
    n = x.shape[-1]
    if flat.numel() == 0:
        return x.detach().clone()
    if n < _RECURSE_FROM:
        return _iterate(flat, rtol, ridge).reshape(x.shape)
    return torch.cat([_checked(one[None], rtol, ridge) for one in flat]).reshape(x.shape)


def _checked(x: Tensor, rtol: float, ridge: bool) -> Tensor:
    """With the fast inverse; once more with LAPACK's where its result is not a polar factor."""
    try:
        r = _iterate(x, rtol, ridge, fast=True)
    except PolarError:
        return _iterate(x, rtol, ridge)
    # RᵀX is symmetric for the polar factor; a few random vectors see it if not.
    draw = torch.Generator().manual_seed(0)
    probe = torch.randn(x.shape[-1], 4, generator=draw, dtype=torch.float64).to(x)
    difference = r.mT @ (x @ probe) - x.mT @ (r @ probe)
    length = r.mT @ (r @ probe) - probe
    limit = 100 * torch.finfo(x.dtype).eps
    wrong = torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(x @ probe)
    off = torch.linalg.vector_norm(length) / torch.linalg.vector_norm(probe)
    if bool((wrong <= limit) & (off <= limit)):
        return r
    return _iterate(x, rtol, ridge)


def _iterate(x: Tensor, rtol: float, ridge: bool, *, fast: bool = False) -> Tensor:
    size = torch.linalg.matrix_norm(x, keepdim=True)
    # No overflow; the polar factor does not change.
    x = x / torch.where(size > 0, size, 1.0)
    root = x.shape[-1] ** 0.5
    inverse = _inverse(x, fast)
    # ‖X‖_F/√n is within a small factor of the largest singular value; NaN counts as singular.
    singular = ~(rtol * torch.linalg.matrix_norm(inverse, keepdim=True) < root)
    if bool(singular.any()):
        if not ridge:
            raise PolarError("x is singular to working precision")
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        x = x + torch.where(singular, rtol / root, 0.0) * eye
        inverse = _inverse(x, fast)
    # The error left after a step is half the square of its (relative) change.
    tolerance = (32 * torch.finfo(x.dtype).eps) ** 0.5
    for _ in range(_STEPS):
        if not bool(inverse.isfinite().all()):
            raise PolarError("x is singular to working precision")
        gamma = ((_size(inverse) / _size(x)) ** 0.25).to(x.dtype)
        new = (x * (gamma / 2)).add_(inverse.div_(2 * gamma).mT)
        change = torch.linalg.matrix_norm(x.sub_(new)).max() / root
        x = new
        if bool(change <= tolerance):
            return x
        inverse = _inverse(x, fast)
    raise PolarError(f"no convergence in {_STEPS} steps")


def _size(x: Tensor) -> Tensor:
    """‖x‖₁‖x‖_∞ per matrix."""
    magnitude = x.abs()
    return (magnitude.sum(-1).amax(-1) * magnitude.sum(-2).amax(-1))[..., None, None]


def _inverse(x: Tensor, fast: bool) -> Tensor:
    """Inverses; not finite where a matrix is singular."""
    if fast:
        return block_inverse(x[0])[None]
    inverse, info = torch.linalg.inv_ex(x)
    return torch.where((info == 0)[..., None, None], inverse, torch.nan)


def block_inverse(x: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The inverse by recursion over 2 × 2 blocks: all work is in matrix products.

    There is no pivoting across blocks. That is safe where the symmetric part of ``x`` is positive
    definite (then every pivot block's is too), as for I - Q with skew Q and for I + R with a
    rotation R; elsewhere the caller has to look at the result. Not finite where a block is
    singular.
    """
    n = x.shape[-1]
    if n <= _LEAF:
        inverse, info = torch.linalg.inv_ex(x)
        return inverse if int(info) == 0 else torch.full_like(x, torch.nan)
    half = n // 2
    b, c, d = x[:half, half:], x[half:, :half], x[half:, half:]
    first = block_inverse(x[:half, :half])
    left, right = c @ first, first @ b
    schur = block_inverse(torch.addmm(d, left, b, alpha=-1))
    out = torch.empty_like(x)
    out[:half, half:] = -(right @ schur)
    out[half:, :half] = -(schur @ left)
    out[:half, :half] = torch.addmm(first, out[:half, half:], left, alpha=-1)
    out[half:, half:] = schur
    return out

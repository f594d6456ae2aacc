"""Polar factors: exact, and by the Newton–Schulz families that optimizers use."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.coefficients import Coefficients, as_table

_LOW = (torch.float16, torch.bfloat16)


def newton_schulz(
    x: Float[Tensor, "*batch m n"],
    steps: int = 5,
    coefficients: Coefficients = "classic",
    eps: float = 1e-7,
) -> Float[Tensor, "*batch m n"]:
    """Approximate polar factor by an odd quintic iteration.

    X₀ = x / (‖x‖_F + eps), then X ← aX + (bA + cA²)X with A = XXᵀ: every singular value follows
    σ ← aσ + bσ³ + cσ⁵ while the singular vectors stay. Plain and differentiable; the optimizers run
    the same polynomials through :func:`stiefel.linalg.orthogonalize`, which is faster.

    Args:
        x: Matrices of shape ``(..., m, n)``; float16 is computed in float32. Not modified.
        steps: Number of iterations, ≥ 0.
        coefficients: ``"classic"`` (3.4445, −4.7750, 2.0315, five steps in the papers; outputs lie
            in [0.68, 1.20] by design), ``"polar_express"`` (arXiv 2505.16932; for 1.01 ‖x‖_F),
            ``"fitted"`` (at most 5 steps), ``"fast"`` (at most 4; ask for ``steps=4``), one triple
            (a, b, c), or one triple per step. Anything is accepted here, even if it diverges.
        eps: Added to the Frobenius norm, which keeps a zero matrix at zero.

    Returns:
        Same shape and dtype as ``x``. NaN or Inf in a matrix gives NaN in that matrix.

    Raises:
        ValueError: fewer than two dimensions, unknown coefficients, too many steps for the table.
        TypeError: ``x`` is not real floating point.
    """
    _check(x)
    if steps < 0:
        raise ValueError(f"steps must be ≥ 0, got {steps}")
    rule = as_table(coefficients, steps)
    if x.numel() == 0:
        return x.clone()
    work = x.float() if x.dtype == torch.float16 else x
    norm = frobenius_norm(work)
    work = work / (norm * rule.safety + eps).to(work.dtype)
    tall = work.shape[-2] > work.shape[-1]
    work = work.reshape(-1, *work.shape[-2:])
    for a, b, c in rule.triples:
        # The sums ride in the products' accumulators: one rounding each in low precision.
        gram = work.mT @ work if tall else work @ work.mT
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (work, inner) if tall else (inner, work)
        work = torch.baddbmm(work, left, right, beta=a)
    return work.reshape(x.shape).to(x.dtype)


def polar(x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """The exact polar factor: the semi-orthogonal matrix closest to ``x`` in Frobenius norm.

    U Vᵀ of the thin singular value decomposition x = U Σ Vᵀ. Rows are orthonormal if m ≤ n, columns
    if m ≥ n. Where ``x`` is rank-deficient the closest matrix is not unique: the decomposition's
    choice is returned, still semi-orthogonal (also for the zero matrix).

    Differentiable once; the gradient is right for repeated singular values too, and is that of the
    full-rank formula with 1/0 replaced by 0 where ``x`` is rank-deficient.

    Args:
        x: Matrices of shape ``(..., m, n)``. float16 and bfloat16 are computed in float32.

    Raises:
        ValueError: fewer than two dimensions; NaN or Inf in ``x``.
        TypeError: ``x`` is not real floating point.
    """
    _check(x)
    if not torch.isfinite(x).all():
        raise ValueError("x must be finite, got NaN or Inf")
    work = x.float() if x.dtype in _LOW else x
    return _Polar.apply(work).to(x.dtype)  # pyrefly: ignore


class _Polar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # Powers of two change no digit, and keep the squares inside LAPACK in range.
        _, exponent = torch.frexp(x.abs().amax((-2, -1), keepdim=True) if x.numel() else x)
        u, s, vh = torch.linalg.svd(torch.ldexp(x, -exponent), full_matrices=False)
        ctx.save_for_backward(u, torch.ldexp(s, exponent[..., 0]), vh)
        return u @ vh

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyrefly: ignore
        # dP = U [(M − Mᵀ) / (σᵢ + σⱼ)] Vᵀ + the part outside the row or column space, M = UᵀdX V.
        u, s, vh = ctx.saved_tensors
        inner = u.mT @ grad @ vh.mT
        pair = s[..., :, None] + s[..., None, :]
        tiny = s[..., :1] * max(grad.shape[-2:]) * torch.finfo(s.dtype).eps
        safe = torch.where(pair > tiny[..., None], 1 / pair, 0.0)
        out = u @ ((inner - inner.mT) * safe) @ vh
        inverse = torch.where(s > tiny, 1 / s, 0.0)
        if grad.shape[-2] < grad.shape[-1]:
            rest = u.mT @ grad
            return out + (u * inverse[..., None, :]) @ (rest - (rest @ vh.mT) @ vh)
        if grad.shape[-2] > grad.shape[-1]:
            rest = grad @ vh.mT
            return out + (rest - u @ (u.mT @ rest)) @ (inverse[..., :, None] * vh)
        return out


def orthogonality_error(
    x: Float[Tensor, "*batch m n"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """How far from semi-orthogonal: ``(max |σ − 1|, mean (σ − 1)²)`` over singular values.

    Args:
        x: Matrices of shape ``(..., m, n)``; low precision is computed in float32.

    Raises:
        ValueError: fewer than two dimensions, an empty matrix, NaN or Inf.
        TypeError: ``x`` is not real floating point.
    """
    _check(x)
    if 0 in x.shape[-2:]:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError("x must be finite, got NaN or Inf")
    off = torch.linalg.svdvals(x.float() if x.dtype in _LOW else x) - 1
    return off.abs().amax(-1), off.square().mean(-1)


def frobenius_norm(x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch 1 1"]:
    """‖x‖_F per matrix by :func:`safe_norm`."""
    return safe_norm(x.flatten(-2))[..., None]


def safe_norm(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch 1"]:
    """Euclidean norm along the last dimension, right for entries whose squares leave float32.

    At least float32; float64 where the device has it and the range is not known to be harmless.
    Looking at the range is free on a CPU and would stall an accelerator.
    """
    if x.dtype == torch.float64:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    trusted = x.device.type == "mps"
    if trusted or (x.device.type == "cpu" and not torch.compiler.is_compiling()):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        if trusted or bool(((norm > 1e-15) & (norm < 1e18)).all()):
            return norm
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)


def _check(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be a real floating-point tensor, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must have at least two dimensions, got shape {tuple(x.shape)}")

"""Rotations: exponential, logarithm, Cayley pair and Haar sampling.

Formulas of OrthoMerge (arXiv 2602.05943), with a weight ``[out, in]`` rotated on its input side,
``W' = W R``. A skew matrix Q that turns one plane by θ has the entry θ there as a logarithm and
tan(θ/2) as a Cayley coordinate. Angles are in radians.

bfloat16 and float16 are computed in float32 and rounded once at the end. Every function that
solves or factorises rejects NaN and infinities; ``skew`` lets them through.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import (
    check_orthogonal,
    check_skew,
    check_square,
    compute_dtype,
    in_batch,
)

# tan(θ/2) up to which the logarithm goes through the Cayley coordinate (θ = π - 0.1): beyond,
# the solve would lose more than a factor of 20 in accuracy.
_LARGEST_TANGENT = 20.0
# Higham 2005: numerator of the [7/7] Padé approximant of exp, and the 1-norm up to which it is
# exact to rounding in float64 and in float32 (table 2.3 and its single-precision counterpart).
_PADE = (17297280.0, 8648640.0, 1995840.0, 277200.0, 25200.0, 1512.0, 56.0, 1.0)
_PADE_THETA = 0.9504178996162932
_PADE_THETA_SINGLE = 3.925724783138660


class SingularCayleyError(ValueError):
    """A rotation with an eigenvalue -1 (a turn by π) has no Cayley coordinate."""


def skew(x: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n n"]:
    """The skew-symmetric part (x - xᵀ) / 2 of each square matrix.

    NaN and infinities propagate. Raises ``ValueError`` where ``x`` is not ``[..., n, n]``.
    """
    check_square(x, "x")
    return (x - x.mT) / 2


def cayley(q: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n n"]:
    """Cayley map R = (I + Q)(I - Q)⁻¹ of skew Q: a rotation without eigenvalue -1.

    Differentiable to any order. R is orthogonal to about (1 + ||Q||) times machine precision.

    Args:
        q: skew matrices ``[..., n, n]``; the skew part is used.

    Raises:
        ValueError: ``q`` is not square, not finite, or not skew (||Q + Qᵀ|| > 1e-4 ||Q||).

    Source: arXiv 2602.05943, Cayley transform.
    """
    check_skew(q, "q")
    work = skew(q.to(compute_dtype(q.dtype)))
    eye = _eye_like(work)
    # The two factors commute, so the inverse may stand on the left.
    return torch.linalg.solve(eye - work, eye + work).to(q.dtype)


def inverse_cayley(r: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n n"]:
    """Inverse Cayley map Q = (R - I)(R + I)⁻¹, re-skewed; differentiable to any order.

    Args:
        r: orthogonal matrices ``[..., n, n]`` without eigenvalue -1.

    Raises:
        SingularCayleyError: R + I is singular, or so near that fewer than two digits of Q would
            be right. Use :func:`rotation_log`, which covers turns by π.
        ValueError: ``r`` is not square, not finite, or not orthogonal.

    Source: arXiv 2602.05943, inverse Cayley transform.
    """
    check_orthogonal(r, "r")
    work = r.to(compute_dtype(r.dtype))
    eye = _eye_like(work)
    solution, info = torch.linalg.solve_ex(work + eye, work - eye)
    q = skew(solution)
    # The relative error of Q is about eps ||Q||, of a stored half type its own eps.
    limit = min(0.01 / torch.finfo(work.dtype).eps, 1 / torch.finfo(r.dtype).eps)
    size = torch.linalg.matrix_norm(q.detach())
    bad = (info != 0) | ~(size <= limit)
    if bool(bad.any()):
        raise SingularCayleyError(
            f"r has an eigenvalue -1, a turn by π to working precision{in_batch(bad)}: "
            "R + I is singular and the Cayley coordinate infinite; use rotation_log instead"
        )
    return q.to(r.dtype)


def rotation_exp(q: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n n"]:
    """Matrix exponential of skew Q: the rotation that turns by the angles of Q.

    Differentiable to any order. R is a rotation to (1 + ||Q||) times rounding, as the Padé
    approximant of a skew matrix is orthogonal. (``torch.linalg.matrix_exp`` is off by 2e-5 in
    float32 and 2e-10 in float64 for single matrices of small norm: pytorch issue 196592.)

    Args:
        q: skew matrices ``[..., n, n]``; the skew part is used.

    Raises:
        ValueError: ``q`` is not square, finite and skew (||Q + Qᵀ|| ≤ 1e-4 ||Q||), or its 1-norm
            is above 1 / machine precision.

    Source: Higham, "The scaling and squaring method for the matrix exponential revisited",
    SIAM J. Matrix Anal. Appl. 26 (2005), eq. (3.5) and table 2.3.
    """
    check_skew(q, "q")
    work = skew(q.to(compute_dtype(q.dtype)))
    if work.numel() == 0:
        return work.to(q.dtype)
    theta = _PADE_THETA if work.dtype == torch.float64 else _PADE_THETA_SINGLE
    # Every matrix is halved as often as it needs, so a small one keeps its relative accuracy.
    norm = torch.linalg.matrix_norm(work.detach(), ord=1, keepdim=True)
    size = float(norm.max())
    if size > 1 / torch.finfo(work.dtype).eps:
        raise ValueError(f"q is too large to keep a digit of exp(q): 1-norm {size:.1e}")
    halvings = (norm / theta).log2().ceil().clamp(min=0).to(torch.int32)
    # The gradient of ldexp itself is zero for negative integer exponents (torch 2.13).
    x = work * torch.ldexp(torch.ones_like(norm), -halvings)
    x2 = x @ x
    x4 = x2 @ x2
    x6 = x4 @ x2
    eye, b = _eye_like(x), _PADE
    odd = x @ (b[7] * x6 + b[5] * x4 + b[3] * x2 + b[1] * eye)
    even = b[6] * x6 + b[4] * x4 + b[2] * x2 + b[0] * eye
    r = torch.linalg.solve(even - odd, even + odd)
    for done in range(int(halvings.max())):
        r = torch.where(done < halvings, r @ r, r)
    return r.to(q.dtype)


def rotation_log(r: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n n"]:
    """Principal logarithm of rotations: skew Q with exp(Q) = R and every angle in [0, π].

    Relative accuracy near the identity, and a small backward error (exp of the result against R)
    everywhere, turns by π included. There the logarithm is not unique: eigenvalues -1 are paired
    into planes in the order the Schur form gives them. Matrices with an angle above π - 0.1 go
    one by one through LAPACK on the CPU in float64; all others are one batch on their device.

    Differentiable once. The gradient is that along the rotation group (its part normal to the
    group is zero); two planes that both turn by exactly π are treated as fixed to each other.

    Args:
        r: rotations ``[..., n, n]``, determinant +1.

    Raises:
        ValueError: ``r`` is not square, not finite, not orthogonal, or has determinant -1.

    To first order it is twice the Cayley coordinate that arXiv 2602.05943 uses.
    """
    check_orthogonal(r, "r")
    work = r.to(compute_dtype(r.dtype))
    negative = torch.linalg.slogdet(work.detach()).sign < 0
    if bool(negative.any()):
        raise ValueError(
            f"r must be a rotation, but its determinant is -1{in_batch(negative)}: "
            "a reflection has no real logarithm"
        )
    if work.numel() == 0:
        return r.clone()
    return _RotationLog.apply(work).to(r.dtype)  # pyrefly: ignore


class _RotationLog(torch.autograd.Function):
    """Principal logarithm, with the derivative of Daleckii and Krein in its eigenbasis."""

    @staticmethod
    def forward(ctx: Any, r: Tensor) -> Tensor:
        log = _principal_log(r)
        ctx.save_for_backward(r, log)
        return log

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore
        (grad,) = grad_outputs
        r, log = ctx.saved_tensors
        # log = V iθ V*. For dR = R Ω: V* dlog V = h(θ_j - θ_k) ∘ (V* Ω V),
        # h(a) = ia / (1 - exp(-ia)) = (a/2) / sin(a/2) · exp(ia/2).
        theta, v = torch.linalg.eigh(-1j * log)
        half = (theta[..., :, None] - theta[..., None, :]) / 2
        sinc = torch.sinc(half / math.pi)
        fixed = sinc.abs() <= log.shape[-1] * torch.finfo(log.dtype).eps
        factor = torch.polar(torch.where(fixed, 0.0, 1 / sinc), -half)
        inner = v.mH @ skew(grad).to(v.dtype) @ v
        return r @ skew((v @ (factor * inner) @ v.mH).real)


def _principal_log(r: Tensor) -> Tensor:
    eye = _eye_like(r)
    solution, info = torch.linalg.solve_ex(r + eye, r - eye)
    solved = (info == 0) & solution.isfinite().all(-1).all(-1)
    q = skew(torch.where(solved[..., None, None], solution, 0.0))
    # -iQ is Hermitian with eigenvalues tan(θ/2), and the logarithm is 2 arctan of it.
    tangent, v = torch.linalg.eigh(-1j * q)
    log = -skew(((v * (2 * tangent.atan())[..., None, :]) @ v.mH).imag)
    far = ~solved | (tangent.abs().amax(-1) > _LARGEST_TANGENT)
    if bool(far.any()):
        rotations = r[far].to("cpu", torch.float64).numpy()
        logs = np.stack([_log_by_schur(one) for one in rotations])
        log[far] = skew(torch.from_numpy(logs)).to(r)
    return log


def _log_by_schur(r: np.ndarray) -> np.ndarray:
    """Principal logarithm of one float64 rotation through its real Schur form."""
    import scipy.linalg  # only here, and costly to import

    t, z = map(np.asarray, scipy.linalg.schur(r, output="real")[:2])
    log = np.zeros_like(r)
    half_turns = []  # 1×1 blocks -1; an even number, since the determinant is +1
    i, n = 0, len(r)
    while i < n:
        if i + 1 < n and t[i + 1, i] != 0:
            a, b, c, d = t[i, i], t[i, i + 1], t[i + 1, i], t[i + 1, i + 1]
            log[i + 1, i] = math.atan2(c - b, a + d)
            i += 2
        else:
            if t[i, i] < 0:
                half_turns.append(i)
            i += 1
    for first, second in zip(half_turns[::2], half_turns[1::2], strict=True):
        log[second, first] = math.pi
    log -= log.T
    return z @ log @ z.T


def haar(
    n: int,
    m: int | None = None,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "n m"]:
    """A random ``[n, m]`` matrix, Haar-distributed: orthonormal columns if n ≥ m, else rows.

    QR of a Gaussian matrix with the signs of R's diagonal moved into Q, without which the
    distribution would not be invariant. ``m`` is ``n`` by default; a square sample has
    determinant +1 or -1 with equal chance. ``dtype`` is torch's default, ``device`` the
    generator's if there is one.

    Raises:
        ValueError: ``n`` or ``m`` is negative.
        TypeError: ``n`` or ``m`` is not an integer, ``dtype`` not real floating point.

    Source: Mezzadri, "How to generate random matrices from the classical compact groups",
    Notices of the AMS 54 (2007).
    """
    n = operator.index(n)
    m = n if m is None else operator.index(m)
    if n < 0 or m < 0:
        raise ValueError(f"n and m must be at least 0, got {n} and {m}")
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be real floating point, got {dtype}")
    if device is None and generator is not None:
        device = generator.device
    size, work = (max(n, m), min(n, m)), compute_dtype(dtype)
    q, r = torch.linalg.qr(torch.randn(size, generator=generator, dtype=work, device=device))
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    q = (q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype)).to(dtype)
    return q if n >= m else q.mT.contiguous()


def _eye_like(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

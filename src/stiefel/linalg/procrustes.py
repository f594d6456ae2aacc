"""The rotation that brings one matrix closest to another.

Extraction step of OrthoMerge (arXiv 2602.05943): a weight ``[out, in]`` is rotated on its input
side, ``W' = W R``. The rule for null spaces and the small form for wide matrices are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import check_finite, check_pair, in_batch
from stiefel.linalg.newton_polar import PolarError, newton_polar
from stiefel.linalg.rotation import skew

# OrthoMerge sheet, edge case 1: relative size below which a singular value counts as zero.
_RANK_TOLERANCE = {torch.float64: 1e-12}
_RANK_TOLERANCE_DEFAULT = 1e-7
# Newton's iteration runs in float64 up to this width, whatever the inputs' type.
FLOAT64_UP_TO = 2048


def procrustes_rotation(
    source: Float[Tensor, "*source_batch out in"],
    target: Float[Tensor, "*target_batch rows cols"],
    *,
    proper: bool = True,
    null: str = "closest",
    rtol: float | None = None,
    polar: str = "svd",
) -> Float[Tensor, "*batch in in"]:
    """The orthogonal R that minimises ||source @ R - target||_F; R is ``[..., in, in]``.

    R = U Vᵀ with sourceᵀ target = U Σ Vᵀ, computed in float64 where the device has it. Where
    Σ has zeros (always for wide matrices, out < in) many R are optimal; ``null`` chooses.

    Args:
        source, target: ``[..., out, in]``, one dtype and device; batch dimensions broadcast.
        proper: require det R = +1 (Kabsch). If U Vᵀ is a reflection, the direction that costs
            least is flipped: the smallest singular value's, or one in the null space.
        null: ``"closest"`` takes, among all optimal R, the one closest to the identity (with
            2 out < in in O(in out²)). ``"svd"`` keeps the decomposition's arbitrary null vectors.
        rtol: singular values up to ``rtol`` times the largest count as zero; by default 1e-12
            for float64 inputs and 1e-7 for all others.
        polar: ``"svd"``, or ``"newton"`` for Newton's iteration: faster for large matrices. Where
            sourceᵀ target is singular to ``rtol`` ≥ 1e-7, a ridge of that size stands in for the
            rule "closest" and agrees with it to about ``rtol`` over the kept singular values; for
            smaller ``rtol``, and for reflections to be flipped, the decomposition is taken after
            all. float64 up to in = 2048, above in float32 unless the inputs are float64.

    Differentiable once, where sourceᵀ target has full rank (by the decomposition).

    Raises:
        ValueError: shapes do not match, NaN or infinities, unknown ``null`` or ``polar``, bad
            ``rtol``.
        TypeError: dtypes differ or are not real floating point.
        RuntimeError: a gradient is asked for and sourceᵀ target is rank deficient: R then jumps
            under small changes.

    Source: arXiv 2602.05943, orthogonal Procrustes extraction; the null-space rule and the small
    form for wide matrices are ours.
    """
    check_pair(source, "source", target, "target")
    if null not in ("closest", "svd"):
        raise ValueError(f"null must be 'closest' or 'svd', got {null!r}")
    if polar not in ("svd", "newton"):
        raise ValueError(f"polar must be 'svd' or 'newton', got {polar!r}")
    if rtol is None:
        rtol = rank_tolerance(source.dtype)
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol must be in [0, 1), got {rtol}")
    check_finite(source, "source")
    check_finite(target, "target")
    batch = torch.broadcast_shapes(source.shape[:-2], target.shape[:-2])
    work = torch.float32 if source.device.type == "mps" else torch.float64
    s = source.to(work).expand(*batch, *source.shape[-2:])
    t = target.to(work).expand(*batch, *target.shape[-2:])
    if torch.is_grad_enabled() and (s.requires_grad or t.requires_grad):
        rotation = _FullRankProcrustes.apply(s.mT @ t, proper, null, rtol)  # pyrefly: ignore
    elif null == "closest" and 2 * s.shape[-2] < s.shape[-1]:
        # R - I lives in the span of the rows of both, of dimension 2 out at most.
        basis = torch.linalg.qr(torch.cat([s.mT, t.mT], dim=-1)).Q
        small = rotation_from_product(
            (s @ basis).mT @ (t @ basis), proper, null, rtol, polar, source.dtype
        )
        eye = torch.eye(s.shape[-1], dtype=work, device=s.device)
        rotation = eye + basis @ (small - _eye_like(small)) @ basis.mT
    else:
        rotation = rotation_from_product(s.mT @ t, proper, null, rtol, polar, source.dtype)
    return rotation.to(source.dtype)


def rank_tolerance(dtype: torch.dtype) -> float:
    """Relative size below which singular values of a product of matrices of a type count as 0."""
    return _RANK_TOLERANCE.get(dtype, _RANK_TOLERANCE_DEFAULT)


def rotation_from_product(
    m: Float[Tensor, "*batch n n"],
    proper: bool,
    null: str,
    rtol: float,
    polar: str,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch n n"]:
    """:func:`procrustes_rotation` from m = sourceᵀ target alone, without its checks.

    ``m`` is best summed in float64; ``dtype`` is that of source and target.
    """
    if polar == "newton" and m.numel() > 0:
        exact = dtype == torch.float64 or m.shape[-1] <= FLOAT64_UP_TO
        work = m if exact else m.float()
        try:
            ridge = null == "closest" and rtol >= _RANK_TOLERANCE_DEFAULT
            rotation = newton_polar(work, rtol=rtol, ridge=ridge)
        except PolarError:
            return _optimal(m, proper, null, rtol)[0]
        if not proper or bool((torch.linalg.slogdet(rotation).sign > 0).all()):
            return rotation.to(m.dtype)
    return _optimal(m, proper, null, rtol)[0]


def _optimal(
    m: Tensor, proper: bool, null: str, rtol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximise trace(Rᵀ M) over orthogonal R, ties broken as ``null`` says.

    Returns R, the singular values (the last one negative where Kabsch flipped it), Vᵀ, and
    whether a singular value counts as zero, a Boolean per matrix.
    """
    u, values, vh = torch.linalg.svd(m)
    kept = values > rtol * values[..., :1]
    deficient = ~kept.all(-1)
    left, right = u, vh
    if null == "closest" and bool(deficient.any()):
        # With N0, N1 the null vectors on either side, R = U1 V1ᵀ + N0 polar(N0ᵀ N1) N1ᵀ is
        # closest to I. As one batch over any ranks: the polar factor of a block matrix with
        # N0ᵀ N1 in the null block and, above its singular values (≤ 1), a diagonal > 2.
        gone = ~kept
        block = (u.mT @ vh.mT) * (gone[..., :, None] & gone[..., None, :])
        scale = torch.where(values[..., :1] > 0, values / values[..., :1], 0.0)
        block = block + torch.diag_embed(torch.where(kept, 2 + scale, 0.0))
        a, _, bh = torch.linalg.svd(block)
        left, right = u @ a, bh @ vh
    rotation = left @ right
    if proper and m.shape[-1] > 0:
        # Both factors are sorted, so the last direction is the cheapest one to flip.
        flip = (torch.linalg.slogdet(rotation).sign < 0).to(m.dtype)[..., None, None]
        rotation = rotation - 2 * flip * (left[..., :, -1:] @ right[..., -1:, :])
        values = torch.cat([values[..., :-1], values[..., -1:] * (1 - 2 * flip[..., 0])], dim=-1)
    return rotation, values, vh, deficient


class _FullRankProcrustes(torch.autograd.Function):
    """``_optimal`` with its derivative: M = R P, P = V Σ Vᵀ symmetric, RᵀdR = Ω skew,
    Ω P + P Ω = RᵀdM - dMᵀR."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, proper: bool, null: str, rtol: float) -> Tensor:
        rotation, values, vh, deficient = _optimal(m, proper, null, rtol)
        if bool(deficient.any()):
            raise RuntimeError(
                "procrustes_rotation has no gradient where sourceᵀ target is rank deficient"
                f"{in_batch(deficient)}; detach the arguments"
            )
        ctx.save_for_backward(rotation, values, vh)
        return rotation

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore
        (grad,) = grad_outputs
        rotation, values, vh = ctx.saved_tensors
        inner = vh @ skew(rotation.mT @ grad) @ vh.mT
        pair = values[..., :, None] + values[..., None, :]
        return 2 * rotation @ vh.mT @ (inner / pair) @ vh, None, None, None


def _eye_like(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

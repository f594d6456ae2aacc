"""One update of ARO on oriented matrices: rows are the rotated side, m ≤ n (arXiv 2602.09006)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.cholesky_qr import orthonormal_factor
from stiefel.linalg.polar import frobenius_norm, polar
from stiefel.optim.sinkhorn import (
    BaseMap,
    adam_map,
    balance,
    checked_map,
    row_map,
    row_squares,
    sign_map,
)

# Norm of rows of RᵀM, in roundings of ‖M‖, that rank-deficient M leave where there is nothing, as R
# is orthogonal to a few roundings only: up to 21 were seen for m from 8 to 384.
_NOISE = 64
POLICIES = ("aro", "eigen", "identity", "polar")


def aro_rotation(
    momentum: Float[Tensor, "*batch m n"],
    rotation: Float[Tensor, "*batch m m"],
    base: BaseMap = row_map,
    *,
    policy: str = "aro",
    qr: str = "qr",
    look: torch.dtype | None = None,
) -> Float[Tensor, "*batch m m"]:
    """The new rotation: Q of QR(A) with A = M f(RᵀM)ᵀ, R being the old one.

    One step from the old R towards the rotation that maximises ⟨M, R f(RᵀM)⟩. polar(A) would solve
    the linearised problem exactly and follows the noise of mini-batches (the paper's appendix C.2).

    Args:
        momentum: M, of root mean square about 1 (R does not depend on its scale), in the precision
            wanted for products.
        rotation: R, orthogonal, float32 or float64.
        base: f, which keeps shapes. It must commute with sign flips of rows, and should not commute
            with rotations: then R cancels in the update.
        policy: ``"aro"``; for ablations ``"polar"``, ``"eigen"`` (eigenvectors of MMᵀ) and
            ``"identity"`` (R as it is).
        qr: As in :func:`stiefel.linalg.cholesky_qr.orthonormal_factor`.
        look: Precision of RᵀM, None for that of M. A's own product is in that of M, so that A has
            no more rank than M.

    Returns:
        R, orthogonal. Where A is zero the old one.
    """
    if policy == "identity":
        return rotation
    if policy == "eigen":
        a = _finite((momentum @ momentum.mT).to(rotation.dtype))
        new = torch.linalg.eigh(a)[1]
    else:
        f = base(_rotate(rotation, momentum if look is None else momentum.to(look)))
        a = (momentum @ f.to(momentum.dtype).mT).to(rotation.dtype)
        new = polar(_finite(a)) if policy == "polar" else orthonormal_factor(a, qr)
    live = a.abs().amax((-2, -1), keepdim=True) > 0  # false for NaN
    if a.device.type == "cpu" and bool(live.all()):
        return new
    return torch.where(live, new, rotation)


def aro_direction(
    momentum: Float[Tensor, "*batch m n"],
    rotation: Float[Tensor, "*batch m m"],
    base: BaseMap = row_map,
) -> Float[Tensor, "*batch m n"]:
    """U = R f(RᵀM), before scaling, with the R of :func:`aro_rotation`.

    Rows of RᵀM that are rounding noise (as for rank-deficient M) count as zero.
    """
    f = base(_rotate(rotation, momentum))
    factor = rotation.to(f.dtype)
    return factor @ f if f.is_contiguous() else (f.mT @ factor.mT).mT


def _finite(a: Tensor) -> Tensor:
    """``a`` with matrices that hold NaN or Inf replaced by 0: decompositions refuse them."""
    return torch.where(a.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), a, 0.0)


def _rotate(r: Tensor, x: Tensor) -> Tensor:
    """RᵀX, laid out in memory as X, without the rows that are nothing but rounding."""
    factor = r.to(x.dtype)
    y = factor.mT @ x if x.is_contiguous() else (x.mT @ factor).mT
    squares = row_squares(y)
    level = _NOISE * torch.finfo(r.dtype).eps
    level += 0.5 * torch.finfo(x.dtype).eps / y.shape[-2] ** 0.5  # spread over all rows
    live = squares > squares.sum(-2, keepdim=True) * level**2
    if y.device.type == "cpu" and bool(live.all()):
        return y
    return torch.where(live | squares.isnan(), y, 0.0)


def rotation_objective(
    momentum: Float[Tensor, "*batch m n"], rotation: Float[Tensor, "*batch m m"], base: BaseMap
) -> Float[Tensor, "*batch"]:
    """J(R) = ⟨M, R f(RᵀM)⟩, the decrease per unit step that a rotation promises.

    For f from a norm it is that norm's dual of RᵀM. ``policy="polar"`` on a fixed M never lowers
    it; QR may.
    """
    rotated = rotation.mT @ momentum
    return (rotated * base(rotated)).sum((-2, -1))


def oriented(x: Tensor, columns: bool) -> Tensor:
    """``x`` with the rotated side as rows."""
    return x.mT if columns else x


def moments(states: Sequence[Mapping[str, Tensor]], columns: bool) -> Tensor | None:
    """Second moments as an oriented stack of their own memory, where the method keeps them."""
    if "root_second_moment" not in states[0]:
        return None
    return oriented(torch.stack([state["root_second_moment"] for state in states]), columns)


def signs(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sign map, in another type."""
    return sign_map(x).to(dtype)


def mean_size(x: Tensor) -> Tensor:
    """Root mean square per matrix, at least float32, never 0."""
    size = frobenius_norm(x) / (x.shape[-2] * x.shape[-1]) ** 0.5
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return size.to(wide).clamp_min_(torch.finfo(wide).smallest_normal)


def base_map(
    group: Mapping[str, Any], v: Tensor | None, unit: Tensor, keep: bool = False
) -> BaseMap:
    """f. For ``"adam"`` with the second moment ``v`` of matrices ``unit`` times larger."""
    base = group["base"]
    if base == "sinkhorn":
        return partial(balance, iters=group["sinkhorn_iters"], mode=group["sinkhorn_mode"])
    if v is not None:
        return partial(adam_map, root=v, unit=unit, beta2=group["beta2"], keep=keep)
    return {"row": row_map, "sign": sign_map}[base] if isinstance(base, str) else checked_map(base)

"""How far the change of a weight is from orthonormal columns, with a gradient in closed form.

After Liu et al., arXiv 2604.17078. ΔW = W − W0, and G its smaller Gram matrix: ΔWᵀΔW, or ΔWΔWᵀ
where ΔW has fewer rows than columns.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stiefel.linalg._checks import check_finite, check_matrix, compute_dtype
from stiefel.linalg.autocast import without_autocast

POWERS = (1, 2)
TARGETS = ("identity", "offdiag")


def orthoreg_loss(
    delta: Shaped[Tensor, "*delta"], power: int = 1, *, target: str = "identity"
) -> Float[Tensor, "*batch"]:
    """‖G − I‖_F of every matrix, or its square; differentiable any number of times.

    The paper prints the square, its authors' code takes the norm: λ differs between the two by
    about 2‖G − I‖_F, often 20 to 60. The gradient is 4 ΔW (G − I) for the square and
    2 ΔW (G − I) / ‖G − I‖_F for the norm; it is 0 where G = I, and 0 at ΔW = 0.

    The literal ΔWᵀΔW of a wide ΔW has columns − rows more in the square and the same gradient
    there; under ``power=1`` it is another function.

    Args:
        delta: ΔW, ``[..., out, in]``. Half types are computed in float32, also under autocast.
        power: 1 (the authors' code) or 2 (the paper).
        target: ``"identity"``, or ``"offdiag"``: G's off-diagonal entries alone, which decorrelates
            without drawing lengths to 1. The latter is ours, not the paper's.

    Returns:
        ``[...]``, in float32 for half types, else in the dtype of ``delta``.

    Raises:
        TypeError: ``delta`` is not real floating point.
        ValueError: fewer than two dimensions; another power or target; NaN or infinities in
            ``delta``, or a G beyond its dtype (neither is looked for in compiled code).
    """
    check_matrix(delta, "delta")
    check_options(power, target)
    with without_autocast(delta):
        work = delta.to(compute_dtype(delta.dtype))
        loss = distance(work, power, target)
    if not _unreadable(loss) and not bool(loss.isfinite().all()):
        check_finite(delta, "delta")
        raise ValueError(f"the Gram matrix of delta leaves the range of {loss.dtype}")
    return loss


def orthoreg_loss_lowrank(
    B: Shaped[Tensor, "*left"],
    A: Shaped[Tensor, "*right"],
    scaling: float | int = 1.0,
    power: int = 1,
    *,
    target: str = "identity",
) -> Float[Tensor, "*batch"]:
    """:func:`orthoreg_loss` of ΔW = s·B·A, exact, without forming it: O((out + in) r²).

    With M = s² (BᵀB)(AAᵀ), r × r: ‖G − I‖²_F = tr(M²) − 2 tr(M) + min(out, in), here summed as
    tr((M − I)²) + min(out, in) − r, which loses nothing when M is close to I. As G has rank r at
    most, the norm cannot fall below √(min(out, in) − r).

    Args:
        B: ``[..., out, r]``.
        A: ``[..., r, in]``.
        scaling: s, α/r of a LoRA layer.
        power: 1 or 2.
        target: ``"identity"`` or ``"offdiag"``, as there.

    Returns:
        ``[...]``, in float32 or the wider of the two dtypes.

    Raises:
        TypeError: a factor is not real floating point.
        ValueError: shapes that do not fit; another power or target; NaN or infinities, or an M
            beyond its dtype (neither is looked for in compiled code).
    """
    check_matrix(B, "B")
    check_matrix(A, "A")
    check_options(power, target)
    if B.shape[-1] != A.shape[-2] or B.shape[:-2] != A.shape[:-2]:
        raise ValueError(
            f"B must be [..., out, r] and A [..., r, in], got {tuple(B.shape)} and {tuple(A.shape)}"
        )
    with without_autocast(B):
        loss = lowrank_distance(B, A, scaling, power, target)
    if not _unreadable(loss) and not bool(loss.isfinite().all()):
        check_finite(B, "B")
        check_finite(A, "A")
        raise ValueError(f"the Gram matrix of s·B·A leaves the range of {loss.dtype}")
    return loss


def check_options(power: int, target: str) -> None:
    """Raise ``ValueError`` for another power or target than there are."""
    if power not in POWERS:
        raise ValueError(f"power must be 1 (the norm) or 2 (its square), got {power!r}")
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")


def distance(
    delta: Tensor,
    power: int,
    target: str,
    rows: bool | None = None,
    groups: tuple[Any, ...] = (),
) -> Tensor:
    """The loss of float32 or float64 matrices; nothing is checked.

    Args:
        delta: ``[..., out, in]``, or this process's share of its rows or columns.
        power, target: As for :func:`orthoreg_loss`.
        rows: Whether G is ΔWΔWᵀ; None: where ``delta`` is wide.
        groups: Process groups over which the share's Gram matrices add up to G. Every process gets
            the loss of the whole, and the gradient of its own share.
    """
    if rows is None:
        rows = delta.shape[-2] < delta.shape[-1]
    return _Distance.apply(delta, power == 2, target == "offdiag", rows, groups)[0]  # pyrefly: ignore


def lowrank_distance(b: Tensor, a: Tensor, scaling: float | int, power: int, target: str) -> Tensor:
    """:func:`orthoreg_loss_lowrank` of arguments that are not checked, autocast off."""
    dtype = torch.promote_types(compute_dtype(b.dtype), compute_dtype(a.dtype))
    b, a = scaling * b.to(dtype), a.to(dtype)
    left, right = b.mT @ b, a @ a.mT
    m = left @ right
    if target == "identity":
        m = m - torch.eye(m.shape[-1], dtype=dtype, device=m.device)
        total = (m * m.mT).sum((-2, -1)) + (min(b.shape[-2], a.shape[-1]) - m.shape[-1])
    else:
        wide = b.shape[-2] < a.shape[-1]
        lengths = ((b @ right) * b).sum(-1) if wide else ((left @ a) * a).sum(-2)
        total = (m * m.mT).sum((-2, -1)) - lengths.square().sum(-1)
    total = total.clamp_min(0)  # rounding
    return total if power == 2 else _root(total)


def _error(delta: Tensor, offdiag: bool, rows: bool, groups: tuple[Any, ...]) -> Tensor:
    """G − I, or G without its diagonal."""
    error = delta @ delta.mT if rows else delta.mT @ delta
    for group in groups:
        torch.distributed.all_reduce(error, group=group)
    diagonal = error.diagonal(dim1=-2, dim2=-1)
    if offdiag:
        diagonal.zero_()
    else:
        diagonal.sub_(1)
    return error


class _Distance(torch.autograd.Function):
    """The loss and G − I, which is kept for the gradient: a third less than autograd's time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        delta: Tensor, squared: bool, offdiag: bool, rows: bool, groups: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        error = _error(delta, offdiag, rows, groups)
        norm = torch.linalg.vector_norm(error, dim=(-2, -1))
        return norm.square() if squared else norm, error

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        delta, *ctx.options = inputs
        loss, error = output
        ctx.mark_non_differentiable(error)
        ctx.save_for_backward(delta, loss, error)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        squared, offdiag, rows, groups = ctx.options
        delta, loss, error = ctx.saved_tensors
        with without_autocast(delta):
            if torch.is_grad_enabled():  # the gradient is to be differentiated: so must G be
                if groups:
                    raise NotImplementedError("second derivatives of sharded parameters")
                error = _error_differentiable(delta, offdiag, rows)
            factor = 4 * outputs[0]
            if not squared:
                zero = loss == 0
                factor = torch.where(zero, 0.0, factor / (2 * torch.where(zero, 1.0, loss)))
            error = factor[..., None, None] * error
            return error @ delta if rows else delta @ error, None, None, None, None


def _error_differentiable(delta: Tensor, offdiag: bool, rows: bool) -> Tensor:
    """As :func:`_error`, without changing anything in place."""
    gram = delta @ delta.mT if rows else delta.mT @ delta
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram * (1 - eye) if offdiag else gram - eye


def _root(total: Tensor) -> Tensor:
    """√ with a gradient of 0 at 0."""
    zero = total <= 0  # NaN is not, and stays
    return torch.where(zero, 0.0, torch.where(zero, 1.0, total).sqrt())


def _unreadable(loss: Tensor) -> bool:
    """Whether the value cannot be looked at: in compiled code, without storage, under vmap."""
    return (
        torch.compiler.is_compiling()
        or loss.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(loss)
    )

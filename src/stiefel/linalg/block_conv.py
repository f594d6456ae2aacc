"""Kernels that are orthogonal by construction, of every size for which there are any.

Two constructions. Block convolutions (Li, Haque, Anil, Lucas, Grosse, Jacobsen, "Preventing
gradient attenuation in Lipschitz constrained convolutional networks", 2019): a matrix with
orthonormal rows or columns, and kernels of two taps [P, I − P] with a projector P, composed.
Cayley (Trockman, Kolter, "Orthogonalizing convolutional layers with the Cayley transform", ICLR
2021): an orthogonal matrix per frequency, whose kernel is as large as the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from stiefel.linalg.conv_geometry import orthogonal_conv_exists
from stiefel.linalg.conv_penalty import output_size, polyphase
from stiefel.linalg.conv_spectrum import symbols


@dataclass(frozen=True)
class BlockPlan:
    """How a kernel of one group is composed.

    Attributes:
        out_ch, in_ch: M and C.
        stride: S per axis.
        core: Sizes of the first kernel, min(k, S) per axis: its patches do not overlap.
        right: Axes along which the input side grows, one tap each.
        left: Axes along which the output side grows, S taps each.
    """

    out_ch: int
    in_ch: int
    stride: tuple[int, ...]
    core: tuple[int, ...]
    right: tuple[int, ...]
    left: tuple[int, ...]

    @property
    def base_shape(self) -> tuple[int, int]:
        """Of the matrix that the first kernel is: ``(M, C·∏core)``."""
        return self.out_ch, self.in_ch * math.prod(self.core)

    @property
    def right_shape(self) -> tuple[int, int, int]:
        """Of the bases of the projectors on the input side, each of half of the channels."""
        return len(self.right), self.in_ch, self.in_ch // 2

    @property
    def left_shape(self) -> tuple[int, int, int]:
        """Of the bases of the projectors on the output side."""
        return len(self.left), self.out_ch, self.out_ch // 2


def block_plan(
    out_ch: int, in_ch: int, kernel_size: tuple[int, ...], stride: tuple[int, ...]
) -> BlockPlan:
    """The composition for M, C, k, S of one group.

    The kernel grows from min(k, S) to k by factors on the side with more channels, where they have
    most freedom (on one channel a factor is a mere shift); on the output side a factor adds S taps.

    Raises:
        ValueError: no orthogonal kernel exists.
    """
    report = orthogonal_conv_exists(out_ch, in_ch, kernel_size, stride, dim=len(stride))
    if not report:
        raise ValueError(f"{report.reason}; the smallest L_orth is {report.minimum:g}")
    core = tuple(map(min, kernel_size, stride))
    right, left = [], []
    for axis, (k, s, n) in enumerate(zip(kernel_size, stride, core, strict=True)):
        outer = (k - n) // s if out_ch > in_ch else 0
        left += [(turn, axis) for turn in range(outer)]
        right += [(turn, axis) for turn in range(k - n - outer * s)]
    # Axes take turns.
    return BlockPlan(
        out_ch, in_ch, stride, core, *(tuple(a for _, a in sorted(x)) for x in (right, left))
    )


def orthonormal(x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """Q of the QR factorisation, of the transpose where rows are fewer. Differentiable.

    A rank-deficient x still gives an orthonormal Q, but no gradient (NaN or Inf).
    """
    if x.numel() == 0:
        return x
    if x.shape[-2] < x.shape[-1]:
        return orthonormal(x.mT).mT
    q = torch.linalg.qr(x).Q
    # One Newton step takes off what reflections left of rounding; its derivative is nothing beside
    # that of Q.
    with torch.no_grad():
        gram = q.mT @ q
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        step = q @ gram / 2
    return q - step


def block_kernel(
    plan: BlockPlan,
    base: Float[Tensor, "groups m n"],
    right: Float[Tensor, "groups r c half"],
    left: Float[Tensor, "groups l m other"],
) -> Float[Tensor, "groups m c *k"]:
    """The orthogonal kernel of these factors. Differentiable.

    Factors need not be orthonormal: they are made so first.
    """
    dim = len(plan.core)
    x = orthonormal(base)
    x = x.reshape(*x.shape[:-1], plan.in_ch, *plan.core)
    x = x.movedim((1, 2), (-2, -1))  # [groups, *taps, M, C]
    for axis, q in zip(plan.right, orthonormal(right).unbind(1), strict=True):
        x = _grown(x, q, axis - dim - 2, 1)
    if plan.left:
        x = x.mT
        for axis, q in zip(plan.left, orthonormal(left).unbind(1), strict=True):
            x = _grown(x, q, axis - dim - 2, plan.stride[axis])
        x = x.mT
    # Left as it lies, the strides would talk torch's convolution into another layout.
    return x.movedim((-2, -1), (1, 2)).contiguous()


def _grown(x: Tensor, q: Tensor, axis: int, by: int) -> Tensor:
    """x composed with the taps P = QQᵀ at 0 and I − P at ``by`` along one axis.

    new[u] = x[u] P + x[u − by] (I − P).
    """
    ends = [0] * (2 * (-axis - 1))
    if q.shape[-1] == 0:
        return pad(x, [*ends, by, 0])
    # Small tensors: bmm makes a third of the calls of @ here, forward and backward.
    inside = torch.bmm(torch.bmm(x.flatten(1, -2), q), q.mT).view(x.shape)
    if x.shape[axis] == by:  # the two do not overlap
        return torch.cat([inside, x - inside], dim=axis)
    return pad(inside, [*ends, 0, by]) + pad(x - inside, [*ends, by, 0])


def cayley_convolve(
    x: Float[Tensor, "batch channels *image"],
    weight: Float[Tensor, "out in *k"],
    gain: Float[Tensor, ""],
    stride: Sequence[int],
    groups: int = 1,
) -> Float[Tensor, "batch out *outputs"]:
    """Circular convolution with the Cayley transform of a kernel, frequency by frequency.

    W(ν) = gain·FFT(weight)/‖weight‖_F on C·∏S channels, tall (transposed where wide), [U; V] with
    U square: A = U − U* + V*V and Q = [(I + A)⁻¹(I − A); −2V(I + A)⁻¹], whose columns are
    orthonormal. Cost per call: one solve of size min(M, C·∏S) for half of the frequencies.

    Raises:
        ValueError: an image that the stride does not divide.
    """
    stride = tuple(stride)
    outputs = output_size(x.shape[2:], stride, len(stride))
    kernel = polyphase(weight.reshape(groups, -1, *weight.shape[1:]), stride)
    parts = [cayley_columns(part) for part in symbols(gain * kernel / kernel.norm(), outputs)]
    axes = tuple(range(2, x.ndim))
    spectrum = torch.fft.rfftn(_to_depth(x, stride), dim=axes)
    grid = spectrum.shape[2:]
    # [frequencies, groups, channels, batch]
    flat = spectrum.flatten(2).permute(2, 1, 0).unflatten(1, (groups, -1))
    y = (torch.cat(parts) @ flat).flatten(1, 2).permute(2, 1, 0)
    return torch.fft.irfftn(y.unflatten(2, grid), s=outputs, dim=axes)


def cayley_columns(w: Tensor) -> Tensor:
    """Complex matrices ``[..., m, n]`` to ones with orthonormal columns, or rows where m < n."""
    if w.shape[-2] < w.shape[-1]:
        return cayley_columns(w.mT).mT
    n = w.shape[-1]
    u, v = w[..., :n, :], w[..., n:, :]
    eye = torch.eye(n, dtype=w.dtype, device=w.device)
    a = u - u.mH + v.mH @ v
    inverse = torch.linalg.inv(eye + a)
    # (I + A)⁻¹(I − A) = 2(I + A)⁻¹ − I.
    return torch.cat([2 * inverse - eye, -2 * v @ inverse], dim=-2)


def _to_depth(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``[batch, C, *S·N]`` to ``[batch, C·∏S, *N]``, in the order of :func:`polyphase`."""
    if max(stride) == 1:
        return x
    dim = len(stride)
    split = [n for size, s in zip(x.shape[2:], stride, strict=True) for n in (size // s, s)]
    y = x.reshape(*x.shape[:2], *split)
    y = y.permute(0, 1, *(3 + 2 * i for i in range(dim)), *(2 + 2 * i for i in range(dim)))
    return y.reshape(
        x.shape[0], -1, *(size // s for size, s in zip(x.shape[2:], stride, strict=True))
    )

"""L_orth: how far a convolution is from orthogonal, from its kernel alone, and what that bounds.

After Achour, Malgouyres, Mamalet (arXiv 2108.05623). M output channels, C input channels, kernel k,
stride S, d axes. The layer's matrix 𝒦 is that of circular padding on any image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

from stiefel.linalg._checks import check_finite, check_floating, compute_dtype
from stiefel.linalg.autocast import without_autocast
from stiefel.linalg.conv_geometry import check_channels, check_dim, conv_orth_case, per_axis

SIDES = ("auto", "out", "in")
# Taps from which frequencies are cheaper than pairs of taps (measured on one core, 64 channels).
_FREQUENCIES_FROM = 25


def check_kernel(weight: Tensor, groups: int = 1, name: str = "weight") -> None:
    """Raise unless ``weight`` is a finite real kernel ``[M, C/groups, *k]`` of one or two axes.

    Raises:
        TypeError: not real floating point.
        ValueError: not 3-D or 4-D, empty, channels that ``groups`` does not divide, NaN or Inf.
    """
    check_floating(weight, name)
    if weight.ndim not in (3, 4) or 0 in weight.shape:
        raise ValueError(
            f"{name} must be a kernel [out, in, k] or [out, in, k, k] that is not empty, "
            f"got shape {tuple(weight.shape)}"
        )
    check_channels(weight.shape[0], weight.shape[1] * groups, groups)
    if not torch.compiler.is_compiling() and not weight.is_meta:
        check_finite(weight, name)


def lorth(
    weight: Shaped[Tensor, "*kernel"],
    stride: int | Iterable[int] = 1,
    groups: int = 1,
    side: str = "auto",
) -> Float[Tensor, ""]:
    """L_orth of a kernel, zero if and only if the whole layer is orthogonal. Differentiable.

    L_orth = ‖conv(K, K, stride S, padding P) − I‖²_F − max(0, M − C·∏S) with P = ⌊(k − 1)/S⌋·S
    (the paper's definition). For circular padding and images of at least 2k − 1 pixels an axis,
    N^d·L_orth = ‖𝒦𝒦ᵀ − I‖²_F (rows) or ‖𝒦ᵀ𝒦 − I‖²_F (columns), N the pixels of the output an axis.

    It is computed on the side with fewer channels: there it is a plain sum of squares, never
    negative, without a constant to subtract.

    Args:
        weight: ``[M, C/groups, k]`` or ``[M, C/groups, k, l]``, as ``torch.nn.Conv1d`` and
            ``Conv2d`` hold it. That of a transposed convolution fits as it is: its matrix is the
            transpose. Half types are computed in float32, also under autocast.
        stride: S, one or one per axis.
        groups: The layer is block diagonal: the sum over its groups.
        side: ``"auto"``; ``"out"`` correlates output channels, ``"in"`` the C·∏S input channels.
            The value is the same but for rounding.

    Returns:
        A scalar, in float32 for half types, else in the dtype of ``weight``.

    Raises:
        TypeError: ``weight`` is not real floating point.
        ValueError: not a kernel of 1-D or 2-D, a stride or groups below 1, channels that groups
            does not divide, an unknown side, NaN or Inf (not checked in compiled code).
    """
    check_kernel(weight, groups)
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
    kernels = weight.reshape(groups, -1, *weight.shape[1:])
    return lorth_stack(kernels, per_axis(stride, weight.ndim - 2, "stride"), side).sum()


def lorth_stack(
    kernels: Float[Tensor, "count out inner *k"], stride: tuple[int, ...], side: str = "auto"
) -> Float[Tensor, " count"]:
    """L_orth of every kernel of a stack; the arguments are not checked. See :func:`lorth`."""
    with without_autocast(kernels):
        x = kernels.to(compute_dtype(kernels.dtype))
        rows, columns = x.shape[1], x.shape[2] * math.prod(stride)
        if side == "auto":
            side = "out" if rows <= columns else "in"
        if side == "in":
            x, stride = polyphase(x, stride).transpose(1, 2), (1,) * len(stride)
        distance = _squared_distance(x, stride)
        # The other side has a projector at best, whose rank falls short by the difference.
        return distance - max(0, rows - columns if side == "out" else columns - rows)


def polyphase(
    kernels: Float[Tensor, "count out inner *k"], stride: tuple[int, ...]
) -> Float[Tensor, "count out phases *q"]:
    """The kernel of the same layer at stride 1, on C·∏S channels: one per channel and offset.

    ``[count, M, C, *k]`` to ``[count, M, C·∏S, *⌈k/S⌉]``, filled up with zeros.
    """
    dim = len(stride)
    sizes = [-(-k // s) for k, s in zip(kernels.shape[3:], stride, strict=True)]
    missing = [q * s - k for q, s, k in zip(sizes, stride, kernels.shape[3:], strict=True)]
    if any(missing):
        kernels = pad(kernels, [n for m in reversed(missing) for n in (0, m)])
    if max(stride) == 1:
        return kernels
    split = [n for q, s in zip(sizes, stride, strict=True) for n in (q, s)]
    x = kernels.reshape(*kernels.shape[:3], *split)
    outer, inner = [3 + 2 * i for i in range(dim)], [4 + 2 * i for i in range(dim)]
    x = x.permute(0, 1, 2, *inner, *outer)
    return x.reshape(*kernels.shape[:2], -1, *sizes)


def _squared_distance(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Σ over lags of ‖A_l − [l = 0] I‖²_F with A_l = Σ_u K_{u+l} K_uᵀ; ``[count]``."""
    if math.prod(x.shape[3:]) >= _FREQUENCIES_FROM:
        return _by_frequencies(polyphase(x, stride))
    return _by_lags(x, stride)


def _by_lags(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """One product per pair of lags ±l, as A_{−l} = A_lᵀ, over the taps that meet."""
    count, rows = x.shape[:2]
    taps = x.permute(0, 1, *range(3, x.ndim), 2)  # channels last: slices keep them together
    steps = [
        range(-((k - 1) // s), (k - 1) // s + 1) for k, s in zip(x.shape[3:], stride, strict=True)
    ]
    total = x.new_zeros(count)
    for lag in product(*steps):
        if lag < (0,) * len(lag):
            continue
        ahead, behind = [slice(None)] * 2, [slice(None)] * 2
        for step, s, k in zip(lag, stride, x.shape[3:], strict=True):
            shift = step * s
            ahead.append(slice(max(0, shift), k + min(0, shift)))
            behind.append(slice(max(0, -shift), k + min(0, -shift)))
        left = taps[tuple(ahead)].reshape(count, rows, -1)
        if any(lag):
            a = left @ taps[tuple(behind)].reshape(count, rows, -1).mT
            total = total + 2 * a.square().sum((1, 2))
        else:
            a = left @ left.mT - torch.eye(rows, dtype=x.dtype, device=x.device)
            total = total + a.square().sum((1, 2))
    return total


def _by_frequencies(x: Tensor) -> Tensor:
    """Parseval: the mean of ‖K(ν) K(ν)* − I‖²_F over 2k − 1 frequencies an axis, stride 1."""
    grid = [2 * k - 1 for k in x.shape[3:]]
    axes = tuple(range(3, x.ndim))
    spectrum = torch.fft.rfftn(x, s=grid, dim=axes).movedim((1, 2), (-2, -1))
    a = spectrum @ spectrum.mH - torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    norms = torch.view_as_real(a).square().sum((-3, -2, -1))
    # The last axis holds half of its frequencies, its odd length all but the first of them twice.
    both = 2 * norms.sum(-1) - norms[..., 0]
    return both.reshape(len(both), -1).sum(1) / math.prod(grid)


def lorth_alpha(shape: Sequence[int], stride: int | Iterable[int] = 1, groups: int = 1) -> float:
    """α with ‖𝒦𝒦ᵀ − I‖²₂ ≤ α·L_orth (or its twin for columns), at every image size.

    α = M·∏(2⌊(k − 1)/S⌋ + 1) for rows, C·∏(2k − 1) for columns, the smaller where M = C·∏S (the
    paper's stability theorem). M and C are those of one group.

    Args:
        shape: ``weight.shape``, ``(M, C/groups, k)`` or ``(M, C/groups, k, l)``.
        stride: S, one or one per axis.
        groups: Of the layer.

    Raises:
        ValueError: not 3 or 4 numbers, a number below 1, groups that do not divide M.
    """
    if len(shape) not in (3, 4):
        raise ValueError(f"shape must be (out, in, k) or (out, in, k, k), got {tuple(shape)}")
    m, c = check_channels(shape[0], shape[1] * groups, groups)
    dim = len(shape) - 2
    k, s = per_axis(tuple(shape[2:]), dim, "kernel_size"), per_axis(stride, dim, "stride")
    rows = m * math.prod(2 * ((size - 1) // step) + 1 for size, step in zip(k, s, strict=True))
    columns = c * math.prod(2 * size - 1 for size in k)
    case = conv_orth_case(m, c, k, s, dim)
    return float({"RO": rows, "CO": columns, "square": min(rows, columns)}[case])


def lorth_sigma_bounds(
    weight: Shaped[Tensor, "*kernel"], stride: int | Iterable[int] = 1, groups: int = 1
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """``(lo, hi)`` between which all singular values lie, whatever the size of the image.

    √max(0, 1 − ε) and √(1 + ε) with ε = √(α·L_orth) (the paper's stability theorem), for the
    min(M, C·∏S) singular values a frequency. Layers padded with zeros or not at all obey ``hi``.

    Args, raises: as :func:`lorth`.
    """
    value = lorth(weight, stride, groups).clamp(min=0)
    eps = (lorth_alpha(weight.shape, stride, groups) * value).sqrt()
    return (1 - eps).clamp(min=0).sqrt(), (1 + eps).sqrt()


def frobenius_error(
    weight: Shaped[Tensor, "*kernel"],
    input_size: int | Iterable[int],
    stride: int | Iterable[int] = 1,
    groups: int = 1,
) -> Float[Tensor, ""]:
    """‖𝒦𝒦ᵀ − I‖_F (rows) or ‖𝒦ᵀ𝒦 − I‖_F (columns) on one image size: √(∏N · L_orth), exactly.

    Args:
        weight: As for :func:`lorth`.
        input_size: Pixels of the input, one or one per axis: S·N ≥ 2k − 1.
        stride: S, one or one per axis.
        groups: Of the layer.

    Raises:
        TypeError: as :func:`lorth`.
        ValueError: as :func:`lorth`; sizes that S does not divide, or below 2k − 1, where the
            identity is false (use :func:`stiefel.nn.conv_singular_values`).
    """
    value = lorth(weight, stride, groups)
    outputs = output_size(input_size, stride, weight.ndim - 2)
    sizes = per_axis(input_size, weight.ndim - 2, "input_size")
    if any(n < 2 * k - 1 for n, k in zip(sizes, weight.shape[2:], strict=True)):
        raise ValueError(
            f"input_size must be at least 2k − 1 for this identity, got {sizes} with kernel "
            f"{tuple(weight.shape[2:])}"
        )
    return (math.prod(outputs) * value.clamp(min=0)).sqrt()


def output_size(
    input_size: int | Iterable[int], stride: int | Iterable[int], dim: int
) -> tuple[int, ...]:
    """N = input / S on every axis.

    Raises:
        ValueError: a size below 1, or one that S does not divide.
    """
    check_dim(dim)
    sizes, steps = per_axis(input_size, dim, "input_size"), per_axis(stride, dim, "stride")
    if any(n % s for n, s in zip(sizes, steps, strict=True)):
        raise ValueError(f"input_size must be divisible by stride {steps}, got {sizes}")
    return tuple(n // s for n, s in zip(sizes, steps, strict=True))

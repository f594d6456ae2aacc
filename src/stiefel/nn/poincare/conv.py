"""Poincaré convolution: two plain convolutions and a pointwise function, no unfolding.

Source: van Spengler et al., arXiv 2303.14027: every patch is a point of a larger ball
(beta-concatenation), and a fully connected layer acts on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.linalg._checks import compute_dtype
from stiefel.nn.poincare._args import Curvature, check_no_nan, check_vectors, curvature, exactly
from stiefel.nn.poincare._fully_connected import layer
from stiefel.nn.poincare._products import Geometry
from stiefel.nn.poincare.ball import PoincareBall
from stiefel.nn.poincare.linear import (
    check_layer,
    check_weight,
    empty_parameters,
    start_weight_,
)

Pair = int | Sequence[int]


def beta_ratio(channels: int, taps: int) -> float:
    """B(channels·taps/2, 1/2)/B(channels/2, 1/2), the factor on vectors that are concatenated.

    It keeps the expected length of ``taps`` random vectors of ``channels`` entries as one vector.
    """

    def log_beta(a: float) -> float:
        return math.lgamma(a) - math.lgamma(a + 0.5)

    return math.exp(log_beta(channels * taps / 2) - log_beta(channels / 2))


def poincare_conv2d(
    x: Shaped[Tensor, ...],
    Z: Shaped[Tensor, ...],
    bias: Shaped[Tensor, ...] | None,
    c: Curvature,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    clip: str | None = None,
) -> Float[Tensor, "batch outputs new_height new_width"]:
    """Convolution of tangent vectors at the origin, one per pixel, into tangent vectors.

    Padding is with 0, the origin. The products with all patches are one convolution, their squared
    lengths another one with a kernel of ones and a single channel.

    Args:
        x: ``[batch, C, height, width]``.
        Z: ``[C·kh·kw, outputs]``, rows channel by channel as ``torch.nn.functional.unfold`` has
            them.
        bias: ``[outputs]`` or None.
        c: > 0, a number or a tensor.
        kernel_size: kh and kw, one or two integers, as are the next three.
        stride: ≥ 1.
        padding: ≥ 0.
        dilation: ≥ 1.
        clip: As of :func:`~stiefel.nn.poincare.poincare_linear_tangent`.

    Raises:
        TypeError: tensors not floating point.
        ValueError: shapes that do not fit, a kernel larger than the padded image, c not positive.
    """
    check_vectors(x, "x")
    check_weight(Z, bias, clip)
    k, s, p, g = (
        pair(v, name, least)
        for v, name, least in (
            (kernel_size, "kernel_size", 1),
            (stride, "stride", 1),
            (padding, "padding", 0),
            (dilation, "dilation", 1),
        )
    )
    taps = k[0] * k[1]
    if x.ndim != 4 or x.shape[1] * taps != Z.shape[0]:
        raise ValueError(
            f"x must be [batch, C, height, width] with C·{taps} = {Z.shape[0]} (the rows of Z), "
            f"got shape {tuple(x.shape)}"
        )
    check_sizes(x, k, s, p, g)
    work = compute_dtype(torch.promote_types(x.dtype, Z.dtype))
    return tangent_conv(x, Z, bias, curvature(c, work, x.device), (k, s, p, g), clip)


def tangent_conv(
    x: Tensor,
    Z: Tensor,
    bias: Tensor | None,
    c: Tensor,
    geometry: Geometry,
    clip: str | None,
) -> Tensor:
    """:func:`poincare_conv2d` of arguments that are known to be right."""
    k, channels = geometry[0], x.shape[1]
    work = compute_dtype(torch.promote_types(x.dtype, Z.dtype))
    factor = beta_ratio(channels, k[0] * k[1])
    with exactly(x):
        bias = None if bias is None else bias.to(work)
        out = layer(x.to(work), Z.to(work), bias, c.to(work), factor, geometry, clip)
    return out.to(x.dtype)


def pair(value: Pair, name: str, least: int) -> tuple[int, int]:
    """One or two integers of at least ``least`` as two.

    Raises:
        ValueError: anything else.
    """
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(n, int) and n >= least for n in both):
        raise ValueError(f"{name} must be one or two integers of at least {least}, got {value!r}")
    return both[0], both[1]


class PoincareConv2d(nn.Module):
    """A convolution of the ball: ``[batch, in_ch, H, W]`` to ``[batch, out_ch, H′, W′]``, tangent.

    ``weight`` is Z, ``[in_ch·kh·kw, out_ch]``, in the order of the authors' and HypLL's layers.

    Args:
        in_ch: Channels in: the dimension of the ball at every pixel.
        out_ch: Channels out.
        kernel_size: One or two integers, as are the next three.
        ball: Where; its curvature may be learnable.
        stride: ≥ 1.
        padding: ≥ 0, with the origin.
        dilation: ≥ 1.
        bias: Learnable offsets, 0 at the start.
        init: ``"identity"``: as the authors' code, output o is tap ``o % k²`` of channel
            ``o // k²`` times :func:`beta_ratio`. ``"identity_center"``: the central tap of channel
            ``o % in_ch``. ``"normal"``: as before the paper.
        clip: As of :func:`~stiefel.nn.poincare.poincare_linear_tangent`.
        jitter: Noise on columns that would start at 0 (out_ch > in_ch·k², first init).
        generator: For the start.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: sizes out of range, an unknown init or clip, a negative jitter.
        TypeError: ball is not a :class:`PoincareBall`.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        kernel_size: Pair,
        ball: PoincareBall,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        bias: bool = True,
        init: str = "identity",
        *,
        clip: str | None = None,
        jitter: float | int = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_layer(init, jitter, clip, ball, in_ch=in_ch, out_ch=out_ch)
        self.in_ch, self.out_ch, self.ball = in_ch, out_ch, ball
        self.kernel_size = pair(kernel_size, "kernel_size", 1)
        self.stride, self.padding = pair(stride, "stride", 1), pair(padding, "padding", 0)
        self.dilation = pair(dilation, "dilation", 1)
        self.init, self.clip, self.jitter = init, clip, jitter
        rows = in_ch * self.kernel_size[0] * self.kernel_size[1]
        self.weight, self.bias = empty_parameters(rows, out_ch, bias, device, dtype)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start again, as ``init`` says."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        start_weight_(self.weight, taps, self.init, self.jitter, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Shaped[Tensor, ...]
    ) -> Float[Tensor, "batch outputs new_height new_width"]:
        """Tangent vectors of every pixel, in the dtype of x.

        Raises:
            TypeError: x is not floating point.
            ValueError: other channels, or images smaller than the kernel.
            RuntimeError: the result holds NaN and the ball is in debug mode.
        """
        check_vectors(x, "x")
        check_images(x, self.in_ch)
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        check_sizes(x, *geometry)
        out = tangent_conv(x, self.weight, self.bias, self.ball.c, geometry, self.clip)
        if self.ball.debug:
            check_no_nan(out, "PoincareConv2d")
        return out

    def extra_repr(self) -> str:
        """Sizes and choices, for ``print(model)``."""
        return (
            f"{self.in_ch}, {self.out_ch}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}, "
            f"init={self.init!r}"
        )


def check_sizes(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    """Raise ``ValueError`` for images smaller than the kernel."""
    for n, k, p, g in zip(x.shape[2:], kernel, padding, dilation, strict=True):
        if n + 2 * p < g * (k - 1) + 1:
            raise ValueError(
                f"images of {tuple(x.shape[2:])} with padding {padding} are smaller than the "
                f"kernel {kernel} with dilation {dilation}"
            )


def check_images(x: Tensor, channels: int) -> None:
    """Raise unless x is floating point (``TypeError``), ``[batch, channels, H, W]``."""
    check_vectors(x, "x")
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be [batch, {channels}, height, width], got {tuple(x.shape)}")

"""What acts on the channels at each point alone, and functions of the coordinates.

Source: sheet of arXiv 2506.10973, recipe, rows "point-wise MLP" and "learned positional table":
these need no change, as they know nothing of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.nn.operators.checks import Sizes, check_numeric, positive, sizes

Activation = Callable[[Tensor], Tensor]

# Hidden values of so many bytes are computed again for gradients instead of kept: smaller ones cost
# more time than their memory is worth.
_LARGE = 4_000_000


class PointwiseLinear(nn.Module):
    """y(x) = W v(x) + b, a 1×1 convolution on a grid of any number of axes.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        bias: With b.
        generator: For the start, uniform in ±1/√C_in as in ``nn.Linear``.

    Attributes:
        weight: ``[C_out, C_in]``.
        bias: ``[C_out]`` or None.

    Raises:
        TypeError, ValueError: Channels that are not positive integers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = sizes(in_channels, 1, "in_channels")[0]
        self.out_channels = sizes(out_channels, 1, "out_channels")[0]
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, device=device, dtype=dtype)
        )
        shift = torch.empty(out_channels, device=device, dtype=dtype)
        self.bias = nn.Parameter(shift) if bias else None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew."""
        bound = 1 / math.sqrt(self.in_channels)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(
        self, x: Shaped[Tensor, "batch channels *grid"]
    ) -> Shaped[Tensor, "batch out *grid"]:
        """``[batch, C_out, *grid]``.

        Raises:
            ValueError: Wrong number of channels.
        """
        check_channels(x, self.in_channels)
        weight, flat = self.weight.expand(x.shape[0], -1, -1), x.flatten(2)
        if self.bias is None:
            y = torch.bmm(weight, flat)
        else:
            y = torch.baddbmm(self.bias[:, None], weight, flat)
        return y.unflatten(2, x.shape[2:])

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"{self.in_channels}, {self.out_channels}, bias={self.bias is not None}"


class PointwiseMLP(nn.Module):
    """The same multi-layer perceptron of the channels at every point.

    Args:
        widths: Channels in, hidden ones, channels out; two numbers are one linear map.
        activation: Between the layers.
        generator: For the start.

    Raises:
        TypeError, ValueError: Fewer than two widths, or not positive integers.
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: Activation = nn.functional.gelu,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.widths = sizes(widths, None, "widths")
        if len(self.widths) < 2:
            raise ValueError(f"widths must be at least (in, out), got {tuple(widths)}")
        self.activation = activation
        self.layers: Any = nn.ModuleList(
            PointwiseLinear(a, b, generator=generator, device=device, dtype=dtype)
            for a, b in pairwise(self.widths)
        )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew."""
        for layer in self.layers:
            layer.reset_parameters(generator)

    def forward(
        self, x: Shaped[Tensor, "batch channels *grid"]
    ) -> Shaped[Tensor, "batch out *grid"]:
        """``[batch, widths[-1], *grid]``.

        Raises:
            ValueError: Wrong number of channels.
        """
        check_channels(x, self.widths[0])
        flat = self.layers[0](x.flatten(2))
        # Autocast and tracing work on torch's own functions only.
        plain = autocast_on(x) or torch.compiler.is_compiling()
        fused = self.activation is nn.functional.gelu and not plain
        for layer in self.layers[1:]:
            if fused and flat.numel() * flat.element_size() >= _LARGE:
                flat = _GeluLinear.apply(flat, layer.weight, layer.bias)
            else:
                flat = layer(self.activation(flat))
        return flat.unflatten(2, x.shape[2:])

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"widths={self.widths}"


def check_channels(x: Tensor, channels: int) -> None:
    """Raise ``ValueError`` unless ``x`` is ``[batch, channels, *grid]``."""
    if x.ndim < 3 or x.shape[1] != channels:
        raise ValueError(f"x must be [batch, {channels}, *grid], got shape {tuple(x.shape)}")


def autocast_on(x: Tensor) -> bool:
    """Whether operations on the device of ``x`` choose their own precision."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


class _GeluLinear(torch.autograd.Function):
    """W gelu(v) + b that keeps v alone: gelu(v) is cheap to compute again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        hidden = nn.functional.gelu(v)
        return torch.baddbmm(bias[:, None], weight.expand(v.shape[0], -1, -1), hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        v, weight, _ = inputs
        ctx.save_for_backward(v, weight)
        ctx.save_for_forward(v, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (v, weight) = grads, ctx.saved_tensors
        for_weight = torch.bmm(grad, nn.functional.gelu(v).mT).sum(0)
        for_hidden = torch.bmm(weight.mT.expand(v.shape[0], -1, -1), grad)
        return torch.ops.aten.gelu_backward(for_hidden, v), for_weight, grad.sum((0, 2))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (dv, dw, db), (v, weight) = tangents, ctx.saved_tensors
        hidden = nn.functional.gelu(v)
        change = torch.zeros((), dtype=v.dtype, device=v.device)
        if dv is not None:
            change = change + weight @ torch.ops.aten.gelu_backward(dv, v)
        if dw is not None:
            change = change + dw @ hidden
        if db is not None:
            change = change + db[:, None]
        return change


class SinusoidalEmbedding(nn.Module):
    """γ(x): sines and cosines of each coordinate at geometrically falling frequencies.

    γ(x) = (sin(s x / M^(i/F)), cos(s x / M^(i/F)))_{i < F}, per coordinate.

    Args:
        frequencies: F, 32 in the authors' graph operators.
        longest: M, 10000 there.
        scale: s, 1 there; 2π makes the first pair periodic on [0, 1].

    Raises:
        TypeError, ValueError: F not a positive integer, M or s not positive.
    """

    def __init__(
        self,
        frequencies: int = 32,
        longest: float | int = 10_000.0,
        scale: float | int = 1.0,
    ) -> None:
        super().__init__()
        self.frequencies = sizes(frequencies, 1, "frequencies")[0]
        self.longest, self.scale = positive(longest, "longest"), positive(scale, "scale")

    def forward(self, points: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch features"]:
        """``[..., 2 F d]`` for coordinates ``[..., d]``, of their dtype."""
        steps = torch.arange(self.frequencies, device=points.device, dtype=points.dtype)
        rates = self.scale * self.longest ** (-steps / self.frequencies)
        angles = points[..., None] * rates
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-3)

    def features(self, ndim: int) -> int:
        """2 F d, the length of γ(x) for x with ``ndim`` coordinates."""
        return 2 * self.frequencies * ndim

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"frequencies={self.frequencies}, longest={self.longest}, scale={self.scale}"


def grid_coordinates(
    shape: Sizes,
    *,
    periodic: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "d first *rest"]:
    """Coordinates in [0, 1] of a grid, ``[d, *shape]``: j/N, or with both end points.

    Raises:
        TypeError, ValueError: A shape that is not of positive integers.
    """
    lines = []
    for n in sizes(shape, None, "shape"):
        steps = torch.arange(n, dtype=dtype or torch.get_default_dtype(), device=device)
        lines.append(steps / (n if periodic else max(n - 1, 1)))
    return torch.stack(torch.meshgrid(*lines, indexing="ij"))


def append_coordinates(
    x: Shaped[Tensor, "batch channels *grid"], *, periodic: bool = True
) -> Shaped[Tensor, "batch more *grid"]:
    """The field with its coordinates as further channels, ``[batch, channels + d, *grid]``.

    A function of the position in place of a table with one row per pixel.

    Raises:
        TypeError: Integers.
        ValueError: No grid axis.
    """
    check_numeric(x, "x")
    if x.ndim < 3:
        raise ValueError(f"x must be [batch, channels, *grid], got shape {tuple(x.shape)}")
    place = grid_coordinates(
        tuple(x.shape[2:]), periodic=periodic, dtype=x.real.dtype, device=x.device
    )
    return torch.cat((x, place.to(x.dtype).expand(x.shape[0], *place.shape)), dim=1)

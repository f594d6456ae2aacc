"""The networks of the card of neural operators: fields ``[batch, 1, *grid]`` to the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stiefel.nn.operators import IntegralAttention, SpectralConv

_CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d)


class PointwiseFrame(nn.Module):
    """Lift, residual layers that mix points, projection: what all networks have in common.

    The coordinates enter as sin 2πx and cos 2πx.
    """

    def __init__(
        self, layers: list[nn.Module], width: int, ndim: int = 1, projection: int = 48
    ) -> None:
        super().__init__()
        conv = _CONVS[ndim - 1]
        self.lift = conv(1 + 2 * ndim, width, 1)
        self.layers = nn.ModuleList(layers)
        self.skips = nn.ModuleList(conv(width, width, 1) for _ in layers)
        self.project = nn.Sequential(conv(width, projection, 1), nn.GELU(), conv(projection, 1, 1))

    def forward(self, u: Tensor, x: Tensor | None = None) -> Tensor:
        """``[batch, 1, *grid]`` to the same, at x ``[N]`` on one axis, or j / N on any."""
        v = self.lift(with_coordinates(u, x))
        for i, (layer, skip) in enumerate(zip(self.layers, self.skips, strict=True)):
            v = layer(v) + skip(v)
            if i + 1 < len(self.layers):
                v = F.gelu(v)
        return self.project(v)


def with_coordinates(u: Tensor, x: Tensor | None = None) -> Tensor:
    """u, sin 2πx and cos 2πx of every axis as channels."""
    lines = [x] if x is not None else [_uniform(n, u) for n in u.shape[2:]]
    parts = [u]
    for angle in torch.meshgrid(*(2 * math.pi * line for line in lines), indexing="ij"):
        parts += [angle.sin().expand_as(u), angle.cos().expand_as(u)]
    return torch.cat(parts, 1)


def _uniform(count: int, u: Tensor) -> Tensor:
    return torch.arange(count, dtype=u.dtype, device=u.device) / count


class SelfAttention(nn.Module):
    """Torch's attention over the points of ``[batch, channels, N]``."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, v: Tensor) -> Tensor:
        """The same shape."""
        tokens = v.mT
        return self.inner(tokens, tokens, tokens, need_weights=False)[0].mT


class LinearAttention(nn.Module):
    """Linear attention over the points; ``count`` makes its integral a sum of so many parts."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.inner = IntegralAttention(width, heads, "linear")
        self.count: int | None = None

    def forward(self, v: Tensor) -> Tensor:
        """``[batch, channels, N]`` to the same."""
        weights = None if self.count is None else v.new_full((v.shape[-1],), 1 / self.count)
        return self.inner(v, weights)


class UNet(nn.Module):
    """Four levels with nine taps, stride 2 down, transposed convolutions up."""

    def __init__(self, width: int = 16, multiples: tuple[int, ...] = (1, 2, 2, 3)) -> None:
        super().__init__()
        widths = [width * m for m in multiples]
        pairs = list(pairwise(widths))
        self.lift = nn.Conv1d(3, width, 1)
        self.left = nn.ModuleList(circular_conv(w, w) for w in widths)
        self.down = nn.ModuleList(circular_conv(a, b, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose1d(b, a, 4, 2, padding=1) for a, b in pairs)
        self.right = nn.ModuleList(circular_conv(2 * a, a) for a, _ in pairs)
        self.project = nn.Conv1d(width, 1, 1)

    def forward(self, u: Tensor) -> Tensor:
        """``[batch, 1, N]``, N a multiple of 8, to the same."""
        v = self.lift(with_coordinates(u))
        kept = []
        for i, layer in enumerate(self.left):
            v = F.gelu(layer(v))
            if i < len(self.down):
                kept.append(v)
                v = self.down[i](v)
        for i in reversed(range(len(kept))):
            v = torch.cat((self.up[i](v), kept[i]), 1)
            v = F.gelu(self.right[i](v))
        return self.project(v)


def build(kind: str, width: int, seed: int, ndim: int = 1, modes: int = 16) -> nn.Module:
    """``"fno"``, ``"cnn"``, ``"softmax"`` or ``"linear"``, four layers; ``"unet"``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "unet":
            return UNet()
        makers: dict[str, Callable[[], nn.Module]] = {
            "fno": lambda: SpectralConv(width, width, modes, ndim),
            "cnn": lambda: circular_conv(width, width, ndim=ndim),
            "softmax": lambda: SelfAttention(width),
            "linear": lambda: LinearAttention(width),
        }
        return PointwiseFrame([makers[kind]() for _ in range(4)], width, ndim)


def circular_conv(inner: int, outer: int, stride: int = 1, ndim: int = 1) -> nn.Module:
    """Nine taps per axis on the circle or torus."""
    return _CONVS[ndim - 1](inner, outer, 9, stride, padding=4, padding_mode="circular")

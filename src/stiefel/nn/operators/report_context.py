"""What the whole of a network tells about its parts: grid sizes, channels, what feeds what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from stiefel.nn.operators.checks import Sizes, sizes

# The package whose layers are operators already, and torch's own.
OPERATORS, TORCH = "stiefel.nn.operators.", "torch.nn.modules."
POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.LPPool1d, nn.LPPool2d, nn.LPPool3d,
)  # fmt: skip
ADAPTIVE = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What the whole network tells about its parts. ``base`` is None where it is not known."""

    base: tuple[int, ...] | None
    interpolation: str
    levels: frozenset[int]
    """How many points the grid has, at the base and below its strided layers."""
    tokens: frozenset[int]
    """How many points or patches a learned table may have one row for."""
    channels: frozenset[int]
    """Of convolutions, normalisations and attention."""
    features: frozenset[int]
    """Those, and what Linear layers put out."""
    fed: frozenset[str]
    """Linear layers with as many inputs as something before them has channels."""
    flattened: frozenset[str]
    """Linear layers that stand behind an ``nn.Flatten``."""


def grid_sizes(module: nn.Module, base_shape: Sizes) -> tuple[int, ...]:
    """``base_shape`` as a tuple, one size for each grid axis of the network.

    Raises:
        TypeError: not integers.
        ValueError: sizes below 1, or another number of axes than a convolution has.
    """
    found = {
        len(m.kernel_size): name
        for name, m in module.named_modules()
        if isinstance(m, _ConvNd) and not isinstance(m, nn.LazyConv1d | nn.LazyConv2d)
    }
    ndim = next(iter(found)) if found and isinstance(base_shape, int) else None
    base = sizes(base_shape, ndim, "base_shape")
    for count, name in found.items():
        if count != len(base):
            raise ValueError(
                f"base_shape {base} has {len(base)} axes, but {name or 'the module'!r} is a "
                f"convolution of {count}; give one size per grid axis"
            )
    return base


def context_of(module: nn.Module, base: tuple[int, ...] | None, interpolation: str) -> Context:
    """Reads it off the sub-modules, in the order of ``named_modules``."""
    channels: set[int] = set()
    levels, tokens = set(), set()
    now = base
    if base is not None:
        levels.add(math.prod(base))
        tokens.add(math.prod(base))
    flattened: list[str] = []
    features: set[int] = set()
    fed = set()
    for name, m in module.named_modules():
        if isinstance(m, _ConvNd):
            channels |= {m.in_channels, m.out_channels}
        elif isinstance(m, _BatchNorm | _InstanceNorm):
            channels.add(m.num_features)
        elif isinstance(m, nn.GroupNorm):
            channels.add(m.num_channels)
        elif isinstance(m, nn.MultiheadAttention):
            channels.add(m.embed_dim)
        elif isinstance(m, nn.Linear):
            if m.in_features in features | channels:
                fed.add(name)
            features.add(m.out_features)
        stride = _stride(m)
        if now is not None and stride is not None and len(stride) == len(now):
            now = tuple(max(1, n // s) for n, s in zip(now, stride, strict=True))
            levels.add(math.prod(now))
            if isinstance(m, _ConvNd) and tuple(m.kernel_size) == stride:  # patches
                tokens |= {math.prod(now), math.prod(now) + 1}
        if isinstance(m, nn.Sequential):
            flattened += _behind_flatten(name, m)
    return Context(
        base, interpolation, frozenset(levels), frozenset(tokens), frozenset(channels),
        frozenset(channels | features), frozenset(fed), frozenset(flattened),
    )  # fmt: skip


def _stride(module: nn.Module) -> tuple[int, ...] | None:
    """By how much a layer thins out the grid; None if it does not."""
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        found = tuple(int(s) for s in module.stride)
    elif isinstance(module, POOLS) and _base_ndim(module):
        stride: Any = module.stride if module.stride is not None else module.kernel_size
        found = (stride,) * _base_ndim(module) if isinstance(stride, int) else tuple(stride)
    else:
        return None
    return found if any(s > 1 for s in found) else None


def _base_ndim(module: nn.Module) -> int:
    """Grid axes of a torch layer, by the digit in its name."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith(TORCH) and kind.__name__[-2:-1].isdigit():
            return int(kind.__name__[-2])
    return 0


def _behind_flatten(name: str, module: nn.Sequential) -> list[str]:
    """The Linear layer that gets every point of every channel, if there is one."""
    flat = False
    for key, child in module.named_children():
        if is_global(child):
            return []
        if isinstance(child, nn.Flatten) and child.start_dim == 1 and child.end_dim == -1:
            flat = True
        elif flat and isinstance(child, nn.Linear):
            return [f"{name}.{key}" if name else key]
    return []


def is_global(module: nn.Module) -> bool:
    """Whether a layer pools the whole grid to one number."""
    if not isinstance(module, ADAPTIVE):
        return False
    size: Any = module.output_size
    return all(n == 1 for n in (size if isinstance(size, Sequence) else (size,)))

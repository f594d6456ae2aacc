"""Convolutions and layers that count points, as they act on any grid.

Each class is a torch layer with another forward: same attributes, same parameters, same keys in the
state dict. :func:`stiefel.nn.operators.convert` makes them; on the training grid they run torch's
own code.

Source: sheet of arXiv 2506.10973, recipe, "conv k×k" and "stride-2 / pooling / transposed conv".
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stiefel.nn.operators.convert_grid import Grid
from stiefel.nn.operators.taps import hat_taps, official_taps

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


class Converted:
    """What converted layers share; stands before a torch layer in the bases."""

    prefix = "Converted"
    """Of the names of classes made with this one."""
    _stiefel_grid: Grid
    _stiefel_name: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For ``pickle`` and ``copy``, which do not find classes made at run time by their name."""
        target, old = type(self).__bases__
        return _blank, (target, old), self.__dict__

    def extra_repr(self) -> str:
        """Torch's, and the grid of the training."""
        text = super().extra_repr()  # type: ignore[misc]  # of the torch layer
        return f"{text}{', ' if text else ''}base_shape={self._stiefel_grid.base_shape}"


class FixedField(Converted):
    """A convolution of stride 1 whose receptive field is a length instead of a number of points.

    The kernel is a sum of hats, see :func:`hat_taps`. On a grid that is r times as fine, r whole,
    its taps are those of W, r points apart, after a hat of width r: two running means. So the cost
    per point is that of the original, not r times as much. Other ratios convolve with the taps.
    """

    prefix = "FixedField"
    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    groups: int
    training: bool
    _taps: tuple[Any, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """``[batch, C, *grid]`` or without batch, to the same grid."""
        grid = self._stiefel_grid
        grid.check_uniform(self._stiefel_name)
        if grid.here.is_base:
            return super().forward(input)  # type: ignore[misc]
        ratio, ndim = grid.here.ratio, len(self.kernel_size)
        smooth = [1] * ndim
        if grid.interpolation == "hat":
            smooth = [int(r) if r.denominator == 1 else 1 for r in ratio]
        rest = tuple(r if s == 1 else Fraction(1) for r, s in zip(ratio, smooth, strict=True))
        if all(r == 1 for r in rest):
            taps, dilation = self.weight, self.dilation
        else:
            taps, dilation = self._rescaled(rest, grid.interpolation), (1,) * ndim
        dilation = tuple(d * s for d, s in zip(dilation, smooth, strict=True))
        reach = [d * (k - 1) for d, k in zip(dilation, taps.shape[2:], strict=True)]
        ends = [(n // 2 + s - 1, n - n // 2 + s - 1) for n, s in zip(reach, smooth, strict=True)]
        x = extend(input, ends, self.padding_mode)
        if any(s > 1 for s in smooth):
            for _ in range(2):  # a mean of a mean is a hat
                x = _AVERAGE[ndim - 1](x, tuple(smooth), stride=1)
        return _CONVOLVE[ndim - 1](x, taps, self.bias, dilation=dilation, groups=self.groups)

    def _rescaled(self, ratio: tuple[Fraction, ...], interpolation: str) -> Tensor:
        """Taps on the current grid. Kept between calls in eval mode, while the weight stays."""
        weight = self.weight
        if torch.compiler.is_compiling():
            return self._taps_on(weight, ratio, interpolation)
        # A graph through kept taps could be walked back once only.
        graph = torch.is_grad_enabled() and weight.requires_grad
        if self.training or graph or weight.is_inference():
            self._taps = None
            return self._taps_on(weight, ratio, interpolation)
        key = (ratio, weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._taps is None or self._taps[0] != key:
            self._taps = (key, self._taps_on(weight, ratio, interpolation))
        return self._taps[1]

    def _taps_on(self, weight: Tensor, ratio: tuple[Fraction, ...], interpolation: str) -> Tensor:
        rule = hat_taps if interpolation == "hat" else official_taps
        return rule(spread(weight, self.dilation), [float(r) for r in ratio])

    def train(self, mode: bool = True) -> Any:
        """As torch's; forgets taps, since writing to ``weight.data`` leaves no trace."""
        self._taps = None
        return super().train(mode)  # type: ignore[misc]


class CountsPoints(Converted):
    """A layer that steps over indices: runs at the base grid of its level, then is resampled back.

    For strides, pooling, transposed convolutions: their offsets and phases are those of the
    training, whatever the grid. What the level's base grid cannot hold is lost here.
    """

    prefix = "CountsPoints"

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[batch, C, *grid]`` or without batch, to the grid of the next level."""
        grid = self._stiefel_grid
        grid.check_uniform(self._stiefel_name)
        if grid.here.is_base:
            return super().forward(input, *args, **kwargs)  # type: ignore[misc]
        name, ndim = self._stiefel_name, len(grid.base_shape)
        x = input if input.ndim == ndim + 2 else input[None]
        size = kwargs.get("output_size", args[0] if args else None)
        if size is not None:  # of a transposed convolution
            sizes = tuple(int(n) for n in size)[-ndim:]
            args, kwargs = (), {"output_size": list(grid.scale(sizes, name, up=False))}
        y = super().forward(grid.to_base(x, name), *args, **kwargs)  # type: ignore[misc]
        y = grid.from_base(y, name)
        return y if input.ndim == ndim + 2 else y[0]


@cache
def class_of(target: type[Converted], old: type) -> type:
    """A subclass of ``old`` with the forward of ``target``.

    Made of the layer's own class, it keeps what users and parametrisations put there.
    """
    return type(target.prefix + old.__name__, (target, old), {"__module__": __name__})


def _blank(target: type[Converted], old: type) -> Any:
    return object.__new__(class_of(target, old))


def spread(weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """The kernel ``[M, C, *k]`` with the zeros between its taps that ``dilation`` stands for."""
    if all(d == 1 for d in dilation):
        return weight
    sizes = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    whole = weight.new_zeros((*weight.shape[:2], *sizes))
    whole[(..., *(slice(None, None, d) for d in dilation))] = weight
    return whole


def extend(x: Tensor, ends: Sequence[tuple[int, int]], mode: str) -> Tensor:
    """``x`` ``[…, *grid]`` continued beyond its border, by so many points before and after.

    Args:
        x: At least as many axes as ``ends``.
        ends: One pair for each of the last axes.
        mode: ``zeros``, ``circular``, ``reflect`` or ``replicate``, as of a convolution.
    """
    flat = [n for pair in reversed(ends) for n in pair]
    if mode == "zeros":
        return F.pad(x, flat)
    room = min(x.shape[-len(ends) :]) - (mode == "reflect")
    if max(flat) <= room and x.ndim - len(ends) in (1, 2):
        return F.pad(x, flat, mode=mode)
    # Further than torch goes: several times around, or beyond a field of few points.
    for axis, (before, after) in enumerate(ends, start=x.ndim - len(ends)):
        if not (before or after):
            continue
        size = x.shape[axis]
        at = torch.arange(-before, size + after, device=x.device)
        if mode == "circular":
            at = at % size
        elif mode == "replicate":
            at = at.clamp(0, size - 1)
        else:
            period = max(2 * (size - 1), 1)
            at = at % period
            at = torch.where(at < size, at, period - at)
        x = x.index_select(axis, at)
    return x

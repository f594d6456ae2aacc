"""Convolution by Fourier multipliers: the same function of the frequency on every grid.

Source: sheet of arXiv 2506.10973, "Spectral conv"; Li et al., arXiv 2010.08895.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from stiefel.linalg._checks import HALF_TYPES
from stiefel.linalg.autocast import without_autocast
from stiefel.nn.operators.checks import (
    Sizes,
    check_field,
    check_uniform_coordinates,
    sizes,
    working,
)
from stiefel.nn.operators.spectral_transform import Modes, analyze, refit, synthesize


class SpectralConv(nn.Module):
    """ŷ_k = R_k v̂_k for the lowest frequencies, 0 above: a periodic global convolution.

    The Fourier coefficients v̂_k are those of the function (sum over points divided by their
    number), so that the weights mean the same on every grid j/N. Frequencies that a grid cannot
    hold are left out there.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        n_modes: Kept frequencies per axis, both signs counted: −⌊m/2⌋ … m − ⌊m/2⌋ − 1; 0 … ⌊m/2⌋
            in the last axis of real fields. One number with ``ndim``, or one per axis.
        ndim: Grid axes, 1 to 3; default: as many as ``n_modes`` has numbers.
        bias: Adds a constant to each channel.
        complex_data: For complex fields: every axis keeps both signs.
        generator: For the start: complex normal with standard deviation √(2/(C_in + C_out)).
        dtype: Real type of the fields; half types keep their weights in complex64.

    Attributes:
        weight: R, complex ``[C_in, C_out, m₁, …, m_d]``, m_d = ⌊n_modes[-1] / 2⌋ + 1 for real
            fields. In memory the frequencies come first: one small matrix for each.

    Raises:
        TypeError, ValueError: Numbers that are not positive integers, or do not agree with ndim.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_modes: Sizes,
        ndim: int | None = None,
        *,
        bias: bool = False,
        complex_data: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = sizes(in_channels, 1, "in_channels")[0]
        self.out_channels = sizes(out_channels, 1, "out_channels")[0]
        self.n_modes = sizes(n_modes, ndim, "n_modes")
        self.ndim = len(self.n_modes)
        self.complex_data = complex_data
        counts = self.n_modes if complex_data else (*self.n_modes[:-1], self.n_modes[-1] // 2 + 1)
        real = dtype or torch.get_default_dtype()
        pairs = (torch.float32 if real in HALF_TYPES else real).to_complex()
        by_mode = torch.empty(*counts, in_channels, out_channels, dtype=pairs, device=device)
        self.weight = nn.Parameter(by_mode.permute(-2, -1, *range(self.ndim)))
        shift = torch.empty(out_channels, dtype=pairs if complex_data else real, device=device)
        self.bias = nn.Parameter(shift) if bias else None
        self._warned = False
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew; the bias starts at 0."""
        std = math.sqrt(2 / (self.in_channels + self.out_channels))
        with torch.no_grad():
            self.weight.normal_(0, std, generator=generator)
            if self.bias is not None:
                self.bias.zero_()

    def forward(
        self,
        x: Shaped[Tensor, "batch channels *grid"],
        output_shape: Sizes | None = None,
        *,
        coordinates: Tensor | None = None,
    ) -> Shaped[Tensor, "batch out *other"]:
        """The convolution, on the grid of x or on one of ``output_shape``.

        Args:
            x: ``[batch, C_in, *grid]`` on the points j/N of a periodic domain. Half types are
                computed in float32, also under autocast.
            output_shape: Points per axis of the result.
            coordinates: ``[*grid, d]``, or ``[N]`` in one dimension, to have them checked.

        Returns:
            ``[batch, C_out, *output_shape]`` of the dtype of x.

        Raises:
            TypeError: Integers, or complex where the layer is real, or the other way round.
            ValueError: Wrong number of axes or channels, NaN or infinities, coordinates that are
                not equally spaced.
        """
        check_field(x, self.in_channels, self.ndim)
        if x.is_complex() != self.complex_data:
            raise TypeError(
                f"x is {x.dtype} but the layer has complex_data={self.complex_data}; build it with "
                f"complex_data={x.is_complex()}"
            )
        if coordinates is not None:
            check_uniform_coordinates(coordinates, tuple(x.shape[2:]))
        shape = (
            x.shape[2:] if output_shape is None else sizes(output_shape, self.ndim, "output_shape")
        )
        return self.flat(x, output_shape).unflatten(2, shape)

    def flat(
        self, x: Shaped[Tensor, "batch channels *grid"], output_shape: Sizes | None = None
    ) -> Shaped[Tensor, "batch out points"]:
        """As the layer, unchecked, with the points in one axis: ``[batch, C_out, N]``."""
        with without_autocast(x):
            series, modes = self._multiplied(working(x))
            if output_shape is not None:
                target = sizes(output_shape, self.ndim, "output_shape")
                series, modes = refit(series, modes, target)
            return synthesize(series, modes).to(x.dtype)

    def _multiplied(self, x: Tensor) -> tuple[Tensor, Modes]:
        """Coefficients of the result, ``[batch, C_out, *modes]``."""
        grid = tuple(x.shape[2:])
        weight = self._kept(grid)
        modes = Modes(tuple(weight.shape[2:]), grid, not self.complex_data)
        axes = range(2, 2 + self.ndim)
        series = analyze(x, modes)
        # One matrix product per frequency: [modes, batch, C_in] @ [modes, C_in, C_out].
        by_mode = series.permute(*axes, 0, 1).flatten(0, -3)
        weight = weight.permute(*axes, 0, 1).flatten(0, -3).to(series.dtype)
        mixed = torch.bmm(by_mode, weight).unflatten(0, modes.counts)
        if self.bias is not None:
            # A constant is the coefficient of frequency 0: no pass over the grid.
            both = modes.counts if self.complex_data else modes.counts[:-1]
            mixed[(*(n // 2 for n in both), *(() if self.complex_data else (0,)))] += self.bias
        return mixed.permute(-2, -1, *range(self.ndim)), modes

    def _kept(self, grid: tuple[int, ...]) -> Tensor:
        """The weights of the frequencies that the grid can hold: the middle of every axis."""
        weight = self.weight
        for axis, n in enumerate(grid):
            have = weight.shape[2 + axis]
            one_sided = not self.complex_data and axis == self.ndim - 1
            keep = min(have, n // 2 + 1 if one_sided else n)
            if keep < have:
                start = 0 if one_sided else have // 2 - keep // 2
                weight = weight.narrow(2 + axis, start, keep)
        if weight is not self.weight and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warnings.warn(
                f"n_modes={self.n_modes} is more than a grid of {grid} points holds: the highest "
                "frequencies have no part there",
                stacklevel=4,
            )
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralConv:
        # .double() and .float() of torch pass complex parameters by; .to(torch.float64) would drop
        # their imaginary parts. Both reach them as pairs of real numbers.
        super()._apply(lambda t: _apply_to_pairs(fn, t) if t.is_complex() else fn(t), recurse)
        return self

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return (
            f"{self.in_channels}, {self.out_channels}, n_modes={self.n_modes}, "
            f"bias={self.bias is not None}, complex_data={self.complex_data}"
        )


def _apply_to_pairs(fn: Callable[[Tensor], Tensor], t: Tensor) -> Any:
    pairs = fn(torch.view_as_real(t))
    if pairs.is_complex():  # .to(torch.complex128)
        return fn(t)
    return torch.view_as_complex(working(pairs))

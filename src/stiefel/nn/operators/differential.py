"""Convolution that converges to a derivative as the grid is refined.

Source: sheet of arXiv 2506.10973, "Differential conv"; Liu-Schiaffini et al., arXiv 2402.16845.
"""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from stiefel.nn.operators.checks import Sizes, check_field, chosen, grouped, sizes
from stiefel.nn.operators.converted_layers import extend
from stiefel.nn.operators.local_integral import (
    PADDING_MODES,
    Lengths,
    lengths,
    spacings,
    start_convolution,
)

_CONVOLVE = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)


class DifferentialConv(nn.Module):
    """y = (conv(v, W) − (Σ W) v) / h_rel: constants give 0, and refining gives h₀ Σ_m m W_m ∂v.

    It amplifies what is at the scale of the grid: one of these in a network is enough.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: k, odd; one number or one per axis.
        base_shape: Points per axis of the training grid, where h_rel = 1.
        base_spacing: In place of ``base_shape``: h₀ itself.
        ndim: Grid axes, 1 to 3; default: as many as ``kernel_size`` has numbers.
        domain: Length of the box per axis: spacings are ``domain`` / N.
        padding_mode: ``circular``, ``replicate``, ``reflect``; ``zeros`` is a jump at the border.
        groups: As of a convolution.
        generator: For the start, that of ``nn.Conv``.

    Raises:
        TypeError, ValueError: Neither or both of base_shape and base_spacing, even k, other
            settings out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes = 3,
        base_shape: Sizes | None = None,
        base_spacing: Lengths | None = None,
        ndim: int | None = None,
        *,
        domain: Lengths = 1.0,
        padding_mode: str = "circular",
        groups: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = sizes(kernel_size, ndim, "kernel_size")
        self.ndim = len(self.kernel_size)
        if self.ndim > 3:
            raise ValueError(f"ndim must be 1, 2 or 3, got {self.ndim}")
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(
                f"kernel_size must be odd, got {kernel_size!r}: an even kernel has no centre tap"
            )
        self.domain = lengths(domain, self.ndim, "domain")
        if base_shape is not None and base_spacing is None:
            base = sizes(base_shape, self.ndim, "base_shape")
            self.base_spacing = tuple(a / n for a, n in zip(self.domain, base, strict=True))
        elif base_spacing is not None and base_shape is None:
            self.base_spacing = lengths(base_spacing, self.ndim, "base_spacing")
        else:
            raise ValueError("give either base_shape or base_spacing: the grid where h_rel is 1")
        self.padding_mode = chosen(padding_mode, PADDING_MODES, "padding_mode")
        self.in_channels, self.out_channels, self.groups = grouped(
            in_channels, out_channels, groups
        )
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew."""
        start_convolution(self.weight, None, generator)

    def forward(
        self, x: Shaped[Tensor, "batch channels *grid"], spacing: Lengths | None = None
    ) -> Shaped[Tensor, "batch out *grid"]:
        """``[batch, C_out, *grid]``.

        Args:
            x: ``[batch, C_in, *grid]``.
            spacing: h per axis; default ``domain`` / N.

        Raises:
            TypeError, ValueError: Wrong number of axes or channels, NaN, spacing not positive, or
                refined more in one axis than in another: no single h_rel is right then.
        """
        check_field(x, self.in_channels, self.ndim)
        here = spacings(x, self.domain, spacing)
        relative = [h / base for h, base in zip(here, self.base_spacing, strict=True)]
        if max(relative) > min(relative) * (1 + 1e-6):
            raise ValueError(
                f"the grid {tuple(x.shape[2:])} is h/h₀ = {[round(r, 6) for r in relative]} along "
                "its axes, which must be equal: resample it first"
            )
        # Σ W belongs to the centre tap: one convolution, and constants cancel in the weights.
        centre = [torch.zeros(k, dtype=self.weight.dtype) for k in self.kernel_size]
        spike = centre[0].new_ones(())
        for line, k in zip(centre, self.kernel_size, strict=True):
            line[k // 2] = 1
            spike = spike[..., None] * line
        axes = tuple(range(2, 2 + self.ndim))
        total = self.weight.sum(axes, keepdim=True)
        taps = (self.weight - total * spike.to(self.weight.device)) / relative[0]
        ends = [(k // 2, k // 2) for k in self.kernel_size]
        x = extend(x, ends, self.padding_mode)
        return _CONVOLVE[self.ndim - 1](x, taps, groups=self.groups)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"base_spacing={self.base_spacing}, domain={self.domain}, "
            f"padding_mode={self.padding_mode!r}"
        )

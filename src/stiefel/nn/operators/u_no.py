"""U-NO: a U-Net of functions, whose levels are resampled instead of strided.

Source: sheet of arXiv 2506.10973, recipe, "stride-2 / pooling / transposed conv"; Rahman et al.,
arXiv 2204.11127.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from stiefel.nn.operators.checks import Sizes, check_field, positive, sizes
from stiefel.nn.operators.fno import FNOBlock
from stiefel.nn.operators.point_wise import Activation, PointwiseMLP, append_coordinates
from stiefel.nn.operators.resample import resample


class UNO(nn.Module):
    """Fourier blocks on coarser and coarser grids and back, with skips between equal levels.

    A level has 1/2 of the points per axis of the one above, by dropping frequencies: which grid
    that is follows from the grid of the input, and every number of points is allowed.

    Args:
        n_modes: Kept frequencies of the first level, per axis; halved from level to level.
        in_channels: Of the input function.
        out_channels: Of the output function.
        hidden_channels: Width of the first level; doubled from level to level.
        levels: Number of levels, at least 1.
        ndim: Grid axes; default: as many as ``n_modes`` has numbers.
        growth: Factor on the width from level to level.
        activation: Everywhere.
        generator: For the start.

    Raises:
        TypeError, ValueError: Numbers out of range; the message says what is allowed.
    """

    def __init__(
        self,
        n_modes: Sizes,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        levels: int = 3,
        *,
        ndim: int | None = None,
        growth: float | int = 2,
        activation: Activation = nn.functional.gelu,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_modes = sizes(n_modes, ndim, "n_modes")
        self.ndim, self.levels = len(self.n_modes), sizes(levels, 1, "levels")[0]
        self.in_channels = sizes(in_channels, 1, "in_channels")[0]
        width = sizes(hidden_channels, 1, "hidden_channels")[0]
        place: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        factor = positive(growth, "growth")
        widths = [max(1, round(width * factor**i)) for i in range(self.levels)]
        modes = [tuple(max(2, m // 2**i) for m in self.n_modes) for i in range(self.levels)]
        options: dict[str, Any] = {"channel_mlp_expansion": None, "activation": activation, **place}
        inputs = in_channels + self.ndim
        self.lifting = PointwiseMLP((inputs, 2 * width, width), activation, **place)
        self.down: Any = nn.ModuleList(
            FNOBlock(widths[max(i - 1, 0)], widths[i], modes[i], **options)
            for i in range(self.levels)
        )
        self.up: Any = nn.ModuleList(
            FNOBlock(widths[i + 1] + widths[i], widths[i], modes[i], **options)
            for i in reversed(range(self.levels - 1))
        )
        self.projection = PointwiseMLP((width, 2 * width, out_channels), activation, **place)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew."""
        for part in (self.lifting, *self.down, *self.up, self.projection):
            part.reset_parameters(generator)

    def forward(
        self, x: Shaped[Tensor, "batch channels *grid"]
    ) -> Shaped[Tensor, "batch out *grid"]:
        """``[batch, out_channels, *grid]`` for x ``[batch, in_channels, *grid]`` on any grid j/N.

        Raises:
            TypeError, ValueError: as :class:`SpectralConv`.
        """
        check_field(x, self.in_channels, self.ndim)
        grid = tuple(x.shape[2:])
        grids = [tuple(-(-n // 2**i) for n in grid) for i in range(self.levels)]
        x = self.lifting(append_coordinates(x))
        skips = []
        for block, shape in zip(self.down, grids, strict=True):
            x = block(resample(x, shape))
            skips.append(x)
        for block, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = block(torch.cat((resample(x, tuple(skip.shape[2:])), skip), dim=1))
        return self.projection(x)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"n_modes={self.n_modes}, levels={self.levels}"

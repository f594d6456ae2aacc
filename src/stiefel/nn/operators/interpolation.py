"""The baseline: any network behind a change of grid, on both sides.

Source: sheet of arXiv 2506.10973, "Input–output interpolation wrapper".
"""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor, nn

from stiefel.nn.operators.checks import Sizes, chosen, sizes
from stiefel.nn.operators.resample import MODES, resample


class InputOutputInterpolation(nn.Module):
    """Runs ``net`` on its own grid: input resampled to ``base_shape``, output back.

    Its error hardly depends on the grid, but it is blind to everything above the Nyquist frequency
    of the base grid.

    Args:
        net: Maps ``[batch, channels, *base_shape]`` to ``[batch, out, *any_grid]``.
        base_shape: The grid that ``net`` was trained on.
        mode: ``"fourier"`` or ``"linear"``, see :func:`resample`.
        periodic: As in :func:`resample`.

    Raises:
        TypeError, ValueError: base_shape missing or not positive integers, unknown mode.
    """

    def __init__(
        self,
        net: nn.Module,
        base_shape: Sizes | None,
        mode: str = "fourier",
        *,
        periodic: bool = True,
    ) -> None:
        super().__init__()
        if base_shape is None:
            raise ValueError("base_shape is missing: the grid that net was trained on, such as 64")
        self.net = net
        self.base_shape = sizes(base_shape, None, "base_shape")
        self.mode, self.periodic = chosen(mode, MODES, "mode"), periodic

    def forward(
        self, x: Shaped[Tensor, "batch channels *grid"]
    ) -> Shaped[Tensor, "batch out *grid"]:
        """``[batch, out, *grid]`` for x on any grid.

        Raises:
            TypeError, ValueError: as :func:`resample`; another number of grid axes.
        """
        if x.ndim - 2 != len(self.base_shape):
            raise ValueError(
                f"x must have the {len(self.base_shape)} grid axes of base_shape "
                f"{self.base_shape}, got shape {tuple(x.shape)}"
            )
        y = self.net(resample(x, self.base_shape, self.mode, periodic=self.periodic))
        return resample(y, tuple(x.shape[2:]), self.mode, periodic=self.periodic)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"base_shape={self.base_shape}, mode={self.mode!r}, periodic={self.periodic}"

"""A non-linearity whose new frequencies do not fold back onto the grid.

Source: sheet of arXiv 2506.10973, "Traps": activations are what is left of the grid in every
neural operator.
"""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor, nn

from stiefel.nn.operators.checks import sizes
from stiefel.nn.operators.point_wise import Activation
from stiefel.nn.operators.resample import resample


class FilteredActivation(nn.Module):
    """Activation on a grid that is ``up`` times finer, then back, without the new frequencies.

    A point-wise function of a band-limited field has higher frequencies; on the grid of the field
    they appear as wrong low ones. In d dimensions it costs up^d times the activation and two
    Fourier transforms; the field is taken to be periodic.

    Args:
        up: Points of the finer grid per point, in every axis; 1 is the plain activation.
        activation: Point-wise, such as ``torch.nn.functional.gelu``.

    Raises:
        TypeError, ValueError: ``up`` is not a positive integer.
    """

    def __init__(self, up: int = 2, activation: Activation = nn.functional.gelu) -> None:
        super().__init__()
        self.up, self.activation = sizes(up, 1, "up")[0], activation

    def forward(
        self, x: Shaped[Tensor, "batch channels *grid"]
    ) -> Shaped[Tensor, "batch channels *grid"]:
        """The same shape and dtype as x."""
        grid = tuple(x.shape[2:])
        return resample(self.activation(resample(x, [self.up * n for n in grid])), grid)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"up={self.up}"

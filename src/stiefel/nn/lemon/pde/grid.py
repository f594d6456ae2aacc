"""The periodic grid: points, Fourier modes of the 2/3 rule, derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LENGTH = 2.0
"""Period: x in [0, 2)."""
DURATION = 2.0
"""Every trajectory is relabelled to t in [0, 2)."""


class Grid:
    """N equidistant points of a period and the Fourier modes below N/3.

    Products of two fields are exact in those modes (2/3 rule).

    Args:
        points: N, at least 8.
        start: The first point.
        device: Where the tensors live.

    Raises:
        ValueError: fewer than 8 points.
    """

    def __init__(
        self,
        points: int,
        start: float | int = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        if points < 8:
            raise ValueError(f"a grid needs at least 8 points, got {points}")
        self.points = points
        self.modes = (points - 1) // 3 + 1
        steps = torch.arange(points, dtype=torch.float64, device=device)
        self.x = start + steps * (LENGTH / points)
        """Points, ``[N]``, float64."""
        self.k = steps[: self.modes] * (2 * math.pi / LENGTH)
        """Wave numbers, ``[modes]``."""
        self.ik = 1j * self.k

    def spectrum(self, field: Tensor) -> Tensor:
        """Fourier coefficients below N/3 of real fields ``[..., N]``."""
        return torch.fft.rfft(field)[..., : self.modes]

    def field(self, spectrum: Tensor) -> Tensor:
        """Real fields ``[..., N]`` of coefficients ``[..., modes]``."""
        return torch.fft.irfft(spectrum, n=self.points)

    def derivative(self, field: Tensor, order: int = 1) -> Tensor:
        """∂ₓ^order of real fields, of their modes below N/3."""
        return self.field(self.ik**order * self.spectrum(field))


def centres(count: int, device: torch.device | str | None = None) -> Tensor:
    """Centres of ``count`` cells of [0, 2): (i + ½)·2/count, float64."""
    return (torch.arange(count, dtype=torch.float64, device=device) + 0.5) * (LENGTH / count)


def all_modes(field: Tensor) -> tuple[Tensor, Tensor]:
    """Every Fourier coefficient of real fields ``[..., N]`` and the wave numbers."""
    points = field.shape[-1]
    k = torch.arange(points // 2 + 1, dtype=torch.float64, device=field.device)
    return torch.fft.rfft(field), k * (2 * math.pi / LENGTH)

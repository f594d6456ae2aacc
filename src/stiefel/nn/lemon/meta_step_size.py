"""LeMONS: one learned step size for each equation, read from its symbols."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from stiefel.nn.lemon.checks import check_count, check_number
from stiefel.nn.s4d import seeded_linear


class SymbolicStepSize(nn.Module):
    """scale · sigmoid(mean over tokens of an MLP of the symbol encoding).

    Args:
        dim: width of the symbol encoder.
        hidden: width of the two hidden layers.
        scale: the largest step size.
        generator: for the start of the weights.
    """

    def __init__(
        self,
        dim: int = 512,
        hidden: int = 128,
        scale: float | int = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("hidden", hidden)
        check_number("scale", scale)
        self.scale = float(scale)
        self.net = nn.Sequential(
            seeded_linear(dim, hidden, generator),
            nn.ReLU(),
            seeded_linear(hidden, hidden, generator),
            nn.ReLU(),
            seeded_linear(hidden, 1, generator),
        )

    def forward(
        self,
        encoding: Float[Tensor, "batch length dim"],
        padding: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, " batch"]:
        """Step sizes ``[batch]`` of equations as ``PROSE.encode_symbols`` gives them."""
        value = self.net(encoding)[..., 0].masked_fill(padding, 0.0)
        return self.scale * torch.sigmoid(value.sum(1) / (~padding).sum(1))

"""S5 with what a deep model puts around it.

Source: Smith et al., arXiv 2208.04933; the gate is "half_glu1" of the authors' code.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.nn.s4d import check_finite_input, length_mask, seeded_linear
from stiefel.nn.s5 import S5


class S5Block(nn.Module):
    """Norm, :class:`S5`, GELU, gate, dropout, and a connection around them.

        z = dropout(gelu(S5(norm(u)))),   y = u + dropout(z · σ(W z))

    Args:
        d_model, d_state: as :class:`S5`.
        dropout: in [0, 1).
        prenorm: normalise what goes into the layer; otherwise the sum that comes out.
        **layer: further settings of :class:`S5`.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dropout: float | int = 0.0,
        prenorm: bool = True,
        **layer: Any,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.prenorm = prenorm
        self.layer = S5(d_model, d_state, **layer)
        place = {"device": layer.get("device"), "dtype": layer.get("dtype")}
        self.norm = nn.LayerNorm(d_model, **place)
        self.gate = seeded_linear(d_model, d_model, layer.get("generator"), **place)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, u: Shaped[Tensor, "batch length H"], state: Tensor | None = None, **options: Any
    ) -> tuple[Float[Tensor, "batch length H"], Tensor | None]:
        """Arguments, result and errors as of :meth:`S5.forward`."""
        # Norms turn Inf into NaN and hide which it was; and beyond `lengths` anything may stand.
        inside = None
        if options.get("lengths") is not None:
            inside = length_mask(options["lengths"], u.shape[0], u.shape[1])[..., None]
            u = torch.where(inside, u, 0.0)
        check_finite_input(u)
        y, state = self.layer(self.norm(u) if self.prenorm else u, state, **options)
        y = self._gated(u, y)
        return (y if inside is None else torch.where(inside, y, 0.0)), state

    def step(
        self, u: Shaped[Tensor, "batch H"], state: Tensor | None = None, rate: float | int = 1.0
    ) -> tuple[Float[Tensor, "batch H"], Tensor]:
        """One sample, as :meth:`S5.step`."""
        check_finite_input(u)
        y, state = self.layer.step(self.norm(u) if self.prenorm else u, state, rate)
        return self._gated(u, y), state

    def _gated(self, u: Tensor, y: Tensor) -> Tensor:
        z = self.dropout(nn.functional.gelu(y))
        y = u + self.dropout(z * torch.sigmoid(self.gate(z)))
        return y if self.prenorm else self.norm(y)

"""A denoiser for small images: a perceptron that attends to the neighbours in every block."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from stiefel.generate._checks import whole
from stiefel.generate.attention import (
    TIME_WIDTH,
    Condition,
    ConditionedNetwork,
    CrossAttention,
    modulate,
)


class _Block(nn.Module):
    """Cross-attention, then a modulated two-layer perceptron; both residual, both after a norm."""

    def __init__(self, width: int, context_width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = CrossAttention(width, context_width, inner, heads)
        self.before_layers = nn.LayerNorm(width)
        self.film = nn.Linear(TIME_WIDTH, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)


class RetrievalDenoiser(ConditionedNetwork):
    """For flat images ``[B, D]`` of up to some hundred pixels, and contexts ``[B, k, e]``.

    With D = 64 and e = 24 the sheet's sizes (width, blocks, inner) are (96, 3, 48): 201,720
    parameters, (48, 2, 32): 51,432, (32, 2, 32): 32,632. A width below D cannot pass noise through
    and so predicts it badly: predict x0 then, or use :class:`RetrievalUNet`.

    Source: arXiv 2204.11824, cross-attention to φ(neighbours) as in its denoiser; the perceptron
    around it is ours.
    """

    def __init__(
        self,
        features: int,
        context_width: int,
        *,
        width: int = 96,
        blocks: int = 3,
        inner: int = 48,
        heads: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw the weights.

        Args:
            features: D, pixels of an image.
            context_width: e.
            width: Of the residual stream.
            blocks: Their number.
            inner: Width of the attention, a multiple of ``heads``.
            heads: Of the attention.
            generator: Of the weights.

        Raises:
            TypeError: sizes that are no whole numbers.
            ValueError: sizes < 1, or ``inner`` no multiple of ``heads``.
        """
        super().__init__(context_width)
        self.features = whole(features, "features")
        self.settings = {
            "kind": "mlp", "features": features, "context_width": context_width,
            "width": width, "blocks": blocks, "inner": inner, "heads": heads,
        }  # fmt: skip
        self.input_shape = (features,)
        whole(width, "width")
        whole(inner, "inner")
        self.enter = nn.Linear(features, width)
        parts = [
            _Block(width, context_width, inner, whole(heads, "heads"))
            for _ in range(whole(blocks, "blocks"))
        ]
        self.blocks = nn.ModuleList(parts)
        self.last = nn.LayerNorm(width)
        self.leave = nn.Linear(width, features)
        self.reset(generator, (*(b.down for b in parts), self.leave))

    @property
    def _parts(self) -> list[_Block]:
        return cast("list[_Block]", list(self.blocks))

    @property
    def attentions(self) -> list[CrossAttention]:
        """The attention of each block."""
        return [b.attention for b in self._parts]

    @property
    def films(self) -> list[nn.Linear]:
        """The modulation of each block."""
        return [b.film for b in self._parts]

    def run(self, x: Tensor, modulations: tuple[Tensor, ...], condition: Condition) -> Tensor:
        """The prediction ``[B, D]``; see :class:`ConditionedNetwork`."""
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"x must be [B, {self.features}], got shape {tuple(x.shape)}")
        h = self.enter(x)
        for place, (block, modulation) in enumerate(zip(self._parts, modulations, strict=True)):
            seen = block.before_attention(h)[:, None]
            h = h + block.attention.attend(seen, condition, place)[:, 0]
            inside = block.up(modulate(block.before_layers(h), modulation))
            h = h + block.down(nn.functional.silu(inside))
        return self.leave(self.last(h))

"""A denoiser for photographs of some 16 to 64 pixels a side: a small convolutional U-Net."""

from __future__ import annotations

from collections.abc import Sequence
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

# Channels that a group norm averages over, at most.
GROUP_CHANNELS = 8


def _norm(channels: int) -> nn.GroupNorm:
    groups = max(1, channels // GROUP_CHANNELS)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


class _Block(nn.Module):
    """Two modulated convolutions and the attention to the neighbours, all residual."""

    def __init__(self, come: int, go: int, context_width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.norm_in = _norm(come)
        self.conv_in = nn.Conv2d(come, go, 3, padding=1)
        self.film = nn.Linear(TIME_WIDTH, 2 * go)
        self.norm_out = _norm(go)
        self.conv_out = nn.Conv2d(go, go, 3, padding=1)
        self.skip = nn.Conv2d(come, go, 1) if come != go else nn.Identity()
        self.before_attention = nn.LayerNorm(go)
        self.attention = CrossAttention(go, context_width, inner, heads)

    def forward(self, h: Tensor, modulation: Tensor, condition: Condition, place: int) -> Tensor:
        inside = self.norm_out(self.conv_in(nn.functional.silu(self.norm_in(h))))
        inside = modulate(inside.movedim(1, -1), modulation[:, None, None]).movedim(-1, 1)
        h = self.skip(h) + self.conv_out(nn.functional.silu(inside))
        tokens = h.flatten(2).mT
        seen = self.attention.attend(self.before_attention(tokens), condition, place)
        return h + seen.mT.reshape(h.shape)


class _SelfAttention(nn.Module):
    """Every place of the smallest map sees every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.parts = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        tokens = h.flatten(2).mT
        b, n, w = tokens.shape
        q, k, v = (
            part.view(b, n, self.heads, -1).transpose(1, 2)
            for part in self.parts(self.norm(tokens)).chunk(3, dim=-1)
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        return h + self.out(seen.transpose(1, 2).reshape(b, n, w)).mT.reshape(h.shape)


class RetrievalUNet(ConditionedNetwork):
    """For images ``[B, C, H, W]``; the neighbours' embeddings ``[B, k, e]`` reach every level.

    Each level halves the sides; a block is two 3 × 3 convolutions modulated by the time, then the
    attention to the neighbours; the smallest map also attends to itself.

    Source: arXiv 2204.11824, whose U-Net (192 channels, multipliers 1, 2, 3, 5) this is in small.
    """

    def __init__(
        self,
        shape: Sequence[int],
        context_width: int,
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        inner: int = 64,
        heads: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw the weights.

        Args:
            shape: ``(C, H, W)`` of an image.
            context_width: e.
            width: Channels of the first level.
            multipliers: Channels of each level, in multiples of ``width``.
            inner: Width of the attentions, a multiple of ``heads``.
            heads: Of the attentions.
            generator: Of the weights.

        Raises:
            TypeError: sizes that are no whole numbers.
            ValueError: ``shape`` is not three numbers, sides that cannot be halved for each level,
                or ``inner`` or the last level's channels are no multiple of ``heads``.
        """
        super().__init__(context_width)
        if len(shape) != 3:
            raise ValueError(f"shape must be (C, H, W), got {tuple(shape)}")
        self.shape = tuple(whole(s, "shape") for s in shape)
        self.settings = {
            "kind": "unet", "shape": list(shape), "context_width": context_width,
            "width": width, "multipliers": list(multipliers), "inner": inner, "heads": heads,
        }  # fmt: skip
        self.input_shape = self.shape
        sizes = [whole(width, "width") * whole(m, "multipliers") for m in multipliers]
        if not sizes:
            raise ValueError("multipliers must name at least one level")
        factor = 2 ** (len(sizes) - 1)
        if self.shape[1] % factor or self.shape[2] % factor:
            raise ValueError(
                f"sides {self.shape[1]} × {self.shape[2]} must be multiples of {factor} for "
                f"{len(sizes)} levels"
            )
        if sizes[-1] % whole(heads, "heads"):
            raise ValueError(f"{sizes[-1]} channels must be a multiple of heads={heads}")

        def block(come: int, go: int) -> _Block:
            return _Block(come, go, context_width, whole(inner, "inner"), heads)

        self.enter = nn.Conv2d(self.shape[0], sizes[0], 3, padding=1)
        before = [sizes[0], *sizes[:-1]]
        self.down = nn.ModuleList(block(a, b) for a, b in zip(before, sizes, strict=True))
        self.shrink = nn.ModuleList(nn.Conv2d(s, s, 3, 2, 1) for s in sizes[:-1])
        self.middle = block(sizes[-1], sizes[-1])
        self.see = _SelfAttention(sizes[-1], heads)
        after = [*sizes[1:], sizes[-1]]
        self.up = nn.ModuleList(block(a + b, b) for a, b in zip(after, sizes, strict=True))
        self.grow = nn.ModuleList(nn.Conv2d(s, s, 3, padding=1) for s in sizes[1:])
        self.last = _norm(sizes[0])
        self.leave = nn.Conv2d(sizes[0], self.shape[0], 3, padding=1)
        closing = (*(b.conv_out for b in self._blocks), self.see.out, self.leave)
        self.reset(generator, closing)

    @property
    def _blocks(self) -> list[_Block]:
        return cast("list[_Block]", [*self.down, self.middle, *reversed(self.up)])

    @property
    def attentions(self) -> list[CrossAttention]:
        """The attention of each block, in order of use."""
        return [b.attention for b in self._blocks]

    @property
    def films(self) -> list[nn.Linear]:
        """The modulation of each block, in order of use."""
        return [b.film for b in self._blocks]

    def run(self, x: Tensor, modulations: tuple[Tensor, ...], condition: Condition) -> Tensor:
        """The prediction ``[B, C, H, W]``; see :class:`ConditionedNetwork`."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must be [B, *{self.shape}], got shape {tuple(x.shape)}")
        steps = iter(zip(self._blocks, modulations, range(len(modulations)), strict=True))

        def next_block(h: Tensor) -> Tensor:
            block, modulation, place = next(steps)
            return block(h, modulation, condition, place)

        h, kept = self.enter(x), []
        for level in range(len(self.down)):
            h = next_block(h)
            kept.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self.see(next_block(h))
        for level in reversed(range(len(self.up))):
            h = next_block(torch.cat([h, kept[level]], dim=1))
            if level:
                h = self.grow[level - 1](nn.functional.interpolate(h, scale_factor=2.0))
        return self.leave(nn.functional.silu(self.last(h)))

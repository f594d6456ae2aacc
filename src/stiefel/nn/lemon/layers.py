"""Blocks of PROSE: attention without a fused fast path, feed-forward, embeddings.

``nn.TransformerEncoderLayer`` reads the weights of its linear maps itself in evaluation mode, so
an adapter put on one of them acts in training only. Here every linear map is called as a module.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from stiefel.nn.lemon.checks import visible
from stiefel.nn.s4d import seeded_linear

# Sinusoidal positions: wave lengths from 2π to 10,000 · 2π.
LONGEST = 10_000.0


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself, or to ``context`` if ``cross``.

    Args:
        dim: width, a multiple of ``heads``.
        heads: number of heads.
        cross: queries come from one sequence, keys and values from another.
        generator: for the start of the weights.
    """

    def __init__(
        self, dim: int, heads: int, cross: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.heads, self.cross = heads, cross
        if cross:
            self.query = seeded_linear(dim, dim, generator)
            self.keys_values = seeded_linear(dim, 2 * dim, generator)
        else:
            self.qkv = seeded_linear(dim, 3 * dim, generator)
        self.output = seeded_linear(dim, dim, generator)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch keys dim"] | None = None,
        padding: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """``padding``: True where a key is to be ignored; no row may be True throughout."""
        if self.cross:
            parts = (self.query(x), *self.keys_values(context).chunk(2, -1))
        else:
            parts = self.qkv(x).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        y = attend(q, k, v, None if padding is None else padding[:, None, None, :])
        return self.output(y.transpose(1, 2).flatten(2))


def attend(
    q: Float[Tensor, "batch heads length width"],
    k: Float[Tensor, "batch heads keys width"],
    v: Float[Tensor, "batch heads keys width"],
    padding: Bool[Tensor, "batch 1 1 keys"] | None,
) -> Float[Tensor, "batch heads length width"]:
    """softmax(q kᵀ / √width) v; ``padding`` True where a key is ignored, nowhere in a whole row."""
    if torch.compiler.is_compiling() or visible(q):
        allowed = None if padding is None else ~padding
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    # Under vmap the fused kernel has no rule, and its fallback guards against rows that are masked
    # throughout, which there are none of here.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if padding is not None:
        scores = scores.masked_fill(padding, float("-inf"))
    return scores.softmax(-1) @ v


class Block(nn.Module):
    """Pre-norm: attention, then a feed-forward map with GELU, each added to what came in."""

    def __init__(
        self,
        dim: int,
        heads: int,
        ffn: int,
        cross: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, cross, generator)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = mlp(dim, ffn, dim, generator)

    def forward(
        self, x: Tensor, context: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """As :meth:`Attention.forward`."""
        x = x + self.attention(self.attention_norm(x), context, padding)
        return x + self.ffn(self.ffn_norm(x))


class Stack(nn.Module):
    """Blocks and a last norm.

    With ``cross`` the rows of x never see one another: each result depends on its own row of x
    and on ``context`` only.
    """

    def __init__(
        self,
        layers: int,
        dim: int,
        heads: int,
        ffn: int,
        cross: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, ffn, cross, generator) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """As :meth:`Attention.forward`."""
        for block in self.blocks:
            x = block(x, context, padding)
        return self.norm(x)


def mlp(
    inside: int, hidden: int, outside: int, generator: torch.Generator | None = None
) -> nn.Sequential:
    """Linear, GELU, linear."""
    return nn.Sequential(
        seeded_linear(inside, hidden, generator),
        nn.GELU(),
        seeded_linear(hidden, outside, generator),
    )


def sinusoids(length: int, dim: int) -> Float[Tensor, "length dim"]:
    """Positions as sines (even columns) and cosines (odd columns) of falling frequency."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    frequency = torch.exp(-math.log(LONGEST) * torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    table = torch.zeros(length, dim, dtype=torch.float64)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency[: dim // 2])
    return table.float()


class GridHead(nn.Module):
    """From the decoder's vector of a time to the values at the ``n_x`` points of the grid."""

    def __init__(
        self, dim: int, n_x: int, channels: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.n_x, self.channels = n_x, channels
        self.values = mlp(dim, dim, n_x * channels, generator)

    def forward(
        self, h: Float[Tensor, "batch times dim"], x_out: Tensor | None = None
    ) -> Float[Tensor, "batch times n_x channels"]:
        """Values on the grid.

        Raises:
            ValueError: ``x_out`` is given.
        """
        if x_out is not None:
            raise ValueError("x_out needs a model with head='points'; this one has head='grid'")
        return self.values(h).unflatten(-1, (self.n_x, self.channels))


class PointHead(nn.Module):
    """Values anywhere: u(t, x) = Σ_p branch_p(t) trunk_p(x), as in a DeepONet.

    The trunk sees sin and cos of 2πkx/period for k ≤ n_x/4, so that predictions are periodic.
    """

    frequency: Tensor

    def __init__(
        self,
        dim: int,
        n_x: int,
        channels: int,
        period: float | int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.n_x, self.channels, self.period = n_x, channels, float(period)
        waves = max(1, n_x // 4)
        frequency = torch.arange(1, waves + 1) * (2 * math.pi / self.period)
        self.register_buffer("frequency", frequency, persistent=False)
        self.branch = mlp(dim, dim, dim * channels, generator)
        self.trunk = mlp(2 * waves, dim, dim, generator)

    def forward(
        self, h: Float[Tensor, "batch times dim"], x_out: Tensor | None = None
    ) -> Float[Tensor, "batch times points channels"]:
        """``x_out``: ``[points]`` or ``[batch, points]``; the centres of n_x cells if None."""
        if x_out is None:
            x_out = (torch.arange(self.n_x, device=h.device) + 0.5) * (self.period / self.n_x)
        phase = x_out.to(self.frequency)[..., None] * self.frequency
        trunk = self.trunk(torch.cat([phase.sin(), phase.cos()], -1))
        trunk = trunk.expand(h.shape[0], *trunk.shape[-2:])
        branch = self.branch(h).unflatten(-1, (self.channels, -1))
        return torch.einsum("btcd,bpd->btpc", branch, trunk) / math.sqrt(trunk.shape[-1])

"""What the two networks share: cross-attention to neighbours, time code, the null context.

The keys and values of a context do not depend on the time step, and the modulations do not depend
on the sample. So a network is called in two parts: :meth:`ConditionedNetwork.condition` and
:meth:`ConditionedNetwork.modulations`, once a sample and once a step, then
:meth:`ConditionedNetwork.run`. ``forward`` is these three in a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from stiefel.generate._checks import whole

TIME_WIDTH = 64
# Spread of the null vector at the start, about that of an embedding's entries.
NULL_SPREAD = 0.5
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Condition:
    """What the attentions of one network need to know of a batch's contexts.

    The rows with neighbours come first; the rows after them have none. The attention to equal rows
    is that row, whatever the query, so that these need no attention at all.
    """

    pairs: tuple[KeysValues, ...]
    """Keys and values ``[rows, k, inner]`` for each attention; empty without neighbours."""
    rows: int
    mask: Tensor | None = None
    """``[rows, k]``, true where there is a neighbour."""
    null: tuple[Tensor, ...] = ()
    """The attentions' output ``[width]`` for the rows without neighbours."""

    def part(self, rows: slice) -> Condition:
        """That of some of the rows with neighbours; without any, itself."""
        if not self.pairs:
            return self
        pairs = tuple((k[rows], v[rows]) for k, v in self.pairs)
        mask = None if self.mask is None else self.mask[rows]
        return Condition(pairs, len(pairs[0][0]), mask, self.null)


class CrossAttention(nn.Module):
    """Queries from the image, keys and values from its context; no position code on the latter.

    ``W_o softmax(q Kᵀ/√d) V + b`` with q = W_q h, K = W_k C, V = W_v C and no other biases, so that
    the order of the neighbours does not matter.
    """

    def __init__(self, width: int, context_width: int, inner: int, heads: int) -> None:
        """``inner`` is shared among ``heads``."""
        super().__init__()
        if inner % heads:
            raise ValueError(f"inner={inner} must be a multiple of heads={heads}")
        self.heads = heads
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(context_width, inner, bias=False)
        self.value = nn.Linear(context_width, inner, bias=False)
        self.out = nn.Linear(inner, width)

    def pair(self, context: Float[Tensor, "*rows e"]) -> KeysValues:
        """Keys and values ``[*rows, inner]``."""
        return self.key(context), self.value(context)

    def null_output(self, null: Float[Tensor, " e"]) -> Float[Tensor, " w"]:
        """What comes out where every row of the context is ``null``."""
        return self.out(self.value(null))

    def forward(
        self,
        h: Float[Tensor, "B n w"],
        keys: Float[Tensor, "B k a"],
        values: Float[Tensor, "B k a"],
        mask: Bool[Tensor, "B k"] | None = None,
    ) -> Float[Tensor, "B n w"]:
        """Attend from each of n tokens to the k rows of its context."""
        b, n, k = h.shape[0], h.shape[1], keys.shape[1]
        q = self.query(h)
        depth = q.shape[-1] // self.heads
        if n == 1:  # a product and a sum: matrices of one row are slow
            scores = (q * keys).view(b, k, self.heads, depth).sum(-1) / math.sqrt(depth)
            if mask is not None:
                scores = scores.masked_fill(~mask[..., None], -torch.inf)
            weights = scores.softmax(1)[..., None]
            mixed = (weights * values.view(b, k, self.heads, depth)).sum(1).view(b, 1, -1)
        else:
            q = q.view(b, n, self.heads, depth).transpose(1, 2)
            keys = keys.view(b, k, self.heads, depth).permute(0, 2, 3, 1)
            scores = q @ keys / math.sqrt(depth)
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
            weights = scores.softmax(-1)
            mixed = weights @ values.view(b, k, self.heads, depth).transpose(1, 2)
            mixed = mixed.transpose(1, 2).reshape(b, n, -1)
        return self.out(mixed)

    def attend(self, h: Float[Tensor, "B n w"], condition: Condition, place: int) -> Tensor:
        """The same by a :class:`Condition`; ``place`` is this attention's number in the network."""
        rows = condition.rows
        if not condition.pairs:
            return condition.null[place].expand_as(h)
        keys, values = condition.pairs[place]
        if rows == len(h):
            return self(h, keys, values, condition.mask)
        first = self(h[:rows], keys, values, condition.mask)
        rest = condition.null[place].expand(len(h) - rows, *first.shape[1:])
        return torch.cat([first, rest])


class ConditionedNetwork(nn.Module):
    """Base of denoisers that see an image, a time step and the embeddings of its neighbours.

    A subclass gives ``attentions`` and ``films``, in the order in which :meth:`run` uses them, and
    calls :meth:`reset` at the end of its ``__init__``.
    """

    settings: dict[str, Any]
    """What it was made with, for files."""
    input_shape: tuple[int, ...]
    """Shape of one image as the network takes it."""

    @property
    def attentions(self) -> list[CrossAttention]:
        """All of them, in order of use."""
        raise NotImplementedError

    @property
    def films(self) -> list[nn.Linear]:
        """What modulates each block, in order of use."""
        raise NotImplementedError

    def __init__(self, context_width: int) -> None:
        super().__init__()
        self.context_width = whole(context_width, "context_width")
        self.time = nn.Linear(TIME_WIDTH, TIME_WIDTH)
        self.null = nn.Parameter(torch.zeros(context_width))

    def reset(
        self, generator: torch.Generator | None, zero: tuple[nn.Linear | nn.Conv2d, ...]
    ) -> None:
        """Draw all weights as PyTorch does, from ``generator``; those of ``zero`` are 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, math.sqrt(5), generator=generator)
                if module.bias is not None:
                    bound = 1 / math.sqrt(module.weight[0].numel())
                    nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        for attention in self.attentions:
            nn.init.zeros_(attention.out.bias)
        for module in zero:
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.null.normal_(0, NULL_SPREAD, generator=generator)

    def null_context(self, B: int, k: int) -> Float[Tensor, "B k e"]:
        """The learned null vector in every place: what stands for no neighbours in training."""
        return self.null.expand(whole(B, "B"), whole(k, "k"), -1)

    def modulations(self, t: Tensor) -> tuple[Tensor, ...]:
        """What the time steps ``[S]`` do to each block: ``[S, 2·width]`` for each of ``films``."""
        half = TIME_WIDTH // 2
        rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angles = t.double()[:, None] * rates
        code = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.null)
        code = nn.functional.silu(self.time(code))
        return tuple(film(code) for film in self.films)

    def condition(
        self,
        context: Tensor,
        mask: Tensor | None = None,
        *,
        null: Float[Tensor, " e"] | None = None,
    ) -> Condition:
        """Keys and values of contexts; with ``null`` also the output of rows that have none."""
        self._check_context(context, mask)
        pairs = tuple(a.pair(context) for a in self.attentions)
        return Condition(pairs, len(context), mask, self.null_outputs(null))

    def null_outputs(self, null: Tensor | None) -> tuple[Tensor, ...]:
        """The attentions' outputs where every row is ``null``; none for None."""
        if null is None:
            return ()
        return tuple(a.null_output(null) for a in self.attentions)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """The prediction for noisy images.

        Args:
            x: ``[B, *shape]`` noisy images.
            t: ``[B]`` whole time steps, or ``[1]`` for all.
            context: ``[B, k, e]`` embeddings of the neighbours; their order does not matter.
            mask: ``[B, k]``, false where there is no neighbour. Every image needs one; for images
                without any give :meth:`null_context`.

        Returns:
            ``[B, *shape]``.

        Raises:
            ValueError: shapes that do not fit, or an image whose mask is false everywhere.
        """
        if t.ndim != 1 or len(t) not in (1, len(x)):
            raise ValueError(f"t must be [{len(x)}] or [1], got shape {tuple(t.shape)}")
        if len(context) != len(x):
            raise ValueError(f"context must be of {len(x)} images, got {len(context)}")
        return self.run(x, self.modulations(t), self.condition(context, mask))

    def run(self, x: Tensor, modulations: tuple[Tensor, ...], condition: Condition) -> Tensor:
        """The network itself; ``modulations`` of one row serve the whole batch."""
        raise NotImplementedError

    def _check_context(self, context: Tensor, mask: Tensor | None) -> None:
        if context.ndim != 3 or context.shape[2] != self.context_width or not context.shape[1]:
            raise ValueError(
                f"context must be [B, k, {self.context_width}] with k ≥ 1, "
                f"got {tuple(context.shape)}"
            )
        if mask is None:
            return
        if mask.dtype != torch.bool or mask.shape != context.shape[:2]:
            raise ValueError(
                f"mask must be bool {tuple(context.shape[:2])}, got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        if not bool(mask.any(1).all()):
            raise ValueError("mask leaves an image without a neighbour: use null_context for it")


def modulate(h: Tensor, modulation: Tensor) -> Tensor:
    """FiLM: ``(1 + g) h + b`` over the last dimension, ``[B or 1, 2·width]`` = g, b."""
    gain, shift = modulation.chunk(2, dim=-1)
    return torch.addcmul(shift, 1 + gain, h)

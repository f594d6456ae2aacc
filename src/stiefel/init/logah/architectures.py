"""Random architectures to train a hypernetwork on, and the graphs of GPT-2 and ViT by rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stiefel.init.logah.graph import NetGraph, Node, Shape, path_lengths


class _Builder:
    """Collects nodes in the order in which :func:`graph_from_module` would find them."""

    def __init__(self) -> None:
        self.nodes = [Node("input")]
        self.shapes: dict[str, Shape] = {}

    def add(
        self,
        op: str,
        parents: Sequence[int],
        parameters: dict[str, Shape] | None = None,
        transposed: bool = False,
    ) -> int:
        """One node; its number."""
        owned = parameters or {}
        self.shapes.update(owned)
        self.nodes.append(Node(op, tuple(sorted(parents)), tuple(owned), transposed))
        return len(self.nodes) - 1

    def norm(self, name: str, width: int, parent: int) -> int:
        """A LayerNorm."""
        return self.add("ln", [parent], {f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def linear(
        self, name: str, inputs: int, outputs: int, parent: int, transposed: bool = False
    ) -> int:
        """A matrix and its bias."""
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        weight = self.add("linear", [parent], {f"{name}.weight": shape}, transposed)
        return self.add("bias", [weight], {f"{name}.bias": (outputs,)})

    def graph(
        self, names: Sequence[str], max_path: int, tied: dict[str, str] | None = None
    ) -> NetGraph:
        """The graph, parameters in this order."""
        A = path_lengths([node.parents for node in self.nodes], max_path)
        shapes = {name: self.shapes[name] for name in names}
        return NetGraph(tuple(self.nodes), shapes, A, tied or {})


def gpt_graph(
    n_layer: int,
    n_embd: int,
    *,
    n_head: int | None = None,
    vocab_size: int = 50257,
    n_positions: int = 1024,
    n_inner: int | None = None,
    tie_word_embeddings: bool = True,
    max_path: int = 50,
) -> NetGraph:
    """The graph of ``GPT2LMHeadModel`` of transformers, without a model and without an export.

    Args:
        n_layer: Blocks.
        n_embd: Width.
        n_head: Has no effect on the graph.
        vocab_size: Words.
        n_positions: Longest context.
        n_inner: Width inside the perceptrons; 4 ``n_embd`` if not given.
        tie_word_embeddings: Whether the head is the table of words.
        max_path: Longest path that counts.

    Returns:
        The same as ``graph_from_module`` of such a model.
    """
    d, inner, b = n_embd, n_inner or 4 * n_embd, _Builder()
    words = b.add("embed", [0], {"transformer.wte.weight": (vocab_size, d)})
    places = b.add("pos_enc", [0], {"transformer.wpe.weight": (n_positions, d)})
    x = b.add("sum", [words, places])
    for i in range(n_layer):
        block = f"transformer.h.{i}"
        y = b.norm(f"{block}.ln_1", d, x)
        y = b.add("msa", [b.linear(f"{block}.attn.c_attn", d, 3 * d, y, True)])
        x = b.add("sum", [x, b.linear(f"{block}.attn.c_proj", d, d, y, True)])
        y = b.linear(f"{block}.mlp.c_fc", d, inner, b.norm(f"{block}.ln_2", d, x), True)
        x = b.add("sum", [x, b.linear(f"{block}.mlp.c_proj", inner, d, y, True)])
    y = b.norm("transformer.ln_f", d, x)
    if tie_word_embeddings:
        b.add("sum", [words, y])
        tied = {"lm_head.weight": "transformer.wte.weight"}
        return b.graph(list(b.shapes), max_path, tied)
    b.add("linear", [y], {"lm_head.weight": (vocab_size, d)})
    return b.graph(list(b.shapes), max_path)


def vit_graph(
    num_hidden_layers: int,
    hidden_size: int,
    *,
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
    image_size: int = 224,
    patch_size: int = 16,
    num_channels: int = 3,
    num_labels: int = 1000,
    max_path: int = 50,
) -> NetGraph:
    """The graph of a ViT with one fused matrix for queries, keys and values, named as in timm.

    Args:
        num_hidden_layers: Blocks.
        hidden_size: Width.
        num_attention_heads: Has no effect on the graph.
        intermediate_size: Width inside the perceptrons; 4 ``hidden_size`` if not given.
        image_size: Side of the images.
        patch_size: Side of the patches.
        num_channels: Of the images.
        num_labels: Classes.
        max_path: Longest path that counts.

    Returns:
        The same as ``graph_from_module`` of ``timm``'s ``VisionTransformer`` with these sizes and
        a class token.
    """
    d, inner, b = hidden_size, intermediate_size or 4 * hidden_size, _Builder()
    kernel = (d, num_channels, patch_size, patch_size)
    x = b.add("conv", [0], {"patch_embed.proj.weight": kernel})
    x = b.add("bias", [x], {"patch_embed.proj.bias": (d,)})
    x = b.add("param", [x], {"cls_token": (1, 1, d)})
    tokens = (image_size // patch_size) ** 2 + 1
    x = b.add("pos_enc", [x], {"pos_embed": (1, tokens, d)})
    for i in range(num_hidden_layers):
        block = f"blocks.{i}"
        y = b.linear(f"{block}.attn.qkv", d, 3 * d, b.norm(f"{block}.norm1", d, x))
        x = b.add("sum", [x, b.linear(f"{block}.attn.proj", d, d, b.add("msa", [y]))])
        y = b.linear(f"{block}.mlp.fc1", d, inner, b.norm(f"{block}.norm2", d, x))
        x = b.add("sum", [x, b.linear(f"{block}.mlp.fc2", inner, d, y)])
    b.linear("head", d, num_labels, b.norm("norm", d, x))
    # The order of named_parameters(): what the model itself owns comes first.
    own = ["cls_token", "pos_embed"]
    return b.graph([*own, *(name for name in b.shapes if name not in own)], max_path)


def _parameters(graph: NetGraph) -> int:
    return sum(math.prod(shape) for shape in graph.parameter_shapes.values())


def sample_gpt(
    rng: np.random.Generator, *, vocab_size: int = 50257, limit: int = 30_000_000
) -> dict[str, Any]:
    """A random architecture of GPTs-1K (LoGAH, Section 4): 3 to 9 blocks, widths 72 to 256.

    Args:
        rng: Source of randomness.
        vocab_size: Words.
        limit: Most parameters.

    Returns:
        ``n_layer``, ``n_embd``, ``n_head``, ``vocab_size``, ``tie_word_embeddings``: arguments of
        :func:`gpt_graph` and of ``transformers.GPT2Config``.

    Raises:
        ValueError: even the smallest architecture is over ``limit``.
    """
    smallest = _parameters(gpt_graph(9, 72, vocab_size=vocab_size, tie_word_embeddings=False))
    _check_limit(limit, smallest)
    while True:
        layers = int(rng.integers(3, 10))
        low, high = (72, 176) if layers > 5 else (128, 176) if layers > 3 else (176, 256)
        width = int(rng.choice(np.arange(low, high + 1, 8)))
        config = {
            "n_layer": layers,
            "n_embd": width,
            "n_head": next(heads for heads in (8, 6, 4) if width % heads == 0),
            "vocab_size": vocab_size,
            "tie_word_embeddings": False,
        }
        if _parameters(gpt_graph(**config)) <= limit:
            return config


def sample_vit(
    rng: np.random.Generator,
    *,
    image_size: int = 32,
    num_labels: int = 100,
    limit: int = 10_000_000,
) -> dict[str, Any]:
    """A random architecture of ViTs-1K (LoGAH, Section 4): 3 to 9 blocks, widths 128 to 512.

    Args:
        rng: Source of randomness.
        image_size: Side of the images.
        num_labels: Classes.
        limit: Most parameters.

    Returns:
        ``num_hidden_layers``, ``hidden_size``, ``num_attention_heads``, ``intermediate_size``,
        ``image_size``, ``patch_size``, ``num_labels``: arguments of :func:`vit_graph`; without
        ``num_labels`` also of ``transformers.ViTConfig``.

    Raises:
        ValueError: even the smallest architecture is over ``limit``.
    """
    sizes = {"image_size": image_size, "num_labels": num_labels, "patch_size": 2}
    _check_limit(limit, _parameters(vit_graph(6, 128, **sizes)))
    while True:
        layers = int(rng.integers(3, 10))
        low, high = (128, 256) if layers > 5 else (256, 384) if layers > 3 else (384, 512)
        width = int(rng.choice(np.arange(low, high + 1, 32)))
        divisors = [12, 6, 3]
        heads = [h for h in divisors if width % h == 0] or [4, 8]
        config = {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": int(rng.choice(heads)),
            "intermediate_size": 4 * width,
            **sizes,
        }
        if _parameters(vit_graph(**config)) <= limit:
            return config


def _check_limit(limit: int, smallest: int) -> None:
    if limit < smallest:
        raise ValueError(f"limit is {limit}; the smallest architecture has {smallest} parameters")

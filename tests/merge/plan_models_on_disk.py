"""Tiny checkpoints on disk for the tests of recipes and plans."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stiefel.merge.plan import build_plan
from stiefel.merge.recipe import parse_recipe
from stiefel.merge.recipe_errors import PlanError

SHAPES = {
    "self_attn.q_proj.weight": (8, 8),
    "mlp.up_proj.weight": (12, 8),
    "input_layernorm.weight": (8,),
}


def tensors(seed=0, *, layers=3, vocab=10, prefix="model.", head=True, dtype=torch.float32):
    """A little Llama's names with random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    found = {f"{prefix}embed_tokens.weight": draw(vocab, 8)}
    for layer in range(layers):
        for name, shape in SHAPES.items():
            found[f"{prefix}layers.{layer}.{name}"] = draw(*shape)
    found[f"{prefix}norm.weight"] = draw(8)
    if head:
        found["lm_head.weight"] = draw(vocab, 8)
    return found


def config(layers=3, vocab=10, **more):
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "torch_dtype": "float32",
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **more,
    }


def write(folder, held=None, settings=None, tokens=None, **of_tensors):
    """A model folder; ``tokens``: the list of its tokens, or pairs for added ones."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = tensors(**of_tensors) if held is None else held
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    if settings is None:
        settings = config(of_tensors.get("layers", 3), of_tensors.get("vocab", 10))
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    if tokens is not None:
        write_tokenizer(folder, tokens)
    return folder


def write_tokenizer(folder, tokens, added=()):
    start = len(tokens)
    content = {
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}},
        "added_tokens": [
            {"id": start + i, "content": token, "special": True} for i, token in enumerate(added)
        ],
    }
    (Path(folder) / "tokenizer.json").write_text(json.dumps(content))


def sparse_llama(folder, *, layers, width, inner, vocab, shards):
    """A checkpoint of real size that takes no room on the disk: headers, then a hole."""
    folder = Path(folder)
    folder.mkdir()
    kinds = {
        **{f"self_attn.{x}_proj": (width, width) for x in "qkvo"},
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{k}.weight": shape for k, shape in kinds.items()}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    names, weight_map = list(shapes), {}
    step = -(-len(names) // shards)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, offset = {}, 0
        for name in names[shard * step : (shard + 1) * step]:
            size = 2 * torch.Size(shapes[name]).numel()
            header[name] = {
                "dtype": "BF16",
                "shape": list(shapes[name]),
                "data_offsets": [offset, offset + size],
            }
            offset += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + offset)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(layers, vocab)))
    write_tokenizer(folder, [f"token {i}" for i in range(vocab)])
    return folder


LINEAR = """models:
  - {model: base, parameters: {weight: 1}}
  - {model: a, parameters: {weight: 3}}
merge_method: linear
"""
TIES = """models:
  - {model: a, parameters: {weight: 0.5, density: 0.2}}
  - {model: b, parameters: {weight: 0.5}}
merge_method: ties
base_model: base
"""
# Layers of two models on top of each other.
STACK = """slices:
  - sources: [{model: base, layer_range: [0, 2]}]
  - sources:
      - model: a
        layer_range: [1, 3]
        parameters: {scale: [{filter: up_proj, value: 0.5}, {value: 1}]}
merge_method: passthrough
dtype: bfloat16
"""


def plan(folder, text=TIES, **more):
    return build_plan(parse_recipe(text), folder, **more)


def problems(folder, text=TIES, **more):
    """What a plan that cannot be made says."""
    with pytest.raises(PlanError) as caught:
        plan(folder, text, **more)
    return str(caught.value)


def by_name(made):
    return {task.name: task for task in made.tasks}

"""The parameters of a model as shapes alone: presets, JSON, headers of safetensors files."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Parameters of two dimensions that are no matrices, by their usual names.
ELEMENTWISE = r"embed|wte|wpe|lm_head|(^|\.)head\."
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Parameter:
    """One parameter; ``blocks`` are the matrices that a fused projection is split into."""

    name: str
    shape: tuple[int, ...]
    matrix: bool
    blocks: Any = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Model:
    """Parameters in the order of the model."""

    name: str
    parameters: tuple[Parameter, ...]

    def numel(self, matrix: bool | None = None) -> int:
        """Numbers in all, or in matrices or elsewhere alone."""
        return sum(p.numel for p in self.parameters if matrix in (None, p.matrix))

    def groups(self, dtype: torch.dtype, *, matrices: bool = True) -> list[dict[str, Any]]:
        """Parameter groups on the meta device; without ``matrices`` all goes elementwise."""
        found: dict[Any, list[tuple[str, nn.Parameter]]] = {}
        for p in self.parameters:
            rule = p.matrix and matrices
            view = "batch" if rule and len(p.shape) == 3 else "flatten"
            tensor = nn.Parameter(torch.empty(p.shape, dtype=dtype, device="meta"))
            key = (rule, view, p.blocks if rule else None)
            found.setdefault(key, []).append((p.name, tensor))
        return [
            {"rule": "matrix", "view": view, "blocks": blocks, "params": params}
            if rule
            else {"rule": "elementwise", "params": params}
            for (rule, view, blocks), params in found.items()
        ]


def named(name: str) -> Model:
    """A preset, one of :data:`PRESETS`."""
    return PRESETS[name]()


def from_shapes(name: str, shapes: Mapping[str, Any], elementwise: str = ELEMENTWISE) -> Model:
    """A model of name → shape; names that match ``elementwise``, and vectors, are no matrices.

    Raises:
        ValueError: a shape that is no list of positive numbers.
    """
    parameters = []
    for key, shape in shapes.items():
        if not isinstance(shape, list | tuple) or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"the shape of {key!r} must be a list of positive ints, got {shape!r}")
        matrix = len(shape) >= 2 and not re.search(elementwise, key)
        parameters.append(Parameter(key, tuple(shape), matrix))
    if not parameters:
        raise ValueError(f"{name} has no parameters")
    return Model(name, tuple(parameters))


def read_model(source: str, elementwise: str = ELEMENTWISE) -> Model:
    """A model from JSON text, a JSON file, or a safetensors file, of which only the header is read.

    Raises:
        ValueError: text or a file of another kind.
        FileNotFoundError: no such file.
    """
    if source.lstrip().startswith("{"):
        return from_shapes("shapes", json.loads(source), elementwise)
    path = Path(source)
    if path.suffix == ".safetensors":
        return from_shapes(path.name, _header(path), elementwise)
    shapes = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(shapes, dict):
        raise ValueError(f"{path} must hold an object of name → shape, got {type(shapes).__name__}")
    return from_shapes(path.name, shapes, elementwise)


def _header(path: Path) -> dict[str, list[int]]:
    """Name → shape of a safetensors file: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < size <= _LARGEST_HEADER:
            raise ValueError(f"{path} is no safetensors file: its header would have {size} bytes")
        header = json.loads(file.read(size))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def gpt2(width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024) -> Model:
    """GPT-2's shapes, weights as (out, in), query, key and value fused."""
    found = [
        Parameter("wte", (vocabulary, width), False),
        Parameter("wpe", (context, width), False),
    ]
    for i in range(layers):
        for name, rows, cols, blocks in (
            ("attn.c_attn", 3 * width, width, 3),
            ("attn.c_proj", width, width, None),
            ("mlp.c_fc", 4 * width, width, None),
            ("mlp.c_proj", width, 4 * width, None),
        ):
            found.append(Parameter(f"h.{i}.{name}.weight", (rows, cols), True, blocks))
            found.append(Parameter(f"h.{i}.{name}.bias", (rows,), False))
        found += [
            Parameter(f"h.{i}.ln_{n}.{part}", (width,), False)
            for n in (1, 2)
            for part in ("weight", "bias")
        ]
    found += [Parameter(f"ln_f.{part}", (width,), False) for part in ("weight", "bias")]
    return Model(f"GPT-2 {width}×{layers}", tuple(found))


def llama(width: int, layers: int, hidden: int, keys: int, vocabulary: int = 32000) -> Model:
    """A Llama's shapes: ``keys`` rows in the key and value projections."""
    found = [Parameter("embed_tokens.weight", (vocabulary, width), False)]
    for i in range(layers):
        for name, rows, cols in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", keys, width),
            ("self_attn.v_proj", keys, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", hidden, width),
            ("mlp.up_proj", hidden, width),
            ("mlp.down_proj", width, hidden),
        ):
            found.append(Parameter(f"layers.{i}.{name}.weight", (rows, cols), True))
        found += [Parameter(f"layers.{i}.norm_{n}.weight", (width,), False) for n in (1, 2)]
    found.append(Parameter("norm.weight", (width,), False))
    found.append(Parameter("lm_head.weight", (vocabulary, width), False))
    return Model(f"Llama {width}×{layers}", tuple(found))


PRESETS = {
    "gpt2-small": gpt2,
    "gpt2-xl": lambda: gpt2(1600, 48),
    "llama-7b": lambda: llama(4096, 32, 11008, 4096),
    "llama-70b": lambda: llama(8192, 80, 28672, 1024),
}

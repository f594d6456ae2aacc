"""Which tensors belong to which layer, from their names alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_NUMBERED = re.compile(r"((?:[^.]+\.)*?)(\d+)\.(.+)", re.DOTALL)
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Parts of a configuration that describe the language model of a multimodal one.
TEXT_PARTS = ("text_config", "llm_config", "language_config")
# What stands before the layers; everything else outside them stands behind.
EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
    "tok_embeddings.weight", "shared.weight",
)  # fmt: skip
HEADS = ("lm_head.weight", "embed_out.weight")
_VOCABULARY = (*EMBEDDINGS, *HEADS, "lm_head.bias")
# Some programs save one and the same model with these before its names, others without.
PREFIXES = ("model.", "transformer.")


@dataclass(frozen=True)
class Layers:
    """The layers of a model: tensors ``{prefix}{index}.{rest}``."""

    prefix: str | None
    """None: no layers found; then every tensor is outside."""
    count: int
    inside: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Layer → what follows its number, in the order of the checkpoint."""

    def split(self, name: str) -> tuple[int, str] | None:
        """Layer and the rest of the name; None for a tensor outside the layers."""
        if self.prefix is None or not name.startswith(self.prefix):
            return None
        number, dot, rest = name[len(self.prefix) :].partition(".")
        if not dot or not number.isdecimal() or int(number) >= self.count:
            return None
        return int(number), rest

    def name(self, index: int, rest: str) -> str:
        """The tensor ``rest`` of layer ``index``."""
        return f"{self.prefix}{index}.{rest}"


def find_layers(names: Iterable[str], config: Mapping[str, Any] | None) -> Layers:
    """The layers among ``names``.

    Numbered groups are looked for by the first number in a name. Of several (a vision tower beside
    the language model) the one with as many layers as the configuration says counts, then the one
    with the most tensors.
    """
    groups: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        found = _NUMBERED.fullmatch(name)
        if found and len(found[2]) < 7:
            groups[found[1]][int(found[2])].append(found[3])
    expected = layer_count(config)
    best, size = None, (False, 0)
    for prefix, layers in groups.items():
        if sorted(layers) != list(range(len(layers))):
            continue
        here = (len(layers) == expected, sum(map(len, layers.values())))
        if here > size:
            best, size = prefix, here
    if best is None:
        return Layers(None, 0)
    inside = {index: tuple(rests) for index, rests in sorted(groups[best].items())}
    return Layers(best, len(inside), inside)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the language model; mostly all of it."""
    for part in (config, *(config.get(name) for name in TEXT_PARTS)):
        if isinstance(part, dict) and any(isinstance(part.get(key), int) for key in LAYER_KEYS):
            return part
    return config


def layer_count(config: Mapping[str, Any] | None) -> int | None:
    """How many layers the configuration says there are; None if it does not say."""
    part = text_part(config or {})
    found = [part[key] for key in LAYER_KEYS if isinstance(part.get(key), int)]
    return found[0] if found else None


def depth(index: int, count: int) -> float:
    """Relative depth t of a layer, for gradients: 0 first, 1 last; a single layer has 1."""
    return index / (count - 1) if count > 1 else 1.0


def stands_before(name: str) -> bool:
    """Whether a tensor outside the layers belongs to the input side."""
    if name.endswith(("wte.weight", "wpe.weight")):
        return True
    return "embed" in name and "embed_out" not in name


def is_embedding(name: str) -> bool:
    """Whether it is the table of token embeddings."""
    return _ends(name, EMBEDDINGS)


def is_head(name: str) -> bool:
    """Whether it is the output matrix over the vocabulary."""
    return _ends(name, HEADS)


def has_vocabulary_rows(name: str) -> bool:
    """Whether its rows are tokens."""
    return _ends(name, _VOCABULARY)


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def match_names(wanted: Iterable[str], have: Iterable[str]) -> dict[str, str]:
    """For each wanted tensor the name under which ``have`` holds it, where it does.

    Equal names first; then with one of :data:`PREFIXES` added or removed.
    """
    there = set(have)
    found = {}
    for name in wanted:
        tries = [name]
        for prefix in PREFIXES:
            tries.append(prefix + name)
            if name.startswith(prefix):
                tries.append(name.removeprefix(prefix))
        own = next((t for t in tries if t in there), None)
        if own is not None:
            found[name] = own
    return found

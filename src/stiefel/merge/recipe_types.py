"""A checked recipe, in one form however it was written. Nothing here opens a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stiefel.merge.recipe_methods import Method
from stiefel.merge.recipe_settings import Setting


@dataclass(frozen=True)
class ModelRef:
    """``model[@revision][+adapter[@revision]]``, as written; nothing is looked up yet."""

    model: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    line: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        text = self.model + (f"@{self.revision}" if self.revision else "")
        if self.adapter is None:
            return text
        return f"{text}+{self.adapter}" + (
            f"@{self.adapter_revision}" if self.adapter_revision else ""
        )


@dataclass(frozen=True)
class Source:
    """A model with its parameters, for all layers or for some."""

    ref: ModelRef
    parameters: Mapping[str, Setting]
    layers: tuple[int, int] | None = None
    """First layer and the one after the last; None: all of them."""
    is_adapter: bool = False
    """Written as ``adapter:``; ``ref.model`` is the adapter's folder."""
    key: str = ""
    """Where in the recipe, for messages."""


@dataclass(frozen=True)
class OutputSlice:
    """Layers of the output, merged from the same number of layers of each source."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Setting]
    base: ModelRef | None = None
    """Instead of the recipe's base."""
    key: str = ""


@dataclass(frozen=True)
class Policies:
    """What to do with tensors that do not fit; see :mod:`stiefel.merge.plan`."""

    missing: str = "error"
    extra: str = "error"
    shape: str = "error"
    vocabulary: str = "error"
    tied: str = "untie"
    nonfinite: str = "error"


@dataclass(frozen=True)
class Recipe:
    """A checked recipe."""

    method: Method
    slices: tuple[OutputSlice, ...]
    """One, without layer ranges, where the recipe says ``models``."""
    stacked: bool
    """Whether the recipe says ``slices``."""
    base: ModelRef | None
    parameters: Mapping[str, Setting]
    dtype: str | None
    """Of the output: ``out_dtype``, else ``dtype``; None keeps the base's."""
    tokenizer: ModelRef | None
    """Whose tokenizer the output has; None is the base's."""
    union: bool
    """The tokenizer is the base's with the tokens of all others added."""
    chat_template: str | None
    policies: Policies
    seed: int
    text: str
    name: str
    warnings: tuple[str, ...] = ()

    @property
    def merges_adapters(self) -> bool:
        """Whether adapters become an adapter, and no model is written."""
        alone = all(source.is_adapter for one in self.slices for source in one.sources)
        return alone and (self.base is None or self.method.adapters_only)

"""What a merge will do, tensor by tensor: made from headers alone, carried out by the engine.

``stiefel.merge.plan`` fills these records in, ``stiefel.merge.engine`` reads them. Nothing here
opens a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlannedModel:
    """One input: a checkpoint and, where the recipe says ``model+adapter``, an adapter on it."""

    name: str
    """As the recipe writes it; messages and reports use this name."""
    path: Path
    """Folder or file of safetensors."""
    adapter: Path | None = None
    """Folder of a PEFT adapter that is folded into the weights while they are read."""


@dataclass(frozen=True)
class TensorRef:
    """One tensor of one input."""

    model: str
    """Name of the model as the recipe writes it."""
    tensor: str
    """Name of the tensor in that model's checkpoint."""
    checkpoint: int
    """Index of the model in :attr:`MergePlan.models`."""
    rows: Tensor | None = field(default=None, compare=False)
    """For vocabularies that differ: int64 ``[output rows]``, which row of this tensor stands there;
    -1 where this model lacks the token: the row of ``fallback`` is taken. None: row i is row i."""
    fallback: TensorRef | None = None
    """Where rows that this model lacks come from (itself with ``rows`` or as long as the output);
    None: the row is zero."""


@dataclass(frozen=True)
class TensorTask:
    """How one output tensor comes about."""

    name: str
    dtype: torch.dtype
    """Of the output."""
    shape: tuple[int, ...]
    method: str
    """``linear``, ``slerp``, ``task_arithmetic``, ``ties``, ``dare_linear``, ``dare_ties``,
    ``orthomerge``, or ``copy`` (one source, values as they are, cast to ``dtype``)."""
    base: TensorRef | None
    sources: tuple[TensorRef, ...]
    """Never includes the base of a method that works on differences."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Resolved for this tensor: gradients and filters are already applied."""
    source_parameters: tuple[Mapping[str, Any], ...] = ()
    """One mapping a source (``weight``, ``density``, ...), resolved as well."""
    note: str = ""
    """What a reader of the report should know (``missing in b: base taken``); mostly empty."""

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class MergePlan:
    """The whole merge, known before any tensor is read."""

    models: tuple[PlannedModel, ...]
    tasks: tuple[TensorTask, ...]
    """In the order in which tensors are written (the base's)."""
    config: Mapping[str, Any] | None
    """Content of the output's config.json; None writes none. Where it is the base's, unchanged, the
    file itself is in :attr:`files_to_copy`, byte for byte."""
    recipe_text: str
    """The recipe as read, kept in the report."""
    files_to_copy: Mapping[str, Path] = field(default_factory=dict)
    """Name in the output folder → file (tokenizer, generation settings, ...)."""
    warnings: tuple[str, ...] = ()
    shard_bytes: int = 5_000_000_000
    seed: int = 0
    """Of the random methods (DARE)."""
    on_nonfinite: str = "error"
    """NaN or infinity in an input: ``error``, ``keep`` (let it through, reported), ``base``
    (the base's value stands in; an error where there is no base)."""
    files_to_write: Mapping[str, str] = field(default_factory=dict)
    """Name in the output folder → text (a tokenizer that was changed)."""

"""The inputs of a merge while it runs: rows of tensors as the plan wants them.

A reader hides where rows come from: straight from the file, through a vocabulary that maps rows,
from a weight with an adapter folded in, or with NaN replaced by the base's value. Only the portion
asked for is read, except where an adapter changes the tensor: that one is folded once and kept as
long as its reader lives.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stiefel.checkpoint import Checkpoint, CheckpointError
from stiefel.checkpoint.reader import rows_within
from stiefel.merge.adapter_config import CONFIG_FILE, WEIGHTS_FILE
from stiefel.merge.arithmetic import all_finite
from stiefel.merge.peft_adapters import Adapter
from stiefel.merge.plan_types import MergePlan, PlannedModel, TensorRef, TensorTask

CHUNK_BYTES = 4_000_000
"""Of one input in a chunk of rows. Small enough that the allocator hands the same memory out
again; far below the 16 MB that keep the peak independent of the model."""


class Inputs:
    """All checkpoints and adapters of a plan, opened once each.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: an input that became unreadable since the
            plan was made.
    """

    def __init__(self, models: Sequence[PlannedModel]) -> None:
        self.models = tuple(models)
        self._checkpoints: dict[Path, Checkpoint] = {}
        self._adapters: dict[int, tuple[Adapter, dict[str, str]]] = {}
        try:
            for number, model in enumerate(self.models):
                if model.path not in self._checkpoints:
                    self._checkpoints[model.path] = Checkpoint(model.path)
                if model.adapter is not None:
                    adapter = Adapter(model.adapter)
                    names = adapter.resolve(self._checkpoints[model.path].tensors)
                    self._adapters[number] = (adapter, names)
            self._states = {
                file: _state(file)
                for number in range(len(self.models))
                for file in self._of(number)
            }
        except BaseException:
            self.close()
            raise

    def checkpoint(self, ref: TensorRef) -> Checkpoint:
        """The files that ``ref`` is in."""
        return self._checkpoints[self.models[ref.checkpoint].path]

    def adapter(self, ref: TensorRef) -> tuple[Adapter, str] | None:
        """The adapter that changes ``ref``, and its name for the tensor; None where none does."""
        adapter, names = self._adapters.get(ref.checkpoint, (None, {}))
        own = names.get(ref.tensor)
        return None if adapter is None or own is None else (adapter, own)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file whose content goes into the output."""
        return tuple(self._states)

    def states(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of every file when it was opened: whether a resumed run
        has the same inputs, without reading them."""
        return [(file.name, *state) for file, state in self._states.items()]

    def digest(self, file: Path) -> str:
        """SHA-256 of a file.

        Raises:
            CheckpointError: it changed since it was opened.
        """
        found = sha256(file)
        if _state(file) != self._states[file]:
            raise CheckpointError(f"{file} changed during the merge")
        return found

    def hashes(self, digests: Mapping[Path, str]) -> list[dict[str, Any]]:
        """Per model its name and the SHA-256 of its files, as reports have it."""
        return [
            {
                "model": model.name,
                "files": {file.name: digests[file] for file in self._of(number)},
            }
            for number, model in enumerate(self.models)
        ]

    def _of(self, number: int) -> list[Path]:
        files = list(self._checkpoints[self.models[number].path].files)
        if number in self._adapters:
            files += adapter_files(self._adapters[number][0].path)
        return files

    def close(self) -> None:
        """Close all files."""
        for checkpoint in self._checkpoints.values():
            checkpoint.close()


class Reader:
    """One input of one task, by output rows.

    Args:
        inputs: Where it comes from.
        ref: Which tensor.
        shape: Of the output.
        base: Whose values stand in for NaN and infinities; None lets them through.
    """

    def __init__(
        self, inputs: Inputs, ref: TensorRef, shape: tuple[int, ...], base: Reader | None = None
    ) -> None:
        self.ref = ref
        self.shape = shape
        self._checkpoint = inputs.checkpoint(ref)
        self._base = base
        self._fallback = None if ref.fallback is None else Reader(inputs, ref.fallback, shape, None)
        self.replaced: dict[int, int] = {}
        """First row of a chunk → how many of its entries the base's stand in for."""
        self._folded: Tensor | None = None
        self.info = self._checkpoint.tensors[ref.tensor]
        self.dtype = self.info.dtype
        adapted = inputs.adapter(ref)
        if adapted is not None:
            adapter, name = adapted
            self.dtype = torch.promote_types(self.dtype, torch.float32)
            self._folded = adapter.fold(name, self._checkpoint.read(ref.tensor), dtype=self.dtype)
        if self._fallback is not None:
            self.dtype = torch.promote_types(self.dtype, self._fallback.dtype)

    @property
    def config(self) -> dict[str, Any] | None:
        """Configuration of the model; None without one."""
        return self._checkpoint.config

    def rows(self, start: int, stop: int) -> Tensor:
        """Output rows ``start:stop``; a scalar as one row."""
        found = self._mapped(start, stop) if self.ref.rows is not None else self._own(start, stop)
        if self._base is not None and found.is_floating_point() and not all_finite(found):
            bad = found.isfinite().logical_not_()
            self.replaced[start] = int(bad.sum())
            found = torch.where(bad, self._base.rows(start, stop).to(found.dtype), found)
        return found

    def whole(self) -> Tensor:
        """All of it, in the output's shape."""
        return self.rows(0, row_count(self.shape)).reshape(self.shape)

    def _own(self, start: int, stop: int) -> Tensor:
        if self._folded is not None:
            return self._folded[start:stop]
        if not self.info.shape:
            return self._checkpoint.read(self.ref.tensor).reshape(1)
        return self._checkpoint.rows(self.ref.tensor, start, stop)

    def _mapped(self, start: int, stop: int) -> Tensor:
        """Rows through the vocabulary's map; runs of neighbours are read in one piece."""
        assert self.ref.rows is not None  # noqa: S101 - the caller looked
        index = self.ref.rows[start:stop].numpy()
        out = torch.zeros(stop - start, *self.shape[1:], dtype=self.dtype)
        for first, last in _runs(index):
            row = int(index[first])
            if row >= 0:
                out[first:last] = self._own(row, row + last - first)
            elif self._fallback is not None:
                out[first:last] = self._fallback.rows(start + first, start + last)
        return out


def sha256(file: Path) -> str:
    """SHA-256 of a file, hexadecimal; read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def adapter_files(folder: Path) -> tuple[Path, ...]:
    """The files that make an adapter what it is."""
    return folder / WEIGHTS_FILE, folder / CONFIG_FILE


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _runs(index: np.ndarray) -> Iterator[tuple[int, int]]:
    """Maximal stretches of consecutive rows, or of missing ones."""
    if len(index) == 0:
        return
    before, after = index[:-1], index[1:]
    joined = ((before >= 0) & (after == before + 1)) | ((before < 0) & (after < 0))
    edges = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(index)]
    yield from pairwise(edges)


def row_count(shape: Sequence[int]) -> int:
    """Length of the first dimension; 1 for a scalar."""
    return shape[0] if shape else 1


def chunk_rows(task: TensorTask, readers: Sequence[Reader]) -> int:
    """How many rows are handled at once."""
    width = max(reader.dtype.itemsize for reader in readers)
    nbytes = max(width, task.dtype.itemsize) * math.prod(task.shape)
    return rows_within(nbytes, row_count(task.shape), CHUNK_BYTES)


def identity(plan: MergePlan, inputs: Inputs, version: str) -> str:
    """Everything the output's bytes depend on, as one string; nothing is read but file states."""
    digest = hashlib.sha256()
    for task in plan.tasks:
        digest.update(repr(_plain(task)).encode())
        for ref in (task.base, *task.sources):
            while ref is not None:
                if ref.rows is not None:
                    digest.update(ref.rows.numpy().tobytes())
                ref = ref.fallback
    rest = [
        version,
        plan.recipe_text,
        plan.config,
        plan.seed,
        plan.on_nonfinite,
        sorted(plan.files_to_copy),
        dict(plan.files_to_write),
        [model.name for model in plan.models],
        inputs.states(),
    ]
    digest.update(json.dumps(rest, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _plain(task: TensorTask) -> tuple[object, ...]:
    def named(ref: TensorRef | None) -> object:
        return None if ref is None else (ref.checkpoint, ref.tensor, named(ref.fallback))

    def items(mapping: Mapping[str, object]) -> list[tuple[str, object]]:
        return sorted(mapping.items())

    return (
        task.name,
        str(task.dtype),
        task.shape,
        task.method,
        named(task.base),
        [named(ref) for ref in task.sources],
        items(task.parameters),
        [items(each) for each in task.source_parameters],
    )

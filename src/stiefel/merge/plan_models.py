"""Finding and opening the models of a recipe: headers, configurations, adapters."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stiefel.checkpoint import Checkpoint, CheckpointError, TensorInfo
from stiefel.merge.adapter_config import CONFIG_FILE
from stiefel.merge.peft_adapters import Adapter
from stiefel.merge.plan_layers import Layers, find_layers, is_embedding, is_head
from stiefel.merge.recipe_errors import Problem, shown
from stiefel.merge.recipe_types import ModelRef

# Types of bytes that hold compressed weights rather than numbers to compute with.
_COMPRESSED = frozenset(
    (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
     torch.float8_e8m0fnu)
)  # fmt: skip
# Ends of names that quantisers leave: GPTQ, AWQ, bitsandbytes.
_QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".SCB": "bitsandbytes 8-bit",
    ".absmax": "bitsandbytes 4-bit",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes 4-bit",
    ".weight_scale": "fp8",
    ".weight_scale_inv": "fp8",
}


@dataclass
class Model:
    """One input of a merge, by its headers."""

    name: str
    """As the recipe writes it."""
    path: Path
    checkpoint: Checkpoint
    adapter: Adapter | None = None
    line: int | None = None
    number: int = field(default=-1, compare=False)
    """Index in the plan."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Its configuration; empty without one."""
        return self.checkpoint.config or {}

    @property
    def folder(self) -> Path:
        """Where its other files are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What it holds."""
        return self.checkpoint.tensors

    @cached_property
    def layers(self) -> Layers:
        """Its layers."""
        return find_layers(self.tensors, self.config)

    @cached_property
    def embedding(self) -> str | None:
        """Its table of token embeddings, if one is found."""
        return next((name for name in self.tensors if is_embedding(name)), None)

    @cached_property
    def head(self) -> str | None:
        """Its output matrix; None if there is none in the files."""
        return next((name for name in self.tensors if is_head(name)), None)

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one: as the configuration says, else by the files."""
        said = self.config.get("tie_word_embeddings")
        return said if isinstance(said, bool) else self.head is None

    def quantisation(self) -> str | None:
        """How its weights are quantised, or None if they are plain numbers."""
        said = self.config.get("quantization_config")
        if isinstance(said, dict):
            return str(said.get("quant_method") or "quantization_config")
        for name, info in self.tensors.items():
            if info.dtype in _COMPRESSED:
                return f"{info.dtype} (tensor {shown(name)})".replace("torch.", "")
            for end, what in _QUANTISED.items():
                if name.endswith(end):
                    return f"{what} (tensor {shown(name)})"
        return None


class Models:
    """Opens each model of a recipe once; collects what is wrong with them.

    Args:
        folder: relative paths start here, then at the current folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self._open: dict[tuple[Path, Path | None], Model] = {}
        self._checkpoints: dict[Path, Checkpoint] = {}

    def get(self, ref: ModelRef, base: Model | None = None) -> Model | None:
        """The model that ``ref`` names; None, and a problem, if it cannot be opened.

        With ``base``, ``ref`` is an adapter on it.
        """
        if base is not None:
            if base.adapter is not None:
                self._wrong(ref, "an adapter entry needs a base_model without an adapter")
                return None
            path, adapter = base.path, self._locate(ref, ref.model, ref.revision, adapter=True)
            if adapter is None:
                return None
        else:
            found = self._locate(ref, ref.model, ref.revision)
            adapter = None
            if ref.adapter is not None:
                adapter = self._locate(ref, ref.adapter, ref.adapter_revision, adapter=True)
                if adapter is None:
                    return None
            if found is None:
                return None
            path = found
        key = (path, adapter)
        if key not in self._open:
            model = self._load(ref, path, adapter)
            if model is None:
                return None
            self._open[key] = model
        return self._open[key]

    def locate_adapter(self, ref: ModelRef) -> Path | None:
        """Folder of the adapter that ``ref`` names by itself; None, and a problem, without one."""
        return self._locate(ref, ref.model, ref.revision, adapter=True)

    def close(self) -> None:
        """Close all files."""
        for checkpoint in self._checkpoints.values():
            checkpoint.close()

    def _wrong(self, ref: ModelRef, message: str) -> None:
        self.problems.append(Problem(message, str(ref), ref.line))

    def _locate(
        self, ref: ModelRef, text: str, revision: str | None, adapter: bool = False
    ) -> Path | None:
        try:
            expanded = Path(text).expanduser()
        except RuntimeError:  # ~ of a user who does not exist
            expanded = Path(text)
        places = [self.folder / expanded, Path.cwd() / expanded]
        if revision is None:
            for place in places:
                if place.exists():
                    return Path(os.path.abspath(place))
        cached = cached_snapshot(text, revision)
        if cached is not None:
            return cached
        if revision is not None and places[0].exists():
            self._wrong(ref, f"@{revision} is for models of the hub; {text} is a local path")
            return None
        what = "adapter" if adapter else "model"
        near = _nearby(places[0])
        self._wrong(
            ref,
            f"no {what} at {places[0]}{near}, and none of that name in the local hub cache; "
            "nothing is downloaded here",
        )
        return None

    def _load(self, ref: ModelRef, path: Path, adapter: Path | None) -> Model | None:
        if path not in self._checkpoints:
            if (path / CONFIG_FILE).is_file():
                self._wrong(ref, "is an adapter: write base+adapter, or adapter: PATH")
                return None
            try:
                self._checkpoints[path] = Checkpoint(path)
            except (CheckpointError, OSError) as error:
                self._wrong(ref, str(error))
                return None
        model = Model(str(ref), path, self._checkpoints[path], line=ref.line)
        if (quantised := model.quantisation()) is not None:
            self._wrong(
                ref, f"its weights are quantised: {quantised}. Merge the model before quantisation"
            )
            return None
        if adapter is not None:
            model.adapter = open_adapter(adapter, ref, self.problems, self.notes)
            if model.adapter is None or not self._fits(ref, model):
                return None
        return model

    def _fits(self, ref: ModelRef, model: Model) -> bool:
        """Whether the adapter's tensors are there, in their shapes."""
        assert model.adapter is not None  # noqa: S101 - called where there is one
        try:
            for own, name in model.adapter.resolve(model.tensors).items():
                model.adapter.check_shape(name, model.tensors[own].shape)
        except (KeyError, ValueError) as error:
            self._wrong(ref, str(error.args[0]))
            return False
        return True


def open_adapter(
    path: Path, ref: ModelRef, problems: list[Problem], notes: list[str]
) -> Adapter | None:
    """The adapter in ``path``; None, and a problem, if it cannot be read."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapter = Adapter(path)
        except (OSError, ValueError) as error:
            problems.append(Problem(str(error), str(ref), ref.line))
            return None
    notes += [f"{ref}: {warning.message}" for warning in caught]
    return adapter


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """Folder of a hub model (``owner/name``) that was downloaded before; None if there is none.

    Looks where the hub's client keeps its files: ``HF_HUB_CACHE``, else ``HF_HOME``/hub, else
    ``~/.cache/huggingface/hub``.
    """
    owner, slash, repository = name.partition("/")
    if not slash or "/" in repository or "\\" in name or ".." in name or not (owner and repository):
        return None
    home = os.environ.get("HF_HOME") or os.path.join("~", ".cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    folder = cache / f"models--{owner}--{repository}"
    wanted = revision or "main"
    if "/" in wanted or ".." in wanted:
        return None
    try:
        commit = (folder / "refs" / wanted).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = wanted
    if not commit or "/" in commit or ".." in commit:
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _nearby(path: Path) -> str:
    """A folder beside ``path`` with nearly its name."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, names[:1000], n=1)
    return f" (there is {found[0]})" if found else ""

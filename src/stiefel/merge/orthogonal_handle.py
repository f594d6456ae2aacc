"""Orthogonal adapters of a whole model: put on, taken off, saved, loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.checkpoint import Checkpoint
from stiefel.merge.adapter_config import WEIGHTS_FILE
from stiefel.merge.adapter_files import free_folder, write_adapter
from stiefel.merge.orthogonal_adapter import (
    LayerUpdate,
    OrthogonalAdapter,
    Projection,
    Scheme,
    geometry,
)
from stiefel.merge.shared_basis import Basis

NOTES_FILE = "orthogonal_adapter.json"
COMPACT_FILE = "orthogonal_adapter.safetensors"
FORMAT = 1


class OrthogonalAdapters:
    """The updates of one adapter, by layer; on a model (``model``) or read from disk (None)."""

    def __init__(
        self,
        adapter_id: str | int,
        layers: Mapping[str, LayerUpdate] | None = None,
        *,
        model: nn.Module | None = None,
        modules: Mapping[str, OrthogonalAdapter] | None = None,
    ) -> None:
        self.adapter_id = adapter_id
        self.model = model
        self.modules: dict[str, OrthogonalAdapter] = dict(modules or {})
        self._stored: dict[str, LayerUpdate] = dict(layers or {})
        self._trainable: list[nn.Parameter] = []

    def __repr__(self) -> str:
        return f"OrthogonalAdapters({self.adapter_id!r}, {len(self.layers)} layers)"

    @property
    def layers(self) -> dict[str, LayerUpdate]:
        """Layer name → its update now."""
        return self._stored | {name: module.update for name, module in self.modules.items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """All A, for the optimizer; empty for an adapter read from disk."""
        return (module.A for module in self.modules.values())

    @property
    def attached(self) -> bool:
        """Whether the model's layers are wrapped now."""
        return self.model is not None and any(
            _get(self.model, name) is module for name, module in self.modules.items()
        )

    def attach(self) -> None:
        """Put the adapter (back) on its model and freeze all but A.

        Raises:
            ValueError: read from disk, without a model; or the model's layers are wrapped.
        """
        if self.model is None:
            raise ValueError("this adapter has no model; see load_orthogonal_adapters")
        for name in self.modules:
            if isinstance(_get(self.model, name), OrthogonalAdapter):
                raise ValueError(f"{name} carries an adapter; detach that one first")
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        for name, module in self.modules.items():
            module.A.requires_grad_(True)
            _set(self.model, name, module)

    def detach(self) -> nn.Module:
        """Take the adapter off; returns the model as it was before."""
        if self.model is None or not self.attached:
            raise ValueError(f"adapter {self.adapter_id!r} is not on a model")
        for name, module in self.modules.items():
            _set(self.model, name, module.base)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        """``LAYER.A`` of every layer: B follows from :attr:`metadata`."""
        return {f"{name}.A": layer.a.detach() for name, layer in self.layers.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy what :meth:`state_dict` gave into this adapter, which is on a model.

        Raises:
            KeyError: layers missing or too many, named.
            ValueError: shapes that differ, NaN or infinities.
        """
        own = {f"{name}.A": module.A for name, module in self.modules.items()}
        if own.keys() != state.keys():
            raise KeyError(f"layers that differ: {', '.join(sorted(own.keys() ^ state.keys()))}")
        for key, value in state.items():
            if value.shape != own[key].shape:
                raise ValueError(f"{key} must be {tuple(own[key].shape)}, got {tuple(value.shape)}")
            check_update(key, value)
        with torch.no_grad():
            for key, value in state.items():
                own[key].copy_(value)

    @property
    def metadata(self) -> dict[str, Any]:
        """What others need besides A, as JSON-able values: ids, seeds, columns, widths."""
        return {
            "format": FORMAT,
            "adapter_id": self.adapter_id,
            "layers": {
                name: {
                    "projection": layer.projection.to_json(),
                    "scaling": layer.scaling,
                    "kernel": list(layer.kernel),
                    "kind": layer.kind,
                }
                for name, layer in self.layers.items()
            },
        }

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Only A and :attr:`metadata`, about half of a LoRA file; whole or not at all.

        :func:`load_orthogonal_adapters` reads it. Raises ``FileExistsError`` as there said.
        """
        target = free_folder(folder, overwrite)
        state = self.state_dict()
        for name, value in state.items():
            check_update(name, value)
        write_adapter(
            target, {}, state, weights_file=COMPACT_FILE, texts={NOTES_FILE: self.notes()}
        )
        return target

    def export_peft(self, folder: str | Path, **options: Any) -> Path:
        """A LoRA folder that PEFT loads; see :func:`stiefel.merge.export_peft`."""
        from stiefel.merge.orthogonal_peft import export_peft

        return export_peft(self, folder, **options)

    def notes(self) -> str:
        """:attr:`metadata` as JSON text."""
        return json.dumps(self.metadata, indent=1)


def add_orthogonal_adapters(
    model: nn.Module,
    r: int = 20,
    *,
    adapter_id: str | int,
    target_modules: Sequence[str] | str,
    scheme: Scheme = "columns",
    basis: Basis = "dct",
    seed: int = 0,
    slot: int | None = None,
    alpha: float | int | None = None,
) -> OrthogonalAdapters:
    """Wrap layers of a model in :class:`OrthogonalAdapter` and freeze everything else.

    Args:
        model: changed in place; :meth:`OrthogonalAdapters.detach` undoes it.
        target_modules: names, or ends of names (``"q_proj"``), of layers; or one regular
            expression that must match a whole name.
        r, adapter_id, scheme, basis, seed, slot, alpha: of :class:`OrthogonalAdapter`. All people
            who want to merge use one seed and basis.

    Returns:
        The handle. Give ``handle.parameters()`` to the optimizer.

    Raises:
        ValueError: nothing matches, or one of the names does not; r or slot does not fit a layer,
            named; a layer carries an adapter already.
        TypeError: a named layer of a kind that cannot be adapted.

    Source: arXiv 2312.02432; fresh columns in every layer are this library's choice, so that a
    shared column in one layer is not one in all.
    """
    chosen = _targets(model, target_modules)
    with _flags_kept(model):
        modules = {
            name: OrthogonalAdapter(
                layer, r, adapter_id=adapter_id, scheme=scheme, basis=basis, seed=seed, slot=slot,
                alpha=alpha, layer=name,
            )
            for name, layer in chosen.items()
        }  # fmt: skip
    handle = OrthogonalAdapters(adapter_id, model=model, modules=modules)
    handle.attach()
    return handle


def load_orthogonal_adapters(
    folder: str | Path, model: nn.Module | None = None
) -> OrthogonalAdapters:
    """Read what :meth:`OrthogonalAdapters.save` or ``export_peft`` wrote.

    Args:
        folder: either kind of folder.
        model: put the adapter on this model, to train on or to use; None: only read.

    Raises:
        FileNotFoundError: no adapter of this kind in the folder.
        ValueError: another format, columns or shapes that contradict the notes, NaN; layers that
            the model lacks or has in another shape.
    """
    folder = Path(folder)
    if not (folder / NOTES_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {NOTES_FILE}: not an orthogonal adapter")
    notes = json.loads((folder / NOTES_FILE).read_text(encoding="utf-8"))
    if notes.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {notes.get('format')}, this version reads {FORMAT}")
    read = _compact if (folder / COMPACT_FILE).is_file() else _exported
    tensors = read(folder, notes["layers"])
    layers = {}
    for name, entry in notes["layers"].items():
        projection = Projection.from_json(entry["projection"])
        check_update(name, tensors[name])
        layers[name] = LayerUpdate(
            projection, tensors[name], entry["scaling"], tuple(entry["kernel"]), entry["kind"]
        )
    if model is None:
        return OrthogonalAdapters(notes["adapter_id"], layers)
    with _flags_kept(model):
        modules = {name: _wrap(model, name, layer) for name, layer in layers.items()}
    handle = OrthogonalAdapters(notes["adapter_id"], model=model, modules=modules)
    handle.attach()
    return handle


def check_update(name: str, a: Tensor) -> None:
    """Raise ``ValueError`` for an A with NaN or infinities."""
    if not bool(a.isfinite().all()):
        raise ValueError(f"A of {name} must be finite: training has diverged there")


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """A layer that is wrapped is frozen; :meth:`attach` notes what was trainable before."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _compact(folder: Path, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    with Checkpoint(folder / COMPACT_FILE) as file:
        return {name: file.read(f"{name}.A") for name in layers}


def _exported(folder: Path, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    from stiefel.merge.peft_adapters import Adapter

    adapter = Adapter(folder)
    found = {}
    for name, entry in layers.items():
        embedding = entry["kind"] == "embedding"
        part = "lora_embedding_B" if embedding else "lora_B.weight"
        found[name] = adapter.tensor(name, part).flatten(1)
        down = adapter.tensor(name, "lora_embedding_A" if embedding else "lora_A.weight")
        b = Projection.from_json(entry["projection"]).matrix()
        if float((down.flatten(1).T.float() - b).abs().max()) > 1e-5:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: the down-projection of {name} is not the shared one; "
                "it was trained, so the adapter is an ordinary LoRA now"
            )
    return found


def _wrap(model: nn.Module, name: str, layer: LayerUpdate) -> OrthogonalAdapter:
    p = layer.projection
    base = _get(model, name)
    if isinstance(base, OrthogonalAdapter):
        raise ValueError(f"{name} carries an adapter; detach that one first")
    kind, n, m, _ = geometry(base, name)
    if (kind, n, m) != (layer.kind, len(layer.a), p.m):
        raise ValueError(
            f"{name} is {kind} {n} × {m} in the model, {layer.kind} {len(layer.a)} × {p.m} in the "
            "adapter"
        )
    module = OrthogonalAdapter(
        base, p.r, adapter_id=p.adapter_id, scheme=p.scheme, basis=p.basis, seed=p.seed,
        slot=p.slot, alpha=layer.scaling * p.r, layer=p.layer,
    )  # fmt: skip
    with torch.no_grad():
        module.A.copy_(layer.a)
    return module


def _targets(model: nn.Module, wanted: Sequence[str] | str) -> dict[str, nn.Module]:
    """Layers whose names are asked for."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(wanted, str):
        chosen = [name for name in names if re.fullmatch(wanted, name)]
        unmet = [] if chosen else [wanted]
    else:
        ends = {name: [w for w in wanted if name == w or name.endswith(f".{w}")] for name in names}
        chosen = [name for name in names if ends[name]]
        unmet = sorted(set(wanted) - {w for found in ends.values() for w in found})
        unmet = unmet or ([] if wanted else ["(none given)"])
    if unmet:
        near = sorted({name.rpartition(".")[2] for name in names})[:12]
        raise ValueError(
            f"target_modules {', '.join(unmet)} match no layer of the model; its layers end in "
            f"{', '.join(near)}"
        )
    for name in chosen:
        if isinstance(_get(model, name), OrthogonalAdapter):
            raise ValueError(f"{name} carries an adapter; detach that one first")
    return {name: _get(model, name) for name in chosen}


def _get(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no layer {name}") from None


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)

"""Whose ΔW the OrthoReg penalty is about: dense parameters and LoRA layers, whole or sharded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from stiefel.linalg._checks import compute_dtype
from stiefel.regularize.orthoreg_loss import distance, lowrank_distance

Params = str | Sequence[str] | Callable[[str, Tensor], bool]

# Modules that hold another one, and that their names leave no trace of in a plain checkpoint.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
# Factors of LoRA layers, PEFT's and others': no ΔW by themselves.
_FACTOR = re.compile(r"(^|\.)lora_")
_PARALLEL = ("DistributedDataParallel", "DataParallel")


@dataclass
class DenseUpdate:
    """ΔW = W − W0 of one parameter, read at each use; beyond two dimensions [out, rest]."""

    name: str
    module: nn.Module
    attribute: str
    held: Tensor
    """The parameter as found. FSDP2 has it replaced by the gathered one for some of the time."""
    reference: Tensor

    def parameter(self) -> Tensor:
        """W as it is now, sharded where it was."""
        found = getattr(self.module, self.attribute)
        if not is_sharded(self.held) or is_sharded(found):
            self.held = found
        return self.held

    def delta(self) -> Tensor:
        """ΔW, whole, ``[out, in]``, at least float32."""
        now, start = self.parameter(), self.reference
        return _difference(whole(now), whole(start)).flatten(1)

    def loss(self, power: int, target: str) -> Tensor:
        """The loss of this ΔW; every process of a mesh gets that of the whole."""
        now = self.parameter()
        if not is_sharded(now):
            return distance(self.delta(), power, target)
        rows = now.shape[0] < math.prod(now.shape[1:])
        groups = _summing_groups(now, rows)
        if groups is None:
            return distance(self.delta(), power, target)
        self.reference = _shard_like(self.reference, now)
        delta = _difference(_local(now), _local(self.reference)).flatten(1)
        return distance(delta, power, target, rows, groups)


@dataclass
class LowRankUpdate:
    """ΔW = s·B·A of one adapter of a LoRA layer, read at each use."""

    name: str
    module: Any
    adapter: str

    @property
    def scaling(self) -> float:
        """s as the layer has it now."""
        return float(self.module.scaling[self.adapter])

    def factors(self) -> tuple[Tensor, Tensor]:
        """B ``[out, r]`` and A ``[r, in]``, whole: together no more than a forward pass gathers."""
        b, a = self.weights()
        return whole(b).flatten(1), whole(a).flatten(1)

    def weights(self) -> tuple[Tensor, Tensor]:
        """The two parameters."""
        return self.module.lora_B[self.adapter].weight, self.module.lora_A[self.adapter].weight

    def loss(self, power: int, target: str) -> Tensor:
        """The loss of this ΔW."""
        return lowrank_distance(*self.factors(), self.scaling, power, target)


Update = DenseUpdate | LowRankUpdate


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, without importing what defines it: that takes long."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """The tensor; gathered from all its processes if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyrefly: ignore


def plain_name(name: str) -> str:
    """A parameter's name without what compilation and checkpointing wrap around it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def find_updates(
    model: nn.Module, params: Params, reference: Mapping[str, Tensor] | None
) -> tuple[dict[str, Update], dict[str, str]]:
    """The updates that ``params`` asks for, by name, and why other trainable matrices are not.

    Raises:
        TypeError: a chosen parameter is not real floating point; FSDP1.
        ValueError: nothing matches, or a pattern matches no matrix; ``reference`` lacks a name or
            has another shape.
        NotImplementedError: a chosen adapter is a variant of LoRA whose ΔW is not s·B·A.
    """
    while type(model).__name__ in _PARALLEL:
        model = model.module  # pyrefly: ignore
    for module in model.modules():
        if any(c.__name__ == "FullyShardedDataParallel" for c in type(module).__mro__):
            raise TypeError(
                "model is wrapped in FullyShardedDataParallel, which flattens parameters: their "
                "columns are lost; use torch.distributed.fsdp.fully_shard"
            )
    lora = list(_lora_layers(model))
    parameters = list(_dense_parameters(model))
    dense = [d for d in parameters if not _FACTOR.search(d[0])]
    matrices = [name for name, _, _, p in dense if p.ndim >= 2]
    wanted = _selection(params, [u.name for u in lora] + matrices)
    known = {id(w) for update in lora for w in update.weights()}
    skipped = {
        name: "a factor of a LoRA layer that is not active or not known"
        for name, _, _, p in parameters
        if _FACTOR.search(name) and id(p) not in known and p.ndim >= 2
    }
    found: dict[str, Update] = {}
    for update in lora:
        b, a = update.weights()
        if not (b.requires_grad or a.requires_grad):
            skipped[update.name] = "frozen"
        elif wanted(update.name, b, a.ndim == 2):
            _check_variant(update)
            found[update.name] = update
    for name, module, attribute, p in dense:
        if p.ndim < 2:
            continue
        if not p.requires_grad:
            skipped[name] = "frozen"
            continue
        usual = p.ndim == 2 and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if wanted(name, p, usual):
            start = _reference(name, p, reference)
            found[name] = DenseUpdate(name, module, attribute, p, start)
        else:
            skipped[name] = "an embedding" if p.ndim == 2 and not usual else "not chosen"
    if not found:
        raise ValueError(_nothing(params, model))
    return found, skipped


def _nothing(params: Params, model: nn.Module) -> str:
    """What to say when no update was found."""
    asked = params if isinstance(params, str) else "that params chooses"
    if not isinstance(params, str) and not callable(params):
        asked = f"among {', '.join(params)}"
    there = [f"{n} {tuple(p.shape)}" for n, p in model.named_parameters() if p.requires_grad]
    text = f"model has no trainable matrix {asked} and no trainable LoRA layer"
    if there:
        text += f"; trainable are {', '.join(there[:8])}{' …' if len(there) > 8 else ''}"
    tensors = [*model.parameters(), *model.buffers()]
    if any(not t.dtype.is_floating_point and t.ndim >= 2 for t in tensors) or any(
        "quantized" in type(m).__module__ for m in model.modules()
    ):
        text += "; it is quantised already: train LoRA adapters on it, or penalise before"
    return text


def _dense_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, module, attribute and parameter, each parameter once.

    A parameter shared with an embedding counts as the embedding's, whichever comes first.
    """
    modules = list(model.named_modules())
    embeddings = {
        id(p)
        for _, m in modules
        if isinstance(m, nn.Embedding | nn.EmbeddingBag)
        for p in m.parameters(recurse=False)
    }
    seen = set()
    for path, module in modules:
        for attribute, p in module.named_parameters(recurse=False):
            late = id(p) in embeddings and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
            if id(p) in seen or late:
                continue
            seen.add(id(p))
            yield plain_name(f"{path}.{attribute}" if path else attribute), module, attribute, p


def _lora_layers(model: nn.Module) -> Iterator[LowRankUpdate]:
    """Every active adapter of every layer built as PEFT builds its LoRA layers."""
    for path, module in model.named_modules():
        parts = (getattr(module, name, None) for name in ("lora_A", "lora_B"))
        if not all(isinstance(part, nn.ModuleDict) for part in parts):
            continue
        layer: Any = module
        for adapter in layer.lora_A:
            if adapter in getattr(layer, "active_adapters", list(layer.lora_A)):
                yield LowRankUpdate(plain_name(f"{path}.{adapter}"), layer, adapter)


def _check_variant(update: LowRankUpdate) -> None:
    variants = getattr(update.module, "lora_variant", {})
    magnitudes = getattr(update.module, "lora_magnitude_vector", {})
    if update.adapter in variants or update.adapter in magnitudes:
        kind = type(variants[update.adapter]).__name__ if update.adapter in variants else "DoRA"
        raise NotImplementedError(
            f"{update.name} is a variant of LoRA ({kind}), whose ΔW is not s·B·A: leave it out by "
            "params"
        )


def _selection(params: Params, names: Sequence[str]) -> Callable[[str, Tensor, bool], bool]:
    """``(name, tensor, usual) -> chosen``."""
    if isinstance(params, str):
        if params != "2d":
            raise ValueError(f'params must be "2d", a list of patterns or callable, got {params!r}')
        return lambda name, tensor, usual: usual

    if callable(params):
        ask = params
        return lambda name, tensor, usual: bool(ask(name, tensor))
    patterns = list(params)
    idle = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
    if idle or not patterns:
        raise ValueError(
            f"params must be patterns of names in the model, got {idle}, which match no matrix; "
            f"there are {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
        )
    return lambda name, tensor, usual: any(fnmatchcase(name, p) for p in patterns)


def _reference(name: str, p: Tensor, reference: Mapping[str, Tensor] | None) -> Tensor:
    """W0 of one parameter, a copy of what it is now unless one is given."""
    if not p.is_floating_point():
        raise TypeError(f"{name} must be real floating point, got {p.dtype}")
    if reference is None:
        return p.detach().clone()
    if name not in reference:
        near = [n for n in reference if n.endswith(name.rsplit(".", 2)[-1])][:4]
        raise ValueError(
            f"reference has no {name!r}" + (f"; it has {', '.join(near)}" * bool(near))
        )
    start = reference[name]
    if start.shape != p.shape:
        raise ValueError(
            f"reference[{name!r}] must have shape {tuple(p.shape)}, got {tuple(start.shape)}"
        )
    if not start.is_floating_point():
        raise TypeError(f"reference[{name!r}] must be real floating point, got {start.dtype}")
    return start.detach()


def _difference(now: Tensor, start: Tensor) -> Tensor:
    dtype = compute_dtype(now.dtype)
    return now.to(dtype) - start.to(device=now.device, dtype=dtype)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local()  # pyrefly: ignore


def _summing_groups(p: Tensor, rows: bool) -> tuple[Any, ...] | None:
    """Process groups whose shares add up to ΔWΔWᵀ (``rows``) or ΔWᵀΔW.

    None where the sharding is another one: then ΔW, the smaller thing to send, is gathered.
    """
    groups = []
    for axis, placement in enumerate(p.placements):  # pyrefly: ignore
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None or (dim > 0) is not rows:
            return None
        groups.append(p.device_mesh.get_group(axis))  # pyrefly: ignore
    return tuple(groups)


def _shard_like(start: Tensor, p: Tensor) -> Tensor:
    """W0 cut as W is."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = p.device_mesh, p.placements  # pyrefly: ignore
    if not is_sharded(start):
        return distribute_tensor(start.to(p.device), mesh, placements, src_data_rank=None)
    if start.placements != placements or start.device_mesh != mesh:  # pyrefly: ignore
        return start.redistribute(mesh, placements)  # pyrefly: ignore
    return start

"""Merging LoRA adapters into one: every method acts on the updates ΔW = s B A themselves.

Adding the factors instead, Σ wᵢ Aᵢ and Σ wᵢ Bᵢ, gives cross terms Bᵢ Aⱼ that no adapter had. The
exact sum of updates has the rank Σ rᵢ: the factors side by side.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stiefel.checkpoint import Checkpoint
from stiefel.linalg._checks import compute_dtype
from stiefel.merge.adapter_config import KEY_PREFIX
from stiefel.merge.adapter_factors import LowRank, concatenate, factorize, reduce_rank
from stiefel.merge.adapter_files import factor_tensors, free_folder, rank_settings, write_adapter
from stiefel.merge.dare import dare
from stiefel.merge.peft_adapters import Adapter
from stiefel.merge.ties import ties

METHODS = ("linear", "cat", "svd", "ties", "dare")
# What decides on which modules an adapter acts; kept where all agree.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class MergedModule:
    """What became of one module."""

    rank: int
    error: float
    """||written - wanted|| / ||wanted|| in the Frobenius norm; rounding is not counted."""


@dataclass(frozen=True)
class AdapterMerge:
    """What :func:`merge_lora_adapters` wrote."""

    folder: Path
    modules: Mapping[str, MergedModule]

    @property
    def error(self) -> float:
        """The largest error of a module."""
        return max(module.error for module in self.modules.values())


@torch.no_grad()
def merge_lora_adapters(
    paths: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float | int] | float | int = 1.0,
    method: str = "linear",
    rank: int | None = None,
    *,
    density: float | None = None,
    seed: int = 0,
    base: str | Path | Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> AdapterMerge:
    """Merge LoRA adapters of one base model into a LoRA adapter that PEFT loads as it is.

    ======== ===================================================== =========================
    method   ΔW                                                    rank
    ======== ===================================================== =========================
    cat      Σ wᵢ ΔWᵢ, exactly                                     Σ rᵢ
    linear   Σ wᵢ ΔWᵢ, exactly unless ``rank`` is given            min(Σ rᵢ, out, in), ``rank``
    svd      nearest to Σ wᵢ ΔWᵢ                                   ``rank``; largest rᵢ
    ties     sign election on the dense ΔWᵢ                        nearest of ``rank``; Σ rᵢ
    dare     Σ wᵢ mᵢ ⊙ ΔWᵢ / density, random masks                 nearest of ``rank``; Σ rᵢ
    ======== ===================================================== =========================

    Modules that an adapter lacks count as zero there. Only one module is in memory at a time,
    besides the result's factors; only ties and dare form ΔW densely.

    Args:
        paths: adapter folders.
        out: folder to write; appears whole or not at all.
        weights: one an adapter, or one for all. No normalisation.
        rank: see above; modules too small for it get what they hold.
        density: share of entries kept by ties and dare, in (0, 1]; needed there.
        seed: of dare's masks and of the approximation of large dense updates.
        base: the base model (safetensors file or folder, or its tensors). Needed where adapters
            replace tensors whole (modules_to_save, biases): their differences to it are merged.
        dtype: of the file; None: float32, or float64 where an input is.
        overwrite: replace ``out``.

    Returns:
        Rank and error of every module.

    Raises:
        ValueError: nothing to merge, an unknown method, weights, rank or density that do not fit;
            DoRA (its rows are rescaled, no sum of updates does that); shapes of a module differ;
            tensors that are replaced but no base; NaN or infinities.
        TypeError: an OFT adapter (its rotations are merged otherwise).
        FileNotFoundError, FileExistsError: inputs that are not there, an output that is.

    Warns:
        UserWarning: the adapters name different base models.
    """
    factors = _check_arguments(paths, weights, method, rank, density)
    folder = free_folder(out, overwrite)
    adapters = [Adapter(path) for path in paths]
    _check_adapters(adapters)
    replaced = sorted({name for adapter in adapters for name in adapter.replaced})
    if replaced and base is None:
        raise ValueError(
            f"base is needed: the adapters replace {', '.join(replaced)} whole, and only the "
            "differences to the base can be merged"
        )
    job = _Job(adapters, factors, method, rank, density, seed)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, MergedModule] = {}
    biased = any(adapter.config.get("lora_bias") for adapter in adapters)
    for module in sorted({m for adapter in adapters for m in adapter.modules}):
        update, error = job.merge(module)
        target = dtype or compute_dtype(update.up.dtype)
        tensors |= factor_tensors(module, update, target)
        if biased:
            tensors[f"{KEY_PREFIX}{module}.lora_B.bias"] = job.bias(module, update).to(target)
        modules[module] = MergedModule(update.rank, error)
    if replaced and base is not None:
        tensors |= job.replacements(replaced, base, dtype)
    config = _settings(adapters, {name: m.rank for name, m in modules.items()}, biased)
    write_adapter(folder, config, tensors)
    return AdapterMerge(folder, modules)


def _check_arguments(
    paths: Sequence[str | Path],
    weights: Sequence[float | int] | float | int,
    method: str,
    rank: int | None,
    density: float | None,
) -> list[float]:
    """One finite weight a path; raises for anything that does not fit."""
    if isinstance(paths, (str, Path)) or not paths:
        raise ValueError(f"paths must be a list of at least one folder, got {paths!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if isinstance(weights, (int, float)):
        weights = [weights] * len(paths)
    if len(weights) != len(paths):
        raise ValueError(f"{len(paths)} paths need as many weights, got {len(weights)}")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights must be finite, got {list(weights)}")
    if rank is not None and (method == "cat" or rank < 1):
        raise ValueError(
            f"rank must be at least 1, and None for cat, which keeps all factors; got {rank}"
        )
    if (density is None) != (method not in ("ties", "dare")):
        raise ValueError(f"density is for ties and dare and needed there, got {density}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    return [float(w) for w in weights]


def _check_adapters(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if adapter.kind != "LORA":
            raise TypeError(f"{adapter.path} is an {adapter.kind} adapter, LoRA is needed")
        scaled = [module for module in adapter.modules if adapter.is_dora(module)]
        if scaled:
            raise ValueError(
                f"{adapter.path} rescales the outputs of {', '.join(scaled)} (DoRA), which no sum "
                "of updates does; fold each adapter into the base and merge the models"
            )
    for field, what in (("base_model_name_or_path", "base models"), ("task_type", "tasks")):
        named = {str(adapter.config.get(field)) for adapter in adapters}
        if len(named) > 1:
            warnings.warn(
                f"the adapters name different {what}: {', '.join(sorted(named))}", stacklevel=3
            )


@dataclass(frozen=True)
class _Job:
    """The merge of one module after another."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    method: str
    rank: int | None
    density: float | None
    seed: int

    def merge(self, module: str) -> tuple[LowRank, float]:
        """The merged update of scaling 1 and its relative error."""
        pairs = [
            (adapter.low_rank(module), weight)
            for adapter, weight in zip(self.adapters, self.weights, strict=True)
            if module in adapter.modules
        ]
        parts = [part for part, _ in pairs]
        if len({(part.shape, part.embedding) for part in parts}) > 1:
            shapes = ", ".join(str(part.shape) for part in parts)
            raise ValueError(f"the adapters of {module} have different shapes: {shapes}")
        if self.method in ("ties", "dare"):
            return self._dense(module, pairs)
        whole = concatenate(parts, [weight for _, weight in pairs])
        rank = self.rank
        if self.method == "svd" and rank is None:
            rank = max(part.rank for part in parts)
        if self.method == "linear" and rank is None:
            rank = min(whole.rank, whole.up.shape[0], whole.down.shape[1])
        if rank is None or (rank >= whole.rank):
            return whole, 0.0
        return reduce_rank(whole, rank)

    def _dense(self, module: str, pairs: Sequence[tuple[LowRank, float]]) -> tuple[LowRank, float]:
        parts = [part for part, _ in pairs]
        deltas = [part.delta().flatten(1) for part in parts]
        name = f"{module}.weight"
        wanted = self.mix(name, deltas, [weight for _, weight in pairs])
        rank = self.rank or sum(part.rank for part in parts)
        generator = torch.Generator().manual_seed(self.seed)
        up, down = factorize(wanted, rank, generator)
        size = torch.linalg.vector_norm(wanted)
        error = torch.linalg.vector_norm(wanted.addmm_(up, down, alpha=-1))
        update = LowRank(up, down, 1.0, parts[0].kernel, parts[0].embedding)
        return update, float(error / size) if size > 0 else 0.0

    def mix(self, name: str, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The merged difference of tensors given as differences."""
        zero = torch.zeros_like(deltas[0])
        density = 1.0 if self.density is None else self.density
        models = [{name: delta} for delta in deltas]
        if self.method == "ties":
            mixed = ties({name: zero}, models, weights, density=density)
        elif self.method == "dare":
            mixed = dare({name: zero}, models, weights, density=density, seed=self.seed)
        else:
            return sum((w * d for w, d in zip(weights, deltas, strict=True)), zero)
        return mixed[name]  # pyrefly: ignore

    def bias(self, module: str, update: LowRank) -> Tensor:
        """The merged shift of a module's output; zero where no adapter has one."""
        if update.embedding:
            raise ValueError(f"{module} is an embedding, and other modules have a lora_B.bias")
        shifts, weights = [], []
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            if "lora_B.bias" in adapter.parts(module):
                shift = adapter.tensor(module, "lora_B.bias")
                shifts.append(shift.to(update.up.dtype) * adapter.low_rank(module).scaling)
                weights.append(weight)
        if not shifts:
            return update.up.new_zeros(update.up.shape[0])
        return self.mix(f"{module}.bias", shifts, weights)

    def replacements(
        self, names: Sequence[str], base: str | Path | Mapping[str, Tensor], dtype: Any
    ) -> dict[str, Tensor]:
        """Base plus merged differences, under the key of the first adapter that has one."""
        if isinstance(base, Mapping):
            stored, lookup = base, base.__getitem__
        else:
            checkpoint = Checkpoint(base)
            stored, lookup = checkpoint.tensors, checkpoint.read
        missing = [name for name in names if name not in stored]
        if missing:
            raise ValueError(f"the base lacks {', '.join(missing)}, which the adapters replace")
        result = {}
        for name in names:
            origin = lookup(name)
            work = compute_dtype(origin.dtype)
            deltas, weights, key = [], [], ""
            for adapter, weight in zip(self.adapters, self.weights, strict=True):
                if name in adapter.replaced:
                    adapter.check_shape(name, origin.shape)
                    deltas.append(adapter.replacement(name).to(work) - origin.to(work))
                    weights.append(weight)
                    key = key or adapter.key(name)
            merged = origin.to(work) + self.mix(name, deltas, weights)
            result[key] = merged.to(dtype or work)
        return result


def _settings(
    adapters: Sequence[Adapter], ranks: Mapping[str, int], biased: bool
) -> dict[str, Any]:
    """adapter_config.json of the result: the first adapter's, where it still holds."""
    config = dict(adapters[0].config) | rank_settings(ranks)
    targets = [{field: adapter.config.get(field) for field in _TARGETS} for adapter in adapters]
    for entry in targets:
        if isinstance(entry["target_modules"], list):
            entry["target_modules"] = sorted(entry["target_modules"])
    if any(entry != targets[0] for entry in targets):
        config |= dict.fromkeys(_TARGETS)
        config["target_modules"] = sorted(ranks)
    saved = sorted({s for a in adapters for s in a.config.get("modules_to_save") or ()})
    biases = sorted({a.config.get("bias", "none") for a in adapters} - {"none"})
    config["modules_to_save"] = saved or None
    config["bias"] = "none" if not biases else biases[0] if len(biases) == 1 else "all"
    config["lora_bias"] = biased
    config["inference_mode"] = True
    return config

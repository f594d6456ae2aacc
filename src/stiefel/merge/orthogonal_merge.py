"""Summing orthogonal adapters, and how much they meet.

Merge (arXiv 2312.02432): W* = W + Σ_i λ_i s_i A_i B_iᵀ, a sum and not an average; exact as one
update of rank Σ r_i. Crosstalk of two updates: ||ΔW_i ΔW_jᵀ|| / (||ΔW_i|| ||ΔW_j||), Frobenius
norms, between 0 and 1 (the normalisation is this library's).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stiefel.linalg._checks import compute_dtype
from stiefel.merge.adapter_factors import LowRank, concatenate
from stiefel.merge.orthogonal_adapter import LayerUpdate, OrthogonalAdapter
from stiefel.merge.orthogonal_handle import OrthogonalAdapters, check_update

# λ of all merges of the paper, three concepts at a time.
PAPER_WEIGHT = 0.6


class MergedAdapters:
    """A sum of adapters as one low-rank update a layer."""

    def __init__(self, layers: Mapping[str, LowRank], kinds: Mapping[str, str]) -> None:
        self.layers = dict(layers)
        self.kinds = dict(kinds)

    def __repr__(self) -> str:
        return f"MergedAdapters({len(self.layers)} layers)"

    @torch.no_grad()
    def fold_into(self, model: nn.Module) -> nn.Module:
        """Add every update to the weight of its layer, in place, rounded once; returns ``model``.

        Raises:
            ValueError: a layer is missing, has another shape, or still carries an adapter.
        """
        weights = {name: self._weight(model, name) for name in self.layers}
        for name, update in self.layers.items():
            weight = weights[name]
            turned = self.kinds[name] == "turned"
            work = compute_dtype(weight.dtype)
            up, down = (x.to(weight.device, work) for x in (update.up, update.down))
            matrix = weight.T if turned else weight.flatten(1)
            total = torch.addmm(matrix.to(work), up, down, alpha=update.scaling)
            weight.copy_(total.T if turned else total.reshape(weight.shape))
        return model

    def export_peft(self, folder: str | Path, **options: Any) -> Path:
        """A LoRA folder of rank Σ r_i; see :func:`stiefel.merge.export_peft`."""
        from stiefel.merge.orthogonal_peft import export_peft

        return export_peft(self, folder, **options)

    def _weight(self, model: nn.Module, name: str) -> Tensor:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the model has no layer {name}") from None
        if isinstance(layer, OrthogonalAdapter):
            raise ValueError(f"{name} carries adapter {layer.projection.adapter_id!r}; detach it")
        weight = layer.weight
        shape = self.layers[name].shape
        if self.kinds[name] == "turned":
            shape = shape[::-1]
        if not isinstance(weight, Tensor) or tuple(weight.shape) != shape:
            raise ValueError(f"{name} must have a weight of shape {shape} to fold into")
        return weight


def merge_adapters(
    handles: Sequence[OrthogonalAdapters],
    weights: float | int | Sequence[float | int] = PAPER_WEIGHT,
    mode: Literal["cat", "fold"] = "cat",
    *,
    model: nn.Module | None = None,
    force: bool = False,
) -> MergedAdapters | nn.Module:
    """Sum adapters that were trained apart: λ₁ s₁ A₁ B₁ᵀ + λ₂ s₂ A₂ B₂ᵀ + …

    Args:
        handles: any subset, in any order.
        weights: λ, one for all or one each. A sum, not an average: they need not add up to 1.
        mode: ``"cat"`` gives the sum as one low-rank update; ``"fold"`` adds it to a model's
            weights, in place, and returns the model (adapters on it are taken off first).
        model: to fold into; None: that of the first handle that has one.
        force: sum adapters that were not made for each other; measure :func:`crosstalk` then.

    Raises:
        ValueError: no adapters, weights that do not fit or are not finite; A with NaN; layers of
            one name that differ in shape; without ``force``: other seeds, bases or schemes, or
            slots that overlap, both values named; no model to fold into.

    Warns:
        UserWarning: an ``adapter_id`` comes twice: those two share every column.

    Source: arXiv 2312.02432, merging; λ = 0.6 there.
    """
    if not handles:
        raise ValueError("handles must hold at least one adapter")
    factors = [weights] * len(handles) if isinstance(weights, (int, float)) else list(weights)
    if len(factors) != len(handles) or not all(math.isfinite(w) for w in factors):
        raise ValueError(f"{len(handles)} adapters need as many finite weights, got {weights}")
    if mode not in ("cat", "fold"):
        raise ValueError(f"mode must be 'cat' or 'fold', got {mode!r}")
    target = model or next((h.model for h in handles if h.model is not None), None)
    if mode == "fold" and target is None:
        raise ValueError("model is needed to fold into: none of the adapters is on one")
    twice = [i for i, count in Counter(h.adapter_id for h in handles).items() if count > 1]
    if twice:
        warnings.warn(f"merging the same adapter_id twice: {twice}", stacklevel=2)
    layers: dict[str, list[tuple[LayerUpdate, float]]] = {}
    for handle, factor in zip(handles, factors, strict=True):
        for name, layer in handle.layers.items():
            layers.setdefault(name, []).append((layer, float(factor)))
    for name, pairs in layers.items():
        _check_layer(name, [layer for layer, _ in pairs], force)
    sums = {
        name: concatenate([layer.low_rank() for layer, _ in pairs], [w for _, w in pairs])
        for name, pairs in layers.items()
    }
    merged = MergedAdapters(sums, {name: pairs[0][0].kind for name, pairs in layers.items()})
    if mode == "cat" or target is None:
        return merged
    for handle in handles:
        if handle.model is target and handle.attached:
            handle.detach()
    return merged.fold_into(target)


def crosstalk(first: OrthogonalAdapters, second: OrthogonalAdapters) -> dict[str, float]:
    """||ΔW₁ΔW₂ᵀ|| / (||ΔW₁|| ||ΔW₂||) of every layer that both adapt, in [0, 1]; float64.

    0 where the row spaces are orthogonal, or an update is zero. From the factors alone, with
    A = Q R: ||R₁ (B₁ᵀB₂) R₂ᵀ||, so no ``[n, m]`` matrix arises.

    Raises:
        ValueError: layers of one name that differ in width, A with NaN.
    """
    found = {}
    for name in first.layers.keys() & second.layers.keys():
        pair = first.layers[name], second.layers[name]
        _check_shapes(name, pair)
        (core1, b1), (core2, b2) = map(_core, pair)
        sizes = [torch.linalg.matrix_norm(c @ b.T) for c, b in ((core1, b1), (core2, b2))]
        meet = torch.linalg.matrix_norm(core1 @ (b1.T @ b2) @ core2.T)
        size = float(sizes[0] * sizes[1])
        found[name] = float(meet) / size if size > 0 else 0.0
    return dict(sorted(found.items()))


def shared_columns(first: OrthogonalAdapters, second: OrthogonalAdapters) -> dict[str, int]:
    """How many columns of the basis two adapters share in every layer that both adapt.

    That is ||B₁ᵀB₂||²_F. Gaussian layers have no columns and are left out; so are layers whose
    bases differ, of which this number says nothing.
    """
    found = {}
    for name in first.layers.keys() & second.layers.keys():
        one, other = (h.layers[name].projection for h in (first, second))
        if one.columns is None or other.columns is None or _basis(one) != _basis(other):
            continue
        found[name] = len(set(one.columns) & set(other.columns))
    return dict(sorted(found.items()))


def _core(layer: LayerUpdate) -> tuple[Tensor, Tensor]:
    """R of A = Q R, and B; float64."""
    a = layer.a.detach().double()
    return torch.linalg.qr(a)[1], layer.b(torch.float64)


def _basis(projection: Any) -> tuple[Any, ...]:
    return projection.m, projection.basis, projection.seed


def _check_shapes(name: str, layers: Sequence[LayerUpdate]) -> None:
    for layer in layers:
        check_update(name, layer.a)
    shapes = {(x.kind, len(x.a), x.projection.m, x.kernel) for x in layers}
    if len(shapes) > 1:
        told = " and ".join(f"{kind} {n} × {m}" for kind, n, m, _ in sorted(shapes))
        raise ValueError(f"adapters of layer {name} have different shapes: {told}")


def _check_layer(name: str, layers: Sequence[LayerUpdate], force: bool) -> None:
    """Raise where the updates of a layer were not made to be summed."""
    _check_shapes(name, layers)
    if force:
        return
    first = layers[0].projection
    for layer in layers[1:]:
        other = layer.projection
        for field in ("seed", "basis", "scheme"):
            one, two = getattr(first, field), getattr(other, field)
            if one != two:
                raise ValueError(
                    f"adapters {first.adapter_id!r} and {other.adapter_id!r} have different "
                    f"{field}s in {name}, {one!r} and {two!r}: they are not orthogonal. "
                    "force=True sums them nevertheless; measure crosstalk() then"
                )
    seen: dict[int, Any] = {}
    for layer in layers:
        p = layer.projection
        for column in p.columns or () if p.scheme == "slots" else ():
            if seen.setdefault(column, p.adapter_id) != p.adapter_id:
                raise ValueError(
                    f"slots of adapters {seen[column]!r} and {p.adapter_id!r} overlap in {name} "
                    f"(column {column}); give each its own, see free_slots(). "
                    "force=True sums them nevertheless"
                )

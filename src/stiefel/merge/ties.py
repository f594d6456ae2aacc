"""TIES: keep each model's largest changes, elect a sign per entry, average what agrees.

The largest changes are found by counting, not by sorting: two passes over the data (four in
float64), each a histogram of 16 bits of |δ|, whose memory does not grow with the tensor. Histograms
add up, over row portions as over processes. Entries as large as the smallest that is kept are taken
in the order of their position, so exactly k are kept, as a stable sort would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stiefel.merge.additive import Model, Models, check_scale
from stiefel.merge.arithmetic import (
    Number,
    blocks,
    check_densities,
    check_keys,
    check_tensors,
    check_weights,
    each_tensor,
    is_mapping,
    mix_rows,
    model_names,
    work_dtype,
)

# Elements that are counted at once; every count fills a table of 65,536 numbers.
_COUNTED = 1 << 18
_BINS = 1 << 16

Chunks = Iterable[tuple[Tensor, Tensor | None]]
"""Pairs (rows of the model, the same rows of the base; None for a base of zeros), in order."""


class Cut:
    """The smallest |δ| that is kept, and how many entries of exactly that size.

    For one pass over the tensor, its rows in order: the entries at the limit are used up.
    """

    def __init__(self, value: Number, at_limit: int | None = None) -> None:
        """Keep |δ| > ``value``, and the first ``at_limit`` entries equal to it (None: all)."""
        self.value = value
        self.at_limit = at_limit

    def _below(self, dtype: torch.dtype) -> float:
        """The next smaller number."""
        value = torch.tensor(self.value, dtype=dtype)
        return float(torch.nextafter(value, torch.zeros_like(value)))

    def __repr__(self) -> str:
        return f"Cut({self.value!r}, {self.at_limit!r})"

    def keep_(self, delta: Tensor) -> Tensor:
        """Set to zero, in place, what is not kept of the next entries."""
        if self.value == 0:
            return delta
        if self.at_limit:
            limit = delta.abs() == self.value
            count = int(limit.count_nonzero())
            if count > self.at_limit:
                late = limit & (limit.flatten().cumsum(0).view_as(limit) > self.at_limit)
                delta.mul_(~late)
            self.at_limit = max(0, self.at_limit - count)
            below = self._below(delta.dtype)
        else:
            below = self._below(delta.dtype) if self.at_limit is None else self.value
        # One pass, in place: hardshrink keeps what is above its limit.
        return torch.hardshrink(delta, below, out=delta)  # pyrefly: ignore


class MagnitudeCounter:
    """Finds the k-th largest |δ| by counting, 16 bits of the number a pass.

    >>> counter = MagnitudeCounter(torch.float32)
    >>> for _ in range(counter.passes):
    ...     counter.count(torch.tensor([0.5, -3.0, 1.0, 2.0]))
    ...     counter.narrow(2)
    >>> counter.cut()
    Cut(2.0, 1)
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """For differences computed in ``dtype``: float32 (two passes) or float64 (four)."""
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        self.dtype = dtype
        self.passes = dtype.itemsize // 2
        self.histogram = torch.zeros(_BINS, dtype=torch.int64)
        """Of the pass at hand; those of several parts or processes are summed before
        :meth:`narrow`."""
        self._done = 0
        self._prefix = 0
        self._wanted: int | None = None

    def count(self, source: Tensor, base: Tensor | None = None) -> None:
        """Take in the entries of ``source`` (minus ``base``)."""
        flat = source.reshape(-1)
        origin = None if base is None else base.reshape(-1)
        integer = torch.int32 if self.dtype == torch.float32 else torch.int64
        shift = 16 * (self.passes - 1 - self._done)
        for start, stop in blocks(flat.numel(), _COUNTED):
            delta = flat[start:stop].to(self.dtype, copy=True)
            if origin is not None:
                delta.sub_(origin[start:stop].to(self.dtype))
            # Floats that are not negative are ordered as the integers of their bits.
            bits = delta.abs_().view(integer)
            if self._done:
                bits = bits[(bits >> (shift + 16)) == self._prefix]
                bits = (bits >> shift) & (_BINS - 1)
            else:
                bits = bits >> shift
            self.histogram += torch.bincount(bits, minlength=_BINS).cpu()

    def narrow(self, k: int) -> None:
        """Close a pass, looking for the ``k``-th largest; the same ``k`` every time."""
        wanted = k if self._wanted is None else self._wanted
        above = self.histogram.flip(0).cumsum(0)
        if not 1 <= wanted <= int(above[-1]):
            raise ValueError(f"k must be in 1..{int(above[-1])}, the entries counted, got {k}")
        found = int(torch.searchsorted(above, wanted))
        self._wanted = wanted - (int(above[found - 1]) if found else 0)
        self._prefix = (self._prefix << 16) | (_BINS - 1 - found)
        self._at_limit = int(self.histogram[_BINS - 1 - found])
        self.histogram.zero_()
        self._done += 1

    def cut(self) -> Cut:
        """The result, after all passes."""
        if self._done != self.passes or self._wanted is None:
            raise ValueError(f"{self.passes} passes are needed, {self._done} were made")
        integer = torch.int32 if self.dtype == torch.float32 else torch.int64
        value = float(torch.tensor([self._prefix], dtype=integer).view(self.dtype))
        return Cut(value, None if self._wanted == self._at_limit else self._wanted)


def kept_entries(numel: int, density: Number) -> int:
    """k = max(1, ⌊density · n⌋), mergekit's rule."""
    return max(1, int(density * numel))


def ties_threshold(
    chunks: Callable[[], Chunks], density: Number, dtype: torch.dtype = torch.float32
) -> Cut | None:
    """What of a tensor's difference to its base is kept; None if all of it is.

    Args:
        chunks: gives the pairs (rows of the model, rows of the base) anew at every call; called
            twice (``dtype`` float32) or four times (float64). Chain the tensors of a model to get
            one limit for all of them.
        density: share that is kept, in (0, 1].
    """
    check_densities(density, 1)
    if density >= 1:
        return None
    counter = MagnitudeCounter(dtype)
    for _ in range(counter.passes):
        numel = 0
        for source, base in chunks():
            counter.count(source, base)
            numel += source.numel()
        if numel == 0:
            return None
        counter.narrow(kept_entries(numel, density))
    return counter.cut()


def ties_rows(
    base: Tensor,
    sources: Sequence[Tensor],
    cuts: Sequence[Cut | None],
    weights: Sequence[Number],
    *,
    normalize: bool = True,
    scale: Number = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`ties` of the next portion of rows, without its checks.

    ``cuts`` are those of :func:`ties_threshold`, one a source, and are used up: rows in order.
    ``out``: contiguous, of base's shape, any floating dtype; by default new, of base's dtype.
    """

    def trim(model: int, delta: Tensor, start: int) -> None:
        cut = cuts[model]
        if cut is not None:
            cut.keep_(delta)

    return mix_rows(
        base, sources, weights, prepare=trim, consensus=True, normalize=normalize, scale=scale,
        out=out,
    )  # fmt: skip


@torch.no_grad()
def ties(
    base: Model,
    models: Models,
    weights: Sequence[Number] | None = None,
    *,
    density: Number | Sequence[Number] = 0.2,
    normalize: bool = True,
    scale: Number = 1.0,
    threshold: str = "tensor",
) -> Tensor | dict[str, Tensor]:
    """base + scale · TIES mix of the differences δᵢ = Wᵢ - base.

    Of each δᵢ the max(1, ⌊density n⌋) largest magnitudes are kept and weighted. Per entry the sign
    of Σ wᵢ δᵢ is elected (0 counts as +), and only wᵢ δᵢ of that sign are summed; ``normalize``
    divides by the sum of their weights (by 1 if that is zero).

    Args:
        base: what all were fine-tuned from: a tensor, or a state dict.
        models: tensors of base's shape, or state dicts with base's names.
        weights: one a model; 1 by default.
        density: share of entries kept, in (0, 1]; one number or one a model.
        threshold: ``"tensor"`` counts n within each tensor (mergekit), ``"model"`` over all
            floating-point tensors of a state dict together (the authors' code).

    Returns:
        Of base's dtype, computed in float32 (float64 where an input is). Not differentiable.

    Raises:
        ValueError: no models, shapes or names differ, bad weights or density, NaN or infinities.
        TypeError: not floating point.

    Source: Yadav et al., "TIES-merging", arXiv 2306.01708, algorithm 1.
    """
    names = model_names(len(models), with_base=True)
    found, densities = check_weights(weights, len(models)), check_densities(density, len(models))
    check_scale(scale)
    if threshold not in ("tensor", "model"):
        raise ValueError(f"threshold must be 'tensor' or 'model', got {threshold!r}")
    dicts = is_mapping(models, base)
    shared: list[Cut | None] | None = None
    if threshold == "model" and dicts:
        check_keys([base, *models], names)  # pyrefly: ignore
        shared = [_whole(base, m, d) for m, d in zip(models, densities, strict=True)]  # pyrefly: ignore

    def merge(name: str, tensors: Sequence[Tensor]) -> Tensor:
        check_tensors(tensors, names, name)
        origin, sources = tensors[0], tensors[1:]
        cuts = shared
        if cuts is None:
            dtype = work_dtype(tensors)
            cuts = [
                ties_threshold(lambda x=x: [(x, origin)], d, dtype)
                for x, d in zip(sources, densities, strict=True)
            ]
        return ties_rows(origin, sources, cuts, found, normalize=normalize, scale=scale)

    if dicts:
        return each_tensor([base, *models], names, merge)  # pyrefly: ignore
    return merge("", [base, *models])  # pyrefly: ignore


def _whole(base: Mapping[str, Tensor], model: Mapping[str, Tensor], density: Number) -> Cut | None:
    """One limit for all floating-point tensors of a model."""
    keys = [k for k in base if base[k].is_floating_point() and model[k].is_floating_point()]
    for key in keys:
        check_tensors([base[key], model[key]], ["base", "models"], key)
    dtype = work_dtype([d[k] for d in (base, model) for k in keys])
    return ties_threshold(lambda: ((model[k], base[k]) for k in keys), density, dtype)

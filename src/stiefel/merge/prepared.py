"""One tensor of OrthoMerge: rotations extracted and averaged, then put together with the rest.

arXiv 2602.05943, Orthogonal-Residual Decoupling: Wᵢ = W0 Rᵢ + ρᵢ, W = W0 R_m + λ · merge(ρ). Rows
are worked on in portions, so beside the inputs only rotations and a few portions are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stiefel.merge.additive import check_scale
from stiefel.merge.arithmetic import Number, check_densities, work_dtype
from stiefel.merge.residual import (
    METHODS,
    Custom,
    default_scale,
    merge_residual_rows,
    residual_cuts,
    tsvm,
)
from stiefel.merge.ties import Cut, ties_threshold
from stiefel.merge.turning import Mean, average, extract, row_portions

RowMerger = Callable[[Sequence[Tensor], int, int], Tensor]

# Tensors of at most this many entries are computed in float64.
_SMALL = 1 << 22
# Residuals up to this many bytes together are kept between the passes that TIES needs.
_KEPT = 1 << 29


@dataclass(frozen=True)
class OrthoSettings:
    """How OrthoMerge is done; the arguments of :func:`orthomerge`."""

    variant: str = "G"
    residual: str | Custom = "ties"
    residual_scale: Number | None = None
    map: str = "cayley"
    intensity: Number = 1.0
    correct: bool = True
    polar: str = "auto"
    density: Number = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("variant", ("G", "C")),
            ("map", ("cayley", "log")),
            ("polar", ("auto", "svd", "newton")),
        ):
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {given!r}")
        if self.residual not in METHODS and not callable(self.residual):
            raise ValueError(
                f"residual must be one of {', '.join(METHODS)} or a function, got {self.residual!r}"
            )
        check_densities(self.density, 1)
        check_scale(self.intensity)
        if self.residual_scale is not None:
            check_scale(self.residual_scale)


@dataclass(frozen=True)
class OrthoReport:
    """What happened to one tensor."""

    norms: tuple[float, ...] = ()
    """‖Qᵢ‖_F of every expert; empty where nothing was turned."""
    correction: float | None = None
    """c, by which the mean coordinate was lengthened."""
    map: str | None = None
    """``cayley`` or ``log``; None where nothing was turned."""
    residuals: tuple[float, ...] = field(default=())
    """‖ρᵢ‖_F / ‖W0‖_F of every expert."""


def is_turned(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is rotated: matrices called ``…weight`` that are no norm's (official code).

    All others are merged as residuals alone.
    """
    lower = name.lower()
    norm = "layernorm" in lower or "layer_norm" in lower
    return tensor.ndim == 2 and tensor.numel() > 0 and "weight" in lower and not norm


class PreparedTensor:
    """One tensor of base and experts with its rotations extracted, ready to be merged."""

    def __init__(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        weights: Sequence[Number],
        settings: OrthoSettings,
        *,
        name: str,
        turn: bool,
    ) -> None:
        """Extract and average; ``turn`` False leaves everything to the residual."""
        self._base, self._experts = base, experts
        self._weights, self._settings, self._name = weights, settings, name
        wide = work_dtype([base, *experts])
        self._dtype = torch.float64 if base.numel() <= _SMALL else wide
        self._turning = self._mean = None
        if turn:
            self._turning = extract(base, experts, variant=settings.variant, polar=settings.polar)
            self._mean = average(
                self._turning, weights, map=settings.map, intensity=settings.intensity,
                correct=settings.correct, name=name,
            )  # fmt: skip
        self._kept: list[Tensor] | None = None

    @property
    def mean(self) -> Mean | None:
        """The merged rotation; None where nothing is turned."""
        return self._mean

    def portions(self) -> Iterator[tuple[int, int]]:
        """Start and stop of the rows that are worked on at once."""
        if self._base.ndim == 0:
            return iter([(0, 1)])
        rows = self._base.shape[0]
        return row_portions(rows, self._base.numel() // max(1, rows))

    def _rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return (tensor if tensor.ndim == 0 else tensor[start:stop]).to(self._dtype)

    def residual(self, expert: int, start: int, stop: int) -> Tensor:
        """Rows of ρᵢ = Wᵢ - W0 Rᵢ, with the true Wᵢ in both variants."""
        if self._kept is not None:
            return self._rows(self._kept[expert], start, stop)
        origin = self._rows(self._base, start, stop)
        rows = self._rows(self._experts[expert], start, stop)
        if self._turning is None:
            return rows - origin
        return rows - self._turning.apply(origin, self._turning.rotations[expert])

    def whole_residuals(self) -> list[Tensor]:
        """All ρᵢ, kept from now on."""
        if self._kept is None:
            kept = []
            for expert in range(len(self._experts)):
                whole = torch.empty_like(self._base, dtype=self._dtype)
                for start, stop in self.portions():
                    self._rows(whole, start, stop).copy_(self.residual(expert, start, stop))
                kept.append(whole)
            self._kept = kept
        return self._kept

    def cuts(self) -> list[Cut | None]:
        """TIES limits of this tensor alone."""
        density = self._settings.density
        if self._dtype.itemsize * self._base.numel() * len(self._experts) <= _KEPT:
            return residual_cuts(self.whole_residuals(), density)
        return [
            ties_threshold(lambda i=i: self.pairs(i), density, self._dtype)
            for i in range(len(self._experts))
        ]

    def pairs(self, expert: int) -> Iterator[tuple[Tensor, None]]:
        """ρᵢ by portions, as :func:`stiefel.merge.ties_threshold` wants it."""
        for start, stop in self.portions():
            yield self.residual(expert, start, stop), None

    def finish(
        self, cuts: Sequence[Cut | None] | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, OrthoReport]:
        """W0 R_m + λ · merged residuals, and the report. ``cuts``: TIES limits, if shared."""
        scale = self._settings.residual_scale
        if scale is None:
            scale = default_scale(self._settings.residual, self._weights)
        if out is None:
            out = torch.empty_like(self._base, memory_format=torch.contiguous_format)
        count = len(self._experts)
        squares, size = [0.0] * count, 0.0
        merge = self._merger(cuts)
        for start, stop in self.portions():
            origin = self._rows(self._base, start, stop)
            size += float(origin.square().sum())
            parts = [self.residual(i, start, stop) for i in range(count)]
            squares = [s + float(p.square().sum()) for s, p in zip(squares, parts, strict=True)]
            rest = merge(parts, start, stop)
            if self._turning is not None and self._mean is not None:
                origin = self._turning.apply(origin, self._mean.rotation)
            target = out if out.ndim == 0 else out[start:stop]
            target.copy_(torch.add(origin, rest, alpha=scale))
        relative = tuple((s / size) ** 0.5 if size > 0 else 0.0 for s in squares)
        if self._mean is None:
            return out, OrthoReport(residuals=relative)
        mean = self._mean
        return out, OrthoReport(mean.norms, mean.correction, mean.map, relative)

    def _merger(self, cuts: Sequence[Cut | None] | None) -> RowMerger:
        """How the residuals of a portion of rows are merged."""
        method = self._settings.residual
        if method == "tsvm" or callable(method):
            whole = self.whole_residuals()
            merged = _custom(method, whole) if callable(method) else tsvm(whole, self._weights)
            return lambda parts, start, stop: self._rows(merged, start, stop)
        if method == "ties" and cuts is None:
            cuts = self.cuts()
        row = self._base[0].numel() if self._base.ndim and len(self._base) else 1

        def merge(parts: Sequence[Tensor], start: int, stop: int) -> Tensor:
            return merge_residual_rows(
                parts, method, self._weights, cuts=cuts or (), density=self._settings.density,
                seed=self._settings.seed, name=self._name, start=start * row,
            )  # fmt: skip

        return merge


def _custom(method: Custom, residuals: Sequence[Tensor]) -> Tensor:
    merged = method(residuals)
    if merged.shape != residuals[0].shape:
        raise ValueError(
            f"residual must return shape {tuple(residuals[0].shape)}, got {tuple(merged.shape)}"
        )
    return merged

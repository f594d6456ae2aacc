"""How experts turned one weight matrix: extraction, Lie coordinates, and the way back.

Part C of OrthoMerge (arXiv 2602.05943): Rᵢ = argmin ‖W0 R - Tᵢ‖_F over rotations, Qᵢ its Cayley
coordinate. Where all experts' rows and the base's span few dimensions (wide matrices), everything
happens in a basis of that span: R = I + B (R_s - I) Bᵀ, and no in × in matrix is formed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg import (
    cayley,
    inverse_cayley,
    procrustes_rotation,
    rotation_exp,
    rotation_log,
    skew,
)
from stiefel.linalg.newton_polar import block_inverse
from stiefel.linalg.procrustes import FLOAT64_UP_TO, rank_tolerance, rotation_from_product
from stiefel.linalg.rotation import SingularCayleyError
from stiefel.merge.arithmetic import Number
from stiefel.merge.lie_average import magnitude_correction

# Rows with a cosine below 0 to the mean change are "in conflict"; the official code's guard.
CONFLICT_EPS = 1e-6
# Within 1e-3 of a turn by π the Cayley coordinate tan(θ/2) is above this: the logarithm is used.
LARGEST_TANGENT = math.tan((math.pi - 1e-3) / 2)
# Entries of a portion of rows, and the width from which inverses are built of matrix products.
PORTION = 1 << 21
_BLOCKED_FROM = 512


class HalfTurnWarning(UserWarning):
    """An expert turns a plane by almost π, where Cayley coordinates end; logarithms are merged."""


@dataclass(frozen=True)
class Turning:
    """The experts' rotations of one matrix."""

    rotations: tuple[Float[Tensor, "m m"], ...]
    """One an expert; of the whole input side, or within ``basis``."""
    basis: Float[Tensor, "in m"] | None
    """Orthonormal columns; None: m is the whole input side."""

    def apply(
        self, rows: Float[Tensor, "rows in"], rotation: Float[Tensor, "m m"]
    ) -> Float[Tensor, "rows in"]:
        """rows @ R, in the rows' dtype."""
        r = rotation.to(rows.dtype)
        if self.basis is None:
            return rows @ r
        b = self.basis.to(rows.dtype)
        inner = rows @ b
        return torch.addmm(rows, inner @ r - inner, b.mT)


@dataclass(frozen=True)
class Mean:
    """The merged rotation, and what a report tells about it."""

    rotation: Float[Tensor, "m m"]
    norms: tuple[float, ...]
    """‖Qᵢ‖_F of every expert: √(2 Σ tan²(θ/2)) over its planes, or √(2 Σ θ²) with ``map`` log."""
    correction: float
    """c: how much longer the merged coordinate is than the plain mean."""
    map: str
    """``cayley`` or ``log``, as it was done."""


def row_portions(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Start and stop of portions of a few million entries."""
    step = max(1, PORTION // max(1, width))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def extract(
    base: Float[Tensor, "out in"],
    experts: Sequence[Float[Tensor, "out in"]],
    *,
    variant: str = "G",
    polar: str = "auto",
) -> Turning:
    """The rotation nearest to each expert; of the optimal ones, that closest to the identity.

    Args:
        base, experts: weights, all of one shape.
        variant: ``"G"``: the target is the expert; ``"C"``: the base, with those rows replaced by
            the expert's whose change has a negative cosine to the mean change.
        polar: ``"svd"``, ``"newton"``, or ``"auto"``: Newton above a width of 2,048.

    float64 up to a width of 2,048 (and for float64 inputs), float32 above.
    """
    out, width = base.shape
    wide = torch.float64 in (base.dtype, *(w.dtype for w in experts))
    source: Tensor = base
    targets: Sequence[Callable[[int, int], Tensor]] = _targets(base, experts, variant)
    basis = _common_basis(base, experts)
    if basis is not None:
        whole = [t(0, out) @ basis for t in targets]
        source, targets = base.double() @ basis, [_rows_of(t) for t in whole]
        width = basis.shape[1]
    kind = torch.float64 if wide or width <= FLOAT64_UP_TO else torch.float32
    if polar == "auto":
        polar = "newton" if width > FLOAT64_UP_TO else "svd"
    dtype = torch.float64 if wide else torch.float32
    found = []
    for target in targets:
        if basis is None and 2 * out < width:
            r = procrustes_rotation(source.to(dtype), target(0, out).to(dtype), polar=polar)
        else:
            m = _product(source, target)
            r = rotation_from_product(m, True, "closest", rank_tolerance(dtype), polar, dtype)
        found.append(r.to(kind))
    return Turning(tuple(found), basis)


def _common_basis(base: Tensor, experts: Sequence[Tensor]) -> Tensor | None:
    """Orthonormal ``[in, m]`` that holds the rows of base and experts; None if m > in / 2.

    Every rotation wanted is the identity outside. m is out, and for each expert the rank of its
    change: r for a LoRA of rank r that was folded in (in float32 or better), else out.
    """
    out, width = base.shape
    if 2 * (out + len(experts)) > width:
        return None
    pieces, span = [base.double()], out
    for w in experts:
        pieces.append(_row_space(w.double() - pieces[0], w.dtype, base))
        span += len(pieces[-1])
        if 2 * span > width:
            return None
    return torch.linalg.qr(torch.cat(pieces).mT).Q


def _row_space(delta: Tensor, stored: torch.dtype, base: Tensor) -> Tensor:
    """Rows that span those of ``delta``, up to the rounding of the weights it is a difference of.

    Half types round too coarsely to tell a rank: all rows are taken.
    """
    if stored not in (torch.float32, torch.float64):
        return delta
    out, width = delta.shape
    rms = float(torch.linalg.matrix_norm(base.double())) / (out * width) ** 0.5
    _, values, vh = torch.linalg.svd(delta, full_matrices=False)
    # The largest singular value of independent roundings.
    noise = torch.finfo(stored).eps * rms * (out**0.5 + width**0.5)
    return vh[: int((values > noise).sum())]


def _targets(
    base: Tensor, experts: Sequence[Tensor], variant: str
) -> list[Callable[[int, int], Tensor]]:
    """What each expert's rotation aims at, by portions of rows, in float64."""
    if variant == "G":
        return [_rows_of(w) for w in experts]

    def conflicting(expert: int) -> Callable[[int, int], Tensor]:
        def rows(start: int, stop: int) -> Tensor:
            origin = base[start:stop].double()
            deltas = [w[start:stop].double() - origin for w in experts]
            mean = torch.stack(deltas).mean(0)
            delta = deltas[expert]
            length = torch.linalg.vector_norm(delta, dim=1) * torch.linalg.vector_norm(mean, dim=1)
            cosine = (delta * mean).sum(1) / (length + CONFLICT_EPS)
            return origin + delta * (cosine < 0)[:, None]

        return rows

    return [conflicting(i) for i in range(len(experts))]


def _rows_of(w: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: w[start:stop].double()


def _product(source: Tensor, target: Callable[[int, int], Tensor]) -> Tensor:
    """sourceᵀ target, summed in float64 over portions of rows."""
    total = torch.zeros(source.shape[1], source.shape[1], dtype=torch.float64, device=source.device)
    for start, stop in row_portions(*source.shape):
        total.addmm_(source[start:stop].double().mT, target(start, stop))
    return total


def average(
    turning: Turning,
    weights: Sequence[Number],
    *,
    map: str = "cayley",
    intensity: Number = 1.0,
    correct: bool = True,
    name: str = "",
) -> Mean:
    """Part A on the experts' rotations: their coordinates merged, and mapped back.

    Warns:
        HalfTurnWarning: a turn by almost π; logarithms are merged instead of Cayley coordinates.
    """
    if map == "cayley":
        try:
            return _average(turning, weights, map, intensity, correct)
        except SingularCayleyError:
            where = f" of {name}" if name else ""
            warnings.warn(
                HalfTurnWarning(f"an expert{where} turns a plane by almost π: logarithms merged"),
                stacklevel=3,
            )
    mean = _average(turning, weights, "log", intensity, correct)
    return replace(mean, map="log")


def _average(
    turning: Turning, weights: Sequence[Number], kind: str, intensity: Number, correct: bool
) -> Mean:
    to, back = (_coordinate, _rotation) if kind == "cayley" else (rotation_log, rotation_exp)
    first = turning.rotations[0]
    total, norms = torch.zeros_like(first), []
    for r, weight in zip(turning.rotations, weights, strict=True):
        q = to(r)
        norms.append(torch.linalg.matrix_norm(q))
        total.add_(q, alpha=weight)
    size = torch.stack([w * n for w, n in zip(weights, norms, strict=True)]).sum()
    c = magnitude_correction(size, torch.linalg.matrix_norm(total)) if correct else None
    factor = intensity / sum(weights) * (1.0 if c is None else float(c))
    merged = back(skew(total.mul_(factor)))
    return Mean(merged, tuple(map(float, norms)), 1.0 if c is None else float(c), kind)


def _coordinate(r: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Inverse Cayley map of a rotation known to be one; refuses turns by π - 1e-3 and more."""
    if r.shape[-1] < _BLOCKED_FROM:
        q = inverse_cayley(r)
    else:
        # (R - I)(R + I)⁻¹ = I - 2 (R + I)⁻¹; the symmetric part of R + I is positive definite.
        work = r.clone()
        work.diagonal().add_(1)
        q = block_inverse(work).mul_(-2)
        q.diagonal().add_(1)
        q = skew(q)
    # The Frobenius norm is above the largest tangent, and cheap.
    size = torch.linalg.matrix_norm(q)
    if not bool(size <= LARGEST_TANGENT) and not (
        bool(size.isfinite()) and bool(torch.linalg.matrix_norm(q, 2) <= LARGEST_TANGENT)
    ):
        raise SingularCayleyError("a turn by almost π")
    return q


def _rotation(q: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Cayley map of a matrix known to be skew: (I + Q)(I - Q)⁻¹ = 2 (I - Q)⁻¹ - I."""
    if q.shape[-1] < _BLOCKED_FROM:
        return cayley(q)
    work = -q
    work.diagonal().add_(1)
    r = block_inverse(work).mul_(2)
    r.diagonal().sub_(1)
    return r

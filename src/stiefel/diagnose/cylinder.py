"""A concept's axis, the plane around it, and where in that plane a sample lies.

The Cylindrical Representation Hypothesis (arXiv 2605.01844): the difference that a concept makes to
an activation is split into a part along the mean difference (the axis, which produces the concept)
and a part orthogonal to it (the normal plane), whose angle decides how easily the axis works.

The split and the penalised vector are the authors' (as in their code). The plane's basis, the
sector scan and the calibration of a sector from outcomes are this library's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.diagnose.steering import Steering as Steering
from stiefel.diagnose.steering import concept_differences as concept_differences
from stiefel.diagnose.steering import steer as steer
from stiefel.diagnose.steering_laws import SinCosLaw as SinCosLaw
from stiefel.diagnose.steering_laws import mean_difference as mean_difference
from stiefel.diagnose.steering_laws import pca_direction as pca_direction
from stiefel.diagnose.steering_laws import probe_direction as probe_direction
from stiefel.diagnose.steering_laws import sin_cos_law as sin_cos_law
from stiefel.linalg._checks import check_finite, check_floating, compute_dtype

# The authors' code calls a vector shorter than this zero.
SHORTEST = 1e-10
# A mean this much shorter than the samples' root mean square is rounding, not a direction.
NO_AXIS = 1e-6
# Singular values below this part of the samples' size span nothing.
NO_PLANE = 1e-6


class CylCoords(NamedTuple):
    """A vector in a cylinder's coordinates; each field has the vector's batch shape."""

    h: Tensor
    """Along the axis, ⟨v, â⟩."""
    rho: Tensor
    """Length of the part in the plane of e₁ and e₂."""
    phi: Tensor
    """Its angle atan2(⟨v, e₂⟩, ⟨v, e₁⟩), radians in (-π, π]."""
    cos: Tensor
    """Of the angle between v and the axis; 0 for the zero vector."""
    sin: Tensor
    """√(1 - cos²)."""
    rest: Tensor
    """What neither axis nor plane holds, ``[..., d]``: v = h·â + ρ(cos φ e₁ + sin φ e₂) + rest."""


class ConceptCylinder:
    """Axis and normal plane of a concept, from differences of activations.

    ``fit`` takes the mean a of the differences as the axis and the leading right singular vectors
    of what is orthogonal to it as the basis of the plane, each with its entry of largest size
    positive. Half types are computed in float32; singular vectors come from the smaller Gram matrix
    in float64.

    Attributes:
        axis_: Unit vector â, ``[d]``.
        axis_norm_: ‖a‖, in the activations' units.
        plane_: Orthonormal rows e₁, e₂, …, ``[rank, d]``, orthogonal to the axis.
        plane_sv_: Singular values of the residuals, ``[rank]``.
        n_samples_: Number of differences.

    >>> D = torch.tensor([[2.0, 1, 0], [2, -1, 0], [2, 0, 1.5], [2, 0, -1.5]])
    >>> cylinder = ConceptCylinder().fit(D)
    >>> cylinder.axis_norm_, cylinder.plane_sv_.tolist()
    (2.0, [2.1213202476501465, 1.4142135381698608])
    """

    axis_: Tensor
    axis_norm_: float
    plane_: Tensor
    plane_sv_: Tensor
    n_samples_: int

    def fit(self, D: Tensor, rank: int = 2) -> ConceptCylinder:
        """Learn axis and plane from differences ``D [n, d]``; returns the cylinder itself.

        Raises:
            TypeError: ``D`` is not floating point.
            ValueError: not a matrix, NaN or infinite entries, ``rank`` < 2, fewer than rank + 1
                samples (their residuals sum to zero), no common axis, or residuals that span fewer
                than ``rank`` dimensions.
        """
        check_floating(D, "D")
        if D.ndim != 2:
            raise ValueError(f"D must be a matrix [samples, d], got shape {tuple(D.shape)}")
        check_finite(D, "D")
        if rank < 2:
            raise ValueError(f"rank must be at least 2, for a plane; got {rank}")
        if len(D) < rank + 1:
            raise ValueError(
                f"a plane of rank {rank} needs at least {rank + 1} samples, got {len(D)}: "
                "what is orthogonal to their mean sums to zero"
            )
        work = D.detach().to(torch.float64)
        size = float(work.square().sum(-1).mean().sqrt())
        mean = work.mean(0)
        norm = float(mean.norm())
        if norm <= max(SHORTEST, NO_AXIS * size):
            raise ValueError(
                f"no common axis: the samples' mean has length {norm:.2e}, "
                f"their root mean square is {size:.2e}"
            )
        axis = mean / norm
        residuals = work - (work @ axis)[:, None] * axis
        values, plane = _leading_rows(residuals, rank)
        if float(values[-1]) <= NO_PLANE * size * math.sqrt(len(D)):
            raise ValueError(
                f"the samples span no plane of rank {rank} around their mean: the singular values "
                f"are {', '.join(f'{float(v):.2e}' for v in values)}"
            )
        dtype = compute_dtype(D.dtype)
        self.axis_, self.axis_norm_ = axis.to(dtype), norm
        self.plane_, self.plane_sv_ = plane.to(dtype), values.to(dtype)
        self.n_samples_ = len(D)
        return self

    def transform(self, V: Tensor) -> CylCoords:
        """Coordinates of vectors ``V [..., d]``; differentiable where ρ > 0.

        Note that a sample which was fitted has a cosine too large by about 1/n.

        Raises:
            TypeError, ValueError: not floating point, NaN or infinite, another width than the axis.
        """
        v = self._checked(V, "V")
        axis, plane = self._moved(v)
        h = v @ axis
        flat = v @ plane[:2].mT
        rho = torch.linalg.vector_norm(flat, dim=-1)
        phi = torch.atan2(flat[..., 1], flat[..., 0])
        length = torch.linalg.vector_norm(v, dim=-1)
        cos = (h / torch.where(length > 0, length, 1.0)).clamp(-1, 1)
        rest = v - h[..., None] * axis - flat @ plane[:2]
        return CylCoords(h, rho, phi, cos, (1 - cos.square()).clamp_min(0).sqrt(), rest)

    def steering_vector(
        self, d: Tensor, length: float | int, penalty: float | int = 0.0
    ) -> Float[Tensor, "*batch d"]:
        """The authors' penalised vector v(s, p) = s·cos θ·â + s·(1 - p)·sin θ·ô of samples d.

        ``penalty`` 0 gives d's own direction at ``length``; 1 leaves the part along the axis alone,
        whose length is only s·|cos θ|: compare at equal length before crediting the plane.

        Args:
            d: Differences of the samples to steer, ``[..., d]``.
            length: s ≥ 0, in the activations' units.
            penalty: p in [0, 1].

        Raises:
            TypeError: d is not floating point.
            ValueError: a d shorter than 1e-10, NaN or infinite entries, another width than the
                axis, a negative length, a penalty outside [0, 1].
        """
        v = self._checked(d, "d")
        _check_number(length, "length", 0.0, math.inf)
        _check_number(penalty, "penalty", 0.0, 1.0)
        axis, _ = self._moved(v)
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        if bool((norm < SHORTEST).any()):
            raise ValueError("d must not be zero: it has no angle to the axis")
        # cos θ·â and sin θ·ô are the parts of d/‖d‖ along the axis and across it.
        unit = v / norm
        along = (unit @ axis)[..., None] * axis
        return length * (along + (1 - penalty) * (unit - along))

    def compose(
        self, axis_strength: float | int, radius: float | int, phi: float | Tensor
    ) -> Float[Tensor, "*batch d"]:
        """A·â + R(cos φ e₁ + sin φ e₂), ``[*phi.shape, d]``; A and R in the activations' units.

        Raises:
            ValueError: a number that is not finite, or a negative radius.
        """
        _check_number(axis_strength, "axis_strength", -math.inf, math.inf)
        _check_number(radius, "radius", 0.0, math.inf)
        angle = torch.as_tensor(phi, dtype=self._fitted().dtype, device=self.axis_.device)
        check_finite(angle, "phi")
        flat = torch.stack([angle.cos(), angle.sin()], dim=-1) @ self.plane_[:2]
        return axis_strength * self.axis_ + radius * flat

    def _fitted(self) -> Tensor:
        if not hasattr(self, "axis_"):
            raise RuntimeError("this cylinder has no axis yet: call fit first")
        return self.axis_

    def _checked(self, v: Tensor, name: str) -> Tensor:
        width = len(self._fitted())
        check_floating(v, name)
        if v.ndim < 1 or v.shape[-1] != width:
            raise ValueError(
                f"{name} must be [..., {width}] like the axis, got shape {tuple(v.shape)}"
            )
        check_finite(v, name)
        return v.to(compute_dtype(v.dtype))

    def _moved(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.axis_.to(v), self.plane_.to(v)


def _leading_rows(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest singular values and right singular vectors (rows), signs fixed."""
    n, d = x.shape
    if n <= d:
        squares, left = torch.linalg.eigh(x @ x.mT)
        lead = left[:, -rank:].mT.flip(0) @ x
    else:
        squares, right = torch.linalg.eigh(x.mT @ x)
        lead = right[:, -rank:].mT.flip(0)
    values = squares[-rank:].flip(0).clamp_min(0).sqrt()
    if len(values) < rank:  # fewer dimensions than asked for: the caller refuses
        return torch.zeros(rank, dtype=x.dtype), lead
    # From the n × n side the rows come as σe; QR gives orthonormal rows where σ is small, too.
    rows = torch.linalg.qr(lead.mT).Q.mT
    at = rows.abs().argmax(-1, keepdim=True)
    return values, rows * torch.where(rows.gather(-1, at) < 0, -1.0, 1.0)


@dataclass(frozen=True)
class SectorProfile:
    """What a score says around a cylinder."""

    phi: Tensor
    """The angles, ``[n_angles]``, from 0 in equal steps, radians."""
    score: Tensor
    """``[..., n_angles]``."""

    @property
    def best(self) -> Tensor:
        """Largest score, ``[...]``."""
        return self.score.amax(-1)

    @property
    def worst(self) -> Tensor:
        """Smallest score, ``[...]``."""
        return self.score.amin(-1)

    @property
    def amplitude(self) -> Tensor:
        """Largest minus smallest, ``[...]``."""
        return self.best - self.worst

    @property
    def best_phi(self) -> Tensor:
        """The first angle with the largest score, ``[...]``."""
        return self.phi[self.score.argmax(-1)]


def sector_scan(
    score: Callable[[Tensor], Tensor],
    cyl: ConceptCylinder,
    axis_strength: float | int = 1.5,
    radius: float | int = 1.0,
    n_angles: int = 16,
) -> SectorProfile:
    """Score A·a + R‖a‖(cos φ e₁ + sin φ e₂) at equally spaced φ.

    Args:
        score: Takes vectors ``[n_angles, d]`` in one batch, returns ``[..., n_angles]``: for many
            prompts at once, one row each.
        cyl: A fitted cylinder.
        axis_strength: A, in units of ‖a‖.
        radius: R, in units of ‖a‖.
        n_angles: At least 2.

    Raises:
        ValueError: fewer than 2 angles, or scores that are not finite or of another shape.
    """
    if n_angles < 2:
        raise ValueError(f"n_angles must be at least 2, got {n_angles}")
    phi = torch.arange(n_angles, dtype=torch.float64) * (2 * math.pi / n_angles)
    vectors = cyl.compose(axis_strength * cyl.axis_norm_, radius * cyl.axis_norm_, phi)
    return SectorProfile(phi, _scores(score, vectors))


def calibrate_sector(scores_train: Tensor) -> float:
    """The angle at which the mean profile over training prompts is largest, in [0, 2π).

    An extension of this library: difference vectors do not tell the good sector, outcomes on a few
    prompts do. Subtracting each prompt's score of the axis alone moves no maximum, so scores may
    come raw or relative. Of equal angles the first is taken.

    Args:
        scores_train: ``[prompts, angles]``, a :func:`sector_scan` profile a row.

    Raises:
        ValueError: not ``[n ≥ 1, angles ≥ 2]``, or NaN or infinite entries.
    """
    if scores_train.ndim != 2 or scores_train.shape[0] < 1 or scores_train.shape[1] < 2:
        raise ValueError(
            "scores_train must be [prompts, angles] with a prompt and two angles at least, got "
            f"shape {tuple(scores_train.shape)}"
        )
    check_finite(scores_train, "scores_train")
    at = int(scores_train.to(torch.float64).mean(0).argmax())
    return 2 * math.pi * at / scores_train.shape[1]


def minimal_strength(
    score: Callable[[Tensor], Tensor],
    direction: Tensor,
    grid: Sequence[float | int] | Tensor,
    threshold: float | int,
) -> float:
    """The first length of ``grid`` at which a vector along ``direction`` reaches ``threshold``.

    Args:
        score: Takes vectors ``[len(grid), d]`` in one batch, returns ``[len(grid)]``.
        direction: ``[d]``, of any length but zero.
        grid: Increasing lengths, in the activations' units.
        threshold: Reached where score ≥ threshold.

    Returns:
        A member of ``grid``; NaN where none is enough.

    Raises:
        ValueError: a zero or non-finite direction, a grid that is empty or does not increase,
            scores that are not finite or of another shape.
    """
    check_floating(direction, "direction")
    check_finite(direction, "direction")
    lengths = torch.as_tensor(grid, dtype=torch.float64)
    if lengths.ndim != 1 or len(lengths) < 1 or bool((lengths.diff() <= 0).any()):
        raise ValueError("grid must hold one length at least, and each larger than the one before")
    check_finite(lengths, "grid")
    work = direction.to(compute_dtype(direction.dtype))
    norm = torch.linalg.vector_norm(work)
    if work.ndim != 1 or float(norm) < SHORTEST:
        raise ValueError(f"direction must be one vector other than zero, got {tuple(work.shape)}")
    scores = _scores(score, lengths.to(work)[:, None] * (work / norm))
    reached = (scores >= threshold).nonzero()
    return float(lengths[int(reached[0])]) if len(reached) else math.nan


class CircularSummary(NamedTuple):
    """Where angles lie together."""

    mean: float
    """Mean direction in (-π, π]; NaN where the resultant vanishes."""
    resultant: float
    """Mean resultant length in [0, 1]; √(π/4n) on average for n uniform angles."""
    rayleigh_p: float
    """Of Rayleigh's test that the angles are uniform (approximation of Zar, 1999)."""


def circular_summary(phi: Tensor | Sequence[float | int]) -> CircularSummary:
    """Mean direction, resultant length and Rayleigh's p of at least two angles (radians).

    Raises:
        ValueError: fewer than two angles, not one row of them, NaN or infinite ones.
    """
    angles = torch.as_tensor(phi, dtype=torch.float64)
    if angles.ndim != 1 or len(angles) < 2:
        raise ValueError(f"phi must be a row of two angles or more, got {tuple(angles.shape)}")
    check_finite(angles, "phi")
    n = len(angles)
    east, north = float(angles.cos().mean()), float(angles.sin().mean())
    r = min(math.hypot(east, north), 1.0)
    mean = math.atan2(north, east) if r > 1e-12 else math.nan
    p = math.exp(math.sqrt(1 + 4 * n + 4 * n * n * (1 - r * r)) - (1 + 2 * n))
    return CircularSummary(mean, r, min(p, 1.0))


def _scores(score: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    found = score(vectors)
    if not isinstance(found, Tensor) or found.ndim < 1 or found.shape[-1] != len(vectors):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"score must return a tensor [..., {len(vectors)}], one number a vector; got {got}"
        )
    check_finite(found, "score")
    return found.detach()


def _check_number(value: float | int, name: str, low: float | int, high: float | int) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} must be a finite number from {low} to {high}, got {value}")

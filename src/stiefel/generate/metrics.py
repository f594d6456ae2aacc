"""How good, how varied and how new samples are: from any feature matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stiefel.generate import search
from stiefel.generate._checks import Images, as_images, whole
from stiefel.generate.database import ImageDatabase

Features = Tensor | np.ndarray
# Samples nearer to the database than this part of what real images are: the copy warning.
COPY_RATIO = 0.9


def _features(x: Features, name: str, width: int | None = None) -> Tensor:
    x = as_images(x, name)
    if x.ndim != 2:
        raise ValueError(f"{name} must be features [n, d], got shape {tuple(x.shape)}")
    if width is not None and x.shape[1] != width:
        raise ValueError(f"{name} must have {width} columns like the first, got {x.shape[1]}")
    return x.detach().double()


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance of the normal distributions with the moments of two samples.

    ``|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½)``, Σ with n − 1. Biased upwards for few
    rows: compare only values of equal n. Symmetric eigendecompositions in float64, so that the
    result is real.

    Args:
        a: ``[n, d]`` features.
        b: ``[m, d]``.

    Raises:
        TypeError: integers.
        ValueError: other shapes, NaN, or no more rows than columns.
    """
    a = _features(a, "a")
    b = _features(b, "b", a.shape[1])
    for x, name in ((a, "a"), (b, "b")):
        if len(x) <= x.shape[1]:
            raise ValueError(
                f"{name} needs more rows than columns for a covariance, got {tuple(x.shape)}"
            )
    difference = (a.mean(0) - b.mean(0)).square().sum()
    first, second = (torch.atleast_2d(x.mT.cov()) for x in (a, b))
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    return float(difference + first.trace() + second.trace() - 2 * cross)


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row."""
    found, _ = search.nearest(
        search.prepare(x, "l2"), x, k, excluded=lambda index, places: index == places[:, None]
    )
    return (x - x[found[:, -1]]).norm(dim=1)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of ``points`` within the ball of any centre."""
    inside = [
        (torch.cdist(p, centres, compute_mode="donot_use_mm_for_euclid_dist") <= radii).any(1)
        for p in points.split(256)
    ]
    return float(torch.cat(inside).double().mean())


def precision_recall(real: Features, fake: Features, k: int = 3) -> tuple[float, float]:
    """Precision and recall of generated samples by balls to the k-th neighbour.

    Precision: share of ``fake`` within a real row's ball. Recall: share of ``real`` within a fake
    row's ball. A ball reaches to its centre's k-th nearest other row of the same set.

    Args:
        real: ``[n, d]`` features.
        fake: ``[m, d]``.
        k: Neighbours.

    Raises:
        TypeError: integers.
        ValueError: other shapes, NaN, or k not below the rows of either.
    """
    real = _features(real, "real")
    fake = _features(fake, "fake", real.shape[1])
    least = min(len(real), len(fake))
    k = whole(k, "k", most=least - 1, why=f" for {least} rows")
    precision = _covered(fake, real, _radii(real, k))
    return precision, _covered(real, fake, _radii(fake, k))


@dataclass(frozen=True)
class CopyReport:
    """How far samples are from the database, in pixels."""

    distance: Float[Tensor, " n"]
    """Euclidean distance of each sample to the nearest entry."""
    nearest: Int[Tensor, " n"]
    """That entry's row."""
    mean: float
    reference: float | None
    """The same mean for real images that the database does not have, if they were given."""

    @property
    def ratio(self) -> float | None:
        """Mean distance of the samples over that of real images."""
        return None if not self.reference else self.mean / self.reference

    @property
    def warning(self) -> str | None:
        """What to say where samples lie nearer to the database than real images do; else None."""
        if self.ratio is None or self.ratio >= COPY_RATIO:
            return None
        return (
            f"samples lie at {self.ratio:.2f} of the distance that real images have to the "
            f"database (below {COPY_RATIO}): they follow their neighbours closely"
        )


def copy_report(samples: Images, db: ImageDatabase, reference: Images | None = None) -> CopyReport:
    """Distance of samples to their nearest database image.

    Args:
        samples: ``[n, *shape]``.
        db: The database.
        reference: ``[m, *shape]`` real images that are not in the database, to compare with.

    Raises:
        TypeError: integer images.
        ValueError: images of another shape, or NaN.
    """
    table = search.prepare(db.images.flatten(1), "l2")

    def distances(images: Images, name: str) -> tuple[Tensor, Tensor]:
        rows = as_images(images, name, shape=db.shape).detach().to(db.images)
        index, distance = search.nearest(table, rows.flatten(1), 1)
        return index[:, 0], distance[:, 0]

    nearest, distance = distances(samples, "samples")
    real = None if reference is None else float(distances(reference, "reference")[1].mean())
    return CopyReport(distance, nearest, float(distance.mean()), real)

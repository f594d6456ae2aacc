"""Linear discriminant analysis with a sampled scatter within classes.

Source: arXiv 1910.06151, section 6 (discriminant analysis).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from stiefel.numerics.sampled.bounds import Guaranteed
from stiefel.numerics.sampled.checks import as_numbers, check_count, check_positive
from stiefel.numerics.sampled.matrix import SampledMatrix
from stiefel.numerics.sampled.means import group_means
from stiefel.numerics.sampled.sketching import ROWS, sketch
from stiefel.numerics.sampled.sources import as_source
from stiefel.numerics.sampled.transform import svt

SHRINKAGE = 0.01


@dataclass(frozen=True, eq=False)
class Discriminant(Guaranteed):
    """Directions that hold classes apart. The bound is on (S_W + λ)^(-1/2), in Frobenius norm."""

    classes: Shaped[np.ndarray, " g"]
    means: Float[np.ndarray, "g d"]
    """Mean row of every class."""
    counts: Float[np.ndarray, " g"]
    components: Float[np.ndarray, "d k"]
    """wᵀ (S_W + λ) w = 1 for each, as estimated."""
    eigenvalues: Float[np.ndarray, " k"]
    """Scatter between classes along each, in units of that within."""

    def transform(self, X: Any) -> Float[np.ndarray, "m k"]:
        """Rows X ``(m, d)`` along the components.

        Raises:
            ValueError: another number of columns, NaN or infinities.
        """
        X = as_numbers(X, "X")
        if X.ndim != 2 or X.shape[1] != self.means.shape[1]:
            raise ValueError(f"X must be (m, {self.means.shape[1]}), got shape {X.shape}")
        center = self.counts @ self.means / self.counts.sum()
        return (X - center) @ self.components

    def scores(self, X: Any) -> Float[np.ndarray, "m g"]:
        """Log probabilities of the classes up to a constant: normal with one covariance."""
        here, means = self.transform(X), self.transform(self.means)
        distances = np.square(here[:, None] - means).sum(axis=2)
        freedom = max(self.counts.sum() - len(self.classes), 1)
        return np.log(self.counts / self.counts.sum()) - freedom / 2 * distances

    def predict(self, X: Any) -> Shaped[np.ndarray, " m"]:
        """The most probable class of each row."""
        return self.classes[self.scores(X).argmax(axis=1)]


def discriminant_analysis(
    A: Any,
    y: Any,
    k: int | np.integer | None = None,
    r: int | np.integer = ROWS,
    c: int | np.integer | None = None,
    generator: Any = None,
    *,
    shrinkage: float | int = SHRINKAGE,
) -> Discriminant:
    """The k leading eigenvectors of (S_W + λ)^(-1) S_B.

    Class means, and with them S_B, take one pass, as do the norms of what is left of each row. Of
    those, r rows drawn by length give (S_W + λ)^(-1/2) by singular value transformation, and the
    rest is as large as the number of classes.

    Args:
        A: ``(n, d)``, real: whatever :class:`SampledMatrix` takes.
        y: ``(n,)``, the class of each row; at least two classes.
        k: Directions, 1 … g − 1; None: g − 1.
        r, c, generator: As :func:`sketch`.
        shrinkage: λ in units of the mean eigenvalue of S_W, > 0.

    Raises:
        TypeError: complex A.
        ValueError: fewer than two classes, y of another length, k > g − 1, shrinkage ≤ 0, rows
            without scatter within classes, NaN.
    """
    source = as_source(A)
    n, d = source.shape
    if source.dtype.kind == "c":
        raise TypeError("discriminant analysis takes real rows, got complex ones")
    if np.shape(y) != (n,):
        raise ValueError(f"y must be ({n},), got shape {np.shape(y)}")
    classes, groups = np.unique(np.asarray(y), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y must have at least two classes, got {len(classes)} class")
    k = len(classes) - 1 if k is None else check_count(k, "k")
    if k >= len(classes):
        raise ValueError(f"k must be at most the classes less one, {len(classes) - 1}, got {k}")
    means, counts = group_means(source, groups, len(classes))
    if not np.isfinite(means).all():
        raise ValueError("A must be finite, but it holds NaN or infinities")
    within = SampledMatrix(A, center=means, groups=groups)
    ridge = check_positive(shrinkage, "shrinkage") * within.fro2 / d
    drawn = sketch(within, r, c, generator)
    # The steepest slopes of f and f̄ are those at 0.
    slopes = (0.5 * ridge**-1.5, 0.375 * ridge**-2.5)
    root = svt(drawn, lambda x: 1 / np.sqrt(x + ridge), lipschitz=slopes)
    between = np.sqrt(counts)[:, None] * (means - counts @ means / n)
    white = root.matmul(between.T)
    values, vectors = np.linalg.eigh(white.T @ white)
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    size = np.sqrt(np.maximum(values, np.finfo(float).tiny))
    components = root.matmul(white @ (vectors / size))
    levels = np.maximum(values, 0.0)
    return Discriminant(classes, means, counts, components, levels, guarantee=root.guarantee)

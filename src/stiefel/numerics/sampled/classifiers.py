"""Classifiers from sampled rows: least-squares SVM, nearest centroid, discriminant analysis.

Needs scikit-learn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data  # pyrefly: ignore

from stiefel.numerics.sampled.checks import check_count
from stiefel.numerics.sampled.clusters import pair_mean
from stiefel.numerics.sampled.discriminant import SHRINKAGE, discriminant_analysis
from stiefel.numerics.sampled.estimators import (
    INPUT,
    SparseInput,
    checked,
    directions,
    generator_of,
)
from stiefel.numerics.sampled.matrix import SampledMatrix
from stiefel.numerics.sampled.sketching import ROWS
from stiefel.numerics.sampled.sources import as_source, square_norms
from stiefel.numerics.sampled.svm import least_squares_svm


def _labelled(estimator: Any, X: Any, y: Any, least: int = 2) -> tuple[Any, Any, np.ndarray]:
    """Checked X, the classes, and which each row is of."""
    X, y = validate_data(estimator, X, y, accept_sparse="csr", dtype=INPUT)
    check_classification_targets(y)
    if hasattr(X, "sum_duplicates") and not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) < least:
        raise ValueError(f"y must have at least {least} classes, got {len(classes)} class")
    return X, classes, codes


def _dense(X: Any) -> np.ndarray:
    return X.toarray() if hasattr(X, "toarray") else X


class SampledSVC(SparseInput, ClassifierMixin, BaseEstimator):
    """Least-squares support vector machine on rows drawn by length; one against the rest.

    Parameters:
        gamma: Weight of errors, > 0.
        n_rows: Rows drawn for each class that is told from the rest.
        random_state: Seed, ``RandomState`` or NumPy generator.

    Attributes:
        classes_: ``(g,)``.
        coef_: ``(g, d)``, or ``(1, d)`` for two classes.
        intercept_: ``(g,)`` or ``(1,)``.
        guarantees_: For each row of ``coef_``, what is proved and whether it is vacuous.
        n_features_in_: d.

    Source: arXiv 1910.06151; Suykens and Vandewalle (1999).
    """

    def __init__(self, gamma: Any = 1.0, *, n_rows: Any = ROWS, random_state: Any = None) -> None:
        self.gamma = gamma
        self.n_rows = n_rows
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SampledSVC:
        """Fit to X ``(n, d)``, an array, memory map or CSR matrix, and classes y ``(n,)``.

        Raises:
            ValueError: one class only, zero X, NaN, a parameter out of range.
        """
        X, self.classes_, codes = _labelled(self, X, y)
        A, rng = SampledMatrix(X), generator_of(self.random_state)
        told = range(len(self.classes_)) if len(self.classes_) > 2 else (1,)
        found = [
            least_squares_svm(A, np.where(codes == c, 1.0, -1.0), self.gamma, self.n_rows, rng)
            for c in told
        ]
        self.coef_ = np.stack([machine.w for machine in found])
        self.intercept_ = np.array([machine.b for machine in found])
        self.guarantees_ = [machine.guarantee for machine in found]
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Signed values: ``(m,)`` for two classes, else ``(m, g)``.

        Raises:
            ValueError: another number of features, NaN.
        """
        check_is_fitted(self)
        values = np.asarray(checked(self, X, reset=False) @ self.coef_.T) + self.intercept_
        return values[:, 0] if len(self.classes_) == 2 else values

    def predict(self, X: Any) -> np.ndarray:
        """The class of each row."""
        values = self.decision_function(X)
        return self.classes_[(values > 0).astype(int) if values.ndim == 1 else values.argmax(1)]


class SampledNearestCentroid(SparseInput, ClassifierMixin, BaseEstimator):
    """The class whose mean is nearest, distances estimated from a few of its rows.

    The rows of :func:`~stiefel.numerics.sampled.centroid_distance` are drawn once, in ``fit``, and
    serve every point: one point costs as much as there are classes and features.

    Parameters:
        n_draws: Draws per class, ≥ 2.
        random_state: Seed, ``RandomState`` or NumPy generator.

    Attributes:
        classes_: ``(g,)``.
        n_features_in_: d.

    Source: arXiv 1910.06151.
    """

    def __init__(self, n_draws: Any = 400, *, random_state: Any = None) -> None:
        self.n_draws = n_draws
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SampledNearestCentroid:
        """Draw from each class of X ``(n, d)``, an array, memory map or CSR matrix.

        Raises:
            ValueError: one class only, NaN, n_draws < 2.
        """
        X, self.classes_, codes = _labelled(self, X, y)
        s, source = check_count(self.n_draws, "n_draws", 2), as_source(X)
        rng = generator_of(self.random_state)
        # As many of the point as of the class: the split by chance would only add to the variance.
        self._mine = s // 2
        totals, squares = [], []
        for c in range(len(self.classes_)):
            members = np.flatnonzero(codes == c)
            rows = source.rows(rng.choice(members, size=s - self._mine)).astype(np.float64)
            totals.append(rows.sum(axis=0))
            squares.append(float(square_norms(rows).sum()))
        self._totals, self._squares, self._draws = np.stack(totals), np.array(squares), s
        return self

    def distances(self, X: Any) -> np.ndarray:
        """Estimated squared distances ``(m, g)`` from the means; some may be negative.

        Raises:
            ValueError: another number of features, NaN.
        """
        check_is_fitted(self)
        X = _dense(checked(self, X, reset=False)).astype(np.float64)
        columns = [
            pair_mean(X, self._mine, total, square, self._draws)
            for total, square in zip(self._totals, self._squares, strict=True)
        ]
        return np.stack(columns, axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """The class with the smallest estimated distance."""
        nearest = self.distances(X).argmin(axis=1)
        return self.classes_[nearest]


class SampledDiscriminantAnalysis(
    SparseInput, ClassNamePrefixFeaturesOutMixin, ClassifierMixin, TransformerMixin, BaseEstimator
):
    """Linear discriminant analysis, its scatter within classes from sampled rows.

    Parameters:
        n_components: Directions, at most the classes less one; None: all of those.
        n_rows: Rows drawn.
        n_cols: Columns drawn; None: all up to 512 features, else as many as rows.
        shrinkage: Added to the scatter within classes, in units of its mean eigenvalue, > 0.
        random_state: Seed, ``RandomState`` or NumPy generator.

    Attributes:
        classes_: ``(g,)``.
        means_: ``(g, d)``.
        components_: ``(k, d)``.
        guarantee_: What is proved of (S_W + λ)^(-1/2), and whether it is vacuous.
        n_features_in_: d.

    Source: arXiv 1910.06151.
    """

    def __init__(
        self,
        n_components: Any = None,
        *,
        n_rows: Any = ROWS,
        n_cols: Any = None,
        shrinkage: Any = SHRINKAGE,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.n_rows = n_rows
        self.n_cols = n_cols
        self.shrinkage = shrinkage
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SampledDiscriminantAnalysis:
        """Fit to X ``(n, d)``, an array, memory map or CSR matrix, and classes y ``(n,)``.

        Raises:
            ValueError: one class only, no scatter within classes, NaN, a parameter out of range.
        """
        X, self.classes_, codes = _labelled(self, X, y)
        most = len(self.classes_) - 1
        k = None if self.n_components is None else directions(self.n_components, X.shape[1], most)
        self.found_ = discriminant_analysis(
            X, codes, k, self.n_rows, self.n_cols, generator_of(self.random_state),
            shrinkage=self.shrinkage,
        )  # fmt: skip
        self.means_, self.components_ = self.found_.means, self.found_.components.T
        self.guarantee_ = self.found_.guarantee
        return self

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def transform(self, X: Any) -> np.ndarray:
        """Rows along the discriminant directions ``(m, k)``.

        Raises:
            ValueError: another number of features, NaN.
        """
        check_is_fitted(self)
        return self.found_.transform(_dense(checked(self, X, reset=False)))

    def decision_function(self, X: Any) -> np.ndarray:
        """Log odds ``(m,)`` of the second of two classes, else log probabilities ``(m, g)``."""
        check_is_fitted(self)
        scores = self.found_.scores(_dense(checked(self, X, reset=False)))
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row."""
        values = self.decision_function(X)
        return self.classes_[(values > 0).astype(int) if values.ndim == 1 else values.argmax(1)]

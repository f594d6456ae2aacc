"""Principal components, regression and recommendation as scikit-learn estimators.

Needs scikit-learn.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data  # pyrefly: ignore

from stiefel.numerics.least_squares_arrays import as_generator
from stiefel.numerics.sampled.low_rank import lowrank_solve, pca_topk
from stiefel.numerics.sampled.matrix import SampledMatrix
from stiefel.numerics.sampled.means import group_means
from stiefel.numerics.sampled.sketching import sketch
from stiefel.numerics.sampled.sources import as_source
from stiefel.numerics.sampled.transform import Recommendation, recommend, threshold

# Kept as they are: float32 matrices are not copied to float64.
INPUT = [np.float64, np.float32]
# Directions, where neither their number nor that of rows is given.
COMPONENTS = 10
LEAST_ROWS = 200


class SparseInput:
    """The tag of estimators that take CSR matrices."""

    def __sklearn_tags__(self) -> Any:
        """Sparse input is accepted."""
        tags = super().__sklearn_tags__()  # pyrefly: ignore
        tags.input_tags.sparse = True
        return tags


def checked(estimator: Any, X: Any, *, reset: bool = True, **settings: Any) -> Any:
    """X as a float array or CSR matrix, not copied where it is one; checked by scikit-learn."""
    found = validate_data(estimator, X, accept_sparse="csr", dtype=INPUT, reset=reset, **settings)
    if hasattr(found, "sum_duplicates") and not found.has_canonical_format:
        found = found.copy()
        found.sum_duplicates()
    return found


def directions(k: Any, width: int, most: int | None = None) -> int:
    """How many components: ``k``, or the smaller of 10 and ``width``; checked."""
    if k is None:
        return min(COMPONENTS, width)
    limit = width if most is None else most
    if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= int(k) <= limit:
        raise ValueError(
            f"n_components must be an integer in 1 … {limit}, got {k!r} with n_features = {width}"
        )
    return int(k)


def rows_to_draw(given: Any, k: int) -> Any:
    """``n_rows``, or 20 for each direction and at least 200."""
    return max(20 * k, LEAST_ROWS) if given is None else given


def generator_of(random_state: Any) -> np.random.Generator:
    """The generator behind scikit-learn's ``random_state``."""
    if isinstance(random_state, np.random.Generator):
        return random_state
    return as_generator(check_random_state(random_state))


def row_mean(X: Any) -> np.ndarray:
    """Mean row, in one pass of blocks."""
    return group_means(as_source(X), np.zeros(X.shape[0], dtype=np.int64), 1)[0][0]


class SampledPCA(SparseInput, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Principal components from a few hundred rows, drawn by their distance from the mean.

    Parameters:
        n_components: k; None: 10, or all features if those are fewer.
        n_rows: Rows drawn; None: 20 k, at least 200.
        n_cols: Columns drawn; None: all up to 512 features, else as many as rows.
        center: Take the mean row off; a sparse X stays sparse.
        random_state: Seed, ``RandomState`` or NumPy generator.

    Attributes:
        components_: ``(k, d)``, orthonormal rows.
        explained_variance_: ``(k,)``, of each component, as estimated.
        singular_values_: ``(k,)``.
        mean_: ``(d,)``, zero without ``center``.
        guarantee_: What is proved of the eigenvalues of the scatter, and whether it is vacuous.
        n_features_in_: d.

    Source: arXiv 1910.06151.
    """

    def __init__(
        self,
        n_components: Any = None,
        *,
        n_rows: Any = None,
        n_cols: Any = None,
        center: Any = True,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.n_rows = n_rows
        self.n_cols = n_cols
        self.center = center
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> SampledPCA:
        """Find the components of X ``(n, d)``, an array, memory map or CSR matrix.

        Raises:
            ValueError: fewer than two rows, equal rows only, NaN, a parameter out of range.

        Warns:
            GapWarning: components whose variances are within 5 %.
        """
        X = checked(self, X, ensure_min_samples=2)
        n, d = X.shape
        k = directions(self.n_components, d)
        self.mean_ = row_mean(X) if self.center else np.zeros(d)
        A = SampledMatrix(X, center=self.mean_ if self.center else None)
        rng = generator_of(self.random_state)
        found = pca_topk(A, k, rows_to_draw(self.n_rows, k), self.n_cols, rng)
        self.components_ = found.vectors.T
        self.singular_values_ = np.sqrt(found.eigenvalues)
        self.explained_variance_ = found.eigenvalues / (n - 1)
        self.guarantee_ = found.guarantee
        return self

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def transform(self, X: Any) -> np.ndarray:
        """Rows along the components ``(m, k)``, in the dtype of X.

        Raises:
            ValueError: another number of features, NaN.
        """
        check_is_fitted(self)
        X = checked(self, X, reset=False)
        axes = self.components_.T.astype(X.dtype)
        return np.asarray(X @ axes) - (self.mean_ @ self.components_.T).astype(X.dtype)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Rows ``(m, d)`` from coordinates ``(m, k)``.

        Raises:
            ValueError: another number of components.
        """
        check_is_fitted(self)
        X = np.asarray(X)
        if X.ndim != 2 or X.shape[1] != len(self.components_):
            raise ValueError(f"X must be (m, {len(self.components_)}), got shape {X.shape}")
        return X @ self.components_ + self.mean_

    def __sklearn_tags__(self) -> Any:
        """Precision is kept."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class SampledLowRankRegressor(SparseInput, RegressorMixin, BaseEstimator):
    """Least squares in the leading directions, from rows drawn by length; y is read there only.

    Parameters:
        n_components: k; None: 10, or all features if those are fewer.
        n_rows: Rows drawn; None: 20 k, at least 200.
        n_cols: Columns drawn; None: all up to 512 features, else as many as rows.
        fit_intercept: Take the means off first.
        random_state: Seed, ``RandomState`` or NumPy generator.

    Attributes:
        coef_: ``(d,)``.
        intercept_: Number.
        guarantee_: What is proved of ``coef_``, and whether it is vacuous.
        n_features_in_: d.

    Source: arXiv 1910.06151.
    """

    def __init__(
        self,
        n_components: Any = None,
        *,
        n_rows: Any = None,
        n_cols: Any = None,
        fit_intercept: Any = True,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.n_rows = n_rows
        self.n_cols = n_cols
        self.fit_intercept = fit_intercept
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SampledLowRankRegressor:
        """Fit to X ``(n, d)``, an array, memory map or CSR matrix, and y ``(n,)``.

        Raises:
            ValueError: fewer than two rows, equal rows only, NaN, a parameter out of range.
        """
        X, y = self._checked(X, y)
        k = directions(self.n_components, X.shape[1])
        mean, level = (row_mean(X), y.mean()) if self.fit_intercept else (None, 0.0)
        A = SampledMatrix(X, center=mean)
        rng = generator_of(self.random_state)
        drawn = sketch(A, rows_to_draw(self.n_rows, k), self.n_cols, rng)
        # Rows that were drawn may span less than was asked for: that much is solved for.
        if self.n_components is None:
            k = min(k, len(drawn.spectrum[1]))
        found = lowrank_solve(A, y - level, k, sketch_of=drawn)
        self.coef_, self.guarantee_ = found.x, found.guarantee
        self.intercept_ = float(level - (mean @ found.x if mean is not None else 0.0))
        return self

    def _checked(self, X: Any, y: Any) -> tuple[Any, np.ndarray]:
        X, y = validate_data(
            self, X, y, accept_sparse="csr", dtype=INPUT, y_numeric=True, ensure_min_samples=2
        )
        if hasattr(X, "sum_duplicates") and not X.has_canonical_format:
            X = X.copy()
            X.sum_duplicates()
        return X, np.asarray(y, dtype=np.float64)

    def predict(self, X: Any) -> np.ndarray:
        """Values at rows X ``(m, d)``.

        Raises:
            ValueError: another number of features, NaN.
        """
        check_is_fitted(self)
        return np.asarray(checked(self, X, reset=False) @ self.coef_) + self.intercept_


class SampledRecommender(SparseInput, TransformerMixin, BaseEstimator):
    """Rows of preferences, completed by what the leading singular vectors say about them.

    Parameters:
        n_components: k: the threshold lies between the k-th and the next singular value found;
            None: 10, or all features if those are fewer. Ignored where ``sigma`` is given.
        sigma: Threshold on singular values; None: from ``n_components``.
        eta: Half the relative width of the ramp around sigma², in (0, 1).
        n_rows: Rows drawn; None: 20 k, at least 200.
        n_cols: Columns drawn; None: all up to 512 features, else as many as rows.
        random_state: Seed, ``RandomState`` or NumPy generator.

    Attributes:
        sigma_: The threshold used.
        function_: t(AᴴA), as :func:`~stiefel.numerics.sampled.threshold` gives it.
        guarantee_: What is proved of it, and whether that is vacuous.
        n_features_in_: d.

    Source: arXiv 1910.06151; Kerenidis and Prakash (2017) for the task.
    """

    def __init__(
        self,
        n_components: Any = None,
        *,
        sigma: Any = None,
        eta: Any = 0.3,
        n_rows: Any = None,
        n_cols: Any = None,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.sigma = sigma
        self.eta = eta
        self.n_rows = n_rows
        self.n_cols = n_cols
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> SampledRecommender:
        """Draw from X ``(n, d)``, users by items; it is kept, not copied.

        Raises:
            ValueError: zero X, NaN, a parameter out of range.
        """
        X = checked(self, X)
        k = directions(self.n_components, X.shape[1])
        self._matrix = SampledMatrix(X)
        rng = generator_of(self.random_state)
        drawn = sketch(self._matrix, rows_to_draw(self.n_rows, k), self.n_cols, rng)
        self.sigma_ = _between(drawn.spectrum[1], k) if self.sigma is None else self.sigma
        self.function_ = threshold(drawn, self.sigma_, self.eta)
        self.guarantee_ = self.function_.guarantee
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Thresholded rows ``(m, d)`` of users X ``(m, d)``, known or new.

        Raises:
            ValueError: another number of items, NaN.
        """
        check_is_fitted(self)
        X = checked(self, X, reset=False)
        X = X.toarray() if hasattr(X, "toarray") else X
        return self.function_.rmatmul(X).astype(X.dtype)

    def recommend(self, i: int) -> Recommendation:
        """The thresholded row of user ``i`` of the fitted X, to draw items from.

        Raises:
            IndexError: no such user.
        """
        check_is_fitted(self)
        return recommend(self._matrix, i, self.sigma_, self.eta, function=self.function_)

    def __sklearn_tags__(self) -> Any:
        """Precision is kept."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _between(values: np.ndarray, k: int) -> float:
    """Geometric mean of the k-th and the next singular value; below the k-th if it is the last."""
    k = min(k, len(values))
    following = values[k] if k < len(values) else values[k - 1] / 4
    return math.sqrt(math.sqrt(float(values[k - 1]) * float(following)))

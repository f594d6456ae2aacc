"""Least squares that says which points to label, for scikit-learn. Needs scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import (
    check_is_fitted,
    validate_data,  # pyrefly: ignore
)

from stiefel.numerics.dpp_design import DELTA, MAX_TRIES, Design, sample_design, weighted_solution
from stiefel.numerics.least_squares_arrays import as_array, as_generator, check_finite
from stiefel.numerics.least_squares_basis import KEPT_BYTES, fit_basis, rotate


class DPPLeastSquares(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Linear least squares in a space of functions, and the choice of the points to label.

    ::

        model = DPPLeastSquares(basis=features, n_samples=80, random_state=0)
        chosen = model.query(candidates)            # which rows to measure
        model.fit(candidates[chosen], measure(candidates[chosen]))
        model.predict(candidates)

    ``fit`` weights the points of the last query as it asks for; with ``sample_weight`` given, or on
    other points, it is weighted least squares with those weights (1 if none).

    Args:
        basis: ``"features"``: the columns of X span the space, with no constant added; or a
            function of X ``(n, d)`` that returns features ``(n, m)``.
        method: How points are chosen; see :func:`~stiefel.numerics.sample_design`.
        n_samples: Points to label; None: six per dimension, four if ``delta`` is None.
        delta: Choose again until λ_min(G) ≥ 1 − δ; None: take the first choice.
        rtol: When features count as dependent; see :func:`~stiefel.numerics.fit_basis`.
        max_tries: Choices made until ``query`` gives up.
        random_state: Seed, ``RandomState`` or NumPy generator.

    Attributes:
        coef_: Coefficients of the features, ``(m,)`` or ``(k, m)`` for k outputs.
        lambda_min_: Smallest eigenvalue of the empirical Gram matrix of ``fit``: of the orthonormal
            basis of the candidates where ``query`` was given some, else of the features themselves.
        condition_: Condition number of the weighted system of ``fit``; infinite where that does not
            determine the fit.
        rank_: Of that system.
        design_: What the last ``query`` chose, with weights and stability.
        n_features_in_: Columns of X.

    Source: arXiv 2312.14057.
    """

    # Parameters are checked in query and fit, as scikit-learn asks.
    def __init__(
        self,
        basis: Any = "features",
        *,
        method: Any = "dpp-repeat",
        n_samples: Any = None,
        delta: Any = DELTA,
        rtol: Any = 1e-10,
        max_tries: Any = MAX_TRIES,
        random_state: Any = None,
    ) -> None:
        self.basis = basis
        self.method = method
        self.n_samples = n_samples
        self.delta = delta
        self.rtol = rtol
        self.max_tries = max_tries
        self.random_state = random_state

    def query(self, X: Any, mu: Any = None) -> np.ndarray:
        """Choose the candidates to label.

        Features of many candidates are computed in blocks and not kept: memory is that of X.

        Args:
            X: Candidates ``(N, d)``.
            mu: Their weights ``(N,)`` where errors do not count the same everywhere.

        Returns:
            Indices ``(n,)`` into X, some perhaps twice: label those once, but keep them twice.

        Raises:
            ValueError: fewer candidates or samples than dimensions, dependent features, NaN.
            RuntimeError: no choice was stable enough; the message says what to change.
        """
        X = check_array(X, dtype=(np.float64, np.float32), input_name="X")
        width = self._features(X[:1]).shape[1]

        def rows(indices: Any) -> np.ndarray:
            return self._features(X[indices])

        keep = len(X) * width * 8 <= KEPT_BYTES
        basis = fit_basis(
            self._features(X) if keep else rows, mu, self.rtol, size=len(X), keep=keep
        )
        state = self.random_state
        if not isinstance(state, np.random.Generator):
            state = check_random_state(state)
        self.design_: Design = sample_design(
            basis,
            self.n_samples,
            method=self.method,
            delta=self.delta,
            generator=as_generator(state),
            max_tries=self.max_tries,
        )
        # All that fit needs of the basis; the rest is as large as X.
        self._inverses, self._queried = basis.inverses, X[self.design_.indices]
        return self.design_.indices

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> DPPLeastSquares:
        """Fit to labelled points.

        Args:
            X: Points ``(n, d)``, those that ``query`` chose or any.
            y: Labels ``(n,)`` or ``(n, k)``.
            sample_weight: ``(n,)``; None: those of the last query where X is what it chose, else 1.

        Without a query, samples that do not determine the fit give the smallest one, as with
        scikit-learn's own linear regression; ``condition_`` says so.

        Raises:
            ValueError: after a query, fewer samples than functions or samples that do not determine
                the fit; NaN or Inf; weights that are negative, of another length or all zero.
        """
        X, y = validate_data(
            self, X, y, dtype=(np.float64, np.float32), multi_output=True, y_numeric=True
        )
        queried = getattr(self, "_queried", None)
        same = queried is not None and np.array_equal(queried, X)
        weights = self.design_.weights if same and sample_weight is None else sample_weight
        weights = _sample_weights(weights, len(X))
        features = self._features(X)
        inverses = getattr(self, "_inverses", ())
        if inverses and len(inverses[0]) != features.shape[1]:
            inverses = ()
        scale = np.sqrt(weights / len(X))
        rows = scale[:, None] * rotate(features, inverses)
        # Columns of one size, so that the rank does not depend on units; φ has it already.
        norms = np.ones(rows.shape[1]) if inverses else np.linalg.norm(rows, axis=0)
        norms[norms == 0] = 1.0
        found, _, self.rank_ = weighted_solution(
            rows / norms,
            (scale * np.asarray(y, dtype=np.float64).T).T,
            unique=bool(inverses),
        )
        found = (found.T / norms).T
        for inverse in reversed(inverses):
            found = inverse @ found
        sigma = np.linalg.svd(rows, compute_uv=False)
        full = self.rank_ == rows.shape[1]
        self.lambda_min_ = float(sigma[-1] ** 2) if full else 0.0
        self.condition_ = float(sigma[0] / sigma[-1]) if full else np.inf
        self.coef_ = found.T
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Values of the fit at X ``(n, d)``, in the precision of X: ``(n,)`` or ``(n, k)``."""
        check_is_fitted(self, "coef_")
        X = validate_data(self, X, reset=False, dtype=(np.float64, np.float32))
        return (self._features(X) @ self.coef_.T).astype(X.dtype)

    def _features(self, X: np.ndarray) -> np.ndarray:
        """Features (n, m) in float64."""
        if callable(self.basis):
            found = as_array(self.basis(X), "basis(X)")
            if found.ndim != 2 or len(found) != len(X):
                raise ValueError(f"basis(X) must be ({len(X)}, m), got shape {found.shape}")
            check_finite(found, "basis(X)")
            return found
        if self.basis != "features":
            raise ValueError(f"basis must be 'features' or a function of X, got {self.basis!r}")
        return X.astype(np.float64, copy=False)


def _sample_weights(given: Any, n: int) -> np.ndarray:
    """Weights (n,), checked; ones if None."""
    if given is None:
        return np.ones(n)
    weights = as_array(given, "sample_weight")
    if weights.shape != (n,):
        raise ValueError(f"sample_weight must have shape ({n},), got {weights.shape}")
    check_finite(weights, "sample_weight")
    if (weights < 0).any() or not weights.any():
        raise ValueError(
            "sample_weight must be ≥ 0 and not zero everywhere, its entries are between "
            f"{weights.min()} and {weights.max()}"
        )
    return weights

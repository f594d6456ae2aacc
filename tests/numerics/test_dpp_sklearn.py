import pickle
import subprocess
import sys

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import stiefel.numerics as numerics
from stiefel.numerics import (
    DPPLeastSquares,
    dpp_sklearn,
    fit_basis,
    orthonormal_polynomials,
    solve_design,
)

CANDIDATES = np.linspace(-1, 1, 2000)[:, None]


def legendre(X):
    return orthonormal_polynomials(X[:, 0], 12)


def f(X):
    return 1 / (1 + 25 * X[:, 0] ** 2)


@pytest.fixture
def model():
    return DPPLeastSquares(legendre, random_state=0)


def test_laws_of_scikit_learn():
    done = check_estimator(DPPLeastSquares(), on_skip=None)
    assert {r["status"] for r in done} <= {"passed", "skipped"}
    assert sum(r["status"] == "passed" for r in done) > 50


def test_query_fit_predict(model):
    chosen = model.query(CANDIDATES)
    assert chosen.shape == (72,)  # six per dimension
    assert model.design_.lambda_min >= 0.5
    assert model.fit(CANDIDATES[chosen], f(CANDIDATES[chosen])) is model
    assert model.lambda_min_ == pytest.approx(model.design_.lambda_min)
    best = np.linalg.lstsq(legendre(CANDIDATES), f(CANDIDATES))[0]
    least = np.mean((f(CANDIDATES) - legendre(CANDIDATES) @ best) ** 2)
    assert np.mean((f(CANDIDATES) - model.predict(CANDIDATES)) ** 2) < 1.5 * least
    # The pure functions give the same fit.
    basis = fit_basis(legendre(CANDIDATES))
    fit = solve_design(basis, model.design_, f(CANDIDATES[chosen]))
    np.testing.assert_allclose(model.coef_, fit.coefficients, atol=1e-12)
    assert model.condition_ == pytest.approx(fit.condition)


def test_weights_of_the_query_are_used_where_they_belong(model):
    X = CANDIDATES[model.query(CANDIDATES)]
    y = f(X)
    by_itself = model.fit(X, y).coef_
    given = model.fit(X, y, sample_weight=model.design_.weights).coef_
    np.testing.assert_allclose(given, by_itself, atol=1e-13)
    even = model.fit(X, y, sample_weight=np.ones(len(X))).coef_
    assert np.abs(even - by_itself).max() > 1e-4
    other = model.fit(X[::-1], y[::-1]).coef_  # not the rows of the query: weights 1
    np.testing.assert_allclose(other, even, atol=1e-12)
    fresh = clone(model).fit(X, y).coef_
    np.testing.assert_allclose(fresh, even, atol=1e-10)


def test_fit_is_weighted_least_squares():
    rng = np.random.default_rng(0)
    X, y, w = rng.standard_normal((40, 5)), rng.standard_normal(40), rng.random(40)
    units = np.array([1, 1e-9, 1e9, 3, 1])
    model = DPPLeastSquares().fit(X * units, y, w)
    root = np.sqrt(w)
    expected = np.linalg.lstsq(root[:, None] * X, root * y)[0]
    np.testing.assert_allclose(model.coef_ * units, expected, rtol=1e-10)
    assert (model.rank_, model.n_features_in_) == (5, 5)


def test_outputs_and_precision(model):
    X = CANDIDATES[model.query(CANDIDATES)]
    Y = np.stack([f(X), X[:, 0] ** 3], axis=1)
    found = model.fit(X, Y).predict(CANDIDATES)
    assert found.shape == (2000, 2)
    np.testing.assert_allclose(found[:, 1], CANDIDATES[:, 0] ** 3, atol=1e-12)
    np.testing.assert_allclose(model.fit(X, Y[:, 0]).predict(CANDIDATES), found[:, 0], atol=1e-12)
    narrow = CANDIDATES.astype(np.float32)
    chosen = model.query(narrow)
    predicted = model.fit(narrow[chosen], f(narrow[chosen])).predict(narrow)
    assert predicted.dtype == np.float32
    assert model.predict(CANDIDATES).dtype == np.float64


def test_candidates_beyond_memory_give_the_same(model, monkeypatch):
    kept = model.query(CANDIDATES)
    calls = []

    def counted(X):
        calls.append(len(X))
        return legendre(X)

    monkeypatch.setattr(dpp_sklearn, "KEPT_BYTES", 1000)
    again = DPPLeastSquares(counted, random_state=0).query(CANDIDATES)
    np.testing.assert_array_equal(again, kept)
    assert len(calls) > 3  # passes over blocks, and rows on demand


@pytest.mark.parametrize("method", ["dpp", "volume", "iid", "uniform", "volume-repeat"])
def test_methods_and_candidates_weights(method):
    model = DPPLeastSquares(legendre, method=method, delta=None, random_state=1)
    mu = np.linspace(0, 1, 2000)
    chosen = model.query(CANDIDATES, mu)
    assert len(chosen) == (12 if method == "dpp" else 48)
    assert 0 not in chosen


def test_the_state_decides():
    first, again = (DPPLeastSquares(legendre, random_state=3).query(CANDIDATES) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for state in (np.random.RandomState(0), np.random.default_rng(0)):
        model = DPPLeastSquares(legendre, random_state=state)
        assert (model.query(CANDIDATES) != model.query(CANDIDATES)).any()


def test_works_with_what_scikit_learn_has(model):
    X, y = load_diabetes(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), PolynomialFeatures(1), DPPLeastSquares())
    assert cross_val_score(pipeline, X, y, cv=5).mean() > 0.45
    queried = model.query(CANDIDATES)
    model.fit(CANDIDATES[queried], f(CANDIDATES[queried]))
    copy = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own
    np.testing.assert_array_equal(copy.predict(CANDIDATES), model.predict(CANDIDATES))
    assert len(pickle.dumps(model)) < 20_000  # neither candidates nor their basis


def test_samples_that_do_not_determine_the_fit():
    X = np.array([[1.0, 2, 3], [2, 4, 5]])
    model = DPPLeastSquares().fit(X, [1.0, 2.0])
    assert (model.lambda_min_, model.condition_, model.rank_) == (0, np.inf, 2)
    np.testing.assert_allclose(model.predict(X), [1, 2])
    model = DPPLeastSquares(legendre, random_state=0)
    X = CANDIDATES[model.query(CANDIDATES)]
    with pytest.raises(ValueError, match="need at least m=12 samples, got 5"):
        model.fit(X[:5], f(X[:5]))
    with pytest.raises(ValueError, match="rank 1"):
        model.fit(np.repeat(X[:1], 20, axis=0), np.ones(20))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"basis": "columns"}, ValueError, "basis must be 'features' or a function"),
        ({"basis": lambda X: X[:, 0]}, ValueError, r"basis\(X\) must be \(1, m\)"),
        ({"basis": lambda X: np.full((len(X), 2), np.nan)}, ValueError, "finite"),
        ({"basis": lambda X: np.ones((len(X), 2))}, ValueError, "rank 1 with 2 columns"),
        ({"n_samples": 11}, ValueError, "need at least m=12"),
        ({"n_samples": 25}, ValueError, "pass n=24 or 36"),
        ({"method": "lhs"}, ValueError, "method must be one of"),
        ({"delta": 2}, ValueError, "delta"),
        ({"n_samples": 24, "delta": 0.01, "max_tries": 2}, RuntimeError, "2 tries"),
    ],
)
def test_bad_parameters(model, change, error, words):
    with pytest.raises(error, match=words):
        model.set_params(**change).query(CANDIDATES)


def test_bad_candidates_and_weights(model):
    with pytest.raises(ValueError, match="at least m=12 candidates"):
        model.query(CANDIDATES[:11])
    with pytest.raises(ValueError, match="NaN"):
        model.query([[np.nan]])
    X = CANDIDATES[::50]
    for weights, words in (
        (np.ones(3), "shape"), (-np.ones(40), "≥ 0"), (np.zeros(40), "zero everywhere"),
        (np.full(40, np.nan), "finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model.fit(X, f(X), weights)


def test_scikit_learn_is_imported_only_when_asked_for():
    code = (
        "import sys, stiefel.numerics as n; a = 'sklearn' in sys.modules; "
        "n.DPPLeastSquares; print(a, 'sklearn' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]
    assert "DPPLeastSquares" in numerics.__all__

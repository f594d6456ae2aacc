import pickle
import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from stiefel.numerics import sampled
from stiefel.numerics.sampled import (
    GapWarning,
    SampledDiscriminantAnalysis,
    SampledLowRankRegressor,
    SampledNearestCentroid,
    SampledPCA,
    SampledRecommender,
    SampledSVC,
)

ESTIMATORS = [
    SampledDiscriminantAnalysis,
    SampledLowRankRegressor,
    SampledNearestCentroid,
    SampledPCA,
    SampledRecommender,
    SampledSVC,
]
CLASSIFIERS = [SampledDiscriminantAnalysis, SampledNearestCentroid, SampledSVC]


@pytest.fixture(scope="module")
def digits():
    return load_digits(return_X_y=True)


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.filterwarnings("ignore::stiefel.numerics.sampled.GapWarning")
def test_laws_of_scikit_learn(kind):
    done = check_estimator(kind(), on_skip=None)
    assert {r["status"] for r in done} <= {"passed", "skipped"}
    assert sum(r["status"] == "passed" for r in done) > 40


@pytest.mark.filterwarnings("ignore::stiefel.numerics.sampled.GapWarning")
def test_principal_components_take_the_mean_off(digits):
    X, _ = digits
    shifted = X + 100.0
    exact = PCA(5).fit(shifted)
    found = SampledPCA(5, n_rows=2000, random_state=0).fit(shifted)
    np.testing.assert_allclose(found.mean_, shifted.mean(0))
    np.testing.assert_allclose(found.explained_variance_, exact.explained_variance_, rtol=0.1)
    kept = np.linalg.norm(found.transform(shifted)) / np.linalg.norm(exact.transform(shifted))
    assert kept > 0.98
    back = found.inverse_transform(found.transform(shifted))
    best = exact.inverse_transform(exact.transform(shifted))
    assert ((shifted - back) ** 2).sum() < 1.05 * ((shifted - best) ** 2).sum()
    np.testing.assert_allclose(found.singular_values_**2 / 1796, found.explained_variance_)
    assert found.guarantee_.vacuous
    raw = SampledPCA(2, center=False, n_rows=500, random_state=0).fit(shifted)
    assert not raw.mean_.any()
    assert abs(raw.components_[0] @ np.ones(64)) / 8 > 0.99
    narrow = X.astype(np.float32)
    assert found.transform(narrow).dtype == np.float32


def test_sparse_input_is_as_dense():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((300, 12)) * (rng.random((300, 12)) < 0.3) * np.logspace(1, -1, 12)
    y = X[:, 0] - X[:, 1]
    for model in (
        SampledPCA(2, random_state=0),
        SampledLowRankRegressor(3, random_state=0),
        SampledRecommender(3, random_state=0),
        SampledSVC(random_state=0),
        SampledNearestCentroid(random_state=0),
        SampledDiscriminantAnalysis(random_state=0),
    ):
        target = y if isinstance(model, SampledLowRankRegressor) else y > 0
        answer = "predict" if hasattr(model, "predict") else "transform"
        dense = getattr(clone(model).fit(X, target), answer)(X)
        other = clone(model).fit(sparse.csr_array(X), target)
        np.testing.assert_allclose(getattr(other, answer)(sparse.csr_array(X)), dense, atol=1e-8)


def test_regression_in_all_directions_is_near_least_squares():
    X, y = load_diabetes(return_X_y=True)
    exact = LinearRegression().fit(X, y)
    found = SampledLowRankRegressor(n_rows=20_000, random_state=0).fit(X, y)
    assert found.score(X, y) > exact.score(X, y) - 0.01
    through = SampledLowRankRegressor(3, fit_intercept=False, random_state=0).fit(X, y)
    assert through.intercept_ == 0
    scores = cross_val_score(
        make_pipeline(StandardScaler(), SampledLowRankRegressor(5, n_rows=2000, random_state=0)),
        X, y,
    )  # fmt: skip
    assert scores.mean() > 0.4


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_read_digits(kind, digits):
    X, y = digits
    model = kind(random_state=0)
    assert model.fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.85
    names = np.array(list("abcdefghij"))[y]
    np.testing.assert_array_equal(
        kind(random_state=0).fit(X[::2], names[::2]).predict(X[:50]),
        np.array(list("abcdefghij"))[model.predict(X[:50])],
    )
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own
    np.testing.assert_array_equal(again.predict(X[:9]), model.predict(X[:9]))


def test_nearest_centroid_estimates_distances(digits):
    X, y = digits
    model = SampledNearestCentroid(20_000, random_state=0).fit(X, y)
    means = np.stack([X[y == c].mean(0) for c in range(10)])
    exact = ((X[:40, None] - means) ** 2).sum(2)
    np.testing.assert_allclose(model.distances(X[:40]), exact, atol=0.05 * exact.max())


def test_recommender_draws_items(digits):
    X, _ = digits
    model = SampledRecommender(10, n_rows=1000, random_state=0).fit(X)
    rows = model.transform(X[:3])
    found = model.recommend(1)
    np.testing.assert_allclose(found.row, rows[1])
    assert found.sample(5, 0).shape == (5,)
    sigma = np.linalg.svd(X, compute_uv=False)
    assert sigma[11] < model.sigma_ < sigma[8]
    assert model.guarantee_.vacuous
    given_ = SampledRecommender(sigma=300.0, random_state=0).fit(X)
    assert given_.sigma_ == 300


def test_seeds_decide_the_draws(digits):
    X, y = digits
    a, b, c = (SampledSVC(n_rows=50, random_state=s).fit(X, y).coef_ for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    SampledSVC(n_rows=50, random_state=np.random.default_rng(0)).fit(X, y)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda X, y: SampledPCA(65).fit(X), "n_components must be an integer in 1 … 64"),
        (lambda X, y: SampledPCA(2.5).fit(X), "n_components"),
        (lambda X, y: SampledPCA(2, n_rows=1).fit(X), r"min\(r, c\) = 1"),
        (lambda X, y: SampledPCA(2, n_rows=0).fit(X), "r must be"),
        (lambda X, y: SampledPCA(2).fit(np.ones((5, 3))), "zero matrix"),
        (lambda X, y: SampledLowRankRegressor(0).fit(X, y), "n_components"),
        (lambda X, y: SampledRecommender(sigma=-1.0).fit(X), "sigma must be positive"),
        (lambda X, y: SampledRecommender(eta=2.0).fit(X), "eta must be"),
        (lambda X, y: SampledSVC(gamma=-1).fit(X, y), "gamma must be positive"),
        (lambda X, y: SampledSVC().fit(X, 0 * y), "2 classes"),
        (lambda X, y: SampledNearestCentroid(1).fit(X, y), "n_draws must be an integer ≥ 2"),
        (lambda X, y: SampledDiscriminantAnalysis(10).fit(X, y), "in 1 … 9"),
        (lambda X, y: SampledDiscriminantAnalysis(shrinkage=-1).fit(X, y), "shrinkage"),
    ],
)  # fmt: skip
def test_bad_input(make, match, digits):
    with pytest.raises(ValueError, match=match):
        make(*digits)


def test_close_components_warn():
    X = np.random.default_rng(0).standard_normal((2000, 5))
    with pytest.warns(GapWarning, match="not identifiable"):
        SampledPCA(3, n_rows=2000, random_state=0).fit(X)


def test_without_scikit_learn_the_functions_stay():
    code = (
        "import sys\n"
        "for name in ('sklearn', 'scipy.sparse'): sys.modules[name] = None\n"
        "import numpy as np, stiefel.numerics.sampled as s\n"
        "print(s.lowrank(np.eye(3)[:2], 1, generator=0).V.shape)\n"
        "try: s.SampledPCA\n"
        "except ImportError as e: print(e)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[0] == "(3, 1)"
    assert "SampledPCA needs scikit-learn" in run.stdout
    assert "stiefel[atlas]" in run.stdout
    with pytest.raises(AttributeError, match="SampledSVD"):
        sampled.SampledSVD  # noqa: B018

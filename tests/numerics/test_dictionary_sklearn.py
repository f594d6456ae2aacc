"""The estimator: scikit-learn's laws, streams, preprocessing, bad input."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from stiefel.numerics import (
    NoGradientWarning,
    OnlineOrthogonalDictionary,
    fw_step,
    recovery_error,
    start_dictionary,
)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"p": 4, "center": "feature", "whiten": True, "init": "pca", "n_epochs": 2},
        {"polar": "newton-schulz", "center": "none", "dtype": "float32", "init": "dct"},
    ],
)
def test_laws_of_scikit_learn(settings):
    done = check_estimator(OnlineOrthogonalDictionary(**settings), on_skip=None)
    statuses = [check["status"] for check in done]
    assert set(statuses) <= {"passed", "skipped"}
    assert statuses.count("passed") >= 45
    assert statuses.count("skipped") <= 3


def walks(count=60, n=16, seed=0):
    return np.random.default_rng(seed).standard_normal((count, n)).cumsum(axis=1)


def sparse(d, count, seed=0, theta=0.1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, len(d))) * (rng.random((count, len(d))) < theta)
    return x @ d.T


def test_steps_are_those_of_the_function():
    x = walks()
    start = np.linalg.qr(walks(16))[0]
    learner = OnlineOrthogonalDictionary(p=4, init=start, center="sample")
    y = torch.from_numpy((x - x.mean(1, keepdims=True)).T)
    state = start_dictionary(16, torch.from_numpy(start))
    scale = float(y[:, :20].square().mean().sqrt())
    for part in range(3):
        learner.partial_fit(x[20 * part : 20 * part + 20])
        before = learner.components_
        state = fw_step(state, y[:, 20 * part : 20 * part + 20], 4)
    np.testing.assert_allclose(learner.relaxed_, state.A, atol=1e-12)
    assert learner.scale_ == pytest.approx(scale)
    assert learner.n_steps_ == len(learner.gap_) == 3
    assert learner.partial_fit(x).components_ is not before
    assert not np.allclose(learner.components_, before)
    state = fw_step(state, y, 4)
    assert min(learner.gap_) >= 0
    u, _, vt = np.linalg.svd(state.A)
    np.testing.assert_allclose(learner.components_, u @ vt, atol=1e-12)


def test_counter_survives_calls_pickles_and_state_dicts():
    x = walks(200)
    whole = OnlineOrthogonalDictionary(random_state=0, center="feature", whiten=True)
    for start in range(0, 200, 20):
        whole.partial_fit(x[start : start + 20])
    half = OnlineOrthogonalDictionary(random_state=0, center="feature", whiten=True)
    for start in range(0, 100, 20):
        half.partial_fit(x[start : start + 20])
    pickled = pickle.loads(pickle.dumps(half))  # noqa: S301 - our own bytes
    loaded = OnlineOrthogonalDictionary(center="feature", whiten=True)
    loaded.load_state_dict(half.state_dict())
    for resumed in (pickled, loaded):
        for start in range(100, 200, 20):
            resumed.partial_fit(x[start : start + 20])
        assert resumed.n_steps_ == 10
        assert resumed.gap_ == whole.gap_
        np.testing.assert_array_equal(resumed.transform(x), whole.transform(x))
    assert half.n_steps_ == 5
    whole.fit(x[:40])
    assert whole.n_steps_ == 2


def test_bad_state_dicts():
    learner = OnlineOrthogonalDictionary(random_state=0).fit(walks())
    good = learner.state_dict()
    for change, match in (
        ({"A": torch.eye(3)}, r"A and G must be \(16, 16\)"),
        ({"G": torch.full((16, 16), torch.nan).double()}, "finite"),
        ({"scatter": torch.eye(16)}, "whiten"),
    ):
        with pytest.raises(ValueError, match=match):
            OnlineOrthogonalDictionary().load_state_dict({**good, **change})
    del good["t"]
    with pytest.raises(ValueError, match="state lacks t"):
        OnlineOrthogonalDictionary().load_state_dict(good)


def test_codes_and_back():
    x = walks() + 5
    learner = OnlineOrthogonalDictionary(random_state=0).fit(x)
    atoms = learner.components_
    np.testing.assert_allclose(atoms @ atoms.T, np.eye(16), atol=1e-12)
    codes = learner.transform(x)
    np.testing.assert_allclose(codes, (x - x.mean(1, keepdims=True)) @ atoms.T, atol=1e-12)
    means = x.mean(1)
    np.testing.assert_allclose(learner.inverse_transform(codes, means), x, atol=1e-12)
    np.testing.assert_allclose(learner.inverse_transform(codes), x - means[:, None], atol=1e-12)
    few = learner.set_params(n_nonzero=3).transform(x)
    assert (np.count_nonzero(few, axis=1) == 3).all()
    assert (few[few != 0] == codes[few != 0]).all()
    assert learner.transform(x.astype(np.float32)).dtype == np.float32
    for means in (np.ones(3), np.full(60, np.nan)):
        with pytest.raises(ValueError, match="sample_mean"):
            learner.inverse_transform(codes, means)
    with pytest.raises(ValueError, match="16 columns"):
        learner.inverse_transform(codes[:, :5])


def test_running_mean_of_features():
    x = walks(90) + 100
    learner = OnlineOrthogonalDictionary(center="feature", random_state=0)
    for part in np.split(x, [10, 45]):
        learner.partial_fit(part)
    np.testing.assert_allclose(learner.mean_, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(learner.inverse_transform(learner.transform(x)), x, rtol=1e-12)
    np.testing.assert_allclose(learner.transform(x).mean(0), 0, atol=1e-10)


@pytest.mark.parametrize("center", ["none", "feature"])
def test_whitening_learns_an_invertible_dictionary(center):
    rng = np.random.default_rng(0)
    mixing = np.linalg.qr(rng.standard_normal((10, 10)))[0] @ np.diag(np.linspace(0.4, 2, 10))
    mixing = mixing @ np.linalg.qr(rng.standard_normal((10, 10)))[0]
    x = sparse(mixing, 12_000) + (50 if center == "feature" else 0)
    plain = OnlineOrthogonalDictionary(batch_size=40, random_state=0, center=center)
    white = clone(plain).set_params(whiten=True).fit(x)
    plain.fit(x)
    errors = []
    for learner in (white, plain):
        # Codes are true codes up to scale: rows of the map times the mixing are nearly unit.
        product = learner._maps()[0].T @ mixing
        product /= np.linalg.norm(product, axis=1, keepdims=True)
        errors.append(1 - (product**4).sum() / 10)
    assert errors[0] < 0.02 < 0.1 < errors[1]
    np.testing.assert_allclose(white.inverse_transform(white.transform(x)), x, atol=1e-9)
    second = white._stream.scatter / len(x)
    y = x - white.mean_
    np.testing.assert_allclose(second, y.T @ y / len(x), rtol=1e-9, atol=1e-9)


def test_whitening_leaves_empty_directions_out():
    x = walks()
    learner = OnlineOrthogonalDictionary(center="sample", whiten=True, random_state=0).fit(x)
    back = learner.inverse_transform(learner.transform(x), x.mean(1))
    np.testing.assert_allclose(back, x, atol=1e-7)


@pytest.mark.parametrize("p", [3, 4])
def test_recovers_a_dictionary_from_a_stream(p):
    d = np.linalg.qr(np.random.default_rng(1).standard_normal((20, 20)))[0]
    learner = OnlineOrthogonalDictionary(p=p, center="none", random_state=0).fit(sparse(d, 16_000))
    error = float(recovery_error(torch.from_numpy(learner.relaxed_), torch.from_numpy(d)))
    assert error < 0.01
    assert learner.gap_[-1] < 0.1 * max(learner.gap_)


def test_digits_beat_principal_components():
    x = load_digits().data
    learner = OnlineOrthogonalDictionary(p=4, n_epochs=3, n_nonzero=2, random_state=1).fit(x)
    rest = x - learner.inverse_transform(learner.transform(x), x.mean(1))
    y = x - x.mean(1, keepdims=True)
    axes = np.linalg.eigh(y.T @ y)[1].T
    codes = y @ axes.T
    largest = np.sort(codes**2, axis=1)[:, -2:].sum()
    assert (rest**2).sum() < (y**2).sum() - largest


def test_float32_state_above_256_features():
    rng = np.random.default_rng(0)
    learner = OnlineOrthogonalDictionary(random_state=0).partial_fit(rng.random((4, 257)))
    assert learner.relaxed_.dtype == np.float32
    assert OnlineOrthogonalDictionary(dtype="float32").fit(walks()).relaxed_.dtype == np.float32
    assert OnlineOrthogonalDictionary().fit(walks().astype(np.float32)).relaxed_.dtype == np.float64


def test_a_memory_map_is_learned_from(tmp_path):
    x = walks()
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    one, two = (OnlineOrthogonalDictionary(random_state=0).fit(data) for data in (x, mapped))
    np.testing.assert_array_equal(one.components_, two.components_)


def test_starts():
    x = walks(400)
    y = x - x.mean(1, keepdims=True)
    learner = OnlineOrthogonalDictionary(init="pca", random_state=0)
    learner._begin(x)
    values = ((y @ learner.relaxed_.T) ** 2).sum(0)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(y.T @ y)[::-1], atol=1e-8)
    same = [OnlineOrthogonalDictionary(random_state=s).fit(x).components_ for s in (0, 0, 1)]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.allclose(same[0], same[2])
    assert np.isfinite(OnlineOrthogonalDictionary(init=2 * np.eye(16)).fit(x).components_).all()


def test_batches_with_nothing_in_them_change_nothing():
    learner = OnlineOrthogonalDictionary(random_state=0).partial_fit(walks(n=11))
    before = learner.state_dict()
    with pytest.warns(NoGradientWarning):
        # Constant samples have no content, also where their mean is not exact.
        learner.partial_fit(np.linspace(0.1, 1, 40)[:, None] * np.ones(11))
    after = learner.state_dict()
    for name in ("A", "G", "t", "gap", "scale"):
        assert torch.equal(before[name], after[name])
    with pytest.warns(NoGradientWarning):
        first = OnlineOrthogonalDictionary(random_state=0).partial_fit(np.zeros((5, 16)))
    assert (first.n_steps_, first.scale_) == (0, 1.0)


@pytest.mark.parametrize("factor", [1e-120, 1e120])
def test_any_size_of_data(factor):
    x = walks()
    plain = OnlineOrthogonalDictionary(p=4, random_state=0).fit(x)
    sized = OnlineOrthogonalDictionary(p=4, random_state=0).fit(factor * x)
    np.testing.assert_allclose(sized.components_, plain.components_, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"p": 2}, "p must be a finite number above 2"),
        ({"p": "3"}, "p must be a finite number above 2"),
        ({"batch_size": 0}, "batch_size must be an integer at least 1"),
        ({"batch_size": 2.0}, "batch_size must be an integer at least 1"),
        ({"n_epochs": 0}, "n_epochs"),
        ({"step_power": 2}, "step_power must be a number in"),
        ({"averaging_power": -1}, "averaging_power must be a number in"),
        ({"center": "mean"}, "center must be one of sample, none, feature"),
        ({"polar": "qr"}, "polar must be one of svd, newton-schulz"),
        ({"init": "haar"}, "init must be one of"),
        ({"init": np.eye(3)}, r"init must be \[..., 16, 16\]"),
        ({"init": np.full((16, 16), np.nan)}, "init must be finite"),
        ({"n_nonzero": 17}, r"n_nonzero must be an integer in 1\.\.16"),
        ({"n_nonzero": 0}, r"n_nonzero must be an integer in 1\.\.16"),
        ({"dtype": "float16"}, "dtype must be None"),
        ({"whiten": "yes"}, "whiten must be True or False"),
    ],
)
def test_bad_parameters(settings, match):
    for method in ("fit", "partial_fit"):
        with pytest.raises(ValueError, match=match):
            getattr(OnlineOrthogonalDictionary(**settings), method)(walks())


def test_bad_data():
    learner = OnlineOrthogonalDictionary(random_state=0)
    with pytest.raises(NotFittedError):
        learner.transform(walks())
    with pytest.raises(AttributeError):
        _ = learner.components_
    learner.partial_fit(walks())
    for call in (learner.partial_fit, learner.fit, learner.transform):
        for bad in (np.nan, np.inf):
            with pytest.raises(ValueError, match=r"NaN|infinity"):
                call(np.full((2, 16), bad))
        with pytest.raises(ValueError, match="0 sample"):
            call(np.empty((0, 16)))
    with pytest.raises(ValueError, match="7 features"):
        learner.partial_fit(walks(n=7))
    with pytest.raises(ValueError, match="at least 2"):
        OnlineOrthogonalDictionary().fit(walks(n=1))


@pytest.mark.parametrize("settings", [{"init": "pca"}, {"whiten": True}])
def test_squares_that_overflow(settings):
    with pytest.raises(ValueError, match="squares of X overflow"):
        OnlineOrthogonalDictionary(**settings).fit(1e200 * walks())


def test_in_a_pipeline_with_names():
    pipe = make_pipeline(StandardScaler(), OnlineOrthogonalDictionary(random_state=0))
    assert pipe.fit_transform(walks()).shape == (60, 16)
    assert pipe[-1].get_feature_names_out()[1] == "onlineorthogonaldictionary1"


def test_home_is_cheap_and_names_the_extra():
    code = (
        "import sys, stiefel.numerics as n\n"
        "print('sklearn' in sys.modules, 'scipy' in sys.modules)\n"
        "sys.modules['sklearn'] = None\n"
        "try: n.OnlineOrthogonalDictionary\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert first == "False False"
    assert "stiefel[atlas]" in second

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_estimator

import stiefel.nn
from stiefel.nn import S4DClassifier


def small(**settings):
    sizes = {"d_model": 8, "d_state": 8, "n_layers": 1, "epochs": 15}
    return S4DClassifier(**{**sizes, "random_state": 0, **settings})


def test_laws_of_scikit_learn():
    done = check_estimator(small(d_model=16, epochs=20), on_skip=None)
    statuses = [check["status"] for check in done]
    assert statuses.count("passed") >= 50
    # Skipped: what needs pandas, or an environment variable for array libraries.
    assert set(statuses) <= {"passed", "skipped"}
    assert statuses.count("skipped") <= 3


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return images[:1297], labels[:1297], images[1297:], labels[1297:]


def test_digits_as_sequences(digits):
    x, y, test_x, test_y = digits
    classifier = S4DClassifier(epochs=5, random_state=0).fit(x, y)
    assert classifier.score(test_x, test_y) > 0.6
    assert classifier.loss_curve_[-1] < 0.5 * classifier.loss_curve_[0]
    probability = classifier.predict_proba(test_x)
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-9)
    assert (classifier.decision_function(test_x).argmax(1) == probability.argmax(1)).all()
    twin = pickle.loads(pickle.dumps(classifier))  # noqa: S301 - our own bytes
    np.testing.assert_array_equal(twin.predict_proba(test_x), probability)


def test_channels_seeds_and_labels():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 12, 3))
    y = np.where(np.arange(40) % 2, "up", "down")
    x[y == "up", :, 1] += np.linspace(-3, 3, 12)
    classifier = small(dropout=0.1, bidirectional=True, epochs=60).fit(x, y)
    assert classifier.score(x, y) > 0.9
    assert classifier.n_channels_ == 3
    state = torch.random.get_rng_state()
    again = clone(classifier).fit(x, y)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(again.predict_proba(x), classifier.predict_proba(x))
    with pytest.raises(ValueError, match="2 channels, but S4DClassifier was fitted on 3"):
        classifier.predict(x[..., :2])
    assert cross_val_score(small(epochs=60), x[..., 1], y, cv=2).mean() > 0.8


def test_step_sizes_follow_the_length():
    assert small()._step_sizes(64) == pytest.approx((4e-3, 0.4))
    assert small()._step_sizes(1024) == pytest.approx((1e-3, 0.1))
    assert small(dt_min=1e-4, dt_max=1e-2)._step_sizes(64) == (1e-4, 1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer ≥ 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"pool": "none"}, "mean or last"),
        ({"d_state": 3}, "even"),
        ({"init": "hippo"}, "legs, lin"),
    ],
)
def test_bad_settings_are_refused_when_fitted(settings, message):
    x = np.random.default_rng(0).normal(size=(10, 6))
    with pytest.raises(ValueError, match=message):
        small(**settings).fit(x, np.arange(10) % 2)


def test_a_rate_that_blows_up_is_an_error():
    x = np.random.default_rng(0).normal(size=(20, 6))
    with pytest.raises((RuntimeError, ValueError), match=r"too large|finite|NaN"):
        small(lr=1e18, epochs=30).fit(x, np.arange(20) % 2)


def test_the_home_does_without_scikit_learn_and_says_how_to_get_it():
    code = (
        "import sys; sys.modules['sklearn'] = sys.modules['sklearn.base'] = None\n"
        "import stiefel.nn\n"
        "try: stiefel.nn.S4DClassifier\n"
        "except ImportError as e: print(e)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "stiefel[atlas]"' in run.stdout
    lazy = "import sys, stiefel.nn; print('sklearn' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", lazy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    assert "S4DClassifier" in dir(stiefel.nn)
    with pytest.raises(AttributeError, match="no attribute 'S4E'"):
        _ = stiefel.nn.S4E

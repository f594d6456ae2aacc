import subprocess
import sys
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.neural_network import MLPClassifier
from sklearn.utils.estimator_checks import estimator_checks_generator

import stiefel.init
from stiefel.init import ShrinkPerturbMLPClassifier

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def digits(count=300):
    x, y = load_digits(return_X_y=True)
    return x[:count] / 16, y[:count]


def classifier(**options):
    settings = {"hidden_layer_sizes": (16,), "max_iter": 30, "random_state": 0}
    return ShrinkPerturbMLPClassifier(**settings | options)


def failed_checks(estimator):
    failed = set()
    for instance, check in estimator_checks_generator(estimator):
        try:
            check(instance)
        except Exception as error:
            if type(error).__name__ != "SkipTest":
                failed.add(getattr(check, "func", check).__name__)
    return failed


@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_s_own_checks():
    assert failed_checks(ShrinkPerturbMLPClassifier()) == set()


@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_s_own_checks_with_warm_starts():
    # They fit twice, which a warm start is not made for: no more fail than of the parent.
    allowed = failed_checks(MLPClassifier(max_iter=5, warm_start=True))
    assert failed_checks(ShrinkPerturbMLPClassifier(max_iter=5, warm_start=True)) <= allowed


def test_fit_is_that_of_the_parent():
    x, y = digits()
    ours = classifier().fit(x, y)
    theirs = MLPClassifier((16,), max_iter=30, random_state=0).fit(x, y)
    for a, b in zip(ours.coefs_, theirs.coefs_, strict=True):
        np.testing.assert_array_equal(a, b)


def test_refit_trains_from_shrunk_weights_with_noise(monkeypatch):
    x, y = digits()
    model = classifier(shrink=0.4, perturb=0.1).fit(x[:150], y[:150])
    old = [w.copy() for w in (*model.coefs_, *model.intercepts_)]
    seen = {}

    def stop(self, X, y):
        seen["weights"] = [w.copy() for w in (*self.coefs_, *self.intercepts_)]
        seen["warm"] = self.warm_start
        return self

    monkeypatch.setattr(MLPClassifier, "fit", stop)
    model.refit(x, y)
    assert seen["warm"]
    assert not model.warm_start
    for i, (new, before) in enumerate(zip(seen["weights"], old, strict=True)):
        bound = 0.1 * np.sqrt(6 / sum(old[i % 2].shape))
        noise = new - 0.4 * before
        assert np.abs(noise).max() <= bound * (1 + 1e-9)
        assert np.abs(noise).max() > 0.5 * bound
    first = seen["weights"]
    model.coefs_, model.intercepts_ = old[:2], old[2:]
    model.refit(x, y)
    assert not np.array_equal(seen["weights"][0], first[0])  # other noise in every round


def test_refit_trains_on_although_its_loss_starts_high():
    x, y = digits()
    model = classifier(max_iter=60, n_iter_no_change=3).fit(x, y)
    model.refit(x, y)
    assert model.n_iter_ > 10  # the best loss of the last fit would end it after four
    assert len(model.loss_curve_) == model.n_iter_
    assert model.refits_ == 1
    assert model.score(x, y) > 0.8


@pytest.mark.parametrize("early_stopping", [False, True])
def test_warm_start_makes_every_later_fit_a_refit(early_stopping):
    x, y = digits()
    options = {"random_state": 3, "early_stopping": early_stopping, "max_iter": 5}
    a = classifier(warm_start=True, **options).fit(x[:200], y[:200]).fit(x, y)
    b = classifier(**options).fit(x[:200], y[:200]).refit(x, y)
    assert a.refits_ == b.refits_ == 1
    for one, other in zip(a.coefs_, b.coefs_, strict=True):
        np.testing.assert_array_equal(one, other)
    assert clone(a).shrink == 0.4


def test_shrink_zero_forgets_nan():
    x, y = digits()
    model = classifier(shrink=0, perturb=1, max_iter=1).fit(x, y)
    model.coefs_[0][:] = np.nan
    model.refit(x, y)
    assert np.isfinite(model.coefs_[0]).all()


def test_refusals_leave_the_classifier_as_it_was():
    x, y = digits()
    with pytest.raises(NotFittedError):
        classifier().refit(x, y)
    with pytest.raises(ValueError, match="shrink must be"):
        classifier(shrink=1.1).fit(x, y)
    with pytest.raises(ValueError, match="perturb must be"):
        classifier(perturb=-1).fit(x, y)
    model = classifier().fit(x[y < 5], y[y < 5])
    before, scores = [w.copy() for w in model.coefs_], model.predict_proba(x)
    with pytest.raises(ValueError, match="classes"):
        model.refit(x, y)
    with pytest.raises(ValueError, match="features"):
        model.refit(x[:, :9][y < 5], y[y < 5])
    for a, b in zip(model.coefs_, before, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(model.predict_proba(x), scores)
    assert not model.warm_start
    assert model.refits_ == 0


def test_it_is_imported_only_when_asked_for():
    code = "import sys, stiefel.init; print('sklearn' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "stiefel.init.warm_start_sklearn")
    for name in [n for n in sys.modules if n == "sklearn" or n.startswith("sklearn.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn.*stiefel\[atlas\]"):
        _ = stiefel.init.ShrinkPerturbMLPClassifier
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = stiefel.init.nonsense


def test_no_warning_but_that_of_the_parent():
    x, y = digits(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier(max_iter=2).fit(x, y).refit(x, y)

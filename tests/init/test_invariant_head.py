import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.model_selection import LeaveOneGroupOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import stiefel.init
from stiefel.init import InvariantHead, train_heads
from stiefel.init.penalties import PENALTIES


class InTurns(InvariantHead):
    """Rows belong to two environments in turn: for checks that know no groups."""

    def fit(self, X, y):
        rows = X.shape[0] if hasattr(X, "shape") and X.shape else len(np.asarray(X))
        return super().fit(X, y, groups=np.arange(rows) % 2)


def cues(n=3000, seed=0, rates=(0.1, 0.2)):
    """A cue that is as good everywhere, and a better one whose worth depends on the environment."""
    rng = np.random.default_rng(seed)
    y, env = rng.integers(0, 2, n), np.arange(n) % 2
    stable = (y ^ (rng.random(n) < 0.25)) * 2.0 - 1
    spurious = (y ^ (rng.random(n) < np.where(env, rates[1], rates[0]))) * 2.0 - 1
    return np.stack([stable, spurious], axis=1), y, env


@pytest.mark.parametrize(
    "estimator",
    [
        InvariantHead("erm", steps=100, lr=0.05),
        InvariantHead("spectral_decoupling", weight=0.01, steps=100, lr=0.05),
        InTurns("vrex", weight=0.1, steps=100, lr=0.05),
    ],
    ids=lambda e: e.penalty,
)
def test_laws_of_scikit_learn(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        results = check_estimator(estimator, on_fail=None, on_skip=None)
    failed = [r["check_name"] for r in results if r["status"] == "failed"]
    assert not failed
    assert sum(r["status"] == "passed" for r in results) > 45


def test_without_groups_it_asks_for_them():
    X, y, env = cues(60)
    for penalty in PENALTIES:
        head = InvariantHead(penalty, steps=2)
        if penalty in ("erm", "spectral_decoupling"):
            head.fit(X, y)
            assert head.environments_.tolist() == [0]
        else:
            with pytest.raises(ValueError, match=f"{penalty!r} compares environments: pass groups"):
                head.fit(X, y)
        head.fit(X, y, groups=env)
        assert head.environments_.tolist() == [0, 1]


@pytest.mark.parametrize("penalty", ["vrex", "irmv1", "fishr", "iga"])
def test_penalties_turn_to_the_stable_cue(penalty):
    X, y, env = cues()
    erm = InvariantHead("erm", steps=600, lr=0.01).fit(X, y, groups=env)
    assert erm.coef_[0, 1] > erm.coef_[0, 0]
    head = InvariantHead(penalty, weight=1e4, steps=600, lr=0.01)
    head.fit(X, y, groups=env, coef_init=erm.coef_, intercept_init=erm.intercept_)
    assert head.coef_[0, 0] > abs(head.coef_[0, 1])
    against, labels, _ = cues(seed=1, rates=(0.9, 0.9))
    assert head.score(against, labels) > 0.6 > 0.4 > erm.score(against, labels)


def test_it_is_train_heads_of_one_run():
    X, y, env = cues(200)
    X = np.column_stack([X, X[:, 0] * X[:, 1]])
    head = InvariantHead("vrex", weight=5.0, steps=40, lr=0.02, l2=0.01)
    head.fit(X, np.array(["no", "yes"])[y], groups=np.array(["b", "a"])[env])
    twin = train_heads(
        *(torch.from_numpy(t) for t in (X, y, 1 - env)), ["vrex"], [5.0], steps=40, lr=0.02, l2=0.01
    )
    np.testing.assert_array_equal(head.coef_, twin.weight[0].numpy())
    np.testing.assert_array_equal(head.intercept_, twin.bias[0].numpy())
    assert head.n_iter_ == 40
    z = head.decision_function(X)
    np.testing.assert_allclose(z, twin(torch.from_numpy(X))[0].numpy(), rtol=1e-12)
    np.testing.assert_array_equal(head.predict(X), np.where(z > 0, "yes", "no"))
    np.testing.assert_allclose(head.predict_proba(X)[:, 1], 1 / (1 + np.exp(-z)), rtol=1e-12)


def test_irmv1_with_a_large_weight_does_not_leave_zero():
    X, y, env = cues()
    head = InvariantHead("irmv1", weight=1e6, steps=600, lr=0.01).fit(X, y, groups=env)
    assert np.abs(head.coef_).max() < 0.02


def test_starts_from_given_weights():
    X, y, env = cues(50)
    coef, intercept = np.array([[0.5, -0.25]]), np.array([0.1])
    head = InvariantHead(steps=0).fit(X, y, env, coef_init=coef, intercept_init=intercept)
    np.testing.assert_array_equal(head.coef_, coef)
    np.testing.assert_array_equal(head.intercept_, intercept)
    head.fit(X, y, env, intercept_init=intercept)
    np.testing.assert_array_equal(head.coef_, 0 * coef)


def test_three_classes():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    X = (np.eye(3)[y] + 0.3 * rng.standard_normal((300, 3))).astype(np.float32)
    head = InvariantHead("fishr", weight=1.0, steps=300, lr=0.05).fit(
        X, y, groups=np.arange(300) % 3
    )
    assert head.coef_.shape == (3, 3)
    assert head.coef_.dtype == np.float32
    assert head.score(X, y) > 0.95
    np.testing.assert_allclose(head.predict_proba(X).sum(1), 1, rtol=1e-5)


def test_in_a_pipeline_and_cross_validation():
    X, y, env = cues(400)
    pipeline = make_pipeline(
        StandardScaler(), InvariantHead("irmv1", weight=0.1, steps=30, lr=0.05)
    )
    pipeline.fit(X, y, invarianthead__groups=env)
    assert pipeline.score(X, y) > 0.7
    scores = cross_val_score(
        InvariantHead("erm", steps=30, lr=0.05), X, y, groups=env, cv=LeaveOneGroupOut()
    )
    assert len(scores) == 2
    assert clone(pipeline[-1]).get_params()["penalty"] == "irmv1"


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        ({}, {"groups": np.zeros(40)}, "at least 2 environments"),
        ({}, {"groups": np.arange(3)}, "one environment for each of the 40"),
        ({}, {"groups": np.full(40, np.nan)}, "groups holds NaN"),
        ({}, {"X": np.full((40, 2), np.nan)}, "NaN"),
        ({}, {"y": np.zeros(40)}, "y has one class"),
        ({}, {"y": np.arange(3)}, "inconsistent numbers of samples"),
        ({}, {"coef_init": np.zeros(2)}, r"coef_init must have shape \(1, 2\)"),
        ({}, {"intercept_init": np.array([np.inf])}, "intercept_init must be finite"),
        ({"penalty": "rex"}, {}, "penalty must be one of"),
        ({"weight": -1.0}, {}, "weight must be at least 0"),
        ({"lr": 0.0}, {}, "lr must be positive"),
        ({"steps": -1}, {}, "steps must be at least 0"),
    ],
)
def test_refuses(settings, change, words):
    X, y, env = cues(40)
    arguments = {"X": X, "y": y, "groups": env} | change
    with pytest.raises(ValueError, match=words):
        InvariantHead(**settings).fit(**arguments)


def test_not_fitted():
    with pytest.raises(NotFittedError):
        InvariantHead().predict([[0.0, 1.0]])


def test_without_scikit_learn_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "stiefel.init.invariant_head")
    with pytest.raises(ImportError, match=r"InvariantHead needs scikit-learn.*stiefel\[atlas\]"):
        _ = stiefel.init.InvariantHead
    with pytest.raises(AttributeError, match="no attribute 'InvariantTail'"):
        _ = stiefel.init.InvariantTail

"""A linear classifier that holds across environments, for scikit-learn.

Needs scikit-learn (the extra ``atlas``); ``stiefel.init.InvariantHead`` imports it when asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data  # pyrefly: ignore

from stiefel.init.head_training import L2, LR, STEPS, Heads, train_heads
from stiefel.init.penalties import PENALTIES

# These do not compare environments, so they do without.
WITHOUT_ENVIRONMENTS = ("erm", "spectral_decoupling")


class InvariantHead(ClassifierMixin, BaseEstimator):
    """Linear classifier trained with a penalty on what differs between environments.

    RFC(cf) of the paper: the features stay as they are, only this head is trained, by full-batch
    Adam from zero weights (or from those given to :meth:`fit`). It is deterministic.

    Parameters
    ----------
    penalty : str, default="vrex"
        ``"irmv1"``, ``"vrex"``, ``"spectral_decoupling"``, ``"iga"``, ``"fishr"``, ``"clove"``, or
        ``"erm"`` for none.
    weight : float, default=1e4
        Factor of the penalty, at least 0. Above 1 the whole loss is divided by it.
    steps : int, default=1001
        Steps of Adam.
    lr : float, default=5e-4
        Adam's rate. It sets how far weights can go: about ``lr * steps`` each.
    l2 : float, default=1.1e-3
        Factor of the squared norm of weights and intercept (not used by Fishr and CLOvE).

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    coef_ : ndarray of shape (1, n_features) if binary, otherwise (n_classes, n_features)
    intercept_ : ndarray of shape (1,) or (n_classes,)
    environments_ : ndarray
        Ids of the environments seen by fit.
    n_features_in_ : int
    n_iter_ : int

    Notes
    -----
    Weights are not chosen by any validation here. The paper picks penalty and weight by looking at
    an environment that resembles the test one, and there is no known way around that.

    Zero weights are a stationary point of IRMv1's penalty: with a large weight it does not leave
    them. Start it from a trained head (``coef_init``), as the paper does.

    References
    ----------
    arXiv 2203.15516, section on the frozen representation, RFC(cf).

    Examples
    --------
    >>> import numpy as np
    >>> from stiefel.init import InvariantHead
    >>> rng = np.random.default_rng(0)
    >>> y, env = rng.integers(0, 2, 2000), np.arange(2000) % 2
    >>> shape = (y ^ (rng.random(2000) < 0.25)) * 2.0 - 1
    >>> colour = (y ^ (rng.random(2000) < np.where(env, 0.2, 0.1))) * 2.0 - 1
    >>> X = np.stack([shape, colour], axis=1)
    >>> head = InvariantHead("vrex", lr=5e-3).fit(X, y, groups=env)
    >>> bool(head.coef_[0, 0] > abs(head.coef_[0, 1]))
    True
    """

    # Parameters are checked in fit, as scikit-learn asks.
    def __init__(
        self,
        penalty: Any = "vrex",
        weight: Any = 1e4,
        steps: Any = STEPS,
        lr: Any = LR,
        l2: Any = L2,
    ) -> None:
        self.penalty = penalty
        self.weight = weight
        self.steps = steps
        self.lr = lr
        self.l2 = l2

    def fit(
        self,
        X: Any,
        y: Any,
        groups: Any = None,
        coef_init: Any = None,
        intercept_init: Any = None,
    ) -> InvariantHead:
        """Train the head.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
            Features, as from :meth:`RichFeatures.transform`.
        y : array of shape (n_samples,)
            Two classes or more.
        groups : array of shape (n_samples,), optional
            Environment of each sample, any labels. At least two environments, unless the penalty
            is ``"erm"`` or ``"spectral_decoupling"``, which do without.
        coef_init, intercept_init : arrays of the shapes of ``coef_`` and ``intercept_``, optional
            Where to start, such as the head of :class:`RichFeatures`.

        Raises
        ------
        ValueError
            Fewer than two environments or classes, lengths that differ, NaN, settings out of
            range, initial weights of another shape.
        """
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"InvariantHead needs at least two classes, y has one class: {y[0]!r}")
        env = self._environments(groups, len(y))
        channels = 1 if len(self.classes_) == 2 else len(self.classes_)
        heads = train_heads(
            torch.from_numpy(np.require(X, requirements=["C", "W"])),
            torch.from_numpy(codes),
            torch.from_numpy(env),
            [self.penalty],
            [self.weight],
            steps=self.steps,
            lr=self.lr,
            l2=self.l2,
            classes=len(self.classes_),
            start=_start(coef_init, intercept_init, (channels, X.shape[1])),
        )
        self.coef_ = heads.weight[0].numpy().copy()
        self.intercept_ = heads.bias[0].numpy().copy()
        self.n_iter_ = self.steps
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits: shape (n_samples,) if binary, otherwise (n_samples, n_classes)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        z = X @ self.coef_.T + self.intercept_
        return z[:, 0] if len(self.classes_) == 2 else z

    def predict(self, X: Any) -> np.ndarray:
        """Most probable class of each sample, shape (n_samples,)."""
        z = self.decision_function(X)
        return self.classes_[(z > 0).astype(int) if z.ndim == 1 else z.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each class, shape (n_samples, n_classes)."""
        z = torch.from_numpy(np.asarray(self.decision_function(X)))
        if z.ndim == 1:
            return torch.stack([(-z).sigmoid(), z.sigmoid()], 1).numpy()
        return z.softmax(1).numpy()

    def _environments(self, groups: Any, n: int) -> np.ndarray:
        if groups is None:
            if self.penalty in PENALTIES and self.penalty not in WITHOUT_ENVIRONMENTS:
                raise ValueError(
                    f"penalty {self.penalty!r} compares environments: pass groups, the "
                    "environment of each sample, to fit"
                )
            groups = np.zeros(n, dtype=np.int64)
        groups = np.asarray(groups)
        if groups.shape != (n,):
            raise ValueError(
                f"groups must hold one environment for each of the {n} samples, "
                f"got shape {groups.shape}"
            )
        if groups.dtype.kind == "f" and not np.isfinite(groups).all():
            raise ValueError("groups holds NaN or infinities")
        self.environments_, env = np.unique(groups, return_inverse=True)
        return env


def _start(coef: Any, intercept: Any, shape: tuple[int, int]) -> Heads | None:
    if coef is None and intercept is None:
        return None
    coef = np.zeros(shape) if coef is None else np.asarray(coef, dtype=np.float64)
    intercept = np.zeros(shape[0]) if intercept is None else np.asarray(intercept, np.float64)
    for name, value, wanted in (
        ("coef_init", coef, shape),
        ("intercept_init", intercept, shape[:1]),
    ):
        if value.shape != wanted:
            raise ValueError(f"{name} must have shape {wanted}, got {value.shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} must be finite")
    return Heads(torch.from_numpy(coef)[None], torch.from_numpy(intercept)[None])

"""Shrink and perturb for scikit-learn's classifier. Needs scikit-learn (the extra ``atlas``)."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from stiefel.init.shrink_perturb_state import PERTURB, SHRINK, check_mixture

# Glorot's bound sqrt(6 / (in + out)); scikit-learn takes 2 for logistic hidden units.
_GLOROT, _GLOROT_LOGISTIC = 6.0, 2.0


class ShrinkPerturbMLPClassifier(MLPClassifier):
    """``MLPClassifier`` whose refits on grown data start shrunk and perturbed.

    :meth:`fit` starts anew, as always; :meth:`refit` shrinks the weights and intercepts by
    ``shrink``, adds ``perturb`` times a fresh initialisation, and trains with a new optimizer on
    all that is given. With ``warm_start=True`` every ``fit`` after the first is a ``refit``, for
    pipelines and searches. scikit-learn's own warm start keeps the best loss of the last fit and
    would stop a shrunk network after a few epochs; here that count starts anew as well.

    Args:
        shrink: λ, in [0, 1].
        perturb: Factor of the fresh initialisation, at least 0.
        **mlp: What :class:`sklearn.neural_network.MLPClassifier` takes.

    Source: arXiv 1910.08475, section 4.
    """

    # Untyped in scikit-learn.
    activation: Any
    early_stopping: Any
    random_state: Any

    # Parameters are checked in fit, as scikit-learn asks.
    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        activation: Any = "relu",
        *,
        shrink: Any = SHRINK,
        perturb: Any = PERTURB,
        solver: Any = "adam",
        alpha: Any = 0.0001,
        batch_size: Any = "auto",
        learning_rate: Any = "constant",
        learning_rate_init: Any = 0.001,
        power_t: Any = 0.5,
        max_iter: Any = 200,
        shuffle: Any = True,
        random_state: Any = None,
        tol: Any = 1e-4,
        verbose: Any = False,
        warm_start: Any = False,
        momentum: Any = 0.9,
        nesterovs_momentum: Any = True,
        early_stopping: Any = False,
        validation_fraction: Any = 0.1,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-8,
        n_iter_no_change: Any = 10,
        max_fun: Any = 15000,
    ) -> None:
        super().__init__(
            hidden_layer_sizes=hidden_layer_sizes,
            activation=activation,
            solver=solver,
            alpha=alpha,
            batch_size=batch_size,
            learning_rate=learning_rate,
            learning_rate_init=learning_rate_init,
            power_t=power_t,
            max_iter=max_iter,
            shuffle=shuffle,
            random_state=random_state,
            tol=tol,
            verbose=verbose,
            warm_start=warm_start,
            momentum=momentum,
            nesterovs_momentum=nesterovs_momentum,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            n_iter_no_change=n_iter_no_change,
            max_fun=max_fun,
        )
        self.shrink = shrink
        self.perturb = perturb

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ShrinkPerturbMLPClassifier:
        """Train from scratch; with ``warm_start=True`` and once fitted, as :meth:`refit`.

        Raises:
            ValueError: ``shrink`` or ``perturb`` out of range, or what ``MLPClassifier`` refuses.
        """
        check_mixture(self.shrink, self.perturb)
        if self.warm_start and hasattr(self, "coefs_"):
            return self.refit(X, y, sample_weight)
        self._train(X, y, sample_weight)
        self.refits_ = 0
        return self

    def refit(self, X: Any, y: Any, sample_weight: Any = None) -> ShrinkPerturbMLPClassifier:
        """Shrink, perturb, then train on ``X [samples, features]`` and ``y [samples]``.

        Give it all data seen so far. The classes and the features must be those of the first fit.

        Raises:
            NotFittedError: there is nothing to shrink yet.
            ValueError: factors out of range, or other classes or features than before; the
                classifier then stays what it was.
        """
        check_is_fitted(self)
        check_mixture(self.shrink, self.perturb)
        before = dict(vars(self))
        self._shrink_and_perturb()
        self.warm_start = True
        try:
            self._train(X, y, sample_weight)
        except Exception:
            vars(self).update(before)
            raise
        finally:
            self.warm_start = before["warm_start"]
        self.refits_ += 1
        return self

    def _train(self, X: Any, y: Any, sample_weight: Any) -> None:
        # Before version 1.7 scikit-learn's networks had no weights of samples.
        extra = {} if sample_weight is None else {"sample_weight": sample_weight}
        super().fit(X, y, **extra)

    def _shrink_and_perturb(self) -> None:
        if isinstance(self.random_state, Integral):
            # The same seed gives the first fit its weights: noise needs a stream of its own.
            random: Any = np.random.default_rng([int(self.random_state), self.refits_ + 1])
        else:
            random = check_random_state(self.random_state)
        factor = _GLOROT_LOGISTIC if self.activation == "logistic" else _GLOROT
        weights, intercepts = [], []
        for w, b in zip(self.coefs_, self.intercepts_, strict=True):
            bound = math.sqrt(factor / sum(w.shape))
            for mixed, old in ((weights, w), (intercepts, b)):
                noise = self.perturb * random.uniform(-bound, bound, old.shape)
                # λ = 0 must not keep a NaN.
                kept = 0.0 if self.shrink == 0 else self.shrink * old
                mixed.append((kept + noise).astype(old.dtype))
        self.coefs_, self.intercepts_ = weights, intercepts
        self.loss_curve_ = []
        self._no_improvement_count = 0
        if self.early_stopping:
            self.validation_scores_, self.best_validation_score_ = [], -np.inf
        else:
            self.best_loss_ = np.inf

"""S4D as a scikit-learn classifier of sequences. Needs scikit-learn: ``stiefel[atlas]``."""

from __future__ import annotations

import math
import operator
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stiefel.nn.s4d_model import S4DModel, ssm_param_groups

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data  # pyrefly: ignore
except ImportError as error:
    raise ImportError(
        "S4DClassifier is a scikit-learn estimator, and scikit-learn 1.6 or later is not "
        'installed: pip install "stiefel[atlas]"'
    ) from error

# Step sizes cover the time scales of a sequence: the slowest 1/dt is about four lengths (sheet of
# the authors' digits-like tasks: 4e-3 … 4e-1 at 64 steps, 1e-3 … 1e-1 at 1,024).
_SLOWEST_STEP, _STEP_RANGE = 0.256, 100.0
_LEAST_STEP, _LARGEST_STEP = 1e-3, 4e-3


class S4DClassifier(ClassifierMixin, BaseEstimator):
    """Classify sequences ``(n, length)`` or ``(n, length, channels)`` with :class:`S4DModel`.

    Every channel is standardised by the mean and deviation of the training data. Trained by AdamW
    with a cosine schedule on cross-entropy; dt, A and B learn at 1e-3 at most, without decay.

    Parameters:
        d_model, d_state, n_layers, dropout, init, disc, bidirectional, pool: as of
            :class:`S4DModel`; ``pool`` is ``"mean"`` or ``"last"``.
        dt_min, dt_max: range of step sizes at the start; by default from the sequences' length.
        lr, weight_decay, batch_size, epochs: of the training.
        random_state: None, an integer or a ``numpy.random.RandomState``.
        device: where to train and predict.

    The constructor stores; :meth:`fit` checks.

    Attributes:
        classes_: the labels, sorted.
        model_: the trained :class:`S4DModel`.
        n_features_in_: length of the sequences; prediction takes this length only.
        n_channels_: channels of the sequences.
        loss_curve_: mean training loss of every epoch.
    """

    def __init__(
        self,
        d_model: Any = 32,
        d_state: Any = 32,
        n_layers: Any = 2,
        *,
        dropout: Any = 0.0,
        init: Any = "legs",
        disc: Any = "zoh",
        bidirectional: Any = False,
        pool: Any = "mean",
        dt_min: Any = None,
        dt_max: Any = None,
        lr: Any = 1e-2,
        weight_decay: Any = 0.01,
        batch_size: Any = 50,
        epochs: Any = 20,
        random_state: Any = None,
        device: Any = "cpu",
    ) -> None:
        self.d_model = d_model
        self.d_state = d_state
        self.n_layers = n_layers
        self.dropout = dropout
        self.init = init
        self.disc = disc
        self.bidirectional = bidirectional
        self.pool = pool
        self.dt_min = dt_min
        self.dt_max = dt_max
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.epochs = epochs
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any) -> S4DClassifier:
        """Train on ``X`` ``(n, length[, channels])`` and labels ``y`` ``(n,)``.

        Raises:
            ValueError: bad shapes, NaN or infinities, a single class, settings out of range.
            RuntimeError: the loss is not finite any more; a smaller ``lr`` helps.
        """
        X, y = validate_data(self, X, y, allow_nd=True, ensure_min_samples=2)
        check_classification_targets(y)
        self._check_settings()
        self.classes_, encoded = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"S4DClassifier needs at least two classes, got one class: {self.classes_[0]!r}"
            )
        x = _as_sequences(X)
        self.n_channels_ = x.shape[2]
        self._mean, self._scale = _moments(x)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        generator = torch.Generator().manual_seed(int(seed))
        dt_min, dt_max = self._step_sizes(x.shape[1])
        model = S4DModel(
            self.n_channels_,
            len(self.classes_),
            self.d_model,
            self.n_layers,
            self.d_state,
            self.dropout,
            pool=self.pool,
            generator=generator,
            init=self.init,
            disc=self.disc,
            bidirectional=self.bidirectional,
            dt_min=dt_min,
            dt_max=dt_max,
            dtype=torch.float32,
        ).to(self.device)
        targets = torch.from_numpy(encoded.astype(np.int64)).to(self.device)
        self.loss_curve_ = self._train(model, self._prepared(x), targets, generator)
        self.model_ = model.eval()
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of each sequence, ``(n,)``; errors as :meth:`predict_proba`."""
        logits = self._logits(X)
        return self.classes_[logits.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``(n, classes)``, in the order of ``classes_``.

        Raises:
            ValueError: another length or number of channels than in training, NaN or infinities.
            sklearn.exceptions.NotFittedError: not fitted.
        """
        return torch.softmax(torch.from_numpy(self._logits(X)), dim=1).numpy()

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits ``(n, classes)``; of two classes their difference ``(n,)``, second minus first.

        Errors as :meth:`predict_proba`.
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        x = _as_sequences(validate_data(self, X, reset=False, allow_nd=True))
        if x.shape[2] != self.n_channels_:
            raise ValueError(
                f"X has {x.shape[2]} channels, but S4DClassifier was fitted on {self.n_channels_}"
            )
        # In batches as in training, so that memory stays what it was.
        with torch.inference_mode():
            parts = [self.model_(part) for part in self._prepared(x).split(self.batch_size)]
        return torch.cat(parts).double().cpu().numpy()

    def _train(
        self, model: S4DModel, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> list[float]:
        groups = ssm_param_groups(model, self.lr, weight_decay=self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        steps = self.epochs * math.ceil(len(x) / self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        state, curve = torch.random.get_rng_state(), []
        try:
            # Dropout has no generator of its own; the caller's stream is given back below.
            torch.manual_seed(int(torch.randint(2**31 - 1, (), generator=generator)))
            for epoch in range(self.epochs):
                total = 0.0
                for index in torch.randperm(len(x), generator=generator).split(self.batch_size):
                    index = index.to(x.device)
                    loss = nn.functional.cross_entropy(model(x[index]), y[index])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    total += loss.item() * len(index)
                if not math.isfinite(total):
                    raise RuntimeError(
                        f"the loss is {total} after epoch {epoch + 1}: lr = {self.lr} is too large"
                    )
                curve.append(total / len(x))
        finally:
            torch.random.set_rng_state(state)
        return curve

    def _prepared(self, x: np.ndarray) -> Tensor:
        standard = (x - self._mean) / self._scale
        return torch.from_numpy(standard.astype(np.float32)).to(self.device)

    def _step_sizes(self, length: int) -> tuple[float, float]:
        least = min(max(_SLOWEST_STEP / length, _LEAST_STEP), _LARGEST_STEP)
        dt_min = least if self.dt_min is None else self.dt_min
        return dt_min, _STEP_RANGE * dt_min if self.dt_max is None else self.dt_max

    def _check_settings(self) -> None:
        """What the model does not check itself."""
        for name in ("d_model", "n_layers", "batch_size", "epochs"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or operator.index(value) < 1:
                raise ValueError(f"{name} must be an integer ≥ 1, got {value!r}")
        rate = float(self.lr) if isinstance(self.lr, Real) else math.nan
        if not 0 < rate < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr!r}")
        if self.pool not in ("mean", "last"):
            raise ValueError(f"pool must be mean or last, got {self.pool!r}")

    def __sklearn_tags__(self) -> Any:
        """Three-dimensional input is allowed; results depend on ``random_state``."""
        tags = super().__sklearn_tags__()  # pyrefly: ignore
        tags.input_tags.three_d_array = True
        tags.non_deterministic = self.random_state is None
        return tags


def _as_sequences(x: np.ndarray) -> np.ndarray:
    """``(n, length, channels)`` in float64."""
    if x.ndim not in (2, 3):
        raise ValueError(f"X must be (n, length) or (n, length, channels), got shape {x.shape}")
    x = x.astype(np.float64)
    return x[..., None] if x.ndim == 2 else x


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every channel; 1 for a channel that is constant."""
    mean, scale = x.mean((0, 1)), x.std((0, 1))
    return mean, np.where(scale > 0, scale, 1.0)

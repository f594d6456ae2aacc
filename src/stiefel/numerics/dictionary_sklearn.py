"""The online orthogonal dictionary as a scikit-learn estimator. Needs scikit-learn."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data  # pyrefly: ignore
from torch import Tensor

from stiefel.linalg import polar
from stiefel.numerics.dictionary import (
    DictionaryState,
    advance,
    check_order,
    check_power,
    power_gradient,
    start_dictionary,
    warn_no_gradient,
)
from stiefel.numerics.dictionary_codes import keep_largest
from stiefel.numerics.dictionary_stream import SampleStream

CENTERS = ("sample", "none", "feature")
# Up to this length the state is float64, which costs nothing there.
_DOUBLE_UP_TO = 256
_INPUT = [np.float64, np.float32]


class OnlineOrthogonalDictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Learn an orthogonal sparsifying transform from a stream, one mini-batch at a time.

    Two ``n × n`` matrices are kept, no history; a step costs two matrix products and one polar
    factor, encoding one matrix product. A step is one of :func:`stiefel.numerics.fw_step`.

    Parameters:
        p: order of the norm that is maximised, above 2. 3 ends closer on sparse codes; 4 learns
            dense codes, noisy data and natural images faster.
        batch_size: samples per step of :meth:`fit`.
        n_epochs: passes of :meth:`fit`, each in a new random order.
        step_power, averaging_power: γ = t^(-step_power), ρ = t^(-averaging_power), in [0, 1].
        center: ``"sample"`` takes the mean off every sample (DC of a patch), ``"feature"`` the
            running mean off every feature, ``"none"`` nothing. A mean that stays takes one atom.
        init: ``"random"``, ``"dct"`` (one-dimensional), ``"pca"`` (of the data of ``fit`` or of the
            first ``partial_fit``) or an ``(n, n)`` array, rows = atoms, made orthogonal.
        polar: ``"svd"`` or ``"newton-schulz"`` (checked, matrix products only).
        n_nonzero: coefficients that :meth:`transform` keeps of every sample; None keeps all.
        random_state: None, an integer or a ``numpy.random.RandomState``: start and order.
        dtype: of the state, ``"float32"`` or ``"float64"``; None takes float64 up to 256 features.
        whiten: multiply samples by C^(-1/2), C their running second moment: then the dictionary may
            be any invertible one. Codes are those of whitened samples.

    The constructor stores; :meth:`fit` checks.

    Attributes:
        components_: ``(n, n)``, orthogonal, rows = atoms: the polar factor of ``relaxed_``.
        relaxed_: ``(n, n)``, the iterate A, in the spectral-norm ball.
        gap_: estimate of the Frank–Wolfe gap before each step, one number a step.
        n_steps_: steps taken, over all calls.
        mean_: ``(n,)``, running mean of the features (zero unless ``center="feature"``).
        scale_: root mean square of the first batch, by which all are divided.
        n_features_in_: n.

    Source: arXiv 2103.01484.
    """

    def __init__(
        self,
        p: Any = 3,
        batch_size: Any = 20,
        n_epochs: Any = 1,
        step_power: Any = 0.75,
        averaging_power: Any = 0.5,
        center: Any = "sample",
        init: Any = "random",
        polar: Any = "svd",
        n_nonzero: Any = None,
        random_state: Any = None,
        dtype: Any = None,
        whiten: Any = False,
    ) -> None:
        self.p = p
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.step_power = step_power
        self.averaging_power = averaging_power
        self.center = center
        self.init = init
        self.polar = polar
        self.n_nonzero = n_nonzero
        self.random_state = random_state
        self.dtype = dtype
        self.whiten = whiten

    def fit(self, X: Any, y: Any = None) -> OnlineOrthogonalDictionary:
        """Start anew and learn from ``X`` ``(N, n)``, rows = samples, in random mini-batches.

        A memory-mapped float array is read batch by batch.

        Raises:
            ValueError: fewer than two features, no samples, NaN or infinities, or a parameter out
                of range.
        """
        X = validate_data(self, X, dtype=_INPUT)
        random = self._begin(X)
        for _ in range(self.n_epochs):
            order = random.permutation(len(X))
            for start in range(0, len(X), self.batch_size):
                self._learn(X[order[start : start + self.batch_size]])
        self._maps()
        return self

    def partial_fit(self, X: Any, y: Any = None) -> OnlineOrthogonalDictionary:
        """One step from the mini-batch ``X`` ``(B, n)``. Steps go on where the last call ended.

        A batch with nothing in it after centring changes nothing and warns.

        Raises:
            ValueError: as :meth:`fit`; another number of features than before.
        """
        first = not self.__sklearn_is_fitted__()
        X = validate_data(self, X, dtype=_INPUT, reset=first)
        if first:
            self._begin(X)
        else:
            self._check_settings()
        self._learn(X)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Codes ``(N, n)`` of the samples, in the dtype of ``X``, ``n_nonzero`` kept of each.

        Raises:
            ValueError: NaN or infinities, another number of features, ``n_nonzero`` out of range.
            sklearn.exceptions.NotFittedError: before any fit.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=_INPUT, reset=False)
        self._check_settings()
        if self._stream.center == "sample":
            X = X - X.mean(1, keepdims=True)
        elif self._stream.center == "feature":
            X = X - self.mean_.astype(X.dtype)
        codes = X @ self._maps()[0].astype(X.dtype)
        return codes if self.n_nonzero is None else keep_largest(codes, self.n_nonzero, copy=False)

    def inverse_transform(self, X: Any, sample_mean: Any = None) -> np.ndarray:
        """Samples ``(N, n)`` from codes ``(N, n)``.

        Args:
            X: codes.
            sample_mean: ``(N,)``, added to the samples. With ``center="sample"`` codes do not know
                the means: without this argument the samples come back without theirs.

        Raises:
            ValueError: a shape that does not fit, NaN or infinities.
        """
        check_is_fitted(self)
        X = check_array(X, dtype=_INPUT)
        if X.shape[1] != self.n_features_in_:
            raise ValueError(f"codes must have {self.n_features_in_} columns, got {X.shape[1]}")
        out = X @ self._maps()[1].astype(X.dtype)
        if self._stream.center == "feature":
            out += self.mean_.astype(X.dtype)
        if sample_mean is not None:
            means = np.asarray(sample_mean, dtype=X.dtype)
            if means.shape != (len(X),) or not np.isfinite(means).all():
                raise ValueError(
                    f"sample_mean must be ({len(X)},) and finite, one number a sample, "
                    f"got shape {means.shape}"
                )
            out += means[:, None]
        return out

    @property
    def components_(self) -> np.ndarray:
        """Rows = atoms, orthogonal."""
        check_is_fitted(self)
        return self._orthogonal()

    @property
    def relaxed_(self) -> np.ndarray:
        """The iterate A."""
        check_is_fitted(self)
        return self._state.A.numpy().copy()

    @property
    def n_steps_(self) -> int:
        """Steps taken."""
        check_is_fitted(self)
        return self._state.t

    @property
    def mean_(self) -> np.ndarray:
        """Running mean of the features."""
        check_is_fitted(self)
        return self._stream.mean

    @property
    def scale_(self) -> float:
        """What all samples are divided by; 1 before any that is not zero."""
        check_is_fitted(self)
        return self._stream.scale or 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that learning needs to go on, as tensors (for safetensors or torch.save)."""
        check_is_fitted(self)
        A, G, t = self._state
        stream = self._stream
        return {
            "A": A.clone(),
            "G": G.clone(),
            "t": torch.tensor(t),
            "gap": torch.tensor(self.gap_, dtype=torch.float64),
            "seen": torch.tensor(stream.seen),
            "scale": torch.tensor(stream.scale, dtype=torch.float64),
            "mean": torch.from_numpy(stream.mean.copy()),
            "scatter": torch.from_numpy(stream.scatter.copy()),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> OnlineOrthogonalDictionary:
        """Go on where the estimator that gave ``state`` was; ``center`` and ``whiten`` as there.

        Raises:
            ValueError: tensors are missing or do not fit one another or these parameters.
        """
        names = ("A", "G", "t", "gap", "seen", "scale", "mean", "scatter")
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"state lacks {', '.join(missing)}")
        A, G, mean = state["A"], state["G"], state["mean"]
        n = len(mean)
        if A.shape != (n, n) or G.shape != A.shape or A.dtype != G.dtype:
            raise ValueError(
                f"A and G must be ({n}, {n}) of one dtype, as mean is ({n},), "
                f"got {tuple(A.shape)} {A.dtype} and {tuple(G.shape)} {G.dtype}"
            )
        if not all(bool(value.isfinite().all()) for value in state.values()):
            raise ValueError("state must be finite, got NaN or Inf")
        self._check_settings()
        stream = SampleStream(n, self.center, self.whiten, A.numpy().dtype)
        if tuple(state["scatter"].shape) != stream.scatter.shape:
            raise ValueError(f"state was learned with another whiten than {self.whiten}")
        stream.seen, stream.scale = int(state["seen"]), float(state["scale"])
        stream.mean = mean.numpy().copy()
        stream.scatter = state["scatter"].numpy().copy()
        self._stream, self._components, self._map_pair = stream, None, None
        self._state = DictionaryState(A.clone(), G.clone(), int(state["t"]))
        self.gap_ = state["gap"].tolist()
        self.n_features_in_ = self._n_features_out = n
        return self

    def _begin(self, X: np.ndarray) -> np.random.RandomState:
        n = X.shape[1]
        self._check_settings(n)
        if n < 2:
            raise ValueError(f"X has 1 feature(s) (shape={X.shape}): a dictionary needs at least 2")
        random = check_random_state(self.random_state)
        dtype = np.dtype(self.dtype or (np.float64 if n <= _DOUBLE_UP_TO else np.float32))
        self._stream = SampleStream(n, self.center, self.whiten, dtype)
        init = self.init
        if isinstance(init, str) and init == "pca":
            init = self._stream.principal(X)
        if not isinstance(init, str):
            init = torch.from_numpy(np.array(init, dtype=np.float64))
        seed = int(random.randint(2**31 - 1))
        self._state = start_dictionary(
            n,
            init,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64 if dtype == np.float64 else torch.float32,
        )
        self.gap_: list[float] = []
        self._n_features_out = n
        self._components = self._map_pair = None
        return random

    def _learn(self, rows: np.ndarray) -> None:
        y = torch.from_numpy(self._stream.learn(rows))
        g = power_gradient(self._state.A, y, self.p)
        if not bool(g.any()):
            warn_no_gradient()
            return
        self._state, gap = advance(
            self._state, g, self.step_power, self.averaging_power, self.polar
        )
        self.gap_.append(float(gap))
        self._components = self._map_pair = None

    def _orthogonal(self) -> np.ndarray:
        if self._components is None:
            self._components = polar(self._state.A).numpy()
        return self._components

    def _maps(self) -> tuple[np.ndarray, np.ndarray]:
        """``(n, n)`` each: centred samples times the first are codes; codes times the second."""
        atoms = self._orthogonal()
        if not self._stream.whiten:
            return atoms.T, atoms
        if self._map_pair is None:
            inverse, root = self._stream.whitening()
            self._map_pair = (inverse @ atoms.T, atoms @ root)
        return self._map_pair

    def _check_settings(self, n: int | None = None) -> None:
        n = self.n_features_in_ if n is None and hasattr(self, "n_features_in_") else n
        check_order(self.p)
        check_power(self.step_power, "step_power")
        check_power(self.averaging_power, "averaging_power")
        for name in ("batch_size", "n_epochs"):
            _check_count(getattr(self, name), name, None)
        if self.n_nonzero is not None:
            _check_count(self.n_nonzero, "n_nonzero", n)
        _check_choice(self.center, "center", CENTERS)
        _check_choice(self.polar, "polar", ("svd", "newton-schulz"))
        if isinstance(self.init, str):
            _check_choice(self.init, "init", ("random", "dct", "pca"))
        if not isinstance(self.whiten, bool | np.bool_):
            raise ValueError(f"whiten must be True or False, got {self.whiten!r}")
        if self.dtype is not None and np.dtype(self.dtype) not in map(np.dtype, _INPUT):
            raise ValueError(f"dtype must be None, 'float32' or 'float64', got {self.dtype!r}")

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_state")

    def __sklearn_tags__(self) -> Any:
        """Both precisions come back as they went in."""
        tags = super().__sklearn_tags__()  # pyrefly: ignore
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _check_count(value: Any, name: str, most: int | None) -> None:
    count = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else 0
    if count < 1 or (most is not None and count > most):
        allowed = "at least 1" if most is None else f"in 1..{most}"
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")


def _check_choice(value: Any, name: str, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

"""Compatible maps between embedding models for scikit-learn. Needs scikit-learn."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from stiefel.linalg.relaxed_orthogonality import ALPHA, orthogonality_distance
from stiefel.merge.compatible import CompatibleMaps, CompatibleSettings, fit_compatible_maps

_FORMAT = "stiefel-compatible-adapter-1"


class _Shared:
    """A method whose name a parameter of the constructor has as well.

    Read, it is the method; assigned, the parameter, which lies where scikit-learn keeps all of
    them, in the instance's ``__dict__``.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        return self._function if instance is None else MethodType(self._function, instance)

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self._function.__name__] = value


class CompatibleAdapter(BaseEstimator):
    """A backward and a forward map between an old and a new embedding model, from their vectors.

    ``fit(H_old, H_new, y)`` sees both models' vectors of the same items; then ``backward(H_new)``
    gives queries that find old vectors as ``place_old(H_old)`` has them and, better,
    ``forward(H_old)``. Neither model is needed, and nothing has to be embedded again.

    Args:
        mode: ``"strict"``: B is orthogonal and keeps the new model's geometry exactly; right where
            the vectors come from the distribution that the models were trained on. ``"lambda"``: B
            may stray by about ``lam``, for another distribution.
        lam: ``"auto"`` (0.37 √n) or the distance λ ≥ 0.
        alpha: Steepness of the gate at λ.
        w: Weights of L_F, L_B and the contrastive term.
        temperature: Of the contrastive term.
        forward: Kind of F, ``"linear"`` or ``"mlp"``; in ``get_params`` under this name.
        center: Centre and scale both models' vectors first.
        epochs: Of Adam.
        lr: Of Adam.
        batch_size: Of Adam.
        random_state: Seed or generator.

    Attributes:
        maps_: The trained :class:`~stiefel.merge.CompatibleMaps`.
        orthogonality_: x = ‖WWᵀ − I‖_F of B.
        n_features_in_: Width of the new vectors.
        n_features_old_: Width of the old ones.

    Source: arXiv 2509.16664.
    """

    def __init__(
        self,
        mode: str = "strict",
        *,
        lam: float | int | str = "auto",
        alpha: float | int = ALPHA,
        w: Sequence[float | int] = (1.0, 1.0, 0.1),
        temperature: float | int = 0.1,
        forward: str = "linear",
        center: bool = True,
        epochs: Any = 60,
        lr: float | int = 1e-3,
        batch_size: Any = 128,
        random_state: Any = None,
    ) -> None:
        self.mode = mode
        self.lam = lam
        self.alpha = alpha
        self.w = w
        self.temperature = temperature
        self.forward = forward
        self.center = center
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(self, H_old: Any, H_new: Any, y: Any = None) -> CompatibleAdapter:
        """Train both maps.

        Args:
            H_old: Vectors of the old model ``[N, d]``, arrays or tensors.
            H_new: Vectors of the new model ``[N, n]``, the same items.
            y: Classes ``[N]``, of any type. Without them the contrastive term, if it has weight,
                knows each item only as itself, and a warning says so.

        Raises:
            ValueError: sizes, values or parameters that do not fit.
        """
        old, new = _vectors(H_old, "H_old"), _vectors(H_new, "H_new")
        if y is None:
            labels = None
            if self.w[2] > 0:
                warnings.warn(
                    "no y given: the contrastive term takes every item for a class of its own",
                    UserWarning,
                    stacklevel=2,
                )
        else:
            classes = np.asarray(y)
            if classes.ndim != 1:
                raise ValueError(f"y must be one class per item, got shape {classes.shape}")
            labels = torch.from_numpy(np.unique(classes, return_inverse=True)[1]).long()
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.maps_ = fit_compatible_maps(
            old, new, labels, self._settings(), generator=torch.Generator().manual_seed(seed)
        )
        self._describe()
        return self

    def backward(self, H_new: Any) -> np.ndarray:
        """B: new vectors ``[M, n]`` into the common space ``[M, n]``."""
        return self._apply("map_new", H_new, "H_new")

    @_Shared
    def forward(self, H_old: Any) -> np.ndarray:
        """F: old vectors ``[M, d]`` into the common space ``[M, n]``."""
        return self._apply("map_old", H_old, "H_old")

    def place_old(self, H_old: Any) -> np.ndarray:
        """Old vectors as B(new) is compared with them: centred and scaled, ``[M, d]``."""
        return self._apply("place_old", H_old, "H_old")

    def transform(self, H_new: Any) -> np.ndarray:
        """Same as :meth:`backward`: what queries go through in production."""
        return self.backward(H_new)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters of the constructor."""
        return super().get_params(deep) | {"forward": vars(self)["forward"]}

    def save(self, path: str | Path) -> None:
        """Write the fitted adapter as one safetensors file, whole or not at all."""
        check_is_fitted(self)
        from safetensors.torch import save

        from stiefel.storage import write_bytes

        settings = {k: v for k, v in self.get_params().items() if k != "random_state"}
        state = {k: v.contiguous() for k, v in self.maps_.state_dict().items()}
        metadata = {"format": _FORMAT, "parameters": json.dumps(settings)}
        write_bytes(Path(path), save(state, metadata))

    @classmethod
    def load(cls, path: str | Path) -> CompatibleAdapter:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} holds tensors, but not a saved CompatibleAdapter")
        settings = json.loads(metadata["parameters"])
        settings["w"] = tuple(settings["w"])
        adapter = cls(**settings)
        old, new = len(state["old_mean"]), len(state["new_mean"])
        maps = CompatibleMaps(old, new, adapter._settings())
        maps.load_state_dict(state)
        adapter.maps_ = maps.eval().requires_grad_(False)
        adapter._describe()
        return adapter

    def _settings(self) -> CompatibleSettings:
        if self.lam != "auto" and not isinstance(self.lam, Real):
            raise ValueError(f"lam must be 'auto' or a number from 0 up, got {self.lam!r}")
        for name in ("epochs", "batch_size"):
            if not isinstance(getattr(self, name), Integral):
                raise ValueError(f"{name} must be an integer, got {getattr(self, name)!r}")
        lam = None if self.lam == "auto" else float(self.lam)  # pyrefly: ignore
        return CompatibleSettings(
            mode=self.mode,
            lam=lam,
            alpha=self.alpha,
            weights=tuple(self.w),
            temperature=self.temperature,
            forward=vars(self)["forward"],
            center=self.center,
            epochs=int(self.epochs),
            lr=self.lr,
            batch_size=int(self.batch_size),
        )

    def _describe(self) -> None:
        self.orthogonality_ = float(orthogonality_distance(self.maps_.backward_map.weight))
        self.n_features_in_ = len(self.maps_.get_buffer("new_mean"))
        self.n_features_old_ = len(self.maps_.get_buffer("old_mean"))

    def _apply(self, what: str, rows: Any, name: str) -> np.ndarray:
        check_is_fitted(self)
        values = _vectors(rows, name)
        width = self.n_features_in_ if name == "H_new" else self.n_features_old_
        if values.shape[1] != width:
            raise ValueError(f"{name} must have {width} columns, as in fit, got {values.shape[1]}")
        with torch.no_grad():
            return getattr(self.maps_, what)(values).numpy()


def _vectors(rows: Any, name: str) -> Tensor:
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu().float().numpy()
    return torch.from_numpy(check_array(rows, dtype=np.float32, input_name=name))

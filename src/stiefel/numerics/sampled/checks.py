"""Argument checks that the sampled methods share."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
from jaxtyping import Int

from stiefel.numerics.least_squares_arrays import is_tensor


def check_count(value: Any, name: str, least: int = 1) -> int:
    """An integer ≥ ``least``, else ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r}")
    return int(value)


def check_positive(value: Any, name: str, below: float | int = math.inf) -> float:
    """A finite number in (0, ``below``), else ``ValueError``."""
    if not isinstance(value, Real) or not 0 < float(value) < below:
        allowed = "positive and finite" if below == math.inf else f"between 0 and {below:g}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return float(value)


def as_indices(value: Any, size: int, name: str) -> Int[np.ndarray, " s"]:
    """Indices ``(s,)`` into ``size`` things; a single integer is one of them.

    Raises:
        TypeError: not integers.
        IndexError: outside 0 … size − 1.
    """
    index = np.atleast_1d(value.cpu().numpy() if is_tensor(value) else np.asarray(value))
    if index.size == 0:
        return np.empty(0, dtype=np.int64)
    if index.dtype.kind not in "iu" or index.ndim != 1:
        raise TypeError(f"{name} must be an integer or a list of them, got {value!r}")
    if index.min() < 0 or index.max() >= size:
        raise IndexError(f"{name} must be in 0 … {size - 1}, got {index.min()} … {index.max()}")
    return index.astype(np.int64, copy=False)


def numbers_at(values: Any, index: np.ndarray, size: int, name: str) -> np.ndarray:
    """``values[index]`` of one number for each of ``size`` rows, checked where they are read.

    Raises:
        ValueError: another length, NaN or infinities among those read.
    """
    values = values if is_tensor(values) or isinstance(values, np.ndarray) else np.asarray(values)
    if tuple(values.shape) != (size,):
        raise ValueError(f"{name} must be ({size},), got shape {tuple(values.shape)}")
    return as_numbers(values[index], name)


def as_numbers(value: Any, name: str) -> np.ndarray:
    """``value`` as a finite float64 or complex128 array.

    Raises:
        TypeError: not numbers.
        ValueError: NaN or infinities.
    """
    if is_tensor(value):
        value = value.detach().resolve_conj().resolve_neg().cpu()
        value = (value if value.is_complex() else value.double()).numpy()
    found = np.asarray(value)
    if found.dtype.kind not in "fiubc":
        raise TypeError(f"{name} must hold numbers, got dtype {found.dtype}")
    found = found.astype(np.complex128 if found.dtype.kind == "c" else np.float64, copy=False)
    if not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite, but it holds NaN or infinities")
    return found

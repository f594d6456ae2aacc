"""Sparse codes from an orthogonal dictionary: which of its coefficients are kept.

For an orthogonal dictionary both rules are exact: keeping the k largest coefficients is the best
k-term approximation, soft thresholding minimises ½‖y - D x‖² + τ‖x‖₁.
"""

from __future__ import annotations

from typing import cast

import numpy as np


def keep_largest(codes: np.ndarray, k: int, *, copy: bool = True) -> np.ndarray:
    """Set all but the ``k`` largest coefficients (in magnitude) of every row to zero.

    Args:
        codes: ``(N, n)``, real.
        k: in 1 … n. Of equal ones exactly as many are kept as make k.
        copy: leave ``codes`` alone; False overwrites it.

    Raises:
        ValueError: not two-dimensional, ``k`` out of range, NaN.
    """
    codes = _two_dimensional(codes)
    n = codes.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n} for codes of length {n}, got {k}")
    out = codes.copy() if copy else codes
    if k < n:
        smallest = np.argpartition(np.abs(codes), n - k - 1, axis=1)[:, : n - k]
        np.put_along_axis(out, smallest, 0, axis=1)
    return out


def soft_threshold(codes: np.ndarray, threshold: float | int | np.ndarray) -> np.ndarray:
    """sign(z) max(|z| - τ, 0): every coefficient moves τ towards zero.

    Args:
        codes: ``(N, n)``, real.
        threshold: τ ≥ 0 in the units of the codes: a number, or an array that broadcasts to them
            (one per coefficient, or ``(N, 1)`` for one per sample).

    Raises:
        ValueError: not two-dimensional, a negative threshold, NaN.
    """
    codes = _two_dimensional(codes)
    tau = np.asarray(threshold, dtype=codes.dtype)
    if not bool(np.all(tau >= 0)):
        raise ValueError(f"threshold must be at least 0, got {threshold!r}")
    return cast(np.ndarray, np.sign(codes) * np.maximum(np.abs(codes) - tau, 0))


def _two_dimensional(codes: np.ndarray) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.dtype.kind not in "iuf":
        raise ValueError(f"codes must be real and of shape (N, n), got {codes.dtype} {codes.shape}")
    if bool(np.isnan(codes).any()):
        raise ValueError("codes must not hold NaN")
    return codes

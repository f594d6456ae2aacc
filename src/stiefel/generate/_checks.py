"""Argument checks that the parts of ``stiefel.generate`` share: each names what came."""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

Images = Tensor | np.ndarray
# Rounding of images that were scaled in another precision may overshoot by as much.
RANGE_SLACK = 1e-4
SHOWN = 5


def rows_text(bad: Tensor) -> str:
    """The first rows where ``bad`` is true, for a message: ``rows 3, 17 (2 in all)``."""
    rows = bad.nonzero().flatten().tolist()
    more = ", …" if len(rows) > SHOWN else ""
    return f"rows {', '.join(map(str, rows[:SHOWN]))}{more} ({len(rows)} in all)"


def as_images(images: Images, name: str, *, shape: tuple[int, ...] | None = None) -> Tensor:
    """``images`` as a floating-point tensor ``[N, *shape]`` of finite numbers.

    Raises:
        TypeError: no tensor or array, or not of floating point; tells how to scale.
        ValueError: no image, none of an image's dimensions, another shape, NaN or infinities.
    """
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor or an array, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(
            f"{name} must be floating point in [-1, 1], got {images.dtype}; for bytes: "
            f"{name} / 127.5 - 1"
        )
    if images.ndim < 2 or 0 in images.shape[1:]:
        raise ValueError(f"{name} must be [N, ...] with pixels, got shape {tuple(images.shape)}")
    if not len(images):
        raise ValueError(f"{name} is empty: at least one image is needed")
    if shape is not None and tuple(images.shape[1:]) != shape:
        raise ValueError(
            f"{name} must hold images of shape {shape}, got {tuple(images.shape[1:])} each"
        )
    finite = images.detach().flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"{name} has NaN or infinite pixels in {rows_text(~finite)}")
    return images


def check_range(images: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless all pixels lie in [-1, 1]."""
    low, high = (float(v) for v in images.aminmax())
    if low < -1 - RANGE_SLACK or high > 1 + RANGE_SLACK:
        raise ValueError(
            f"{name} must have pixels in [-1, 1], got [{low:.4g}, {high:.4g}]; scale first"
        )


def whole(value: int, name: str, *, least: int = 1, most: int | None = None, why: str = "") -> int:
    """``value`` as an int within bounds.

    Raises:
        TypeError: no whole number (bool is none).
        ValueError: out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}{why}"
        raise ValueError(f"{name} must be at least {least}{upper}, got {value}")
    return int(value)


def number(
    value: float | int, name: str, *, least: float | int = -math.inf, most: float | int = math.inf
) -> float:
    """``value`` as a finite float within bounds.

    Raises:
        TypeError: no real number.
        ValueError: NaN, infinite or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and least <= value <= most):
        bounds = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name} must be finite, at least {least:g}{bounds}, got {value!r}")
    return float(value)


def choice(value: str, name: str, allowed: tuple[str, ...]) -> str:
    """``value`` if it is one of ``allowed``.

    Raises:
        ValueError: it is not; lists what is.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value

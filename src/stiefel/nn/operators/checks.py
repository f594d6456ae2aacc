"""Argument checks that the operator layers share: they name the argument, what came, the fix."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from stiefel.linalg._checks import HALF_TYPES

Sizes = int | Iterable[int]


def values_known(x: Tensor) -> bool:
    """Whether numbers of ``x`` can be looked at: not while compiling, not on the meta device."""
    return not (
        torch.compiler.is_compiling() or x.is_meta or torch._C._functorch.is_batchedtensor(x)
    )


def check_finite_values(x: Tensor, name: str) -> None:
    """Raise ``ValueError`` if ``x`` holds NaN or infinities; skipped where values are not known."""
    if not values_known(x):
        return
    # The sum is a cheap first look; it may overflow, so that only a second look raises.
    values = x.detach()
    if bool(values.sum().isfinite()):
        return
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} must be finite, but {bad} of its {x.numel()} values are NaN or infinite; "
            "fill or drop those samples first"
        )


def check_numeric(x: Tensor, name: str) -> None:
    """Raise ``TypeError`` unless ``x`` is floating point or complex."""
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"{name} must be floating point or complex, got {x.dtype}; use {name}.float()"
        )


def check_field(x: Tensor, channels: int, ndim: int, name: str = "x") -> None:
    """Raise unless ``x`` is a finite field ``[batch, channels, *grid]`` with ``ndim`` grid axes.

    Raises:
        TypeError: Integers or booleans.
        ValueError: Wrong number of axes or channels, an empty grid, NaN or infinities.
    """
    check_numeric(x, name)
    if x.ndim != ndim + 2:
        raise ValueError(
            f"{name} must be [batch, channels, *grid] with {ndim} grid axes, got shape "
            f"{tuple(x.shape)} with {max(x.ndim - 2, 0)}; the layer was built with ndim={ndim}"
        )
    if x.shape[1] != channels:
        raise ValueError(
            f"{name} must have {channels} channels in dimension 1, got shape {tuple(x.shape)}"
        )
    if 0 in x.shape[2:]:
        raise ValueError(
            f"{name} must have at least one point per axis, got shape {tuple(x.shape)}"
        )
    check_finite_values(x, name)


def sizes(value: Sizes, ndim: int | None, name: str, least: int = 1) -> tuple[int, ...]:
    """``value`` as a tuple of ``ndim`` integers of at least ``least``; one number is repeated.

    With ``ndim=None`` a sequence decides how many there are, a number is one.

    Raises:
        TypeError: Not integers.
        ValueError: Too small, or the wrong number of them.
    """
    if isinstance(value, Iterable):
        found = tuple(_integer(v, name) for v in value)
    else:
        found = (_integer(value, name),) * (1 if ndim is None else ndim)
    if not found or (ndim is not None and len(found) != ndim):
        raise ValueError(f"{name} must be one integer or {ndim or 'at least 1'}, got {value!r}")
    if min(found) < least:
        raise ValueError(f"{name} must be at least {least} in every axis, got {value!r}")
    return found


def grouped(in_channels: int, out_channels: int, groups: int) -> tuple[int, int, int]:
    """Channel counts and groups of a convolution, as integers.

    Raises:
        TypeError: Not integers.
        ValueError: Less than 1, or groups that do not divide both counts.
    """
    named = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
    inputs, outputs, parts = (sizes(value, 1, name)[0] for name, value in named.items())
    if inputs % parts or outputs % parts:
        raise ValueError(
            f"groups must divide both channel counts, got {groups} for {in_channels} and "
            f"{out_channels}"
        )
    return inputs, outputs, parts


def _integer(value: object, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be integers, got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]  # its TypeError is what we look for
    except TypeError:
        raise TypeError(f"{name} must be integers, got {value!r}") from None


def positive(value: float | int, name: str) -> float:
    """``value`` as a float; ``ValueError`` unless it is positive and finite."""
    if not (0 < value < math.inf):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def chosen(value: str, allowed: Iterable[str], name: str) -> str:
    """``value`` itself; ``ValueError`` unless it is one of ``allowed``."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def check_weights(weights: Tensor, name: str = "weights") -> None:
    """Raise unless quadrature ``weights`` are real floating point, finite and positive.

    Raises:
        TypeError: Not real floating point.
        ValueError: NaN, infinite, zero or negative.
    """
    if not weights.is_floating_point():
        raise TypeError(f"{name} must be real floating point, got {weights.dtype}")
    if values_known(weights) and not bool(((weights > 0) & weights.isfinite()).all()):
        bad = int((~((weights > 0) & weights.isfinite())).sum())
        raise ValueError(
            f"{name} must be positive and finite: {bad} of {weights.numel()} are not; a point "
            "without weight has no part in an integral, leave it out"
        )


def working(x: Tensor) -> Tensor:
    """``x`` in the precision in which transforms run: half types in float32."""
    return x.float() if x.dtype in HALF_TYPES else x


def check_uniform_coordinates(coordinates: Tensor, grid: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``coordinates`` of a grid are equally spaced along every axis.

    They are ``[*grid, d]``, or ``[N]`` in one dimension; axes may have different spacings.
    """
    points = coordinates[:, None] if coordinates.ndim == 1 else coordinates
    fits = tuple(points.shape) == (*grid, len(grid))
    if fits and values_known(points):
        points = points.detach().double()
        # 1e-4 of the spacing: float32 coordinates of 1,000 points are that precise.
        for axis, n in enumerate(grid):
            if n < 3:
                continue
            steps = points.diff(dim=axis)
            first = steps.flatten(0, -2)[0]
            fits &= bool(
                (steps - first).abs().amax() <= 1e-3 * first.abs().amax().clamp(min=1e-300)
            )
            others = [i for i in range(len(grid)) if i != axis]
            fits &= bool((first[others].abs() <= 1e-3 * first[axis].abs()).all())
    if not fits:
        raise ValueError(
            f"coordinates must be those of an equally spaced grid {grid}, got shape "
            f"{tuple(coordinates.shape)} or unequal steps: Fourier transforms need such a grid; "
            "use KernelIntegral or IntegralAttention with quadrature weights for other points"
        )

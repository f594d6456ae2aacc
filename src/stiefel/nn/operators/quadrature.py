"""Weights that turn sums over points into integrals: Σ_j w_j f(x_j) ≈ ∫_D f.

Source: sheet of arXiv 2506.10973, "Quadrature helpers"; Clenshaw–Curtis and Fejér after Waldvogel,
BIT 46 (2006), by discrete cosine sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.nn.operators.checks import Sizes, check_finite_values, chosen, sizes

Interval = tuple[float | int, float | int]
Domain = Sequence[float | int] | Sequence[Sequence[float | int]]

GRID_KINDS = ("uniform", "trapezoid", "gauss-legendre", "clenshaw-curtis", "chebyshev")
POINT_KINDS = ("trapezoid", "circle", "voronoi", "monte-carlo")
KINDS = tuple(dict.fromkeys((*GRID_KINDS, *POINT_KINDS)))


def quadrature(
    kind: str,
    shape: Sizes | Tensor | Sequence[Tensor] | None = None,
    domain: Domain | None = None,
    *,
    points: Tensor | Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "*grid"]:
    """Quadrature weights, positive, with Σ w = |D|.

    ===================  =======================  =================================================
    kind                 second argument          rule
    ===================  =======================  =================================================
    ``uniform``          shape                    |D|/N at j/N, periodic: exact below N frequencies
    ``trapezoid``        shape, sorted points     linear between points, end points included
    ``gauss-legendre``   shape                    exact for polynomials up to degree 2N − 1
    ``clenshaw-curtis``  shape                    Chebyshev points with both ends, up to N − 1
    ``chebyshev``        shape                    Chebyshev roots (Fejér), up to N − 1
    ``circle``           sorted points            half the distance between both neighbours, wrapped
    ``voronoi``          points in any order      size of the cell of each point in D, d ≤ 2
    ``monte-carlo``      shape, points            |D|/N
    ===================  =======================  =================================================

    Args:
        kind: From the table.
        shape: ``n`` or ``(n₁, …, n_d)`` for a tensor product, whose points
            :func:`quadrature_points` gives; or points, as ``points=``.
        domain: ``(a, b)`` or one such pair per axis; default [0, 1]^d. For ``trapezoid`` on points
            the default is from the first to the last of them; with a domain, what is left at its
            ends goes to the end points.
        points: ``[N]`` or ``[N, d]``; or one ``[n_i]`` per axis, for the tensor product of
            ``trapezoid`` or ``circle``.
        dtype: Of the weights; default: of the points, or torch's default.
        device: Default: of the points, or torch's default.

    Returns:
        ``[n₁, …, n_d]`` for a shape or axes, ``[N]`` for points.

    Raises:
        TypeError: Points that are not real floating point, sizes that are not integers.
        ValueError: Unknown kind, or not for a shape (for points); points not sorted, repeated, NaN
            or outside the domain; an empty domain; fewer points than the rule needs.
    """
    chosen(kind, KINDS, "kind")
    given = points if points is not None else shape
    if given is None or (points is not None and shape is not None):
        raise ValueError(f"quadrature({kind!r}, …) needs either a shape or points")
    axes = _axes(given)
    if axes is None:
        if kind not in (*GRID_KINDS, "monte-carlo"):
            raise ValueError(f"kind {kind!r} needs points, got shape={given!r}")
        counts = sizes(given, None, "shape")  # type: ignore[arg-type]  # not tensors, see _axes
        found = [
            torch.from_numpy(_grid_rule(kind, n)[1] * (b - a))
            for n, (a, b) in zip(counts, _intervals(domain, len(counts)), strict=True)
        ]
        return _product(found).to(dtype=dtype or torch.get_default_dtype(), device=device)
    if kind not in POINT_KINDS:
        raise ValueError(
            f"kind {kind!r} fixes its own points: pass a shape, or one of {', '.join(POINT_KINDS)}"
        )
    dtype, device = dtype or axes[0].dtype, device or axes[0].device
    work = [x.detach().to("cpu", torch.float64) for x in axes]
    if isinstance(given, Tensor):
        weights = _scattered(kind, work[0], domain)
    elif kind in ("trapezoid", "circle"):
        limits = [None] * len(work) if domain is None else _intervals(domain, len(work))
        rule = _trapezoid if kind == "trapezoid" else _circle
        weights = _product([rule(x, d) for x, d in zip(work, limits, strict=True)])
    else:
        raise ValueError(f"kind {kind!r} needs points [N] or [N, d], got one tensor per axis")
    return weights.to(dtype=dtype, device=device)


def quadrature_points(
    kind: str,
    shape: Sizes,
    domain: Domain | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "*grid d"]:
    """The points of the rules that :func:`quadrature` has for a shape, ``[n₁, …, n_d, d]``.

    Raises:
        TypeError, ValueError: as :func:`quadrature`; ``monte-carlo`` and rules for points have no
            points of their own.
    """
    chosen(kind, GRID_KINDS, "kind")
    counts = sizes(shape, None, "shape")
    lines = [
        torch.from_numpy(a + (b - a) * _grid_rule(kind, n)[0])
        for n, (a, b) in zip(counts, _intervals(domain, len(counts)), strict=True)
    ]
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)
    return grid.to(dtype=dtype or torch.get_default_dtype(), device=device)


def _axes(given: object) -> list[Tensor] | None:
    """Points as a list of tensors, None if ``given`` is a shape."""
    if isinstance(given, Tensor):
        axes = [given]
    elif isinstance(given, Sequence) and given and all(isinstance(x, Tensor) for x in given):
        axes = list(given)
    else:
        return None
    for x in axes:
        if not x.is_floating_point():
            raise TypeError(f"points must be real floating point, got {x.dtype}")
        check_finite_values(x, "points")
        if x.ndim not in (1, 2) or x.shape[0] == 0 or (len(axes) > 1 and x.ndim != 1):
            raise ValueError(
                f"points must be [N], [N, d] or one [n] per axis, got {tuple(x.shape)}"
            )
    return axes


def _intervals(domain: Domain | None, ndim: int) -> list[tuple[float, float]]:
    """One pair per axis."""
    if domain is None:
        return [(0.0, 1.0)] * ndim
    pairs = [domain] * ndim if np.ndim(domain[0]) == 0 else list(domain)  # type: ignore[arg-type]
    if len(pairs) != ndim or any(len(p) != 2 for p in pairs):  # type: ignore[arg-type]
        raise ValueError(f"domain must be (a, b) or {ndim} such pairs, got {domain!r}")
    found = [(float(a), float(b)) for a, b in pairs]  # type: ignore[misc]
    if not all(-math.inf < a < b < math.inf for a, b in found):
        raise ValueError(f"domain must be pairs a < b of finite numbers, got {domain!r}")
    return found


def _product(weights: Sequence[Tensor]) -> Tensor:
    """Outer product of the weights of the axes."""
    whole = weights[0]
    for line in weights[1:]:
        whole = whole[..., None] * line
    return whole


def _grid_rule(kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Points in [0, 1] in rising order, and weights that add to 1."""
    if kind in ("uniform", "monte-carlo"):
        return np.arange(n) / n, np.full(n, 1 / n)
    if n == 1:
        return np.array([0.5]), np.ones(1)
    if kind == "gauss-legendre":
        x, w = np.polynomial.legendre.leggauss(n)
        return (1 + x) / 2, w / 2
    if kind == "trapezoid":
        w = np.full(n, 1 / (n - 1))
        w[[0, -1]] /= 2
        return np.linspace(0, 1, n), w
    if kind == "clenshaw-curtis":
        m = n - 1
        angle = np.pi * np.arange(n) / m
        w = np.ones(n) - sum(
            (1 if 2 * k == m else 2) * np.cos(2 * k * angle) / (4 * k * k - 1)
            for k in range(1, m // 2 + 1)
        )
        w = w / m
        w[[0, -1]] /= 2
    else:
        angle = np.pi * (np.arange(n) + 0.5) / n
        w = 1 - 2 * sum(np.cos(2 * k * angle) / (4 * k * k - 1) for k in range(1, n // 2 + 1))
        w = w / n
    return (1 - np.cos(angle)) / 2, np.asarray(w)


def _check_sorted(x: Tensor) -> None:
    steps = x.diff()
    if bool((steps == 0).any()):
        at = int((steps == 0).nonzero()[0])
        raise ValueError(
            f"points must not repeat: number {at} and {at + 1} are both {float(x[at])}; keep one "
            "of them"
        )
    if bool((steps < 0).any()):
        at = int((steps < 0).nonzero()[0])
        raise ValueError(
            f"points must be sorted: number {at + 1}, {float(x[at + 1])}, comes after "
            f"{float(x[at])}; sort points and values together"
        )


def _scattered(kind: str, x: Tensor, domain: Domain | None) -> Tensor:
    """Weights of points ``[N]`` or ``[N, d]``."""
    ndim = 1 if x.ndim == 1 else x.shape[1]
    flat = x[:, 0] if x.ndim == 2 and ndim == 1 else x
    if kind == "trapezoid" and ndim == 1:
        return _trapezoid(flat, None if domain is None else _intervals(domain, 1)[0])
    limits = _intervals(domain, ndim)
    if kind == "monte-carlo":
        size = math.prod(b - a for a, b in limits)
        return torch.full((x.shape[0],), size / x.shape[0], dtype=x.dtype)
    if kind in ("trapezoid", "circle"):
        if ndim != 1:
            raise ValueError(
                f"kind {kind!r} is for points [N] of one axis, got shape {tuple(x.shape)}; pass "
                'one tensor per axis for a product, or kind="voronoi"'
            )
        return _circle(flat, limits[0])
    if ndim == 1:
        order = flat.argsort()
        weights = torch.empty_like(flat)
        weights[order] = _cells(flat[order], limits[0])
        return weights
    if ndim > 2:
        raise ValueError(
            f'kind "voronoi" is for one or two axes, got points with {ndim}; use "monte-carlo"'
        )
    return torch.from_numpy(_voronoi_areas(x.numpy(), limits))


def _inside(x: Tensor, limits: tuple[float, float]) -> tuple[float, float]:
    if bool((x < limits[0]).any()) or bool((x > limits[1]).any()):
        raise ValueError(
            f"points must lie in the domain {limits}, got values from {float(x.min())} to "
            f"{float(x.max())}"
        )
    return limits


def _trapezoid(x: Tensor, limits: tuple[float, float] | None) -> Tensor:
    _check_sorted(x)
    if limits is None:
        if x.shape[0] < 2:
            raise ValueError("the trapezoidal rule needs two points, or one and a domain")
        limits = (float(x[0]), float(x[-1]))
    a, b = _inside(x, limits)
    steps = x.diff() / 2
    weights = torch.nn.functional.pad(steps, (1, 0)) + torch.nn.functional.pad(steps, (0, 1))
    weights[0] += x[0] - a
    weights[-1] += b - x[-1]
    return weights


def _circle(x: Tensor, limits: tuple[float, float] | None) -> Tensor:
    _check_sorted(x)
    a, b = _inside(x, (0.0, 1.0) if limits is None else limits)
    period = b - a
    if x.shape[0] == 1:
        return torch.full_like(x, period)
    if float(x[-1]) - float(x[0]) == period:
        raise ValueError(
            f"points must not repeat: {float(x[0])} and {float(x[-1])} are one point of the "
            "circle; leave the last one out"
        )
    ahead, behind = x.roll(-1), x.roll(1)
    ahead[-1] += period
    behind[0] -= period
    return (ahead - behind) / 2


def _cells(x: Tensor, limits: tuple[float, float]) -> Tensor:
    """Lengths of the intervals that are closer to each point than to any other."""
    _check_sorted(x)
    a, b = _inside(x, limits)
    middle = (x[1:] + x[:-1]) / 2
    edges = torch.cat((x.new_tensor([a]), middle, x.new_tensor([b])))
    return edges.diff()


def _voronoi_areas(x: np.ndarray, limits: Sequence[tuple[float, float]]) -> np.ndarray:
    """Areas of Voronoi cells in a rectangle; mirror images make its sides borders of cells."""
    from scipy.spatial import Voronoi

    for axis, pair in enumerate(limits):
        _inside(torch.from_numpy(x[:, axis]), pair)
    unique, count = np.unique(x, axis=0, return_counts=True)
    if len(unique) < len(x):
        raise ValueError(
            f"points must not repeat: {tuple(unique[count > 1][0].tolist())} is there "
            f"{int(count.max())} times; keep one of them"
        )
    low, high = (np.array([pair[i] for pair in limits]) for i in (0, 1))
    unit = (x - low) / (high - low)
    mirrored = [unit]
    for axis in range(2):
        for side in (0.0, 1.0):
            image = unit.copy()
            # A point on the side is its own image: there the next one closes its cell.
            own = unit[:, axis] == side
            image[own, axis] = 2 * (1 - side) - image[own, axis]
            image[:, axis] = 2 * side - image[:, axis]
            mirrored.append(image)
    # Scaled to the rectangle again: cells are cells of the true distance.
    diagram = Voronoi(low + np.concatenate(mirrored) * (high - low))
    areas = np.empty(len(x))
    for i in range(len(x)):
        corners = np.clip(diagram.vertices[diagram.regions[diagram.point_region[i]]], low, high)
        around = corners - corners.mean(0)
        around = around[np.argsort(np.arctan2(around[:, 1], around[:, 0]))]
        closed = [*around, around[0]]
        areas[i] = sum(p[0] * q[1] - p[1] * q[0] for p, q in pairwise(closed)) / 2
    return areas

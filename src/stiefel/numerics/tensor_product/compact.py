"""Compact (Padé) derivatives: fourth and sixth order from short stencils and tridiagonal solves.

    α f′_{i-1} + f′_i + α f′_{i+1} = a (f_{i+1} - f_{i-1})/(2h) + b (f_{i+2} - f_{i-2})/(4h)
    α f″_{i-1} + f″_i + α f″_{i+1} = a δ₁/h² + b δ₂/(4h²),      δ_k = f_{i+k} - 2f_i + f_{i-k}

Compact part of arXiv 2606.25148. Every line of the field along the axis is a right-hand side.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Num
from torch import Tensor

from stiefel.numerics.tensor_product.axis_apply import apply_along
from stiefel.numerics.tensor_product.checks import (
    CONDITIONS,
    DIRICHLET,
    PERIODIC,
    check_axis,
    check_bc,
    check_choice,
    check_count,
    check_dtype,
    check_finite,
    check_positive,
    hidden,
    per_axis,
    real_dtype,
)
from stiefel.numerics.tensor_product.lines import BandedLineSolver

OPEN = "open"
ORDERS = (4, 6)
DERIVATIVES = (1, 2)
DENSE_LIMIT = 128
"""Longest line for one product with the derivative's matrix, which saves the stencil too."""
# (derivative, order): α, a, b.
INTERIOR = {
    (1, 4): (1 / 4, 3 / 2, 0.0),
    (1, 6): (1 / 3, 14 / 9, 1 / 9),
    (2, 4): (1 / 10, 6 / 5, 0.0),
    (2, 6): (2 / 11, 12 / 11, 3 / 11),
}
# Rows at an open lower end, each (β, m): β f′_{i-1} + f′_i + β f′_{i+1} from f_0 … f_{m-1}, by the
# weights that are exact for polynomials of degree m - 1. The row of (1, 4) is the paper's,
# f′_0 + 3f′_1 = (-17/6 f_0 + 3/2 f_1 + 3/2 f_2 - 1/6 f_3)/h: β makes it exact to degree 4. The
# others spend a point more and keep β small: with that β the system's condition number would be
# 1e3 to 2e5 (1.5 to 5 so), at no smaller error, and it is singular on m points.
CLOSURES = {
    (1, 4): ((3.0, 4),),
    (1, 6): ((0.0, 7), (1 / 3, 7)),
    (2, 4): ((0.0, 6),),
    (2, 6): ((0.0, 8), (2 / 11, 8)),
}
# With an open end. Four points would do for the row of (1, 4), but with one at each end the system
# of four is singular.
LEAST_OPEN = {(1, 4): 5, (1, 6): 7, (2, 4): 6, (2, 6): 8}


def compact_derivative(
    U: Num[Tensor, "*grid"],
    axis: int,
    h: float | int,
    order: int = 4,
    deriv: int = 1,
    bc: str = OPEN,
) -> Num[Tensor, "*grid"]:
    """First or second derivative along one axis of a field, order 4 or 6.

    Args:
        U: Values on equally spaced points, any shape; real or complex.
        axis: Of ``U``, from -ndim to ndim - 1; all other axes are right-hand sides.
        h: Distance of the points, > 0.
        order: 4 or 6, up to the ends.
        deriv: 1 or 2.
        bc: ``"open"``: nothing is known at the ends, one-sided rows close the system.
            ``"periodic"``: the point after the last is the first. ``"dirichlet"``: f is zero one
            step outside of the last points, as on a Dirichlet axis of :func:`grid1d`; the wall's
            value is used, and no symmetry supposed. ``"neumann"``: mirrored at half a
            step outside, as on a Neumann axis; of full order if the mirrored function is smooth
            (f‴ = 0 at the wall too). ``"dirichlet-neumann"``, ``"neumann-dirichlet"``: lower
            end first.

    Returns:
        The derivative, in the shape and precision of ``U``; linear and differentiable in ``U``.
        On an open line exact for polynomials of degree ``order`` (deriv 1; one more for 2).

    Raises:
        ValueError: too few points for the closures (names the axis and how many are needed), an
            unknown ``bc``, ``order`` or ``deriv``, h not positive, a NaN.
        TypeError: integers or half precision.
        IndexError: no such axis.
    """
    check_dtype(U, "U")
    dim = check_axis(axis, U.ndim)
    check_choice(order, "order", ORDERS)
    check_choice(deriv, "deriv", DERIVATIVES)
    ends = _ends(bc)
    factor = 1 / check_positive(h, "h") ** deriv
    cut = tuple(int(end == DIRICHLET) for end in ends)
    closed = tuple(OPEN if end == DIRICHLET else end for end in ends)
    least = _least_points(order, deriv, closed) - sum(cut)
    n = U.shape[dim]
    if n < least:
        raise ValueError(
            f"U must have at least {least} points along axis {dim} for derivative {deriv} of "
            f"order {order} with bc {bc!r}, got {n} in shape {tuple(U.shape)}"
        )
    if U.numel() == 0:
        raise ValueError(f"U is empty: shape {tuple(U.shape)}")
    check_finite(U, "U")
    scheme = _scheme(n + sum(cut), order, deriv, closed)
    if scheme.matrix is not None:
        D = scheme.matrix[cut[0] : n + cut[0], cut[0] : n + cut[0]]
        return apply_along((factor * D).to(U.device, real_dtype(U.dtype)), U, dim)
    if sum(cut):
        zero = torch.zeros_like(U.narrow(dim, 0, 1))
        U = torch.cat([zero] * cut[0] + [U] + [zero] * cut[1], dim)
    result = scheme.solver.invert(factor * _weigh(scheme, U, dim), dim)
    return result.narrow(dim, cut[0], n) if sum(cut) else result


def compact_gradient(
    U: Num[Tensor, "*grid"],
    spacing: float | int | Sequence[float | int],
    order: int = 4,
    bc: str | Sequence[str] = OPEN,
    *,
    dims: int | None = None,
) -> Num[Tensor, "*stacked"]:
    """All first derivatives of a field.

    Args:
        U: ``(*batch, nx, ny, …)``.
        spacing: h of all axes, or one per axis.
        order: As for :func:`compact_derivative`.
        bc: As there, for all axes or one per axis.
        dims: d, how many of the last axes of ``U`` are the grid; if None as many as ``spacing``
            has, or all.

    Returns:
        ``(d, *batch, nx, ny, …)``: component i is the derivative along grid axis i.

    Raises:
        ValueError, TypeError: as :func:`compact_derivative`; ``dims`` that do not fit.
    """
    if dims is None:
        dims = U.ndim if isinstance(spacing, (int, float)) else len(spacing)
    if not 1 <= check_count(dims, "dims") <= U.ndim:
        raise ValueError(f"dims must be in 1..{U.ndim} for U of shape {tuple(U.shape)}, got {dims}")
    steps, conditions = (
        per_axis(value if isinstance(value, (int, float, str)) else list(value), dims, name)
        for value, name in ((spacing, "spacing"), (bc, "bc"))
    )
    parts = [
        compact_derivative(U, U.ndim - dims + i, step, order, 1, condition)
        for i, (step, condition) in enumerate(zip(steps, conditions, strict=True))
    ]
    return torch.stack(parts)


class _Scheme(NamedTuple):
    """A derivative on n points of distance 1: solver · (stencil inside, blocks at the ends)."""

    deriv: int
    stencil: tuple[float, float]
    lower: Tensor | None
    upper: Tensor | None
    solver: BandedLineSolver
    matrix: Tensor | None


def _ends(bc: str) -> tuple[str, str]:
    if bc == OPEN:
        return OPEN, OPEN
    check_choice(bc, "bc", (OPEN, *CONDITIONS))
    return check_bc(bc)


def _width(order: int) -> int:
    """How far the stencil reaches to each side."""
    return order // 2 - 1


def _least_points(order: int, deriv: int, ends: tuple[str, ...]) -> int:
    found = 2 * _width(order) + 1
    if OPEN in ends:
        found = max(found, LEAST_OPEN[deriv, order])
    return found


def _scheme(n: int, order: int, deriv: int, ends: tuple[str, ...]) -> _Scheme:
    """Kept between calls, but not what is made while compiling."""
    if hidden(torch.empty(0)):
        return _make_scheme(n, order, deriv, ends)
    return _kept_scheme(n, order, deriv, ends)


def _make_scheme(n: int, order: int, deriv: int, ends: tuple[str, ...]) -> _Scheme:
    alpha, a, b = INTERIOR[deriv, order]
    periodic = PERIODIC in ends
    bands = torch.full((3, n), alpha, dtype=torch.float64)
    bands[1] = 1.0
    stencil = (a / 2, b / 4) if deriv == 1 else (a, b / 4)
    blocks: list[Tensor | None] = [None, None]
    if not periodic:
        for side, end in enumerate(ends):
            betas, block = _end(order, deriv, end)
            if side:  # from the other side every first derivative has the other sign
                block = (-1) ** deriv * block.flip(0, 1)
            blocks[side] = block
            for i, (diagonal, beta) in enumerate(betas):
                row = n - 1 - i if side else i
                bands[1, row] = diagonal
                for column, band in ((row - 1, 2), (row + 1, 0)):
                    if 0 <= column < n:
                        bands[band, column] = beta
    solver = BandedLineSolver(bands, periodic=periodic)
    scheme = _Scheme(deriv, stencil, blocks[0], blocks[1], solver, None)
    if n > DENSE_LIMIT:
        return scheme
    weights = _weigh(scheme, torch.eye(n, dtype=torch.float64), 0)
    return scheme._replace(matrix=solver.invert(weights, 0))


_kept_scheme = lru_cache(maxsize=64)(_make_scheme)


def _end(order: int, deriv: int, end: str) -> tuple[list[tuple[float, float]], Tensor]:
    """Rows at a lower end: (diagonal, off-diagonal) of each, and its weights of f_0, f_1, …"""
    if end == OPEN:
        rows = CLOSURES[deriv, order]
        weights = [_open_weights(i, beta, m, deriv) for i, (beta, m) in enumerate(rows)]
        return [(1.0, beta) for beta, _ in rows], torch.tensor(weights, dtype=torch.float64)
    alpha, a, b = INTERIOR[deriv, order]
    w = _width(order)
    near, far = (a / 2, b / 4) if deriv == 1 else (a, b / 4)
    stencil = {1: near, 2: far, -1: -near, -2: -far}
    if deriv == 2:
        stencil = {1: near, 2: far, -1: near, -2: far, 0: -2 * (near + far)}
    block = torch.zeros(w, 2 * w, dtype=torch.float64)
    for i in range(w):
        for offset, weight in stencil.items():
            if abs(offset) <= w:
                j = i + offset
                block[i, j if j >= 0 else -1 - j] += weight
    # f even: its first derivative is odd, its second even.
    mirrored = alpha * (-1) ** deriv
    return [(1.0 + mirrored if i == 0 else 1.0, alpha) for i in range(w)], block


def _open_weights(i: int, beta: float, m: int, deriv: int) -> list[float]:
    """Weights of f_0 … f_{m-1} for β f′_{i-1} + f′_i + β f′_{i+1}, points at distance 1."""
    found = []
    for k in range(m):
        # The Lagrange polynomial that is 1 at k and 0 at the others, in exact fractions.
        polynomial = [Fraction(1)]
        for j in range(m):
            if j != k:
                raised = [Fraction(0), *polynomial]
                lowered = [*(j * c for c in polynomial), Fraction(0)]
                polynomial = [(a - b) / (k - j) for a, b in zip(raised, lowered, strict=True)]
        for _ in range(deriv):
            polynomial = [power * c for power, c in enumerate(polynomial)][1:]
        at = {x: float(sum(c * x**q for q, c in enumerate(polynomial))) for x in (i - 1, i, i + 1)}
        found.append(at[i] + beta * (at[i + 1] + (at[i - 1] if i else 0.0)))
    return found


def _weigh(scheme: _Scheme, U: Tensor, dim: int) -> Tensor:
    """The right-hand side: differences first, so that constants give exact zeros inside."""
    near, far = scheme.stencil
    w = 2 if far else 1
    n = U.shape[dim]
    field = U
    if scheme.lower is None:
        field = torch.cat((U.narrow(dim, n - w, w), U, U.narrow(dim, 0, w)), dim)
    size = field.shape[dim] - 2 * w

    def at(offset: int) -> Tensor:
        return field.narrow(dim, w + offset, size)

    def difference(k: int) -> Tensor:
        if scheme.deriv == 1:
            return at(k) - at(-k)
        return (at(k) - at(0)) - (at(0) - at(-k))

    inner = near * difference(1)
    if far:
        inner = inner + far * difference(2)
    if scheme.lower is None or scheme.upper is None:
        return inner
    lower, upper = (x.to(U.device, real_dtype(U.dtype)) for x in (scheme.lower, scheme.upper))
    top = apply_along(lower, U.narrow(dim, 0, lower.shape[1]), dim)
    bottom = apply_along(upper, U.narrow(dim, n - upper.shape[1], upper.shape[1]), dim)
    return torch.cat((top, inner, bottom), dim)

"""B-splines on an open uniform knot vector: values, derivatives, Galerkin matrices.

Galerkin part of arXiv 2606.25148. On ``elements`` equal intervals of ``[0, length]`` there are
``n = elements + degree`` functions of the given degree; the ones at the ends are 1 there.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.numerics.tensor_product.checks import check_choice, check_count, check_positive


def bspline_values(
    points: Float[Tensor, " q"],
    elements: int,
    degree: int,
    length: float | int = 1.0,
    deriv: int = 0,
) -> Float[Tensor, "q n"]:
    """Every B-spline, or its first derivative, at every point.

    Args:
        points: In ``[0, length]``, float32 or float64; the result has their dtype and device.
        elements: Number of intervals, at least 1.
        degree: Of the splines, at least 1.
        length: Of the domain, positive.
        deriv: 0 for values, 1 for derivatives (per unit of length; from the right at a knot).

    Returns:
        ``(q, n)`` with ``n = elements + degree``: row i holds the functions at ``points[i]``.
        A spline with coefficients c has the values ``result @ c``.

    Raises:
        TypeError: integer points.
        ValueError: a size, degree, length or derivative out of range, points outside the domain.
    """
    check_spline(elements, degree, length)
    check_choice(deriv, "deriv", (0, 1))
    if not points.is_floating_point():
        raise TypeError(f"points must be a real floating-point tensor, got {points.dtype}")
    x = points.detach().double()
    if not bool(((x >= 0) & (x <= length)).all()):
        raise ValueError(f"points must lie in [0, {length}]; some do not, or are NaN")
    first, local = _local_values(x, elements, degree, float(length), deriv)
    found = x.new_zeros(len(x), elements + degree)
    found.scatter_(1, first[:, None] + torch.arange(degree + 1, device=x.device), local)
    return found.to(points.dtype)


def bspline_matrices(
    elements: int,
    degree: int,
    length: float | int = 1.0,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Galerkin matrices of all ``n = elements + degree`` B-splines, ends included.

    Args:
        elements: Number of equal intervals, at least 1.
        degree: p, at least 1.
        length: Of the domain, positive.
        dtype: Of the results, real floating point; the work is done in float64.

    Returns:
        Greville abscissae ``(n,)``, which run from 0 to ``length``; stiffness
        ``K[i, j] = ∫ Bᵢ′ Bⱼ′`` and mass ``M[i, j] = ∫ Bᵢ Bⱼ``, both ``(n, n)``, symmetric, zero
        beyond p diagonals. The Gauss rule of p + 1 points per element makes them exact. For
        functions that vanish at both ends take ``[1:-1, 1:-1]``.

    Raises:
        TypeError: a dtype that is not real floating point.
        ValueError: a size, degree or length out of range.
    """
    check_spline(elements, degree, length)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a real floating-point type, got {dtype}")
    size = elements + degree
    x, weights = gauss_points(elements, degree + 1, length)
    functions = torch.arange(degree + 1)
    rows = torch.arange(elements)[:, None, None] + functions[:, None]
    columns = torch.arange(elements)[:, None, None] + functions
    matrices = []
    for deriv in (1, 0):
        _, local = _local_values(x, elements, degree, float(length), deriv)
        local = local.reshape(elements, degree + 1, degree + 1)
        blocks = local.mT @ (weights.reshape(elements, degree + 1, 1) * local)
        matrix = torch.zeros(size, size, dtype=torch.float64)
        matrix.index_put_((rows, columns), blocks, accumulate=True)
        # Products of one pair in two orders may be rounded apart.
        matrices.append((0.5 * (matrix + matrix.mT)).to(dtype))
    greville = _knots(elements, degree, float(length)).unfold(0, degree, 1)[1:-1].mean(1)
    greville[-1] = length
    return greville.to(dtype), matrices[0], matrices[1]


def gauss_points(
    elements: int, count: int, length: float | int = 1.0
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """Gauss–Legendre points and weights, ``count`` in each element, in float64.

    Args:
        elements: Number of equal intervals, at least 1.
        count: Points per element, at least 1: exact for polynomials of degree 2 count - 1.
        length: Of the domain, positive.

    Returns:
        Points and weights ``(elements · count,)``, by element; the weights sum to ``length``.

    Raises:
        ValueError: a count or length out of range.
    """
    check_spline(elements, 1, length)
    check_count(count, "count")
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(count))
    step = length / elements
    points = (torch.arange(elements, dtype=torch.float64)[:, None] + 0.5 * (1 + nodes)) * step
    return points.flatten(), (0.5 * step * weights).repeat(elements)


def check_spline(elements: int, degree: int, length: float | int) -> None:
    """Raise unless there are elements, a degree and a length to work with."""
    check_count(elements, "elements")
    check_count(degree, "degree")
    check_positive(length, "length")


def _knots(elements: int, degree: int, length: float) -> Tensor:
    """Equal steps, and each end ``degree + 1`` times."""
    inner = torch.linspace(0, length, elements + 1, dtype=torch.float64)
    ends = inner.new_zeros(degree)
    return torch.cat((ends, inner, ends + length))


def _local_values(
    x: Tensor, elements: int, degree: int, length: float, deriv: int
) -> tuple[Tensor, Tensor]:
    """Index of the first function that lives at each point, and the values of it and p more.

    Cox–de Boor recursion: degree j from degree j - 1, all points at once.
    """
    knots = _knots(elements, degree, length).to(x.device)
    first = (x * (elements / length)).long().clamp_(0, elements - 1)
    span = first + degree
    local = [torch.ones_like(x)]
    for j in range(1, degree + 1):
        slope = deriv == 1 and j == degree
        saved, raised = torch.zeros_like(x), []
        for r, value in enumerate(local):
            right, left = knots[span + r + 1], knots[span + r + 1 - j]
            part = value / (right - left)
            # The derivative of a B-spline is a difference of two of one degree less.
            raised.append(saved - degree * part if slope else saved + (right - x) * part)
            saved = degree * part if slope else (x - left) * part
        local = [*raised, saved]
    return first, torch.stack(local, 1)

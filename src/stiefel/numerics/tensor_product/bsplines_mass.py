"""Tensor-product mass matrices inverted axis by axis, and load vectors of B-splines.

    (Mx ⊗ My ⊗ Mz)⁻¹ = Mx⁻¹ ⊗ My⁻¹ ⊗ Mz⁻¹

Galerkin part of arXiv 2606.25148: projection in L², and the explicit steps of isogeometric
analysis, need nothing larger than a banded 1-D matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor

from stiefel.numerics.tensor_product.axis_apply import MAX_AXES
from stiefel.numerics.tensor_product.bsplines import bspline_values, gauss_points
from stiefel.numerics.tensor_product.checks import (
    SingularOperatorError,
    check_choice,
    check_field,
    check_matrix,
    check_sizes,
    check_symmetric,
    per_axis,
)
from stiefel.numerics.tensor_product.lines import BandedLineSolver
from stiefel.numerics.tensor_product.sum_factorization import sum_factorize_transpose

METHODS = ("auto", "gemm", "banded")


class MassInverse:
    """Solves (Mx ⊗ My ⊗ …) X = F: one banded solve per axis, all other axes right-hand sides.

    Args:
        masses: One symmetric positive definite matrix ``(n_i, n_i)`` per axis, 1 to 4, real; bands
            are found by themselves. None is the identity, as the mass of finite differences.
        method: ``"gemm"`` multiplies by the 1-D inverses; ``"banded"`` eliminates by blocks, O(N);
            ``"auto"`` takes gemm for short lines, banded for long ones.

    Attributes:
        shape: ``(n_1, …)``; None where the mass is the identity.

    Raises:
        SingularOperatorError: a mass that is not positive definite; names the axis.
        ValueError: not square, not symmetric, not finite, no masses or more than four.
        TypeError: complex, integers or half precision.
    """

    def __init__(self, masses: Sequence[Float[Tensor, "_ _"] | None], method: str = "auto") -> None:
        if not 1 <= len(masses) <= MAX_AXES:
            raise ValueError(f"masses must be 1 to {MAX_AXES}, got {len(masses)}")
        check_choice(method, "method", METHODS)
        self.shape = tuple(None if M is None else M.shape[0] for M in masses)
        self._lines: list[BandedLineSolver | None] = []
        names = {"auto": "auto", "gemm": "dense", "banded": "block"}
        for i, M in enumerate(masses):
            if M is None:
                self._lines.append(None)
                continue
            name = f"masses[{i}]"
            check_matrix(M, name, square=True)
            check_symmetric(M, name)
            _, info = torch.linalg.cholesky_ex(M.detach().double())
            if int(info):
                raise SingularOperatorError(
                    f"{name} must be positive definite, its leading {int(info)} x {int(info)} "
                    "block is not"
                )
            self._lines.append(BandedLineSolver.from_matrix(M, method=names[method]))

    def solve(self, F: Num[Tensor, "*grid"]) -> Num[Tensor, "*grid"]:
        """X, of the shape and type of ``F``; linear and differentiable in ``F`` and the masses.

        Args:
            F: ``(*batch, n_1, …)``; real or complex.

        Raises:
            ValueError: sizes that do not fit (names the axis), a NaN.
            TypeError: integers or half precision.
        """
        d = len(self.shape)
        found = F.shape[max(0, F.ndim - d) :]
        check_field(F, [n or m for n, m in zip(self.shape, (*found, *[1] * d), strict=False)], "F")
        for i, lines in enumerate(self._lines):
            if lines is not None:
                F = lines.invert(F, F.ndim - d + i)
        return F


def bspline_load(
    f: Callable[..., Tensor],
    elements: int | Sequence[int],
    degree: int | Sequence[int],
    lengths: Sequence[float | int],
    *,
    points: int | None = None,
) -> Float[Tensor, "*grid"]:
    """∫ f Bᵢ Bⱼ … over the box for all B-splines, by Gauss points and three small GEMMs.

    Args:
        f: Function of d tensors of coordinates that broadcast to the grid of points (x of shape
            ``(q_x, 1, 1)`` and so on), returning values there that broadcast to it.
        elements: Per axis, or one for all.
        degree: Likewise.
        lengths: Of the box, one per axis: d is how many there are, 1 to 4.
        points: Gauss points per element and axis; degree + 1 if None.

    Returns:
        ``(n_1, …)`` in float64, n_i = elements_i + degree_i; cut ``[1:-1]`` for functions that
        vanish at the ends. The right-hand side of Galerkin's method with :func:`bspline_matrices`.

    Raises:
        ValueError: a size, degree or length out of range; values of ``f`` that do not fit, or NaN.
    """
    d = len(lengths)
    if not 1 <= d <= MAX_AXES:
        raise ValueError(f"lengths must be 1 to {MAX_AXES}, got {d}")
    counts, degrees = (
        per_axis(value if isinstance(value, int) else list(value), d, name)
        for value, name in ((elements, "elements"), (degree, "degree"))
    )
    places, mats = [], []
    for i, (count, p, length) in enumerate(zip(counts, degrees, lengths, strict=True)):
        x, weights = gauss_points(count, p + 1 if points is None else points, length)
        mats.append(weights[:, None] * bspline_values(x, count, p, length))
        places.append(x.reshape(*[1] * i, -1, *[1] * (d - i - 1)))
    values = torch.as_tensor(f(*places), dtype=torch.float64)
    sizes = tuple(len(A) for A in mats)
    try:
        values = values.expand(sizes)
    except RuntimeError:
        check_sizes(values, sizes, "f(x, …)")
        raise
    check_field(values, sizes, "f(x, …)")
    return sum_factorize_transpose(mats, values, method="factorized")

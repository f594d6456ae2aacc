"""Poisson and Helmholtz problems solved directly over many processes.

Fast diagonalisation in a pencil decomposition (arXiv 2606.25148): the modes of an axis are taken in
the pencil in which that axis is whole, so that every product is local.
"""

from __future__ import annotations

import math
import warnings
from functools import reduce

import torch
from jaxtyping import Num
from torch import Tensor

from stiefel.numerics.tensor_product.axes import in_precision
from stiefel.numerics.tensor_product.axis_apply import apply_along
from stiefel.numerics.tensor_product.checks import (
    IncompatibleDataError,
    check_axis,
    check_field,
    real_dtype,
)
from stiefel.numerics.tensor_product.fast_diagonalization import (
    MEAN_TOLERANCE,
    FastDiagonalization,
    IncompatibleDataWarning,
)
from stiefel.numerics.tensor_product.pencils import PencilGrid
from stiefel.numerics.tensor_product.transforms import transform


def pencil_solve(
    grid: PencilGrid,
    solver: FastDiagonalization,
    F: Num[Tensor, "*block"],
    axis: int = 0,
) -> Num[Tensor, "*block"]:
    """``solver.solve(F)`` with F over the processes of a grid: the same solution to rounding.

    Each process needs its block and the 1-D tables. Fields move 2 (d - 1) times between
    neighbouring pencils if ``axis`` is the first or the last, and more often from between.

    Args:
        grid: Of ``len(solver.axes) - 1`` dimensions.
        solver: :class:`FastDiagonalization` of the whole grid; as on every process. Its option
            ``incompatible`` is followed; ``refine`` is not (use float64).
        F: This process's block ``(*batch, …)`` in pencil ``axis`` (:meth:`PencilGrid.local_block`).
        axis: The pencil of ``F`` and of the result.

    Returns:
        This process's block of the solution; differentiable.

    Raises:
        ValueError: a mesh that does not fit the solver, a block of the wrong shape or with a NaN on
            any process (names it).
        IncompatibleDataError: as the solver.
        TypeError: types as the solver.
    """
    if grid.dims != len(solver.shape):
        raise ValueError(
            f"a solver of {len(solver.shape)} axes needs a mesh of {len(solver.shape) - 1} "
            f"dimensions, got {grid.mesh}"
        )
    axis = check_axis(axis, grid.dims)
    slices = grid.local_slices(solver.shape, axis)
    grid.agree(_complaint(F, [s.stop - s.start for s in slices], solver))
    if solver.singular and solver.incompatible != "project":
        _check_mean(grid, solver, F)
    first = F.ndim - grid.dims
    # To the nearer end of the row of pencils and then to the other: the fewest moves.
    order = [*range(axis, -1, -1), *range(axis + 1, grid.dims)]
    if axis > grid.dims - 1 - axis:
        order = [*range(axis, grid.dims), *range(axis - 1, -1, -1)]
    hat, at = F, axis
    for i in order:
        hat, at = grid.walk(hat, at, i, solver.shape), i
        hat = _along(solver, i, hat, first + i, inverse=False)
    slices = grid.local_slices(solver.shape, at)
    sums = reduce(
        lambda a, b: a[..., None] + b,
        [in_precision(solver.axes[j].eigenvalues[s], F) for j, s in enumerate(slices)],
    )
    inverse = (sums + solver.shift).reciprocal()
    if solver.singular and all(s.start == 0 for s in slices):
        inverse[(0,) * grid.dims] = 0.0
    hat = hat * inverse
    for i in reversed(order):
        hat, at = grid.walk(hat, at, i, solver.shape), i
        hat = _along(solver, i, hat, first + i, inverse=True)
    return hat


def _along(solver: FastDiagonalization, i: int, U: Tensor, dim: int, *, inverse: bool) -> Tensor:
    """Sᵀ or S of axis i, by the transform or the table that the solver has chosen."""
    name = solver.transforms[i]
    if name is not None:
        return transform(U, dim, name, inverse=inverse)
    S = in_precision(solver.axes[i].eigenvectors, U)
    return apply_along(S if inverse else S.mT, U, dim)


def _complaint(F: Tensor, sizes: list[int], solver: FastDiagonalization) -> Exception | None:
    """What is wrong with this process's block; not raised yet, the others have to hear of it."""
    try:
        check_field(F, sizes, "F")
        if isinstance(solver.shift, complex) and not F.is_complex():
            raise TypeError(f"F must be complex since shift is, got {F.dtype}")
    except (TypeError, ValueError) as error:
        return error
    return None


def _check_mean(grid: PencilGrid, solver: FastDiagonalization, F: Tensor) -> None:
    """The mean of the whole field, from the sums of all processes."""
    values, dims = F.detach(), tuple(range(F.ndim - grid.dims, F.ndim))
    wide = torch.complex128 if F.is_complex() else torch.float64
    mine = (
        values.sum(dims, dtype=wide).cpu(),
        torch.linalg.vector_norm(values, float("inf"), dims).cpu(),
    )
    sums, largest = zip(*grid.from_all(mine), strict=True)
    mean = torch.stack(sums).sum(0).abs() / math.prod(solver.shape)
    size = torch.stack(largest).amax(0)
    bad = mean > MEAN_TOLERANCE[real_dtype(F.dtype)] * size
    if not bool(bad.any()):
        return
    message = (
        "F must have mean zero over all processes: with Neumann or periodic conditions on every "
        f"axis and shift 0 there is no solution otherwise. The mean is {float(mean[bad].max()):.2e}"
    )
    if solver.incompatible == "raise":
        raise IncompatibleDataError(f"{message}; a solver with incompatible='project' takes it out")
    warnings.warn(f"{message}; it was taken out", IncompatibleDataWarning, stacklevel=3)

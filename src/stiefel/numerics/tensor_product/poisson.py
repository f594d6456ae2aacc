"""-∇²u + c u = f on a box, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Num
from torch import Tensor

from stiefel.numerics.tensor_product.axis_apply import MAX_AXES
from stiefel.numerics.tensor_product.axis_kinds import grid1d
from stiefel.numerics.tensor_product.checks import check_field, per_axis
from stiefel.numerics.tensor_product.fast_diagonalization import FastDiagonalization


def poisson_solve(
    F: Num[Tensor, "*grid"],
    lengths: float | int | Sequence[float | int] = 1.0,
    bc: str | Sequence[str] = "dirichlet",
    scheme: Any = "fd2",
    shift: float | int | complex = 0.0,
    *,
    incompatible: str = "raise",
) -> Num[Tensor, "*grid"]:
    """Solve -∇²u + c u = f on a box of d = 1 to 4 axes.

    To solve often on one grid, keep a :class:`FastDiagonalization`.

    Args:
        F: f at the points of :func:`grid1d`, ``(*batch, nx, ny, …)``. For ``("bspline", p)`` and
            ``("fv", edges)`` its integrals against each function or cell.
        lengths: Of the box. A list has one length per axis and tells how many of F's axes are the
            grid; a number is for every axis of F, and there is no batch.
        bc: One for all axes or a list; names as in :func:`grid1d`.
        scheme: One for all axes or a list; names as in :func:`grid1d`.
        shift: c.
        incompatible: ``"raise"``, ``"warn"`` or ``"project"`` for data whose mean is not zero
            though it must be; see :class:`FastDiagonalization`.

    Returns:
        u at the points (for B-splines its coefficients), of the shape and type of F. Mean zero
        for a pure Neumann or periodic problem with c = 0.

    Raises:
        ValueError: lengths that are not positive, unknown names, lists of another length, sizes
            that do not fit, NaN.
        IncompatibleDataError: pure Neumann or periodic, c = 0, and the mean of F is not zero.
        SingularOperatorError: -c is an eigenvalue of the operator.
        TypeError: F is not float32, float64 or complex.

    Source: arXiv 2606.25148, fast diagonalisation.
    """
    d = len(lengths) if isinstance(lengths, Sequence) else F.ndim
    if not 1 <= d <= MAX_AXES:
        raise ValueError(
            f"the grid must have 1 to {MAX_AXES} axes, got {d}; pass lengths as a list, one per "
            "grid axis, if F has batch axes"
        )
    if F.ndim < d:
        raise ValueError(f"F must have at least {d} axes, one per length, got {tuple(F.shape)}")
    sizes = F.shape[F.ndim - d :]
    check_field(F, sizes, "F")
    axes = [
        grid1d(n, length, condition, kind)
        for n, length, condition, kind in zip(
            sizes,
            per_axis(lengths, d, "lengths"),
            per_axis(bc, d, "bc"),
            per_axis(scheme, d, "scheme"),
            strict=True,
        )
    ]
    return FastDiagonalization(axes, shift, incompatible=incompatible).solve(F)

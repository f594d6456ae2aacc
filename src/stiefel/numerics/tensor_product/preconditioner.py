"""-∇·(a ∇u) + c u = f with a(x) of any shape: conjugate gradients, preconditioned by the direct
solver for the mean of a.

The iteration count does not grow with the grid, only with max a / min a (arXiv 2606.25148,
applicability: separable solvers as preconditioners).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from stiefel.numerics.relaxation import SolveResult
from stiefel.numerics.tensor_product.axes import Axis
from stiefel.numerics.tensor_product.checks import (
    NEUMANN,
    PERIODIC,
    check_count,
    check_field,
    check_finite,
    check_positive,
    real_dtype,
)
from stiefel.numerics.tensor_product.fast_diagonalization import FastDiagonalization
from stiefel.numerics.tensor_product.scipy_operator import linear_operator


class DiffusionOperator:
    """-∇·(a ∇u) + c u on a uniform tensor grid, second order, a given on the faces.

    Args:
        faces: For each axis i the values of a on the faces across it: the grid's shape with one
            more along axis i, face k between points k - 1 and k. Values on a Neumann end do not
            matter; the two ends of a periodic axis are one face and must agree. Positive.
        axes: Uniform axes with scheme ``"fd2"``.
        shift: c ≥ 0.

    Attributes:
        shape: Of the grid.
        preconditioner: The :class:`FastDiagonalization` for the mean of a.

    Raises:
        ValueError: axes of another scheme, shapes that do not fit (names the axis), coefficients
            that are not positive and finite, a negative shift.

    Source: arXiv 2606.25148, applicability; coefficient at faces as in its sheet, item 9.
    """

    def __init__(
        self,
        faces: Sequence[Float[Tensor, "*_face"]],
        axes: Sequence[Axis],
        shift: float | int = 0.0,
    ) -> None:
        for i, axis in enumerate(axes):
            if axis.kind != "fd2":
                raise ValueError(f"axes[{i}] must have scheme 'fd2', got {axis.kind!r}")
        if len(faces) != len(axes):
            raise ValueError(f"faces must have one entry per axis, {len(axes)}, got {len(faces)}")
        self.axes, self.shift = tuple(axes), float(shift)
        self.shape = tuple(len(axis) for axis in axes)
        if not (math.isfinite(self.shift) and self.shift >= 0):
            raise ValueError(f"shift must be finite and at least 0, got {shift!r}")
        self._weights = [
            _face_weights(values, i, axes[i], self.shape) for i, values in enumerate(faces)
        ]
        counts = sum(values.numel() for values in faces)
        self.mean = float(sum(values.detach().sum() for values in faces) / counts)
        """Mean of a over all faces."""
        self.preconditioner = FastDiagonalization(
            axes, self.shift / self.mean, incompatible="project", refine=False
        )

    @classmethod
    def from_function(
        cls, a: Callable[..., Tensor], axes: Sequence[Axis], shift: float | int = 0.0
    ) -> DiffusionOperator:
        """With ``a(x, y, …)`` evaluated on the faces; it gets coordinates that broadcast."""
        faces = []
        for i in range(len(axes)):
            coordinates = []
            for j, axis in enumerate(axes):
                points = _face_points(axis) if i == j else axis.points
                coordinates.append(points.reshape(-1, *[1] * (len(axes) - 1 - j)))
            sizes = [len(x) for x in coordinates]
            faces.append(a(*coordinates).expand(sizes))
        return cls(faces, axes, shift)

    @classmethod
    def from_points(
        cls, values: Float[Tensor, "*grid"], axes: Sequence[Axis], shift: float | int = 0.0
    ) -> DiffusionOperator:
        """With ``a`` known at the grid points: harmonic means, right also where a jumps.

        Faces on the boundary take the value of the point beside them.
        """
        check_field(values, [len(axis) for axis in axes], "values")
        _check_coefficient(values, "values")
        faces = []
        for i, axis in enumerate(axes):
            n = len(axis)
            before, after = values.narrow(i, 0, n - 1), values.narrow(i, 1, n - 1)
            first, last = values.narrow(i, 0, 1), values.narrow(i, n - 1, 1)
            inner = 2 / (1 / before + 1 / after)
            if PERIODIC in axis.bc:
                first = last = 2 / (1 / first + 1 / last)
            faces.append(torch.cat([first, inner, last], i))
        return cls(faces, axes, shift)

    def matmul(self, U: Num[Tensor, "*grid"]) -> Num[Tensor, "*grid"]:
        """The operator on a field ``(*batch, nx, ny, …)``: O(N).

        Raises:
            ValueError: sizes that do not fit (names the axis), NaN.
            TypeError: not float32, float64 or complex.
        """
        check_field(U, self.shape)
        return self._apply(U)

    def _apply(self, U: Tensor) -> Tensor:
        out = self.shift * U
        for i, (weights, axis) in enumerate(zip(self._weights, self.axes, strict=True)):
            weights = weights.to(U.device, real_dtype(U.dtype))
            dim, n = U.ndim - len(self.shape) + i, len(axis)
            first, last = U.narrow(dim, 0, 1), U.narrow(dim, n - 1, 1)
            # Differences across all n + 1 faces; outside a Dirichlet end u is zero.
            ends = (first - last, first - last) if PERIODIC in axis.bc else (first, -last)
            jumps = torch.cat([ends[0], U.diff(dim=dim), ends[1]], dim)
            out = out - (weights * jumps).diff(dim=dim)
        return out

    def solve(
        self,
        F: Float[Tensor, "*grid"],
        *,
        rtol: float | int = 1e-8,
        maxiter: int = 1000,
        preconditioned: bool = True,
    ) -> SolveResult:
        """Conjugate gradients from zero until ‖r‖ ≤ rtol ‖F‖.

        The solution ``x`` is differentiable once in F and in the coefficients: backward is one more
        solve, nothing of the iteration is kept.

        Args:
            F: One field ``(nx, ny, …)``, real. For Neumann or periodic ends on every axis and
                shift 0 its mean must be zero.
            rtol: Relative residual to reach.
            maxiter: Iterations after which it gives up (``converged`` is then False).
            preconditioned: False leaves the direct solver out, for comparison.

        Returns:
            ``SolveResult(x, iterations, converged, residual)``; the residual is that of the
            recurrence over ‖F‖.

        Raises:
            ValueError: sizes that do not fit, NaN, rtol or maxiter out of range.
            IncompatibleDataError: a singular problem and a mean that is not zero.
        """
        if F.ndim != len(self.shape):
            raise ValueError(f"F must be one field of shape {self.shape}, got {tuple(F.shape)}")
        check_field(F, self.shape, "F")
        rtol = check_positive(rtol, "rtol")
        maxiter = check_count(maxiter, "maxiter")
        if self.preconditioner.singular:
            FastDiagonalization(self.axes).check_compatible(F)
        inverse = self.preconditioner.invert if preconditioned else _same

        def run(f: Tensor) -> tuple[Tensor, int, float]:
            return conjugate_gradients(self._apply, inverse, f, rtol, maxiter)

        with torch.no_grad():
            x, iterations, residual = run(F)
        if torch.is_grad_enabled():
            rest = F - self._apply(x)
            if rest.requires_grad:
                x = x + _SolveBackward.apply(rest, lambda f: run(f)[0])
        return SolveResult(x, iterations, residual <= rtol, residual)

    def as_scipy_linear_operator(self) -> Any:
        """``scipy.sparse.linalg.LinearOperator`` on vec(U), float64; symmetric."""

        def forward(U: Tensor) -> Tensor:
            return self._apply(U)

        return linear_operator(forward, forward, self.shape, self.shape, torch.float64)


class _SolveBackward(torch.autograd.Function):
    """Zero forward; backward the solution for the incoming gradient of a symmetric operator."""

    @staticmethod
    def forward(ctx: Any, rest: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return torch.zeros_like(rest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore
        return ctx.solve(grad_outputs[0]), None


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    F: Tensor,
    rtol: float,
    maxiter: int,
) -> tuple[Tensor, int, float]:
    """Solution, iterations and relative residual of a symmetric positive system, from zero."""
    x, r = torch.zeros_like(F), F.clone()
    size = float(torch.linalg.vector_norm(F))
    if size == 0:
        return x, 0, 0.0
    z = inverse(r)
    p, rz = z.clone(), torch.vdot(r.flatten(), z.flatten())
    residual = 1.0
    for iteration in range(1, maxiter + 1):
        q = apply(p)
        step = rz / torch.vdot(p.flatten(), q.flatten())
        x += step * p
        r -= step * q
        residual = float(torch.linalg.vector_norm(r)) / size
        if residual <= rtol:
            return x, iteration, residual
        z = inverse(r)
        before, rz = rz, torch.vdot(r.flatten(), z.flatten())
        p = z + (rz / before) * p
    return x, maxiter, residual


def _same(r: Tensor) -> Tensor:
    return r


def _face_points(axis: Axis) -> Tensor:
    """Where the n + 1 faces of a uniform axis are: half a step around every point."""
    h = axis.spacing or 1.0
    return axis.points[0] - h / 2 + h * torch.arange(len(axis) + 1, dtype=torch.float64)


def _check_coefficient(values: Tensor, name: str) -> None:
    check_finite(values, name)
    smallest = float(values.detach().min())
    if not smallest > 0:
        raise ValueError(
            f"{name} must be positive, the smallest is {smallest:.3g}. A zero would cut points out "
            "of the box: curved and masked domains are no tensor products and out of scope here"
        )


def _face_weights(values: Tensor, i: int, axis: Axis, shape: Sequence[int]) -> Tensor:
    """a/h² on the faces across axis i; zero on Neumann ends."""
    expected = tuple(n + (j == i) for j, n in enumerate(shape))
    if tuple(values.shape) != expected:
        raise ValueError(
            f"faces[{i}] must have shape {expected}, one more than the grid along axis {i}, got "
            f"{tuple(values.shape)}"
        )
    _check_coefficient(values, f"faces[{i}]")
    n = len(axis)
    first, last = values.narrow(i, 0, 1), values.narrow(i, n, 1)
    if PERIODIC in axis.bc and not torch.equal(first.detach(), last.detach()):
        difference = float((first - last).detach().abs().max())
        if difference > 1e-10 * float(values.detach().abs().max()):
            raise ValueError(
                f"faces[{i}]: the first and the last face of a periodic axis are one and must "
                f"agree, they differ by {difference:.1e}"
            )
    keep = torch.ones(n + 1, dtype=values.dtype, device=values.device)
    for place, end in zip((0, -1), axis.bc, strict=True):
        if end == NEUMANN:
            keep[place] = 0.0
    h = axis.spacing or 1.0
    return values * keep.reshape(-1, *[1] * (len(shape) - 1 - i)) / h**2

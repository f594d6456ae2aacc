"""The Poincaré ball as a module: its curvature is a number, or learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stiefel.linalg._checks import HALF_TYPES
from stiefel.nn.poincare import operations
from stiefel.nn.poincare._args import check_no_nan, wrong_curvature

# Training may push c towards 0, where the ball is flat, but 1/√c has to stay a number.
FLATTEST = 1e-12


class PoincareBall(nn.Module):
    """The ball of radius 1/√c with curvature −c, and its operations along the last dimension.

    Points that are not inside raise ``ValueError``. Half precision is computed in float32.

    Args:
        c: > 0, at least 1e-12. Kept as softplus⁻¹(c), so that training cannot make it negative.
        learnable: Whether c is a parameter.
        project: Take points outside the ball for the nearest ones inside instead of raising.
        check: Whether to look at the points at all; on a GPU that waits for the numbers.
        debug: Raise ``RuntimeError`` naming the operation, or layer, that gave NaN.
        device: Of c.
        dtype: Of c.

    Raises:
        ValueError: c is not positive and finite.

    >>> ball = PoincareBall(c=0.5)
    >>> point = ball.expmap0(torch.tensor([3.0, 4.0]))
    >>> round(float(ball.dist(torch.zeros(2), point)), 2)
    8.84
    """

    def __init__(
        self,
        c: float | int = 1.0,
        learnable: bool = False,
        *,
        project: bool = False,
        check: bool = True,
        debug: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not FLATTEST <= c < math.inf:
            raise ValueError(wrong_curvature(c))
        # log(exp(c) - 1), also where exp(c) overflows.
        raw = torch.tensor(c + math.log(-math.expm1(-c)), device=device, dtype=dtype)
        self.learnable = learnable
        if learnable:
            self.raw_c = nn.Parameter(raw)
        else:
            self.register_buffer("raw_c", raw)
        self.pulls_in, self.check, self.debug = project, check, debug

    @property
    def c(self) -> Float[Tensor, ""]:
        """The negative of the curvature, without dimensions."""
        return nn.functional.softplus(self.raw_c).clamp_min(FLATTEST)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PoincareBall:
        # Half a precision would change the geometry: c stays as it is, on the new device.
        before = self.raw_c.detach()
        super()._apply(fn, recurse)
        if self.raw_c.dtype in HALF_TYPES and before.dtype not in HALF_TYPES:
            self.raw_c.data = before.to(self.raw_c.device)
        return self

    def _points(self, *points: Tensor) -> tuple[Tensor, ...]:
        if not self.pulls_in:
            return points
        return tuple(operations.project(x, self.c) for x in points)

    def _checked(self, out: Tensor, operation: str) -> Tensor:
        if self.debug:
            check_no_nan(out, operation)
        return out

    def _call(self, name: str, points: tuple[Tensor, ...], *rest: Any) -> Tensor:
        function = getattr(operations, name)
        arguments = (*self._points(*points), *rest)
        return self._checked(function(*arguments, self.c, check=self.check), name)

    def expmap0(self, v: Tensor) -> Tensor:
        """exp₀(v), ``[..., d]`` to points; see :func:`~stiefel.nn.poincare.expmap0`."""
        return self._checked(operations.expmap0(v, self.c), "expmap0")

    def logmap0(self, x: Tensor) -> Tensor:
        """log₀(x), points ``[..., d]`` to tangent vectors at the origin."""
        return self._call("logmap0", (x,))

    def expmap(self, x: Tensor, v: Tensor) -> Tensor:
        """exp_x(v): where the geodesic from x along v ends."""
        return self._call("expmap", (x,), v)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """log_x(y): the tangent vector at x whose geodesic ends in y."""
        return self._call("logmap", (x, y))

    def mobius_add(self, x: Tensor, y: Tensor) -> Tensor:
        """x ⊕ y."""
        return self._call("mobius_add", (x, y))

    def conformal_factor(self, x: Tensor) -> Tensor:
        """λ_x, ``[...]`` of points ``[..., d]``."""
        return self._call("conformal_factor", (x,))

    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances, ``[...]`` of points ``[..., d]``."""
        return self._call("dist", (x, y))

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """The tangent vector v at x, carried to y along the geodesic."""
        return self._call("transp", (x, y), v)

    def gyration(self, u: Tensor, v: Tensor, w: Tensor) -> Tensor:
        """gyr[u, v] w."""
        return self._call("gyration", (u, v), w)

    def project(self, x: Tensor, eps: float | int | None = None) -> Tensor:
        """Points longer than (1 − eps)/√c shortened to that; eps: 4e-3, 1e-5 in float64."""
        return self._checked(operations.project(x, self.c, eps), "project")

    def midpoint(self, x: Tensor, w: Tensor | None = None, dim: int = 0) -> Tensor:
        """Gyromidpoint over ``dim``, with weights; see :func:`~stiefel.nn.poincare.midpoint`."""
        (x,) = self._points(x)
        return self._checked(operations.midpoint(x, self.c, w, dim, check=self.check), "midpoint")

    def frechet_mean(self, x: Tensor, tol: float | int = 1e-8, max_iter: int = 100) -> Tensor:
        """The point with the least mean squared distance to ``[n, d]`` points."""
        (x,) = self._points(x)
        return self._checked(
            operations.frechet_mean(x, self.c, tol, max_iter, check=self.check), "frechet_mean"
        )

    def extra_repr(self) -> str:
        """c, for ``print(model)``."""
        return f"c={float(self.c.detach()):.4g}, learnable={self.learnable}"

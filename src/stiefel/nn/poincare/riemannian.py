"""Any torch optimizer on parameters that are points of the ball."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from stiefel.nn.poincare.ball import PoincareBall


class RiemannianHook:
    """Makes a ``torch.optim.Optimizer`` step along geodesics for parameters that are points.

    Before a step the gradients of the points are divided by λ², which makes them Riemannian ones;
    after it, what the optimizer added is taken as a tangent vector, and the point moves along its
    geodesic (exponential map, projected). Momentum is carried along by parallel transport. With SGD
    that is Riemannian SGD. Adam divides coordinate by coordinate, which is
    not invariant, but works.
    All other parameters are left alone; the gradients are the old ones again after the step.

    Layers of this package need none of it: their parameters are not points.

    Args:
        optimizer: Any; it keeps working on all of its parameters.
        points: Parameters of it, ``[..., d]``, every row a point of the ball.
        ball: Which.
        transport: Names of state that is a tangent vector at the point.

    Raises:
        TypeError: ball is not a :class:`PoincareBall`.
        ValueError: no points, or one that is not a parameter of the optimizer or not in the ball.

    >>> ball = PoincareBall(1.0)
    >>> words = torch.nn.Parameter(torch.zeros(100, 2))
    >>> optimizer = torch.optim.SGD([words], lr=0.1, momentum=0.9)
    >>> hook = RiemannianHook(optimizer, [words], ball)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        points: Iterable[Tensor],
        ball: PoincareBall,
        *,
        transport: Sequence[str] = ("momentum_buffer", "exp_avg"),
    ) -> None:
        if not isinstance(ball, PoincareBall):
            raise TypeError(f"ball must be a PoincareBall, got {type(ball).__name__}")
        self.points, self.ball, self.transport = list(points), ball, tuple(transport)
        if not self.points:
            raise ValueError("points must hold at least one parameter")
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for index, point in enumerate(self.points):
            if id(point) not in known:
                raise ValueError(f"points[{index}] is not a parameter of the optimizer")
            ball.conformal_factor(point.detach())
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        )

    def remove(self) -> None:
        """Let the optimizer step as it did before."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _pre(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        closure = kwargs.get("closure") or next(iter(args[1:] if args else ()), None)
        if closure is not None:
            raise ValueError(
                "step(closure) computes gradients inside the step, where they cannot be rescaled: "
                "call backward() first and step() without a closure"
            )
        self._before = []
        for point in self.points:
            grad = point.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise TypeError("gradients of points must be dense: use sparse=False")
            factor = self.ball.conformal_factor(point)[..., None]
            point.grad = (grad / factor.square()).to(grad.dtype)
            self._before.append((point, point.clone(), grad))

    @torch.no_grad()
    def _post(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for point, start, grad in self._before:
            end = self.ball.expmap(start, point - start)
            for name in self.transport:
                kept = optimizer.state.get(point, {}).get(name)
                if isinstance(kept, Tensor) and kept.shape == point.shape:
                    kept.copy_(self.ball.transp(start, end, kept))
            point.copy_(end)
            point.grad = grad
        self._before = []

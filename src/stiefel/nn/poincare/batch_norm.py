"""Batch normalisation in the Poincaré ball, by the midpoint or the Fréchet mean.

Source: van Spengler et al., arXiv 2303.14027 (midpoint); Lou et al., arXiv 2003.00335 (Fréchet).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.linalg._checks import compute_dtype
from stiefel.nn.poincare._args import check_no_nan, exactly
from stiefel.nn.poincare._midpoint_norm import LEAST, midpoint_norm
from stiefel.nn.poincare._radial import TANHC
from stiefel.nn.poincare.ball import PoincareBall
from stiefel.nn.poincare.conv import check_images
from stiefel.nn.poincare.functions import (
    scale,
    squared_length,
    translate,
)
from stiefel.nn.poincare.linear import check_layer
from stiefel.nn.poincare.operations import frechet_tangent

MEANS = ("midpoint", "frechet")
# The Fréchet mean within a layer: far below what batches differ by.
_TOLERANCE, _STEPS = 1e-6, 100


class PoincareBatchNorm2d(nn.Module):
    """Points of a batch moved to a learned mean, with a learned variance; tangent in and out.

    With mu the mean of all batch·H·W points p and s their mean squared distance to it,

        out = exp_beta(√(g/(s + eps)) PT_{mu→beta} log_mu(p)),   beta = exp₀(bias).

    Evaluation uses running statistics, which the authors' code does not have: the tangent vector of
    the mean and s, each updated by ``(1 − momentum) old + momentum new``.

    Args:
        features: Channels.
        ball: Where.
        mean: ``"midpoint"``, or ``"frechet"``: by Newton's method, with exact gradients.
        eps: > 0.
        momentum: In (0, 1].
        track_running_stats: False: statistics of the batch in evaluation too, as in the authors'
            code.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.

    Attributes:
        weight: g, one number, 1 at the start. Below 1e-12 it counts as that.
        bias: ``[features]``, 0 at the start.

    Raises:
        ValueError: an unknown mean, a setting out of range.
        TypeError: ball is not a :class:`PoincareBall`.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        features: int,
        ball: PoincareBall,
        mean: str = "midpoint",
        eps: float | int = 1e-6,
        momentum: float | int = 0.1,
        track_running_stats: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_layer("identity", 0, None, ball, features=features)
        if mean not in MEANS:
            raise ValueError(f"mean must be one of {', '.join(MEANS)}, got {mean!r}")
        if not 0 < eps < math.inf or not 0 < momentum <= 1:
            raise ValueError(
                f"eps must be positive and momentum in (0, 1], got eps={eps}, momentum={momentum}"
            )
        self.features, self.ball, self.mean = features, ball, mean
        self.eps, self.momentum, self.track_running_stats = eps, momentum, track_running_stats
        self.weight = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        if track_running_stats:
            self.register_buffer("running_mean", torch.empty_like(self.bias.detach()))
            self.register_buffer("running_var", torch.empty_like(self.weight.detach()))
            count = torch.zeros((), dtype=torch.long, device=device)
            self.register_buffer("num_batches_tracked", count)
        else:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                self.register_buffer(name, None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again: g = 1, beta at the origin, no statistics."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Forget the batches seen."""
        if self.running_mean is None or self.running_var is None:
            return
        self.running_mean.zero_()
        self.running_var.fill_(1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def forward(self, x: Shaped[Tensor, ...]) -> Float[Tensor, "batch channels height width"]:
        """Tangent vectors at the origin, of the shape and dtype of x.

        Raises:
            TypeError: x is not floating point.
            ValueError: other channels; a single point where its statistics are needed.
            RuntimeError: the result holds NaN and the ball is in debug mode; the Fréchet mean does
                not converge.
        """
        check_images(x, self.features)
        batch = self.training or self.running_mean is None
        count = x.numel() // self.features
        if batch and count < 2:
            raise ValueError(
                f"the variance of a batch needs at least two points, got shape {tuple(x.shape)}"
            )
        work = compute_dtype(torch.promote_types(x.dtype, self.bias.dtype))
        with exactly(x):
            u, c, bias = x.to(work), self.ball.c.to(work), self.bias.to(work)
            weight = self.weight.to(work)
            if batch and self.mean == "midpoint":
                out, mean, variance = midpoint_norm(u.flatten(2), weight, bias, c, self.eps)
                out = out.reshape(u.shape)
            else:
                out, mean, variance = self._about(self._mean(u, c, batch), u, c, batch)
            if batch:
                self._track(mean, variance)
        if self.ball.debug:
            check_no_nan(out, "PoincareBatchNorm2d")
        return out.to(x.dtype)

    def _mean(self, u: Tensor, c: Tensor, batch: bool) -> Tensor:
        if not batch:
            return self._running(self.running_mean, u)
        rows = u.movedim(1, -1).flatten(0, 2)
        return frechet_tangent(rows, c, _TOLERANCE, _STEPS)[:, None, None][None]

    def _about(
        self, mean: Tensor, u: Tensor, c: Tensor, batch: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised about a mean that is known; the mean and the variance."""
        moved = translate(-mean, u, c, 1)  # log₀((−mu) ⊕ p), half of log_mu(p) carried to 0
        if batch:
            variance = 4 * squared_length(moved, 1).mean()
        else:
            variance = self._running(self.running_var, u)
        size = (self.weight.to(c.dtype).clamp_min(LEAST) / (variance + self.eps)).sqrt()
        beta = self.bias.to(c.dtype)[:, None, None]
        turned = torch.matmul(size * self._rotation(mean, c), moved.flatten(2)).reshape(u.shape)
        return translate(beta[None], turned, c, 1), mean, variance

    def _rotation(self, mean: Tensor, c: Tensor) -> Tensor:
        """gyr[beta, −mu], ``[C, C]``: parallel transport past the origin turns vectors by it.

        With u = √c beta, v = −√c mu as points, M = [u v] and J = [[0, 1], [−1, 0]] it is
        I − 2M (MᵀM + (1 + <u, v>) J)⁻¹ Mᵀ: the sheet's formula of gyr, a 2 × 2 inverse.
        """
        both = torch.stack([self.bias.to(c.dtype), -mean.flatten()])
        m = c.sqrt() * scale(both, c, TANHC)
        gram = m @ m.mT
        turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=c.dtype, device=c.device)
        inner = torch.linalg.solve(gram + (1 + gram[0, 1]) * turn, m)
        eye = torch.eye(self.features, dtype=c.dtype, device=c.device)
        return torch.addmm(eye, m.mT, inner, alpha=-2)

    @staticmethod
    def _running(statistic: Tensor | None, like: Tensor) -> Tensor:
        if statistic is None:
            raise RuntimeError("no running statistics: the layer was made without them")
        statistic = statistic.to(like.dtype)
        return statistic[None, :, None, None] if statistic.ndim else statistic

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        for kept, new in ((self.running_mean, mean.flatten()), (self.running_var, variance)):
            kept.lerp_(new.detach().to(kept.dtype), self.momentum)

    def extra_repr(self) -> str:
        """Choices, for ``print(model)``."""
        return (
            f"{self.features}, mean={self.mean!r}, eps={self.eps:g}, momentum={self.momentum:g}, "
            f"track_running_stats={self.track_running_stats}"
        )

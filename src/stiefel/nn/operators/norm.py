"""Normalisation of functions: moments are integrals.

Source: sheet of arXiv 2506.10973, recipe, "BatchNorm/LayerNorm over the grid".
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.linalg.autocast import without_autocast
from stiefel.nn.operators.checks import (
    check_finite_values,
    check_numeric,
    check_weights,
    chosen,
    positive,
    sizes,
    working,
)

KINDS = ("instance", "layer", "batch")


def weighted_moments(
    x: Shaped[Tensor, "batch channels *grid"],
    weights: Tensor | None,
    dims: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """m = Σ w v / Σ w and Σ w (v − m)² / Σ w over ``dims``, which are kept with size 1.

    ``weights`` broadcast to x, as :func:`stiefel.nn.operators.losses.point_weights` makes them.
    """
    if weights is None:
        mean = x.mean(dims, keepdim=True)
        return mean, (x - mean).square().mean(dims, keepdim=True)
    share = weights.to(x.dtype).expand(x.shape)
    share = share / share.sum(dims, keepdim=True)
    mean = (share * x).sum(dims, keepdim=True)
    return mean, (share * (x - mean).square()).sum(dims, keepdim=True)


class FunctionNorm(nn.Module):
    """(v − m) / √(var + ε) with moments m = Σ w v / Σ w, var = Σ w (v − m)² / Σ w.

    With equal weights it is ``nn.InstanceNorm``, ``nn.GroupNorm(1, C)`` or ``nn.BatchNorm``.

    Args:
        weights: Quadrature weights of the points, ``[*grid]``, used unless ``forward`` is given
            others. Not in the state dict: another grid has others.
        channels: C, for a scale and a shift per channel; needed by ``"batch"``.
        kind: What moments are taken over: ``"instance"``: points; ``"layer"``: points and channels;
            ``"batch"``: points and samples, with running moments for evaluation.
        eps: ε.
        momentum: Of the running moments.

    Raises:
        TypeError, ValueError: Weights that are not positive, ``"batch"`` without channels, other
            settings out of range.
    """

    weights: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        weights: Float[Tensor, "*grid"] | None = None,
        channels: int | None = None,
        *,
        kind: str = "instance",
        eps: float | int = 1e-5,
        momentum: float | int = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if weights is not None:
            check_weights(weights)
        self.register_buffer("weights", weights, persistent=False)
        self.kind, self.eps = chosen(kind, KINDS, "kind"), positive(eps, "eps")
        self.channels = None if channels is None else sizes(channels, 1, "channels")[0]
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.momentum = float(momentum)
        self.scale: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None
        if channels is not None:
            self.scale = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
            self.shift = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        if kind == "batch":
            if channels is None:
                raise ValueError("channels is missing: kind='batch' keeps moments of each")
            zeros = torch.zeros(channels, device=device, dtype=dtype)
            self.register_buffer("running_mean", zeros)
            self.register_buffer("running_var", torch.ones_like(zeros))

    def reset_parameters(self) -> None:
        """Scale 1, shift 0, running moments 0 and 1."""
        with torch.no_grad():
            if self.scale is not None and self.shift is not None:
                self.scale.fill_(1)
                self.shift.zero_()
            if self.kind == "batch":
                self.running_mean.zero_()
                self.running_var.fill_(1)

    def forward(
        self,
        x: Float[Tensor, "batch channels *grid"],
        weights: Tensor | None = None,
    ) -> Float[Tensor, "batch channels *grid"]:
        """The field with mean 0 and variance 1 before scale and shift; half types in float32.

        Args:
            x: ``[batch, C, *grid]``.
            weights: ``[*grid]`` or ``[batch, *grid]``, in place of those of the layer.

        Raises:
            TypeError: Not real floating point.
            ValueError: NaN, wrong number of channels, weights of another grid or not positive.
        """
        from stiefel.nn.operators.losses import point_weights

        check_numeric(x, "x")
        check_finite_values(x, "x")
        if x.ndim < 3 or (self.channels is not None and x.shape[1] != self.channels):
            raise ValueError(
                f"x must be [batch, {self.channels or 'channels'}, *grid], got shape "
                f"{tuple(x.shape)}"
            )
        given = self.weights if weights is None else weights
        points = None if given is None else point_weights(given, x)
        per_channel = (-1, *(1,) * (x.ndim - 2))
        with without_autocast(x):
            y = working(x)
            axes = tuple(range(2, x.ndim))
            dims = {"instance": axes, "layer": (1, *axes), "batch": (0, *axes)}[self.kind]
            if self.kind == "batch" and not self.training:
                mean, var = (
                    r.to(y.dtype).reshape(per_channel)
                    for r in (self.running_mean, self.running_var)
                )
            else:
                mean, var = weighted_moments(y, points, dims)
                if self.kind == "batch":
                    self._follow(mean, var)
            y = (y - mean) * torch.rsqrt(var + self.eps)
            if self.scale is not None and self.shift is not None:
                scale, shift = (
                    p.to(y.dtype).reshape(per_channel) for p in (self.scale, self.shift)
                )
                y = y * scale + shift
        return y.to(x.dtype)

    def _follow(self, mean: Tensor, var: Tensor) -> None:
        # No n/(n − 1): moments of functions do not know the number of points.
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten().to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var.flatten().to(self.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        points = None if self.weights is None else tuple(self.weights.shape)
        return f"channels={self.channels}, kind={self.kind!r}, eps={self.eps}, weights={points}"

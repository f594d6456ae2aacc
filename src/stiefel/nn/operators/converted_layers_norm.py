"""Normalisation over a grid and attention over its points, with quadrature weights.

Without weights all points weigh the same, and torch's own code runs. With them
(``converted(x, weights=w)``) moments are m = Σ w v / Σ w and var = Σ w (v − m)² / Σ w, and
attention adds log w to its logits.

Source: sheet of arXiv 2506.10973, recipe, "BatchNorm/LayerNorm over the grid" and "softmax
attention".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stiefel.nn.operators.converted_layers import Converted


class QuadratureBatchNorm(Converted):
    """Batch normalisation whose statistics in training are integrals; pointwise otherwise."""

    prefix = "Quadrature"

    def forward(self: Any, input: Tensor) -> Tensor:
        """``[batch, C, *grid]`` to the same."""
        weights = self._stiefel_grid.here.weights
        counts = self.training or self.running_mean is None
        if weights is None or not counts or input.ndim == 2:
            return super().forward(input)  # type: ignore[misc]
        self._check_input_dim(input)
        x, w = _flat(input, weights, self._stiefel_name)
        share = w.expand(x.shape[0], 1, -1) / (w.sum() * x.shape[0] / w.shape[0])
        mean = (share * x).sum((0, 2))
        var = (share * (x - mean[:, None]) ** 2).sum((0, 2))
        if self.training and self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = self.momentum
                if momentum is None:
                    momentum = 1 / float(self.num_batches_tracked)
                # As torch: what is stored is the unbiased variance, here by the effective number
                # of points (Σw)² / Σw², which is N where all weigh the same.
                many = 1 / share.square().sum()
                unbiased = var * many / (many - 1).clamp(min=torch.finfo(var.dtype).tiny)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        scaled = (x - mean[:, None]) * torch.rsqrt(var + self.eps)[:, None]
        return _affine(scaled.reshape(input.shape), self.weight, self.bias)


class QuadratureInstanceNorm(Converted):
    """Instance normalisation by integrals; without running statistics of its own."""

    prefix = "Quadrature"

    def forward(self: Any, input: Tensor) -> Tensor:
        """``[batch, C, *grid]`` to the same."""
        weights = self._stiefel_grid.here.weights
        if weights is None or not (self.training or not self.track_running_stats):
            return super().forward(input)  # type: ignore[misc]
        x, w = _flat(input, weights, self._stiefel_name)
        return _affine(_normal(x, w, 2, self.eps).reshape(input.shape), self.weight, self.bias)


class QuadratureGroupNorm(Converted):
    """Group normalisation by integrals."""

    prefix = "Quadrature"

    def forward(self: Any, input: Tensor) -> Tensor:
        """``[batch, C, *grid]`` to the same."""
        weights = self._stiefel_grid.here.weights
        if weights is None:
            return super().forward(input)  # type: ignore[misc]
        x, w = _flat(input, weights, self._stiefel_name)
        groups = x.reshape(x.shape[0], self.num_groups, -1, x.shape[-1])
        y = _normal(groups, w[:, None], (2, 3), self.eps)
        return _affine(y.reshape(input.shape), self.weight, self.bias)


class QuadratureLayerNorm(Converted):
    """Layer normalisation over ``[…, *grid]``, without a parameter per point."""

    prefix = "Quadrature"

    def forward(self: Any, input: Tensor) -> Tensor:
        """Normalised over as many last axes as the original, whatever their sizes."""
        here = self._stiefel_grid.here
        axes = len(self.normalized_shape)
        if here.weights is None:
            return F.layer_norm(input, input.shape[-axes:], None, None, self.eps)
        ndim = len(self._stiefel_grid.base_shape)
        x, w = _flat(input, here.weights, self._stiefel_name, ndim)
        dims = 2 if axes == ndim else (1, 2)
        return _normal(x, w, dims, self.eps).reshape(input.shape)


class QuadratureMean(Converted):
    """The mean over the grid as an integral: ``nn.AdaptiveAvgPool`` of size 1."""

    prefix = "Quadrature"

    def forward(self: Any, input: Tensor) -> Tensor:
        """``[batch, C, *grid]`` to ``[batch, C, 1, …]``."""
        weights, ndim = self._stiefel_grid.here.weights, len(self._stiefel_grid.base_shape)
        if weights is None or input.ndim != ndim + 2:
            return super().forward(input)  # type: ignore[misc]
        x, w = _flat(input, weights, self._stiefel_name)
        mean = (x * w).sum(-1) / w.sum(-1)
        return mean.reshape(*mean.shape, *(1,) * ndim)


class QuadratureAttention(Converted):
    """``nn.MultiheadAttention`` whose sum over keys is an integral: log w joins the logits.

    Keys that are no points (``add_bias_kv``, ``add_zero_attn``) count as one point of the training
    grid each, on every grid.
    """

    prefix = "Quadrature"
    batch_first: bool
    bias_k: Tensor | None
    add_zero_attn: bool

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's.

        Raises:
            ValueError: the keys are not the points that the weights belong to.
        """
        bias = self._log_weights(key, query is key)
        if bias is not None:
            key_padding_mask = _joined(bias, key_padding_mask)
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = _joined(torch.zeros_like(attn_mask, dtype=query.dtype), attn_mask)
        return super().forward(  # type: ignore[misc]
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    def _log_weights(self, key: Tensor, own: bool) -> Tensor | None:
        """``[batch, keys]`` or ``[keys]``; None where all keys weigh the same."""
        here = self._stiefel_grid.here
        weights, points = here.weights, math.prod(here.ratio)
        extra = self.bias_k is not None or self.add_zero_attn
        axis = 0 if key.ndim == 2 or not self.batch_first else 1
        if weights is None:
            if not (extra and own and points != 1):
                return None
            weights = key.new_ones(key.shape[axis])
        if key.shape[axis] != weights.shape[-1]:
            raise ValueError(
                f"attention {self._stiefel_name!r} has {key.shape[axis]} keys, but weights are "
                f"for {weights.shape[-1]} points"
            )
        bias = torch.log(weights / weights.mean(-1, keepdim=True)).to(key.dtype)
        if extra:
            bias = bias - math.log(points)
        return bias.expand(key.shape[1 - axis], -1) if key.ndim == 3 else bias


class QuadratureEncoderLayer(Converted):
    """``nn.TransformerEncoderLayer`` that does not go around its attention when weights are set."""

    prefix = "Quadrature"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As torch's."""
        if self._stiefel_grid.here.weights is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _no_fast_path():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class ChannelLinear(Converted):
    """``nn.Linear`` of as many inputs as the grid has points, taken to act on channels."""

    prefix = "Channel"
    in_features: int

    def forward(self, input: Tensor) -> Tensor:
        """As torch's.

        Raises:
            ValueError: it acts over the grid after all.
        """
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"{self._stiefel_name!r} is a Linear over the grid: it has {self.in_features} "
                f"inputs and got {input.shape[-1]}; replace it by SpectralConv, KernelIntegral or "
                "a mean over the grid"
            )
        return super().forward(input)  # type: ignore[misc]


def _flat(x: Tensor, weights: Tensor, name: str, ndim: int | None = None) -> tuple[Tensor, Tensor]:
    """Features ``[batch, channels, N]`` and weights ``[1 or batch, 1, N]``."""
    start = 2 if ndim is None else x.ndim - ndim
    y = x.flatten(start).reshape(x.shape[0], -1, x.shape[start:].numel())
    if y.shape[-1] != weights.shape[-1]:
        raise ValueError(
            f"layer {name!r} normalises over {y.shape[-1]} points, but weights are for "
            f"{weights.shape[-1]}"
        )
    return y, weights.reshape(-1, 1, weights.shape[-1]).to(y.dtype)


def _normal(x: Tensor, w: Tensor, dims: int | tuple[int, ...], eps: float) -> Tensor:
    """(x − m) / √(var + ε), moments over ``dims`` with weights that broadcast."""
    share = w.expand_as(x) / w.expand_as(x).sum(dims, keepdim=True)
    mean = (share * x).sum(dims, keepdim=True)
    var = (share * (x - mean) ** 2).sum(dims, keepdim=True)
    return (x - mean) * torch.rsqrt(var + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (-1, *(1,) * (x.ndim - 2))
    if weight is not None:
        x = x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _joined(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A float mask and another one, float or boolean (True: left out)."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(mask, float("-inf"))
    return bias + mask


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Torch's fused encoder layer takes no float masks."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

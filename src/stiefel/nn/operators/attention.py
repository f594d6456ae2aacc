"""Attention as an integral: quadrature weights go into the sum over keys.

Source: sheet of arXiv 2506.10973, recipe, "softmax attention" and "linear attention"; Cao,
arXiv 2105.14995 (Galerkin), Li et al., arXiv 2205.13671 (OFormer).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.nn.operators.checks import (
    check_field,
    check_finite_values,
    check_weights,
    chosen,
    sizes,
)
from stiefel.nn.operators.norm import weighted_moments

KINDS = ("softmax", "linear")
NORMS = ("points", "channels", "none")
# Rotary embedding of the authors' OFormer: x / (1/64), rates 10000^(−2i/d).
ROTARY_SCALE, ROTARY_LONGEST = 64.0, 10_000.0


def integral_attention(
    q: Float[Tensor, "*batch queries c"],
    k: Float[Tensor, "*batch points c"],
    v: Float[Tensor, "*batch points e"],
    weights: Tensor | None = None,
    kind: str = "softmax",
) -> Float[Tensor, "*batch queries e"]:
    """Attention with quadrature weights w_j of the points where keys and values are.

        softmax:  Σ_j w_j e^(q·k_j/√c) v_j / Σ_j w_j e^(q·k_j/√c)
        linear:   q (Σ_j w_j k_j v_jᵀ)

    Splitting a point into two of half the weight changes nothing. The softmax kind is
    ``scaled_dot_product_attention`` with log w added to the logits, so that its kernels apply.

    Args:
        q: ``[..., N_q, c]``.
        k: ``[..., N, c]``.
        v: ``[..., N, e]``.
        weights: w, positive, ``[N]`` or broadcasting to the leading dimensions; None: 1/N.
        kind: ``"softmax"`` or ``"linear"``.

    Raises:
        TypeError, ValueError: An unknown kind, weights that are not positive or do not fit.
    """
    chosen(kind, KINDS, "kind")
    if weights is not None:
        check_weights(weights)
        if weights.ndim == 0 or weights.shape[-1] != k.shape[-2]:
            raise ValueError(
                f"weights must have one entry for each of the {k.shape[-2]} points in its last "
                f"dimension, got shape {tuple(weights.shape)}"
            )
    if kind == "linear":
        if weights is None:
            return q @ (k.mT @ v / k.shape[-2])
        return q @ ((k * weights[..., None].to(k.dtype)).mT @ v)
    mask = None if weights is None else weights.log().to(q.dtype)[..., None, :]
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rotate(
    x: Float[Tensor, "batch heads points c"], places: Float[Tensor, "*many points d"]
) -> Float[Tensor, "batch heads points c"]:
    """Rotary embedding: q·k then depends on differences of places; c / d channels per coordinate.

    Raises:
        ValueError: c is no multiple of 2d.
    """
    ndim, width = places.shape[-1], x.shape[-1]
    if width % (2 * ndim):
        raise ValueError(
            f"head_dim must be a multiple of 2 d = {2 * ndim} for a rotary embedding, got {width}"
        )
    size = width // ndim
    steps = torch.arange(0, size, 2, device=x.device, dtype=x.dtype)
    rates = ROTARY_SCALE * ROTARY_LONGEST ** (-steps / size)
    angles = places.to(x.dtype)[..., None] * rates
    if places.ndim == 3:
        angles = angles[:, None]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.unflatten(-1, (ndim, 2, size // 2)).unbind(-2)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-2).flatten(-3)


class IntegralAttention(nn.Module):
    """Multi-head attention between functions on any points.

    Args:
        dim: Channels in and out.
        heads: Number of heads.
        kind: ``"softmax"``, or ``"linear"``, whose cost is linear in the points.
        head_dim: c; default dim / heads.
        norm: Of keys and values of the linear kind: ``"points"`` gives every channel mean 0 and
            variance 1 over the domain, with weighted moments; ``"channels"`` every point over its
            channels, as ``neuraloperator`` does; ``"none"``.
        generator: For the start: Xavier uniform with gain 1/√c, plus 1/√c on the diagonal where
            c = dim.

    Raises:
        TypeError, ValueError: dim not a multiple of heads without ``head_dim``; other settings out
            of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        kind: str = "softmax",
        *,
        head_dim: int | None = None,
        norm: str = "points",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads = sizes(dim, 1, "dim")[0], sizes(heads, 1, "heads")[0]
        self.kind, self.norm = chosen(kind, KINDS, "kind"), chosen(norm, NORMS, "norm")
        if head_dim is None and dim % heads:
            raise ValueError(
                f"dim must be a multiple of heads, got {dim} and {heads}; or pass head_dim"
            )
        self.head_dim = sizes(dim // heads if head_dim is None else head_dim, 1, "head_dim")[0]
        inner = heads * self.head_dim
        self.to_q, self.to_k, self.to_v = (
            nn.Parameter(torch.empty(inner, dim, device=device, dtype=dtype)) for _ in range(3)
        )
        self.to_out = nn.Parameter(torch.empty(dim, inner, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew."""
        gain = 1 / math.sqrt(self.head_dim)
        with torch.no_grad():
            for weight in (self.to_q, self.to_k, self.to_v):
                for head in weight.unflatten(0, (self.heads, self.head_dim)):
                    nn.init.xavier_uniform_(head, gain, generator=generator)
                    if self.head_dim == self.dim:
                        head.diagonal().add_(gain)
        bound = 1 / math.sqrt(self.heads * self.head_dim)
        nn.init.uniform_(self.to_out, -bound, bound, generator=generator)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        u: Shaped[Tensor, "batch dim *grid"],
        weights: Tensor | None = None,
        query: Shaped[Tensor, "rows inner *other"] | None = None,
        *,
        points: Float[Tensor, "*many N d"] | None = None,
        query_points: Float[Tensor, "*others M e"] | None = None,
    ) -> Shaped[Tensor, "batch dim *other"]:
        """Attention from the points of ``query`` to those of ``u``.

        Args:
            u: ``[batch, dim, *grid]`` or ``[batch, dim, N]``.
            weights: Quadrature weights of the points of u, ``[*grid]`` or ``[batch, *grid]``, also
                with the grid flattened; None for equal ones. On points that are not uniform
                attention without weights is an average by density, not an integral.
            query: ``[batch, dim, *other]``, another function that asks; default u.
            points: Coordinates ``[N, d]`` or ``[batch, N, d]`` of u, for a rotary embedding of keys
                and queries.
            query_points: The same of ``query``.

        Returns:
            ``[batch, dim, *other]``.

        Raises:
            TypeError, ValueError: Shapes that do not fit, NaN, weights that are not positive,
                coordinates of one function only.
        """
        check_field(u, self.dim, max(u.ndim - 2, 1), "u")
        asking = u if query is None else query
        check_field(asking, self.dim, max(asking.ndim - 2, 1), "query")
        if query_points is not None and (query is None or points is None):
            raise ValueError("query_points need query and points")
        if query is not None and points is not None and query_points is None:
            raise ValueError("query_points are missing: where is query, when u is at points?")
        w = None if weights is None else self._weights(weights, u)
        tokens, askers = u.flatten(2).mT, asking.flatten(2).mT
        q = self._split(askers, self.to_q)
        k, v = self._split(tokens, self.to_k), self._split(tokens, self.to_v)
        if self.kind == "linear" and self.norm != "none":
            k, v = self._normalized(k, w), self._normalized(v, w)
        if points is not None:
            there = points if query_points is None else query_points
            self._check_places(points, k, "points")
            self._check_places(there, q, "query_points")
            q, k = rotate(q, there), rotate(k, points)
        y = integral_attention(q, k, v, w, self.kind)
        y = nn.functional.linear(y.transpose(1, 2).flatten(2), self.to_out, self.bias)
        return y.mT.unflatten(2, asking.shape[2:])

    def _split(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """``[batch, heads, N, c]``."""
        heads = nn.functional.linear(tokens, weight).unflatten(-1, (self.heads, self.head_dim))
        return heads.transpose(1, 2)

    def _weights(self, weights: Tensor, u: Tensor) -> Tensor:
        """``[1 or batch, 1, N]``."""
        check_weights(weights)
        grid, count = tuple(u.shape[2:]), u[0, 0].numel()
        if tuple(weights.shape) in (grid, (count,)):
            return weights.reshape(1, 1, count)
        if tuple(weights.shape) in ((u.shape[0], *grid), (u.shape[0], count)):
            return weights.reshape(-1, 1, count)
        raise ValueError(
            f"weights must have one entry per point, {grid} or {(u.shape[0], *grid)}, got shape "
            f"{tuple(weights.shape)}"
        )

    def _normalized(self, x: Tensor, w: Tensor | None) -> Tensor:
        if self.norm == "channels":
            return nn.functional.layer_norm(x, (self.head_dim,))
        mean, var = weighted_moments(x, None if w is None else w[..., None], (-2,))
        return (x - mean) * torch.rsqrt(var + 1e-5)

    def _check_places(self, places: Tensor, x: Tensor, name: str) -> None:
        check_finite_values(places, name)
        if places.ndim not in (2, 3) or places.shape[-2] != x.shape[-2]:
            raise ValueError(
                f"{name} must be [N, d] or [batch, N, d] with N = {x.shape[-2]}, got shape "
                f"{tuple(places.shape)}"
            )

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return (
            f"{self.dim}, heads={self.heads}, kind={self.kind!r}, head_dim={self.head_dim}, "
            f"norm={self.norm!r}"
        )

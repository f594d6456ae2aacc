"""Graph neural operator: a learned kernel integrated over a ball around each query.

Source: sheet of arXiv 2506.10973, "GNO"; Li et al., arXiv 2003.03485.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stiefel.nn.operators.checks import (
    check_field,
    check_finite_values,
    check_weights,
    chosen,
    positive,
    sizes,
    values_known,
)
from stiefel.nn.operators.kernel_integral_neighbors import Neighbors, radius_neighbors
from stiefel.nn.operators.point_wise import Activation, PointwiseLinear, SinusoidalEmbedding

REDUCTIONS = ("mean", "sum")
KERNELS = ("diagonal", "full")
# Widths of the authors' kernel network.
MLP = (128, 256, 128)


class KernelIntegral(nn.Module):
    """y(x) = Σ_{|x − y_j| ≤ r} κ(γ(y_j), γ(x)[, v_j]) v_j w_j, at any points x, from any points y.

    κ is a perceptron of both places. Its first layer is linear in each, so that it is computed
    per point and only its sum per pair; the remaining layers run on the pairs, a bounded number of
    them at a time.

    Args:
        in_channels: C_in.
        out_channels: C_out. The diagonal kernel has one value per channel: a linear map of the
            channels follows where C_out ≠ C_in.
        radius: r.
        mlp: Hidden widths of κ.
        ndim: Coordinates of a point.
        kernel: ``"diagonal"``, or ``"full"``, a C_out × C_in matrix per pair.
        use_values: κ sees v_j as well; it is not linear in v then.
        embedding: γ, a module with ``features(ndim)``; None for the coordinates themselves.
        reduction: Of sums without weights: ``"mean"`` over the ball or ``"sum"``.
        period: Length of a periodic box, see :func:`radius_neighbors`.
        max_pairs: Pairs at a time.
        recompute: In training, hold no activations of κ: compute them again for gradients.
        generator: For the start.

    Raises:
        TypeError, ValueError: Settings out of range; the message says what is allowed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        radius: float | int,
        mlp: Sequence[int] = MLP,
        ndim: int = 1,
        *,
        kernel: str = "diagonal",
        use_values: bool = False,
        embedding: nn.Module | str | None = "sinusoidal",
        reduction: str = "mean",
        period: float | int | None = None,
        activation: Activation = nn.functional.gelu,
        max_pairs: int = 262_144,
        recompute: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = sizes(in_channels, 1, "in_channels")[0]
        self.out_channels = sizes(out_channels, 1, "out_channels")[0]
        self.radius, self.ndim = positive(radius, "radius"), sizes(ndim, 1, "ndim")[0]
        self.kernel, self.use_values = chosen(kernel, KERNELS, "kernel"), use_values
        self.reduction = chosen(reduction, REDUCTIONS, "reduction")
        self.period, self.activation = period, activation
        self.max_pairs, self.recompute = sizes(max_pairs, 1, "max_pairs")[0], recompute
        if isinstance(embedding, str):
            chosen(embedding, ("sinusoidal",), "embedding")
            embedding = SinusoidalEmbedding()
        self.embedding = embedding
        place: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        features: Any = getattr(embedding, "features", lambda n: n)
        values = in_channels if use_values else 0
        hidden = sizes(mlp, None, "mlp")
        ends = in_channels if kernel == "diagonal" else in_channels * out_channels
        widths = (2 * features(self.ndim) + values, *hidden, ends)
        self.layers: Any = nn.ModuleList(
            PointwiseLinear(a, b, **place) for a, b in pairwise(widths)
        )
        mixes = kernel == "diagonal" and in_channels != out_channels
        self.projection = PointwiseLinear(in_channels, out_channels, **place) if mixes else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew."""
        for layer in (*self.layers, *([self.projection] if self.projection else ())):
            layer.reset_parameters(generator)

    def forward(
        self,
        v: Shaped[Tensor, "batch channels N"],
        points: Float[Tensor, "*many P d"],
        queries: Float[Tensor, "*asked M e"] | None = None,
        weights: Float[Tensor, "*rows W"] | None = None,
        neighbors: Neighbors | None = None,
    ) -> Shaped[Tensor, "batch out M"]:
        """The integral at the queries, ``[batch, C_out, M]``.

        Args:
            v: Values at the points, ``[batch, C_in, N]``.
            points: y, ``[N, d]`` for the whole batch, or ``[batch, N, d]``.
            queries: x, ``[M, d]`` or ``[batch, M, d]``; default: the points.
            weights: Quadrature weights ``[N]`` or ``[batch, N]``. Without them the sum over a ball
                is ``reduction`` of the layer, which follows the density of the points.
            neighbors: From :func:`radius_neighbors`, to search once for several calls; for points
                ``[N, d]``.

        Raises:
            TypeError, ValueError: Shapes that do not fit, weights that are not positive, NaN.

        Warns:
            UserWarning: Queries without a neighbour; the result is 0 there.
        """
        check_field(v, self.in_channels, 1, "v")
        queries = points if queries is None else queries
        batch = v.shape[0]
        self._check_points(v, points, queries)
        if weights is not None:
            check_weights(weights)
            if tuple(weights.shape) not in ((v.shape[2],), (batch, v.shape[2])):
                raise ValueError(
                    f"weights must be [{v.shape[2]}] or [{batch}, {v.shape[2]}], got shape "
                    f"{tuple(weights.shape)}"
                )
        weighted = (
            v if weights is None else v * (weights if weights.ndim == 1 else weights[:, None])
        )
        if points.ndim == 2 and queries.ndim == 2:
            y = self._integrate(v, weighted, points, queries, weights is None, neighbors)
        else:
            if neighbors is not None:
                raise ValueError("neighbors are for points [N, d] that the whole batch shares")
            points, queries = (x.expand(batch, -1, -1) for x in (points, queries))
            parts = [
                self._integrate(
                    v[i, None], weighted[i, None], points[i], queries[i], weights is None
                )
                for i in range(batch)
            ]
            y = torch.cat(parts, dim=1)
        y = y.movedim(0, -1)
        return y if self.projection is None else self.projection(y)

    def _check_points(self, v: Tensor, points: Tensor, queries: Tensor) -> None:
        for x, name in ((points, "points"), (queries, "queries")):
            fits = x.ndim in (2, 3) and x.shape[-1] == self.ndim
            if not fits or (x.ndim == 3 and x.shape[0] != v.shape[0]):
                raise ValueError(
                    f"{name} must be [N, {self.ndim}] or [batch, N, {self.ndim}], got shape "
                    f"{tuple(x.shape)}; coordinates per point are ndim of the layer"
                )
            check_finite_values(x, name)
        if points.shape[-2] != v.shape[2]:
            raise ValueError(
                f"points must be as many as values in v, got shapes {tuple(points.shape)} and "
                f"{tuple(v.shape)}"
            )

    def _integrate(
        self,
        v: Tensor,
        weighted: Tensor,
        points: Tensor,
        queries: Tensor,
        unweighted: bool,
        neighbors: Neighbors | None = None,
    ) -> Tensor:
        """``[M, batch, channels]`` for points that the batch shares."""
        if neighbors is None:
            neighbors = radius_neighbors(points, queries, radius=self.radius, period=self.period)
        splits = neighbors.row_splits
        if len(splits) != len(queries) + 1:
            raise ValueError(
                f"neighbors must have one row per query, {len(queries)}, got {len(splits) - 1}"
            )
        counts = splits.diff()
        if values_known(counts) and bool((counts == 0).any()):
            warnings.warn(
                f"{int((counts == 0).sum())} of {len(counts)} queries have no point within radius "
                f"{self.radius}: the integral is 0 there",
                stacklevel=4,
            )
        at_points, at_queries = self._first_layer(v, points, queries)
        values = weighted.permute(2, 0, 1)
        parts = []
        for first, last in self._parts(splits):
            rows = counts[first:last]
            index = neighbors.index[splits[first] : splits[last]]
            inputs = (at_points, at_queries[first:last], values, index, rows)
            if self.recompute and torch.is_grad_enabled():
                parts.append(checkpoint(self._sums, *inputs, use_reentrant=False))
            else:
                parts.append(self._sums(*inputs))
        y = torch.cat(parts)
        if unweighted and self.reduction == "mean":
            y = y / counts.clamp(min=1)[:, None, None]
        return y

    def _first_layer(self, v: Tensor, points: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """W₁ of the point's part ``[N, (batch,) h]`` and of the query's with bias ``[M, 1, h]``."""
        layer = self.layers[0]
        places = [points, queries] if self.embedding is None else [
            self.embedding(points), self.embedding(queries)
        ]  # fmt: skip
        width = places[0].shape[-1]
        weight = layer.weight
        at_points = (places[0] @ weight[:, :width].mT)[:, None]
        if self.use_values:
            at_points = at_points + v.permute(2, 0, 1) @ weight[:, 2 * width :].mT
        return at_points, (places[1] @ weight[:, width : 2 * width].mT + layer.bias)[:, None]

    def _parts(self, splits: Tensor) -> list[tuple[int, int]]:
        """Ranges of queries with at most ``max_pairs`` pairs, or a single query."""
        ends, parts, first = splits.tolist(), [], 0
        for row in range(1, len(ends)):
            if ends[row] - ends[first] > self.max_pairs and row - 1 > first:
                parts.append((first, row - 1))
                first = row - 1
        return [*parts, (first, len(ends) - 1)]

    def _sums(
        self, at_points: Tensor, at_queries: Tensor, values: Tensor, index: Tensor, rows: Tensor
    ) -> Tensor:
        """Σ κ v over each row, ``[rows, batch, channels]``."""
        query = torch.arange(len(rows), device=rows.device).repeat_interleave(rows)
        hidden = at_points[index] + at_queries[query]
        for layer in self.layers[1:]:
            hidden = nn.functional.linear(self.activation(hidden), layer.weight, layer.bias)
        chosen_values = values[index]
        if self.kernel == "full":
            matrix = hidden.unflatten(-1, (self.out_channels, self.in_channels))
            terms = (matrix @ chosen_values[..., None])[..., 0]
        else:
            terms = hidden * chosen_values
        start = terms.new_zeros(len(rows), *terms.shape[1:])
        return start.index_add(0, query, terms)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return (
            f"{self.in_channels}, {self.out_channels}, radius={self.radius}, ndim={self.ndim}, "
            f"kernel={self.kernel!r}, use_values={self.use_values}, reduction={self.reduction!r}"
        )

"""Integral operators of finite rank: their branches are inner products, not raw samples.

Source: sheet of arXiv 2506.10973, recipe, "dense layer on the grid"; Lu et al., arXiv 1910.03193
(DeepONet).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.nn.operators.checks import check_field, check_finite_values, check_weights, sizes
from stiefel.nn.operators.point_wise import PointwiseMLP, SinusoidalEmbedding, grid_coordinates


class _Places(nn.Module):
    """Functions of the coordinates, ``[..., d] → [..., out]``: sines, cosines, a perceptron."""

    def __init__(self, ndim: int, hidden: Sequence[int], out: int, **place: Any) -> None:
        super().__init__()
        # Wave lengths from the box down: 1, 1/2, …, as functions on [0, 1] need them.
        self.embedding = SinusoidalEmbedding(4, longest=1 / 16, scale=2 * math.pi)
        features = self.embedding.features(ndim) + ndim
        self.mlp = PointwiseMLP((features, *hidden, out), **place)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.mlp.reset_parameters(generator)

    def forward(self, points: Tensor) -> Tensor:
        seen = torch.cat((points, self.embedding(points)), -1)
        flat = seen.reshape(1, -1, seen.shape[-1]).mT
        return self.mlp(flat)[0].mT.unflatten(0, points.shape[:-1])


def _sampled(
    u: Tensor, points: Tensor | None, weights: Tensor | None, channels: int, ndim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[batch, channels, N]``, places ``[(batch,) N, d]``, weights ``[(batch,) N]``."""
    if points is None:
        check_field(u, channels, ndim, "u")
        places = grid_coordinates(tuple(u.shape[2:]), dtype=u.dtype, device=u.device)
        places = places.flatten(1).mT
    else:
        check_field(u, channels, max(u.ndim - 2, 1), "u")
        check_finite_values(points, "points")
        places = points
    values = u.flatten(2)
    batch, _, count = values.shape
    if tuple(places.shape) not in ((count, ndim), (batch, count, ndim)):
        raise ValueError(
            f"points must be [{count}, {ndim}] or [{batch}, {count}, {ndim}], got shape "
            f"{tuple(places.shape)}"
        )
    if weights is None:
        return values, places, values.new_full((count,), 1 / count)
    check_weights(weights)
    one = weights.numel() == count or weights.ndim < 2
    flat = weights.flatten() if one else weights.flatten(1)
    if tuple(flat.shape) not in ((count,), (batch, count)):
        raise ValueError(
            f"weights must have one entry per point, [{count}] or [{batch}, {count}], got shape "
            f"{tuple(weights.shape)}"
        )
    return values, places, flat.to(values.dtype)


def _check_queries(queries: Tensor, batch: int, ndim: int) -> None:
    check_finite_values(queries, "queries")
    fits = queries.ndim in (2, 3) and queries.shape[-1] == ndim
    if not fits or (queries.ndim == 3 and queries.shape[0] != batch):
        raise ValueError(
            f"queries must be [M, {ndim}] or [{batch}, M, {ndim}], got shape {tuple(queries.shape)}"
        )


class LowRankIntegral(nn.Module):
    """y(x) = Σ_r φ_r(x) ∫ ψ_r(y)·v(y) dy: a kernel of rank R between any points.

    Linear in v. φ_r has one value per channel out, ψ_r one per channel in; both are perceptrons of
    the coordinates.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        rank: R.
        ndim: Coordinates of a point.
        hidden: Widths of the perceptrons.
        generator: For the start.

    Raises:
        TypeError, ValueError: Numbers that are not positive integers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int,
        ndim: int = 1,
        hidden: Sequence[int] = (64,),
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = sizes(in_channels, 1, "in_channels")[0]
        self.out_channels = sizes(out_channels, 1, "out_channels")[0]
        self.rank, self.ndim = sizes(rank, 1, "rank")[0], sizes(ndim, 1, "ndim")[0]
        place: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        self.inward = _Places(self.ndim, hidden, rank * in_channels, **place)
        self.outward = _Places(self.ndim, hidden, rank * out_channels, **place)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew."""
        self.inward.reset_parameters(generator)
        self.outward.reset_parameters(generator)

    def forward(
        self,
        v: Shaped[Tensor, "batch channels *grid"],
        points: Float[Tensor, "*many N d"] | None = None,
        queries: Float[Tensor, "*others M e"] | None = None,
        weights: Tensor | None = None,
    ) -> Shaped[Tensor, "batch out *other"]:
        """The operator on v, ``[batch, C_out, *grid]``, or ``[batch, C_out, M]`` at ``queries``.

        Args:
            v: ``[batch, C_in, *grid]``.
            points: Where v is sampled, ``[N, d]`` or ``[batch, N, d]``; default: the grid j/N.
            queries: Where the result is asked for, ``[M, d]`` or ``[batch, M, d]``.
            weights: Quadrature weights; default 1/N.

        Raises:
            TypeError, ValueError: Shapes that do not fit, NaN, weights that are not positive.
        """
        values, places, w = _sampled(v, points, weights, self.in_channels, self.ndim)
        psi = self.inward(places).unflatten(-1, (self.rank, self.in_channels))
        subscripts = "bcn,nrc->br" if psi.ndim == 3 else "bcn,bnrc->br"
        products = torch.einsum(subscripts, values * (w if w.ndim == 1 else w[:, None]), psi)
        asked = places if queries is None else queries
        _check_queries(asked, v.shape[0], self.ndim)
        phi = self.outward(asked).unflatten(-1, (self.rank, self.out_channels))
        y = torch.einsum("br,mrc->bcm" if phi.ndim == 3 else "br,bmrc->bcm", products, phi)
        return y.unflatten(2, v.shape[2:]) if queries is None else y

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"{self.in_channels}, {self.out_channels}, rank={self.rank}, ndim={self.ndim}"


class DeepONet(nn.Module):
    """y(x) = Σ_k b_k(u) t_k(x) + b₀, the branch fed by ⟨u, φ_m⟩ = Σ_j w_j φ_m(x_j) u(x_j).

    A branch on raw samples has its sensors built in; inner products with learned functions φ_m are
    those of the function, wherever it was sampled.

    Args:
        in_channels: Of u.
        out_channels: Of y.
        ndim: Coordinates of a point.
        sensors: Number of functions φ_m per channel in.
        basis: K, number of trunk functions t_k per channel out.
        hidden: Widths of the perceptrons: branch, trunk, φ.
        generator: For the start.

    Raises:
        TypeError, ValueError: Numbers that are not positive integers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ndim: int = 1,
        sensors: int = 32,
        basis: int = 64,
        hidden: Sequence[int] = (128, 128),
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = sizes(in_channels, 1, "in_channels")[0]
        self.out_channels = sizes(out_channels, 1, "out_channels")[0]
        self.ndim, self.sensors = sizes(ndim, 1, "ndim")[0], sizes(sensors, 1, "sensors")[0]
        self.basis = sizes(basis, 1, "basis")[0]
        place: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        terms = basis * out_channels
        self.sensing = _Places(self.ndim, hidden[:1], sensors, **place)
        self.branch = PointwiseMLP((sensors * in_channels, *hidden, terms), **place)
        self.trunk = _Places(self.ndim, hidden, terms, **place)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew; the bias starts at 0."""
        for part in (self.sensing, self.branch, self.trunk):
            part.reset_parameters(generator)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        u: Shaped[Tensor, "batch channels *grid"],
        points: Float[Tensor, "*many N d"] | None = None,
        queries: Float[Tensor, "*others M e"] | None = None,
        weights: Tensor | None = None,
    ) -> Shaped[Tensor, "batch out *other"]:
        """y, ``[batch, out_channels, *grid]``, or ``[batch, out_channels, M]`` at ``queries``.

        Arguments and errors as of :class:`LowRankIntegral`.
        """
        values, places, w = _sampled(u, points, weights, self.in_channels, self.ndim)
        phi = self.sensing(places)
        subscripts = "bcn,nm->bcm" if phi.ndim == 2 else "bcn,bnm->bcm"
        seen = torch.einsum(subscripts, values * (w if w.ndim == 1 else w[:, None]), phi)
        branch = self.branch(seen.flatten(1)[..., None])[..., 0]
        branch = branch.unflatten(1, (self.out_channels, self.basis))
        asked = places if queries is None else queries
        _check_queries(asked, u.shape[0], self.ndim)
        trunk = self.trunk(asked).unflatten(-1, (self.out_channels, self.basis))
        subscripts = "bck,mck->bcm" if trunk.ndim == 3 else "bck,bmck->bcm"
        y = torch.einsum(subscripts, branch, trunk) / math.sqrt(self.basis) + self.bias[:, None]
        return y.unflatten(2, u.shape[2:]) if queries is None else y

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return (
            f"{self.in_channels}, {self.out_channels}, ndim={self.ndim}, sensors={self.sensors}, "
            f"basis={self.basis}"
        )

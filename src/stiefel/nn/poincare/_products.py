"""The products of a Poincaré layer: its matrix with every vector or patch, and squared lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

# Kernel, stride, padding, dilation of a convolution; None for a linear layer.
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]


def products(
    u: Float[Tensor, "*shape"], matrix: Float[Tensor, "outputs rows"], geometry: Geometry | None
) -> tuple[Float[Tensor, "batch outputs points"], Float[Tensor, "batch 1 points"]]:
    """``matrix`` times the rows of u, or times the patches of images u; their squared lengths.

    Points come last: what follows has numbers per point and per channel, and sums over channels,
    all of which run along the last dimension in memory.
    """
    if geometry is None:
        square = torch.linalg.vector_norm(u, dim=1).square_()
        return (matrix @ u.mT)[None], square[None, None]
    k, s, p, g = geometry
    d = conv2d(u, matrix.reshape(len(matrix), u.shape[1], *k), None, s, p, g)
    square = patch_sums((u * u).sum(1, keepdim=True), geometry)
    return d.flatten(2), square.flatten(2)


def products_plain(u: Tensor, matrix: Tensor, geometry: Geometry | None) -> tuple[Tensor, Tensor]:
    """The same, differentiable: lengths have no second derivative at 0."""
    if geometry is None:
        return (matrix @ u.mT)[None], u.square().sum(1)[None, None]
    return products(u, matrix, geometry)


def products_backward(
    by_d: Tensor,
    by_square: Tensor,
    u: Tensor,
    matrix: Tensor,
    geometry: Geometry | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of u and the matrix; ``by_square`` is twice that of the squared lengths."""
    if geometry is None:
        du = (u * by_square[0].mT).addmm_(by_d[0].mT, matrix) if wanted[0] else None
        return du, by_d[0] @ u if wanted[1] else None
    k, s, p, g = geometry
    kernel = matrix.reshape(len(matrix), u.shape[1], *k)
    size = patch_counts(u.shape[2:], geometry)
    du, dm, _ = torch.ops.aten.convolution_backward(
        by_d.unflatten(2, size), u, kernel, None, s, p, g, False, [0, 0], 1, [*wanted, False]
    )
    if du is not None:
        du.addcmul_(u, _patch_sums_backward(by_square.unflatten(2, size), u[:, :1], geometry))
    return du, dm if dm is None else dm.reshape(matrix.shape)


def patch_counts(sides: Sequence[int], geometry: Geometry) -> list[int]:
    """How many patches there are along both sides of an image."""
    return [
        (n + 2 * p - g * (k - 1) - 1) // s + 1
        for n, k, s, p, g in zip(sides, *geometry, strict=True)
    ]


def patch_sums(x: Float[Tensor, "batch 1 height width"], geometry: Geometry) -> Tensor:
    """Sums over patches of numbers ≥ 0, ``[batch, 1, H′, W′]``."""
    k, s, p, g = geometry
    if k == (1, 1) and p == (0, 0):
        return x[:, :, :: s[0], :: s[1]]
    if _pools(geometry):
        return avg_pool2d(x, k, s, p, divisor_override=1)
    # A convolution by FFT or Winograd may give -1e-9.
    return conv2d(x, x.new_ones(1, 1, *k), None, s, p, g).clamp_min(0)


def _patch_sums_backward(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The sum over the patches that a pixel is in; of x only the shape counts."""
    k, s, p, g = geometry
    if k == s == (1, 1) and p == (0, 0):
        return grad
    if _pools(geometry):
        back = torch.ops.aten.avg_pool2d_backward
        return back(grad, x, k, s, p, False, True, 1)
    ones = x.new_ones(1, 1, *k)
    back, mask = torch.ops.aten.convolution_backward, [True, False, False]
    return back(grad, x, ones, None, s, p, g, False, [0, 0], 1, mask)[0]


def _pools(geometry: Geometry) -> bool:
    """Whether torch's pooling takes such patches."""
    k, _, p, g = geometry
    return g == (1, 1) and all(2 * q <= n for q, n in zip(p, k, strict=True))

"""A Poincaré layer but for its matrix product: its weights before it, what follows after it."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.nn.poincare._args import through_plain
from stiefel.nn.poincare._radial import (
    ASINHC,
    cosh_limited,
    lift,
    lift_slopes,
    sinhc_limited,
    slope,
    value,
)
from stiefel.nn.poincare.functions import dot

# Distances (times √c) beyond which points count as that far: their sinh can still be squared and
# summed over channels. Float32 overflows at 44; the sheet's 80 bounds the sinh alone.
LIMIT = {torch.float32: 41.0, torch.float64: 340.0}
# Columns shorter than this count as 0.
_SHORTEST = 1e-15


class _Weights(torch.autograd.Function):
    """What a layer needs of Z and its bias: the matrix of the product, |z_k| and −sinh(beta_k).

    The matrix is root f cosh(beta_k) z_k/|z_k|, 0 for z_k = 0; root = 2√c, beta_k = root r_k, f a
    factor on the inputs.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor | None, root: Tensor, factor: float | int) -> Any:
        length = dot(z, z, 0).sqrt_()
        direction = z / length.clamp_min(_SHORTEST)
        size, sinh = root * factor, None
        if bias is not None:
            beta = (root * bias).clamp_(-LIMIT[z.dtype], LIMIT[z.dtype])
            size, sinh = size * beta.cosh(), beta.sinh().neg_()
        ctx.save_for_backward(z, bias, root, direction, length)
        ctx.factor = factor
        return direction * size, length[0], sinh

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z, bias, root, direction, length = ctx.saved_tensors
        factor = ctx.factor
        if torch.is_grad_enabled():
            return *through_plain(_weights_plain, (z, bias, root), grads, factor), None
        by_matrix, by_length, by_sinh = grads
        scale = root * factor
        inverse = 1 / length.clamp_min(_SHORTEST)
        by_cosh = dot(by_matrix, direction, 0)[0] * scale
        size, dbias, by_beta = scale, None, None
        if bias is not None:
            beta = (root * bias).clamp_(-LIMIT[z.dtype], LIMIT[z.dtype])
            cosh = beta.cosh()
            by_beta = by_cosh * beta.sinh() - by_sinh * cosh
            dbias, size, by_cosh = root * by_beta, scale * cosh, by_cosh * cosh
        along = by_length - by_cosh * inverse
        dz = torch.addcmul(by_matrix * (size * inverse), along, direction)
        droot = None
        if ctx.needs_input_grad[2]:
            droot = by_cosh.sum() / root
            droot = droot if by_beta is None else droot + (by_beta * bias).sum()
        return dz, dbias, droot, None


def _weights_plain(z: Tensor, bias: Tensor | None, root: Tensor, factor: float | int) -> Any:
    square = z.square().sum(0)
    # A norm has no second derivative at 0; nothing flows into columns there.
    filled = square > 0
    length = torch.where(filled, torch.where(filled, square, 1.0).sqrt(), 0.0)
    size, sinh = root * factor, None
    if bias is not None:
        beta = _held(root * bias, LIMIT[z.dtype])
        size, sinh = size * beta.cosh(), -beta.sinh()
    return z / length.clamp_min(_SHORTEST) * size, length, sinh


def layer_weights(
    z: Float[Tensor, "inputs outputs"],
    bias: Float[Tensor, " outputs"] | None,
    root: Float[Tensor, ""],
    factor: float | int,
) -> tuple[
    Float[Tensor, "inputs outputs"], Float[Tensor, " outputs"], Float[Tensor, " outputs"] | None
]:
    """Matrix of the product, lengths of the columns of Z, and −sinh(beta); see ``_Weights``."""
    if torch.compiler.is_compiling():
        return _weights_plain(z, bias, root, factor)
    return _Weights.apply(z, bias, root, factor)  # pyrefly: ignore


class _FullyConnected(torch.autograd.Function):
    """Sheet, "Fused tangent form", from the products on.

    d = root f cosh(beta_k) <u, z_k/|z_k|> and s = |u|²; t = root f √s:

        alpha = sinh(t)/t d − cosh(t) sinh(beta)
        q = sinh(2|z_k| asinh(alpha)),   out = asinh(|q|) q/(root |q|)

    Between the passes d, asinh(alpha) and what has no channels are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        d: Tensor,
        s: Tensor,
        sinh: Tensor | None,
        length: Tensor,
        root: Tensor,
        factor: float | int,
        dim: int,
    ) -> Tensor:
        limit, scale = LIMIT[d.dtype], root * factor
        sinhc, cosh = lift(s * (scale * scale), limit)
        most = math.sinh(limit)
        w = _asinh_(_alpha(d, sinhc, cosh, sinh, dim).clamp_(-most, most))
        q = (w * _spread(2 * length, d, dim)).clamp_(-limit, limit).sinh_()
        square = dot(q, q, dim)
        shrink = value(ASINHC, square)
        ctx.save_for_backward(d, s, sinh, length, root, w, sinhc, cosh, square, shrink)
        ctx.factor, ctx.dim = factor, dim
        return q.mul_(shrink / root)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d, s, sinh, length, root, w, sinhc, cosh, square, shrink = ctx.saved_tensors
        (g,), dim, factor = grads, ctx.dim, ctx.factor
        if torch.is_grad_enabled():
            found = through_plain(_plain, (d, s, sinh, length, root), grads, factor, dim)
            return *found, None, None
        limit, scale = LIMIT[d.dtype], root * factor
        zeta = _spread(2 * length, d, dim)
        up = (w * zeta).clamp_(-limit, limit).exp_()
        down = up.reciprocal()
        q = (up - down).mul_(0.5)
        along = dot(g, q, dim)
        # From out to q, then to the exponent, of which cosh is the derivative.
        by_q = (2 / root) * slope(ASINHC, square, shrink) * along
        gw = (g * (shrink / root)).addcmul_(by_q, q).mul_(up.add_(down).mul_(0.5))
        dlength = 2 * _over_points(torch.mul(gw, w, out=q), dim)
        # Beyond the limit the slope of asinh falls on, to 0 where the square overflows.
        alpha = _alpha(d, sinhc, cosh, sinh, dim)
        galpha = gw.mul_(zeta).mul_(alpha.square_().add_(1).rsqrt_())
        by_sinhc = torch.mul(galpha, d, out=q).sum(dim, keepdim=True)
        x = s * (scale * scale)
        sinhc_slope, cosh_slope = lift_slopes(x, sinhc, cosh, limit)
        dx, dsinh = by_sinhc * sinhc_slope, None
        if sinh is not None:
            by_cosh = torch.mul(galpha, _spread(sinh, d, dim), out=q).sum(dim, keepdim=True)
            dx = dx + by_cosh * cosh_slope
            dsinh = _over_points(torch.mul(galpha, cosh, out=q), dim)
        droot = None
        if ctx.needs_input_grad[4]:
            droot = (2 * dx * x - along * shrink / root).sum() / root
        return galpha.mul_(sinhc), dx * (scale * scale), dsinh, dlength, droot, None, None


def _spread(x: Tensor, like: Tensor, dim: int) -> Tensor:
    """Numbers per channel, along ``dim`` of ``like``."""
    return x.reshape(*(-1 if i == dim % like.ndim else 1 for i in range(like.ndim)))


def _over_points(x: Tensor, dim: int) -> Tensor:
    """Sums over everything but the channels."""
    return x.sum([i for i in range(x.ndim) if i != dim % x.ndim])


def _asinh_(alpha: Tensor) -> Tensor:
    """sign(α) log1p(|α| + α²/(1 + √(1 + α²))), all vectorised: torch's own takes 10 × as long."""
    size = alpha.abs()
    square = size * size
    size.add_(square.div_(square.add(1).sqrt_().add_(1))).log1p_()
    return size.copysign_(alpha)


def _alpha(d: Tensor, sinhc: Tensor, cosh: Tensor, sinh: Tensor | None, dim: int) -> Tensor:
    alpha = d * sinhc
    return alpha if sinh is None else alpha.addcmul_(cosh, _spread(sinh, d, dim))


def _held(x: Tensor, limit: float) -> Tensor:
    """Clamped, with gradients that go on: what is too far can come back."""
    return x.detach().clamp(-limit, limit) + (x - x.detach())


def _plain(
    d: Tensor,
    s: Tensor,
    sinh: Tensor | None,
    length: Tensor,
    root: Tensor,
    factor: float | int,
    dim: int,
) -> Tensor:
    limit = LIMIT[d.dtype]
    x = s * (root * factor).square()
    alpha = sinhc_limited(x, limit) * d
    if sinh is not None:
        alpha = alpha + cosh_limited(x, limit) * _spread(sinh, d, dim)
    w = torch.asinh(alpha).clamp(-limit, limit)
    q = torch.sinh(_held(w * _spread(2 * length, d, dim), limit))
    return value(ASINHC, dot(q, q, dim)) / root * q


def fully_connected(
    d: Float[Tensor, "*shape"],
    s: Float[Tensor, "*point"],
    sinh: Float[Tensor, " outputs"] | None,
    length: Float[Tensor, " outputs"],
    root: Float[Tensor, ""],
    factor: float | int,
    dim: int,
) -> Float[Tensor, "*shape"]:
    """The layer's output from its products; ``dim`` holds the channels, where s has size 1."""
    if torch.compiler.is_compiling():
        return _plain(d, s, sinh, length, root, factor, dim)
    return _FullyConnected.apply(d, s, sinh, length, root, factor, dim)  # pyrefly: ignore

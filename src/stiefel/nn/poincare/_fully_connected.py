"""A Poincaré layer, linear or convolution, as one function with one backward pass.

A layer of small size spends its time in the dispatch of operations, one of large size in passes
over memory. So all is one ``torch.autograd.Function``, and it works in place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.nn.poincare._args import BOUNDARY, exactly, number, through_plain
from stiefel.nn.poincare._products import (
    Geometry,
    patch_counts,
    products,
    products_backward,
    products_plain,
)
from stiefel.nn.poincare._radial import (
    ASINHC,
    asinh,
    asinhc,
    cosh_limited,
    lift,
    lift_slopes,
    radial_slope,
    sinhc_limited,
    value,
)
from stiefel.nn.poincare.functions import dot

# Distances (times √c) beyond which points count as that far: their sinh can still be squared and
# summed over channels. Float32 overflows at 44; the sheet's 80 bounds the sinh alone.
LIMIT = {torch.float32: 41.0, torch.float64: 340.0}
# Columns shorter than this count as 0.
_SHORTEST = 1e-15


def ends(dtype: torch.dtype, clip: str | None) -> tuple[float, float]:
    """2√c|u| beyond which inputs, and outputs, count as that long."""
    if clip is None:
        return LIMIT[dtype], math.inf
    end = 2 * math.atanh(1 - BOUNDARY[dtype])
    return end, end


class _Layer(torch.autograd.Function):
    """Sheet, "Fused tangent form". root = 2√c, f the factor on inputs, beta_k = root r_k.

        d = root f cosh(beta_k) <u, z_k/|z_k|>,   t = root f |u|
        alpha = sinh(t)/t d − cosh(t) sinh(beta_k)
        q = sinh(2|z_k| asinh(alpha)),   out = asinh(|q|) q/(root |q|)

    u is ``[points, inputs]``, or images of which every patch counts as one vector. Between the
    passes u, alpha, asinh(alpha), of images also q, and what has no channels are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        z: Tensor,
        bias: Tensor | None,
        c: Tensor,
        factor: float | int,
        geometry: Geometry | None,
        clip: str | None,
    ) -> Tensor:
        root, limit = 2 * number(c) ** 0.5, LIMIT[u.dtype]
        far, long = ends(u.dtype, clip)
        scale = root * factor
        matrix, length, size, sinh, cosh_bias = _weights(z, bias, root, scale)
        d, s = products(u, matrix, geometry)
        x = s.mul_(scale * scale)
        sinhc, cosh = lift(x, far)
        most = math.sinh(limit)
        alpha = d.mul_(sinhc)
        if sinh is not None:
            alpha.addcmul_(cosh, sinh)
        w = asinh(alpha.clamp(-most, most))
        power = 2 * length
        q = (w * power).clamp_(-limit, limit).sinh_()
        square = dot(q, q, 1)
        shrink = asinhc(square, long)
        ctx.save_for_backward(
            u, z, bias, c, alpha, w, None if geometry is None else q, matrix, power, size, sinh,
            cosh_bias, x, sinhc, cosh, square, shrink,
        )  # fmt: skip
        ctx.settings = factor, geometry, clip
        # The output must not be a view: it may be changed in place.
        if geometry is None:
            out = q.new_empty(*q.shape[:0:-1])
            torch.mul(q[0], shrink[0] / root, out=out.mT)
        else:
            out = q.new_empty(*q.shape[:2], *patch_counts(u.shape[2:], geometry))
            torch.mul(q, shrink / root, out=out.flatten(2))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (
            u, z, bias, c, alpha, w, q, matrix, power, size, sinh, cosh_bias, x, sinhc, cosh,
            square, shrink,
        ) = ctx.saved_tensors  # fmt: skip
        (factor, geometry, clip), (g,), wanted = ctx.settings, grads, ctx.needs_input_grad
        if torch.is_grad_enabled():
            found = through_plain(_plain, (u, z, bias, c), grads, factor, geometry, clip)
            return *found, None, None, None
        root, limit = 2 * number(c) ** 0.5, LIMIT[u.dtype]
        far, long = ends(u.dtype, clip)
        scale = root * factor
        with exactly(u):
            n = 1 if q is not None else 2  # q and its slope may come doubled
            if q is None:
                g = g.mT.contiguous()[None]
                up = (w * power).clamp_(-limit, limit).exp_()
                spare = up.reciprocal()
                q, slope = up - spare, up.add_(spare)
                double = torch.mul(g, q, out=spare)
            else:
                g = g.flatten(2)
                double, slope = g * q, (q * q).add_(1).sqrt_()
            along = double.sum(1, keepdim=True)
            part = radial_slope(square, shrink, long).mul_(along).mul_(1 / n**2)
            # The gradient of 2|z_k| asinh(alpha), of which cosh is the slope towards q.
            gw = torch.mul(g, shrink, out=double).addcmul_(part, q)
            gw.mul_(slope.mul_(1 / (n * root)))
            by_length = torch.mul(gw, w, out=slope).sum((0, 2))
            # Beyond the limit the slope of asinh falls on, to 0 where the square overflows.
            inverse = torch.mul(alpha, alpha, out=slope).add_(1).rsqrt_()
            galpha = gw.mul_(power).mul_(inverse)
            # alpha = sinhc d + cosh sinh: what d is to sinhc follows from what alpha is to all.
            dx = torch.mul(galpha, alpha, out=slope).sum(1, keepdim=True).div_(sinhc)
            sinhc_slope, cosh_slope = lift_slopes(x, sinhc, cosh, far)
            dx, by_sinh = dx.mul_(sinhc_slope), None
            if sinh is not None:
                cosh_slope.sub_(cosh / sinhc * sinhc_slope)
                dx.addcmul_(torch.matmul(sinh.mT, galpha), cosh_slope)
                by_sinh = torch.mul(galpha, cosh, out=slope).sum((0, 2))
            gd = galpha.mul_(sinhc)
            of_u = wanted[0], any(wanted[1:4])
            du, dm = products_backward(gd, dx.mul_(scale * scale), u, matrix, geometry, of_u)
            if dm is None:
                return du, None, None, None, None, None, None
            dz, dbias, by_log = _weights_backward(
                dm, by_length, by_sinh, matrix, size, sinh, cosh_bias, root, scale
            )
            dc = None
            if wanted[3]:
                droot = (
                    dx * x / (scale * scale) - along * shrink / (n * root)
                ).sum() + by_log.sum()
                if bias is not None:
                    droot = droot + (dbias * bias).sum()
                dc = droot * (2 / (root * root))
        return du, dz, dbias, dc, None, None, None


def _weights(
    z: Tensor, bias: Tensor | None, root: Any, scale: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Matrix of the product, 0 where z_k = 0; |z_k|; their ratio; −sinh and cosh of beta_k."""
    rows = z.mT.contiguous()
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    size = scale / length.clamp_min(_SHORTEST)
    if bias is None:
        return rows * size, length, size, None, None
    beta = (bias[:, None] * -root).clamp_(-LIMIT[z.dtype], LIMIT[z.dtype])
    sinh, cosh = beta.sinh(), beta.cosh_()
    size.mul_(cosh)
    return rows * size, length, size, sinh, cosh


def _weights_backward(
    by_matrix: Tensor,
    by_length: Tensor,
    by_sinh: Tensor | None,
    matrix: Tensor,
    size: Tensor,
    sinh: Tensor | None,
    cosh: Tensor | None,
    root: Any,
    scale: Any,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of Z and bias, and of log root by the matrix; ``by_length`` is half of |z_k|'s."""
    by_log, dbias = dot(by_matrix, matrix, 1), None
    whole = scale if cosh is None else scale * cosh
    if sinh is not None and cosh is not None and by_sinh is not None:
        dbias = (by_log * (sinh / cosh)).addcmul_(by_sinh[:, None], cosh).mul_(-root)[:, 0]
    # z_k/|z_k| is the matrix over ``whole``; along it goes what its length does.
    along = (2 * by_length[:, None] - by_log * (size / whole)) / whole
    return (by_matrix * size).addcmul_(matrix, along).mT, dbias, by_log


def _held(x: Tensor, limit: float) -> Tensor:
    """Clamped, with gradients that go on: what is too far can come back."""
    return x.detach().clamp(-limit, limit) + (x - x.detach())


def _plain(
    u: Tensor,
    z: Tensor,
    bias: Tensor | None,
    c: Tensor,
    factor: float | int,
    geometry: Geometry | None,
    clip: str | None,
) -> Tensor:
    root, limit = 2 * c.sqrt(), LIMIT[u.dtype]
    far, long = ends(u.dtype, clip)
    square = z.square().sum(0)
    # A norm has no second derivative at 0; nothing flows into columns there.
    filled = square > 0
    length = torch.where(filled, torch.where(filled, square, 1.0).sqrt(), 0.0)
    size = root * factor / length.clamp_min(_SHORTEST)
    beta = None if bias is None else _held(root * bias, limit)
    if beta is not None:
        size = size * beta.cosh()
    d, s = products_plain(u, (z * size).mT, geometry)
    x = s * (root * factor).square()
    alpha = sinhc_limited(x, far) * d
    if beta is not None:
        alpha = alpha - cosh_limited(x, far) * beta.sinh()[:, None]
    w = torch.asinh(alpha).clamp(-limit, limit)
    q = torch.sinh(_held(w * (2 * length)[:, None], limit))
    square = dot(q, q, 1)
    shrink = value(ASINHC, square)
    if long < math.inf:
        inside = square < math.sinh(long) ** 2
        shrink = torch.where(inside, shrink, long * torch.rsqrt(torch.where(inside, 1.0, square)))
    out = shrink / root * q
    if geometry is None:
        return out[0].mT
    return out.unflatten(2, patch_counts(u.shape[2:], geometry))


def layer(
    u: Float[Tensor, "*shape"],
    z: Float[Tensor, "rows outputs"],
    bias: Float[Tensor, " outputs"] | None,
    c: Float[Tensor, ""],
    factor: float | int,
    geometry: Geometry | None,
    clip: str | None,
) -> Float[Tensor, "*shape_"]:
    """Of ``[points, inputs]``: ``[points, outputs]``; of images: ``[batch, outputs, H′, W′]``."""
    if torch.compiler.is_compiling():
        return _plain(u, z, bias, c, factor, geometry, clip)
    return _Layer.apply(u, z, bias, c, factor, geometry, clip)  # pyrefly: ignore

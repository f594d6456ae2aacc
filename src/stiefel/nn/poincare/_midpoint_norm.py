"""Batch norm by the midpoint, from the batch's points to the normalised ones, as one function.

On the hyperboloid a point is (X, X₀) with X = sinh(t) u/|u|, X₀ = cosh(t), t = 2√c|u|, and what the
ball does by ⊕ and gyrations are linear maps: a boost takes the mean (M, M₀) to the origin, and
parallel transport from the mean to beta, seen from the origin, is the matrix D of ``_transport``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.nn.poincare._args import exactly, number, through_plain
from stiefel.nn.poincare._radial import (
    ARTANHC,
    ASINHC,
    asinhc,
    cosh_limited,
    lift,
    lift_slopes,
    radial_slope,
    sinhc_limited,
    value,
)
from stiefel.nn.poincare.functions import TRANSLATION_LIMIT, dot

# Below this the learned variance counts as this.
LEAST = 1e-12


class _MidpointNorm(torch.autograd.Function):
    """With root = 2√c and points (X, X₀):

        m = ΣX/ΣX₀,   M₀ = 1/√(1 − |m|²),   M = M₀ m
        y = X + (<M, X>/(1 + M₀) − X₀) M,   rho = asinh|y|,   s = mean rho²/c
        Y = cosh(k rho) beta + sinh(k rho) D y/|y|,   k = √(g/(s + eps))
        out = asinh(|Y|) Y/(root |Y|)

    Gives out, the tangent vector of the mean, and s; gradients go through the first alone. Between
    the passes u, y, D y and what has no channels are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, g: Tensor, bias: Tensor, c: Tensor, eps: float | int
    ) -> tuple[Tensor, Tensor, Tensor]:
        root, limit = 2 * number(c) ** 0.5, TRANSLATION_LIMIT[u.dtype]
        x = dot(u, u, 1).mul_(root * root)
        sinhc, time = lift(x, limit)
        sinhc.mul_(root)
        y = u * sinhc
        weight = time.sum()
        m = (y.sum((0, 2)) / weight)[:, None]
        square = dot(m, m, 0)
        start = _room(square).rsqrt_()  # M₀
        mean = m * start
        along = torch.matmul(mean.mT, y)
        shift = (along / (1 + start)).sub_(time)
        y.addcmul_(shift, mean)
        yy = dot(y, y, 1)
        h = asinhc(yy, math.inf)
        rho = yy * h * h
        variance = rho.mean() / number(c)
        size = (g.clamp_min(LEAST) / (variance + eps)).sqrt_()
        beta_x = root * root * bias.dot(bias)
        beta_sinhc, beta_time = lift(beta_x, limit)
        beta = (bias * (root * beta_sinhc))[:, None]
        moved = torch.matmul(_transport(mean, start, beta, beta_time), y)
        ratio, cosh = lift(rho * size.square(), limit)
        stretch = h * size * ratio
        out = (moved * stretch).addcmul_(cosh, beta)
        outer = dot(out, out, 1)
        shrink = asinhc(outer, math.inf)
        out.mul_(shrink / root)
        tangent = m * (value(ARTANHC, square) / root)
        ctx.save_for_backward(
            u, g, bias, c, y, moved, x, sinhc, time, weight, m, start, along, shift, yy, h, rho,
            variance, size, beta, beta_x, beta_time, ratio, cosh, stretch, outer, shrink,
        )  # fmt: skip
        ctx.eps = eps
        ctx.mark_non_differentiable(tangent, variance)
        return out, tangent, variance

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (
            u, gain, bias, c, y, moved, x, sinhc, time, weight, m, start, along, shift, yy, h, rho,
            variance, size, beta, beta_x, beta_time, ratio, cosh, stretch, outer, shrink,
        ) = ctx.saved_tensors  # fmt: skip
        if torch.is_grad_enabled():
            found = through_plain(_plain_output, (u, gain, bias, c), grads[:1], ctx.eps)
            return *found, None
        root, limit = 2 * number(c) ** 0.5, TRANSLATION_LIMIT[u.dtype]
        with exactly(u):
            # From out to Y.
            g, mean = grads[0], m * start
            work = g * moved
            along_out = (work.sum(1, keepdim=True) * stretch).addcmul_(
                torch.matmul(beta.mT, g), cosh
            )
            part = radial_slope(outer, shrink, math.inf).mul_(along_out).mul_(1 / root)
            gy = torch.mul(g, shrink / root).addcmul_(part * stretch, moved)
            gy.addcmul_(part * cosh, beta)
            # From Y to D y, rho, k and beta.
            by_stretch = torch.mul(gy, moved, out=work).sum(1, keepdim=True)
            by_cosh = torch.matmul(beta.mT, gy)
            by_beta = _over_points(gy, cosh)
            gy.mul_(stretch)
            by_d = torch.matmul(gy, y.mT).sum(0)
            gy = torch.matmul(_transport(mean, start, beta, beta_time).mT, gy)
            square = rho * size.square()
            ratio_slope, cosh_slope = lift_slopes(square, ratio, cosh, limit)
            by_h = by_stretch * size * ratio
            by_square = (by_stretch * h * size).mul_(ratio_slope).addcmul_(by_cosh, cosh_slope)
            by_size = (by_stretch * h * ratio).sum() + size * (by_square * rho).sum()
            by_variance = by_size * size / (-2 * (variance + ctx.eps))
            by_rho = (0.5 * size.square()) * by_square + by_variance / (number(c) * rho.numel())
            by_h.addcmul_(by_rho, yy * h, value=2)
            by_yy = (by_rho * h * h).mul_(2).addcmul_(by_h, radial_slope(yy, h, math.inf))
            gy.addcmul_(by_yy, y)
            # From y to the points and their mean, which is M.
            by_shift = torch.matmul(mean.mT, gy)
            inverse = 1 / (1 + start)
            by_mean = _over_points(gy, shift) + inverse * _over_points(u, by_shift * sinhc)
            by_start = -inverse * inverse * (by_shift * along).sum()
            extra = _transport_backward(by_d, mean, start, beta, beta_time)
            by_mean, by_start = by_mean + extra[0], by_start + extra[1]
            by_start = by_start + dot(by_mean, m, 0)
            by_m = by_mean * start + m * (by_start * start**3)
            by_sum = by_m / weight
            gy.addcmul_(by_shift * inverse, mean).add_(by_sum)
            by_time = -by_shift - dot(by_sum, m, 0)
            by_x = torch.mul(gy, u, out=work).sum(1, keepdim=True)
            sinhc_slope, time_slope = lift_slopes(x, sinhc / root, time, limit)
            by_x = (by_x.mul_(sinhc_slope).mul_(root)).addcmul_(by_time, time_slope)
            du = gy.mul_(sinhc).addcmul_(by_x.mul_(root * root), u)
            # From beta on the hyperboloid to the bias.
            by_beta, by_beta_time = by_beta + extra[2], extra[3]
            beta_sinhc = lift(beta_x, limit)[0]
            slopes = lift_slopes(beta_x, beta_sinhc, beta_time, limit)
            inner = (by_beta[:, 0] * bias).sum() * root * slopes[0] + by_beta_time * slopes[1]
            inner = (inner * (root * root)).reshape(())
            dbias = by_beta[:, 0] * (root * beta_sinhc) + inner * bias
            dgain = torch.where(gain > LEAST, by_size * size / (2 * gain), 0.0)
            dc = None
            if ctx.needs_input_grad[3]:
                log_root = (du * u).sum() + (dbias * bias).sum()
                log_root = log_root - (along_out * shrink).sum() / root
                dc = 2 * log_root / (root * root) - by_variance * variance / number(c)
        return du, dgain, dbias, dc, None


def _room(square: Tensor) -> Tensor:
    """1 − |m|², at least what points of this precision can have."""
    return (1 - square).clamp_min(2 * torch.finfo(square.dtype).eps)


def _over_points(x: Tensor, factor: Tensor) -> Tensor:
    """Σ factor x over all points, ``[channels, 1]``."""
    return torch.matmul(x, factor.mT).sum(0)


def _transport(mean: Tensor, start: Tensor, beta: Tensor, end: Tensor) -> Tensor:
    """D: tangent vectors at the origin boosted to the mean, carried to beta, spatial part.

    Carrying adds <beta, v>/(1 − <M, beta>) (M + beta) in Lorentz products. For beta = 0 it is I.
    """
    s = dot(mean, beta, 0)
    whole = start * end - s + 1
    first = torch.addcmul(beta, mean, (1 - end) / (1 + start))
    second = torch.addcmul(beta, mean, s / (1 + start) - end)
    d = (mean @ first.mT + beta @ second.mT).div_(whole)
    d.diagonal().add_(1)
    return d


def _transport_backward(
    by_d: Tensor, mean: Tensor, start: Tensor, beta: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the mean, its time, beta and its time."""
    s = dot(mean, beta, 0)
    inverse, above = 1 / (start * end - s + 1), 1 / (1 + start)
    p, q = (1 - end) * above, s * above - end
    first, second = torch.addcmul(beta, mean, p), torch.addcmul(beta, mean, q)
    by_d = by_d * inverse
    by_first, by_second = by_d.mT @ mean, by_d.mT @ beta
    by_mean, by_beta = by_d @ first, by_d @ second
    by_whole = -inverse * (dot(by_mean, mean, 0) + dot(by_beta, beta, 0))
    by_p, by_q = dot(by_first, mean, 0), dot(by_second, mean, 0)
    by_s = by_q * above - by_whole
    by_mean = by_mean + by_first * p + by_second * q + by_s * beta
    by_beta = by_beta + by_first + by_second + by_s * mean
    by_start = by_whole * end - (by_p * p + by_q * s * above) * above
    by_end = by_whole * start - by_p * above - by_q
    return by_mean, by_start, by_beta, by_end


def _plain(
    u: Tensor, g: Tensor, bias: Tensor, c: Tensor, eps: float | int
) -> tuple[Tensor, Tensor, Tensor]:
    root, limit = 2 * c.sqrt(), TRANSLATION_LIMIT[u.dtype]
    x = root * root * dot(u, u, 1)
    points, time = root * sinhc_limited(x, limit) * u, cosh_limited(x, limit)
    m = (points.sum((0, 2)) / time.sum())[:, None]
    square = dot(m, m, 0)
    start = (1 - square).clamp_min(2 * torch.finfo(square.dtype).eps).rsqrt()
    mean = m * start
    y = points + (torch.matmul(mean.mT, points) / (1 + start) - time) * mean
    yy = dot(y, y, 1)
    h = value(ASINHC, yy)
    rho = yy * h.square()
    variance = rho.mean() / c
    size = (g.clamp_min(LEAST) / (variance + eps)).sqrt()
    beta_x = root * root * dot(bias, bias, 0)
    beta = (bias * root * sinhc_limited(beta_x, limit))[:, None]
    end = cosh_limited(beta_x, limit)
    s = dot(mean, beta, 0)
    first = beta + mean * (1 - end) / (1 + start)
    second = beta + mean * (s / (1 + start) - end)
    d = (mean @ first.mT + beta @ second.mT) / (start * end - s + 1)
    square_out = rho * size.square()
    stretch = h * size * sinhc_limited(square_out, limit)
    out = stretch * (y + torch.matmul(d, y)) + cosh_limited(square_out, limit) * beta
    out = value(ASINHC, dot(out, out, 1)) / root * out
    return out, m * value(ARTANHC, square) / root, variance


def _plain_output(u: Tensor, g: Tensor, bias: Tensor, c: Tensor, eps: float | int) -> Tensor:
    return _plain(u, g, bias, c, eps)[0]


def midpoint_norm(
    u: Float[Tensor, "batch channels points"],
    g: Float[Tensor, ""],
    bias: Float[Tensor, " channels"],
    c: Float[Tensor, ""],
    eps: float | int,
) -> tuple[Float[Tensor, "batch channels points"], Float[Tensor, "channels 1"], Float[Tensor, ""]]:
    """Normalised tangent vectors; the mean's tangent vector and the variance, without gradients."""
    if torch.compiler.is_compiling():
        out, mean, variance = _plain(u, g, bias, c, eps)
        return out, mean.detach(), variance.detach()
    return _MidpointNorm.apply(u, g, bias, c, eps)  # pyrefly: ignore

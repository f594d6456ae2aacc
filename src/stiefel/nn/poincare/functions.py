"""Operations of the ball with hand-written backward passes, for the curvature as well.

Source: van Spengler et al., arXiv 2303.14027, "Poincaré ResNet": own backward passes keep the
graphs of hyperbolic networks small. Each function here keeps its arguments only. A second
derivative goes through the same formula written with differentiable operations, and so does
``torch.compile``, which makes backward passes of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.nn.poincare._args import through_plain
from stiefel.nn.poincare._radial import (
    ARTANHC,
    ASINHC,
    Analytic,
    asinhc,
    cosh_limited,
    lift,
    lift_slopes,
    radial_slope,
    sinhc_limited,
    slope,
    value,
)

# |2√c u| beyond which u counts as that long: (cosh t)⁴ of two such vectors stays finite.
TRANSLATION_LIMIT = {torch.float32: 21.0, torch.float64: 170.0}


def dot(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Inner products along ``dim``, which stays."""
    return (x * y).sum(dim, keepdim=True)


class _SquaredLength(torch.autograd.Function):
    """|x|², one pass each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        return dot(x, x, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return (2 * grads[0]) * x, None


def squared_length(x: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape_"]:
    """|x|² along ``dim``, which stays with size 1."""
    if torch.compiler.is_compiling():
        return dot(x, x, dim)
    return _SquaredLength.apply(x, dim)  # pyrefly: ignore


class _Scale(torch.autograd.Function):
    """y = f(c|v|²) v."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, c: Tensor, f: Analytic, dim: int) -> Tensor:
        ctx.save_for_backward(v, c)
        ctx.f, ctx.dim = f, dim
        return value(f, c * dot(v, v, dim)) * v

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        v, c = ctx.saved_tensors
        (g,) = grads
        if torch.is_grad_enabled():
            return *through_plain(_scale_plain, (v, c), grads, ctx.f, ctx.dim), None, None
        square = dot(v, v, ctx.dim)
        x = c * square
        # f′(x) <g, v>: with x = c|v|² the gradient is 2c of it along v, |v|² of it for c.
        part = slope(ctx.f, x) * dot(g, v, ctx.dim)
        dv = torch.addcmul(value(ctx.f, x) * g, 2 * c * part, v)
        dc = (part * square).sum() if ctx.needs_input_grad[1] else None
        return dv, dc, None, None


def _scale_plain(v: Tensor, c: Tensor, f: Analytic, dim: int) -> Tensor:
    return value(f, c * dot(v, v, dim)) * v


def scale(
    v: Float[Tensor, "*shape"], c: Float[Tensor, ""], f: Analytic, dim: int = -1
) -> Float[Tensor, "*shape"]:
    """f(c|v|²) v: exp₀ with f = ``TANHC``, log₀ with f = ``ARTANHC``."""
    if torch.compiler.is_compiling():
        return _scale_plain(v, c, f, dim)
    return _Scale.apply(v, c, f, dim)  # pyrefly: ignore


class _MobiusAdd(torch.autograd.Function):
    """x ⊕ y = (a x + b y)/d; the sheet's "Manual backwards"."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, c)
        return _mobius_plain(x, y, c)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, y, c = ctx.saved_tensors
        (g,) = grads
        if torch.is_grad_enabled():
            return through_plain(_mobius_plain, (x, y, c), grads)
        x2, y2, xy = dot(x, x, -1), dot(y, y, -1), dot(x, y, -1)
        a, b = 1 + 2 * c * xy + c * y2, 1 - c * x2
        d = 1 + 2 * c * xy + c * c * x2 * y2
        gx, gy = dot(g, x, -1), dot(g, y, -1)
        theta, k = (a * gx + b * gy) / d, 2 * c / d
        dx = (a / d) * g - k * (theta * c * y2 + gy) * x - k * (theta - gx) * y
        dy = (b / d) * g + k * (gx - theta) * x + k * (gx - c * x2 * theta) * y
        dc = ((2 * xy + y2) * gx - x2 * gy - theta * (2 * xy + 2 * c * x2 * y2)) / d
        return dx.sum_to_size(x.shape), dy.sum_to_size(y.shape), dc.sum()


def _mobius_plain(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    x2, y2, xy = dot(x, x, -1), dot(y, y, -1), dot(x, y, -1)
    top = (1 + 2 * c * xy + c * y2) * x + (1 - c * x2) * y
    return top / (1 + 2 * c * xy + c * c * x2 * y2)


def mobius(
    x: Float[Tensor, "*#batch d"], y: Float[Tensor, "*#batch d"], c: Float[Tensor, ""]
) -> Float[Tensor, "*batch_ d"]:
    """x ⊕ y along the last dimension."""
    if torch.compiler.is_compiling():
        return _mobius_plain(x, y, c)
    return _MobiusAdd.apply(x, y, c)  # pyrefly: ignore


class _ConformalFactor(torch.autograd.Function):
    """λ = 2/(1 − c|x|²), dλ/dx = c λ² x, dλ/dc = λ²|x|²/2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(x, c)
        return _conformal_plain(x, c)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, c = ctx.saved_tensors
        (g,) = grads
        if torch.is_grad_enabled():
            return through_plain(_conformal_plain, (x, c), grads)
        square = dot(x, x, -1)
        part = g * (2 / (1 - c * square)).square()
        return c * part * x, (part * square).sum() / 2


def _conformal_plain(x: Tensor, c: Tensor) -> Tensor:
    return 2 / (1 - c * dot(x, x, -1))


def conformal(x: Float[Tensor, "*batch d"], c: Float[Tensor, ""]) -> Float[Tensor, "*batch 1"]:
    """λ_x along the last dimension, which stays with size 1."""
    if torch.compiler.is_compiling():
        return _conformal_plain(x, c)
    return _ConformalFactor.apply(x, c)  # pyrefly: ignore


class _Translate(torch.autograd.Function):
    """log₀(exp₀(a) ⊕ exp₀(b)), by a boost of the hyperboloid.

    With t = 2√c|u| the point exp₀(u) is (cosh t, sinh t û) there, so nothing saturates.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, dim: int) -> Tensor:
        limit, four = TRANSLATION_LIMIT[b.dtype], 4 * c
        aa, bb, ab = (four * dot(x, y, dim) for x, y in ((a, a), (b, b), (a, b)))
        sinh_a, cosh_a = lift(aa, limit)
        p, cosh_b = lift(bb, limit)
        q = torch.addcmul(sinh_a * cosh_b, sinh_a.square() / (1 + cosh_a) * ab, p)
        y = torch.addcmul(p * b, q, a)
        yy = four * dot(y, y, dim)
        h = asinhc(yy, math.inf)
        ctx.save_for_backward(a, b, c, aa, bb, ab, sinh_a, cosh_a, p, cosh_b, q, yy, h)
        ctx.dim = dim
        return y.mul_(h)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        a, b, c, aa, bb, ab, sinh_a, cosh_a, p, cosh_b, q, yy, h = ctx.saved_tensors
        (g,), dim = grads, ctx.dim
        if torch.is_grad_enabled():
            return *through_plain(_translate_plain, (a, b, c), grads, dim), None
        limit, four = TRANSLATION_LIMIT[b.dtype], 4 * c
        # out = h(yy) y with y = p b + q a and q = k p ab + sinh_a cosh_b.
        y = torch.addcmul(p * b, q, a)
        by_yy = radial_slope(yy, h, math.inf) / 2 * dot(g, y, dim)
        gy = (h * g).addcmul_(2 * four * by_yy, y)
        by_q = dot(gy, a, dim)
        k = sinh_a.square() / (1 + cosh_a)
        by_ab = by_q * k * p
        by_p = torch.addcmul(dot(gy, b, dim), by_q * k, ab)
        sinh_b_slope, cosh_b_slope = lift_slopes(bb, p, cosh_b, limit)
        by_bb = (by_p * sinh_b_slope + by_q * sinh_a * cosh_b_slope) / 2
        db = (p * gy).addcmul_(2 * four * by_bb, b).addcmul_(four * by_ab, a).sum_to_size(b.shape)
        by_aa, da = None, None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            sinh_a_slope, cosh_a_slope = lift_slopes(aa, sinh_a, cosh_a, limit)
            k_slope = (sinh_a * sinh_a_slope - k / 2 * cosh_a_slope) / (1 + cosh_a)
            by_aa = k_slope * (by_q * p * ab).sum_to_size(aa.shape)
            by_aa = by_aa + sinh_a_slope / 2 * (by_q * cosh_b).sum_to_size(aa.shape)
            da = gy.mul_(q).addcmul_(four * by_ab, b).sum_to_size(a.shape)
            da = torch.addcmul(da, 2 * four * by_aa, a)
        dc = None
        if ctx.needs_input_grad[2] and by_aa is not None:
            parts = ((by_aa, aa), (by_bb, bb), (by_ab, ab), (by_yy, yy))
            dc = sum((x * y).sum() for x, y in parts) / c
        return da, db, dc, None


def _translate_plain(a: Tensor, b: Tensor, c: Tensor, dim: int) -> Tensor:
    limit = TRANSLATION_LIMIT[b.dtype]
    aa, bb, ab = (4 * c * dot(x, y, dim) for x, y in ((a, a), (b, b), (a, b)))
    sinh_a, p = sinhc_limited(aa, limit), sinhc_limited(bb, limit)
    k = sinh_a.square() / (1 + cosh_limited(aa, limit))
    y = torch.addcmul(p * b, k * p * ab + sinh_a * cosh_limited(bb, limit), a)
    return value(ASINHC, 4 * c * dot(y, y, dim)) * y


def translate(
    a: Float[Tensor, "*#shape"], b: Float[Tensor, "*#shape"], c: Float[Tensor, ""], dim: int = -1
) -> Float[Tensor, "*shape_"]:
    """log₀(exp₀(a) ⊕ exp₀(b)) of tangent vectors at the origin, along ``dim``."""
    if torch.compiler.is_compiling():
        return _translate_plain(a, b, c, dim)
    return _Translate.apply(a, b, c, dim)  # pyrefly: ignore


class _Midpoint(torch.autograd.Function):
    """m = Σ sinh(t) û / Σ cosh(t) with t = 2√c|u|; the tangent artanh(|m|) m̂/(2√c) of its point."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, c: Tensor, dims: tuple[int, ...], dim: int) -> Tensor:
        four = 4 * c
        x = four * dot(u, u, dim)
        sinhc, cosh = lift(x, TRANSLATION_LIMIT[u.dtype])
        weight = cosh.sum(dims, keepdim=True)
        mean = (sinhc * u).sum(dims, keepdim=True) / weight
        ctx.save_for_backward(u, c, mean, weight, x, sinhc, cosh)
        ctx.dims, ctx.dim = dims, dim
        return value(ARTANHC, four * dot(mean, mean, dim)) * mean

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        u, c, mean, weight, x, sinhc, cosh = ctx.saved_tensors
        (g,), dim = grads, ctx.dim
        if torch.is_grad_enabled():
            found = through_plain(_midpoint_plain, (u, c, None), grads, ctx.dims, dim)
            return found[0], found[1], None, None
        limit, four = TRANSLATION_LIMIT[u.dtype], 4 * c
        square = four * dot(mean, mean, dim)
        by_square = slope(ARTANHC, square) * dot(g, mean, dim)
        by_mean = torch.addcmul(value(ARTANHC, square) * g, 2 * four * by_square, mean) / weight
        sinhc_slope, cosh_slope = lift_slopes(x, sinhc, cosh, limit)
        by_x = dot(by_mean, u, dim) * sinhc_slope - dot(by_mean, mean, dim) * cosh_slope
        by_x = by_x / 2
        du = (sinhc * by_mean).addcmul_(2 * four * by_x, u)
        dc = None
        if ctx.needs_input_grad[1]:
            dc = ((by_x * x).sum() + (by_square * square).sum()) / c
        return du, dc, None, None


def _midpoint_plain(
    u: Tensor, c: Tensor, w: Tensor | None, dims: tuple[int, ...], dim: int
) -> Tensor:
    limit, x = TRANSLATION_LIMIT[u.dtype], 4 * c * dot(u, u, dim)
    sinhc, cosh = sinhc_limited(x, limit), cosh_limited(x, limit)
    if w is not None:
        sinhc, cosh = w * sinhc, w * cosh
    mean = (sinhc * u).sum(dims, keepdim=True) / cosh.sum(dims, keepdim=True)
    return value(ARTANHC, 4 * c * dot(mean, mean, dim)) * mean


def midpoint_tangent(
    u: Float[Tensor, "*shape"],
    c: Float[Tensor, ""],
    dims: tuple[int, ...],
    dim: int,
    w: Tensor | None = None,
) -> Float[Tensor, "*reduced"]:
    """log₀ of the midpoint of exp₀(u) over ``dims``, kept as size 1; vectors are along ``dim``."""
    if w is not None or torch.compiler.is_compiling():
        return _midpoint_plain(u, c, w, dims, dim)
    return _Midpoint.apply(u, c, dims, dim)  # pyrefly: ignore

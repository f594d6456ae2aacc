"""Functions of a squared length: sinh(√x)/√x and its like, with derivatives, smooth at 0.

All layers need them of x = |v|²: as functions of the square they are analytic, so that no length
has to be divided by and no gradient is singular at the origin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, factorial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Below this, derivatives are taken from the Taylor series: above, (outer − f)/(2x) loses at most
# two digits. The series ends where its terms are below rounding: 0.01⁴ = 1e-8, 0.01⁸ = 1e-16.
SMALL = 1e-2
TERMS = {torch.float32: 4, torch.float64: 8}
_MOST = 8
# Any x above SMALL where all of the functions are finite; stands in for x in the branch not taken.
_ELSEWHERE = 0.25


@dataclass(frozen=True)
class Analytic:
    """f with f(x) = exact(√x) and 2x f′(x) = outer(√x, x) − f(x), and its Taylor series."""

    series: tuple[float, ...]
    exact: Callable[[Tensor], Tensor]
    outer: Callable[[Tensor, Tensor], Tensor]


def _artanh_over(root: Tensor) -> Tensor:
    # Beyond the last number below 1 artanh is infinite: points on the boundary count as inside.
    return torch.atanh(root.clamp_max(1 - torch.finfo(root.dtype).eps)) / root


def _asinh_over(root: Tensor) -> Tensor:
    # torch's own asinh is not vectorised and takes 20 × as long.
    square = root * root
    return torch.log1p(root + square / (1 + (1 + square).sqrt())) / root


# tanh(√x)/√x, of the tangent numbers 1, 2, 16, 272, …
_TANH = (
    1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075,
    -929569 / 638512875,
)  # fmt: skip

SINHC = Analytic(
    tuple(1 / factorial(2 * k + 1) for k in range(_MOST)),
    lambda root: torch.sinh(root) / root,
    lambda root, x: torch.cosh(root),
)
ASINHC = Analytic(
    tuple((-1) ** k * comb(2 * k, k) / 4**k / (2 * k + 1) for k in range(_MOST)),
    _asinh_over,
    lambda root, x: torch.rsqrt(1 + x),
)
TANHC = Analytic(
    _TANH,
    lambda root: torch.tanh(root) / root,
    lambda root, x: 1 - torch.tanh(root).square(),
)
ARTANHC = Analytic(
    tuple(1 / (2 * k + 1) for k in range(_MOST)),
    _artanh_over,
    lambda root, x: torch.where(x < 1, 1 / (1 - x.clamp_max(1 - torch.finfo(x.dtype).eps)), 0.0),
)


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    # Where another formula is taken the polynomial must not overflow: 0 times that is NaN.
    x = x.clamp_max(SMALL)
    total = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total = total * x + coefficient
    return total


def _value(f: Analytic, x: Tensor) -> Tensor:
    """f(x); its graph would be inexact near 0."""
    return f.exact(x.clamp_min(torch.finfo(x.dtype).tiny).sqrt())


def _smooth_value(f: Analytic, x: Tensor) -> Tensor:
    """f(x) from operations whose own derivatives are exact at 0."""
    small = x < SMALL
    far = torch.where(small, _ELSEWHERE, x)
    return torch.where(small, _horner(x, f.series[: TERMS[x.dtype]]), f.exact(far.sqrt()))


def slope(
    f: Analytic, x: Float[Tensor, "*shape"], known: Float[Tensor, "*shape"] | None = None
) -> Float[Tensor, "*shape"]:
    """f′(x) for x ≥ 0, made of differentiable operations; ``known`` is f(x), if there."""
    small = x < SMALL
    far = torch.where(small, _ELSEWHERE, x)
    root = far.sqrt()
    derived = [k * coefficient for k, coefficient in enumerate(f.series[: TERMS[x.dtype] + 1])]
    exact = (f.outer(root, far) - (f.exact(root) if known is None else known)) / (2 * far)
    return torch.where(small, _horner(x, derived[1:]), exact)


class _Evaluate(torch.autograd.Function):
    """f(x) that keeps x alone; the derivative is differentiable again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Analytic) -> Tensor:
        ctx.save_for_backward(x)
        ctx.f = f
        return _value(f, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * slope(ctx.f, x), None


def value(f: Analytic, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """f(x) for x ≥ 0; twice differentiable."""
    if torch.compiler.is_compiling():  # the compiler makes a backward pass of its own
        return _smooth_value(f, x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Evaluate.apply(x, f)  # pyrefly: ignore
    return _value(f, x)


def lift(x: Float[Tensor, "*shape"], limit: float) -> tuple[Tensor, Tensor]:
    """Where vectors of squared length x are on the hyperboloid: sinh(t)/√x and cosh(t), no graph.

    t = min(√x, limit): longer vectors count as that long, their squares would overflow.
    """
    root = _positive(x).sqrt_()
    near = root.clamp_max(limit)
    cosh = near.cosh()
    return near.sinh_().div_(root), cosh


def lift_slopes(x: Tensor, sinhc: Tensor, cosh: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Twice the derivatives of both by x.

    Beyond the limit T sinh(T)/√x falls like 1/√x and cosh(T) stays. Times x both are exact to
    rounding, by themselves they are not near x = 0. That is enough for gradients of vectors v with
    x = |v|², where the slope meets v and another product with v.
    """
    beyond = x > limit * limit
    by_sinhc = cosh.masked_fill(beyond, 0.0).sub_(sinhc).div_(_positive(x))
    return by_sinhc, sinhc.masked_fill(beyond, 0.0)


def asinh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """sign(x) log1p(|x| + x²/(1 + √(1 + x²))), no graph, x² finite."""
    size, square = x.abs(), x * x
    root = (square + 1).sqrt_().add_(1)
    return size.addcdiv_(square, root).log1p_().copysign_(x)


def asinhc(x: Float[Tensor, "*shape"], limit: float) -> Float[Tensor, "*shape"]:
    """min(asinh(√x), limit)/√x, no graph."""
    root = _positive(x).sqrt_()
    size = (x + 1).sqrt_().add_(1)
    size = torch.addcdiv(root, x, size, out=size).log1p_()
    return (size if limit == math.inf else size.clamp_max_(limit)).div_(root)


def radial_slope(x: Tensor, known: Tensor, limit: float) -> Float[Tensor, "*shape"]:
    """Twice the derivative of :func:`asinhc`, whose value is ``known``; as exact as lift_slopes."""
    outer = (x + 1).rsqrt_()
    if limit < math.inf:
        outer.masked_fill_(x > math.sinh(limit) ** 2, 0.0)
    return outer.sub_(known).div_(_positive(x))


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def sinhc_limited(x: Float[Tensor, "*shape"], limit: float) -> Float[Tensor, "*shape"]:
    """sinh(t)/√x with t = min(√x, limit), differentiable."""
    inside = x <= limit * limit
    shrink = torch.where(inside, 1.0, limit * torch.rsqrt(torch.where(inside, 1.0, x)))
    return value(SINHC, x.clamp_max(limit * limit)) * shrink


def cosh_limited(x: Float[Tensor, "*shape"], limit: float) -> Float[Tensor, "*shape"]:
    """cosh(t) with t = min(√x, limit), differentiable: 1 + x/2 (sinh(√x/2)/(√x/2))²."""
    near = x.clamp_max(limit * limit)
    return 1 + near / 2 * value(SINHC, near / 4).square()

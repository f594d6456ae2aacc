"""One clock for every depth: the time a balanced mode takes, and where it is at a time.

A mode u of D weight layers obeys τ u' = D u^{2−2/D} (s − δ u). In w = δu/s and the time
T = D s (s/δ)^q t/τ, q = 1 − 2/D, this has no constants left: w' = w^{1+q} (1 − w). The logit
y = ln(w / |1 − w|) then runs at

    dT/dy = (1 + σ e^{−y})^q,    w = 1 / (1 + σ e^{−y}),

with σ = 1 for growth (w < 1) and −1 for decay (w > 1). :func:`clock` is T(y), exact to rounding
from two power series that meet at w = 1/2 (growth) or w = 2 (decay); :func:`position` is w(T),
read from a table of cubic pieces that is made once for every q and has error below 1e-10.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stiefel.theory.deep_linear_blocks import BLOCK

# Terms of the series: both variables are at most 1/2, and 2^-60 is below rounding.
_TERMS = 64
# The table covers 40 units of the coordinate on both sides of 0; e^-40 is below rounding.
REACH = 40.0
_CELLS_PER_UNIT = 192


def logit(end: Tensor, s: Tensor) -> Tensor:
    """y = ln(w / |1 − w|) of w = end/s > 0, w ≠ 1; far above 1 without cancellation."""
    far = end > 2 * s
    near = end.log() - (s - end).abs().log()
    return torch.where(far, -torch.log1p(-s / torch.where(far, end, 4 * s)), near)


def clock(y: Tensor, q: float, sign: int) -> Tensor:
    """T(y), elementwise in float64; differentiable to any order.

    Args:
        y: Logits; for decay (``sign`` −1) positive.
        q: 1 − 2/D, from −1 (one layer) to 1 (infinitely many).
        sign: σ, 1 or −1. T → y for late times of growth; T = 0 at w = ∞ for decay.
    """
    return _Clock.apply(y, q, sign)


class _Clock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, q: float, sign: int) -> Tensor:
        ctx.save_for_backward(y)
        ctx.settings = q, sign
        return _grow(y, q) if sign > 0 else _decay(y, q)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore
        (y,) = ctx.saved_tensors
        q, sign = ctx.settings
        return grad_outputs[0] * _rate(y, q, sign), None, None


def _rate(y: Tensor, q: float, sign: int) -> Tensor:
    """dT/dy = (1 + σ e^{−y})^q, the base without cancellation."""
    log = _softplus(-y) if sign > 0 else torch.log(-torch.expm1(-y))
    return (q * log).exp()


def _softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x) to rounding at every x; torch's own drops e^−x from x = 20 on."""
    return -torch.nn.functional.logsigmoid(-x)


def _grow(y: Tensor, q: float) -> Tensor:
    """∫ w^{−1−q}/(1 − w) dw, from powers of 1 − w above w = 1/2 and of w below."""
    rest = torch.sigmoid(-y.clamp_min(0))
    late = _softplus(y.clamp_min(0)) - _rising(rest, q + 1)
    w = torch.sigmoid(y.clamp_max(0))
    log_w = -_softplus(-y.clamp_max(0))
    half = torch.full((), 0.5, dtype=y.dtype, device=y.device)
    start = math.log(2.0) - _rising(half, q + 1)
    early = start + _early(w, log_w, q) - _early(half, half.log(), q)
    return torch.where(y >= 0, late, early)


def _early(w: Tensor, log_w: Tensor, q: float) -> Tensor:
    """−w^{−q}/q + Σ_k w^{k+1−q}/(k+1−q) up to a constant: differences of it are used."""
    # The term k = 0 tends to ln w as q → 1: written so that nothing cancels there.
    p = 1 - q
    first = torch.expm1(p * log_w) / p if p > 0 else log_w
    lead = -torch.exp(-q * log_w) / q if q else log_w
    tail = torch.zeros_like(w)
    for k in range(_TERMS, 0, -1):
        tail = (tail + 1 / (k + p)) * w
    return lead + first + tail * torch.exp(p * log_w)


def _rising(x: Tensor, a: float) -> Tensor:
    """Σ_{k≥1} (a)_k / (k!·k) x^k."""
    coefficients, rising = [], 1.0
    for k in range(1, _TERMS + 1):
        rising *= (a + k - 1) / k
        coefficients.append(rising / k)
    total = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = (total + coefficient) * x
    return total


def _decay(y: Tensor, q: float) -> Tensor:
    """∫₀^v x^q/(1 − x) dx with v = 1/w = 1 − e^{−y}."""
    middle = math.log(2.0)
    v = -torch.expm1(-y.clamp_max(middle))
    total = torch.zeros_like(v)
    for k in range(_TERMS, -1, -1):
        total = total * v + 1 / (k + 1 + q)
    early = total * v ** (1 + q)
    half = torch.full((), 0.5, dtype=y.dtype, device=y.device)
    at_half = sum(0.5 ** (k + 1 + q) / (k + 1 + q) for k in range(_TERMS + 1))
    late = y.clamp_min(middle) - _rising(torch.exp(-y.clamp_min(middle)), -q)
    start = at_half - (middle - _rising(half, -q))
    return torch.where(y <= middle, early, late + start)


def position(time: Tensor, q: float, sign: int) -> Tensor:
    """w(T), the inverse of :func:`clock`, elementwise in float64; differentiable to any order.

    For 0 < q ≤ 1 only: with one or two layers the inverse is elementary.
    """
    return _Position.apply(time, q, sign)


class _Position(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, time: Tensor, q: float, sign: int) -> Tensor:
        w = torch.empty_like(time, memory_format=torch.contiguous_format)
        flat, source = w.view(-1), time.reshape(-1)
        for start in range(0, flat.numel(), BLOCK):
            read_position(source[start : start + BLOCK], flat[start : start + BLOCK], q, sign)
        ctx.save_for_backward(w)
        ctx.q = q
        return w

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore
        (w,) = ctx.saved_tensors
        return grad_outputs[0] * w ** (1 + ctx.q) * (1 - w), None, None


def read_position(time: Tensor, out: Tensor, q: float, sign: int) -> None:
    """Write w(``time``) into ``out`` (which may be ``time``); no gradients."""
    table, least, shift = _table(q, sign)
    table = table.to(time.device)
    x = _coordinate(time, q, sign)
    early = None
    if time.numel() and float(x.min()) < least:
        early = torch.where(x < least, _asymptote(time, q, sign, shift), torch.nan)
    part = x.sub_(least).mul_(_CELLS_PER_UNIT).clamp_(0, table.shape[1] - 1)
    cell = part.to(torch.int32)
    part.sub_(cell)
    # Four selections from rows are a third faster than one of columns with strided arithmetic.
    c0, c1, c2, c3 = (row.index_select(0, cell) for row in table)
    torch.addcmul(c2, c3, part, out=c3)
    torch.addcmul(c1, c3, part, out=c3)
    torch.addcmul(c0, c3, part, out=out)
    if early is not None:
        out.copy_(torch.where(early.isnan(), out, early))


def _coordinate(time: Tensor, q: float, sign: int) -> Tensor:
    """A closed form in T that is near ±ln w early and near T late: the table's even spacing.

    Growth: T itself, and below 0 the logarithm of w's power law. Decay: ln(e^T − 1).
    """
    if sign > 0:
        if time.numel() and float(time.min()) >= 0:
            return time.clone()
        early = torch.log1p(time.clamp_max(0).mul_(-q)).mul_(-1 / q)
        return early.add_(time.clamp_min(0))
    return time + torch.log(-torch.expm1(-time))


def _asymptote(time: Tensor, q: float, sign: int, shift: float) -> Tensor:
    """w where it is so far from 1 that only the power law is left."""
    if sign > 0:
        return ((shift - time).mul_(q)) ** (-1 / q)
    return (time * (1 + q)) ** (-1 / (1 + q))


@lru_cache(maxsize=64)
def _table(q: float, sign: int) -> tuple[Tensor, float, float]:
    """Coefficients ``[4, cells]`` of the pieces, the least coordinate, and the shift of T.

    Piecewise Hermite polynomials: values and slopes of w at the nodes, both exact.
    """
    reach = REACH if sign > 0 else REACH * (1 + q)
    x = torch.arange(-math.ceil(reach * _CELLS_PER_UNIT), math.ceil(REACH * _CELLS_PER_UNIT) + 1)
    x = x.to(torch.float64) / _CELLS_PER_UNIT
    if sign > 0:
        time = torch.where(x < 0, torch.expm1(-q * x) / -q, x)
        spacing = torch.where(x < 0, torch.exp(-q * x), 1.0)  # dT/dx
    else:
        time, spacing = _softplus(x), torch.sigmoid(x)
    w, rest = _solve(time, x, q, sign)
    slope = sign * w ** (1 + q) * rest * spacing / _CELLS_PER_UNIT
    rise, before, after = w.diff(), slope[:-1], slope[1:]
    pieces = (w[:-1], before, 3 * rise - 2 * before - after, before + after - 2 * rise)
    shift = 0.0
    if sign > 0:
        far = torch.full((1,), -REACH - 5, dtype=torch.float64)
        shift = float(_grow(far, q) + torch.exp(-q * far) / q)
    return torch.stack(pieces), float(x[0]), shift


def _solve(time: Tensor, x: Tensor, q: float, sign: int) -> tuple[Tensor, Tensor]:
    """w and |1 − w| at the nodes: a coarse inverse by interpolation, then Newton's method."""
    if sign > 0:
        guess = torch.linspace(-REACH - 5, REACH + 5, 4001, dtype=torch.float64)
        y = _interpolate(x, _coordinate(_grow(guess, q), q, sign), guess)
        for _ in range(4):
            y = y - (_grow(y, q) - time) / _rate(y, q, sign)
        return torch.sigmoid(y), torch.sigmoid(-y)
    guess = torch.linspace(-REACH - 5, math.log(REACH + 5), 4001, dtype=torch.float64)
    log_y = _interpolate(x, _coordinate(_decay(guess.exp(), q), q, sign), guess)
    for _ in range(4):
        y = log_y.exp()
        log_y = log_y - (_decay(y, q) - time) / (y * _rate(y, q, sign))
    y = log_y.exp()
    return -1 / torch.expm1(-y), 1 / torch.expm1(y)


def _interpolate(x: Tensor, nodes: Tensor, values: Tensor) -> Tensor:
    right = torch.searchsorted(nodes, x).clamp(1, nodes.numel() - 1)
    left = right - 1
    part = (x - nodes[left]) / (nodes[right] - nodes[left])
    return torch.lerp(values[left], values[right], part)

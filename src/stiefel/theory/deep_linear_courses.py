"""The formulas behind :func:`~stiefel.theory.mode_curve`, one for each kind of mode.

Which one a mode follows depends on its depth and on where it starts. All are written so that no
exponential overflows and nothing cancels, and so that gradients exist at the fixed points too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stiefel.theory.deep_linear_blocks import (
    CONVERGED,
    empty,
    grid_of,
    in_blocks,
    logistic_on_grid,
)
from stiefel.theory.deep_linear_clock import REACH, clock, logit, position, read_position

# e^−x beyond this is nothing beside the other term, or belongs to a mode that stays at 0.
_LARGEST_EXPONENT = 80.0
# Up to here (1 − e^−x)/x is read from its series.
_SMALL = 1e-4


class Modes(NamedTuple):
    """Modes that share a formula: parameters ``[M]``, times ``[1, T]`` or ``[M, T]``."""

    t: Tensor
    s: Tensor
    u0: Tensor
    lr: Tensor
    delta: Tensor

    def at(self, rows: Tensor) -> Modes:
        """Those with these indices."""
        times = self.t if self.t.shape[0] == 1 else self.t[rows]
        return Modes(times, *(x[rows] for x in self[1:]))

    def needs_gradients(self) -> bool:
        """Whether autograd records what is done with these."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self)


Course = Callable[[Modes, float, Tensor | None], Tensor]


def kinds(modes: Modes, depth: float) -> list[tuple[Tensor, Course]]:
    """Which rows follow which formula: disjoint masks that cover all, the usual one first."""
    with torch.no_grad():
        end = modes.delta * modes.u0
        zero, negative = modes.u0 == 0, modes.u0 < 0
        grow = (modes.u0 > 0) & (end < modes.s)
        if depth > 1 and bool(grow.all()):
            return [(grow, logistic if depth == 2 else deep)]
        if depth == 1:
            return [(torch.ones_like(grow), one_layer)]
        if depth == 2:
            return [(grow, logistic), (~grow & ~negative, two_layers), (negative, opposite)]
        driven = modes.s > 0
        return [
            (grow, deep),
            (zero, at_saddle),
            (~driven & ~zero, undriven),
            (driven & (end == modes.s), at_rest),
            (driven & (end > modes.s), deep),
        ]


def one_layer(modes: Modes, depth: float, out: Tensor | None) -> Tensor:
    """τ u' = s − δu."""
    x = (modes.delta * modes.lr)[:, None] * modes.t
    end = (modes.s / modes.delta)[:, None]
    return torch.sub(modes.u0[:, None] * torch.exp(-x), end * torch.expm1(-x), out=out)


def logistic(modes: Modes, depth: float, out: Tensor | None) -> Tensor:
    """Two layers, 0 < δu0 < s: u = (s/δ) / (1 + (s/(δu0) − 1) e^{−2st/τ}), eq. 9."""
    if modes.needs_gradients():
        start, speed, end = _logistic_terms(modes)
        return end * torch.sigmoid(start + speed * modes.t)

    dtype, device = modes.s.dtype, modes.s.device
    if out is None:
        out = empty(len(modes.s), modes.t.shape[-1], dtype, device)
    # In double precision up to the argument: what is small beside s must not shift the time.
    wide = Modes(*(x.double() for x in modes))
    start, speed, end = _logistic_terms(wide)
    grid = grid_of(modes.t[0]) if modes.t.shape[0] == 1 else None
    if grid is not None:
        curve = logistic_on_grid(start[:, 0], speed[:, 0], end[:, 0], grid, out)
        if curve is not None:
            return curve
    end = end.to(dtype)

    def finish(phase: Tensor, block: Tensor, rows: slice) -> None:
        if phase.dtype is not block.dtype:
            phase = block.copy_(phase)
        torch.sigmoid(phase, out=block).mul_(end[rows])

    return in_blocks(wide.t, start, speed, end, CONVERGED[dtype], finish, out)


def _logistic_terms(modes: Modes) -> tuple[Tensor, Tensor, Tensor]:
    """Logit at t = 0 (below s, where it needs no case), its speed and the end: ``[M, 1]`` each."""
    first = modes.delta * modes.u0
    start = first.log() - (modes.s - first).log()
    return start[:, None], (2 * modes.s * modes.lr)[:, None], (modes.s / modes.delta)[:, None]


def two_layers(modes: Modes, depth: float, out: Tensor | None) -> Tensor:
    """Two layers from anywhere ≥ 0, s = 0 included: u0 / (e^{−x} + δ u0 (1 − e^{−x})/s)."""
    x = (2 * modes.s * modes.lr)[:, None] * modes.t
    fall = torch.exp(-x.clamp_max(_LARGEST_EXPONENT))
    u0 = modes.u0[:, None]
    return torch.div(u0, fall + u0 * _pull(modes, x), out=out)


def opposite(modes: Modes, depth: float, out: Tensor | None) -> Tensor:
    """Two layers with a = −b: |u| falls to the saddle at 0."""
    x = (2 * modes.s * modes.lr)[:, None] * modes.t
    u0 = modes.u0[:, None]
    return torch.div(u0 * torch.exp(-x), 1 - u0 * _pull(modes, x), out=out)


def _pull(modes: Modes, x: Tensor) -> Tensor:
    """δ (1 − e^{−x})/s with x = 2st/τ, smooth through s = 0, where it is 2δt/τ."""
    large = x > _SMALL
    safe = torch.where(large, x, 1.0)
    share = torch.where(large, -torch.expm1(-safe) / safe, 1 - x / 2 + x**2 / 6 - x**3 / 24)
    return (2 * modes.delta * modes.lr)[:, None] * modes.t * share


def deep(modes: Modes, depth: float, out: Tensor | None) -> Tensor:
    """Three layers and more: the common clock, read backwards. All rows grow, or all decay.

    In float64 whatever the dtype: near the saddle T is large and only its differences matter.
    """
    dtype, wide = modes.s.dtype, Modes(*(x.double() for x in modes))
    q = 1 - 2 / depth
    sign = 1 if bool(wide.delta[0] * wide.u0[0] < wide.s[0]) else -1
    start = clock(logit(wide.delta * wide.u0, wide.s), q, sign)[:, None]
    speed = clock_speed(wide.s, wide.lr, wide.delta, depth)[:, None]
    end = (wide.s / wide.delta)[:, None]
    if modes.needs_gradients():
        return (end * position(start + speed * wide.t, q, sign)).to(dtype)

    if out is None:
        out = empty(len(modes.s), modes.t.shape[-1], dtype, modes.s.device)

    def finish(phase: Tensor, block: Tensor, rows: slice) -> None:
        flat = phase.view(-1)
        read_position(flat, flat, q, sign)
        torch.mul(phase, end[rows], out=block)

    return in_blocks(wide.t, start, speed, end, REACH, finish, out)


def clock_speed(s: Tensor, lr: Tensor, delta: Tensor, depth: float) -> Tensor:
    """dT/dt = D s (s/δ)^{1−2/D} / τ; at infinite depth λ already holds the factor D."""
    layers = 1.0 if math.isinf(depth) else depth
    return layers * lr * s * (s / delta) ** (1 - 2 / depth)


def at_saddle(modes: Modes, depth: float, out: Tensor | None) -> Tensor:
    """u0 = 0 stays; with three layers and more the saddle is flat, so ∂u/∂u0 = 1."""
    return modes.u0[:, None].expand(-1, modes.t.shape[-1])


def at_rest(modes: Modes, depth: float, out: Tensor | None) -> Tensor:
    """u0 = s/δ stays; the first order in both keeps the gradients right."""
    end = (modes.s / modes.delta)[:, None]
    rate = clock_speed(modes.s, modes.lr, modes.delta, depth)[:, None]
    return end + (modes.u0[:, None] - end) * torch.exp(-rate * modes.t)


def undriven(modes: Modes, depth: float, out: Tensor | None) -> Tensor:
    """s = 0: τ u' = −D δ u^{p+1}, p = 2 − 2/D, a power law.

    The second term is 0 and carries ∂u/∂s at s = 0.
    """
    p, layers = 2 - 2 / depth, 1.0 if math.isinf(depth) else depth
    u0, delta = modes.u0[:, None], modes.delta[:, None]
    pull = p * layers * (modes.delta * modes.lr)[:, None] * modes.t
    share = (1 + pull * u0**p) ** (-1 / p)
    return u0 * share + modes.s[:, None] * (1 - share ** (p + 1)) / (delta * (p + 1))

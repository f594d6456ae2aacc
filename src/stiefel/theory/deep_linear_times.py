"""How long deep linear networks take to learn, and the learning rates that they stand.

Saxe, McClelland and Ganguli, arXiv 1312.6120. D counts weight layers (the paper counts layers of
neurons, N_l = D + 1); times are in iterations of full-batch gradient descent at rate λ = 1/τ.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.theory.deep_linear_args import Reals, as_reals, check_at_least, check_depth
from stiefel.theory.deep_linear_clock import clock, logit
from stiefel.theory.deep_linear_courses import clock_speed


def mode_time(
    s: Reals,
    u0: Reals,
    uf: Reals,
    depth: float | int = 2,
    lr: Reals = 1.0,
    delta: Reals = 1.0,
) -> Float[Tensor, "*modes"]:
    """Iterations that a mode takes from ``u0`` to ``uf``; differentiable in all arguments.

    At a fixed rate more layers are not slower for ever: from 0.01 to 0.99 with s = 1 six layers
    take longest, and 99 are four times as fast as one. At a rate that falls as 1/D the time rises
    to a finite limit (:func:`mode_time_infinite`).

    Args:
        s: Strength of the mode, ≥ 0.
        u0: Where it starts; > 0 for two layers and more (0 is a fixed point).
        uf: Where it ends, strictly between u0 and s/delta.
        depth: D, the number of weight layers, or ``math.inf``.
        lr: Learning rate λ > 0; at infinite depth λD.
        delta: Input variance δ > 0 of the mode.

    All but ``depth`` broadcast; dtypes as in :func:`mode_curve`.

    Raises:
        ValueError: uf is not strictly between u0 and s/delta (never reached, or no time at all),
            and as :func:`mode_curve`.

    Source: arXiv 1312.6120, eq. 8 and the integral of eq. 16; the limit of D → ∞, eq. 17.
    """
    depth = check_depth(depth)
    s, u0, uf, lr, delta = torch.broadcast_tensors(*as_reals(s=s, u0=u0, uf=uf, lr=lr, delta=delta))
    check_at_least(s, "s", 0)
    check_at_least(lr, "lr", 0, strictly=True)
    check_at_least(delta, "delta", 0, strictly=True)
    if depth > 1:
        check_at_least(u0, "u0", 0, strictly=True)
    _check_between(s, u0, uf, delta)
    dtype = s.dtype
    s, u0, uf, lr, delta = (x.double() for x in (s, u0, uf, lr, delta))
    if depth == 1:
        return (torch.log((s - delta * u0) / (s - delta * uf)) / (delta * lr)).to(dtype)
    growing, undriven = uf > u0, s == 0
    driven = torch.where(undriven, 1.0, s)
    q, layers = 1 - 2 / depth, 1.0 if math.isinf(depth) else depth
    speed = clock_speed(driven, lr, delta, depth)
    times = []
    for sign, mask in ((1, growing), (-1, ~growing & ~undriven)):
        # Other rows get any pair that lies on the right side.
        inside = (0.25, 0.5) if sign > 0 else (4.0, 2.0)
        first, last = (
            torch.where(mask, delta * u, driven * part)
            for u, part in zip((u0, uf), inside, strict=True)
        )
        start, end = (logit(w, driven) for w in (first, last))
        times.append((clock(end, q, sign) - clock(start, q, sign)) / speed)
    p = 2 - 2 / depth
    decay = (uf**-p - u0**-p) / (p * layers * delta * lr)
    return torch.where(growing, times[0], torch.where(undriven, decay, times[1])).to(dtype)


def mode_time_infinite(
    s: Reals, u0: Reals, uf: Reals, lr: Reals = 1.0, depth: Reals = 1.0
) -> Float[Tensor, "*modes"]:
    """Iterations of a very deep network: (τ/D) [ln(uf(s−u0)/(u0(s−uf)))/s² + 1/(s u0) − 1/(s uf)].

    Args:
        s: Strength of the mode, > 0.
        u0: Where it starts, > 0.
        uf: Where it ends, strictly between u0 and s.
        lr: Learning rate λ > 0.
        depth: D. At λ = c/D (``depth=1``, ``lr=c``) this is the limit of :func:`mode_time`.

    Raises:
        ValueError: depth < 1, and as :func:`mode_time`.

    Source: arXiv 1312.6120, eq. 17.
    """
    s, u0, uf, lr, depth = as_reals(s=s, u0=u0, uf=uf, lr=lr, depth=depth)
    check_at_least(depth, "depth", 1)
    return mode_time(s, u0, uf, depth=math.inf, lr=lr * depth)


def _check_between(s: Tensor, u0: Tensor, uf: Tensor, delta: Tensor) -> None:
    first, last = (delta * u0).detach(), (delta * uf).detach()
    goal = s.detach()
    inside = ((first < last) & (last < goal)) | ((first > last) & (last > goal))
    if not bool(inside.all()):
        k = tuple(int(i) for i in (~inside).nonzero()[0])
        start, target, end = (float(x.detach()[k]) for x in (u0, uf, s / delta))
        raise ValueError(
            f"uf must lie strictly between u0 and s/delta: from {start:g} a mode of strength "
            f"{end:g} never reaches {target:g} (the time is infinite), or is there already"
        )


def unbalanced_time(
    a0: Reals, b0: Reals, s: Reals, uf: Reals, lr: Reals = 1.0
) -> Float[Tensor, "*modes"]:
    """Iterations until two layers that start apart, a ≠ b, have the product ``uf``.

    With c = |a² − b²|, which is conserved, and r = √(c² + 4s²), the time is τ/r · ln K from start
    to end, K(u) = (c² + 4su + r√(c² + 4u²)) / (s − u). This equals the paper's form once its two
    misprints are mended (ab = (c/2) sinh θ, and τ θ' = 2s − c sinh θ) and needs no switch to the
    balanced one as c → 0.

    Args:
        a0: Amplitude of the first layer.
        b0: Amplitude of the second; a0 + b0 ≠ 0, or the mode would run into the saddle at 0.
        s: Strength of the mode, ≥ 0.
        uf: Product at the end, strictly between a0·b0 and s; it may start below 0.
        lr: Learning rate λ > 0.

    Raises:
        ValueError: a0 = −b0, uf not strictly between a0·b0 and s, lr ≤ 0, s < 0, NaN.

    Source: arXiv 1312.6120, appendix on unequal initial conditions, corrected.
    """
    a0, b0, s, uf, lr = torch.broadcast_tensors(*as_reals(a0=a0, b0=b0, s=s, uf=uf, lr=lr))
    dtype = s.dtype
    a0, b0, s, uf, lr = (x.double() for x in (a0, b0, s, uf, lr))
    c, r = _check_unbalanced(a0, b0, s, lr)
    u0 = a0 * b0
    _check_between(s, u0, uf, torch.ones_like(s))
    level = r == 0  # a = b and s = 0: u = u0/(1 + 2 u0 t/τ)
    time = (_log_k(uf, c, s, r) - _log_k(u0, c, s, r)) / (torch.where(level, 1.0, r) * lr)
    if bool(level.any()):
        safe0, safef = (torch.where(level, u, 1.0) for u in (u0, uf))
        time = torch.where(level, (1 / safef - 1 / safe0) / (2 * lr), time)
    return time.to(dtype)


def unbalanced_curve(
    t: Reals, a0: Reals, b0: Reals, s: Reals, lr: Reals = 1.0
) -> Float[Tensor, "*modes"]:
    """Product ab of two layers that start apart, at every time: ``[..., T]``.

    The inverse of :func:`unbalanced_time`, elementary too: with k = e^{−rt/τ}/K(u0),
    u = (s − 2c²k − 4sc²k²) / ((1 + 4sk)² − 4r²k²).

    Args:
        t: Times, ≥ 0: ``[T]`` or a number.
        a0: Amplitude of the first layer, ``[...]``.
        b0: Amplitude of the second; a0 + b0 ≠ 0.
        s: Strength of the mode, > 0.
        lr: Learning rate λ > 0.

    Raises:
        ValueError: a0 = −b0, s ≤ 0, lr ≤ 0, a negative time, NaN.

    Source: arXiv 1312.6120, appendix on unequal initial conditions, corrected and inverted.
    """
    times, a0, b0, s, lr = as_reals(t=t, a0=a0, b0=b0, s=s, lr=lr)
    check_at_least(times, "t", 0)
    check_at_least(s, "s", 0, strictly=True)
    a0, b0, s, lr = torch.broadcast_tensors(a0, b0, s, lr)
    dtype = s.dtype
    c, r = _check_unbalanced(a0, b0, s, lr)
    if times.ndim:
        a0, b0, s, lr, c, r = (x[..., None] for x in (a0, b0, s, lr, c, r))
    u0 = a0 * b0
    start = (s - u0) / _positive_part(u0, c, s, r)
    k = start * torch.exp(-r * lr * times)
    top = s - 2 * c**2 * k - 4 * s * (c * k) ** 2
    return (top / ((1 + 4 * s * k) ** 2 - (2 * r * k) ** 2)).to(dtype)


def _check_unbalanced(a0: Tensor, b0: Tensor, s: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
    """c and r; raise unless the settings make sense."""
    check_at_least(s, "s", 0)
    check_at_least(lr, "lr", 0, strictly=True)
    if bool((a0.detach() + b0.detach() == 0).any()):
        raise ValueError(
            "a0 + b0 must not be 0: with a0 = -b0 the mode runs into the saddle at 0 "
            "and learns nothing"
        )
    c = ((a0 - b0) * (a0 + b0)).abs()
    return c, torch.hypot(c, 2 * s)


def _positive_part(u: Tensor, c: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """c² + 4su + r√(c² + 4u²), without cancellation where u < 0."""
    root = r * torch.hypot(c, 2 * u)
    plain = c**2 + 4 * s * u
    below = plain < 0
    apart = torch.where(below, root - plain, 1.0)
    return torch.where(below, (2 * c * (s - u)) ** 2 / apart, plain + root)


def _log_k(u: Tensor, c: Tensor, s: Tensor, r: Tensor) -> Tensor:
    top = _positive_part(u, c, s, r)
    # Only where r = 0 is this 0; that row is answered by another formula.
    return torch.where(r == 0, 1.0, top).log() - (s - u).abs().log()


def max_stable_lr(s_max: Reals, depth: float | int) -> Float[Tensor, "*modes"]:
    """The learning rate from which gradient descent diverges at the solution: 2/(D s^{2−2/D}).

    The largest eigenvalue of the loss's Hessian over a balanced, decoupled course is reached at its
    end, D s^{2−2/D} for the strongest mode s (whitened inputs). The differential equation is stable
    at any rate; its discretisation is not.

    Args:
        s_max: Largest strength, > 0.
        depth: D, the number of weight layers, finite.

    Raises:
        ValueError: depth < 1, not whole or infinite (the rate would be 0), s_max ≤ 0, NaN.

    Source: arXiv 1312.6120, eq. 41.
    """
    return 2 * optimal_lr(s_max, depth)


def optimal_lr(s_max: Reals, depth: float | int) -> Float[Tensor, "*modes"]:
    """The learning rate that is fastest at the solution, 1/(D s^{2−2/D}); it falls as 1/D.

    The inverse of the largest eigenvalue of the Hessian: the strongest mode's last error is gone in
    one step. With it the learning time stays finite as D → ∞.

    Args:
        s_max: Largest strength, > 0.
        depth: D, the number of weight layers, finite.

    Raises:
        ValueError: as :func:`max_stable_lr`.

    Source: arXiv 1312.6120, section 2.3 and eq. 41.
    """
    layers = check_depth(depth, infinite=False)
    (strength,) = as_reals(s_max=s_max)
    check_at_least(strength, "s_max", 0, strictly=True)
    return 1 / (layers * strength ** (2 - 2 / layers))

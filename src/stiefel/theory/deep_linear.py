"""Time courses of the modes of deep linear networks, in closed form for every depth.

Saxe, McClelland and Ganguli, arXiv 1312.6120. D weight layers, whitened inputs (or inputs whose
covariance has the same eigenvectors, with eigenvalues δ), decoupled and balanced initial weights:
each mode's strength u, the product of its D layers' amplitudes, obeys

    τ u' = D u^{2−2/D} (s − δ u),    τ = 1/λ,

with t in iterations of full-batch gradient descent at a small learning rate λ. Units: s and u are
as Σ31; where covariances are sums over P examples instead of means, s is P times as large.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.theory.deep_linear_args import Reals, as_reals, check_at_least, check_depth
from stiefel.theory.deep_linear_courses import Modes, kinds


def mode_curve(
    t: Reals,
    s: Reals,
    u0: Reals,
    depth: float | int = 2,
    lr: Reals = 1.0,
    delta: Reals = 1.0,
    *,
    signed: bool = False,
    out: Tensor | None = None,
) -> Float[Tensor, "*modes"]:
    """Strength of every mode at every time: the whole trajectory at once.

    Depths 1 and 2 are elementary; for all others, infinity included, one table per depth, made
    at the first call (10 ms), inverts the time course to 5e-12 relative. Differentiable in ``t``,
    ``s``, ``u0``, ``lr`` and ``delta``.

    Args:
        t: Times in iterations, ≥ 0: ``[T]``, or ``[..., T]`` with leading dimensions that broadcast
            with the modes, or a number.
        s: Strengths of the modes (singular values of Σ31), ≥ 0, any shape ``[...]``.
        u0: Strengths at t = 0, ≥ 0 (any sign with one layer). 0 is a fixed point for depth ≥ 2.
        depth: D, the number of weight layers (not of neuron layers), or ``math.inf``.
        lr: Learning rate λ > 0. At infinite depth this is λD, which has to stay finite.
        delta: Input variance δ > 0 of the mode: u ends at s/δ.
        signed: Allow u0 < 0 with two layers, which means a = −b: such modes end at the saddle 0.
        out: Where to write (contiguous, of the result's shape and dtype); saves getting new memory,
            up to half of the time of a big result. Not with gradients.

    ``s``, ``u0``, ``lr`` and ``delta`` broadcast. The dtype is that of the tensors given, float64
    for numbers and NumPy arrays. Growth with two layers: float32 is within 1e-6 of s/δ (for the
    float32 values given) and takes half of the time of float64, whose error is 1e-14 for u0 down
    to 1e-6 s/δ. Equally spaced times are the fastest, sorted ones come next.

    Returns:
        ``[..., T]``; without the last dimension where ``t`` is a number.

    Raises:
        ValueError: a time that is negative or not finite, depth < 1 or not whole, lr ≤ 0, s < 0,
            delta ≤ 0, a negative u0 without ``signed`` or with more than two layers, NaN, an
            ``out`` that does not fit.
        TypeError: values that are not real numbers.

    Source: arXiv 1312.6120, eqs. 7 to 9 (two layers), 14 to 16 (any depth).
    """
    depth = check_depth(depth)
    times, s, u0, lr, delta = as_reals(t=t, s=s, u0=u0, lr=lr, delta=delta)
    check_at_least(times, "t", 0)
    check_at_least(s, "s", 0)
    check_at_least(lr, "lr", 0, strictly=True)
    check_at_least(delta, "delta", 0, strictly=True)
    if depth > 1 and bool((u0.detach() < 0).any()) and not (signed and depth == 2):
        raise ValueError(
            f"u0 must be ≥ 0, got {float(u0.detach().min()):g}: a negative product of equal "
            "amplitudes exists for two layers only, as a = −b, and runs into the saddle at 0; "
            "pass signed=True with depth=2 to see it"
        )
    row = times if times.ndim else times[None]
    s, u0, lr, delta = torch.broadcast_tensors(s, u0, lr, delta)
    shape = torch.broadcast_shapes(s.shape, row.shape[:-1])
    if row.ndim > 1:
        row = row.expand(*shape, -1)
    full = (*shape, row.shape[-1])
    own = row.shape[:-1].numel()  # 1 where the modes share their times
    modes = Modes(
        row.reshape(own, row.shape[-1]), *(x.expand(shape).reshape(-1) for x in (s, u0, lr, delta))
    )
    result_shape = full if times.ndim else shape
    if out is not None:
        _check_out(out, result_shape, modes)
    curve = _curves(modes, depth, None if out is None else out.view(modes.s.numel(), full[-1]))
    return curve.reshape(result_shape) if out is None else out


def _check_out(out: Tensor, shape: tuple[int, ...], modes: Modes) -> None:
    if modes.needs_gradients():
        raise ValueError("out cannot be used where gradients are asked for")
    dtype, device = modes.s.dtype, modes.s.device
    fits = tuple(out.shape) == tuple(shape) and out.dtype is dtype and out.device == device
    if not fits or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, {tuple(shape)}, {dtype}, on {device}; got "
            f"{tuple(out.shape)}, {out.dtype}, on {out.device}, strides {out.stride()}"
        )


def _curves(modes: Modes, depth: float, out: Tensor | None) -> Tensor:
    """``[M, T]``: each row by the formula of its kind."""
    found = [(mask, course) for mask, course in kinds(modes, depth) if bool(mask.any())]
    if len(found) == 1:
        curve = found[0][1](modes, depth, out)
        return curve if out is None or curve is out else out.copy_(curve)
    result = modes.t.new_zeros(modes.s.numel(), modes.t.shape[-1])
    for mask, course in found:
        rows = mask.nonzero()[:, 0]
        result = result.index_put((rows,), course(modes.at(rows), depth, None))
    return result if out is None else out.copy_(result)

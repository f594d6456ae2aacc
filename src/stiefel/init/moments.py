"""Spread over environments of the moments of a linear head's per-example gradients.

The gradient of one example by the weights and the bias of a linear head is residual ⊗ (φ, 1). IGA
compares its means between environments, Fishr the means of its squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stiefel.init.environments import Part, through_link
from stiefel.linalg._checks import check_finite, check_floating

# Up to so many rows of weights (runs × classes × environments) a product with all features is
# bound by reading these, however many of the weights are zero.
_FEW_PRODUCTS = 64


def moment_spread(phi: Tensor, whole: Part, rows: Sequence[Tensor], *, power: int) -> Tensor:
    """Σ_e ‖v_e − mean v‖², v_e = mean over e of residual^power ⊗ (φ^power, 1); one for each run.

    Args:
        phi: features ``[n, h]`` or ``[..., n, h]``.
        whole: logits and targets of all examples, checked.
        rows: the examples of each environment.
        power: 1 (IGA) or 2 (Fishr).

    Raises:
        ValueError: ``phi`` is not ``[..., n, h]`` or not finite.
        TypeError: ``phi`` is not real floating point.
    """
    check_floating(phi, "phi")
    n = whole.z.shape[-1]
    if phi.ndim < 2 or phi.shape[-2] != n:
        raise ValueError(
            f"phi must be [n, h] with one row for each of the {n} examples of z, "
            f"got shape {tuple(phi.shape)}"
        )
    features = phi.to(whole.z.dtype)
    if whole.z[..., 0].numel() * len(rows) <= _FEW_PRODUCTS:
        # Zero weights for the other environments cost less than copying the features apart.
        average = torch.zeros(len(rows), 1, n, dtype=whole.z.dtype, device=whole.z.device)
        for weights, members in zip(average, rows, strict=True):
            weights[:, members] = 1 / len(members)
        value = _Spread.apply(features, whole.z, whole.target, average, power)  # pyrefly: ignore
    else:
        value = _by_blocks(features, whole.residual(), rows, power)
    if not bool(value.detach().isfinite().all()):  # cheaper than looking at all features first
        check_finite(phi, "phi")
    return value


def spread(vectors: Tensor) -> Tensor:
    """Σ_e ‖v_e − mean v‖² of vectors ``[..., environments, size]``."""
    return vectors.var(-2, correction=0).sum(-1) * vectors.shape[-2]


def _by_blocks(features: Tensor, residual: Tensor, rows: Sequence[Tensor], power: int) -> Tensor:
    """For many runs: each environment's product with its own features only."""
    moments = []
    for i in rows:
        weights = residual[..., i].pow(power) / len(i)
        by_weight = weights @ features[..., i, :].pow(power)
        moments.append(torch.cat([by_weight.flatten(-2), weights.sum(-1)], -1))
    return spread(torch.stack(moments, -2))


class _Spread(torch.autograd.Function):
    """The same with its gradient written out: one node, and nothing of size n × h kept for it.

    With w = residual^power and f = φ^power: v_e = mean_e(w ⊗ (f, 1)), and for the deviations
    d_e = v_e − mean v, ∂P/∂w_i = 2/n_e ⟨d_e, (f_i, 1)⟩, ∂P/∂f_i = 2/n_e Σ_c w_ic d_ec.
    """

    @staticmethod
    def forward(
        ctx: Any, phi: Tensor, z: Tensor, target: Tensor, average: Tensor, power: int
    ) -> Tensor:
        p = Part(z, target).probability()
        residual = p - target
        features, w = (phi.square(), residual.square()) if power == 2 else (phi, residual)
        weights = w.unsqueeze(-3) * average  # [..., e, c, n]
        v = (weights.flatten(-3, -2) @ features).unflatten(-2, weights.shape[-3:-1])
        b = weights.sum(-1)
        v -= v.mean(-3, keepdim=True)
        b -= b.mean(-2, keepdim=True)
        by_z = None
        if ctx.needs_input_grad[1]:
            inner = (v.flatten(-3, -2) @ features.mT).unflatten(-2, weights.shape[-3:-1])
            by_w = 2 * ((inner + b.unsqueeze(-1)) * average).sum(-3)
            by_z = through_link(p, 2 * residual * by_w if power == 2 else by_w)
        ctx.save_for_backward(phi, weights, v, by_z)
        ctx.power = power
        return v.square().sum((-3, -2, -1)) + b.square().sum((-2, -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore
        grad = grad_outputs[0][..., None, None]
        phi, weights, v, by_z = ctx.saved_tensors
        by_phi = None
        if ctx.needs_input_grad[0]:
            weights, v = (grad * weights.flatten(-3, -2)), v.flatten(-3, -2)
            if phi.ndim == 2:  # shared by the runs
                weights, v = weights.flatten(0, -2), v.flatten(0, -2)
            by_phi = 2 * (weights.mT @ v)
            if ctx.power == 2:
                by_phi *= 2 * phi
        return by_phi, None if by_z is None else grad * by_z, None, None, None

"""Spread over environments of the moments of a linear head's per-example gradients.

The gradient of one example by the weights and the bias of a linear head is residual ⊗ (φ, 1). IGA
compares its means between environments, Fishr the means of its squares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stiefel.init.environments import Groups, Part, through_link
from stiefel.linalg._checks import check_finite, check_floating

# Up to so many rows of weights (runs × classes × environments) a product with all features is
# bound by reading these, however many of the weights are zero.
_FEW_PRODUCTS = 64
# Numbers squared at a time: 1 MB of float32 stays in a core's cache; an accelerator wants few
# launches.
_BLOCK_CPU, _BLOCK_ACCELERATOR = 1 << 18, 1 << 24


def moment_spread(phi: Tensor, whole: Part, together: Groups, *, power: int) -> Tensor:
    """Σ_e ‖v_e − mean v‖², v_e = mean over e of residual^power ⊗ (φ^power, 1); one for each run.

    Args:
        phi: features ``[n, h]`` or ``[..., n, h]``.
        whole: logits and targets of all examples, checked.
        together: the environment of each example.
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
    if whole.z.numel() // n * len(together.counts) <= _FEW_PRODUCTS:
        table = whole.z.new_tensor(contrasts(together.counts))
        each = table.index_select(1, together.place)
        value = _Spread.apply(features, whole.z, whole.target, each, power)  # pyrefly: ignore
    else:
        value = _by_blocks(features, whole.residual(), together.rows(), power)
    if not math.isfinite(value.detach().sum()):  # cheaper than looking at all features first
        check_finite(phi, "phi")
    return value


def spread(vectors: Tensor) -> Tensor:
    """Σ_e ‖v_e − mean v‖² of vectors ``[..., environments, size]``."""
    return vectors.var(-2, correction=0).sum(-1) * vectors.shape[-2]


def contrasts(counts: Sequence[int]) -> list[list[float]]:
    """Matrix C ``[environments − 1, environments]`` with Σ_e ‖v_e − mean v‖² = ‖C s‖².

    s_e = counts_e · v_e is the sum over an environment. Row k of Helmert's orthonormal contrasts
    compares environment k with the mean of those before it: one product less than environments,
    and no mean to take off.
    """
    rows = []
    for k in range(1, len(counts)):
        row = [1.0] * k + [-float(k)] + [0.0] * (len(counts) - k - 1)
        norm = math.sqrt(k * (k + 1))
        rows.append([entry / (norm * count) for entry, count in zip(row, counts, strict=True)])
    return rows


def _by_blocks(features: Tensor, residual: Tensor, rows: Sequence[Tensor], power: int) -> Tensor:
    """For many runs: each environment's product with its own features only."""
    moments = []
    for i in rows:
        weights = residual[..., i].pow(power) / len(i)
        by_weight = weights @ features[..., i, :].pow(power)
        moments.append(torch.cat([by_weight.flatten(-2), weights.sum(-1)], -1))
    return spread(torch.stack(moments, -2))


class _Powers:
    """φ^power in blocks of rows. Squares are made anew on every pass, unless they are one block."""

    def __init__(self, phi: Tensor, power: int) -> None:
        size = _BLOCK_CPU if phi.device.type == "cpu" else _BLOCK_ACCELERATOR
        self._whole: Tensor | None = phi if power == 1 else None
        if power == 2 and phi.numel() <= size:
            self._whole = phi * phi
        self._phi, self._rows = phi, max(1, size * phi.shape[-2] // max(phi.numel(), 1))

    def __iter__(self) -> Iterator[Tensor]:
        blocks = self._phi.split(self._rows, -2)
        room = torch.empty_like(blocks[0])
        for block in blocks:
            yield torch.mul(block, block, out=room[..., : block.shape[-2], :])

    def rows_by(self, weights: Tensor) -> Tensor:
        """weights @ φ^power."""
        if self._whole is not None:
            return weights @ self._whole
        pairs = zip(weights.split(self._rows, -1), self, strict=True)
        return functools.reduce(Tensor.add_, (part @ block for part, block in pairs))

    def columns_by(self, u: Tensor) -> Tensor:
        """u @ (φ^power)ᵀ."""
        if self._whole is not None:
            return u @ self._whole.mT
        return torch.cat([u @ block.mT for block in self], -1)


class _Spread(torch.autograd.Function):
    """The same with its gradient written out: one node, and nothing of size n × h kept for it.

    With w = residual^power, f = φ^power and c_ki the contrast k of the environment of example i:
    u_k = Σ_i c_ki w_i ⊗ (f_i, 1), P = Σ_k ‖u_k‖², ∂P/∂w_i = 2 Σ_k c_ki ⟨u_k, (f_i, 1)⟩ and
    ∂P/∂f_i = 2 Σ_k c_ki w_i u_k.
    """

    @staticmethod
    def forward(
        ctx: Any, phi: Tensor, z: Tensor, target: Tensor, table: Tensor, power: int
    ) -> Tensor:
        p = Part(z, target).probability()
        residual = p - target
        w = residual * residual if power == 2 else residual
        k, c = len(table), z.shape[-2]
        if k == 1:  # two environments
            weights = w * table
        else:
            table = table.unsqueeze(-2)
            weights = (w.unsqueeze(-3) * table).flatten(-3, -2)  # [..., k c, n]
        features = _Powers(phi, power)
        u, b = features.rows_by(weights), weights.sum(-1, keepdim=True)
        by_z = None
        if ctx.needs_input_grad[1]:
            by_w = features.columns_by(u).add_(b)
            by_w = by_w * table if k == 1 else (by_w.unflatten(-2, (k, c)) * table).sum(-3)
            by_z = through_link(p, by_w * residual if power == 2 else by_w).mul_(2 * power)
        ctx.power = power
        ctx.save_for_backward(by_z, *((phi, weights, u) if ctx.needs_input_grad[0] else ()))
        both = torch.cat([u, b], -1)
        return (both * both).sum((-2, -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore
        grad = grad_outputs[0][..., None, None]
        by_z, *kept = ctx.saved_tensors
        by_phi = None
        if kept:
            phi, weights, u = kept
            weights = grad * weights
            if phi.ndim == 2:  # shared by the runs
                weights, u = weights.flatten(0, -2), u.flatten(0, -2)
            by_phi = 2 * (weights.mT @ u)
            if ctx.power == 2:
                by_phi *= 2 * phi
        return by_phi, None if by_z is None else grad * by_z, None, None, None

"""Training of a chunk of permutation networks at once, in place: descent, or the exact solve.

Weights as in :class:`stiefel.theory.PermutationEnsemble`: ``hidden`` is W₁ᵀ/√k and ``readout`` W₂,
both ``[n, k, m]`` for n members; ``targets`` ``[k, k]`` has the target of basis vector i as row i.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Every output of every member this close to its target: training stops.
TRAINED = 3e-7


def descend(
    hidden: Float[Tensor, "n k m"],
    readout: Float[Tensor, "n k m"],
    targets: Float[Tensor, "k k"],
    steps: int,
    lr: float,
) -> float:
    """Gradient descent on both layers of a chunk of members, in place; the last largest error.

    Shapes: ``hidden`` and ``readout`` ``[n, k, m]``, ``targets`` ``[k, k]``. Stops early at 3e-7.
    """
    members, k, width = hidden.shape
    scale = 1 / math.sqrt(width)
    wanted = -targets.expand(members, k, k)
    active, back = torch.empty_like(hidden), torch.empty_like(hidden)
    largest = math.inf
    for _ in range(steps):
        torch.clamp(hidden, min=0, out=active)
        error = torch.baddbmm(wanted, active, readout.mT, alpha=scale)
        largest = float(error.abs().max())
        if largest <= TRAINED or not math.isfinite(largest):
            break
        torch.bmm(error, readout, out=back)
        readout.baddbmm_(error.mT, active, alpha=-lr * scale)
        # relu's own backward kernel, in place: 30 × faster than masked_fill_ on a CPU.
        torch.ops.aten.threshold_backward.grad_input(back, hidden, 0, grad_input=back)
        # hidden is W₁ᵀ/√k: one √k from the gradient, one from the scaling.
        hidden.add_(back, alpha=-lr * scale / k)
    return largest


def solve(
    hidden: Float[Tensor, "n k m"],
    readout: Float[Tensor, "n k m"],
    targets: Float[Tensor, "k k"],
    steps: int,
    lr: float | None,
) -> float:
    """What gradient descent on W₂ gives: after ``steps`` of size ``lr``, or in the limit (None).

    In place, shapes as in :func:`descend`. With features R = relu(hidden) and the Gram matrix
    G = R Rᵀ/m the limit is W₂ += (Y − f₀) R⁺; residuals shrink by (1 − lr λ) a step along each
    eigenvector of G. Returns the largest error left (0 stands for converged up to rounding).
    """
    scale = 1 / math.sqrt(hidden.shape[-1])
    active = hidden.clamp_min(0)
    gram = torch.bmm(active, active.mT).double() * scale**2

    def move(coefficients: Tensor) -> None:
        readout.baddbmm_(coefficients.to(readout.dtype).mT, active, alpha=scale)

    def missing() -> Tensor:
        return (targets - torch.bmm(active, readout.mT) * scale).double()

    if lr is not None:
        values, vectors = torch.linalg.eigh(gram)
        # (1 − (1 − lr λ)^steps)/λ, and its limit where λ is 0 up to rounding.
        zero = values <= torch.finfo(readout.dtype).eps * values[..., -1:]
        grown = torch.where(zero, steps * lr, (1 - (1 - lr * values) ** steps) / values)
        move(vectors @ (grown.unsqueeze(-1) * (vectors.mT @ missing())))
    else:
        factor, info = torch.linalg.cholesky_ex(gram)
        if bool(info.any()):
            raise ValueError(
                f"width {hidden.shape[-1]} is too small for k = {hidden.shape[-2]}: the hidden "
                "features of the training inputs are linearly dependent in a member"
            )
        for _ in range(2):  # the second pass removes the rounding of the first
            move(torch.cholesky_solve(missing(), factor))
    return float(missing().abs().max())

"""How faithfully a network passes signals from end to end: the spectrum of its Jacobian."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Sheet, check D: singular values at least this part of the largest count as kept.
_KEPT = 0.1
# Rows of a Jacobian that are computed at one time.
_CHUNK = 512


class JacobianSpectrum(NamedTuple):
    """Result of :func:`jacobian_spectrum`."""

    singular_values: Float[Tensor, "*batch k"]
    """Largest first."""
    isometry: Float[Tensor, "*batch"]
    """Share of singular values that are at least a tenth of the largest: 1 for an isometry."""


def jacobian_spectrum(model: nn.Module, x: Float[Tensor, ...]) -> JacobianSpectrum:
    """Singular values of ∂model(x)/∂x and how near they are to one another.

    Dynamical isometry: gradients reach the first layer about as long as they leave the last. Deep
    orthogonal networks have it at the edge of chaos; with Gaussian weights a few directions take
    everything (100 tanh layers, width 200: 0.8 against 0.03).

    Args:
        model: Takes a batch of inputs. Examples must not influence one another (batch
            normalisation in training mode does that). Its parameters get no gradients.
        x: One input ``[n]``, or a batch ``[B, ...]``, one spectrum each.

    Returns:
        ``(singular_values, isometry)`` with shapes ``[k]`` and ``[]``, or ``[B, k]`` and ``[B]``;
        k is the smaller of the numbers of inputs and outputs of one example.

    Raises:
        TypeError: ``x`` is not real floating point.
        ValueError: ``x`` has no dimensions, or the Jacobian is not finite.

    Source: arXiv 1312.6120, section 4 and figure 7.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be real floating point, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("x must be one input [n] or a batch [B, ...], got a number")
    constants = {
        name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())
    }

    def outputs(example: Tensor) -> Tensor:
        result = torch.func.functional_call(model, constants, (example[None],))
        return result[0].flatten()

    examples = x.detach()[None] if x.ndim == 1 else x.detach()
    jacobian = torch.func.jacrev(outputs, chunk_size=_CHUNK)
    values = torch.stack([_singular_values(jacobian(example)) for example in examples])
    largest = values[:, :1]
    kept = ((values >= _KEPT * largest) & (largest > 0)).to(values.dtype).mean(-1)
    return JacobianSpectrum(values[0], kept[0]) if x.ndim == 1 else JacobianSpectrum(values, kept)


def _singular_values(jacobian: Tensor) -> Tensor:
    matrix = jacobian.flatten(1)
    matrix = matrix if matrix.dtype is torch.float64 else matrix.float()
    if not bool(matrix.isfinite().all()):
        raise ValueError("the Jacobian of the model at x holds NaN or infinity")
    return torch.linalg.svdvals(matrix)

"""Kernels of an infinitely wide ReLU network with one hidden layer and no biases.

The network is f(x) = (1/√m) W₂ relu((1/√k) W₁ x) with standard normal weights, m → ∞. With ρ the
cosine between two inputs and φ = arccos ρ (arXiv 2502.16763; the arc-cosine kernels of Cho and
Saul, 2009):

* NNGP, the covariance of the outputs at the start and the kernel of training W₂ alone:
  K = ‖x‖‖z‖/k · [sin φ + (π − φ) ρ] / (2π)
* NTK, the kernel of training both layers: Θ = K + ‖x‖‖z‖/k · ρ (π − φ) / (2π)
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import check_finite, check_matrix, compute_dtype

KINDS = ("ntk", "nngp")
# |ρ| from which arccos would lose digits: 1/sin φ is 7 here.
NEARLY_PARALLEL = 0.99


def ntk_relu(
    X: Float[Tensor, "*batch n k"],
    Z: Float[Tensor, "*others m d"] | None = None,
    *,
    kind: str = "ntk",
) -> Float[Tensor, "*both n m"]:
    """Kernel matrix ``[..., n, m]`` of a wide two-layer ReLU network between rows of X and Z.

    Where inputs are nearly parallel the angle comes from the lengths of x̂ − ẑ and x̂ + ẑ, not from
    a rounded cosine, so that the NTK keeps full accuracy there (arccos would halve the digits).

    Differentiable once; where two inputs are parallel, the kink of the NTK gets the derivative 0.
    float16 and bfloat16 are computed in float32. A zero row gives zeros.

    Args:
        X: inputs, one a row.
        Z: other inputs with as many columns; None means X itself.
        kind: ``"ntk"`` (both layers trained) or ``"nngp"`` (output covariance; last layer trained).

    Raises:
        TypeError: X or Z is not real floating point, or their dtypes differ.
        ValueError: ``kind`` is unknown, the column counts differ or are 0, an entry is not finite,
            or the kernel overflows its dtype.

    Source: arXiv 2502.16763, NTK parametrisation of its network.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    other = X if Z is None else Z
    for name, x in (("X", X), ("Z", other)):
        check_matrix(x, name)
        check_finite(x, name)
    if X.shape[-1] != other.shape[-1] or X.shape[-1] == 0:
        raise ValueError(
            f"X and Z must have one number of columns, at least 1; got shapes {tuple(X.shape)} and "
            f"{tuple(other.shape)}"
        )
    if X.dtype != other.dtype:
        raise TypeError(f"X is {X.dtype} but Z is {other.dtype}")
    work = compute_dtype(X.dtype)
    x, x_length = _directions(X.to(work))
    z, z_length = _directions(other.to(work))
    apart, together = _half_angles(x, z)
    rest = 2 * torch.atan2(together, apart)  # π − φ
    rho = together.square() - apart.square()
    shape = 2 * apart * together + rest * rho  # sin φ + (π − φ) ρ
    if kind == "ntk":
        shape = shape + rest * rho
    # Lengths last and one at a time: their product may overflow where the kernel does not.
    kernel = x_length * (shape / (2 * math.pi * X.shape[-1])) * z_length.mT
    kernel = kernel.to(X.dtype)
    if not bool(kernel.detach().isfinite().all()):
        raise ValueError(
            f"the kernel overflows {X.dtype}: rows are up to {float(x_length.max()):.1e} and "
            f"{float(z_length.max()):.1e} long. Scale the inputs or use float64"
        )
    return kernel


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows and lengths ``[..., n, 1]``; a zero row stays zero."""
    # The largest entry first, so that no square overflows or vanishes.
    largest = x.detach().abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    length = torch.linalg.vector_norm(x / largest, dim=-1, keepdim=True)
    unit = x / largest / torch.where(length > 0, length, 1.0)
    return unit, length * largest


def _half_angles(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """sin(φ/2) and cos(φ/2) between unit rows, each accurate relative to its own size."""
    rho = x @ z.mT
    near = rho.detach().abs() > NEARLY_PARALLEL
    found = int(near.sum())
    if found > 4 * sum(rho.shape[-2:]) * math.prod(rho.shape[:-2]):
        # Too many pairs to gather. The default mode would take a matrix product again.
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(x, z, compute_mode=exact) / 2, torch.cdist(x, -z, compute_mode=exact) / 2
    # A square root of 0 would send NaN into the gradient although its value is not used.
    safe = torch.where(near, 0.0, rho)
    apart, together = ((1 - safe) / 2).sqrt(), ((1 + safe) / 2).sqrt()
    if found:
        place = near.nonzero(as_tuple=True)
        *batch, row, column = place
        a = x.expand(*rho.shape[:-2], *x.shape[-2:])[(*batch, row)]
        b = z.expand(*rho.shape[:-2], *z.shape[-2:])[(*batch, column)]
        apart = apart.index_put(place, torch.linalg.vector_norm(a - b, dim=-1) / 2)
        together = together.index_put(place, torch.linalg.vector_norm(a + b, dim=-1) / 2)
    return apart, together

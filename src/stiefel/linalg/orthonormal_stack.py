"""Many Haar-distributed matrices at once, from reflections instead of factorisations."""

from __future__ import annotations

import operator

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import compute_dtype


def orthonormal_stack(
    count: int,
    n: int,
    m: int,
    *,
    haar: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "count n m"]:
    """Independent random ``[n, m]`` matrices: orthonormal columns if n ≥ m, else rows.

    The QR factorisation of a Gaussian matrix meets, in column k, a fresh Gaussian vector of the
    n − k coordinates that are left: reflections before it do not change its distribution. So the
    reflectors can be drawn instead of found, and only the product H₁H₂…Hₘ is computed: half the
    work, and none of the slow half.

    Args:
        count: How many, ≥ 0.
        n: Rows, ≥ 0.
        m: Columns, ≥ 0.
        haar: Give R's diagonal, which is known without R, the sign that makes the distribution
            uniform. False leaves the signs as LAPACK's QR does: orthonormal, not uniform.
        generator: Of the numbers; also gives the device if ``device`` is None.
        dtype: torch's default if None. Half types are computed in float32.
        device: Where they are made.

    Raises:
        ValueError: a negative size.
        TypeError: a size is not an integer, ``dtype`` not real floating point.

    Source: Stewart, "The efficient generation of random orthogonal matrices", SIAM J. Numer. Anal.
    17 (1980); the signs as in Mezzadri, Notices of the AMS 54 (2007).
    """
    count, n, m = operator.index(count), operator.index(n), operator.index(m)
    if min(count, n, m) < 0:
        raise ValueError(f"count, n and m must be at least 0, got {count}, {n} and {m}")
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be real floating point, got {dtype}")
    if device is None and generator is not None:
        device = generator.device
    size = (count, min(n, m), max(n, m))
    x = torch.randn(size, generator=generator, dtype=compute_dtype(dtype), device=device)
    # Row k holds column k's Gaussian vector, of the coordinates from k on: LAPACK's own order.
    x.triu_()
    first = x.diagonal(dim1=-2, dim2=-1).clone()
    norm = torch.linalg.vector_norm(x, dim=-1)
    sign = torch.where(first < 0, -1.0, 1.0).to(x.dtype)
    # LAPACK's reflector I − τ v vᵀ with v₁ = 1 takes the vector to −sign·norm·e₁. A vector of
    # zeros (a lone coordinate can be exactly 0) needs no reflection.
    tau = torch.where(norm > 0, 1 + first.abs() / torch.where(norm > 0, norm, 1.0), 0.0)
    x /= torch.where(norm > 0, first + sign * norm, 1.0).unsqueeze(-1)
    q = torch.linalg.householder_product(x.mT, tau)
    if haar:
        q *= -sign.unsqueeze(-2)
    q = q.to(dtype)
    # The transpose of a square one has the same distribution, and contiguous rows.
    return q if n > m else q.mT

"""Eigenvectors of uniform 1-D operators, as tables and as fast transforms along one axis.

Each basis V is real and orthonormal. With θ_k the angle of mode k, and rows i counted from 0:

    dst      Dirichlet            √(2/(n+1)) sin((i+1)(k+1)π/(n+1))        θ = (k+1)π/(n+1)
    dct      Neumann              √(2/n) cos((i+1/2)kπ/n), k = 0 by 1/√2   θ = kπ/n
    hartley  periodic             (cos + sin)(2πik/n)/√n                   θ = 2πk/n
    mixed    Dirichlet–Neumann    2/√(2n+1) sin((i+1)(2k+1)π/(2n+1))       θ = (2k+1)π/(2n+1)

Fast transforms go through torch.fft: differentiable, on any device. On a CPU and with nothing
watching, SciPy's sine transform does the same without the doubled line.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stiefel.linalg import dct, dct_matrix
from stiefel.linalg.dct import _scipy_may_run
from stiefel.numerics.tensor_product.checks import DIRICHLET, NEUMANN, PERIODIC

# Sheet of arXiv 2606.25148: below this many points a GEMM is as fast as any transform …
TRANSFORM_FROM = 97
# … and so it is where the FFT's length has a large prime factor, unless the axis is long enough.
LARGEST_PRIME = 7
# Measured, one thread: a point costs the GEMM as much as the FFT at n = 100 + 3 p, p that factor.
BASE, PER_PRIME = 100, 3
BASES = {
    (DIRICHLET, DIRICHLET): "dst",
    (NEUMANN, NEUMANN): "dct",
    (PERIODIC, PERIODIC): "hartley",
    (DIRICHLET, NEUMANN): "mixed",
    (NEUMANN, DIRICHLET): "mixed-reversed",
}
FAST = ("dst", "dct", "hartley")


def angles(basis: str, n: int) -> Tensor:
    """θ_k, k = 0..n-1, in float64; eigenvalues are functions of cos θ."""
    k = torch.arange(n, dtype=torch.float64)
    if basis == "dst":
        return (k + 1) * (math.pi / (n + 1))
    if basis == "dct":
        return k * (math.pi / n)
    if basis == "hartley":
        return k * (2 * math.pi / n)
    return (2 * k + 1) * (math.pi / (2 * n + 1))


def basis_matrix(basis: str, n: int) -> Tensor:
    """V ``(n, n)`` in float64. Arguments are reduced as integers: no digits lost for large n."""
    if basis == "dct":
        return dct_matrix(n, dtype=torch.float64).mT.contiguous()
    i = torch.arange(n)[:, None]
    k = torch.arange(n)[None, :]
    if basis == "dst":
        return _sines((i + 1) * (k + 1), 2 * (n + 1)) * math.sqrt(2 / (n + 1))
    if basis == "hartley":
        turns = (i * k) % n
        angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
        return ((angle.cos() + angle.sin()) / math.sqrt(n))[turns]
    V = _sines((i + 1) * (2 * k + 1), 2 * (2 * n + 1)) * (2 / math.sqrt(2 * n + 1))
    return V if basis == "mixed" else V.flip(0)


def _sines(steps: Tensor, turn: int) -> Tensor:
    """sin(2π steps / turn) from a table of one turn."""
    table = torch.sin(torch.arange(turn, dtype=torch.float64) * (2 * math.pi / turn))
    return table[steps % turn]


def largest_prime(n: int) -> int:
    """Largest prime factor of n; 1 for 1."""
    largest, p = 1, 2
    while p * p <= n:
        while n % p == 0:
            largest, n = p, n // p
        p += 1
    return max(largest, n)


def transform_pays(basis: str | None, n: int) -> bool:
    """Whether a fast transform of this length beats a GEMM: the sheet's rule, and long axes."""
    if basis not in FAST or n < TRANSFORM_FROM:
        return False
    prime = largest_prime(n + 1 if basis == "dst" else n)
    return prime <= LARGEST_PRIME or n > BASE + PER_PRIME * prime


def transform(U: Tensor, dim: int, basis: str, *, inverse: bool) -> Tensor:
    """Vᵀ (or V if ``inverse``) times every line of ``U`` along ``dim``; real or complex."""
    if U.is_complex():
        parts = (transform(x.contiguous(), dim, basis, inverse=inverse) for x in (U.real, U.imag))
        return torch.complex(*parts)
    if basis == "dct":
        return dct(U, dim=dim, type=3 if inverse else 2)
    if basis == "hartley":
        return hartley(U, dim)
    return dst(U, dim)


def dst(U: Tensor, dim: int) -> Tensor:
    """Orthonormal DST-I along ``dim``; symmetric and its own inverse."""
    n = U.shape[dim]
    if _scipy_may_run(U):
        import scipy.fft

        return torch.from_numpy(
            scipy.fft.dst(
                U.detach().resolve_neg().numpy(),
                type=1,
                axis=dim,
                norm="ortho",
                workers=torch.get_num_threads(),
            )
        )
    zero = torch.zeros_like(U.narrow(dim, 0, 1))
    odd = torch.cat([zero, U, zero, -U.flip(dim)], dim)
    spectrum = torch.fft.rfft(odd, dim=dim)
    del odd
    return spectrum.imag.narrow(dim, 1, n) * (-1 / math.sqrt(2 * (n + 1)))


def hartley(U: Tensor, dim: int) -> Tensor:
    """Orthonormal discrete Hartley transform along ``dim``; symmetric and its own inverse.

    It diagonalises every symmetric circulant matrix, and keeps a real field real.
    """
    n = U.shape[dim]
    z = torch.fft.rfft(U, dim=dim, norm="ortho")
    front = z.real - z.imag
    # X_{n-k} is the conjugate of X_k.
    back = (z.real + z.imag).narrow(dim, 1, n - 1 - n // 2).flip(dim)
    return torch.cat([front, back], dim)

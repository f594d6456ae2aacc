"""The HiPPO-LegS matrix, its normal part, and transfer functions of diagonal systems.

    A[n, k] = -√(2n+1) √(2k+1) (n > k),  -(n+1) (n = k),  0 (n < k);   B[n] = √(2n+1)

A itself is so far from normal that its eigenvectors are useless (condition number 10¹¹ at order
16). Adding P Pᵀ with P = B/√2 leaves -I/2 plus a skew matrix, which is normal: S4D starts there.

Sources: Gu et al., arXiv 2206.11893 (S4D), section 4; Gu et al., arXiv 2008.07669 (HiPPO).
"""

from __future__ import annotations

import math
import operator

import torch
from jaxtyping import Complex, Complex128, Float, Float64
from torch import Tensor


def hippo_legs(n: int) -> tuple[Float64[Tensor, "n n"], Float64[Tensor, " n"]]:
    """HiPPO-LegS of order ``n``: the state matrix ``[n, n]`` and the input vector ``[n]``, float64.

    Raises:
        ValueError: ``n`` is less than 1.
        TypeError: ``n`` is not an integer.
    """
    n = _check_order(n)
    index = torch.arange(n, dtype=torch.float64)
    b = (2 * index + 1).sqrt()
    a = -torch.outer(b, b).tril(-1) - torch.diag(index + 1)
    return a, b


def legs_normal(
    n: int,
) -> tuple[Complex128[Tensor, " n"], Complex128[Tensor, "n n"], Float64[Tensor, " n"]]:
    """Spectral decomposition of the normal matrix A_LegS + P Pᵀ = V diag(λ) V*.

    Returns:
        λ ``[n]`` by increasing imaginary part, every real part exactly -1/2; V ``[n, n]`` unitary,
        the first entry of each column positive (an eigenvector's phase is otherwise arbitrary);
        P ``[n]``. Computed in float64 by the Hermitian eigenproblem of -i (A + P Pᵀ + I/2).

    Raises:
        ValueError: ``n`` is less than 1.
        TypeError: ``n`` is not an integer.
    """
    n = _check_order(n)
    a, b = hippo_legs(n)
    p = b / math.sqrt(2)
    skew = a + torch.outer(p, p) + torch.eye(n, dtype=torch.float64) / 2
    imaginary, v = torch.linalg.eigh(-1j * (skew - skew.mT) / 2)
    # Never zero: row 0 of the eigenproblem reads P_0 (P·v) = (λ + 1) v_0. With v_0 = 0 also
    # P·v = 0, so v would be an eigenvector of A; but A has eigenvalues -1, …, -n, not -1/2 + iω.
    v = v * (v[0].conj() / v[0].abs())
    return torch.complex(torch.full_like(imaginary, -0.5), imaginary), v, p


def transfer_function(
    a: Complex[Tensor, " n"],
    b: Complex[Tensor, " n"],
    c: Complex[Tensor, " n"],
    omega: Float[Tensor, "*points"],
    weights: Float[Tensor, " n"] | None = None,
) -> Complex[Tensor, "*points"]:
    """G(iω) of the real system x' = A x + B u, y = Σ w Re(C x) with diagonal A.

        G(iω) = Σ_n (w_n/2) [C_n B_n/(iω - A_n) + conj(C_n B_n)/(iω - conj A_n)]

    Args:
        a, b, c: ``[n]`` complex. One of each conjugate pair is stored, so
        weights: ``[n]`` is 2 by default; 1 for a real eigenvalue that stands for itself, and for
            every entry where the full spectrum is given.
        omega: angular frequencies in radians per unit of time, any shape.

    Raises:
        ValueError: NaN or infinities, or a pole lies exactly at a frequency asked for.
    """
    for name, x in (("a", a), ("b", b), ("c", c), ("omega", omega)):
        if not bool(x.detach().isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    half = 1.0 if weights is None else weights / 2
    s = 1j * omega[..., None]
    below, above = s - a, s - a.conj()
    if bool(((below == 0) | (above == 0)).any()):
        raise ValueError("omega holds the imaginary part of a pole on the axis: no value there")
    residue = c * b
    return (half * (residue / below + residue.conj() / above)).sum(-1)


def _check_order(n: int) -> int:
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return n

"""(A ⊗ B ⊗ C) vec(U), one axis after the other, without the big matrix.

U has shape (*batch, nx, ny, nz) in C order (axis 0 slowest); vec(U) = U.reshape(-1), and A ⊗ B ⊗ C
is kron(A, kron(B, C)): A acts on axis 0, B on axis 1, C on axis 2. arXiv 2606.25148.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Num
from torch import Tensor

from stiefel.numerics.tensor_product.checks import check_field, check_matrix, real_dtype

MAX_AXES = 4


def apply_along(A: Tensor, U: Tensor, dim: int) -> Tensor:
    """A times every line of ``U`` along ``dim`` (from the front), one (batched) GEMM; unchecked.

    Every other axis is a right-hand side. A real matrix on a complex field works on the real and
    the imaginary part: half the multiplications of a complex one.
    """
    if U.is_complex() and not A.is_complex():
        return torch.complex(apply_along(A, U.real, dim), apply_along(A, U.imag, dim))
    if A.is_complex() and not U.is_complex():
        return torch.complex(apply_along(A.real, U, dim), apply_along(A.imag, U, dim))
    shape = U.shape
    m, n = A.shape
    before, after = shape[:dim], shape[dim + 1 :]
    if not after:
        return (U.reshape(-1, n) @ A.mT).reshape(*before, m)
    rest = math.prod(after)
    if math.prod(before) == 1:
        return (A @ U.reshape(n, rest)).reshape(*before, m, *after)
    lines = U.reshape(-1, n, rest)
    out = torch.bmm(A.expand(lines.shape[0], m, n), lines)
    return out.reshape(*before, m, *after)


def apply_axes(mats: Sequence[Tensor | None], U: Tensor) -> Tensor:
    """:func:`axis_apply` without its checks."""
    d = len(mats)
    todo = [(axis, A) for axis, A in enumerate(mats) if A is not None]
    # Axes that shrink go first, those that grow last: less work for the others.
    todo.sort(key=lambda pair: pair[1].shape[0] / pair[1].shape[1])
    for axis, A in todo:
        U = apply_along(A, U, U.ndim - d + axis)
    return U


def axis_apply(
    mats: Sequence[Num[Tensor, ...] | None], U: Num[Tensor, "*grid"]
) -> Num[Tensor, "*mapped"]:
    """(A_1 ⊗ … ⊗ A_d) applied to a field, axis by axis: N (m_1 + … + m_d) multiplications.

    Args:
        mats: For each of the d grid axes a matrix ``(m_i, n_i)``; None is the identity.
        U: Field ``(*batch, n_1, …, n_d)``; axes before the last d are a batch.

    Returns:
        ``(*batch, m_1, …, m_d)``; complex if any of them is. Differentiable in ``U`` and ``mats``.

    Raises:
        ValueError: no or more than four matrices, sizes that do not fit (names the axis), NaN.
        TypeError: integers or half precision; precisions that differ.

    Source: arXiv 2606.25148, Kronecker identities and reshapes for many right-hand sides.
    """
    if not 1 <= len(mats) <= MAX_AXES:
        raise ValueError(f"mats must have 1 to {MAX_AXES} entries, one per axis, got {len(mats)}")
    d = len(mats)
    sizes = []
    for axis, A in enumerate(mats):
        if A is None:
            sizes.append(U.shape[U.ndim - d + axis] if U.ndim >= d else 1)
            continue
        check_matrix(A, f"mats[{axis}]")
        if real_dtype(A.dtype) != real_dtype(U.dtype):
            raise TypeError(
                f"mats[{axis}] is {A.dtype} but U is {U.dtype}: convert one to the precision of "
                "the other"
            )
        sizes.append(A.shape[1])
    check_field(U, sizes)
    return apply_axes(mats, U)

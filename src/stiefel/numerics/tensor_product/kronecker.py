"""Kronecker products and sums of small matrices as operators on fields (arXiv 2606.25148).

KroneckerOperator  A ⊗ B ⊗ C
KroneckerSum       A ⊗ I ⊗ I + I ⊗ B ⊗ I + I ⊗ I ⊗ C
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Num, Shaped
from torch import Tensor

from stiefel.numerics.tensor_product.axis_apply import MAX_AXES, apply_along, apply_axes
from stiefel.numerics.tensor_product.checks import (
    SingularOperatorError,
    check_field,
    check_matrix,
    is_symmetric,
    real_dtype,
)
from stiefel.numerics.tensor_product.scipy_operator import linear_operator

DENSE_LIMIT = 4096
# Sheet: a denominator below this part of the largest one is none.
SINGULAR_TOLERANCE = 1e-12
# Condition of a non-symmetric factor's eigenvectors: they cost so many digits.
CONDITION_LIMIT = 1e8


class _Factors:
    """Matrices, one per grid axis, and what products and sums of them have in common."""

    def __init__(self, factors: Sequence[Num[Tensor, ...]], *, square: bool = False) -> None:
        if not 1 <= len(factors) <= MAX_AXES:
            raise ValueError(f"factors must be 1 to {MAX_AXES} matrices, got {len(factors)}")
        for axis, A in enumerate(factors):
            check_matrix(A, f"factors[{axis}]", square=square)
            if real_dtype(A.dtype) != real_dtype(factors[0].dtype) or A.device != factors[0].device:
                raise TypeError(
                    f"factors[{axis}] is {A.dtype} on {A.device} but factors[0] is "
                    f"{factors[0].dtype} on {factors[0].device}"
                )
        self.factors: tuple[Tensor, ...] = tuple(factors)
        self.outputs = tuple(A.shape[0] for A in factors)
        """Shape of the fields that come out."""
        self.inputs = tuple(A.shape[1] for A in factors)
        """Shape of the fields that go in."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that is never formed."""
        return math.prod(self.outputs), math.prod(self.inputs)

    @property
    def dtype(self) -> torch.dtype:
        """Of what comes out for a real field."""
        return reduce(torch.promote_types, (A.dtype for A in self.factors))

    def _check(self, U: Tensor, sizes: Sequence[int], name: str) -> None:
        if real_dtype(U.dtype) != real_dtype(self.dtype):
            raise TypeError(f"{name} is {U.dtype} but the factors are {self.dtype}")
        check_field(U, sizes, name)

    def _check_square(self, what: str) -> None:
        for axis, A in enumerate(self.factors):
            if A.shape[0] != A.shape[1]:
                raise ValueError(
                    f"{what} needs square factors, factors[{axis}] is {tuple(A.shape)}"
                )

    def _check_dense(self) -> None:
        if max(self.shape) > DENSE_LIMIT:
            raise ValueError(
                f"the dense matrix would be {self.shape[0]} x {self.shape[1]}, more than "
                f"{DENSE_LIMIT} is refused: use matmul, or as_scipy_linear_operator()"
            )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{m} x {n}" for m, n in zip(self.outputs, self.inputs, strict=True))
        return f"{type(self).__name__}({sizes}, {self.dtype})"


class KroneckerOperator(_Factors):
    """A_1 ⊗ … ⊗ A_d on fields ``(*batch, n_1, …, n_d)``.

    Args:
        factors: 1 to 4 matrices ``(m_i, n_i)`` of one precision.

    Raises:
        ValueError: no factors or too many, not matrices, NaN.
        TypeError: integers, half precision, precisions or devices that differ.

    Source: arXiv 2606.25148, Kronecker identities.
    """

    def __init__(self, factors: Sequence[Num[Tensor, ...]]) -> None:
        super().__init__(factors)

    def matmul(self, U: Num[Tensor, "*grid"]) -> Num[Tensor, "*mapped"]:
        """The operator on a field: ``(*batch, *inputs)`` to ``(*batch, *outputs)``.

        Raises:
            ValueError: sizes that do not fit (names the axis), NaN.
            TypeError: another precision.
        """
        self._check(U, self.inputs, "U")
        return apply_axes(self.factors, U)

    def __matmul__(self, other: Any) -> Any:
        """``op @ U`` is ``op.matmul(U)``; (A ⊗ B) @ (C ⊗ D) = AC ⊗ BD."""
        if not isinstance(other, KroneckerOperator):
            return self.matmul(other)
        if self.inputs != other.outputs:
            raise ValueError(f"factors do not fit: {self.inputs} columns, {other.outputs} rows")
        return KroneckerOperator([A @ C for A, C in zip(self.factors, other.factors, strict=True)])

    @property
    def T(self) -> KroneckerOperator:
        """(A ⊗ B)ᵀ = Aᵀ ⊗ Bᵀ, not conjugated."""
        return KroneckerOperator([A.mT for A in self.factors])

    def solve(self, F: Num[Tensor, "*grid"]) -> Num[Tensor, "*grid"]:
        """(A ⊗ B ⊗ C)⁻¹ F = (A⁻¹ ⊗ B⁻¹ ⊗ C⁻¹) F, axis by axis. Differentiable in both.

        Raises:
            ValueError: factors that are not square, sizes that do not fit, NaN.
            SingularOperatorError: a singular factor; names its axis.
        """
        self._check_square("solve")
        self._check(F, self.outputs, "F")
        d = len(self.factors)
        for axis, A in enumerate(self.factors):
            dtype = torch.promote_types(A.dtype, F.dtype)
            lines = F.to(dtype).movedim(F.ndim - d + axis, 0)
            X, info = torch.linalg.solve_ex(A.to(dtype), lines.reshape(lines.shape[0], -1))
            if not torch.compiler.is_compiling() and int(info):
                raise SingularOperatorError(f"factors[{axis}] is singular")
            F = X.reshape(lines.shape).movedim(0, F.ndim - d + axis)
        return F.contiguous()

    def to_dense(self) -> Num[Tensor, "rows columns"]:
        """kron(A, kron(B, C)).

        Raises:
            ValueError: more than 4096 rows or columns.
        """
        self._check_dense()
        return reduce(torch.kron, self.factors)

    def diagonal(self) -> Num[Tensor, " rows"]:
        """Of the dense matrix, which is not formed.

        Raises:
            ValueError: factors that are not square.
        """
        self._check_square("diagonal")
        return reduce(torch.kron, (A.diagonal() for A in self.factors))

    def as_scipy_linear_operator(self) -> Any:
        """``scipy.sparse.linalg.LinearOperator`` on vec(U), NumPy arrays in and out."""
        factors = [A.detach() for A in self.factors]
        adjoint = [A.mH for A in factors]
        return linear_operator(
            lambda U: apply_axes(factors, U),
            lambda U: apply_axes(adjoint, U),
            self.outputs,
            self.inputs,
            self.dtype,
            factors[0].device,
        )


class KroneckerSum(_Factors):
    """A_1 ⊗ I ⊗ … + I ⊗ A_2 ⊗ … + … on fields ``(*batch, n_1, …, n_d)``.

    Args:
        factors: 1 to 4 square matrices ``(n_i, n_i)`` of one precision; symmetric (Hermitian) or
            not.

    Raises:
        ValueError: no factors or too many, not square, NaN.
        TypeError: integers, half precision, precisions or devices that differ.

    Source: arXiv 2606.25148, Kronecker sum and fast diagonalisation.
    """

    def __init__(self, factors: Sequence[Num[Tensor, ...]]) -> None:
        super().__init__(factors, square=True)
        self._modes: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def matmul(self, U: Num[Tensor, "*grid"]) -> Num[Tensor, "*grid"]:
        """The operator on a field ``(*batch, *inputs)``.

        Raises:
            ValueError: sizes that do not fit (names the axis), NaN.
            TypeError: another precision.
        """
        self._check(U, self.inputs, "U")
        return _sum_along(self.factors, U)

    def __matmul__(self, U: Any) -> Any:
        """``op @ U`` is ``op.matmul(U)``."""
        return self.matmul(U)

    @property
    def T(self) -> KroneckerSum:
        """The sum of the transposed factors, not conjugated."""
        return KroneckerSum([A.mT for A in self.factors])

    def solve(self, F: Num[Tensor, "*grid"]) -> Num[Tensor, "*grid"]:
        """Direct solution by fast diagonalisation: A_i = S_i Λ_i S_i⁻¹, one division per mode.

        Differentiable once in ``F`` and in the factors, whose eigenvectors are not differentiated.
        They are computed at the first call: change no factor in place afterwards.

        Raises:
            ValueError: sizes that do not fit, NaN; eigenvectors of a non-symmetric factor that are
                too close to dependent (condition above 1e8).
            SingularOperatorError: eigenvalues that add up to zero, within 1e-12 of the largest sum.
        """
        self._check(F, self.inputs, "F")
        U = self._invert(F)
        if torch.is_grad_enabled() and any(A.requires_grad for A in self.factors):
            # U = L⁻¹F, dU = L⁻¹(dF - dL U): a term of value zero carries dL.
            moved = _sum_along(self.factors, U.detach())
            U = self._invert(F - (moved - moved.detach()))
        return U

    def _diagonalize(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Eigenvalues, S and S⁻¹ of every factor, once; refuses a singular sum."""
        if self._modes is None:
            modes = [_eigen(A.detach(), axis) for axis, A in enumerate(self.factors)]
            sizes = _outer_sum([eigenvalues for eigenvalues, _, _ in modes]).abs()
            smallest, largest = float(sizes.min()), float(sizes.max())
            if not smallest > SINGULAR_TOLERANCE * largest:
                raise SingularOperatorError(
                    f"the Kronecker sum is singular: its eigenvalues are between {smallest:.1e} "
                    f"and {largest:.1e} in size"
                )
            self._modes = modes
        return self._modes

    def _invert(self, F: Tensor) -> Tensor:
        modes, d = self._diagonalize(), len(self.factors)
        hat = F
        for axis, (_, _, inverse) in enumerate(modes):
            hat = apply_along(inverse, hat, F.ndim - d + axis)
        hat = hat / _outer_sum([eigenvalues for eigenvalues, _, _ in modes])
        for axis, (_, S, _) in enumerate(modes):
            hat = apply_along(S, hat, F.ndim - d + axis)
        real = not F.is_complex() and not self.dtype.is_complex
        return hat.real if real and hat.is_complex() else hat

    def to_dense(self) -> Num[Tensor, "rows columns"]:
        """The assembled matrix.

        Raises:
            ValueError: more than 4096 rows.
        """
        self._check_dense()
        n = self.shape[0]
        eye = torch.eye(n, dtype=self.dtype, device=self.factors[0].device)
        return _sum_along(self.factors, eye.reshape(n, *self.inputs)).reshape(n, n).mT

    def diagonal(self) -> Num[Tensor, " rows"]:
        """Of the dense matrix, which is not formed."""
        diagonals = (A.diagonal() for A in self.factors)
        return reduce(lambda a, b: (a[:, None] + b).reshape(-1), diagonals)

    def as_scipy_linear_operator(self) -> Any:
        """``scipy.sparse.linalg.LinearOperator`` on vec(U), NumPy arrays in and out."""
        factors = [A.detach() for A in self.factors]
        adjoint = [A.mH for A in factors]
        return linear_operator(
            lambda U: _sum_along(factors, U),
            lambda U: _sum_along(adjoint, U),
            self.outputs,
            self.inputs,
            self.dtype,
            factors[0].device,
        )


def _outer_sum(parts: Sequence[Tensor]) -> Tensor:
    """x_i + y_j + …, one axis for each part."""
    return reduce(lambda a, b: a[..., None] + b, parts)


def _sum_along(factors: Sequence[Tensor], U: Tensor) -> Tensor:
    d = len(factors)
    out = apply_along(factors[0], U, U.ndim - d)
    for axis, A in enumerate(factors[1:], 1):
        out = out + apply_along(A, U, U.ndim - d + axis)
    return out


def _eigen(A: Shaped[Tensor, "n n"], axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors S and S⁻¹ of one factor."""
    if is_symmetric(A):
        eigenvalues, modes = torch.linalg.eigh(A)
        return eigenvalues, modes, modes.mH
    eigenvalues, modes = torch.linalg.eig(A)
    condition = float(torch.linalg.cond(modes))
    if not condition <= CONDITION_LIMIT:
        raise ValueError(
            f"factors[{axis}] is not symmetric and its eigenvectors are nearly dependent "
            f"(condition {condition:.1e}, at most {CONDITION_LIMIT:.0e}): it cannot be diagonalised"
        )
    return eigenvalues, modes, torch.linalg.inv(modes)

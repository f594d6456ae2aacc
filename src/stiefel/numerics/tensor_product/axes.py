"""One axis of a tensor grid: points, 1-D operator, and the modes that diagonalise it.

The 1-D problem is K S = M S Λ with Sᵀ M S = I; finite differences have M = I (arXiv 2606.25148).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.numerics.tensor_product.axis_apply import apply_along
from stiefel.numerics.tensor_product.transforms import basis_matrix


@dataclass(frozen=True)
class Stencil:
    """A tridiagonal operator, on a ring if ``wrap``: diagonal ``(n,)``, couplings ``(n-1,)``.

    ``uniform``: the one number that all couplings are; ends may still have another diagonal.
    """

    diagonal: Tensor
    coupling: Tensor
    wrap: float = 0.0
    uniform: float | None = None

    def dense(self) -> Tensor:
        """The matrix ``(n, n)``."""
        K = self.diagonal.diag()
        if len(self.coupling):
            K = K + self.coupling.diag(1) + self.coupling.diag(-1)
        if self.wrap:
            K[0, -1] += self.wrap
            K[-1, 0] += self.wrap
        return K

    def add_couplings(self, out: Tensor, U: Tensor, dim: int) -> None:
        """``out`` += (the matrix without its diagonal) U along ``dim``: O(N), in place."""
        n = U.shape[dim]
        if n > 1:
            low, high = (0, n - 1), (1, n - 1)
            for target, source in ((low, high), (high, low)):
                values = U.narrow(dim, *source)
                if self.uniform is not None:
                    out.narrow(dim, *target).add_(values, alpha=self.uniform)
                else:
                    out.narrow(dim, *target).add_(values * along(self.coupling, U, dim))
        if self.wrap:
            out.narrow(dim, 0, 1).add_(U.narrow(dim, n - 1, 1), alpha=self.wrap)
            out.narrow(dim, n - 1, 1).add_(U.narrow(dim, 0, 1), alpha=self.wrap)


@dataclass(frozen=True, eq=False)
class Axis:
    """The 1-D problem of one grid axis, made by :func:`grid1d` or :func:`pencil_axis`."""

    points: Float[Tensor, " n"]
    """Where the unknowns are, float64 (for B-splines the Greville points)."""
    eigenvalues: Float[Tensor, " n"]
    """λ of K S = M S Λ, in the order of the basis; not sorted on a periodic axis."""
    kind: str
    """``"fd2"``, ``"compact4"``, ``"compact6"``, ``"fv"``, ``"bspline-p"`` or ``"pencil"``."""
    bc: tuple[str, str]
    """Conditions at the lower and the upper end."""
    length: float
    spacing: float | None = None
    """h of a uniform grid; None otherwise."""
    mass: Float[Tensor, "n n"] | None = None
    """M, symmetric positive definite; None is the identity."""
    basis: str | None = None
    """Name of the fast transform's basis; None if modes come from an eigensolver."""
    constant: bool = False
    """Whether K maps constants to zero: Neumann or periodic at both ends."""
    stencil: Stencil | None = field(default=None, repr=False)
    """K as a tridiagonal matrix, where it is one."""
    _stiffness: Tensor | None = field(default=None, repr=False)
    _modes: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def eigenvectors(self) -> Float[Tensor, "n n"]:
        """S, one mode a column, Sᵀ M S = I."""
        if self._modes is not None:
            return self._modes
        if self.basis is None:
            raise RuntimeError("an axis needs a basis or its modes")
        return basis_matrix(self.basis, len(self))

    @cached_property
    def stiffness(self) -> Float[Tensor, "n n"]:
        """K, symmetric; approximates -d²/dx² (times M, if there is a mass)."""
        if self._stiffness is not None:
            return self._stiffness
        if self.stencil is not None:
            return self.stencil.dense()
        V = self.eigenvectors
        K = (V * self.eigenvalues) @ V.mT
        return (K + K.mT) / 2

    @cached_property
    def mass_diagonal(self) -> Tensor | None:
        """The diagonal of M if that is all there is of it, as for finite volumes."""
        if self.mass is None:
            return None
        diagonal = self.mass.diagonal()
        return diagonal.clone() if torch.equal(self.mass, diagonal.diag()) else None


def along(values: Tensor, U: Tensor, dim: int) -> Tensor:
    """``values`` as a vector along axis ``dim`` of ``U``, in its precision and on its device."""
    real = U.real.dtype if U.is_complex() else U.dtype
    return values.to(U.device, real).reshape(-1, *[1] * (U.ndim - dim - 1))


def add_stiffness(out: Tensor, axis: Axis, U: Tensor, dim: int) -> None:
    """``out`` += K U along ``dim``, in place: O(N) where K is a stencil."""
    stencil = axis.stencil
    if stencil is None:
        out += apply_along(in_precision(axis.stiffness, U), U, dim)
        return
    out.add_(U * along(stencil.diagonal, U, dim))
    stencil.add_couplings(out, U, dim)


def apply_mass(axis: Axis, U: Tensor, dim: int) -> Tensor:
    """M U along ``dim``; ``U`` itself if M is the identity."""
    if axis.mass is None:
        return U
    if axis.mass_diagonal is not None:
        return U * along(axis.mass_diagonal, U, dim)
    return apply_along(in_precision(axis.mass, U), U, dim)


def in_precision(A: Tensor, U: Tensor) -> Tensor:
    """A real table in the precision and on the device of ``U``."""
    return A.to(U.device, U.dtype.to_real() if U.dtype.is_complex else U.dtype)

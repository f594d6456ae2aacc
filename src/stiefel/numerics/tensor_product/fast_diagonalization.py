"""Poisson and Helmholtz problems on tensor grids, solved directly (arXiv 2606.25148).

With K_i S_i = M_i S_i Λ_i and S_iᵀ M_i S_i = I on each axis, the operator

    Kx ⊗ My ⊗ Mz + Mx ⊗ Ky ⊗ Mz + Mx ⊗ My ⊗ Kz + c Mx ⊗ My ⊗ Mz

has the inverse  S (Sᵀ F / (λx_i + λy_j + λz_k + c)): six GEMMs on a cube, O(N^{4/3}), or fast
transforms, O(N log N). Nothing larger than a 1-D matrix is stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor

from stiefel.numerics.tensor_product.axes import Axis, add_stiffness, apply_mass, in_precision
from stiefel.numerics.tensor_product.axis_apply import MAX_AXES, apply_along
from stiefel.numerics.tensor_product.checks import (
    IncompatibleDataError,
    SingularOperatorError,
    check_choice,
    check_field,
    hidden,
    real_dtype,
)
from stiefel.numerics.tensor_product.kronecker import SINGULAR_TOLERANCE
from stiefel.numerics.tensor_product.scipy_operator import linear_operator
from stiefel.numerics.tensor_product.transforms import FAST, transform, transform_pays

METHODS = ("auto", "gemm", "transform")
INCOMPATIBLE = ("raise", "warn", "project")
# |mean F| above this part of max |F| is no rounding. The first is the sheet's.
MEAN_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-6}


class IncompatibleDataWarning(UserWarning):
    """The mean of the data was not zero, though the problem needs it, and was taken out."""


class FastDiagonalization:
    """Direct solver for -∇²u + c u = f and for any sum of symmetric pencils, d = 1 to 4.

    Args:
        axes: One :class:`Axis` per grid axis, axis 0 the slowest.
        shift: c; negative (Helmholtz) away from eigenvalues, complex for absorption.
        incompatible: What to do with a pure Neumann or periodic problem at c = 0, solvable only if
            F has mean zero, when it has not: ``"raise"`` (IncompatibleDataError), ``"warn"`` and
            take the mean out, ``"project"``: take it out. The solution's mean is zero.
        method: ``"auto"`` takes a fast transform on a uniform axis of n > 96 points whose FFT
            length (n + 1 for sines) has no prime factor p above 7, or if n > 100 + 3 p, and a GEMM
            otherwise; ``"gemm"``, ``"transform"`` (an error where an axis has none).
        refine: For float32 and complex64: one step of refinement with a float64 residual.

    Attributes:
        axes, shape, shift: as given.
        singular: Whether constants are in the null space.
        transforms: For each axis the name of its fast transform, or None.

    Raises:
        ValueError: no axes or more than four, an unknown option, a shift that is not finite.
        SingularOperatorError: |λ + c| below 1e-12 of its largest value for some mode.
        TypeError: an axis that is not an :class:`Axis`.

    Source: arXiv 2606.25148, fast diagonalisation.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        shift: float | int | complex = 0.0,
        *,
        incompatible: str = "raise",
        method: str = "auto",
        refine: bool = True,
    ) -> None:
        if not 1 <= len(axes) <= MAX_AXES:
            raise ValueError(f"axes must be 1 to {MAX_AXES}, got {len(axes)}")
        for i, axis in enumerate(axes):
            if not isinstance(axis, Axis):
                raise TypeError(f"axes[{i}] must be an Axis (see grid1d), got {type(axis)}")
        self.axes = tuple(axes)
        self.shape = tuple(len(axis) for axis in axes)
        self.shift = complex(shift) if isinstance(shift, complex) else float(shift)
        if not abs(self.shift) < float("inf"):
            raise ValueError(f"shift must be finite, got {shift!r}")
        self.incompatible = check_choice(incompatible, "incompatible", INCOMPATIBLE)
        self.refine = refine
        self.singular = self.shift == 0 and all(axis.constant for axis in axes)
        self.transforms = _choose(self.axes, check_choice(method, "method", METHODS))
        self._modes = [
            axis.eigenvectors if name is None else None
            for axis, name in zip(axes, self.transforms, strict=True)
        ]
        self._cache: dict[Any, tuple[list[Tensor | None], list[Tensor]]] = {}
        if not self.singular:
            check_invertible([axis.eigenvalues for axis in axes], self.shift)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{n} {axis.kind} {axis.bc[0]}-{axis.bc[1]}" for n, axis in
                          zip(self.shape, self.axes, strict=True))  # fmt: skip
        return f"FastDiagonalization({kinds}, shift={self.shift})"

    def solve(self, F: Num[Tensor, "*grid"]) -> Num[Tensor, "*grid"]:
        """The solution U, of the shape and type of F; linear and differentiable in F.

        Args:
            F: ``(*batch, nx, ny, …)``. Finite differences: values of f at ``axis.points``. With a
                mass (finite volumes, B-splines): M f, integrals against cells or functions.

        Raises:
            ValueError: sizes that do not fit (names the axis), NaN, an empty batch.
            IncompatibleDataError: see ``incompatible``.
            TypeError: F is not float32, float64 or complex; a real F with a complex shift.
        """
        self._check(F, "F")
        self.check_compatible(F)
        if not (self.refine and real_dtype(F.dtype) == torch.float32):
            return self.invert(F)
        wide = torch.complex128 if F.is_complex() else torch.float64
        U = self.invert(F).to(wide)
        residual = F.to(wide) - self._apply(U)
        return (U + self.invert(residual.to(F.dtype))).to(F.dtype)

    def apply(self, U: Num[Tensor, "*grid"]) -> Num[Tensor, "*grid"]:
        """The operator on U ``(*batch, nx, ny, …)``: O(N) for stencils, GEMMs otherwise.

        Raises:
            ValueError, TypeError: as :meth:`solve`.
        """
        self._check(U, "U")
        return self._apply(U)

    def as_scipy_linear_operator(self, *, inverse: bool = False) -> Any:
        """``scipy.sparse.linalg.LinearOperator`` on vec(U); with ``inverse`` a preconditioner.

        In double precision. A singular operator's inverse takes the mean out of what it gets.
        """
        kind = torch.complex128 if isinstance(self.shift, complex) else torch.float64

        def forward(U: Tensor) -> Tensor:
            return self.invert(U) if inverse else self._apply(U)

        def adjoint(U: Tensor) -> Tensor:
            # The operator is symmetric: its adjoint is its conjugate.
            return forward(U.conj().resolve_conj()).conj().resolve_conj()

        return linear_operator(forward, adjoint, self.shape, self.shape, kind)

    def _check(self, U: Tensor, name: str) -> None:
        check_field(U, self.shape, name)
        if isinstance(self.shift, complex) and not U.is_complex():
            raise TypeError(f"{name} must be complex since shift is, got {U.dtype}")

    def _tables(self, U: Tensor) -> tuple[list[Tensor | None], list[Tensor]]:
        """Modes and eigenvalues in the precision and on the device of ``U``."""
        if hidden(U):
            return self._build(U)
        key = (real_dtype(U.dtype), U.device)
        if key not in self._cache:
            # Tables made under inference_mode could never be used with autograd afterwards.
            with torch.inference_mode(False):
                self._cache[key] = self._build(U)
        return self._cache[key]

    def _build(self, U: Tensor) -> tuple[list[Tensor | None], list[Tensor]]:
        modes = [None if S is None else in_precision(S, U) for S in self._modes]
        return modes, [in_precision(axis.eigenvalues, U) for axis in self.axes]

    def invert(self, F: Tensor) -> Tensor:
        """:meth:`solve` without checks and refinement: for inner loops, as a preconditioner."""
        modes, eigenvalues = self._tables(F)
        first = F.ndim - len(self.shape)
        hat = F
        for axis, (S, name) in enumerate(zip(modes, self.transforms, strict=True)):
            hat = _along(S.mT if S is not None else None, name, hat, first + axis, inverse=False)
        inverse = reduce(lambda a, b: a[..., None] + b, eigenvalues) + self.shift
        inverse = inverse.reciprocal()
        if self.singular:
            inverse[(0,) * len(self.shape)] = 0.0
        hat = hat.mul_(inverse)  # nothing keeps it: every step before is a linear map
        del inverse
        for axis, (S, name) in enumerate(zip(modes, self.transforms, strict=True)):
            hat = _along(S, name, hat, first + axis, inverse=True)
        return hat

    def check_compatible(self, F: Num[Tensor, "*grid"]) -> None:
        """Whether a singular problem can be solved for F: ``incompatible`` says what happens.

        The mean is that of the values; with a mass, of the integrals.

        Raises:
            IncompatibleDataError: the mean of F is above 1e-8 of max |F| (float32: 1e-6), and
                ``incompatible`` is ``"raise"``.
        """
        if not self.singular or self.incompatible == "project" or hidden(F):
            return
        values, dims = F.detach(), tuple(range(F.ndim - len(self.shape), F.ndim))
        wide = torch.complex128 if F.is_complex() else torch.float64
        mean = values.mean(dims, dtype=wide).abs()
        size = torch.linalg.vector_norm(values, float("inf"), dims)
        bad = mean > MEAN_TOLERANCE[real_dtype(F.dtype)] * size
        if not bool(bad.any()):
            return
        where = tuple(int(i) for i in bad.nonzero()[0])
        message = (
            "F must have mean zero: with Neumann or periodic conditions on every axis and shift 0 "
            f"there is no solution otherwise. The mean{f' of item {where}' if where else ''} is "
            f"{float(mean[where]):.2e}, max |F| is {float(size[where]):.2e}"
        )
        if self.incompatible == "raise":
            raise IncompatibleDataError(
                f"{message}. Check the fluxes at the boundary, or pass incompatible='project' to "
                "take the mean out"
            )
        warnings.warn(f"{message}; it was taken out", IncompatibleDataWarning, stacklevel=3)

    def _apply(self, U: Tensor) -> Tensor:
        """Σ K … M … M U + c M … M U, axis by axis: (A, B) → (M A, M B + K A)."""
        first = U.ndim - len(self.shape)
        product, total = U, torch.zeros_like(U)
        for i, axis in enumerate(self.axes):
            if i:
                total = apply_mass(axis, total, first + i)
            add_stiffness(total, axis, product, first + i)
            product = apply_mass(axis, product, first + i)
        if self.shift:
            total.add_(product, alpha=self.shift)
        return total


def _choose(axes: Sequence[Axis], method: str) -> list[str | None]:
    """For every axis the basis whose fast transform is used; None for a GEMM."""
    chosen: list[str | None] = []
    for i, axis in enumerate(axes):
        fast = axis.basis if axis.basis in FAST else None
        if method == "transform" and fast is None:
            raise ValueError(
                f"method 'transform' needs a uniform axis with one kind of end, axes[{i}] is "
                f"{axis.kind} with {axis.bc[0]}-{axis.bc[1]}"
            )
        used = method == "transform" or (method == "auto" and transform_pays(fast, len(axis)))
        chosen.append(fast if used else None)
    return chosen


def _along(A: Tensor | None, name: str | None, U: Tensor, dim: int, *, inverse: bool) -> Tensor:
    if A is not None:
        return apply_along(A, U, dim)
    return transform(U, dim, name or "", inverse=inverse)


def check_invertible(eigenvalues: Sequence[Tensor], shift: complex | float) -> None:
    """Raise ``SingularOperatorError`` if a sum of eigenvalues, one per axis, nearly meets -shift.

    All N sums are searched as pairs of at most two axes: one list sorted, the other looked up.
    """
    wanted = -(shift.real if isinstance(shift, complex) else shift)
    half = (len(eigenvalues) + 1) // 2
    left, right = (
        reduce(lambda a, b: (a[:, None] + b).reshape(-1), part, torch.zeros(1).double())
        for part in (eigenvalues[:half], eigenvalues[half:])
    )
    ordered = left.sort().values
    place = torch.searchsorted(ordered, wanted - right).clamp(1, max(len(ordered) - 1, 1))
    near = torch.stack([ordered[place - 1], ordered[place.clamp(max=len(ordered) - 1)]]) + right
    distance = (near - wanted).abs()
    imaginary = shift.imag if isinstance(shift, complex) else 0.0
    smallest = abs(complex(float(distance.min()), imaginary))
    ends = [sum(float(f(x)) for x in eigenvalues) for f in (torch.min, torch.max)]
    largest = max(abs(complex(end - wanted, imaginary)) for end in ends)
    if not smallest > SINGULAR_TOLERANCE * largest:
        eigenvalue = float(near.flatten()[distance.argmin()])
        raise SingularOperatorError(
            f"shift = {shift} meets the eigenvalue {eigenvalue:.12g}: |λ + shift| = {smallest:.1e} "
            f"is below {SINGULAR_TOLERANCE:.0e} of its largest value {largest:.1e}. The smallest "
            f"eigenvalue is {ends[0]:.12g}"
        )

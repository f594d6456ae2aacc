"""Heat equation by alternating directions: one line solve per axis and step (Douglas–Gunn).

    (I - k/2 Lx)(I - k/2 Ly)(I - k/2 Lz) d = k ((Lx + Ly + Lz) uⁿ + f^{n+1/2}),   uⁿ⁺¹ = uⁿ + d

Error O(k² + h²), stable for every step. ADI part of arXiv 2606.25148.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor

from stiefel.numerics.tensor_product.axes import Axis, add_stiffness, apply_mass
from stiefel.numerics.tensor_product.axis_apply import MAX_AXES
from stiefel.numerics.tensor_product.checks import check_field, check_positive, per_axis
from stiefel.numerics.tensor_product.lines import BandedLineSolver


class ADIHeat:
    """Time steps of u_t = κ ∇²u + f on a tensor grid, second order in time.

    Args:
        axes: One :class:`Axis` per grid axis (:func:`grid1d`), 1 to 4 of them, with any boundary
            conditions and schemes; conditions are homogeneous. Other boundary values: step the
            difference to any field that has them. One axis alone is Crank–Nicolson.
        dt: Time step k > 0.
        diffusivity: κ > 0, one for all axes or one per axis.

    With a mass (finite volumes, B-splines) L = -M⁻¹K, and the factors are M + k κ K/2: nothing is
    lumped. Fields are nodal values or coefficients, the source too.

    Attributes:
        axes, dt, diffusivity, shape: as given; diffusivity one per axis.

    Raises:
        ValueError: no axes or more than four, dt or κ not positive (names the axis).
        TypeError: an axis that is not an :class:`Axis`, dt or κ that is no number.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        dt: float | int,
        diffusivity: float | int | Sequence[float | int] = 1.0,
    ) -> None:
        if not 1 <= len(axes) <= MAX_AXES:
            raise ValueError(f"axes must be 1 to {MAX_AXES}, got {len(axes)}")
        for i, axis in enumerate(axes):
            if not isinstance(axis, Axis):
                raise TypeError(f"axes[{i}] must be an Axis (see grid1d), got {type(axis)}")
        self.axes = tuple(axes)
        self.shape = tuple(len(axis) for axis in axes)
        self.dt = check_positive(dt, "dt")
        given = diffusivity if isinstance(diffusivity, (int, float)) else list(diffusivity)
        self.diffusivity = tuple(
            check_positive(value, f"diffusivity of axis {i}")
            for i, value in enumerate(per_axis(given, len(axes), "diffusivity"))
        )
        self._lines = [
            _implicit(axis, self.dt * kappa / 2)
            for axis, kappa in zip(axes, self.diffusivity, strict=True)
        ]

    def __repr__(self) -> str:
        kinds = ", ".join(f"{len(axis)} {axis.kind}" for axis in self.axes)
        return f"ADIHeat({kinds}, dt={self.dt}, diffusivity={self.diffusivity})"

    def step(
        self, U: Num[Tensor, "*grid"], source: Num[Tensor, "*source"] | None = None
    ) -> Num[Tensor, "*grid"]:
        """The field one step later.

        Args:
            U: ``(*batch, nx, ny, …)``; real or complex.
            source: f at the middle of the step, of the shape of ``U`` or of the grid; None is zero.

        Returns:
            A field like ``U``; linear and differentiable in ``U`` and ``source``.

        Raises:
            ValueError: sizes that do not fit (names the axis), a NaN.
            TypeError: integers or half precision; a source of another type than ``U``.
        """
        check_field(U, self.shape)
        if source is not None:
            check_field(source, self.shape, "source")
            if source.dtype != U.dtype:
                raise TypeError(f"source must be {U.dtype} like U, got {source.dtype}")
            d, batch = len(self.shape), source.shape[: -len(self.shape)]
            if batch and batch != U.shape[:-d]:
                raise ValueError(
                    f"source must have the shape of U {tuple(U.shape)} or of the grid "
                    f"{self.shape}, got {tuple(source.shape)}"
                )
        change = self._rate(U, source)
        first = U.ndim - len(self.shape)
        for i, lines in enumerate(self._lines):
            change = lines.invert(change, first + i)
        return torch.add(U, change, alpha=self.dt)

    def _rate(self, U: Tensor, source: Tensor | None) -> Tensor:
        """-Σ κ K … M … M U + M … M f, axis by axis: (A, B) → (M A, M B - κ K A)."""
        first = U.ndim - len(self.shape)
        product, total = U, torch.zeros_like(U)
        for i, (axis, kappa) in enumerate(zip(self.axes, self.diffusivity, strict=True)):
            total = apply_mass(axis, total, first + i) if i else total
            if source is not None:
                source = apply_mass(axis, source, source.ndim - len(self.shape) + i)
            add_stiffness(total, axis, -kappa * product, first + i)
            product = apply_mass(axis, product, first + i)
        return total if source is None else total + source


def adi_amplification(*halves: Float[Tensor, ...] | float | int) -> Tensor:
    """G = 1 - 2 (a + b + …)/((1 + a)(1 + b)…): what one step multiplies an eigenmode by.

    Args:
        halves: a, b, …: k κ λ/2 of each axis, λ ≥ 0 the eigenvalue of -L; numbers or tensors that
            broadcast.

    Returns:
        G, of their common shape; -1 < G ≤ 1, so that no mode grows.

    Raises:
        ValueError: none given, or one that is negative or not a number.
    """
    if not halves:
        raise ValueError("halves must be one or more, got none")
    total, product = torch.zeros(()).double(), torch.ones(()).double()
    for i, half in enumerate(halves):
        value = torch.as_tensor(half, dtype=None if isinstance(half, Tensor) else torch.float64)
        if not bool((value.detach() >= 0).all()):
            raise ValueError(f"halves[{i}] must be >= 0 everywhere, got {half}")
        total, product = total + value, product * (1 + value)
    return 1 - 2 * total / product


def _implicit(axis: Axis, half: float) -> BandedLineSolver:
    """Line solver of M + half · K."""
    stencil = axis.stencil
    if stencil is None or (axis.mass is not None and axis.mass_diagonal is None):
        mass = torch.eye(len(axis), dtype=torch.float64) if axis.mass is None else axis.mass
        return BandedLineSolver.from_matrix(mass + half * axis.stiffness)
    diagonal = half * stencil.diagonal
    diagonal = diagonal + (1.0 if axis.mass_diagonal is None else axis.mass_diagonal)
    bands = diagonal.new_zeros(3, len(axis))
    bands[1] = diagonal
    if len(axis) == 1:
        return BandedLineSolver(bands[1:2])
    bands[0, 1:] = half * stencil.coupling
    bands[2, :-1] = half * stencil.coupling
    if stencil.wrap:
        bands[0, 0] = bands[2, -1] = half * stencil.wrap
    return BandedLineSolver(bands, periodic=bool(stencil.wrap))

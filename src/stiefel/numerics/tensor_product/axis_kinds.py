"""The makes of axes: uniform differences, finite volumes, B-splines, any symmetric pencil.

On a uniform grid the modes are sines and cosines (module ``transforms``) and

    fd2        λ = s/h²                                         s  = 2 - 2 cos θ
    compact4   λ = 1.2 s/h² / (1 + 0.2 cos θ)
    compact6   λ = (12/11 s + 3/44 s₂)/h² / (1 + 4/11 cos θ)    s₂ = 2 - 2 cos 2θ

arXiv 2606.25148, 1-D operators and compact schemes. Points and steps, axis of length L:

    Dirichlet          x_i = (i+1)h, h = L/(n+1): the ends are the zeros outside
    Neumann            x_i = (i+1/2)h, h = L/n: cell centres, no flux through the ends
    periodic           x_i = ih, h = L/n
    Dirichlet–Neumann  x_i = (i+1)h, h = L/(n+1/2): the last cell ends at L; reversed likewise
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from stiefel.numerics.tensor_product.axes import Axis, Stencil
from stiefel.numerics.tensor_product.checks import (
    DIRICHLET,
    NEUMANN,
    PERIODIC,
    check_bc,
    check_count,
    check_finite,
    check_matrix,
    check_positive,
    check_symmetric,
)
from stiefel.numerics.tensor_product.transforms import BASES, angles

UNIFORM = ("fd2", "compact4", "compact6")
# A ring of three points is the shortest on which both neighbours differ.
LEAST_PERIODIC = 3
# Row sums below this part of max |K| are zero.
ZERO_SUM_TOLERANCE = 1e-12


def grid1d(n: int, length: float | int = 1.0, bc: str = DIRICHLET, scheme: Any = "fd2") -> Axis:
    """One axis of a Poisson or Helmholtz problem.

    Args:
        n: Unknowns on the axis (for B-splines: functions left after the boundary condition).
        length: Of the axis, L > 0.
        bc: ``"dirichlet"``, ``"neumann"``, ``"periodic"``, ``"dirichlet-neumann"`` or
            ``"neumann-dirichlet"`` (lower end first); all homogeneous.
        scheme: ``"fd2"`` (second order), ``"compact4"``, ``"compact6"``: uniform. The compact ones
            keep their order only if the odd (Dirichlet) or even (Neumann) extension of u is
            smooth, so that f is zero on a Dirichlet end; otherwise second order near the wall.
            ``("fv", edges)``: finite volumes between n + 1 increasing edges, any spacing, second
            order on grids that are stretched smoothly. ``("bspline", p)``: Galerkin with
            B-splines of degree p on equal elements, order p + 1; not periodic.

    Returns:
        An :class:`Axis`; tables are float64 on the CPU, moved to the field when used.

    Raises:
        ValueError: n too small, length not positive, unknown ``bc`` or scheme, edges that do not
            fit.
        TypeError: arguments of another type.

    Source: arXiv 2606.25148, 1-D operators, compact Padé, Galerkin/B-spline.
    """
    ends = check_bc(bc)
    least = LEAST_PERIODIC if bc == PERIODIC else 1
    n = check_count(n, f"n of a {bc} axis", least)
    length = check_positive(length, "length")
    if isinstance(scheme, str) and scheme in UNIFORM:
        return _uniform(n, length, ends, scheme)
    if isinstance(scheme, (tuple, list)) and len(scheme) == 2:
        name, parameter = scheme
        if name == "fv":
            return _finite_volumes(n, length, ends, parameter)
        if name == "bspline":
            return _bsplines(n, length, ends, parameter)
    raise ValueError(
        f"scheme must be one of {', '.join(map(repr, UNIFORM))}, ('fv', edges) or "
        f"('bspline', degree), got {scheme!r}"
    )


def _uniform(n: int, length: float, ends: tuple[str, str], scheme: str) -> Axis:
    basis = BASES[ends]
    i = torch.arange(n, dtype=torch.float64)
    steps = {"dst": n + 1, "dct": n, "hartley": n}.get(basis, n + 0.5)
    first = {"dct": 0.5, "hartley": 0.0, "mixed-reversed": 0.5}.get(basis, 1.0)
    h = length / steps
    theta = angles(basis, n)
    # 2 - 2 cos θ without the cancellation of small angles.
    s, s2 = 4 * (theta / 2).sin() ** 2, 4 * theta.sin() ** 2
    stencil = None
    if scheme == "fd2":
        symbol = s
        stencil = _uniform_stencil(n, ends, h)
    elif scheme == "compact4":
        symbol = 1.2 * s / (1 + 0.2 * theta.cos())
    else:
        symbol = (12 / 11 * s + 3 / 44 * s2) / (1 + 4 / 11 * theta.cos())
    return Axis(
        points=(i + first) * h,
        eigenvalues=symbol / h**2,
        kind=scheme,
        bc=ends,
        length=length,
        spacing=h,
        basis=basis,
        constant=DIRICHLET not in ends,
        stencil=stencil,
    )


def _uniform_stencil(n: int, ends: tuple[str, str], h: float) -> Stencil:
    w = 1 / h**2
    diagonal = torch.full((n,), 2 * w, dtype=torch.float64)
    for place, end in zip((0, -1), ends, strict=True):
        if end == NEUMANN:
            diagonal[place] -= w
    coupling = torch.full((n - 1,), -w, dtype=torch.float64)
    return Stencil(diagonal, coupling, -w if PERIODIC in ends else 0.0, uniform=-w)


def _finite_volumes(n: int, length: float, ends: tuple[str, str], edges: Any) -> Axis:
    """Cells between edges: K from fluxes between centres, M the widths (as a diagonal)."""
    edges = torch.as_tensor(edges, dtype=torch.float64).cpu()
    if edges.shape != (n + 1,):
        raise ValueError(
            f"edges of n = {n} cells must be {n + 1} numbers, got shape {tuple(edges.shape)}"
        )
    check_finite(edges, "edges")
    widths = edges.diff()
    if bool((widths <= 0).any()):
        i = int((widths <= 0).nonzero()[0])
        raise ValueError(
            f"edges must increase, but edges[{i + 1}] = {float(edges[i + 1])} after "
            f"{float(edges[i])}"
        )
    span = float(edges[-1] - edges[0])
    if abs(span - length) > 1e-9 * length:
        raise ValueError(f"edges must span the length {length}, got {span}")
    centres = (edges[1:] + edges[:-1]) / 2
    w = 1 / centres.diff()
    diagonal = torch.zeros(n, dtype=torch.float64)
    diagonal[:-1] += w
    diagonal[1:] += w
    wrap = 0.0
    if PERIODIC in ends:
        ring = float(2 / (widths[0] + widths[-1]))
        diagonal[0] += ring
        diagonal[-1] += ring
        wrap = -ring
    for place, end in zip((0, -1), ends, strict=True):
        if end == DIRICHLET:
            diagonal[place] += 2 / widths[place]
    stencil = Stencil(diagonal, -w, wrap)
    return _pencil(stencil.dense(), widths.diag(), centres, "fv", ends, length, stencil=stencil)


def _bsplines(n: int, length: float, ends: tuple[str, str], degree: Any) -> Axis:
    from stiefel.numerics.tensor_product.bsplines import bspline_matrices

    degree = check_count(degree, "the degree of scheme ('bspline', degree)")
    if PERIODIC in ends:
        raise ValueError("scheme 'bspline' has open knots: bc must not be 'periodic'")
    cut = [int(end == DIRICHLET) for end in ends]
    elements = n + sum(cut) - degree
    if elements < 1:
        raise ValueError(
            f"n = {n} unknowns leave {elements} elements for B-splines of degree {degree} with "
            f"bc {'-'.join(ends)}; n must be at least {degree + 1 - sum(cut)}"
        )
    points, K, M = bspline_matrices(elements, degree, length, dtype=torch.float64)
    kept = slice(cut[0], len(points) - cut[1])
    K, M = K[kept, kept].contiguous(), M[kept, kept].contiguous()
    return _pencil(K, M, points[kept].contiguous(), f"bspline-{degree}", ends, length)


def pencil_axis(
    stiffness: Num[Tensor, ...],
    mass: Num[Tensor, ...] | None = None,
    points: Float[Tensor, " _points"] | None = None,
) -> Axis:
    """An axis from any symmetric pencil: K S = M S Λ, Sᵀ M S = I.

    Args:
        stiffness: K, symmetric; real.
        mass: M, symmetric positive definite; None is the identity.
        points: Where the unknowns are; 0, 1, … if None.

    Raises:
        ValueError: not square, not symmetric, not finite, M not positive definite.
        TypeError: complex or not floating point.

    Source: arXiv 2606.25148, fast diagonalisation.
    """
    for name, A in (("stiffness", stiffness), ("mass", mass)):
        if A is None:
            continue
        check_matrix(A, name, square=True)
        if A.is_complex():
            raise TypeError(f"{name} must be real, got {A.dtype}")
        check_symmetric(A, name)
    n = stiffness.shape[0]
    if mass is not None and mass.shape != stiffness.shape:
        raise ValueError(
            f"mass must have the shape of stiffness {tuple(stiffness.shape)}, got "
            f"{tuple(mass.shape)}"
        )
    if points is None:
        points = torch.arange(n, dtype=torch.float64)
    if len(points) != n:
        raise ValueError(f"points must be {n} numbers, one per row of stiffness, got {len(points)}")
    K = stiffness.detach().cpu().double()
    M = None if mass is None else mass.detach().cpu().double()
    place = points.detach().cpu().double()
    return _pencil(K, M, place, "pencil", ("pencil", "pencil"), float(place[-1] - place[0]))


def _pencil(
    K: Tensor,
    M: Tensor | None,
    points: Tensor,
    kind: str,
    ends: tuple[str, str],
    length: float,
    stencil: Stencil | None = None,
) -> Axis:
    eigenvalues, modes = pencil_modes(K, M)
    size = K.abs().max()
    constant = bool(K.sum(1).abs().max() <= ZERO_SUM_TOLERANCE * len(K) * size)
    if constant:
        # Exactly: the solver looks for this mode. Its sign makes the constant positive.
        eigenvalues[0] = 0.0
        modes[:, 0] *= torch.sign(modes[:, 0].sum())
    return Axis(
        points=points, eigenvalues=eigenvalues, kind=kind, bc=ends, length=length, mass=M,
        constant=constant, stencil=stencil, _stiffness=K, _modes=modes,
    )  # fmt: skip


def pencil_modes(K: Tensor, M: Tensor | None) -> tuple[Tensor, Tensor]:
    """Λ ``(n,)`` ascending and S ``(n, n)`` with K S = M S Λ, Sᵀ M S = I.

    Raises:
        ValueError: M is not positive definite.
    """
    if M is None:
        eigenvalues, modes = torch.linalg.eigh(K)
        return eigenvalues, modes
    diagonal = M.diagonal()
    if torch.equal(M, diagonal.diag()):
        if not bool((diagonal > 0).all()):
            raise ValueError("mass must be positive definite, it has a diagonal entry <= 0")
        scale = diagonal.rsqrt()
        eigenvalues, modes = torch.linalg.eigh(scale[:, None] * K * scale)
        return eigenvalues, scale[:, None] * modes
    L, info = torch.linalg.cholesky_ex(M)
    if int(info):
        raise ValueError(
            f"mass must be positive definite, its leading {int(info)} x {int(info)} block is not"
        )
    half = torch.linalg.solve_triangular(L, K, upper=False)
    C = torch.linalg.solve_triangular(L, half.mT, upper=False)
    eigenvalues, modes = torch.linalg.eigh((C + C.mT) / 2)
    return eigenvalues, torch.linalg.solve_triangular(L.mT, modes, upper=True)

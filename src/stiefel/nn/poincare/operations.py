"""Geometry of the Poincaré ball of curvature −c, radius 1/√c; points along the last dimension.

Source: van Spengler et al., arXiv 2303.14027, and Ganea et al., arXiv 1805.09112. Every function
takes c as a number or a tensor and is differentiable in it. Half precision is computed in float32.

All raise ``TypeError`` for tensors that are not floating point, ``ValueError`` for c not positive,
shapes that do not broadcast, and points that are not inside the ball (``check=False`` leaves that
last one out: on a GPU it waits for the numbers).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stiefel.nn.poincare._args import BOUNDARY, Curvature, check_points, prepare
from stiefel.nn.poincare._radial import (
    ARTANHC,
    TANHC,
)
from stiefel.nn.poincare.functions import (
    conformal,
    dot,
    midpoint_tangent,
    mobius,
    scale,
    translate,
)

# Of any shape and dtype here: what does not fit has an error of its own.
Vectors = Shaped[Tensor, "..."]


def project(x: Vectors, c: Curvature, eps: float | int | None = None) -> Float[Tensor, "*batch d"]:
    """Points longer than (1 − eps)/√c shortened to that length; eps: 4e-3, 1e-5 in float64.

    Raises:
        ValueError: eps not in [0, 1).
    """
    c, dtype, (x,) = prepare(c, (x, "x"))
    return shorten(x, c, eps).to(dtype)


def shorten(x: Tensor, c: Tensor, eps: float | int | None = None) -> Tensor:
    """:func:`project` of a tensor in the precision of the work."""
    if eps is None:
        eps = BOUNDARY[x.dtype]
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be in [0, 1), got {eps}")
    square = c * dot(x, x, -1)
    inside = square <= (1 - eps) ** 2
    return x * torch.where(inside, 1.0, (1 - eps) * torch.rsqrt(torch.where(inside, 1.0, square)))


def conformal_factor(x: Vectors, c: Curvature, *, check: bool = True) -> Float[Tensor, "*batch"]:
    """λ_x = 2/(1 − c|x|²): how much longer vectors at x are than they look."""
    c, dtype, (x,) = prepare(c, (x, "x"))
    if check:
        check_points(c, (x, "x"))
    return conformal(x, c)[..., 0].to(dtype)


def mobius_add(
    x: Vectors, y: Vectors, c: Curvature, *, check: bool = True
) -> Float[Tensor, "*batch d"]:
    """x ⊕ y, the translation that takes 0 to x, at y."""
    c, dtype, (x, y) = prepare(c, (x, "x"), (y, "y"))
    if check:
        check_points(c, (x, "x"), (y, "y"))
    return mobius(x, y, c).to(dtype)


def expmap0(v: Vectors, c: Curvature) -> Float[Tensor, "*batch d"]:
    """exp₀(v) = tanh(√c|v|) v/(√c|v|), projected."""
    c, dtype, (v,) = prepare(c, (v, "v"))
    return shorten(scale(v, c, TANHC), c).to(dtype)


def logmap0(y: Vectors, c: Curvature, *, check: bool = True) -> Float[Tensor, "*batch d"]:
    """log₀(y) = artanh(√c|y|) y/(√c|y|), the inverse of :func:`expmap0`."""
    c, dtype, (y,) = prepare(c, (y, "y"))
    if check:
        check_points(c, (y, "y"))
    return scale(y, c, ARTANHC).to(dtype)


def expmap(
    x: Vectors, v: Vectors, c: Curvature, *, check: bool = True
) -> Float[Tensor, "*batch d"]:
    """exp_x(v) = x ⊕ exp₀(λ_x v/2), projected: where a geodesic from x along v ends."""
    c, dtype, (x, v) = prepare(c, (x, "x"), (v, "v"))
    if check:
        check_points(c, (x, "x"))
    return shorten(mobius(x, scale(conformal(x, c) / 2 * v, c, TANHC), c), c).to(dtype)


def logmap(
    x: Vectors, y: Vectors, c: Curvature, *, check: bool = True
) -> Float[Tensor, "*batch d"]:
    """log_x(y) = (2/λ_x) log₀((−x) ⊕ y): the tangent vector at x whose geodesic ends in y."""
    c, dtype, (x, y) = prepare(c, (x, "x"), (y, "y"))
    if check:
        check_points(c, (x, "x"), (y, "y"))
    return (scale(mobius(-x, y, c), c, ARTANHC) * (2 / conformal(x, c))).to(dtype)


def dist(x: Vectors, y: Vectors, c: Curvature, *, check: bool = True) -> Float[Tensor, "*batch"]:
    """Distance (2/√c) artanh(√c|(−x) ⊕ y|), ``[...]``; at x = y the gradient is 0.

    Computed as (2/√c) asinh(√c|x − y| √(λ_x λ_y)/2), which stays finite up to the boundary.
    """
    c, dtype, (x, y) = prepare(c, (x, "x"), (y, "y"))
    if check:
        check_points(c, (x, "x"), (y, "y"))
    factor = (conformal(x, c) * conformal(y, c)).sqrt()[..., 0] / 2
    root = c.sqrt()
    chord = torch.linalg.vector_norm(x - y, dim=-1)
    return (2 / root * torch.asinh(root * chord * factor)).to(dtype)


def gyration(
    u: Vectors, v: Vectors, w: Vectors, c: Curvature, *, check: bool = True
) -> Float[Tensor, "*batch d"]:
    """gyr[u, v] w, the rotation by which ⊕ fails to be associative."""
    c, dtype, (u, v, w) = prepare(c, (u, "u"), (v, "v"), (w, "w"))
    if check:
        check_points(c, (u, "u"), (v, "v"))
    return gyrate(u, v, w, c).to(dtype)


def gyrate(u: Tensor, v: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """:func:`gyration` of tensors in the precision of the work."""
    u2, v2, uv, uw, vw = (dot(p, q, -1) for p, q in ((u, u), (v, v), (u, v), (u, w), (v, w)))
    a = -c * c * uw * v2 + c * vw + 2 * c * c * uv * vw
    b = -c * c * vw * u2 - c * uw
    return w + 2 * (a * u + b * v) / (1 + 2 * c * uv + c * c * u2 * v2)


def transp(
    x: Vectors, y: Vectors, v: Vectors, c: Curvature, *, check: bool = True
) -> Float[Tensor, "*batch d"]:
    """v, a tangent vector at x, carried along the geodesic to y: gyr[y, −x] v λ_x/λ_y."""
    c, dtype, (x, y, v) = prepare(c, (x, "x"), (y, "y"), (v, "v"))
    if check:
        check_points(c, (x, "x"), (y, "y"))
    return (gyrate(y, -x, v, c) * (conformal(x, c) / conformal(y, c))).to(dtype)


def tangent_add(a: Vectors, b: Vectors, c: Curvature) -> Float[Tensor, "*batch d"]:
    """log₀(exp₀(a) ⊕ exp₀(b)), without leaving the tangent space: nothing saturates.

    Vectors with 2√c|u| beyond 21 (170 in float64) count as that long.
    """
    c, dtype, (a, b) = prepare(c, (a, "a"), (b, "b"))
    return translate(a, b, c).to(dtype)


def frechet_tangent(u: Float[Tensor, "n d"], c: Tensor, tol: float | int, max_iter: int) -> Tensor:
    """log₀ of the Fréchet mean of exp₀(u), ``[d]``, by Newton's method from the midpoint.

    Gradients are those of the implicit function: the mean is where the mean of log_mu vanishes.

    Raises:
        RuntimeError: no convergence in ``max_iter`` steps.
    """
    fixed, at = u.detach(), c.detach()
    mean = midpoint_tangent(fixed, at, (0,), -1)[0]
    # No step can be told from 0 below the rounding of the vectors themselves.
    floor = 64 * torch.finfo(u.dtype).eps * float(fixed.norm(dim=-1).max()) if len(u) else 0.0
    length = math.inf
    for _ in range(max_iter):
        moved = translate(-mean[None], fixed, at)
        step = torch.linalg.solve(_mean_hessian(moved, at), moved.mean(0))
        mean = translate(mean[None], step[None], at)[0]
        length = float(2 * step.norm())
        if length <= max(tol, floor):
            break
    else:
        raise RuntimeError(
            f"the Fréchet mean did not converge in max_iter = {max_iter} steps: the last one was "
            f"{length:.1e} long, tol is {tol:g}"
        )
    # One more step, with a graph: it moves by nothing but has the gradient.
    moved = translate(-mean[None], u, c)
    hessian = _mean_hessian(moved.detach(), at)
    return translate(mean[None], torch.linalg.solve(hessian, moved.mean(0))[None], c)[0]


def _mean_hessian(moved: Tensor, c: Tensor) -> Tensor:
    """Of half the mean squared distance, at the origin: 1 along a point, t coth t across."""
    x = 4 * c * dot(moved, moved, -1)
    t = x.sqrt()
    # t coth t = 1 + x (t coth t - 1)/x; the last factor is 1/3 at 0.
    tiny = x < 1e-4
    far = torch.where(tiny, 1.0, t)
    across = torch.where(tiny, 1 / 3 - x / 45, (far / far.tanh() - 1) / far.square())
    flat = 4 * c * across / len(moved)
    eye = torch.eye(moved.shape[-1], dtype=moved.dtype, device=moved.device)
    return (1 + (across * x).mean()) * eye - (flat * moved).mT @ moved


def midpoint(
    x: Vectors,
    c: Curvature,
    w: Tensor | None = None,
    dim: int = 0,
    *,
    check: bool = True,
) -> Float[Tensor, "*reduced"]:
    """The gyromidpoint of points over dimension ``dim``, which goes.

        (1/2) ⊗ [Σ w λ_x x / Σ w (λ_x − 1)],   (1/2) ⊗ m = m/(1 + √(1 − c|m|²))

    Args:
        x: ``[..., d]`` with at least two dimensions.
        c: > 0.
        w: Weights ≥ 0, the shape of x without its last dimension; None: equal ones.
        dim: Not the last one.
        check: Whether to look at the points.

    Raises:
        ValueError: also for weights of another shape, and for ``dim`` the last or out of range.
    """
    c, dtype, (x,) = prepare(c, (x, "x"))
    if not -x.ndim <= dim < x.ndim or dim % x.ndim == x.ndim - 1 or not x.shape[dim]:
        raise ValueError(
            f"dim must be a dimension of points, not the last, with at least one point; got "
            f"dim={dim} for shape {tuple(x.shape)}"
        )
    if check:
        check_points(c, (x, "x"))
    if w is not None:
        if w.shape != x.shape[:-1]:
            raise ValueError(f"w must be {tuple(x.shape[:-1])}, got shape {tuple(w.shape)}")
        w = w.to(x.dtype)[..., None]
    u = midpoint_tangent(scale(x, c, ARTANHC), c, (dim,), -1, w)
    return scale(u, c, TANHC).squeeze(dim).to(dtype)


def frechet_mean(
    x: Vectors,
    c: Curvature,
    tol: float | int = 1e-8,
    max_iter: int = 100,
    *,
    check: bool = True,
) -> Float[Tensor, " d"]:
    """The point with the least mean squared distance to ``[n, d]`` points, differentiable.

    Newton's method from the midpoint: two or three steps, whatever the spread. Gradients, also for
    c, are exact (implicit differentiation), first derivatives only.

    Args:
        x: At least one point.
        c: > 0.
        tol: Length of the last step, or the rounding of the points if that is larger.
        max_iter: ≥ 1.
        check: Whether to look at the points.

    Raises:
        ValueError: also for no points at all, tol ≤ 0 or max_iter < 1.
        RuntimeError: no convergence in ``max_iter`` steps.
    """
    c, dtype, (x,) = prepare(c, (x, "x"))
    if x.ndim != 2:
        raise ValueError(f"x must be [n, d], got shape {tuple(x.shape)}")
    if not len(x) or not tol > 0 or max_iter < 1:
        raise ValueError(
            f"needs at least one point, tol > 0 and max_iter ≥ 1, got {len(x)} points, "
            f"tol={tol:g}, max_iter={max_iter}"
        )
    if check:
        check_points(c, (x, "x"))
    mean = frechet_tangent(scale(x, c, ARTANHC), c, tol, max_iter)
    return scale(mean, c, TANHC).to(dtype)

"""Cheap normalisers that are not rotation-equivariant: Sinkhorn, row norm, sign."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.polar import frobenius_norm

BaseMap = Callable[[Tensor], Tensor]
MODES = ("alternating", "simultaneous")
# Smallest root mean square of a row or column that is divided by, that of the matrix being 1.
CLAMP = 1e-8
# Numbers in a matrix from which a call for each costs less than what bmm loses.
_ONE_BY_ONE_FROM = 4096
_LARGEST_ROOT = 1e18
# Entries of RᵀM below this part of the root mean square may be rounding of an exact zero (RᵀA is
# triangular, so rows of RᵀM are orthogonal to sign rows before them), whose sign is a coin toss.
SIGN_FLOOR = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-3}


def sinkhorn_normalize(
    x: Float[Tensor, "*batch m n"], iters: int = 5, mode: str = "alternating"
) -> Float[Tensor, "*batch m n"]:
    """Scale rows and columns in turn until all have the same root mean square.

    ``"alternating"`` (SinkGD): rows to norm √n, then columns to norm √m. ``"simultaneous"`` (the
    ARO paper): X ← diag(row norms)⁻¹ X diag(column norms)⁻¹, scaled to root mean square 1 at the
    end. Both have one limit, in which X∘X is balanced; alternating gets there about twice as fast.

    Args:
        x: Matrices ``(..., m, n)`` of any scale. Half types are computed in float32.
        iters: Rounds, ≥ 1.
        mode: See above.

    Returns:
        Same shape and dtype, root mean square 1 where no row and no column is zero. Zero rows and
        columns stay zero, signs stay as they are.

    Raises:
        ValueError: fewer than two dimensions, no round, an unknown mode.
        TypeError: ``x`` is not real floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be a real floating-point tensor, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must have at least two dimensions, got shape {tuple(x.shape)}")
    if iters < 1:
        raise ValueError(f"iters must be ≥ 1, got {iters}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if x.numel() == 0:
        return x.clone()
    norm = frobenius_norm(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    unit = (norm / (x.shape[-2] * x.shape[-1]) ** 0.5).to(wide)
    work = x.to(wide) / torch.where(unit > 0, unit, 1.0)
    return balance(work, iters, mode).to(x.dtype)


def balance(
    x: Float[Tensor, "*batch m n"], iters: int, mode: str = "alternating"
) -> Float[Tensor, "*batch m n"]:
    """:func:`sinkhorn_normalize` for matrices whose root mean square is about 1 already.

    Only two vectors of scales change from round to round: row norms of diag(r) X diag(c) are
    r √(S c²) with S = X∘X. A round is two matrix-vector products, which read S and write nothing,
    also along columns and for transposed memory.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = x.to(wide, copy=True).square_()
    m, n = s.shape[-2:]
    r2, c2 = s.new_ones((*s.shape[:-2], m, 1)), s.new_ones((*s.shape[:-2], n, 1))
    if mode == "alternating":
        for _ in range(iters):
            r2 = n / times(s, c2).clamp_min_(n * CLAMP**2)
            c2 = m / times(s.mT, r2).clamp_min_(m * CLAMP**2)
        size = 1.0
    else:
        for _ in range(iters):
            rows, columns = times(s, c2), times(s.mT, r2)
            r2 = 1 / (rows / _mean(rows)).clamp_min_(CLAMP**2)
            c2 = 1 / (columns / _mean(columns)).clamp_min_(CLAMP**2)
        square = (r2 * times(s, c2)).sum((-2, -1), keepdim=True)
        size = torch.where(square > 0, m * n / square, 1.0)
    out = torch.mul(x, (r2 * size).sqrt_(), out=s)
    return out.mul_(c2.sqrt_().mT).to(x.dtype)


def sign_map(x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """f(X) = sign(X), 0 where |x| is below 1e-6 (float32: 1e-5) of the root mean square."""
    floor = _floor(x)
    if x.device.type == "cpu" and x.ndim == 3 and bool(floor.isfinite().all()):
        out = torch.empty_like(x)  # laid out in memory as x, and no masks: five times as fast
        for own, level, signs in zip(x, floor.flatten().tolist(), out, strict=True):
            torch.hardshrink(own, level, out=signs).sign_()
        return out
    size = x.abs()
    return torch.where(size <= floor, 0.0, x / size)


def _floor(x: Tensor) -> Tensor:
    """Smallest absolute value per matrix that has a sign."""
    size = frobenius_norm(x) / (x.shape[-2] * x.shape[-1]) ** 0.5
    return (SIGN_FLOOR[x.dtype] * size).to(x.dtype)


def row_map(x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """f(X): every row scaled to norm √n; zero rows stay zero. X has root mean square about 1."""
    mean_square = row_squares(x) / x.shape[-1]
    return (x * mean_square.clamp_min_(CLAMP**2).rsqrt_()).to(x.dtype)


def _mean(squares: Tensor) -> Tensor:
    """Mean over rows, 1 where all are 0."""
    mean = squares.mean(-2, keepdim=True)
    return torch.where(mean > 0, mean, 1.0)


def adam_map(
    x: Float[Tensor, "*batch m n"],
    root: Float[Tensor, "*batch m n"],
    unit: Float[Tensor, "*batch 1 1"],
    beta2: float,
    keep: bool,
) -> Float[Tensor, "*batch m n"]:
    """f(X) = X / √V with V ← β₂ V + (1 − β₂) X∘X, X being ``unit`` times ``x``; 0 where V is 0.

    ``root`` is √V, so that no square leaves float32. ``keep`` writes the new one into it; the
    look-ahead inside A does not. Entries without a sign (see :func:`sign_map`) count as zero.
    """
    wide = torch.where(x.abs() <= _floor(x), 0.0, x).to(root.dtype)
    # In units of X. Where the past is so much larger that its square overflows, X / √V is 0 anyway.
    new = (root / unit).clamp_max_(_LARGEST_ROOT).square_().mul_(beta2)
    new.addcmul_(wide, wide, value=1 - beta2).sqrt_()
    if keep:
        torch.mul(new, unit, out=root)
    # Where V is 0 so is X, and 0 divided by the smallest number is 0.
    return wide.div_(new.clamp_min_(torch.finfo(new.dtype).smallest_normal)).to(x.dtype)


def checked_map(base: BaseMap) -> BaseMap:
    """``base`` that refuses to change shapes and keeps dtypes."""

    def call(x: Tensor) -> Tensor:
        y = base(x)
        if y.shape != x.shape:
            raise ValueError(
                f"base must keep shapes, got {tuple(y.shape)} for a stack of {tuple(x.shape)}"
            )
        return y.to(x.dtype)

    return call


def row_squares(x: Tensor) -> Tensor:
    """Sums of squares of rows, by a product that is fast for transposed memory too."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = x.to(wide, copy=True).square_()
    return times(s, s.new_ones((*s.shape[:-2], s.shape[-1], 1)))


def times(
    s: Float[Tensor, "*batch m n"], v: Float[Tensor, "*batch n 1"]
) -> Float[Tensor, "*batch m 1"]:
    """Matrix-vector products; large ones one by one on CPUs, where bmm is ten times slower."""
    if s.ndim != 3 or s.device.type != "cpu" or s[0].numel() < _ONE_BY_ONE_FROM:
        return s @ v
    out = s.new_empty((*s.shape[:-1], 1))
    for matrix, vector, result in zip(s, v, out, strict=True):
        torch.mv(matrix, vector[:, 0], out=result[:, 0])
    return out

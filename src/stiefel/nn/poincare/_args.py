"""Argument checks of the ball's operations and layers, and where arguments are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from stiefel.linalg._checks import compute_dtype
from stiefel.linalg.autocast import without_autocast

# Sheet, "projection after exp/FC" (authors' code): how far from the boundary points are kept.
BOUNDARY = {torch.float32: 4e-3, torch.float64: 1e-5}

Curvature = float | int | Tensor


def is_real(x: Tensor) -> bool:
    """Whether values are there to be looked at: not while compiling, nor on the meta device."""
    return not torch.compiler.is_compiling() and not x.is_meta


def number(c: Tensor) -> Any:
    """c as a Python number where looking at it waits for nothing: operations take it for less."""
    return c.item() if c.device.type == "cpu" and type(c) in (Tensor, Parameter) else c


def exactly(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast; none, which takes no time, where there is no autocast."""
    if torch.compiler.is_compiling() or x.is_meta or torch.is_autocast_enabled(x.device.type):
        return without_autocast(x)
    return nullcontext()


def check_vectors(x: Tensor, name: str) -> None:
    """Raise unless x is real floating point (``TypeError``), ``[..., d]`` (``ValueError``)."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a real floating-point tensor, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"{name} must hold vectors [..., d], got a tensor without dimensions")


def curvature(c: Curvature, dtype: torch.dtype, device: torch.device) -> Tensor:
    """c as a tensor without dimensions.

    Raises:
        ValueError: c is not positive and finite, or more than one number.
    """
    if isinstance(c, Tensor):
        if c.numel() != 1:
            raise ValueError(f"c must be one number, got shape {tuple(c.shape)}")
        if is_real(c) and not 0 < float(c.detach()) < math.inf:
            raise ValueError(wrong_curvature(float(c.detach())))
        return c.reshape(()).to(device=device, dtype=dtype)
    if not 0 < c < math.inf:
        raise ValueError(wrong_curvature(c))
    return torch.tensor(float(c), dtype=dtype, device=device)


def wrong_curvature(c: float | int) -> str:
    """The sentence for a c that is none: most often a curvature in place of its negative."""
    hint = f" (the curvature is -c: pass c={-c:g})" if c < 0 else ""
    return f"c must be positive and finite, got {c}{hint}"


def prepare(c: Curvature, *named: tuple[Tensor, str]) -> tuple[Tensor, torch.dtype, list[Tensor]]:
    """Arguments in the precision of the work; c; the dtype that the answer is to have.

    Raises:
        TypeError: not floating point.
        ValueError: shapes that do not broadcast, different d, c not positive.
    """
    for x, name in named:
        check_vectors(x, name)
    first, first_name = named[0]
    dtype = first.dtype
    for x, name in named[1:]:
        if x.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"{first_name} and {name} must have one last dimension, got shapes "
                f"{tuple(first.shape)} and {tuple(x.shape)}"
            )
        dtype = torch.promote_types(dtype, x.dtype)
    try:
        torch.broadcast_shapes(*(x.shape for x, _ in named))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for x, name in named)
        raise ValueError(f"shapes must broadcast, got {shapes}") from error
    work = compute_dtype(dtype)
    return curvature(c, work, first.device), dtype, [x.to(work) for x, _ in named]


def check_points(c: Tensor, *named: tuple[Tensor, str]) -> None:
    """Raise ``ValueError`` for points that are not inside the ball, NaN among them."""
    for x, name in named:
        if not is_real(x) or not x.numel():
            continue
        square = c.detach() * x.detach().square().sum(-1)
        inside = square < 1
        if not bool(inside.all()):
            length = float((square[~inside].flatten()[0] / c.detach()).sqrt())
            raise ValueError(
                f"{name} must lie inside the ball of radius 1/√c = "
                f"{float(c.detach().rsqrt()):.6g}: {int((~inside).sum())} of {inside.numel()} "
                f"points do not, the first has length {length:.6g}; project them first "
                "(project(x, c), or PoincareBall(project=True))"
            )


def check_no_nan(x: Tensor, operation: str) -> None:
    """Raise ``RuntimeError`` naming the operation if its result holds NaN."""
    if is_real(x) and bool(x.detach().isnan().any()):
        raise RuntimeError(f"{operation} gave NaN")


def through_plain(
    plain: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    *settings: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``plain(*inputs, *settings)`` that can be differentiated once more."""
    with torch.enable_grad():
        # Aliases, so that an input computed from another one counts for itself only.
        aliases = [None if x is None else x.view_as(x) for x in inputs]
        wanted = [x for x in aliases if x is not None and x.requires_grad]
        out = plain(*aliases, *settings)
        outs = out if isinstance(out, tuple) else (out,)
        pairs = [
            (y, g) for y, g in zip(outs, grads, strict=True) if y is not None and y.requires_grad
        ]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
        return tuple(next(found) if x is not None and x.requires_grad else None for x in aliases)

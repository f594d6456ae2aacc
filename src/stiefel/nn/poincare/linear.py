"""Fully connected layers of the Poincaré ball, from tangent vectors to tangent vectors.

Source: van Spengler et al., arXiv 2303.14027; the layer itself is Shimizu et al.'s (HNN++). The
form used here never leaves the tangent space at the origin: it has no 1 − c|x|² that cancels near
the boundary, and needs no projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.linalg._checks import compute_dtype
from stiefel.nn.poincare._args import (
    Curvature,
    check_no_nan,
    check_vectors,
    curvature,
    exactly,
)
from stiefel.nn.poincare._fully_connected import layer
from stiefel.nn.poincare.ball import PoincareBall

INITS = ("identity", "normal", "identity_center")
SPACES = ("tangent", "ball")
CLIPS = (None, "official")


def poincare_linear_tangent(
    u: Shaped[Tensor, ...],
    Z: Shaped[Tensor, ...],
    bias: Shaped[Tensor, ...] | None,
    c: Curvature,
    clip: str | None = None,
) -> Float[Tensor, "*batch outputs"]:
    """log₀ of the fully connected layer at exp₀(u), by the sheet's fused form.

    With r = |u|, t = 2√c r and columns z_k of Z:

        alpha_k = sinh(t) <u/r, z_k/|z_k|> cosh(2√c bias_k) − cosh(t) sinh(2√c bias_k)
        q_k = sinh(2|z_k| asinh(alpha_k)),   out = asinh(|q|) q/(2√c |q|)

    For c → 0 this is 2 Zᵀu − 2|z_k| bias_k. A column z_k = 0 gives 0, with gradient 0. Everything
    is computed in float32 at least; t and 2|z_k| asinh(alpha_k) beyond 41 (340 in float64) count as
    that much.

    Args:
        u: ``[..., inputs]``, tangent vectors at the origin.
        Z: ``[inputs, outputs]``.
        bias: ``[outputs]`` or None.
        c: > 0, the negative of the curvature; a number or a tensor, which may have a gradient.
        clip: ``"official"`` shortens u and the result to artanh(1 − eps)/√c, where the authors'
            projection onto the ball ends (eps: 4e-3, 1e-5 in float64); None shortens nothing.

    Returns:
        ``[..., outputs]`` in the dtype of u.

    Raises:
        TypeError: u, Z or bias not floating point.
        ValueError: shapes that do not fit, c not positive, an unknown clip.
    """
    check_vectors(u, "u")
    check_weight(Z, bias, clip)
    if u.shape[-1] != Z.shape[0]:
        raise ValueError(
            f"u must be [..., {Z.shape[0]}] for Z of shape {tuple(Z.shape)}, "
            f"got shape {tuple(u.shape)}"
        )
    work = compute_dtype(torch.promote_types(u.dtype, Z.dtype))
    return tangent_linear(u, Z, bias, curvature(c, work, u.device), clip)


def tangent_linear(
    u: Tensor, Z: Tensor, bias: Tensor | None, c: Tensor, clip: str | None
) -> Tensor:
    """:func:`poincare_linear_tangent` of arguments that are known to be right."""
    work = compute_dtype(torch.promote_types(u.dtype, Z.dtype))
    with exactly(u):
        rows = u.to(work)
        rows = rows if u.ndim == 2 else rows.reshape(-1, u.shape[-1])
        bias = None if bias is None else bias.to(work)
        out = layer(rows, Z.to(work), bias, c.to(work), 1.0, None, clip)
    out = out if u.ndim == 2 else out.reshape(*u.shape[:-1], Z.shape[1])
    return out.to(u.dtype)


def check_weight(Z: Tensor, bias: Tensor | None, clip: str | None) -> None:
    """Raise unless Z is ``[inputs, outputs]``, bias fits it and clip is known."""
    check_vectors(Z, "Z")
    if Z.ndim != 2:
        raise ValueError(f"Z must be [inputs, outputs], got shape {tuple(Z.shape)}")
    if bias is not None:
        check_vectors(bias, "bias")
        if bias.shape != Z.shape[1:]:
            raise ValueError(f"bias must be [{Z.shape[1]}], got shape {tuple(bias.shape)}")
    if clip not in CLIPS:
        raise ValueError(f"clip must be None or 'official', got {clip!r}")


def start_weight_(
    weight: Tensor, taps: int, init: str, jitter: float | int, generator: torch.Generator | None
) -> None:
    """Fill Z, ``[channels * taps, outputs]``, rows channel by channel; see :class:`PoincareLinear`.

    ``taps``: entries of a convolution's kernel, 1 for a linear layer.
    """
    inputs, outputs = weight.shape
    z = torch.zeros(inputs, outputs, dtype=torch.float64)
    if init == "normal":
        z.normal_(0, (2 * inputs * outputs) ** -0.5, generator=generator)
    elif init == "identity":
        z.fill_diagonal_(0.5)
    else:
        channels, out = inputs // taps, torch.arange(outputs)
        z[out % channels * taps + taps // 2, out] = 0.5
    if jitter:
        noise = torch.empty_like(z).normal_(0, jitter, generator=generator)
        z = torch.where((z == 0).all(0), noise, z)
    with torch.no_grad():
        weight.copy_(z)


def check_layer(init: str, jitter: float | int, clip: str | None, ball: Any, **counts: int) -> None:
    """Raise for an unknown start or clip, a negative jitter, no ball, or counts below 1."""
    if not isinstance(ball, PoincareBall):
        raise TypeError(f"ball must be a PoincareBall, got {type(ball).__name__}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if not 0 <= jitter < math.inf:
        raise ValueError(f"jitter must be at least 0, got {jitter}")
    if clip not in CLIPS:
        raise ValueError(f"clip must be None or 'official', got {clip!r}")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}")


def empty_parameters(
    rows: int, columns: int, bias: bool, device: Any, dtype: torch.dtype | None
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Z and bias of a layer, not filled yet."""
    make: Callable[..., Tensor] = torch.empty
    weight = nn.Parameter(make(rows, columns, device=device, dtype=dtype))
    return weight, nn.Parameter(make(columns, device=device, dtype=dtype)) if bias else None


class PoincareLinear(nn.Module):
    """A fully connected layer of the ball; ``weight`` is Z, ``[in_f, out_f]``.

    Args:
        in_f: Dimension of the ball that points come from.
        out_f: Dimension of the ball that they go to.
        ball: Where; its curvature may be learnable.
        bias: Learnable offsets r_k of the hyperplanes, 0 at the start.
        init: ``"identity"``: half the identity matrix; the layer then is exactly the identity on
            the first ``min(in_f, out_f)`` coordinates, and columns beyond ``in_f`` are 0, output 0
            and stay so. ``"identity_center"``: output o is input ``o % in_f``, no column is 0.
            ``"normal"``: N(0, 1/(2 in_f out_f)), as before the paper: norms shrink layer by layer.
        space: ``"tangent"``: vectors at the origin in and out. ``"ball"``: points in and out.
        clip: As of :func:`poincare_linear_tangent`.
        jitter: Standard deviation of noise on columns that would start at 0, so that they learn.
        generator: For the start.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: sizes below 1, an unknown init, space or clip, a negative jitter.
        TypeError: ball is not a :class:`PoincareBall`.
    """

    def __init__(
        self,
        in_f: int,
        out_f: int,
        ball: PoincareBall,
        bias: bool = True,
        init: str = "identity",
        space: str = "tangent",
        *,
        clip: str | None = None,
        jitter: float | int = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_layer(init, jitter, clip, ball, in_f=in_f, out_f=out_f)
        if space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
        self.in_f, self.out_f, self.ball = in_f, out_f, ball
        self.init, self.space, self.clip, self.jitter = init, space, clip, jitter
        self.weight, self.bias = empty_parameters(in_f, out_f, bias, device, dtype)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start again, as ``init`` says."""
        start_weight_(self.weight, 1, self.init, self.jitter, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Shaped[Tensor, ...]) -> Float[Tensor, "*batch outputs"]:
        """``[..., in_f]`` to ``[..., out_f]``, in the dtype of x.

        Raises:
            TypeError: x is not floating point.
            ValueError: another last dimension; with ``space="ball"`` points outside the ball.
            RuntimeError: the result holds NaN and the ball is in debug mode.
        """
        check_vectors(x, "x")
        if x.shape[-1] != self.in_f:
            raise ValueError(f"x must be [..., {self.in_f}], got shape {tuple(x.shape)}")
        inside = self.space == "ball"
        u = self.ball.logmap0(x) if inside else x
        out = tangent_linear(u, self.weight, self.bias, self.ball.c, self.clip)
        if self.ball.debug:
            check_no_nan(out, "PoincareLinear")
        return self.ball.expmap0(out) if inside else out

    def extra_repr(self) -> str:
        """Sizes and choices, for ``print(model)``."""
        return (
            f"{self.in_f}, {self.out_f}, bias={self.bias is not None}, init={self.init!r}, "
            f"space={self.space!r}"
        )

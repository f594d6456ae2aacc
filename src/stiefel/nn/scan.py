"""All states of a diagonal linear recurrence at once: x_k = a_k x_{k-1} + b_k.

Composing (a, b) ∘ (a', b') = (a' a, a' b + b') is associative, so that stretches of the sequence
can be worked on side by side. Here the sequence is cut into chunks of T samples; step by step, all
chunks at once, each gets the state it ends with if it starts from nothing; these ends obey the same
recurrence with one step per chunk, and are found by the same method in double precision; then every
chunk runs again from the right state. Depth 2T log_T L (T = 2: 4 log₂ L), work 2 multiply-adds a
number, and rounding errors do not travel further than a chunk.

The recurrence is that of S5 (Smith et al., arXiv 2208.04933, appendix H).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from jaxtyping import Inexact, Shaped
from torch import Tensor

CHUNK = 32


def associative_scan(
    a: Shaped[Tensor, ...],
    b: Shaped[Tensor, "*batch"],
    reverse: bool = False,
    chunk: int = CHUNK,
) -> Inexact[Tensor, "*batch"]:
    """x_k = a_k x_{k-1} + b_k from x_{-1} = 0 along dimension -2; P independent recurrences.

    The backward pass is one more scan, from the other end: g_k = ∂x_k + ā_{k+1} g_{k+1} is the
    gradient of b, Σ_k x̄_{k-1} g_k that of a. It keeps x and a only. Second derivatives exist.

    Args:
        a: ``[P]``, the same factors at every step, or ``[..., L, P]``, broadcastable to b.
        b: ``[..., L, P]``, real or complex; the result has the common dtype.
        reverse: from the end instead, x_k = a_k x_{k+1} + b_k.
        chunk: T, at least 2. A few tens suit processors; 2 is the tree of least depth.

    Raises:
        ValueError: shapes that do not go together, L = 0, ``chunk`` below 2, NaN or infinities.
        TypeError: not floating point or complex.
    """
    for name, x in (("a", a), ("b", b)):
        if not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"{name} must be floating point or complex, got {x.dtype}")
    if b.ndim < 2 or b.shape[-2] < 1:
        raise ValueError(f"b must be [..., L, P] with L ≥ 1, got shape {tuple(b.shape)}")
    fits = a.shape == b.shape[-1:] or (
        2 <= a.ndim <= b.ndim
        and a.shape[-2:] == b.shape[-2:]
        and all(m in (1, n) for m, n in zip(a.shape[-3::-1], b.shape[-3::-1], strict=False))
    )
    if not fits:
        raise ValueError(
            f"a must be [P] or [..., L, P] that broadcasts to b, got shapes {tuple(a.shape)} "
            f"and {tuple(b.shape)}"
        )
    if operator.index(chunk) < 2:
        raise ValueError(f"chunk must be at least 2, got {chunk}")
    if not torch.compiler.is_compiling() and not b.is_meta:
        for name, x in (("a", a), ("b", b)):
            # A sum is a cheap first look; it may overflow, so that only the second look raises.
            x = x.detach()
            if not bool(x.sum().isfinite()) and not bool(x.isfinite().all()):
                raise ValueError(f"{name} must be finite, got NaN or infinities")
    return scan(a, b, reverse=reverse, chunk=chunk)


def scan(
    a: Tensor,
    b: Tensor,
    start: Tensor | None = None,
    *,
    reverse: bool = False,
    chunk: int = CHUNK,
) -> Tensor:
    """:func:`associative_scan` without its checks, from x_{-1} = ``start`` ``[..., P]``."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if start is not None:
        start = start.to(dtype)
    if torch.compiler.is_compiling():
        return _doubling(a, b, start, reverse)
    shape = b.shape
    if a.ndim > 1:
        a = a.expand(shape).reshape(-1, *shape[-2:])
    if start is not None:
        start = start.expand(*shape[:-2], shape[-1]).reshape(-1, shape[-1])
    x = _Scan.apply(a, b.reshape(-1, *shape[-2:]), start, reverse, chunk)  # pyrefly: ignore
    return x.reshape(shape)


class _Scan(torch.autograd.Function):
    """a ``[P]`` or ``[N, L, P]``, b ``[N, L, P]``, start ``[N, P]`` or None, all of one dtype."""

    @staticmethod
    def forward(  # pyrefly: ignore
        a: Tensor, b: Tensor, start: Tensor | None, reverse: bool, chunk: int
    ) -> Tensor:
        return _run(a.resolve_conj(), b.resolve_conj(), start, reverse, chunk)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        a, _, start, ctx.reverse, ctx.chunk = inputs
        ctx.save_for_backward(a, start, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore
        (grad,), (a, start, x) = grad_outputs, ctx.saved_tensors
        reverse = ctx.reverse
        factor = torch.conj_physical(a)
        after = factor
        if a.ndim > 1:  # step k + 1 multiplies what step k gave
            after = _shifted(factor, -1 if not reverse else 1, None)
        # With functions that are themselves differentiable: gradients of gradients come for free.
        g = _Scan.apply(after, grad, None, not reverse, ctx.chunk)  # pyrefly: ignore
        first = -1 if reverse else 0
        grad_a = grad_start = None
        if ctx.needs_input_grad[0]:
            if a.ndim > 1:
                grad_a = torch.conj_physical(_shifted(x, -1 if reverse else 1, start)) * g
            else:
                before, later = (x[:, 1:], g[:, :-1]) if reverse else (x[:, :-1], g[:, 1:])
                grad_a = (torch.conj_physical(before) * later).sum((0, 1))
                if start is not None:
                    grad_a = grad_a + (torch.conj_physical(start) * g[:, first]).sum(0)
        if start is not None and ctx.needs_input_grad[2]:
            grad_start = (factor if a.ndim == 1 else factor[:, first]) * g[:, first]
        return grad_a, g if ctx.needs_input_grad[1] else None, grad_start, None, None


def _shifted(x: Tensor, by: int, filling: Tensor | None) -> Tensor:
    """``[N, L, P]`` one sample later (``by`` = 1) or earlier (-1), ``[N, P]`` or zeros moved in."""
    edge = (torch.zeros_like(x[:, 0]) if filling is None else filling)[:, None]
    return torch.cat([edge, x[:, :-1]] if by > 0 else [x[:, 1:], edge], dim=1)


def _run(a: Tensor, b: Tensor, start: Tensor | None, reverse: bool, chunk: int) -> Tensor:
    """The scan itself, on ``[N, L, P]``; nothing here is differentiated."""
    rows, length, width = b.shape
    constant = a.ndim == 1
    chunks = -(-length // chunk)

    def part(x: Tensor, k: int, count: int) -> Tensor:
        """Sample k of each chunk, of ``count`` chunks from the first one on (or the last)."""
        if not reverse:
            return x[:, k::chunk][:, :count]
        found = x[:, (length - 1 - k) % chunk :: chunk]
        return found[:, found.shape[1] - count :]

    zero = b.new_zeros(rows, 1, width) if start is None else start[:, None]
    if chunks == 1:
        carry = zero
    else:
        # What every chunk but the last ends with, starting from nothing (Horner's rule).
        full = chunks - 1
        ends = part(b, 0, full).clone(memory_format=torch.contiguous_format)
        # From here on in double precision: the same error of aᵀ in every chunk would add up.
        wide = _widened(a.dtype) if a.device.type != "mps" else a.dtype
        product = _power(a.to(wide), chunk) if constant else part(a, 0, full).to(wide, copy=True)
        for k in range(1, chunk):
            factor = a if constant else part(a, k, full)
            torch.addcmul(part(b, k, full), ends, factor, out=ends)
            if not constant:
                product *= factor
        wide_start = None if start is None else start.to(wide)
        ends = _run(product, ends.to(wide), wide_start, reverse, chunk).to(b.dtype)
        carry = torch.cat([ends, zero] if reverse else [zero, ends], dim=1)
    x = torch.empty_like(b, memory_format=torch.contiguous_format)
    current = carry
    for k in range(min(chunk, length)):
        count = -(-(length - k) // chunk)
        # The last chunk may be shorter; the last in time stands first when running backwards.
        current = current[:, current.shape[1] - count :] if reverse else current[:, :count]
        out = part(x, k, count)
        torch.addcmul(part(b, k, count), current, a if constant else part(a, k, count), out=out)
        current = out
    return x


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float64)


def _power(a: Tensor, n: int) -> Tensor:
    """aⁿ by repeated squaring; ``pow`` takes logarithms, and a may be zero."""
    result = torch.ones_like(a)
    while n:
        if n & 1:
            result = result * a
        n >>= 1
        a = a * a
    return result


def _doubling(a: Tensor, b: Tensor, start: Tensor | None, reverse: bool) -> Tensor:
    """The same by log₂ L shifted multiply-adds (Hillis, Steele): for compilers, which fuse them."""
    length, x = b.shape[-2], b

    def shifted(y: Tensor, by: int) -> Tensor:
        pad = (0, 0, 0, by) if reverse else (0, 0, by, 0)
        kept = y[..., by:, :] if reverse else y[..., : length - by, :]
        return torch.nn.functional.pad(kept, pad)

    if a.ndim > 1:
        a = a.expand(b.shape)
    if start is not None:
        edge = (0, 0, length - 1, 0) if reverse else (0, 0, 0, length - 1)
        factor = a if a.ndim == 1 else a[..., -1 if reverse else 0, :]
        x = x + torch.nn.functional.pad((factor * start)[..., None, :], edge)
    if a.ndim == 1 and a.device.type != "mps":
        a = a.to(_widened(a.dtype))  # squared again and again
    step = 1
    while step < length:
        x = x + a.to(x.dtype) * shifted(x, step)
        a = a * (a if a.ndim == 1 else shifted(a, step))
        step *= 2
    return x

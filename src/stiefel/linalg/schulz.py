"""The Newton–Schulz polynomials of :mod:`stiefel.linalg.coefficients` at full speed.

Three things make it fast, none of which changes the polynomial: products on the short side only,
the Gram-side recursion for elongated matrices, and symmetric products computed by row strips. All
work is in-place on stacks of equal matrices, in buffers that are kept between calls.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.coefficients import Table
from stiefel.linalg.polar import frobenius_norm


class Workspace:
    """Scratch memory by name, grown when needed and reused between calls.

    One workspace serves one caller at a time; it is never part of any saved state.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """An uninitialised tensor of this shape; the same memory at the next call of this name."""
        size = 1
        for extent in shape:
            size *= extent
        key = (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, device=device)
            self._buffers[key] = buffer
        return buffer[:size].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values())


def orthogonalize(
    x: Float[Tensor, "*batch m n"], rule: Table, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "*batch m n"]:
    """Approximate polar factor of every matrix by the fast algorithm, without touching ``x``.

    Args:
        x: Matrices of shape ``(..., m, n)``. A zero matrix gives zero; NaN or Inf gives NaN.
        rule: Polynomial, from :func:`stiefel.linalg.coefficients.as_table`.
        dtype: Precision of the products; default that of ``x`` (float16 runs in float32).

    Returns:
        Same shape and dtype as ``x``. Not differentiable: use :func:`newton_schulz` for gradients.
    """
    with torch.no_grad():
        if dtype is None:
            dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        if x.numel() == 0:
            return x.clone()
        stack = x.reshape(-1, *x.shape[-2:])
        work = torch.empty(stack.shape, dtype=dtype, device=x.device)
        normalize_into(work, stack, rule)
        return orthogonalize_(work, rule, Workspace()).to(x.dtype).reshape(x.shape)


def normalize_into(
    out: Tensor, x: Tensor, rule: Table, eps: float | None = None, scratch: Tensor | None = None
) -> None:
    """``out`` ← x / (safety·‖x‖_F + eps) per matrix, for any scale of x; zero stays zero.

    ``scratch`` of x's shape and dtype, or x itself, spares a temporary where ``out`` has another
    dtype.
    """
    norm = frobenius_norm(x).mul_(rule.safety).add_(rule.eps if eps is None else eps)
    if x.dtype != torch.float64:
        norm = norm.to(torch.float32)
    # A norm below the smallest positive number can only be that of a zero matrix.
    norm.clamp_min_(_SMALLEST[norm.dtype])
    if scratch is None:
        torch.div(x, norm, out=out)
    else:
        out.copy_(torch.div(x, norm, out=scratch))


_SMALLEST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}


def orthogonalize_(
    x: Float[Tensor, "k m n"], rule: Table, space: Workspace
) -> Float[Tensor, "k m n"]:
    """Run ``rule`` on normalised matrices; destroys ``x``.

    The result lies in ``x`` or in memory of ``space``: use it before the next call.
    """
    k, m, n = x.shape
    tall = m > n
    short, long = (n, m) if tall else (m, n)
    if rule.steps == 0 or x.numel() == 0:
        return x
    spare = space.take("x", (k, m, n), x.dtype, x.device)
    r, p, q, t = (
        space.take(name, (k, short, short), x.dtype, x.device) for name in ("r", "p", "q", "t")
    )
    step = 0
    _symmetric(r, *((x.mT, x) if tall else (x, x.mT)))
    for length in _segments(rule, short, long, _is_spread(r)):
        triples = rule.triples[step : step + length]
        if step:
            _symmetric(r, *((x.mT, x) if tall else (x, x.mT)))
        step += length
        polynomial = _gram_polynomial(r, p, q, t, triples)
        torch.bmm(*((x, polynomial) if tall else (polynomial, x)), out=spare)
        x, spare = spare, x
    return x


def _gram_polynomial(r: Tensor, p: Tensor, q: Tensor, t: Tensor, triples: tuple) -> Tensor:
    """Q with X_end = Q X, from R = XXᵀ alone; destroys all four buffers.

    P = aI + bR + cR², Q ← QP, R ← PRP: R stays the Gram matrix of QX for the very Q that rounding
    leaves us with. Every product is symmetric, as polynomials of one matrix commute.
    """
    for index, (a, b, c) in enumerate(triples):
        _symmetric(p, r, r, add=r, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        if index == 0:
            q, p = p, q
            step = q
        else:
            _symmetric(t, q, p)
            step, q, t = p, t, q
        if index < len(triples) - 1:
            _symmetric(t, r, step)
            _symmetric(r, step, t)
    return q


def _symmetric(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    add: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> None:
    """``out`` ← beta·add + alpha·left@right, known to be symmetric.

    Large products on a CPU compute the upper row strips and mirror them.
    """
    strips = _strips(left.shape[-2], left.shape[-1], add is not None, left.device.type)
    if len(strips) == 1:
        if add is None:
            torch.bmm(left, right, out=out)
        else:
            torch.baddbmm(add, left, right, beta=beta, alpha=alpha, out=out)
        return
    sums = (None,) * len(out) if add is None else add.unbind(0)
    for o, rows, columns, base in zip(
        out.unbind(0), left.unbind(0), right.unbind(0), sums, strict=True
    ):  # mm takes strided operands as they are, bmm copies them
        for start, stop in strips:
            part, rest, target = rows[start:stop], columns[:, start:], o[start:stop, start:]
            if base is None:
                torch.mm(part, rest, out=target)
            else:
                own = base[start:stop, start:]
                torch.addmm(own, part, rest, beta=beta, alpha=alpha, out=target)
    for start, stop in strips[:-1]:
        out[:, stop:, start:stop] = out[:, start:stop, stop:].mT


@lru_cache(maxsize=256)
def _strips(n: int, inner: int, adds: bool, device: str) -> tuple[tuple[int, int], ...]:
    """Row ranges for a symmetric n × n product over ``inner``; one range means the plain product.

    Strips save up to half of the work and lose to smaller products and the mirroring: on a CPU two
    pay without a term to add, three for long sums, and with one for large n only (measured at
    n = 256 … 1024).
    """
    if device != "cpu" or n < (768 if adds else 256):
        return ((0, n),)
    count = (2 if inner < 2 * n else 3) + (n >= 768)
    width = -(-n // count // 32) * 32  # multiples of 32 keep the vector units full
    return tuple((i, min(i + width, n)) for i in range(0, n, width))


def _is_spread(r: Tensor) -> bool:
    """Whether no row carries more than 5 % of its matrix's weight (tr R = 1 at the start).

    Q holds numbers as large as the slope gathered, with rounding errors in proportion; along a
    direction v they add up to Σ v_i² δ_i, which averages out only if v is spread over many rows.
    With few active neurons it does not, and strong directions leave the polynomial's range. To look
    would stall an accelerator, which gets the cautious answer.
    """
    if r.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(r.diagonal(dim1=-2, dim2=-1).amax() <= 0.05)


# Below, plain steps cost next to nothing more.
_GRAM_FROM = 64


@lru_cache(maxsize=256)
def _segments(rule: Table, short: int, long: int, spread: bool) -> tuple[int, ...]:
    """Gram-side runs where they are safe and save work for this shape, else plain steps."""
    # In units of short³ multiply-adds: a plain step takes 2·ratio + 1; a Gram run of L steps takes
    # 2·ratio for XXᵀ and QX, L for R², and L − 1 each for QP, RP and P(RP).
    runs, ratio = rule.gram_segments(spread), long / short
    gram = sum(2 * ratio + 4 * length - 3 for length in runs)
    if short >= _GRAM_FROM and gram < rule.steps * (2 * ratio + 1):
        return runs
    return (1,) * rule.steps


def chunk_size(count: int, rows: int, cols: int, device: torch.device) -> int:
    """How many matrices of this shape to work on at once, of ``count``.

    Counting all buffers in bfloat16: on a CPU as many as stay in a shared cache, which already
    fills the vector units; on accelerators as many as fit a gigabyte.
    """
    budget = (7 << 20) if device.type == "cpu" else (1 << 30)
    short = min(rows, cols)
    return max(1, min(count, budget // max(1, 2 * (2 * rows * cols + 4 * short * short))))


@lru_cache(maxsize=8)
def product_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32; measured once on CPUs.

    Emulated products are slower than float32's, native ones two to four times faster, so a short
    timing tells them apart.
    """
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    if device_type != "cpu":
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        a @ a
        samples = []
        for _ in range(5):
            start = time.thread_time()
            a @ a
            samples.append(time.thread_time() - start)
        seconds[dtype] = min(samples)
    return torch.bfloat16 if seconds[torch.bfloat16] < seconds[torch.float32] else torch.float32

"""Error feedback in 8 or 4 bits (arXiv 2505.17967, quantised error feedback)."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

BITS = (4, 8)


def quantize(
    x: Float[Tensor, "*batch m n"], bits: int, dim: int = -1
) -> tuple[UInt8[Tensor, "*batch bytes"], Tensor, Tensor]:
    """Round every row to 2^bits levels between its least and its largest entry.

    u = (max − min) / (2^bits − 1) and q = ⌊(x − min)/u + ½⌋ per bucket; constant buckets have u = 0
    and q = 0. :func:`dequantize` is off by at most u/2.

    Args:
        x: Shape ``(..., m, n)``, float32 or float64; not changed.
        bits: 8 or 4.
        dim: Where a bucket extends: −1 makes rows buckets, −2 columns.

    Returns:
        The codes, one row of bytes per matrix (4-bit codes in pairs, see :func:`pack`), then min
        and u with ``x``'s shape except 1 at ``dim``. NaN or Inf in a bucket makes min or u NaN.

    Raises:
        ValueError: ``bits`` is not 4 or 8.
    """
    check_bits(bits)
    levels = 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)  # 13 times aminmax's speed
    # Divided first: the range of finite numbers may be infinite.
    unit = high / levels - low / levels
    scaled = torch.sub(x, low).mul_(1 / unit).add_(0.5)
    # NaN has no code: that of 0/0 in constant buckets becomes 0, others stay visible through min.
    codes = scaled.nan_to_num_(0.0).clamp_(0, levels).to(torch.uint8).flatten(-2)
    return (codes if bits == 8 else pack(codes)), low, unit


def dequantize(
    codes: UInt8[Tensor, "*batch bytes"],
    low: Float[Tensor, "*batch a b"],
    unit: Float[Tensor, "*batch a b"],
    bits: int,
    shape: tuple[int, int],
) -> Float[Tensor, "*batch m n"]:
    """q·u + min, of shape ``(..., m, n)`` in the dtype of ``low``; inverse of :func:`quantize`.

    Args:
        codes: Bytes from :func:`quantize`, as are ``low`` and ``unit`` (``(..., m, 1)`` or
            ``(..., 1, n)``).
        bits: 8 or 4.
        shape: (m, n).

    Raises:
        ValueError: ``bits`` is not 4 or 8.
    """
    check_bits(bits)
    if bits == 4:
        codes = unpack(codes, shape[0] * shape[1])
    q = codes.unflatten(-1, shape)
    return q.to(low.dtype).mul_(unit).add_(low)


def pack(codes: UInt8[Tensor, "*batch n"]) -> UInt8[Tensor, "*batch half"]:
    """Two 4-bit codes a byte along the last dimension, the first in the high half.

    An odd count is padded with one zero.
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def unpack(packed: UInt8[Tensor, "*batch half"], count: int) -> UInt8[Tensor, "*batch n"]:
    """The ``count`` codes that :func:`pack` stored, in their order."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2)[..., :count]


def code_bytes(rows: int, cols: int, bits: int) -> int:
    """Bytes that the codes of a matrix take."""
    return (rows * cols * bits + 7) // 8


def check_bits(bits: int) -> None:
    """Refuse all but 4 and 8."""
    if bits not in BITS:
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")

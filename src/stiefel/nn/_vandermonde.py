"""Products with a Vandermonde matrix exp(l z_n) that is never formed.

With l = aT + b the entry is exp(aT z) exp(b z), so a sum over n for every l is one real matrix
product of two factors with about √length rows each. The factors are split once more: each is an
outer product of two short tables, and only these hold exponentials. The exponents are computed in
the precision of z (float64 in the layers), as l·Im z runs over thousands of turns.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def block_length(length: int, least: int = 1) -> int:
    """T: the power of two at or above √length, or above ``least`` where that is larger.

    Never much above ``length``.
    """
    block = 1
    while block * block < length or block < min(least, length):
        block *= 2
    return block


def powers(
    z: Complex[Tensor, "*batch modes"], count: int, stride: int, dtype: torch.dtype
) -> Complex[Tensor, "*batch count modes"]:
    """exp(k · stride · z) for k = 0 … count - 1, in the complex ``dtype``."""
    fine = block_length(count)
    coarse = -(-count // fine)
    index = torch.arange(max(fine, coarse), dtype=z.real.dtype, device=z.device)[:, None]
    small = torch.exp(index[:fine] * stride * z[..., None, :]).to(dtype)
    large = torch.exp(index[:coarse] * (stride * fine) * z[..., None, :]).to(dtype)
    table = large[..., :, None, :] * small[..., None, :, :]
    return table.flatten(-3, -2)[..., :count, :]


def multiply(
    weights: Complex[Tensor, "rows channels modes"],
    z: Complex[Tensor, "channels modes"],
    length: int,
    dtype: torch.dtype,
    block: int | None = None,
) -> Float[Tensor, "rows channels length"]:
    """Re Σ_n weights[r, h, n] exp(l z[h, n]) for l = 0 … length - 1.

    Holds channels · modes · (rows · length / block + block) numbers of the complex ``dtype``;
    ``block`` is about √length by default.
    """
    rows, channels, _ = weights.shape
    block = block or block_length(length)
    blocks = -(-length // block)
    starts = powers(z, blocks, block, dtype)
    left = weights.to(dtype).transpose(0, 1)[:, :, None] * starts[:, None]
    # Re(p q) = (Re p, Im p) · (Re q̄, Im q̄): interleaved real parts make it one real product.
    left = torch.view_as_real(left).reshape(channels, rows * blocks, -1)
    right = torch.view_as_real(powers(z.conj(), block, 1, dtype).resolve_conj()).flatten(-2)
    table = (left @ right.mT).reshape(channels, rows, blocks * block)
    return table[..., :length].transpose(0, 1)


def gather(
    u: Float[Tensor, "batch length channels"],
    z: Complex[Tensor, "channels modes"],
    dtype: torch.dtype,
    block: int,
) -> Complex[Tensor, "batch channels modes"]:
    """Σ_l exp((length - 1 - l) z[h, n]) u[b, l, h]: what is left of every sample at the end."""
    batch, length, channels = u.shape
    blocks = -(-length // block)
    padded = torch.nn.functional.pad(u, (0, 0, blocks * block - length, 0))
    parts = padded.reshape(batch, blocks, block, channels).permute(3, 0, 1, 2)
    parts = parts.reshape(channels, batch * blocks, block)
    right = torch.view_as_real(powers(z, block, 1, dtype).flip(-2).resolve_conj()).flatten(-2)
    inner = torch.view_as_complex((parts @ right).reshape(channels, batch, blocks, -1, 2))
    return (inner * powers(z, blocks, block, dtype).flip(-2)[:, None]).sum(2).transpose(0, 1)

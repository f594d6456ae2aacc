"""Convolution of long sequences with kernels as long as they are, by FFT."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Transforms of these lengths split into small factors only.
_FACTORS = (2, 3, 5)
# Numbers transformed at a time on a CPU: their spectra stay in the cache.
_SLICE = 2**18


def fast_length(least: int) -> int:
    """The smallest even length ≥ ``least`` without prime factors above 5."""
    length = least + least % 2
    while not _is_smooth(length):
        length += 2
    return length


def _is_smooth(n: int) -> bool:
    for factor in _FACTORS:
        while n % factor == 0:
            n //= factor
    return n == 1


def convolve(
    u: Float[Tensor, "batch length channels"],
    past: Float[Tensor, "channels length"],
    future: Float[Tensor, "channels length"] | None = None,
) -> Float[Tensor, "batch length channels"]:
    """y_t = Σ_{l ≥ 0} past_l u_{t-l} + Σ_{l ≥ 0} future_l u_{t+1+l}; u is zero outside.

    Transforms of length ≥ 2L - 1, so nothing wraps around. Only u and the kernels are kept for the
    backward pass.
    """
    length = u.shape[1]
    size = fast_length(2 * length - 1)
    kernel = past
    if future is not None:
        gap = past.new_zeros(past.shape[0], size - 2 * length + 1)
        kernel = torch.cat([past, gap, future[:, : length - 1].flip(-1)], dim=-1)
    if torch.compiler.is_compiling():
        product = _spectrum(u, size) * torch.fft.rfft(kernel, n=size)
        return _signal(product, size, length)
    return _Convolution.apply(u, kernel, size)  # pyrefly: ignore


def _spectrum(u: Tensor, size: int) -> Tensor:
    """``[batch, channels, size // 2 + 1]`` of ``[batch, length, channels]``."""
    return torch.fft.rfft(u.mT.contiguous(), n=size)


def _signal(spectrum: Tensor, size: int, length: int) -> Tensor:
    """Back to ``[batch, length, channels]``."""
    return torch.fft.irfft(spectrum, n=size)[..., :length].mT


class _Convolution(torch.autograd.Function):
    """Circular convolution of length ``size``, cut to the length of u.

    Autograd's own backward of ``rfft`` fills up the spectrum and transforms complex numbers, and it
    keeps every spectrum. Transforming u once more while a slice is in the cache is cheaper.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, kernel: Tensor, size: int) -> Tensor:  # pyrefly: ignore
        factor = torch.fft.rfft(kernel, n=size)
        return torch.cat(
            [_signal(_spectrum(part, size) * factor, size, u.shape[1]) for part in _sliced(u, size)]
        ).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        u, kernel, ctx.size = inputs
        ctx.save_for_backward(u, kernel)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore
        (grad,), size = grad_outputs, ctx.size
        u, kernel = ctx.saved_tensors
        for_u, for_kernel = ctx.needs_input_grad[:2]
        factor = torch.conj_physical(torch.fft.rfft(kernel, n=size)) if for_u else None
        parts_u, total = [], None
        for part, part_grad in zip(_sliced(u, size), _sliced(grad, size), strict=True):
            spectrum = _spectrum(part_grad, size)
            if factor is not None:
                parts_u.append(_signal(spectrum * factor, size, u.shape[1]))
            if for_kernel:
                product = (spectrum * torch.conj_physical(_spectrum(part, size))).sum(0)
                total = product if total is None else total + product
        grad_u = torch.cat(parts_u).contiguous() if for_u else None
        if total is None:
            return grad_u, None, None
        return grad_u, torch.fft.irfft(total, n=size)[..., : kernel.shape[-1]], None


def _sliced(u: Tensor, size: int) -> tuple[Tensor, ...]:
    if u.device.type != "cpu":
        return (u,)
    return u.split(max(1, _SLICE // (size * u.shape[2])))

"""All singular values of a strided circular convolution, one small matrix per frequency.

Sedghi, Gupta, Long, "The singular values of convolutional layers" (ICLR 2019), with strides: a
layer of stride S is one of stride 1 on C·∏S channels, one per channel and offset, and the Fourier
transform takes that apart into one M × C·∏S matrix per frequency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stiefel.linalg._checks import compute_dtype
from stiefel.linalg.conv_geometry import per_axis
from stiefel.linalg.conv_penalty import check_kernel, output_size, polyphase

# Bytes of matrices held at once.
_CHUNK_BYTES = 16 << 20


def conv_singular_values(
    weight: Shaped[Tensor, "*kernel"],
    input_size: int | Iterable[int],
    stride: int | Iterable[int] = 1,
    groups: int = 1,
) -> Float[Tensor, "*frequencies values"]:
    """The singular values of the layer's matrix under circular padding. Differentiable.

    The frequencies are gone through in parts, and half of them suffice for real kernels: the
    matrices of all frequencies are never held at once (but for a backward pass).

    Args:
        weight: ``[M, C/groups, k]`` or ``[M, C/groups, k, l]``. Half types in float32.
        input_size: Pixels of the input, one or one per axis; may differ between axes. A kernel
            that is larger wraps around the image, as circular padding does.
        stride: S, one or one per axis; must divide the size.
        groups: Of the layer; their values are side by side, one group after the other.

    Returns:
        ``[N, groups·min(M, C·∏S)]`` or ``[N, N, …]`` with N = input / S and M, C of one group:
        descending within a group. Together they are all singular values with their multiplicity.

    Raises:
        TypeError: ``weight`` is not real floating point, sizes are not integers.
        ValueError: not a kernel of 1-D or 2-D, sizes, strides or groups below 1 or that do not
            divide, NaN or Inf.
    """
    return _over_frequencies(weight, input_size, stride, groups, torch.linalg.svdvals)


def conv_spectral_norm(
    weight: Shaped[Tensor, "*kernel"],
    input_size: int | Iterable[int],
    stride: int | Iterable[int] = 1,
    groups: int = 1,
) -> Float[Tensor, ""]:
    """The largest singular value alone: the Lipschitz constant of the layer. Differentiable.

    From Gram matrices on the shorter side, which squares the numbers: right to rounding for the
    largest value, which is all that is asked for.

    Args, raises: as :func:`conv_singular_values`.
    """
    return _over_frequencies(weight, input_size, stride, groups, _largest).amax()


def _largest(symbols: Tensor) -> Tensor:
    tall = symbols.shape[-2] > symbols.shape[-1]
    gram = symbols.mH @ symbols if tall else symbols @ symbols.mH
    # A zero kernel has no direction to differentiate in; its rounding may be negative.
    return torch.linalg.eigvalsh(gram)[..., -1:].clamp(min=0).sqrt()


def _over_frequencies(
    weight: Tensor,
    input_size: int | Iterable[int],
    stride: int | Iterable[int],
    groups: int,
    function: Callable[[Tensor], Tensor],
) -> Tensor:
    """``function`` of the matrices of all frequencies, ``[*N, groups·values]``."""
    check_kernel(weight, groups)
    dim = weight.ndim - 2
    outputs = output_size(input_size, stride, dim)
    x = weight.to(compute_dtype(weight.dtype)).reshape(groups, -1, *weight.shape[1:])
    kernel = polyphase(x, per_axis(stride, dim, "stride"))
    values = torch.cat([function(part).flatten(1) for part in symbols(kernel, outputs)])
    return values[_mirror(outputs, values.device)]


def symbols(
    kernel: Float[Tensor, "groups out inner *k"], outputs: tuple[int, ...]
) -> Iterator[Shaped[Tensor, "frequencies groups out inner"]]:
    """Σ_u K_u exp(−2πi ν·u/N) of a kernel of stride 1, for half of the frequencies, in parts.

    Half: ν from 0 to N/2 on the last axis; the others are conjugates. Row-major, last axis fastest.
    """
    grid = (*outputs[:-1], outputs[-1] // 2 + 1)
    count, matrix = math.prod(grid), kernel.shape[:3]
    taps = kernel.flatten(3)
    flat = taps.reshape(-1, taps.shape[-1])
    place = torch.cartesian_prod(*(torch.arange(k, device=kernel.device) for k in kernel.shape[3:]))
    place = place.reshape(taps.shape[-1], -1)
    per_chunk = max(1, _CHUNK_BYTES // (2 * kernel.element_size() * math.prod(matrix)))
    for start in range(0, count, per_chunk):
        index = torch.arange(start, min(start + per_chunk, count), device=kernel.device)
        turns = torch.zeros((), dtype=torch.float64, device=kernel.device)
        for axis, (nu, size) in enumerate(zip(_coordinates(index, grid), outputs, strict=True)):
            # Whole turns are taken off as integers: no digit of the phase is lost.
            turns = turns + (nu[:, None] * place[:, axis] % size).to(turns.dtype) / size
        angle = -2 * math.pi * turns
        real, imaginary = (f(angle).to(kernel.dtype) @ flat.mT for f in (torch.cos, torch.sin))
        yield torch.complex(real, imaginary).reshape(len(index), *matrix)


def _coordinates(index: Tensor, grid: tuple[int, ...]) -> list[Tensor]:
    """Row-major index to one coordinate per axis."""
    found = []
    for size in reversed(grid):
        found.append(index % size)
        index = index // size
    return found[::-1]


def _mirror(outputs: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each frequency's values stand among the half that was computed, ``[*N]``."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in outputs), indexing="ij")
    half = outputs[-1] // 2 + 1
    conjugate = axes[-1] >= half
    index = torch.zeros(outputs, dtype=torch.int64, device=device)
    for nu, size, width in zip(axes, outputs, (*outputs[:-1], half), strict=True):
        index = index * width + torch.where(conjugate, (size - nu) % size, nu)
    return index

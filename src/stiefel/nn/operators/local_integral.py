"""Convolution with a kernel of fixed physical size: taps follow the grid.

Source: sheet of arXiv 2506.10973, "Fixed-receptive-field conv"; Liu-Schiaffini et al.,
arXiv 2402.16845.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.nn.operators.checks import Sizes, check_field, chosen, grouped, positive, sizes
from stiefel.nn.operators.converted_layers import extend
from stiefel.nn.operators.running_mean import running_mean
from stiefel.nn.operators.taps import hat_taps as hat_taps
from stiefel.nn.operators.taps import official_taps as official_taps

Lengths = float | int | Iterable[float | int]
PADDING_MODES = ("circular", "replicate", "reflect", "zeros")
INTERPOLATIONS = ("hat", "official")
_CONVOLVE = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)


def local_integral(
    x: Shaped[Tensor, "batch channels *grid"],
    weight: Shaped[Tensor, "out inner *kernel"],
    ratio: Sequence[float | int],
    bias: Shaped[Tensor, " out"] | None = None,
    *,
    interpolation: str = "hat",
    padding_mode: str = "circular",
    groups: int = 1,
) -> Shaped[Tensor, "batch out *grid"]:
    """∫ κ(x − y) v(y) dy over the support of κ, on a grid ``ratio`` times as fine as that of W.

    κ is a sum of hats, see :func:`hat_taps`. For whole ratios its taps are those of W, r points
    apart, behind a hat of width r, which is a running mean of a running mean: the cost per point
    does not grow with r. Other ratios convolve with the resized taps.

    Args:
        x: Field.
        weight: W, ``[out, in / groups, *k]``, k odd.
        ratio: r = h₀/h per axis.
        bias: Added to each channel.
        interpolation: ``"hat"`` or ``"official"``, see :func:`official_taps`.
        padding_mode: How the field goes on beyond the grid; as wide as the kernel, in length.
        groups: As of a convolution.

    Raises:
        ValueError: Even k or a ratio that is not positive.
    """
    whole = [
        round(r) if interpolation == "hat" and r >= 1 and abs(r - round(r)) < 1e-6 * r else 1
        for r in ratio
    ]
    rest = [1.0 if s > 1 else _snapped(float(r)) for r, s in zip(ratio, whole, strict=True)]
    if any(s > 1 and k % 2 == 0 for s, k in zip(whole, weight.shape[2:], strict=True)):
        hat_taps(weight, ratio)  # raises
    taps = (hat_taps if interpolation == "hat" else official_taps)(weight, rest)
    ndim = len(whole)
    reach = [s * (k - 1) for s, k in zip(whole, taps.shape[2:], strict=True)]
    ends = [(n // 2 + s - 1, n - n // 2 + s - 1) for n, s in zip(reach, whole, strict=True)]
    y = extend(x, ends, padding_mode)
    if max(whole) > 1:
        y = running_mean(running_mean(y, whole), whole)
    return _CONVOLVE[ndim - 1](y, taps, bias, dilation=tuple(whole), groups=groups)


def _snapped(ratio: float) -> float:
    """1 exactly where rounding of spacings has moved it."""
    return 1.0 if abs(ratio - 1) < 1e-6 else ratio


class LocalIntegralConv(nn.Module):
    """A convolution whose kernel is a function of the physical offset.

    κ(δ) = (1/h₀) Σ_m W_m Λ(δ/h₀ − m): on a grid of spacing h₀ it is ``nn.Conv`` with taps W; on
    others the taps are resized so that the integral stays.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: k, odd; one number or one per axis.
        base_spacing: h₀, distance of the taps; one number or one per axis.
        radius: In place of ``base_spacing``: offset of the outermost tap, h₀ = radius / ⌊k/2⌋.
        ndim: Grid axes, 1 to 3; default: as many as ``kernel_size`` has numbers.
        domain: Length of the box per axis: spacings are ``domain`` / N.
        bias: Adds a constant to each channel.
        groups: As of a convolution.
        interpolation: ``"hat"`` keeps Σ taps, ``"official"`` is the authors' rule.
        padding_mode: ``circular``, ``replicate``, ``reflect`` or ``zeros``.
        generator: For the start, that of ``nn.Conv``.

    Raises:
        TypeError, ValueError: Neither or both of base_spacing and radius; even k with ``"hat"``;
            other settings out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        base_spacing: Lengths | None = None,
        radius: Lengths | None = None,
        ndim: int | None = None,
        *,
        domain: Lengths = 1.0,
        bias: bool = True,
        groups: int = 1,
        interpolation: str = "hat",
        padding_mode: str = "circular",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = sizes(kernel_size, ndim, "kernel_size")
        self.ndim = _check_ndim(len(self.kernel_size))
        self.interpolation = chosen(interpolation, INTERPOLATIONS, "interpolation")
        if interpolation == "hat" and any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(
                f"kernel_size must be odd with interpolation='hat', got {kernel_size!r}: an even "
                "kernel has no centre tap"
            )
        self.domain = lengths(domain, self.ndim, "domain")
        if radius is not None and base_spacing is None:
            half = [max(k // 2, 1) for k in self.kernel_size]
            reach = lengths(radius, self.ndim, "radius")
            self.base_spacing = tuple(r / p for r, p in zip(reach, half, strict=True))
        elif base_spacing is not None and radius is None:
            self.base_spacing = lengths(base_spacing, self.ndim, "base_spacing")
        else:
            raise ValueError("give either base_spacing or radius: the kernel's size is a length")
        self.padding_mode = chosen(padding_mode, PADDING_MODES, "padding_mode")
        self.in_channels, self.out_channels, self.groups = grouped(
            in_channels, out_channels, groups
        )
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        shift = torch.empty(out_channels, device=device, dtype=dtype)
        self.bias = nn.Parameter(shift) if bias else None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew."""
        start_convolution(self.weight, self.bias, generator)

    def forward(
        self, x: Shaped[Tensor, "batch channels *grid"], spacing: Lengths | None = None
    ) -> Shaped[Tensor, "batch out *grid"]:
        """``[batch, C_out, *grid]``.

        Args:
            x: ``[batch, C_in, *grid]``.
            spacing: h per axis; default ``domain`` / N.

        Raises:
            TypeError, ValueError: Wrong number of axes or channels, NaN, spacing not positive.
        """
        check_field(x, self.in_channels, self.ndim)
        here = spacings(x, self.domain, spacing)
        return local_integral(
            x,
            self.weight,
            [base / h for base, h in zip(self.base_spacing, here, strict=True)],
            self.bias,
            interpolation=self.interpolation,
            padding_mode=self.padding_mode,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"base_spacing={self.base_spacing}, domain={self.domain}, "
            f"interpolation={self.interpolation!r}, padding_mode={self.padding_mode!r}"
        )


def lengths(value: Lengths, ndim: int, name: str) -> tuple[float, ...]:
    """One positive number per axis; one number is repeated.

    Raises:
        ValueError: Not positive and finite, or the wrong number of them.
    """
    if not isinstance(value, Iterable):
        return (positive(value, name),) * ndim
    found = tuple(positive(v, name) for v in value)
    if len(found) != ndim:
        raise ValueError(f"{name} must be one number or {ndim}, got {value!r}")
    return found


def spacings(
    x: Shaped[Tensor, "batch channels *grid"], domain: Sequence[float], given: Lengths | None
) -> tuple[float, ...]:
    """Distance of neighbouring points per axis: ``given``, or the box length over N."""
    if given is not None:
        return lengths(given, x.ndim - 2, "spacing")
    return tuple(side / n for side, n in zip(domain, x.shape[2:], strict=True))


def start_convolution(
    weight: Float[Tensor, "out inner *kernel"],
    bias: Float[Tensor, " out"] | None,
    generator: torch.Generator | None,
) -> None:
    """The start of ``nn.Conv``: uniform within 1/√(fan in)."""
    bound = 1 / math.sqrt(weight[0].numel())
    for parameter in (weight, bias):
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound, generator=generator)


def _check_ndim(ndim: int) -> int:
    if not 1 <= ndim <= 3:
        raise ValueError(f"ndim must be 1, 2 or 3, got {ndim}")
    return ndim

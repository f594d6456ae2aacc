"""What the numbers of a convolution alone decide: which side is orthogonal, and whether it can be.

After Achour, Malgouyres, Mamalet, "Existence, Stability and Scalability of Orthogonal Convolutional
Neural Networks" (arXiv 2108.05623), with one number per axis for kernel and stride.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Case = Literal["RO", "CO", "square"]
PADDING_MODES = ("circular", "valid", "zeros_same")


@dataclass(frozen=True)
class ExistenceReport:
    """Whether a convolution can be orthogonal; true in a condition if it can.

    Attributes:
        exists: An orthogonal kernel exists that makes use of its window.
        case: ``"RO"`` orthonormal rows (M ≤ C·∏S), ``"CO"`` orthonormal columns, ``"square"`` both.
        reason: One sentence; where ``exists`` is false it names the inequality that fails.
        minimum: Smallest L_orth over all kernels, attained; 0 where the circular layer exists.
        reduced_kernel: Where padding with zeros leaves only kernels that vanish outside a block,
            and orthogonal ones are among them: the size of that block. ``(1, 1)`` is a 1 × 1
            convolution, whatever the nominal kernel. Otherwise None.
    """

    exists: bool
    case: Case
    reason: str
    minimum: float
    reduced_kernel: tuple[int, ...] | None = None

    def __bool__(self) -> bool:
        return self.exists


def per_axis(value: int | Iterable[int], dim: int, name: str) -> tuple[int, ...]:
    """One positive integer per axis, from one for all or a sequence of ``dim``.

    Raises:
        ValueError: another length, or an entry below 1.
        TypeError: not integers.
    """
    if isinstance(value, Iterable):
        numbers = tuple(operator.index(v) for v in value)
    else:
        numbers = (operator.index(value),) * dim
    if len(numbers) != dim:
        raise ValueError(f"{name} must be one integer or {dim}, got {value!r}")
    if min(numbers) < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return numbers


def check_channels(out_ch: int, in_ch: int, groups: int) -> tuple[int, int]:
    """Channels of one group, ``(out, in)``.

    Raises:
        ValueError: a number below 1, or channels that ``groups`` does not divide.
    """
    for name, value in (("groups", groups), ("out_ch", out_ch), ("in_ch", in_ch)):
        if operator.index(value) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (("out_ch", out_ch), ("in_ch", in_ch)):
        if value % groups:
            raise ValueError(f"{name} must be divisible by groups={groups}, got {value}")
    return out_ch // groups, in_ch // groups


def check_dim(dim: int) -> None:
    """Raise ``ValueError`` unless ``dim`` is 1 or 2."""
    if dim not in (1, 2):
        raise ValueError(f"dim must be 1 or 2, got {dim}")


def conv_orth_case(
    out_ch: int,
    in_ch: int,
    kernel_size: int | Iterable[int],
    stride: int | Iterable[int] = 1,
    dim: int = 2,
) -> Case:
    """Which products of the layer's matrix 𝒦 can be the identity.

    ``"RO"``: 𝒦𝒦ᵀ = I, if M < C·∏S; ``"CO"``: 𝒦ᵀ𝒦 = I, if M > C·∏S; ``"square"``: both. M is
    ``out_ch``, C is ``in_ch``, of one group; the kernel does not matter and is only checked.

    Raises:
        ValueError: a number below 1, a wrong number of sizes, ``dim`` neither 1 nor 2.
        TypeError: a size is not an integer.
    """
    check_dim(dim)
    out_ch, in_ch = check_channels(out_ch, in_ch, 1)
    per_axis(kernel_size, dim, "kernel_size")
    columns = in_ch * math.prod(per_axis(stride, dim, "stride"))
    if out_ch == columns:
        return "square"
    return "RO" if out_ch < columns else "CO"


def orthogonal_conv_exists(
    out_ch: int,
    in_ch: int,
    kernel_size: int | Iterable[int],
    stride: int | Iterable[int] = 1,
    padding_mode: str = "circular",
    dim: int = 2,
) -> ExistenceReport:
    """Whether some kernel makes the convolution orthogonal, at every image size.

    Circular padding (the paper's theorem, for one kernel size and stride per axis): with rows
    orthonormal if and only if M ≤ C·∏min(k, S), with columns if and only if S ≤ k on every axis.
    The smallest L_orth is max(0, M − C·∏min(k, S)) − max(0, M − C·∏S).

    ``"valid"``: the rows of the circular matrix that do not wrap, so the same kernels for rows. For
    columns only k = S: with k > S the first pixel sees nothing but the first taps and the last one
    nothing but the last, each of which would have to be the whole.

    ``"zeros_same"`` (odd k, padding (k − 1)/2): all taps vanish but those 0 … min(r, S − 1) steps
    after the centre, k = 2r + 1, which do not overlap. For S = 1 that is a 1 × 1 convolution.
    For k > 1 that counts as "does not exist", and ``reduced_kernel`` says what is left.

    Args:
        out_ch: M, ≥ 1; for a grouped layer, of one group.
        in_ch: C, ≥ 1; for a grouped layer, of one group.
        kernel_size: k, one or one per axis.
        stride: S, one or one per axis.
        padding_mode: ``"circular"``, ``"valid"`` or ``"zeros_same"``.
        dim: 1 or 2 axes.

    Raises:
        ValueError: a number below 1, a wrong number of sizes, an even kernel with ``"zeros_same"``,
            an unknown padding, ``dim`` neither 1 nor 2.
        TypeError: a size is not an integer.
    """
    case = conv_orth_case(out_ch, in_ch, kernel_size, stride, dim)
    k, s = per_axis(kernel_size, dim, "kernel_size"), per_axis(stride, dim, "stride")
    if padding_mode not in PADDING_MODES:
        raise ValueError(
            f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}"
        )
    if padding_mode == "zeros_same" and any(size % 2 == 0 for size in k):
        raise ValueError(f"zeros_same needs odd kernel sizes, got {kernel_size!r}")
    reason = _missing(out_ch, in_ch, k, s, case)
    least = float(
        max(0, out_ch - in_ch * math.prod(map(min, k, s))) - max(0, out_ch - in_ch * math.prod(s))
    )
    if reason:
        return ExistenceReport(False, case, reason, least)
    if padding_mode == "valid" and case == "CO" and k != s:
        return ExistenceReport(
            False, case,
            f"without padding, columns can be orthonormal only if k = S, got k = {_shown(k)} and "
            f"S = {_shown(s)}: the first and the last pixel see different taps only",
            least,
        )  # fmt: skip
    if padding_mode == "zeros_same" and max(k) > 1:
        return _with_zeros(out_ch, in_ch, k, s, case)
    given = f"M = {out_ch}, C = {in_ch}, k = {_shown(k)}, S = {_shown(s)}"
    return ExistenceReport(True, case, f"orthogonal kernels exist for {given}", least)


def _missing(m: int, c: int, k: tuple[int, ...], s: tuple[int, ...], case: Case) -> str:
    """Which inequality of the circular theorem fails; empty if none."""
    if case == "RO" and m > c * math.prod(map(min, k, s)):
        reach = c * math.prod(map(min, k, s))
        return (
            f"orthonormal rows need M ≤ C·∏min(k, S), got M = {m} and {reach} (C = {c}, "
            f"k = {_shown(k)}, S = {_shown(s)}): too few pixels are seen"
        )
    if case != "RO" and any(size < step for size, step in zip(k, s, strict=True)):
        return (
            f"orthonormal columns need S ≤ k, got S = {_shown(s)} and k = {_shown(k)} "
            f"(M = {m} ≥ C·∏S with C = {c}): some pixels are never seen"
        )
    return ""


def _with_zeros(
    m: int, c: int, k: tuple[int, ...], s: tuple[int, ...], case: Case
) -> ExistenceReport:
    """What is left of kernels that a border of zeros cuts, where the circular layer exists."""
    block = tuple(min((size + 1) // 2, step) for size, step in zip(k, s, strict=True))
    fits = not _missing(m, c, block, s, case)
    left = (
        f"which is a convolution of kernel {_shown(block)} that does not overlap"
        if fits
        else f"and those of kernel {_shown(block)} are too few"
    )
    return ExistenceReport(
        False, case,
        f"a border of zeros cuts the kernel, k = {_shown(k)}: all taps but the centre and those up "
        f"to S − 1 after it must vanish, {left}",
        0.0, block if fits else None,
    )  # fmt: skip


def _shown(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else " × ".join(map(str, sizes))

"""Quantiles of absolute values, per matrix, at a fraction of the cost of sorting."""

from __future__ import annotations

import math
import time
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.schulz import Workspace

MODES = ("exact", "sampled")

# Entries looked at by the sampled mode, at most. The quantile's relative error is
# √(q(1 − q)/n) / (ε f(ε)), 0.3 % for Gaussian entries at q = 0.9.
_SAMPLE = 65_536
# Below this size selecting is cheaper than looking for a bracket first.
_SMALL = 16_384
# The sample that brackets: a larger one costs more itself, a smaller one leaves more to collect.
_PILOT = 8192
# Half width of the bracket in standard deviations of a sample quantile: it misses once in 300.
_WIDTH = 3.0
# Entries worked on at a time: stays in the cache, and no large temporary is allocated.
_CHUNK = 32_768
# Entries that show whether many are equal, and numpy's time to partition one, in times of an AND,
# that tells vectorised from scalar code: 4 against 60 was measured.
_PROBE, _FAST = 64, 16
_KEYS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def abs_quantile(
    x: Float[Tensor, "*batch m n"],
    q: float,
    mode: str = "exact",
    *,
    check_nan: bool = True,
    space: Workspace | None = None,
) -> Float[Tensor, "*batch 1 1"]:
    """The q-quantile of |x| over each matrix, interpolated linearly at index q·(N − 1).

    Args:
        x: Matrices of shape ``(..., m, n)``, not empty. Not changed.
        q: In (0, 1]; 1 gives the largest absolute value.
        mode: ``"exact"``: the two order statistics themselves. ``"sampled"``: those of up to 65,536
            entries at equal distances, which is enough for a threshold.
        check_nan: False: NaN counts as larger than any number.
        space: Scratch memory to use on a CPU, of one matrix's size.

    Returns:
        In float64 for float64 input, else float32. NaN for a matrix that contains NaN (in sampled
        mode: if the sample does).

    Raises:
        ValueError: ``q`` outside (0, 1], an unknown mode, an empty matrix.
    """
    check_quantile(q)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"x must hold matrices with entries, got shape {tuple(x.shape)}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.device.type != "cpu":
        return _by_kthvalue(_entries(x, mode).abs(), q).to(dtype)[..., None, None]
    values = _values(x, q, mode, check_nan, space)
    return torch.tensor(values, dtype=dtype).reshape(*x.shape[:-2], 1, 1)


def clip_threshold(
    x: Float[Tensor, "*batch m n"], q: float, mode: str = "exact"
) -> Float[Tensor, "*batch 1 1"]:
    """:func:`abs_quantile`, or the smallest positive |x| of a matrix whose quantile is zero.

    A matrix with more than the share q of exact zeros (sparse embeddings, dead units) would
    otherwise lose everything to the clip. All zeros give zero. NaN counts as the
    largest number.
    """
    threshold = abs_quantile(x, q, mode, check_nan=False)
    if x.device.type == "cpu" and bool((threshold != 0).all()):
        return threshold
    magnitudes = x.detach().abs()
    smallest = magnitudes.masked_fill(magnitudes == 0, math.inf).amin((-2, -1), keepdim=True)
    smallest = smallest.masked_fill(smallest.isinf(), 0.0).to(threshold.dtype)
    return torch.where(threshold == 0, smallest, threshold)


def clip_(
    x: Float[Tensor, "k m n"], q: float, mode: str = "exact", space: Workspace | None = None
) -> None:
    """Clip each matrix to ± its :func:`clip_threshold`, in place.

    Args:
        x: Matrices, not empty.
        q: In (0, 1].
        mode: As in :func:`abs_quantile`, as is ``space``.
    """
    if x.device.type != "cpu":
        limit = clip_threshold(x, q, mode).to(x.dtype)
        torch.clamp(x, -limit, limit, out=x)
        return
    bounds = _values(x, q, mode, False, space)
    if not all(bounds):
        bounds = clip_threshold(x, q, mode).flatten().tolist()
    for matrix, bound in zip(x, bounds, strict=True):  # five times as fast as with tensors
        matrix.clamp_(-bound, bound)


def check_quantile(q: float) -> None:
    """Refuse what is no quantile.

    Raises:
        ValueError: ``q`` outside (0, 1].
    """
    if not 0 < q <= 1:
        raise ValueError(f"quantile must be in (0, 1], got {q}")


def _stride(size: int, columns: int, wanted: int) -> int:
    """Distance of at most about ``wanted`` samples that visit all columns alike."""
    stride = max(1, size // wanted)
    while stride > 1 and math.gcd(stride, columns) > 1:
        stride += 1
    return stride


def _position(size: int, q: float) -> tuple[int, int, float]:
    """The order statistics around index q·(size − 1), 0-based, and the weight of the upper one."""
    index = q * (size - 1)  # in float64: exact beyond the 2²⁴ of float32
    low = min(int(index), size - 1)
    return low, min(low + 1, size - 1), index - low


def _entries(x: Tensor, mode: str) -> Tensor:
    """The entries of every matrix that are looked at, (..., n)."""
    entries = x.detach().flatten(-2)
    if mode == "sampled":
        return entries[..., :: _stride(entries.shape[-1], x.shape[-1], _SAMPLE)]
    return entries


def _values(
    x: Tensor, q: float, mode: str, check_nan: bool, space: Workspace | None
) -> list[float]:
    """The quantile of each matrix on a CPU."""
    entries = _entries(x, mode)
    size, own = entries.shape[-1], _KEYS[x.element_size()]
    space = Workspace() if space is None else space
    keys = space.take("keys", (size,), own, x.device).numpy()
    columns = x.shape[-1] if mode == "exact" else 1
    rows = entries.reshape(-1, size).view(own).numpy()
    return [_select(bits, q, columns, check_nan, keys, x.dtype) for bits in rows]


def _by_kthvalue(magnitudes: Tensor, q: float) -> Tensor:
    """Radix selection, which accelerators have, for every row; in float64 where there is one."""
    low, high, weight = _position(magnitudes.shape[-1], q)
    lower, upper = (
        magnitudes.kthvalue(k + 1, dim=-1).values.to(
            torch.float32 if magnitudes.device.type == "mps" else torch.float64
        )
        for k in (low, high)
    )
    value = lower + weight * (upper - lower) if weight else lower
    return torch.where(magnitudes.isnan().any(-1), math.nan, value)


def _select(
    bits: np.ndarray, q: float, columns: int, check_nan: bool, keys: np.ndarray, dtype: torch.dtype
) -> float:
    """The quantile of numbers of this type, given as integers; ``keys`` is scratch for as many.

    Without their sign, floating-point numbers are ordered as their bits are, NaN last: every dtype
    is compared as integers.
    """
    low, high, weight = _position(bits.size, q)
    magnitude = np.iinfo(bits.dtype).max  # all bits but the sign
    pair = None
    if bits.size > _SMALL and not (
        _partitions_fast(bits.dtype) and _least_is_rare(bits, magnitude)
    ):
        pair = _by_bracket(bits, magnitude, low, high, columns, keys[:_CHUNK])
    if pair is None:
        np.bitwise_and(bits, magnitude, out=keys)
        # With two positions at once numpy is four times as slow.
        keys.partition(low)
        pair = keys[low], keys[low + 1 :].min() if high > low else keys[low]
    ends = [*pair, (bits & magnitude).max()] if check_nan else pair
    lower, upper, *largest = torch.from_numpy(np.array(ends)).view(dtype).tolist()
    if largest and math.isnan(largest[0]):
        return math.nan
    return lower + weight * (upper - lower) if weight else lower


def _by_bracket(
    bits: np.ndarray, magnitude: int, low: int, high: int, columns: int, keys: np.ndarray
) -> tuple[np.integer, np.integer] | None:
    """The order statistics ``low`` and ``high`` of ``bits & magnitude``, or None.

    A sample brackets them; the entries within the bracket are collected, those below it counted.
    None if it turns out that the bracket has missed.
    """
    sample = bits[:: _stride(bits.size, columns, _PILOT)] & magnitude
    share, last = low / bits.size, sample.size - 1
    width = _WIDTH * math.sqrt(share * (1 - share) * sample.size) + 2
    ends = max(0, int(share * last - width)), min(last, math.ceil(share * last + width))
    ordered = np.partition(sample, ends)
    # Beyond the ends of a sample there may be more.
    bottom = ordered[ends[0]] if ends[0] else bits.dtype.type(0)
    top = ordered[ends[1]] if ends[1] < last else magnitude
    below, kept = 0, []
    for start in range(0, bits.size, keys.size):
        part = bits[start : start + keys.size]
        part = np.bitwise_and(part, magnitude, out=keys[: part.size])
        under = part < bottom
        below += int(np.count_nonzero(under))
        kept.append(part[under ^ (part <= top)])
    inside = np.concatenate(kept)
    low, high = low - below, high - below
    if low < 0 or high >= inside.size:
        return None
    inside.partition(low)
    return inside[low], inside[low + 1 :].min() if high > low else inside[low]


def _least_is_rare(bits: np.ndarray, magnitude: int) -> bool:
    """Whether a few entries speak against half of them being the least one, mostly zero.

    Numpy's vectorised partition gets nowhere with such a half and starts again in scalar code.
    """
    probe = np.sort(bits[:: max(1, bits.size // _PROBE)] & magnitude)
    return bool(probe[0] != probe[probe.size // 4])


@lru_cache(maxsize=8)
def _partitions_fast(dtype: np.dtype) -> bool:
    """Whether numpy's partition is vectorised here for this type: measured once.

    Both ways lead to the same numbers.
    """
    bits = np.random.default_rng(0).integers(np.iinfo(dtype).max, size=_SAMPLE, dtype=dtype)
    keys, seconds = np.empty_like(bits), []
    for task in (lambda: np.bitwise_and(bits, 1, out=keys), lambda: bits.copy().partition(_CHUNK)):
        samples = []
        for _ in range(5):
            start = time.thread_time()
            task()
            samples.append(time.thread_time() - start)
        seconds.append(min(samples))
    return seconds[1] < _FAST * seconds[0]

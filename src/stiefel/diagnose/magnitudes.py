"""Counts of |w| in bins that need no logarithm: the leading bits of the number itself.

The bit pattern of a non-negative float grows with its value, so sixteen bits of it are a bin index.
One pass, no transcendental function, 32,768 counters, and histograms of parts add up to the
histogram of the whole: over chunks, shards or ranks. For bfloat16 and float16 sixteen bits are all
there is, and nothing is lost; float32 is rounded to bfloat16, so that a bin is centred on its
number and 0.8 % wide at most.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

KEYS = 2**15
# Elements at a time: keys of a chunk stay in cache, and the counters are not cleared too often.
CHUNK = 2**20
_KEY_TYPES = {torch.float32: torch.bfloat16, torch.float64: torch.bfloat16}
_HALF = (torch.bfloat16, torch.float16)


class NonFiniteError(ValueError):
    """Weights hold NaN or infinity, so their distribution says nothing."""


@cache
def _grid(dtype: torch.dtype) -> Tensor:
    """Magnitudes of all keys of a half type, float64 ``[32768]``; not finite at the end."""
    return torch.arange(KEYS, dtype=torch.int32).to(torch.int16).view(dtype).double()


class _Rooms(threading.local):
    """Space for the keys of a chunk, kept per thread: fresh pages cost as much as counting."""

    def __init__(self) -> None:
        self.kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_rooms = _Rooms()


def _room(dtype: torch.dtype, device: torch.device) -> Tensor:
    if (dtype, device) not in _rooms.kept:
        _rooms.kept[dtype, device] = torch.empty(CHUNK, dtype=dtype, device=device)
    return _rooms.kept[dtype, device]


@dataclass
class MagnitudeCounts:
    """A mergeable histogram of |w|.

    Attributes:
        dtype: bfloat16 or float16: whose bits the keys are. float32 and float64 are counted as
            bfloat16.
        counts: int64 ``[32768]``, by the bits of |w|.
    """

    dtype: torch.dtype
    counts: Tensor

    @classmethod
    def empty(cls, dtype: torch.dtype, device: torch.device | str = "cpu") -> MagnitudeCounts:
        """Nothing counted yet.

        Raises:
            TypeError: not a floating-point type, or one of eight bits (dequantise first).
        """
        if dtype not in _HALF and dtype not in _KEY_TYPES:
            raise TypeError(
                f"weights must be float64, float32, bfloat16 or float16, got {dtype}; quantised "
                "weights have to be dequantised first"
            )
        key = _KEY_TYPES.get(dtype, dtype)
        return cls(key, torch.zeros(KEYS, dtype=torch.int64, device=device))

    def update(self, weights: Tensor) -> MagnitudeCounts:
        """Count the entries of a tensor of any shape; returns itself.

        Raises:
            TypeError: a dtype that cannot be counted under these keys.
        """
        if _KEY_TYPES.get(weights.dtype, weights.dtype) != self.dtype:
            raise TypeError(f"these counts are of {self.dtype}, got {weights.dtype}")
        flat = weights.detach().reshape(-1)
        room = _room(self.dtype, flat.device)
        first_bad = self._first_bad
        for part in flat.split(CHUNK):
            keys = room[: len(part)].copy_(part).view(torch.int16)
            found = torch.bincount(keys.bitwise_and_(KEYS - 1), minlength=KEYS)
            bad = int(found[first_bad:].sum())
            if bad and weights.dtype not in _HALF:
                # The largest numbers round up to infinity; they are finite all the same.
                rounded = bad - int((~part.isfinite()).sum())
                found[first_bad] -= rounded
                found[first_bad - 1] += rounded
            self.counts += found
        return self

    def __add__(self, other: MagnitudeCounts) -> MagnitudeCounts:
        if other.dtype != self.dtype:
            raise TypeError(f"counts of {self.dtype} and {other.dtype} have different bins")
        return MagnitudeCounts(self.dtype, self.counts + other.counts)

    @property
    def _first_bad(self) -> int:
        """Key of infinity."""
        return 0x7C00 if self.dtype == torch.float16 else 0x7F80

    @property
    def total(self) -> int:
        """Entries seen, of any kind."""
        return int(self.counts.sum())

    @property
    def nonfinite(self) -> int:
        """NaN and infinities seen."""
        return int(self.counts[self._first_bad :].sum())

    @property
    def zeros(self) -> int:
        """Entries that are 0; of float32 also those below 2⁻¹³⁴."""
        return int(self.counts[0])

    def bins(self) -> tuple[Tensor, Tensor]:
        """Magnitude and count of the bins that hold finite non-zero entries; float64, ascending."""
        counts = self.counts[1 : self._first_bad].cpu()
        seen = counts.nonzero().flatten()
        return _grid(self.dtype)[1:][seen], counts[seen].double()


@dataclass(frozen=True)
class Spread:
    """How heavy the tail of |w| is, whatever the distribution; zeros left out.

    Attributes:
        q90_q10, q99_q50, p999_p50: Ratios of quantiles.
        gini: 0 where all magnitudes are alike, towards 1 where few hold everything.
        median: Of |w|.
    """

    q90_q10: float
    q99_q50: float
    p999_p50: float
    gini: float
    median: float


def spread(counts: MagnitudeCounts) -> Spread:
    """Quantile ratios and the Gini coefficient of what was counted; the fallback where no fit is.

    Raises:
        ValueError: nothing but zeros, NaN and infinities.
    """
    values, mass = counts.bins()
    if len(values) == 0:
        raise ValueError("no finite non-zero entries, so |w| has no spread")
    total = mass.sum()
    cumulated = (mass.cumsum(0) - mass / 2) / total

    def quantile(q: float | int) -> float:
        """Log-linear between bins, as these are even in the logarithm."""
        at = int(torch.searchsorted(cumulated, q))
        if at == 0 or at == len(values):
            return float(values[min(at, len(values) - 1)])
        low, high = values[at - 1].log(), values[at].log()
        part = (q - cumulated[at - 1]) / (cumulated[at] - cumulated[at - 1])
        return float((low + part * (high - low)).exp())

    share = torch.cat([values.new_zeros(1), (values * mass).cumsum(0) / (values * mass).sum()])
    people = torch.cat([values.new_zeros(1), mass.cumsum(0) / total])
    median = quantile(0.5)
    return Spread(
        q90_q10=quantile(0.9) / quantile(0.1),
        q99_q50=quantile(0.99) / median,
        p999_p50=quantile(0.999) / median,
        gini=float(1 - 2 * torch.trapezoid(share, people)),
        median=median,
    )

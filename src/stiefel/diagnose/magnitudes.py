"""Counts of |w| in bins that need no logarithm: the leading bits of the number itself.

The bit pattern of a non-negative float grows with its value, so its first sixteen bits are a bin
index. One pass, no transcendental function, 32,768 counters, and histograms of parts add up to the
histogram of the whole: over chunks, shards or ranks. For bfloat16 and float16 sixteen bits are all
there is, and nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEYS = 2**15
# Elements at a time: keys and magnitudes of a chunk stay in cache.
CHUNK = 2**19
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class NonFiniteError(ValueError):
    """Weights hold NaN or infinity, so their distribution says nothing."""


def _grid(dtype: torch.dtype) -> Tensor:
    """Magnitudes of all keys of a dtype, float64 ``[32768]``; NaN where a key is not finite."""
    keys = torch.arange(KEYS, dtype=torch.int32)
    if dtype == torch.float32:
        return (keys << 16).view(torch.float32).double()
    return keys.to(torch.int16).view(dtype).double()


@dataclass
class MagnitudeCounts:
    """A mergeable histogram of |w|.

    Attributes:
        dtype: float32, bfloat16 or float16: whose bits the keys are. float64 is counted as float32.
        counts: int64 ``[32768]``, by the leading bits of |w|.
    """

    dtype: torch.dtype
    counts: Tensor

    @classmethod
    def empty(cls, dtype: torch.dtype, device: torch.device | str = "cpu") -> MagnitudeCounts:
        """Nothing counted yet.

        Raises:
            TypeError: not a floating-point type, or one of eight bits (dequantise first).
        """
        if dtype == torch.float64:
            dtype = torch.float32
        if dtype not in _FLOATS:
            raise TypeError(
                f"weights must be float64, float32, bfloat16 or float16, got {dtype}; quantised "
                "weights have to be dequantised first"
            )
        return cls(dtype, torch.zeros(KEYS, dtype=torch.int64, device=device))

    def update(self, weights: Tensor) -> MagnitudeCounts:
        """Count the entries of a tensor of any shape; returns itself.

        Raises:
            TypeError: a dtype that cannot be counted under these keys.
        """
        same = weights.dtype == self.dtype
        if not same and not (weights.dtype == torch.float64 and self.dtype == torch.float32):
            raise TypeError(f"these counts are of {self.dtype}, got {weights.dtype}")
        flat = weights.detach().reshape(-1)
        for part in flat.split(CHUNK):
            if self.dtype == torch.float32:
                keys = part.to(torch.float32).view(torch.int32).bitwise_right_shift(16)
            else:
                keys = part.view(torch.int16)
            self.counts += torch.bincount(keys.bitwise_and(KEYS - 1), minlength=KEYS)
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
        """Entries that are 0; of float32 also those below 2⁻¹³³."""
        return int(self.counts[0])

    def bins(self) -> tuple[Tensor, Tensor]:
        """Representative magnitude and count of the bins that hold finite non-zero entries.

        For float32 the middle of a bin, for the half types the number itself. Both float64,
        ascending.
        """
        grid = _grid(self.dtype)
        if self.dtype == torch.float32:
            values = (grid[1 : self._first_bad] + _upper(grid, self._first_bad)) / 2
        else:
            values = grid[1 : self._first_bad]
        counts = self.counts[1 : self._first_bad].cpu()
        seen = counts > 0
        return values[seen], counts[seen].double()


def _upper(grid: Tensor, first_bad: int) -> Tensor:
    """Upper edges of the keys from 1 on; the last is the largest finite number."""
    upper = grid[2 : first_bad + 1].clone()
    upper[-1] = torch.finfo(torch.float32).max
    return upper


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

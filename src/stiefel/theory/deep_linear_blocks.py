"""Many time courses written into one matrix, each part of it while it is in the cache.

A thousand modes at ten thousand times are 80 MB: what counts is how often memory is touched. Three
things save work. Blocks fit the cache. On equally spaced times t_a + t_b the exponential of a sum
is a product, so that √T exponentials serve T times. Elsewhere, from where a mode has converged,
its end is written without computing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Elements that are worked on at one time where several temporaries are needed.
BLOCK = 1 << 14
# Bytes of the result that are worked on in place: with two factors they stay in a cache of 1 MB.
_BLOCK_BYTES = 1 << 20
# Rows whose factors are made together: those of all modes at once would leave the cache.
_ROWS = 512
# Fewer times than these are not worth a grid.
_LEAST_TIMES = 64
# 1 + e^−x is 1 from here on.
CONVERGED = {torch.float32: 25 * math.log(2.0), torch.float64: 54 * math.log(2.0)}
# Largest −logit(u0 δ/s) and |ln(s/δ)| for which the factors of the grid neither overflow nor,
# where it matters, lose digits to underflow: e^(60 + 20) and e^(600 + 80) are finite.
_RANGES = {torch.float32: (60.0, 20.0), torch.float64: (600.0, 80.0)}


class Grid(NamedTuple):
    """Equally spaced times first + k·step, k < count; ``apart``: relative distance from them."""

    first: float
    step: float
    count: int
    apart: float


def grid_of(times: Tensor) -> Grid | None:
    """The grid that ``times`` ``[T]`` lie on up to two roundings of each, None if on none."""
    count = times.shape[0]
    if count < _LEAST_TIMES:
        return None
    wide = times.double()
    first, last = float(wide[0]), float(wide[-1])
    step = (last - first) / (count - 1)
    if step < 0:
        return None
    fit = torch.arange(count, dtype=torch.float64, device=times.device).mul_(step).add_(first)
    # Relative to each time, not to the last: strong modes learn within the first few of them.
    off = fit.sub_(wide).abs_().div_(wide.clamp_min(torch.finfo(torch.float64).tiny))
    apart = float(off.max())
    bound = 2 * torch.finfo(times.dtype).eps
    return Grid(first, step, count, apart) if apart <= bound else None


def logistic_on_grid(
    start: Tensor, speed: Tensor, end: Tensor, grid: Grid, out: Tensor
) -> Tensor | None:
    """end·sigmoid(start + speed·t) into ``out`` ``[M, T]``; None where the range does not allow it.

    ``start``, ``speed``, ``end``: ``[M]`` in float64. 1/u = 1/end + P_a Q_b with
    P_a = e^{−start − speed·t_a}/end and Q_b = e^{−speed·b·step}: a multiplication, an addition and
    a reciprocal per value. The factors are rounded to ``out``'s dtype only once they are made, so
    that float32 is within 3e-7 of ``end`` and of each value.
    """
    log_end = end.log()
    deepest, widest = _RANGES[out.dtype]
    # u moves by at most (|start| + 2)/4 of the relative error of the times.
    apart = grid.apart * float((2 - start).max()) if out.dtype is torch.float32 else 0.0
    if float(start.min()) < -deepest or float(log_end.abs().max()) > widest or apart > 2e-6:
        return None
    # Binary exponents: torch's exp2 takes a third of the time of its exp.
    offset, rate = ((start + log_end) / math.log(2.0), speed / math.log(2.0))
    for top in range(0, len(start), _ROWS):
        rows = slice(top, top + _ROWS)
        _tiles(offset[rows], rate[rows], 1 / end[rows], grid, out[rows])
    return out


def _tiles(
    offset: Tensor,
    rate: Tensor,
    floor: Tensor,
    grid: Grid,
    out: Tensor,
) -> None:
    """Rows whose factors stay in the cache: 1 / (floor + 2^(−offset − rate·t))."""
    width = _width(grid.count)
    tiles, rest = divmod(grid.count, width)
    index = torch.arange(max(tiles + 1, width), dtype=torch.float64, device=out.device)
    coarse = rate[:, None] * (index[: tiles + 1] * (-width * grid.step) - grid.first)
    coarse.sub_(offset[:, None])
    fine = rate[:, None] * (index[:width] * -grid.step)
    left, right = (x.exp2_().to(out.dtype) for x in (coarse, fine))
    left, right = left[..., None], right[:, None]
    floor = floor.to(out.dtype)[:, None, None]
    if rest:
        tail = out[:, tiles * width :].unsqueeze(1)
        torch.mul(left[:, tiles:], right[..., :rest], out=tail)
        tail.add_(floor).reciprocal_()
    body, left = out[:, : tiles * width].unflatten(1, (tiles, width)), left[:, :tiles]
    height = max(1, _BLOCK_BYTES // (grid.count * out.element_size()))
    for top in range(0, len(floor), height):
        rows = slice(top, top + height)
        block = torch.mul(left[rows], right[rows], out=body[rows])
        block.add_(floor[rows]).reciprocal_()


def _bands(stops: list[int], most: int) -> Iterator[tuple[slice, int]]:
    """Bands of rows and the latest of their ``stops``: ``most`` elements each, or one row."""
    top = 0
    while top < len(stops):
        bottom, latest = top + 1, stops[top]
        while bottom < len(stops) and (bottom + 1 - top) * max(latest, stops[bottom]) <= most:
            latest = max(latest, stops[bottom])
            bottom += 1
        yield slice(top, bottom), latest
        top = bottom


@lru_cache(maxsize=256)
def _width(count: int) -> int:
    """How many neighbouring times make a tile: few exponentials, long rows, little left over."""
    # Multiples of 16 keep rows of tiles on lines of the cache.
    # A row of a tile costs as much as two exponentials to start, and so does one odd time.
    return min(
        range(16, min(count, 2048) + 1, 16),
        key=lambda width: width + 2 * (count // width) + 2 * (count % width),
    )


def empty(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix; on a CPU in NumPy's memory, which asks for huge pages.

    Getting 80 MB page by page takes three times as long as computing what goes into it.
    """
    names = {torch.float32: "float32", torch.float64: "float64"}
    if device.type == "cpu" and dtype in names:
        return torch.from_numpy(np.empty((rows, columns), dtype=names[dtype]))
    return torch.empty(rows, columns, dtype=dtype, device=device)


def in_blocks(
    times: Tensor,
    start: Tensor,
    speed: Tensor,
    end: Tensor,
    converged: float,
    finish: Callable[[Tensor, Tensor, slice], None],
    out: Tensor,
) -> Tensor:
    """``finish(start + speed·t, block, rows)`` for every block of ``out`` ``[M, T]``.

    ``start``, ``speed``, ``end``: ``[M, 1]``; ``times`` ``[1, T]`` or ``[M, T]``. ``finish`` writes
    into the block it is given; the phases may lie there already. Where modes share sorted times,
    those whose phase is above ``converged`` get ``end`` instead.
    """
    length = out.shape[1]
    for rows, stop in _bands(_stops(times, start[:, 0], speed[:, 0], converged), BLOCK):
        own = times[rows] if times.shape[0] > 1 else times
        if stop < length:
            out[rows, stop:] = end[rows]
        for left in range(0, stop, BLOCK):
            columns = slice(left, min(left + BLOCK, stop))
            block = out[rows, columns]
            if block.dtype is start.dtype and block.is_contiguous():
                # Two passes over one number a row are faster than one over two numbers.
                phase = torch.mul(own[:, columns], speed[rows], out=block)
            else:
                phase = own[:, columns] * speed[rows]
            finish(phase.add_(start[rows]), block, rows)
    return out


def _stops(times: Tensor, start: Tensor, speed: Tensor, converged: float) -> list[int]:
    """How many of the times come before each mode has converged; all unless they are sorted."""
    length = times.shape[-1]
    if times.shape[0] > 1 or not bool((times.diff() >= 0).all()):
        return [length] * len(start)
    return torch.searchsorted(times[0].contiguous(), (converged - start) / speed).tolist()

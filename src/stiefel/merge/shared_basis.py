"""Orthogonal bases that people share without sending them: a seed and a width are enough.

Orthogonal Adaptation (arXiv 2312.02432) gives every adapter r columns of one orthogonal O
``[m, m]`` per input width m. Here a column is computed when it is asked for, so O never stands in
memory (``"dct"``):

    O[k, j] = ε_k √(2/m) cos(π (2k + 1) p_j / (2m)),   p_j = 0: divided by √2.

The signs ε_k, which spread structured inputs, and the permutation p, which makes no frequency
special, come from integers alone. With 64-bit words modulo 2⁶⁴ and the mixing function of
SplitMix64 (Steele, Lea, Flood 2014),

    mix(z):   z += 0x9E3779B97F4A7C15;  z = (z ^ z>>30) · 0xBF58476D1CE4E5B9;
              z = (z ^ z>>27) · 0x94D049BB133111EB;  z ^ z>>31
    hash(w₁, …, w_n):  h = 0;  h = mix(h ^ w_i) for each i,

- ε_k is -1 where the top bit of hash(1, seed, k) is set,
- p is the stable argsort of hash(2, seed, m, j) over j,
- the columns of an adapter are the first r of the stable argsort of hash(3, seed, id, layer, m, j),

where ``id`` and ``layer`` are the first 8 bytes, little-endian, of the SHA-256 of
``"int:7"`` or ``"str:name"`` and of the layer's name. Any language gives the same columns.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stiefel.linalg import haar

Basis = Literal["dct", "qr"]
BASES = ("dct", "qr")

# First word of each hash: what it is for.
_SIGN, _ORDER, _COLUMNS, _NORMAL = 1, 2, 3, 4
_WORD = (1 << 64) - 1
# Orthogonal matrices of "qr" kept: the widths of one model.
_KEPT = 4


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashed(words: Sequence[int], last: np.ndarray) -> np.ndarray:
    """hash(w₁, …, w_n, x) of the module docstring for every x of ``last``, as uint64."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _mix(state ^ np.uint64(word & _WORD))
    return _mix(state ^ last.astype(np.uint64))


def text_word(text: str) -> int:
    """A name as a 64-bit word: the start of its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def identity_word(identity: str | int) -> int:
    """An adapter's id as a word; 7 and "7" are different."""
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise TypeError(f"adapter_id must be a string or an integer, got {identity!r}")
    return text_word(f"{type(identity).__name__}:{identity}")


def random_columns(
    m: int, r: int, *, seed: int = 0, adapter_id: str | int, layer: str = ""
) -> list[int]:
    """r different columns of 0 … m - 1 for one adapter in one layer, the same on every machine.

    Two adapters share r² / m columns on average.

    Raises ``ValueError`` unless 1 ≤ r ≤ m.
    """
    _check_rank(m, r)
    words = (_COLUMNS, seed, identity_word(adapter_id), text_word(layer), m)
    return np.argsort(hashed(words, np.arange(m)), kind="stable")[:r].tolist()


def slot_columns(m: int, r: int, slot: int) -> list[int]:
    """Columns s r … (s + 1) r - 1 of slot s: other slots share none of them.

    Raises ``ValueError`` unless 1 ≤ r ≤ m and 0 ≤ slot < ⌊m / r⌋.
    """
    _check_rank(m, r)
    slot = operator.index(slot)
    if not 0 <= slot < m // r:
        raise ValueError(
            f"slot must be in 0..{m // r - 1} for rank {r} of width {m}, got {slot}. When all "
            "slots are taken use a smaller rank, or scheme='columns', where columns may be shared"
        )
    return list(range(slot * r, (slot + 1) * r))


def free_slots(m: int, r: int, used: Iterable[int] = ()) -> list[int]:
    """Slots of rank r in width m that are not in ``used``; empty when all are taken.

    Raises ``ValueError`` where a used slot does not exist or stands twice, or r does not fit m.
    """
    _check_rank(m, r)
    taken = [operator.index(slot) for slot in used]
    wrong = sorted({slot for slot in taken if not 0 <= slot < m // r})
    if wrong:
        raise ValueError(f"used slots must be in 0..{m // r - 1}, got {wrong}")
    twice = sorted({slot for slot in taken if taken.count(slot) > 1})
    if twice:
        raise ValueError(f"slots {twice} are used twice: those adapters overlap entirely")
    return [slot for slot in range(m // r) if slot not in set(taken)]


def gaussian_columns(
    m: int, r: int, *, seed: int = 0, adapter_id: str | int, layer: str = ""
) -> Float[Tensor, "m r"]:
    """B with independent N(0, 1/m) entries: orthogonal to others only on average. float64.

    Box–Muller on hashed integers, so that B follows from seed, id and layer (to rounding).
    """
    _check_rank(m, r)
    words = (_NORMAL, seed, identity_word(adapter_id), text_word(layer), m)
    numbers = hashed(words, np.arange(2 * m * r)) >> np.uint64(11)
    first, second = numbers.astype(np.float64).reshape(2, m, r) * 2.0**-53
    # 1 - u is in (0, 1]: its logarithm is finite.
    normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)
    return torch.from_numpy(normal / math.sqrt(m))


def shared_basis(
    m: int,
    cols: Sequence[int] | Int[Tensor, " r"],
    *,
    basis: Basis = "dct",
    seed: int | None = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "m r"]:
    """Columns ``cols`` of the orthogonal matrix O ``[m, m]`` that ``seed`` and ``basis`` name.

    Args:
        m: width.
        cols: r different columns, each in 0 … m - 1.
        basis: ``"dct"`` computes the columns alone, O(m r), from integers and one cosine each
            (module docstring). ``"qr"`` draws all of a Haar orthogonal matrix with torch's
            generator (seed + m), O(m³); equal on other machines only to rounding.
        seed: of the signs and the order; None (``"dct"`` only): none of either, the plain basis.
        dtype: of the result; computed in float64 (``"qr"``: float32) and rounded last. In half
            precision columns are orthogonal to about 1e-2 only.

    Returns:
        B with BᵀB = I to rounding.

    Raises:
        ValueError: a column outside 0 … m - 1 or twice, no column, m < 1, an unknown basis.
        TypeError: ``dtype`` is not real floating point.

    Source: arXiv 2312.02432, section on the randomised orthogonal basis.
    """
    m = operator.index(m)
    chosen = [int(c) for c in cols]
    if m < 1 or not chosen:
        raise ValueError(f"m and the number of columns must be at least 1, got {m}, {len(chosen)}")
    wrong = [c for c in chosen if not 0 <= c < m]
    if wrong or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"cols must be different numbers in 0..{m - 1}, got "
            f"{wrong or sorted(c for c in set(chosen) if chosen.count(c) > 1)}"
        )
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be real floating point, got {dtype}")
    if basis == "qr":
        if seed is None:
            raise ValueError("seed must be an integer for basis='qr', got None")
        return _haar(m, seed)[:, chosen].to(device=device, dtype=dtype)
    if basis != "dct":
        raise ValueError(f"basis must be one of {', '.join(BASES)}, got {basis!r}")
    frequency = np.asarray(chosen) if seed is None else _order(m, seed)[chosen]
    row = np.arange(m)
    # Angles as integers modulo a full turn, 4m: cosines of large arguments would lose digits.
    turn = (2 * row[:, None] + 1) * frequency.astype(np.int64) % (4 * m)
    # As many different cosines as that; taken once and looked up.
    table = np.cos(np.arange(4 * m) * (math.pi / (2 * m))) * math.sqrt(2 / m)
    columns = table[turn]
    columns[:, frequency == 0] = math.sqrt(1 / m)
    if seed is not None:
        negative = hashed((_SIGN, seed), row) >> np.uint64(63) == 1
        columns[negative] *= -1
    return torch.from_numpy(columns).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _order(m: int, seed: int) -> np.ndarray:
    order = np.argsort(hashed((_ORDER, seed, m), np.arange(m)), kind="stable")
    order.flags.writeable = False
    return order


@lru_cache(maxsize=_KEPT)
def _haar(m: int, seed: int) -> Tensor:
    return haar(m, m, generator=torch.Generator().manual_seed(seed + m), dtype=torch.float32)


def _check_rank(m: int, r: int) -> None:
    if not 1 <= r <= m:
        raise ValueError(f"r must be in 1..{m}, the width of the input, got {r}")

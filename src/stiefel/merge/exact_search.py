"""Exact nearest neighbours by cosine: a low-precision screen with a certificate, then float32.

Every score is first computed in bfloat16, where the machine multiplies it several times faster.
Rounding moves a score by at most a bound that is known per query, so a candidate list is complete
as soon as the k-th exact score among the candidates lies above everything that was left out, by
more than that bound. Lists that are not complete are widened, or the row is computed in full. The
answer is the same as without the screen; only the time differs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Scores held at a time: 128 MB in float32.
BLOCK = 2**25
# Candidates beyond this many are not worth gathering: the row is computed in full.
WIDEST = 1024
_BF16_ROUNDING = 2.0**-9  # half a unit in the last place, relative
_FLOAT32_ROUNDING = 2.0**-24


class CosineIndex:
    """A gallery that is ready to be searched, exactly, as often as wanted.

    Args:
        gallery: ``[n, d]``, no row zero; kept as unit rows in float32 (float64 stays), and once
            more in bfloat16 where it is screened.
        screen: Whether to screen in bfloat16 first; None: where the device is fast at it. Only
            float32 and lower is screened. It changes the time, not the answer.

    Raises:
        ValueError: not a matrix, a zero row, NaN or infinity.
        TypeError: not floating point.
    """

    def __init__(self, gallery: Float[Tensor, "n d"], *, screen: bool | None = None) -> None:
        self.rows = unit_rows(gallery, "gallery")
        if screen is None:
            screen = multiplies_bfloat16_fast(self.rows.device)
        screen = screen and self.rows.dtype == torch.float32 and len(self.rows) > 0
        self._coarse = _Coarse(self.rows) if screen else None

    def __len__(self) -> int:
        return len(self.rows)

    def search(
        self,
        queries: Float[Tensor, "m e"],
        k: int,
        *,
        exclude: Int[Tensor, " _"] | None = None,
        chunk: int | None = None,
    ) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """The ``k`` rows of largest cosine with each query; ties by lowest row number.

        Args:
            queries: ``[m, d]``, of any length but zero.
            k: Neighbours per query, at most the rows that count.
            exclude: One row per query that does not count, such as the query itself.
            chunk: Queries at a time; by default what keeps the scores under 128 MB.

        Returns:
            Cosines, largest first, and row numbers.

        Raises:
            ValueError: sizes that do not fit, a zero row, NaN or infinity.
            TypeError: not floating point.
        """
        g = self.rows
        q = unit_rows(queries, "queries").to(g.dtype)
        available = len(g) - (exclude is not None)
        if q.shape[1] != g.shape[1]:
            raise ValueError(
                f"queries and gallery must have one width, got {q.shape[1]} and {g.shape[1]}"
            )
        if not 1 <= k <= available:
            raise ValueError(f"k must be between 1 and {available}, the rows that count, got {k}")
        if exclude is not None and exclude.shape != (len(q),):
            raise ValueError(f"exclude must hold one row per query, {len(q)}, got {len(exclude)}")
        coarse = self._coarse if len(g) > 4 * k + 32 else None
        values = torch.empty(len(q), k, dtype=q.dtype, device=q.device)
        indices = torch.empty(len(q), k, dtype=torch.int64, device=q.device)
        step = chunk or max(1, BLOCK // len(g))
        for start in range(0, len(q), step):
            rows = slice(start, start + step)
            skip = None if exclude is None else exclude[rows]
            if coarse is None:
                values[rows], indices[rows] = _in_full(q[rows], g, k, skip)
            else:
                values[rows], indices[rows] = coarse.search(q[rows], k, skip)
        return values, indices


def nearest(
    queries: Float[Tensor, "m d"],
    gallery: Float[Tensor, "n e"],
    k: int,
    *,
    exclude: Int[Tensor, " _"] | None = None,
    chunk: int | None = None,
    screen: bool | None = None,
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """One search of a gallery: ``CosineIndex(gallery, screen=…).search(queries, k, …)``.

    Cosines ``[m, k]``, largest first, and row numbers; errors as there.
    """
    return CosineIndex(gallery, screen=screen).search(queries, k, exclude=exclude, chunk=chunk)


def unit_rows(x: Tensor, name: str) -> Tensor:
    """Rows of length 1, in float32 or, for float64, as they are.

    Raises:
        TypeError: not floating point.
        ValueError: not a matrix, NaN or infinity, a row of zeros.
    """
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"{name} must be a matrix [rows, width], got shape {tuple(x.shape)}")
    x = x if x.dtype == torch.float64 else x.float()
    # By the largest entry first, so that no square overflows or vanishes.
    largest = x.abs().amax(1, keepdim=True) if x.numel() else x.new_ones(len(x), 1)
    bad = ~(largest.isfinite() & (largest > 0)).flatten()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        what = "only zeros, so no direction" if largest[row] == 0 else "NaN or infinity"
        raise ValueError(f"row {row} of {name} has {what} ({int(bad.sum())} such rows)")
    x = x / largest
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


def multiplies_bfloat16_fast(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices have instructions of their own on this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    has = (
        getattr(torch.cpu, f"_is_{unit}_supported", bool) for unit in ("avx512_bf16", "amx_tile")
    )
    return any(bool(supported()) for supported in has)


def _drop(scores: Tensor, skip: Tensor | None) -> Tensor:
    """Scores with the excluded entry of each row below all others, in place."""
    if skip is not None:
        scores[torch.arange(len(scores), device=scores.device), skip] = -torch.inf
    return scores


def _in_full(q: Tensor, g: Tensor, k: int, skip: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = _drop(q @ g.T, skip)
    top = scores.topk(k, dim=1)
    # topk leaves the order of equal scores open, also of those at its edge.
    edge = (scores >= top.values[:, -1:]).sum(1) > k
    values, indices = _by_score_then_index(top.values, top.indices)
    if bool(edge.any()):
        order = scores[edge].sort(dim=1, descending=True, stable=True)
        values[edge], indices[edge] = order.values[:, :k], order.indices[:, :k]
    return values, indices


def _by_score_then_index(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    indices, order = indices.sort(dim=1)
    values, final = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, final)


class _Coarse:
    """A gallery in bfloat16, with how far rounding can have moved its scores."""

    def __init__(self, gallery: Tensor) -> None:
        self.exact = gallery
        self.rounded = gallery.bfloat16()
        self.moved = float((gallery - self.rounded.float()).norm(dim=1).max())

    def search(self, q: Tensor, k: int, skip: Tensor | None) -> tuple[Tensor, Tensor]:
        rounded = q.bfloat16()
        scores = _drop(rounded @ self.rounded.T, skip)
        # |q·g − q̂·ĝ| ≤ |q − q̂||g| + |q̂||g − ĝ|, then the sum's rounding and the result's. Unit
        # vectors; the lengths after rounding are at most 1 + 2⁻⁹.
        sums = 2 * q.shape[1] * _FLOAT32_ROUNDING
        bound = (
            (q - rounded.float()).norm(dim=1) + 1.002 * self.moved + sums + 1.01 * _BF16_ROUNDING
        )
        values, indices, last, found = self._among(q, scores, 2 * k + 16, k)
        open_rows = (last + bound >= found).nonzero().flatten()
        if len(open_rows):
            low = (found - bound)[open_rows, None]
            # Widest list that certainly holds all rows that could still be among the k.
            width = int((scores[open_rows].float() >= low).sum(1).max())
            skipped = None if skip is None else skip[open_rows]
            if width <= min(WIDEST, len(self.exact)):
                wide = self._among(q[open_rows], scores[open_rows], width, k)[:2]
            else:
                wide = _in_full(q[open_rows], self.exact, k, skipped)
            values[open_rows], indices[open_rows] = wide
        return values, indices

    def _among(
        self, q: Tensor, scores: Tensor, width: int, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best ``k`` among the ``width`` best by coarse score; the last coarse, k-th exact."""
        coarse = scores.topk(width, dim=1)
        exact = torch.empty(coarse.indices.shape, dtype=q.dtype, device=q.device)
        step = max(1, BLOCK // (width * q.shape[1]))
        for start in range(0, len(q), step):
            rows = slice(start, start + step)
            found = self.exact[coarse.indices[rows]]
            exact[rows] = torch.bmm(found, q[rows, :, None])[..., 0]
        exact.masked_fill_(coarse.values == -torch.inf, -torch.inf)
        values, indices = _by_score_then_index(exact, coarse.indices)
        return values[:, :k], indices[:, :k], coarse.values[:, -1].float(), values[:, k - 1]

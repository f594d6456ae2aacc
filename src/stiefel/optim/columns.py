"""Low rank by choosing columns of a fixed orthogonal basis, no SVD (arXiv 2505.17967).

With the DCT as basis one fast transform gives the coordinates in every column at once; a matrix's
subspace is then a list of r integers.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from stiefel.linalg._checks import HALF_TYPES, check_floating, check_orthogonal, compute_dtype
from stiefel.linalg.dct import dct, dct_, dct_matrix

# Name, orthogonal matrix, or a function that makes one for any n.
Basis = str | Tensor | Callable[[int], Tensor]

# A Q is the row-wise transform of this type: Q = Dᵀ for "dct2" (columns are pure frequencies).
TYPES = {"dct2": 2, "dct3": 3}
METHODS = ("auto", "fft", "matmul")
# Above this width the n × n matrix is not worth its memory: always the fast transform.
_LARGEST_MATRIX = 8192
# Columns from which an FFT is faster than a product. CPU: one thread, AVX-512, torch 2.13, n from
# 48 to 8192 without a prime factor above 13: 57 to 72 in float32, 45 to 81 in float64, whatever n
# is, as the product takes n · columns and the FFT little more than n. CUDA: not measured, but
# estimated from bandwidth (six passes over the data) against float32 products.
_FFT_FROM = {"cpu": 64, "cuda": 448}
# So much more for other n; 273 to 394 columns were measured for primes and twice primes.
_ROUGH = 5


class ColumnSelector:
    """The r columns of an orthogonal basis that carry most of a matrix.

    Q (n, n) has orthonormal columns. For A (…, R, n)::

        S = A Q                     coordinates in all n columns
        I = the r largest of ‖S[:, j]‖_p, ascending; equal scores: the lower index first
        P = Q[:, I],  low = S[:, I]
        A ≈ low Pᵀ

    ‖A − low Pᵀ‖² = ‖A‖² − Σ_{j∈I} ‖S_j‖², so p = 2 is the best choice of r columns of this basis,
    and the error is at most (1 − r/n) ‖A‖². Neither A's scale nor the order of its rows matters.

    Args:
        n: Width of the matrices.
        rank: r, an integer ≥ 1, or a fraction of n in (0, 1). More than n is n, with a warning.
        basis: ``"dct2"`` (columns of Q are cosines of one frequency), ``"dct3"`` (its transpose),
            an orthogonal (n, n) tensor, or a function from n to one.
        norm: p of the scores, 1 (the authors' code) or 2.
        method: ``"fft"``, ``"matmul"``, or ``"auto"``: what is faster for this n and rank, by a
            rule of sizes, the same on every run.

    Every method takes ``dim``: −1 for the above, −2 for the same with all matrices transposed: A
    (…, n, C), low (…, r, C). Low precision is transformed in float32.

    Raises:
        ValueError: a setting out of range; a basis that is not orthogonal.
        TypeError: ``rank`` or ``n`` is no number; a matrix that is not real floating point.
    """

    def __init__(
        self,
        n: int,
        rank: int | float,
        basis: Basis = "dct2",
        norm: int = 1,
        method: str = "auto",
    ) -> None:
        self.n = operator.index(n)
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self.rank = resolve_rank(rank, self.n)
        check_basis(basis)
        if isinstance(norm, bool) or norm not in (1, 2):
            raise ValueError(f"norm must be 1 or 2, got {norm!r}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if isinstance(rank, int) and rank > self.n:
            warnings.warn(f"rank {rank} is more than n = {n}; using {n}", UserWarning, stacklevel=2)
        self.norm = norm
        self.method = method
        self._type = TYPES[basis] if isinstance(basis, str) else None
        self._atoms: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        if not isinstance(basis, str):
            q = basis if isinstance(basis, Tensor) else basis(self.n)
            if tuple(q.shape) != (self.n, self.n):
                raise ValueError(
                    f"basis must have shape ({self.n}, {self.n}), got {tuple(q.shape)}"
                )
            check_orthogonal(q, "basis")
            if method == "fft":
                raise ValueError("method='fft' needs basis 'dct2' or 'dct3', got a matrix")
            rows = q.detach().mT.contiguous()
            self._atoms[rows.dtype, rows.device] = rows

    # The four operations of the paper

    def select(
        self, a: Float[Tensor, "*batch m n"], *, dim: int = -1
    ) -> tuple[Float[Tensor, "*batch p q"], Int[Tensor, "*batch r"]]:
        """``(low, idx)`` for every matrix of ``a`` (…, R, n): low (…, R, r), idx (…, r) ascending.

        ``a`` is not changed; low has its dtype. NaN counts as the largest score.
        """
        self._check(a, "a", self.n, dim)
        s = self.coefficients(a, dim)
        idx = self.choose(s, dim)
        return self.take(s, idx, dim), idx

    def expand(
        self, low: Float[Tensor, "*batch p q"], idx: Int[Tensor, "*batch r"], *, dim: int = -1
    ) -> Float[Tensor, "*batch m n"]:
        """low Pᵀ, the matrix (…, R, n) with these coordinates in the columns ``idx``."""
        self._check(low, "low", idx.shape[-1], dim)
        if self.uses_fft(idx.shape[-1], low.device):
            shape = list(low.shape)
            shape[dim] = self.n
            full = torch.empty(shape, dtype=compute_dtype(low.dtype), device=low.device)
            return self.expand_into_(full, low, idx, dim).to(low.dtype)
        p = self._chosen(idx, low.dtype)
        return low @ p if dim == -1 else p.mT @ low

    @staticmethod
    def carry(
        state: Shaped[Tensor, "*batch p q"],
        idx_prev: Int[Tensor, "*batch r"],
        idx_new: Int[Tensor, "*batch s"],
        *,
        dim: int = -1,
    ) -> Shaped[Tensor, "*batch u v"]:
        """state · P_prevᵀ P_new: what ``state`` in the old columns is in the new ones.

        The columns of Q are orthonormal, so the product is a choice of columns: those in both lists
        are moved, the others of the new list are zero. Both lists ascend.
        """
        place = torch.searchsorted(idx_prev, idx_new).clamp_max_(idx_prev.shape[-1] - 1)
        gone = idx_prev.gather(-1, place) != idx_new
        carried = ColumnSelector.take(state, place, dim)
        return carried.masked_fill_(gone.unsqueeze(-2 if dim == -1 else -1), 0)

    @staticmethod
    def error(
        a: Float[Tensor, "*batch m n"], low: Float[Tensor, "*batch p q"]
    ) -> Float[Tensor, "*batch"]:
        """Relative error ‖A − low Pᵀ‖_F / ‖A‖_F, for low from :meth:`select` of this ``a``.

        From √(‖A‖² − ‖low‖²) / ‖A‖, the norms in float64: below about √ε it is rounding of low.
        0 for a zero matrix. Either ``dim``.
        """
        wide = torch.float32 if a.device.type == "mps" else torch.float64
        whole, part = (torch.linalg.vector_norm(x, dim=(-2, -1), dtype=wide) for x in (a, low))
        ratio = part / torch.where(whole > 0, whole, 1.0)
        return torch.where(whole > 0, (1 - ratio.square()).clamp_min(0).sqrt(), 0.0).to(a.dtype)

    # What they are made of; optimizers use these directly

    def coefficients(self, a: Tensor, dim: int = -1) -> Tensor:
        """S = A Q, in memory of its own: all n coordinates along ``dim``."""
        if self.uses_fft(self.n, a.device):
            return dct(a, dim=dim, type=self._type or 2)
        rows = self._rows(a.dtype, a.device)
        return a @ rows.mT if dim == -1 else rows @ a

    def transform_(self, work: Tensor, dim: int = -1) -> Tensor:
        """:meth:`coefficients` by FFT of float32 or float64 scratch memory, which it may destroy.

        The result lies there or elsewhere.
        """
        return dct_(work, dim=dim, type=self._type or 2)

    def expand_into_(self, work: Tensor, low: Tensor, idx: Tensor, dim: int = -1) -> Tensor:
        """:meth:`expand` by FFT in scratch memory; the result lies there or elsewhere."""
        work.zero_().scatter_(dim, _spread(idx, low, dim), low.to(work.dtype))
        return dct_(work, dim=dim, type=5 - (self._type or 2))

    def choose(self, s: Tensor, dim: int = -1) -> Tensor:
        """Ascending indices (…, r) of the largest slices of S along ``dim``."""
        scores = _scores(s, -2 if dim == -1 else -1, self.norm)
        # topk leaves the order of equal scores open.
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.rank]
        return best.sort(dim=-1).values

    @staticmethod
    def take(s: Tensor, idx: Tensor, dim: int = -1) -> Tensor:
        """S[:, I] per matrix."""
        if idx.numel() == idx.shape[-1]:  # one matrix: ten times as fast in two dimensions
            taken = s.reshape(s.shape[-2:]).index_select(dim, idx.view(-1))
            return taken.view(*s.shape[:-2], *taken.shape)
        return torch.gather(s, dim, _spread(idx, s, dim))

    def project(self, a: Tensor, idx: Tensor, dim: int = -1) -> Tensor:
        """A Q[:, I] for columns that are known already."""
        if self.uses_fft(idx.shape[-1], a.device):
            return self.take(self.coefficients(a, dim), idx, dim)
        p = self._chosen(idx, a.dtype)
        return a @ p.mT if dim == -1 else p @ a

    def weights(self, idx: Tensor, value: float, dtype: torch.dtype, dim: int = -1) -> Tensor:
        """``value`` at the chosen indices and 1 elsewhere, broadcasting against S."""
        weights = torch.ones(*idx.shape[:-1], self.n, dtype=dtype, device=idx.device)
        return weights.scatter_(-1, idx, value).unsqueeze(-2 if dim == -1 else -1)

    def uses_fft(self, columns: int, device: torch.device) -> bool:
        """Whether a transform to or from ``columns`` of the n columns goes by FFT."""
        if self.method != "auto" or self._type is None:
            return self.method == "fft"
        return self.n > _LARGEST_MATRIX or columns >= _fft_from(self.n, device.type)

    def _rows(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Qᵀ (n, n): row j is column j of the basis."""
        if self._type is not None:
            return _dct_rows(self.n, self._type, dtype, device)
        rows = self._atoms.get((dtype, device))
        if rows is None:
            rows = next(iter(self._atoms.values())).to(device, dtype)
            self._atoms[dtype, device] = rows
        return rows

    def _chosen(self, idx: Tensor, dtype: torch.dtype) -> Tensor:
        """Pᵀ (…, r, n)."""
        rows = self._rows(dtype, idx.device)
        return rows.index_select(0, idx.reshape(-1)).view(*idx.shape, self.n)

    def _check(self, x: Tensor, name: str, extent: int, dim: int) -> None:
        check_floating(x, name)
        if dim not in (-1, -2):
            raise ValueError(f"dim must be -1 or -2, got {dim}")
        if x.ndim < 2 or x.shape[dim] != extent:
            wanted = f"(…, m, {extent})" if dim == -1 else f"(…, {extent}, m)"
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")


def low_rank_svd_projector(
    a: Float[Tensor, "*batch m n"], rank: int | float
) -> Float[Tensor, "*batch n r"]:
    """The best rank-r basis: leading right singular vectors P, so that A ≈ A P Pᵀ.

    What the fixed basis replaces, here as the baseline: an SVD per matrix. GaLore's projector.

    Args:
        a: Shape ``(..., R, n)``; low precision is computed in float32.
        rank: As in :class:`ColumnSelector`.

    Returns:
        P with orthonormal columns, shape ``(..., n, r)``, r ≤ min(R, n).
    """
    check_floating(a, "a")
    r = min(resolve_rank(rank, a.shape[-1]), a.shape[-2])
    vh = torch.linalg.svd(a.to(compute_dtype(a.dtype)), full_matrices=False).Vh
    return vh[..., :r, :].mT.to(a.dtype)


def resolve_rank(rank: int | float, n: int) -> int:
    """The number of columns: an integer, at most n, or a fraction of n rounded, at least 1.

    Raises:
        ValueError: an integer below 1, or a fraction outside (0, 1).
        TypeError: no number.
    """
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(f"rank must be an integer or a fraction, got {rank!r}")
    if isinstance(rank, int):
        if rank < 1:
            raise ValueError(f"rank must be at least 1, or a fraction in (0, 1), got {rank}")
        return min(rank, n)
    if not 0 < rank < 1:
        raise ValueError(f"rank must be a fraction in (0, 1) or an integer, got {rank}")
    return max(1, round(rank * n))


def check_basis(basis: Basis) -> None:
    """Refuse what is neither a known name nor a matrix nor a function."""
    if not (isinstance(basis, Tensor) or callable(basis)) and basis not in tuple(TYPES):
        raise ValueError(f"basis must be one of {tuple(TYPES)} or a matrix, got {basis!r}")


def _scores(s: Tensor, dim: int, norm: int) -> Tensor:
    """‖·‖_p along ``dim``, at least in float32, right where squares leave its range."""
    s = s.detach()
    if norm == 1:  # several times faster than vector_norm down the columns of a row-major matrix
        return s.abs().sum(dim, dtype=compute_dtype(s.dtype))
    if s.dtype in HALF_TYPES:
        s = s.float()
    squares = s.square().sum(dim)
    if s.dtype == torch.float64 or s.device.type != "cpu":
        # Looking at the range is free on a CPU and would stall an accelerator.
        wide = torch.float32 if s.device.type == "mps" else torch.float64
        return squares if s.dtype == wide else s.to(wide).square_().sum(dim)
    largest = squares.amax()
    if bool((largest > 1e-30) & (largest < 1e37)):
        return squares
    return s.double().square_().sum(dim)


def _spread(idx: Tensor, like: Tensor, dim: int) -> Tensor:
    """Indices (…, r) along ``dim`` of ``like``, the same for every slice."""
    if dim == -1:
        return idx[..., None, :].expand(*idx.shape[:-1], like.shape[-2], idx.shape[-1])
    return idx[..., :, None].expand(*idx.shape, like.shape[-1])


def _dct_rows(n: int, kind: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The DCT matrix, one per size shared by all layers; a tracer's must not be kept."""
    if torch.compiler.is_compiling():
        return dct_matrix(n, type=kind, dtype=dtype, device=device)
    return _kept_dct_rows(n, kind, dtype, device)


@lru_cache(maxsize=32)
def _kept_dct_rows(n: int, kind: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else it could never be used with autograd
        return dct_matrix(n, type=kind, dtype=dtype, device=device)


@lru_cache(maxsize=256)
def _fft_from(n: int, device: str) -> int:
    """From how many of n columns on a transform goes by FFT.

    By sizes alone, so that a run can be repeated to the last bit.
    """
    if device not in _FFT_FROM:
        return n + 1  # transforms may be missing there, and products are what it is for
    rest = n
    for prime in (2, 3, 5, 7, 11, 13):
        while rest % prime == 0:
            rest //= prime
    return _FFT_FROM[device] * (1 if rest == 1 else _ROUGH)

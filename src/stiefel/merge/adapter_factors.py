"""Low-rank updates as pairs of factors: sums by concatenation, smaller ranks by a small SVD.

With ΔW = B A, B = Q_B R_B and Aᵀ = Q_A R_A (thin QR), the singular values of ΔW are those of the
R × R core R_B R_Aᵀ: O((out + in) R² + R³) instead of a dense SVD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import compute_dtype

# Extra directions and passes of the randomised range finder (Halko, Martinsson, Tropp 2011, 4.5).
_OVERSAMPLING = 10
_PASSES = 4


@dataclass(frozen=True)
class LowRank:
    """ΔW = scaling · up @ down of one module, in the orientation of ``nn.Linear``."""

    up: Float[Tensor, "out r"]
    down: Float[Tensor, "r in"]
    scaling: float = 1.0
    kernel: tuple[int, ...] = ()
    """Of a convolution: its ``in`` is channels × kernel, flattened."""
    embedding: bool = False
    """``out`` is the vocabulary: ΔE ``[vocabulary, width]``."""

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the module's weight."""
        out, width = self.up.shape[0], self.down.shape[1]
        for size in self.kernel:
            width //= size
        return (out, width, *self.kernel)

    def delta(self) -> Tensor:
        """ΔW, dense, in the module's shape; half types are multiplied in float32."""
        work = compute_dtype(self.up.dtype)
        return (self.up.to(work) @ self.down.to(work)).mul_(self.scaling).reshape(self.shape)


def concatenate(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ_i w_i ΔW_i as one update of rank Σ r_i and scaling 1; exact but for rounding w_i s_i B_i.

    Half types come out in float32.

    Raises:
        ValueError: nothing to add, as many weights as parts are not given, or shapes differ.
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(f"one weight a part is needed, got {len(parts)} and {len(weights)}")
    kinds = {(part.shape, part.embedding) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"updates must have one shape, got {sorted(k[0] for k in kinds)}")
    work = compute_dtype(reduce(torch.promote_types, [part.up.dtype for part in parts]))
    up = torch.cat(
        [p.up.to(work) * (w * p.scaling) for p, w in zip(parts, weights, strict=True)], 1
    )
    down = torch.cat([p.down.to(work) for p in parts], 0)
    return LowRank(up, down, 1.0, parts[0].kernel, parts[0].embedding)


def reduce_rank(update: LowRank, rank: int) -> tuple[LowRank, float]:
    """The nearest update of at most ``rank`` in the Frobenius norm (Eckart–Young), scaling 1.

    The singular values are shared evenly between the factors. Exact where ``rank`` is at least the
    rank of ΔW; the result has as many columns as asked for, ``min(out, in)`` and r allow.

    Returns the update and its relative error in the Frobenius norm.

    Raises ``ValueError`` for ``rank`` < 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    work = compute_dtype(update.up.dtype)
    left, left_core = torch.linalg.qr(update.up.to(work) * update.scaling)
    right, right_core = torch.linalg.qr(update.down.to(work).T)
    u, s, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    root = s[:rank].sqrt()
    up = left @ (u[:, :rank] * root)
    down = (root[:, None] * vh[:rank]) @ right.T
    size, rest = torch.linalg.vector_norm(s), torch.linalg.vector_norm(s[rank:])
    error = float(rest / size) if size > 0 else 0.0
    return LowRank(up, down, 1.0, update.kernel, update.embedding), error


def factorize(
    matrix: Float[Tensor, "out in"], rank: int, generator: torch.Generator
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """Factors of the best approximation of a dense ΔW of at most ``rank``.

    Exact SVD where the smaller side is within a few times the rank; otherwise a randomised range
    finder with four passes, within a few per mille of the best error.

    Source: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1.

    Raises ``ValueError`` for ``rank`` < 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    out, width = matrix.shape
    columns = rank + _OVERSAMPLING
    if 4 * columns >= min(out, width):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        probe = torch.randn(width, columns, generator=generator, dtype=matrix.dtype)
        basis = torch.linalg.qr(matrix @ probe.to(matrix.device))[0]
        for _ in range(_PASSES):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
        u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]

"""Rotations of OFT adapters: from the stored triangles to the blocks, and onto a weight.

An OFT adapter turns the input of a layer in blocks of b coordinates. It stores, for each block, the
strict upper triangle of a skew Q row by row, ``[blocks, b (b - 1) / 2]`` (arXiv 2306.07280; layout
of PEFT 0.21).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg import cayley
from stiefel.linalg._checks import check_finite, check_matrix, compute_dtype


def block_size(elements: int) -> int:
    """b of a stored triangle of ``elements`` = b (b - 1) / 2 numbers.

    Raises ``ValueError`` where no b fits.
    """
    b = (1 + math.isqrt(1 + 8 * elements)) // 2
    if elements < 1 or b * (b - 1) // 2 != elements:
        raise ValueError(f"no block has a strict triangle of {elements} numbers (1, 3, 6, 10, …)")
    return b


def skew_blocks(triangle: Float[Tensor, "blocks elements"]) -> Float[Tensor, "blocks b b"]:
    """Skew blocks Q = S - Sᵀ, S the strict upper triangle that ``triangle`` lists by rows."""
    check_matrix(triangle, "triangle")
    b = block_size(triangle.shape[-1])
    rows, columns = torch.triu_indices(b, b, 1, device=triangle.device)
    q = triangle.new_zeros(*triangle.shape[:-1], b, b)
    q[..., rows, columns] = triangle
    return q - q.mT


def rotation_blocks(
    triangle: Float[Tensor, "blocks elements"], *, neumann_terms: int | None = None
) -> Float[Tensor, "blocks b b"]:
    """Blocks R with which PEFT turns inputs, x → x R.

    Args:
        triangle: stored numbers ``[blocks, b (b - 1) / 2]``.
        neumann_terms: None for the Cayley map R = (I - Q)(I + Q)⁻¹. T for the truncated series
            R = I + 2Q + … + 2Q^(T-2) + Q^(T-1), which approximates (I + Q)(I - Q)⁻¹ (the other
            sense of turning) and is orthogonal only to the order of its last term.

    Raises:
        ValueError: ``triangle`` is not finite or of no block's size, or ``neumann_terms`` < 1.
    """
    check_finite(triangle, "triangle")
    if neumann_terms is not None and neumann_terms < 1:
        raise ValueError(f"neumann_terms must be at least 1, got {neumann_terms}")
    q = skew_blocks(triangle.to(compute_dtype(triangle.dtype)))
    if neumann_terms is None:
        return cayley(-q)
    r = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q).clone()
    if neumann_terms == 1:
        return r
    r += 2 * q
    if neumann_terms == 2:
        return r
    power = q @ q
    r += 2 * power
    # PEFT 0.21 gives three terms the series of four.
    last = max(neumann_terms - 1, 3)
    for exponent in range(3, last + 1):
        power = power @ q
        r += power if exponent == last else 2 * power
    return r


def project_blocks(
    triangle: Float[Tensor, "blocks elements"], eps: float
) -> Float[Tensor, "blocks elements"]:
    """Constrained OFT: blocks with ||Q||_F above eps / √blocks are scaled down to it."""
    limit = eps / math.sqrt(triangle.shape[0])
    norm = math.sqrt(2) * torch.linalg.vector_norm(triangle, dim=-1, keepdim=True)
    return torch.where(norm <= limit, triangle, triangle * (limit / norm))


def rotate_inputs(
    weight: Float[Tensor, "out in"], blocks: Float[Tensor, "blocks b b"], *, outputs: bool = False
) -> Float[Tensor, "out in"]:
    """W blockdiag(R)ᵀ, the weight that acts on x as W does on x R; in O(out in b).

    Args:
        weight: ``[out, in]``.
        blocks: ``[in / b, b, b]``, or one block ``[1, b, b]`` that all share.
        outputs: W blockdiag(R) instead: rows of an embedding, whose output is turned.

    Raises:
        ValueError: the blocks do not fill the input.
    """
    b, width = blocks.shape[-1], weight.shape[-1]
    if width % b or blocks.shape[0] not in (1, width // b):
        raise ValueError(
            f"{blocks.shape[0]} blocks of {b} do not fill an input of width {width}: one shared "
            f"block or in / b of them are needed"
        )
    parts = weight.unflatten(-1, (width // b, b))
    return torch.einsum(
        "...gk,gck->...gc" if not outputs else "...gk,gkc->...gc",
        parts,
        blocks.expand(width // b, b, b),
    ).flatten(-2)

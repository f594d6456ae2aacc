"""Weights of a deep linear network in which every mode starts, and then learns, by itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.orthonormal_stack import orthonormal_stack


def decoupled_factors(
    left: Float[Tensor, "outputs modes"],
    right: Float[Tensor, "inputs modes"],
    hidden: Sequence[int],
    amplitude: Float[Tensor, " modes"] | Float[Tensor, ""],
    *,
    count: int = 1,
    generator: torch.Generator | None = None,
) -> list[Float[Tensor, "count rows columns"]]:
    """Weights W_l = R_{l+1} · diag(a) · R_lᵀ that turn ``right`` into ``left``, mode by mode.

    R_1 = ``right``, R_{D+1} = ``left``; between them are random orthonormal columns. Modes
    beyond the smallest width stay at 0: no such network can hold them.

    Args:
        left: Orthonormal columns on the output side, strongest mode first.
        right: Orthonormal columns on the input side, in the same order.
        hidden: Widths between the D = len(hidden) + 1 layers, each ≥ 1.
        amplitude: a of each mode in each layer, or one for all.
        count: How many networks with bases of their own.
        generator: Of the random bases.

    Returns:
        D stacks of weights, first layer first.

    Source: arXiv 1312.6120, section 3 and appendix on decoupled initial conditions.
    """
    modes = min([left.shape[1], *hidden])
    scale = amplitude.expand(left.shape[1])[:modes]
    options = {"dtype": left.dtype, "device": left.device}
    bases = [right[:, :modes].expand(count, -1, -1)]
    for width in hidden:
        # Drawn where the generator lives, so that every device gets the same numbers.
        place = generator.device if generator is not None else left.device
        basis = orthonormal_stack(
            count, width, modes, generator=generator, dtype=left.dtype, device=place
        )
        bases.append(basis.to(**options))
    bases.append(left[:, :modes].expand(count, -1, -1))
    return [(after * scale) @ before.mT for before, after in pairwise(bases)]

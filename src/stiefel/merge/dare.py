"""DARE: drop random entries of each model's change, scale up the rest, then add.

Which entries are dropped follows from the seed, the tensor's name, the model's index and the
entry's position alone (a Philox counter): no portioning, thread count or device changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from stiefel.merge.additive import Model, Models, check_scale
from stiefel.merge.arithmetic import (
    Number,
    check_densities,
    check_tensors,
    check_weights,
    each_tensor,
    is_mapping,
    mix_rows,
    model_names,
)

# A Philox counter gives four 64-bit words: eight entries with 32 bits each.
_PER_COUNTER = 8


def dare_mask(
    start: int, count: int, density: Number, *, seed: int, name: str = "", model: int = 0
) -> Bool[Tensor, " count"]:
    """Which of the entries ``start … start + count - 1`` of a flattened tensor are kept.

    Each with probability ``density`` (to 2⁻³²), independently of all others.

    Args:
        start: position of the first entry in the whole tensor, row-major.
        seed: any integer. ``name`` and ``model`` (index among the merged) select the stream.
    """
    identity = hashlib.sha256(f"{seed}\0{model}\0{name}".encode()).digest()
    stream = np.random.Philox(key=np.frombuffer(identity[:16], dtype="<u8"))
    skipped = start % _PER_COUNTER
    stream.advance(start // _PER_COUNTER)
    words = stream.random_raw((skipped + count + 1) // 2).astype("<u8", copy=False)
    draws = words.view("<u4")[skipped : skipped + count]
    limit = round(density * 2.0**32)
    kept = np.ones(count, dtype=bool) if limit >= 2**32 else draws < np.uint32(limit)
    return torch.from_numpy(kept)


def dare_rows(
    base: Tensor,
    sources: Sequence[Tensor],
    weights: Sequence[Number],
    densities: Sequence[Number],
    *,
    seed: int,
    name: str = "",
    start: int = 0,
    consensus: str | None = None,
    normalize: bool = False,
    rescale: bool = True,
    scale: Number = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`dare` of one portion of rows, without its checks.

    ``start``: position of the portion's first entry in the flattened tensor ``name``. ``out`` as in
    :func:`stiefel.merge.ties_rows`.
    """

    def drop(model: int, delta: Tensor, offset: int) -> None:
        density = densities[model]
        if density >= 1:
            return
        kept = dare_mask(start + offset, delta.numel(), density, seed=seed, name=name, model=model)
        delta.mul_(kept.to(delta.device))
        if rescale:
            delta.div_(density)

    return mix_rows(
        base, sources, weights, prepare=drop, consensus=consensus == "sum", normalize=normalize,
        scale=scale, out=out,
    )  # fmt: skip


@torch.no_grad()
def dare(
    base: Model,
    models: Models,
    weights: Sequence[Number] | None = None,
    *,
    density: Number | Sequence[Number] = 0.5,
    seed: int = 0,
    consensus: str | None = None,
    normalize: bool = False,
    rescale: bool = True,
    scale: Number = 1.0,
    name: str = "",
) -> Tensor | dict[str, Tensor]:
    """base + scale · Σ wᵢ mᵢ ⊙ (Wᵢ - base) / density, with random masks mᵢ.

    ``consensus="sum"`` elects signs as :func:`stiefel.merge.ties` does (mergekit's ``dare_ties``);
    None is ``dare_linear``. mergekit 0.1.5 rescales the kept entries so that the 1-norm of the
    difference stays; here, as in the paper, they are divided by the density.

    Args:
        density: probability that an entry is kept, in (0, 1]; one number or one a model.
        seed: two calls with one seed drop the same entries.
        name: for a single tensor, its name: it selects the random numbers. State dicts use theirs.

    Other arguments, result and errors as in :func:`stiefel.merge.ties`.

    Source: Yu et al., "Language models are super Mario", arXiv 2311.03099.
    """
    names = model_names(len(models), with_base=True)
    found, densities = check_weights(weights, len(models)), check_densities(density, len(models))
    check_scale(scale)
    if consensus not in (None, "sum"):
        raise ValueError(f"consensus must be 'sum' or None, got {consensus!r}")

    def merge(key: str, tensors: Sequence[Tensor]) -> Tensor:
        check_tensors(tensors, names, key)
        return dare_rows(
            tensors[0], tensors[1:], found, densities, seed=seed, name=key, consensus=consensus,
            normalize=normalize, rescale=rescale, scale=scale,
        )  # fmt: skip

    if is_mapping(models, base):
        return each_tensor([base, *models], names, merge)  # pyrefly: ignore
    return merge(name, [base, *models])  # pyrefly: ignore

"""Recurrent weights with the structure of neural circuits: Dale's law, blocks of neurons.

Both have the Frobenius norm gain · √n that gain · N(0, 1) / √n has on average, so they compare
with :func:`stiefel.init.low_rank_init`; their effective rank is lower (arXiv 2310.08513, fig. 4).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.init.low_rank import GAIN, _check_gain
from stiefel.linalg._checks import check_finite, compute_dtype


def dale_init(
    n: int,
    frac_exc: float | int = 0.8,
    balanced: bool = True,
    gain: float | int = GAIN,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "n n"]:
    """Weights by Dale's law: every neuron only excites or only inhibits.

    The weight from neuron j to neuron i stands at ``[i, j]``. The first round(frac_exc · n)
    columns are ≥ 0, the others ≤ 0; magnitudes are half-normal.

    Args:
        n: Number of neurons.
        frac_exc: Share of excitatory neurons, in [0, 1].
        balanced: Scale the inhibition of every neuron so that its weights sum to zero. Without
            it the mean of the weights adds one large eigenvalue.
        gain: Frobenius norm over √n.
        generator: Source of the magnitudes.
        dtype, device: torch's default and the generator's.

    Raises:
        ValueError: ``n`` below 1, ``frac_exc`` outside [0, 1], ``gain`` not positive, or
            ``balanced`` with neurons of one kind only.

    Source: arXiv 2310.08513, section 4 (Dale's law); the balance of every row as in Rajan and
    Abbott, Phys. Rev. Lett. 97, 188104 (2006).
    """
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 0 <= frac_exc <= 1:
        raise ValueError(f"frac_exc must be in [0, 1], got {frac_exc}")
    excitatory = round(frac_exc * n)
    if balanced and not 0 < excitatory < n:
        raise ValueError(
            f"balanced weights need neurons of both kinds, got {excitatory} excitatory of {n}"
        )
    weights = _gaussian(n, gain, generator, dtype, device).abs()
    weights[:, excitatory:] *= -1
    if balanced:
        up, down = weights[:, :excitatory].sum(-1), weights[:, excitatory:].sum(-1)
        weights[:, excitatory:] *= (up / -down)[:, None]
    return _resize(weights, gain, dtype)


def block_init(
    sizes: Sequence[int],
    means: Float[Tensor, "k l"] | Sequence[Sequence[float | int]],
    gain: float | int = GAIN,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "n n"]:
    """Gaussian weights between groups of neurons, each pair of groups with a mean of its own.

    Args:
        sizes: Neurons in each of the k groups; n is their sum.
        means: ``[k, k]``: ``means[a][b]`` is the mean weight from group b to group a in units of
            the weights' standard deviation. Zeros give a plain Gaussian matrix.
        gain: Frobenius norm over √n.
        generator: Source of the weights.
        dtype, device: torch's default and the generator's.

    Raises:
        ValueError: no group or an empty one, ``means`` not ``[k, k]`` or not finite, ``gain`` not
            positive.

    Source: arXiv 2310.08513, section 4 (block structure).
    """
    counts = [operator.index(size) for size in sizes]
    if not counts or min(counts) < 1:
        raise ValueError(f"sizes must be one or more positive integers, got {counts}")
    n = sum(counts)
    weights = _gaussian(n, gain, generator, dtype, device)
    table = torch.as_tensor(means, dtype=weights.dtype, device=weights.device)
    if table.shape != (len(counts), len(counts)):
        raise ValueError(
            f"means must be [{len(counts)}, {len(counts)}] for {len(counts)} sizes, "
            f"got {tuple(table.shape)}"
        )
    check_finite(table, "means")
    group = torch.repeat_interleave(torch.tensor(counts)).to(weights.device)
    return _resize(weights + table[group[:, None], group[None, :]], gain, dtype)


def _gaussian(
    n: int,
    gain: float | int,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    """Standard normal ``[n, n]``."""
    _check_gain(gain)
    if device is None and generator is not None:
        device = generator.device
    work = compute_dtype(dtype or torch.get_default_dtype())
    return torch.randn(n, n, generator=generator, dtype=work, device=device)


def _resize(weights: Tensor, gain: float | int, dtype: torch.dtype | None) -> Tensor:
    size = torch.linalg.matrix_norm(weights)
    result = weights * (gain * math.sqrt(weights.shape[-1]) / size)
    return result.to(dtype or torch.get_default_dtype())

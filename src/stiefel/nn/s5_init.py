"""How S5 starts: blocks of HiPPO-LegS, diagonalised, with random input and output maps.

Sources: Smith et al., arXiv 2208.04933 (S5) and the authors' code; Yu et al., arXiv 2310.01698
(S5-PTD).
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from jaxtyping import Complex128, Float64
from torch import Tensor

from stiefel.linalg.diagonalize import check_t, ptd_diagonalize
from stiefel.linalg.hippo import hippo_legs, legs_normal

INITS = ("legs-normal", "ptd")


class S5Start(NamedTuple):
    """x' = diag(a) x + b u, y = Re Σ weights c x."""

    a: Complex128[Tensor, " modes"]
    b: Complex128[Tensor, "modes H"]
    c: Complex128[Tensor, "directions H modes"]
    weights: Float64[Tensor, " modes"]


def s5_init(
    d_model: int,
    d_state: int,
    blocks: int = 1,
    init: str = "legs-normal",
    *,
    t: float | int = 0.1,
    conj_sym: bool = True,
    directions: int = 1,
    generator: torch.Generator | None = None,
) -> S5Start:
    """One system of ``d_state`` states, ``blocks`` copies of LegS of order ``d_state / blocks``.

    ``"legs-normal"``: the normal part of LegS, as S5. ``"ptd"``: LegS + t P Pᵀ.

    The input map is B̃ = V⁻¹ B with B real, entries N(0, 1/H); the output map C̃ = C V with C real,
    entries N(0, 1/d_state) (LeCun's rule for both).

    Args:
        conj_sym: keep one of each conjugate pair, with weight 2, and real eigenvalues with 1.
            The function is the same without; then every mode is kept with weight 1.
        directions: how many output maps.

    Raises:
        ValueError: a size below 1, ``blocks`` does not divide ``d_state``, with ``conj_sym`` an odd
            ``d_state`` or block, unknown ``init``, ``t`` outside (0, 1].
    """
    sizes = {"d_model": d_model, "d_state": d_state, "blocks": blocks}
    for name, size in sizes.items():
        if operator.index(size) < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if d_state % blocks:
        raise ValueError(f"blocks must divide d_state = {d_state}, got {blocks}")
    order = d_state // blocks
    if conj_sym and order % 2:
        raise ValueError(
            f"with conj_sym d_state / blocks must be even (pairs are stored once), got "
            f"{d_state} / {blocks}; conj_sym=False takes odd sizes"
        )
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    check_t(t)
    if init == "ptd":
        found = ptd_diagonalize(hippo_legs(order)[0], low_rank="legs", t=t)
        a, v, inverse, weights = found.eigenvalues, found.V, found.V_inv, found.weights
    else:
        a, v, _ = legs_normal(order)
        inverse = v.mH
        # Computed pairs are not exactly conjugate, so that signs alone would not do for odd orders.
        imaginary = torch.where(a.imag.abs() <= 1e-9 * order**2, 0.0, a.imag)
        weights = 1 + imaginary.sign()
    kept = weights > 0 if conj_sym else torch.ones_like(weights, dtype=torch.bool)
    b = torch.randn(blocks, order, d_model, generator=generator, dtype=torch.float64)
    c = torch.randn(directions, d_model, blocks, order, generator=generator, dtype=torch.float64)
    inputs = inverse[kept] @ (b / math.sqrt(d_model)).to(v.dtype)
    outputs = (c / math.sqrt(d_state)).to(v.dtype) @ v[:, kept]
    ones = torch.ones_like(weights[kept])
    return S5Start(
        a=a[kept].repeat(blocks),
        b=inputs.flatten(0, 1),
        c=outputs.flatten(2),
        weights=(weights[kept] if conj_sym else ones).repeat(blocks),
    )

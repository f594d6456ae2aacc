"""The optimizers that race on the language model, by name: a table to add a method to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from stiefel.optim import ARO, RMNP, ROOT, AuON, DCTAdamW, HybridAuON, Muon, NorMuon
from stiefel.papers.low_rank_adamw import LowRankAdamW
from stiefel.papers.normalized_momentum import NormalizedMomentum
from stiefel.papers.probes import CLIP_QUANTILE, MOMENTUM

Groups = list[dict[str, Any]]
Factory = Callable[[Groups, float], torch.optim.Optimizer]

# Everything that is not a block matrix is AdamW's, at this rate, whatever the method.
ELEMENTWISE_LR = 3e-3
ADAMW_BETAS = (0.9, 0.95)
# NorMuon's second beta.
SECOND = 0.95
# Low-rank methods keep a quarter of the columns.
RANK = 0.25


def _adamw(groups: Groups, lr: float) -> torch.optim.Optimizer:
    matrices, others = groups
    return torch.optim.AdamW(
        [matrices, {**others, "lr": ELEMENTWISE_LR}],
        lr=lr,
        betas=ADAMW_BETAS,
        weight_decay=0.0,
        fused=True,
    )


def _ours(
    cls: Callable[..., torch.optim.Optimizer], groups: Groups, lr: float, **options: Any
) -> torch.optim.Optimizer:
    """One of Stiefel's optimizers without weight decay, the rest of the model at 3e-3."""
    return cls(
        groups,
        lr=lr,
        weight_decay=0.0,
        adamw_lr=ELEMENTWISE_LR,
        adamw_betas=ADAMW_BETAS,
        **options,
    )


# The papers' polynomial, for all that orthogonalise.
_muon = partial(_ours, Muon, momentum=MOMENTUM, nesterov=True, ns="classic")
_root = partial(_ours, ROOT, momentum=MOMENTUM, nesterov=True)
_hybrid = partial(_ours, HybridAuON, momentum=MOMENTUM, nesterov=True)
_aro = partial(_ours, ARO, beta=MOMENTUM, base="sinkhorn")
_low_rank = partial(_ours, LowRankAdamW, rank=RANK, betas=ADAMW_BETAS, error_feedback=True)

FACTORIES: Mapping[str, Factory] = {
    "adamw": _adamw,
    "muon": partial(_muon, scale="rms"),
    "muon-plain": partial(_muon, scale="rms", nesterov=False),
    "muon-exact-rms": partial(_muon, scale=None, rescale="rms"),
    "normuon": partial(
        _ours, NorMuon, betas=(MOMENTUM, SECOND), nesterov=True, ns="classic", rescale="rms"
    ),
    "rmnp": partial(_ours, RMNP, momentum=MOMENTUM, nesterov=True),
    "root": partial(_root, quantile=CLIP_QUANTILE, coefficients="fitted"),
    "root-clip": partial(_root, quantile=CLIP_QUANTILE, coefficients="classic"),
    "root-coefficients": partial(_root, quantile=1.0, coefficients="fitted"),
    "auon": partial(_ours, AuON, momentum=MOMENTUM, nesterov=True, variant="paper"),
    "normalized-momentum": partial(_ours, NormalizedMomentum, momentum=MOMENTUM),
    "hybrid-auon": partial(_hybrid, variant="paper"),
    "hybrid-auon-normalized": partial(_hybrid, variant="normalized"),
    "aro": partial(_aro, rotation="aro"),
    "aro-eigen": partial(_aro, rotation="eigen"),
    "aro-identity": partial(_aro, rotation="identity"),
    "aro-polar": partial(_aro, rotation="polar"),
    # "auto" would measure what is faster, and so round one way or the other.
    "dct-adamw": partial(
        _ours,
        DCTAdamW,
        rank=RANK,
        betas=ADAMW_BETAS,
        error_feedback="full",
        rotate=True,
        method="matmul",
    ),
    "svd-adamw": partial(_low_rank, subspace="svd"),
    "random-columns-adamw": partial(_low_rank, subspace="random-columns"),
}
"""Name of a method to what builds it from two groups (the matrices, the rest; named parameters) and
the learning rate of the matrices."""


def build(groups: Groups, method: str, lr: float) -> torch.optim.Optimizer:
    """The optimizer called ``method``, without weight decay; matrices at ``lr``, the rest at 3e-3.

    Args:
        groups: The matrices, then the rest, both as (name, parameter) pairs under ``"params"`` and
            with their ``"rule"``.
        method: A name of :data:`FACTORIES`.
        lr: Learning rate of the matrices.

    Raises:
        ValueError: unknown method.
    """
    if method not in FACTORIES:
        raise ValueError(f"method must be one of {', '.join(FACTORIES)}; got {method!r}")
    return FACTORIES[method](groups, lr)

"""Who races: every contestant with its settings and the rate its grid starts from.

Rates are converted from AdamW's. Where a method offers the convention in which an update has root
mean square 0.2·lr, the race uses it: one factor then serves every width. AuON's and Hybrid-AuON's
rate is a Frobenius norm; they start where the largest singular value is about as large.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.optim.aro import ARO
from stiefel.optim.auon import AuON, HybridAuON
from stiefel.optim.dct_adamw import DCTAdamW
from stiefel.optim.groups import split_parameters
from stiefel.optim.muon import Muon
from stiefel.optim.normuon import NorMuon
from stiefel.optim.rmnp import RMNP
from stiefel.optim.root import ROOT
from stiefel.optim.trion import Trion

BASELINE = "adamw"
BETAS = (0.9, 0.95)
_FUSED = ("cpu", "cuda", "mps", "xpu")

Groups = list[dict[str, Any]]
Build = Callable[[Groups, float, float], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Contestant:
    """An optimizer in the race."""

    name: str
    """As the command line takes it."""
    build: Build
    """``build(groups, lr, elementwise_lr)`` with the groups of :func:`split_parameters`: one
    optimizer, or two that step together."""
    factor: float
    """Centre of the grid, as a multiple of AdamW's best rate."""
    frobenius: bool = False
    """Whether the rate is an update's Frobenius norm: the centre is then times 0.2·√(inputs)."""

    def centre(self, adamw_lr: float, inputs: float) -> float:
        """The rate in the middle of the first grid, to two digits; AdamW's own for AdamW.

        Args:
            adamw_lr: The rate at which AdamW does best on the same task.
            inputs: Typical number of columns of the model's matrices.
        """
        if self.name == BASELINE:  # exactly: that run is there already
            return adamw_lr
        scale = 0.2 * math.sqrt(inputs) if self.frobenius else 1.0
        return float(f"{adamw_lr * self.factor * scale:.2g}")


def _parameters(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    return [p for group in groups for _, p in group["params"]]


def _adamw_over(*groups: tuple[list[Tensor], float]) -> torch.optim.Optimizer:
    filled = [{"params": params, "lr": lr} for params, lr in groups if params]
    fused = all(p.device.type in _FUSED for group in filled for p in group["params"])
    return torch.optim.AdamW(filled, betas=BETAS, weight_decay=0.0, fused=fused)


def _by_rule(groups: Groups) -> tuple[Groups, Groups]:
    matrix = [group for group in groups if group["rule"] == "matrix"]
    return matrix, [group for group in groups if group["rule"] != "matrix"]


def _adamw(groups: Groups, lr: float, elementwise_lr: float) -> list[torch.optim.Optimizer]:
    matrix, rest = _by_rule(groups)
    return [_adamw_over((_parameters(matrix), lr), (_parameters(rest), elementwise_lr))]


def _torch_muon(groups: Groups, lr: float, elementwise_lr: float) -> list[torch.optim.Optimizer]:
    matrix, rest = (_parameters(part) for part in _by_rule(groups))
    plain = [p for p in matrix if p.ndim == 2]  # it takes no kernels of convolutions
    rest += [p for p in matrix if p.ndim != 2]
    if not plain:
        raise ValueError("torch-muon: the model has no two-dimensional hidden weight; leave it out")
    muon = torch.optim.Muon(plain, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, _adamw_over((rest, elementwise_lr))] if rest else [muon]


def _ours(
    make: Callable[..., torch.optim.Optimizer], groups: Groups, lr: float, elementwise_lr: float
) -> list[torch.optim.Optimizer]:
    settings = {"weight_decay": 0.0, "adamw_lr": elementwise_lr, "adamw_betas": BETAS}
    filled = [group for group in groups if group["params"]]
    return [make(filled, lr=lr, **settings)]


def _own(
    name: str,
    cls: type[torch.optim.Optimizer],
    factor: float,
    *,
    frobenius: bool = False,
    **settings: Any,
) -> Contestant:
    return Contestant(name, partial(_ours, partial(cls, **settings)), factor, frobenius)


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(BASELINE, _adamw, 1.0),
        Contestant("torch-muon", _torch_muon, 4.0),
        _own("muon", Muon, 4.0, scale="rms"),
        _own("normuon", NorMuon, 4.0),
        _own("rmnp", RMNP, 1.0, scale="rms"),
        _own("root", ROOT, 4.0),
        _own("auon", AuON, 4.0, frobenius=True),
        _own("hybrid-auon", HybridAuON, 8.0, frobenius=True),
        _own("aro", ARO, 4.0),
        _own("trion", Trion, 4.0, scale="kimi"),
        _own("dct-adamw", DCTAdamW, 2.0, betas=BETAS, error_feedback=8),
    )
}


def chosen(names: Sequence[str] | None) -> list[Contestant]:
    """The contestants of these names, AdamW first whether named or not; all of them for None.

    Raises:
        ValueError: an unknown name (near matches are given), one named twice, or none at all.
    """
    if names is None:
        return list(CONTESTANTS.values())
    wanted = [name.strip().lower() for name in names]
    for name in wanted:
        if name not in CONTESTANTS:
            near = difflib.get_close_matches(name, CONTESTANTS, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else "There are: "
            raise ValueError(
                f"no optimizer {name!r}. {hint}{'' if near else ', '.join(CONTESTANTS)}"
            )
    twice = [name for name in dict.fromkeys(wanted) if wanted.count(name) > 1]
    if twice or not wanted:
        raise ValueError(f"optimizers must be named once each, got {', '.join(names) or 'none'}")
    return [CONTESTANTS[name] for name in dict.fromkeys([BASELINE, *wanted])]


def groups_of(model: nn.Module) -> Groups:
    """Parameter groups of ``model``, hidden matrices and the rest.

    Raises:
        ValueError: it has no hidden matrix, so that all contestants would be AdamW.
    """
    groups = split_parameters(model)
    if not _parameters(_by_rule(groups)[0]):
        raise ValueError(
            f"{type(model).__name__} has no hidden weight matrix (split_parameters found none), so "
            "every contestant would be AdamW"
        )
    return groups


def typical_inputs(groups: Groups) -> float:
    """Geometric mean of the number of columns of the hidden matrices."""
    counts = []
    for group in _by_rule(groups)[0]:
        for parameter in _parameters([group]):
            rows_last = group["view"] in ("transpose", "batch")
            columns = {"transpose": parameter.shape[0], "batch": parameter.shape[-1]}
            counts.append(
                columns[group["view"]] if rows_last else parameter.numel() // parameter.shape[0]
            )
    return math.exp(sum(map(math.log, counts)) / len(counts))


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of the state that optimizers keep between steps; a shared storage counts once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for inner in value.values():
                visit(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                visit(inner)

    for optimizer in optimizers:
        visit(dict(optimizer.state))
    return sum(storages.values())

"""What is measured inside an optimizer while it trains: row norms, dominance, distance to polar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stiefel.papers.byte_gpt import GPT

# Momentum of every matrix method in the race, Nesterov form.
MOMENTUM = 0.95
# Singular values below this share of the largest are left out of a condition number: the smallest
# of a square matrix is an accident.
CONDITION_FLOOR = 0.01

Numbers = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Probe:
    """Measures at some steps of a run, just after the optimizer's step."""

    steps: Callable[[int], set[int]]
    """Numbers of the steps (from 1), given the length of the run."""
    measure: Callable[[GPT, torch.optim.Optimizer, Mapping[str, Tensor]], Numbers]
    """Numbers by kind of matrix, from the model, its optimizer, and its matrices before the step.
    Gradients must still be there."""


def kind(weight: Tensor) -> str:
    """``tall`` (more outputs than inputs), ``wide`` or ``square``."""
    rows, columns = weight.shape[-2:]
    return "tall" if rows > columns else "wide" if rows < columns else "square"


def by_kind(matrices: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of the matrices of each kind, all of one shape within a kind."""
    names: dict[str, list[str]] = {}
    for name, weight in matrices.items():
        names.setdefault(kind(weight), []).append(name)
    return names


def variation(matrices: Tensor) -> Tensor:
    """Coefficient of variation of the row norms, [..., R, C] to [...]."""
    norms = matrices.norm(dim=-1)
    return norms.std(dim=-1, correction=0) / norms.mean(dim=-1)


def condition(matrices: Tensor) -> Tensor:
    """Largest over smallest singular value above 0.01 of the largest, [..., R, C] to [...]."""
    sigma = torch.linalg.svdvals(matrices)
    top = sigma[..., :1]
    return (top / sigma.where(sigma > CONDITION_FLOOR * top, top).amin(-1, keepdim=True))[..., 0]


def row_norms(
    model: GPT, optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor]
) -> Numbers:
    """How unequal the rows are before and after NorMuon's normalisation.

    *Before* is Newton–Schulz of the same Nesterov momentum, what Muon would apply; *after* is the
    change that the step made to the weights.
    """
    from stiefel.linalg import newton_schulz

    weights, numbers = model.matrices(), {}
    for name_of_kind, names in by_kind(weights).items():
        momentum = torch.stack([optimizer.state[weights[n]]["momentum_buffer"] for n in names])
        gradient = torch.stack([_gradient(weights[n]) for n in names])
        plain = newton_schulz(torch.lerp(gradient, momentum, MOMENTUM), coefficients="classic")
        applied = torch.stack([before[n] - weights[n].detach() for n in names])
        numbers[name_of_kind] = {
            "variation_before": float(variation(plain).mean()),
            "variation_after": float(variation(applied).mean()),
        }
        if name_of_kind == "tall":  # where rows of a polar factor differ at all
            numbers[name_of_kind] |= {
                "condition_before": float(condition(plain).mean()),
                "condition_after": float(condition(applied).mean()),
            }
    return numbers


def dominance(
    model: GPT, optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor]
) -> Numbers:
    """How diagonal V Vᵀ is for the momentum V, and how near row normalisation is to polar."""
    from stiefel.optim import polar_cosine, row_dominance

    weights, numbers = model.matrices(), {}
    for name_of_kind, names in by_kind(weights).items():
        momentum = torch.stack([optimizer.state[weights[n]]["momentum_buffer"] for n in names])
        average, least, _ = row_dominance(momentum)
        transposed, _, _ = row_dominance(momentum, transpose_tall=True)
        numbers[name_of_kind] = {
            "average": float(average.mean()),
            "least": float(least.mean()),
            "transposed": float(transposed.mean()),
            "cosine": float(polar_cosine(momentum).mean()),
            "columns": float(momentum.shape[-1]),
        }
    return numbers


def _gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        raise ValueError("a probe needs the gradients of the step; zero_grad ran before it")
    return weight.grad


def _eighths(steps: int) -> set[int]:
    """From a quarter of the run on, every eighth of it."""
    return {steps * i // 8 for i in range(2, 9)} - {0}


def _few(steps: int) -> set[int]:
    """A twentieth of the run (the warm-up), then every quarter."""
    return {steps // 20, *(steps * i // 4 for i in range(1, 5))} - {0}


# Always on for these methods, so that the runs of a grid serve the figures too.
PROBES: Mapping[str, Probe] = {
    "normuon": Probe(_eighths, row_norms),
    "rmnp": Probe(_few, dominance),
}

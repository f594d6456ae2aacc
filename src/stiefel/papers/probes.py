"""What is measured inside an optimizer while it trains: row norms, dominance, distance to polar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from stiefel.papers.byte_gpt import GPT

# Momentum of every matrix method in the race, Nesterov form.
MOMENTUM = 0.95
# Above this quantile of its absolute values ROOT clips the momentum.
CLIP_QUANTILE = 0.9
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
        momentum = _nesterov([weights[n] for n in names], optimizer)
        plain = newton_schulz(momentum, coefficients="classic")
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


def orthogonality(
    model: GPT, optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor]
) -> Numbers:
    """How far five Newton–Schulz steps leave ROOT's momentum from orthogonal, by coefficients.

    On the exact singular values of the Nesterov momentum and of what ROOT keeps of it: the mean
    (σ − 1)² with classic and with fitted coefficients (means over the matrices, *clipped*), and
    the largest ratio of the two on one matrix.
    """
    from stiefel.linalg.coefficients import scalar_image, table
    from stiefel.optim import soft_clip

    tables = {name: table(name, 5).triples for name in ("classic", "fitted")}
    weights, numbers = model.matrices(), {}
    for name_of_kind, names in by_kind(weights).items():
        momentum = _nesterov([weights[n] for n in names], optimizer)
        clipped, outliers = soft_clip(momentum, CLIP_QUANTILE)
        errors = {}
        for which, matrices in (("raw", momentum), ("clipped", clipped)):
            sigma = torch.linalg.svdvals(matrices.double())
            sigma = (sigma / torch.linalg.vector_norm(sigma, dim=-1, keepdim=True)).numpy()
            for name, triples in tables.items():
                deviation = (scalar_image(sigma, triples) - 1) ** 2
                errors[which, name] = deviation.mean(axis=-1)
        removed = outliers.abs().sum((-2, -1)) / momentum.abs().sum((-2, -1))
        numbers[name_of_kind] = {
            "classic": float(errors["clipped", "classic"].mean()),
            "fitted": float(errors["clipped", "fitted"].mean()),
            "ratio": max(
                float(np.max(errors[which, "fitted"] / errors[which, "classic"]))
                for which in ("raw", "clipped")
            ),
            "removed": float(removed.mean()),
        }
    return numbers


def cosh_effect(
    model: GPT, optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor]
) -> Numbers:
    """How AuON's update differs from Frobenius-normalised momentum.

    Both are made from the momentum of this step, AuON's by a step of the optimizer itself on zero
    weights, where no rounding of the weights hides a difference: the largest
    ‖AuON − normalised‖ / ‖normalised‖ of all matrices of a kind.
    """
    from stiefel.optim import AuON
    from stiefel.optim.settings import scale_factor

    weights, numbers = model.matrices(), {}
    for name_of_kind, names in by_kind(weights).items():
        momentum = _nesterov([weights[n] for n in names], optimizer)
        still = [torch.zeros_like(u) for u in momentum]
        for parameter, u in zip(still, momentum, strict=True):
            parameter.grad = u
        AuON(still, lr=1.0, momentum=0.0, nesterov=False).step()
        expected = momentum / torch.linalg.matrix_norm(momentum, keepdim=True)
        expected *= scale_factor("spectral", *momentum.shape[-2:])
        difference = torch.linalg.matrix_norm(torch.stack(still) + expected)
        relative = difference / torch.linalg.matrix_norm(expected)
        numbers[name_of_kind] = {"difference": float(relative.max())}
    return numbers


def _nesterov(weights: list[Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    """The momentum that the last step applied, one step ahead, as [matrices, R, C]."""
    momentum = torch.stack([optimizer.state[w]["momentum_buffer"] for w in weights])
    return torch.lerp(torch.stack([_gradient(w) for w in weights]), momentum, MOMENTUM)


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


def _early_middle_end(steps: int) -> set[int]:
    """A twentieth of the run (the warm-up), half of it, its end."""
    return {steps // 20, steps // 2, steps} - {0}


def _all(steps: int) -> set[int]:
    return set(range(1, steps + 1))


# Always on for these methods, so that the runs of a grid serve the figures too.
PROBES: Mapping[str, Probe] = {
    "normuon": Probe(_eighths, row_norms),
    "rmnp": Probe(_few, dominance),
    "root": Probe(_early_middle_end, orthogonality),
    "auon": Probe(_all, cosh_effect),
}

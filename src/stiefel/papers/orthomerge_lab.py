"""OrthoMerge on the five questions about digits: experts, their merges, what each can still do.

One lab is one base network. Its experts are trained twice: as rotations (OFT) and freely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stiefel.linalg import cayley
from stiefel.merge import dare, fold_oft, merge_rotations, orthomerge, task_arithmetic, ties
from stiefel.merge.adapter_rotation import rotate_inputs, skew_blocks
from stiefel.papers.attribute_digits import (
    MATRICES,
    TASKS,
    Lab,
    Part,
    Trunk,
    accuracies,
    accuracy,
    fit,
    full_finetune,
    make_lab,
)

Report = Callable[[float, str], None]

BLOCK = 32
OFT_RATE = 1e-3
# Sizes of the merged rotation at which the frontier is drawn; 1 is the method's own.
INTENSITIES = (0.4, 0.55, 0.7, 0.85, 1.0, 1.2)
DENSITY = 0.2
# Pixels by which the images of two contradicting experts are moved, left and right.
SHIFT = 2


def oft_finetune(lab: Lab, task: str, steps: int) -> dict[str, Tensor]:
    """Triangles of an OFT expert for each matrix, from zero."""
    triangles = {
        name: torch.zeros(lab.base[name].shape[1] // BLOCK, BLOCK * (BLOCK - 1) // 2)
        for name in MATRICES
    }
    learned = [t.requires_grad_() for t in triangles.values()]
    fit(
        lambda: turned(lab, triangles), lab.heads[task], lab.train, task, learned, lr=OFT_RATE,
        steps=steps, draw=lab.generator(2, list(TASKS).index(task)),
    )  # fmt: skip
    return {name: t.detach() for name, t in triangles.items()}


def turned(lab: Lab, triangles: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base with its matrices turned as OFT stores it: W0 blockdiag(Cayley(Q))."""
    return {
        **lab.base, **{name: fold_oft(lab.base[name], t) for name, t in triangles.items()}
    }  # fmt: skip


def merged_oft(
    lab: Lab,
    experts: Sequence[Mapping[str, Tensor]],
    *,
    intensity: float = 1.0,
    correct: bool = True,
) -> dict[str, Tensor]:
    """OrthoMerge of OFT experts: one correction a matrix, no residual."""
    trunk = dict(lab.base)
    for name in MATRICES:
        blocks = [skew_blocks(expert[name]) for expert in experts]
        merged = merge_rotations(blocks, intensity=intensity, correct=correct)
        # rotate_inputs multiplies by the transpose.
        trunk[name] = rotate_inputs(trunk[name], cayley(merged).mT)
    return trunk


def as_far_as(lab: Lab, mean: Trunk, model: Trunk) -> dict[str, Tensor]:
    """The mean's change, lengthened per matrix to the norm of another model's change."""
    trunk = dict(lab.base)
    for name in MATRICES:
        base = lab.base[name]
        delta = mean[name] - base
        trunk[name] = base + delta * ((model[name] - base).norm() / delta.norm())
    return trunk


def spectral_change(lab: Lab, model: Trunk) -> float:
    """Largest relative change of a matrix's spectral norm."""
    pairs = [(lab.base[n].double(), model[n].double()) for n in MATRICES]
    norms = [[float(torch.linalg.matrix_norm(w, 2)) for w in pair] for pair in pairs]
    return max(abs(new / old - 1) for old, new in norms)


def energy_change(lab: Lab, model: Trunk) -> float:
    """Largest relative change of a matrix's hyperspherical energy Σ ‖ŵᵢ - ŵⱼ‖⁻¹."""

    def energy(w: Tensor) -> float:
        return float(torch.pdist(F.normalize(w.double(), dim=1)).reciprocal().sum())

    return max(abs(energy(model[n]) / energy(lab.base[n]) - 1) for n in MATRICES)


def run(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Everything measured in one lab: ``{"scores": {merge: [task, base]}, …}``, per cent."""
    lab = make_lab(config["lab"], train=config["train"], epochs=config["epochs"])
    steps = config["steps"]
    triangles = [oft_finetune(lab, task, steps) for task in TASKS]
    report(0.5, "OFT experts trained")
    free = [full_finetune(lab, task, steps=steps) for task in TASKS]
    report(0.6, "free experts trained")
    rotated = [turned(lab, t) for t in triangles]
    models = {"base": lab.base} | oft_merges(lab, triangles, rotated) | free_merges(lab, free)
    scores = {name: list(accuracies(model, lab)) for name, model in models.items()}
    for name, experts in (("oft experts", rotated), ("free experts", free)):
        own = [accuracy(e, lab, task) for e, task in zip(experts, TASKS, strict=True)]
        kept = [accuracy(e, lab, "digit") for e in experts]
        scores[name] = [sum(own) / len(own), sum(kept) / len(kept)]
    frontier = {"om": [], "ta": []}
    for intensity in INTENSITIES:
        model = merged_oft(lab, triangles, intensity=intensity)
        frontier["om"].append(list(accuracies(model, lab)))
        matched = as_far_as(lab, models["ta"], model)
        frontier["ta"].append(list(accuracies(matched, lab)))
    return {
        "scores": scores,
        "frontier": frontier,
        "energy": {n: energy_change(lab, models[n]) for n in ("om", "ta")},
        "spectral": {n: spectral_change(lab, models[n]) for n in ("om", "ta")},
        "contradiction": contradiction(lab, steps),
        "sha256": lab.sha256,
    }


def oft_merges(
    lab: Lab, triangles: Sequence[Mapping[str, Tensor]], experts: Sequence[Trunk]
) -> dict[str, Any]:
    """Merges of the OFT experts, by name."""
    share = 1 / len(experts)
    ours = merged_oft(lab, triangles)
    mean = task_arithmetic(lab.base, experts, scale=share)
    return {
        "om": ours,
        "lie mean": merged_oft(lab, triangles, correct=False),
        "ta": mean,
        "ta .3": task_arithmetic(lab.base, experts, scale=0.3),
        "ta matched": as_far_as(lab, mean, ours),  # pyrefly: ignore
        "ties": ties(lab.base, experts, density=DENSITY, threshold="model"),
        "dare": dare(lab.base, experts, density=0.5, scale=share, seed=lab.seed),
    }


def free_merges(lab: Lab, experts: Sequence[Trunk]) -> dict[str, Any]:
    """Merges of the freely trained experts, by name; OM-G and OM-C are the two variants."""
    base, share = lab.base, 1 / len(experts)
    merges: dict[str, Any] = {
        "free ta": task_arithmetic(base, experts, scale=share),
        "free ta .4": task_arithmetic(base, experts, scale=0.4),
        "free ties": ties(base, experts, density=DENSITY, threshold="model"),
    }
    for variant in ("G", "C"):
        for name, residual, scale in (("ta", "ta", share), ("ta .4", "ta", 0.4)):
            merges[f"free om-{variant} {name}"] = orthomerge(
                base, experts, variant=variant, residual=residual, residual_scale=scale
            )
        merges[f"free om-{variant} ties"] = orthomerge(
            base, experts, variant=variant, residual="ties", threshold="model", density=DENSITY
        )
    return merges


def contradiction(lab: Lab, steps: int) -> dict[str, float]:
    """Two OFT experts that must read the same pixels differently: digits moved left, and right.

    Each is trained and the merges are tested on the ten classes, with the base's own head.
    """

    def moved(part: Part, by: int) -> Part:
        images = part.x.view(-1, 8, 8).roll(by, 2)
        images[..., slice(by) if by > 0 else slice(by, None)] = 0
        return Part(images.reshape(-1, 64), part.y)

    experts = []
    for by in (-SHIFT, SHIFT):
        triangles = {
            name: torch.zeros(lab.base[name].shape[1] // BLOCK, BLOCK * (BLOCK - 1) // 2)
            for name in MATRICES
        }
        learned = [t.requires_grad_() for t in triangles.values()]
        fit(
            lambda t=triangles: turned(lab, t), lab.heads["digit"], moved(lab.train, by), "digit",
            learned, lr=OFT_RATE, steps=steps, draw=lab.generator(3, int(by > 0)),
        )  # fmt: skip
        experts.append({name: t.detach() for name, t in triangles.items()})
    tests = [moved(lab.test, by) for by in (-SHIFT, SHIFT)]
    models = {
        "om": merged_oft(lab, experts),
        "ta": task_arithmetic(lab.base, [turned(lab, e) for e in experts], scale=0.5),
        "base": lab.base,
    }

    def score(model: Any, part: Part) -> float:
        return accuracy(model, lab, "digit", part)

    own = [score(turned(lab, e), t) for e, t in zip(experts, tests, strict=True)]
    found = {name: sum(score(m, t) for t in tests) / 2 for name, m in models.items()}
    return {**found, "experts": sum(own) / 2}

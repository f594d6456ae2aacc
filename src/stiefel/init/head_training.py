"""Linear heads on frozen features, a whole grid of penalties and weights trained as one.

With features cached, a step of all runs is one product of matrices forwards and one back. The
gradient of every penalty by the logits is written out here; the tests hold each against autograd
on :mod:`stiefel.init.penalties`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stiefel.init.environments import (
    Part,
    confidence,
    kernel_sums,
    members,
    targets,
    through_link,
)
from stiefel.init.penalties import CLOVE_SCALE, check_penalty
from stiefel.linalg._checks import check_finite, check_matrix, compute_dtype

# arXiv 2203.15516, ColoredMNIST.
LR, L2, STEPS = 5e-4, 1.1e-3, 1001
# Its code regularises only the feature network with Fishr, and nothing with CLOvE.
WITHOUT_L2 = ("fishr", "clove")


@dataclass(frozen=True)
class Heads:
    """Linear heads, one for each run: ``c`` = 1 channel if binary, otherwise one for each class."""

    weight: Float[Tensor, "runs c h"]
    bias: Float[Tensor, "runs c"]

    def __call__(self, phi: Float[Tensor, "n h"]) -> Float[Tensor, "*runs_and_logits"]:
        """Logits of every run on features: ``[runs, n]`` if binary, otherwise ``[runs, n, c]``."""
        z = (phi.to(self.weight) @ self.weight.flatten(0, 1).mT).unflatten(1, self.bias.shape)
        z = (z + self.bias).movedim(0, 1)
        return z[..., 0] if self.bias.shape[1] == 1 else z


def train_heads(
    phi: Float[Tensor, "n h"],
    y: Shaped[Tensor, " _labels"],
    env: Shaped[Tensor, " _ids"],
    penalties: Sequence[str],
    weights: Sequence[float | int],
    *,
    steps: int | Sequence[int] = STEPS,
    lr: float | int = LR,
    l2: float | int = L2,
    classes: int = 2,
    start: Heads | None = None,
    watch: Callable[[int, Heads], None] | None = None,
) -> Heads:
    """Train one linear head for each pair of penalty and weight by full-batch Adam, all at once.

    Each run minimises Σ_e L_e + l2 ‖(w, b)‖² + weight · P, divided by ``weight`` where that is
    above 1, as if it were alone; l2 is left out for Fishr and CLOvE. Features are read once, and
    half types kept as float32.

    Args:
        phi: features ``[n, h]``, frozen.
        y: labels ``[n]``: 0 and 1, or class ids below ``classes``.
        env: environment ids ``[n]``, at least two unless every penalty is ``"erm"`` or
            ``"spectral_decoupling"``.
        penalties, weights: of each run, names as in :func:`penalised_loss`.
        steps: of all runs, or of each; a run ends with its own last step.
        lr, l2: Adam's rate and the factor of the squared norm.
        classes: 2: one logit and a sigmoid; more: a softmax.
        start: heads to start from, one for each run or one for all; zeros if left out.
        watch: called with the number of steps done and the heads after every step, 0 included.

    Raises:
        ValueError: lengths differ, too few environments, wrong labels, NaN or infinities, unknown
            penalty, settings out of range.
        TypeError: ``phi`` is not floating point or ``env`` not integer.

    Source: arXiv 2203.15516, RFC(cf).
    """
    _check_settings(penalties, weights, lr, l2, classes)
    ends = _ends(steps, len(penalties))
    check_matrix(phi, "phi")
    check_finite(phi, "phi")
    alone = all(name in ("erm", "spectral_decoupling") for name in penalties)
    rows = members(env, len(phi), least=1 if alone else 2)
    c = 1 if classes == 2 else classes
    features = torch.nn.functional.pad(phi.detach().to(compute_dtype(phi.dtype)), (0, 1), value=1.0)
    target = targets(y, len(phi), c, features.dtype)
    # A contiguous block for each environment: means by slices, features never copied again.
    blocks = [features[i] for i in rows]
    labels = [target[:, i] for i in rows]
    squares = [block.square() for block in blocks] if "fishr" in penalties else []

    w = _start(start, len(penalties), c, features)
    result = w.detach().clone()
    optimizer = torch.optim.Adam([w], lr=lr)
    runs = {name: [i for i, p in enumerate(penalties) if p == name] for name in penalties}
    strength = features.new_tensor(weights)[:, None, None]
    plain = features.new_tensor([name == "erm" for name in penalties])[:, None, None]
    scale = torch.where(plain > 0, 1.0, strength.clamp(min=1.0))
    decay = features.new_tensor([0.0 if p in WITHOUT_L2 else 2.0 * l2 for p in penalties])
    decay = decay[:, None, None] / scale
    for step in range(max(ends) + 1):
        if watch is not None:
            watch(step, _heads(w.detach()))
        finished = [i for i, end in enumerate(ends) if end == step]
        if finished:
            result[finished] = w.detach()[finished]
            # What goes on with these is not read any more, so their penalties need no computing.
            runs = {name: [i for i in index if ends[i] > step] for name, index in runs.items()}
        if step == max(ends):
            break
        slopes = _slopes(w.detach(), blocks, squares, labels, runs, strength)
        gradient = torch.zeros_like(w).flatten(0, 1)
        for slope, block in zip(slopes, blocks, strict=True):
            gradient.addmm_((slope / scale).flatten(0, 1), block)
        w.grad = gradient.view_as(w).addcmul_(decay, w.detach())
        optimizer.step()
    return _heads(result)


def _slopes(
    w: Tensor,
    blocks: Sequence[Tensor],
    squares: Sequence[Tensor],
    labels: Sequence[Tensor],
    runs: Mapping[str, list[int]],
    strength: Tensor,
) -> list[Tensor]:
    """Gradient of Σ_e L_e + weight · P of every run by each environment's logits."""
    parts = [
        Part((w.flatten(0, 1) @ block.mT).unflatten(0, w.shape[:2]), label)
        for block, label in zip(blocks, labels, strict=True)
    ]
    slopes = [part.residual() / part.z.shape[-1] for part in parts]
    for name, index in runs.items():
        if name == "erm" or not index:
            continue
        chosen = [Part(part.z[index], part.target) for part in parts]
        features = squares if name == "fishr" else blocks
        for slope, extra in zip(slopes, penalty_slopes(name, chosen, features), strict=True):
            slope[index] += strength[index] * extra
    return slopes


def penalty_slopes(name: str, parts: Sequence[Part], blocks: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of a penalty by the logits of each environment, ``[runs, c, n]``.

    Args:
        name: a penalty other than ``"erm"``.
        parts: logits and targets of each environment.
        blocks: features of each environment with a last column of ones, ``[n, h + 1]``; for
            ``"fishr"`` their squares.
    """
    return _SLOPES[name](parts, blocks)


def _irmv1(parts: Sequence[Part], _: Sequence[Tensor]) -> list[Tensor]:
    slopes = []
    for part in parts:
        n, p = part.z.shape[-1], part.probability()
        residual = p - part.target
        by_scale = (residual * part.z).sum((-2, -1), keepdim=True) / n
        factor = 2 * by_scale / (len(parts) * n)
        slopes.append(factor * (residual + through_link(p, part.z)))
    return slopes


def _vrex(parts: Sequence[Part], _: Sequence[Tensor]) -> list[Tensor]:
    losses = torch.stack([part.losses().mean(-1) for part in parts])
    factors = 2 * (losses - losses.mean(0)) / (len(parts) - 1)
    return [
        factor[:, None, None] * part.residual() / part.z.shape[-1]
        for factor, part in zip(factors, parts, strict=True)
    ]


def _spectral_decoupling(parts: Sequence[Part], _: Sequence[Tensor]) -> list[Tensor]:
    return [2 * part.z / part.z.shape[-1] for part in parts]


def _iga(parts: Sequence[Part], blocks: Sequence[Tensor]) -> list[Tensor]:
    return _by_moments(parts, blocks, 1)


def _fishr(parts: Sequence[Part], blocks: Sequence[Tensor]) -> list[Tensor]:
    return _by_moments(parts, blocks, 2)


def _by_moments(parts: Sequence[Part], blocks: Sequence[Tensor], power: int) -> list[Tensor]:
    """Of Σ_e ‖v_e − mean v‖² with v_e = mean(residual^power ⊗ features), features as given."""
    probabilities = [part.probability() for part in parts]
    residuals = [p - part.target for p, part in zip(probabilities, parts, strict=True)]
    moments = torch.stack(
        [r.pow(power) @ block / len(block) for r, block in zip(residuals, blocks, strict=True)]
    )
    slopes = []
    for deviation, p, r, block in zip(
        moments - moments.mean(0), probabilities, residuals, blocks, strict=True
    ):
        by_residual = 2 / len(block) * (deviation @ block.mT)
        if power == 2:
            by_residual = 2 * r * by_residual
        slopes.append(through_link(p, by_residual))
    return slopes


def _clove(parts: Sequence[Part], _: Sequence[Tensor]) -> list[Tensor]:
    slopes = []
    for part in parts:
        n, p = part.z.shape[-1], part.probability()
        conf, correct = confidence(part)
        gap = correct - conf
        lower, ties, upper = kernel_sums(conf, gap, CLOVE_SCALE)
        # The gap moves against the confidence, and so does the kernel's distance.
        by_conf = -(lower + ties + upper) + gap * (upper - lower) / CLOVE_SCALE
        by_conf = (2 / n**2 * by_conf).unsqueeze(-2)
        if p.shape[-2] == 1:
            slopes.append(by_conf * part.z.sign() * p * (1 - p))
        else:
            largest = torch.zeros_like(p).scatter(-2, p.argmax(-2, keepdim=True), by_conf)
            slopes.append(through_link(p, largest))
    return slopes


_SLOPES: dict[str, Callable[[Sequence[Part], Sequence[Tensor]], list[Tensor]]] = {
    "irmv1": _irmv1,
    "vrex": _vrex,
    "spectral_decoupling": _spectral_decoupling,
    "iga": _iga,
    "fishr": _fishr,
    "clove": _clove,
}


def _heads(w: Tensor) -> Heads:
    return Heads(w[..., :-1], w[..., -1])


def _start(start: Heads | None, runs: int, c: int, features: Tensor) -> Tensor:
    shape = (runs, c, features.shape[1])
    if start is None:
        return torch.zeros(shape, dtype=features.dtype, device=features.device)
    w = torch.cat([start.weight, start.bias[..., None]], -1).detach().to(features)
    if w.shape[0] not in (1, runs) or w.shape[1:] != shape[1:]:
        raise ValueError(
            f"start must hold 1 or {runs} heads of {c} × {shape[2] - 1} weights, "
            f"got {tuple(start.weight.shape)}"
        )
    return w.expand(shape).clone()


def _ends(steps: int | Sequence[int], runs: int) -> list[int]:
    ends = [steps] * runs if isinstance(steps, int) else list(steps)
    if len(ends) != runs or any(end < 0 for end in ends):
        raise ValueError(f"steps must be at least 0, one number or one for each run, got {steps}")
    return ends


def _check_settings(
    penalties: Sequence[str],
    weights: Sequence[float | int],
    lr: float | int,
    l2: float | int,
    classes: int,
) -> None:
    if not penalties or len(penalties) != len(weights):
        raise ValueError(
            f"penalties and weights must hold one entry for each run, got {len(penalties)} "
            f"and {len(weights)}"
        )
    for penalty, weight in zip(penalties, weights, strict=True):
        check_penalty(penalty, weight)
    if not 0 < lr < float("inf") or not 0 <= l2 < float("inf"):
        raise ValueError(f"lr must be positive, l2 at least 0, both finite; got {lr} and {l2}")
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")

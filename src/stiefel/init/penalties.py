"""Six out-of-distribution penalties, each one function with the shape of a PyTorch loss.

Each takes logits, labels and the environment of every example, and returns one number per run.
Wherever a penalty is a function of gradients with respect to a linear head, those gradients are
written out (residual times feature), so no penalty but :func:`iga` differentiates twice.

Source: the objectives as compared in "Rich Feature Construction for the Optimization-
Generalization Dilemma", arXiv 2203.15516; each function names the work it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.init.environments import (
    Part,
    channels,
    confidence,
    kernel_sums,
    members,
    split,
    targets,
    whole,
)
from stiefel.init.moments import moment_spread, spread

# CLOvE, arXiv 2102.10395: width of the Laplace kernel on confidences.
CLOVE_SCALE = 0.4
PENALTIES = ("erm", "irmv1", "vrex", "spectral_decoupling", "iga", "fishr", "clove")


def environment_losses(
    z: Float[Tensor, "*logits"],
    y: Shaped[Tensor, "*labels"],
    env: Shaped[Tensor, " n"],
    *,
    multiclass: bool = False,
) -> Float[Tensor, "*runs"]:
    """Mean cross-entropy of each environment, nats: ``[..., environments]``, in order of their ids.

    Args:
        z: logits ``[..., n]``; leading dimensions are runs. With ``multiclass`` ``[..., n, c]``.
        y: labels ``[n]`` or ``[..., n]``: 0 and 1, or with ``multiclass`` class ids below ``c``.
        env: environment id of each example, integers ``[n]``.
        multiclass: softmax over the last dimension of ``z`` instead of a sigmoid.

    Raises:
        ValueError: fewer than two environments, lengths that differ, labels that are no such
            labels, logits that are not finite.
        TypeError: ``z`` is not real floating point, or ``env`` not integer.
    """
    return _losses(split(z, y, env, multiclass=multiclass))


def irmv1(
    z: Float[Tensor, "*logits"],
    y: Shaped[Tensor, "*labels"],
    env: Shaped[Tensor, " n"],
    *,
    multiclass: bool = False,
) -> Float[Tensor, "*runs"]:
    """IRMv1: mean over environments of (∂L_e/∂s)², with logits s·z at s = 1; one number per run.

    The derivative is mean⟨residual, z⟩, so nothing is differentiated here. Arguments, shapes and
    errors as in :func:`environment_losses`.

    Source: Arjovsky et al., "Invariant Risk Minimization", arXiv 1907.02893.
    """
    return _irmv1(split(z, y, env, multiclass=multiclass))


def vrex(
    z: Float[Tensor, "*logits"],
    y: Shaped[Tensor, "*labels"],
    env: Shaped[Tensor, " n"],
    *,
    multiclass: bool = False,
) -> Float[Tensor, "*runs"]:
    """V-REx: unbiased variance of the environments' losses; (L₁ − L₂)²/2 if there are two.

    Arguments, shapes and errors as in :func:`environment_losses`.

    Source: Krueger et al., "Out-of-Distribution Generalization via Risk Extrapolation",
    arXiv 2003.00688, with the divisor E − 1 of arXiv 2203.15516.
    """
    return _vrex(split(z, y, env, multiclass=multiclass))


def spectral_decoupling(
    z: Float[Tensor, "*logits"],
    env: Shaped[Tensor, " n"] | None = None,
    *,
    multiclass: bool = False,
) -> Float[Tensor, "*runs"]:
    """Spectral decoupling: mean squared logit of each environment, summed over environments.

    Args:
        z: logits ``[..., n]``, or with ``multiclass`` ``[..., n, c]`` (squares summed over c).
        env: environment ids ``[n]``; without them all examples are one environment.
        multiclass: whether the last dimension of ``z`` holds classes.

    Raises:
        ValueError: logits that are not finite, lengths that differ.
        TypeError: ``z`` is not real floating point, or ``env`` not integer.

    Source: Pezeshki et al., "Gradient Starvation", arXiv 2011.09468.
    """
    logits = channels(z, multiclass)
    squares = logits.square().sum(-2)
    if env is None:
        return squares.mean(-1)
    rows = members(env, squares.shape[-1], least=1)
    return torch.stack([squares[..., i].mean(-1) for i in rows], -1).sum(-1)


def iga(
    z: Float[Tensor, "*logits"],
    y: Shaped[Tensor, "*labels"],
    env: Shaped[Tensor, " n"],
    parameters: Iterable[Tensor],
    *,
    multiclass: bool = False,
) -> Float[Tensor, ""]:
    """IGA: Σ_e ‖g_e − mean g‖², g_e the gradient of L_e by ``parameters``; for any network.

    One backward pass per environment, kept for a second one. The mean is held constant, which
    leaves the gradient as it is: the deviations from a mean sum to zero. For the weights of a
    linear head :func:`iga_linear` gives the same without any of this.

    Args:
        z: logits ``[n]`` (``[n, c]`` with ``multiclass``) of one run, computed from ``parameters``.
        y, env, multiclass: as in :func:`environment_losses`.
        parameters: tensors that require gradients; one that ``z`` does not depend on counts as 0.

    Raises:
        ValueError: as :func:`environment_losses`; ``z`` of several runs; no parameters.

    Source: Koyama and Yamaguchi, "When is invariance useful in an Out-of-Distribution
    Generalization problem?", arXiv 2008.01883.
    """
    losses = environment_losses(z, y, env, multiclass=multiclass)
    if losses.ndim != 1:
        raise ValueError(f"iga takes the logits of one run, got z of shape {tuple(z.shape)}")
    wrt = list(parameters)
    if not wrt:
        raise ValueError("parameters is empty: iga needs what the gradients are taken by")
    gradients = [
        torch.autograd.grad(loss, wrt, create_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    total = losses.new_zeros(())
    for per_environment in zip(*gradients, strict=True):
        total = total + spread(torch.stack(per_environment).flatten(1))
    return total


def iga_linear(
    phi: Float[Tensor, "... _rows h"],
    z: Float[Tensor, "*logits"],
    y: Shaped[Tensor, "*labels"],
    env: Shaped[Tensor, " n"],
    *,
    multiclass: bool = False,
) -> Float[Tensor, "*runs"]:
    """IGA of a linear head with bias: g_e = mean(residual ⊗ (φ, 1)); one number per run.

    Args:
        phi: features ``[n, h]`` that the head reads, shared by the runs, or ``[..., n, h]``.
        z: logits ``phi @ w + b`` of the head, ``[..., n]`` (``[..., n, c]`` with ``multiclass``).
        y, env, multiclass: as in :func:`environment_losses`.

    Raises:
        ValueError, TypeError: as :func:`environment_losses`; also for ``phi``.
    """
    return moment_spread(phi, *whole(z, y, env, multiclass=multiclass), power=1)


def fishr_linear(
    phi: Float[Tensor, "... _rows h"],
    z: Float[Tensor, "*logits"],
    y: Shaped[Tensor, "*labels"],
    env: Shaped[Tensor, " n"],
    *,
    multiclass: bool = False,
) -> Float[Tensor, "*runs"]:
    """Fishr of a linear head with bias: Σ_e ‖v_e − mean v‖², v_e = mean(residual² ⊗ (φ², 1)).

    v_e is the uncentred second moment of the per-example gradients. These are residual ⊗ (φ, 1),
    so their squares are averaged by one product of matrices and no gradient is ever stored.
    Arguments, shapes and errors as in :func:`iga_linear`.

    Source: Rame et al., "Fishr: Invariant Gradient Variances for Out-of-Distribution
    Generalization", arXiv 2109.02934, uncentred as in arXiv 2203.15516.
    """
    return moment_spread(phi, *whole(z, y, env, multiclass=multiclass), power=2)


def fishr(
    module: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Shaped[Tensor, " n"],
    env: Shaped[Tensor, " n"],
    *,
    multiclass: bool = False,
) -> Float[Tensor, ""]:
    """Fishr by the trainable parameters of any module, from per-example gradients (torch.func).

    It holds n gradients at a time; for a linear head use :func:`fishr_linear`.

    Args:
        module: maps ``x`` to logits ``[n]`` or ``[n, 1]``, or ``[n, c]`` with ``multiclass``. It
            must treat examples one by one: no batch normalisation in training mode.
        x: inputs ``[n, ...]``; gradients flow to them too.
        y, env, multiclass: as in :func:`environment_losses`.

    Raises:
        ValueError, TypeError: as :func:`environment_losses`.
    """
    trained: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = dict(module.named_buffers())
    for name, parameter in module.named_parameters():
        (trained if parameter.requires_grad else fixed)[name] = parameter

    def logits(parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
        out = torch.func.functional_call(module, (parameters, fixed), (rows,))
        return out if multiclass else out.reshape(len(rows))

    z = channels(logits(trained, x), multiclass)
    rows = members(env, len(x))
    target = targets(y, len(x), z.shape[0], z.dtype)

    def loss(parameters: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        alone = logits(parameters, row[None]).reshape(-1, 1).to(label.dtype)
        return Part(alone, label[:, None]).losses().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 1))(trained, x, target)
    total = z.new_zeros(())
    for gradient in gradients.values():
        squares = gradient.flatten(1).square()
        total = total + spread(torch.stack([squares[i].mean(0) for i in rows]))
    return total


def clove(
    z: Float[Tensor, "*logits"],
    y: Shaped[Tensor, "*labels"],
    env: Shaped[Tensor, " n"],
    scale: float | int = CLOVE_SCALE,
    *,
    multiclass: bool = False,
) -> Float[Tensor, "*runs"]:
    """CLOvE: squared kernel calibration error (MMCE) of each environment, summed.

    P_e = Σ_ij a_i a_j exp(−|conf_i − conf_j| / scale) / n², a = [correct] − conf, conf the largest
    probability. Summed in order of confidence: O(n log n) time, O(n) memory, unless ``scale`` is
    below 1/40, where the n × n kernel is made. Arguments else as in :func:`environment_losses`.

    Raises:
        ValueError: ``scale`` is not positive and finite, or as in :func:`environment_losses`.
        TypeError: as in :func:`environment_losses`.

    Source: Wald et al., "On Calibration and Out-of-Domain Generalization", arXiv 2102.10395,
    after Kumar et al., "Trainable calibration measures for neural networks" (MMCE), ICML 2018.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return _clove(split(z, y, env, multiclass=multiclass), scale)


def penalised_loss(
    penalty: str,
    weight: float | int,
    z: Float[Tensor, "*logits"],
    y: Shaped[Tensor, "*labels"],
    env: Shaped[Tensor, " n"],
    *,
    phi: Float[Tensor, "... _rows h"] | None = None,
    parameters: Iterable[Tensor] | None = None,
    multiclass: bool = False,
) -> Float[Tensor, "*runs"]:
    """Σ_e L_e + weight · P, all of it divided by ``weight`` where that is above 1.

    Args:
        penalty: ``"erm"`` (no penalty), ``"irmv1"``, ``"vrex"``, ``"spectral_decoupling"``,
            ``"iga"``, ``"fishr"`` or ``"clove"``.
        weight: c ≥ 0; ignored by ``"erm"``.
        z, y, env, multiclass: as in :func:`environment_losses`.
        phi: features ``[n, h]`` that a linear head reads; ``"fishr"`` needs them, and ``"iga"``
            where ``parameters`` are not given.
        parameters: what ``"iga"`` takes gradients by.

    Raises:
        ValueError: unknown penalty, a weight that is negative or not finite, what ``penalty``
            needs is missing, or as in the penalty.
        TypeError: as in the penalty.

    Source: arXiv 2203.15516, the objectives as its code runs them.
    """
    check_penalty(penalty, weight)
    parts = split(z, y, env, multiclass=multiclass)
    total = _losses(parts).sum(-1)
    if penalty == "erm":
        return total
    if penalty == "iga" and parameters is not None:
        value = iga(z, y, env, parameters, multiclass=multiclass)
    elif penalty in ("iga", "fishr"):
        if phi is None:
            raise ValueError(f"penalty {penalty!r} needs phi, the features that the head reads")
        every, together = whole(z, y, env, multiclass=multiclass)
        value = moment_spread(phi, every, together, power=1 if penalty == "iga" else 2)
    else:
        value = _BY_LOGITS[penalty](parts)
    return (total + weight * value) / max(weight, 1.0)


def check_penalty(penalty: str, weight: float | int) -> None:
    """Raise ``ValueError`` unless ``penalty`` is one of ours and ``weight`` ≥ 0 and finite."""
    if penalty not in PENALTIES:
        raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}, got {penalty!r}")
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"weight must be at least 0 and finite, got {weight}")


def _losses(parts: Sequence[Part]) -> Tensor:
    return torch.stack([part.losses().mean(-1) for part in parts], -1)


def _irmv1(parts: Sequence[Part]) -> Tensor:
    slopes = [(part.residual() * part.z).sum(-2).mean(-1) for part in parts]
    return torch.stack(slopes, -1).square().mean(-1)


def _vrex(parts: Sequence[Part]) -> Tensor:
    return _losses(parts).var(-1, unbiased=True)


def _spectral_decoupling(parts: Sequence[Part]) -> Tensor:
    return torch.stack([part.z.square().sum(-2).mean(-1) for part in parts], -1).sum(-1)


def _clove(parts: Sequence[Part], scale: float | int = CLOVE_SCALE) -> Tensor:
    values = []
    for part in parts:
        conf, correct = confidence(part)
        gap = correct - conf
        lower, ties, _ = kernel_sums(conf, gap, scale)
        # What is above i for j is below j for i: the pairs on either side add up to the same.
        values.append((gap * (2 * lower + ties)).mean(-1) / gap.shape[-1])
    return torch.stack(values, -1).sum(-1)


_BY_LOGITS: dict[str, Callable[[Sequence[Part]], Tensor]] = {
    "irmv1": _irmv1,
    "vrex": _vrex,
    "spectral_decoupling": _spectral_decoupling,
    "clove": _clove,
}

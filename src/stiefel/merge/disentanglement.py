"""How far task vectors disturb each other, and what their sum and their negation are worth.

Weight disentanglement, f(x; θ0 + Σ α_j τ_j) = f(x; θ0 + α_t τ_t) for x of task t, and its error ξ:
Ortiz-Jimenez et al., arXiv 2305.12827. The evaluation follows the code of OrthoReg, arXiv
2604.17078.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stiefel.merge.task_vector import TaskVector, as_state

State = Mapping[str, Tensor]
Outputs = Callable[[State, Tensor], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]

# The strengths that the authors try: 0, 0.05 ... 1.
ALPHAS = tuple(i / 20 for i in range(21))
# Part of the control accuracy that must be left when a task is negated.
KEEP = 0.95


def disentanglement_error(
    f: Outputs | nn.Module | Sequence[Outputs],
    theta0: State | nn.Module,
    tau1: TaskVector,
    tau2: TaskVector,
    loaders: Sequence[Iterable[Tensor | Sequence[Tensor]]],
    alphas: Sequence[float | int],
    *,
    dist: Distance | None = None,
) -> Float[Tensor, "k k"]:
    """ξ(α1, α2) = Σ_t E_{x∼D_t} dist(f(x; θ0 + α_t τ_t), f(x; θ0 + α1 τ1 + α2 τ2)), t = 1, 2.

    0 where each task sees only its own vector; 2 where every prediction changes.

    Args:
        f: ``(state, x) -> outputs [n, ...]``, pure; two of them if the tasks have heads of their
            own; or a module, which is run in evaluation mode with the states' tensors in place of
            its own.
        theta0: θ0.
        tau1, tau2: The two task vectors.
        loaders: Data of task 1 and of task 2: batches x, or tuples that begin with x. Each is gone
            through once.
        alphas: The k strengths for either axis.
        dist: ``(alone, both) -> [n]``. None: 1 where the largest of the last dimension's outputs is
            another one, else 0.

    Returns:
        Entry [i, j] is ξ(alphas[i], alphas[j]), float64.

    Raises:
        ValueError: not two loaders or functions, no alpha, an alpha that is not finite, a loader
            without data, outputs that are NaN; names or shapes that do not fit.
    """
    first, second = _pair(f, "f") if isinstance(f, Sequence) else (f, f)
    data = _pair(loaders, "loaders")
    if not alphas or not all(math.isfinite(a) for a in alphas):
        raise ValueError(f"alphas must be finite numbers, at least one, got {list(alphas)}")
    dist = dist or _other_label
    zero = as_state(theta0)
    total = torch.zeros(len(alphas), len(alphas), dtype=torch.float64)
    with torch.no_grad():
        for number, (run, loader, own) in enumerate(
            ((_outputs(first), data[0], tau1), (_outputs(second), data[1], tau2))
        ):
            summed, count = torch.zeros_like(total), 0
            for batch in loader:
                x = batch if isinstance(batch, Tensor) else batch[0]
                alone = [_checked(run(own.apply_to(zero, a), x)) for a in alphas]
                for i, a1 in enumerate(alphas):
                    partly = tau1.apply_to(zero, a1)
                    for j, a2 in enumerate(alphas):
                        both = _checked(run(tau2.apply_to(partly, a2), x))
                        apart = dist(alone[(i, j)[number]], both)
                        summed[i, j] += apart.double().sum().cpu()
                count += len(x)
            if not count:
                raise ValueError(f"loaders[{number}] has no data")
            total += summed / count
    return total


def absolute_accuracy(accuracies: Sequence[float | int]) -> float:
    """Mean over tasks of the merged model's accuracy.

    Raises:
        ValueError: no task, or a number that is not finite.
    """
    _check_numbers(accuracies, "accuracies")
    return math.fsum(accuracies) / len(accuracies)


def normalised_accuracy(accuracies: Sequence[float | int], single: Sequence[float | int]) -> float:
    """Mean over tasks of the merged model's accuracy in parts of the task's own expert's.

    1 is what the experts have, of the same method: weak experts make it easy to exceed.

    Raises:
        ValueError: no task, different numbers of tasks, a number that is not finite, an expert's
            accuracy that is not positive.
    """
    _check_numbers(accuracies, "accuracies")
    _check_numbers(single, "single")
    if len(accuracies) != len(single):
        raise ValueError(
            f"accuracies and single must be of the same tasks, got {len(accuracies)} and "
            f"{len(single)}"
        )
    if min(single) <= 0:
        raise ValueError(f"single must be positive, got {list(single)}")
    return math.fsum(a / s for a, s in zip(accuracies, single, strict=True)) / len(single)


@dataclass(frozen=True)
class AlphaChoice:
    """What :func:`select_alpha` found.

    Attributes:
        alpha: The strength chosen.
        score: There.
        scores: Of every strength asked for, in their order; NaN where the control forbade it.
    """

    alpha: float
    score: float
    scores: tuple[float, ...]


def select_alpha(
    score: Callable[[float], float],
    alphas: Sequence[float | int] = ALPHAS,
    *,
    control: Callable[[float], float] | None = None,
    at_least: float | int | None = None,
    maximize: bool = True,
) -> AlphaChoice:
    """The strength with the best validation score, the first of several.

    Merging: ``score`` is the mean normalised accuracy. Negation: ``score`` is the accuracy on the
    task to forget, ``maximize=False``, and ``control`` must stay ``at_least`` what it was times
    0.95.

    Args:
        score: Of a strength α, on validation data.
        alphas: The strengths to try.
        control: Of a strength α; strengths where it is below ``at_least`` are out.
        at_least: As said; with ``control``.
        maximize: Whether a larger score is better.

    Raises:
        ValueError: no strength, only one of ``control`` and ``at_least``, no strength that keeps
            the control, a score that is NaN.
    """
    if not alphas:
        raise ValueError("alphas must hold at least one strength")
    if (control is None) != (at_least is None):
        raise ValueError("control and at_least go together: give both or neither")
    scores = []
    for alpha in alphas:
        allowed = control is None or at_least is None or control(float(alpha)) >= at_least
        scores.append(float(score(float(alpha))) if allowed else math.nan)
        if allowed and math.isnan(scores[-1]):
            raise ValueError(f"the score at alpha = {alpha} is NaN")
    kept = [i for i, value in enumerate(scores) if not math.isnan(value)]
    if not kept:
        raise ValueError(f"no alpha keeps the control at {at_least} or above")
    best = (max if maximize else min)(kept, key=scores.__getitem__)
    return AlphaChoice(float(alphas[best]), scores[best], tuple(scores))


@dataclass(frozen=True)
class Addition:
    """What adding task vectors gives, on test data.

    Attributes:
        alpha: Chosen on validation data, one for all tasks.
        accuracies: Of the merged model, by task.
        single: Of each task's own expert, by task.
        absolute: Mean of ``accuracies``.
        normalised: Mean of their ratios to ``single``.
    """

    alpha: float
    accuracies: dict[str, float]
    single: dict[str, float]
    absolute: float
    normalised: float


@dataclass(frozen=True)
class Negation:
    """What subtracting one task vector gives, on test data.

    Attributes:
        alpha: Chosen on validation data.
        target: Accuracy on the task to forget.
        control: Accuracy on what must stay.
        target_before, control_before: The same at θ0.
    """

    alpha: float
    target: float
    control: float
    target_before: float
    control_before: float


Accuracy = Callable[[State, str, str], float]
"""``(state, task, part)``, part ``"validation"`` or ``"test"``."""


def evaluate_addition(
    accuracy: Accuracy,
    theta0: State | nn.Module,
    taus: Mapping[str, TaskVector],
    alphas: Sequence[float | int] = ALPHAS,
) -> Addition:
    """θ0 + α Σ τ_t, with the α of the best mean normalised accuracy on validation data.

    Args:
        accuracy: Of a state on a task's part of the data.
        theta0: θ0.
        taus: The task vectors by task.
        alphas: The strengths to try.

    Raises:
        ValueError: no task; as :func:`select_alpha` and :func:`normalised_accuracy`.
    """
    if not taus:
        raise ValueError("taus must hold at least one task vector")
    zero, tasks = as_state(theta0), list(taus)
    total = sum(taus.values())
    experts = {task: tau.apply_to(zero) for task, tau in taus.items()}
    own = [accuracy(experts[task], task, "validation") for task in tasks]

    def merged(alpha: float, part: str) -> list[float]:
        state = total.apply_to(zero, alpha)  # pyrefly: ignore
        return [accuracy(state, task, part) for task in tasks]

    choice = select_alpha(lambda a: normalised_accuracy(merged(a, "validation"), own), alphas)
    found = merged(choice.alpha, "test")
    single = [accuracy(experts[task], task, "test") for task in tasks]
    return Addition(
        choice.alpha,
        dict(zip(tasks, found, strict=True)),
        dict(zip(tasks, single, strict=True)),
        absolute_accuracy(found),
        normalised_accuracy(found, single),
    )


def evaluate_negation(
    accuracy: Accuracy,
    control: Callable[[State, str], float],
    theta0: State | nn.Module,
    taus: Mapping[str, TaskVector],
    alphas: Sequence[float | int] = ALPHAS,
    *,
    keep: float | int = KEEP,
) -> dict[str, Negation]:
    """θ0 − α τ_t for every task: least target accuracy while the control stays.

    Args:
        accuracy: Of a state on a task's part of the data.
        control: Of a state on a part of the control data.
        theta0: θ0.
        taus: The task vectors by task.
        alphas: The strengths to try, 0 among them.
        keep: Part of θ0's control accuracy, on validation data, that must be left. The authors
            also report 0.90 and 0.80.

    Raises:
        ValueError: no task, ``keep`` outside of [0, 1]; as :func:`select_alpha`.
    """
    if not taus:
        raise ValueError("taus must hold at least one task vector")
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be between 0 and 1, got {keep}")
    zero = as_state(theta0)
    floor = keep * control(zero, "validation")
    control_before = control(zero, "test")
    found = {}
    for task, tau in taus.items():
        choice = select_alpha(
            lambda a, tau=tau, task=task: accuracy(tau.apply_to(zero, -a), task, "validation"),
            alphas,
            control=lambda a, tau=tau: control(tau.apply_to(zero, -a), "validation"),
            at_least=floor,
            maximize=False,
        )
        state = tau.apply_to(zero, -choice.alpha)
        found[task] = Negation(
            choice.alpha,
            accuracy(state, task, "test"),
            control(state, "test"),
            accuracy(zero, task, "test"),
            control_before,
        )
    return found


def _outputs(f: Outputs | nn.Module) -> Outputs:
    """A module as a function of its state, in evaluation mode while it runs."""
    if not isinstance(f, nn.Module):
        return f
    module = f

    def run(state: State, x: Tensor) -> Tensor:
        modes = [(m, m.training) for m in module.modules()]
        module.eval()
        try:
            return torch.func.functional_call(module, dict(state), (x,))
        finally:
            for m, mode in modes:
                m.training = mode

    return run


def _other_label(alone: Tensor, both: Tensor) -> Tensor:
    return alone.argmax(-1) != both.argmax(-1)


def _checked(outputs: Tensor) -> Tensor:
    if bool(outputs.isnan().any()):
        raise ValueError("f returned NaN")
    return outputs


def _pair(values: Sequence, name: str) -> tuple:
    if len(values) != 2:
        raise ValueError(f"{name} must be two, one per task, got {len(values)}")
    return tuple(values)


def _check_numbers(values: Sequence[float | int], name: str) -> None:
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be finite numbers, at least one, got {list(values)}")

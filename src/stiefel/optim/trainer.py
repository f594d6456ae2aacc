"""Our optimizers in ``transformers.Trainer``; transformers itself is never imported here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from stiefel.optim.base import MatrixOptimizer
from stiefel.optim.groups import split_parameters

_ROUTING = tuple(inspect.signature(split_parameters).parameters)[1:]


class TrainerFactory:
    """What Trainer makes the optimizer with, once it has the model that it will train.

    Of what stands in ``optimizer_cls_and_kwargs`` and is no optimizer class, Trainer calls
    ``TrainerFactory()(model, **kwargs)``. A class would get two lists of parameters without names,
    sorted into decayed and not decayed, from which no routing can be read.
    """

    def __init__(self, *arguments: Any, **_: Any) -> None:
        """Take nothing.

        Raises:
            TypeError: an older Trainer, which passes parameter lists to all that it is given.
        """
        if arguments:
            raise TypeError(
                "this Trainer hands lists of parameters to a factory; transformers 5.2 or newer "
                "hands over the model. With an older one pass Trainer(optimizers=(optimizer, None))"
            )

    def __call__(
        self,
        model: nn.Module,
        *,
        optimizer: type[MatrixOptimizer],
        routing: Mapping[str, Any],
        **settings: Any,
    ) -> MatrixOptimizer:
        """The optimizer on the groups of ``model``.

        Args:
            model: What is trained, as Trainer has it when training starts.
            optimizer: A class of :mod:`stiefel.optim`.
            routing: Arguments of :func:`split_parameters`.
            **settings: Arguments of ``optimizer``.

        Raises:
            ValueError: what :func:`split_parameters` or ``optimizer`` refuses.
        """
        groups = []
        for group in split_parameters(model, **routing):
            groups.append(group)
            if group["rule"] == "elementwise":
                groups += _spare_vectors(group)
        return optimizer(groups, **settings)


def _spare_vectors(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Move biases and gains from an elementwise group to one without decay, if there are any."""
    vectors = [(name, p) for name, p in group["params"] if p.ndim < 2]
    group["params"] = [(name, p) for name, p in group["params"] if p.ndim >= 2]
    if not group["params"]:  # the first group of the rule stays, as it does in split_parameters
        group.update(params=vectors, weight_decay=0.0)
        return []
    return [{**group, "params": vectors, "weight_decay": 0.0}] if vectors else []


def trainer_optimizer(
    optimizer: Any,
    *,
    routing: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[type[TrainerFactory], dict[str, Any]]:
    """What ``transformers.Trainer`` takes as ``optimizer_cls_and_kwargs`` (5.2 or newer).

    >>> from stiefel.optim import NorMuon
    >>> chosen = trainer_optimizer(
    ...     NorMuon, lr=2e-3, adamw_lr=1e-3, routing={"split": {"c_attn": 3}}
    ... )
    >>> # Trainer(model, TrainingArguments(...), optimizer_cls_and_kwargs=chosen)

    Parameters are routed by :func:`split_parameters` when Trainer makes the optimizer, so the
    result serves any number of Trainers, also with ``model_init``. Learning rates and decay are
    those given here: ``learning_rate``, ``weight_decay`` and ``adam_*`` of ``TrainingArguments``
    are not looked at. Its schedule and ``max_grad_norm`` work as ever; every group is scheduled
    from its own rate, and the rate that Trainer logs is the matrices'. ``weight_decay`` is for
    matrices, ``adamw_weight_decay`` for embeddings and heads; parameters with fewer than two
    dimensions are not decayed.

    Args:
        optimizer: A class of :mod:`stiefel.optim`.
        routing: Arguments of :func:`split_parameters`: ``{"split": {"c_attn": 3}}``.
        **settings: Arguments of ``optimizer``, such as ``lr``.

    Returns:
        A factory and the arguments that Trainer calls it with.

    Raises:
        TypeError: ``optimizer`` is no such class; a name in ``routing`` or ``settings`` that
            nothing takes.
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, MatrixOptimizer)):
        got = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(
            f"optimizer must be a class of stiefel.optim, such as NorMuon, got {got}. The model is "
            "not asked for: Trainer hands it over when it makes the optimizer"
        )
    routing = dict(routing or {})
    if unknown := sorted(set(routing) - set(_ROUTING)):
        raise TypeError(f"routing has {unknown}, but may have {', '.join(_ROUTING)}")
    known = tuple(inspect.signature(optimizer).parameters)[1:]
    if unknown := sorted(set(settings) - set(known)):
        raise TypeError(f"{optimizer.__name__} has no {unknown}; it takes {', '.join(known)}")
    return TrainerFactory, {"optimizer": optimizer, "routing": routing, **settings}

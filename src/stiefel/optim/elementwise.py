"""The elementwise rule: AdamW, by torch's own kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def adamw_state(
    states: Any, params: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], bool]:
    """Means, mean squares and counts of every parameter, made in ``states`` where there are none.

    The last is whether torch has a fused AdamW for all of them.
    """
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in params)
    averages, squares, steps = [], [], []
    for parameter in params:
        state = states[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        if fused:  # the fused kernels want the count beside the parameter
            state["step"] = state["step"].to(parameter.device)
        averages.append(state["exp_avg"])
        squares.append(state["exp_avg_sq"])
        steps.append(state["step"])
    return averages, squares, steps, fused


def update_elementwise(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    fused: bool,
) -> None:
    """One step of fused or foreach AdamW."""
    beta1, beta2 = group["betas"]
    adamw(
        params,
        grads,
        averages,
        squares,
        [],
        steps,
        fused=fused,
        foreach=not fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )

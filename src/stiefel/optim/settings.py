"""Settings of the optimizers: what is allowed, and how sizes and rates are named."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

NONFINITE = ("raise", "skip", "propagate")


def scale_factor(scale: str | None, rows: int, cols: int) -> float:
    """How a unit orthogonal update of shape (rows, cols) is sized.

    ``"spectral"`` sqrt(max(1, R/C)) (Jordan), ``"rms"`` 0.2·sqrt(max(R, C)) (Moonshot: AdamW's
    learning rate carries over), ``"dion"`` sqrt(R/C), ``None`` 1.
    """
    if scale == "spectral":
        return math.sqrt(max(1.0, rows / cols))
    if scale == "rms":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(rows / cols) if scale == "dion" else 1.0


def check_at_least_zero(group: dict[str, Any], *keys: str) -> None:
    """Refuse negative and non-finite settings."""
    for key in keys:
        if isinstance(group[key], Tensor) and group[key].numel() != 1:
            raise ValueError(f"Tensor {key} must be 1-element, got {tuple(group[key].shape)}")
        value = float(group[key])
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{key} must be finite and ≥ 0, got {group[key]}")


def check_fraction(group: dict[str, Any], *keys: str) -> None:
    """Refuse decay rates outside [0, 1)."""
    for key in keys:
        values = group[key] if isinstance(group[key], tuple | list) else [group[key]]
        for value in values:
            if not 0 <= float(value) < 1:
                raise ValueError(f"{key} must be in [0, 1), got {group[key]}")


def check_choice(group: dict[str, Any], key: str, choices: tuple[Any, ...]) -> None:
    """Refuse what is not among the choices."""
    if group[key] not in choices:
        raise ValueError(f"{key} must be one of {choices}, got {group[key]!r}")


def check_adamw(group: dict[str, Any]) -> None:
    """Refuse AdamW settings out of range."""
    check_at_least_zero(group, "lr", "eps", "weight_decay")
    if len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers, got {group['betas']}")
    check_fraction(group, "betas")


def adamw_defaults(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> dict[str, Any]:
    """The ``adamw_…`` settings of a constructor, checked."""
    check_adamw({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
    return {
        "adamw_lr": lr,
        "adamw_betas": tuple(betas),
        "adamw_eps": eps,
        "adamw_weight_decay": weight_decay,
    }

"""Momentum divided by its Frobenius norm: what AuON is held against."""

from __future__ import annotations

from typing import Any

import torch

from stiefel.optim.base import Batch, MatrixOptimizer
from stiefel.optim.settings import adamw_defaults, check_fraction, scale_factor


class NormalizedMomentum(MatrixOptimizer):
    """SGD with Nesterov momentum U, divided by its Frobenius norm; AdamW for the rest.

    W ← (1 − lr·wd) W − lr · sqrt(max(1, R/C)) · U / ‖U‖_F: AuON without its cosh. A zero U leaves
    its matrix as it is, apart from weight decay.

    Raises:
        ValueError: a setting out of range; a 1-D parameter in a matrix group, by name.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": True,
            "weight_decay": weight_decay,
            "nonfinite": "raise",
            **adamw_defaults(adamw_lr, adamw_betas, 1e-8, 0.0),
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_fraction(group, "momentum")

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        batch.advance(group["momentum"])
        lr = float(group["lr"])
        for p, g, m in zip(batch.params, batch.grads, batch.momenta, strict=True):
            u = torch.lerp(g, m, group["momentum"])
            norm = float(torch.linalg.vector_norm(u))
            p.mul_(1 - lr * group["weight_decay"])
            if norm > 0:
                p.sub_(u, alpha=lr * scale_factor("spectral", *batch.shape) / norm)

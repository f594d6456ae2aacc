"""Muon: momentum orthogonalised by Newton–Schulz (Jordan 2024; Moonshot, arXiv 2502.16982)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stiefel.linalg.coefficients import Coefficients
from stiefel.optim.base import Batch
from stiefel.optim.orthogonal import (
    OrthogonalOptimizer,
    orthogonal_defaults,
    squared_norms,
)
from stiefel.optim.settings import (
    adamw_defaults,
    check_at_least_zero,
    check_choice,
    check_fraction,
    scale_factor,
)


class Muon(OrthogonalOptimizer):
    """Muon for hidden matrices, AdamW for the rest, in one optimizer.

    Learning rate: spectral convention by default (an update has singular values near
    lr·sqrt(max(1, R/C)); 0.02 is usual). With ``scale="rms"`` an update has root mean square
    ≈ 0.2·lr, and AdamW's learning rate and weight decay carry over.

    Per matrix (R, C), with momentum M starting at 0::

        M ← μ M + (1 − μ) G
        U ← (1 − μ) G + μ M  (Nesterov)  or  M
        W ← (1 − lr·wd) W − lr · scale(R, C) · NS(U)

    Args:
        params: Groups from :func:`split_parameters`, or 2-D parameters (all matrices).
        lr: Learning rate of matrix groups.
        momentum: μ in [0, 1).
        nesterov: Look ahead by one step.
        weight_decay: Decoupled; 0.0 means none.
        eps: Added to the momentum's norm before NS. Default: what the coefficients were published
            with, 1e-7 for ``"classic"`` and ``"polar_express"``, else 0, which makes steps
            independent of the gradients' scale.
        ns: ``"fitted"`` (five steps, most accurate on real momentum), ``"fast"`` (four steps, about
            the error of classic), ``"classic"`` (the papers' quintic), ``"polar_express"``, or one
            triple (a, b, c) per step, which must keep the guards of
            :func:`stiefel.linalg.check_guards`.
        scale: ``"spectral"``, ``"rms"``, ``"dion"`` or ``None``.
        rescale: ``"rms"`` gives every update exactly the root mean square 0.2·lr by dividing by its
            own norm; ``scale`` is not used then.
        adamw_lr: Learning rate of elementwise groups, as are ``adamw_betas``, ``adamw_eps`` and
            ``adamw_weight_decay``.
        nonfinite: What a NaN or Inf gradient does: ``"raise"`` before anything changes, ``"skip"``
            that parameter with a warning, or ``"propagate"`` unchecked.
        ns_dtype: Precision of the products. Default: bfloat16 where the device multiplies it
            natively, else float32; float64 for float64 parameters.
        maximize: Must be False.

    Raises:
        ValueError: a setting out of range; a 1-D parameter in a matrix group, by name.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        eps: float | None = None,
        *,
        ns: Coefficients = "fitted",
        scale: str | None = "spectral",
        rescale: str | None = None,
        adamw_lr: float | Tensor = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        nonfinite: str = "raise",
        ns_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "scale": scale,
            "rescale": rescale,
            "nonfinite": nonfinite,
            **orthogonal_defaults(ns, nesterov, ns_dtype),
            **adamw_defaults(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay),
        }
        super().__init__(params, defaults, maximize=maximize)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_fraction(group, "momentum")
        if group["eps"] is not None:
            check_at_least_zero(group, "eps")
        check_choice(group, "scale", ("spectral", "rms", "dion", None))
        check_choice(group, "rescale", ("rms", None))

    def _eps(self, group: dict[str, Any]) -> float | None:
        return group["eps"]

    def _factor(self, group: dict[str, Any], o: Tensor, batch: Batch) -> Tensor | float:
        rows, cols = batch.shape
        lr = float(group["lr"])
        if group["rescale"] is None:
            return lr * scale_factor(group["scale"], rows, cols)
        norm = squared_norms(o.flatten(1), -1).sqrt_()[..., None]
        return torch.where(norm > 0, 0.2 * lr * (rows * cols) ** 0.5 / norm, 0.0)

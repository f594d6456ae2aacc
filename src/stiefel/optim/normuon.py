"""NorMuon: Muon with one second moment per neuron (Li et al., arXiv 2510.05491)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.coefficients import Coefficients
from stiefel.optim.base import Batch
from stiefel.optim.groups import dimension_order
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


def normuon_direction(
    update: Float[Tensor, "*batch m n"],
    second_moment: Float[Tensor, "*batch m 1"],
    beta2: float,
    eps: float,
) -> tuple[Float[Tensor, "*batch m n"], Float[Tensor, "*batch m 1"]]:
    """Divide every row of an orthogonalised update by its running root mean square.

    v ← β₂ v + (1 − β₂) · mean over columns of O∘O, then Ô = O / (√v + ε) (algorithm 1, before the
    size rule). Pure: neither argument is changed.

    Args:
        update: O, the orthogonalised momentum, shape ``(..., R, C)``; rows are output neurons.
        second_moment: v, shape ``(..., R, 1)``, zeros at the start.
        beta2: Decay of v, in [0, 1).
        eps: Added after the root. A row that has always been zero stays zero, also with ``eps=0``.

    Returns:
        Ô in the dtype of ``update`` and the new v.
    """
    mean_square = squared_norms(update, -1) / update.shape[-1]
    new = second_moment.lerp(mean_square.to(second_moment.dtype), 1 - beta2)
    return (update * _inverse(new, eps)).to(update.dtype), new


def _inverse(second_moment: Tensor, eps: float) -> Tensor:
    """1 / (√v + ε), 0 where that would be 1/0."""
    root = second_moment.sqrt() + eps
    return torch.where(root > 0, 1 / root, 0.0)


class NorMuon(OrthogonalOptimizer):
    """NorMuon for hidden matrices, AdamW for the rest, in one optimizer.

    Learning rate: RMS convention by default (every update has root mean square exactly 0.2·lr, so
    AdamW's learning rate and weight decay carry over). With ``rescale="preserve"`` and
    ``scale="spectral"`` it is Muon's.

    Per matrix (R, C), M and v starting at 0 (algorithm 1; ``nesterov`` as in the authors' code)::

        M ← β₁ M + (1 − β₁) G ;  U = M, or (1 − β₁) G + β₁ M with Nesterov
        O ← NS(U)
        v ← β₂ v + (1 − β₂) · mean over columns of O∘O         one number per output neuron
        Ô ← O / (√v + ε)
        W ← (1 − lr·wd) W − lr · 0.2 √(RC) / ‖Ô‖_F · Ô

    The exact polar factor of a square or wide matrix has rows of norm one already: there NorMuon
    only evens out the error of NS. It acts on tall matrices (up- and gate-projections), and with
    ``reduce="long"`` on wide ones too, column by column.

    v has no age per row: a neuron that was silent for long takes a large share of the update when
    it first becomes active. ``bias_correction=True`` divides v by 1 − β₂ᵏ, k being the steps
    since the row was first active.

    Args:
        params: Groups from :func:`split_parameters`, or 2-D parameters (all matrices).
        lr: Learning rate of matrix groups.
        betas: (β₁, β₂), each in [0, 1).
        weight_decay: Decoupled; 0.0 means none.
        eps: ε, added after the root.
        nesterov: Off in the paper, on in the authors' code.
        ns: As in :class:`Muon`.
        rescale: ``"rms"`` (the paper) or ``"preserve"``: ‖O‖_F times ``scale``.
        scale: ``"spectral"``, ``"rms"``, ``"dion"`` or ``None``; only with ``rescale="preserve"``.
        reduce: ``"rows"``, or ``"long"``: columns where R < C.
        bias_correction: See above.
        adamw_lr: Learning rate of elementwise groups, as are ``adamw_betas``, ``adamw_eps`` and
            ``adamw_weight_decay``.
        nonfinite: As in :class:`Muon`, as are ``ns_dtype`` and ``maximize``.

    State per parameter: ``momentum_buffer`` and ``second_moment`` (flat, float32 whatever the
    parameter's dtype).

    Raises:
        ValueError: a setting out of range; a 1-D parameter in a matrix group, by name.
    """

    _float32_state = ("second_moment", "row_age")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        weight_decay: float = 0.1,
        eps: float = 1e-8,
        nesterov: bool = False,
        *,
        ns: Coefficients = "fitted",
        rescale: str = "rms",
        scale: str | None = None,
        reduce: str = "rows",
        bias_correction: bool = False,
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
            "betas": betas,
            "weight_decay": weight_decay,
            "eps": eps,
            "rescale": rescale,
            "scale": scale,
            "reduce": reduce,
            "bias_correction": bias_correction,
            "nonfinite": nonfinite,
            **orthogonal_defaults(ns, nesterov, ns_dtype),
            **adamw_defaults(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay),
        }
        super().__init__(params, defaults, maximize=maximize)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, got {group['betas']}")
        check_fraction(group, "betas")
        check_at_least_zero(group, "eps")
        check_choice(group, "rescale", ("rms", "preserve"))
        check_choice(group, "scale", ("spectral", "rms", "dion", None))
        check_choice(group, "reduce", ("rows", "long"))
        if group["rescale"] == "rms" and group["scale"] is not None:
            raise ValueError(
                f"scale={group['scale']!r} has no effect with rescale='rms', which fixes the size "
                "of every update; use rescale='preserve' or scale=None"
            )

    def _momentum(self, group: dict[str, Any]) -> float:
        return group["betas"][0]

    def _extra_state(
        self, group: dict[str, Any], sizes: Sequence[tuple[int, int]], parameter: Tensor
    ) -> dict[str, Tensor]:
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        count = sum(_statistics(group, rows, cols) for rows, cols in sizes)
        keys = ("second_moment", "row_age") if group["bias_correction"] else ("second_moment",)
        return {key: torch.zeros(count, dtype=dtype, device=parameter.device) for key in keys}

    def _extra_views(
        self, group: dict[str, Any], sizes: Sequence[tuple[int, int]], parameter: Tensor
    ) -> list[dict[str, Tensor]]:
        state, order = self.state[parameter], dimension_order(parameter)
        counts = [_statistics(group, rows, cols) for rows, cols in sizes]
        keys = [key for key in self._float32_state if key in state]
        parts = [list(state[key].split(counts)) for key in keys]
        if group["view"] == "flatten" and order != tuple(range(parameter.ndim)):
            # Saved column by column as a contiguous kernel has them, used as they lie in memory.
            columns = [group["reduce"] == "long" and rows < cols for rows, cols in sizes]
            parts = [
                [
                    p.view(parameter.shape[1:]).permute([d - 1 for d in order[1:]]) if c else p
                    for p, c in zip(part, columns, strict=True)
                ]
                for part in parts
            ]
        return [dict(zip(keys, part, strict=True)) for part in zip(*parts, strict=True)]

    def _factor(self, group: dict[str, Any], o: Tensor, batch: Batch) -> Tensor | float:
        rows, cols = batch.shape
        dim = -2 if group["reduce"] == "long" and rows < cols else -1
        square = squared_norms(o, dim)  # (k, R, 1), or (k, 1, C)
        moment = _read(batch, "second_moment").view(square.shape)
        moment.lerp_((square / o.shape[dim]).to(moment.dtype), 1 - group["betas"][1])
        corrected = moment
        if group["bias_correction"]:
            age = _read(batch, "row_age").view(square.shape)
            age += (moment > 0).to(age.dtype)
            corrected = moment / (1 - group["betas"][1] ** age.clamp_min(1))
            _write(batch, "row_age", age)
        _write(batch, "second_moment", moment)

        inverse = _inverse(corrected, group["eps"])
        # ‖Ô‖² = Σ_r ‖O_r‖² / (√v_r + ε)²: no second pass over O.
        norm = (square * inverse.square()).sum((-2, -1), keepdim=True).sqrt_()
        if group["rescale"] == "rms":
            size: Tensor | float = 0.2 * (rows * cols) ** 0.5
        else:
            size = square.sum((-2, -1), keepdim=True).sqrt_()
            size = size * scale_factor(group["scale"], rows, cols)
        return torch.where(norm > 0, float(group["lr"]) * size / norm, 0.0) * inverse


def _statistics(group: dict[str, Any], rows: int, cols: int) -> int:
    return max(rows, cols) if group["reduce"] == "long" else rows


def _read(batch: Batch, key: str) -> Tensor:
    return torch.stack([state[key].flatten() for state in batch.states])


def _write(batch: Batch, key: str, values: Tensor) -> None:
    for state, value in zip(batch.states, values.flatten(1).unbind(0), strict=True):
        state[key].copy_(value.view(state[key].shape))

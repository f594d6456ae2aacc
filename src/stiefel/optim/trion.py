"""Trion: Muon in the columns of a DCT that carry the momentum (arXiv 2505.17967)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.coefficients import Coefficients, Table, as_table
from stiefel.linalg.schulz import chunk_size, normalize_into, orthogonalize, orthogonalize_
from stiefel.optim.base import Batch, apply_update
from stiefel.optim.columns import ColumnSelector
from stiefel.optim.orthogonal import OrthogonalOptimizer, _precision, orthogonal_defaults
from stiefel.optim.settings import (
    adamw_defaults,
    check_at_least_zero,
    check_choice,
    check_fraction,
    scale_factor,
)
from stiefel.optim.subspace import (
    LARGEST_STACK,
    check_selection,
    column_layout,
    expanded,
    low_shape,
    natural_order,
    selection,
    selection_defaults,
    stack_size,
    stacked,
    transform_flops,
    transformed,
    uncompiled,
    warn_of_clamping,
)

# The authors' names for sizes, in those of scale_factor.
_SCALES = {"kj": "spectral", "kimi": "rms", "dion": "dion", "none": None}


def trion_direction(
    gradient: Float[Tensor, "*batch m n"],
    momentum: Float[Tensor, "*batch m n"],
    selector: ColumnSelector,
    decay: float,
    *,
    dim: int = -1,
    ns: Coefficients = "fitted",
    steps: int | None = None,
) -> tuple[Float[Tensor, "*batch m n"], Float[Tensor, "*batch m n"]]:
    """Trion's update before its size rule, and the new momentum, equation by equation.

    B = M + G; (b, I) = selected columns of B; M ← B − (1 − μ) b Pᵀ; O = NS(b) Pᵀ. Pure: neither
    argument is changed. :class:`Trion` computes the same with fewer transforms.

    Args:
        gradient: G, shape ``(..., R, C)``.
        momentum: M, same shape, zeros at the start.
        selector: For n = C (``dim=-1``) or n = R (``dim=-2``).
        decay: μ in [0, 1). Momentum decays inside the selected columns alone: what lies outside
            waits there until it is selected.
        dim: −1 projects from the right, −2 from the left.
        ns: Coefficients of NS, as is ``steps``, their number.

    Returns:
        ``(O, M)``.
    """
    buffer = momentum + gradient
    low, idx = selector.select(buffer, dim=dim)
    new = buffer - (1 - decay) * selector.expand(low, idx, dim=dim)
    return selector.expand(orthogonalize(low, _table(ns, steps)), idx, dim=dim), new


class Trion(OrthogonalOptimizer):
    """Trion for hidden matrices, AdamW for the rest, in one optimizer.

    Learning rate: spectral convention by default (an update has r singular values near
    lr·sqrt(max(1, R/C)), the others are 0; 0.02 is usual). With ``scale="kimi"`` AdamW's learning
    rate and weight decay carry over.

    Per matrix (R, C) with R ≥ C, Q the (C, C) DCT basis, M starting at 0; wide matrices are treated
    as their transposes::

        B ← M + G ;  S = B Q
        I = the r columns of S of largest norm ;  b = S[:, I] ;  P = Q[:, I]
        M ← B − (1 − μ) b Pᵀ           momentum decays inside the subspace: error feedback
        W ← (1 − lr·wd) W − lr · scale(R, C) · NS(b) Pᵀ

    NS works on R × r instead of R × C. M is kept as M Q: selected columns are then scaled in place,
    and only G is transformed. Neither Nesterov nor bias correction.

    Args:
        params: Groups from :func:`split_parameters`, or 2-D parameters (all matrices).
        lr: Learning rate of matrix groups.
        momentum: μ in [0, 1).
        rank: r, an integer, or a fraction of the smaller side in (0, 1). More than the side is the
            side, with a warning. Fixed once a parameter has state.
        weight_decay: Decoupled; 0.0 means none.
        scale: ``"kj"`` sqrt(max(1, R/C)) (also ``"spectral"``), ``"kimi"`` 0.2·sqrt(max(R, C))
            (also ``"rms"``), ``"dion"`` sqrt(R/C), ``"none"`` 1 (also None).
        ns_steps: Steps of NS. Tables with a row per step take at most as many as they have.
        norm: Columns are compared by 1-norm or by 2-norm.
        foreach: Work on matrices of one shape together; False takes them one by one.
        ns: As in :class:`Muon`. The paper's is ``"classic"``.
        eps: As in :class:`Muon`.
        side: ``"auto"`` transforms along the smaller side, ``"right"`` rows, ``"left"`` columns.
        basis: ``"dct2"``, ``"dct3"``, or a function from n to an orthogonal matrix, for study.
        method: ``"auto"``, ``"fft"`` or ``"matmul"``; "auto" goes by sizes.
        adamw_lr: Learning rate of elementwise groups, as are ``adamw_betas``, ``adamw_eps`` and
            ``adamw_weight_decay``.
        nonfinite: As in :class:`Muon`, as are ``ns_dtype`` and ``maximize``.

    State per parameter: ``momentum_dct``, of the parameter's shape and dtype.

    Raises:
        ValueError: a setting out of range; a 1-D parameter in a matrix group, by name.
    """

    _first_state = "momentum_dct"
    _sends = "gradient"  # a shard of M Q is no function of the same shard of M

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        rank: int | float = 0.25,
        weight_decay: float = 0.0,
        scale: str | None = "kj",
        ns_steps: int = 5,
        norm: int = 1,
        foreach: bool = True,
        *,
        ns: Coefficients = "fitted",
        eps: float | None = None,
        side: str = "auto",
        basis: str | Callable[[int], Tensor] = "dct2",
        method: str = "auto",
        adamw_lr: float | Tensor = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-10,
        adamw_weight_decay: float = 0.0,
        nonfinite: str = "raise",
        ns_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        polynomial = orthogonal_defaults(ns, False, ns_dtype)
        del polynomial["nesterov"]
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "scale": scale,
            "ns_steps": ns_steps,
            "foreach": bool(foreach),
            "eps": eps,
            "nonfinite": nonfinite,
            **selection_defaults(rank, norm, side, basis, method),
            **polynomial,
            **adamw_defaults(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay),
        }
        super().__init__(params, defaults, maximize=maximize)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_fraction(group, "momentum")
        check_choice(group, "scale", (*_SCALES, "spectral", "rms", None))
        check_selection(group)
        if isinstance(group["ns_steps"], bool) or not isinstance(group["ns_steps"], int):
            raise TypeError(f"ns_steps must be an integer, got {group['ns_steps']!r}")
        if group["ns_steps"] < 1:
            raise ValueError(f"ns_steps must be at least 1, got {group['ns_steps']}")
        if group["eps"] is not None:
            check_at_least_zero(group, "eps")

    def _check_matrices(self, group: dict[str, Any]) -> None:
        super()._check_matrices(group)
        warn_of_clamping(group)

    def _rule(self, group: dict[str, Any], rows: int, cols: int) -> Table:
        return _table(group["ns"], group["ns_steps"])

    def _flops(self, group: dict[str, Any], rows: int, cols: int) -> float:
        selector, dim = selection(group, rows, cols)
        low = super()._flops(group, *low_shape(selector, dim, rows, cols))
        return low + transform_flops(selector.n, rows, cols)

    def _eps(self, group: dict[str, Any]) -> float | None:
        return group["eps"]

    def _variant(self, group: dict[str, Any], parameter: Tensor, index: int) -> Hashable:
        return column_layout(group, parameter)

    def _update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        uncompiled(super()._update_group)(group, params)

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        with natural_order(batch, batch.variant) as natural:  # pyrefly: ignore
            self._update_natural(group, natural)

    def _update_natural(self, group: dict[str, Any], batch: Batch) -> None:
        rows, cols = batch.shape
        device = batch.params[0].device
        selector, dim = selection(group, rows, cols)
        thin = low_shape(selector, dim, rows, cols)
        rule = self._rule(group, rows, cols)
        decay = 1 - float(group["lr"]) * group["weight_decay"]
        scale = _SCALES.get(group["scale"], group["scale"])
        factor = float(group["lr"]) * scale_factor(scale, rows, cols)
        most = min(len(batch), LARGEST_STACK) if device.type == "cpu" else len(batch)
        size = chunk_size(most, *thin, device) if group["foreach"] else 1
        piece = stack_size(size, rows, cols, device)
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            pieces = [slice(i, i + piece) for i in range(0, len(part), piece)]
            chosen = [self._select(group, part[p], selector, dim) for p in pieces]
            o = self._orthogonalize(group, [low for low, _ in chosen], rule)
            for p, (_, idx) in zip(pieces, chosen, strict=True):
                direction = expanded(self._space, selector, o[p], idx, dim)
                apply_update(part.params[p], direction, factor, decay)

    def _select(
        self, group: dict[str, Any], part: Batch, selector: ColumnSelector, dim: int
    ) -> tuple[Tensor, Tensor]:
        """Advance the momenta M Q; returns b (k, R, r), or (k, r, C), and I."""
        s = transformed(self._space, selector, part.grads, dim)
        momenta = part.momenta
        inside = len(momenta) == 1 and momenta[0].dtype == s.dtype
        buffer = momenta[0][None].add_(s) if inside else s.add_(stacked(momenta))
        idx = selector.choose(buffer, dim)
        low = selector.take(buffer, idx, dim)
        # M Q = B Q − (1 − μ) b in the columns I: the expansion of the paper is a scaling here.
        buffer.mul_(selector.weights(idx, group["momentum"], buffer.dtype, dim))
        if not inside:
            torch._foreach_copy_(momenta, list(buffer.unbind(0)))
        return low, idx

    def _orthogonalize(self, group: dict[str, Any], lows: list[Tensor], rule: Table) -> Tensor:
        """NS of all matrices together."""
        first = lows[0]
        dtype = group["ns_dtype"] or _precision(first)
        count = sum(len(low) for low in lows)
        x = self._space.take("o", (count, *first.shape[1:]), dtype, first.device)
        place = 0
        for low in lows:
            normalize_into(x[place : place + len(low)], low, rule, self._eps(group))
            place += len(low)
        return orthogonalize_(x, rule, self._space)


def _table(ns: Coefficients, steps: int | None) -> Table:
    """The polynomial; tables that have a row per step take at most as many as they have."""
    if steps is None or ns in ("classic", "polar_express"):
        return as_table(ns, steps)
    own = as_table(ns)
    return as_table(ns, min(steps, own.steps)) if isinstance(ns, str) else own

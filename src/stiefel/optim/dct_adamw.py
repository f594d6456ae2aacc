"""DCT-AdamW: Adam's moments in the columns of a DCT that carry the gradient (arXiv 2505.17967)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import compute_dtype
from stiefel.optim.base import Batch, MatrixOptimizer, apply_update
from stiefel.optim.columns import ColumnSelector
from stiefel.optim.quantized import code_bytes, dequantize, quantize
from stiefel.optim.settings import adamw_defaults, check_adamw, check_choice
from stiefel.optim.subspace import (
    check_selection,
    column_layout,
    expanded,
    low_shape,
    natural_order,
    projects_right,
    selection,
    selection_defaults,
    stack_size,
    stacked,
    transform_flops,
    transformed,
    uncompiled,
    warn_of_clamping,
)


def low_rank_adam(
    mean: Float[Tensor, "*batch m r"],
    square: Float[Tensor, "*batch m r"],
    gradient: Float[Tensor, "*batch m r"],
    betas: tuple[float, float],
    eps: float,
    age: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam in the chosen columns: ``(u, m, v)`` from the moments before and the new coordinates.

    m ← β₁ m + (1 − β₁) a;  v ← β₂ v + (1 − β₂) a²;  u = (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε).
    ``age`` is t, a number or one per column. Pure; all of one dtype.
    """
    beta1, beta2 = betas
    m = torch.lerp(mean, gradient, 1 - beta1)
    v = (square * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    u = m / v.sqrt().mul_((1 - beta2**age) ** -0.5).add_(eps)
    return u.mul_((1 - beta1**age) ** -1), m, v


class DCTAdamW(MatrixOptimizer):
    """AdamW in a moving low-rank subspace for hidden matrices, AdamW for the rest.

    Learning rate: AdamW's, or somewhat above it. State is 2·max(R, C)·r numbers and r integers per
    matrix where AdamW keeps 2·R·C numbers, and there is no SVD.

    Per matrix (R, C) with R ≥ C, Q the (C, C) DCT basis, E, m, v starting at 0, step t from 1; wide
    matrices are treated as their transposes::

        A = G + E                                       E only with error feedback
        if t = 1 or t divides by T:  S = A Q ;  I = the r columns of largest norm, ascending
        a = A Q[:, I] ;  E = A − a Q[:, I]ᵀ
        when I has changed:  m, v move with their columns; those of new columns start at 0
        m ← β₁ m + (1 − β₁) a ;  v ← β₂ v + (1 − β₂) a²
        W ← (1 − lr·wd) W − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε) · Q[:, I]ᵀ

    The paper rotates m and v by Q[:, I_prev]ᵀ Q[:, I]; as columns are orthonormal that is moving
    columns, exactly. E is kept as E Q, where the chosen columns are zero and nothing is transformed
    twice.

    A new column has m = v = 0 while the bias correction of a global t is spent: its first update is
    (1 − β₁) / √(1 − β₂) of what Adam's first is, 3.16 at the default betas and 0.45 at
    (0.9, 0.95). ``correct_new_columns=True`` counts t per column.

    Args:
        params: Groups from :func:`split_parameters`, or 2-D parameters (all matrices).
        lr: Learning rate of matrix groups.
        rank: r, an integer, or a fraction of the smaller side in (0, 1). More than the side is the
            side, with a warning. Fixed once a parameter has state.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε, added after the root.
        weight_decay: Decoupled; 0.0 means none.
        update_gap: T, steps between two choices of columns.
        rotate: Whether moments move with their columns. False leaves them where they are in the
            list, as the authors' code does by default.
        error_feedback: None; ``"full"`` (a number per weight); 8 or 4 (bits per weight, two float32
            per row, rounded to the nearest level).
        norm: Columns are compared by 1-norm or by 2-norm.
        correct_new_columns: See above; r integers more. Needs ``rotate``.
        side: ``"auto"`` transforms along the smaller side, ``"right"`` rows, ``"left"`` columns.
        basis: ``"dct2"``, ``"dct3"``, or a function from n to an orthogonal matrix, for study.
        method: ``"auto"``, ``"fft"`` or ``"matmul"``; "auto" goes by sizes.
        adamw_lr: Learning rate of elementwise groups, as are ``adamw_betas``, ``adamw_eps`` and
            ``adamw_weight_decay``.
        nonfinite: As in :class:`Muon`, as is ``maximize``.

    State per parameter: ``low_avg`` (in its dtype) and ``low_avg_sq`` (float32 for low precision),
    ``columns`` and as asked for ``column_steps``, ``error`` or ``error_codes`` and ``error_range``,
    all flat; ``step``.

    Raises:
        ValueError: a setting out of range; a 1-D parameter in a matrix group, by name.
    """

    _first_state = "columns"
    _has_momentum = False
    _sends = "gradient"
    _float32_state = ("low_avg_sq", "error_range")
    _exact_state = ("columns", "column_steps", "error_codes")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        rank: int | float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_gap: int = 1,
        rotate: bool = True,
        error_feedback: str | int | None = None,
        *,
        norm: int = 1,
        correct_new_columns: bool = False,
        side: str = "auto",
        basis: str | Callable[[int], Tensor] = "dct2",
        method: str = "auto",
        adamw_lr: float | Tensor = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        nonfinite: str = "raise",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "update_gap": update_gap,
            "rotate": bool(rotate),
            "error_feedback": error_feedback,
            "correct_new_columns": bool(correct_new_columns),
            "nonfinite": nonfinite,
            **selection_defaults(rank, norm, side, basis, method),
            **adamw_defaults(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay),
        }
        super().__init__(params, defaults, maximize=maximize)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_adamw(group)
        check_selection(group)
        gap = group["update_gap"]
        if isinstance(gap, bool) or not isinstance(gap, int):
            raise TypeError(f"update_gap must be an integer, got {gap!r}")
        if gap < 1:
            raise ValueError(f"update_gap must be at least 1, got {gap}")
        check_choice(group, "error_feedback", (None, "full", 8, 4))
        if group["correct_new_columns"] and not group["rotate"]:
            raise ValueError(
                "correct_new_columns=True needs rotate=True: without it no column is new"
            )

    def _check_matrices(self, group: dict[str, Any]) -> None:
        super()._check_matrices(group)
        warn_of_clamping(group)

    # State: flat tensors, in them one piece per matrix

    def _layout(self, group: dict[str, Any], rows: int, cols: int) -> dict[str, tuple[int, ...]]:
        """Name → shape of what a matrix keeps."""
        selector, dim = selection(group, rows, cols)
        low = low_shape(selector, dim, rows, cols)
        layout: dict[str, tuple[int, ...]] = {"low_avg": low, "low_avg_sq": low}
        layout["columns"] = (selector.rank,)
        if group["correct_new_columns"]:
            layout["column_steps"] = (selector.rank,)
        if group["error_feedback"] == "full":
            layout["error"] = (rows, cols)
        elif group["error_feedback"] is not None:
            layout["error_codes"] = (code_bytes(rows, cols, group["error_feedback"]),)
            buckets = (rows, 1) if projects_right(group, rows, cols) else (1, cols)
            layout["error_range"] = (2, *buckets)
        return layout

    def _extra_state(
        self, group: dict[str, Any], sizes: Sequence[tuple[int, int]], parameter: Tensor
    ) -> dict[str, Tensor]:
        dtypes = {
            "low_avg": parameter.dtype,
            "low_avg_sq": compute_dtype(parameter.dtype),
            "columns": torch.int64,
            "column_steps": torch.int64,
            "error": parameter.dtype,
            "error_codes": torch.uint8,
            "error_range": compute_dtype(parameter.dtype),
        }
        layouts = [self._layout(group, rows, cols) for rows, cols in sizes]
        state = {
            key: torch.zeros(
                sum(torch.Size(layout[key]).numel() for layout in layouts),
                dtype=dtypes[key],
                device=parameter.device,
            )
            for key in layouts[0]
        }
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        return state

    def _extra_views(
        self, group: dict[str, Any], sizes: Sequence[tuple[int, int]], parameter: Tensor
    ) -> list[dict[str, Tensor]]:
        state = self.state[parameter]
        layouts = [self._layout(group, rows, cols) for rows, cols in sizes]
        views: list[dict[str, Tensor]] = [{} for _ in sizes]
        for key in layouts[0]:
            shapes = [layout[key] for layout in layouts]
            parts = state[key].split([torch.Size(shape).numel() for shape in shapes])
            for view, part, shape in zip(views, parts, shapes, strict=True):
                view[key] = part.view(shape)
        return views

    def _flops(self, group: dict[str, Any], rows: int, cols: int) -> float:
        n = selection(group, rows, cols)[0].n
        return transform_flops(n, rows, cols) + 20.0 * rows * cols

    def _variant(self, group: dict[str, Any], parameter: Tensor, index: int) -> Hashable:
        return column_layout(group, parameter)

    # The step

    def _update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        uncompiled(self._update_ages)(group, params)

    def _update_ages(self, group: dict[str, Any], params: list[Tensor]) -> None:
        # Parameters of one age choose columns together.
        fresh = torch.zeros((), dtype=torch.float32, device="cpu")
        ages = torch.stack([self.state[p].get("step", fresh) for p in params]).tolist()
        for age in sorted(set(ages)):
            members = [p for p, a in zip(params, ages, strict=True) if a == age]
            for batch in self._batches(group, members):
                self._update_aged(group, batch, int(age) + 1)
        torch._foreach_add_([self.state[p]["step"] for p in params], 1)

    def _update_aged(self, group: dict[str, Any], batch: Batch, step: int) -> None:
        rows, cols = batch.shape
        selector, dim = selection(group, rows, cols)
        size = stack_size(len(batch), rows, cols, batch.params[0].device)
        with natural_order(batch, batch.variant) as natural:  # pyrefly: ignore
            for start in range(0, len(batch), size):
                self._advance(group, natural[start : start + size], step, selector, dim)

    def _advance(
        self, group: dict[str, Any], part: Batch, step: int, selector: ColumnSelector, dim: int
    ) -> None:
        """One step of a few matrices of one age."""
        states = part.states
        old = _stack(states, "columns")
        refresh = step == 1 or step % group["update_gap"] == 0
        low, idx = self._project(group, part, old if not refresh else None, selector, dim)
        moved = refresh and step > 1 and group["rotate"] and not torch.equal(old, idx)
        mean, square = (stacked([s[k] for s in states]) for k in ("low_avg", "low_avg_sq"))
        if moved:
            mean = selector.carry(mean, old, idx, dim=dim)
            square = selector.carry(square, old, idx, dim=dim)
        age: float | Tensor = float(step)
        if group["correct_new_columns"]:
            counts = _stack(states, "column_steps")
            counts = selector.carry(counts[:, None], old, idx)[:, 0] if moved else counts
            counts = counts + 1
            _keep(states, "column_steps", counts)
            age = counts.to(low.dtype).unsqueeze(-2 if dim == -1 else -1)
        u, mean, square = low_rank_adam(mean, square, low, group["betas"], group["eps"], age)
        _keep(states, "low_avg", mean)
        _keep(states, "low_avg_sq", square)
        if refresh:
            _keep(states, "columns", idx)
        lr = float(group["lr"])
        direction = expanded(self._space, selector, u, idx, dim)
        apply_update(part.params, direction, lr, 1 - lr * group["weight_decay"])

    def _project(
        self,
        group: dict[str, Any],
        part: Batch,
        idx: Tensor | None,
        selector: ColumnSelector,
        dim: int,
    ) -> tuple[Tensor, Tensor]:
        """a and I, choosing I if it is not given; brings the error up to date."""
        feedback = group["error_feedback"]
        if feedback is None and idx is not None:
            return selector.project(stacked(part.grads), idx, dim), idx
        s = transformed(self._space, selector, part.grads, dim)
        if feedback == "full":
            s.add_(stacked([state["error"] for state in part.states]))
        elif feedback is not None:
            s.add_(_error(part.states, feedback, part.shape))
        idx = selector.choose(s, dim) if idx is None else idx
        low = selector.take(s, idx, dim)
        if feedback is None:
            return low, idx
        # E Q = A Q with nothing in the chosen columns.
        s.mul_(selector.weights(idx, 0.0, s.dtype, dim))
        if feedback == "full":
            _keep(part.states, "error", s)
        else:
            codes, least, unit = quantize(s, feedback, dim)
            _keep(part.states, "error_codes", codes)
            _keep(part.states, "error_range", torch.stack([least, unit], dim=1))
        return low, idx


def _stack(states: Sequence[dict[str, Tensor]], key: str) -> Tensor:
    if len(states) == 1:
        return states[0][key][None]
    return torch.stack([state[key] for state in states])


def _keep(states: Sequence[dict[str, Tensor]], key: str, values: Tensor) -> None:
    torch._foreach_copy_([state[key] for state in states], list(values.unbind(0)))


def _error(states: Sequence[dict[str, Tensor]], bits: int, shape: tuple[int, int]) -> Tensor:
    ends = _stack(states, "error_range")
    return dequantize(_stack(states, "error_codes"), ends[:, 0], ends[:, 1], bits, shape)

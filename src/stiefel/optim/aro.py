"""ARO: momentum normalised in a frame that follows the normaliser (Gong et al., arXiv 2602.09006).

Every matrix here is oriented: rows are the rotated side, m ≤ n.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stiefel.linalg.schulz import chunk_size, product_dtype
from stiefel.optim.aro_layout import Entry, Orient, Share, Slot, layout, share_indices
from stiefel.optim.aro_update import (
    POLICIES,
    aro_direction,
    aro_rotation,
    base_map,
    mean_size,
    moments,
    oriented,
    signs,
)
from stiefel.optim.base import Batch, MatrixOptimizer, _sizes, apply_update
from stiefel.optim.orthogonal import squared_norms
from stiefel.optim.settings import adamw_defaults, check_at_least_zero, check_choice, check_fraction
from stiefel.optim.sinkhorn import MODES, BaseMap
from stiefel.optim.subspace import Layout, column_layout, natural_order

BASES = ("sinkhorn", "row", "sign", "adam")

# Below this length bfloat16 products are no faster than float32's.
_BFLOAT16_FROM = 64


class ARO(MatrixOptimizer):
    """ARO for hidden matrices, AdamW for the rest, in one optimizer.

    Learning rate and weight decay: AdamW's (every update has root mean square 0.2·lr).

    Per matrix, oriented to (m, n) with the residual stream's side as rows, M = 0 and R = I at the
    start::

        M ← β M + (1 − β) G
        A = M f(RᵀM)ᵀ                      with the old R
        R ← Q of QR(A)
        U = R f(RᵀM)                       with the new R
        W ← (1 − lr·wd) W − lr · rms · √(mn) / ‖U‖_F · U

    Args:
        params: Groups from :func:`aro_param_groups` or :func:`split_parameters`, or 2-D parameters.
        lr: Learning rate of matrix groups.
        beta: β in [0, 1).
        base: f: ``"sinkhorn"``, ``"row"``, ``"sign"``, ``"adam"`` (with a second moment in the
            rotated frame, decaying by ``beta2``), or a function of (k, m, n) stacks that keeps
            shapes and commutes with sign flips of rows. A function is not part of ``state_dict``.
        sinkhorn_iters: Rounds of :func:`sinkhorn_normalize`.
        rotation: ``"aro"``; ``"eigen"``, ``"identity"`` and ``"polar"`` are for comparison.
        qr: ``"qr"`` (Householder), ``"scqr"`` (:func:`shifted_cholesky_qr`, with Householder for
            those matrices where it fails), ``"auto"``: the first on CPUs, else the second.
        orient: Which side is rotated: ``"auto"`` (the shorter one; of square weights the input
            side if the name is one of q, k, v, up, gate …, else the output side), ``"rows"``,
            ``"cols"``, or a function of (name, parameter) that is true for rows.
        rms: Root mean square of an update at lr = 1; None leaves U as it is.
        weight_decay: Decoupled; 0.0 means none.
        share: One rotation for several matrices with a common side: ``"layer"`` (all of one layer,
            by names), or lists of parameters of one group. f sees them side by side for A, and each
            by itself for U. None: a rotation for each.
        foreach: Work on stacks of equal matrices; False takes one at a time.
        sinkhorn_mode: ``"alternating"`` or ``"simultaneous"`` (the paper).
        beta2: Decay of the second moment of ``base="adam"``.
        rotation_every: Steps between two changes of R.
        product_dtype: Precision of the products with M. Default: bfloat16 where the device
            multiplies it natively and f is smooth, else float32. float64 parameters: float64.
            ``"sign"``: A and the RᵀM of the update in float32, the old RᵀM and U as for a smooth f.
            R, QR and norms are never below float32.
        adamw_lr: Learning rate of elementwise groups, as are ``adamw_betas``, ``adamw_eps`` and
            ``adamw_weight_decay``.
        nonfinite: As in :class:`Muon`, as is ``maximize``.

    State per parameter: ``momentum_buffer``, ``rotation`` (float32 whatever the parameter's dtype;
    of a shared one only the first parameter has it), ``step``, and for ``base="adam"``
    ``root_second_moment`` (float32).

    Raises:
        ValueError: a setting out of range; a 1-D parameter in a matrix group, by name; an explicit
            orientation along the longer side; a shared rotation without a common side.
    """

    _float32_state = ("rotation", "root_second_moment")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        beta: float = 0.95,
        base: str | BaseMap = "sinkhorn",
        sinkhorn_iters: int = 5,
        rotation: str = "aro",
        qr: str = "auto",
        orient: Orient = "auto",
        rms: float | None = 0.2,
        weight_decay: float = 0.0,
        share: Share = None,
        foreach: bool = True,
        *,
        sinkhorn_mode: str = "alternating",
        beta2: float = 0.95,
        rotation_every: int = 1,
        product_dtype: torch.dtype | None = None,
        adamw_lr: float | Tensor = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        nonfinite: str = "raise",
        maximize: bool = False,
    ) -> None:
        self._layouts: dict[int, tuple[Slot, ...]] = {}
        defaults = {
            "lr": lr,
            "beta": beta,
            "base": base,
            "sinkhorn_iters": sinkhorn_iters,
            "rotation": rotation,
            "qr": qr,
            "orient": orient,
            "rms": rms,
            "weight_decay": weight_decay,
            "share": share,
            "foreach": bool(foreach),
            "sinkhorn_mode": sinkhorn_mode,
            "beta2": beta2,
            "rotation_every": rotation_every,
            "product_dtype": product_dtype,
            "nonfinite": nonfinite,
            **adamw_defaults(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay),
        }
        super().__init__(params, defaults, maximize=maximize)
        if share is not None and not isinstance(share, str):
            self.defaults["share"] = None  # parameters; every group has its indices by now

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; which side is rotated is worked out anew."""
        super().__setstate__(state)
        self._layouts = {}

    def state_dict(self) -> dict[str, Any]:
        """As :class:`torch.optim.Optimizer`, without functions: they come from the constructor."""
        state = super().state_dict()
        state["param_groups"] = [
            {k: v for k, v in g.items() if not callable(v)} for g in state["param_groups"]
        ]
        return state

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_fraction(group, "beta", "beta2")
        for key, choices in (("base", BASES), ("orient", ("auto", "rows", "cols"))):
            if not callable(group[key]):
                check_choice(group, key, choices)
        check_choice(group, "rotation", POLICIES)
        check_choice(group, "qr", ("auto", "qr", "scqr"))
        check_choice(group, "sinkhorn_mode", MODES)
        for key in ("sinkhorn_iters", "rotation_every"):
            if not isinstance(group[key], int) or group[key] < 1:
                raise ValueError(f"{key} must be a whole number ≥ 1, got {group[key]!r}")
        if group["rms"] is not None:
            check_at_least_zero(group, "rms")
        allowed = (None, torch.bfloat16, torch.float32, torch.float64)
        check_choice(group, "product_dtype", allowed)

    def _check_matrices(self, group: dict[str, Any]) -> None:
        super()._check_matrices(group)
        group["share"] = share_indices(group["params"], group["share"])
        self._lay_out(group)

    def _lay_out(self, group: dict[str, Any]) -> None:
        names = group.get("param_names") or [None] * len(group["params"])
        entries = [
            Entry(name, p, tuple(_sizes(group, p)) if p.numel() else ())
            for name, p in zip(names, group["params"], strict=True)
        ]
        slots = layout(entries, group["orient"], group["share"])
        self._layouts.update(zip(map(id, group["params"]), slots, strict=True))

    def _slots(self, group: dict[str, Any], parameter: Tensor) -> tuple[Slot, ...]:
        if id(parameter) not in self._layouts:
            self._lay_out(group)
        return self._layouts[id(parameter)]

    # What ranks that hold a parameter together must know

    def _flops(self, group: dict[str, Any], rows: int, cols: int) -> float:
        m, n = min(rows, cols), max(rows, cols)
        maps = 8.0 * group["sinkhorn_iters"] * m * n if group["base"] == "sinkhorn" else 6.0 * m * n
        if group["rotation"] == "identity":
            return maps
        return 2 * maps + 8.0 * m * m * n + 4.0 * m**3  # four products, QR

    def _team(self, group: dict[str, Any], parameter: Tensor, index: int) -> Hashable:
        return self._slots(group, parameter)[index].team

    def _stand_in(
        self,
        worker: MatrixOptimizer,
        group: dict[str, Any],
        matrices: Sequence[tuple[Tensor, int, Tensor]],
    ) -> None:
        assert isinstance(worker, ARO)  # noqa: S101 - only for the type checker
        worker._layouts = {id(t): (self._slots(group, p)[i],) for p, i, t in matrices}

    # State

    def _momentum(self, group: dict[str, Any]) -> float:
        return group["beta"]

    def _extra_state(
        self, group: dict[str, Any], sizes: Sequence[tuple[int, int]], parameter: Tensor
    ) -> dict[str, Tensor]:
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        state = {"step": torch.zeros((), dtype=torch.float32)}
        own = [slot.m for slot in self._slots(group, parameter) if slot.owns]
        if own and group["rotation"] != "identity":
            eyes = [torch.eye(m, dtype=wide, device=parameter.device) for m in own]
            single = len(own) == 1
            state["rotation"] = eyes[0] if single else torch.cat([e.flatten() for e in eyes])
        if group["base"] == "adam":
            count = sum(rows * cols for rows, cols in sizes)
            state["root_second_moment"] = torch.zeros(count, dtype=wide, device=parameter.device)
        return state

    def _extra_views(
        self, group: dict[str, Any], sizes: Sequence[tuple[int, int]], parameter: Tensor
    ) -> list[dict[str, Tensor]]:
        state, slots = self.state[parameter], self._slots(group, parameter)
        views: list[dict[str, Tensor]] = [{} for _ in sizes]
        if "root_second_moment" in state:
            parts = state["root_second_moment"].split([rows * cols for rows, cols in sizes])
            for view, part, size in zip(views, parts, sizes, strict=True):
                view["root_second_moment"] = part.view(size)
        if "rotation" in state:
            own = [(v, slot.m) for v, slot in zip(views, slots, strict=True) if slot.owns]
            parts = state["rotation"].flatten().split([m * m for _, m in own])
            for (view, m), part in zip(own, parts, strict=True):
                view["rotation"] = part.view(m, m)
        return views

    def _variant(self, group: dict[str, Any], parameter: Tensor, index: int) -> Hashable:
        """(whether columns are rotated, set that shares R, whether R changes now, memory layout).

        QR depends on the order of what is rotated, and the second moment is saved in one order.
        """
        slot, every = self._slots(group, parameter)[index], group["rotation_every"]
        due = every == 1 or int(self.state[parameter]["step"]) % every == 0
        return slot.columns, slot.team, due, column_layout(group, parameter)

    # The step

    def _update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        batches = self._batches(group, params)
        torch._foreach_add_([self.state[p]["step"] for p in params], 1)
        teams: dict[int, list[Batch]] = {}
        for batch in batches:
            _, team, _, order = _variant(batch)
            if team is None:
                with natural_order(batch, order) as natural:
                    self._update(group, natural)
            else:
                teams.setdefault(team, []).append(batch)
        for team, members in teams.items():
            with ExitStack() as orders:
                natural = [orders.enter_context(natural_order(b, _variant(b)[3])) for b in members]
                self._update_team(group, team, natural)

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        columns, _, due, _ = _variant(batch)
        for part in self._parts(group, batch):
            part.advance(group["beta"])
            x, unit = self._unit(group, part)
            if group["rotation"] == "identity":
                self._apply(group, part, x, unit, None)
                continue
            r = torch.stack([state["rotation"] for state in part.states])
            if due:
                ahead = base_map(group, moments(part.states, columns), unit)
                m = oriented(x, columns)
                look = self._precision(group, m.shape[-2], x, ahead=True)
                r = aro_rotation(m, r, ahead, look=look, **self._policy(group, x))
                for state, new in zip(part.states, r.unbind(0), strict=True):
                    state["rotation"].copy_(new)
            self._apply(group, part, x, unit, r)

    def _update_team(self, group: dict[str, Any], team: int, batches: list[Batch]) -> None:
        """A from all matrices side by side, U for each by itself (the paper's section 6)."""
        for batch in batches:
            batch.advance(group["beta"])
        r = None
        if group["rotation"] != "identity":
            r = self._shared(group, team)
            if any(due for _, _, due, _ in map(_variant, batches)):
                self._turn(group, r, batches)
        for batch in batches:
            for part in self._parts(group, batch):
                x, unit = self._unit(group, part)
                self._apply(
                    group, part, x, unit, None if r is None else r.expand(len(part), *r.shape)
                )

    def _turn(self, group: dict[str, Any], r: Tensor, batches: list[Batch]) -> None:
        """The new shared rotation, into ``r``."""

        def beside(key: str | None) -> Tensor:  # (1, m, all columns), in memory transposed
            stacks = []
            for batch in batches:
                columns = _variant(batch)[0]
                own = batch.momenta if key is None else [state[key] for state in batch.states]
                stacks += [oriented(t, not columns) for t in own]
            return torch.cat(stacks)[None].mT

        x = beside(None)
        unit = mean_size(x.mT)
        x = (x.mT / unit).to(self._precision(group, x.shape[-2], x)).mT
        v = beside("root_second_moment") if group["base"] == "adam" else None
        new = aro_rotation(x, r[None], base_map(group, v, unit), **self._policy(group, x))
        r.copy_(new[0])

    def _shared(self, group: dict[str, Any], team: int) -> Tensor:
        """The rotation of a set; its owner may have had no gradient yet."""
        for p in group["params"]:
            if any(slot.team == team and slot.owns for slot in self._slots(group, p)):
                if "rotation" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    self.state[p].update(self._extra_state(group, _sizes(group, p), p))
                return self.state[p]["rotation"]
        raise RuntimeError(f"no parameter owns the rotation of set {team}")

    def _parts(self, group: dict[str, Any], batch: Batch) -> list[Batch]:
        size = 1
        if group["foreach"]:
            size = chunk_size(len(batch), *batch.shape, batch.params[0].device)
        return [batch[i : i + size] for i in range(0, len(batch), size)]

    def _precision(
        self, group: dict[str, Any], m: int, like: Tensor, ahead: bool = False
    ) -> torch.dtype:
        """Of products; ``ahead``: of those after which a sign may be a coin toss."""
        if like.dtype == torch.float64:
            return like.dtype
        if group["product_dtype"] is not None:
            return group["product_dtype"]
        smooth = group["base"] in ("sinkhorn", "row", "adam") or (ahead and group["base"] == "sign")
        if smooth and group["rotation"] in ("aro", "identity") and m >= _BFLOAT16_FROM:
            return product_dtype(like.device.type)
        return torch.float32

    def _policy(self, group: dict[str, Any], x: Tensor) -> dict[str, Any]:
        auto = "qr" if x.device.type == "cpu" else "scqr"
        return {"policy": group["rotation"], "qr": auto if group["qr"] == "auto" else group["qr"]}

    def _unit(self, group: dict[str, Any], part: Batch) -> tuple[Tensor, Tensor]:
        """Momenta divided by their root mean squares, as a stack, and these."""
        (rows, cols), first = part.shape, part.params[0]
        dtype = self._precision(group, min(rows, cols), first)
        x = self._space.take("x", (len(part), rows, cols), dtype, first.device)
        unit = torch.cat([mean_size(m[None]) for m in part.momenta])
        for momentum, size, out in zip(part.momenta, unit, x, strict=True):
            torch.div(momentum, size, out=out)
        return x, unit

    def _apply(
        self, group: dict[str, Any], part: Batch, x: Tensor, unit: Tensor, r: Tensor | None
    ) -> None:
        """U from the stack ``x`` with rotations ``r`` (None: the identity), then the weights."""
        columns = _variant(part)[0]
        v = moments(part.states, columns)
        final, m = base_map(group, v, unit, keep=True), oriented(x, columns)
        if group["base"] == "sign":  # exact in any type, so that U needs no wider product
            final = partial(signs, dtype=self._precision(group, m.shape[-2], x, ahead=True))
        u = oriented(final(m) if r is None else aro_direction(m, r, final), columns)
        if v is not None:
            for state, new in zip(part.states, oriented(v, columns).unbind(0), strict=True):
                state["root_second_moment"].copy_(new)
        rows, cols = part.shape
        lr = float(group["lr"])
        factor: Tensor | float = lr
        if group["rms"] is not None:
            norm = squared_norms(u.flatten(1), -1).sqrt_()[..., None]
            factor = torch.where(norm == 0, 0.0, lr * group["rms"] * (rows * cols) ** 0.5 / norm)
        apply_update(part.params, u, factor, 1 - lr * group["weight_decay"])


def _variant(batch: Batch) -> tuple[bool, int | None, bool, Layout | None]:
    return batch.variant  # pyrefly: ignore

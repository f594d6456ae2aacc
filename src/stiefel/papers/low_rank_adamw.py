"""AdamW in a subspace from anywhere: what the DCT's columns are compared with.

A plain, slow reference with an orthonormal projector per matrix, the moments carried from one to
the next by products (arXiv 2505.17967 and the methods before it).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg import dct_matrix
from stiefel.optim import low_rank_svd_projector
from stiefel.optim.columns import resolve_rank

SUBSPACES = ("svd", "random-columns", "dct")
# Random columns are drawn from one generator, so that a run is determined by its settings.
_DRAWS_SEED = 17_967


class LowRankAdamW(torch.optim.Optimizer):
    """AdamW on what an orthonormal projector leaves of each matrix's gradient; AdamW for the rest.

    Per matrix (R, C) with R ≥ C (wide ones are treated as their transposes), every step::

        A = G + E                                       E only with error feedback
        P (C, r) from A ;  a = A P ;  E = A − a Pᵀ
        m ← m P_prevᵀ P ;  v ← |v P_prevᵀ P|
        m ← β₁ m + (1 − β₁) a ;  v ← β₂ v + (1 − β₂) a²
        W ← (1 − lr·wd) W − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε) Pᵀ

    Args:
        params: Two kinds of groups: ``rule="matrix"`` with 2-D parameters, ``rule="elementwise"``.
        lr: Learning rate of matrix groups.
        rank: r, an integer, or a fraction of the smaller side in (0, 1).
        subspace: ``"svd"``: leading right singular vectors of A. ``"dct"``: the columns of the
            DCT-II basis with the largest 1-norms in A Q. ``"random-columns"``: columns of that
            basis drawn anew in every step, whatever A is.
        betas, eps, weight_decay: As in AdamW.
        error_feedback: Whether E is kept.
        adamw_lr, adamw_betas: Of elementwise groups.

    Raises:
        ValueError: an unknown subspace or rule; a parameter of a matrix group that is not 2-D.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        rank: int | float,
        subspace: str,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        error_feedback: bool = False,
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        if subspace not in SUBSPACES:
            raise ValueError(f"subspace must be one of {SUBSPACES}, got {subspace!r}")
        self._subspace = subspace
        self._draws = torch.Generator().manual_seed(_DRAWS_SEED)
        groups = []
        for group in params:
            if group["rule"] not in ("matrix", "elementwise"):
                raise ValueError(f"rule must be matrix or elementwise, got {group['rule']!r}")
            own = {} if group["rule"] == "matrix" else {"lr": adamw_lr, "betas": adamw_betas}
            groups.append({**own, **group})
        defaults = {
            "lr": lr,
            "rank": rank,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "error_feedback": error_feedback,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            flat = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
            if group["rule"] == "matrix" and flat:
                raise ValueError(f"matrix groups take 2-D parameters, got one of shape {flat[0]}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyrefly: ignore
        """Update every parameter that has a gradient.

        Raises:
            FloatingPointError: a matrix has a gradient that is not finite.
            ValueError: there is a closure.
        """
        if closure is not None:
            raise ValueError("LowRankAdamW takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["rule"] == "elementwise":
                for p in params:
                    self._advance(group, p, p.grad, None)
                continue
            # One batched decomposition for all matrices of a shape.
            for shape in dict.fromkeys(p.shape for p in params):
                alike = [p for p in params if p.shape == shape]
                self._advance_matrices(group, alike, wide=shape[0] < shape[1])

    def _advance_matrices(self, group: dict[str, Any], params: list[Tensor], wide: bool) -> None:
        gradients = [p.grad.mT if wide else p.grad for p in params]  # pyrefly: ignore
        a = torch.stack(
            [g + self.state[p].get("error", 0.0) for p, g in zip(params, gradients, strict=True)]
        )
        if not a.isfinite().all():
            raise FloatingPointError("a gradient is not finite")
        projectors = self._projectors(a, resolve_rank(group["rank"], a.shape[-1]))
        low = a @ projectors
        errors = a - low @ projectors.mT
        for i, p in enumerate(params):
            state, projector = self.state[p], projectors[i]
            if "projector" in state:
                turn = state["projector"].mT @ projector
                state["mean"] = state["mean"] @ turn
                state["square"] = (state["square"] @ turn).abs()
            state["projector"] = projector
            if group["error_feedback"]:
                state["error"] = errors[i]
            self._advance(group, p, low[i], projector, wide)

    def _projectors(self, a: Float[Tensor, "k m n"], rank: int) -> Float[Tensor, "k n r"]:
        """An orthonormal P for every matrix."""
        if self._subspace == "svd":
            return low_rank_svd_projector(a, rank)
        count, _, n = a.shape
        rows = dct_matrix(n, dtype=a.dtype, device=a.device)
        if self._subspace == "dct":
            scores = (a @ rows.mT).abs().sum(-2)
        else:
            scores = torch.rand(count, n, generator=self._draws).to(a.device)
        chosen = scores.topk(rank, dim=-1).indices.sort(dim=-1).values
        return rows[chosen].mT

    def _advance(
        self,
        group: dict[str, Any],
        p: Tensor,
        gradient: Tensor | None,
        projector: Tensor | None,
        wide: bool = False,
    ) -> None:
        """Adam on ``gradient``; the update goes back through ``projector`` if there is one."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        if "step" not in state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(gradient)  # pyrefly: ignore
            state["square"] = torch.zeros_like(gradient)  # pyrefly: ignore
        state["step"] += 1
        mean, square, t = state["mean"], state["square"], state["step"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        u = mean / (1 - beta1**t) / ((square / (1 - beta2**t)).sqrt() + group["eps"])
        if projector is not None:
            u = u @ projector.mT
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(u.mT if wide else u, alpha=group["lr"])

"""RMNP: momentum divided by its row norms (Deng et al., arXiv 2603.20527)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.polar import polar, safe_norm
from stiefel.optim.base import MatrixOptimizer
from stiefel.optim.batch import LOW_PRECISION, Batch
from stiefel.optim.distributed.shards import Shard
from stiefel.optim.settings import adamw_defaults, check_at_least_zero, check_choice, check_fraction


def rmnp_direction(
    update: Float[Tensor, "*batch m n"], eps: float = 1e-12
) -> Float[Tensor, "*batch m n"]:
    """Every row divided by max(‖row‖₂, eps): R = rows of the momentum at unit length.

    Args:
        update: Momentum, shape ``(..., R, C)``; rows are output neurons, whatever the shape. Not
            changed.
        eps: Smallest norm divided by. Rows at or above it become exactly unit, in float32 also
            where their squares underflow or overflow; zero rows stay zero.
    """
    return (update / _row_norms(update, eps)).to(update.dtype)


def _row_norms(update: Tensor, eps: float) -> Tensor:
    """max(‖row‖, eps) as a column, at least in float32."""
    norm = safe_norm(update).clamp_min_(eps if eps > 0 else torch.finfo(torch.float32).tiny)
    return norm if update.dtype == torch.float64 else norm.to(torch.float32)


class RMNP(MatrixOptimizer):
    """RMNP for hidden matrices, AdamW for the rest, in one optimizer: no products, linear time.

    Learning rate: spectral convention (every row of an update has norm lr·sqrt(max(1, R/C))), but a
    good one is three to five times smaller than Muon's. With ``scale="rms"`` every row has norm
    0.2·lr·sqrt(C).

    Per matrix (R, C), momentum M starting at 0::

        M ← μ M + (1 − μ) G
        U ← (1 − μ) G + μ M  (Nesterov, the authors' code)  or  M  (the paper)
        W ← (1 − lr·wd) W − lr · scale · U_r / max(‖U_r‖₂, ε)   for every row r

    Rows are output neurons of the stored (out, in) weight. Tall matrices are not transposed, on
    purpose. If the rows of U are orthogonal this is exactly its polar factor.

    Args:
        params: Groups from :func:`split_parameters`, or 2-D parameters (all matrices).
        lr: Learning rate of matrix groups.
        momentum: μ in [0, 1).
        nesterov: Look ahead by one step.
        weight_decay: Decoupled; 0.0 means none.
        eps: Smallest row norm divided by.
        scale: ``"spectral"`` sqrt(max(1, R/C)), ``"rms"`` 0.2·sqrt(C), or ``None``.
        adamw_lr: Learning rate of elementwise groups, as are ``adamw_betas``, ``adamw_eps`` and
            ``adamw_weight_decay``.
        nonfinite: As in :class:`Muon`, as is ``maximize``.

    Raises:
        ValueError: a setting out of range; a 1-D parameter in a matrix group, by name.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        eps: float = 1e-12,
        *,
        scale: str | None = "spectral",
        adamw_lr: float | Tensor = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        nonfinite: str = "raise",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": bool(nesterov),
            "weight_decay": weight_decay,
            "eps": eps,
            "scale": scale,
            "nonfinite": nonfinite,
            **adamw_defaults(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay),
        }
        super().__init__(params, defaults, maximize=maximize)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_fraction(group, "momentum")
        check_at_least_zero(group, "eps")
        check_choice(group, "scale", ("spectral", "rms", None))

    _sends = "nothing"

    def _size_rule(self, group: dict[str, Any], rows: int, cols: int) -> float:
        """Norm of a row of the update."""
        return (
            float(group["lr"])
            * {
                "spectral": max(1.0, rows / cols) ** 0.5,
                "rms": 0.2 * cols**0.5,
                None: 1.0,
            }[group["scale"]]
        )

    def _update_shards(
        self,
        group: dict[str, Any],
        shards: Sequence[Shard],
        total: Callable[[list[Tensor]], list[Tensor]],
    ) -> None:
        """Whole rows need nobody; of split ones the sums of squares are added up over ranks."""
        sums = []
        for shard in shards:
            shard.momentum.lerp_(shard.grad, 1 - group["momentum"])
            if not shard.entry.splits_rows:
                self._apply_shard(group, shard, None)
                continue
            squares = shard.param.new_zeros(shard.size[0], dtype=torch.float64)
            if shard.counts and shard.param.numel():
                # In float64 no square leaves the range.
                u = self._ahead(group, shard).flatten(1)
                norm = torch.linalg.vector_norm(u, dim=1, dtype=torch.float64)
                squares[shard.first_row : shard.first_row + len(u)] = norm.square()
            sums.append(squares)
        found = iter(total(sums))
        for shard in shards:
            if shard.entry.splits_rows:
                self._apply_shard(group, shard, next(found))

    def _ahead(self, group: dict[str, Any], shard: Shard) -> Tensor:
        """U. Made again where it is needed twice: kept, it would be a copy of all momenta."""
        m = shard.momentum
        return torch.lerp(shard.grad, m, group["momentum"]) if group["nesterov"] else m

    def _apply_shard(self, group: dict[str, Any], shard: Shard, squares: Tensor | None) -> None:
        """Update a part, given the sums of squares of its matrix's rows where they are split."""
        p = shard.param
        if not p.numel():
            return
        u = self._ahead(group, shard)
        if squares is None:
            norm = _row_norms(u.flatten(1), group["eps"])
        else:
            smallest = group["eps"] if group["eps"] > 0 else torch.finfo(torch.float32).tiny
            mine = squares[shard.first_row : shard.first_row + len(u)]
            norm = mine.sqrt().clamp_min(smallest)
            norm = norm if u.dtype == torch.float64 else norm.to(torch.float32)
        target = p.float() if p.dtype in LOW_PRECISION else p
        decay = 1 - float(group["lr"]) * group["weight_decay"]
        if decay != 1.0:
            target.mul_(decay)
        norm = norm.view(-1, *[1] * (u.ndim - 1))
        target.addcdiv_(u, norm, value=-self._size_rule(group, *shard.size))
        if target is not p:
            p.copy_(target)

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        rows, cols = batch.shape
        first = batch.params[0]
        decay = 1 - float(group["lr"]) * group["weight_decay"]
        factor = self._size_rule(group, rows, cols)
        ahead = self._space.take("u", (rows, cols), first.dtype, first.device)
        low = first.dtype in LOW_PRECISION
        for p, g, m in zip(batch.params, batch.grads, batch.momenta, strict=True):
            m.lerp_(g, 1 - group["momentum"])
            u = torch.lerp(g, m, group["momentum"], out=ahead) if group["nesterov"] else m
            target = p.float() if low else p
            if decay != 1.0:
                target.mul_(decay)
            target.addcdiv_(u, _row_norms(u, group["eps"]), value=-factor)
            if low:
                p.copy_(target)


def row_dominance(
    momentum: Float[Tensor, "*batch m n"], transpose_tall: bool = False
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """How far V Vᵀ is from diagonal, the paper's reason why row normalisation may suffice.

    r_i = (V Vᵀ)_ii / mean over j ≠ i of |(V Vᵀ)_ij|. For independent Gaussian entries with C
    columns r is about sqrt(πC/2), growing with C without any structure; momentum in training lies
    far below.

    Args:
        momentum: V, shape ``(..., R, C)`` with R ≥ 2.
        transpose_tall: Use Vᵀ where R > C, as the authors' monitor does (their optimizer does not).

    Returns:
        ``(mean, min, max)`` of r over rows. A zero row has r = 0; rows orthogonal to all others
        have r = inf. Never more than 4096 rows of the Gram matrix are held at once.

    Raises:
        ValueError: fewer than two rows.
    """
    v = momentum.mT if transpose_tall and momentum.shape[-2] > momentum.shape[-1] else momentum
    count = v.shape[-2]
    if count < 2:
        raise ValueError(f"momentum must have at least two rows, got shape {tuple(v.shape)}")
    v = v.double() if v.dtype == torch.float64 else v.float()
    pieces = []
    for start in range(0, count, 4096):
        rows = v[..., start : start + 4096, :]
        own = rows.square().sum(-1)
        others = (rows @ v.mT).abs_().sum(-1) - own
        # Cancellation may leave a tiny negative rest where the rows are orthogonal.
        pieces.append(torch.where(own > 0, own * (count - 1) / others.clamp_min(0), 0.0))
    r = torch.cat(pieces, dim=-1)
    return r.mean(-1), r.amin(-1), r.amax(-1)


def polar_cosine(momentum: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch"]:
    """Cosine between the row-normalised momentum and its exact polar factor: RMNP against Muon.

    About 0.85 for square Gaussian matrices and 0.97 at aspect ratio four; 1 if the rows are
    orthogonal.
    """
    v = momentum.double()
    a, b = rmnp_direction(v), polar(v)
    return (a * b).sum((-2, -1)) / (a.norm(dim=(-2, -1)) * b.norm(dim=(-2, -1)))

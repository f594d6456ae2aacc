"""AuON and Hybrid-AuON: momentum divided by its norm and a cosh mean (Maity, arXiv 2509.24320)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.coefficients import Table, table
from stiefel.linalg.polar import frobenius_norm
from stiefel.linalg.schulz import normalize_into
from stiefel.optim.base import MatrixOptimizer
from stiefel.optim.batch import LOW_PRECISION, Batch
from stiefel.optim.distributed.shards import Shard
from stiefel.optim.orthogonal import OrthogonalOptimizer
from stiefel.optim.settings import adamw_defaults, check_choice, check_fraction, scale_factor

# Added to r, which is at least 1: it never matters (the paper's and the authors' constant).
_EPS = 1e-8
# cosh² of the largest allowed argument is 1e8: far from overflow in any precision.
_GAMMA_MAX = 10.0
# Relative error of the cosh mean that the series may make; float32 rounds by 6e-8.
_SERIES_ERROR = 1e-7
# Norms within these bounds are right in float32.
_SAFE_NORM = (1e-15, 1e18)
# Factors within these bounds are safe to multiply with in float32.
_FACTOR_RANGE = (1e-30, 1e30)


def auon_direction(
    update: Float[Tensor, "*batch m n"], gamma: float = 1.0
) -> Float[Tensor, "*batch m n"]:
    """x / r with x = U / ‖U‖_F and r = sqrt(mean of cosh²(γ x)), both per matrix (equations 3, 4).

    r² = 1 + γ²/N + O(γ⁴ Σx⁴ / N) with N entries: for any layer of practical size this is
    Frobenius-normalised momentum to 1e-5, and ‖x‖_F = 1 alone bounds its spectral norm.

    Args:
        update: Momentum, shape ``(..., R, C)``; not changed. Any scale that its dtype can hold: the
            paper's 1e-7 beside ‖U‖_F is left out.
        gamma: In (0, 10]. 1 in the paper, 1.5 in the authors' later code.

    Returns:
        Same shape and dtype, Frobenius norm at most 1. Zero matrices stay zero.

    Raises:
        ValueError: ``gamma`` outside (0, 10].
    """
    _check_gamma(gamma)
    if not update.numel():
        return update.clone()
    x = torch.empty_like(update, dtype=_wide(update))
    normalize_into(x, update, _PLAIN)
    return (x / (_cosh_square_mean(gamma * x).sqrt() + _EPS)).to(update.dtype)


_PLAIN = Table(())


def _cosh_square_mean(t: Tensor) -> Tensor:
    """Mean of cosh²(t) per matrix, kept: 1 + mean of sinh²(t), which loses nothing to the 1."""
    return t.sinh().square().mean((-2, -1), keepdim=True) + 1


def _norm(x: Tensor) -> tuple[float, float]:
    """‖x‖_F of one matrix on a CPU and its largest row norm, in one pass."""
    rows = torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x))
    norm, largest = float(torch.linalg.vector_norm(rows)), float(rows.max())
    if not _SAFE_NORM[0] < norm < _SAFE_NORM[1]:  # squares may have left float32
        return float(frobenius_norm(x)), math.inf
    return norm, largest


def _cosh_square_number(x: Tensor, factor: float, norm: float, largest: float) -> float:
    """Mean of cosh²(factor·x) over one matrix on a CPU, given what :func:`_norm` says of x.

    By the first term of the series, 1 + energy/N with energy = Σ (factor·x)², wherever that is
    right to 1e-7: sinh²(t)/t² grows with |t|, so that the rest is at most
    energy/N · (sinh²(T)/T² − 1) for T ≥ max |factor·x|, a row norm for instance.
    """
    mean = (factor * norm) ** 2 / x.numel()
    if mean * _beyond_square(factor * largest) <= _SERIES_ERROR:
        return 1 + mean
    low, high = x.aminmax()
    if mean * _beyond_square(factor * max(-float(low), float(high))) <= _SERIES_ERROR:
        return 1 + mean
    # In float64, where no factor overflows: such matrices are small, or hold one large entry.
    return float(_cosh_square_mean(x.double() * factor))


def _beyond_square(t: float) -> float:
    """sinh²(t)/t² − 1."""
    return (math.sinh(t) / t) ** 2 - 1 if 0 < t < 100 else math.inf


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in LOW_PRECISION else x.dtype


class AuON(MatrixOptimizer):
    """AuON for hidden matrices, AdamW for the rest, in one optimizer: no products, linear time.

    Learning rate: an update has Frobenius norm just below lr·sqrt(max(1, R/C)) (``"paper"``), which
    bounds its spectral norm; of Muon's, only the largest singular value is comparable. With
    ``"code"`` it is that of momentum SGD.

    Per matrix (R, C) of N entries, momentum M starting at 0::

        M ← μ M + (1 − μ) G
        U ← (1 − μ) G + μ M  (Nesterov)  or  M
        x ← U / ‖U‖_F
        r ← sqrt(mean of cosh²(γ x))                        1 + γ²/2N for all but tiny matrices
        D ← x / (r + 1e-8)  ("paper")  or  U / (r + 1e-8)  ("code": not divided by ‖U‖)
        W ← (1 − lr·wd) W − lr · sqrt(max(1, R/C)) · D      without the root for "code"

    r rescales the whole matrix: no entry is weighted differently from another. For any layer of
    practical size, ``"paper"`` is normalised momentum SGD to 1e-5, ``"code"`` is momentum SGD.

    Args:
        params: Groups from :func:`split_parameters`, or 2-D parameters (all matrices).
        lr: Learning rate of matrix groups.
        momentum: μ in [0, 1).
        nesterov: Look ahead by one step.
        weight_decay: Decoupled; 0.0 means none.
        gamma: γ in (0, 10]; 1 in the paper, 1.5 in the authors' later code.
        variant: ``"paper"``, or ``"code"`` as the authors' code since January 2026.
        adamw_lr: Learning rate of elementwise groups, as are ``adamw_betas``, ``adamw_eps`` and
            ``adamw_weight_decay``.
        nonfinite: As in :class:`Muon`, as is ``maximize``.

    Raises:
        ValueError: a setting out of range; a 1-D parameter in a matrix group, by name.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        gamma: float = 1.0,
        variant: str = "paper",
        *,
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
            "gamma": gamma,
            "variant": variant,
            "nonfinite": nonfinite,
            **adamw_defaults(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay),
        }
        super().__init__(params, defaults, maximize=maximize)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_fraction(group, "momentum")
        _check_gamma(group["gamma"])
        check_choice(group, "variant", ("paper", "code"))

    _sends = "nothing"
    _needs_whole_sums = True

    def _update_shards(
        self,
        group: dict[str, Any],
        shards: Sequence[Shard],
        total: Callable[[list[Tensor]], list[Tensor]],
    ) -> None:
        """Two numbers of a split matrix are added up over ranks: Σ U² and Σ sinh²(γ U/‖U‖_F)."""
        gamma, sizes, waves = group["gamma"], [], []
        parted = [shard for shard in shards if shard.entry.is_split]
        for shard in shards:
            shard.momentum.lerp_(shard.grad, 1 - group["momentum"])
            u = self._ahead(group, shard)
            size = _size(u)
            if shard.entry.is_split:
                sizes.append(size)
            else:
                norm = size[0].sqrt()
                self._apply_shard(
                    group, shard, u, norm, _wave_sum(lambda u=u: u, size, gamma, norm)
                )
        nothing = torch.zeros((), dtype=torch.float64)  # each copy counts once
        squares = [
            size[0] if shard.counts else nothing.to(size[0].device)
            for shard, size in zip(parted, sizes, strict=True)
        ]
        norms = [value.sqrt() for value in total(squares)]
        for shard, size, norm in zip(parted, sizes, norms, strict=True):
            wave = _wave_sum(partial(self._ahead, group, shard), size, gamma, norm)
            waves.append(wave if shard.counts else torch.zeros_like(wave))
        for shard, norm, wave in zip(parted, norms, total(waves), strict=True):
            self._apply_shard(group, shard, self._ahead(group, shard), norm, wave)

    def _ahead(self, group: dict[str, Any], shard: Shard) -> Tensor:
        """U. Made again where it is needed twice: kept, it would be a copy of all momenta."""
        m = shard.momentum
        return torch.lerp(shard.grad, m, group["momentum"]) if group["nesterov"] else m

    def _apply_shard(
        self, group: dict[str, Any], shard: Shard, u: Tensor, norm: Tensor, wave: Tensor
    ) -> None:
        """Update a part, given ‖U‖_F and the sum of waves of its whole matrix."""
        if not u.numel():
            return
        lr, p = float(group["lr"]), shard.param
        rows, cols = shard.size
        factor = lr / ((1 + wave / (rows * cols)).sqrt() + _EPS)
        if group["variant"] == "paper":
            factor = scale_factor("spectral", rows, cols) * factor / norm
        factor = torch.where(norm > 0, factor, torch.where(norm == 0, 0.0, norm))
        target = p.float() if p.dtype in LOW_PRECISION else p
        decay = 1 - lr * group["weight_decay"]
        if decay != 1.0:
            target.mul_(decay)
        if u.device.type == "cpu":
            _subtract(target, u, float(factor))
        else:
            target.sub_((u * factor).to(target.dtype))
        if target is not p:
            p.copy_(target)

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        first, lr = batch.params[0], float(group["lr"])
        decay = 1 - lr * group["weight_decay"]
        if group["variant"] == "paper":
            lr *= scale_factor("spectral", *batch.shape)
        low = first.dtype in LOW_PRECISION
        ahead = self._space.take("u", batch.shape, first.dtype, first.device)
        for p, g, m in zip(batch.params, batch.grads, batch.momenta, strict=True):
            m.lerp_(g, 1 - group["momentum"])
            u = torch.lerp(g, m, group["momentum"], out=ahead) if group["nesterov"] else m
            target = p.float() if low else p
            if decay != 1.0:
                target.mul_(decay)
            if first.device.type == "cpu":
                _subtract(target, u, lr / _divisor(group, u))
            else:  # without looking at the numbers, which would stall
                target.sub_(lr * _direction(group, u))
            if low:
                p.copy_(target)


def _size(u: Tensor) -> tuple[Tensor, Tensor, int]:
    """Σ U² in float64, where no square leaves the range; a bound of max |U|; how many numbers."""
    if not u.numel():
        nothing = torch.zeros((), dtype=torch.float64, device=u.device)
        return nothing, nothing, 0
    if u.device.type == "cpu":
        norm, largest = (torch.tensor(n, dtype=torch.float64) for n in _norm(u.flatten(1)))
        return norm.square(), largest, u.numel()
    square = torch.linalg.vector_norm(u, dtype=torch.float64).square()
    return square, u.abs().amax().double(), u.numel()


def _wave_sum(
    u: Callable[[], Tensor], size: tuple[Tensor, Tensor, int], gamma: float, norm: Tensor
) -> Tensor:
    """Σ sinh²(γ U/‖U‖) over a part of U of this :func:`_size`, in float64.

    U itself is only asked for where the square does not do; then a few rows are seen at a time.
    """
    square, largest, count = size
    if not count:
        return torch.zeros_like(norm)
    t = gamma / norm.clamp_min(torch.finfo(torch.float64).tiny)
    if norm.device.type == "cpu":
        energy = square * t.square()
        if float(energy) / count * _beyond_square(float(largest * t)) <= _SERIES_ERROR:
            return energy
    return torch.stack([(row.double() * t).sinh().square().sum() for row in u().split(256)]).sum()


def _divisor(group: dict[str, Any], u: Tensor) -> float:
    """What U is divided by; Inf for a zero matrix."""
    norm, largest = _norm(u)
    if norm == 0:
        return math.inf
    r = math.sqrt(_cosh_square_number(u, group["gamma"] / norm, norm, largest)) + _EPS
    return norm * r if group["variant"] == "paper" else r


def _direction(group: dict[str, Any], u: Tensor) -> Tensor:
    """D as a tensor, for accelerators."""
    if group["variant"] == "paper":
        return auon_direction(u.to(_wide(u)), group["gamma"])
    x = torch.empty_like(u, dtype=_wide(u))
    normalize_into(x, u, _PLAIN)
    return u / (_cosh_square_mean(group["gamma"] * x).sqrt() + _EPS)


def _subtract(target: Tensor, u: Tensor, factor: float) -> None:
    """``target`` ← target − factor·u, also where the factor leaves float32's range."""
    if _FACTOR_RANGE[0] < factor < _FACTOR_RANGE[1]:
        target.add_(u, alpha=-factor)
    elif factor != 0:
        target.sub_((u.double() * factor).to(target.dtype))


class HybridAuON(OrthogonalOptimizer):
    """Hybrid-AuON: one Newton–Schulz iteration, then AuON's scaling; AdamW for the rest.

    Learning rate: an update of ``"normalized"`` has Frobenius norm just below
    lr·sqrt(max(1, R/C)), one of ``"paper"`` between 0.7 and 3.4 times that, one of ``"code"`` has
    singular values near lr.

    Per matrix (R, C), momentum M starting at 0::

        M ← μ M + (1 − μ) G
        U ← (1 − μ) G + μ M  (Nesterov)  or  M
        X ← NS(U)                               classic coefficients, one iteration ("code": five)
        D ← X / ‖X‖_F / (sqrt(mean of cosh²(γ X / ‖X‖_F)) + 1e-8)     "normalized"
            X / (mean of cosh²(γ X) + 1e-8)                           "paper": X is not normalised
            X / (sqrt(mean of cosh²(γ X / ‖X‖_F)) + 1e-8)             "code"
        W ← (1 − lr·wd) W − lr · sqrt(max(1, R/C)) · D                without the root for "code"

    One iteration multiplies small singular values of U/‖U‖_F by 3.44 and 1 by 0.70; the cosh mean
    is 1 + ‖X‖²/N. ``"code"`` is Muon without its size rule.

    Args:
        params: Groups from :func:`split_parameters`, or 2-D parameters (all matrices).
        lr: Learning rate of matrix groups.
        momentum: μ in [0, 1).
        nesterov: Look ahead by one step.
        weight_decay: Decoupled; 0.0 means none.
        gamma: γ in (0, 10]; 1 in the paper, 1.5 in the authors' later code.
        ns_steps: Iterations. Default: 1, or 5 for ``"code"``.
        variant: ``"normalized"`` keeps AuON's bound, ``"paper"`` is literal and trains better,
            ``"code"`` is the authors' code since January 2026.
        adamw_lr: Learning rate of elementwise groups, as are ``adamw_betas``, ``adamw_eps`` and
            ``adamw_weight_decay``.
        nonfinite: As in :class:`Muon`, as are ``ns_dtype`` and ``maximize``.

    Raises:
        ValueError: a setting out of range; a 1-D parameter in a matrix group, by name.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        gamma: float = 1.0,
        ns_steps: int | None = None,
        variant: str = "normalized",
        *,
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
            "nesterov": bool(nesterov),
            "weight_decay": weight_decay,
            "gamma": gamma,
            "ns_steps": ns_steps,
            "variant": variant,
            "nonfinite": nonfinite,
            "ns_dtype": ns_dtype,
            **adamw_defaults(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay),
        }
        super().__init__(params, defaults, maximize=maximize)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_fraction(group, "momentum")
        _check_gamma(group["gamma"])
        check_choice(group, "variant", ("normalized", "paper", "code"))

    def _check_polynomial(self, group: dict[str, Any]) -> None:
        steps = group["ns_steps"]
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ValueError(f"ns_steps must be an integer ≥ 1 or None, got {steps!r}")

    def _rule(self, group: dict[str, Any], rows: int, cols: int) -> Table:
        steps = group["ns_steps"] or (5 if group["variant"] == "code" else 1)
        # No ε beside the norm, so that steps do not depend on the gradients' scale.
        return replace(table("classic", steps), eps=0.0)

    def _factor(self, group: dict[str, Any], o: Tensor, batch: Batch) -> Tensor | list[float]:
        lr, variant, gamma = float(group["lr"]), group["variant"], group["gamma"]
        if variant != "code":
            lr *= scale_factor("spectral", *batch.shape)
        if o.device.type != "cpu":
            norm = frobenius_norm(o).clamp_min(1e-30)
            mean = _cosh_square_mean(gamma * (o.to(_wide(o)) if variant == "paper" else o / norm))
            r = (mean if variant == "paper" else mean.sqrt()) + _EPS
            return lr / (norm * r if variant == "normalized" else r)
        factors = []
        for x in o:
            norm, largest = _norm(x)
            if norm == 0:
                factors.append(0.0)
                continue
            mean = _cosh_square_number(
                x, gamma if variant == "paper" else gamma / norm, norm, largest
            )
            r = (mean if variant == "paper" else math.sqrt(mean)) + _EPS
            factors.append(lr / (norm * r if variant == "normalized" else r))
        return factors


def _check_gamma(gamma: float) -> None:
    if not 0 < gamma <= _GAMMA_MAX:
        raise ValueError(f"gamma must be in (0, {_GAMMA_MAX:g}], got {gamma}")

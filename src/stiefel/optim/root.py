"""ROOT: Muon on momentum without its outliers (He et al., arXiv 2511.20626)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.coefficients import (
    NAMES,
    Coefficients,
    Table,
    Triple,
    as_table,
    check_guards,
    table,
)
from stiefel.optim.base import Batch, _sizes, gradient
from stiefel.optim.distributed.owned import everything
from stiefel.optim.groups import dimension_order, matrices
from stiefel.optim.orthogonal import OrthogonalOptimizer
from stiefel.optim.quantile import MODES, check_quantile, clip_, clip_threshold
from stiefel.optim.settings import adamw_defaults, check_choice, check_fraction, scale_factor

# One triple for all steps and shapes, fitted by the routine of `fit_coefficients` to recorded and
# synthetic spectra (mean ratio) under the guards with ±2 % noise: slope 395.
TRIPLE: Triple = (3.3067, -3.9846, 1.5753)

# The authors' published triples by (min, max). The first breaks a guard: after five steps it sends
# the singular value 0.559 to 3.31, after six to 679.
OFFICIAL: dict[tuple[int, int], Triple] = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}

# The authors add this to the threshold, so that it is never zero.
_EPS = 1e-9

ShapeTables = dict[tuple[int, int], tuple[Triple, ...]]


def soft_clip(
    update: Float[Tensor, "*batch m n"], quantile: float = 0.9
) -> tuple[Float[Tensor, "*batch m n"], Float[Tensor, "*batch m n"]]:
    """Split each matrix into a bounded base and sparse outliers by soft thresholding.

    ε = quantile of |U| over the matrix + 1e-9, O = sign(U)·max(|U| − ε, 0), B = U − O = U clipped
    to [−ε, ε] (the paper's decomposition). O solves min ½‖U − O‖² + ε‖O‖₁. Neither is scaled.

    Args:
        update: U, shape ``(..., R, C)``, not changed; each matrix has its own ε.
        quantile: In (0, 1], interpolated linearly. If it is zero because most entries are, the
            smallest positive |U| takes its place.

    Returns:
        ``(B, O)`` in the dtype of ``update``; O is exactly ``update − B``. NaN in a matrix gives
        NaN in both.

    Raises:
        ValueError: ``quantile`` outside (0, 1]; an empty matrix.
    """
    threshold = (clip_threshold(update, quantile) + _EPS).to(update.dtype)
    base = update.clamp(-threshold, threshold)
    return base, update - base


class ROOT(OrthogonalOptimizer):
    """ROOT for hidden matrices, AdamW for the rest, in one optimizer.

    Learning rate: RMS convention (an update has root mean square ≈ 0.2·lr, so AdamW's learning rate
    and weight decay carry over).

    Per matrix (R, C), momentum M starting at 0::

        M ← μ M + (1 − μ) G
        U ← (1 − μ) G + μ M  (Nesterov, the authors' code)  or  M  (the paper)
        ε ← quantile of |U|, interpolated linearly at index q·(RC − 1)
        B ← clip(U, −ε, ε)                                  the outliers U − B are thrown away
        W ← (1 − lr·wd) W − lr · 0.2 √max(R, C) · NS(B)

    M keeps the outliers, which decay with μ. It needs outliers rarer than the clipped share 1 − q:
    momentum remembers 1/(1 − μ) steps, so 1 % of the entries per step contaminates 18 % of M. The
    authors' 1e-9 beside ε is left out, so that steps do not depend on the gradients' scale.

    Args:
        params: Groups from :func:`split_parameters`, or 2-D parameters (all matrices).
        lr: Learning rate of matrix groups.
        momentum: μ in [0, 1).
        nesterov: Look ahead by one step.
        weight_decay: Decoupled; 0.0 means none.
        quantile: q in (0, 1]; 1 clips nothing. Where more than the share q of U is exactly zero,
            ε is the smallest positive \\|U\\|.
        quantile_mode: ``"exact"``, or ``"sampled"``: of up to 65,536 entries.
        ns_steps: Steps of NS. Tables with a row per step take at most as many as they have.
        coefficients: ``"fitted"`` (one triple per step, for every shape), ``"triple"`` (one triple
            for all steps), ``"official"`` (the authors' four shapes, for study: their triple for
            2048 × 2048 is unstable), ``"classic"``, any other name or triples that :class:`Muon`
            takes as ``ns``, or a mapping {(min, max): one triple, or one per step} as from
            :func:`fit_coefficients`. Shapes that a mapping or ``"official"`` lacks use
            ``"classic"``, with a warning.
        adamw_lr: Learning rate of elementwise groups, as are ``adamw_betas``, ``adamw_eps`` and
            ``adamw_weight_decay``.
        nonfinite: As in :class:`Muon`, as are ``ns_dtype`` and ``maximize``. Unless it is
            ``"propagate"``, a matrix whose momentum itself has become NaN is left out of the step,
            with a warning, apart from weight decay.

    Raises:
        ValueError: a setting out of range; coefficients that send a singular value out of bounds,
            naming it; a 1-D parameter in a matrix group, by name.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        quantile: float = 0.9,
        quantile_mode: str = "exact",
        ns_steps: int = 5,
        coefficients: Coefficients | Mapping[tuple[int, int], Any] = "fitted",
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
            "quantile": quantile,
            "quantile_mode": quantile_mode,
            "ns_steps": ns_steps,
            "coefficients": _readable(coefficients),
            "nonfinite": nonfinite,
            "ns_dtype": ns_dtype,
            **adamw_defaults(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay),
        }
        super().__init__(params, defaults, maximize=maximize)

    @torch.no_grad()
    def removed(self) -> dict[str, list[float]]:
        """Share of Σ\\|U\\| that the last step's clip threw away, for every matrix.

        Call it after :meth:`step` and before the gradients are cleared: U is built from them again.
        With DTensor parameters every rank must call it.

        Returns:
            Name of the parameter (its position where it has none) → one number in [0, 1) per
            matrix that it holds. Parameters without a gradient or a step are left out.
        """
        shares: dict[str, list[float]] = {}
        for group in self.param_groups:
            for p in group["params"] if group["rule"] == "matrix" else ():
                if p.grad is None or "momentum_buffer" not in self.state[p]:
                    continue
                rows = tuple(r for r, _ in _sizes(group, p))
                order = dimension_order(p)
                pair = (gradient(p), self.state[p]["momentum_buffer"])
                parts = (matrices(everything(t), group["view"], rows, order) for t in pair)
                numbers = shares.setdefault(self._name(group, p), [])
                for g, m in zip(*parts, strict=True):
                    u = torch.lerp(g, m, group["momentum"]) if group["nesterov"] else m
                    limit = clip_threshold(u, group["quantile"], group["quantile_mode"])
                    size = u.abs().to(limit.dtype)
                    total = float(size.sum())
                    left = float(size.sub_(limit).clamp_min_(0).sum())
                    numbers.append(left / total if total else 0.0)
        return shares

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_fraction(group, "momentum")
        check_quantile(group["quantile"])
        check_choice(group, "quantile_mode", MODES)

    def _check_polynomial(self, group: dict[str, Any]) -> None:
        steps = group["ns_steps"]
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"ns_steps must be an integer ≥ 1, got {steps!r}")
        given = group["coefficients"] = _readable(group["coefficients"])
        if isinstance(given, dict):
            for shape in given:
                try:
                    check_guards(_rule(given[shape], steps))
                except ValueError as error:
                    raise ValueError(f"coefficients of shape {shape}: {error}") from error
        elif given != "official":
            rule = _rule(given, steps)
            if not isinstance(given, str):
                check_guards(rule)

    def _check_matrices(self, group: dict[str, Any]) -> None:
        super()._check_matrices(group)
        given = group["coefficients"]
        known = OFFICIAL if given == "official" else given
        if not isinstance(known, dict):
            return
        shapes = {_key(*size) for p in group["params"] if p.numel() for size in _sizes(group, p)}
        for low, high in sorted(shapes):
            if (low, high) not in known:
                message = f"no coefficients for shape ({low}, {high}): the classic ones are used"
            elif given == "official" and (low, high) == (2048, 2048):
                message = (
                    "the official coefficients for (2048, 2048) are unstable: the singular value "
                    "0.5591 ends at 3.31 after five steps, at 679 after six"
                )
            else:
                continue
            warnings.warn(message, UserWarning, stacklevel=4)

    def _rule(self, group: dict[str, Any], rows: int, cols: int) -> Table:
        given = group["coefficients"]
        if given == "official":
            given = OFFICIAL.get(_key(rows, cols), "classic")
            given = given if isinstance(given, str) else (given,)
        elif isinstance(given, dict):
            given = given.get(_key(rows, cols), "classic")
        return _rule(given, group["ns_steps"])

    def _normalize(self, group: dict[str, Any], x: Tensor, u: Tensor, rule: Table) -> None:
        if group["quantile"] < 1:
            clip_(u, group["quantile"], group["quantile_mode"], self._space)
        super()._normalize(group, x, u, rule)
        if group["nonfinite"] != "propagate":
            # One NaN is in the norm and so in every entry; a lone Inf has been clipped.
            bad = x[:, 0, 0].isnan()
            if bool(bad.any()):
                shape = tuple(x.shape[1:])
                warnings.warn(
                    f"NaN in the momentum of {int(bad.sum())} matrices of shape {shape}: skipped",
                    RuntimeWarning,
                    stacklevel=5,
                )
                x[bad] = 0

    def _factor(self, group: dict[str, Any], o: Tensor, batch: Batch) -> Tensor | float:
        return float(group["lr"]) * scale_factor("rms", *batch.shape)


def _key(rows: int, cols: int) -> tuple[int, int]:
    return min(rows, cols), max(rows, cols)


def _readable(coefficients: Any) -> Any:
    """A name, a tuple of triples, or a dict from (min, max) to a tuple of triples.

    Raises:
        ValueError: anything else.
    """
    if isinstance(coefficients, str):
        if coefficients not in (*NAMES, "triple", "official"):
            raise ValueError(
                f"coefficients must be one of {', '.join(NAMES)}, triple, official, a sequence of "
                f"(a, b, c), or a mapping from shapes to these, got {coefficients!r}"
            )
        return coefficients
    if not isinstance(coefficients, Mapping):
        return as_table(coefficients).triples
    result: ShapeTables = {}
    for shape, triples in coefficients.items():
        if (
            not isinstance(shape, tuple)
            or len(shape) != 2
            or not all(isinstance(n, int) for n in shape)
            or not 1 <= shape[0] <= shape[1]
        ):
            raise ValueError(f"keys of coefficients must be (min, max), got {shape!r}")
        result[shape] = as_table(triples).triples
    return result


@lru_cache(maxsize=256)
def _rule(given: str | tuple[Triple, ...], steps: int) -> Table:
    """The table of a name or of triples: one is repeated, several are used as they are."""
    if given == "triple":
        # As for the classic triple, whose slope is larger.
        return Table((TRIPLE,) * steps, restarts=(3,) if steps <= 5 else None)
    if given == "fast":
        return table("fast", min(steps, 4))
    if isinstance(given, str):
        return table(given, steps)
    return Table(given * steps if len(given) == 1 else given)

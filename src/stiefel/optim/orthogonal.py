"""Optimizers whose direction is the polar factor of the momentum: Muon and its family."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.coefficients import NAMES, Coefficients, Table, as_table, check_guards
from stiefel.linalg.schulz import (
    chunk_size,
    normalize_into,
    orthogonalize_,
    product_dtype,
)
from stiefel.optim.base import Batch, MatrixOptimizer, apply_update


class OrthogonalOptimizer(MatrixOptimizer):
    """Momentum → polynomial polar factor → :meth:`_factor` → weights, a few matrices at a time.

    Scratch memory is a few matrices, whatever the number of parameters: equal shapes are worked on
    in stacks that fit the cache (CPU) or fill the device (accelerators).
    """

    def _factor(
        self, group: dict[str, Any], o: Tensor, batch: Batch
    ) -> Tensor | list[float] | float:
        """What the orthogonal updates (k, R, C) are multiplied with, learning rate included."""
        raise TypeError(f"{type(self).__name__} has no size rule; use one of its subclasses")

    def _eps(self, group: dict[str, Any]) -> float | None:
        """Added to the momentum's norm; None takes what the coefficients were published with."""
        return None

    def _flops(self, group: dict[str, Any], rows: int, cols: int) -> float:
        short, long = min(rows, cols), max(rows, cols)
        steps = self._rule(group, rows, cols).steps
        return steps * (4.0 * short**2 * long + 2.0 * short**3) + 10.0 * rows * cols

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_polynomial(group)
        dtype = group["ns_dtype"]
        if dtype is not None and dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"ns_dtype must be bfloat16, float32, float64 or None, got {dtype}")

    def _check_polynomial(self, group: dict[str, Any]) -> None:
        """Refuse coefficients that could hurt."""
        ns = group["ns"]
        rule = as_table(ns)
        if not isinstance(ns, str):
            check_guards(rule)
            group["ns"] = rule.triples

    def _rule(self, group: dict[str, Any], rows: int, cols: int) -> Table:
        """The polynomial for matrices of this shape."""
        return as_table(group["ns"])

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        rows, cols = batch.shape
        rule = self._rule(group, rows, cols)
        first = batch.params[0]
        dtype = group["ns_dtype"] or _precision(first)
        decay = 1 - float(group["lr"]) * group["weight_decay"]
        size = chunk_size(len(batch), rows, cols, first.device)
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            part.advance(self._momentum(group))
            shape = (len(part), rows, cols)
            x = self._space.take("o", shape, dtype, first.device)
            u = self._ahead(group, part)
            self._normalize(group, x, u, rule)
            o = orthogonalize_(x, rule, self._space)
            if first.dtype == torch.float32:  # once, for the size rule and the update
                o = u.copy_(o)
            apply_update(part.params, o, self._factor(group, o, part), decay)

    def _normalize(self, group: dict[str, Any], x: Tensor, u: Tensor, rule: Table) -> None:
        """``x`` ← the (Nesterov) momenta ``u``, each divided by its norm; ``u`` is destroyed."""
        normalize_into(x, u, rule, self._eps(group), scratch=u)

    def _ahead(self, group: dict[str, Any], part: Batch) -> Tensor:
        """The (Nesterov) momenta as a stack (k, R, C) in scratch memory."""
        first = part.params[0]
        u = self._space.take("u", (len(part), *part.shape), first.dtype, first.device)
        momentum = self._momentum(group)
        for i, (g, m) in enumerate(zip(part.grads, part.momenta, strict=True)):
            if group["nesterov"]:
                torch.lerp(g, m, momentum, out=u[i])
            else:
                u[i].copy_(m)
        return u


def orthogonal_defaults(
    ns: Coefficients, nesterov: bool, ns_dtype: torch.dtype | None
) -> dict[str, Any]:
    """The settings that every optimizer of the family has; ``ns`` must at least be readable."""
    if isinstance(ns, str) and ns not in NAMES:
        raise ValueError(
            f"ns must be one of {', '.join(NAMES)} or a sequence of (a, b, c), got {ns!r}"
        )
    if not isinstance(ns, str):
        ns = as_table(ns).triples
    return {"ns": ns, "nesterov": bool(nesterov), "ns_dtype": ns_dtype}


def squared_norms(o: Float[Tensor, "*batch m n"], dim: int) -> Tensor:
    """Sums of squares along a dimension, kept, accumulated at least in float32."""
    dtype = torch.float64 if o.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(o, dim=dim, keepdim=True, dtype=dtype).square_()


def _precision(parameter: Tensor) -> torch.dtype:
    if parameter.dtype == torch.float64:
        return torch.float64
    return product_dtype(parameter.device.type)

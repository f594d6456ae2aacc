"""A formula taken apart: its time derivative, its linear part, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from stiefel.nn.lemon.expression import (
    Call,
    Expression,
    Name,
    Number,
    evaluate,
    factors,
    prefix,
    product,
    summed,
    terms,
)
from stiefel.nn.lemon.formula import parse
from stiefel.nn.lemon.pde.grid import Grid
from stiefel.nn.lemon.tokenizer import VARIABLES

TIME_DERIVATIVES = {"ut": 1, "utt": 2}
SPACE_DERIVATIVES = {"u": 0, "ux": 1, "uxx": 2, "uxxx": 3, "uxxxx": 4}
RELABEL = "relabel"
"""Name of the factor (2/T)^order that relabelling to [0, 2) puts before the time derivative."""

Coefficients = Mapping[str, Tensor]
"""``[n, 1]`` each."""


@dataclass(frozen=True)
class Split:
    """``factor · ∂ₜ^order u = Σ linear[m] ∂ₓ^m u + rest``."""

    order: int
    factor: Expression
    linear: Mapping[int, Expression]
    rest: Expression | None

    def symbol(self, grid: Grid, q: Coefficients) -> Tensor:
        """ℓ of û_t = ℓ û + …, ``[n or 1, modes]``; complex only where odd derivatives occur."""
        total = torch.zeros(1, grid.modes, dtype=torch.float64, device=grid.x.device)
        odd = torch.zeros_like(total)
        for m, coefficient in self.linear.items():
            wave = grid.k**m * (1 if m % 4 < 2 else -1)
            part = evaluate(coefficient, q) * wave
            if m % 2:
                odd = odd + part
            else:
                total = total + part
        factor = evaluate(self.factor, q)
        total, odd = total / factor, odd / factor
        return torch.complex(*torch.broadcast_tensors(total, odd)) if bool(odd.any()) else total

    def nonlinear(self, grid: Grid, q: Coefficients) -> Callable[[Tensor], Tensor] | None:
        """The rest as a function of spectra, ``None`` if there is none."""
        rest = self.rest
        if rest is None:
            return None
        used = {e.name for e in prefix(rest) if isinstance(e, Name)}
        fields = {name: m for name, m in SPACE_DERIVATIVES.items() if name in used}
        factor = evaluate(self.factor, q)

        def function(spectrum: Tensor) -> Tensor:
            values = {name: grid.field(grid.ik**m * spectrum) for name, m in fields.items()}
            value = evaluate(rest, {**q, **values, "x": grid.x}) / factor
            return grid.spectrum(value.expand(*spectrum.shape[:-1], grid.points))

        return function


@lru_cache(maxsize=256)
def template(text: str, coefficients: tuple[str, ...]) -> Expression:
    """The tree of a family's formula, in the equation's own time.

    Raises:
        KeyError, ValueError: see :func:`stiefel.nn.lemon.formula.parse`.
    """
    return parse(text, (*VARIABLES, *coefficients))


def relabelled(tree: Expression) -> Expression:
    """The tree with the factor of relabelling before its time derivative."""
    if isinstance(tree, Name) and tree.name in TIME_DERIVATIVES:
        return Call("mul", (Name(RELABEL), tree))
    if isinstance(tree, Call):
        return Call(tree.operator, tuple(relabelled(a) for a in tree.arguments))
    return tree


def constant(tree: Expression, coefficients: Collection[str]) -> bool:
    """Whether the tree holds numbers and coefficients only."""
    return all(e.name in coefficients for e in prefix(tree) if isinstance(e, Name))


def split(tree: Expression, coefficients: Collection[str]) -> Split:
    """Solve the formula for its time derivative, keeping apart what Fourier modes solve exactly.

    Raises:
        ValueError: no single time derivative that is only multiplied by constants.
    """
    time: list[tuple[int, Expression]] = []
    linear: dict[int, list[tuple[int, Expression]]] = {}
    rest: list[tuple[int, Expression]] = []
    order = 0
    for sign, term in terms(tree):
        parts = factors(term)
        fixed = [e for e in parts if constant(e, coefficients)]
        free = [e for e in parts if not constant(e, coefficients)]
        coefficient = product(fixed) if fixed else Number(1.0)
        name = free[0].name if len(free) == 1 and isinstance(free[0], Name) else ""
        if name in TIME_DERIVATIVES:
            time.append((sign, coefficient))
            order = TIME_DERIVATIVES[name]
        elif any(isinstance(e, Name) and e.name in TIME_DERIVATIVES for e in prefix(term)):
            raise ValueError(f"ut or utt may only be multiplied by constants, got {term}")
        elif name in SPACE_DERIVATIVES:
            linear.setdefault(SPACE_DERIVATIVES[name], []).append((-sign, coefficient))
        else:
            rest.append((-sign, term))
    if len(time) != 1:
        raise ValueError(
            f"a formula needs exactly one term with ut or utt, this one has {len(time)}: {tree}"
        )
    return Split(
        order,
        summed(time),
        {m: summed(parts) for m, parts in linear.items()},
        summed(rest) if rest else None,
    )

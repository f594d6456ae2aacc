"""Families by name, and how a user adds one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from stiefel.nn.lemon.expression import unknown
from stiefel.nn.lemon.pde.families import BUILT_IN, STEPPED
from stiefel.nn.lemon.pde.family import Family, Parameter, Problem, Solver
from stiefel.nn.lemon.pde.grid import Grid
from stiefel.nn.lemon.pde.spectral import integrating_factor, kick_drift_kick
from stiefel.nn.lemon.pde.split import RELABEL, Split, split, template
from stiefel.nn.lemon.tokenizer import VARIABLES

Rhs = Callable[[Tensor, Callable[..., Tensor], Mapping[str, Tensor]], Tensor]
"""``rhs(u, dx, q)``: the time derivative from u ``[n, N]``, ``dx(field, order=1)`` and the
coefficients ``[n, 1]``."""

_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
_AGREEMENT = 1e-6
"""Largest relative difference of a right-hand side and its formula."""


class Families(Mapping[str, Family]):
    """Families by name; blanks, dashes and capitals do not matter: ``"Klein-Gordon"``."""

    def __init__(self, families: tuple[Family, ...]) -> None:
        self._families = {family.name: family for family in families}
        self._built_in = frozenset(self._families)

    def __getitem__(self, name: str) -> Family:
        if not isinstance(name, str):
            raise TypeError(f"a family is given by its name, got {type(name).__name__}")
        key = _key(name)
        if key not in self._families:
            raise unknown("family", name, self._families)
        return self._families[key]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _key(name) in self._families

    def __iter__(self) -> Iterator[str]:
        return iter(self._families)

    def __len__(self) -> int:
        return len(self._families)

    def __repr__(self) -> str:
        return f"Families({', '.join(self._families)})"

    def add(self, family: Family, *, replace: bool = False) -> None:
        """Add one of the user's; those of the paper cannot be replaced.

        Raises:
            ValueError: the name is taken.
        """
        if family.name in self._built_in or (family.name in self._families and not replace):
            raise ValueError(f"there is a family {family.name!r} already")
        self._families[family.name] = family

    def remove(self, name: str) -> None:
        """Take out one that the user added.

        Raises:
            KeyError: no such family.
            ValueError: one of the paper's.
        """
        family = self[name]
        if family.name in self._built_in:
            raise ValueError(f"{family.name!r} is a family of the paper and stays")
        del self._families[family.name]


def _key(name: str) -> str:
    return re.sub(r"[\s‐-―-]+", "_", name.strip().lower())


FAMILIES = Families(BUILT_IN)
"""All families there are."""


def register(
    name: str,
    rhs: Rhs | None,
    formula: str,
    parameters: Mapping[str, Parameter | float | int] | None = None,
    *,
    horizon: float | int = 2.0,
    substeps: int = 16,
    waves: int = 2,
    initial: tuple[str, ...] = ("sines", "gp"),
    refine: int = 1,
    replace: bool = False,
) -> Family:
    """Add an equation of your own: periodic, first or second order in time.

    The linear terms with constant coefficients are found in the formula and solved exactly in
    Fourier space; the rest is stepped with RK4 (first order) or Strang splitting (second order).

    >>> family = register("fisher", None, "ut - nu*uxx - r*u*(1 - u)", {"nu": 3e-3, "r": 2.0})
    >>> sample("fisher", 4, seed=0).u.shape
    torch.Size([4, 64, 128])
    >>> FAMILIES.remove("fisher")

    Args:
        name: Lower-case letters, digits, underscores.
        rhs: ``rhs(u, dx, q)`` gives ∂ₜu (∂ₜₜu if the formula has ``utt``) from u ``[n, N]``,
            ``dx(field, order=1)`` and the parameters ``[n, 1]``; ``None``: made from the formula.
        formula: What vanishes, with ``ut`` or ``utt``, ``u ux uxx uxxx uxxxx x`` and the names of
            the parameters. Relabelling to t in [0, 2) is done for you.
        parameters: Centres, or :class:`Parameter` with ranges. Numbers must keep their sign.
        horizon: Final time.
        substeps: Steps per 1/32 of it on 128 points; more on finer grids.
        waves: Largest wave number of initial sines.
        initial: Of ``"sines"``, ``"gp"``; the usual first.
        refine: Points of the solver per point kept.
        replace: Whether an earlier one of yours may be replaced.

    Raises:
        KeyError: a name in the formula that is neither variable nor parameter.
        ValueError: a name that is taken or none; a formula without a single time derivative, or
            ill-posed at the centres; ``rhs`` and formula that disagree (with the difference).
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name must be lower-case letters, digits and _, got {name!r}")
    for what, value in (("horizon", horizon), ("substeps", substeps), ("refine", refine)):
        if not value > 0:
            raise ValueError(f"{what} must be positive, got {value}")
    if waves < 1:
        raise ValueError(f"waves must be at least 1, got {waves}")
    if not initial or not set(initial) <= {"sines", "gp"}:
        raise ValueError(f"initial must be of 'sines', 'gp', got {initial}")
    ranges = {key: _range(value) for key, value in (parameters or {}).items()}
    for key in ranges:
        if not key.isidentifier() or key in (*VARIABLES, RELABEL):
            raise ValueError(f"a parameter cannot be called {key!r}")
    parts = split(template(formula, tuple(ranges)), ranges)
    family = Family(
        name, formula, ranges, _solver(parts, rhs, float(horizon), substeps),
        "Strang splitting in Fourier space" if parts.order == 2 else STEPPED,
        horizon=float(horizon), waves=waves, initial=initial, refine=refine,
    )  # fmt: skip
    _check_agreement(family, parts, rhs)
    FAMILIES.add(family, replace=replace)
    return family


def _range(value: Parameter | float | int) -> Parameter:
    """Numbers may change in size, not in sign."""
    if isinstance(value, Parameter):
        return value
    number = float(value)
    if number == 0:
        return Parameter(0.0)
    ends = (0.0, float("inf")) if number > 0 else (float("-inf"), 0.0)
    return Parameter(number, low=ends[0], high=ends[1])


def _solver(parts: Split, rhs: Rhs | None, horizon: float | int, substeps: int) -> Solver:
    def solve(p: Problem) -> Tensor:
        linear = parts.symbol(p.grid, p.q)
        rest = _rest(parts, rhs, p.grid, p.q, linear)
        longest = p.longest(substeps, horizon)
        if parts.order == 2:
            if linear.is_complex():
                raise ValueError("an equation with utt may not have linear terms ux or uxxx")
            return kick_drift_kick(p.initial, p.grid, -linear, rest, p.times, longest)
        if rest is None:
            rest, longest = torch.zeros_like, horizon
        return integrating_factor(p.initial, p.grid, linear, rest, p.times, longest)

    return solve


def _rest(
    parts: Split, rhs: Rhs | None, grid: Grid, q: Mapping[str, Tensor], linear: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """What the linear part leaves over, from the right-hand side or the formula."""
    if rhs is None:
        return parts.nonlinear(grid, q)
    return lambda s: grid.spectrum(rhs(grid.field(s), grid.derivative, q)) - linear * s


def _check_agreement(family: Family, parts: Split, rhs: Rhs | None) -> None:
    """Right-hand side against formula on a smooth field, and a linear part that can be solved."""
    grid = Grid(128)
    q = {name: value[:, None] for name, value in family.at_centres().items()}
    u = 0.5 + 0.3 * torch.sin(torch.pi * grid.x + 0.4) + 0.2 * torch.cos(3 * torch.pi * grid.x)
    spectrum = grid.spectrum(u[None])
    family.solver(Problem(u[None], grid, q, torch.zeros(1, dtype=torch.float64)))
    if rhs is None:
        return
    linear = parts.symbol(grid, q)
    given = grid.spectrum(rhs(u[None], grid.derivative, q))
    rest = parts.nonlinear(grid, q)
    meant = linear * spectrum + (rest(spectrum) if rest else 0)
    difference = float((given - meant).abs().amax() / meant.abs().amax().clamp_min(1e-12))
    if not difference <= _AGREEMENT:
        raise ValueError(
            f"rhs and formula of {family.name} disagree by {difference:.1e} of the larger on a "
            f"smooth field, at most {_AGREEMENT:.0e} is allowed: a sign or a coefficient is wrong"
        )

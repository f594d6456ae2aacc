"""What a family of equations is: formula, parameters with their ranges, solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from stiefel.nn.lemon.expression import Expression, substitute, unknown
from stiefel.nn.lemon.pde.grid import DURATION, Grid
from stiefel.nn.lemon.pde.split import RELABEL, Split, relabelled, split, template
from stiefel.nn.lemon.tokenizer import rounded

STEPS = ("one_shock", "two_shocks", "rarefaction")
"""Initial data that are not periodic; only conservation laws take them."""


@dataclass(frozen=True)
class Parameter:
    """A coefficient of a family and how it is drawn.

    With ``span`` it is uniform in that interval, with ``choices`` one of them, otherwise
    centre·(1 + γ U(−1, 1)). Values outside ``[low, high]`` are refused.
    """

    centre: float | int = 1.0
    low: float | int = -math.inf
    high: float | int = math.inf
    span: tuple[float | int, float | int] | None = None
    choices: tuple[float | int, ...] = ()
    initial: bool = False
    """Of the initial data: drawn for every trajectory, not part of the equation."""

    @property
    def middle(self) -> float:
        """The centre, the middle of the span, or the first choice."""
        if self.choices:
            return float(self.choices[0])
        return sum(self.span) / 2 if self.span else float(self.centre)

    def check(self, name: str, family: str, lowest: float | int, highest: float | int) -> None:
        """Refuse values outside the range.

        Raises:
            ValueError: names the parameter, the values, the range.
        """
        inside = self.low <= lowest <= highest <= self.high  # False for NaN
        if not inside or (self.choices and not {lowest, highest} <= set(self.choices)):
            allowed = (
                f"one of {', '.join(f'{c:g}' for c in self.choices)}"
                if self.choices
                else f"in [{self.low:g}, {self.high:g}]"
            )
            came = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
            raise ValueError(f"{name} of {family} must be {allowed}, got {came}")


@dataclass(frozen=True)
class Problem:
    """What a solver gets; float64, one device."""

    initial: Tensor
    """``[n, N]``."""
    grid: Grid
    q: Mapping[str, Tensor]
    """Coefficients and parameters, ``[n, 1]`` each."""
    times: Tensor
    """``[times]``, equidistant from 0, in the equation's own units."""
    periodic: bool = True
    steps: float | int = 1.0
    """Factor on the usual number of steps."""

    def longest(self, substeps: float | int, horizon: float | int) -> float:
        """The step that gives ``substeps`` per 1/32 of the horizon on 128 points, less on more."""
        return horizon / (32 * substeps * self.steps) * min(1.0, 128 / self.grid.points)


Solver = Callable[[Problem], Tensor]
"""Gives ``[n, times, N]``."""


@dataclass(frozen=True)
class Family:
    """A parametrised equation on x in [0, 2), its solver and the range of its parameters."""

    name: str
    formula: str | Callable[[Mapping[str, float | int]], str]
    """What vanishes, in the equation's own time, e.g. ``"ut - c1*uxx"``."""
    parameters: Mapping[str, Parameter]
    solver: Solver
    method: str
    """The solver in a few words."""
    derive: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    """Coefficients of the formula from the parameters."""
    horizon: float | int = 2.0
    """Final time in the equation's own units."""
    waves: int = 2
    """Largest wave number of initial sines."""
    initial: tuple[str, ...] = ("sines", "gp")
    """Initial data it takes, the usual first."""
    refine: int = 1
    """Points of the solver per point kept, unless told."""
    cells: bool = False
    """Values are averages over cells."""
    convex: bool = True
    """Of a conservation law: falling steps are shocks."""
    bumps: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]] | None = field(
        default=None, repr=False
    )
    """Centre and width of initial bumps from the parameters."""

    def draw(
        self,
        draws: int,
        repeats: int,
        gamma: float | int,
        given: Mapping[str, float | int],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """``draws`` parameter sets, each ``repeats`` times, rounded to three digits; ``[n]`` each.

        Raises:
            KeyError: a given parameter that the family does not have.
            ValueError: a value outside the family's range.
        """
        for name in given:
            if name not in self.parameters:
                raise unknown(f"parameter of {self.name}", name, self.parameters)
        drawn = {}
        for name, p in self.parameters.items():
            n = draws * repeats if p.initial else draws
            chance = torch.rand(n, dtype=torch.float64, generator=generator)
            centre = float(given.get(name, p.centre))
            if name in given and (p.span or p.choices):
                p.check(name, self.name, centre, centre)
                value = torch.full_like(chance, centre)
            elif p.span:
                value = p.span[0] + (p.span[1] - p.span[0]) * chance
            elif p.choices:
                index = (chance * len(p.choices)).long()
                value = torch.tensor(p.choices, dtype=torch.float64)[index]
            else:
                ends = sorted((centre * (1 - gamma), centre * (1 + gamma)))
                p.check(name, self.name, ends[0], ends[1])
                value = centre * (1 + gamma * (2 * chance - 1))
            value = torch.tensor([float(f"{v:.2e}") for v in value.tolist()], dtype=torch.float64)
            drawn[name] = value if p.initial else value.repeat_interleave(repeats)
        return drawn

    def coefficients(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Coefficients of the formula, ``[n]`` each, rounded to what its tokens say.

        Both the solver and the formula use the rounded ones, so data and symbols agree exactly.
        """
        return {
            name: torch.tensor([rounded(v) for v in value.tolist()], dtype=torch.float64)
            for name, value in self.derive(parameters).items()
        }

    def own_time(self, coefficients: Mapping[str, float | int]) -> Expression:
        """The formula's tree in the equation's own time, coefficients by name."""
        text = self.formula if isinstance(self.formula, str) else self.formula(coefficients)
        return template(text, tuple(coefficients))

    @cached_property
    def order(self) -> int:
        """Of the time derivative."""
        return self.taken_apart().order

    def taken_apart(self) -> Split:
        """The formula solved for its time derivative, at the centres of the parameters."""
        q = self.at_centres()
        return split(self.own_time({k: float(v) for k, v in q.items()}), q)

    def at_centres(self) -> dict[str, Tensor]:
        """Coefficients for the centres of all parameters, ``[1]`` each."""
        return self.coefficients(
            {
                name: torch.tensor([p.middle], dtype=torch.float64)
                for name, p in self.parameters.items()
            }
        )

    def expression(self, coefficients: Mapping[str, float | int]) -> Expression:
        """The formula in relabelled time t in [0, 2), with numbers for its coefficients."""
        tree = relabelled(self.own_time(coefficients))
        order = self.order
        scale = (DURATION / self.horizon) ** order
        return substitute(tree, {**coefficients, RELABEL: scale})

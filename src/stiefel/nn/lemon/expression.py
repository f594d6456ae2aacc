"""Equations as trees: numbers, names and operations, printed so that they can be read again."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ARITY = {
    "add": 2, "sub": 2, "mul": 2, "div": 2, "neg": 1, "inv": 1, "sin": 1, "cos": 1,
    "pow": 2, "pow2": 1, "pow3": 1, "exp": 1, "log": 1, "tanh": 1,
}  # fmt: skip
"""Arguments of every operation that trees may hold; the first eleven are those of the paper."""
MAX_DEPTH = 200
"""Levels of a tree: keeps what walks it within Python's recursion limit."""

_SHOWN = 40
_LEVELS = {"add": 1, "sub": 1, "mul": 2, "div": 2, "neg": 3, "pow": 4, "pow2": 4, "pow3": 4}
_ATOM = 5


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number.

    Raises:
        ValueError: NaN or infinite.
    """

    value: float | int

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"a number of an equation must be finite, got {self.value}")

    @property
    def depth(self) -> int:
        """1: a leaf."""
        return 1

    def __str__(self) -> str:
        return f"{self.value:.15g}"


@dataclass(frozen=True, slots=True)
class Name:
    """A field, one of its derivatives, a coordinate or a coefficient."""

    name: str

    @property
    def depth(self) -> int:
        """1: a leaf."""
        return 1

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Call:
    """An operation of :data:`ARITY` on its arguments.

    Raises:
        KeyError: no such operation; names the closest one.
        ValueError: wrong number of arguments, or a tree of more than 200 levels.
    """

    operator: str
    arguments: tuple[Expression, ...]
    depth: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.operator not in ARITY:
            raise unknown("operator", self.operator, ARITY)
        if len(self.arguments) != ARITY[self.operator]:
            raise ValueError(
                f"{self.operator} takes {ARITY[self.operator]} arguments, got {len(self.arguments)}"
            )
        depth = 1 + max(a.depth for a in self.arguments)
        if depth > MAX_DEPTH:
            raise ValueError(f"an equation may be at most {MAX_DEPTH} levels deep")
        object.__setattr__(self, "depth", depth)

    def __str__(self) -> str:
        return _infix(self)


Expression = Number | Name | Call


def unknown(kind: str, word: str, known: Iterable[str]) -> KeyError:
    """A ``KeyError`` that names the word and the closest known one."""
    shown = word if len(word) <= _SHOWN else word[:_SHOWN] + "…"
    names = list(known)
    near = difflib.get_close_matches(word[:_SHOWN], names, n=1, cutoff=0.0)
    closest = f"; the closest known one is {near[0]!r}" if near else "; none is known"
    return KeyError(f"unknown {kind} {shown!r}{closest}")


def prefix(expression: Expression) -> list[Expression]:
    """All nodes, an operation before its arguments (Polish notation)."""
    nodes, stack = [], [expression]
    while stack:
        node = stack.pop()
        nodes.append(node)
        if isinstance(node, Call):
            stack.extend(reversed(node.arguments))
    return nodes


def substitute(expression: Expression, values: Mapping[str, float | int]) -> Expression:
    """The tree with the named coefficients replaced by numbers."""
    if isinstance(expression, Call):
        arguments = tuple(substitute(a, values) for a in expression.arguments)
        return Call(expression.operator, arguments)
    if isinstance(expression, Name) and expression.name in values:
        return Number(float(values[expression.name]))
    return expression


def terms(expression: Expression) -> list[tuple[int, Expression]]:
    """Summands with their signs: ``a - b + c`` gives ``[(1, a), (-1, b), (1, c)]``."""
    if isinstance(expression, Call) and expression.operator in ("add", "sub"):
        left, right = expression.arguments
        sign = 1 if expression.operator == "add" else -1
        return terms(left) + [(sign * s, e) for s, e in terms(right)]
    if isinstance(expression, Call) and expression.operator == "neg":
        return [(-s, e) for s, e in terms(expression.arguments[0])]
    return [(1, expression)]


def factors(expression: Expression) -> list[Expression]:
    """Factors of a product: ``a*b*c`` gives ``[a, b, c]``."""
    if isinstance(expression, Call) and expression.operator == "mul":
        left, right = expression.arguments
        return factors(left) + factors(right)
    return [expression]


def summed(parts: Iterable[tuple[int, Expression]]) -> Expression:
    """The sum of signed terms, associated to the left; a leading minus goes into a number.

    Raises:
        ValueError: no terms.
    """
    total: Expression | None = None
    for sign, part in parts:
        if total is None:
            total = part if sign > 0 else negated(part)
        else:
            total = Call("add" if sign > 0 else "sub", (total, part))
    if total is None:
        raise ValueError("an equation needs at least one term")
    return total


def product(parts: Iterable[Expression]) -> Expression:
    """The product, nested to the right: a·(b·c).

    Raises:
        ValueError: no factors.
    """
    total: Expression | None = None
    for part in reversed(list(parts)):
        total = part if total is None else Call("mul", (part, total))
    if total is None:
        raise ValueError("a product needs at least one factor")
    return total


def negated(expression: Expression) -> Expression:
    """−e, into the number where e is one."""
    if isinstance(expression, Number):
        return Number(-expression.value)
    return Call("neg", (expression,))


_APPLY: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "neg": lambda a: -a, "inv": lambda a: 1 / a,
    "sin": torch.sin, "cos": torch.cos, "exp": torch.exp, "log": torch.log, "tanh": torch.tanh,
    "pow": lambda a, b: a**b, "pow2": lambda a: a * a, "pow3": lambda a: a * a * a,
}  # fmt: skip


def evaluate(expression: Expression, values: Mapping[str, Tensor]) -> Tensor:
    """The value of the tree, elementwise.

    Args:
        expression: The tree.
        values: A tensor for each name in it; they broadcast.

    Raises:
        KeyError: a name without a value.
    """
    if isinstance(expression, Number):
        return torch.tensor(expression.value, dtype=torch.float64)
    if isinstance(expression, Name):
        if expression.name not in values:
            raise unknown("name", expression.name, values)
        return values[expression.name]
    return _APPLY[expression.operator](*(evaluate(a, values) for a in expression.arguments))


def _level(e: Expression) -> int:
    """How tightly the printed form binds."""
    if isinstance(e, Number):
        return 3 if str(e).startswith("-") else _ATOM
    if isinstance(e, Name) or _as_function(e):
        return _ATOM
    return _LEVELS[e.operator]


def _as_function(e: Call) -> bool:
    """Printed as ``name(arguments)``: signs and powers that the parser would read otherwise."""
    if e.operator == "neg":
        return isinstance(e.arguments[0], Number)
    if e.operator == "pow":
        return isinstance(e.arguments[1], Number)
    return e.operator not in _LEVELS


def _infix(e: Expression) -> str:
    """Text that :func:`stiefel.nn.lemon.formula.parse` reads back as the same tree."""
    if not isinstance(e, Call):
        return str(e)

    def at(index: int, level: int) -> str:
        text = _infix(e.arguments[index])
        return text if _level(e.arguments[index]) >= level else f"({text})"

    if _as_function(e):
        return f"{e.operator}({', '.join(_infix(a) for a in e.arguments)})"
    match e.operator:
        case "add":
            return f"{at(0, 1)} + {at(1, 2)}"
        case "sub":
            return f"{at(0, 1)} - {at(1, 2)}"
        case "mul":  # products nest to the right
            right = e.arguments[1]
            nested = isinstance(right, Call) and right.operator == "mul"
            return f"{at(0, 3)}*{at(1, 2 if nested else 3)}"
        case "div":
            return f"{at(0, 2)}/{at(1, 3)}"
        case "neg":
            return f"-{at(0, 3)}"
        case "pow":
            return f"{at(0, _ATOM)}**{at(1, 3)}"
    return f"{at(0, _ATOM)}**{e.operator[-1]}"

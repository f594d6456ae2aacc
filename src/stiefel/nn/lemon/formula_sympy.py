"""SymPy expressions as trees and back; SymPy is imported only when it is used."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from stiefel.nn.lemon.expression import (
    ARITY,
    MAX_DEPTH,
    Call,
    Expression,
    Name,
    Number,
    product,
    summed,
    unknown,
)

_FUNCTIONS = ("sin", "cos", "exp", "log", "tanh")
_SMALL_POWERS = {2: "pow2", 3: "pow3", -1: "inv"}


def from_sympy(formula: Any, names: Collection[str]) -> Expression:
    """The tree of a SymPy expression or equation (left − right), term by term in SymPy's order.

    Symbols are names; so are a field ``u(t, x)`` and its derivatives: ``u(t, x).diff(x, 2)`` is
    ``uxx``. Numbers such as π and 1/3 become floating point.

    Raises:
        KeyError: a symbol or a function that is not known.
        TypeError: something that is no expression of real numbers.
        ValueError: more than 200 levels deep, or a number that is not finite.
    """
    import sympy

    if isinstance(formula, sympy.Equality):
        formula = sympy.Add(formula.lhs, sympy.Mul(-1, formula.rhs))
    if not isinstance(formula, sympy.Expr):
        raise TypeError(f"a formula must be a SymPy expression or Eq, got {type(formula).__name__}")
    return _convert(formula, names, 0)


def to_sympy(expression: Expression) -> Any:
    """The tree as a SymPy expression of real symbols."""
    import sympy

    if isinstance(expression, Number):
        value = float(expression.value)
        return sympy.Integer(int(value)) if value.is_integer() else sympy.Float(value)
    if isinstance(expression, Name):
        return sympy.Symbol(expression.name)
    arguments = [to_sympy(a) for a in expression.arguments]
    match expression.operator:
        case "add":
            return sympy.Add(*arguments)
        case "sub":
            return arguments[0] - arguments[1]
        case "mul":
            return sympy.Mul(*arguments)
        case "div":
            return arguments[0] / arguments[1]
        case "neg":
            return -arguments[0]
        case "inv":
            return 1 / arguments[0]
        case "pow":
            return sympy.Pow(*arguments)
        case "pow2" | "pow3":
            return arguments[0] ** int(expression.operator[-1])
    return getattr(sympy, expression.operator)(*arguments)


def _known(name: str, names: Collection[str]) -> Name:
    if name not in names:
        raise unknown("symbol", name, names)
    return Name(name)


def _convert(e: Any, names: Collection[str], depth: int) -> Expression:
    import sympy
    from sympy.core.function import AppliedUndef

    if depth > MAX_DEPTH:
        raise ValueError(f"an equation may be at most {MAX_DEPTH} levels deep")
    if e.is_number:
        if not e.is_extended_real or not e.is_finite:
            raise ValueError(f"a number of an equation must be real and finite, got {e}")
        return Number(float(e))
    if isinstance(e, sympy.Symbol):
        return _known(e.name, names)
    if isinstance(e, sympy.Derivative) and isinstance(e.expr, AppliedUndef):
        order = "".join(str(v) for v in sorted(map(str, e.variables)))
        return _known(e.expr.func.__name__ + order, names)
    if isinstance(e, AppliedUndef):
        return _known(e.func.__name__, names)
    if isinstance(e, sympy.Add):
        return summed(_signed(a, names, depth + 1) for a in e.as_ordered_terms())
    if isinstance(e, sympy.Mul):
        return product(_convert(a, names, depth + 1) for a in e.as_ordered_factors())
    if isinstance(e, sympy.Pow):
        base = _convert(e.base, names, depth + 1)
        if e.exp in _SMALL_POWERS:
            return Call(_SMALL_POWERS[e.exp], (base,))
        return Call("pow", (base, _convert(e.exp, names, depth + 1)))
    name = type(e).__name__
    if name not in _FUNCTIONS or name not in ARITY:
        raise unknown("operator", name, ARITY)
    return Call(name, (_convert(e.args[0], names, depth + 1),))


def _signed(term: Any, names: Collection[str], depth: int) -> tuple[int, Expression]:
    """The term without its minus sign."""
    if term.could_extract_minus_sign():
        return -1, _convert(-term, names, depth)
    return 1, _convert(term, names, depth)

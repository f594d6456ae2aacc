"""Equations as text: a parser by recursive descent that never evaluates what it reads."""

from __future__ import annotations

import re
from collections.abc import Collection

from stiefel.nn.lemon.expression import (
    ARITY,
    Call,
    Expression,
    Name,
    Number,
    negated,
    product,
    unknown,
)

MAX_CHARACTERS = 10_000
"""Longest text that is read."""
MAX_NESTING = 40
"""Deepest brackets, signs and powers; five Python frames each."""

_WORDS = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<sign>\*\*|[-+*/^(),=]))",
    re.ASCII,
)
_SMALL_POWERS = {2.0: "pow2", 3.0: "pow3", -1.0: "inv"}


def parse(
    text: str, names: Collection[str], operators: Collection[str] | None = None
) -> Expression:
    """The tree of a formula such as ``"ut - 0.003*uxx"``.

    Sums associate to the left, products nest to the right: ``a*b*c`` is a·(b·c). ``**`` and ``^``
    are powers; squares, cubes and reciprocals become ``pow2``, ``pow3`` and ``inv``. One ``=`` is
    allowed: ``left = right`` means left − right. Nothing is evaluated or simplified, except that
    the sign before a number belongs to the number.

    Args:
        text: At most 10,000 characters; ASCII.
        names: What may occur besides numbers and operations.
        operators: Names of operations that may be called, all of them unless told.

    Raises:
        TypeError: ``text`` is no string.
        KeyError: a word that is not known; names the closest one that is.
        ValueError: no formula (the message says where), too long or too deep.
    """
    if not isinstance(text, str):
        raise TypeError(f"a formula must be a string, got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a formula may have {MAX_CHARACTERS} characters at most, got {len(text)}")
    return _Parser(text, names, ARITY if operators is None else operators).equation()


class _Parser:
    """One text, read from left to right."""

    def __init__(self, text: str, names: Collection[str], operators: Collection[str]) -> None:
        self.text, self.names, self.operators = text, names, operators
        self.words: list[tuple[str, str, int]] = []
        self.position = self.nesting = 0
        place = 0
        while text[place:].strip():
            found = _WORDS.match(text, place)
            if not found:
                place += len(text[place:]) - len(text[place:].lstrip())
                raise ValueError(
                    f"cannot read {text[place]!r} at character {place + 1} of the formula"
                )
            self.words.append((str(found.lastgroup), found[str(found.lastgroup)], found.start()))
            place = found.end()

    def error(self, wanted: str) -> ValueError:
        """What stands where ``wanted`` should."""
        if self.position < len(self.words):
            _, word, place = self.words[self.position]
            return ValueError(f"expected {wanted}, got {word[:40]!r} at character {place + 1}")
        return ValueError(f"expected {wanted}, but the formula ends")

    def peek(self) -> str:
        """The next sign, or the kind of the next word in brackets."""
        if self.position == len(self.words):
            return ""
        kind, word, _ = self.words[self.position]
        return word if kind == "sign" else f"<{kind}>"

    def take(self) -> str:
        self.position += 1
        return self.words[self.position - 1][1]

    def expect(self, sign: str) -> None:
        if self.peek() != sign:
            raise self.error(repr(sign))
        self.position += 1

    def equation(self) -> Expression:
        left = self.sum()
        if self.peek() == "=":
            self.take()
            right = self.sum()
            left = left if right == Number(0.0) else Call("sub", (left, right))
        if self.peek():
            raise self.error("an operator or the end")
        return left

    def sum(self) -> Expression:
        total = self.term()
        while self.peek() in ("+", "-"):
            operator = "add" if self.take() == "+" else "sub"
            total = Call(operator, (total, self.term()))
        return total

    def term(self) -> Expression:
        run: list[Expression] = [self.signed()]
        while self.peek() in ("*", "/"):
            if self.take() == "*":
                run.append(self.signed())
            else:
                run = [Call("div", (product(run), self.signed()))]
        return product(run)

    def signed(self) -> Expression:
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise ValueError(f"a formula may nest {MAX_NESTING} levels at most")
        if self.peek() in ("+", "-"):
            result = negated(self.signed()) if self.take() == "-" else self.signed()
        else:
            result = self.power()
        self.nesting -= 1
        return result

    def power(self) -> Expression:
        base = self.atom()
        if self.peek() not in ("**", "^"):
            return base
        self.take()
        exponent = self.signed()
        if isinstance(exponent, Number) and exponent.value in _SMALL_POWERS:
            return Call(_SMALL_POWERS[exponent.value], (base,))
        return Call("pow", (base, exponent))

    def atom(self) -> Expression:
        match self.peek():
            case "<number>":
                return Number(float(self.take()))
            case "<name>":
                name = self.take()
                if self.peek() == "(":
                    return self.call(name)
                if name not in self.names:
                    raise unknown("symbol", name, self.names)
                return Name(name)
            case "(":
                self.take()
                inside = self.sum()
                self.expect(")")
                return inside
        raise self.error("a number, a name or a bracket")

    def call(self, name: str) -> Expression:
        if name not in self.operators or name not in ARITY:
            raise unknown("operator", name, self.operators)
        self.expect("(")
        arguments = [self.sum()]
        while self.peek() == ",":
            self.take()
            arguments.append(self.sum())
        self.expect(")")
        return Call(name, tuple(arguments))

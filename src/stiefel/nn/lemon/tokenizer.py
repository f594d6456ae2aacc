"""Equations as tokens in Polish notation, numbers in a three-digit code.

Source: Sun, Zhang, Schaeffer, arXiv 2408.16168, symbol stream of PROSE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from stiefel.nn.lemon.expression import (
    ARITY,
    Call,
    Expression,
    Name,
    Number,
    prefix,
    unknown,
)
from stiefel.nn.lemon.formula import parse as parse_formula

OPERATORS = ("add", "sub", "mul", "div", "neg", "inv", "sin", "cos", "pow", "pow2", "pow3")
"""Operations of the paper."""
VARIABLES = ("u", "ut", "utt", "ux", "uxx", "uxxx", "uxxxx", "x")
"""Fields and coordinates of the paper."""
LAPTOP_OPERATORS = ("add", "sub", "mul", "sin", "cos", "pow2")
LAPTOP_VARIABLES = ("u", "ut", "utt", "ux", "uxx", "uxxx")
"""What the ten families of the laptop experiment need: 1036 tokens with the padding."""

PAD = "<pad>"
SIGNS = ("+", "-")
EXPONENTS = range(-10, 11)
_COORDINATES = ("x", "y", "z", "t")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(_\d+)?", re.ASCII)


class PolishTokenizer:
    """Formulas to tokens and back.

    A formula is a binary tree in prefix order, terms associated to the left, products nested to
    the right. A number is three tokens: sign, ``N`` and its digits, ``E`` and an exponent of −10
    to 10, its value sign·N·10^E. Fields get the suffix ``_0``. Token 0 is padding.

    >>> tokenizer = PolishTokenizer()
    >>> " ".join(tokenizer.words("ut - 0.003*uxx"))
    'sub ut_0 mul + N300 E-5 uxx_0'
    >>> tokenizer.decode(tokenizer.encode("ut - 0.003*uxx"))
    'ut - 0.003*uxx'

    Args:
        variables: Fields, derivatives, coordinates that formulas may hold.
        operators: Operations they may hold, of add sub mul div neg inv sin cos pow pow2 pow3 exp
            log tanh.
        mantissa_digits: Digits of a number, 1 to 4: 10^digits tokens.
        max_length: Most tokens of one formula.

    Raises:
        KeyError: an operation that does not exist.
        ValueError: a name that is none or occurs twice, digits or length out of range.
    """

    def __init__(
        self,
        variables: Iterable[str] = VARIABLES,
        operators: Iterable[str] = OPERATORS,
        mantissa_digits: int = 3,
        *,
        max_length: int = 512,
    ) -> None:
        self.variables, self.operators = tuple(variables), tuple(operators)
        if not 1 <= mantissa_digits <= 4:
            raise ValueError(f"mantissa_digits must be in 1..4, got {mantissa_digits}")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        for operator in self.operators:
            if operator not in ARITY:
                raise unknown("operator", operator, ARITY)
        for name in self.variables:
            if not _NAME.fullmatch(name) or name in ARITY:
                raise ValueError(
                    f"a variable must be letters and digits, with _0 for its field, got {name!r}"
                )
        self.mantissa_digits, self.max_length = mantissa_digits, max_length
        self._token_of = {name: _with_field(name) for name in self.variables}
        mantissas = (f"N{i:0{mantissa_digits}d}" for i in range(10**mantissa_digits))
        self.vocabulary = (
            PAD, *self.operators, *self._token_of.values(), *SIGNS, *mantissas,
            *(f"E{e}" for e in EXPONENTS),
        )  # fmt: skip
        """All words; the place of a word is its token."""
        self._ids = {word: i for i, word in enumerate(self.vocabulary)}
        if len(self._ids) != len(self.vocabulary) or len(self._token_of) != len(self.variables):
            raise ValueError("variables and operators must not occur twice")
        # Names as they may be written: u and u_0 are one field.
        self._written = {token: name for name, token in self._token_of.items()}
        self._written |= {name: name for name in self.variables}

    def __len__(self) -> int:
        return len(self.vocabulary)

    def __repr__(self) -> str:
        return (
            f"PolishTokenizer({self.variables}, {self.operators}, "
            f"mantissa_digits={self.mantissa_digits}, max_length={self.max_length})"
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, padding included."""
        return len(self.vocabulary)

    @property
    def pad_id(self) -> int:
        """0."""
        return 0

    def parse(self, text: str) -> Expression:
        """The tree of a text, see :func:`stiefel.nn.lemon.formula.parse`.

        Raises:
            KeyError: a name or an operation that this tokenizer does not know.
            ValueError: no formula, too long or too deep.
        """
        return self._renamed(parse_formula(text, self._written, self.operators))

    def words(self, formula: Any) -> list[str]:
        """The formula in Polish notation.

        Args:
            formula: Text, a tree of :meth:`parse`, or a SymPy expression or equation.

        Raises:
            TypeError: none of these.
            KeyError: a name or an operation that this tokenizer does not know.
            ValueError: no formula; more than ``max_length`` tokens; a number above 9.99e12.
        """
        words: list[str] = []
        for node in prefix(self._tree(formula)):
            if isinstance(node, Number):
                words += self.number_words(node.value)
            elif isinstance(node, Name):
                if node.name not in self._token_of:
                    raise unknown("symbol", node.name, self._token_of)
                words.append(self._token_of[node.name])
            elif node.operator not in self.operators:
                raise unknown("operator", node.operator, self.operators)
            else:
                words.append(node.operator)
        if len(words) > self.max_length:
            raise ValueError(
                f"a formula may have {self.max_length} tokens at most, this one has {len(words)}"
            )
        return words

    def encode(self, formula: Any) -> list[int]:
        """Tokens of a text, tree or SymPy expression; see :meth:`words` for what is refused."""
        return [self._ids[word] for word in self.words(formula)]

    def encode_batch(
        self, formulas: Sequence[Any], length: int | None = None
    ) -> Int[Tensor, "formulas length"]:
        """Tokens of several formulas, padded on the right with token 0.

        Args:
            formulas: At least one.
            length: Of all rows; the longest unless told.

        Raises:
            ValueError: no formulas, or one longer than ``length``.
        """
        rows = [self.encode(formula) for formula in formulas]
        if not rows:
            raise ValueError("formulas must hold at least one formula")
        longest = max(map(len, rows))
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"length is {length}, but a formula has {longest} tokens")
        return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int64)

    def decode(self, tokens: Iterable[int | str] | Tensor) -> str:
        """The formula of tokens (or words) as text; padding is left out.

        ``parse`` and ``encode`` read the text back: the same tree, the same tokens, as long as
        numbers are written the way ``encode`` writes them.

        Raises:
            KeyError: an unknown word.
            IndexError: a token outside the vocabulary.
            ValueError: the tokens are not one formula.
        """
        return str(self.tree(tokens))

    def tree(self, tokens: Iterable[int | str] | Tensor) -> Expression:
        """The formula of tokens (or words) as a tree; refuses what :meth:`decode` refuses."""
        if isinstance(tokens, Tensor):
            if tokens.ndim != 1 or tokens.is_floating_point():
                raise ValueError(
                    "tokens must be one row of integers, got shape "
                    f"{tuple(tokens.shape)} of {tokens.dtype}"
                )
            tokens = tokens.tolist()
        words = [word for word in map(self._word, tokens) if word != PAD]
        if len(words) > self.max_length:
            raise ValueError(f"a formula may have {self.max_length} tokens at most")
        names = {token: name for name, token in self._token_of.items()}
        stack: list[Expression | str] = []
        for word in reversed(words):  # arguments come before their operation
            if word in names:
                stack.append(Name(names[word]))
            elif word in SIGNS:
                stack.append(self._number(word, stack))
            elif word in self.operators:
                stack.append(_call(word, stack))
            else:
                stack.append(word)  # digits and exponents wait for their sign
        if len(stack) != 1 or isinstance(stack[0], str):
            raise ValueError(
                f"the tokens must be exactly one formula, they leave {len(stack)} parts"
            )
        return stack[0]

    def number_words(self, value: float | int) -> tuple[str, str, str]:
        """Sign, digits and exponent of a number, rounded to the digits; tiny ones become 0.

        Raises:
            ValueError: not finite, or too large for the largest exponent.
        """
        return number_code(value, self.mantissa_digits)

    def rounded(self, value: float | int) -> float:
        """What a number is after encoding and decoding."""
        return rounded(value, self.mantissa_digits)

    def _tree(self, formula: Any) -> Expression:
        if isinstance(formula, str):
            return self.parse(formula)
        if isinstance(formula, Expression):
            return self._renamed(formula)
        if type(formula).__module__.partition(".")[0] == "sympy":
            from stiefel.nn.lemon.formula_sympy import from_sympy

            return self._renamed(from_sympy(formula, self._written))
        raise TypeError(
            "a formula must be text, a parsed tree or a SymPy expression, "
            f"got {type(formula).__name__}"
        )

    def _renamed(self, e: Expression) -> Expression:
        """u_0 as u."""
        if isinstance(e, Call):
            return Call(e.operator, tuple(self._renamed(a) for a in e.arguments))
        if isinstance(e, Name) and e.name in self._written:
            return Name(self._written[e.name])
        return e

    def _word(self, token: int | str) -> str:
        if isinstance(token, str):
            if token not in self._ids:
                raise unknown("token", token, self._ids)
            return token
        if not 0 <= token < len(self.vocabulary):
            raise IndexError(f"tokens are 0..{len(self.vocabulary) - 1}, got {token}")
        return self.vocabulary[token]

    def _number(self, sign: str, stack: list[Expression | str]) -> Number:
        mantissa = stack.pop() if stack else ""
        exponent = stack.pop() if stack else ""
        if not (
            isinstance(mantissa, str)
            and isinstance(exponent, str)
            and mantissa.startswith("N")
            and exponent.startswith("E")
        ):
            raise ValueError(f"after {sign!r} must come the digits of a number and its exponent")
        return Number(float(f"{sign}{mantissa[1:]}e{exponent[1:]}"))


def number_code(value: float | int, digits: int = 3) -> tuple[str, str, str]:
    """Sign, digits, exponent of a number: .003 is ``("+", "N300", "E-5")``; below 1e-8 it is 0.

    Raises:
        ValueError: not finite, or too large for the largest exponent.
    """
    value = Number(float(value)).value  # refuses what is not finite
    mantissa, exponent = f"{abs(value):.{digits - 1}e}".split("e")
    power = int(exponent) - (digits - 1)
    if power > EXPONENTS[-1]:
        raise ValueError(f"a number may be {10**digits - 1}e{EXPONENTS[-1]} at most, got {value}")
    mantissa = mantissa.replace(".", "")
    if power < EXPONENTS[0] or not int(mantissa):
        return "+", "N" + "0" * digits, "E0"
    return "-" if value < 0 else "+", f"N{mantissa}", f"E{power}"


def rounded(value: float | int, digits: int = 3) -> float:
    """The number that :func:`number_code` stands for."""
    sign, mantissa, exponent = number_code(value, digits)
    return float(f"{sign}{mantissa[1:]}e{exponent[1:]}")


def _with_field(name: str) -> str:
    """u is field 0; coordinates belong to no field."""
    return name if "_" in name or name in _COORDINATES else f"{name}_0"


def _call(operator: str, stack: list[Expression | str]) -> Call:
    arguments: list[Expression] = []
    for _ in range(ARITY[operator]):
        argument = stack.pop() if stack else ""
        if isinstance(argument, str):
            raise ValueError(f"{operator} takes {ARITY[operator]} arguments, some are missing")
        arguments.append(argument)
    return Call(operator, tuple(arguments))

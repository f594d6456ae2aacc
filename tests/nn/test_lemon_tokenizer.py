"""Equations as tokens: the sheet's examples, round trips, hostile text, SymPy."""

import math
import random

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.nn.lemon.expression import (
    ARITY,
    MAX_DEPTH,
    Call,
    Name,
    Number,
    evaluate,
    factors,
    prefix,
    terms,
)
from stiefel.nn.lemon.formula_sympy import from_sympy, to_sympy
from stiefel.nn.lemon.tokenizer import (
    LAPTOP_OPERATORS,
    LAPTOP_VARIABLES,
    OPERATORS,
    VARIABLES,
    PolishTokenizer,
)

TOKENIZER = PolishTokenizer()
BURGERS = "1*ut + 1*u*ux - 0.00318310*uxx"

numbers = st.builds(
    lambda sign, digits, power: Number(float(f"{sign}{digits}e{power}")),
    st.sampled_from("+-"),
    st.integers(100, 999),
    st.integers(-10, 10),
)
leaves = st.one_of(numbers, st.sampled_from([Name(v) for v in VARIABLES]))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        [st.builds(lambda *a, o=o: Call(o, a), *[inner] * ARITY[o]) for o in OPERATORS]
    ),
    max_leaves=25,
)


def spoken(formula, tokenizer=TOKENIZER):
    return " ".join(tokenizer.words(formula))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.003, "+ N300 E-5"), (1, "+ N100 E-2"), (-0.5, "- N500 E-3"), (123.456, "+ N123 E0"),
        (99.96, "+ N100 E0"), (0.0, "+ N000 E0"), (-0.0, "+ N000 E0"), (1e-9, "+ N000 E0"),
        (-1e-9, "+ N000 E0"), (9.99e12, "+ N999 E10"), (1e-8, "+ N100 E-10"),
    ],
)  # fmt: skip
def test_numbers_of_the_sheet(value, words):
    assert " ".join(TOKENIZER.number_words(value)) == words


def test_rounded_numbers_of_the_sheet():
    assert TOKENIZER.rounded(0.00318310) == 0.00318
    assert TOKENIZER.rounded(1e-9) == 0.0
    assert TOKENIZER.decode(TOKENIZER.encode("0.00318310")) == "0.00318"
    assert TOKENIZER.decode(TOKENIZER.encode("1e-9")) == "0"


def test_formulas_of_the_sheet():
    assert spoken("1*ut - 0.003*uxx") == "sub mul + N100 E-2 ut_0 mul + N300 E-5 uxx_0"
    burgers = "sub add mul + N100 E-2 ut_0 mul + N100 E-2 mul u_0 ux_0 mul + N318 E-5 uxx_0"
    assert spoken(BURGERS) == burgers
    assert len(TOKENIZER.encode(BURGERS)) == 19


def test_klein_gordon_has_the_signs_of_its_equation():
    """The sheet's example, ``sub add …``, reads 4u_tt + u_xx − .01u, which waves do not solve."""
    sheet = "sub add mul + N400 E-2 utt_0 mul + N100 E-2 uxx_0 mul + N100 E-4 u_0"
    assert TOKENIZER.decode(sheet.split()) == "4*utt + 1*uxx - 0.01*u"
    right = "add sub mul + N400 E-2 utt_0 mul + N100 E-2 uxx_0 mul + N100 E-4 u_0"
    assert spoken("4*utt - 1*uxx + 0.01*u") == right


def test_vocabulary_of_the_sheet():
    laptop = PolishTokenizer(LAPTOP_VARIABLES, LAPTOP_OPERATORS)
    assert len(laptop) == laptop.vocab_size == 1036
    numeric = [w for w in TOKENIZER.vocabulary if w in "+-" or w[0] in "NE"]
    assert len(numeric) == 1023
    assert len(TOKENIZER) == 1023 + len(OPERATORS) + len(VARIABLES) + 1
    assert TOKENIZER.vocabulary[TOKENIZER.pad_id] == "<pad>"


@given(trees)
def test_every_tree_survives_tokens_and_text(tree):
    tokens = TOKENIZER.encode(tree)
    assert TOKENIZER.tree(tokens) == tree
    text = TOKENIZER.decode(tokens)
    assert TOKENIZER.parse(text) == tree
    assert TOKENIZER.encode(text) == tokens


@pytest.mark.parametrize(
    "text",
    ["u*(ux/x)", "u/(ux*x)", "u/(ux/x)", "(u*ux)*x", "u*ux/x", "u - (ux - x)", "u - (ux + x)",
     "(u + ux)*x", "-(u*ux)", "-u*ux", "(-u)**2", "-u**2", "(u**2)**3", "u**-x", "u**x**ux",
     "u - -2", "neg(2)*u", "pow(u, 2)", "inv(u)**2", "sin(u + ux)*cos(-x)"],
)  # fmt: skip
def test_brackets_are_kept_where_they_matter(text):
    tree = TOKENIZER.parse(text)
    assert TOKENIZER.parse(str(tree)) == tree


@given(st.floats(-9e10, 9e10), st.integers(1, 4))
def test_numbers_are_rounded_to_their_digits(value, digits):
    tokenizer = PolishTokenizer(("u",), ("mul",), digits)
    read = tokenizer.tree(tokenizer.encode(Number(value))).value
    assert read == tokenizer.rounded(value)
    smallest = 10.0 ** (-10 + digits - 1)
    assert abs(read - value) <= max(0.5 * 10 ** (1 - digits) * abs(value) * (1 + 1e-9), smallest)


def test_terms_associate_to_the_left_and_products_to_the_right():
    assert TOKENIZER.parse("u - ux + uxx") == Call(
        "add", (Call("sub", (Name("u"), Name("ux"))), Name("uxx"))
    )
    assert TOKENIZER.parse("u*ux*uxx") == Call(
        "mul", (Name("u"), Call("mul", (Name("ux"), Name("uxx"))))
    )
    assert [s for s, _ in terms(TOKENIZER.parse("u - (ux - uxx) + -x"))] == [1, -1, 1, -1]
    assert factors(TOKENIZER.parse("2*(u*ux)*x")) == [Number(2.0), Name("u"), Name("ux"), Name("x")]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-u**2", -4.0), ("2**3**2*u", 1024.0), ("u/4/2", 0.25), ("u*6/4*x", 9.0), ("--u", 2.0),
        ("3 - 2 - 1", 0.0), ("2*-u", -4.0), ("u^-1", 0.5), ("-2**2", -4.0), ("ux = u", 1.0),
        ("sin(u)*inv(u)", math.sin(2) / 2), ("+u - -1", 3.0), ("pow(u, 0.5)**2", 2.0),
        (".5e1*u_0", 10.0), ("(u - 1)*(u + 1)", 3.0),
    ],
)  # fmt: skip
def test_text_means_what_python_means(text, value):
    values = {name: torch.tensor(float(v)) for name, v in {"u": 2, "ux": 3, "x": 3}.items()}
    torch.testing.assert_close(float(evaluate(TOKENIZER.parse(text), values)), value)


@pytest.mark.parametrize(
    ("formula", "named", "closest"),
    [
        ("ut - 0.1*uxy", "uxy", "ux"), ("ut - sinus(u)", "sinus", "sin"), ("v", "v", ""),
        ("__import__(u)", "__import__", ""), ("exp(u)", "exp", ""), ("ut_1", "ut_1", "ut"),
        ("mul", "mul", ""), ("N100", "N100", ""),
    ],
)  # fmt: skip
def test_unknown_words_are_named_with_the_closest_known_one(formula, named, closest):
    with pytest.raises(
        KeyError, match=rf"unknown (symbol|operator) '{named}'.*closest.*'{closest}"
    ):
        TOKENIZER.encode(formula)


@pytest.mark.parametrize(
    ("formula", "error", "message"),
    [
        ("", ValueError, "formula ends"), ("u +", ValueError, "formula ends"),
        ("u u", ValueError, "character 2"), ("(u", ValueError, r"expected '\)'"),
        ("u = u = u", ValueError, "got '='"), ("1e999", ValueError, "finite"),
        ("1e300", ValueError, "999e10 at most"), ("u; u", ValueError, "cannot read ';'"),
        ("sin()", ValueError, "expected a number"), ("pow(u)", ValueError, "takes 2"),
        ("sin(u, u)", ValueError, "takes 1"), ("u\0", ValueError, "cannot read"),
        ("__import__('os')", ValueError, "cannot read"),
        ("١٢*u", ValueError, "cannot read"), ("(" * 5000 + "u", ValueError, "nest 40"),
        ("-" * 9000 + "u", ValueError, "nest 40"), ("u**" * 3000 + "u", ValueError, "nest 40"),
        ("u+" * 3000 + "u", ValueError, f"{MAX_DEPTH} levels"),
        ("u*" * 3000 + "u", ValueError, f"{MAX_DEPTH} levels"),
        ("(" + "1*u*ux+" * 110 + "u)*(" + "1*u*ux+" * 110 + "u)", ValueError, "512 tokens"),
        ("u" * 9999, KeyError, "u…"), ("u" * 10_001, ValueError, "10000 characters"),
        (3, TypeError, "got int"), (None, TypeError, "NoneType"), (b"u", TypeError, "bytes"),
    ],
)  # fmt: skip
def test_what_is_no_formula_is_refused(formula, error, message):
    with pytest.raises(error, match=message):
        TOKENIZER.encode(formula)


@given(
    st.one_of(
        st.text(max_size=60),
        st.text("ux0123.e+-*/^(),=sincopw_ \n", max_size=60),
        st.lists(
            st.sampled_from(["u", "ux", "(", ")", "+", "-", "*", "/", "**", "2", "sin(", ","])
        ).map("".join),
    )
)
@settings(max_examples=300)
def test_any_text_is_a_formula_or_refused(text):
    try:
        tokens = TOKENIZER.encode(text)
    except (ValueError, KeyError):
        return
    assert TOKENIZER.encode(TOKENIZER.decode(tokens)) == tokens


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12))
@settings(max_examples=300)
def test_any_tokens_are_a_formula_or_refused(tokens):
    try:
        tree = TOKENIZER.tree(tokens)
    except ValueError:
        return
    assert len(prefix(tree)) <= len(tokens)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], ValueError, "leave 0"), (["u_0", "u_0"], ValueError, "leave 2"),
        (["mul", "u_0"], ValueError, "mul takes 2"), (["+", "N100"], ValueError, "digits"),
        (["+", "E0", "N100"], ValueError, "digits"), (["N100"], ValueError, "leave 1"),
        (["sin", "N100"], ValueError, "sin takes 1"), (["tan"], KeyError, "'tan'.*'sin'|'tan'"),
        ([5000], IndexError, r"0\.\.1042"), ([-1], IndexError, "got -1"),
        (["neg"] * 300 + ["u_0"], ValueError, "200 levels"), (["neg"] * 600, ValueError, "512"),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, "one row"),
        (torch.zeros(3), ValueError, "one row of integers"),
    ],
)  # fmt: skip
def test_tokens_that_are_no_formula_are_refused(tokens, error, message):
    with pytest.raises(error, match=message):
        TOKENIZER.decode(tokens)


def test_batches_are_padded_on_the_right_and_padding_is_skipped():
    batch = TOKENIZER.encode_batch(["u", BURGERS])
    assert batch.shape == (2, 19)
    assert batch.dtype == torch.int64
    assert batch[0, 1:].eq(TOKENIZER.pad_id).all()
    assert [TOKENIZER.decode(row) for row in batch] == ["u", "1*ut + 1*u*ux - 0.00318*uxx"]
    assert TOKENIZER.encode_batch(["u"], 7).shape == (1, 7)
    with pytest.raises(ValueError, match="length is 3"):
        TOKENIZER.encode_batch([BURGERS], 3)
    with pytest.raises(ValueError, match="at least one"):
        TOKENIZER.encode_batch([])


def test_fields_of_a_system_keep_their_number():
    tokenizer = PolishTokenizer(("u", "u_1", "ut", "x"), ("mul", "add"))
    assert spoken("u_0*u_1 + x*ut", tokenizer) == "add mul u_0 u_1 mul x ut_0"
    with pytest.raises(KeyError, match="'u_2'"):
        tokenizer.encode("u_2")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"operators": ("mul", "tan")}, KeyError, "'tan'"),
        ({"variables": ("u", "u")}, ValueError, "twice"),
        ({"variables": ("u", "u_0")}, ValueError, "twice"),
        ({"variables": ("sin",)}, ValueError, "'sin'"),
        ({"variables": ("u-x",)}, ValueError, "u-x"),
        ({"mantissa_digits": 0}, ValueError, "1..4"),
        ({"max_length": 0}, ValueError, "at least 1"),
    ],
)
def test_bad_vocabularies_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        PolishTokenizer(**arguments)


def test_sympy_expressions_and_derivatives():
    x, t = sympy.symbols("x t")
    u = sympy.Function("u")(t, x)
    burgers = sympy.Eq(u.diff(t) + u * u.diff(x), sympy.Rational(3, 1000) * u.diff(x, 2))
    words = TOKENIZER.words(burgers)
    expected = ["sub", "add", "ut_0", "mul", "u_0", "ux_0", "mul", "+", "N300", "E-5", "uxx_0"]
    assert sorted(words) == sorted(expected)
    assert TOKENIZER.decode(TOKENIZER.encode(sympy.pi * sympy.Symbol("u"))) == "3.14*u"
    with pytest.raises(KeyError, match="tan"):
        TOKENIZER.encode(sympy.tan(sympy.Symbol("u")))
    with pytest.raises(KeyError, match="'w'"):
        TOKENIZER.encode(sympy.Symbol("w") + 1)
    for wrong in (sympy.I * sympy.Symbol("u"), sympy.oo, sympy.nan, sympy.zoo):
        with pytest.raises(ValueError, match="real and finite"):
            TOKENIZER.encode(wrong)
    with pytest.raises(TypeError, match="SymPy"):
        TOKENIZER.encode(sympy.Matrix([1]))


def test_sympy_agrees_in_value_with_the_tree():
    random.seed(0)
    values = {name: random.uniform(0.5, 2) for name in VARIABLES}
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    for text in (
        "u**2*ux/3 - sin(u)*cos(x) + inv(u)",
        "-(u - ux)**3 + 2**u",
        BURGERS,
        "neg(pow2(u))",
    ):
        tree = TOKENIZER.parse(text)
        there = to_sympy(tree)
        expected = float(evaluate(tree, tensors))
        assert float(there.subs(values)) == pytest.approx(expected, rel=1e-12)
        back = from_sympy(there, VARIABLES)
        assert float(evaluate(back, tensors)) == pytest.approx(expected, rel=1e-12)


def test_deep_sympy_expressions_are_refused():
    e = sympy.Symbol("u")
    for _ in range(250):
        e = sympy.sin(e, evaluate=False)
    with pytest.raises(ValueError, match="levels deep"):
        TOKENIZER.encode(e)

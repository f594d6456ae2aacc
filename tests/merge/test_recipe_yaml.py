"""YAML of recipes: bounded, safe, with lines."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stiefel.merge.recipe_errors import RecipeError
from stiefel.merge.recipe_yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES, parse_yaml

TEXT = """models:
  - model: ./ft_math
  - model: ./ft_code
    parameters: {weight: [0.2, 0.8]}
merge_method: ties
"""


def deep(levels):
    return "a: " + "[" * levels + "]" * levels


def bomb():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("- a\n", "got a sequence"),
        ("a: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", "line 2: a: this key stands twice"),
        ("1: 2\n", "a key must be a word"),
        ("? [a]\n: 2\n", "a key must be a word"),
        ("a: !!python/object/apply:os.system [ls]\n", "tag"),
        ("a: !!python/name:os.system\n", "tag"),
        ("a: !mine x\n", "tag"),
        ("a: !!set {x}\n", "tag"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "merge keys"),
        ("a: &x [*x]\n", "stands inside what it repeats"),
        ("a: *nothing\n", "not valid YAML"),
        ("a: 2020-99-99\n", "cannot be read"),
        ("a: b\x00\n", "not valid YAML"),
        (deep(MAX_DEPTH), f"nested more than {MAX_DEPTH} deep"),
        (deep(100_000), f"nested more than {MAX_DEPTH} deep"),
        (bomb(), f"more than {MAX_NODES} values"),
        ("a: [" + "1," * MAX_NODES + "]", f"more than {MAX_NODES} values"),
        ("a: " + "x" * MAX_BYTES, f"at most {MAX_BYTES}"),
    ],
)
def test_yaml_is_bounded_and_safe(text, said):
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text)
    assert said in str(caught.value)


def test_lines_of_keys_are_known():
    document = parse_yaml(TEXT)
    assert document.line(("models", 1, "parameters", "weight")) == 4
    assert document.line(("models", 1, "parameters", "weight", "nothing")) == 4
    assert document.line(()) is None
    assert document.content == yaml.safe_load(TEXT)


SCALARS = st.one_of(st.booleans(), st.integers(-99, 99), st.text("abc", max_size=3), st.none())
TREES = st.dictionaries(
    st.text("xyz", min_size=1, max_size=3).map("k".__add__),
    st.recursive(
        SCALARS,
        lambda t: st.one_of(
            st.lists(t, max_size=3), st.dictionaries(st.just("q").map(str), t, max_size=1)
        ),
        max_leaves=8,
    ),
    min_size=1,
    max_size=4,
)


@given(TREES)
def test_yaml_agrees_with_the_safe_loader(tree):
    text = yaml.safe_dump(tree)
    assert parse_yaml(text).content == yaml.safe_load(text)

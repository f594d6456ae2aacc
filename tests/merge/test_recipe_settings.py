"""What settings resolve to: gradients over layers, filters, precedence."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiefel.merge.recipe_settings import Parameter, Rule, at_layer, parse_setting, resolve

NUMBER = Parameter("weight", float, required=True, each=True)


def test_the_first_matching_rule_counts():
    setting = parse_setting(
        NUMBER, [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.5}, {"value": 9}]
    )
    places = ({"weight": setting},)
    assert resolve(NUMBER, places, "layers.0.self_attn.q_proj", 0.25) == 0.25
    assert resolve(NUMBER, places, "layers.0.mlp.up_proj", 0.25) == 0.5


def test_inner_places_go_first_and_silent_ones_are_passed_over():
    inner = {"weight": parse_setting(NUMBER, {"filter": "mlp", "value": 1})}
    outer = {"weight": parse_setting(NUMBER, "1e-3")}
    assert resolve(NUMBER, (inner, outer), "mlp.up", 0) == 1
    assert resolve(NUMBER, (inner, outer), "attn.q", 0) == 0.001
    with pytest.raises(LookupError):
        resolve(NUMBER, (inner,), "attn.q", 0)
    assert resolve(Parameter("weight", float, default=7.0), (inner,), "attn.q", 0) == 7


FINITE = st.floats(-1e6, 1e6)
FRACTION = st.floats(0, 1)


@given(st.lists(FINITE, min_size=1, max_size=6), FRACTION)
def test_gradients_are_straight_between_their_anchors(anchors, t):
    """Against the definition: the polygon through (i / (n - 1), anchor i)."""
    value = at_layer(tuple(anchors), t)
    assert min(anchors) - 1e-6 <= value <= max(anchors) + 1e-6
    n = len(anchors)
    expected = anchors[0]
    for i in range(n - 1):
        left, right = i / (n - 1), (i + 1) / (n - 1)
        if left <= t <= right:
            expected = anchors[i] + (anchors[i + 1] - anchors[i]) * (t - left) * (n - 1)
    assert value == pytest.approx(expected, abs=1e-6, rel=1e-9)


@given(st.lists(FINITE, min_size=1, max_size=6), st.integers(0, 5))
def test_gradients_hit_their_anchors(anchors, i):
    i %= len(anchors)
    t = i / (len(anchors) - 1) if len(anchors) > 1 else 0.3
    assert at_layer(tuple(anchors), t) == pytest.approx(anchors[i], rel=1e-9, abs=1e-6)


@given(st.lists(st.sampled_from(["G", "C"]), min_size=1, max_size=5), FRACTION)
def test_words_are_chosen_not_mixed(words, t):
    assert at_layer(tuple(words), t) == words[int(t * (len(words) - 1))]


RULES = st.lists(
    st.tuples(st.sampled_from([None, "*", "a", "ab", "b.c", "zz"]), FINITE), max_size=4
)


@given(st.lists(RULES, max_size=4), st.sampled_from(["ab.c", "zz", "q", "b"]), st.booleans())
def test_resolving_is_the_first_hit_of_a_plain_search(places, tensor, required):
    parameter = Parameter("weight", float, default=None if required else -1.0, required=required)
    raw = [[{"filter": f, "value": v} for f, v in rules] for rules in places]
    settings = [{"weight": parse_setting(parameter, rules)} if rules else {} for rules in raw]
    hits = [v for rules in places for f, v in rules if f in (None, "*") or f in tensor]
    if not hits and required:
        with pytest.raises(LookupError):
            resolve(parameter, settings, tensor, 0)
    else:
        assert resolve(parameter, settings, tensor, 0) == (hits[0] if hits else -1.0)


@given(st.one_of(st.none(), st.text(max_size=4), st.booleans(), st.lists(st.none(), max_size=2)))
def test_nothing_but_numbers_is_a_number(raw):
    try:
        expected = float(raw) if isinstance(raw, str) else math.nan
    except ValueError:
        expected = math.nan
    if math.isfinite(expected):
        assert parse_setting(NUMBER, raw) == (Rule(expected),)
    else:
        with pytest.raises(ValueError, match=r"must be a finite number|an empty list"):
            parse_setting(NUMBER, raw)

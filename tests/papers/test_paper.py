"""Claims, verdicts and the statistics behind them."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from stiefel.papers.paper import Claim, Measurement, Paper, Verdict, mean_interval

numbers = st.floats(-1e6, 1e6)


def measured(*values):
    return [Measurement(seed, {"m": value}) for seed, value in enumerate(values)]


def verdict(claim, *values):
    return claim.judge(measured(*values)).verdict


at_most = Claim("small", "m", at_most=1.0)
at_least = Claim("large", "m", at_least=1.0)


@given(st.lists(numbers, min_size=2, max_size=12), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_is_scipys(values, confidence):
    mean, lo, hi = mean_interval(values, confidence)
    error = stats.sem(values)
    scale = max(map(abs, values), default=0.0) + 1e-300
    assert mean == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-9 * scale)
    if error > 1e-12 * scale:
        want = stats.t.interval(confidence, len(values) - 1, loc=mean, scale=error)
        assert (lo, hi) == pytest.approx(want, rel=1e-7, abs=1e-7 * scale)


def test_interval_of_three_by_hand():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.302653
    mean, lo, hi = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert hi - 2.0 == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert 2.0 - lo == pytest.approx(4.302652729911275 / math.sqrt(3))


@given(st.lists(numbers, min_size=2, max_size=8))
def test_interval_holds_the_mean_and_the_mean_lies_among_the_values(values):
    mean, lo, hi = mean_interval(values)
    assert lo <= mean <= hi
    assert min(values) <= mean <= max(values)


def test_interval_without_spread_is_a_point_and_without_values_the_line():
    assert mean_interval([0.1, 0.1, 0.1]) == (0.1, 0.1, 0.1)
    assert mean_interval([5.0]) == (5.0, -math.inf, math.inf)
    mean, lo, hi = mean_interval([])
    assert math.isnan(mean)
    assert (lo, hi) == (-math.inf, math.inf)


def test_interval_of_infinities():
    inf = math.inf
    assert mean_interval([inf, inf]) == (inf, inf, inf)
    assert mean_interval([-inf, -inf]) == (-inf, -inf, -inf)
    for mixed in ([inf, 1.0], [inf, -inf], [math.nan, 1.0]):
        mean, lo, hi = mean_interval(mixed)
        assert math.isnan(mean)
        assert (lo, hi) == (-inf, inf)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 95])
def test_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got"):
        mean_interval([1.0, 2.0], confidence)


def test_verdict_follows_the_whole_interval():
    assert verdict(at_most, 0.5, 0.51, 0.49) is Verdict.REPRODUCED
    assert verdict(at_most, 1.5, 1.51, 1.49) is Verdict.NOT_REPRODUCED
    # Mean 0.9 keeps the bound, the interval (0.9 ± 4.3 · 0.1) does not.
    assert verdict(at_most, 0.8, 1.0, 0.9) is Verdict.INCONCLUSIVE
    assert verdict(at_least, 1.5, 1.51, 1.49) is Verdict.REPRODUCED
    assert verdict(at_least, 0.5, 0.51, 0.49) is Verdict.NOT_REPRODUCED
    assert verdict(at_least, 1.0, 1.2, 1.1) is Verdict.INCONCLUSIVE


def test_the_bound_itself_keeps_the_claim():
    above, below = math.nextafter(1.0, 2.0), math.nextafter(1.0, 0.0)
    assert verdict(at_most, 1.0, 1.0) is Verdict.REPRODUCED
    assert verdict(at_most, above, above) is Verdict.NOT_REPRODUCED
    assert verdict(at_least, 1.0, 1.0) is Verdict.REPRODUCED
    assert verdict(at_least, below, below) is Verdict.NOT_REPRODUCED
    # Three times 0.1 sums to more than 0.3 in floating point; the mean must stay 0.1.
    assert verdict(Claim("x", "m", at_most=0.1), 0.1, 0.1, 0.1) is Verdict.REPRODUCED


def test_verdict_where_the_interval_touches_the_bound():
    hi = mean_interval([1.0, 2.0, 3.0])[2]
    lo = mean_interval([1.0, 2.0, 3.0])[1]
    assert verdict(Claim("x", "m", at_most=hi), 1.0, 2.0, 3.0) is Verdict.REPRODUCED
    just_below = Claim("x", "m", at_most=math.nextafter(hi, 0))
    assert verdict(just_below, 1.0, 2.0, 3.0) is Verdict.INCONCLUSIVE
    assert verdict(Claim("x", "m", at_most=lo), 1.0, 2.0, 3.0) is Verdict.INCONCLUSIVE
    beyond = Claim("x", "m", at_most=math.nextafter(lo, -9))
    assert verdict(beyond, 1.0, 2.0, 3.0) is Verdict.NOT_REPRODUCED


def test_too_little_is_inconclusive_and_never_reaching_it_is_not():
    assert verdict(at_most, 0.1) is Verdict.INCONCLUSIVE
    assert verdict(at_most) is Verdict.INCONCLUSIVE
    assert verdict(at_most, 0.1, math.nan) is Verdict.INCONCLUSIVE
    assert verdict(at_most, 0.1, math.inf) is Verdict.INCONCLUSIVE
    assert verdict(at_most, math.inf, math.inf) is Verdict.NOT_REPRODUCED
    assert verdict(at_least, math.inf, math.inf) is Verdict.REPRODUCED


@given(st.lists(numbers, min_size=2, max_size=6), numbers)
def test_at_least_is_at_most_mirrored(values, bound):
    assume(max(values) - min(values) > 1e-6 or len(set(values)) == 1)
    mirrored = [-v for v in values]
    assert verdict(Claim("x", "m", at_most=bound), *values) is verdict(
        Claim("x", "m", at_least=-bound), *mirrored
    )


@given(st.lists(numbers, min_size=2, max_size=6), numbers, st.floats(0, 1e3))
def test_a_weaker_claim_is_never_judged_worse(values, bound, slack):
    order = [Verdict.NOT_REPRODUCED, Verdict.INCONCLUSIVE, Verdict.REPRODUCED]
    strict = verdict(Claim("x", "m", at_most=bound), *values)
    weak = verdict(Claim("x", "m", at_most=bound + slack), *values)
    assert order.index(weak) >= order.index(strict)


def test_claim_needs_exactly_one_bound():
    for bounds in ({}, {"at_most": 1.0, "at_least": 0.0}):
        with pytest.raises(ValueError, match="exactly one of at_most and at_least"):
            Claim("x", "m", **bounds)
    assert (at_most.bound, at_most.relation) == (1.0, "≤")
    assert (at_least.bound, at_least.relation) == (1.0, "≥")
    assert Claim("zero", "m", at_most=0.0).bound == 0.0


def test_missing_metric_names_what_is_there():
    with pytest.raises(KeyError, match="seed 3 has no metric 'm'; it has a, b"):
        at_most.judge([Measurement(3, {"a": 1.0, "b": 2.0})])


def paper(**changes):
    fields = {
        "slug": "a-paper",
        "title": "T",
        "authors": "A",
        "published": "2025-10",
        "arxiv": "2510.00001",
        "code": None,
        "topic": "t",
        "summary": "s",
        "claim": at_most,
        "experiment": measured,
        "figure": measured,
        "snippet": "x",
    }
    return Paper(**{**fields, **changes})


def test_a_paper_judges_its_headline_first():
    judged = paper(others=(at_least,)).judge(measured(0.5, 0.5))
    assert [j.claim for j in judged] == [at_most, at_least]
    assert [j.verdict for j in judged] == [Verdict.REPRODUCED, Verdict.NOT_REPRODUCED]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slug", "../escape"),
        ("slug", "Upper"),
        ("slug", ""),
        ("slug", "a--b"),
        ("published", "October 2025"),
        ("code", "javascript:alert(1)"),
    ],
)
def test_a_paper_refuses_what_would_break_files_or_links(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        paper(**{field: value})

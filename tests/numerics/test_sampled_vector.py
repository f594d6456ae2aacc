import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from stiefel.numerics.sampled import ComplexEstimate, Estimate, SampledVector, combine
from stiefel.numerics.sampled.vector import RowCombination, draw_in_segments

X = np.array([1, -2, 3, 0.5])
Y = np.array([2.0, 1, 0, -4])


def same_law(found, weights):
    counts = np.bincount(found, minlength=len(weights))
    assert not counts[weights == 0].any()
    kept = weights > 0
    expected = counts.sum() * weights[kept] / weights.sum()
    return chisquare(counts[kept], expected).pvalue > 1e-3


def test_sheet_inner_product():
    """⟨x, y⟩ = −2; one draw has mean −2 and variance ‖x‖²‖y‖² − ⟨x, y⟩² = 295.25."""
    v = SampledVector(X)
    assert v.norm2 == 14.25
    z = v.norm2 * Y / X
    p = X**2 / v.norm2
    assert z @ p == pytest.approx(-2, abs=1e-14)
    assert (z - z @ p) ** 2 @ p == pytest.approx(295.25, abs=1e-12)
    draws = v.sample(200_000, 0)
    assert z[draws].var() == pytest.approx(295.25, rel=0.02)
    found = v.inner(Y, 0.05, 0.1, generator=0)
    assert isinstance(found, Estimate)
    # ⌈6 ln 20⌉ = 18 means of ⌈9/ε²⌉ = 3,600 draws: within ε ‖x‖ ‖y‖, and far more than 4 entries.
    assert found.guarantee.draws == 18 * 3600
    assert abs(found + 2) < 0.05 * math.sqrt(14.25 * 21)
    assert found.bound == 0.05
    assert found.vacuous
    assert "Vacuous" in str(found.guarantee)
    long = SampledVector(np.ones(100_000)).inner(np.ones(100_000), 0.5, 0.5, generator=0)
    assert not long.vacuous
    assert long == pytest.approx(100_000)


def test_inner_product_keeps_its_promise():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 50))
    v = SampledVector(x)
    errors = [abs(v.inner(y, 0.3, 0.2, rng) - x @ y) for _ in range(100)]
    size = 0.3 * np.linalg.norm(x) * np.linalg.norm(y)
    assert np.mean(np.array(errors) > size) <= 0.2


def test_complex_inner_product_conjugates_the_first():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 30)) + 1j * rng.standard_normal((2, 30))
    found = SampledVector(x).inner(torch.from_numpy(y), 0.05, generator=1)
    assert isinstance(found, ComplexEstimate)
    size = np.linalg.norm(x) * np.linalg.norm(y)
    assert abs(found - np.vdot(x, y)) < 0.05 * size


def test_a_vector_draws_by_its_squares_and_follows_updates():
    rng = np.random.default_rng(0)
    given_ = rng.standard_normal(200) * (rng.random(200) < 0.5)
    kept = given_.copy()
    v = SampledVector(given_)
    assert same_law(v.sample(5000, rng), given_**2)
    assert v.acceptance == 1
    assert v.phi == pytest.approx(1)
    v.update([3, 100], [5.0, 0.0])
    now = kept.copy()
    now[[3, 100]] = 5, 0
    np.testing.assert_array_equal(v.query(np.arange(200)), now)
    np.testing.assert_array_equal(given_, kept)  # the caller's own is left alone
    assert v.norm2 == pytest.approx((now**2).sum())
    assert same_law(v.sample(5000, rng), now**2)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_combination(kind):
    rng = np.random.default_rng(0)
    shape = (4, 12)
    rows, coefficients = rng.standard_normal(shape), rng.standard_normal(4)
    rows[:, 5] = 0
    if kind == "complex":
        rows = rows + 1j * rng.standard_normal(shape)
        coefficients = coefficients * np.exp(1j * np.arange(4))
    u = coefficients @ rows
    weights2 = 4 * np.abs(coefficients) ** 2 @ np.abs(rows) ** 2
    both = combine(coefficients, rows), RowCombination(coefficients, rows)
    for c in both:
        np.testing.assert_allclose(c.dense(), u)
        np.testing.assert_allclose(c.query([7, 2]), u[[7, 2]])
        np.testing.assert_allclose(c.weight2(np.arange(12)), weights2)
        assert (weights2 >= np.abs(u) ** 2 - 1e-12).all()
        assert c.weight_norm2 == pytest.approx(weights2.sum())
        # The closure rule: φ = τ Σ ‖λ_t v_t‖² / ‖u‖².
        parts = np.abs(coefficients) ** 2 * (np.abs(rows) ** 2).sum(1)
        assert c.phi == pytest.approx(4 * parts.sum() / (np.abs(u) ** 2).sum())
        assert same_law(c.propose(5000, rng), weights2)
        assert same_law(c.sample(5000, rng), np.abs(u) ** 2)
        assert c.acceptance == pytest.approx(1 / c.phi, rel=0.1)
        assert c.estimate_norm2(0.1, 0.01, rng) == pytest.approx(c.norm2, rel=0.1)


def test_combinations_of_combinations():
    """φ of a combination enters the φ of what it is combined into."""
    rng = np.random.default_rng(2)
    a, b, e = rng.standard_normal((3, 9))
    inner = combine([1.0, -0.5], [a, b])
    outer = combine([2.0, 3.0], [inner, SampledVector(e)])
    u = 2 * (a - 0.5 * b) + 3 * e
    np.testing.assert_allclose(outer.dense(), u)
    expected = 2 * (inner.phi * 4 * inner.norm2 + 9 * (e**2).sum()) / (u**2).sum()
    assert outer.phi == pytest.approx(expected)
    assert same_law(outer.sample(4000, rng), u**2)


def test_cancellation_is_an_error_not_an_endless_loop():
    v = np.array([1.0, 2.0, 3.0])
    nothing = combine([1.0, -1.0], [v, v])
    assert nothing.phi == math.inf
    with pytest.raises(RuntimeError, match="cancel"):
        nothing.sample(2, 0)
    with pytest.raises(RuntimeError, match="cancel"):
        nothing.estimate_norm2(generator=0)
    nearly = combine([1.0, -1.0], [v, v * (1 + 1e-3)])
    with pytest.raises(RuntimeError, match="max_trials"):
        nearly.sample(1, 0, max_trials=10)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_segments_are_kept_to(seed, segments, width):
    rng = np.random.default_rng(seed)
    weights = rng.random((segments, width)) * (rng.random((segments, width)) < 0.6)
    weights[:, rng.integers(width)] = 10.0 ** rng.integers(-9, 9, segments)
    which = rng.integers(segments, size=200)
    starts = np.arange(0, weights.size + 1, width)
    found = draw_in_segments(weights.ravel().cumsum(), starts, which, rng)
    assert (found // width == which).mean() > 0.99  # rounding of tiny segments beside huge ones
    assert (weights.ravel()[found] > 0).all()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SampledVector([1, np.nan]), ValueError, "v must be finite"),
        (lambda: SampledVector(np.ones((2, 2))), ValueError, "must be a vector"),
        (lambda: SampledVector([]), ValueError, "must be a vector"),
        (lambda: SampledVector(["a"]), TypeError, "must hold numbers"),
        (lambda: SampledVector([1e200]), ValueError, "beyond float64"),
        (lambda: SampledVector([0.0, 0.0]).sample(1), ValueError, "zero vector"),
        (lambda: SampledVector(X).sample(0), ValueError, "n must be an integer ≥ 1"),
        (lambda: SampledVector(X).query([4]), IndexError, "must be in 0 … 3"),
        (lambda: SampledVector(X).inner(Y[:3]), ValueError, "4 entries"),
        (lambda: SampledVector(X).inner(Y, eps=0), ValueError, "eps must be between 0 and 1"),
        (lambda: SampledVector(X).inner(Y, delta=1), ValueError, "delta must be between"),
        (lambda: SampledVector(X).inner([1, 2, np.inf, 3]), ValueError, "finite"),
        (lambda: SampledVector(X).estimate_norm2(nu=2), ValueError, "nu must be between"),
        (lambda: SampledVector(X).update([0, 0], [1, 2]), ValueError, "different entries"),
        (lambda: SampledVector(X).update([0], [np.nan]), ValueError, "finite"),
        (lambda: SampledVector(X).update([0], [1j]), TypeError, "complex values"),
        (lambda: SampledVector(X).update([9], [1.0]), IndexError, "must be in"),
        (lambda: combine([1.0], []), ValueError, "at least one vector"),
        (lambda: combine([1.0, 2.0], [X]), ValueError, "one number for each"),
        (lambda: combine([1.0, 2.0], [X, Y[:2]]), ValueError, "one length"),
        (lambda: combine([np.nan], [X]), ValueError, "coeffs must be finite"),
    ],
)  # fmt: skip
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()

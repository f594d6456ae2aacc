import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stiefel.numerics import keep_largest, soft_threshold

CODES = arrays(np.float64, (4, 6), elements=st.floats(-9, 9))


@given(codes=CODES, k=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_keeps_the_largest(codes, k):
    before = codes.copy()
    kept = keep_largest(codes, k)
    np.testing.assert_array_equal(codes, before)
    for row, out in zip(codes, kept, strict=True):
        order = np.sort(np.abs(row))[::-1]
        np.testing.assert_array_equal(np.sort(np.abs(out))[::-1][:k], order[:k])
        assert np.count_nonzero(out) <= k
        assert set(out) <= set(row) | {0.0}


def test_exactly_k_of_equals_and_in_place():
    codes = np.array([[1.0, -1.0, 1.0, 1.0]])
    assert np.count_nonzero(keep_largest(codes, 2)) == 2
    assert keep_largest(codes, 3, copy=False) is codes
    assert np.count_nonzero(codes) == 3


@given(codes=CODES, tau=st.floats(0, 5))
@settings(max_examples=40, deadline=None)
def test_soft_threshold_minimises_its_objective(codes, tau):
    found = soft_threshold(codes, tau)

    def objective(x):
        return 0.5 * (codes - x) ** 2 + tau * np.abs(x)

    for other in np.linspace(-9, 9, 37):
        assert (objective(found) <= objective(other) + 1e-9).all()


def test_soft_threshold_by_coefficient_and_sample():
    codes = np.array([[3.0, -3.0], [1.0, 0.5]], dtype=np.float32)
    by_coefficient = soft_threshold(codes, np.array([1.0, 2.0]))
    np.testing.assert_array_equal(by_coefficient, [[2, -1], [0, 0]])
    assert by_coefficient.dtype == np.float32
    np.testing.assert_array_equal(soft_threshold(codes, np.array([[1.0], [0.5]]))[1], [0.5, 0])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: keep_largest(np.ones((2, 3)), 0), r"k must be in 1\.\.3"),
        (lambda: keep_largest(np.ones((2, 3)), 4), r"k must be in 1\.\.3"),
        (lambda: keep_largest(np.ones(3), 1), r"shape \(N, n\)"),
        (lambda: keep_largest(np.full((1, 2), np.nan), 1), "NaN"),
        (lambda: keep_largest(np.ones((1, 2), dtype=complex), 1), "must be real"),
        (lambda: soft_threshold(np.ones((2, 3)), -0.1), "at least 0"),
        (lambda: soft_threshold(np.ones((2, 3)), float("nan")), "at least 0"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()

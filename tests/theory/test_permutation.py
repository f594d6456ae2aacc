import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from scipy.special import comb
from scipy.stats import norm

from stiefel.theory import ensemble_size, nonzero_inputs, ntk_relu, permutation_moments
from stiefel.theory.permutation import AUTO_STEP, REGIMES, auto_step, spectrum

# Sheet, "Exact test values": (k, n) to (μ_on, μ_off, σ²).
SHEET = {
    ("ntk", 3, 2): (0.5570974077, -0.0181746693, 0.0223263120),
    ("ntk", 5, 2): (0.5606322403, -0.0146398367, 0.0132346846),
    ("ntk", 5, 3): (0.4110783617, -0.0320237747, 0.0190863182),
    ("ntk", 10, 4): (0.3393813420, -0.0316865635, 0.0109776193),
    ("ntk", 20, 20): (0.0703239543, -0.0769382603, 0.0116182638),
    ("last_layer", 3, 2): (0.5862750060, -0.0549243747, 0.0219546577),
    ("last_layer", 5, 2): (0.6016565538, -0.0395428268, 0.0128766868),
    ("last_layer", 5, 3): (0.4321396723, -0.0715712630, 0.0187743116),
    ("last_layer", 10, 4): (0.3683006945, -0.0581216475, 0.0106913474),
    ("last_layer", 20, 20): (0.0621611337, -0.1135709323, 0.0113834577),
}
# Sheet, table of ensemble sizes at δ = 0.1: NTK single, all; last layer single, all.
SIZES = {
    5: (205, 455, 28, 61),
    8: (284, 670, 46, 108),
    10: (333, 801, 58, 139),
    20: (579, 1469, 121, 307),
    32: (894, 2330, 204, 532),
    64: (1814, 4866, 449, 1204),
    128: (3854, 10564, 997, 2732),
    1024: (39967, 113875, 10764, 30805),
}


def dense(k, n, regime, t=None, lr=None):
    """Mean and variance by linear algebra on the k basis vectors and one input with n ones."""
    eye = torch.eye(k, dtype=torch.float64)
    x = torch.zeros(1, k, dtype=torch.float64)
    x[0, :n] = n**-0.5
    kind = "ntk" if regime == "ntk" else "nngp"
    theta, theta_x = ntk_relu(eye, kind=kind), ntk_relu(eye, x, kind=kind)
    start, start_x = ntk_relu(eye, kind="nngp"), ntk_relu(eye, x, kind="nngp")
    if t is not None:
        # scipy's: torch's keeps only ten digits at small norms.
        theta_x = theta_x - torch.from_numpy(expm(-lr * t * theta.numpy())) @ theta_x
    a = torch.linalg.solve(theta, theta_x)
    var = ntk_relu(x, kind="nngp") + a.T @ start @ a - 2 * a.T @ start_x
    return a[:, 0], float(var)


def exceeds_reference(k, members, delta, regime):
    """Union bound above δ: term by term, without logarithms."""
    total = 0.0
    for n in range(2, k + 1):
        on, off, var = (float(v) for v in permutation_moments(k, n, regime=regime))
        root = math.sqrt(members / var)
        total += comb(k, n) * (n * norm.sf(on * root) + (k - n) * norm.sf(-off * root))
    return total > delta


@pytest.mark.parametrize(("case", "expected"), SHEET.items(), ids=str)
def test_values_of_the_sheet(case, expected):
    regime, k, n = case
    values = [float(v) for v in permutation_moments(k, n, regime=regime)]
    assert values == pytest.approx(expected, abs=1.01e-10)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("k", [2, 3, 7, 12])
def test_closed_form_equals_dense_linear_algebra(regime, k):
    for n in range(1, k + 1):
        a, var = dense(k, n, regime)
        on, off, sigma2 = (float(v) for v in permutation_moments(k, n, regime=regime))
        expected = torch.tensor([on] * n + [off] * (k - n), dtype=torch.float64)
        torch.testing.assert_close(a, expected, rtol=0, atol=1e-12)
        assert sigma2 == pytest.approx(var, abs=1e-12)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("t", [0, 0.5, 7, 300])
def test_finite_time_equals_the_matrix_exponential(regime, t):
    k, lr = 6, 0.3
    for n in range(1, k + 1):
        a, var = dense(k, n, regime, t, lr)
        on, off, sigma2 = (float(v) for v in permutation_moments(k, n, regime=regime, t=t, lr=lr))
        assert on == pytest.approx(float(a[0]), abs=1e-12)
        if n < k:
            assert off == pytest.approx(float(a[-1]), abs=1e-12)
        assert sigma2 == pytest.approx(var, abs=1e-12)


def test_time_starts_at_the_random_network_and_ends_at_the_limit():
    on, off, var = permutation_moments(9, range(1, 10), t=0)
    torch.testing.assert_close(on, torch.zeros(9).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(off, torch.zeros(9).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(var, torch.full((9,), 0.5 / 9).double())
    torch.testing.assert_close(
        permutation_moments(9, range(1, 10), t=1e4), permutation_moments(9, range(1, 10))
    )
    by_default = permutation_moments(9, 3, t=5)
    assert by_default == permutation_moments(9, 3, t=5, lr=AUTO_STEP * 9 / spectrum(9, "ntk")[1])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 3000), st.sampled_from(REGIMES))
def test_the_sign_is_the_answer(k, regime):
    n = np.arange(1, k + 1)
    on, off, var = permutation_moments(k, n, regime=regime)
    assert (float(on[0]), float(off[0]), float(var[0])) == (1.0, 0.0, 0.0)
    assert bool((on[1:] > 0).all())
    assert bool((off[1:] < 0).all())
    assert bool((var[1:] > 0).all())
    assert int((-off[1:]).argmin()) == 0  # two ones have the smallest margin


@pytest.mark.parametrize(("regime", "part"), [("ntk", 0.15), ("last_layer", 0.27)])
def test_smallest_margin_in_units_of_1_over_k(regime, part):
    same, cross, f = (
        (1.0, 1 / (2 * math.pi), 0.642869625)
        if regime == "ntk"
        else (0.5, 1 / (2 * math.pi), 0.377704582)
    )
    limit = 2 * (f - cross) / (same - cross) - 1  # 0.1505 and 0.2824; the sheet rounds k = 64
    assert limit == pytest.approx(part, abs=0.013)
    off = permutation_moments(10**7, 2, regime=regime)[1]
    assert -(10**7) * float(off) == pytest.approx(limit, abs=1e-6)


def test_counts_of_any_kind_and_shape():
    grid = torch.tensor([[2, 3], [4, 5]])
    values = permutation_moments(6, grid)
    for given_counts in (grid.numpy(), grid.int(), grid.short()):
        torch.testing.assert_close(permutation_moments(6, given_counts), values, rtol=0, atol=0)
    for v in values:
        assert (v.shape, v.dtype) == ((2, 2), torch.float64)
    assert permutation_moments(6, 2)[0].shape == ()
    assert permutation_moments(6, [2, 3])[1].tolist() == values[1][0].tolist()


@pytest.mark.parametrize(("k", "expected"), SIZES.items())
def test_ensemble_sizes_of_the_sheet(k, expected):
    found = [
        ensemble_size(k, n_ones=n_ones, regime=regime)
        for regime in REGIMES
        for n_ones in (2, "all")
    ]
    assert tuple(found) == expected


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("delta", [1e-12, 0.01, 0.7])
def test_all_inputs_is_the_smallest_size_that_keeps_the_bound(regime, delta):
    for k in (2, 3, 9):
        size = ensemble_size(k, delta, n_ones="all", regime=regime)
        assert not exceeds_reference(k, size, delta, regime)
        assert size == 1 or exceeds_reference(k, size - 1, delta, regime)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 200),
    st.floats(1e-9, 0.999),
    st.sampled_from(REGIMES),
    st.data(),
)
def test_one_input_is_the_smallest_size_that_succeeds(k, delta, regime, data):
    n = data.draw(st.integers(2, k))
    size = ensemble_size(k, delta, n_ones=n, regime=regime)
    on, off, var = (float(v) for v in permutation_moments(k, n, regime=regime))

    def success(members):
        root = math.sqrt(members / var)
        return norm.cdf(on * root) ** n * norm.cdf(-off * root) ** (k - n)

    assert success(size) >= (1 - delta) * (1 - 1e-12)
    assert size == 1 or success(size - 1) < (1 - delta) * (1 + 1e-12)


def test_sizes_fall_with_delta_and_a_training_input_needs_one():
    for n_ones in (2, "all"):
        sizes = [ensemble_size(12, d, n_ones=n_ones) for d in (1e-200, 1e-3, 0.1, 0.9, 1 - 1e-12)]
        assert sizes == sorted(sizes, reverse=True)
    assert ensemble_size(12, n_ones=1) == 1


def test_growth_is_far_below_quadratic():
    for regime, slope in (("ntk", 1.137), ("last_layer", 1.169)):
        ratio = (
            SIZES[1024][REGIMES.index(regime) * 2 + 1] / SIZES[64][REGIMES.index(regime) * 2 + 1]
        )
        assert math.log(ratio) / math.log(16) == pytest.approx(slope, abs=1e-3)


def test_single_input_success_by_sampling(generator):
    k, n, delta = 8, 3, 0.3
    size = ensemble_size(k, delta, n_ones=n)
    on, off, var = permutation_moments(k, n)
    mean = torch.where(torch.arange(k) < n, on, off)
    draws = mean + (var / size).sqrt() * torch.randn(40_000, k, generator=generator).double()
    right = ((draws > 0) == (torch.arange(k) < n)).all(1).double().mean()
    assert 1 - delta - 0.01 < float(right) < 1 - delta + 0.02


def test_nonzero_inputs_are_the_bits_of_1_to_2_to_the_k():
    rows = nonzero_inputs(9)
    assert rows.dtype == torch.uint8
    expected = [[int(c) for c in f"{i:09b}"] for i in range(1, 512)]
    assert rows.tolist() == expected
    assert nonzero_inputs(2).tolist() == [[0, 1], [1, 0], [1, 1]]


def test_bad_input():
    for bad in (1, 0, -3):
        for function in (lambda k: permutation_moments(k, 1), ensemble_size, nonzero_inputs):
            with pytest.raises(ValueError, match=f"at least 2 bits, got {bad}"):
                function(bad)
    for bad in (0, 6, [2, 7]):
        with pytest.raises(ValueError, match=r"n_ones must lie in 1\.\.5"):
            permutation_moments(5, bad)
    with pytest.raises(ValueError, match=r"n_ones must lie in 1\.\.5"):
        ensemble_size(5, n_ones=6)
    with pytest.raises(ValueError, match='"all"'):
        ensemble_size(5, n_ones="each")
    for bad in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="delta must lie strictly"):
            ensemble_size(5, float(bad))
    with pytest.raises(ValueError, match="regime must be one of"):
        permutation_moments(5, 2, regime="nngp")
    with pytest.raises(TypeError, match="n_ones must be integer"):
        permutation_moments(5, torch.tensor([2.0]))
    for bad in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match="t must be finite"):
            permutation_moments(5, 2, t=bad)
    for regime in REGIMES:
        limit = 2 * auto_step(5, regime) / AUTO_STEP
        permutation_moments(5, 2, regime=regime, t=1, lr=limit * (1 - 1e-9))
        for bad in (limit, 0, -1, math.nan, math.inf):
            with pytest.raises(ValueError, match="below 2k/D"):
                permutation_moments(5, 2, regime=regime, t=1, lr=bad)
    with pytest.raises(ValueError, match="k = 40 bits do not fit"):
        nonzero_inputs(40)

"""The Weibull line: values of the sheet, parity with the official package, invariance, merging."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.diagnose import (
    MagnitudeCounts,
    NonFiniteError,
    fit_magnitudes,
    half_normal_anchor,
    spread,
    weibull_fit,
    weibull_fit_counts,
    weibull_mean,
    weibull_quantile,
    weibull_std,
)


def half_normal(n, dtype=torch.float64):
    """Its quantiles at (i − ½)/n."""
    f = (torch.arange(1, n + 1, dtype=torch.float64) - 0.5) / n
    return torch.special.ndtri((1 + f) / 2).to(dtype)


def gaussian(n, seed=0, scale=0.02):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, n).astype(np.float32))


class TestAnchors:
    @pytest.mark.parametrize(
        ("trim", "family", "k", "lam", "r2"),
        [
            (0.8, "normal", 1.20543431901745, 0.887487039832, 0.997740367),
            (0.9, "normal", 1.190922610, 0.880887883, None),
            (0.8, "uniform", 1.375118805, 0.607365597, 0.983),
            (0.8, "truncnorm", 1.227173712, 0.830310252, None),
            (0.8, "laplace", 1.0, 1.0, 1.0),
        ],
    )
    def test_values_of_the_sheet(self, trim, family, k, lam, r2):
        anchor = half_normal_anchor(trim, family)
        assert anchor.k == pytest.approx(k, abs=1e-8)
        assert anchor.lam == pytest.approx(lam, abs=1e-8)
        if r2 is not None:
            assert anchor.r2 == pytest.approx(r2, abs=1e-3)

    @pytest.mark.parametrize("family", ["normal", "uniform", "truncnorm", "laplace"])
    def test_they_are_the_limit_of_large_samples(self, family):
        f = (torch.arange(1, 200_001, dtype=torch.float64) - 0.5) / 200_000
        values = {
            "normal": torch.special.ndtri((1 + f) / 2),
            "uniform": f,
            "laplace": -torch.log1p(-f),
            "truncnorm": torch.special.ndtri(0.5 + f * (torch.special.ndtr(f.new_tensor(2)) - 0.5)),
        }[family]
        fit, anchor = weibull_fit(values, method="exact"), half_normal_anchor(family=family)
        assert fit.k == pytest.approx(anchor.k, abs=1e-5)
        assert fit.lam == pytest.approx(anchor.lam, abs=1e-5)

    def test_other_families_and_trims_are_refused(self):
        with pytest.raises(ValueError, match="family must be one of normal"):
            half_normal_anchor(family="cauchy")
        for trim in (0.0, 1.1, math.nan):
            with pytest.raises(ValueError, match="trim must be in"):
                half_normal_anchor(trim)


class TestExact:
    def test_values_of_the_sheet(self):
        fit = weibull_fit(torch.arange(1, 11, dtype=torch.float64) / 10, min_count=5)
        assert (fit.k, fit.lam) == pytest.approx((1.5898214711, 0.6589969733), abs=1e-9)
        assert fit.r2 == pytest.approx(0.9908265625, abs=1e-9)
        assert (fit.n, fit.n_used) == (10, 8)
        fit = weibull_fit(torch.arange(1, 6, dtype=torch.float64), min_count=5)
        assert (fit.k, fit.lam) == pytest.approx((1.8563205124, 3.4578791141), abs=1e-9)
        fit = weibull_fit(half_normal(1000))
        assert (fit.k, fit.lam) == pytest.approx((1.2054346249, 0.8874870451), abs=1e-9)

    def test_a_weibull_is_found_exactly(self):
        f = (torch.arange(1, 1001, dtype=torch.float64) - 0.5) / 1000
        fit = weibull_fit(3 * (-torch.log1p(-f)) ** (1 / 0.8))
        assert (fit.k, fit.lam, fit.r2) == pytest.approx((0.8, 3, 1), abs=1e-12)
        assert fit.ks == pytest.approx(0.0005, abs=1e-9)

    @given(st.integers(0, 9999), st.floats(1e-20, 1e20))
    @settings(max_examples=30, deadline=None)
    def test_scale_order_and_sign_do_not_matter(self, seed, factor):
        w = torch.randn(20, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        base = weibull_fit(w)
        scaled = weibull_fit(-factor * w)
        assert scaled.k == pytest.approx(base.k, rel=1e-11)
        assert scaled.lam == pytest.approx(factor * base.lam, rel=1e-11)
        assert weibull_fit(w.T) == base
        flipped = w.flatten()[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
        assert weibull_fit(flipped) == base

    def test_ties_share_the_mean_of_their_places(self):
        """Both copies of a value at the mean of their two places, as counting would have it."""
        w = half_normal(500)
        twice = weibull_fit(torch.cat([w, w]))
        middle = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
        used = (middle >= 0.1) & (middle <= 0.9)
        slope, _ = np.polyfit(w[used].log(), (-torch.log1p(-middle[used])).log(), 1)
        assert twice.k == pytest.approx(slope, rel=1e-10)


class TestBits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_agrees_with_the_sorted_fit(self, dtype):
        w = gaussian(300_000).to(dtype)
        bits, exact = weibull_fit(w, method="bits"), weibull_fit(w, method="exact")
        # Half types lose nothing: every bin is one number.
        lossless = dtype in (torch.bfloat16, torch.float16)
        assert bits.k == pytest.approx(exact.k, abs=1e-10 if lossless else 1e-3)
        assert bits.lam == pytest.approx(exact.lam, rel=1e-10 if lossless else 1e-3)

    @pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e20])
    def test_any_scale(self, scale):
        w = half_normal(200_000).float() * scale
        fit = weibull_fit(w, method="bits")
        assert fit.k == pytest.approx(half_normal_anchor().k, abs=1e-3)
        assert fit.lam / scale == pytest.approx(half_normal_anchor().lam, rel=1e-3)

    @given(st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.integers(0, 99))
    @settings(max_examples=20, deadline=None)
    def test_parts_add_up_to_the_whole(self, sizes, seed):
        w = gaussian(sum(sizes), seed)
        whole = MagnitudeCounts.empty(w.dtype).update(w)
        total = MagnitudeCounts.empty(w.dtype)
        for part in w.split(sizes):
            total = total + MagnitudeCounts.empty(w.dtype).update(part)
        assert torch.equal(total.counts, whole.counts)
        assert whole.total == len(w)

    def test_every_number_lies_in_its_bin(self):
        w = torch.cat([gaussian(1000), torch.tensor([1e-38, 3.4e38, 1e-30, 65504.0])]).abs()
        values, mass = MagnitudeCounts.empty(w.dtype).update(w).bins()
        assert int(mass.sum()) == len(w)
        nearest = (w.double()[:, None] / values).log().abs().amin(1)
        assert float(nearest.max()) < 0.004  # half of 2⁻⁷

    def test_the_largest_numbers_are_finite_though_they_round_up(self):
        w = torch.tensor([3.4e38, -3.402e38, 1.0, math.inf])
        counts = MagnitudeCounts.empty(w.dtype).update(w)
        assert counts.nonfinite == 1
        assert int(counts.bins()[1].sum()) == 3

    def test_zeros_and_odd_numbers_are_counted_apart(self):
        w = torch.cat([gaussian(5000), torch.zeros(1000), torch.tensor([math.inf, math.nan])])
        counts = MagnitudeCounts.empty(w.dtype).update(w)
        assert (counts.zeros, counts.nonfinite, counts.total) == (1000, 2, 6002)
        fit = fit_magnitudes(counts, nonfinite="drop")
        assert fit.zero_fraction == pytest.approx(1 / 6)
        assert fit.n == 5000

    def test_counts_of_other_types_do_not_mix(self):
        counts = MagnitudeCounts.empty(torch.float32)
        with pytest.raises(TypeError, match="different bins"):
            counts + MagnitudeCounts.empty(torch.float16)
        with pytest.raises(TypeError, match=r"of torch.bfloat16, got torch.float16"):
            counts.update(torch.ones(3, dtype=torch.float16))
        with pytest.raises(TypeError, match="dequantised"):
            MagnitudeCounts.empty(torch.float8_e4m3fn)


class TestOfficialProtocol:
    def test_values_of_the_sheet(self):
        fit = weibull_fit(gaussian(200_000), method="npm")
        assert (fit.k, fit.lam) == pytest.approx((1.205798, 0.017784), abs=1e-6)
        assert (fit.r2, fit.ks) == pytest.approx((0.997662, 0.028711), abs=1e-6)
        assert fit.n_used == 82

    def test_it_stays_near_the_exact_fit(self):
        w = gaussian(100_000, 3)
        assert weibull_fit(w, method="npm").k == pytest.approx(weibull_fit(w).k, abs=3e-3)

    def test_trim_of_everything_has_no_nan(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            fit = weibull_fit(gaussian(5000), method="npm", trim=1.0)
        assert fit.ok is False or math.isfinite(fit.k)


class TestCountsOfOthers:
    def test_expected_counts_of_a_weibull(self):
        edges = torch.logspace(-6, 2, 4001, dtype=torch.float64)
        mass = (-torch.expm1(-((edges / 0.05) ** 1.1))).diff()
        fit = weibull_fit_counts(1e6 * mass, edges)
        assert (fit.k, fit.lam) == pytest.approx((1.1, 0.05), rel=1e-4)

    def test_bins_in_the_way_of_the_official_package(self):
        """Expected counts of a half normal of σ = 0.02: the figures of the sheet, but the guard."""
        edges = 10 ** torch.linspace(-12, 2, 1025, dtype=torch.float64)
        below = torch.special.erf(edges / 0.02 / math.sqrt(2))
        centre = (edges[1:] * edges[:-1]).sqrt()
        fit = weibull_fit_counts(1e6 * below.diff(), centre)
        assert fit.k == pytest.approx(1.2052475324, abs=1e-8)
        assert fit.lam / 0.02 == pytest.approx(0.8878746117, abs=1e-8)
        assert fit.r2 == pytest.approx(0.99778328, abs=1e-7)
        assert fit.n_used == 81

    @pytest.mark.parametrize(
        ("counts", "edges", "message"),
        [
            ([1, 2], [1.0, 2.0, 3.0, 4.0], "as many entries"),
            ([1, 2], [2.0, 1.0], "ascending"),
            ([1, 2], [-1.0, 1.0], "not negative"),
            ([1, -2], [1.0, 2.0], "counts must be finite and not negative"),
        ],
    )
    def test_bad_histograms(self, counts, edges, message):
        with pytest.raises(ValueError, match=message):
            weibull_fit_counts(torch.tensor(counts), torch.tensor(edges))


class TestPoorInput:
    def test_too_few_entries_are_not_fitted_but_told(self):
        fit = weibull_fit(torch.ones(99))
        assert not fit.ok
        assert "99 non-zero entries, at least 100" in fit.reason
        assert math.isnan(fit.k)

    @pytest.mark.parametrize("method", ["exact", "bits", "npm"])
    @pytest.mark.parametrize("w", [torch.ones(1000), torch.zeros(1000), torch.empty(0)])
    def test_constant_zero_and_empty(self, method, w):
        fit = weibull_fit(w, method=method)
        assert not fit.ok
        assert fit.reason

    def test_pruning_shows_only_in_the_zeros(self):
        w = gaussian(100_000)
        w[torch.randperm(100_000)[:50_000]] = 0
        fit = weibull_fit(w)
        assert fit.k == pytest.approx(1.206, abs=0.01)
        assert fit.zero_fraction == pytest.approx(0.5)

    @pytest.mark.parametrize("method", ["exact", "bits", "npm"])
    def test_nan_and_infinity_are_refused_or_dropped(self, method):
        w = torch.cat([gaussian(500), torch.tensor([math.nan, math.inf])])
        with pytest.raises(NonFiniteError, match="2 of its 502 entries"):
            weibull_fit(w, method=method)
        assert weibull_fit(w, method=method, nonfinite="drop").n == 500

    def test_other_types_and_options(self):
        for w in (torch.ones(5, dtype=torch.int64), torch.ones(5, dtype=torch.complex64)):
            with pytest.raises(TypeError, match="floating"):
                weibull_fit(w)
        with pytest.raises(ValueError, match="method must be one of"):
            weibull_fit(torch.ones(5), method="mle")
        with pytest.raises(ValueError, match="nonfinite must be"):
            weibull_fit(torch.ones(5), nonfinite="ignore")
        with pytest.raises(ValueError, match="trim must be in"):
            weibull_fit(torch.ones(5), trim=0.0)


def test_the_standard_error_is_that_of_repetitions():
    ks = [weibull_fit(gaussian(10_000, seed)).k for seed in range(60)]
    assert np.std(ks) == pytest.approx(weibull_fit(gaussian(10_000)).se_k, rel=0.3)


def test_closed_forms():
    assert weibull_std(2, 1) == pytest.approx(0.4632513752, abs=1e-10)
    assert weibull_quantile(1.2054, 0.8875, 0.9) == pytest.approx(1.7728114383, abs=1e-9)
    assert weibull_mean(1, 3) == pytest.approx(3)
    with pytest.raises(ValueError, match="q must be in"):
        weibull_quantile(1, 1, 1.0)


def test_spread_of_a_gaussian_and_of_a_weibull():
    w = gaussian(200_000)
    ours = spread(MagnitudeCounts.empty(w.dtype).update(w))
    sizes = np.sort(w.abs().numpy().astype(np.float64))
    q = np.quantile(sizes, [0.1, 0.5, 0.9, 0.99, 0.999])
    assert ours.q90_q10 == pytest.approx(q[2] / q[0], rel=0.01)
    assert ours.q99_q50 == pytest.approx(q[3] / q[1], rel=0.01)
    assert ours.p999_p50 == pytest.approx(q[4] / q[1], rel=0.01)
    n = len(sizes)
    gini = (2 * np.arange(1, n + 1) - n - 1) @ sizes / (n * sizes.sum())
    assert ours.gini == pytest.approx(gini, abs=1e-4)
    assert ours.gini == pytest.approx(0.413904, abs=1e-4)
    f = (torch.arange(1, 100_001, dtype=torch.float64) - 0.5) / 100_000
    w = (-torch.log1p(-f)) ** (1 / 0.9)
    ratio = (math.log(0.1) / math.log(0.9)) ** (1 / 0.9)
    counts = MagnitudeCounts.empty(torch.float32).update(w.float())
    assert spread(counts).q90_q10 == pytest.approx(ratio, rel=0.01)
    with pytest.raises(ValueError, match="no finite non-zero"):
        spread(MagnitudeCounts.empty(torch.float32).update(torch.zeros(5)))

"""Cosine moments without pairs, capacity formulas, packings, histograms of overlaps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.diagnose import (
    CosineMoments,
    accepted_deviation,
    capacity,
    cosine_moments,
    fit_capacity,
    log10_capacity,
    min_dimension,
    overlap_histogram,
    pack_directions,
    welch_bound,
    worst_case_overlap,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_pairs(e):
    u = torch.nn.functional.normalize(e.double())
    cosines = (u @ u.T)[*torch.triu_indices(len(u), len(u), 1)]
    return (
        float(cosines.mean()),
        float(cosines.std(correction=min(1, len(cosines) - 1))),
        float(cosines.abs().max()),
    )


class TestMoments:
    def test_values_of_the_sheet(self):
        stats = cosine_moments(torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.float64))
        assert (stats.mean, stats.std) == pytest.approx((0.4714045208, 0.4082482905), abs=1e-10)
        assert stats.eps == pytest.approx(1.2879011017, abs=1e-10)
        e = torch.cat([torch.diag(torch.tensor([1.0, 2, 3])), torch.zeros(1, 3), torch.ones(1, 3)])
        stats = cosine_moments(e.double())
        assert (stats.k, stats.dropped_rows) == (4, 1)
        assert (stats.mean, stats.std) == pytest.approx((0.2886751346, 0.3162277660), abs=1e-10)
        assert stats.eps == pytest.approx(0.9211306666, abs=1e-10)
        e = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 32)))
        stats = cosine_moments(e)
        assert stats.mean == pytest.approx(-2.7875882e-05, abs=1e-11)
        assert stats.std == pytest.approx(0.1771080071, abs=1e-10)
        stats = cosine_moments(e + 0.5)
        assert (stats.mean, stats.std) == pytest.approx((0.2015947308, 0.1670520168), abs=1e-10)
        assert accepted_deviation(e + 0.5) == pytest.approx(0.5356987644, abs=1e-10)

    @given(st.integers(2, 40), st.integers(1, 12), st.integers(1, 50), st.integers(0, 999))
    @settings(max_examples=40, deadline=None)
    def test_equals_all_pairs(self, k, d, chunk, seed):
        e = draw(k, d, seed=seed)
        stats = cosine_moments(e, chunk=chunk)
        mean, std, _ = by_pairs(e)
        assert stats.mean == pytest.approx(mean, abs=1e-10)
        if k > 2:
            # The variance is a difference of near-equal numbers: √ of its rounding where it is 0.
            assert stats.std == pytest.approx(std, abs=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_lower_precision_is_lifted_first(self, dtype):
        e = draw(300, 24).to(dtype)
        mean, std, _ = by_pairs(e)
        stats = cosine_moments(e)
        assert (stats.mean, stats.std) == pytest.approx((mean, std), abs=1e-6)

    def test_lengths_and_rotations_do_not_matter(self):
        e = draw(50, 8)
        plain = cosine_moments(e)
        scale = torch.logspace(-200, 200, 50, dtype=torch.float64)[:, None]
        assert cosine_moments(e * scale)[:2] == pytest.approx(plain[:2], abs=1e-12)
        rotation = torch.linalg.qr(draw(8, 8, seed=1)).Q
        assert cosine_moments(e @ rotation)[:2] == pytest.approx(plain[:2], abs=1e-12)

    def test_orthonormal_rows_have_none(self):
        stats = cosine_moments(torch.eye(9, dtype=torch.float64))
        assert (stats.mean, stats.std, stats.orthogonality_class) == (0, 0, 2)

    def test_parts_add_up(self):
        e = draw(70, 6)
        whole = CosineMoments(6).update(e)
        first, second = CosineMoments(6).update(e[:31]), CosineMoments(6).update(e[31:])
        assert first.merge(second).stats()[:4] == pytest.approx(whole.stats()[:4], abs=1e-12)

    def test_centring_is_another_statistic(self):
        e = draw(200, 8) + 3
        assert cosine_moments(e).mean > 0.7
        assert abs(cosine_moments(e, center=True).mean) < 0.02

    def test_random_rows_have_an_excess_of_one(self):
        assert cosine_moments(draw(4000, 64)).excess == pytest.approx(1, abs=0.02)

    def test_classes(self):
        assert cosine_moments(draw(3000, 512)).orthogonality_class == 2
        assert cosine_moments(draw(100, 8)).orthogonality_class == 1
        assert cosine_moments(draw(3000, 200)).orthogonality_class is None

    @pytest.mark.parametrize(
        ("e", "error", "message"),
        [
            (torch.ones(3), ValueError, "matrix"),
            (torch.ones(1, 3), ValueError, "at least two rows"),
            (torch.zeros(5, 3), ValueError, "at least two rows"),
            (torch.full((3, 3), math.nan), ValueError, "9 entries are NaN"),
            (torch.ones(3, 3, dtype=torch.int8), TypeError, "dequantise"),
        ],
    )
    def test_bad_input(self, e, error, message):
        with pytest.raises(error, match=message):
            cosine_moments(e)

    def test_bad_sizes(self):
        with pytest.raises(ValueError, match="chunk"):
            cosine_moments(draw(3, 3), chunk=0)
        with pytest.raises(ValueError, match="widths differ"):
            CosineMoments(3).merge(CosineMoments(4))
        with pytest.raises(ValueError, match="d must be"):
            CosineMoments(0)


class TestCapacity:
    def test_overlaps_of_the_sheet(self):
        for (k, d), values in {
            (32000, 4096): (0.0247007581, 0.0254782229, 0.0875924234, 0.0145909999),
            (2000, 64): (0.2423439112, 0.2637444106, 0.5998278657, 0.1230144962),
        }.items():
            found = [worst_case_overlap(k, d, form=form) for form in ("full", "ratio", "jl")]
            assert [*found, welch_bound(k, d)] == pytest.approx(values, abs=1e-10)

    @pytest.mark.parametrize(
        ("d", "eps", "value"),
        [
            (4096, 0.0645, 39_944_630), (384, 0.2, 3_388_946), (768, 0.09, 75_009),
            (64, 0.3, 7_122), (2048, 0.09, 1.985e7), (3072, 0.09, 5.96e8), (8192, 0.05, 2.459e8),
            (8192, 0.09, 2.03e14),
        ],
    )  # fmt: skip
    def test_capacities_of_the_sheet(self, d, eps, value):
        assert capacity(d, eps, force=True) == pytest.approx(value, rel=2e-3 if value > 1e7 else 0)

    def test_llama_2(self):
        assert capacity(4096, 0.0645, form="jl", c=8.0) == pytest.approx(9)  # 8.4, rounded up
        assert capacity(4096, 0.0645, form="jl") == pytest.approx(277, abs=1)
        assert capacity(4096, 0.0645, form="ratio") == pytest.approx(2.16e9, rel=5e-3)

    @given(st.integers(3, 10**6), st.integers(2, 5000), st.sampled_from(["full", "ratio", "jl"]))
    def test_capacity_is_the_inverse_of_the_overlap(self, k, d, form):
        eps = worst_case_overlap(k, d, form=form)
        if 1e-3 < eps < 1:
            assert 10 ** log10_capacity(d, eps, form=form) == pytest.approx(k, rel=1e-9)
            assert capacity(d, eps, form=form, force=True) == k

    @given(st.integers(3, 10**6), st.floats(0.01, 0.9), st.sampled_from(["full", "ratio", "jl"]))
    @settings(max_examples=50)
    def test_least_dimension(self, k, eps, form):
        d = min_dimension(k, eps, form=form)
        assert worst_case_overlap(k, d, form=form) <= eps
        if d > 1:
            assert worst_case_overlap(k, d - 1, form=form) > eps

    def test_few_directions_are_orthonormal(self):
        for form in ("full", "ratio"):
            assert worst_case_overlap(10, 100, form=form) == 0
        assert welch_bound(10, 100) == 0

    def test_huge_capacities_have_a_logarithm(self):
        assert capacity(10**6, 0.099) == math.inf
        assert math.isfinite(log10_capacity(10**6, 0.099))

    def test_indeterminate_is_refused_unless_forced(self):
        with pytest.raises(ValueError, match="indeterminate"):
            capacity(384, 0.2)
        assert capacity(384, 0.2, force=True) > 0

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: capacity(0, 0.05), "d must be"),
            (lambda: capacity(10, 1.5, force=True), "eps must be"),
            (lambda: capacity(10, 0.05, form="cubic"), "form must be one of"),
            (lambda: worst_case_overlap(1, 10), "k must be"),
            (lambda: min_dimension(10, 0.0), "eps must be"),
            (lambda: welch_bound(1, 3), "k must be"),
        ],
    )
    def test_bad_input(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestPacking:
    @pytest.mark.parametrize(
        ("k", "d", "eps"),
        [(20, 16, 0.1268), (64, 16, 0.2622), (64, 32, 0.1379), (128, 64, 0.0970)],
    )
    def test_cells_of_the_sheet(self, k, d, eps):
        u, found = pack_directions(k, d)
        assert found == pytest.approx(eps, abs=3e-3)
        assert found >= welch_bound(k, d)
        cosines = (u @ u.T).fill_diagonal_(0).abs()
        assert float(cosines.max()) == pytest.approx(found, abs=1e-6)
        torch.testing.assert_close(u.norm(dim=1), torch.ones(k))

    def test_a_known_optimum(self):
        """The six diagonals of the icosahedron: overlap 1/√5, and no better exists."""
        found = min(pack_directions(6, 3, seed=seed, dtype=torch.float64)[1] for seed in range(3))
        assert 1 / math.sqrt(5) <= found < 1 / math.sqrt(5) + 0.01

    def test_a_seed_decides_and_progress_is_told(self):
        seen = []
        first = pack_directions(20, 8, steps=40, seed=3, report=seen.append)
        second = pack_directions(20, 8, steps=40, seed=3)
        assert torch.equal(first[0], second[0])
        assert seen == [0.0, 0.5]

    def test_bad_input(self):
        for bad in ((1, 5), (5, 1), (5, 5, 1)):
            with pytest.raises(ValueError, match="must be at least 2"):
                pack_directions(*bad)

    @pytest.mark.parametrize("form", ["jl", "ratio", "full"])
    def test_a_fit_recovers_what_made_the_data(self, form):
        cells = [(k, d) for d in (32, 64, 128, 256) for k in (2 * d, 5 * d, 20 * d, 100 * d)]
        eps = [worst_case_overlap(k, d, form=form) for k, d in cells]
        fit = fit_capacity(*zip(*cells, strict=True), eps, form=form)
        assert fit.mape < 0.05
        assert fit.r2 > 0.99999
        assert fit.n_excluded == 0
        if form != "full":
            constant = {"jl": 3.029480, "ratio": 1.293401}[form]
            assert fit.params[0] == pytest.approx(constant, rel=1e-6)

    def test_cells_without_room_are_told_apart(self):
        """The paper's 975 %: cells with k ≤ d, whose overlap is only the optimiser's patience."""
        cells = [(4000, 4096), (2000, 128), (4000, 128), (2000, 256), (4000, 512)]
        eps = [1.26e-4, 0.1469, 0.1703, 0.0911, 0.0645]
        fit = fit_capacity(*zip(*cells, strict=True), eps, form="ratio")
        assert fit.n_excluded == 1
        assert fit.mape_above < 10 < fit.mape
        assert 5 * fit.mape == pytest.approx(4 * fit.mape_above + 100, rel=1e-9)

    def test_bad_fits(self):
        with pytest.raises(ValueError, match="as long"):
            fit_capacity([10, 20], [5], [0.1, 0.2])
        with pytest.raises(ValueError, match="4 cells"):
            fit_capacity([10], [5], [0.1], form="full")
        with pytest.raises(ValueError, match="positive"):
            fit_capacity([10], [5], [0.0])
        with pytest.raises(ValueError, match="form must be"):
            fit_capacity([10], [5], [0.1], form="cubic")


class TestOverlaps:
    @pytest.mark.parametrize("tile", [7, 64, 4096])
    def test_equals_all_pairs(self, tile, monkeypatch):
        from stiefel.diagnose import overlaps

        monkeypatch.setattr(overlaps, "TILE", tile)
        e = draw(150, 12)
        found = overlap_histogram(e, sample=None, bins=50)
        u = torch.nn.functional.normalize(e)
        cosines = (u @ u.T)[*torch.triu_indices(150, 150, 1)]
        wanted, _ = np.histogram(cosines.numpy(), bins=50, range=(-1, 1))
        assert found.counts.tolist() == wanted.tolist()
        assert found.largest == pytest.approx(float(cosines.abs().max()), abs=1e-12)
        assert found.pairs == 150 * 149 // 2
        assert not found.sampled

    def test_duplicates_are_found_on_both_sides(self):
        e = draw(60, 12, dtype=torch.float32)
        e[50] = 2 * e[3]
        e[20] = 0
        found = overlap_histogram(e, sample=None)
        assert (found.close_rows, found.rows) == (2, 59)
        assert found.largest == pytest.approx(1, abs=1e-6)

    def test_part_above(self):
        e = draw(500, 16)
        found = overlap_histogram(e, sample=None)
        u = torch.nn.functional.normalize(e)
        cosines = (u @ u.T)[*torch.triu_indices(500, 500, 1)]
        for eps in (-0.3, 0.0, 0.2137, 0.5):
            assert found.above(eps) == pytest.approx(
                float((cosines > eps).double().mean()), abs=2e-3
            )
        assert found.above(1.0) == 0
        assert found.above(-1.0) == 1

    def test_a_sample_is_like_the_whole(self):
        e = draw(3000, 16)
        part = overlap_histogram(e, sample=800)
        assert part.sampled
        assert part.rows == 800
        assert part.above(0.3) == pytest.approx(
            overlap_histogram(e, sample=None).above(0.3), abs=0.01
        )

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at least two rows"):
            overlap_histogram(torch.zeros(5, 3))
        with pytest.raises(ValueError, match="finite"):
            overlap_histogram(torch.full((5, 3), math.inf))
        with pytest.raises(TypeError, match="floating"):
            overlap_histogram(torch.ones(5, 3, dtype=torch.int8))
        with pytest.raises(ValueError, match="bins at least 2"):
            overlap_histogram(draw(5, 3), bins=1)

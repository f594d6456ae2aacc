"""The cylinder: exact values, invariants, and the statistics around it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.diagnose import cylinder as home
from stiefel.diagnose.cylinder import (
    ConceptCylinder,
    calibrate_sector,
    circular_summary,
    mean_difference,
    minimal_strength,
    pca_direction,
    probe_direction,
    sector_scan,
    sin_cos_law,
)
from stiefel.linalg import haar

SHEET = torch.tensor(
    [[2, 1, 0], [2, -1, 0], [2, 0, 1.5], [2, 0, -1.5]], dtype=torch.float64
)  # fmt: skip


def cloud(n=12, d=7, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=g, dtype=torch.float64) + 1).to(dtype)


@pytest.fixture(scope="module")
def sheet():
    return ConceptCylinder().fit(SHEET)


class TestExactValues:
    def test_axis_and_plane(self, sheet):
        assert sheet.axis_norm_ == 2
        assert sheet.n_samples_ == 4
        assert sheet.axis_.tolist() == [1, 0, 0]
        expected = torch.tensor([2.1213203436, 1.4142135624], dtype=torch.float64)
        torch.testing.assert_close(sheet.plane_sv_, expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(
            sheet.plane_, torch.tensor([[0, 0, 1], [0, 1, 0]], dtype=torch.float64)
        )

    def test_coordinates(self, sheet):
        found = sheet.transform(SHEET)
        cos = torch.tensor([0.8944271910, 0.8944271910, 0.8, 0.8], dtype=torch.float64)
        sin = torch.tensor([0.4472135955, 0.4472135955, 0.6, 0.6], dtype=torch.float64)
        torch.testing.assert_close(found.cos, cos, atol=1e-10, rtol=0)
        torch.testing.assert_close(found.sin, sin, atol=1e-10, rtol=0)
        first = (float(found.h[0]), float(found.rho[0]), math.degrees(float(found.phi[0])))
        assert first == pytest.approx((2, 1, 90), abs=1e-12)

    @pytest.mark.parametrize(
        ("penalty", "across"), [(0.0, 1.3416407865), (0.5, 0.6708203932), (1.0, 0.0)]
    )
    def test_penalised_vector(self, sheet, penalty, across):
        found = sheet.steering_vector(SHEET[0], 3, penalty)
        expected = torch.tensor([2.6832815730, across, 0], dtype=torch.float64)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@given(
    n=st.integers(3, 9), d=st.integers(3, 9), extra=st.integers(0, 1), seed=st.integers(0, 10**6)
)
@settings(max_examples=30, deadline=None)
def test_coordinates_give_the_vector_back(n, d, extra, seed):
    rank = min(2 + extra, n - 1, d - 1)
    D = cloud(n, d, seed)
    found = ConceptCylinder().fit(D, rank=rank)
    frame = torch.cat([found.axis_[None], found.plane_])
    torch.testing.assert_close(frame @ frame.mT, torch.eye(rank + 1, dtype=D.dtype))
    V = cloud(5, d, seed + 1)
    c = found.transform(V)
    back = found.compose(0.0, 1.0, c.phi) * c.rho[:, None] + c.h[:, None] * found.axis_ + c.rest
    torch.testing.assert_close(back, V, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        c.h.square() + c.rho.square() + c.rest.square().sum(-1), V.square().sum(-1)
    )


@pytest.mark.parametrize("shape", [(5, 30), (40, 6)])
def test_the_plane_is_that_of_the_plain_decomposition(shape):
    D = cloud(*shape, seed=3)
    axis = D.mean(0) / D.mean(0).norm()
    _, values, rows = torch.linalg.svd(D - (D @ axis)[:, None] * axis, full_matrices=False)
    found = ConceptCylinder().fit(D, rank=3)
    torch.testing.assert_close(found.plane_sv_, values[:3])
    torch.testing.assert_close((found.plane_ @ rows[:3].mT).abs(), torch.eye(3, dtype=D.dtype))
    largest = found.plane_.gather(1, found.plane_.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_turning_the_space_turns_the_cylinder():
    D, V = cloud(), cloud(4, seed=5)
    turn = haar(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain, turned = ConceptCylinder().fit(D), ConceptCylinder().fit(D @ turn)
    torch.testing.assert_close(turned.axis_, plain.axis_ @ turn)
    a, b = plain.transform(V), turned.transform(V @ turn)
    for name in ("h", "rho", "cos", "sin"):
        torch.testing.assert_close(getattr(b, name), getattr(a, name))
    torch.testing.assert_close(b.rest, a.rest @ turn)
    # The signs of e₁ and e₂ are fixed in coordinates, so they may differ after a turn.
    signs = ((plain.plane_ @ turn) * turned.plane_).sum(-1)
    flat = torch.stack([b.phi.cos(), b.phi.sin()], -1) * signs
    torch.testing.assert_close(flat, torch.stack([a.phi.cos(), a.phi.sin()], -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_agrees_and_large_norms_do_not_overflow(dtype):
    D = cloud(dtype=dtype) * 200  # squares beyond float16
    found = ConceptCylinder().fit(D)
    exact = ConceptCylinder().fit(D.double())
    assert found.axis_.dtype == torch.float32
    torch.testing.assert_close(found.axis_.double(), exact.axis_, atol=1e-6, rtol=0)
    assert found.axis_norm_ == exact.axis_norm_
    torch.testing.assert_close(
        found.transform(D).h.double(), exact.transform(D.double()).h, rtol=1e-5, atol=1e-3
    )


def test_penalty_interpolates_and_lengths_are_as_stated(sheet):
    d = cloud(6, 3, seed=9)
    c = sheet.transform(d)
    whole, axis = (sheet.steering_vector(d, 2.5, p) for p in (0.0, 1.0))
    torch.testing.assert_close(whole, 2.5 * d / d.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(axis, (2.5 * c.cos)[:, None] * sheet.axis_)
    torch.testing.assert_close(sheet.steering_vector(d, 2.5, 0.3), 0.7 * whole + 0.3 * axis)


def test_gradients_flow_through_coordinates():
    found = ConceptCylinder().fit(cloud(8, 4))
    V = cloud(2, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: found.transform(v)[:5], V)
    assert torch.autograd.gradcheck(lambda v: found.steering_vector(v, 2.0, 0.4), V)


class TestRefusals:
    @pytest.mark.parametrize(
        ("D", "rank", "message"),
        [
            (torch.ones(4), 2, "must be a matrix"),
            (torch.ones(4, 3), 1, "rank must be at least 2"),
            (torch.ones(1, 3), 2, "needs at least 3 samples, got 1"),
            (torch.ones(2, 3), 2, "needs at least 3 samples, got 2"),
            (torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]), 2, "no common axis"),
            (torch.zeros(4, 3), 2, "no common axis"),
            (torch.ones(4, 3), 2, "span no plane"),
            (cloud(6, 2), 2, "span no plane"),
            (cloud() * float("nan"), 2, "finite"),
        ],
    )
    def test_fit(self, D, rank, message):
        with pytest.raises(ValueError, match=message):
            ConceptCylinder().fit(D, rank=rank)

    def test_kind_and_state(self, sheet):
        with pytest.raises(TypeError, match="floating-point"):
            ConceptCylinder().fit(torch.ones(4, 3, dtype=torch.int64))
        with pytest.raises(RuntimeError, match="call fit first"):
            ConceptCylinder().transform(SHEET)
        with pytest.raises(ValueError, match=r"\[\.\.\., 3\] like the axis"):
            sheet.transform(torch.ones(2, 4))
        with pytest.raises(ValueError, match="d must not be zero"):
            sheet.steering_vector(torch.zeros(3), 1.0)
        with pytest.raises(ValueError, match=r"penalty must be .* from 0\.0 to 1\.0, got 1\.5"):
            sheet.steering_vector(SHEET, 1.0, 1.5)
        with pytest.raises(ValueError, match="length"):
            sheet.steering_vector(SHEET, -1.0)
        with pytest.raises(ValueError, match="radius"):
            sheet.compose(1.0, math.inf, 0.0)


class TestSectors:
    def test_scan_stands_in_units_of_the_axis(self, sheet):
        seen = []

        def score(vectors):
            seen.append(vectors)
            return torch.stack([vectors @ sheet.plane_[0], -(vectors @ sheet.plane_[1])])

        found = sector_scan(score, sheet, axis_strength=1.5, radius=0.5, n_angles=8)
        torch.testing.assert_close(seen[0][:, 0], torch.full((8,), 3.0, dtype=torch.float64))
        torch.testing.assert_close(found.phi, torch.arange(8.0).double() * math.pi / 4)
        torch.testing.assert_close(found.score[0], found.phi.cos())
        for name, value in (("best", 1), ("worst", -1), ("amplitude", 2)):
            torch.testing.assert_close(getattr(found, name), torch.tensor([value] * 2).double())
        assert found.best_phi.tolist() == pytest.approx([0, 1.5 * math.pi])

    def test_bad_scores(self, sheet):
        with pytest.raises(ValueError, match=r"tensor \[\.\.\., 16\].*got \(3,\)"):
            sector_scan(lambda v: v[:3, 0], sheet)
        with pytest.raises(ValueError, match="finite"):
            sector_scan(lambda v: v[:, 0] / 0, sheet)
        with pytest.raises(ValueError, match="n_angles"):
            sector_scan(lambda v: v[:, 0], sheet, n_angles=1)

    def test_calibration_takes_the_mean_over_prompts(self):
        scores = torch.zeros(3, 16)
        scores[0, 2] = 5
        scores[:, 7] = 2
        assert calibrate_sector(scores) == pytest.approx(7 * math.pi / 8)
        assert calibrate_sector(scores + torch.tensor([[3.0], [9], [-50]])) == pytest.approx(
            7 * math.pi / 8
        )
        with pytest.raises(ValueError, match="a prompt and two angles"):
            calibrate_sector(torch.zeros(0, 16))
        with pytest.raises(ValueError, match="finite"):
            calibrate_sector(scores * float("nan"))

    def test_least_strength_is_the_first_that_works(self):
        direction, grid = torch.tensor([0.0, 10]), [0.5, 1, 2, 4]
        assert minimal_strength(lambda v: v[:, 1], direction, grid, 1.0) == 1
        assert minimal_strength(lambda v: -((v[:, 1] - 1) ** 2), direction, grid, -0.1) == 1
        assert math.isnan(minimal_strength(lambda v: v[:, 0], direction, grid, 1.0))
        with pytest.raises(ValueError, match="each larger"):
            minimal_strength(lambda v: v[:, 0], direction, [1, 1], 1.0)
        with pytest.raises(ValueError, match="other than zero"):
            minimal_strength(lambda v: v[:, 0], torch.zeros(2), grid, 1.0)


class TestCircle:
    def test_known_sets(self):
        same = circular_summary([0.5] * 10)
        assert same[:2] == pytest.approx((0.5, 1.0))
        assert same.rayleigh_p < 1e-4
        spread = circular_summary(torch.arange(8).double() * math.pi / 4)
        assert spread.resultant == pytest.approx(0, abs=1e-12)
        assert math.isnan(spread.mean)
        assert spread.rayleigh_p == pytest.approx(1)
        assert circular_summary([math.pi - 0.1, 0.1 - math.pi]).mean == pytest.approx(
            math.pi, abs=1e-9
        ) or circular_summary([math.pi - 0.1, 0.1 - math.pi]).mean == pytest.approx(-math.pi)

    def test_uniform_angles_have_the_stated_resultant_and_a_uniform_p(self):
        g = torch.Generator().manual_seed(0)
        found = [
            circular_summary(2 * math.pi * torch.rand(10, generator=g, dtype=torch.float64))
            for _ in range(600)
        ]
        mean = sum(f.resultant for f in found) / 600
        assert mean == pytest.approx(math.sqrt(math.pi / 40), abs=0.02)
        assert sum(f.rayleigh_p < 0.1 for f in found) / 600 == pytest.approx(0.1, abs=0.04)

    def test_refusals(self):
        with pytest.raises(ValueError, match="two angles or more"):
            circular_summary([1.0])
        with pytest.raises(ValueError, match="finite"):
            circular_summary([1.0, math.nan])


class TestLaw:
    def test_planted_exponents_are_found(self):
        theta = torch.linspace(0.05, 1.5, 40, dtype=torch.float64)
        y = 3 * theta.sin() ** 2 * theta.cos() ** 3 - 1
        found = sin_cos_law(theta, y, range(5), range(5))
        assert found[:2] == (2, 3)
        assert found.r == pytest.approx(1)
        assert found.p == pytest.approx(1e-3)

    def test_p_is_corrected_for_the_search(self):
        """Under no relation p ≤ 0.1 in a tenth of the cases; the best pair's own p much oftener."""
        from scipy.stats import pearsonr

        g = torch.Generator().manual_seed(0)
        corrected = naive = 0
        for _ in range(200):
            theta = 1.5 * torch.rand(12, generator=g, dtype=torch.float64)
            y = torch.randn(12, generator=g, dtype=torch.float64)
            found = sin_cos_law(theta, y, range(5), range(5), 99, generator=g)
            best = theta.sin() ** found.m * theta.cos() ** found.n
            corrected += found.p <= 0.1
            naive += pearsonr(best, y, alternative="greater").pvalue <= 0.1
        assert corrected / 200 == pytest.approx(0.1, abs=0.06)
        assert naive > 1.5 * corrected

    def test_seeded_and_refusing(self):
        theta, y = torch.rand(9).double(), torch.rand(9).double()
        assert sin_cos_law(theta, y, [1], [1]) == sin_cos_law(theta, y, [1], [1])
        for bad, message in (
            ((theta[:2], y[:2], [1], [1]), "three samples"),
            ((theta, y[:8], [1], [1]), "shapes"),
            ((theta, torch.ones(9).double(), [1], [1]), "constant"),
            ((theta, y, [0], [0]), "constant"),
            ((theta, y, [-1], [1]), "exponents ≥ 0"),
            ((theta + 1.7, y, [1], [0.5]), "negative cosine"),
            ((theta * math.nan, y, [1], [1]), "finite"),
        ):
            with pytest.raises(ValueError, match=message):
                sin_cos_law(*bad)


class TestDirections:
    def test_mean_difference_is_the_mean_of_pairs(self):
        a, b = cloud(seed=1), cloud(seed=2)
        torch.testing.assert_close(mean_difference(a, b), (a - b).mean(0))
        assert mean_difference(a[:3], b).shape == (7,)

    def test_pca_is_uncentred_and_points_with_the_mean(self):
        D = cloud(20, seed=4) + 3
        found = pca_direction(D)
        assert float(found.norm()) == pytest.approx(1)
        assert float(found @ D.mean(0)) > 0
        torch.testing.assert_close(pca_direction(-D), -found)
        # Uncentred: far from the origin it is the mean's direction.
        assert float(found @ D.mean(0) / D.mean(0).norm()) > 0.98

    def test_probe_separates_at_the_length_of_the_mean_difference(self):
        a, b = cloud(30, seed=5) + 1, cloud(30, seed=6) - 1
        found = probe_direction(a, b)
        assert float(found.norm()) == pytest.approx(float(mean_difference(a, b).norm()))
        assert float((a @ found).min()) > float((b @ found).max())
        torch.testing.assert_close(probe_direction(a, b), found)

    def test_refusals(self):
        with pytest.raises(ValueError, match="one width"):
            mean_difference(cloud(d=3), cloud(d=4))
        with pytest.raises(ValueError, match="not zero"):
            pca_direction(torch.zeros(3, 4))
        with pytest.raises(ValueError, match="one mean"):
            probe_direction(torch.ones(3, 2), torch.ones(3, 2))
        with pytest.raises(ValueError, match="steps"):
            probe_direction(cloud(), cloud(), steps=0)


def test_the_home_has_the_sheets_names():
    for name in ("concept_differences", "steer", "Steering"):
        assert hasattr(home, name)

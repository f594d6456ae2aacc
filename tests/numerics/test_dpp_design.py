from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.numerics import (
    Design,
    fit_basis,
    orthonormal_polynomials,
    sample_design,
    sample_dpp,
    solve_design,
)
from stiefel.numerics.dpp_design import METHODS, singular_values, sizes

X = np.array([-1, -0.6, -0.2, 0.2, 0.6, 1])
LINE = np.stack([np.ones(6), X], axis=1)
F = np.array([1.0, 0, 2, -1, 3, 5])


def enumerated(n, density):
    """Expectations over all 6^n sequences of the six points, ``density`` their probabilities.

    Plain weighted least squares with w = m / k; returns E ratio, E G⁻¹, E λ_min, max |E f̂ − P f|.
    """
    basis = fit_basis(LINE)
    phi = basis.evaluate(LINE)
    best = basis.project(F)
    error = np.mean((F - phi @ best) ** 2)
    sets = np.array(list(product(range(6), repeat=n)))
    chance = density(sets, basis)
    sets, chance = sets[chance > 1e-15], chance[chance > 1e-15]
    assert chance.sum() == pytest.approx(1, abs=1e-12)
    w = 2 / basis.kernel()[sets]
    G = np.einsum("sn,sni,snj->sij", w, phi[sets], phi[sets]) / n
    b = np.einsum("sn,sni,sn->si", w, phi[sets], F[sets]) / n
    c = np.linalg.solve(G, b[..., None])[..., 0]
    return (
        chance @ (1 + np.sum((c - best) ** 2, 1) / error),
        np.einsum("s,sij->ij", chance, np.linalg.inv(G)),
        chance @ np.linalg.eigvalsh(G)[:, 0],
        np.abs(phi @ (chance @ c - best)).max(),
    )


def dpp(sets, basis):
    """det² / m! of an ordered draw."""
    return np.linalg.det(basis.Q[sets]) ** 2 / 2


def volume(sets, basis):
    """n^m (n − m)! / n! · det G · Π ν, ν = k μ / m."""
    n = sets.shape[1]
    w = 2 / basis.kernel()[sets]
    phi = basis.Q * 6**0.5
    G = np.einsum("sn,sni,snj->sij", w, phi[sets], phi[sets]) / n
    return n**2 / (n * (n - 1)) * np.linalg.det(G) * np.prod(basis.leverage[sets] / 2, axis=1)


class TestExactValues:
    def test_one_draw(self):
        ratio, _, _, bias = enumerated(2, dpp)
        assert ratio == pytest.approx(3, abs=1e-12)
        assert bias < 1e-13

    @pytest.mark.parametrize(
        ("n", "ratio", "diagonal"),
        [
            (2, 3.0, None),
            (3, 2.2059638660, [1.417750243, 1.4507142857]),
            (4, 1.8108943715, [1.3150925674, 1.3235899651]),
        ],
    )
    def test_volume(self, n, ratio, diagonal):
        found, inverse, _, bias = enumerated(n, volume)
        assert found == pytest.approx(ratio, abs=1e-9)
        assert bias < 1e-13
        if diagonal:
            np.testing.assert_allclose(np.diagonal(inverse), diagonal, atol=1e-9)
            assert (np.diagonal(inverse) <= n / (n - 1)).all()  # equality for continuous ν

    def test_two_draws(self):
        def density(sets, basis):
            return dpp(sets[:, :2], basis) * dpp(sets[:, 2:], basis)

        ratio, _, smallest, bias = enumerated(4, density)
        assert ratio == pytest.approx(1.5773114245, abs=1e-9)
        assert smallest == pytest.approx(0.7576011830, abs=1e-9)
        assert bias == pytest.approx(0.1027969, abs=1e-6)

    def test_constant_of_one_draw(self):
        """E ‖(1/m) Σ w φ g‖² / ‖g‖² by its closed form and by listing all draws."""
        basis = fit_basis(LINE)
        phi, k = basis.evaluate(LINE), basis.kernel()
        g = F - phi @ basis.project(F)
        K = phi @ phi.T
        inner = np.einsum("i,j,ij", g, g, K**3 / np.outer(k, k)) / 36
        closed = 1 - inner / np.mean(g**2)
        assert closed == pytest.approx(0.8800682761, abs=1e-9)
        listed = 0.0
        for i, j in product(range(6), repeat=2):
            chance = np.linalg.det(basis.Q[[i, j]]) ** 2 / 2
            vector = sum(2 / k[a] * phi[a] * g[a] for a in (i, j)) / 2
            listed += chance * vector @ vector
        assert listed / np.mean(g**2) == pytest.approx(closed, abs=1e-12)


def test_volume_designs_have_their_law():
    """E ratio and E G⁻¹ of draws against the enumeration."""
    basis = fit_basis(LINE)
    best, error = basis.project(F), 2.2793650794
    rng, ratios, traces = np.random.default_rng(0), [], []
    for _ in range(1500):
        design = sample_design(basis, 3, method="volume", generator=rng)
        fit = solve_design(basis, design, F[design.indices])
        ratios.append(1 + np.sum((fit.orthonormal - best) ** 2) / error)
        sigma = singular_values(basis, design.indices, design.weights)
        traces.append(np.sum(sigma**-2))
    for values, expected in ((ratios, 2.2059638660), (traces, 1.417750243 + 1.4507142857)):
        standard_error = np.std(values) / len(values) ** 0.5
        assert abs(np.mean(values) - expected) < 4 * standard_error
        assert standard_error < 0.05 * expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gram_matrix_is_the_identity_on_average(method, weighted):
    """The weights are right, whatever μ: E G = I. Volume-rescaled laws have it only for n ≫ m."""
    rng = np.random.default_rng(1)
    mu = rng.random(40) + 0.1 if weighted else None
    basis = fit_basis(rng.standard_normal((40, 3)), mu)
    n = {"dpp": 3, "volume": 120, "volume-repeat": 240}.get(method, 6)
    mean = np.zeros((3, 3))
    for _ in range(600):
        design = sample_design(basis, n, method=method, generator=rng)
        scale = np.sqrt(design.weights / (n * basis.mu[design.indices]))
        rows = scale[:, None] * basis.rows(design.indices)
        assert design.lambda_min == pytest.approx(np.linalg.eigvalsh(rows.T @ rows)[0], abs=1e-12)
        mean += rows.T @ rows / 600
    np.testing.assert_allclose(mean, np.eye(3), atol=0.12)


@pytest.mark.parametrize("zeta", [0.5, 0.9])
def test_mixed_weights_are_bounded_and_right(zeta):
    rng = np.random.default_rng(2)
    basis = fit_basis(rng.standard_t(2, (300, 3)))
    mean = np.zeros((3, 3))
    for _ in range(300):
        design = sample_design(basis, 30, method="iid", zeta=zeta, generator=rng)
        k = basis.kernel(design.indices)
        assert (design.weights <= 1 / (1 - zeta)).all()
        assert (design.weights * k <= 3 / zeta * (1 + 1e-12)).all()
        np.testing.assert_allclose(design.weights, 1 / (zeta * k / 3 + 1 - zeta))
        rows = np.sqrt(design.weights * 300 / 30)[:, None] * basis.rows(design.indices)
        mean += rows.T @ rows / 300
    np.testing.assert_allclose(mean, np.eye(3), atol=0.1)
    design = sample_design(basis, 9, method="volume", zeta=zeta, generator=rng)
    assert (design.weights <= 1 / (1 - zeta)).all()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(METHODS), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9),
    st.integers(0, 2**31),
)  # fmt: skip
def test_functions_of_the_space_are_found_exactly(method, m, times, more, seed):
    rng = np.random.default_rng(seed)
    Phi = rng.standard_normal((30, m))
    basis = fit_basis(Phi, rng.random(30) + 0.1)
    n = m if method == "dpp" else times * m
    if method == "volume-repeat":
        n = 2 * n
    elif method in ("iid", "volume"):
        n += more
    design = sample_design(basis, n, method=method, generator=rng)
    assert design.indices.shape == design.weights.shape == (n,)
    assert design.method == method
    assert design.tries == 1
    if design.lambda_min < 1e-6:  # independent points may have too few distinct ones
        return
    truth = rng.standard_normal((m, 2))
    fit = solve_design(basis, design, Phi[design.indices] @ truth)
    np.testing.assert_allclose(fit.coefficients, truth, atol=1e-8)
    assert fit.lambda_min == pytest.approx(design.lambda_min)


def test_repeated_draws_are_whole_draws():
    basis = fit_basis(orthonormal_polynomials(np.linspace(-1, 1, 500), 7))
    design = sample_design(basis, repeats=5, generator=0)
    parts = design.indices.reshape(5, 7)
    assert all(len(set(part)) == 7 for part in parts)
    np.testing.assert_array_equal(parts, sample_dpp(basis, 5, generator=0))


def test_fit_is_the_weighted_one():
    basis = fit_basis(LINE)
    design = sample_design(basis, 4, generator=0)
    fit = solve_design(basis, design, F[design.indices])
    root = np.sqrt(design.weights)
    plain = np.linalg.lstsq(root[:, None] * LINE[design.indices], root * F[design.indices])[0]
    np.testing.assert_allclose(fit.coefficients, plain, atol=1e-12)
    A = np.sqrt(design.weights / 4)[:, None] * basis.evaluate(LINE[design.indices])
    assert fit.condition == pytest.approx(np.linalg.cond(A))


class TestStability:
    basis = fit_basis(orthonormal_polynomials(np.linspace(-1, 1, 1000), 10))

    def test_is_redrawn_until_it_holds(self):
        designs = [sample_design(self.basis, 40, delta=0.5, generator=s) for s in range(20)]
        assert all(d.lambda_min >= 0.5 for d in designs)
        assert max(d.tries for d in designs) > 1
        first = sample_design(self.basis, 40, generator=0)
        assert (first.tries, first.lambda_min < 0.5) == (1, designs[0].tries > 1)

    def test_gives_up_with_the_best_one(self):
        with pytest.raises(RuntimeError, match=r"20 points .* 3 tries, the best had 0\.\d+.*n=30"):
            sample_design(self.basis, 20, delta=0.01, max_tries=3, generator=0)


def test_tensors_in_tensors_out():
    design = sample_design(torch.from_numpy(LINE).float(), 4, generator=torch.Generator())
    assert design.indices.dtype == torch.int64
    assert design.weights.dtype == torch.float64
    same = sample_design(LINE, 4, generator=torch.Generator())
    np.testing.assert_array_equal(design.indices.numpy(), same.indices)
    values = torch.from_numpy(F)[design.indices]
    fit = solve_design(fit_basis(LINE), design, values)
    assert isinstance(fit.coefficients, torch.Tensor)
    plain = solve_design(fit_basis(LINE), same, F[same.indices])
    assert not isinstance(plain.coefficients, torch.Tensor)
    np.testing.assert_allclose(fit.coefficients.numpy(), plain.coefficients)


def test_seeds_of_every_kind():
    first = [
        sample_design(LINE, 8, generator=make()).indices
        for make in (lambda: 3, lambda: np.random.default_rng(3), lambda: np.int64(3))
    ]
    assert all((f == first[0]).all() for f in first)
    one, two = (sample_design(LINE, 40, generator=np.random.RandomState(0)) for _ in range(2))
    np.testing.assert_array_equal(one.indices, two.indices)
    state = np.random.RandomState(0)
    sample_design(LINE, 40, generator=state)
    assert (sample_design(LINE, 40, generator=state).indices != one.indices).any()
    assert sample_design(LINE, 40).indices.tolist() != sample_design(LINE, 40).indices.tolist()


@pytest.mark.parametrize(
    ("method", "n", "repeats", "expected"),
    [
        ("dpp", None, None, (5, 1)),
        ("dpp-repeat", None, None, (20, 4)),
        ("dpp-repeat", 15, None, (15, 3)),
        ("dpp-repeat", None, 2, (10, 2)),
        ("volume", None, None, (20, 1)),
        ("volume", 7, None, (7, 1)),
        ("volume-repeat", None, None, (20, 2)),
        ("volume-repeat", None, 3, (21, 3)),
        ("volume-repeat", None, 6, (30, 6)),
        ("iid", 9, None, (9, 1)),
    ],
)
def test_sizes(method, n, repeats, expected):
    assert sizes(5, n, method, repeats) == expected


def test_more_points_by_default_where_stability_is_asked_for():
    basis = fit_basis(orthonormal_polynomials(np.linspace(-1, 1, 100), 3))
    assert len(sample_design(basis, delta=0.5, generator=0).indices) == 18
    assert len(sample_design(basis, generator=0).indices) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 1}, "need at least m=2 samples, got n=1"),
        ({"n": 1, "method": "iid"}, "need at least m=2 samples"),
        ({"n": 5}, "whole draws of m=2 points, got n=5 .*pass n=4 or 6"),
        ({"n": 4, "method": "dpp"}, "pass n=2"),
        ({"n": 4, "repeats": 3}, "n=4 and repeats=3"),
        ({"repeats": 2, "method": "dpp"}, "use 'dpp-repeat'"),
        ({"repeats": 2, "method": "iid"}, "repeats=2 means nothing"),
        ({"repeats": 0}, "repeats must be ≥ 1"),
        ({"n": 3, "method": "volume-repeat"}, "m=2 samples in each part, got n=3 in 2 parts"),
        ({"n": 5, "method": "volume-repeat"}, "2 equal parts"),
        ({"method": "sobol"}, "method must be one of dpp-repeat"),
        ({"delta": 0}, "delta must be between 0 and 1, got 0"),
        ({"delta": 1.0}, "delta must be between"),
        ({"zeta": 0, "method": "iid"}, "zeta must be above 0"),
        ({"zeta": 0.5}, "zeta=0.5 needs method"),
        ({"max_tries": 0}, "max_tries"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        sample_design(LINE, **options)


def test_bad_input():
    basis = fit_basis(LINE)
    with pytest.raises(ValueError, match="mu belongs to the basis"):
        sample_design(basis, mu=np.ones(6))
    design = Design(np.array([0, 5, 2]), np.ones(3), 0.0, 1)
    with pytest.raises(ValueError, match=r"values must be \(3,\) or \(3, k\).*\(2,\)"):
        solve_design(basis, design, [1.0, 2.0])
    with pytest.raises(ValueError, match="1 of them are NaN"):
        solve_design(basis, design, [1.0, np.nan, 2.0])
    same = Design(np.array([2, 2, 2]), np.ones(3), 0.0, 1)
    with pytest.raises(ValueError, match="rank 1 in a space of dimension m=2"):
        solve_design(basis, same, np.ones(3))
    with pytest.raises(ValueError, match="need at least m=2 samples, got 1"):
        solve_design(basis, Design(np.array([2]), np.ones(1), 0.0, 1), np.ones(1))

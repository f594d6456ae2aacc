from itertools import combinations

import numpy as np
import pytest
from scipy.stats import chi2

from stiefel.numerics import dpp_sampling as module
from stiefel.numerics import fit_basis, orthonormal_polynomials, sample_dpp, sample_leverage

X = np.array([-1, -0.6, -0.2, 0.2, 0.6, 1])
LINE = np.stack([np.ones(6), X], axis=1)
SAMPLERS = ("rejection", "gram-schmidt")


def law(basis):
    """Every set of m candidates and its probability."""
    sets = list(combinations(range(basis.size), basis.dimension))
    rows = basis.rows(np.arange(basis.size))
    return sets, np.array([np.linalg.det(rows[list(s)]) ** 2 for s in sets])


def p_value(draws, basis):
    """Of χ² against the law; sets that expect fewer than five draws are one cell."""
    sets, chance = law(basis)
    code = {s: k for k, s in enumerate(sets)}
    seen = np.bincount([code[tuple(d)] for d in np.sort(draws, 1)], minlength=len(sets))
    expected = chance * len(draws)
    rare = expected < 5
    s, e = (np.append(v[~rare], v[rare].sum()) for v in (seen, expected))
    keep = e > 0.5
    assert seen[chance < 1e-12].sum() == 0
    return chi2.sf(np.sum((s - e)[keep] ** 2 / e[keep]), keep.sum() - 1)


def test_law_of_the_six_points():
    basis = fit_basis(LINE)
    sets, chance = law(basis)
    found = dict(zip(sets, chance, strict=True))
    assert found[0, 5] == pytest.approx(0.2380952381, abs=1e-10)
    assert found[0, 1] == pytest.approx(0.0095238095, abs=1e-10)
    assert abs(basis.Q[0] @ basis.Q[1]) == pytest.approx(0.3809523810, abs=1e-10)
    assert chance.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("case", ["line", "weighted", "duplicates", "on demand"])
def test_draws_follow_the_law(sampler, case):
    rng = np.random.default_rng(7)
    if case == "line":
        basis = fit_basis(LINE)
    elif case == "duplicates":
        Phi = rng.standard_normal((8, 3))
        Phi[5:] = Phi[[0, 1, 1]]
        basis = fit_basis(Phi)
    else:
        mu = np.append(rng.random(7), 0.0)
        keep = case != "on demand" or sampler == "gram-schmidt"
        basis = fit_basis(rng.standard_normal((8, 3)), mu, keep=keep)
    draws = sample_dpp(basis, 20_000, generator=3, sampler=sampler)
    assert draws.shape == (20_000, basis.dimension)
    assert p_value(draws, basis) > 1e-3


def test_a_wrong_law_is_seen():
    """Independent points of the same density, distinct ones only."""
    basis = fit_basis(LINE)
    pairs = sample_leverage(basis, 40_000, generator=0).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    assert p_value(pairs, basis) < 1e-12


def test_first_point_has_the_optimal_density_and_pairs_repel():
    basis = fit_basis(orthonormal_polynomials(np.linspace(-1, 1, 400), 6))
    draws = sample_dpp(basis, 20_000, generator=0)
    for column in (0, 5):  # exchangeable: every position has the same law
        seen = np.bincount(draws[:, column] // 50, minlength=8)
        expected = 20_000 * basis.leverage.reshape(8, 50).sum(1) / 6
        assert chi2.sf(np.sum((seen - expected) ** 2 / expected), 7) > 1e-3
    # P(i and j) summed over two halves: Σ (k_ii k_jj − k_ij²).
    K = basis.Q @ basis.Q.T
    both = ((draws < 200).sum(1) * (draws >= 200).sum(1)).mean()
    assert both == pytest.approx(9 - np.sum(K[:200, 200:] ** 2), abs=0.02)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("m", [1, 2, 30, 80])
def test_points_of_a_draw_are_distinct(sampler, m):
    basis = fit_basis(orthonormal_polynomials(np.linspace(-1, 1, 300), m))
    draws = sample_dpp(basis, 5, generator=1, sampler=sampler)
    assert all(len(set(d)) == m for d in draws)
    assert all(np.linalg.matrix_rank(basis.Q[d]) == m for d in draws)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_as_many_points_as_candidates(sampler):
    basis = fit_basis(np.random.default_rng(0).standard_normal((7, 7)))
    draws = sample_dpp(basis, 3, generator=1, sampler=sampler)
    assert (np.sort(draws, 1) == np.arange(7)).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_one_of_equal_rows(sampler):
    basis = fit_basis(np.repeat(np.eye(4), 3, axis=0))
    draws = sample_dpp(basis, 200, generator=0, sampler=sampler)
    assert (np.sort(draws // 3, axis=1) == np.arange(4)).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_decides_and_memory_only_splits(sampler, monkeypatch):
    basis = fit_basis(LINE)
    first, again = (sample_dpp(basis, 50, generator=5, sampler=sampler) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != sample_dpp(basis, 50, generator=6, sampler=sampler)).any()
    monkeypatch.setattr(module, "_REJECTION_BYTES", 1)
    monkeypatch.setattr(module, "_GRAM_SCHMIDT_BYTES", 1)
    draws = sample_dpp(basis, 3000, generator=5, sampler=sampler)
    assert p_value(draws, basis) > 1e-3


def test_proposals_run_out_and_come_anew(monkeypatch):
    monkeypatch.setattr(module, "_PROPOSALS", 2)
    basis = fit_basis(LINE)
    assert p_value(sample_dpp(basis, 5000, generator=2), basis) > 1e-3


@pytest.mark.parametrize("zeta", [0, 0.5, 1])
def test_independent_points_have_the_mixed_density(zeta):
    mu = np.array([1, 2, 0, 3, 1, 1]) / 8
    basis = fit_basis(LINE, mu)
    seen = np.bincount(sample_leverage(basis, 20_000, zeta=zeta, generator=0), minlength=6)
    expected = 20_000 * (zeta * basis.leverage / 2 + (1 - zeta) * mu)
    assert seen[2] == 0
    rest = expected > 0
    assert chi2.sf(np.sum((seen - expected)[rest] ** 2 / expected[rest]), 4) > 1e-3


def test_uniform_numbers_at_the_ends():
    cumulative = np.array([0.0, 0.0, 0.25, 0.25, 1.0, 1.0])
    found = module._by_weight(cumulative, np.array([0.0, 0.25, 0.9999, 1.0]))
    assert found.tolist() == [2, 4, 4, 4]  # never one of weight 0


def test_bad_input():
    basis = fit_basis(LINE)
    with pytest.raises(ValueError, match="draws must be ≥ 1, got 0"):
        sample_dpp(basis, 0)
    with pytest.raises(ValueError, match="sampler must be one of rejection, gram-schmidt"):
        sample_dpp(basis, sampler="mcmc")
    with pytest.raises(ValueError, match="Q in memory"):
        sample_dpp(fit_basis(LINE, keep=False), sampler="gram-schmidt")
    with pytest.raises(ValueError, match="zeta"):
        sample_leverage(basis, 3, zeta=2)
    with pytest.raises(TypeError, match=r"generator must be .* got str"):
        sample_dpp(basis, generator="0")

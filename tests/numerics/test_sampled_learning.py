import math

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.linalg import eigh, expm
from sklearn.datasets import load_digits

from stiefel.numerics.sampled import (
    SampledMatrix,
    centroid_distance,
    discriminant_analysis,
    hamiltonian_simulation,
    least_squares_svm,
    sdp_feasibility,
)
from stiefel.numerics.sampled.clusters import distance_bound, pair_mean
from stiefel.numerics.sampled.means import group_means
from stiefel.numerics.sampled.sources import as_source
from stiefel.numerics.sampled.svm import solve_system


@pytest.fixture(scope="module")
def digits():
    return load_digits(return_X_y=True)


def test_sheet_distance_to_a_centroid(digits):
    """digits[0] and class 3: 1564.53; unbiased, with the spread of its law."""
    X, y = digits
    p, q = X[0], X[y == 3]
    exact = ((p - q.mean(0)) ** 2).sum()
    assert exact == pytest.approx(1564.53, abs=5e-3)
    Q, rng = SampledMatrix(q), np.random.default_rng(0)
    found = np.array([centroid_distance(p, Q, 200, rng) for _ in range(400)])
    # The law: z = 2p or −2q; variance of the mean over pairs from its two projections.
    Z, chance = np.concatenate([2 * p[None], -2 * q]), np.full(len(q) + 1, 0.5 / len(q))
    chance[0] = 0.5
    assert ((chance @ Z) ** 2).sum() == pytest.approx(exact)
    one = chance @ (Z @ (chance @ Z)) ** 2 - exact**2
    two = chance @ (Z @ Z.T) ** 2 @ chance - exact**2
    variance = (4 * 198 * one + 2 * two) / (200 * 199)
    assert math.sqrt(variance) == pytest.approx(85.6, abs=0.1)
    assert found.mean() == pytest.approx(exact, abs=4 * math.sqrt(variance / 400))
    assert found.std() == pytest.approx(math.sqrt(variance), rel=0.2)
    size2 = (p**2).sum() + (q**2).sum() / len(q)
    assert distance_bound(exact, size2, 200, 0.05) > math.sqrt(variance / 0.05)
    few, many = centroid_distance(p, Q, 200, rng), centroid_distance(p, Q, 40_000, rng)
    assert few.vacuous
    assert "Vacuous" in str(few.guarantee)
    assert not many.vacuous
    assert abs(many - exact) < many.bound


def test_pairs_are_summed_as_they_say():
    rng = np.random.default_rng(0)
    p, q, mine = rng.standard_normal(5), rng.standard_normal((4, 5)), 3
    z = np.concatenate([np.tile(2 * p, (mine, 1)), -2 * q])
    inner = z @ z.T
    expected = (inner.sum() - np.trace(inner)) / (7 * 6)
    found = pair_mean(p[None], mine, q.sum(0), float((q**2).sum()), 7)
    np.testing.assert_allclose(found, [expected])
    complex_ = centroid_distance(p + 1j, q + 2j, 20_000, 0)
    assert complex_ == pytest.approx(((np.abs(p + 1j - q.mean(0) - 2j)) ** 2).sum(), rel=0.1)


def test_primal_and_dual_of_the_svm_are_one():
    """[[0, 1ᵀ], [1, K + I/γ]] [b; α] = [0; y] on all rows, solved either way."""
    rng = np.random.default_rng(0)
    for n, d in ((9, 20), (20, 9)):
        X, y = rng.standard_normal((n, d)), np.sign(rng.standard_normal(n))
        system = np.block([[np.zeros((1, 1)), np.ones((1, n))],
                           [np.ones((n, 1)), X @ X.T + np.eye(n) / 0.7]])  # fmt: skip
        found = np.linalg.solve(system, np.r_[0, y])
        w, b = solve_system(X, np.ones(n), y, 0.7)
        np.testing.assert_allclose(b, found[0])
        np.testing.assert_allclose(w, X.T @ found[1:])
        np.testing.assert_allclose(0.7 * (y - X @ w - b), found[1:], atol=1e-12)


def test_sampled_svm_approaches_that_of_all_rows():
    rng = np.random.default_rng(1)
    X = rng.standard_normal((5000, 4)) * rng.random((5000, 1)) * 3
    y = np.where(X @ [1, -2, 0.5, 0] + 0.3 + 0.1 * rng.standard_normal(5000) > 0, 1, -1)
    w, b = solve_system(X, np.ones(5000), y.astype(float), 1.0)
    exact = np.r_[w, b]
    A, errors = SampledMatrix(X), {}
    for r in (200, 5000):
        found = [least_squares_svm(A, y, 1.0, r, seed) for seed in range(8)]
        errors[r] = np.mean([np.linalg.norm(np.r_[m.w, m.b] - exact) for m in found])
    assert errors[5000] < 0.35 * errors[200]
    assert errors[5000] < 0.05 * np.linalg.norm(exact)
    machine = least_squares_svm(A, torch.from_numpy(y), 1.0, 5000, 0)
    np.testing.assert_allclose(machine.decision(X[:3]), X[:3] @ machine.w + machine.b)
    np.testing.assert_allclose(machine.dual(A, y, [2]), y[2] - machine.decision(X[2:3]))
    assert np.mean(np.sign(machine.decision(X)) == y) > 0.9
    assert machine.vacuous
    surely = least_squares_svm(A, y, 1.0, 300_000, 0)
    assert not surely.vacuous
    assert np.linalg.norm(np.r_[surely.w, surely.b] - exact) < surely.bound
    wide = rng.standard_normal((50, 600))
    assert least_squares_svm(wide, np.sign(wide[:, 0]), 1.0, 30, 0).bound == math.inf


def test_means_of_groups():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4000, 300)) * (rng.random((4000, 300)) < 0.2)
    groups = rng.integers(3, size=4000)
    for given in (a, sparse.csr_array(a), torch.from_numpy(a).bfloat16()):
        dense = given.double().numpy() if isinstance(given, torch.Tensor) else a
        means, sizes = group_means(as_source(given), groups, 4)
        np.testing.assert_array_equal(sizes, np.bincount(groups, minlength=4))
        for g in range(3):
            np.testing.assert_allclose(means[g], dense[groups == g].mean(0), atol=1e-12)
        assert not means[3].any()


def test_discriminant_directions_are_those_of_the_scatters(digits):
    X, y = digits
    classes = np.unique(y)
    means = np.stack([X[y == c].mean(0) for c in classes])
    counts = np.bincount(y)
    within = sum((X[y == c] - means[c]).T @ (X[y == c] - means[c]) for c in classes)
    spread = means - X.mean(0)
    between = (spread.T * counts) @ spread
    ridge = 0.01 * np.trace(within) / 64
    exact, vectors = eigh(between, within + ridge * np.eye(64))
    found = discriminant_analysis(X, y, 2, 20_000, generator=0)
    np.testing.assert_allclose(found.means, means)
    np.testing.assert_allclose(found.eigenvalues, exact[::-1][:2], rtol=0.1)
    for j in (0, 1):
        w, v = found.components[:, j], vectors[:, -1 - j]
        S = within + ridge * np.eye(64)
        assert w @ S @ w == pytest.approx(1, rel=0.1)
        assert abs(w @ S @ v) > 0.97
    every = discriminant_analysis(X, y, r=500, generator=0)
    assert every.components.shape == (64, 9)
    assert np.mean(every.predict(X) == y) > 0.93
    assert every.transform(X[:2]).shape == (2, 9)
    assert every.vacuous
    same = discriminant_analysis(sparse.csr_array(X), y, r=500, generator=0)
    np.testing.assert_allclose(np.abs(same.components), np.abs(every.components), atol=1e-8)


def hermitian(n, levels, seed=0, kind=complex):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, len(levels)))
    a = a + 1j * rng.standard_normal(a.shape) if kind is complex else a
    U = np.linalg.qr(a)[0]
    return (U * levels) @ U.conj().T, U


@pytest.mark.parametrize("kind", [float, complex])
@pytest.mark.parametrize("t", [1.5, -1.5])
def test_evolution_approaches_the_exponential(kind, t):
    H, U = hermitian(60, [1.0, -0.6, 0.3], kind=kind)
    b = U @ np.array([1, 1j, -1]) / math.sqrt(3) + 0.2
    exact = expm(1j * t * H) @ b
    A, errors = SampledMatrix(H), {}
    for r in (300, 10_000):
        found = [hamiltonian_simulation(A, b, t, r, generator=s) for s in range(4)]
        errors[r] = np.mean([np.linalg.norm(f - exact) for f in found])
    assert errors[10_000] < 0.05
    assert errors[10_000] < 0.4 * errors[300]
    assert not found[0].vacuous
    assert np.linalg.norm(found[0].state - exact) < found[0].bound
    assert hamiltonian_simulation(A, b, t, 20, generator=0).vacuous


def test_evolution_by_hand():
    """A Hamiltonian of one row per level: every row is drawn with its own weight, time 0 is b."""
    H, b = np.diag([2.0, 2.0]), np.array([1.0, 1j])
    np.testing.assert_allclose(hamiltonian_simulation(H, b, 0.0, generator=0), b)
    found = hamiltonian_simulation(H, b, 0.4, 200_000, generator=0)
    np.testing.assert_allclose(found, np.exp(0.8j) * b, atol=0.02)


def test_sdp_finds_a_state_or_says_that_there_is_none():
    rng = np.random.default_rng(0)
    n = 24
    goal = np.linalg.qr(rng.standard_normal((n, 2)))[0]
    constraints, b = [], []
    for j in range(4):
        A, _ = hermitian(n, [1.0, -0.5], seed=j, kind=float)
        constraints.append(A)
        b.append(float(np.trace(goal.T @ A @ goal)) / 2 + 0.1)
    # Also: at least 0.6 of the trace on two given directions, which the first X is far from.
    constraints.append(-goal @ goal.T)
    b.append(-0.6)
    matrices = [SampledMatrix(A) for A in constraints]
    found = sdp_feasibility(matrices, b, 0.1, 400, 0, width=1.0)
    assert found.feasible
    assert 5 < found.steps < 4 * math.log(n) / 0.01
    X = found.X.dense()
    assert np.trace(X) == pytest.approx(1)
    assert np.linalg.eigvalsh(X)[0] >= -1e-12
    exact = np.array([np.trace(A @ X) for A in constraints])
    assert (exact <= np.array(b) + 0.1 + found.bound).all()
    np.testing.assert_allclose(found.values, exact, atol=found.bound)
    assert found.guarantee.trivial == 0.1
    # tr(A X) ≤ −0.3 and ≥ 0.3 at once: impossible.
    A = constraints[-1]
    none = sdp_feasibility([A, -A], [-0.3, -0.3], 0.2, 100, 0, width=1.0)
    assert not none.feasible
    assert none.steps == math.ceil(4 * math.log(n) / 0.04)
    first = sdp_feasibility([A], [1.0], 0.1)
    assert (first.feasible, first.steps) == (True, 0)
    np.testing.assert_allclose(first.X.dense(), np.eye(n) / n)


def test_sdp_of_complex_constraints():
    A, _ = hermitian(12, [1.0, -1.0])
    found = sdp_feasibility([A, -A], [-0.4, 1.0], 0.2, 300, 0, width=1.0)
    X = found.X.dense()
    np.testing.assert_allclose(X, X.conj().T)
    assert found.feasible
    assert np.trace(A @ X).real < -0.2 + found.bound
    value = np.trace(A @ X).real
    np.testing.assert_allclose(found.values, [value, -value], atol=0.1)


H = np.diag([1.0, 2.0])
X2, Y2 = np.array([[1.0, 2], [3, 4], [5, 7]]), np.array([1, -1, 1])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: centroid_distance([1, 2, 3], X2), ValueError, "p must be"),
        (lambda: centroid_distance([1, np.nan], X2), ValueError, "p must be finite"),
        (lambda: centroid_distance([1, 2], X2, 1), ValueError, "s must be an integer ≥ 2"),
        (lambda: least_squares_svm(X2, Y2, 0), ValueError, "gamma must be positive"),
        (lambda: least_squares_svm(X2, Y2[:2]), ValueError, "y must be"),
        (lambda: least_squares_svm(X2, [np.nan] * 3), ValueError, "y must be finite"),
        (lambda: least_squares_svm(X2, Y2 * 1j), TypeError, "y must be real"),
        (lambda: least_squares_svm(X2 * 1j, Y2), TypeError, "real rows"),
        (lambda: least_squares_svm(X2, Y2, r=0), ValueError, "r must be"),
        (lambda: least_squares_svm(X2, Y2).decision([[1.0]]), ValueError, "X must be"),
        (lambda: discriminant_analysis(X2, [1, 1, 1]), ValueError, "at least two classes"),
        (lambda: discriminant_analysis(X2, Y2, 2), ValueError, "k must be at most"),
        (lambda: discriminant_analysis(X2, [1, 2]), ValueError, "y must be"),
        (lambda: discriminant_analysis(X2, [1, 2, 3]), ValueError, "zero matrix"),
        (lambda: discriminant_analysis(X2 * np.nan, Y2), ValueError, "NaN"),
        (lambda: discriminant_analysis(X2 * 1j, Y2), TypeError, "real rows"),
        (lambda: discriminant_analysis(X2, Y2, shrinkage=0), ValueError, "shrinkage must be"),
        (lambda: hamiltonian_simulation(X2, [1, 2], 1), ValueError, "H must be square"),
        (lambda: hamiltonian_simulation(H, [1, 2, 3], 1), ValueError, "b must be"),
        (lambda: hamiltonian_simulation(H, [1, 2], np.inf), ValueError, "t must be finite"),
        (lambda: hamiltonian_simulation([[1, 2], [3, 1]], [1, 2], 1), ValueError, "Hermitian"),
        (lambda: hamiltonian_simulation(H, [1, 2], 1, 0), ValueError, "r must be"),
        (lambda: sdp_feasibility([], [], 0.1), ValueError, "one or more square"),
        (lambda: sdp_feasibility([H, np.eye(3)], [1, 1], 0.1), ValueError, "one size"),
        (lambda: sdp_feasibility([X2], [1], 0.1), ValueError, "square"),
        (lambda: sdp_feasibility([H], [1, 2], 0.1), ValueError, "b must be"),
        (lambda: sdp_feasibility([H], [np.nan], 0.1), ValueError, "finite"),
        (lambda: sdp_feasibility([H], [1], 0), ValueError, "eps must be positive"),
        (lambda: sdp_feasibility([H * 1j], [1], 0.1), ValueError, "constraint 0 must be Hermitian"),
        (lambda: sdp_feasibility([H, [[1, 2], [3, 1]]], [1, 1], 0.1), ValueError, "constraint 1"),
    ],
)  # fmt: skip
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()

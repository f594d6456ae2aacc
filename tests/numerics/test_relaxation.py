import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.numerics import (
    ChebCB,
    GridOperator,
    RelaxedSolver,
    SolveResult,
    TsallisINF,
    optimal_omega,
    sor_radius,
    sor_solve,
    ssor_pcg,
)

OMEGAS = (1, 1.2, 1.4, 1.6, 1.8, 1.95)
ONES, SINES = np.ones(100), np.sin(np.arange(1, 101))
BETA = 4 * np.cos(np.pi / 11)


def laplacian(c=0.0):
    return GridOperator((10, 10), 4 + c, (-1.0, -1.0))


def textbook(A, b, omega, tol, order):
    """SOR one entry at a time."""
    A, x = A.toarray(), np.zeros(len(b))
    first = np.linalg.norm(b)
    for k in range(1, 10_000):
        for i in order:
            x[i] += omega * (b[i] - A[i] @ x) / A[i, i]
        if np.linalg.norm(b - A @ x) < tol * first:
            return x, k
    raise AssertionError("no convergence")


@pytest.mark.parametrize(
    ("c", "b", "counts"),
    [
        (0, ONES, (223, 145, 88, 43, 89, 383)),
        (-0.15, ONES, (2927, 1950, 1252, 724, 293, 392)),
        (0.45, ONES, (64, 39, 25, 42, 89, 379)),
        (0, SINES, (131, 90, 58, 41, 86, 361)),
        (0.45, SINES, (44, 30, 25, 41, 84, 360)),
    ],
)
def test_sor_counts(c, b, counts):
    A = laplacian(c)
    results = [sor_solve(A, b, omega=w) for w in OMEGAS]
    np.testing.assert_allclose([r.iterations for r in results], counts, atol=1)
    for r in results:
        assert r.converged
        assert r.residual == pytest.approx(np.linalg.norm(b - A @ r.x) / np.linalg.norm(b))
        assert r.residual < 1e-8


@pytest.mark.parametrize(
    ("c", "omega", "count"),
    [(0, 1.5603879212747773, 41), (-0.15, 1.853594150353643, 147), (0.45, 1.3279192322517512, 23)],
)
def test_the_best_omega(c, omega, count):
    assert optimal_omega(BETA / (4 + c)) == pytest.approx(omega, rel=1e-13)
    assert abs(sor_solve(laplacian(c), ONES, omega=omega).iterations - count) <= 1


@pytest.mark.parametrize(
    ("c", "b", "counts"),
    [
        (0, ONES, (13, 12, 13, 13, 15, 17)),
        (0.45, ONES, (11, 9, 9, 12, 14, 15)),
        (0, SINES, (14, 12, 12, 13, 16, 19)),
        (0.45, SINES, (10, 9, 9, 12, 16, 18)),
    ],
)
def test_ssor_cg_counts(c, b, counts):
    A = laplacian(c)
    results = [ssor_pcg(A, b, omega=w) for w in OMEGAS]
    np.testing.assert_allclose([r.iterations for r in results], counts, atol=1)
    for r in results:
        assert r.converged
        np.testing.assert_allclose(A @ r.x, b, atol=1e-6)


@pytest.mark.parametrize(
    ("omega", "radius"),
    [(1, 0.9206267664), (1.3, 0.8499735927), (optimal_omega(BETA / 4), 0.5603879213), (1.7, 0.7)],
)
def test_radius_is_that_of_the_iteration(omega, radius):
    A = laplacian().to_csr().toarray()
    M = np.diag(np.diag(A)) / omega + np.tril(A, -1)
    found = np.abs(np.linalg.eigvals(np.eye(100) - A @ np.linalg.inv(M))).max()
    assert sor_radius(omega, BETA / 4) == pytest.approx(radius, abs=1e-10)
    # At the best ω eigenvalues meet in Jordan blocks, which rounding splits.
    assert found == pytest.approx(radius, abs=1e-6 if omega in (1, 1.3, 1.7) else 0.02)


@pytest.mark.parametrize("shape", [(7,), (6, 5), (5, 6), (5, 5), (1, 4), (3, 4, 5), (2, 3, 3)])
@pytest.mark.parametrize("kind", ["equal", "numbers", "arrays"])
def test_red_black_is_the_textbook_in_that_order(shape, kind):
    rng = np.random.default_rng(0)
    couplings, diag = [-1.0] * len(shape), 2.0 * len(shape) + 0.3
    if kind == "numbers":
        couplings = [-1.0 - 0.3 * a for a in range(len(shape))]
        diag = 3.0 * len(shape)
    elif kind == "arrays":
        edges = [[s - (a == i) for i, s in enumerate(shape)] for a in range(len(shape))]
        couplings = [-rng.random(e) for e in edges]
        diag = 2.0 * len(shape) + rng.random(shape)
    grid = GridOperator(shape, diag, couplings)
    A, b = grid.to_csr(), rng.standard_normal(grid.size)
    colour = np.indices(shape).sum(0).ravel() % 2
    order = np.concatenate((np.flatnonzero(colour == 0), np.flatnonzero(colour == 1)))
    x, count = textbook(A, b, 1.3, 1e-6, order)
    for matrix in (grid, A):
        r = sor_solve(matrix, b, omega=1.3, tol=1e-6, ordering="red-black")
        assert r.iterations == count
        np.testing.assert_allclose(r.x, x, atol=1e-13)
        assert r.residual == pytest.approx(
            np.linalg.norm(b - A @ r.x) / np.linalg.norm(b), rel=1e-6
        )
    x, count = textbook(A, b, 1.3, 1e-6, range(len(b)))
    natural = sor_solve(grid, b, omega=1.3, tol=1e-6)
    assert natural.iterations == count
    np.testing.assert_allclose(natural.x, x, atol=1e-13)
    np.testing.assert_allclose(grid @ x.reshape(shape), (A @ x).reshape(shape), atol=1e-14)
    assert abs(A - A.T).max() == 0


def test_one_colour_less_than_two_and_several_parts():
    A = sp.block_diag([np.array([[2.0, -1], [-1, 2]]), np.eye(3)]).tocsr()
    for ordering in ("natural", "red-black"):
        r = sor_solve(A, np.arange(1.0, 6), omega=1.0, ordering=ordering)
        np.testing.assert_allclose(A @ r.x, np.arange(1.0, 6), rtol=1e-7)
    with pytest.raises(ValueError, match="odd cycle"):
        sor_solve(np.eye(3) * 3 + np.ones((3, 3)), np.ones(3), ordering="red-black")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.floats(0.1, 1.9), st.integers(0, 10**6))
def test_any_positive_definite_matrix_is_solved(n, omega, seed):
    rng = np.random.default_rng(seed)
    F = rng.standard_normal((n, n + 2))
    A, b = F @ F.T + np.eye(n), rng.standard_normal(n)
    start, scale = rng.standard_normal(n), np.abs(b).max() * np.linalg.cond(A)
    exact = np.linalg.solve(A, b)
    for r in (
        sor_solve(A, b, start, omega, tol=1e-10, maxiter=100_000),
        ssor_pcg(A, b, start, omega, tol=1e-10),
    ):
        assert r.converged
        assert np.abs(r.x - exact).max() < 1e-6 * (scale + np.abs(exact).max())


def test_every_kind_of_matrix_gives_the_same():
    grid = laplacian(0.45)
    csr = grid.to_csr()
    tensor = torch.from_numpy(csr.toarray())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that its CSR is in beta
        sparse = [tensor.to_sparse_csr(), tensor.to_sparse_coo()]
    expected = sor_solve(grid, SINES)
    for A in (csr, csr.tocoo(), sp.csc_array(csr), csr.toarray(), csr.toarray().tolist()):
        np.testing.assert_array_equal(sor_solve(A, SINES).x, expected.x)
    for A in (tensor, *sparse):
        r = sor_solve(A, torch.from_numpy(SINES))
        assert isinstance(r.x, torch.Tensor)
        np.testing.assert_array_equal(r.x.numpy(), expected.x)
    with pytest.raises(TypeError, match="layout"):
        sor_solve(tensor.to_sparse_bsc((5, 5)), SINES)
    shaped = sor_solve(grid, SINES.reshape(10, 10), np.zeros((10, 10)), ordering="red-black")
    assert shaped.x.shape == (10, 10)
    whole = sor_solve(2 * np.eye(2, dtype=int), [2, 4])
    np.testing.assert_allclose(whole.x, [1, 2], rtol=1e-7)
    twice = sp.csr_matrix(([1.0, 1.0, 3.0], ([0, 0, 1], [0, 0, 1])))  # duplicates are summed
    np.testing.assert_allclose(sor_solve(twice, [2.0, 3.0]).x, [1, 1], rtol=1e-7)


def test_batches():
    A, omegas = laplacian(), np.array([1.2, 1.6, 1.6])
    b = np.stack([ONES, SINES, np.zeros(100)])
    r = sor_solve(A, b, omega=omegas)
    assert isinstance(r, SolveResult)
    assert r.x.shape == (3, 100)
    assert r.iterations.tolist() == [145, 41, 1]
    assert r.converged.all()
    for i in (0, 1):
        np.testing.assert_array_equal(r.x[i], sor_solve(A, b[i], omega=omegas[i]).x)
    shifts = [laplacian(c) for c in (0, 0.45)]
    several = ssor_pcg(shifts, b[:2], omega=1.4)
    stacked = ssor_pcg(np.stack([s.to_csr().toarray() for s in shifts]), b[:2], omega=1.4)
    assert several.iterations.tolist() == stacked.iterations.tolist() == [13, 9]
    with pytest.raises(ValueError, match="one size"):
        sor_solve([np.eye(2), np.eye(3)], np.ones((2, 2)))
    with pytest.raises(ValueError, match="omega must be a number or of shape"):
        sor_solve(A, b, omega=[1.2, 1.3])


def test_single_precision():
    A, b = laplacian(0.45).to_csr().astype(np.float32), SINES.astype(np.float32)
    for solve in (sor_solve, ssor_pcg):
        r = solve(A, b, tol=1e-5)
        assert r.x.dtype == np.float32
        assert r.converged
        np.testing.assert_allclose(A @ r.x, b, atol=1e-3)
        assert solve(A, SINES).x.dtype == np.float64
        with pytest.warns(RuntimeWarning, match="float32"):
            solve(A, b, tol=1e-8, maxiter=5)
    grid = GridOperator((10, 10), np.full((10, 10), 4, np.float32), (-1.0, -1.0))
    assert sor_solve(grid, b, tol=1e-5, ordering="red-black").x.dtype == np.float32


@pytest.mark.parametrize("ordering", ["natural", "red-black"])
def test_edges_of_sor(ordering):
    A = laplacian()
    zero = sor_solve(A, np.zeros(100), SINES, ordering=ordering)
    assert (zero.iterations, zero.converged, np.abs(zero.x).max()) == (1, True, 0)
    exact = np.round(SINES * 8)  # A x is exact in whole numbers
    done = sor_solve(A, A @ exact, exact, ordering=ordering)
    assert (done.iterations, done.converged, done.residual) == (1, True, 0)
    np.testing.assert_array_equal(done.x, exact)
    short = sor_solve(A, ONES, maxiter=7, ordering=ordering)
    assert (short.iterations, short.converged) == (7, False)
    # The tolerance is relative to the start.
    near = sor_solve(A, ONES, sor_solve(A, ONES).x, ordering=ordering)
    assert near.iterations > 20
    with pytest.raises(ValueError, match="not positive definite"):
        sor_solve(GridOperator((10, 10), 1.0, (-1.0, -1.0)), ONES, ordering=ordering)


def test_edges_of_ssor_cg():
    A = laplacian()
    assert ssor_pcg(A, ONES, ssor_pcg(A, ONES).x).iterations == 0
    assert ssor_pcg(A, np.zeros(100), SINES)[1:] == (1, True, 0.0)
    short = ssor_pcg(A, SINES, maxiter=2)
    assert (short.iterations, short.converged) == (2, False)
    with pytest.raises(ValueError, match="pᵀAp"):
        ssor_pcg(np.array([[1.0, 2], [2, 1]]), [1.0, -1])
    with pytest.raises(ValueError, match="symmetric"):
        ssor_pcg(np.array([[2.0, 1], [0, 2]]), [1.0, 1])


def test_ssor_cg_is_the_textbook_with_that_preconditioner():
    rng = np.random.default_rng(0)
    F, b, omega = rng.standard_normal((12, 15)), rng.standard_normal(12), 1.3
    A = F @ F.T + np.diag(rng.uniform(0, 40, 12))
    D, L = np.diag(np.diag(A)), np.tril(A, -1)
    X = D + omega * L
    P = X.T @ np.linalg.inv(D) @ X / (omega * (2 - omega))
    x, r = np.zeros(12), b.copy()
    z = p = np.linalg.solve(P, r)
    for _ in range(4):
        step = (r @ z) / (p @ A @ p)
        x, before = x + step * p, r @ z
        r = r - step * A @ p
        z = np.linalg.solve(P, r)
        p = z + (r @ z) / before * p
    found = ssor_pcg(A, b, omega=omega, maxiter=4)
    np.testing.assert_allclose(found.x, x, rtol=1e-9)
    assert found.residual == pytest.approx(np.linalg.norm(r) / np.linalg.norm(b))


def test_pure_neumann():
    """Singular: solved where the data are compatible, told where they are not."""
    diag = np.full((8, 8), 4.0)
    for edge in ((0, ...), (-1, ...), (..., 0), (..., -1)):
        diag[edge] -= 1
    A, b = GridOperator((8, 8), diag, (-1.0, -1.0)), np.sin(np.arange(64))
    b -= b.mean()
    for solve in (sor_solve, ssor_pcg):
        r = solve(A, b)
        assert r.converged
        np.testing.assert_allclose(A @ r.x, b, atol=1e-6)
    assert not sor_solve(A, b + 1, maxiter=500).converged


BAD = {
    "square": (np.ones((2, 3)), np.ones(2), {}),
    "not empty": (np.ones((0, 0)), np.ones(0), {}),
    "finite": (np.diag([1.0, np.nan]), np.ones(2), {}),
    "positive diagonal": (np.diag([1.0, 0.0]), np.ones(2), {}),
    r"A\[1, 1\] = -2": (np.diag([1.0, -2.0]), np.ones(2), {}),
    "b must have shape": (np.eye(2), np.ones(3), {}),
    "b must be finite": (np.eye(2), np.array([1, np.inf]), {}),
    "x0 must have": (np.eye(2), np.ones(2), {"x0": np.ones(3)}),
    "x0 must be finite": (np.eye(2), np.ones(2), {"x0": np.array([np.nan, 0])}),
    "omega": (np.eye(2), np.ones(2), {"omega": 2.0}),
    "between 0": (np.eye(2), np.ones(2), {"omega": 0.0}),
    "both excluded": (np.eye(2), np.ones(2), {"omega": float("nan")}),
    "tol": (np.eye(2), np.ones(2), {"tol": 0.0}),
    "maxiter": (np.eye(2), np.ones(2), {"maxiter": 0}),
}


@pytest.mark.parametrize("match", BAD)
def test_bad_input(match):
    A, b, options = BAD[match]
    for solve in (sor_solve, ssor_pcg):
        with pytest.raises(ValueError, match=match):
            solve(A, b, **options)


def test_bad_types_and_orderings():
    with pytest.raises(TypeError, match="real numbers"):
        sor_solve(np.eye(2) * 1j, np.ones(2))
    with pytest.raises(ValueError, match="ordering"):
        sor_solve(np.eye(2), np.ones(2), ordering="random")
    for arguments, match in (
        (((), 1.0, ()), "positive lengths"),
        (((3, 0), 1.0, (1.0, 1.0)), "positive lengths"),
        (((3, 3), 4.0, (-1.0,)), "one entry per axis"),
        (((3, 3), np.ones(4), (-1.0, -1.0)), "broadcast"),
        (((3, 3), 0.0, (-1.0, -1.0)), "positive diagonal"),
        (((3, 3), 4.0, (np.ones((3, 3)), -1.0)), r"shape \(2, 3\)"),
        (((3, 3), 4.0, (float("nan"), -1.0)), "finite"),
    ):
        with pytest.raises(ValueError, match=match):
            GridOperator(*arguments)
    with pytest.raises(ValueError, match="x must have shape"):
        laplacian().matvec(np.ones(99))
    for beta in (-0.1, 1.0):
        with pytest.raises(ValueError, match="beta"):
            optimal_omega(beta)


@pytest.mark.parametrize("method", ["sor", "ssor-cg"])
@pytest.mark.parametrize("policy", ["tsallis", "binned", "chebcb", 1.4, TsallisINF(random_state=3)])
def test_relaxed_solver(method, policy):
    solver = RelaxedSolver(method, policy, low=0, high=1, random_state=0)
    matrices = {c: laplacian(c).to_csr() for c in (0.0, 0.45)}
    x = None
    for t in range(12):
        c = 0.45 * (t % 2)
        r = solver.solve(matrices[c], SINES, x, context=c)
        np.testing.assert_allclose(matrices[c] @ r.x, SINES, atol=1e-6)
        omega, cost = solver.history_[-1]
        assert cost == max(r.iterations, 1)
        assert omega == 1.4 if policy == 1.4 else omega in solver.policy_.grid
        x = r.x
    assert len(solver.history_) == 12


def test_relaxed_solver_learns_and_counts():
    grid = [1.0, 1.6]
    solver = RelaxedSolver("sor", "tsallis", grid=grid, random_state=0, ordering="red-black")
    A = laplacian()
    for _ in range(60):
        solver.solve(A, ONES)
    chosen = [omega for omega, _ in solver.history_[-20:]]
    assert chosen.count(1.6) >= 15
    batch = solver.solve(A, np.stack([ONES, SINES]))
    assert solver.history_[-1][1] == batch.iterations.mean()
    capped = RelaxedSolver("sor", 1.0, maxiter=5)
    assert not capped.solve(A, ONES).converged
    assert capped.history_ == [(1.0, 5.0)]
    free = RelaxedSolver("ssor-cg", "tsallis", random_state=0)
    assert free.solve(A, ONES, sor_solve(A, ONES, tol=1e-12).x).iterations == 0
    assert free.history_[0][1] == 1
    with pytest.raises(ValueError, match="b must have shape"):
        solver.solve(A, np.ones(3))
    solver.solve(A, ONES)  # goes on after a refusal


def test_relaxed_solver_refuses():
    for options, match in (
        ({"method": "jacobi"}, "method"),
        ({"policy": "greedy"}, "policy"),
        ({"policy": "chebcb"}, "low and high"),
        ({"policy": 2.5}, "omega"),
        ({"ordering": "wave"}, "ordering"),
        ({"method": "ssor-cg", "ordering": "red-black"}, "natural"),
    ):
        with pytest.raises(ValueError, match=match):
            RelaxedSolver(**options)
    with pytest.raises(TypeError, match="predict and update"):
        RelaxedSolver(policy=[1.0])
    with pytest.raises(ValueError, match="context"):
        RelaxedSolver(policy=ChebCB()).solve(np.eye(2), np.ones(2))

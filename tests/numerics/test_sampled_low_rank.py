import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.stats import chisquare

from stiefel.numerics.sampled import (
    GapWarning,
    SampledMatrix,
    gram_error_rms,
    lowrank,
    lowrank_solve,
    pca_topk,
    recommend,
    sketch,
    svt,
    threshold,
)
from stiefel.numerics.sampled.bounds import gram_factor
from stiefel.numerics.sampled.transform import Ramp

A = np.array([[1.0, 2, 0], [3, 4, 1], [0, 1, -2], [2, 0, 2]])
ROWS, COLS = [1, 3, 2, 1], [0, 2, 1]


def low_rank(n=300, d=20, k=3, seed=0, noise=0.0, kind=float):
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((n, k)), rng.standard_normal((k, d))
    if kind is complex:
        right = right + 1j * rng.standard_normal((k, d))
    return (left * np.arange(k, 0, -1)) @ right + noise * rng.standard_normal((n, d))


def test_sheet_sketch():
    s = sketch(SampledMatrix(A), rows=ROWS, cols=COLS)
    R = [
        [1.9513309068, 2.6017745424, 0.6504436356],
        [2.3452078799, 0, 2.3452078799],
        [0, 1.4832396974, -2.9664793948],
        [1.9513309068, 2.6017745424, 0.6504436356],
    ]
    np.testing.assert_allclose(s.R, R, atol=1e-10)
    np.testing.assert_allclose((s.R**2).sum(1), 11)  # all of norm ‖A‖_F/√r
    q = (s.R**2).sum(0) / 44
    np.testing.assert_allclose(q, [0.2980769231, 0.3576923077, 0.3442307692], atol=1e-10)
    np.testing.assert_allclose(s.C[0], [2.0635078183, 0.6400651736, 2.5116217326], atol=1e-10)
    np.testing.assert_allclose(s.C[1], [2.4800277487, 2.3077878030, 0], atol=1e-10)
    found = np.linalg.svd(s.C, compute_uv=False)
    np.testing.assert_allclose(found, [5.2464309069, 3.9508537940, 0.9304391642], atol=1e-10)
    np.testing.assert_allclose(np.sqrt(s.spectrum[1]), found, atol=1e-10)
    np.testing.assert_allclose(
        np.linalg.svd(s.R, compute_uv=False), [5.1770707176, 4.0444038025, 0.9169169362], atol=1e-10
    )
    np.testing.assert_allclose(
        np.linalg.svd(A, compute_uv=False), [5.7781376188, 3.1701486515, 0.7505219419], atol=1e-10
    )
    sigma, V = lowrank(SampledMatrix(A), 2, sketch_of=s, orthonormal=False)
    np.testing.assert_allclose(sigma, found[:2], atol=1e-10)
    np.testing.assert_allclose(np.diag(V.T @ V), [0.9731557628, 1.0485398803], atol=1e-10)
    Q = lowrank(SampledMatrix(A), 2, sketch_of=s).V
    np.testing.assert_allclose(Q.T @ Q, np.eye(2), atol=1e-14)
    assert 44 - np.linalg.norm(A @ Q) ** 2 == pytest.approx(0.6965896534, abs=1e-9)


def test_sheet_identity_of_the_gram_error():
    """E‖RᵀR − AᵀA‖_F² = (‖A‖_F⁴ − ‖AᵀA‖_F²)/r: 144 for r = 5, also for all numbers of rows."""
    gram = A.T @ A
    assert (gram**2).sum() == pytest.approx(1216)
    assert gram_error_rms(44, 1216, 5) ** 2 == pytest.approx(144)
    m, rng = SampledMatrix(A), np.random.default_rng(0)
    draws = 20_000
    index, p = m.sample_rows(5 * draws, rng)
    R = (A[index] / np.sqrt(5 * p)[:, None]).reshape(draws, 5, 3)
    grams = R.swapaxes(1, 2) @ R
    np.testing.assert_allclose(grams.mean(0), gram, atol=0.25)  # unbiased
    assert ((grams - gram) ** 2).sum((1, 2)).mean() == pytest.approx(144, rel=0.02)


def test_taking_each_row_once_is_not_the_matrix():
    s = sketch(SampledMatrix(A), rows=np.arange(4))
    assert np.linalg.norm(s.R.T @ s.R - A.T @ A) > 5


def test_columns_are_unbiased_and_drawn_by_length():
    m, rng = SampledMatrix(low_rank(30, 8)), np.random.default_rng(0)
    first = sketch(m, 20, generator=rng)
    total, counts = np.zeros((20, 20)), np.zeros(8)
    for _ in range(1500):
        s = sketch(m, c=4, rows=first.rows, generator=rng)
        total += s.C @ s.C.T
        counts += np.bincount(s.cols, minlength=8)
    exact = first.R @ first.R.T
    assert np.linalg.norm(total / 1500 - exact) < 0.03 * np.linalg.norm(exact)
    q = (first.R**2).sum(0)
    assert chisquare(counts, counts.sum() * q / q.sum()).pvalue > 1e-3


def test_concentration_holds_more_often_than_it_must():
    a = low_rank(200, 6, 6)
    m, gram, rng = SampledMatrix(a), a.T @ a, np.random.default_rng(0)
    for r, delta in ((10, 0.5), (50, 0.2)):
        errors = []
        for _ in range(300):
            R = sketch(m, r, generator=rng).R
            errors.append(np.linalg.norm(R.T @ R - gram) / m.fro2)
        assert np.mean(np.array(errors) > gram_factor(r, delta)) <= delta
    assert gram_factor(100, 0.9) == pytest.approx(0.1 / math.sqrt(0.9))  # Markov
    assert gram_factor(100, 0.001) == pytest.approx(0.1 * (1 + math.sqrt(math.log(1000))))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_residual_is_bounded_by_the_two_errors(seed, k, columns):
    """‖A − AQQᴴ‖² ≤ best + 2 √k (‖RᴴR − AᴴA‖ + ‖CCᴴ − RRᴴ‖), whatever was drawn."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((25, 9)) * np.logspace(0, -2, 9)
    m = SampledMatrix(a)
    s = sketch(m, 12, 6 if columns else None, rng)
    if len(s.spectrum[1]) < k:
        return
    Q = lowrank(m, k, sketch_of=s).V
    sigma2 = np.linalg.svd(a, compute_uv=False) ** 2
    residual = m.fro2 - np.linalg.norm(a @ Q) ** 2
    errors = np.linalg.norm(s.R.T @ s.R - a.T @ a) + np.linalg.norm(s.C @ s.C.T - s.R @ s.R.T)
    assert residual >= sigma2[k:].sum() - 1e-9
    assert residual <= sigma2[k:].sum() + 2 * math.sqrt(k) * errors + 1e-9


@pytest.mark.parametrize("kind", [float, complex])
@pytest.mark.parametrize(("r", "c"), [(40, None), (40, 15), (15, 19)])
def test_a_matrix_of_rank_k_is_found_exactly(kind, r, c):
    """Few rows span the row space of a low-rank matrix: the projection is exact."""
    a = low_rank(kind=kind)
    for given_ in (a, sparse.csr_array(a)):
        found = lowrank(given_, 3, r, c, generator=0)
        sigma, Q = found
        assert len(found) == 2
        assert found[1] is Q
        assert sigma.shape == (3,)
        np.testing.assert_allclose(Q.conj().T @ Q, np.eye(3), atol=1e-12)
        assert np.linalg.norm(a - a @ Q @ Q.conj().T) < 1e-6 * np.linalg.norm(a)


def test_more_rows_are_better_and_dimension_does_not_matter():
    residual = {}
    for n in (500, 10_000):
        a = low_rank(n, 30, 5, noise=1.0)
        best = (np.linalg.svd(a, compute_uv=False)[5:] ** 2).sum()
        m = SampledMatrix(a)
        for r in (50, 800):
            found = [lowrank(m, 5, r, generator=seed).V for seed in range(8)]
            ratios = [(m.fro2 - np.linalg.norm(a @ V) ** 2) / best for V in found]
            residual[n, r] = np.mean(ratios)
    assert residual[500, 800] < residual[500, 50]
    assert residual[10_000, 50] == pytest.approx(residual[500, 50], abs=0.03)


def test_bounds_say_when_they_are_vacuous():
    a = low_rank(400, 10, 1)
    few, many = lowrank(a, 1, 20, generator=0), lowrank(a, 1, 2000, generator=0)
    assert few.vacuous
    assert "Vacuous at 20 draws" in str(few.guarantee)
    assert "would be needed" in str(few.guarantee)
    assert not many.vacuous
    assert "Vacuous" not in str(many.guarantee)
    assert many.bound == pytest.approx(2 * gram_factor(2000, 0.05) * (a**2).sum())
    # As many as were said to be needed are about enough.
    enough = math.ceil(few.guarantee.needed * 1.1)
    assert not lowrank(a, 1, enough, generator=0).vacuous
    uniform = lowrank(a, 1, sketch_of=sketch(a, 5000, sampling="uniform", generator=0))
    assert uniform.bound == math.inf
    assert uniform.vacuous
    assert "no bound is known" in str(uniform.guarantee)


@pytest.mark.parametrize("kind", [float, complex])
def test_functions_of_the_gram_matrix(kind):
    """Rᴴ f̄(RRᴴ) R + f(0) I is f(RᴴR) exactly when all columns are kept."""
    a = low_rank(60, 7, 5, kind=kind)
    s = sketch(SampledMatrix(a), 30, generator=0)
    values, vectors = np.linalg.eigh(s.R.conj().T @ s.R)
    values = np.maximum(values, 0)
    scale = values[-1]
    rng = np.random.default_rng(0)
    X = rng.standard_normal((7, 3)) + (1j * rng.standard_normal((7, 3)) if kind is complex else 0)
    for f in (
        lambda x: np.exp(-x / scale),
        lambda x: np.sqrt(x),
        lambda x: np.exp(1j * x / scale),
        lambda x: 1.0 + 0 * x,
    ):
        exact = (vectors * f(values)) @ vectors.conj().T
        found = svt(s, f)
        np.testing.assert_allclose(found.matmul(X), exact @ X, atol=1e-5 * np.abs(exact).max())
        np.testing.assert_allclose(found.rmatmul(X.T), X.T @ exact, atol=1e-5 * abs(exact).max())
        np.testing.assert_allclose(found.row(2), exact[2], atol=1e-5 * np.abs(exact).max())
        formed = s.R.conj().T @ found.U @ s.R + found.f0 * np.eye(7)
        np.testing.assert_allclose(formed @ X, found.matmul(X), atol=1e-8 * np.abs(exact).max())
        assert found.shape == (7, 7)
    shifted = svt(s, lambda x: 1 / (x + 1), f0=1.0)
    np.testing.assert_allclose(
        shifted.matmul(X[:, 0]), np.linalg.solve(s.R.conj().T @ s.R + np.eye(7), X[:, 0]), atol=1e-6
    )


def test_transform_error_is_bounded_by_slopes():
    """‖f(AᴴA) − (RᴴUR + f(0) I)‖_F ≤ L ε_rows + ‖R‖² L̄ ε_columns, with the errors as they are."""
    a = low_rank(200, 12, 4)
    gram = a.T @ a
    values, vectors = np.linalg.eigh(gram)
    scale = values[-1]
    f = lambda x: x / (x + scale)  # noqa: E731 - slopes 1/scale and 1/scale²
    exact = (vectors * f(values)) @ vectors.T
    for c in (None, 8):
        for seed in range(20):
            s = sketch(SampledMatrix(a), 60, c, seed)
            found = svt(s, f)
            error = np.linalg.norm(found.matmul(np.eye(12)) - exact)
            rows = np.linalg.norm(s.R.T @ s.R - gram)
            columns = np.linalg.norm(s.C @ s.C.T - s.R @ s.R.T)
            proved = rows / scale + np.linalg.norm(s.R, 2) ** 2 / scale**2 * columns
            assert error <= proved + 1e-8
            assert error <= found.bound
            given_ = svt(s, f, lipschitz=(1 / scale, 1 / scale**2))
            assert found.bound == pytest.approx(given_.bound, rel=0.01)  # slopes were measured well


def test_rows_of_a_function_are_drawn_by_their_squares():
    a = low_rank(50, 8, 3)
    s = sketch(SampledMatrix(a), 40, generator=0)
    for f0 in (0.0, 0.7):
        function = svt(s, lambda x, f0=f0: f0 + x / (x + 100), f0)
        found = function.sample_row(3, 4000, 1)
        expected = function.row(3) ** 2
        counts = np.bincount(found, minlength=8)
        assert chisquare(counts, 4000 * expected / expected.sum()).pvalue > 1e-3


def test_slopes_of_the_ramp_are_its_steepest():
    for sigma, eta in ((3.0, 0.3), (0.5, 0.05), (2.0, 0.9)):
        ramp = Ramp(sigma, eta)
        x = np.linspace(0, 3 * sigma**2, 200_001)[1:]
        for slope, y in zip(ramp.lipschitz, (ramp(x), ramp(x) / x), strict=True):
            assert slope == pytest.approx(np.abs(np.diff(y)).max() / x[0], rel=2e-3)


def test_recommendation_is_the_thresholded_row():
    a = low_rank(120, 15, 4, noise=0.1)
    m = SampledMatrix(a)
    U, sigma, Vh = np.linalg.svd(a, full_matrices=False)
    middle = math.sqrt(sigma[3] * sigma[4])
    ramp = np.clip((sigma**2 / middle**2 - 0.7) / 0.6, 0, 1)
    exact = (U * sigma * ramp) @ Vh
    function = threshold(sketch(m, 1500, generator=0), middle, 0.3)
    for i in (0, 77):
        found = recommend(m, i, middle, 0.3, function=function)
        assert np.linalg.norm(found - exact[i]) < 0.15 * np.linalg.norm(exact[i])
        np.testing.assert_allclose(np.asarray(found), found.row)
        drawn = found.sample(3000, 0)
        squares = found.row**2
        keep = squares > 1e-3 * squares.sum()
        counts = np.bincount(drawn, minlength=15)[keep]
        assert chisquare(counts, counts.sum() * squares[keep] / squares[keep].sum()).pvalue > 1e-3
        assert found.vector.acceptance == pytest.approx(1 / found.phi, rel=0.15)
    # φ = r Σ |λ_t|² ‖R_t‖² / ‖u‖².
    parts = function.coefficients(a[77]) ** 2 * (function.R**2).sum(1)
    assert found.phi == pytest.approx(1500 * parts.sum() / (found.row**2).sum())
    alone = recommend(m, 5, middle, 0.3, r=1500, generator=1)
    assert np.linalg.norm(alone.row - exact[5]) < 0.15 * np.linalg.norm(exact[5])
    assert alone.vacuous  # the proved error is far above the one that is seen
    assert recommend(m, 0, 1e-3 * sigma[-1], r=50, generator=0).row.shape == (15,)


def test_least_squares_in_the_leading_directions():
    a = low_rank(4000, 12, 4, noise=0.05)
    rng = np.random.default_rng(0)
    b = a @ rng.standard_normal(12) + rng.standard_normal(4000)
    U, sigma, Vh = np.linalg.svd(a, full_matrices=False)
    exact = Vh[:4].T @ ((U.T @ b)[:4] / sigma[:4])
    m = SampledMatrix(a)
    errors = {}
    for r in (100, 3000):
        found = [np.asarray(lowrank_solve(m, b, 4, r=r, generator=s)) for s in range(6)]
        errors[r] = np.mean([np.linalg.norm(x - exact) for x in found]) / np.linalg.norm(exact)
    assert errors[3000] < 0.1
    assert errors[3000] < 0.4 * errors[100]
    by_sigma = lowrank_solve(m, b, sigma=sigma[3] / 2, r=500, generator=0)
    np.testing.assert_array_equal(by_sigma.x, lowrank_solve(m, b, 4, r=500, generator=0).x)
    assert by_sigma.sigma.shape == (4,)
    assert by_sigma.vacuous
    assert (a @ by_sigma).shape == (4000,)


def test_least_squares_of_a_consistent_system_is_exact():
    """b = A x: any rows give x in the row space, with columns drawn too."""
    a = low_rank(200, 20, 3, kind=complex)
    x = a[:5].conj().T @ np.arange(5)  # in the row space
    for c in (None, 15):
        np.testing.assert_allclose(
            lowrank_solve(a, a @ x, 3, r=40, c=c, generator=0).x, x, rtol=1e-6
        )


def test_solution_bound_holds_where_it_says_something():
    a = np.linalg.qr(np.random.default_rng(0).standard_normal((200, 1)))[0] @ np.ones((1, 3))
    b = a[:, 0] + 0.01
    exact = np.linalg.lstsq(a, b, rcond=None)[0]
    for seed in range(10):
        found = lowrank_solve(a, b, 1, r=100_000, generator=seed)
        assert not found.vacuous
        assert np.linalg.norm(found.x - exact) <= found.bound


def test_principal_components_and_their_gaps():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3000, 6)) * [9, 5, 3, 1, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eigenvalues, vectors = found = pca_topk(a, 2, 2000, generator=0)
    exact = np.linalg.eigvalsh(a.T @ a)[::-1]
    np.testing.assert_allclose(eigenvalues, exact[:2], rtol=0.1)
    assert (np.abs(vectors[[0, 1], [0, 1]]) > 0.98).all()
    assert found.gaps[0] == pytest.approx(1 - eigenvalues[1] / eigenvalues[0])
    assert found.bound == pytest.approx(gram_factor(2000, 0.05) * (a**2).sum())
    assert len(found) == 2
    assert found[0] is eigenvalues
    with pytest.warns(GapWarning, match="eigenvalues 1 and 2"):
        pca_topk(np.tile(np.eye(2), (400, 1)) @ [[1, 0, 0], [0, 1.001, 0]], 1, 40_000, generator=0)


def test_uniform_rows_are_unbiased_too():
    a = low_rank(50, 4, 4)
    rng = np.random.default_rng(0)
    grams = [sketch(a, 20, generator=rng, sampling="uniform").R for _ in range(2000)]
    mean = np.mean([R.T @ R for R in grams], axis=0)
    assert np.linalg.norm(mean - a.T @ a) < 0.03 * np.linalg.norm(a.T @ a)


def test_wide_matrices_draw_columns_by_themselves():
    wide = np.random.default_rng(0).standard_normal((30, 600))
    assert sketch(wide, 10, generator=0).C.shape == (10, 10)
    assert sketch(wide[:, :512], 10, generator=0).C.shape == (10, 512)
    assert sketch(wide, 10, 600, generator=0).C.shape == (10, 600)
    with pytest.raises(ValueError, match="at most"):
        lowrank(wide, 11, 10, generator=0)


M = SampledMatrix(A)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: sketch(M, 0), ValueError, "r must be an integer ≥ 1, got 0"),
        (lambda: sketch(M, 5, 0), ValueError, "c must be an integer ≥ 1"),
        (lambda: sketch(M, 5, sampling="leverage"), ValueError, "sampling must be l2 or uniform"),
        (lambda: sketch(M, rows=[7]), IndexError, "rows must be in"),
        (lambda: sketch(M, rows=[]), ValueError, "number of rows"),
        (lambda: sketch([[0.0, 0], [1, 2]], rows=[0]), ValueError, "row 0 is zero"),
        (lambda: sketch([[0.0, 0], [1, 0]], rows=[1], cols=[1]), ValueError, "column 1 is zero"),
        (lambda: sketch([[1.0, np.nan]]), ValueError, "NaN"),
        (lambda: sketch(np.zeros((2, 2))), ValueError, "cannot l2-sample a zero matrix"),
        (lambda: lowrank(M, 4, 10), ValueError, r"k must be at most min\(r, c\) = 3, got 4"),
        (lambda: lowrank(M, 3, 2), ValueError, r"min\(r, c\) = 2"),
        (lambda: lowrank(M, 0), ValueError, "k must be an integer ≥ 1"),
        (lambda: lowrank(np.ones((9, 4)), 2, 8), ValueError, "rank 1"),
        (lambda: pca_topk(M, 4), ValueError, "k must be at most"),
        (lambda: lowrank_solve(M, [1, 2, 3], 1), ValueError, "b must be"),
        (lambda: lowrank_solve(M, [np.nan] * 4, 1), ValueError, "b must be finite"),
        (lambda: lowrank_solve(M, [1, 2, 3, 4]), ValueError, "give k or sigma"),
        (lambda: lowrank_solve(M, [1, 2, 3, 4], 1, 1.0), ValueError, "give k or sigma"),
        (lambda: lowrank_solve(M, [1, 2, 3, 4], sigma=0), ValueError, "sigma must be positive"),
        (lambda: lowrank_solve(M, [1, 2, 3, 4], sigma=99), ValueError, "above every singular"),
        (lambda: svt(sketch(M, 5), lambda x: np.log(x)), ValueError, r"f\(0\) is not"),
        (lambda: svt(sketch(M, 5), lambda x: x.sum()), ValueError, "one number for each"),
        (lambda: svt(sketch(M, 5), np.sqrt, f0=np.nan), ValueError, "f0 must be finite"),
        (lambda: svt(sketch(M, 5), np.sqrt).matmul(np.ones(2)), ValueError, "X must be"),
        (lambda: svt(sketch(M, 5), np.sqrt).row(3), IndexError, "must be in 0 … 2"),
        (lambda: recommend(M, 9, 1.0), IndexError, "must be in 0 … 3"),
        (lambda: recommend(M, 0, -1.0), ValueError, "sigma must be positive"),
        (lambda: recommend(M, 0, 1.0, 1.5), ValueError, "eta must be between"),
        (lambda: recommend(M, 0, 1.0, r=0), ValueError, "r must be"),
        (lambda: recommend(M, 0, 1e3, generator=0).sample(1), ValueError, "zero vector"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()

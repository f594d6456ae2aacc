import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.numerics import fit_basis
from stiefel.numerics import least_squares_basis as module

X = np.array([-1, -0.6, -0.2, 0.2, 0.6, 1])
LINE = np.stack([np.ones(6), X], axis=1)
F = np.array([1.0, 0, 2, -1, 3, 5])


def naive(Phi, mu):
    """Q of NumPy's own QR."""
    return np.linalg.qr(np.sqrt(mu)[:, None] * Phi)[0]


def test_values_of_the_six_points():
    basis = fit_basis(LINE)
    kernel = [3.1428571429, 1.7714285714, 1.0857142857]
    np.testing.assert_allclose(basis.kernel(), kernel + kernel[::-1], atol=1e-10)
    best = basis.project(F)
    np.testing.assert_allclose(best, [1.6666666667, 1.2686700948], atol=1e-10)
    phi = basis.evaluate(LINE)
    np.testing.assert_allclose(phi, np.stack([np.ones(6), X * 1.463850109], 1), atol=1e-9)
    assert np.mean((F - phi @ best) ** 2) == pytest.approx(2.2793650794, abs=1e-10)
    np.testing.assert_allclose(
        basis.feature_coefficients(best), np.linalg.lstsq(LINE, F)[0], atol=1e-13
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 40), st.booleans(), st.integers(0, 2**31))
def test_is_a_weighted_qr(m, more, weighted, seed):
    rng = np.random.default_rng(seed)
    n = m + more
    Phi = rng.standard_normal((n, m)) * 10.0 ** rng.integers(-8, 9, m)
    mu = rng.random(n) + 0.01 if weighted else None
    basis = fit_basis(Phi, mu)
    weights = np.full(n, 1 / n) if mu is None else mu / mu.sum()
    np.testing.assert_allclose(basis.Q.T @ basis.Q, np.eye(m), atol=1e-12)
    np.testing.assert_allclose(basis.Q @ basis.R, np.sqrt(weights)[:, None] * Phi, rtol=1e-7)
    assert (np.diagonal(basis.R) > 0).all()
    assert basis.leverage.sum() == pytest.approx(m)
    np.testing.assert_allclose(
        basis.leverage, np.square(naive(Phi, weights)).sum(1), rtol=1e-6, atol=1e-10
    )
    np.testing.assert_allclose(basis.kernel() * weights, basis.leverage)


def test_leverage_depends_on_the_span_only():
    rng = np.random.default_rng(0)
    Phi, mixed = rng.standard_normal((50, 4)), rng.standard_normal((4, 4))
    one, other = fit_basis(Phi), fit_basis(Phi @ mixed)
    np.testing.assert_allclose(one.leverage, other.leverage, atol=1e-12)


@pytest.mark.parametrize("kind", ["array", "memmap", "function", "tensor"])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_on_demand_are_those_in_memory(kind, weighted, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1000)  # so that there are many blocks
    rng = np.random.default_rng(1)
    Phi = rng.standard_normal((700, 3))
    mu = rng.random(700) if weighted else None
    source, size = Phi, None
    if kind == "memmap":
        source = np.memmap(tmp_path / "rows", dtype=np.float64, mode="w+", shape=Phi.shape)
        source[:] = Phi
    elif kind == "function":
        source, size = (lambda index: Phi[index]), 700
    elif kind == "tensor":
        source = torch.from_numpy(Phi)
    kept, streamed = fit_basis(Phi, mu), fit_basis(source, mu, size=size, keep=False)
    assert streamed.Q is None
    assert "on demand" in repr(streamed)
    index = np.array([5, 699, 5, 0])
    np.testing.assert_allclose(streamed.rows(index), kept.Q[index], atol=1e-14)
    np.testing.assert_allclose(streamed.leverage, kept.leverage, atol=1e-14)
    values = rng.standard_normal((700, 2))
    np.testing.assert_allclose(streamed.project(values), kept.project(values), atol=1e-13)
    weights = np.full(700, 1 / 700) if mu is None else mu / mu.sum()
    np.testing.assert_allclose(
        np.abs(kept.Q), np.abs(naive(Phi, weights)), atol=1e-13
    )  # the slow twin has signs of its own


def test_ill_conditioned_features_are_orthonormalised_twice():
    Phi = np.vander(np.linspace(-1, 1, 3000), 25, increasing=True)
    assert np.linalg.cond(Phi) > 1e8
    for keep in (True, False):
        basis = fit_basis(Phi, keep=keep)
        rows = basis.rows(np.arange(3000))
        np.testing.assert_allclose(rows.T @ rows, np.eye(25), atol=1e-13)
        assert len(basis.inverses) == 2
    once = Phi @ np.linalg.inv(np.linalg.qr(Phi, mode="r"))
    assert np.abs(once.T @ once - np.eye(25)).max() > 1e-10  # what one pass alone leaves


def test_float32_integers_and_lists_are_computed_in_float64():
    exact = fit_basis(LINE * 5).leverage
    for Phi in (
        (LINE * 5).astype(np.int64),
        (LINE * 5).tolist(),
        torch.from_numpy(LINE * 5),
        torch.from_numpy(LINE * 5).to(torch.int32),
    ):
        basis = fit_basis(Phi)
        assert basis.leverage.dtype == basis.Q.dtype == np.float64
        np.testing.assert_allclose(basis.leverage, exact, atol=1e-14)


class TestDependentColumns:
    Phi = np.column_stack((LINE, 3 * X - 2, np.zeros(6), X**2))

    def test_are_refused_with_the_rank(self):
        with pytest.raises(ValueError, match=r"rank 3 with 5 columns .* such as .*3.*rank='drop'"):
            fit_basis(self.Phi)

    def test_are_dropped(self):
        basis = fit_basis(self.Phi, rank="drop")
        assert len(basis.columns) == 3
        assert 3 not in basis.columns
        assert 4 in basis.columns
        expected = fit_basis(np.column_stack((LINE, X**2))).leverage
        np.testing.assert_allclose(basis.leverage, expected, atol=1e-13)
        coefficients = basis.feature_coefficients(basis.project(F))
        assert coefficients[3] == 0
        best = np.linalg.lstsq(self.Phi, F)[0]
        np.testing.assert_allclose(self.Phi @ coefficients, self.Phi @ best, atol=1e-12)

    def test_only_because_of_the_weights(self):
        mu = [1, 0, 0, 0, 0, 1]
        with pytest.raises(ValueError, match="rank 2 with 3 columns"):
            fit_basis(np.column_stack((LINE, X**2)), mu)

    def test_zero_features_have_no_space(self):
        with pytest.raises(ValueError, match="rank 0"):
            fit_basis(np.zeros((4, 2)), rank="drop")

    def test_size_of_columns_does_not_matter(self):
        assert fit_basis(LINE * [1e-150, 1e160]).dimension == 2


def test_candidates_without_weight():
    basis = fit_basis(LINE, [1, 0, 1, 1, 1, 1])
    assert basis.leverage[1] == basis.kernel()[1] == 0
    assert basis.leverage.sum() == pytest.approx(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((LINE[:1],), {}, ValueError, "need at least m=2 candidates"),
        ((np.ones(6),), {}, ValueError, r"\(candidates, features\).*\(6,\)"),
        ((np.ones((6, 0)),), {}, ValueError, "no columns"),
        ((np.where(LINE == 1, np.nan, LINE),), {}, ValueError, "Phi .* finite, but 7 of"),
        ((np.where(LINE == 1, np.inf, LINE),), {}, ValueError, "NaN or infinite"),
        ((LINE * 1j,), {}, TypeError, "complex128"),
        ((LINE, np.ones(5)), {}, ValueError, r"6 of them, got shape \(5,\)"),
        ((LINE, [1, 1, 1, 1, 1, -1]), {}, ValueError, r"mu must be ≥ 0.*-1"),
        ((LINE, np.zeros(6)), {}, ValueError, "zero everywhere"),
        ((LINE, [np.nan] * 6), {}, ValueError, "mu must be finite"),
        ((LINE,), {"rank": "keep"}, ValueError, "'raise' or 'drop', got 'keep'"),
        ((LINE,), {"rtol": 0}, ValueError, "rtol"),
        ((LINE,), {"size": 5}, ValueError, "size is 5, but Phi has 6 rows"),
        ((lambda i: LINE[i],), {}, ValueError, "size must be"),
        ((lambda i: LINE[0],), {"size": 6}, ValueError, r"must return rows \(n, M\)"),
        ((lambda i: LINE[:1],), {"size": 6}, ValueError, r"\(6, 2\) for 6 indices"),
    ],
)  # fmt: skip
def test_bad_input(arguments, options, error, words):
    with pytest.raises(error, match=words):
        fit_basis(*arguments, **options)


def test_bad_points_and_values():
    basis = fit_basis(LINE)
    with pytest.raises(ValueError, match=r"Phi must be \(n, 2\)"):
        basis.evaluate(np.ones((3, 3)))
    with pytest.raises(ValueError, match="finite"):
        basis.evaluate([[np.nan, 1]])
    with pytest.raises(ValueError, match="6 rows"):
        basis.project(np.ones(5))

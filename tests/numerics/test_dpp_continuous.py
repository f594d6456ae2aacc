from itertools import pairwise, product

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import roots_hermitenorm, roots_jacobi, roots_legendre
from scipy.stats import beta, chi2

from stiefel.numerics import (
    HermiteDPP,
    JacobiDPP,
    LegendreDPP,
    fit_basis,
    hyperbolic_cross,
    orthonormal_polynomials,
    sample_dpp,
    tensor_polynomials,
    total_degree,
)


def gauss(family, a=1.0, b=1.0, n=40):
    """Points and weights that integrate polynomials of degree < 2n under the law exactly."""
    if family == "legendre":
        x, w = roots_legendre(n)
    elif family == "hermite":
        x, w = roots_hermitenorm(n)
    else:
        x, w = roots_jacobi(n, b - 1, a - 1)
        x = (x + 1) / 2
    return x, w / w.sum()


class TestPolynomials:
    @pytest.mark.parametrize(
        ("family", "a", "b"),
        [
            ("legendre", 1, 1), ("hermite", 1, 1), ("jacobi", 1, 1), ("jacobi", 2, 3.5),
            ("jacobi", 0.5, 0.5), ("jacobi", 0.3, 0.6), ("jacobi", 4.0, 0.2),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("m", [1, 2, 12])
    def test_are_orthonormal(self, family, a, b, m):
        x, w = gauss(family, a, b)
        values = orthonormal_polynomials(x, m, family, a=a, b=b)
        np.testing.assert_allclose(values.T @ (w[:, None] * values), np.eye(m), atol=1e-10)

    def test_no_division_by_zero_where_a_and_b_sum_to_one(self):
        x = np.linspace(0.1, 0.9, 5)
        found = orthonormal_polynomials(x, 6, "jacobi", a=0.3, b=0.7)
        near = orthonormal_polynomials(x, 6, "jacobi", a=0.3, b=0.7 + 1e-9)
        np.testing.assert_allclose(found, near, atol=1e-6)

    def test_kernel_of_legendre(self):
        for m, values in (
            (5, (3.515625, 3.91998291015625, 25)),
            (10, (6.05621337890625, 7.569796539610252, 100)),
        ):
            np.testing.assert_allclose(LegendreDPP(m).kernel([0, 0.5, 1]), values, rtol=1e-13)

    def test_keep_the_shape(self):
        assert orthonormal_polynomials(np.zeros((3, 4)), 5).shape == (3, 4, 5)
        assert orthonormal_polynomials(0.5, 5).shape == (5,)

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda: orthonormal_polynomials([0.0], 0), "m must be ≥ 1"),
            (lambda: orthonormal_polynomials([0.0], 2, "chebyshev"), "family must be one of"),
            (lambda: orthonormal_polynomials([0.0], 2, "jacobi", a=0), "a and b must be positive"),
            (lambda: orthonormal_polynomials([np.nan], 2), "finite"),
            (lambda: total_degree(0, 2), "d must be ≥ 1"),
            (lambda: hyperbolic_cross(2, -1), "p ≥ 0"),
            (lambda: tensor_polynomials(np.ones((3, 2)), [[1]]), "same d"),
            (lambda: tensor_polynomials(np.ones((3, 1)), [[-1]]), "integers ≥ 0"),
            (lambda: tensor_polynomials(np.ones((3, 1)), [[1]], "jacobi"), "'legendre' or"),
            (lambda: LegendreDPP(0), "m must be ≥ 1"),
            (lambda: JacobiDPP(3, -1), "a and b"),
            (lambda: HermiteDPP(3).sample(0), "r must be ≥ 1"),
        ],
    )
    def test_bad_input(self, call, words):
        with pytest.raises(ValueError, match=words):
            call()


class TestIndexSets:
    @pytest.mark.parametrize(("d", "p"), [(1, 4), (2, 3), (3, 4)])
    def test_are_what_they_say(self, d, p):
        whole = list(product(range(p + 1), repeat=d))
        total = {tuple(a) for a in total_degree(d, p)}
        cross = {tuple(a) for a in hyperbolic_cross(d, p)}
        assert total == {a for a in whole if sum(a) <= p}
        assert cross == {a for a in whole if np.prod(np.add(a, 1)) <= p + 1}
        assert len(total_degree(d, p)) == len(total)
        assert total_degree(d, p)[0].tolist() == [0] * d

    @pytest.mark.parametrize("family", ["legendre", "hermite"])
    def test_products_are_orthonormal(self, family):
        x, w = gauss(family, n=8)
        X = np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
        values = tensor_polynomials(X, total_degree(2, 4), family)
        gram = values.T @ (np.outer(w, w).ravel()[:, None] * values)
        np.testing.assert_allclose(gram, np.eye(15), atol=1e-10)


def p_value(points, edges, expected):
    """χ² of the counts of all points; positively wrong only: points of a DPP repel."""
    seen = np.histogram(points, edges)[0]
    expected = np.asarray(expected) * points.size
    return chi2.sf(np.sum((seen - expected) ** 2 / expected), len(seen) - 1)


class TestLaws:
    def test_legendre(self):
        points = LegendreDPP(5).sample(20_000, 0)
        assert points.shape == (20_000, 5)
        assert (np.diff(points, axis=1) > 0).all()
        half = [0.22501, 0.11036, 0.08203, 0.08260]
        assert p_value(points, np.linspace(-1, 1, 9), half + half[::-1]) > 1e-3

    def test_hermite(self):
        points = np.abs(HermiteDPP(5).sample(20_000, 0))
        inner = 2 * np.array([0.07233, 0.06735, 0.13687, 0.11702])
        expected = [*inner, 1 - inner.sum()]
        assert p_value(points, [0, 0.5, 1, 2, 3, 99], expected) > 1e-3

    @pytest.mark.parametrize(("a", "b"), [(2, 3.5), (0.5, 0.5)])
    def test_jacobi(self, a, b):
        dpp = JacobiDPP(4, a, b)
        edges = np.linspace(0, 1, 9)
        expected = [
            quad(lambda x: dpp.kernel(x)[()] * beta.pdf(x, a, b) / 4, *pair, limit=200)[0]
            for pair in pairwise(edges)
        ]
        points = dpp.sample(20_000, 1)
        assert sum(expected) == pytest.approx(1, abs=1e-6)
        assert p_value(points, edges, expected) > 1e-3

    def test_one_point_is_the_law_itself(self):
        assert p_value(LegendreDPP(1).sample(5000, 0), np.linspace(-1, 1, 6), [0.2] * 5) > 1e-3
        assert HermiteDPP(1).sample(5000, 0).std() == pytest.approx(1, abs=0.05)

    def test_pairs_repel_as_on_a_fine_grid(self):
        """Number of points in [−1, 0]: mean m/2, variance far below that of independent ones."""
        exact = fit_basis(orthonormal_polynomials(np.linspace(-1, 1, 2000), 6))
        grid = (sample_dpp(exact, 20_000, generator=0) < 1000).sum(1)
        line = (LegendreDPP(6).sample(20_000, 0) < 0).sum(1)
        assert line.mean() == pytest.approx(3, abs=0.02)
        assert line.var() == pytest.approx(grid.var(), rel=0.05)
        assert line.var() < 0.6

    def test_the_seed_decides(self):
        for dpp in (LegendreDPP(4), HermiteDPP(4), JacobiDPP(4, 2, 1)):
            np.testing.assert_array_equal(dpp.sample(3, 7), dpp.sample(3, 7))
            assert (dpp.sample(3, 7) != dpp.sample(3, 8)).all()
            assert "m=4" in repr(dpp)


def test_weights_make_the_gram_matrix_the_identity():
    for dpp in (LegendreDPP(6), HermiteDPP(6), JacobiDPP(6, 2, 0.7)):
        x = dpp.sample(3000, 0).ravel()
        phi, w = dpp.features(x), dpp.weights(x)
        np.testing.assert_allclose((w[:, None] * phi).T @ phi / len(x), np.eye(6), atol=0.06)


def test_inverse_gram_matrix_of_volume_samples():
    """E G⁻¹ = n / (n − m + 1) I exactly where ν is continuous: one draw and n − m points of ν."""
    m, n, repeats = 3, 7, 8000
    dpp, rng = LegendreDPP(m), np.random.default_rng(0)
    others = dpp.sample(repeats * (n - m), rng)  # one point of each, in a random place, has ν
    others = others[np.arange(len(others)), rng.integers(m, size=len(others))]
    x = np.concatenate((dpp.sample(repeats, rng), others.reshape(repeats, -1)), axis=1)
    phi, w = dpp.features(x), dpp.weights(x)
    gram = np.einsum("rn,rni,rnj->rij", w, phi, phi) / n
    inverses = np.linalg.inv(gram)
    error = inverses.std(0) / repeats**0.5
    wrong = np.abs(inverses.mean(0) - n / (n - m + 1) * np.eye(m))
    assert (wrong < 4 * error).all()
    assert error.max() < 0.03

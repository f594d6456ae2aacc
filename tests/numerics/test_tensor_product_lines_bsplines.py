"""B-splines: matrices, masses inverted axis by axis, isogeometric Poisson."""

import math

import numpy as np
import pytest
import scipy.interpolate
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.numerics.tensor_product import (
    FastDiagonalization,
    MassInverse,
    SingularOperatorError,
    axis_apply,
    bspline_load,
    bspline_matrices,
    bspline_values,
    gauss_points,
    grid1d,
    sum_factorize,
)

F64 = torch.float64


def test_exact_matrices_of_the_sheet():
    _, K, M = bspline_matrices(4, 2)
    sixth = [0.05, 0.0833333333333333, 0.1375, 0.1375, 0.0833333333333333, 0.05]
    assert M.diagonal().tolist() == pytest.approx(sixth, abs=1e-14)
    row = [0.05, 0.0291666666666667, 0.0041666666666667, 0, 0, 0]
    assert M[0].tolist() == pytest.approx(row, abs=1e-14)
    assert K[0].tolist() == pytest.approx([16 / 3, -4, -4 / 3, 0, 0, 0], abs=1e-13)
    assert float(M.sum()) == pytest.approx(1, abs=1e-14)
    _, K, M = bspline_matrices(4, 1)
    assert M[1].tolist() == pytest.approx([1 / 24, 1 / 6, 1 / 24, 0, 0], abs=1e-15)
    assert K[1].tolist() == pytest.approx([-4, 8, -4, 0, 0], abs=1e-13)


@settings(max_examples=30, deadline=None)
@given(
    elements=st.integers(1, 9),
    degree=st.integers(1, 6),
    length=st.sampled_from([1, 0.3, 5.0]),
)
def test_values_and_matrices_are_those_of_scipy(elements, degree, length):
    knots = np.r_[[0] * degree, np.linspace(0, length, elements + 1), [length] * degree]
    n = elements + degree
    spline = scipy.interpolate.BSpline(knots, np.eye(n), degree)
    x = torch.linspace(0, length, 41, dtype=F64)
    B = bspline_values(x, elements, degree, length)
    torch.testing.assert_close(B, torch.from_numpy(spline(x.numpy())), rtol=0, atol=1e-13)
    # Slopes of degree 1 jump at the knots: no point is one of them.
    between = length * (torch.arange(40, dtype=F64) + 0.1234567) / 40
    slopes = bspline_values(between, elements, degree, length, deriv=1)
    expected = torch.from_numpy(spline.derivative()(between.numpy()))
    torch.testing.assert_close(slopes, expected, rtol=0, atol=1e-11 * n / length)
    points, K, M = bspline_matrices(elements, degree, length)
    # Sums to one; linear functions have the Greville points as coefficients.
    torch.testing.assert_close(B.sum(1), torch.ones_like(x))
    torch.testing.assert_close(B @ points, x, rtol=0, atol=1e-13)
    assert points[0] == 0
    assert points[-1] == length
    torch.testing.assert_close(M.sum(), torch.tensor(float(length), dtype=F64))
    torch.testing.assert_close(points @ M @ points, torch.tensor(length**3 / 3, dtype=F64))
    torch.testing.assert_close(points @ K @ points, torch.tensor(float(length), dtype=F64))
    assert float((K @ torch.ones(n, dtype=F64)).abs().max()) < 1e-11 * float(K.abs().max())
    i = torch.arange(n)
    assert not bool(M[(i[:, None] - i).abs() > degree].any())
    assert torch.equal(M, M.mT)


def test_gauss_points_integrate_their_degree():
    x, w = gauss_points(3, 4, 2.0)
    assert x.shape == (12,)
    for q in range(8):
        assert float((w * x**q).sum()) == pytest.approx(2 ** (q + 1) / (q + 1), rel=1e-13)


@pytest.mark.parametrize("method", ["auto", "gemm", "banded"])
@pytest.mark.parametrize("n", [8, 80])
def test_mass_inverse_is_scipys_banded_cholesky(method, n):
    masses = [bspline_matrices(n - p, p)[2] for p in (1, 3)] + [bspline_matrices(3, 2)[2]]
    F = torch.randn(2, n, n, 5, dtype=F64)
    expected = F.numpy()
    for axis, (M, p) in enumerate(zip(masses, (1, 3, 2), strict=True)):
        bands = np.zeros((p + 1, len(M)))
        for k in range(p + 1):
            bands[k, : len(M) - k] = np.diagonal(M.numpy(), -k)
        factor = scipy.linalg.cholesky_banded(bands, lower=True)
        lines = np.moveaxis(expected, axis + 1, 0)
        solved = scipy.linalg.cho_solve_banded((factor, True), lines.reshape(len(M), -1))
        expected = np.moveaxis(solved.reshape(lines.shape), 0, axis + 1)
    solver = MassInverse(masses, method)
    assert solver.shape == (n, n, 5)
    np.testing.assert_allclose(
        solver.solve(F).numpy(), expected, rtol=0, atol=1e-12 * abs(expected).max()
    )
    torch.testing.assert_close(axis_apply(masses, solver.solve(F)), F, rtol=0, atol=1e-12)


def test_an_axis_without_a_mass_is_left_alone():
    M = bspline_matrices(5, 2)[2]
    F = torch.randn(4, 7, dtype=torch.complex64)
    found = MassInverse([None, M]).solve(F)
    torch.testing.assert_close(
        found, torch.linalg.solve(M.to(F.dtype), F.mT).mT, rtol=1e-4, atol=1e-4
    )


def test_gradients_in_field_and_masses():
    masses = [bspline_matrices(1, 2)[2].requires_grad_(), bspline_matrices(2, 2)[2]]
    F = torch.randn(3, 4, dtype=F64, requires_grad=True)

    def solve(M, F):
        return MassInverse([(M + M.mT) / 2, masses[1]]).solve(F)

    assert torch.autograd.gradcheck(solve, (masses[0], F))


@pytest.mark.parametrize(
    ("degree", "sheet"),
    [
        (1, (0.0318, 0.00795, 0.00199)),
        (2, (0.00437, 0.000408, 4.68e-5)),
        (3, (0.00102, 4.47e-5, 2.50e-6)),
        (4, (2.1e-4, 4.4e-6, 1.2e-7)),
    ],
)
def test_isogeometric_poisson_has_the_errors_of_the_sheet(degree, sheet):
    def u(x, y, z):
        return (math.pi * x).sin() * (2 * math.pi * y).sin() * (3 * math.pi * z).sin()

    errors = {degree + 1: [], degree + 3: []}
    for elements in (8, 16, 32):
        axis = grid1d(elements + degree - 2, 1.0, "dirichlet", ("bspline", degree))
        load = bspline_load(lambda *x: 14 * math.pi**2 * u(*x), elements, degree, [1, 1, 1])
        c = FastDiagonalization([axis] * 3).solve(load[1:-1, 1:-1, 1:-1].contiguous())
        for count, found in errors.items():
            x, w = gauss_points(elements, count)
            B = bspline_values(x, elements, degree)[:, 1:-1]
            error = sum_factorize([B] * 3, c, "factorized") - u(x[:, None, None], x[:, None], x)
            found.append(math.sqrt(float(torch.einsum("i,j,k,ijk->", w, w, w, error**2))))
    # The sheet's norm is at the points of the matrices, where the error is a little smaller.
    assert errors[degree + 1] == pytest.approx(sheet, rel=0.03)
    for found in errors.values():
        assert math.log2(found[1] / found[2]) == pytest.approx(degree + 1, abs=0.25)


def test_projection_reproduces_splines_and_converges():
    M = bspline_matrices(6, 3, 2)[2]
    load = bspline_load(lambda x, y: x**3 * y, 6, 3, [2, 2])
    c = MassInverse([M, M]).solve(load)
    x = torch.linspace(0, 2, 9, dtype=F64)
    B = bspline_values(x, 6, 3, 2)
    torch.testing.assert_close(axis_apply([B, B], c), x[:, None] ** 3 * x, rtol=0, atol=1e-12)
    # Another number of elements and degree per axis, a constant.
    mixed = bspline_load(lambda x, y: torch.tensor(3.0), [2, 4], [1, 2], [2.0, 0.5], points=2)
    assert mixed.shape == (3, 6)
    assert float(mixed.sum()) == pytest.approx(3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types(dtype):
    for x, wide in zip(bspline_matrices(5, 3, dtype=dtype), bspline_matrices(5, 3), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), wide, rtol=1e-6, atol=1e-6)
    assert bspline_values(torch.rand(4, dtype=dtype), 5, 3).dtype == dtype


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"elements": 0}, ValueError, "elements must be at least 1"),
        ({"degree": 0}, ValueError, "degree must be at least 1"),
        ({"length": 0}, ValueError, "length must be a positive"),
        ({"length": float("nan")}, ValueError, "length must be a positive"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a real floating-point"),
        ({"dtype": torch.complex64}, TypeError, "dtype must be a real floating-point"),
    ],
)
def test_bad_matrices(change, error, message):
    with pytest.raises(error, match=message):
        bspline_matrices(**{"elements": 4, "degree": 2} | change)


def test_bad_points_and_loads():
    with pytest.raises(ValueError, match=r"points must lie in \[0, 1"):
        bspline_values(torch.tensor([0.5, 1.5]), 4, 2)
    with pytest.raises(ValueError, match="or are NaN"):
        bspline_values(torch.tensor([float("nan")]), 4, 2)
    with pytest.raises(ValueError, match="deriv must be one of 0, 1"):
        bspline_values(torch.tensor([0.5]), 4, 2, deriv=2)
    with pytest.raises(ValueError, match="count must be at least 1"):
        gauss_points(4, 0)
    with pytest.raises(ValueError, match="NaN"):
        bspline_load(lambda x, y: x / (0 * y), 4, 2, [1, 1])
    with pytest.raises(ValueError, match=r"f\(x, …\) must have 12 points along grid axis 0"):
        bspline_load(lambda x, y: torch.ones(5, 12), 4, 2, [1, 1])
    with pytest.raises(ValueError, match="lengths must be 1 to 4"):
        bspline_load(lambda: torch.ones(()), 4, 2, [])
    with pytest.raises(ValueError, match="degree must be one value or one per axis"):
        bspline_load(lambda x, y: x, 4, [2], [1, 1])


def test_bad_masses():
    M = bspline_matrices(4, 2)[2]
    with pytest.raises(SingularOperatorError, match=r"masses\[1\] must be positive definite"):
        MassInverse([M, M - torch.eye(6)])
    with pytest.raises(ValueError, match=r"masses\[0\] must be symmetric"):
        MassInverse([torch.triu(M), M])
    with pytest.raises(ValueError, match=r"masses\[0\] must be square"):
        MassInverse([M[:3]])
    with pytest.raises(ValueError, match="method must be one of"):
        MassInverse([M], "lu")
    with pytest.raises(ValueError, match="masses must be 1 to 4, got 0"):
        MassInverse([])
    with pytest.raises(ValueError, match="6 points along grid axis 1"):
        MassInverse([M, M]).solve(torch.ones(6, 5))
    with pytest.raises(ValueError, match="at least 2 axes"):
        MassInverse([None, M]).solve(torch.ones(6))

"""Banded line solves against dense linear algebra."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from stiefel.numerics.tensor_product import BandedLineSolver, SingularOperatorError, grid1d

METHODS = ("auto", "dense", "block")


def matrix(bands, upper, periodic=False):
    """A, entry by entry."""
    n = bands.shape[1]
    A = torch.zeros(n, n, dtype=bands.dtype)
    for k, band in enumerate(bands):
        for j in range(n):
            i = j + k - upper
            if periodic or 0 <= i < n:
                A[i % n, j] += band[j]
    return A


def dominant(lower, upper, n, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bands = torch.randn(lower + upper + 1, n, dtype=dtype, generator=generator)
    bands[upper] += 2 * (lower + upper + 1)
    return bands


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([1, 2, 3, 7, 33, 65, 100, 133]),
    lower=st.integers(0, 5),
    upper=st.integers(0, 5),
    periodic=st.booleans(),
    method=st.sampled_from(METHODS),
    place=st.sampled_from([0, 1, 2]),
    batch=st.sampled_from([(1, 1), (1, 3), (2, 3)]),
    seed=st.integers(0, 99),
)
def test_solve_is_the_dense_solve(n, lower, upper, periodic, method, place, batch, seed):
    if max(lower, upper) >= n or (periodic and lower + upper + 1 > n):
        return
    bands = dominant(lower, upper, n, seed=seed)
    A = matrix(bands, upper, periodic)
    solver = BandedLineSolver(bands, lower, upper, periodic=periodic, method=method)
    shape = list(batch)
    shape.insert(place, n)
    U = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = solver.solve(U, place - 3)
    expected = torch.linalg.solve(A, U.movedim(place, 0).reshape(n, -1))
    expected = expected.reshape(n, *batch).movedim(0, place)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(solver.matmul(found, place), U, rtol=1e-12, atol=1e-12)
    again = BandedLineSolver.from_matrix(A, method=method)
    torch.testing.assert_close(again.solve(U, place), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", [40, 200])
def test_it_is_scipys_solve_banded(n):
    bands = dominant(2, 1, n)
    F = torch.randn(n, 6, dtype=torch.float64)
    expected = scipy.linalg.solve_banded((2, 1), bands.numpy(), F.numpy())
    found = BandedLineSolver(bands, 2, 1).solve(F, 0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_a_long_line_needs_no_square_of_its_length():
    n = 5000
    solver = BandedLineSolver(dominant(1, 1, n), periodic=True)
    assert solver.method == "block"
    parts = [p for parts in solver._blocks for p in parts] + list(solver._border)
    assert sum(p.numel() for p in parts) < 30 * n
    U = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(solver.matmul(solver.solve(U)), U, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("n", [12, 90])
def test_every_type(dtype, kind, n):
    bands = dominant(1, 2, n, kind)
    solver = BandedLineSolver(bands, 1, 2)
    U = torch.randn(n, 3, dtype=dtype)
    x = solver.solve(U, 0)
    complex_result = dtype.is_complex or kind.is_complex
    assert x.dtype == (dtype.to_complex() if complex_result else dtype)
    wide = torch.complex128
    expected = torch.linalg.solve(matrix(bands, 2).to(wide), U.to(wide))
    single = torch.finfo(dtype).eps > 1e-10
    tolerance = 2e-6 if single else 1e-12
    torch.testing.assert_close(x.to(wide), expected, rtol=tolerance, atol=tolerance)
    back = solver.matmul(x, 0).to(wide)
    torch.testing.assert_close(back, U.to(wide), rtol=0, atol=1e-4 if single else 1e-11)


@pytest.mark.parametrize("method", ["dense", "block"])
@pytest.mark.parametrize("periodic", [False, True])
def test_gradients_in_field_and_bands(method, periodic, monkeypatch):
    monkeypatch.setattr("stiefel.numerics.tensor_product.lines.BLOCK", 3)
    bands = dominant(1, 1, 11).requires_grad_()
    U = torch.randn(2, 11, 2, dtype=torch.float64, requires_grad=True)

    def solve(bands, U):
        solver = BandedLineSolver(bands, periodic=periodic, method=method)
        assert solver.method == method
        return solver.solve(U, 1)

    assert torch.autograd.gradcheck(solve, (bands, U))
    assert torch.autograd.gradgradcheck(solve, (bands, U[:1, :, :1].detach().requires_grad_()))


# torch compiles formulas of its own when forward derivatives are first asked for.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_in_place_and_recorded_sweeps_agree():
    for lower, upper, periodic in ((1, 1, False), (0, 2, False), (3, 1, True), (17, 20, False)):
        bands = dominant(lower, upper, 150)
        solver = BandedLineSolver(bands, lower, upper, periodic=periodic)
        assert solver.method == "block"
        for shape, axis in (((150, 7), 0), ((7, 150), 1), ((2, 3, 150), -1), ((1, 150, 2, 2), 1)):
            U = torch.randn(shape, dtype=torch.float64)
            for field in (U, U.mT.contiguous().mT):  # any order in memory
                kept = field.clone()
                plain = solver.solve(field, axis)
                assert torch.equal(field, kept)
                recorded = solver.solve(field.clone().requires_grad_(), axis)
                assert recorded.requires_grad
                torch.testing.assert_close(plain, recorded.detach(), rtol=1e-13, atol=1e-14)
        lines = U.movedim(1, -1)
        with forward_ad.dual_level():
            dual = solver.solve(forward_ad.make_dual(lines, 2 * lines))
            tangent = forward_ad.unpack_dual(dual).tangent
        torch.testing.assert_close(tangent, 2 * solver.solve(lines))


def test_a_gradient_is_the_transposed_solve():
    bands = dominant(2, 1, 80)
    U = torch.randn(80, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(80, 3, dtype=torch.float64)
    (BandedLineSolver(bands, 2, 1).solve(U, 0) * w).sum().backward()
    torch.testing.assert_close(U.grad, torch.linalg.solve(matrix(bands, 1).mT, w))


def test_bands_are_found_in_a_matrix():
    dense = BandedLineSolver.from_matrix(torch.eye(9) + 0.1)
    assert (dense.lower, dense.upper, dense.periodic) == (8, 8, False)
    ring = BandedLineSolver.from_matrix(torch.eye(9) + grid1d(9, bc="periodic").stiffness)
    assert (ring.lower, ring.upper, ring.periodic) == (1, 1, True)
    corner = torch.eye(9) * 3
    corner[8, 0] = 1.0
    assert BandedLineSolver.from_matrix(corner).periodic


def test_the_middle_row_may_vanish_where_rows_can_be_exchanged():
    A = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    U = torch.tensor([2.0, 5.0], dtype=torch.float64)
    assert BandedLineSolver.from_matrix(A).solve(U).tolist() == [5.0, 2.0]


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_units_do_not_make_it_singular(scale):
    bands = scale * dominant(1, 1, 90)
    U = torch.ones(90, dtype=torch.float64)
    x = BandedLineSolver(bands).solve(U)
    torch.testing.assert_close(scale * x, BandedLineSolver(bands / scale).solve(U))


@pytest.mark.parametrize("n", [20, 300])
def test_singular_matrices_are_refused(n):
    ring = torch.tensor([[-1.0], [2.0], [-1.0]]).repeat(1, n)
    with pytest.raises(SingularOperatorError, match=f"pivot block of rows .* of {n} has no inv"):
        BandedLineSolver(ring, periodic=True)
    BandedLineSolver(ring)  # with walls it has an inverse
    ring[:, 7] = 0.0
    with pytest.raises(SingularOperatorError, match="singular"):
        BandedLineSolver(ring)
    rows = torch.eye(n)
    rows[5, 5] = 0.0
    with pytest.raises(SingularOperatorError, match="row 5 of the matrix is zero"):
        BandedLineSolver.from_matrix(rows)
    with pytest.raises(SingularOperatorError, match="it is zero"):
        BandedLineSolver.from_matrix(torch.zeros(n, n))


def test_a_block_without_an_inverse_names_its_rows_and_the_way_out():
    n = 96
    bands = torch.zeros(3, n)
    bands[0, 1:], bands[1], bands[2, :-1] = 1.0, 1e-30, 1.0
    bands[1, 1::2] = 0.0
    bands[1, ::2] = 0.0
    # Zero diagonal: pairs (0, 1), (2, 3), … make it regular, but no block of 15 is.
    bands[0, 15], bands[2, 14] = 0.0, 0.0
    with pytest.raises(SingularOperatorError, match=r"rows \d+ to \d+ .*'dense' exchanges all"):
        BandedLineSolver(bands, method="block")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bands": torch.ones(4, 9)}, ValueError, "4 rows: say how many"),
        ({"bands": torch.ones(4, 9), "lower": 1, "upper": 1}, ValueError, "3 rows, got 4"),
        ({"bands": torch.ones(3, 9), "lower": -1}, ValueError, "lower must be at least 0"),
        ({"bands": torch.ones(5, 2)}, ValueError, "too many for lines of n = 2 points"),
        ({"bands": torch.ones(5, 4), "periodic": True}, ValueError, "with corners"),
        ({"bands": torch.ones(3, 0)}, ValueError, "not empty"),
        ({"bands": torch.tensor([[1.0, float("nan")]])}, ValueError, "bands must be finite"),
        ({"bands": torch.ones(3, 9, dtype=torch.int64)}, TypeError, "bands must be float32"),
        ({"bands": torch.ones(3, 9).half()}, TypeError, "bands must be float32"),
        ({"bands": torch.ones(1, 9), "method": "thomas"}, ValueError, "method must be one of"),
    ],
)
def test_bad_bands(change, error, message):
    with pytest.raises(error, match=message):
        BandedLineSolver(**change)


def test_bad_fields():
    solver = BandedLineSolver(dominant(1, 1, 9))
    with pytest.raises(ValueError, match="9 points along axis 1, got 3"):
        solver.solve(torch.ones(9, 3, dtype=torch.float64), 1)
    with pytest.raises(IndexError, match=r"axis must be in -2..1, got 2"):
        solver.solve(torch.ones(9, 3), 2)
    with pytest.raises(ValueError, match="NaN"):
        solver.matmul(torch.full((9,), float("nan")))
    with pytest.raises(ValueError, match="U is empty"):
        solver.solve(torch.ones(0, 9))
    with pytest.raises(TypeError, match="U must be float32"):
        solver.solve(torch.ones(9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"A must be square"):
        BandedLineSolver.from_matrix(torch.ones(3, 4))

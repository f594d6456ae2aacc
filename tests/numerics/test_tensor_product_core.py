import subprocess
import sys
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.numerics.tensor_product import (
    KroneckerOperator,
    KroneckerSum,
    SingularOperatorError,
    axis_apply,
)

SIZES = (2, 3, 4)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(a, b, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def dense_apply(mats, U):
    """The big matrix on vec(U)."""
    return (reduce(torch.kron, mats) @ U.reshape(-1)).reshape([A.shape[0] for A in mats])


def test_axis_apply_exact():
    X = torch.arange(24, dtype=torch.float64).reshape(SIZES)
    mats = [
        torch.tensor(rows, dtype=torch.float64)
        for rows in (
            [[1, 2], [0, 1], [3, 0]],
            [[1, 0, 1], [2, 1, 0]],
            [[1, 1, 1, 1], [0, 1, 2, 3]],
        )
    ]
    found = axis_apply(mats, X)
    assert found.shape == (3, 2, 2)
    assert found.flatten().tolist() == [
        324, 516, 390, 630, 140, 220, 178, 282, 132, 228, 102, 198,
    ]  # fmt: skip
    assert torch.equal(KroneckerOperator(mats).matmul(X), found)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), max_size=2),
    st.booleans(),
    st.booleans(),
)
def test_axis_apply_is_the_big_matrix(sizes, batch, complex_mats, complex_field):
    kinds = [torch.complex128 if c else torch.float64 for c in (complex_mats, complex_field)]
    mats = [randn(m, n, seed=i, dtype=kinds[0]) for i, (m, n) in enumerate(sizes)]
    U = randn(*batch, *[n for _, n in sizes], seed=9, dtype=kinds[1])
    found = axis_apply(mats, U)
    assert found.shape == (*batch, *[m for m, _ in sizes])
    both = torch.promote_types(*kinds)
    wide = [A.to(both) for A in mats]
    for item, one in zip(
        found.reshape(-1, *found.shape[len(batch) :]),
        U.to(both).reshape(-1, *U.shape[len(batch) :]),
        strict=True,
    ):
        close(item, dense_apply(wide, one))


def test_none_is_the_identity_and_strides_do_not_matter():
    A, U = randn(5, 3), randn(4, 3, 2).permute(2, 1, 0)
    eye = [torch.eye(n, dtype=torch.float64) for n in (2, 4)]
    close(axis_apply([None, A, None], U), axis_apply([eye[0], A, eye[1]], U.contiguous()))


def test_gradients():
    mats = [randn(2, 3).requires_grad_(), None, randn(3, 2).requires_grad_()]
    U = randn(3, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, c, u: axis_apply([a, None, c], u), (*mats[::2], U))
    square = [
        A.clone().requires_grad_() for A in (randn(2, 2) + 3 * torch.eye(2), randn(3, 3, seed=2))
    ]
    F = randn(2, 2, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b, f: KroneckerOperator([a, b]).solve(f), (*square, F)
    )
    assert torch.autograd.gradcheck(lambda a, b, f: KroneckerSum([a, b]).solve(f), (*square, F))


def test_kronecker_identities():
    A, B, C, D = randn(2, 3), randn(4, 2, seed=1), randn(3, 2, seed=2), randn(2, 3, seed=3)
    first, second = KroneckerOperator([A, B]), KroneckerOperator([C, D])
    assert first.shape == (8, 6)
    close(first.to_dense(), torch.kron(A, B))
    close((first @ second).to_dense(), torch.kron(A, B) @ torch.kron(C, D))
    close(first.T.to_dense(), torch.kron(A, B).mT)
    U = randn(3, 2, seed=4)
    close((first @ U).reshape(-1), torch.kron(A, B) @ U.reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_solve_and_diagonal_of_a_product(dtype):
    mats = [randn(n, n, seed=n, dtype=dtype) + 2 * n * torch.eye(n) for n in SIZES]
    op, F = KroneckerOperator([A.to(dtype) for A in mats]), randn(5, *SIZES, dtype=dtype)
    U = op.solve(F)
    assert U.dtype == dtype
    loose = dtype in (torch.float32, torch.complex64)
    close(op.matmul(U), F, *([1e-4] * 2 if loose else [1e-12] * 2))
    dense = op.to_dense()
    close(op.diagonal(), dense.diagonal(), *([1e-4] * 2 if loose else [1e-12] * 2))
    flat = torch.linalg.solve(dense, F.reshape(5, -1).mT).mT.reshape(F.shape)
    close(U, flat, *([1e-4] * 2 if loose else [1e-12] * 2))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_sum(symmetric, dtype):
    factors = []
    for n in SIZES:
        A = randn(n, n, seed=n, dtype=dtype)
        factors.append((A @ A.mH if symmetric else A) + 3 * n * torch.eye(n, dtype=dtype))
    op, F = KroneckerSum(factors), randn(2, *SIZES, dtype=dtype)
    eye = [torch.eye(n, dtype=dtype) for n in SIZES]
    dense = sum(
        reduce(torch.kron, [factors[i] if i == j else eye[i] for i in range(3)]) for j in range(3)
    )
    close(op.to_dense(), dense)
    close(op.diagonal(), dense.diagonal())
    close(op.T.to_dense(), dense.mT)
    close((op @ F).reshape(2, -1), F.reshape(2, -1) @ dense.mT)
    U = op.solve(F)
    assert U.dtype == dtype
    close(op.matmul(U), F, atol=1e-10)


def test_scipy_operators():
    from scipy.sparse.linalg import LinearOperator, gmres

    product = KroneckerOperator([randn(2, 3), randn(4, 2, seed=1, dtype=torch.complex128)])
    total = KroneckerSum([randn(n, n, seed=n) + 3 * torch.eye(n) for n in SIZES])
    for op in (product, total):
        linear = op.as_scipy_linear_operator()
        assert isinstance(linear, LinearOperator)
        dense = op.to_dense().numpy()
        rng = np.random.default_rng(0)
        x, block = rng.standard_normal(dense.shape[1]), rng.standard_normal((dense.shape[1], 3))
        y = rng.standard_normal(dense.shape[0])
        np.testing.assert_allclose(linear @ x, dense @ x, atol=1e-12)
        np.testing.assert_allclose(linear @ block, dense @ block, atol=1e-12)
        np.testing.assert_allclose(linear.rmatvec(y), dense.conj().T @ y, atol=1e-12)
    b = np.ones(24)
    x, failed = gmres(total.as_scipy_linear_operator(), b, rtol=1e-10)
    assert failed == 0
    np.testing.assert_allclose(x, np.linalg.solve(total.to_dense().numpy(), b), rtol=1e-6)


def test_dense_is_refused_above_4096():
    big = [torch.ones(65, 65).double(), torch.ones(64, 64).double()]
    for op in (KroneckerOperator(big), KroneckerSum(big)):
        with pytest.raises(ValueError, match="4160 x 4160"):
            op.to_dense()
        assert op.diagonal().shape == (4160,)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: axis_apply([], randn(2)), ValueError, "1 to 4"),
        (lambda: axis_apply([randn(2, 3)], randn(2, 4)), ValueError, "3 points along grid axis 0"),
        (lambda: axis_apply([None, randn(2, 3)], randn(3)), ValueError, "at least 2 axes"),
        (
            lambda: axis_apply([randn(2, 3), randn(2, 4)], randn(3, 5)),
            ValueError,
            r"4 points along grid axis 1 .* got 5",
        ),
        (lambda: axis_apply([randn(3)], randn(3)), ValueError, "must be a matrix"),
        (
            lambda: axis_apply([randn(2, 3).float()], randn(3)),
            TypeError,
            r"mats\[0\] is torch.float32",
        ),
        (lambda: axis_apply([torch.ones(2, 3).int()], randn(3)), TypeError, "float32, float64"),
        (lambda: axis_apply([randn(2, 3)], randn(0, 3)), ValueError, "empty"),
        (
            lambda: axis_apply([randn(2, 2)], torch.tensor([1.0, torch.nan]).double()),
            ValueError,
            r"U must be finite, but 1 of its 2 .* index \(1,\)",
        ),
        (lambda: KroneckerOperator([randn(2, 3)]).solve(randn(2)), ValueError, "square"),
        (lambda: KroneckerOperator([randn(2, 3)]).diagonal(), ValueError, "square"),
        (
            lambda: KroneckerOperator([randn(2, 3)]) @ KroneckerOperator([randn(2, 3)]),
            ValueError,
            "fit",
        ),
        (
            lambda: KroneckerOperator([randn(2, 3)]).matmul(randn(3).float()),
            TypeError,
            "factors are",
        ),
        (lambda: KroneckerOperator([randn(2, 2), randn(2, 2).float()]), TypeError, r"factors\[1\]"),
        (lambda: KroneckerSum([randn(2, 3)]), ValueError, r"factors\[0\] must be square"),
        (
            lambda: KroneckerOperator([torch.eye(2).double(), torch.ones(2, 2).double()]).solve(
                randn(2, 2)
            ),
            SingularOperatorError,
            r"factors\[1\] is singular",
        ),
        (
            lambda: KroneckerSum([torch.eye(2).double(), -torch.eye(3).double()]).solve(
                randn(2, 3)
            ),
            SingularOperatorError,
            "singular",
        ),
        (
            lambda: KroneckerSum([torch.tensor([[1.0, 1.0], [0.0, 1.0]]).double()]).solve(randn(2)),
            ValueError,
            "nearly dependent",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_infinite_entries_are_seen_though_the_sum_is_not():
    U = torch.tensor([torch.inf, -torch.inf, 1.0]).double()
    with pytest.raises(ValueError, match="2 of its 3"):
        axis_apply([torch.eye(3).double()], U)
    # A sum that overflows is no infinite entry.
    large = torch.full((3,), 1e308, dtype=torch.float64)
    assert axis_apply([torch.eye(3).double()], large).isfinite().all()


def test_one_graph_under_compile():
    script = Path(__file__).with_name("tensor_product_compiled.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.stdout.strip() == "one graph", run.stderr

"""Sum factorisation: both ways against einsum, transposes, and the choice between them."""

import pytest
import torch

from stiefel.numerics.tensor_product import (
    sum_factorization,
    sum_factorization_choices,
    sum_factorize,
    sum_factorize_transpose,
)

F64 = torch.float64
METHODS = ("auto", "dense", "factorized")


@pytest.fixture(autouse=True)
def nothing_chosen():
    sum_factorization.forget_choices()
    yield
    sum_factorization.forget_choices()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_values_and_integrals(method, batch):
    A, B, C = (torch.randn(q, p, dtype=F64) for q, p in ((4, 2), (5, 3), (3, 6)))
    c = torch.randn(*batch, 2, 3, 6, dtype=F64)
    expected = torch.einsum("xa,yb,zc,...abc->...xyz", A, B, C, c)
    found = sum_factorize([A, B, C], c, method)
    torch.testing.assert_close(found, expected)
    v = torch.randn(*batch, 4, 5, 3, dtype=F64)
    back = sum_factorize_transpose([A, B, C], v, method)
    torch.testing.assert_close(back, torch.einsum("xa,yb,zc,...xyz->...abc", A, B, C, v))
    torch.testing.assert_close((found * v).sum(), (c * back).sum())


def test_stiffness_by_one_derivative_in_place_of_a_factor():
    """K-type term: derivative along axis 1, weights, and back, against the dense matrix."""
    B, D = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    w = torch.rand(4, 4, dtype=F64)
    c = torch.randn(3, 3, dtype=F64)
    big = torch.kron(B, D)
    expected = (big.mT @ (w.reshape(-1) * (big @ c.reshape(-1)))).reshape(3, 3)
    found = sum_factorize_transpose([B, D], w * sum_factorize([B, D], c))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("method", METHODS)
def test_types(dtype, method):
    real = dtype.to_real() if dtype.is_complex else dtype
    A, c = torch.randn(4, 3, dtype=real), torch.randn(5, 3, 3, dtype=dtype)
    found = sum_factorize([A, A], c, method)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.einsum("xa,yb,nab->nxy", A.to(dtype), A.to(dtype), c))
    if real == dtype:  # complex matrices on real coefficients
        turned = sum_factorize([1j * A, A], c, method)
        torch.testing.assert_close(turned, 1j * found)
    back = sum_factorize_transpose([1j * A, A], found, method)  # not conjugated
    torch.testing.assert_close(back, 1j * sum_factorize_transpose([A, A], found, method))


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method):
    A, B = (torch.randn(3, 2, dtype=F64, requires_grad=True) for _ in range(2))
    c = torch.randn(2, 2, 2, dtype=F64, requires_grad=True)
    for f in (sum_factorize, lambda m, c, k: sum_factorize_transpose([x.mT for x in m], c, k)):
        assert torch.autograd.gradcheck(lambda A, B, c, f=f: f([A, B], c, method), (A, B, c))


def test_the_faster_one_is_measured_once_and_kept(monkeypatch):
    timed = []

    def times(tasks, x):
        timed.append(len(tasks))
        assert all(task().shape[0] == 64 for task in tasks)
        return [2.0, 1.0] if len(timed) == 1 else [1.0, 2.0]

    monkeypatch.setattr(sum_factorization, "_in_turn", times)
    A = torch.randn(4, 3)
    used = []
    monkeypatch.setattr(
        sum_factorization,
        "_dense",
        lambda m, c, f=sum_factorization._dense: used.append(1) or f(m, c),
    )
    for elements in (64, 60, 33):  # one power of two
        sum_factorize([A, A], torch.randn(elements, 3, 3))
    assert timed == [2]
    assert sum_factorization_choices() == {"64 x (4, 3)(4, 3) float32 cpu": "factorized"}
    calls = len(used)
    sum_factorize([A.double(), A.double()], torch.randn(64, 3, 3, dtype=F64))
    assert timed == [2, 2]
    assert len(used) == calls + 2  # once to be timed, once to be used
    assert sum_factorization_choices()["64 x (4, 3)(4, 3) float64 cpu"] == "dense"
    sum_factorization.forget_choices()
    assert sum_factorization_choices() == {}


def test_real_measurements_lead_to_a_choice():
    A = torch.randn(4, 3, dtype=F64)
    sum_factorize([A] * 3, torch.randn(16, 3, 3, 3, dtype=F64))
    assert set(sum_factorization_choices().values()) <= {"dense", "factorized"}
    assert len(sum_factorization_choices()) == 1


def test_large_matrices_and_single_axes_are_not_tried():
    A = torch.randn(130, 130)
    sum_factorize([A, A], torch.randn(130, 130))
    sum_factorize([A], torch.randn(4, 130))
    assert sum_factorization_choices() == {}
    with pytest.raises(ValueError, match="'dense' would need a matrix of 285610000 entries"):
        sum_factorize([A, A], torch.randn(130, 130), "dense")


def test_bad_input():
    A, c = torch.randn(4, 3), torch.randn(2, 3, 3)
    with pytest.raises(ValueError, match="3 points along grid axis 1"):
        sum_factorize([A, A], torch.randn(3, 4))
    with pytest.raises(ValueError, match="4 points along grid axis 0"):
        sum_factorize_transpose([A, A], torch.randn(3, 4))
    with pytest.raises(ValueError, match="coeffs is empty"):
        sum_factorize([A, A], torch.randn(0, 3, 3))
    with pytest.raises(ValueError, match="at least 2 axes"):
        sum_factorize([A, A], torch.randn(3))
    with pytest.raises(ValueError, match="method must be one of"):
        sum_factorize([A, A], c, "sparse")
    with pytest.raises(ValueError, match="mats must have 1 to 4 entries"):
        sum_factorize([], c)
    with pytest.raises(TypeError, match=r"mats\[1\] is torch.float64 but coeffs is torch.float32"):
        sum_factorize([A, A.double()], c)
    with pytest.raises(ValueError, match=r"mats\[0\] must be finite"):
        sum_factorize([A / 0, A], c)
    with pytest.raises(ValueError, match="coeffs must be finite"):
        sum_factorize([A, A], c * float("nan"))

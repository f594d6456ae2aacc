import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg.hippo import hippo_legs, legs_normal, transfer_function


def entry_by_entry(n):
    a = np.zeros((n, n))
    for i in range(n):
        for k in range(i):
            a[i, k] = -math.sqrt(2 * i + 1) * math.sqrt(2 * k + 1)
        a[i, i] = -(i + 1)
    return a


@pytest.mark.parametrize("n", [1, 2, 7])
def test_matrix_follows_its_definition(n):
    a, b = hippo_legs(n)
    np.testing.assert_allclose(a.numpy(), entry_by_entry(n), rtol=1e-15)
    np.testing.assert_allclose(b.numpy(), [math.sqrt(2 * i + 1) for i in range(n)], rtol=1e-15)
    assert a.dtype == b.dtype == torch.float64


def test_impulse_responses_are_legendre_polynomials_of_decay():
    """K_n(t) = √(2n+1) e^{-t} P_n(2e^{-t} - 1): what LegS is made for."""
    a, b = hippo_legs(12)
    for t in (0.0, 0.3, 2.0):
        response = scipy.linalg.expm(t * a.numpy()) @ b.numpy()
        decay = math.exp(-t)
        for n in range(12):
            polynomial = np.polynomial.legendre.Legendre.basis(n)(2 * decay - 1)
            exact = math.sqrt(2 * n + 1) * decay * polynomial
            assert response[n] == pytest.approx(exact, abs=1e-11)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40))
def test_normal_part_is_unitarily_diagonal_with_real_part_half(n):
    a, b = hippo_legs(n)
    spectrum, v, p = legs_normal(n)
    normal = (a + torch.outer(p, p)).to(v.dtype)
    assert (spectrum.real == -0.5).all()
    assert (spectrum.imag.diff() > 0).all()
    torch.testing.assert_close(v.mH @ v, torch.eye(n, dtype=v.dtype), rtol=0, atol=1e-13)
    torch.testing.assert_close((v * spectrum) @ v.mH, normal, rtol=0, atol=1e-12 * n * n)
    assert (v[0].real > 0).all()
    assert v[0].imag.abs().max() < 1e-15
    # Conjugate pairs, so that half of them describe a real system.
    torch.testing.assert_close(spectrum.flip(0).conj(), spectrum, rtol=1e-11, atol=1e-11)
    inputs = (v.mH @ b.to(v.dtype)).abs().square().sum()
    assert float(inputs) == pytest.approx(n * n)
    assert float((v.mH @ p.to(v.dtype)).abs().square().sum()) == pytest.approx(n * n / 2)


@pytest.mark.parametrize(
    ("n", "imaginary"),
    [(2, [0.866025403784]), (4, [0.556501115084, 4.603293007067])],
)
def test_eigenvalues_of_small_orders(n, imaginary):
    spectrum, _, _ = legs_normal(n)
    np.testing.assert_allclose(spectrum.imag[n // 2 :].numpy(), imaginary, rtol=1e-11)


@pytest.mark.parametrize(("n", "largest"), [(64, 1303.273842981), (256, 20860.233111417)])
def test_largest_frequency_grows_like_the_square(n, largest):
    spectrum, _, _ = legs_normal(n)
    assert float(spectrum.imag[-1]) == pytest.approx(largest, rel=1e-10)
    assert float(spectrum.imag[-1]) == pytest.approx(n * n / math.pi, rel=2e-3)


def legs_error(n, half=True):
    spectrum, v, _ = legs_normal(n)
    _, b = hippo_legs(n)
    omega = torch.linspace(-20, 20, 801, dtype=torch.float64)
    inputs = v.mH @ (b / (2 if half else 1)).to(v.dtype)
    ones = torch.ones(n, dtype=torch.float64)
    found = transfer_function(spectrum, inputs, v[0].clone(), omega, ones)
    return float((found - 1 / (1j * omega + 1)).abs().max())


@pytest.mark.parametrize(("n", "error"), [(16, 0.1363), (32, 0.0547), (64, 0.0209), (128, 0.00903)])
def test_normal_system_with_half_the_input_approaches_legs(n, error):
    assert legs_error(n) == pytest.approx(error, rel=5e-3)
    assert legs_error(n, half=False) == pytest.approx(1.0, abs=0.02)


def test_stored_half_and_full_spectrum_give_one_transfer_function():
    a, b = hippo_legs(6)
    spectrum, v, p = legs_normal(6)
    normal, c = a + torch.outer(p, p), torch.randn(6, dtype=torch.float64)
    inputs, outputs = v.mH @ b.to(v.dtype), c.to(v.dtype) @ v
    omega = torch.tensor([[0.0, 0.7], [3.0, -11.0]], dtype=torch.float64)
    dense = torch.stack(
        [
            c.to(v.dtype)
            @ torch.linalg.solve(1j * w * torch.eye(6) - normal.to(v.dtype), b.to(v.dtype))
            for w in omega.flatten()
        ]
    ).reshape(2, 2)
    whole = transfer_function(spectrum, inputs, outputs, omega, torch.ones(6, dtype=torch.float64))
    half = transfer_function(spectrum[3:], inputs[3:], outputs[3:], omega)
    torch.testing.assert_close(whole, dense)
    torch.testing.assert_close(half, dense)


def test_transfer_function_has_gradients():
    spectrum, _, _ = legs_normal(4)
    a = spectrum[2:].clone().requires_grad_()
    b, c = (torch.randn(2, dtype=torch.complex128, requires_grad=True) for _ in range(2))
    omega = torch.tensor([0.3, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *s: transfer_function(*s, omega), (a, b, c))


@pytest.mark.parametrize("function", [hippo_legs, legs_normal])
def test_bad_orders_are_refused(function):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        function(0)
    with pytest.raises(TypeError):
        function(2.5)


def test_bad_systems_are_refused():
    one = torch.ones(1, dtype=torch.complex128)
    omega = torch.tensor([1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="pole"):
        transfer_function(1j * one, one, one, omega)
    with pytest.raises(ValueError, match="b must be finite"):
        transfer_function(-one, one * math.nan, one, omega)

import math

import pytest
import torch
from torch import nn

from stiefel.init import aligned_init, spectrum_init
from stiefel.linalg import haar
from stiefel.theory import (
    expected_kernel_alignment,
    expected_representation_alignment,
    kernel_alignment,
    linear_kernel_alignment,
    tangent_kernel,
)


@pytest.mark.parametrize(
    ("d", "rank", "value"),
    [
        (10, 1, 0.930769),
        (10, 2, 0.949202),
        (10, 5, 0.960802),
        (10, 10, 0.964764),
        (100, 1, 0.9903883),
        (100, 100, 0.9951826),
    ],
)
def test_values_of_the_sheet(d, rank, value):
    assert expected_kernel_alignment([1.0] * rank, d) == pytest.approx(value, abs=1e-6)


def test_more_values_of_the_sheet():
    assert expected_kernel_alignment([1.0], 2) == pytest.approx(0.9, abs=1e-12)
    assert expected_kernel_alignment([1.0, 1.0], 2) == pytest.approx(0.9486832981, abs=1e-10)
    for r in (1, 2, 5, 10):
        assert expected_representation_alignment([3] * r, 10) == pytest.approx(math.sqrt(r) / 10)


def test_matrix_and_singular_values_agree(generator):
    values = torch.tensor([2.0, 1.0, 0.25], dtype=torch.float64)
    w = spectrum_init((7, 5), values, generator=generator)
    for function in (expected_kernel_alignment, expected_representation_alignment):
        assert function(w, 5) == pytest.approx(function(values, 5), rel=1e-12)
        assert function(1e200 * w, 5) == pytest.approx(function(values, 5), rel=1e-12)


def test_the_mean_over_a_basis_of_tasks_is_the_expectation(generator):
    w = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    tasks = haar(6, generator=generator, dtype=torch.float64)
    each = linear_kernel_alignment(w.expand(6, 4, 6), tasks)
    assert float(each.mean()) == pytest.approx(expected_kernel_alignment(w, 6), rel=1e-12)


def test_aligned_is_one(generator):
    beta = torch.randn(6, generator=generator, dtype=torch.float64)
    w = aligned_init((8, 6), beta, norm=1e-2, generator=generator)
    assert float(linear_kernel_alignment(w, beta)) == pytest.approx(1.0, abs=1e-12)
    full = expected_kernel_alignment([1.0] * 6, 6)
    assert expected_kernel_alignment([1.0], 6) < full < 1


def test_against_a_trained_network(generator):
    """Gradient descent from a small start, the tangent kernel of all parameters by autograd."""
    d = 4
    x = math.sqrt(d) * haar(d, generator=generator, dtype=torch.float64)  # XᵀX / n = I
    beta = torch.randn(d, generator=generator, dtype=torch.float64)
    for r in (1, 4):
        w0 = spectrum_init(
            (9, d), torch.ones(r, dtype=torch.float64), norm=1e-3, generator=generator
        )
        net = nn.Sequential(nn.Linear(d, 9, bias=False), nn.Linear(9, 1, bias=False)).double()
        second = torch.randn(1, 9, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            net[0].weight.copy_(w0)
            net[1].weight.copy_(1e-3 * second / second.norm())
        before = tangent_kernel(net, x)
        optimizer = torch.optim.SGD(net.parameters(), 0.02)
        for _ in range(1500):
            optimizer.zero_grad()
            (0.5 * (net(x)[:, 0] - x @ beta).square().mean()).backward()
            optimizer.step()
        measured = kernel_alignment(before, tangent_kernel(net, x))
        assert float(measured) == pytest.approx(float(linear_kernel_alignment(w0, beta)), abs=1e-4)


def test_gradients_and_dtypes(generator):
    w = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    beta = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(linear_kernel_alignment, (w, beta))
    low = linear_kernel_alignment(w.bfloat16(), beta.bfloat16())
    assert low.dtype == torch.bfloat16
    truth = linear_kernel_alignment(w, beta).detach()
    torch.testing.assert_close(low.detach().double(), truth, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("given", "d", "message"),
    [
        ([1.0], 0, "d must be at least 1"),
        ([1.0] * 4, 3, "1 to 3 singular values"),
        ([], 3, "1 to 3 singular values"),
        (torch.ones(2, 4), 3, "W must have 3 columns"),
        (torch.ones(2, 2, 2), 3, "1 to 3"),
        ([1.0, -1.0], 3, "at least 0"),
        ([0.0, 0.0], 3, "one above 0"),
        (torch.zeros(2, 3), 3, "one above 0"),
        ([math.nan], 3, "finite"),
    ],
)
def test_bad_spectra(given, d, message):
    if isinstance(given, list):
        given = torch.tensor(given)
    for function in (expected_kernel_alignment, expected_representation_alignment):
        with pytest.raises(ValueError, match=message):
            function(given, d)


def test_bad_tasks():
    w = torch.eye(3)
    with pytest.raises(ValueError, match="3 entries"):
        linear_kernel_alignment(w, torch.ones(2))
    with pytest.raises(ValueError, match="beta must not be zero"):
        linear_kernel_alignment(w, torch.zeros(3))
    with pytest.raises(ValueError, match=r"W must not be zero \(matrix \(1,\)"):
        linear_kernel_alignment(torch.stack([w, 0 * w]), torch.ones(3))
    with pytest.raises(ValueError, match="finite"):
        linear_kernel_alignment(w, math.inf * torch.ones(3))

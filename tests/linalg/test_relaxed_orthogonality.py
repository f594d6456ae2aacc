"""λ-orthogonality: values of the sheet, gradients, invariance, limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stiefel.linalg import haar, lambda_orthogonality, orthogonality_distance
from stiefel.regularize import LambdaOrthogonality


def plain(w, lam, alpha):
    """As the paper writes it, by autograd."""
    x = (w @ w.mT - torch.eye(w.shape[-2], dtype=w.dtype)).square().sum((-2, -1)).sqrt()
    return (torch.sigmoid(alpha * (x - lam)) * x).sum()


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("lam", "alpha", "value"),
    [
        (3, 10, 2.213218482624025),
        (0, 1, 2.958045508120978),
        (1, 1, 2.752653493998802),
        (3, 1, 1.61749203207866),
        (5, 1, 0.39966114458845986),
    ],
)
def test_values_of_a_diagonal_matrix(lam, alpha, value):
    w = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    assert float(orthogonality_distance(w)) == pytest.approx(3.092329219213245, rel=1e-14)
    assert float(lambda_orthogonality(w, lam, alpha)) == pytest.approx(value, rel=1e-13)


@pytest.mark.parametrize(
    ("lam", "value", "norm"),
    [
        (1, 2.5165234793633324, 3.4947988799),
        (2, 2.0250442096615235, 5.1182977876),
        (3, 0.8288867210681102, 4.3922695793),
    ],
)
def test_values_and_gradients_of_a_gaussian_matrix(lam, value, norm):
    w = torch.tensor(0.5 * np.random.RandomState(0).randn(4, 4), requires_grad=True)
    loss = lambda_orthogonality(w, lam, 2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, rel=1e-13)
    assert float(w.grad.norm()) == pytest.approx(norm, rel=1e-9)
    if lam == 3:
        wanted = [2.4099683012, 0.0538130396, 1.3974617290, 2.3570028871]
        np.testing.assert_allclose(w.grad[0].numpy(), wanted, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3), (2, 3, 4, 4)])
def test_gradient_is_that_of_autograd(shape):
    w = random(*shape).requires_grad_()
    ours, twin = lambda_orthogonality(w, 1.5, 3.0), plain(w, 1.5, 3.0)
    torch.testing.assert_close(ours, twin)
    grads = [torch.autograd.grad(loss, w)[0] for loss in (ours, twin)]
    torch.testing.assert_close(*grads)
    torch.autograd.gradcheck(lambda w: lambda_orthogonality(w, 1.5, 3.0), (w,))


@given(st.integers(0, 10_000), st.floats(0, 5), st.integers(2, 6))
def test_rotations_of_either_side_do_not_matter(seed, lam, n):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, n, dtype=torch.float64, generator=g)
    q = haar(n, n, generator=g, dtype=torch.float64)
    value = lambda_orthogonality(w, lam)
    torch.testing.assert_close(lambda_orthogonality(q @ w, lam), value)
    torch.testing.assert_close(lambda_orthogonality(w @ q, lam), value)


def test_an_orthogonal_matrix_costs_nothing_and_has_no_gradient():
    w = torch.eye(5).requires_grad_()
    loss = lambda_orthogonality(w, 0.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(w.grad, torch.zeros(5, 5))


def test_without_a_bound_there_is_no_penalty():
    w = random(4, 4).requires_grad_()
    loss = lambda_orthogonality(w, math.inf)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(w.grad, torch.zeros(4, 4, dtype=torch.float64))


def test_huge_distances_do_not_overflow_the_gate():
    w = (1e3 * torch.eye(4)).requires_grad_()
    loss = lambda_orthogonality(w, 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2 * (1e6 - 1), rel=1e-6)
    assert bool(w.grad.isfinite().all())


def test_a_tall_matrix_keeps_the_distance_it_cannot_lose():
    q = haar(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(orthogonality_distance(q)) == pytest.approx(math.sqrt(2), rel=1e-12)
    assert float(orthogonality_distance(q.mT)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_and_autocast_compute_in_float32(dtype):
    w = random(8, 8, dtype=torch.float32).to(dtype)
    wanted = plain(w.float(), 2.0, 10.0)
    with torch.autocast("cpu", torch.bfloat16):
        value = lambda_orthogonality(w, 2.0)
    assert value.dtype == dtype
    torch.testing.assert_close(value, wanted.to(dtype))


def test_training_under_the_penalty_keeps_the_distance_near_lambda():
    """The paper's point: the distance settles at λ, whatever the pull away from orthogonality."""
    for lam in (1.0, 3.0):
        w = torch.nn.Parameter(torch.eye(12))
        target = 3 * random(12, 12, dtype=torch.float32)
        optimizer = torch.optim.Adam([w], lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            loss = 0.01 * (w - target).square().sum() + lambda_orthogonality(w, lam)
            loss.backward()
            optimizer.step()
        assert abs(float(orthogonality_distance(w)) - lam) < 0.5


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2)])
def test_second_derivatives(shape):
    w = random(*shape).requires_grad_()
    torch.autograd.gradgradcheck(lambda w: lambda_orthogonality(w, 1.0, 3.0), (w,))


@pytest.mark.parametrize(
    ("lam", "alpha", "message"),
    [
        (-1, 10, "lam must be at least 0"),
        (math.nan, 10, "lam must be at least 0"),
        (1, 0, "alpha must be positive"),
        (1, math.inf, "alpha must be positive"),
    ],
)
def test_gates_that_cannot_be(lam, alpha, message):
    with pytest.raises(ValueError, match=message):
        lambda_orthogonality(torch.eye(3), lam, alpha)
    with pytest.raises(ValueError, match=message):
        LambdaOrthogonality(lam, alpha)


def test_matrices_that_cannot_be():
    with pytest.raises(ValueError, match="finite"):
        lambda_orthogonality(torch.full((2, 2), math.nan), 1.0)
    with pytest.raises(TypeError, match="floating"):
        lambda_orthogonality(torch.eye(2, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match="two dimensions"):
        lambda_orthogonality(torch.ones(3), 1.0)


def test_the_module_scales_it():
    w = random(4, 4)
    module = LambdaOrthogonality(1.0, alpha=5.0, weight=0.1)
    torch.testing.assert_close(module(w), 0.1 * lambda_orthogonality(w, 1.0, 5.0))
    assert repr(module) == "LambdaOrthogonality(lam=1, alpha=5, weight=0.1)"
    with pytest.raises(ValueError, match="weight"):
        LambdaOrthogonality(1.0, weight=-1.0)

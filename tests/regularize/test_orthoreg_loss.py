import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import haar
from stiefel.regularize import orthoreg_loss, orthoreg_loss_lowrank

POWERS = (1, 2)
TARGETS = ("identity", "offdiag")


def delta(shape, seed):
    values = 0.3 * np.random.RandomState(seed).randn(*shape)
    return torch.tensor(values, requires_grad=True)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def slow(d, power=1, target="identity"):
    """The formula, left to autograd."""
    g = d @ d.mT if d.shape[-2] < d.shape[-1] else d.mT @ d
    eye = torch.eye(g.shape[-1], dtype=d.dtype)
    e = g - eye if target == "identity" else g * (1 - eye)
    total = e.square().sum((-2, -1))
    return total if power == 2 else total.sqrt()


def test_values_of_the_official_formula():
    d = delta((4, 3), 0)
    loss = orthoreg_loss(d)
    loss.backward()
    assert loss.item() == pytest.approx(1.1306652495607334, rel=1e-14)
    assert d.grad.norm().item() == pytest.approx(0.7897661665, abs=1e-10)
    expected = torch.tensor([-0.0670933166, 0.2066451276, -0.3506914264], dtype=torch.float64)
    torch.testing.assert_close(d.grad[0], expected, atol=1e-10, rtol=0)

    d = delta((3, 5), 1)
    loss = orthoreg_loss(d)
    loss.backward()
    assert loss.item() == pytest.approx(1.4343789718288862, rel=1e-14)
    assert d.grad.norm().item() == pytest.approx(1.4853975033, abs=1e-10)
    assert orthoreg_loss(delta((8, 8), 2)).item() == pytest.approx(2.3389452292338313, rel=1e-14)


def test_the_literal_column_gram_of_a_wide_change_is_off_by_a_constant():
    d = delta((3, 5), 1)
    literal = (d.mT @ d - torch.eye(5, dtype=torch.float64)).norm()
    assert literal.item() == pytest.approx(2.014309567773755, rel=1e-14)
    assert literal.item() ** 2 - orthoreg_loss(d, 2).item() == pytest.approx(2, abs=1e-12)
    (mine,) = torch.autograd.grad(orthoreg_loss(d, 2), d)
    (other,) = torch.autograd.grad(literal**2, d)
    torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("power", POWERS)
def test_no_gradient_at_zero_and_at_orthonormal_columns(power):
    zero = torch.zeros(6, 4, requires_grad=True)
    loss = orthoreg_loss(zero, power)
    loss.backward()
    assert loss.item() == 2.0**power
    assert not zero.grad.any()

    q = haar(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for point in (q, torch.eye(6, 4, dtype=torch.float64)):
        at = point.clone().requires_grad_()
        loss = orthoreg_loss(at, power)
        loss.backward()
        assert loss.item() < 1e-12
        assert at.grad.isfinite().all()
    assert not at.grad.any()  # of the identity, where G − I is 0 exactly


def test_the_factors_of_lora():
    random = np.random.RandomState(3)
    b, a = torch.tensor(random.randn(10, 2)), torch.tensor(random.randn(2, 6))
    assert orthoreg_loss_lowrank(b, a, 0.5, 2).item() == pytest.approx(402.2194245685815, rel=1e-13)
    assert orthoreg_loss(0.5 * b @ a, 2).item() == pytest.approx(402.2194245685815, rel=1e-13)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (2, 3, 6, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("target", TARGETS)
def test_closed_form_is_the_gradient_of_the_formula(shape, power, target):
    d = noise(*shape).requires_grad_()
    weights = noise(*shape[:-2], seed=1)
    (orthoreg_loss(d, power, target=target) * weights).sum().backward()
    twin = d.detach().clone().requires_grad_()
    if target == "offdiag" and min(shape[-2:]) == 1:  # nothing off the diagonal; √0 has no slope
        assert not d.grad.any()
        return
    (slow(twin, power, target) * weights).sum().backward()
    torch.testing.assert_close(
        orthoreg_loss(d, power, target=target), slow(twin, power, target), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(d.grad, twin.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("target", TARGETS)
def test_derivatives_of_both_orders(power, target):
    d = noise(2, 4, 3).requires_grad_()

    def loss(x):
        return orthoreg_loss(x, power, target=target)

    for f in (loss, lambda x: loss(x.mT)):
        assert torch.autograd.gradcheck(f, d)
        assert torch.autograd.gradgradcheck(f, d)
    b, a = noise(5, 2).requires_grad_(), noise(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda b, a: orthoreg_loss_lowrank(b, a, 0.7, power, target=target), (b, a)
    )


@pytest.mark.parametrize("target", TARGETS)
def test_transforms_of_functions(target):
    """They differentiate the gradient as well, for which G is computed once more."""

    def loss(x):
        return orthoreg_loss(x, target=target)

    for x in (noise(3, 4, 2), noise(3, 2, 4)):
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(slow(leaf, target=target).sum(), leaf)
        torch.testing.assert_close(torch.func.grad(lambda y: loss(y).sum())(x), expected)
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)


def test_compiled_without_a_break():
    """In a process of its own: what checks shapes in tests cannot be compiled."""
    code = """
import torch
from stiefel.regularize import orthoreg_loss, orthoreg_loss_lowrank
f = torch.compile(
    lambda y: (orthoreg_loss(y) * orthoreg_loss_lowrank(y, y.mT)).sum(),
    fullgraph=True, backend="aot_eager",
)
x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
f(x).backward()
y = x.detach().clone().requires_grad_()
(orthoreg_loss(y) * orthoreg_loss(y @ y.mT)).sum().backward()
torch.testing.assert_close(x.grad, y.grad)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


matrices = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))


@settings(max_examples=40, deadline=None)
@given(matrices, st.sampled_from(POWERS), st.floats(0.05, 3))
def test_rotations_of_either_side_and_the_transpose_change_nothing(size, power, scale):
    rows, columns, seed = size
    generator = torch.Generator().manual_seed(seed)
    d = scale * noise(rows, columns, seed=seed)
    u = haar(rows, rows, generator=generator, dtype=torch.float64)
    v = haar(columns, columns, generator=generator, dtype=torch.float64)
    loss = orthoreg_loss(d, power)
    torch.testing.assert_close(orthoreg_loss(u @ d @ v, power), loss)
    torch.testing.assert_close(orthoreg_loss(d.mT, power), loss)
    singular = torch.linalg.svdvals(d)
    expected = (singular.square() - 1).square().sum()
    torch.testing.assert_close(loss ** (2 // power), expected)


@settings(max_examples=40, deadline=None)
@given(matrices, st.integers(1, 6), st.sampled_from(POWERS), st.sampled_from(TARGETS))
def test_low_rank_is_the_dense_formula(size, rank, power, target):
    rows, columns, seed = size
    b, a = noise(rows, rank, seed=seed), noise(rank, columns, seed=seed + 1)
    low = orthoreg_loss_lowrank(b, a, -0.4, 2, target=target)
    dense = orthoreg_loss(-0.4 * b @ a, 2, target=target)
    scale = 1 + float((0.16 * (b @ a).square().sum()) ** 2)
    assert abs(float(low - dense)) < 1e-12 * scale
    if power == 1 and float(dense) > 1e-3 * scale:
        norm = orthoreg_loss_lowrank(b, a, -0.4, target=target)
        torch.testing.assert_close(norm, dense.sqrt())
    floor = max(0, min(rows, columns) - rank)
    assert target == "offdiag" or float(low) >= floor - 1e-9


def test_low_rank_reaches_its_smallest_value_without_loss_of_digits():
    """Orthonormal factors: √(min(out, in) − r), and 0 at full rank, where a gradient exists."""
    generator = torch.Generator().manual_seed(0)
    b = haar(40, 4, generator=generator, dtype=torch.float32)
    a = haar(30, 4, generator=generator, dtype=torch.float32).mT.contiguous()
    assert orthoreg_loss_lowrank(b, a).item() == pytest.approx(math.sqrt(26), rel=1e-6)
    small = a[:, :4].clone().copy_(torch.eye(4)).requires_grad_()
    full = orthoreg_loss_lowrank(torch.eye(40, 4), small)
    full.backward()
    assert full.item() == 0
    assert not small.grad.any()
    rotated = haar(4, 4, generator=generator, dtype=torch.float32)
    assert orthoreg_loss_lowrank(b, rotated).item() < 1e-5  # 4 − 4·(1 ± 1e-7) would give 1e-3


def test_batches_of_factors():
    b, a = noise(3, 6, 2), noise(3, 2, 5, seed=1)
    each = torch.stack([orthoreg_loss_lowrank(x, y, 2) for x, y in zip(b, a, strict=True)])
    torch.testing.assert_close(orthoreg_loss_lowrank(b, a, 2), each)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision(dtype):
    """Computed in float32, whatever the dtype, also under autocast, forward and backward."""
    d = noise(32, 16, dtype=torch.float32).to(dtype).requires_grad_()
    exact = orthoreg_loss(d.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = orthoreg_loss(d)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        loss.backward()
        low = orthoreg_loss_lowrank(d, d.mT, 0.1)
    twin = d.detach().double().requires_grad_()
    orthoreg_loss(twin).backward()
    assert d.grad.dtype == dtype
    error = (d.grad.double() - twin.grad).norm() / twin.grad.norm()
    assert error < {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 1e-6}[dtype]
    exact = orthoreg_loss(0.1 * d.detach().double() @ d.detach().double().mT)
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=0)


def test_nothing_to_measure():
    assert orthoreg_loss(torch.zeros(3, 0)).item() == 0
    assert orthoreg_loss(torch.zeros(0, 4, 3)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: orthoreg_loss(torch.ones(3)), ValueError, "delta must have at least two"),
        (lambda: orthoreg_loss(torch.ones(3, 3).int()), TypeError, "delta must be a real"),
        (lambda: orthoreg_loss(torch.ones(3, 3), 3), ValueError, "power must be 1"),
        (lambda: orthoreg_loss(torch.ones(3, 3), target="diag"), ValueError, "target must be one"),
        (lambda: orthoreg_loss(torch.full((3, 3), math.nan)), ValueError, "delta must be finite"),
        (lambda: orthoreg_loss(torch.full((3, 3), 1e20)), ValueError, "leaves the range of"),
        (
            lambda: orthoreg_loss_lowrank(torch.ones(3, 2), torch.ones(3, 4)),
            ValueError,
            r"B must be \[..., out, r\] and A \[..., r, in\], got \(3, 2\) and \(3, 4\)",
        ),
        (
            lambda: orthoreg_loss_lowrank(torch.ones(3, 2), torch.full((2, 4), math.inf)),
            ValueError,
            "A must be finite",
        ),
        (
            lambda: orthoreg_loss_lowrank(torch.full((3, 2), 1e15), torch.ones(2, 4)),
            ValueError,
            "s·B·A leaves the range",
        ),
        (
            lambda: orthoreg_loss_lowrank(torch.ones(3, 2).long(), torch.ones(2, 4)),
            TypeError,
            "B must be a real",
        ),
    ],
)
def test_what_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()

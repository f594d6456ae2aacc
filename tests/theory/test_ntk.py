import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import dblquad

from stiefel.theory import ntk_relu

TWO_PI = 2 * math.pi


def kernel_reference(x, z, kind):
    """One pair, by the formula as printed, in 64-bit Python floats."""
    length = math.hypot(*x) * math.hypot(*z)
    if length == 0:
        return 0.0
    rho = max(-1.0, min(1.0, sum(a * b for a, b in zip(x, z, strict=True)) / length))
    phi = math.acos(rho)
    value = (math.sin(phi) + (math.pi - phi) * rho) / TWO_PI
    if kind == "ntk":
        value += rho * (math.pi - phi) / TWO_PI
    return length * value / len(x)


def pair(rho):
    """Two unit vectors in the plane at cosine ``rho``."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    z = torch.tensor([[rho, math.sqrt(1 - rho**2)]], dtype=torch.float64)
    return x, z


@pytest.mark.parametrize(
    ("kind", "rho", "value"),
    [
        ("nngp", 0.0, 1 / TWO_PI),
        ("ntk", 0.0, 1 / TWO_PI),
        ("nngp", 1.0, 0.5),
        ("ntk", 1.0, 1.0),
        ("nngp", math.sqrt(0.5), 0.377704582),
        ("ntk", math.sqrt(0.5), 0.642869625),
        ("nngp", -1.0, 0.0),
        ("ntk", -1.0, 0.0),
    ],
)
def test_values_of_the_sheet_times_k(kind, rho, value):
    assert 2 * float(ntk_relu(*pair(rho), kind=kind)) == pytest.approx(value, abs=6e-10)


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_agrees_with_the_printed_formula_pair_by_pair(kind, generator):
    x = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    z = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    x[0, 1] = 0
    expected = [
        [[kernel_reference(a, b, kind) for b in zs] for a in xs]
        for xs, zs in zip(x.tolist(), z.tolist(), strict=True)
    ]
    out = ntk_relu(x, z, kind=kind)
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rho", [0.6, -0.3])
def test_kernels_are_the_integrals_they_stand_for(rho):
    # E[relu(u) relu(v)] and E[1(u > 0) 1(v > 0)] over correlated Gaussians, by quadrature.
    norm = 1 / (TWO_PI * math.sqrt(1 - rho**2))

    def density(u, v):
        return norm * math.exp(-(u * u - 2 * rho * u * v + v * v) / (2 * (1 - rho**2)))

    product = dblquad(lambda v, u: u * v * density(u, v), 0, 9, 0, 9, epsabs=1e-8)[0]
    both = dblquad(density, 0, 9, 0, 9, epsabs=1e-8)[0]
    x, z = pair(rho)
    assert 2 * float(ntk_relu(x, z, kind="nngp")) == pytest.approx(product, abs=1e-7)
    assert 2 * float(ntk_relu(x, z)) == pytest.approx(product + rho * both, abs=1e-7)


def test_a_wide_network_has_this_tangent_kernel(generator):
    width, k = 60_000, 3
    x = torch.randn(4, k, generator=generator, dtype=torch.float64)
    w1 = torch.randn(width, k, generator=generator, dtype=torch.float64, requires_grad=True)
    w2 = torch.randn(width, generator=generator, dtype=torch.float64, requires_grad=True)
    outputs = torch.relu(x @ w1.T / k**0.5) @ w2 / width**0.5
    rows = [torch.autograd.grad(o, (w1, w2), retain_graph=True) for o in outputs]
    last = torch.stack([g2 for _, g2 in rows])
    first = torch.stack([g1.flatten() for g1, _ in rows])
    torch.testing.assert_close(last @ last.T, ntk_relu(x, kind="nngp"), rtol=0, atol=0.02)
    both = last @ last.T + first @ first.T
    torch.testing.assert_close(both, ntk_relu(x), rtol=0, atol=0.04)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.floats(0.1, 10), st.sampled_from([-1, 1]))
def test_symmetric_positive_and_homogeneous(seed, k, factor, sign):
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((7, k)))
    for kind in ("ntk", "nngp"):
        kernel = ntk_relu(x, kind=kind)
        torch.testing.assert_close(kernel, kernel.T, rtol=0, atol=1e-14)
        assert torch.linalg.eigvalsh(kernel)[0] > -1e-12 * kernel.abs().max()
        # relu is positively homogeneous, and a common sign flips every angle the same way.
        scaled = ntk_relu(sign * factor * x, kind=kind)
        torch.testing.assert_close(scaled, factor**2 * kernel, rtol=1e-12, atol=1e-14)


def test_near_duplicates_keep_their_digits():
    # Angle 1e-9: arccos of the cosine would give 0 or 1.5e-8.
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    z = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    lost = 1 - 2 * float(ntk_relu(x, z))
    assert lost == pytest.approx(1e-9 / TWO_PI, rel=1e-5)
    assert 2 * float(ntk_relu(x)) == 1.0


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_many_near_duplicates_are_as_exact_as_one_pair(kind, generator):
    signs = torch.tensor([1.0, -1.0]).repeat(15)[:, None].double()
    x = signs * (1 + 1e-7 * torch.randn(2, 30, 4, generator=generator, dtype=torch.float64))
    whole = ntk_relu(x, kind=kind)
    for i, j in ((0, 2), (1, 4), (3, 3), (5, 7)):
        one = ntk_relu(x[1, i : i + 1], x[1, j : j + 1], kind=kind)
        assert float(whole[1, i, j]) == pytest.approx(float(one), abs=1e-15)
    assert whole.diagonal(dim1=1, dim2=2).numpy() == pytest.approx(
        x.square().sum(-1).numpy() * (1 if kind == "ntk" else 0.5) / 4, rel=1e-14
    )
    x.requires_grad_()
    torch.autograd.gradcheck(lambda a: ntk_relu(a, kind=kind).diagonal(dim1=1, dim2=2), (x,))


def test_batches_broadcast(generator):
    x = torch.randn(2, 1, 3, 4, generator=generator, dtype=torch.float64)
    z = torch.cat([x[0, 0, :2], torch.randn(1, 4, generator=generator).double()])
    out = ntk_relu(x, z.expand(5, 3, 4))
    assert out.shape == (2, 5, 3, 3)
    for i in range(2):
        torch.testing.assert_close(out[i, 2], ntk_relu(x[i, 0], z), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)],
)
def test_dtypes(dtype, tolerance, generator):
    x = torch.randn(30, 5, generator=generator).to(dtype)
    out = ntk_relu(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), ntk_relu(x.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_gradients(kind, generator):
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda a, b: ntk_relu(a, b, kind=kind), (x, z))
    # On the diagonal, where both arguments move together, and at a zero row.
    torch.autograd.gradcheck(lambda a: ntk_relu(a, kind=kind).diagonal(), (x,))
    with_zero = torch.cat([x.detach(), torch.zeros(1, 4).double()]).requires_grad_()
    ntk_relu(with_zero, kind=kind).sum().backward()
    assert with_zero.grad.isfinite().all()


def test_extreme_lengths_do_not_overflow_on_the_way():
    x = torch.tensor([[3e30, 4e30], [3e-30, 4e-30]])
    kernel = ntk_relu(x[:1], x[1:])
    assert float(kernel) == pytest.approx(25 / 2, rel=1e-5)


def test_bad_input(generator):
    x = torch.randn(3, 4, generator=generator)
    with pytest.raises(ValueError, match="kind must be one of"):
        ntk_relu(x, kind="arccos")
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 5\)"):
        ntk_relu(x, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="at least 1"):
        ntk_relu(torch.zeros(2, 0))
    with pytest.raises(TypeError, match="Z is torch"):
        ntk_relu(x, x.double())
    with pytest.raises(ValueError, match="Z must be finite"):
        ntk_relu(x, x / 0)
    with pytest.raises(ValueError, match="overflows"):
        ntk_relu(1e30 * x)

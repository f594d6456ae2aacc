import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import haar, polar, procrustes_rotation, rotation_exp, skew
from stiefel.linalg import newton_polar as module

DTYPES = [torch.float32, torch.float64]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def near_identity(n, seed=0, size=0.1):
    return rotation_exp(size * skew(normal(n, n, seed=seed)))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), seed=st.integers(0, 2**31), condition=st.floats(0, 9))
def test_it_is_the_polar_factor(n, seed, condition):
    """For any condition number; the error grows with it, as the problem's own does."""
    g = torch.Generator().manual_seed(seed)
    u, v = (haar(n, generator=g, dtype=torch.float64) for _ in range(2))
    x = (u * torch.logspace(0, -condition, n, dtype=torch.float64)) @ v
    r = module.newton_polar(3e7 * x)
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(r.mT @ r, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(r, u @ v, rtol=0, atol=1e-14 * 10 ** (condition + 1) + 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_and_scales(dtype):
    x = normal(2, 3, 5, 5).to(dtype) + 3 * torch.eye(5, dtype=dtype)
    scale = torch.logspace(-15, 15, 6, dtype=dtype).view(2, 3, 1, 1)
    got = module.newton_polar(x * scale)
    torch.testing.assert_close(got, polar(x), rtol=0, atol=50 * torch.finfo(dtype).eps)
    assert module.newton_polar(x[:0]).shape == (0, 3, 5, 5)


def test_the_determinant_keeps_its_sign():
    x = normal(4, 4)
    for sign in (1, -1):
        flipped = x.clone()
        flipped[0] *= sign
        assert float(module.newton_polar(flipped).det() * flipped.det()) > 0


def test_singular_matrices_are_refused_or_get_a_ridge():
    base = normal(3, 6)
    m = base.T @ (base + 0.1 * normal(3, 6, seed=1))
    with pytest.raises(module.PolarError, match="singular"):
        module.newton_polar(torch.zeros(3, 3))
    with pytest.raises(module.PolarError, match="singular"):
        module.newton_polar(m, rtol=1e-9)
    ridged = module.newton_polar(m, rtol=1e-7, ridge=True)
    closest = procrustes_rotation(base, base + 0.1 * normal(3, 6, seed=1))
    torch.testing.assert_close(ridged, closest, rtol=0, atol=1e-5)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(module.newton_polar(0 * eye, rtol=1e-7, ridge=True), eye)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [512, 600])
def test_large_matrices_take_the_recursion(monkeypatch, dtype, n):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(n + 200, n, generator=g, dtype=torch.float64)
    r = rotation_exp(0.005 * skew(torch.randn(n, n, generator=g, dtype=torch.float64)))
    m = (base.T @ base @ r).to(dtype)
    got = module.newton_polar(m)
    torch.testing.assert_close(got.double(), r, rtol=0, atol=1e4 * torch.finfo(dtype).eps)
    # A recursion that gives nonsense is seen, and LAPACK asked.
    monkeypatch.setattr(module, "block_inverse", lambda x: torch.eye(len(x), dtype=x.dtype))
    again = module.newton_polar(m)
    torch.testing.assert_close(again, got, rtol=0, atol=1e4 * torch.finfo(dtype).eps)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**31), size=st.floats(0, 50))
def test_block_inverse_of_what_is_safe(n, seed, size):
    """I - Q for skew Q of any size: the symmetric part is the identity."""
    leaf, module._LEAF = module._LEAF, 2
    try:
        x = torch.eye(n, dtype=torch.float64) - size * skew(normal(n, n, seed=seed))
        # Blocks are inverted without pivots: rounding grows with the condition number, squared.
        error = 1e-14 * (1 + size * n) ** 1.5
        wanted = torch.linalg.inv(x)
        torch.testing.assert_close(module.block_inverse(x), wanted, rtol=0, atol=error)
        zero = module.block_inverse(torch.zeros(n, n))
    finally:
        module._LEAF = leaf
    assert not torch.isfinite(zero).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (5, 5), (5, 7), (2, 9)])
def test_procrustes_by_newton_agrees_with_the_decomposition(shape, dtype):
    source = normal(3, *shape).to(dtype)
    target = (source.double() + 0.1 * normal(3, *shape, seed=1)).to(dtype)
    expected = procrustes_rotation(source, target)
    got = procrustes_rotation(source, target, polar="newton")
    atol = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 1e-2)
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)
    assert got.dtype == dtype


def test_procrustes_by_newton_flips_reflections_too():
    source = normal(6, 4)
    mirror = torch.diag(torch.tensor([1.0, 1, 1, -1], dtype=torch.float64))
    for proper in (True, False):
        got = procrustes_rotation(source, source @ mirror, proper=proper, polar="newton")
        expected = procrustes_rotation(source, source @ mirror, proper=proper)
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="polar must be"):
        procrustes_rotation(source, source, polar="qr")


def test_wide_inputs_run_in_float32(monkeypatch):
    monkeypatch.setattr("stiefel.linalg.procrustes.FLOAT64_UP_TO", 0)
    source = normal(30, 20, dtype=torch.float32)
    target = source @ near_identity(20).float()
    got = procrustes_rotation(source, target, polar="newton")
    torch.testing.assert_close(got, near_identity(20).float(), rtol=0, atol=1e-4)

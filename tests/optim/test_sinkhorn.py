import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.optim.sinkhorn import adam_map, row_map, sign_map, sinkhorn_normalize, times

EXAMPLE = torch.cos(
    0.7
    * (torch.arange(3, dtype=torch.float64)[:, None] + 1)
    * (torch.arange(5, dtype=torch.float64) + 1)
)


def reference(x, iters, mode):
    """Element by element, as the papers write it."""
    m, n = x.shape
    for _ in range(iters):
        if mode == "alternating":
            x = x * n**0.5 / x.norm(dim=1, keepdim=True).clamp_min(1e-8)
            x = x * m**0.5 / x.norm(dim=0, keepdim=True).clamp_min(1e-8)
        else:
            rows, columns = x.norm(dim=1, keepdim=True), x.norm(dim=0, keepdim=True)
            x = x / rows.clamp_min(1e-8) / columns.clamp_min(1e-8)
    return x * (m * n) ** 0.5 / x.norm()


def test_exact_values():
    x = torch.tensor([[1, 2], [3, 4]], dtype=torch.float64)
    first = [[0.8451542547, 1.0540925534], [1.1338934190, 0.9428090416]]
    limit = [[0.8**0.5, 1.2**0.5], [1.2**0.5, 0.8**0.5]]
    for value, iters in ((first, 1), (limit, 60)):
        expected = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(sinkhorn_normalize(x, iters), expected, atol=6e-11, rtol=0)
    squares = sinkhorn_normalize(x, 60).square()
    two = torch.full((2,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(squares.sum(0), two)
    torch.testing.assert_close(squares.sum(1), two)


def test_alternating_converges_twice_as_fast():
    limit = sinkhorn_normalize(EXAMPLE, 200)
    expected = {
        "alternating": [1.2e-2, 3.0e-3, 5.5e-5, 7.8e-8],
        "simultaneous": [2.8e-2, 1.2e-2, 1.2e-3, 3.4e-5],
    }
    for mode, values in expected.items():
        assert torch.allclose(sinkhorn_normalize(EXAMPLE, 200, mode), limit, atol=1e-12)
        for iters, value in zip((1, 2, 5, 10), values, strict=True):
            off = (sinkhorn_normalize(EXAMPLE, iters, mode) - limit).norm() / limit.norm()
            assert float(off) == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("mode", ["alternating", "simultaneous"])
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    iters=st.integers(1, 6),
    exponent=st.integers(-25, 25),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_it_is_the_definition_at_any_scale(mode, m, n, iters, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=generator, dtype=torch.float64)
    expected = reference(x, iters, mode)
    scaled = x * 10.0**exponent
    torch.testing.assert_close(sinkhorn_normalize(scaled, iters, mode), expected)
    single = sinkhorn_normalize(scaled.float(), iters, mode)
    torch.testing.assert_close(single.double(), expected, atol=1e-4, rtol=1e-4)
    assert float(single.norm()) == pytest.approx((m * n) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("mode", ["alternating", "simultaneous"])
def test_zero_rows_and_columns_stay_zero(mode):
    x = EXAMPLE.float().clone()
    x[1] = 0
    x[:, 3] = 0
    y = sinkhorn_normalize(torch.stack([x, torch.zeros_like(x)]), 5, mode)
    assert torch.isfinite(y).all()
    assert not y[0, 1].any()
    assert not y[0, :, 3].any()
    assert not y[1].any()
    inner = sinkhorn_normalize(x[[0, 2]][:, [0, 1, 2, 4]], 5, mode)
    part = y[0][[0, 2]][:, [0, 1, 2, 4]]
    cosine = (inner * part).sum() / inner.norm() / part.norm()
    assert float(cosine) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    x = EXAMPLE.to(dtype)
    before = x.clone()
    y = sinkhorn_normalize(x)
    assert torch.equal(y, sinkhorn_normalize(x.float()).to(dtype))
    assert torch.equal(x, before)


def test_memory_layout_does_not_matter(generator):
    x = torch.randn(2, 96, 80, generator=generator)
    transposed = x.mT.contiguous().mT
    torch.testing.assert_close(sinkhorn_normalize(transposed), sinkhorn_normalize(x))
    v = torch.randn(2, 80, 1, generator=generator)
    for matrices in (x, transposed):
        torch.testing.assert_close(times(matrices, v), torch.einsum("kij,kjl->kil", x, v))


def test_row_map(generator):
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    x[2] = 0
    y = row_map(x)
    norms = torch.tensor([6**0.5, 6**0.5, 0, 6**0.5], dtype=torch.float64)
    torch.testing.assert_close(y.norm(dim=1), norms)
    torch.testing.assert_close(y[0], x[0] * 6**0.5 / x[0].norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sign_map_of_stacks_is_that_of_each_matrix(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    x *= torch.tensor([1.0, 1e-6, 1e6]).to(dtype)[:, None, None]
    x[:, 1, 2] *= 1e-7  # below the floor
    x[:, 4] = 0
    expected = x.sign()
    expected[:, 1, 2] = 0
    assert torch.equal(sign_map(x), expected)
    assert torch.equal(sign_map(x.mT), expected.mT)
    assert torch.equal(torch.stack([sign_map(own) for own in x]), expected)
    x[1, 0, 0] = torch.nan
    assert sign_map(x)[1].isnan().any()
    assert torch.equal(sign_map(x)[0], expected[0])


def test_sign_map_does_not_toss_coins():
    x = torch.tensor([[1.0, -2.0, 1e-9], [-1e-9, 0.0, 3e-6]], dtype=torch.float64)
    for scale in (1.0, 1e-20, 1e20):
        assert sign_map(x * scale).tolist() == [[1, -1, 0], [0, 0, 1]]
    assert sign_map(x * torch.nan).isnan().all()


def test_adam_map():
    x, v = EXAMPLE[None].clone(), 0.5 * EXAMPLE.square()[None]
    unit = torch.full((1, 1, 1), 3.0, dtype=torch.float64)
    v[0, 0, 0] = x[0, 0, 0] = 0.0
    new = 0.9 * v + 0.1 * (3 * x).square()
    expected = torch.where(new > 0, 3 * x / new.sqrt(), 0.0)
    root = v.sqrt()
    torch.testing.assert_close(adam_map(x, root, unit, 0.9, False), expected)
    assert torch.equal(root, v.sqrt())
    torch.testing.assert_close(adam_map(x, root, unit, 0.9, True), expected)
    torch.testing.assert_close(root, new.sqrt())
    big = adam_map(x.float(), torch.zeros(1, 3, 5), torch.full((1, 1, 1), 1e30), 0.9, True)
    torch.testing.assert_close(big, x.float().sign() * 10**0.5)


def test_bad_inputs():
    with pytest.raises(ValueError, match="iters must be ≥ 1, got 0"):
        sinkhorn_normalize(EXAMPLE, 0)
    with pytest.raises(ValueError, match="mode must be one of"):
        sinkhorn_normalize(EXAMPLE, mode="both")
    for wrong in (EXAMPLE[0], torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(TypeError):
            sinkhorn_normalize(wrong)
    assert sinkhorn_normalize(torch.zeros(0, 3)).shape == (0, 3)

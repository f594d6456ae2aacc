"""Column selection and the quantiser of error feedback: values of the sheet, identities, traps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import dct_matrix, haar
from stiefel.optim import columns
from stiefel.optim.columns import ColumnSelector, low_rank_svd_projector
from stiefel.optim.quantized import code_bytes, dequantize, pack, quantize, unpack

BASES = ("dct2", "dct3")
METHODS = ("fft", "matmul", "auto")
every_basis = pytest.mark.parametrize("basis", BASES)
every_method = pytest.mark.parametrize("method", METHODS)
both_sides = pytest.mark.parametrize("dim", [-1, -2])


def cosines(rows=6, cols=4):
    i = torch.arange(rows, dtype=torch.float64)[:, None] + 1
    return torch.cos(0.7 * i * (torch.arange(cols, dtype=torch.float64) + 1))


def noise(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def q_of(n, basis):
    """Q itself: Dᵀ for dct2, D for dct3."""
    d = dct_matrix(n, dtype=torch.float64)
    return d.mT if basis == "dct2" else d


def sided(a, dim):
    return a if dim == -1 else a.mT.contiguous()


@every_method
def test_values_of_the_sheet(method):
    g = cosines()
    selector = ColumnSelector(4, 2, method=method)
    low, idx = selector.select(g)
    assert idx.tolist() == [2, 3]
    assert float(selector.error(g, low)) == pytest.approx(0.5311219716, abs=1e-9)
    s = selector.coefficients(g)
    squares = [0.3727415087, 2.586692419, 3.058346057, 4.4732979361]
    torch.testing.assert_close(s.square().sum(0).tolist(), squares, rtol=0, atol=1e-9)
    assert float(s.square().sum()) == pytest.approx(10.4910779208, abs=1e-9)
    projector = low_rank_svd_projector(g, 2)
    best = (g - g @ projector @ projector.mT).norm() / g.norm()
    assert float(best) == pytest.approx(0.4978739243, abs=1e-9)


def test_the_two_norms_rank_differently():
    s = torch.tensor([[3, 1.5], [0, 1.5], [0, 1.5]])
    assert ColumnSelector(2, 1, torch.eye(2), norm=1).select(s)[1].tolist() == [1]
    assert ColumnSelector(2, 1, torch.eye(2), norm=2).select(s)[1].tolist() == [0]


@every_method
@every_basis
@both_sides
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_all_columns_reconstruct(method, basis, dim, dtype):
    a = sided(noise(3, 9, 7, dtype=dtype), dim)
    selector = ColumnSelector(7, 7, basis, method=method)
    low, idx = selector.select(a, dim=dim)
    assert idx.tolist() == [list(range(7))] * 3
    torch.testing.assert_close(selector.expand(low, idx, dim=dim), a)


@every_method
@every_basis
@both_sides
def test_low_is_a_times_the_chosen_columns(method, basis, dim):
    a = noise(5, 12)
    selector = ColumnSelector(12, 4, basis, method=method)
    low, idx = selector.select(sided(a, dim), dim=dim)
    assert low.shape == ((5, 4) if dim == -1 else (4, 5))
    p = q_of(12, basis)[:, idx]
    scores = (a @ q_of(12, basis)).abs().sum(0)
    assert set(idx.tolist()) == set(scores.topk(4).indices.tolist())
    torch.testing.assert_close(low, sided(a @ p, dim))
    torch.testing.assert_close(selector.expand(low, idx, dim=dim), sided(a @ p @ p.mT, dim))
    torch.testing.assert_close(selector.project(sided(a, dim), idx, dim), low)
    torch.testing.assert_close(p.mT @ p, torch.eye(4, dtype=torch.float64))


@given(
    n=st.integers(1, 24),
    rows=st.integers(1, 6),
    part=st.floats(0.01, 0.99),
    basis=st.sampled_from(BASES),
    norm=st.sampled_from((1, 2)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_error_identity_parseval_and_contraction(n, rows, part, basis, norm, seed):
    a = noise(rows, n, seed=seed)
    selector = ColumnSelector(n, part, basis, norm)
    assert selector.rank == max(1, round(part * n))
    low, idx = selector.select(a)
    assert (idx.diff() > 0).all()
    s = selector.coefficients(a)
    torch.testing.assert_close(s.norm(), a.norm())
    rest = a - selector.expand(low, idx)
    torch.testing.assert_close(rest.square().sum(), (a.norm() ** 2 - low.norm() ** 2).clamp_min(0))
    assert float(selector.error(a, low)) == pytest.approx(float(rest.norm() / a.norm()), abs=1e-7)
    if norm == 2:
        bound = (1 - selector.rank / n) * a.square().sum()
        assert rest.square().sum() <= bound * (1 + 1e-12) + 1e-12


@given(
    n=st.integers(1, 16), seed=st.integers(0, 1000), dim=st.sampled_from((-1, -2)), data=st.data()
)
@settings(max_examples=60, deadline=None)
def test_carrying_is_the_rotation(n, seed, dim, data):
    old, new = (
        torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))) for _ in "ab"
    )
    q = q_of(n, "dct2")
    state = noise(3, len(old), seed=seed)
    rotated = state @ (q[:, old].mT @ q[:, new])
    carried = ColumnSelector.carry(sided(state, dim), old, new, dim=dim)
    torch.testing.assert_close(carried, sided(rotated, dim), rtol=0, atol=1e-14 * 16)
    assert (carried == 0).sum() == 3 * len(set(new.tolist()) - set(old.tolist()))


def test_carrying_drops_what_is_not_a_number_with_its_column():
    state = torch.tensor([[1.0, math.nan]])
    carried = ColumnSelector.carry(state, torch.tensor([0, 3]), torch.tensor([0, 1]))
    assert carried.tolist() == [[1, 0]]


@both_sides
def test_batches_are_matrices_one_by_one(dim):
    a = sided(noise(2, 3, 5, 8), dim)
    selector = ColumnSelector(8, 3)
    low, idx = selector.select(a, dim=dim)
    full = selector.expand(low, idx, dim=dim)
    carried = selector.carry(low, idx, idx.roll(1, 0), dim=dim)
    for i in range(2):
        for j in range(3):
            one_low, one_idx = selector.select(a[i, j], dim=dim)
            torch.testing.assert_close(low[i, j], one_low)
            assert torch.equal(idx[i, j], one_idx)
            torch.testing.assert_close(full[i, j], selector.expand(one_low, one_idx, dim=dim))
            one = selector.carry(one_low, one_idx, idx.roll(1, 0)[i, j], dim=dim)
            torch.testing.assert_close(carried[i, j], one)
    assert selector.error(a, low).shape == (2, 3)


@both_sides
@pytest.mark.parametrize("norm", [1, 2])
def test_equal_scores_choose_the_lower_index(dim, norm):
    selector = ColumnSelector(8, 3, torch.eye(8), norm)
    a = torch.zeros(2, 8)
    assert selector.select(sided(a, dim), dim=dim)[1].tolist() == [0, 1, 2]
    a[:, [6, 1, 3, 5]] = torch.tensor([1.0, -1.0])[:, None]
    assert selector.select(sided(a, dim), dim=dim)[1].tolist() == [1, 3, 5]
    a[0, 7] = 9
    assert selector.select(sided(a, dim), dim=dim)[1].tolist() == [1, 3, 7]


@pytest.mark.parametrize("norm", [1, 2])
def test_neither_scale_nor_order_of_rows_matters(norm):
    a = noise(6, 16, dtype=torch.float32)
    selector = ColumnSelector(16, 5, norm=norm)
    idx = selector.select(a)[1]
    assert torch.equal(selector.select(a[torch.randperm(6)])[1], idx)
    for scale in (1e-30, 1e-12, 3.0, 1e12, 1e30):  # squares leave float32
        assert torch.equal(selector.select(a * scale)[1], idx)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_follows(method, dtype):
    a = noise(6, 32, dtype=dtype)
    before = a.clone()
    selector = ColumnSelector(32, 8, method=method)
    low, idx = selector.select(a)
    assert low.dtype == dtype
    full = selector.expand(low, idx)
    assert full.dtype == dtype
    exact = ColumnSelector(32, 8).expand(ColumnSelector(32, 8).project(a.double(), idx), idx)
    assert (full.double() - exact).norm() < 0.03 * exact.norm()
    assert torch.equal(a, before)


@every_method
@both_sides
def test_gradients_flow_through_the_chosen_columns(method, dim):
    a = sided(noise(4, 8), dim).requires_grad_()
    selector = ColumnSelector(8, 3, method=method)
    low, idx = selector.select(a, dim=dim)
    target = sided(noise(4, 8, seed=1), dim)
    (selector.expand(low, idx, dim=dim) * target).sum().backward()
    expected = selector.expand(selector.project(target, idx, dim), idx, dim=dim)
    torch.testing.assert_close(a.grad, expected)


def test_a_basis_of_ones_own():
    q = haar(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a = noise(4, 6)
    low, idx = ColumnSelector(6, 2, q).select(a)
    torch.testing.assert_close(low, a @ q[:, idx])
    low32, _ = ColumnSelector(6, 2, lambda n: q).select(a.float())
    assert low32.dtype == torch.float32
    torch.testing.assert_close(low32, low.float())


def test_one_matrix_per_size_is_shared():
    pair = [ColumnSelector(48, r, method="matmul") for r in (3, 9)]
    for selector in pair:
        selector.select(noise(2, 48))
    columns._kept_dct_rows.cache_clear()
    for selector in pair:
        selector.select(noise(2, 48))
    assert columns._kept_dct_rows.cache_info().misses == 1
    assert not any(isinstance(v, torch.Tensor) for s in pair for v in vars(s).values())


@pytest.mark.parametrize(
    ("n", "count", "fft"),
    [
        (384, 384, True),
        (384, 64, True),
        (384, 63, False),
        (32, 32, False),
        (8192, 63, False),
        (8193, 1, True),  # no n × n matrix that large
        (1021, 319, False),  # a prime: five times as many
        (1021, 320, True),
        (2 * 1021, 319, False),
        (1001, 64, True),  # 7 · 11 · 13
        (17 * 64, 64, False),
    ],
)
def test_auto_goes_by_sizes(n, count, fft):
    assert ColumnSelector(n, 1).uses_fft(count, torch.device("cpu")) is fft


def test_auto_elsewhere():
    cuda, mps = torch.device("cuda"), torch.device("mps")
    assert ColumnSelector(1024, 1).uses_fft(1024, cuda)
    assert not ColumnSelector(1024, 1).uses_fft(256, cuda)
    assert not ColumnSelector(1024, 1).uses_fft(1024, mps)
    assert ColumnSelector(1024, 1, method="fft").uses_fft(1, mps)
    matrix = ColumnSelector(8, 1, torch.eye(8))
    assert not matrix.uses_fft(8, torch.device("cpu"))


def test_nan_and_inf_propagate():
    for bad in (math.nan, math.inf):
        a = noise(4, 8, dtype=torch.float32)
        a[1, 2] = bad
        low, idx = ColumnSelector(8, 3).select(a)
        assert idx.shape == (3,)
        assert not torch.isfinite(low[1]).any()
        assert torch.isfinite(low[0]).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1), ValueError, "n must be at least 1, got 0"),
        ((4.5, 1), TypeError, "int"),
        ((4, 0), ValueError, "rank must be at least 1.*got 0"),
        ((4, -2), ValueError, "got -2"),
        ((4, 1.5), ValueError, "fraction in"),
        ((4, 0.0), ValueError, "fraction in"),
        ((4, math.nan), ValueError, "fraction in"),
        ((4, True), TypeError, "rank must be"),
        ((4, "2"), TypeError, "rank"),
        ((4, 2, "dct1"), ValueError, "basis must be"),
        ((4, 2, torch.eye(3)), ValueError, r"shape \(4, 4\), got \(3, 3\)"),
        ((4, 2, 2 * torch.eye(4)), ValueError, "orthogonal"),
        ((4, 2, torch.eye(4), 1, "fft"), ValueError, "method='fft' needs"),
        ((4, 2, "dct2", 3), ValueError, "norm must be 1 or 2, got 3"),
        ((4, 2, "dct2", 1, "slow"), ValueError, "method must be"),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        ColumnSelector(*arguments)


def test_bad_matrices():
    selector = ColumnSelector(4, 2)
    with pytest.raises(TypeError):
        selector.select(torch.zeros(3, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"must have shape \(…, m, 4\), got \(4, 3\)"):
        selector.select(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"must have shape \(…, 4, m\)"):
        selector.select(torch.zeros(3, 4), dim=-2)
    with pytest.raises(ValueError, match="dim must be -1 or -2"):
        selector.select(torch.zeros(4, 4), dim=0)
    with pytest.raises(ValueError, match="low must have shape"):
        selector.expand(torch.zeros(3, 4), torch.tensor([0, 1]))


def test_too_large_a_rank_is_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="rank 9 is more than n = 4") as caught:
        assert ColumnSelector(4, 9).rank == 4
    assert len(caught) == 1


def test_zero_matrices_have_no_error():
    a = torch.zeros(3, 4)
    low, _ = ColumnSelector(4, 2).select(a)
    assert float(ColumnSelector.error(a, low)) == 0


# The quantiser


@given(
    bits=st.sampled_from((4, 8)),
    rows=st.integers(1, 5),
    cols=st.integers(1, 7),
    dim=st.sampled_from((-1, -2)),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_rounding_is_to_the_nearest_level(bits, rows, cols, dim, exponent, seed):
    x = noise(2, rows, cols, seed=seed) * 10.0**exponent
    codes, low, unit = quantize(x, bits, dim)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, code_bytes(rows, cols, bits))
    back = dequantize(codes, low, unit, bits, (rows, cols))
    assert ((x - back).abs() <= unit * 0.5 * (1 + 1e-9)).all()
    torch.testing.assert_close(back.amax(dim), x.amax(dim))
    assert torch.equal(back.amin(dim), x.amin(dim))


def test_eight_bits_are_256_levels_and_four_are_16():
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64)[None]
    assert quantize(x, 8)[0].unique().tolist() == list(range(256))
    codes = unpack(quantize(x, 4)[0], 1001)
    assert codes.unique().tolist() == list(range(16))


def test_levels_survive_unchanged():
    x = torch.arange(256, dtype=torch.float32)[None] - 100
    assert torch.equal(dequantize(*quantize(x, 8), 8, (1, 256)), x)


def test_nibbles_keep_their_order():
    codes = torch.tensor([[0, 1, 2, 15], [0, 5, 10, 15]], dtype=torch.uint8)
    packed = pack(codes)
    assert packed.tolist() == [[0x01, 0x2F], [0x05, 0xAF]]
    assert torch.equal(unpack(packed, 4), codes)
    odd = torch.tensor([7, 8, 9], dtype=torch.uint8)
    assert torch.equal(unpack(pack(odd), 3), odd)


@pytest.mark.parametrize("bits", [4, 8])
def test_constant_and_extreme_rows(bits):
    huge = torch.finfo(torch.float32).max
    x = torch.tensor([[3.0, 3, 3], [0, 0, 0], [-huge, 0, huge], [1e30, 1e30, -1e30]])
    codes, low, unit = quantize(x, bits)
    back = dequantize(codes, low, unit, bits, (4, 3))
    assert torch.equal(back[:2], x[:2])
    assert not unit[:2].any()
    assert torch.isfinite(unit).all()
    error = (x.double() - back.double()).abs()
    assert (error <= 0.51 * unit.double())[3].all()
    flat = codes if bits == 8 else unpack(codes, 12)
    assert not flat[:6].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_visible(bad):
    x = torch.tensor([[1.0, bad, 2.0], [1, 2, 3]])
    back = dequantize(*quantize(x, 8), 8, (2, 3))
    assert not torch.isfinite(back[0]).all()
    torch.testing.assert_close(back[1], x[1], rtol=0, atol=0.004)


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 2"):
        quantize(torch.zeros(2, 2), 2)

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.init import aligned_init, low_rank_init, spectrum_init

W = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.2], [-0.6, 0.3, 0.7]], dtype=torch.float64)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rank_of(w):
    return int(torch.linalg.matrix_rank(w.double(), rtol=1e-6))


def test_values_of_the_sheet():
    s = torch.linalg.svdvals(W)
    expected = torch.tensor([1.0183012846, 0.6189555282, 0.3315969660], dtype=torch.float64)
    torch.testing.assert_close(s, expected, rtol=0, atol=1e-10)
    one = torch.tensor(
        [
            [0.3138014842, -0.1558715441, -0.2518613544],
            [0.0397217324, -0.0197305879, -0.0318812046],
            [-0.8420694202, 0.4182729125, 0.6758564102],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(low_rank_init(W, 1), one, rtol=0, atol=1e-10)
    row = torch.tensor([0.399440508, -0.4412397876, 0.1389959124], dtype=torch.float64)
    torch.testing.assert_close(low_rank_init(W, 2)[0], row, rtol=0, atol=1e-10)
    torch.testing.assert_close(low_rank_init(W, 3), W, rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 12), n=st.integers(1, 12), seed=st.integers(0, 1000), data=st.data())
def test_rank_and_norm(m, n, seed, data):
    rank = data.draw(st.integers(1, min(m, n)))
    w = gaussian(m, n, seed=seed)
    low = low_rank_init(w, rank)
    assert rank_of(low) == rank
    assert float(low.norm()) == pytest.approx(float(w.norm()), rel=1e-12)
    # It is the truncation: proportional to the projection on the leading left vectors.
    u = torch.linalg.svd(w).U[:, :rank]
    projected = u @ u.mT @ w
    scale = w.norm() / projected.norm()
    torch.testing.assert_close(low, scale * projected, rtol=1e-9, atol=1e-9)


def test_what_the_norm_keeps():
    w = gaussian(20, 14)
    top = float(torch.linalg.matrix_norm(w, 2))
    spectral = low_rank_init(w, 3, norm="spectral")
    assert float(torch.linalg.matrix_norm(spectral, 2)) == pytest.approx(top, rel=1e-12)
    for number in (2, 0.5):
        assert float(low_rank_init(w, 3, norm=number).norm()) == pytest.approx(number, rel=1e-12)


def test_shape_draws_a_gaussian_of_the_gain(generator):
    w = low_rank_init((400, 300), 300, gain=2.0, generator=generator, dtype=torch.float64)
    assert float(w.std() * math.sqrt(300)) == pytest.approx(2.0, rel=0.01)
    again = [
        low_rank_init((6, 6), r, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for r in (6, 2)
    ]
    torch.testing.assert_close(low_rank_init(again[0], 2), again[1])  # paired by the seed


def test_batches_are_one_by_one():
    w = gaussian(2, 3, 5, 4)
    low = low_rank_init(w, 2)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(low[i, j], low_rank_init(w[i, j], 2))
    assert low_rank_init((2, 5, 4), 1, generator=torch.Generator()).shape == (2, 5, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    low = low_rank_init(W.to(dtype), 1)
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), low_rank_init(W, 1), rtol=0, atol=2e-2)
    for result in (
        low_rank_init((4, 3), 2, dtype=dtype),
        spectrum_init((4, 3), [1.0, 0.5], dtype=dtype),
        aligned_init((4, 3), torch.tensor([1.0, 2.0, 0.0], dtype=dtype)),
    ):
        assert result.dtype == dtype
        assert result.isfinite().all()


def test_float32_leaves_no_spurious_rank(generator):
    w = low_rank_init((300, 300), 5, generator=generator)
    s = torch.linalg.svdvals(w.double())
    assert s[5] < 1e-6 * s[0] < s[4]


def test_gradients():
    w = gaussian(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: low_rank_init(x, 2), w)
    values = torch.tensor([2.0, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: spectrum_init((4, 3), s, norm=2.0, generator=torch.Generator().manual_seed(0)),
        values,
    )


@pytest.mark.parametrize("bad", [0, -1, 4])
def test_ranks_outside_the_matrix(bad):
    with pytest.raises(ValueError, match=rf"1\.\.3 for matrices of 3 × 3, got {bad}"):
        low_rank_init(W, bad)


def test_rank_above_that_of_the_matrix():
    thin = W[:, :1] @ W[:1]
    with pytest.raises(ValueError, match="below the rank 2"):
        low_rank_init(thin, 2)
    with pytest.raises(ValueError, match=r"below the rank 1 .*matrix \(1,\)"):
        low_rank_init(torch.stack([W, torch.zeros(3, 3, dtype=torch.float64)]), 1)


@pytest.mark.parametrize("bad", ["nuclear", 0, -1.0, math.inf, math.nan])
def test_bad_norms(bad):
    for call in (
        lambda: low_rank_init(W, 1, norm=bad),
        lambda: spectrum_init((3, 3), [1.0], norm=bad),
        lambda: aligned_init((3, 3), W[0], norm=bad),
    ):
        with pytest.raises(ValueError, match="norm must be"):
            call()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_bad_gains(bad):
    for call in (
        lambda: low_rank_init((3, 3), 1, gain=bad),
        lambda: spectrum_init((3, 3), [1.0], gain=bad),
        lambda: aligned_init((3, 3), W[0], gain=bad),
    ):
        with pytest.raises(ValueError, match="gain must be positive"):
            call()


def test_bad_matrices():
    with pytest.raises(ValueError, match="finite"):
        low_rank_init(W * math.nan, 1)
    with pytest.raises(TypeError):
        low_rank_init(torch.ones(3, 3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"\[\.\.\., m, n\]"):
        low_rank_init((3,), 1)
    with pytest.raises(ValueError, match="keeps its own"):
        low_rank_init(W, 1, dtype=torch.float32)


def test_spectrum_is_the_one_asked_for(generator):
    for shape in ((7, 4), (4, 7), (5, 5)):
        w = spectrum_init(shape, [3.0, 0.5, 1.0], generator=generator, dtype=torch.float64)
        s = torch.linalg.svdvals(w)
        torch.testing.assert_close(s[:3], torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
        assert s[3:].max() < 1e-14
    values = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    stack = spectrum_init((4, 3), values, generator=generator)
    assert stack.shape == (2, 4, 3)
    torch.testing.assert_close(torch.linalg.svdvals(stack)[:, :2], values)


def test_spectrum_norms(generator):
    draw = {"generator": generator, "dtype": torch.float64, "gain": 2.0}
    w = spectrum_init((9, 4), [3.0, 1.0], norm="fro", **draw)
    assert float(w.norm()) == pytest.approx(2 * 3)  # gain √m
    w = spectrum_init((9, 4), [3.0, 1.0], norm="spectral", **draw)
    assert float(torch.linalg.matrix_norm(w, 2)) == pytest.approx(2 * (1 + 1.5))
    w = spectrum_init((9, 4), [3.0, 1.0], norm=7, **draw)
    assert float(w.norm()) == pytest.approx(7)


def test_directions_of_the_spectrum_are_uniform(generator):
    rows = [
        spectrum_init((3, 3), [1.0], generator=generator, dtype=torch.float64) for _ in range(2000)
    ]
    w = torch.stack(rows)
    assert w.mean(0).abs().max() < 0.03
    torch.testing.assert_close(
        (w.square()).mean(0), torch.full((3, 3), 1 / 9, dtype=torch.float64), rtol=0.15, atol=0
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0] * 4, "1 to 3 numbers"),
        ([], "1 to 3 numbers"),
        ([-1.0], "at least 0"),
        ([0.0, 0.0], "one above 0"),
        ([math.nan], "finite"),
    ],
)
def test_bad_spectra(values, message):
    with pytest.raises(ValueError, match=message):
        spectrum_init((3, 5), values)


@pytest.mark.parametrize("shape", [(3,), (0, 2), (2, 3, 4)])
def test_bad_shapes(shape):
    for call in (lambda: spectrum_init(shape, [1.0]), lambda: aligned_init(shape, W[0])):
        with pytest.raises(ValueError, match="two positive integers"):
            call()


def test_one_direction_is_seen_and_nothing_else(generator):
    beta = gaussian(6)
    w = aligned_init((9, 6), beta, norm=0.01, generator=generator)
    assert float(w.norm()) == pytest.approx(0.01, rel=1e-12)
    unit = beta / beta.norm()
    torch.testing.assert_close(w.mT @ w, 1e-4 * torch.outer(unit, unit))


@pytest.mark.parametrize("r", [1, 3])
def test_several_directions(r, generator):
    directions, outputs = gaussian(r, 6), gaussian(r, 9, seed=1)
    w = aligned_init((9, 6), directions, outputs, gain=2.0)
    s = torch.linalg.svdvals(w)
    torch.testing.assert_close(s[:r], torch.full((r,), 2 * 3 / math.sqrt(r), dtype=torch.float64))
    assert s[r:].max() < 1e-13
    inside = torch.linalg.lstsq(directions.mT, w.mT).solution  # every row lies in their span
    torch.testing.assert_close(directions.mT @ inside, w.mT)
    top = aligned_init((9, 6), directions, norm="spectral", gain=2.0, generator=generator)
    largest = float(torch.linalg.matrix_norm(top, 2))
    assert largest == pytest.approx(2 * (1 + math.sqrt(9 / 6)))


def test_orthogonal_directions_keep_their_outputs():
    eye = torch.eye(4, dtype=torch.float64)
    w = aligned_init((4, 4), 3 * eye[[0, 2]], 0.1 * eye[[3, 1]], norm=math.sqrt(2))
    expected = torch.outer(eye[3], eye[0]) + torch.outer(eye[1], eye[2])
    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.ones(5), r"\[6\] or \[r, 6\], got \(5,\)"),
        (torch.ones(2, 3, 6), "got"),
        (torch.zeros(6), "number 0 is"),
        (torch.stack([torch.ones(6), torch.zeros(6)]), "number 1 is"),
        (torch.ones(2, 6), "linearly independent"),
        (torch.eye(6)[:5], "1 to 4 vectors"),
        (torch.full((6,), math.inf), "finite"),
    ],
)
def test_bad_directions(directions, message):
    with pytest.raises(ValueError, match=message):
        aligned_init((4, 6), directions)


def test_bad_outputs():
    with pytest.raises(ValueError, match=r"outputs must have shape \[4\]"):
        aligned_init((4, 6), torch.ones(6), torch.ones(6))
    with pytest.raises(ValueError, match="outputs must be 1"):
        aligned_init((4, 6), torch.ones(6), torch.eye(4)[:2])

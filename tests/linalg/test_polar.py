"""Polar factors: exact values, invariants, and agreement with the singular value decomposition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import haar, newton_schulz, orthogonality_error, polar

SHAPES = [(1, 1), (3, 3), (4, 3), (3, 4), (2, 5, 4), (2, 3, 4, 6), (1, 7), (7, 1)]


def cosines(rows, cols, t=0.0):
    i = torch.arange(rows, dtype=torch.float64)[:, None] + 1
    j = torch.arange(cols, dtype=torch.float64) + 1
    return torch.cos(0.7 * i * j + 0.3 * t)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_exact(actual, expected):
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), atol=6e-9, rtol=0
    )


def test_classic_newton_schulz_exact_values():
    out = newton_schulz(cosines(4, 3))
    assert_exact(out[0], [0.61249406, 0.19498940, -0.28582116])
    assert_exact(torch.linalg.svdvals(out), [1.08711036, 1.05955236, 1.04803441])


def test_polar_express_exact_values():
    out = newton_schulz(cosines(4, 3), coefficients="polar_express")
    assert_exact(out[0], [0.60937506, 0.19637692, -0.25307372])
    assert_exact(torch.linalg.svdvals(out), [1.10964518, 1.01906075, 0.92323814])


def test_polar_express_goes_on_to_the_exact_factor():
    x = gaussian(5, 8)
    out = newton_schulz(x, steps=12, coefficients="polar_express")
    torch.testing.assert_close(out, polar(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_is_the_svd_one_and_semi_orthogonal(shape):
    x = gaussian(*shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(polar(x), u @ vh, atol=1e-12, rtol=0)
    assert float(orthogonality_error(polar(x))[0].max()) < 1e-12


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6), st.floats(-30, 30))
@settings(max_examples=40, deadline=None)
def test_polar_properties(rows, cols, seed, exponent):
    x = gaussian(rows, cols, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    a = haar(cols, cols, generator=generator, dtype=torch.float64)
    q = haar(rows, rows, generator=generator, dtype=torch.float64)
    p = polar(x)
    # (near-)rank-deficient draws have no well-determined factor
    close = {"atol": 1e-9 / float(torch.linalg.svdvals(x)[-1].clamp_min(1e-6)), "rtol": 0}
    torch.testing.assert_close(polar(q @ x @ a), q @ p @ a, **close)
    torch.testing.assert_close(polar(x.mT), p.mT, **close)
    torch.testing.assert_close(polar(x * 10.0**exponent), p, **close)
    best = (x - p).norm()
    assert best <= (x - q @ p).norm() + 1e-9


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 3), (2, 3, 4)])
def test_polar_gradient(shape):
    assert torch.autograd.gradcheck(polar, (gaussian(*shape).requires_grad_(),))


def test_polar_gradient_at_repeated_singular_values():
    # The gradient of U and V alone is infinite here, that of U Vᵀ is not.
    x = torch.eye(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(polar, (x,))
    q = haar(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(polar, (q.requires_grad_(),))


@pytest.mark.parametrize("coefficients", ["classic", "polar_express"])
def test_newton_schulz_gradient(coefficients):
    x = gaussian(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: newton_schulz(t, 3, coefficients), (x,))


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (6, 4)])
def test_rank_deficient_matrices(rank, shape):
    x = gaussian(shape[0], rank) @ gaussian(rank, shape[1], seed=1)
    p = polar(x)
    assert float(orthogonality_error(p)[0]) < 1e-12  # completed, so still semi-orthogonal
    best = torch.linalg.svdvals(x).sub(1).norm()  # no semi-orthogonal matrix is closer
    torch.testing.assert_close((x - p).norm(), best, atol=1e-12, rtol=0)
    out = newton_schulz(x)
    assert int((torch.linalg.svdvals(out) > 1e-6).sum()) == rank  # zeros stay zeros


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("function", [polar, newton_schulz])
def test_low_precision_follows_float64(function, dtype, tolerance):
    x = gaussian(2, 6, 9).to(dtype)
    kept = x.clone()
    out = function(x)
    assert out.dtype == dtype
    assert torch.equal(x, kept)
    wide = tolerance if function is polar else 4 * tolerance  # five steps of bfloat16 products
    torch.testing.assert_close(out.double(), function(x.double()), atol=wide, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_float32_scales_whose_squares_leave_the_range(scale):
    x = gaussian(4, 5, dtype=torch.float32)
    torch.testing.assert_close(polar(x * scale), polar(x), atol=1e-5, rtol=0)
    out, expected = newton_schulz(x * scale, eps=0.0), newton_schulz(x, eps=0.0)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_newton_schulz_image_of_singular_values():
    sigma = torch.tensor([0.05, 0.3, 0.6, 0.8], dtype=torch.float64)
    q = haar(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = q @ torch.diag(sigma) @ q.mT
    s = sigma / sigma.norm()
    for _ in range(5):
        s = s * (3.4445 + s**2 * (-4.7750 + s**2 * 2.0315))
    expected = torch.sort(s, descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(newton_schulz(x, eps=0.0)), expected)


def test_tall_is_the_transpose_of_wide():
    x = gaussian(3, 7)
    torch.testing.assert_close(newton_schulz(x.mT), newton_schulz(x).mT)


def test_orthogonality_error_is_that_of_the_singular_values():
    x = torch.diag(torch.tensor([1.5, 1.0, 0.8], dtype=torch.float64))
    worst, mean = orthogonality_error(x)
    assert_exact(worst, 0.5)
    assert_exact(mean, (0.25 + 0.04) / 3)
    worst, _ = orthogonality_error(torch.stack([x, torch.eye(3, dtype=torch.float64)]))
    assert_exact(worst, [0.5, 0.0])


def test_empty_matrices_and_batches():
    assert polar(torch.zeros(2, 0, 3)).shape == (2, 0, 3)
    assert polar(torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    assert newton_schulz(torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    assert newton_schulz(torch.zeros(2, 0, 3)).shape == (2, 0, 3)
    assert torch.equal(newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_newton_schulz_keeps_nan_in_its_matrix():
    x = gaussian(2, 3, 4)
    clean = newton_schulz(x)
    x[0, 1, 2] = torch.nan
    out = newton_schulz(x)
    assert torch.isnan(out[0]).all()
    torch.testing.assert_close(out[1], clean[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("function", [polar, orthogonality_error])
def test_nan_and_inf_are_refused(function, bad):
    x = torch.eye(3)
    x[0, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        function(x)


def test_bad_arguments_are_named():
    x = torch.eye(3)
    with pytest.raises(ValueError, match="steps must be ≥ 0, got -1"):
        newton_schulz(x, steps=-1)
    with pytest.raises(ValueError, match="coefficients must be one of"):
        newton_schulz(x, coefficients="quintic")
    with pytest.raises(ValueError, match="got shape"):
        newton_schulz(x, coefficients=[(1.0, 2.0)])
    with pytest.raises(ValueError, match="fast has 4 steps, got steps=5"):
        newton_schulz(x, coefficients="fast")
    with pytest.raises(ValueError, match="empty"):
        orthogonality_error(torch.zeros(0, 3))

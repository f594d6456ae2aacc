"""The fast algorithm against the plain loop, the coefficient tables and their guards."""

import warnings

import numpy as np
import pytest
import torch

from stiefel.linalg import (
    as_table,
    check_guards,
    haar,
    newton_schulz,
    orthogonality_error,
    orthogonalize,
)
from stiefel.linalg.coefficients import NAMES, scalar_image, table
from stiefel.linalg.schulz import (
    Workspace,
    _segments,
    _strips,
    chunk_size,
    normalize_into,
    orthogonalize_,
    product_dtype,
)

ONE_TRIPLE = (3.3067, -3.9846, 1.5753)
IMAGES = {  # of σ₀ = .05, .3, .6, .8, .9, 1
    "classic": [0.758120, 1.079592, 0.722876, 1.119204, 0.682011, 0.696436],
    "fitted": [0.947593, 0.954736, 1.027404, 1.053914, 1.026661, 1.036750],
    "fast": [1.123318, 0.996554, 0.849024, 1.083101, 0.983079, 1.171849],
}


def gaussian(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spectrum(sigma, rows, cols, seed=0):
    """A matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(sigma)
    u = haar(rows, n, generator=generator, dtype=torch.float64)
    v = haar(cols, n, generator=generator, dtype=torch.float64)
    return (u * sigma) @ v.mT


@pytest.mark.parametrize("name", IMAGES)
def test_tables_have_the_published_images(name):
    image = scalar_image(np.array([0.05, 0.3, 0.6, 0.8, 0.9, 1.0]), table(name).triples)
    np.testing.assert_allclose(image, IMAGES[name], atol=5e-7)


def test_one_triple_image():
    image = scalar_image(np.array([0.05, 1.0]), as_table(ONE_TRIPLE, 5).triples)
    np.testing.assert_allclose(image, [0.866478, 0.890916], atol=5e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape", [(2, 5, 5), (3, 70, 210), (3, 210, 70), (1, 300, 300), (2, 260, 800)]
)
def test_fast_algorithm_equals_the_plain_loop(name, shape):
    x = gaussian(*shape)
    rule = table(name)
    plain = newton_schulz(x, rule.steps, name, eps=rule.eps)
    # The Gram side squares the condition number: below 1e-9 in float64, below 1e-5 in float32.
    torch.testing.assert_close(orthogonalize(x, rule), plain, atol=1e-9, rtol=0)
    single = orthogonalize(x.float(), rule)
    torch.testing.assert_close(single.double(), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("coefficients", [ONE_TRIPLE, [ONE_TRIPLE] * 7, [(1.5, -0.5, 0.0)] * 12])
def test_tables_of_users_run_too(coefficients):
    rule = as_table(coefficients, 5 if np.ndim(coefficients) == 1 else None)
    x = gaussian(2, 20, 70)
    plain = newton_schulz(x, rule.steps, coefficients, eps=0.0)
    torch.testing.assert_close(orthogonalize(x, rule), plain, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "cols"), [(96, 96), (96, 384), (384, 96), (256, 1024)])
@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0])
def test_bfloat16_stays_accurate_on_spectra_of_real_momentum(name, rows, cols, power):
    # Momentum in training has half of its singular values below 0.02 and some at 1e-5. Without
    # restarts the Gram side explodes there in bfloat16, while Gaussian matrices look perfect.
    sigma = torch.arange(1, min(rows, cols) + 1, dtype=torch.float64) ** -power
    sigma /= sigma.norm()
    rule = table(name)
    image = scalar_image((sigma / rule.safety).numpy(), rule.triples)
    expected = float(((image - 1) ** 2).mean())
    out = orthogonalize(spectrum(sigma, rows, cols).float(), rule, dtype=torch.bfloat16)
    assert float(torch.linalg.svdvals(out).max()) < 1.22
    assert float(orthogonality_error(out)[1]) == pytest.approx(expected, rel=0.12, abs=1e-3)


def adversarial(rows, cols, count, seed=0):
    """Spectra that low precision is worst at: steep, of low rank, one spike over a flat floor."""
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, cols)
    i = torch.arange(1, n + 1, dtype=torch.float64)
    uniform = torch.rand(4, count, n, generator=generator, dtype=torch.float64)
    low_rank, spike = torch.zeros(2, count, n, dtype=torch.float64)
    low_rank[:, :2] = uniform[0, :, :2] + 0.01
    spike[:] = 1e-4 * uniform[1]
    spike[:, 0] = 1
    spike[:, 1:2] = uniform[1, :, :1]
    steep = torch.exp(-12 * uniform[2])
    steep[:, 0] = 1
    power = i ** (-3 * uniform[3, :, :1])
    sigma = torch.cat([low_rank, spike, steep, power, uniform[0] ** 3])
    return torch.stack([spectrum(s, rows, cols, seed) for s in sigma]).float()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rows", "cols"), [(2, 32), (3, 9), (8, 4), (16, 40), (64, 160), (96, 384)]
)
def test_bfloat16_is_safe_on_adversarial_spectra_of_any_size(name, rows, cols):
    out = orthogonalize(adversarial(rows, cols, 40), table(name), dtype=torch.bfloat16)
    assert float(torch.linalg.matrix_norm(out, 2).max()) < 1.25


def test_restarts_are_what_keeps_bfloat16_finite():
    sigma = torch.logspace(0, -5, 96, dtype=torch.float64)
    x = spectrum(sigma / sigma.norm(), 96, 384).float()
    rule = table("fitted")
    assert rule.gram_segments() == (2, 1, 2)
    without = type(rule)(rule.triples, restarts=())
    assert without.gram_segments() == (5,)
    good = torch.linalg.svdvals(orthogonalize(x, rule, dtype=torch.bfloat16))
    bad = orthogonalize(x, without, dtype=torch.bfloat16)
    assert float(good.max()) < 1.22
    assert not torch.isfinite(bad).all() or float(bad.abs().max()) > 10


@pytest.mark.parametrize(("name", "bound"), [("fitted", 0.2), ("fast", 0.8)])
@pytest.mark.parametrize("shape", [(384, 384), (96, 384)])
def test_error_targets_on_gaussians(name, bound, shape):
    x = gaussian(*shape).float()
    classic = float(orthogonality_error(orthogonalize(x, table("classic")))[1])
    assert float(orthogonality_error(orthogonalize(x, table(name)))[1]) <= bound * classic


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_any_scale_and_zero(scale):
    x = gaussian(2, 6, 9).float()
    x[1] = 0
    out = orthogonalize(x * scale, table("fitted"))
    torch.testing.assert_close(out, orthogonalize(x, table("fitted")), atol=1e-5, rtol=0)
    assert torch.equal(out[1], torch.zeros(6, 9))


def test_nan_stays_in_its_matrix():
    x = gaussian(2, 6, 9).float()
    clean = orthogonalize(x, table("fitted"))
    x[0, 0, 0] = torch.inf
    out = orthogonalize(x, table("fitted"))
    assert torch.isnan(out[0]).all()
    torch.testing.assert_close(out[1], clean[1])


def test_input_is_untouched_even_where_no_cast_makes_a_copy():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = gaussian(3, 8, 8).to(dtype)
        kept = x.clone()
        assert orthogonalize(x, table("fitted")).dtype == dtype
        assert torch.equal(x, kept)


def test_workspace_is_reused_and_grows():
    space = Workspace()
    first = space.take("x", (2, 3), torch.float32, torch.device("cpu"))
    again = space.take("x", (3, 2), torch.float32, torch.device("cpu"))
    assert first.data_ptr() == again.data_ptr()
    assert space.nbytes == 24
    space.take("x", (4, 4), torch.float32, torch.device("cpu"))
    assert space.nbytes == 64


def test_scratch_of_a_stack_is_bounded_by_two_of_it():
    space, x = Workspace(), gaussian(4, 64, 256).bfloat16()
    work = torch.empty_like(x)
    normalize_into(work, x, table("fitted"))
    orthogonalize_(work, table("fitted"), space)
    assert space.nbytes <= 2 * x.numel() * x.element_size()


def test_segments_and_strips_cover_everything():
    for name in NAMES:
        for long in (64, 90, 128, 512):
            for spread in (True, False):
                assert sum(_segments(table(name), 64, long, spread)) == table(name).steps
    for n in (1, 255, 256, 300, 384, 767, 768, 1000):
        strips = _strips(n, 4 * n, False, "cpu")
        assert [s for s, _ in strips] == [0, *[e for _, e in strips[:-1]]]
        assert strips[-1][1] == n
    assert _segments(table("fitted"), 64, 256, True) == (2, 1, 2)
    assert _segments(table("fitted"), 64, 256, False) == (1, 1, 1, 2)
    assert _segments(table("fitted"), 64, 64, True) == (1, 1, 1, 1, 1)
    assert _segments(table("fitted"), 32, 128, True) == (1, 1, 1, 1, 1)
    assert _segments(table("polar_express"), 64, 256, True) == (1, 1, 1, 1, 1)
    assert chunk_size(24, 10**4, 10**4, torch.device("cpu")) == 1
    assert product_dtype("cpu") in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_tables_keep_the_guards(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_guards(table(name))
        check_guards(as_table(ONE_TRIPLE, 5))


def test_unstable_published_triple_is_refused_with_the_value_it_hits():
    # σ₀ = .5591 ends at 3.31 after five steps.
    with pytest.raises(ValueError, match=r"σ₀ = 0\.5591 to 3\.31"):
        check_guards(as_table((3.4916, -4.8224, 2.1095), 5))
    x = torch.diag(torch.tensor([0.5591, 0.8291002291], dtype=torch.float64))
    out = newton_schulz(x, coefficients=(3.4916, -4.8224, 2.1095), eps=0.0)
    expected = torch.tensor([3.31383191, 1.05438906], dtype=torch.float64)
    torch.testing.assert_close(out.diagonal(), expected, atol=1e-5, rtol=0)


def test_a_triple_that_only_rounding_breaks_is_refused():
    # In exact arithmetic harmless, divergent when each step is off by 0.2 %.
    exact = scalar_image(np.linspace(0, 1, 10001), as_table((3.5118, -5.1077, 2.3347), 5).triples)
    assert np.abs(exact).max() < 1.3
    with pytest.raises(ValueError, match="when steps are off"):
        check_guards(as_table((3.5118, -5.1077, 2.3347), 5))


def test_weak_and_sign_flipping_tables():
    with pytest.warns(UserWarning, match="ends at"):
        check_guards(as_table([(1.5, -0.5, 0.0)] * 3))  # safe, but σ₀ = .02 hardly moves
    with pytest.raises(ValueError, match=r"to -"):
        check_guards(as_table([(1.0, -2.0, 0.0)]))


def test_bad_tables_are_named():
    with pytest.raises(ValueError, match="at least one triple"):
        as_table([])
    with pytest.raises(ValueError, match="finite"):
        as_table([(1.0, float("nan"), 0.0)])
    with pytest.raises(ValueError, match="must be numbers"):
        as_table([("a", "b", "c")])
    with pytest.raises(ValueError, match="fitted has 5 steps, got steps=6"):
        table("fitted", 6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [(2, 4), (4, 8), (8, 16), (16, 40)])
def test_bfloat16_is_safe_with_few_active_rows_and_columns(name, block):
    # Dead neurons, rarely used experts: rounding does not average out over many rows there.
    generator = torch.Generator().manual_seed(0)
    x = 1e-4 * torch.randn(200, 64, 192, generator=generator)
    x[:100] = 0
    x[:, : block[0], : block[1]] += torch.randn(200, *block, generator=generator)
    out = orthogonalize(x, table(name), dtype=torch.bfloat16)
    assert float(torch.linalg.matrix_norm(out, 2).max()) < 1.25

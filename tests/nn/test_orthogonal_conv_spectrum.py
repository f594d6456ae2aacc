import math

import pytest
import torch
from conv_twins import dense, det_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import conv_spectrum
from stiefel.nn import conv_singular_values, conv_spectral_norm


def sorted_values(values):
    return values.flatten().sort().values


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 5),
    c=st.integers(1, 3),
    axes=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=2
    ),
    seed=st.integers(0, 10**6),
)
def test_against_the_matrix(m, c, axes, seed):
    """Any kernel, stride and image, also kernels that wrap around a smaller image."""
    k, stride, outputs = zip(*axes, strict=True)
    kernel = torch.randn(
        m, c, *k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    image = tuple(s * n for s, n in zip(stride, outputs, strict=True))
    values = conv_singular_values(kernel, image, stride)
    assert values.shape == (*outputs, min(m, c * math.prod(stride)))
    exact = torch.linalg.svdvals(dense(kernel, image, stride))
    torch.testing.assert_close(sorted_values(values), sorted_values(exact), rtol=0, atol=1e-12)
    norm = conv_spectral_norm(kernel, image, stride)
    assert float(norm) == pytest.approx(float(exact.max()), rel=1e-12)


def test_each_frequency_stands_in_its_place():
    kernel = det_kernel(3, 2, 3)
    values = conv_singular_values(kernel, (4, 5))
    spectrum = torch.fft.fft2(kernel, s=(4, 5)).permute(2, 3, 0, 1)
    torch.testing.assert_close(values, torch.linalg.svdvals(spectrum), rtol=1e-12, atol=1e-12)


def test_groups_side_by_side():
    kernel = det_kernel(6, 2, 3)
    values = conv_singular_values(kernel, 6, 2, groups=3)
    parts = [conv_singular_values(part, 6, 2) for part in kernel.split(2)]
    torch.testing.assert_close(values, torch.cat(parts, dim=-1))
    exact = torch.linalg.svdvals(dense(kernel, (6, 6), 2, groups=3))
    torch.testing.assert_close(sorted_values(values), sorted_values(exact), rtol=0, atol=1e-12)


def test_haar_pair_and_its_borders():
    kernel = torch.tensor([[[1.0, 1, 0]], [[1, -1, 0]]], dtype=torch.float64) / 2
    torch.testing.assert_close(
        conv_singular_values(kernel, 8), torch.ones(8, 1, dtype=torch.float64)
    )
    for border, least in (("circular", 1), ("zeros", math.sqrt(0.5)), ("valid", 0)):
        values = torch.linalg.svdvals(dense(kernel, (8,), 1, border))
        assert float(values.max()) == pytest.approx(1)
        assert float(values.min()) == pytest.approx(least, abs=1e-12)


def test_parts_are_as_good_as_the_whole(monkeypatch):
    kernel, whole, held = det_kernel(4, 3, 3), [], []
    for limit in (1 << 24, 1000):
        monkeypatch.setattr(conv_spectrum, "_CHUNK_BYTES", limit)
        whole.append(conv_singular_values(kernel, 8, 2))
        parts = list(conv_spectrum.symbols(kernel[None], (8, 8)))
        held.append(max(x.numel() * x.element_size() for x in parts))
    torch.testing.assert_close(*whole, rtol=1e-14, atol=1e-14)
    assert held[0] > 5000
    assert held[1] <= 1000


@pytest.mark.parametrize(
    ("shape", "size", "stride"), [((2, 3, 3), 4, 1), ((3, 1, 2, 3), (4, 2), 2)]
)
def test_gradients(shape, size, stride, generator):
    kernel = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    # Sums over σ² and σ⁴ are smooth where single values cross.
    assert torch.autograd.gradcheck(
        lambda x: conv_singular_values(x, size, stride).pow(4).sum(), kernel
    )
    assert torch.autograd.gradcheck(lambda x: conv_spectral_norm(x, size, stride), kernel)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)]
)
def test_lower_precision(dtype, error):
    kernel = det_kernel(4, 3, 3).to(dtype)
    values, exact = conv_singular_values(kernel, 6), conv_singular_values(kernel.double(), 6)
    assert values.dtype == torch.float32
    assert float((values - exact).abs().max()) < error


def test_a_zero_kernel():
    kernel = torch.zeros(2, 2, 3, dtype=torch.float64)
    assert float(conv_spectral_norm(kernel, 4)) == 0
    assert (conv_singular_values(kernel, 4) == 0).all()


@pytest.mark.parametrize("function", [conv_singular_values, conv_spectral_norm])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 2), 4), ValueError, "kernel"),
        ((torch.zeros(2, 2, 3), 5, 2), ValueError, "divisible by stride"),
        ((torch.zeros(2, 2, 3), 0), ValueError, "input_size must be at least 1"),
        ((torch.zeros(2, 2, 3, 3), (4, 4, 4)), ValueError, "input_size must be one integer or 2"),
        ((torch.zeros(2, 2, 3), 4, -1), ValueError, "stride must be at least 1"),
        ((torch.zeros(3, 2, 3), 4, 1, 2), ValueError, "divisible by groups=2"),
        ((torch.full((1, 1, 3), math.nan), 4), ValueError, "finite"),
        ((torch.zeros(2, 2, 3, dtype=torch.int32), 4), TypeError, "real floating-point"),
        ((torch.zeros(2, 2, 3), 4.5), TypeError, "integer|Type-check"),
    ],
)
def test_bad_input(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)

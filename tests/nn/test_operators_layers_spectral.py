"""Convolution by Fourier multipliers."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_fields import jit_warning, seeded, smooth

from stiefel.nn.operators import SpectralConv, grid_coordinates, resample


def multiplied(x, weight, complex_data):
    """ŷ_k = R_k v̂_k, frequency by frequency, of one sample."""
    _, channels, *grid = x.shape
    points = np.stack(np.meshgrid(*(np.arange(n) / n for n in grid), indexing="ij"))
    y = np.zeros((weight.shape[1], *grid), dtype=complex)
    w, v = weight.detach().numpy(), x[0].numpy()
    counts = w.shape[2:]
    for index in np.ndindex(*counts):
        k = np.array([i - m // 2 for i, m in zip(index, counts, strict=True)])
        twice = 1
        if not complex_data:
            k[-1] = index[-1]
            twice = 1 if k[-1] == 0 or 2 * k[-1] == grid[-1] else 2
        if any(2 * f > n or 2 * -f > n for f, n in zip(k, grid, strict=True)):
            continue
        basis = np.exp(2j * np.pi * np.tensordot(k, points, 1))
        series = np.array([np.mean(v[c] * basis.conj()) for c in range(channels)])
        y += twice * np.tensordot(series @ w[(slice(None), slice(None), *index)], basis, 0)
    return y if complex_data else y.real


@settings(max_examples=25, deadline=None)
@given(
    grid=st.lists(st.integers(3, 7), min_size=1, max_size=2),
    modes=st.integers(1, 7),
    complex_data=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:n_modes")
def test_spectral_convolution_is_its_sum(grid, modes, complex_data):
    layer = SpectralConv(
        2, 3, modes, len(grid), complex_data=complex_data, dtype=torch.float64, generator=seeded()
    )
    kind = torch.complex128 if complex_data else torch.float64
    x = torch.randn(1, 2, *grid, dtype=kind, generator=seeded(1))
    # On a grid of fewer points than modes the middle is kept: −N/2 but not N/2.
    counts = [min(m, n) for m, n in zip(layer.weight.shape[2:], grid, strict=True)]
    if not complex_data:
        counts[-1] = min(layer.weight.shape[-1], grid[-1] // 2 + 1)
    slices = [
        slice(m // 2 - c // 2, m // 2 - c // 2 + c)
        for m, c in zip(layer.weight.shape[2:], counts, strict=True)
    ]
    if not complex_data:
        slices[-1] = slice(0, counts[-1])
    kept = layer.weight[(slice(None), slice(None), *slices)]
    expected = multiplied(x, kept, complex_data)
    np.testing.assert_allclose(layer(x)[0].detach(), expected, atol=1e-12)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("n", [4, 5, 8, 64, 101, 256])
def test_derivative_of_a_sine(n, dtype, error):
    layer = SpectralConv(1, 1, 4, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(2j * math.pi * torch.arange(3, dtype=torch.float64))
    x = grid_coordinates(n, dtype=torch.float64)[None]
    found = layer(torch.sin(2 * math.pi * x).to(dtype))
    exact = (2 * math.pi * torch.cos(2 * math.pi * x)).to(dtype)
    assert float((found - exact).detach().abs().max()) <= error * (
        1 if dtype == torch.float64 else 2 * math.pi
    )


def test_zero_frequency_alone_is_the_mean():
    layer = SpectralConv(1, 1, (4, 4), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 2, 0] = 1
    x = torch.randn(2, 1, 8, 6, dtype=torch.float64, generator=seeded())
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    torch.testing.assert_close(layer(x), mean)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_one_function_on_two_grids(ndim):
    layer = SpectralConv(2, 3, 6, ndim, bias=True, generator=seeded())
    with torch.no_grad():
        layer.bias.fill_(0.7)
    fine, coarse = (smooth(n, 3, ndim=ndim, dtype=torch.float32) for n in (32, 16))
    every = (..., *(slice(None, None, 2),) * ndim)
    torch.testing.assert_close(layer(fine)[every], layer(coarse), atol=2e-6, rtol=0)
    torch.testing.assert_close(
        layer(coarse, 32 if ndim == 1 else (32,) * ndim), layer(fine), atol=2e-6, rtol=0
    )


@pytest.mark.filterwarnings("ignore:n_modes")
@pytest.mark.parametrize("complex_data", [False, True])
@pytest.mark.parametrize(
    ("grid", "target"),
    [((8, 8), (12, 12)), ((12, 12), (8, 8)), ((8, 7), (5, 9)), ((6, 6), (8, 5)), ((4, 4), (4, 8))],
)
def test_without_multipliers_it_resamples(grid, target, complex_data):
    layer = SpectralConv(1, 1, (20, 20), complex_data=complex_data, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.fill_(1)
    kind = torch.complex128 if complex_data else torch.float64
    x = torch.randn(2, 1, *grid, dtype=kind, generator=seeded())
    torch.testing.assert_close(layer(x), x)
    torch.testing.assert_close(layer(x, target), resample(x, target))


@jit_warning
@pytest.mark.filterwarnings("ignore:n_modes")
@pytest.mark.parametrize("complex_data", [False, True])
@pytest.mark.parametrize("shape", [None, (5, 7), (3, 4)])
def test_derivatives(complex_data, shape):
    layer = SpectralConv(1, 2, (3, 4), bias=True, complex_data=complex_data, dtype=torch.float64)
    kind = torch.complex128 if complex_data else torch.float64
    x = torch.randn(1, 1, 4, 6, dtype=kind, requires_grad=True)

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, shape))

    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("n", [40, 9])
def test_matrix_and_transform_agree(n, monkeypatch):
    layer = SpectralConv(2, 2, 8, dtype=torch.float64, generator=seeded())
    x = torch.randn(3, 2, n, dtype=torch.float64, generator=seeded(1))
    matrix = layer(x)
    monkeypatch.setattr("stiefel.nn.operators.spectral_transform._FEW", 0)
    torch.testing.assert_close(matrix, layer(x))


@jit_warning
def test_vmap_and_jacobian():
    layer = SpectralConv(1, 1, 4, dtype=torch.float64, generator=seeded())
    x = torch.randn(3, 1, 1, 6, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(s) for s in x]))
    reverse = torch.func.jacrev(layer)(x[0])
    forward = torch.func.jacfwd(layer)(x[0])
    torch.testing.assert_close(reverse, forward)


def test_start_has_the_standard_deviation_of_the_sheet():
    layer = SpectralConv(20, 30, (16, 16), generator=seeded())
    assert layer.weight.shape == (20, 30, 16, 9)
    size = float(layer.weight.detach().abs().square().mean().sqrt())
    assert size == pytest.approx(math.sqrt(2 / 50), rel=0.02)
    again = SpectralConv(20, 30, (16, 16), generator=seeded())
    assert torch.equal(layer.weight, again.weight)
    again.reset_parameters(seeded(1))
    assert not torch.equal(layer.weight, again.weight)


def test_memory_layout_survives_copies_and_steps():
    layer = SpectralConv(4, 6, (4, 4), generator=seeded())
    by_mode = layer.weight.permute(2, 3, 0, 1)
    assert by_mode.is_contiguous()
    other = copy.deepcopy(layer)
    other.load_state_dict({"weight": torch.zeros(4, 6, 4, 3, dtype=torch.complex64)})
    assert other.weight.permute(2, 3, 0, 1).is_contiguous()
    assert float(other.weight.detach().abs().max()) == 0
    layer(torch.randn(1, 4, 8, 8)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    assert layer.weight.permute(2, 3, 0, 1).is_contiguous()


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(torch.float64)])
def test_change_of_precision_keeps_the_imaginary_parts(move):
    layer = SpectralConv(2, 2, 4, bias=True, generator=seeded())
    x = torch.randn(1, 2, 8, generator=seeded(1))
    before, weight = layer(x), layer.weight.detach().clone()
    moved = move(copy.deepcopy(layer))
    assert moved.weight.dtype == torch.complex128
    assert torch.equal(moved.weight.to(torch.complex64), weight)
    torch.testing.assert_close(moved(x.double()).float(), before, atol=1e-6, rtol=0)
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight.dtype == torch.complex64
    found = half(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), before, atol=0.05, rtol=0.05)


def test_transform_stays_in_float32_under_autocast():
    layer = SpectralConv(2, 2, 4, generator=seeded())
    x = torch.randn(1, 2, 16, generator=seeded(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert torch.equal(found, layer(x))


def test_too_many_modes_warn_once():
    layer = SpectralConv(1, 1, 16)
    with pytest.warns(UserWarning, match="more than a grid of"):
        layer(torch.ones(1, 1, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.ones(1, 1, 8))


BAD_SETTINGS = [
    ({"n_modes": 0}, ValueError, "n_modes must be at least 1"),
    ({"n_modes": (4, 0)}, ValueError, "n_modes must be at least 1"),
    ({"n_modes": (4, 4), "ndim": 3}, ValueError, "n_modes"),
    ({"n_modes": 4, "in_channels": 0}, ValueError, "in_channels"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_SETTINGS)
def test_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SpectralConv(**{"in_channels": 1, "out_channels": 1, **options})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(1, 1, 8, 8), ValueError, "1 grid axes"),
        (torch.ones(1, 2, 8), ValueError, "1 channels"),
        (torch.ones(1, 1, 0), ValueError, "at least one point"),
        (torch.tensor([[[1.0, math.nan]]]), ValueError, "x must be finite, but 1 of its 2"),
        (torch.tensor([[[1.0, math.inf]]]), ValueError, "x must be finite"),
        (torch.ones(1, 1, 8).long(), TypeError, "floating point"),
        (torch.ones(1, 1, 8) * 1j, TypeError, "complex_data=True"),
    ],
)
def test_fields_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        SpectralConv(1, 1, 2)(x)


def test_coordinates_are_checked():
    layer, x = SpectralConv(1, 1, 2), torch.ones(1, 1, 8)
    layer(x, coordinates=torch.arange(8) / 8)
    uneven = torch.arange(8) / 8
    uneven[3] += 0.02
    for bad in (uneven, torch.arange(7) / 7, torch.arange(8).flip(0)[None].float()):
        with pytest.raises(ValueError, match="KernelIntegral"):
            layer(x, coordinates=bad)
    plane = SpectralConv(1, 1, (2, 2))
    grid = grid_coordinates((4, 6)).movedim(0, -1)
    plane(torch.ones(1, 1, 4, 6), coordinates=grid)
    with pytest.raises(ValueError, match="equally spaced"):
        plane(torch.ones(1, 1, 4, 6), coordinates=grid + 0.1 * grid.roll(1, 0) * grid.flip(-1))

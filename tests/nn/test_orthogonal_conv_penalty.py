import math

import pytest
import torch
from conv_twins import dense, det_kernel, distance
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg.conv_penalty import _by_frequencies, _by_lags, polyphase
from stiefel.nn import (
    conv_singular_values,
    frobenius_error,
    lorth,
    lorth_alpha,
    lorth_sigma_bounds,
)

# M, C, k, S, N, L_orth, alpha, least and largest singular value.
EXACT = [
    (4, 3, 3, 1, 5, 1.190071118375, 75, 0.1381160404, 1.4216503916),
    (3, 4, 3, 1, 5, 1.282230764936, 75, 0.1303360436, 1.2911820843),
    (8, 2, 3, 2, 4, 4.049682041815, 50, 0.0118749143, 1.4820582328),
    (9, 2, 3, 2, 4, 4.189989743321, 50, 0.0726964983, 1.5843184681),
    (5, 3, 5, 2, 5, 1.724961450175, 125, 0.2607430690, 1.0842372232),
    (16, 1, 3, 1, 5, 55.780917778702, 25, 2.3116085359, 3.5099361835),
    (6, 2, 5, 3, 4, 1.856219293190, 54, 0.3860742061, 1.0387749951),
]


@pytest.mark.parametrize("row", EXACT)
@pytest.mark.parametrize("side", ["auto", "out", "in"])
def test_exact_values(row, side):
    m, c, k, s, _, value, alpha, _, _ = row
    kernel = det_kernel(m, c, k)
    assert float(lorth(kernel, s, side=side)) == pytest.approx(value, abs=1e-11)
    assert lorth_alpha(kernel.shape, s) == alpha


@pytest.mark.parametrize("row", EXACT)
def test_exact_singular_values(row):
    m, c, k, s, n, _, _, least, largest = row
    values = conv_singular_values(det_kernel(m, c, k), s * n, s)
    assert values.shape == (n, n, min(m, c * s * s))
    assert float(values.min()) == pytest.approx(least, abs=1e-10)
    assert float(values.max()) == pytest.approx(largest, abs=1e-10)


HALF = 0.5
CLOSED = [
    ("ones", torch.ones(1, 1, 3, 3) / 3, 1, 361 / 81 - 1),
    ("mean of two", torch.tensor([[[0.5, 0.5, 0.0]]]), 1, 0.375),
    ("two apart", torch.tensor([[[1.0, 0.0, 1.0]]]) / math.sqrt(2), 1, 0.5),
    ("Haar", torch.tensor([[[1.0, 1, 0]], [[1, -1, 0]]]) / 2, 1, 0.0),
    ("Haar, stride 2", torch.tensor([[[1.0, 1, 0]], [[1, -1, 0]]]) / math.sqrt(2), 2, 0.0),
]


@pytest.mark.parametrize(
    ("kernel", "stride", "value"), [row[1:] for row in CLOSED], ids=[row[0] for row in CLOSED]
)
def test_closed_forms(kernel, stride, value):
    kernel = kernel.double()
    # In float32 first: rounding of 1/3 and 1/√2 is what is left.
    assert float(lorth(kernel, stride)) == pytest.approx(value, abs=1e-6)


def test_the_flattened_kernel_says_nothing():
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64) / 3
    assert float((kernel.flatten(1) @ kernel.flatten(1).T).squeeze()) == pytest.approx(1)
    values = conv_singular_values(kernel, 6)
    assert (float(values.min()), float(values.max())) == pytest.approx((0, 3), abs=1e-12)
    corners = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    corners[0, 0, 0, 0] = corners[0, 0, 2, 2] = 1 / math.sqrt(2)
    assert float(lorth(corners)) == pytest.approx(0.5, abs=1e-14)


@pytest.mark.parametrize("shape", [(3, 3, 3), (5, 2, 3, 3), (2, 5, 3, 4)])
def test_deltas_are_orthogonal(shape):
    for tap in range(math.prod(shape[2:])):
        kernel = torch.zeros(*shape[:2], math.prod(shape[2:]), dtype=torch.float64)
        kernel[:, :, tap] = torch.eye(*shape[:2], dtype=torch.float64)
        assert float(lorth(kernel.reshape(shape))) == 0


architectures = st.tuples(
    st.integers(1, 5),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=2),
    st.integers(0, 10**6),
)


def drawn(numbers):
    m, c, axes, seed = numbers
    generator = torch.Generator().manual_seed(seed)
    k, s = [a for a, _ in axes], tuple(b for _, b in axes)
    kernel = torch.randn(m, c, *k, dtype=torch.float64, generator=generator) / math.sqrt(c * 3)
    image = tuple(b * -(-(2 * a - 1) // b) for a, b in axes)
    return kernel, s, image


@settings(max_examples=30, deadline=None)
@given(architectures)
def test_against_the_matrix(numbers):
    kernel, stride, image = drawn(numbers)
    frobenius, spectral = distance(dense(kernel, image, stride))
    value = float(lorth(kernel, stride))
    pixels = math.prod(n // s for n, s in zip(image, stride, strict=True))
    assert frobenius**2 == pytest.approx(pixels * value, rel=1e-11, abs=1e-11)
    assert float(frobenius_error(kernel, image, stride)) == pytest.approx(frobenius, abs=1e-6)
    assert spectral**2 <= lorth_alpha(kernel.shape, stride) * value * (1 + 1e-12) + 1e-12
    for side in ("out", "in"):
        assert float(lorth(kernel, stride, side=side)) == pytest.approx(value, rel=1e-10, abs=1e-10)
    lags, waves = _by_lags(kernel[None], stride), _by_frequencies(polyphase(kernel[None], stride))
    torch.testing.assert_close(lags, waves, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("k", "s"), [(5, 1), (7, 2), (9, 1)])
def test_large_kernels_go_by_frequencies(k, s):
    kernel = det_kernel(3, 2, k)
    plain = torch.nn.functional.conv2d(kernel, kernel, stride=s, padding=(k - 1) // s * s)
    plain[:, :, (k - 1) // s, (k - 1) // s] -= torch.eye(3)
    assert float(lorth(kernel, s)) == pytest.approx(
        float(plain.square().sum()) - max(0, 3 - 2 * s * s), rel=1e-11
    )


def test_the_identity_is_false_on_small_images():
    kernel = det_kernel(3, 2, 3)
    frobenius, spectral = distance(dense(kernel, (4, 4), 1))
    value = float(lorth(kernel))
    assert abs(frobenius / (4 * math.sqrt(value)) - 1) > 1e-3
    assert spectral <= math.sqrt(lorth_alpha(kernel.shape) * value)
    with pytest.raises(ValueError, match="at least 2k − 1"):
        frobenius_error(kernel, 4)


def test_spectral_error_is_bounded_at_every_size():
    kernel, errors = det_kernel(4, 3, 3), []
    low, high = (float(x) for x in lorth_sigma_bounds(kernel))
    small = 0.2 * kernel
    small[:, :, 1, 1] += torch.eye(4, 3)
    near_low, near_high = (float(x) for x in lorth_sigma_bounds(small * 0.98))
    assert low == 0
    for n in (8, 16, 32):
        values = conv_singular_values(kernel, n)
        errors.append(float((values.square() - 1).abs().max()))
        assert low <= float(values.min())
        assert float(values.max()) <= high
        values = conv_singular_values(small * 0.98, n)
        assert near_low <= float(values.min())
        assert float(values.max()) <= near_high
    assert errors == sorted(errors)
    assert errors[-1] <= math.sqrt(75 * 1.190071118375)


def test_bounds_close_in_on_one():
    """Near an orthogonal kernel the interval is short, and holds what it says."""
    kernel = torch.zeros(3, 4, 3, 3, dtype=torch.float64)
    kernel[:, :, 1, 2] = torch.eye(3, 4)
    noisy = kernel + 1e-4 * det_kernel(3, 4, 3)
    low, high = (float(x) for x in lorth_sigma_bounds(noisy))
    assert 0.99 < low < 1 < high < 1.01
    values = conv_singular_values(noisy, 8)
    assert low <= float(values.min())
    assert float(values.max()) <= high
    assert [float(x) for x in lorth_sigma_bounds(kernel)] == [1, 1]


def test_invariances(generator):
    kernel = det_kernel(4, 3, 3)
    value = float(lorth(kernel))
    left = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator)).Q
    turned = torch.einsum("ab,bcxy,cd->adxy", left, kernel, right)
    window = torch.nn.functional.pad(kernel, (2, 0, 0, 1))
    for other in (turned, kernel.flip(2, 3), window):
        assert float(lorth(other)) == pytest.approx(value, rel=1e-12)


def test_groups_add_up():
    kernel = det_kernel(6, 2, 3)
    whole = float(lorth(kernel, 2, groups=3))
    assert whole == pytest.approx(sum(float(lorth(part, 2)) for part in kernel.split(2)), rel=1e-12)
    frobenius, spectral = distance(dense(kernel, (6, 6), 2, groups=3))
    assert frobenius**2 == pytest.approx(9 * whole, rel=1e-11)
    assert spectral**2 <= lorth_alpha(kernel.shape, 2, 3) * whole


@pytest.mark.parametrize(
    ("shape", "stride"), [((2, 3, 3), 1), ((5, 1, 3, 2), 2), ((2, 1, 5, 5), 1)]
)
def test_gradients(shape, stride, generator):
    kernel = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    for side in ("out", "in"):
        assert torch.autograd.gradcheck(lambda x, side=side: lorth(x, stride, side=side), kernel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(dtype):
    kernel = (det_kernel(4, 3, 3) / 2).to(dtype)
    exact = float(lorth(kernel.double()))
    value = lorth(kernel)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(exact, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(lorth(kernel)) == pytest.approx(exact, rel=1e-5)


def test_small_values_do_not_cancel():
    """The shorter side has no constant to subtract: 1e-9 comes out of float32."""
    kernel = torch.zeros(64, 4, 3, 3)
    kernel[:, :, 1, 1] = torch.eye(64, 4)
    kernel[0, 1, 0, 0] = 1e-5
    exact = float(lorth(kernel.double()))
    assert float(lorth(kernel)) == pytest.approx(exact, rel=1e-3)
    assert 0 < exact < 1e-9


@pytest.mark.parametrize(
    ("kernel", "settings", "error", "message"),
    [
        (torch.zeros(2, 2), {}, ValueError, "kernel"),
        (torch.zeros(2, 2, 3, 3, 3), {}, ValueError, "kernel"),
        (torch.zeros(2, 0, 3), {}, ValueError, "not empty"),
        (torch.zeros(2, 2, 3), {"stride": 0}, ValueError, "stride must be at least 1"),
        (torch.zeros(2, 2, 3), {"stride": (1, 1)}, ValueError, "stride must be one integer or 1"),
        (torch.zeros(3, 2, 3), {"groups": 2}, ValueError, "divisible by groups=2, got 3"),
        (torch.zeros(3, 2, 3), {"groups": 0}, ValueError, "groups must be at least 1"),
        (torch.zeros(2, 2, 3), {"side": "left"}, ValueError, "side must be one of"),
        (torch.full((1, 1, 3), math.nan), {}, ValueError, "weight must be finite"),
        (torch.full((1, 1, 3), math.inf), {}, ValueError, "weight must be finite"),
        (torch.zeros(2, 2, 3, dtype=torch.int64), {}, TypeError, "weight must be a real"),
        (torch.zeros(2, 2, 3, dtype=torch.complex64), {}, TypeError, "weight must be a real"),
    ],
)
def test_bad_kernels(kernel, settings, error, message):
    with pytest.raises(error, match=message):
        lorth(kernel, **settings)


def test_bad_shapes_of_alpha():
    with pytest.raises(ValueError, match="shape must be"):
        lorth_alpha((2, 2))
    with pytest.raises(ValueError, match="divisible"):
        lorth_alpha((3, 2, 3), groups=2)

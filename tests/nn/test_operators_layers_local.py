"""Kernels of fixed physical size and their taps; differences that become derivatives."""

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_fields import seeded
from torch import nn

from stiefel.nn.operators import (
    DifferentialConv,
    LocalIntegralConv,
    grid_coordinates,
    hat_taps,
    official_taps,
)
from stiefel.nn.operators.converted_layers import extend
from stiefel.nn.operators.local_integral import local_integral
from stiefel.nn.operators.running_mean import running_mean

CONVOLVE = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (2, [0.25, 0.5, 0.75, 1, 1.5, 2, 1]),
        (
            4,
            [*(j / 16 for j in range(1, 9)), 0.625, 0.75, 0.875, 1, 0.75, 0.5, 0.25],
        ),
        (0.5, [0.5, 4.5, 2]),
        (1, [1, 2, 4]),
    ],
)
def test_taps_of_the_sheet(ratio, expected):
    found = hat_taps(torch.tensor([1.0, 2, 4]), ratio)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert float(found.sum()) == 7


def taps_in_words(weight, r):
    """The formula of the sheet, tap by tap."""
    p = len(weight) // 2

    def hat(t):
        return max(0.0, 1 - abs(t))

    if r == 1:
        return list(weight)
    reach = math.ceil(round((p + 1) * r, 9)) - 1
    pairs = [(m, float(weight[m + p])) for m in range(-p, p + 1)]
    if r > 1:
        js = range(-reach, reach + 1)
        total = {m: sum(hat(j / r - m) for j in js) for m, _ in pairs}
        return [sum(w * hat(j / r - m) / total[m] for m, w in pairs) for j in js]
    js = range(-max(1, reach), max(1, reach) + 1)
    total = {m: sum(hat(i - r * m) for i in js) for m, _ in pairs}
    return [sum(w * hat(j - r * m) / total[m] for m, w in pairs) for j in js]


@settings(max_examples=40, deadline=None)
@given(
    half=st.integers(0, 4),
    ratio=st.one_of(
        st.integers(1, 6).map(float), st.integers(2, 5).map(lambda n: 1 / n), st.floats(0.2, 5)
    ),
)
def test_taps_are_the_formula_and_keep_the_sum(half, ratio):
    weight = torch.randn(2 * half + 1, generator=seeded(half), dtype=torch.float64)
    found = hat_taps(weight, ratio)
    torch.testing.assert_close(found, torch.tensor(taps_in_words(weight, ratio)).double())
    torch.testing.assert_close(found.sum(), weight.sum())
    if ratio == int(ratio):
        # Whole ratios need no scaling: Σ_j Λ(j/r − m) = r.
        plain = [
            sum(
                float(w) * max(0.0, 1 - abs(j / ratio - m)) / ratio
                for m, w in enumerate(weight, start=-half)
            )
            for j in range(-(len(found) // 2), len(found) // 2 + 1)
        ]
        torch.testing.assert_close(found, torch.tensor(plain).double())


def test_taps_in_several_axes_are_a_product():
    weight = torch.randn(2, 3, 3, 5, generator=seeded(), dtype=torch.float64, requires_grad=True)
    found = hat_taps(weight, (2, 0.5))
    rows = torch.stack([hat_taps(e, 2) for e in torch.eye(3, dtype=torch.float64)], 1)
    columns = torch.stack([hat_taps(e, 0.5) for e in torch.eye(5, dtype=torch.float64)], 1)
    expected = torch.einsum("ja,kb,oiab->oijk", rows, columns, weight)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda w: hat_taps(w, (2, 0.5)), (weight,))
    assert torch.autograd.gradcheck(lambda w: official_taps(w, (2, 1.5)), (weight,))
    assert hat_taps(weight, 1) is weight
    low = hat_taps(weight.detach().bfloat16(), 2)
    assert low.dtype == torch.bfloat16


def test_official_taps():
    weight = torch.randn(9, 9, generator=seeded(), dtype=torch.float64)
    found = official_taps(weight, (2, 2))
    assert found.shape == (17, 17)
    ratio = 81 / 289
    inner = nn.functional.interpolate(weight[None, None], size=(17, 17), mode="bilinear")[0, 0]
    torch.testing.assert_close(found, inner * ratio)
    # Not kept, unlike with hats.
    assert abs(float(found.sum() - weight.sum())) > 1e-3
    torch.testing.assert_close(hat_taps(weight, (2, 2)).sum(), weight.sum())
    assert official_taps(torch.ones(1, 1, 4), 2).shape == (1, 1, 7)
    assert official_taps(torch.ones(1, 1, 3, 3, 3), 2).shape == (1, 1, 5, 5, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hat_taps(torch.ones(4), 2), "odd"),
        (lambda: hat_taps(torch.ones(3), 0), "ratio must be positive"),
        (lambda: hat_taps(torch.ones(3), math.nan), "ratio must be positive"),
        (lambda: hat_taps(torch.ones(3), (2, 2)), "one for each kernel axis"),
        (lambda: official_taps(torch.ones(1, 1, 3), -1), "ratio"),
        (lambda: official_taps(torch.ones(3, 3, 3, 3), (1, 1, 1, 2)), "three axes"),
    ],
)
def test_taps_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 20), data=st.data())
def test_running_means_are_means_of_windows(n, data):
    width = data.draw(st.integers(1, n))
    x = torch.randn(2, n, 3, generator=seeded(n), dtype=torch.float64)
    expected = x.unfold(1, width, 1).mean(-1)
    torch.testing.assert_close(running_mean(x, [width, 1]), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_running_mean_derivatives_and_refusals():
    x = torch.randn(1, 5, 4, generator=seeded(), dtype=torch.float64, requires_grad=True)
    run = lambda x: running_mean(x, [3, 2])  # noqa: E731
    assert torch.autograd.gradcheck(run, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x,))
    torch.testing.assert_close(torch.func.vmap(run)(x[None]), run(x)[None])
    for width in (0, 6):
        with pytest.raises(ValueError, match="1 to the number of points"):
            running_mean(x, [width, 1])


@pytest.mark.parametrize("mode", ["circular", "replicate", "reflect", "zeros"])
@pytest.mark.parametrize("ratio", [(1, 1), (2, 3), (4, 1), (1.5, 0.5), (0.5, 2)])
def test_running_means_are_the_taps(ratio, mode):
    weight = torch.randn(4, 3, 5, 3, generator=seeded(), dtype=torch.float64)
    x = torch.randn(2, 3, 12, 12, generator=seeded(1), dtype=torch.float64)
    taps = hat_taps(weight, ratio)
    around = extend(x, [(n // 2, n // 2) for n in taps.shape[2:]], mode)
    expected = nn.functional.conv2d(around, taps)
    torch.testing.assert_close(local_integral(x, weight, ratio, padding_mode=mode), expected)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_local_integral_layer(ndim):
    base, size = 8, (3, 5, 3)[:ndim]
    layer = LocalIntegralConv(2, 3, size, base_spacing=1 / base, dtype=torch.float64)
    x = torch.randn(2, 2, *(base,) * ndim, generator=seeded(), dtype=torch.float64)
    around = extend(x, [(k // 2, k // 2) for k in size], "circular")
    plain = CONVOLVE[ndim - 1](around, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain)
    # A constant goes through with Σ W, on every grid.
    for n in (4, 12, 16, 24):
        constant = layer(torch.ones(1, 2, *(n,) * ndim, dtype=torch.float64))
        total = layer.weight.flatten(2).sum((1, 2)) + layer.bias
        torch.testing.assert_close(constant, total.reshape(1, 3, *(1,) * ndim).expand_as(constant))


def test_local_integral_converges_to_its_integral():
    layer = LocalIntegralConv(1, 1, 5, base_spacing=1 / 16, bias=False, dtype=torch.float64)

    def at(n):
        x = grid_coordinates(n, dtype=torch.float64)[None]
        return layer(torch.sin(2 * math.pi * x))[0, 0]

    # ∫ κ(δ) e^(−iωδ) dδ = Σ_m W_m e^(−iω m h₀) sinc²(ω h₀ / 2).
    w = 2 * math.pi / 16
    offsets = torch.arange(-2, 3) * w
    factor = (layer.weight[0, 0] * torch.exp(1j * offsets)).sum() * (math.sin(w / 2) / (w / 2)) ** 2
    x = 2 * math.pi * torch.arange(256) / 256
    exact = (factor * torch.exp(1j * x)).imag
    errors = [float((at(n) - exact[:: 256 // n]).detach().abs().max()) for n in (16, 32, 64, 256)]
    assert errors[3] < 1e-4
    assert errors[2] < 0.3 * errors[1] < 0.09 * errors[0]


def test_radius_domain_spacing_and_groups():
    by_radius = LocalIntegralConv(4, 4, 5, radius=1 / 8, groups=2, generator=seeded())
    assert by_radius.base_spacing == (1 / 16,)
    assert by_radius.weight.shape == (4, 2, 5)
    longer = LocalIntegralConv(4, 4, 5, base_spacing=1 / 8, domain=2.0, groups=2)
    longer.load_state_dict(by_radius.state_dict())
    x = torch.randn(1, 4, 32, generator=seeded(1))
    torch.testing.assert_close(by_radius(x), longer(x))
    torch.testing.assert_close(by_radius(x, spacing=1 / 64), by_radius(x.repeat(1, 1, 2))[..., :32])
    assert by_radius(x.bfloat16().float()).shape == x.shape
    official = LocalIntegralConv(4, 4, 4, radius=1 / 8, interpolation="official")
    assert official(x).shape == x.shape
    low = LocalIntegralConv(4, 4, 5, radius=1 / 8, dtype=torch.bfloat16)
    assert low(x.bfloat16()).dtype == torch.bfloat16


def test_local_derivatives():
    weight = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    for ratio in (2, 1.5, 0.5):
        assert torch.autograd.gradcheck(
            lambda x, w, r=ratio: local_integral(x, w, [r]), (x, weight)
        )
    layer = DifferentialConv(2, 2, 3, base_shape=6, dtype=torch.float64)
    run = lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight))


LOCAL_BAD = [
    ({"kernel_size": 4, "radius": 0.1}, "odd"),
    ({}, "either base_spacing or radius"),
    ({"radius": 0.1, "base_spacing": 0.1}, "either base_spacing or radius"),
    ({"radius": -0.1}, "radius must be positive"),
    ({"radius": (0.1, 0.1)}, "radius must be one number or 1"),
    ({"radius": 0.1, "padding_mode": "wrap"}, "circular"),
    ({"radius": 0.1, "interpolation": "cubic"}, "hat, official"),
    ({"radius": 0.1, "groups": 2}, "groups must divide"),
    ({"radius": 0.1, "ndim": 4}, "ndim must be 1, 2 or 3"),
    ({"radius": 0.1, "domain": 0}, "domain"),
]


@pytest.mark.parametrize(("options", "message"), LOCAL_BAD)
def test_local_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LocalIntegralConv(**{"in_channels": 1, "out_channels": 3, "kernel_size": 3, **options})


def difference(taps):
    layer = DifferentialConv(1, 1, 3, base_spacing=1.0, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(taps))
    return layer


def test_differences_of_the_sheet():
    layer = difference([-0.5, 0.3, 0.5])

    def at(n):
        x = grid_coordinates(n, dtype=torch.float64)[None]
        return layer(torch.sin(2 * math.pi * x))[0, 0].detach()

    expected = torch.tensor([5.656853, 4, 0], dtype=torch.float64)
    torch.testing.assert_close(at(8)[:3], expected, atol=5e-6, rtol=0)
    errors = []
    for n in (32, 64, 128, 256):
        x = grid_coordinates(n, dtype=torch.float64)[0]
        errors.append(float((at(n) - 2 * math.pi * torch.cos(2 * math.pi * x)).abs().max()))
    assert errors == pytest.approx([0.0403, 0.0101, 0.00254, 0.00067], rel=0.07)
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.01)  # second order


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_differential_layer_is_its_formula(ndim):
    layer = DifferentialConv(2, 3, 3, base_shape=8, ndim=ndim, generator=seeded()).double()
    for n in (8, 4):
        x = torch.randn(2, 2, *(n,) * ndim, generator=seeded(1), dtype=torch.float64)
        total = layer.weight.sum(tuple(range(2, 2 + ndim)), keepdim=True)
        around = extend(x, [(1, 1)] * ndim, "circular")
        run = CONVOLVE[ndim - 1]
        expected = (run(around, layer.weight) - run(x, total)) / (8 / n)
        torch.testing.assert_close(layer(x), expected)
        zero = layer(torch.ones_like(x))
        torch.testing.assert_close(zero, torch.zeros_like(zero))


def test_differential_grids():
    layer = DifferentialConv(1, 1, 3, base_shape=(8, 16), ndim=2)
    assert layer(torch.ones(1, 1, 16, 32)).shape == (1, 1, 16, 32)
    with pytest.raises(ValueError, match="equal: resample"):
        layer(torch.ones(1, 1, 16, 16))
    assert layer(torch.ones(1, 1, 16, 16), spacing=(1 / 8, 1 / 16)).shape == (1, 1, 16, 16)
    replicated = DifferentialConv(1, 1, 3, base_shape=8, padding_mode="replicate")
    zero = replicated(torch.ones(1, 1, 8))
    torch.testing.assert_close(zero, torch.zeros_like(zero), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either base_shape or base_spacing"),
        ({"base_shape": 8, "base_spacing": 1}, "either base_shape or base_spacing"),
        ({"base_shape": 8, "kernel_size": 2}, "odd"),
        ({"base_shape": 8, "ndim": 4}, "ndim"),
        ({"base_shape": 8, "padding_mode": "wrap"}, "circular"),
        ({"base_shape": 8, "groups": 2}, "groups"),
        ({"base_shape": 0}, "base_shape"),
    ],
)
def test_differential_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DifferentialConv(**{"in_channels": 1, "out_channels": 3, **options})


@pytest.mark.parametrize(
    ("layer", "x"),
    list(
        product(
            [LocalIntegralConv(1, 1, 3, radius=0.1), DifferentialConv(1, 1, 3, base_shape=8)],
            [torch.ones(1, 1, 8, 8), torch.ones(1, 2, 8), torch.full((1, 1, 8), math.nan)],
        )
    ),
)
def test_fields_are_refused(layer, x):
    with pytest.raises(ValueError, match="x must"):
        layer(x)
    with pytest.raises(ValueError, match="spacing"):
        layer(torch.ones(1, 1, 8), spacing=0)

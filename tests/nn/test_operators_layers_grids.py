"""Resampling, quadrature, errors of functions, and the two wrappers around them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stiefel.nn.operators import (
    FilteredActivation,
    InputOutputInterpolation,
    append_coordinates,
    grid_coordinates,
    quadrature,
    quadrature_points,
    relative_l2,
    resample,
)


def line(values):
    return torch.tensor(values, dtype=torch.float64)[None, None]


def wave(n, frequency, phase=0.3, ndim=1):
    x = grid_coordinates((n,) * ndim, dtype=torch.float64)
    return torch.cos(2 * math.pi * frequency * x.sum(0) + phase)[None, None]


@pytest.mark.parametrize(
    ("values", "size", "expected"),
    [
        ([1, -1, 1, -1], 8, [1, 0, -1, 0, 1, 0, -1, 0]),
        ([0, 1, 0, 0], 8, [0, 0.603553, 1, 0.603553, 0, -0.103553, 0, -0.103553]),
        (
            [0, 1, 2, 3, 4],
            7,
            [0, 0.206159, 1.922594, 1.934322, 2.620636, 4.324386, 2.991903],
        ),
        ([math.cos(4 * math.pi * j / 8) for j in range(8)], 4, [1, -1, 1, -1]),
    ],
)
def test_resampling_of_the_sheet(values, size, expected):
    for x in (line(values), line(values).to(torch.complex128)):
        found = resample(x, size)
        torch.testing.assert_close(found, line(expected).to(x.dtype), atol=1e-6, rtol=0)


def trigonometric(x, size):
    """The interpolant, summed: the term of half the points is a cosine."""
    n = len(x)
    t = np.arange(size) / size
    value = np.zeros(size)
    for k in range(-(n // 2), n // 2 + 1):
        c = np.mean(x * np.exp(-2j * np.pi * k * np.arange(n) / n))
        share = 0.5 if 2 * abs(k) == n else 1
        value += share * (c * np.exp(2j * np.pi * k * t)).real
    return value


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), extra=st.integers(0, 8))
def test_going_up_is_the_interpolant_and_back_is_exact(n, extra):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(1, 1, n, generator=g, dtype=torch.float64)
    fine = resample(x, n + extra)
    expected = trigonometric(x[0, 0].numpy(), n + extra)
    np.testing.assert_allclose(fine[0, 0], expected, atol=1e-12)
    torch.testing.assert_close(resample(fine, n), x)
    torch.testing.assert_close(resample(x.to(torch.complex128), n + extra).real, fine)


@pytest.mark.parametrize("shape", [(7, 12), (16, 5), (9, 9)])
def test_resampling_in_two_axes_is_one_after_the_other(shape):
    x = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    by_axis = resample(resample(x, (shape[0], 10)), (shape[0], shape[1]))
    torch.testing.assert_close(resample(x, shape), by_axis, atol=1e-5, rtol=1e-5)
    assert resample(x, (8, 10)) is x


def test_band_limited_functions_are_sampled_anew():
    for mode, error in (("fourier", 1e-12), ("linear", 0.4)):
        found = resample(wave(16, 3, ndim=2), 40, mode)
        assert (found - wave(40, 3, ndim=2)).abs().max() < error
    # Nodes, not cells: every second sample is there already, nothing shifts by half a step.
    torch.testing.assert_close(resample(wave(16, 3), 32, "linear")[..., ::2], wave(16, 3))
    torch.testing.assert_close(resample(wave(32, 3), 16, "linear"), wave(32, 3)[..., ::2])
    ends = torch.linspace(0, 1, 5, dtype=torch.float64)[None, None]
    found = resample(ends, 9, "linear", periodic=False)
    torch.testing.assert_close(found[0, 0], torch.linspace(0, 1, 9, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["fourier", "linear"])
def test_resampling_derivatives_and_half_precision(mode):
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resample(x, (6, 3), mode), (x,))
    half = x.detach().to(torch.bfloat16)
    found = resample(half, (6, 3), mode)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, resample(half.float(), (6, 3), mode).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("x", "shape", "options", "error", "message"),
    [
        (torch.zeros(1, 1, 4, dtype=torch.long), 8, {}, TypeError, "x must be floating"),
        (torch.zeros(1, 4), 8, {}, ValueError, "grid"),
        (torch.zeros(1, 1, 4), 0, {}, ValueError, "shape must be at least 1"),
        (torch.zeros(1, 1, 4), 2.5, {}, TypeError, "int"),
        (torch.zeros(1, 1, 4), (4, 4), {}, ValueError, "shape"),
        (torch.zeros(1, 1, 0), 4, {}, ValueError, "at least one point"),
        (torch.zeros(1, 1, 4), 8, {"mode": "cubic"}, ValueError, "fourier, linear"),
        (torch.zeros(1, 1, 4), 8, {"periodic": False}, ValueError, "periodic"),
    ],
)
def test_resampling_refuses(x, shape, options, error, message):
    with pytest.raises(error, match=message):
        resample(x, shape, **options)


def test_trapezoid_of_the_sheet():
    points = torch.tensor([0, 0.1, 0.4, 1.0])
    expected = torch.tensor([0.05, 0.2, 0.45, 0.3])
    torch.testing.assert_close(quadrature("trapezoid", points), expected)
    torch.testing.assert_close(quadrature("trapezoid", points=points, domain=(0, 1)), expected)
    wide = quadrature("trapezoid", points, (-1, 2))
    torch.testing.assert_close(wide, expected + torch.tensor([1, 0, 0, 1.0]))


@pytest.mark.parametrize("n", [1, 2, 5, 8, 9])
@pytest.mark.parametrize(
    ("kind", "degree"),
    [
        ("gauss-legendre", lambda n: 2 * n - 1),
        ("clenshaw-curtis", lambda n: n - 1),
        ("chebyshev", lambda n: n - 1),
        ("trapezoid", lambda n: 1),
    ],
)
def test_rules_are_exact_for_polynomials(kind, degree, n):
    a, b = -1.0, 2.0
    w = quadrature(kind, n, (a, b), dtype=torch.float64)
    x = quadrature_points(kind, n, (a, b), dtype=torch.float64)[:, 0]
    assert bool((w > 0).all())
    assert bool((x.diff() > 0).all())
    for p in range(degree(n) + 1):
        exact = (b ** (p + 1) - a ** (p + 1)) / (p + 1)
        assert float((w * x**p).sum()) == pytest.approx(exact, abs=1e-10, rel=1e-12)
    # And not for the even power about the middle two degrees further on.
    p = degree(n) + 2 + degree(n) % 2
    wrong = float((w * (x - 0.5) ** p).sum()) - 2 * 1.5 ** (p + 1) / (p + 1)
    assert abs(wrong) > 1e-6


def test_periodic_rule_is_exact_below_n_frequencies():
    w = quadrature("uniform", 8, (0, 2 * math.pi), dtype=torch.float64)
    x = quadrature_points("uniform", 8, (0, 2 * math.pi), dtype=torch.float64)[:, 0]
    for k in range(1, 8):
        assert abs(float((w * torch.cos(k * x + 0.3)).sum())) < 1e-12
    assert abs(float((w * torch.cos(8 * x)).sum())) == pytest.approx(2 * math.pi)
    assert float(x[0]) == 0
    assert float(x[-1]) == pytest.approx(2 * math.pi * 7 / 8)


def test_tensor_products():
    w = quadrature("gauss-legendre", (3, 4), ((0, 2), (1, 4)), dtype=torch.float64)
    x, y = quadrature_points(
        "gauss-legendre", (3, 4), ((0, 2), (1, 4)), dtype=torch.float64
    ).unbind(-1)
    assert float((w * x**2 * y**3).sum()) == pytest.approx(8 / 3 * (256 - 1) / 4)
    lines = [torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0.0, 0.5, 0.6, 2.0])]
    product = quadrature("trapezoid", points=lines)
    expected = quadrature("trapezoid", lines[0])[:, None] * quadrature("trapezoid", lines[1])
    torch.testing.assert_close(product, expected)


def test_circle_and_cells():
    x = torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)
    expected = torch.tensor([0.35, 0.2, 0.45], dtype=torch.float64)
    torch.testing.assert_close(quadrature("circle", x), expected)
    cells = quadrature("voronoi", torch.tensor([0.9, 0.1, 0.2], dtype=torch.float64))
    torch.testing.assert_close(cells, torch.tensor([0.45, 0.15, 0.4], dtype=torch.float64))
    assert quadrature("circle", x[:1]).tolist() == [1]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 20))
def test_voronoi_areas_are_those_of_the_nearest(seed, n):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, generator=g, dtype=torch.float64) * torch.tensor([1.0, 3.0])
    x[0] = 0  # a corner
    x[-1, 0] = 1  # a side
    areas = quadrature("voronoi", x, ((0, 1), (0, 3)))
    assert float(areas.sum()) == pytest.approx(3)
    grid = grid_coordinates((60, 60), dtype=torch.float64).flatten(1).mT + 1 / 120
    nearest = torch.cdist(grid * torch.tensor([1.0, 3.0]), x).argmin(1)
    counted = 3 * torch.bincount(nearest, minlength=n) / 3600
    assert float((areas - counted).abs().max()) < 0.1


def test_a_grid_has_the_trapezoidal_cells():
    points = grid_coordinates((4, 3), periodic=False, dtype=torch.float64).flatten(1).mT
    product = quadrature("trapezoid", (4, 3), dtype=torch.float64).flatten()
    torch.testing.assert_close(quadrature("voronoi", points), product)


def test_monte_carlo_and_placement():
    w = quadrature("monte-carlo", torch.rand(8, 3), ((0, 1), (0, 2), (0, 3)))
    torch.testing.assert_close(w, torch.full((8,), 6 / 8))
    assert quadrature("uniform", (4, 2)).shape == (4, 2)
    assert quadrature("uniform", 4).dtype == torch.get_default_dtype()
    assert (
        quadrature("circle", torch.tensor([0.1, 0.5]), dtype=torch.float64).dtype == torch.float64
    )


BAD_POINTS = [
    ([0, 0.4, 0.2], "sorted"),
    ([0, 0.2, 0.2, 1], "repeat"),
    ([0, math.nan, 1], "finite"),
    ([0, 0.5, 1.5], "domain"),
]


@pytest.mark.parametrize("kind", ["trapezoid", "circle"])
@pytest.mark.parametrize(("points", "message"), BAD_POINTS)
def test_quadrature_refuses_points(kind, points, message):
    with pytest.raises(ValueError, match=message):
        quadrature(kind, torch.tensor(points), (0, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quadrature("simpson", 4), "uniform, trapezoid"),
        (lambda: quadrature("uniform", torch.rand(3)), "fixes its own points"),
        (lambda: quadrature("circle", 4), "needs points"),
        (lambda: quadrature("uniform"), "shape or points"),
        (lambda: quadrature("uniform", 0), "at least 1"),
        (lambda: quadrature("uniform", 4, (1, 0)), "domain"),
        (lambda: quadrature("uniform", 4, ((0, 1), (0, 1))), "domain"),
        (lambda: quadrature("circle", torch.rand(3, 2)), "voronoi"),
        (lambda: quadrature("circle", torch.tensor([0.0, 0.5, 1.0])), "one point of the circle"),
        (lambda: quadrature("voronoi", torch.rand(4, 3)), "monte-carlo"),
        (lambda: quadrature("voronoi", torch.zeros(2, 2)), "repeat"),
        (lambda: quadrature("voronoi", torch.full((1, 2), 2.0)), "domain"),
        (lambda: quadrature("trapezoid", torch.zeros(1)), "two points"),
        (lambda: quadrature("voronoi", [torch.rand(3), torch.rand(3)]), "one tensor per axis"),
        (lambda: quadrature_points("monte-carlo", 4), "kind"),
    ],
)
def test_quadrature_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_quadrature_refuses_integers():
    with pytest.raises(TypeError, match="floating point"):
        quadrature("trapezoid", torch.arange(4))


def test_relative_error_with_weights():
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 3, 2, 6, generator=g, dtype=torch.float64)
    w = torch.rand(6, generator=g, dtype=torch.float64) + 0.1
    expected = [
        math.sqrt(float((w * (a - b) ** 2).sum() / (w * b**2).sum()))
        for a, b in zip(u, v, strict=True)
    ]
    found = relative_l2(u, v, w, reduction="none")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(relative_l2(u, v, w), found.mean())
    torch.testing.assert_close(relative_l2(u, v, w, reduction="sum"), found.sum())
    torch.testing.assert_close(relative_l2(u, v, 7 * w), found.mean())
    torch.testing.assert_close(relative_l2(u, v), relative_l2(u, v, torch.ones(3, 6).double()))
    # A point counted as two of half the weight.
    twice = torch.cat((u, u[..., -1:]), -1), torch.cat((v, v[..., -1:]), -1)
    halves = torch.cat((w[:-1], w[-1:] / 2, w[-1:] / 2))
    torch.testing.assert_close(relative_l2(*twice, halves), found.mean())
    assert float(relative_l2(u.to(torch.complex128) * 1j, v * 1j, w)) == pytest.approx(
        float(found.mean())
    )


def test_relative_error_has_derivatives_also_at_zero():
    u = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    w = torch.rand(2, 5, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda u, v: relative_l2(u, v, w), (u, v))
    (at_zero,) = torch.autograd.grad(relative_l2(u, u.detach()), u)
    assert bool((at_zero == 0).all())
    half = torch.ones(1, 1, 4, dtype=torch.bfloat16)
    assert relative_l2(half, half).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pred": torch.ones(2, 1, 5)}, ValueError, "shapes"),
        ({"pred": torch.ones(2, 1, 4).long()}, TypeError, "pred"),
        ({"pred": torch.full((2, 1, 4), math.nan)}, ValueError, "pred must be finite"),
        ({"target": torch.zeros(2, 1, 4)}, ValueError, "zero everywhere in sample 0"),
        ({"weights": torch.ones(5)}, ValueError, "one entry per point"),
        ({"weights": torch.tensor([1, 1, 1, 0.0])}, ValueError, "positive"),
        ({"weights": torch.tensor([1, 1, 1, -1.0])}, ValueError, "positive"),
        ({"weights": torch.tensor([1, 1, 1, math.nan])}, ValueError, "positive"),
        ({"weights": torch.ones(4).long()}, TypeError, "weights"),
        ({"reduction": "max"}, ValueError, "mean, sum, none"),
    ],
)
def test_relative_error_refuses(change, error, message):
    arguments = {"pred": torch.ones(2, 1, 4), "target": torch.ones(2, 1, 4), **change}
    with pytest.raises(error, match=message):
        relative_l2(**arguments)


def test_interpolation_around_a_network():
    net = nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular", dtype=torch.float64)
    wrapped = InputOutputInterpolation(net, 16)
    x = wave(16, 3)
    assert torch.equal(wrapped(x), net(x))
    fine = wrapped(wave(48, 3))
    assert fine.shape == (1, 2, 48)
    torch.testing.assert_close(fine[..., ::3], net(x))
    # Blind above the Nyquist frequency of its grid.
    torch.testing.assert_close(wrapped(wave(48, 20)), wrapped(torch.zeros(1, 1, 48).double()))
    assert InputOutputInterpolation(net, 16, "linear")(wave(48, 3)).shape == (1, 2, 48)
    assert wrapped.state_dict().keys() == {"net.weight", "net.bias"}
    assert "base_shape=(16,)" in repr(wrapped)


def test_interpolation_refuses():
    with pytest.raises(ValueError, match="base_shape is missing"):
        InputOutputInterpolation(nn.Identity(), None)
    with pytest.raises(ValueError, match="mode"):
        InputOutputInterpolation(nn.Identity(), 4, "cubic")
    with pytest.raises(ValueError, match="grid axes of base_shape"):
        InputOutputInterpolation(nn.Identity(), 4)(torch.zeros(1, 1, 4, 4))


def test_filtered_activation_does_not_alias():
    square = FilteredActivation(2, torch.square)
    # cos² has twice the frequency, 14, which a grid of 20 points shows as 6.
    x = wave(20, 7)
    exact = torch.full_like(x, 0.5)
    torch.testing.assert_close(square(x), exact)
    assert float((x.square() - exact).abs().max()) > 0.4
    gelu = FilteredActivation()
    assert gelu.up == 2
    assert gelu(x.float()).dtype == torch.float32
    torch.testing.assert_close(FilteredActivation(1)(x), nn.functional.gelu(x))
    with pytest.raises(ValueError, match="up"):
        FilteredActivation(0)


def test_coordinates_are_functions_of_the_place():
    periodic = grid_coordinates((4, 2))
    assert periodic[0, :, 0].tolist() == [0, 0.25, 0.5, 0.75]
    assert grid_coordinates(5, periodic=False)[0].tolist() == [0, 0.25, 0.5, 0.75, 1]
    x = torch.zeros(2, 3, 4, 2, dtype=torch.bfloat16)
    more = append_coordinates(x)
    assert more.shape == (2, 5, 4, 2)
    assert more.dtype == torch.bfloat16
    assert torch.equal(more[0, 3:].float(), periodic)
    with pytest.raises(ValueError, match="grid"):
        append_coordinates(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="floating"):
        append_coordinates(torch.zeros(2, 3, 4).long())

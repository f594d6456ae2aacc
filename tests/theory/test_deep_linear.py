"""Closed forms of deep linear networks against the sheet's values, ODE solvers and gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp

from stiefel.theory import (
    max_stable_lr,
    mode_curve,
    mode_time,
    mode_time_infinite,
    optimal_lr,
    unbalanced_curve,
    unbalanced_time,
)
from stiefel.theory.deep_linear_clock import clock, position

DEPTHS = (1, 2, 3, 4, 5, 9, 100, math.inf)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def by_solver(t, s, u0, depth, delta=1.0, lr=1.0):
    """The slow, obvious twin: one mode by an adaptive integrator in ln u."""
    layers, p = (1, 2) if math.isinf(depth) else (depth, 2 - 2 / depth)

    def slope(_, v):
        u = np.exp(v)
        return lr * layers * u ** (p - 1) * (s - delta * u)

    found = solve_ivp(slope, (0, t[-1]), [math.log(u0)], "LSODA", t_eval=t, rtol=1e-11, atol=1e-12)
    return np.exp(found.y[0])


# --- values of the sheet -------------------------------------------------------------------------


def test_two_layers():
    assert float(mode_curve(1.0, 2.0, 0.01)) == pytest.approx(0.4305879205, abs=5e-11)
    assert float(mode_time(2.0, 0.01, 1.9)) == pytest.approx(2.0594359510, abs=5e-11)


@pytest.mark.parametrize(
    ("depth", "time"),
    [
        (1, 2.3978952728),
        (2, 0.7862774187),
        (3, 0.4598259761),
        (5, 0.2493859597),
        (10, 0.1158589396),
        (100, 0.0108631224),
    ],
)
def test_times_from_0_9_to_1_9(depth, time):
    assert float(mode_time(2.0, 0.9, 1.9, depth)) == pytest.approx(time, abs=6e-11)


def test_infinitely_many_layers():
    assert float(mode_time_infinite(2.0, 0.9, 1.9)) == pytest.approx(1.0786750795, abs=6e-11)
    assert float(mode_time_infinite(1.0, 0.01, 0.99)) == pytest.approx(108.1801387, abs=6e-8)
    assert float(mode_time_infinite(1.0, 0.5, 0.99)) == pytest.approx(5.5850188, abs=6e-8)
    # Depth times time goes there; at a given depth and rate the formula divides by both.
    assert float(10**7 * mode_time(2.0, 0.9, 1.9, 10**7)) == pytest.approx(1.0786750795, rel=1e-6)
    ratio = mode_time_infinite(2.0, 0.9, 1.9) / mode_time_infinite(2.0, 0.9, 1.9, 0.5, 30)
    assert float(ratio) == pytest.approx(15)


@pytest.mark.parametrize(
    ("depth", "time"),
    [
        (1, 4.59511985),
        (2, 4.59511985),
        (3, 5.39587989),
        (4, 5.94392484),
        (5, 6.18481842),
        (9, 5.78573065),
        (29, 2.94909006),
        (99, 1.01934631),
    ],
)
def test_times_from_0_01_to_0_99(depth, time):
    assert float(mode_time(1.0, 0.01, 0.99, depth)) == pytest.approx(time, abs=6e-9)


def test_depth_at_a_fixed_rate_is_not_monotone():
    times = [float(mode_time(1.0, 0.01, 0.99, depth)) for depth in range(2, 20)]
    assert 2 + times.index(max(times)) in (5, 6)


@pytest.mark.parametrize(
    ("u0", "depth", "time", "digits"),
    [
        (0.01, 3, 16.18764, 5),
        (0.01, 29, 85.5236, 4),
        (0.01, 99, 100.9153, 4),
        (0.01, 999, 107.4349, 4),
        (0.5, 1, 3.912, 3),
        (0.5, 2, 4.595, 3),
        (0.5, 3, 4.884, 3),
        (0.5, 5, 5.142, 3),
        (0.5, 9, 5.330, 3),
        (0.5, 29, 5.504, 3),
        (0.5, 99, 5.561, 3),
    ],
)
def test_depth_scaled_rates(u0, depth, time, digits):
    scaled = depth * float(mode_time(1.0, u0, 0.99, depth))
    assert scaled == pytest.approx(time, abs=0.6 * 10**-digits)


def test_unbalanced():
    assert float(unbalanced_time(0.5, 0.1, 2.0, 1.9)) == pytest.approx(1.4931971436, abs=6e-11)


# --- the curve -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    ("s", "u0", "delta"),
    [
        (2.0, 0.01, 1.0),
        (1.5, 0.3, 2.0),
        (2.0, 5.0, 1.0),
        (0.4, 30.0, 0.5),
        (1.0, 1e-5, 3.0),
    ],
)
def test_curves_solve_the_differential_equation(depth, s, u0, delta):
    t = np.linspace(0.0, 6.0, 13)
    found = mode_curve(t, s, u0, depth, lr=0.7, delta=delta).numpy()
    np.testing.assert_allclose(found, by_solver(t, s, u0, depth, delta, 0.7), rtol=2e-8)


def test_hardly_any_strength():
    """Where x = 2st/τ is below the threshold of the series, and right above it."""
    t, u0 = f64(1.0, 30.0), 2.0
    for s in (1e-7, 1e-6, 4e-5, 6e-5):
        x = 2 * s * t
        exact = u0 / (torch.exp(-x) - u0 * torch.expm1(-x) / s)
        torch.testing.assert_close(mode_curve(t, s, u0), exact, rtol=1e-10, atol=0)


@pytest.mark.parametrize("depth", [2, 3, 7, math.inf])
def test_no_strength_is_the_limit_of_little(depth):
    t = f64(0.0, 1.0, 5.0)
    power = 2 - 2 / depth
    layers = 1 if math.isinf(depth) else depth
    exact = (0.7**-power + power * layers * t) ** (-1 / power)
    torch.testing.assert_close(mode_curve(t, 0.0, 0.7, depth), exact)
    torch.testing.assert_close(mode_curve(t, 1e-9, 0.7, depth), exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("depth", DEPTHS)
def test_fixed_points_stay(depth):
    t = f64(0.0, 1.0, 1e4)
    assert torch.equal(mode_curve(t, 1.5, 0.75, depth, delta=2.0), f64(0.75, 0.75, 0.75))
    if depth > 1:
        assert torch.equal(mode_curve(t, 1.5, 0.0, depth), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("depth", DEPTHS)
def test_curves_and_times_are_inverse(depth):
    s, u0 = f64(2.0, 0.5, 1.0), f64(1e-3, 0.2, 4.0)
    uf = f64(1.999, 0.3, 1.1)
    time = mode_time(s, u0, uf, depth, lr=0.3)
    assert time.shape == (3,)
    again = torch.stack([mode_curve(time[k], s[k], u0[k], depth, lr=0.3) for k in range(3)])
    torch.testing.assert_close(again, uf, rtol=1e-9, atol=0)


@given(
    s=st.floats(1e-3, 1e3),
    part=st.floats(1e-9, 50.0).filter(lambda x: abs(x - 1) > 1e-3),
    depth=st.sampled_from(DEPTHS),
    first=st.floats(0.0, 5.0),
    second=st.floats(0.0, 5.0),
)
@settings(max_examples=60, deadline=None)
def test_flow_is_a_semigroup_and_monotone(s, part, depth, first, second):
    """After ``first`` and then ``second`` it is where it is after both; it moves towards s."""
    scale = s ** (2 - 2 / depth) if depth > 1 else 1.0  # times of order one
    first, second = first / scale, second / scale
    u0 = part * s
    middle = float(mode_curve(first, s, u0, depth))
    end = float(mode_curve(first + second, s, u0, depth))
    assert float(mode_curve(second, s, middle, depth)) == pytest.approx(end, rel=1e-6)
    low, high = sorted((u0, s))
    assert low * (1 - 1e-9) <= middle <= high * (1 + 1e-9)
    assert abs(end - s) <= abs(middle - s) * (1 + 1e-9) + 1e-12 * s


@pytest.mark.parametrize("depth", DEPTHS)
def test_extremes_are_finite(depth):
    t = f64(0.0, 1e-12, 1.0, 1e12)
    s, u0 = f64(1e-8, 1.0, 1e4, 1.0, 1.0), f64(1e-30, 1e-200, 1.0, 1e15, 1 + 1e-15)
    curve = mode_curve(t, s, u0, depth)
    assert curve.isfinite().all()
    assert (curve >= 0).all()
    torch.testing.assert_close(curve[2, -1], f64(1e4)[0])


def test_shapes_and_dtypes():
    t = torch.linspace(0, 1, 5)
    s = torch.rand(3, 1)
    curve = mode_curve(t, s, torch.full((4,), 0.01), 3)
    assert curve.shape == (3, 4, 5)
    assert curve.dtype is torch.float32
    assert mode_curve(0.5, s, 0.01).shape == (3, 1)
    assert mode_curve([0.5], 1.0, 0.01).dtype is torch.float64
    own_times = torch.rand(3, 1, 7)
    many = mode_curve(own_times, s, 0.01, 5)
    assert many.shape == (3, 1, 7)
    torch.testing.assert_close(many[2, 0], mode_curve(own_times[2, 0], s[2, 0], 0.01, 5))
    assert mode_curve(torch.arange(4), torch.ones(2, dtype=torch.bfloat16), 0.1).dtype is (
        torch.float32
    )
    assert mode_curve(torch.zeros(0), s, 0.1, 3).shape == (3, 1, 0)
    assert mode_curve(t, torch.zeros(0), 0.1, 3).shape == (0, 5)


@pytest.mark.parametrize("depth", [2, 5])
def test_single_precision_is_as_good_as_its_type(depth):
    t = torch.linspace(0, 20, 2001, dtype=torch.float64)
    s = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    t, s = t.float(), s.float()
    exact = mode_curve(t.double(), s.double(), 2.0**-10, depth)
    found = mode_curve(t, s, 2.0**-10, depth)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_out(depth):
    t, s = torch.linspace(0, 9, 40_000, dtype=torch.float64), f64(1.0, 2.0)
    u0 = f64(0.01, 0.5)
    out = torch.empty(2, 40_000, dtype=torch.float64)
    assert mode_curve(t, s, u0, depth, out=out) is out
    assert torch.equal(out, mode_curve(t, s, u0, depth))
    mixed = mode_curve(t, s, f64(0.01, 5.0), depth, out=out)
    assert torch.equal(mixed, mode_curve(t, s, f64(0.01, 5.0), depth))
    with pytest.raises(ValueError, match=r"out must be contiguous, \(2, 40000\)"):
        mode_curve(t, s, u0, depth, out=out.float())
    with pytest.raises(ValueError, match="gradients"):
        mode_curve(t, s.requires_grad_(), u0, depth, out=out)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, math.inf])
def test_gradients(depth):
    """Growth, decay, both fixed points and no strength, to second order."""
    s = f64(2.0, 0.5, 1.0, 0.7).requires_grad_()
    u0 = f64(0.1, 2.0, 0.2, 3.0).requires_grad_()
    t, lr = f64(0.1, 0.7, 2.0).requires_grad_(), f64(0.8).requires_grad_()
    delta = f64(1.0, 1.2, 0.5, 1.0).requires_grad_()

    def curve(*arguments):
        t, s, u0, lr, delta = arguments
        return mode_curve(t, s, u0, depth, lr, delta)

    assert torch.autograd.gradcheck(curve, (t, s, u0, lr, delta))
    assert torch.autograd.gradgradcheck(curve, (t, s, u0, lr, delta))


@pytest.mark.parametrize("depth", [2, 3, 5, math.inf])
def test_gradients_at_fixed_points_are_one_sided_limits(depth):
    """At u0 = 0, u0 = s/δ and s = 0 central differences do not exist or cross formulas."""
    t = f64(0.3, 1.0)
    for s, u0 in ((1.5, 0.75), (0.0, 0.6), (1.5, 0.0)):
        inputs = [f64(s)[0].requires_grad_(), f64(u0)[0].requires_grad_()]
        curve = mode_curve(t, *inputs, depth, delta=2.0)
        for k in range(2):
            moved = [s, u0]
            h = 1e-6 if u0 else 1e-24  # at the saddle the next order is u0^(2 − 2/D)
            moved[k] += h
            slope = (mode_curve(t, *moved, depth, delta=2.0) - curve) / h
            (gradient,) = torch.autograd.grad(
                (curve * f64(1.0, -2.0)).sum(), inputs[k], retain_graph=True, allow_unused=True
            )
            found = 0.0 if gradient is None else float(gradient)
            assert found == pytest.approx(float(slope.detach() @ f64(1.0, -2.0)), 1e-4, 1e-5)


def test_gradients_in_single_precision():
    s = torch.tensor([1.0, 2.0], requires_grad=True)
    mode_curve(torch.tensor([0.5, 1.0]), s, 0.1, 5).sum().backward()
    assert s.grad.dtype is torch.float32
    assert s.grad.isfinite().all()


def test_negative_product_runs_into_the_saddle():
    t = f64(0.0, 0.5, 2.0)
    found = mode_curve(t, f64(2.0, 0.0), -0.3, signed=True)
    slopes = solve_ivp(
        lambda _, u: -2 * u * (2.0 - u), (0, 2), [-0.3], t_eval=t.numpy(), rtol=1e-11, atol=1e-13
    )
    np.testing.assert_allclose(found[0].numpy(), slopes.y[0], rtol=1e-8)
    torch.testing.assert_close(found[1], -0.3 / (1 + 0.6 * t))
    assert float(mode_curve(1.0, 2.0, -0.3, depth=1)) == pytest.approx(2 - 2.3 / math.e)


# --- the clock behind it -------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [3, 5, 9, 100, 10**6, math.inf])
@pytest.mark.parametrize("sign", [1, -1])
def test_clock_is_its_integral_and_position_its_inverse(depth, sign):
    q = 1 - 2 / depth
    ends = f64(-6.0, -0.5, 0.0, 2.0, 9.0) if sign > 0 else f64(0.1, 0.69, 0.7, 2.0, 9.0)
    exact = [
        quad(lambda y: (1 + sign * math.exp(-y)) ** q, float(ends[0]), float(end), epsabs=1e-12)[0]
        for end in ends
    ]
    times = clock(ends, q, sign)
    np.testing.assert_allclose((times - times[0]).numpy(), exact, atol=1e-11, rtol=1e-12)
    y = torch.linspace(-70, 35, 9001, dtype=torch.float64)
    y = y if sign > 0 else y.sub(10).exp()[:5500]
    w = 1 / (1 + sign * torch.exp(-y)) if sign > 0 else -1 / torch.expm1(-y)
    torch.testing.assert_close(position(clock(y, q, sign), q, sign), w, rtol=2e-11, atol=0)


# --- times, unbalanced layers, rates -------------------------------------------------------------


def test_times_have_gradients():
    s, u0, uf = (f64(*x).requires_grad_() for x in ((2.0, 1.0), (0.1, 3.0), (1.5, 1.2)))
    lr = f64(0.5).requires_grad_()
    for depth in (1, 2, 5, math.inf):
        assert torch.autograd.gradcheck(
            lambda s, u0, uf, lr, depth=depth: mode_time(s, u0, uf, depth, lr), (s, u0, uf, lr)
        )
    a, b = f64(0.5, 0.3).requires_grad_(), f64(0.1, -0.1).requires_grad_()
    assert torch.autograd.gradcheck(unbalanced_time, (a, b, s, f64(1.5, 0.5)))
    assert torch.autograd.gradcheck(
        lambda a, b, s: unbalanced_curve(f64(0.2, 1.0), a, b, s), (a, b, s)
    )


def test_time_without_strength_and_with_variance():
    time = mode_time(0.0, 0.7, 0.2, 3)
    assert float(mode_curve(time, 0.0, 0.7, 3)) == pytest.approx(0.2)
    time = mode_time(2.0, 0.01, 0.9, 4, delta=2.0)
    assert float(mode_curve(time, 2.0, 0.01, 4, delta=2.0)) == pytest.approx(0.9)


@pytest.mark.parametrize("start", [(0.5, 0.1), (0.1, -0.6), (-0.5, -0.2), (2.0, 1.5), (1e-4, 0.0)])
def test_unbalanced_curves_solve_both_equations(start):
    t = np.linspace(0, 8, 9)
    exact = solve_ivp(
        lambda _, w: [w[1] * (2 - w[0] * w[1]), w[0] * (2 - w[0] * w[1])],
        (0, 8),
        start,
        t_eval=t,
        rtol=1e-11,
        atol=1e-13,
    ).y
    found = unbalanced_curve(t, *start, 2.0).numpy()
    np.testing.assert_allclose(found, exact[0] * exact[1], rtol=1e-7, atol=1e-9)
    drift = exact[0] ** 2 - exact[1] ** 2
    np.testing.assert_allclose(drift, drift[0], atol=1e-8)
    assert float(unbalanced_time(*start, 2.0, float(found[3]))) == pytest.approx(t[3], rel=1e-6)


def test_unbalanced_goes_over_into_balanced():
    t = f64(0.0, 0.5, 1.0, 3.0)
    for apart in (0.0, 1e-12, 1e-8):
        curve = unbalanced_curve(t, 0.1 + apart, 0.1, 2.0)
        torch.testing.assert_close(curve, mode_curve(t, 2.0, 0.01), rtol=1e-6, atol=0)
    assert float(unbalanced_time(0.6, 0.6, 0.0, 0.1)) == pytest.approx(
        float(mode_time(0.0, 0.36, 0.1))
    )


def test_the_printed_formula_is_the_wrong_one():
    """The paper's F with c sinh θ and s − c sinh θ gives 2.7017; a solver says 1.4932."""
    c, s = 0.24, 2.0

    def printed(product):
        theta, r = math.asinh(product / c), math.hypot(c, s)
        h = s * math.tanh(theta / 2)
        return math.log((r + c + h) / (r - c - h)) / r

    assert printed(1.9) - printed(0.05) == pytest.approx(2.7017, abs=1e-4)


def test_rates():
    assert float(max_stable_lr(2.0, 2)) == pytest.approx(0.5)
    assert float(optimal_lr(2.0, 4)) == pytest.approx(1 / (4 * 2**1.5))
    assert max_stable_lr([1.0, 2.0], 1).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_descent_on_amplitudes_is_stable_up_to_the_bound(depth):
    """Gradient descent on D equal amplitudes near the optimum: converges below, not above."""
    s = 1.7

    def end(lr):
        a = torch.full((depth,), (s * 1.001) ** (1 / depth), dtype=torch.float64)
        for _ in range(3000):
            a = a + lr * (s - a.prod()) * a.prod() / a
            if not a.isfinite().all() or a.abs().max() > 10:
                return math.inf
        return abs(float(a.prod()) - s)

    bound = float(max_stable_lr(s, depth))
    assert end(0.97 * bound) < 1e-6
    assert end(1.03 * bound) > 1e-3


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t": -1.0}, "t must be ≥ 0, got -1"),
        ({"t": [0.0, math.inf]}, "t must be finite"),
        ({"t": math.nan}, "t must be finite"),
        ({"s": -0.1}, "s must be ≥ 0"),
        ({"s": math.nan}, "s must be finite"),
        ({"u0": -0.1}, "signed=True"),
        ({"u0": -0.1, "depth": 3, "signed": True}, "two layers only"),
        ({"u0": math.inf}, "u0 must be finite"),
        ({"depth": 0}, "depth counts weight layers"),
        ({"depth": 2.5}, "whole number"),
        ({"depth": math.nan}, "whole number"),
        ({"depth": -math.inf}, "whole number"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"lr": -1.0}, "lr must be > 0"),
        ({"delta": 0.0}, "delta must be > 0"),
    ],
)
def test_bad_curves(arguments, message):
    with pytest.raises(ValueError, match=message):
        mode_curve(**{"t": 1.0, "s": 1.0, "u0": 0.1, **arguments})


def test_complex_numbers_are_refused():
    with pytest.raises(TypeError, match="s must be real"):
        mode_curve(1.0, torch.ones(1, dtype=torch.complex64), 0.1)


@pytest.mark.parametrize(
    ("u0", "uf"), [(0.1, 1.0), (0.1, 1.5), (0.1, 0.05), (0.1, 0.1), (2.0, 0.5), (2.0, 3.0)]
)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_times_never_reached(u0, uf, depth):
    with pytest.raises(ValueError, match="uf must lie strictly between u0 and s/delta"):
        mode_time(1.0, u0, uf, depth)


def test_other_bad_times():
    with pytest.raises(ValueError, match="u0 must be > 0"):
        mode_time(1.0, 0.0, 0.5)
    with pytest.raises(ValueError, match="lr must be > 0"):
        mode_time(1.0, 0.1, 0.5, lr=0.0)
    with pytest.raises(ValueError, match="depth must be ≥ 1"):
        mode_time_infinite(1.0, 0.1, 0.5, depth=0)
    with pytest.raises(ValueError, match="a0 \\+ b0 must not be 0"):
        unbalanced_time(0.3, -0.3, 1.0, 0.5)
    with pytest.raises(ValueError, match="between u0 and s"):
        unbalanced_time(0.3, 0.3, 1.0, 1.5)
    with pytest.raises(ValueError, match="s must be > 0"):
        unbalanced_curve(1.0, 0.3, 0.3, 0.0)
    with pytest.raises(ValueError, match="depth counts weight layers"):
        max_stable_lr(1.0, math.inf)
    with pytest.raises(ValueError, match="s_max must be > 0"):
        optimal_lr(0.0, 2)


# --- fast paths against the slow twin ------------------------------------------------------------


def twin(t, s, u0):
    """Two layers, one value at a time in extended precision: no blocks, grids or tables."""
    t, s, u0 = (np.asarray(x, dtype=np.longdouble) for x in (t, s, u0))
    x = np.exp(-2 * s[:, None] * t)
    undriven = s == 0
    s = np.where(undriven, np.longdouble(1), s)
    pull = np.where(undriven[:, None], 2 * t, -np.expm1(-2 * s[:, None] * t) / s[:, None])
    x = np.where(undriven[:, None], np.longdouble(1), x)
    started = np.where(u0 == 0, np.longdouble(1), u0)[:, None]
    u = started / (x + started * pull)
    return np.where(u0[:, None] == 0, 0, u).astype(np.float64)


TIMES = {
    "equal": np.linspace(0, 40, 3000),
    "shifted": np.linspace(3, 17, 1501),
    "whole": np.arange(64.0),
    "short": np.linspace(0, 9, 63),
    "odd": np.linspace(0, 9, 1009),
    "huge": np.linspace(0, 1e12, 777),
    "all the same": np.full(100, 2.5),
    "repeated": np.repeat(np.linspace(0, 9, 50), 3),
    "decreasing": np.linspace(9, 0, 500),
    "shuffled": np.random.default_rng(0).permutation(np.linspace(0, 9, 500)),
    "logarithmic": np.logspace(-6, 6, 20_001),
    "one off": np.linspace(0, 9, 500) + 1e-6 * (np.arange(500) == 250),
}


@pytest.mark.parametrize("name", TIMES)
def test_every_path_agrees_with_the_twin(name):
    t = TIMES[name]
    s = np.concatenate([np.linspace(0.05, 3.0, 40), [1.0, 1.0, 700.0, 1e-9, 1e9, 2.0]])
    u0 = np.concatenate([np.full(40, 1e-3), [0.999999, 1e-6, 1e-4, 1e-12, 1e4, 1.0]])
    exact = twin(t, s, u0)
    found = mode_curve(t, s, u0).numpy()
    np.testing.assert_allclose(found, exact, rtol=2e-14)
    out = torch.full(exact.shape, math.nan, dtype=torch.float64)
    assert np.array_equal(mode_curve(t, s, u0, out=out).numpy(), found)
    kinds = np.array([1.0, 0.0, 1.0, 1.0, 0.5]), np.array([0.01, 0.7, 0.0, 1.0, 30.0])
    np.testing.assert_allclose(mode_curve(t, *kinds).numpy(), twin(t, *kinds), rtol=2e-14)


@pytest.mark.parametrize("name", TIMES)
def test_single_precision_is_within_a_millionth(name):
    """Against the twin at the float32 values themselves."""
    t = torch.from_numpy(TIMES[name]).float()
    s = torch.cat([torch.linspace(0.05, 3.0, 40), torch.tensor([1.0, 1.0, 700.0, 1e-9, 1e9])])
    u0 = torch.cat([torch.full((40,), 1e-3), torch.tensor([0.99999, 1e-30, 1e-4, 1e-12, 1e4])])
    for strengths, starts in ((s, u0), (s[:40], u0[:40])):  # outside and inside the grid's range
        found = mode_curve(t, strengths, starts)
        assert found.dtype is torch.float32
        error = np.abs(found.double().numpy() - twin(t, strengths, starts))
        assert (error / strengths.double().numpy()[:, None]).max() < 1e-6


def test_extreme_starts_on_a_grid():
    """Where a factor of the grid would overflow or underflow, and right before."""
    t = np.linspace(0, 800, 2000)
    for part in (1e-300, 1e-261, 1e-259, 1e-200, 1e-100):
        s = np.array([1.0, 0.5, 2e-3])
        np.testing.assert_allclose(
            mode_curve(t, s, part * s).numpy(), twin(t, s, part * s), rtol=1e-12, atol=0
        )
    for scale in (1e-40, 1e-30, 1e30, 1e40):
        s = scale * np.array([1.0, 0.5])
        np.testing.assert_allclose(
            mode_curve(t / scale, s, 1e-3 * s).numpy(), twin(t / scale, s, 1e-3 * s), rtol=5e-14
        )


def test_many_modes_on_a_grid():
    """More rows than share their factors, more than a block, times left over from the tiles."""
    t, s = np.linspace(0, 6, 1003), np.linspace(0.5, 4, 1100)
    found = mode_curve(t, s, 1e-4).numpy()
    np.testing.assert_allclose(found, twin(t, s, np.full(1100, 1e-4)), rtol=2e-14)
    own = np.tile(t, (1100, 1))
    np.testing.assert_allclose(mode_curve(own, s, 1e-4).numpy(), found, rtol=2e-14)


@pytest.mark.parametrize("depth", [3, 5, math.inf])
@pytest.mark.parametrize("u0", [0.01, 7.0])
def test_deep_modes_that_converge_are_cut_right(depth, u0):
    """Sorted times, where converged parts are filled, against the same times shuffled."""
    t = np.concatenate([np.linspace(0, 300, 4000), np.logspace(3, 9, 50)])
    s = np.linspace(0.1, 3, 30)
    order = np.random.default_rng(1).permutation(len(t))
    starts = u0 * s
    found = mode_curve(t, s, starts, depth)
    shuffled = mode_curve(t[order], s, starts, depth)
    torch.testing.assert_close(found[:, order], shuffled, rtol=1e-14, atol=0)
    assert torch.equal(found[:, -1], torch.from_numpy(s))

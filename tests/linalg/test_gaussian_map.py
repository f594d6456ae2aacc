"""Length maps, their fixed points and the edge of chaos."""

import math

import pytest
import torch
from scipy.integrate import quad
from torch import nn

from stiefel.linalg.gaussian_map import ACTIVATIONS, critical_gain, length_map, q_fixed_point, slope


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def gauss(function):
    weight = math.sqrt(2 * math.pi)
    return sum(
        quad(lambda z: function(z) * math.exp(-z * z / 2) / weight, *ends, epsabs=1e-13)[0]
        for ends in ((-12, 0), (0, 12))
    )


def test_values_of_the_sheet():
    found = length_map("tanh", f64(1.0, 0.5))
    torch.testing.assert_close(found, f64(0.3942944904, 0.2736763079), rtol=0, atol=6e-11)
    gains = f64(1.05, 1.1, 1.5, 2.0)
    exact = f64(0.05325049, 0.11274989, 0.79335404, 2.12147357)
    torch.testing.assert_close(q_fixed_point("tanh", gains), exact, rtol=0, atol=6e-9)
    assert critical_gain("tanh") == pytest.approx(1.0, abs=1e-12)
    assert critical_gain("relu") == pytest.approx(math.sqrt(2), abs=1e-12)
    assert critical_gain("linear") == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", ["tanh", "relu", "elu", "gelu", "sigmoid", "softplus", "erf"])
@pytest.mark.parametrize("q", [0.01, 1.0, 9.0])
def test_expectations_are_their_integrals(name, q):
    phi = ACTIVATIONS[name]
    exact = gauss(lambda z: float(phi(f64(math.sqrt(q) * z))) ** 2)
    assert float(length_map(name, f64(q)[0])) == pytest.approx(exact, rel=1e-9)
    step = 1e-5

    def derivative(z):
        x = f64(math.sqrt(q) * z)
        return float((phi(x + step) - phi(x - step)) / (2 * step)) ** 2

    assert float(slope(name, f64(q)[0])) == pytest.approx(gauss(derivative), rel=2e-5)


def test_fixed_points_are_where_iteration_ends():
    for phi, gain in (("tanh", 1.3), ("erf", 1.2), ("sigmoid", 2.0), ("relu", 1.2), ("tanh", 0.9)):
        q = f64(1.0)
        for _ in range(400):
            q = length_map(phi, q, gain)
        torch.testing.assert_close(q_fixed_point(phi, gain), q[0], rtol=1e-9, atol=1e-12)


def test_fixed_points_have_gradients():
    gains = f64(1.2, 1.8, 0.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: q_fixed_point("tanh", g), (gains,), atol=1e-4)
    q = f64(0.3, 2.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, g: length_map("tanh", q, g), (q, gains[:2]))


@pytest.mark.parametrize("name", ["tanh", "erf", "softsign", "hardtanh", "elu", "selu", "sigmoid"])
def test_perturbations_die_out_below_the_critical_gain_only(name):
    edge = critical_gain(name)

    def growth(gain, q):
        return float(gain**2 * slope(name, q))

    # Where lengths die out the slope at rest counts.
    below = q_fixed_point(name, 0.99 * edge).clamp_min(1e-20)
    assert 0.9 < growth(0.99 * edge, below) < 1
    if name == "sigmoid":  # no rest: perturbations grow around the new fixed point
        assert growth(1.01 * edge, q_fixed_point(name, 1.01 * edge)) > 1
    else:  # rest is unstable, and lengths settle at a new fixed point
        assert growth(1.01 * edge, f64(1e-20)[0]) > 1
        assert float(q_fixed_point(name, 1.01 * edge)) > 1e-6


def test_any_callable_is_an_activation():
    assert critical_gain(nn.LeakyReLU(0.5)) == pytest.approx(math.sqrt(2 / 1.25))
    assert critical_gain(lambda x: 3 * x.tanh()) == pytest.approx(1 / 3)
    assert critical_gain(nn.Tanh()) == critical_gain("tanh")


def test_what_is_refused():
    with pytest.raises(ValueError, match="phi must be one of"):
        critical_gain("tan")
    for name in ("gelu", "silu"):
        with pytest.raises(ValueError, match="no edge of chaos"):
            critical_gain(name)
    with pytest.raises(ValueError, match="no gain between"):
        critical_gain("softplus")
    with pytest.raises(ValueError, match="keeps every length"):
        q_fixed_point("relu", math.sqrt(2))
    with pytest.raises(ValueError, match="grow without bound"):
        q_fixed_point("relu", 1.5)
    for gain in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="g must be positive"):
            q_fixed_point("tanh", gain)

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.nn import s4d_init
from stiefel.nn.s4d_init import INITS, discretize

EXACT_IMAGINARY = {
    "lin": [0.0, math.pi, 2 * math.pi, 3 * math.pi],
    "inv": [0.3637827271, 1.5278874537, 4.2441318158, 17.8253536263],
    "legs": [0.4274887123, 1.9577941509, 5.3542085150, 19.8574103710],
    "real": [0.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("kind", EXACT_IMAGINARY)
def test_exact_values_at_eight(kind):
    a, b = s4d_init(kind, 8)
    np.testing.assert_allclose(a.imag.numpy(), EXACT_IMAGINARY[kind], rtol=1e-9, atol=1e-12)
    real = [-1, -2, -3, -4] if kind == "real" else [-0.5] * 4
    np.testing.assert_array_equal(a.real.numpy(), real)
    if kind != "legs":
        assert (b == 1).all()
    assert a.dtype == b.dtype == torch.complex128


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (2, [math.sqrt(2)]),
        (4, [0.966931169884, 2.658015070068]),
        (8, [0.799463587546, 1.174959947250, 1.843868910526, 5.155625523187]),
    ],
)
def test_size_of_the_legs_inputs(n, sizes):
    _, b = s4d_init("legs", n)
    np.testing.assert_allclose(b.abs().numpy(), sizes, rtol=1e-11)
    # Both halves together: the whole of V* B.
    assert float(2 * b.abs().square().sum()) == pytest.approx(n * n)


def test_official_clip_shortens_the_fastest_mode():
    _, b = s4d_init("legs", 8, official_clip=True)
    assert float(b.abs()[-1]) == pytest.approx(2.004, abs=1e-3)
    assert float(b.imag.abs().max()) == 2.0


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(INITS), half=st.integers(1, 24))
def test_every_start_is_stable_and_sorted(kind, half):
    a, b = s4d_init(kind, 2 * half, generator=torch.Generator().manual_seed(half))
    assert a.shape == b.shape == (half,)
    assert (a.real < 0).all()
    assert (a.imag.diff() >= 0).all()
    assert (a.imag >= 0).all()


def test_scales_act_on_their_part():
    a, _ = s4d_init("inv", 8)
    scaled, _ = s4d_init("inv", 8, scale_real=2.0, scale_imag=0.01)
    torch.testing.assert_close(scaled, torch.complex(2 * a.real, 0.01 * a.imag))


def test_random_start_follows_its_generator():
    first, second = (
        s4d_init("random", 16, generator=torch.Generator().manual_seed(s))[0] for s in (1, 2)
    )
    again, _ = s4d_init("random", 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("legz", 8), "legs, lin, inv, real, random, got 'legz'"),
        (("lin", 7), "even and at least 2"),
        (("lin", 0), "even and at least 2"),
    ],
)
def test_bad_starts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        s4d_init(*arguments)


@pytest.mark.parametrize("scale", [{"scale_real": 0.0}, {"scale_imag": math.inf}])
def test_bad_scales_are_refused(scale):
    with pytest.raises(ValueError, match=next(iter(scale))):
        s4d_init("lin", 8, **scale)


def system(n=4):
    a, _ = s4d_init("lin", n)
    return a, torch.complex(torch.ones(n // 2), torch.arange(n // 2) / 2).to(a.dtype)


def step(a, b, dt, disc):
    log_a, b_bar = discretize(a, b, torch.tensor(dt, dtype=torch.float64), disc)
    return log_a.exp(), b_bar


def test_zoh_is_exact_for_an_input_held_constant():
    a, b = system()
    a_bar, b_bar = step(a, b, 0.3, "zoh")
    for n in range(2):
        # exp of [[a, b], [0, 0]] holds both in its first row.
        block = scipy.linalg.expm(0.3 * np.array([[complex(a[n]), complex(b[n])], [0, 0]]))
        assert complex(a_bar[n]) == pytest.approx(block[0, 0])
        assert complex(b_bar[n]) == pytest.approx(block[0, 1])


def test_two_zoh_steps_are_one_of_twice_the_size():
    a, b = system()
    once, twice = step(a, b, 0.1, "zoh"), step(a, b, 0.2, "zoh")
    torch.testing.assert_close(once[0] ** 2, twice[0])
    torch.testing.assert_close(once[0] * once[1] + once[1], twice[1])


def test_bilinear_follows_its_formula():
    a, b = system()
    a_bar, b_bar = step(a, b, 0.1, "bilinear")
    torch.testing.assert_close(a_bar, (1 + 0.05 * a) / (1 - 0.05 * a))
    torch.testing.assert_close(b_bar, 0.1 * b / (1 - 0.05 * a))


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_tiny_and_zero_exponents_lose_no_digit(disc):
    a = torch.tensor([0.0, -1e-14, -1e-9 + 1e-9j, -1e-4j], dtype=torch.complex128)
    _, b_bar = discretize(a, torch.ones_like(a), torch.tensor(0.5, dtype=torch.float64), disc)
    assert float(((b_bar / 0.5) - 1 - 0.25 * a).abs().max()) < 1e-9


def test_a_pole_that_one_bilinear_step_kills_has_no_nan():
    a = torch.tensor([-20.0 + 0j], dtype=torch.complex128)
    log_a, _ = discretize(a, a, torch.tensor(0.1, dtype=torch.float64), "bilinear")
    powers = (log_a * torch.arange(4)).exp()
    torch.testing.assert_close(powers.real, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_gradients_of_the_discretisation(disc):
    a = torch.tensor([-0.5 + 3j, -1e-3 + 1e-4j, -4 - 1j], dtype=torch.complex128)
    inputs = (a, torch.ones_like(a) * (1 - 2j), torch.full((3,), 0.2, dtype=torch.float64))
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: discretize(*x, disc), leaves)


def test_unknown_rule_is_refused():
    a, b = system()
    with pytest.raises(ValueError, match="zoh, bilinear, got 'euler'"):
        discretize(a, b, torch.tensor(0.1), "euler")

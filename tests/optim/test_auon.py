"""AuON and Hybrid-AuON: published values, what cosh adds, and gradients of any scale."""

import math

import pytest
import torch
from test_exact import gradient
from torch import nn

from stiefel.linalg import newton_schulz
from stiefel.optim import Muon
from stiefel.optim.auon import AuON, HybridAuON, auon_direction

BOTH = pytest.mark.parametrize("cls", [AuON, HybridAuON])
SCALE_FREE = pytest.mark.parametrize(
    ("cls", "variant"), [(AuON, "paper"), (HybridAuON, "normalized"), (HybridAuON, "paper")]
)


def three(cls, rows, cols, **settings):
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(cols, dtype=torch.float64)
    weight = nn.Parameter(0.1 * torch.sin(1 + i * cols + j))
    optimizer = cls([weight], lr=0.1, **settings)
    for t in range(3):
        weight.grad = gradient(rows, cols, t)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def assert_exact(actual, expected, tolerance=1.5e-8):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def rms_cosh(x, gamma=1.0):
    """r by its definition."""
    return (gamma * x / x.norm()).cosh().square().mean().sqrt()


def ahead(weight, state):
    return torch.lerp(gradient(*weight.shape, 2), state["momentum_buffer"], 0.95)


def test_auon_paper():
    weight, state = three(AuON, 4, 3)
    assert_exact(
        weight,
        [
            [-0.00242837, 0.09417296, 0.10564856],
            [-0.07243704, 0.04088640, 0.01531105],
            [0.15723522, 0.14218842, -0.09399653],
            [0.08237672, -0.22207481, 0.03960895],
        ],
        tolerance=1e-7,  # the printed values have 1e-7 beside norms of about 0.3
    )
    assert math.isclose(rms_cosh(ahead(weight, state)), 1.0426458802, abs_tol=1e-7)


def test_auon_code():
    weight, state = three(AuON, 4, 3, variant="code", gamma=1.5)
    assert_exact(weight[0], [0.06184468, 0.09342538, 0.04023195])
    assert_exact(weight[3], [-0.01694246, -0.13397836, -0.02708476])
    assert math.isclose(rms_cosh(ahead(weight, state), 1.5), 1.0986744768, abs_tol=1e-7)


def test_hybrid_normalized():
    weight, state = three(HybridAuON, 4, 3)
    assert_exact(weight[0], [0.00154164, 0.09358167, 0.09933197])
    x = newton_schulz(ahead(weight, state), 1)
    assert math.isclose(rms_cosh(x), 1.0426504845, abs_tol=1e-7)


def test_hybrid_paper():
    weight, state = three(HybridAuON, 4, 3, variant="paper")
    assert_exact(
        weight,
        [
            [-0.03787206, 0.09489328, 0.14006541],
            [-0.01880164, 0.13828459, 0.07650910],
            [0.20108864, 0.16075015, -0.14191270],
            [0.14816686, -0.23056541, 0.08566484],
        ],
        tolerance=1e-7,
    )
    x = newton_schulz(ahead(weight, state), 1)
    assert math.isclose(x.cosh().square().mean(), 1.3786565608, abs_tol=1e-6)
    weight, _ = three(HybridAuON, 3, 4, variant="paper")
    assert_exact(weight[0], [-0.02152459, 0.14018806, 0.13136316, 0.09974963], tolerance=1e-7)


def test_hybrid_code_is_muon_up_to_a_factor():
    weight, state = three(HybridAuON, 4, 3, variant="code", gamma=1.5)
    assert_exact(weight[0], [-0.02289184, 0.09306096, 0.12201955], tolerance=3e-7)
    x = newton_schulz(ahead(weight, state), 5)
    assert math.isclose(rms_cosh(x, 1.5), 1.1002994334, abs_tol=1e-7)
    steps = []
    for cls, kwargs in ((HybridAuON, {"variant": "code", "gamma": 1.5}), (Muon, {"ns": "classic"})):
        w = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        w.grad = gradient(4, 3, 0)
        cls([w], lr=0.1, weight_decay=0.0, **kwargs).step()
        steps.append(w.detach())
    ratio = steps[0] / steps[1]
    r = rms_cosh(newton_schulz(gradient(4, 3, 0), 5), 1.5)
    torch.testing.assert_close(ratio, (1 / (r * (4 / 3) ** 0.5)).expand(4, 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 1.5, 10.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_direction_is_the_formula_per_matrix(gamma, dtype, generator):
    u = torch.randn(3, 6, 5, generator=generator).mul_(torch.tensor([1e-3, 1.0, 50])[:, None, None])
    u = u.to(dtype)
    before = u.clone()
    expected = []
    for matrix in u.double():
        x = matrix / matrix.norm()
        expected.append(x / (gamma * x).cosh().square().mean().sqrt())
    actual = auon_direction(u, gamma)
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), torch.stack(expected), rtol=0, atol=2 * torch.finfo(dtype).eps + 2e-8
    )
    assert torch.equal(u, before)


def test_direction_is_bounded_and_zero_for_zero(generator):
    u = torch.randn(4, 8, 6, dtype=torch.float64, generator=generator)
    u[0] = 0
    d = auon_direction(u, 2.0)
    assert torch.equal(d[0], u[0])
    assert (d[1:].norm(dim=(1, 2)) < 1).all()
    assert (torch.linalg.matrix_norm(d, 2) < 1).all()
    assert auon_direction(torch.zeros(0, 3)).shape == (0, 3)


def one_step(cls, gradient, *, lr=0.1, **settings):
    weight = nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient
    cls([weight], lr=lr, **settings).step()
    return weight.detach()


@pytest.mark.parametrize("gamma", [1.0, 1.5, 10.0])
@pytest.mark.parametrize("kind", ["flat", "spiky", "one entry", "one row"])
@pytest.mark.parametrize("variant", ["paper", "code"])
def test_series_or_not_the_step_is_the_formula(gamma, kind, variant, generator):
    """Whichever way r is computed, to 1e-7."""
    g = torch.randn(64, 80, dtype=torch.float64, generator=generator)
    if kind == "spiky":
        g[3, 5] = 60.0
    elif kind != "flat":
        g[1:] = 0
        if kind == "one entry":
            g[:, 1:] = 0
    u = (0.05 + 0.95 * 0.05) * g
    r = rms_cosh(u, gamma)
    expected = -0.1 * (u / u.norm() if variant == "paper" else u) / r
    actual = one_step(AuON, g, gamma=gamma, variant=variant)
    torch.testing.assert_close(actual, expected, rtol=1.2e-7, atol=1e-300)


def test_it_is_normalised_momentum_for_layers_of_practical_size(generator):
    g = torch.randn(96, 96, dtype=torch.float64, generator=generator)
    step = one_step(AuON, g)
    control = -0.1 * g / g.norm()
    difference = (step - control).norm() / control.norm()
    assert 5e-5 < difference < 6e-5  # r − 1 = 1/(2·96²)


@SCALE_FREE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_scale_of_gradients_gives_the_same_step(cls, variant, dtype, generator):
    g = torch.randn(12, 7, generator=generator).to(dtype)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    expected = one_step(cls, g, variant=variant)
    scales = [2.0**-26, 2.0**66, 2.0**-90, 2.0**120]
    if dtype == torch.float64:
        scales += [2.0**-100, 2.0**400]
    for scale in scales:
        actual = one_step(cls, g * scale, variant=variant)
        assert (actual - expected).norm() < tolerance * expected.norm(), scale


def test_gradients_among_the_subnormal_numbers(generator):
    """0.1/‖U‖ is beyond float32 here."""
    g = torch.randn(12, 7, generator=generator)
    expected = one_step(AuON, g)
    assert (one_step(AuON, g * 2.0**-136) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("cls", [AuON, HybridAuON])
@pytest.mark.parametrize("variant", ["first", "paper"])
def test_a_single_outlier(cls, variant, scale, dtype):
    g = torch.full((40, 30), 1e-6 * scale, dtype=dtype)
    g[7, 3] = scale
    variant = "paper" if cls is AuON or variant == "paper" else "normalized"
    step = one_step(cls, g, variant=variant)
    assert torch.isfinite(step).all()
    assert 0 < step.double().norm() <= 0.1 * (40 / 30) ** 0.5 * (1 + torch.finfo(dtype).eps)
    assert step.abs().argmax() == 7 * 30 + 3


@BOTH
@pytest.mark.parametrize("variant", ["paper", "code"])
def test_zero_gradients_give_zero_steps(cls, variant):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert not one_step(cls, torch.zeros(5, 4, dtype=dtype), variant=variant).any()


@BOTH
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (1, 8)])
def test_bound_of_a_step(cls, shape, generator):
    g = torch.randn(shape, dtype=torch.float64, generator=generator)
    size = 0.1 * max(1, shape[0] / shape[1]) ** 0.5
    norm = one_step(cls, g).norm()
    assert 0.9 * size < norm <= size
    if cls is HybridAuON:
        paper = one_step(cls, g, variant="paper").norm()
        assert 0.5 * size < paper <= 3.4445 * size


def test_a_fixed_direction_is_sgd(generator):
    g = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    weight = nn.Parameter(torch.zeros_like(g))
    optimizer = AuON([weight])
    for t in range(4):
        weight.grad = g * (t + 1)
        optimizer.step()
    size = 0.1 * (6 / 5) ** 0.5 / rms_cosh(g)
    torch.testing.assert_close(weight.detach(), -4 * size * g / g.norm(), rtol=1e-7, atol=0)


def test_hybrid_raises_small_singular_values():
    """One iteration: σ → aσ + bσ³ + cσ⁵ with Frobenius norm one."""
    s = torch.tensor([0.995, 0.09, 0.04], dtype=torch.float64)
    s /= s.norm()
    step = one_step(HybridAuON, torch.diag(s), variant="paper", lr=1.0)
    image = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    got = -step.diagonal()
    torch.testing.assert_close(got / got[0], image / image[0], rtol=1e-9, atol=0)


def test_more_iterations_on_request(generator):
    g = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    x = newton_schulz(g, 3, eps=0.0)
    expected = -0.1 * x / x.norm() / rms_cosh(x)
    torch.testing.assert_close(one_step(HybridAuON, g, ns_steps=3), expected, rtol=1e-6, atol=0)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nonfinite_gradients(cls, dtype):
    weights = [nn.Parameter(torch.ones(4, 3, dtype=dtype)) for _ in range(2)]
    for bad in (math.nan, math.inf):
        for w in weights:
            w.grad = torch.ones_like(w)
        weights[0].grad[1, 1] = bad
        with pytest.raises(FloatingPointError, match="parameter 0"):
            cls(weights).step()
        optimizer = cls(weights, nonfinite="skip")
        before = [w.detach().clone() for w in weights]
        with pytest.warns(RuntimeWarning, match="skipped"):
            optimizer.step()
        assert torch.equal(weights[0], before[0])
        assert not torch.equal(weights[1], before[1])
        free = [nn.Parameter(w.detach().clone()) for w in weights]
        for f, w in zip(free, weights, strict=True):
            f.grad = w.grad
        cls(free, nonfinite="propagate").step()
        assert free[0].isnan().any()
        assert torch.isfinite(free[1]).all()


@BOTH
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"gamma": 0.0}, r"gamma must be in \(0, 10\], got 0.0"),
        ({"gamma": 10.1}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"lr": -1.0}, "lr must be finite and ≥ 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"variant": "best"}, "variant must be one of .*'best'"),
    ],
)
def test_bad_settings(cls, settings, match):
    with pytest.raises(ValueError, match=match):
        cls([nn.Parameter(torch.ones(3, 2))], **settings)


@BOTH
def test_vectors_are_refused_by_name(cls):
    with pytest.raises(ValueError, match=r"'bias' has shape \(3,\)"):
        cls([("bias", nn.Parameter(torch.ones(3)))])


@pytest.mark.parametrize("steps", [0, -1])
def test_hybrid_refuses_bad_steps(steps):
    with pytest.raises(ValueError, match="ns_steps must be an integer"):
        HybridAuON([nn.Parameter(torch.ones(3, 2))], ns_steps=steps)


def test_direction_refuses_bad_gamma():
    with pytest.raises(ValueError, match="gamma"):
        auon_direction(torch.ones(2, 2), 11.0)

"""What is known of orthogonal convolutions beside the table: traps, minima, SOC."""

import math

import pytest
import torch
from conv_twins import dense, det_kernel, distance
from torch import nn

from stiefel.linalg.block_conv import block_kernel, block_plan
from stiefel.nn import (
    OrthogonalConv2d,
    certified_lipschitz,
    conv_singular_values,
    lorth,
    lorth_alpha,
    orthogonal_conv_exists,
)
from stiefel.nn.orthogonal_conv import start_factors

DOUBLE = {"dtype": torch.float64}


def drawn(m, c, k, s, seed):
    """An orthogonal kernel."""
    plan = block_plan(m, c, (k, k), (s, s))
    return block_kernel(plan, *start_factors(plan, 1, torch.Generator().manual_seed(seed)))[0]


def older_penalty(kernel, stride=2, padding=1):
    """The script of Wang et al. (CVPR 2020), with its defaults: un-squared norm, fixed padding."""
    a = nn.functional.conv2d(kernel, kernel, stride=stride, padding=padding)
    target = torch.zeros_like(a)
    target[:, :, a.shape[-2] // 2, a.shape[-1] // 2] = torch.eye(len(kernel))
    return float((a - target).norm())


@pytest.mark.parametrize(
    ("kernel", "stride", "value"),
    [
        (torch.ones(1, 1, 3, 3, **DOUBLE) / 3, 1, 361 / 81 - 1),
        (torch.tensor([[[0.5, 0.5, 0.0]]], **DOUBLE), 1, 0.375),
        (torch.tensor([[[1.0, 0, 1]]], **DOUBLE) / math.sqrt(2), 1, 0.5),
        (torch.tensor([[[1.0, 1, 0]], [[1, -1, 0]]], **DOUBLE) / 2, 1, 0.0),
        (torch.tensor([[[1.0, 1, 0]], [[1, -1, 0]]], **DOUBLE) / math.sqrt(2), 2, 0.0),
    ],
)
def test_closed_forms_to_rounding(kernel, stride, value):
    assert float(lorth(kernel, stride)) == pytest.approx(value, abs=1e-14)


def test_the_small_image_on_which_the_identity_is_false():
    """M, C, k, S, N = 3, 2, 3, 1, 4: 2k − 1 is 5."""
    kernel = det_kernel(3, 2, 3)
    whole, small = (distance(dense(kernel, (n, n), 1))[0] for n in (5, 4))
    root = math.sqrt(float(lorth(kernel)))
    assert whole == pytest.approx(5 * root, rel=1e-12)
    assert small == pytest.approx(4.7027706, abs=1e-7)
    assert 4 * root == pytest.approx(4.1745049, abs=1e-7)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_fixed_padding_punishes_orthogonal_kernels(seed):
    """k = 3, S = 2: with padding 1 only odd lags are seen, none of which has to vanish."""
    kernel = drawn(8, 8, 3, 2, seed)
    assert float(lorth(kernel, 2)) < 1e-24
    assert 2.9 < older_penalty(kernel) < 3.3
    centre = torch.zeros(9, 9, 3, 3, **DOUBLE)
    centre[:, :, 1, 1] = torch.eye(9)
    assert float(lorth(centre, 2)) == 0
    assert older_penalty(centre) == 3
    # The padding of the definition: the same script sees nothing wrong.
    assert older_penalty(kernel, 2, 2) < 1e-12


def test_a_fixed_padding_misses_lags():
    """k = 3, S = 1: lags of 2 are not seen with padding 1."""
    corners = torch.zeros(1, 1, 3, 3, **DOUBLE)
    corners[0, 0, 0, 0] = corners[0, 0, 2, 2] = 1 / math.sqrt(2)
    assert older_penalty(corners, 1, 1) == pytest.approx(0, abs=1e-15)
    assert float(lorth(corners)) == pytest.approx(0.5, abs=1e-14)
    values = conv_singular_values(corners, 8)
    assert (float(values.min()), float(values.max())) == pytest.approx((0, math.sqrt(2)), abs=1e-12)


@pytest.mark.parametrize(
    ("numbers", "seed", "value", "span"),
    [((4, 4, 3, 1), 2, 7.47e-2, None), ((8, 2, 3, 2), 2, 0.2, (0, math.sqrt(1.6)))],
)
def test_local_minima_of_square_layers(numbers, seed, value, span):
    """Reached by descent, flat, and curved upwards: a minimum although an exact kernel exists."""
    m, c, k, s = numbers
    report = orthogonal_conv_exists(*numbers)
    assert (report.exists, report.case, report.minimum) == (True, "square", 0)
    start = torch.empty(m, c, k, k, **DOUBLE)
    nn.init.xavier_uniform_(start, generator=torch.Generator().manual_seed(seed))
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        lorth(x, s).backward()
        optimizer.step()
        schedule.step()
    x = x.detach()
    assert float(lorth(x, s)) == pytest.approx(value, rel=2e-3)
    copy = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(lorth(copy, s), copy)
    assert float(slope.norm()) < 1e-2
    curvature = torch.autograd.functional.hessian(lambda kernel: lorth(kernel, s), x)
    lowest = torch.linalg.eigvalsh(curvature.reshape(x.numel(), -1))[0]
    assert float(lowest) > -1e-2
    values = conv_singular_values(x, 8 * s, s)
    if span:
        assert (float(values.min()), float(values.max())) == pytest.approx(span, abs=2e-3)
    else:
        assert float(values.min()) < 0.1


def soc_kernel(weight, terms):
    """Σ_{t ≤ terms} Lᵗ/t! as one kernel, L = W − Wᵀ skew (channels swapped, taps flipped)."""
    skew = (weight - weight.transpose(0, 1).flip(2, 3)) / 2
    skew = 0.7 * skew / conv_singular_values(skew, 32).max()
    c, size = weight.shape[0], 2 * terms + 1
    total = torch.zeros(c, c, size, size, **DOUBLE)
    power = torch.zeros(c, c, 1, 1, **DOUBLE)
    power[:, :, 0, 0] = torch.eye(c)
    for t in range(terms + 1):
        edge = terms - t
        total += nn.functional.pad(power, [edge] * 4) / math.factorial(t)
        # A * (B * x): rows of `power` are images, convolved with the flipped, transposed kernel.
        power = nn.functional.conv2d(power, skew.transpose(0, 1).flip(2, 3), padding=2)
    return total, skew


@pytest.mark.parametrize("terms", [5, 12])
def test_skew_orthogonal_convolution(terms, generator):
    """SOC (Singla, Feizi 2021): the exponential of a skew convolution, cut off after T terms.

    An orthogonal kernel that none of our constructions made: L_orth and singular values must see
    the error of the series, and nothing else. Ours have no such error, on a kernel as small as W.
    """
    weight = torch.randn(4, 4, 3, 3, generator=generator, **DOUBLE)
    kernel, skew = soc_kernel(weight, terms)
    n = 7
    # Taps around the centre of the circle: a skew matrix.
    wide = nn.functional.pad(skew, (0, n - 3, 0, n - 3)).roll((-1, -1), (2, 3))
    centred = dense(wide, (n, n), 1)
    torch.testing.assert_close(centred, -centred.T, rtol=0, atol=1e-14)
    exact = torch.linalg.matrix_exp(centred)
    series = sum(
        torch.linalg.matrix_power(centred, t) / math.factorial(t) for t in range(terms + 1)
    )
    cut = float(torch.linalg.matrix_norm(exact - series, 2))
    assert cut <= 0.7 ** (terms + 1) / math.factorial(terms + 1) * math.exp(0.7)
    values = conv_singular_values(kernel, n)  # the kernel wraps around this image
    torch.testing.assert_close(
        values.flatten().sort().values,
        torch.linalg.svdvals(series).flip(0),
        rtol=0,
        atol=1e-12,
    )
    error = float((conv_singular_values(kernel, 32) - 1).abs().max())
    assert error <= 0.7 ** (terms + 1) / math.factorial(terms + 1) * math.exp(0.7)
    value = float(lorth(kernel))
    if terms == 5:
        assert error > 1e-5
        assert 0 < value < 1e-6
    assert (2 * error) ** 2 <= 1.01 * lorth_alpha(kernel.shape) * value + 1e-20
    ours = OrthogonalConv2d(4, 4, 3, generator=generator, **DOUBLE)
    assert ours.weight.shape == (4, 4, 3, 3)
    assert kernel.shape[2:] == (2 * terms + 1, 2 * terms + 1)
    best = float((conv_singular_values(ours.weight.detach(), 32) - 1).abs().max())
    assert best < 1e-13
    assert best <= max(error, 1e-13)


def test_a_deep_net_keeps_norms_where_layers_are_orthogonal(generator):
    """Twelve square layers: norms of the input come out, and the certificate says 1."""
    model = nn.Sequential(
        *(OrthogonalConv2d(4, 4, 3, bias=False, generator=generator, **DOUBLE) for _ in range(12))
    )
    x = torch.randn(3, 4, 6, 6, generator=generator, **DOUBLE)
    with torch.no_grad():
        torch.testing.assert_close(model(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    assert certified_lipschitz(model, (4, 6, 6)) == pytest.approx(1, abs=1e-12)

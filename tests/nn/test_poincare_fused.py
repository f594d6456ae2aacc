"""The layers' single functions: their parts, precision, memory, and where they could go wrong."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from stiefel.nn.poincare import (
    PoincareBall,
    PoincareBatchNorm2d,
    PoincareConv2d,
    PoincareLinear,
    dist,
    expmap0,
    midpoint,
    poincare_conv2d,
    poincare_linear_tangent,
)
from stiefel.nn.poincare import _fully_connected as layers
from stiefel.nn.poincare import _midpoint_norm as norms
from stiefel.nn.poincare._radial import asinh, asinhc, lift, lift_slopes, radial_slope

DOUBLE = torch.float64


def randn(g, *shape):
    return torch.randn(*shape, dtype=DOUBLE, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_a_squared_length(dtype):
    eps = torch.finfo(dtype).eps
    low = torch.logspace(-12, 8, 60, dtype=dtype)
    x = low.double()
    for sign in (1, -1):
        torch.testing.assert_close(
            asinh(sign * low).double(), torch.asinh(sign * x), rtol=6 * eps, atol=0
        )
    # Times x the slopes are exact to rounding of the values, also near 0.
    for limit in (math.inf, 3.0):
        y = x.clone().requires_grad_()
        value = torch.asinh(y.sqrt()).clamp_max(limit) / y.sqrt()
        found = asinhc(low, limit)
        torch.testing.assert_close(found.double(), value.detach(), rtol=6 * eps, atol=0)
        (slope,) = torch.autograd.grad(value.sum(), y)
        found = radial_slope(low, found, limit).double() * x
        torch.testing.assert_close(found, 2 * slope * x, rtol=40 * eps, atol=4 * eps)
    low = torch.logspace(-12, 2, 60, dtype=dtype)
    y = low.double().requires_grad_()
    near = y.sqrt().clamp_max(4.0)
    found = lift_slopes(low, *lift(low, 4.0), 4.0)
    for f, slope in zip((near.sinh() / y.sqrt(), near.cosh()), found, strict=True):
        (exact,) = torch.autograd.grad(f.sum(), y, retain_graph=True)
        wanted = 2 * exact * y.detach()
        torch.testing.assert_close(slope * y.detach(), wanted, rtol=99 * eps, atol=9 * eps)


GEOMETRIES = [
    ((3, 2), (2, 1), (0, 1), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (1, 2), (2, 3), (2, 1)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradients_of_every_geometry(geometry, generator):
    taps = geometry[0][0] * geometry[0][1]
    u, z = randn(generator, 2, 2, 4, 3), randn(generator, 2 * taps, 2) / 2
    r, c = randn(generator, 2), torch.tensor(0.7, dtype=DOUBLE)
    arguments = [x.requires_grad_() for x in (u, z, r, c)]
    for clip in (None, "official"):
        assert gradcheck(lambda *a, clip=clip: poincare_conv2d(*a, *geometry, clip), arguments)
    for index, x in enumerate(arguments):  # one of them alone
        some = [y.detach() for y in arguments]
        some[index] = x
        assert gradcheck(lambda *a: poincare_conv2d(*a, *geometry), some)


def test_clip_differentiated_twice(generator):
    u, z, r = 5 * randn(generator, 3, 4), randn(generator, 4, 5), randn(generator, 5)
    u[0] /= 20
    arguments = [x.requires_grad_() for x in (u, z, r)]
    assert gradgradcheck(lambda *a: poincare_linear_tangent(*a, 0.7, "official"), arguments)


@pytest.mark.parametrize("size", [0, 1e-12, 1e-3, 1, 3])
def test_float32_gradients_are_those_of_float64(size, generator):
    found, weights = {}, torch.linspace(-1, 2, 96, dtype=DOUBLE).reshape(6, 4, 2, 2)
    start = randn(generator, 6, 4, 2, 2), randn(generator, 36, 3) / 3, 0.3 * randn(generator, 3)
    shift = randn(generator, 1, 4, 1, 1)
    for dtype in (torch.float32, DOUBLE):
        ball = PoincareBall(0.3, learnable=True, dtype=dtype)
        conv = PoincareConv2d(4, 3, 3, ball, padding=1, dtype=dtype)
        norm = PoincareBatchNorm2d(4, ball, dtype=dtype)
        with torch.no_grad():
            conv.weight.copy_(start[1])
            conv.bias.copy_(start[2])
            norm.bias.copy_(shift.flatten() / 4)
        u = (size * (start[0] + shift)).to(dtype).requires_grad_()
        loss = (conv(u) * weights[:, :3].to(dtype)).sum()
        grads = torch.autograd.grad(loss, [u, conv.weight, conv.bias, ball.raw_c])
        if size >= 1e-3:
            loss = (norm(u) * weights.to(dtype)).sum()
            grads += torch.autograd.grad(loss, [u, norm.bias, norm.weight, ball.raw_c])
        found[dtype] = grads
    for low, high in zip(found[torch.float32], found[DOUBLE], strict=True):
        tolerance = 2e-4 * float(high.abs().max())
        torch.testing.assert_close(low.double(), high, rtol=0, atol=tolerance)


def test_norm_function_is_its_plain_twin(generator):
    u, weights = randn(generator, 3, 4, 5).requires_grad_(), randn(generator, 3, 4, 5)
    g, c = torch.tensor(1.7, dtype=DOUBLE), torch.tensor(0.4, dtype=DOUBLE)
    for bias in (torch.zeros(4, dtype=DOUBLE), randn(generator, 4)):
        arguments = [x.requires_grad_() for x in (u, g, bias, c)]
        fused, plain = norms.midpoint_norm(*arguments, 1e-6), norms._plain(*arguments, 1e-6)
        assert [x.requires_grad for x in fused] == [True, False, False]
        pairs = list(zip(fused, plain, strict=True))
        grads = [torch.autograd.grad((x[0] * weights).sum(), arguments) for x in (fused, plain)]
        for x, y in (*pairs, *zip(*grads, strict=True)):
            torch.testing.assert_close(x, y)
    rows = expmap0(u.detach().movedim(1, -1).flatten(0, 1), 0.4)
    mu = midpoint(rows, 0.4)
    torch.testing.assert_close(expmap0(fused[1].detach()[:, 0], 0.4), mu)
    torch.testing.assert_close(fused[2].detach(), dist(rows, mu, 0.4).square().mean())


def test_transport_keeps_lengths_and_is_the_identity_at_the_origin(generator):
    """D v is the spatial part of a tangent vector at beta: |D v|² − <beta, D v>²/beta₀² = |v|²."""
    mean, beta, v = (randn(generator, 4, 1) for _ in range(3))
    times = [(1 + x.square().sum()).sqrt().reshape(1, 1) for x in (mean, beta)]
    moved = norms._transport(mean, times[0], beta, times[1]) @ v
    length = moved.square().sum() - ((beta * moved).sum() / times[1]).square()
    torch.testing.assert_close(length, v.square().sum().reshape(1, 1))
    still = norms._transport(mean, times[0], 0 * beta, torch.ones(1, 1, dtype=DOUBLE))
    assert torch.equal(still, torch.eye(4, dtype=DOUBLE))


def kept(forward):
    """Bytes that a forward pass keeps, each storage once."""
    sizes, alive = {}, []

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive.append(forward())
    return sum(sizes.values())


def test_memory():
    """What is kept: of a convolution its input and three such tensors, of a norm two."""
    ball, u = PoincareBall(0.1), torch.randn(8, 16, 8, 8, requires_grad=True)
    one = u.numel() * 4
    conv, norm = PoincareConv2d(16, 16, 3, ball, padding=1), PoincareBatchNorm2d(16, ball)
    assert kept(lambda: conv(u)) < 5 * one
    assert kept(lambda: norm(u)) < 4 * one


def test_backward_under_autocast(generator):
    ball = PoincareBall(0.3)
    for layer in (PoincareConv2d(4, 4, 3, ball), PoincareBatchNorm2d(4, ball)):
        u = torch.randn(3, 4, 5, 5, generator=generator).requires_grad_()
        out = layer(u)
        (exact,) = torch.autograd.grad(out, u, torch.ones_like(out), retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = torch.autograd.grad(out, u, torch.ones_like(out))
        assert torch.equal(found, exact)


def test_empty_batches_and_strided_gradients(generator):
    ball = PoincareBall(0.3)
    conv, linear = PoincareConv2d(4, 3, 3, ball), PoincareLinear(4, 3, ball)
    assert conv(torch.empty(0, 4, 5, 5)).shape == (0, 3, 3, 3)
    assert linear(torch.empty(2, 0, 4)).shape == (2, 0, 3)
    u = torch.randn(2, 4, 5, 5, generator=generator).requires_grad_()
    g = torch.randn(2, 3, 3, 3, generator=generator)
    exact = torch.autograd.grad(conv(u), u, g)[0]
    for strided in (g.mT.contiguous().mT, g.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(torch.autograd.grad(conv(u), u, strided)[0], exact)
    images = u.detach().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv(images), conv(u))
    norm = PoincareBatchNorm2d(4, ball, track_running_stats=False)
    torch.testing.assert_close(norm(images), norm(u))
    x = torch.randn(5, 2, 4, generator=generator)
    assert linear(x).is_contiguous()
    torch.testing.assert_close(linear(x.mT.contiguous().mT), linear(x))


def test_outputs_can_be_changed_in_place(generator):
    """As ``nn.ReLU(inplace=True)`` does: nothing that is kept is the output."""
    ball = PoincareBall(0.3)
    conv, norm = PoincareConv2d(4, 4, 3, ball, padding=1), PoincareBatchNorm2d(4, ball)
    linear = PoincareLinear(4, 4, ball)
    images = torch.randn(3, 4, 5, 5, generator=generator).requires_grad_()
    rows = torch.randn(6, 4, generator=generator).requires_grad_()
    for layer, x in ((conv, images), (norm, images), (linear, rows)):
        exact = torch.autograd.grad(layer(x).relu().square().sum(), x)[0]
        found = torch.autograd.grad(layer(x).relu_().square().sum(), x)[0]
        torch.testing.assert_close(found, exact)


def test_curvature_that_stays_a_tensor(generator, monkeypatch):
    """On a GPU c is not looked at: everything has to work with it as a tensor."""
    ball = PoincareBall(0.3, learnable=True, dtype=DOUBLE)
    conv = PoincareConv2d(4, 4, 3, ball, padding=1, dtype=DOUBLE)
    norm = PoincareBatchNorm2d(4, ball, dtype=DOUBLE)
    linear = PoincareLinear(4, 4, ball, dtype=DOUBLE)
    images = randn(generator, 3, 4, 5, 5).requires_grad_()
    rows = randn(generator, 6, 4).requires_grad_()
    cases = [(conv, images), (norm, images), (linear, rows)]

    def results():
        outs = [layer(x) for layer, x in cases]
        grads = [
            torch.autograd.grad(y.pow(3).sum(), (x, *layer.parameters()))
            for y, (layer, x) in zip(outs, cases, strict=True)
        ]
        return outs, grads

    exact = results()
    for module in (layers, norms):
        monkeypatch.setattr(module, "number", lambda c: c)
    torch.testing.assert_close(results(), exact)

import copy
import math

import poincare_twins as twins
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from stiefel.nn.poincare import (
    PoincareBall,
    PoincareConv2d,
    PoincareLinear,
    beta_ratio,
    expmap0,
    logmap0,
    poincare_conv2d,
    poincare_linear_tangent,
)

DOUBLE = torch.float64
U = torch.tensor([0.3, 0.4], dtype=DOUBLE)
Z = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.4, -0.6]], dtype=DOUBLE)
BIAS = torch.tensor([0.1, -0.2, 0.05], dtype=DOUBLE)


def randn(g, *shape):
    return torch.randn(*shape, dtype=DOUBLE, generator=g)


def test_exact_values():
    close = {"rtol": 0, "atol": 2e-12}
    tangent = {1: (0.354590295068, 0.383743521087, -0.460159908408)}
    tangent[0.1] = (0.413816074824, 0.378587663600, -0.476276958861)
    for c, wanted in tangent.items():
        found = poincare_linear_tangent(U, Z, BIAS, c)
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=DOUBLE), **close)
    v, y = twins.fully_connected(U, Z, BIAS, 1)
    wanted = torch.tensor([0.963979711797, 0.980415971120, -1.149739897654], dtype=DOUBLE)
    torch.testing.assert_close(v, wanted, **close)
    wanted = torch.tensor([0.333139974756, 0.340524757929, -0.422331619804], dtype=DOUBLE)
    torch.testing.assert_close(y, wanted, **close)
    layer = PoincareLinear(2, 3, PoincareBall(1.0, dtype=DOUBLE), space="ball", dtype=DOUBLE)
    with torch.no_grad():
        layer.weight.copy_(Z)
        layer.bias.copy_(BIAS)
    torch.testing.assert_close(layer(U), wanted, **close)


def test_beta_ratios():
    for channels, wanted in (
        (1, 35 / 128),
        (3, 0.309962034225),
        (8, 0.324227367747),
        (16, 0.328739029590),
    ):
        assert beta_ratio(channels, 9) == pytest.approx(wanted, abs=1e-12)
    assert beta_ratio(5, 1) == 1
    assert beta_ratio(10**6, 9) == pytest.approx(1 / 3, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    c=st.floats(0.01, 2),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
)
def test_linear_is_the_composition(seed, c, inputs, outputs):
    g = torch.Generator().manual_seed(seed)
    u, z, r = 0.5 * randn(g, 3, inputs), 0.5 * randn(g, inputs, outputs), 0.3 * randn(g, outputs)
    found = poincare_linear_tangent(u, z, r, c)
    torch.testing.assert_close(found, twins.linear(u, z, r, c), rtol=1e-6, atol=1e-8)
    bare = poincare_linear_tangent(u, z, None, c)
    torch.testing.assert_close(bare, poincare_linear_tangent(u, z, 0 * r, c))


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_clip_is_the_projection_of_the_authors(c, generator):
    u = randn(generator, 6, 4) * torch.tensor([0.1, 1, 5, 20, 60, 200], dtype=DOUBLE)[:, None]
    z, r = randn(generator, 4, 3), 0.1 * randn(generator, 3)
    found = poincare_linear_tangent(u, z, r, c, clip="official")
    torch.testing.assert_close(
        found, twins.linear(u, z, r, c, projected=True), rtol=1e-5, atol=1e-7
    )
    most = twins.saturation() / c**0.5
    assert float(found.norm(dim=-1).max()) == pytest.approx(most)
    assert poincare_linear_tangent(u, z, r, c).norm(dim=-1).max() > 2 * most


def test_small_curvature_is_an_affine_map(generator):
    u, z, r = randn(generator, 5, 4), randn(generator, 4, 3), randn(generator, 3)
    flat = 2 * u @ z - 2 * z.norm(dim=0) * r
    torch.testing.assert_close(poincare_linear_tangent(u, z, r, 1e-9), flat, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_start_is_the_identity_at_any_length(dtype, generator):
    """Up to r = 50 at c = 0.1, where points in float32 saturate at 9.82."""
    for inputs, outputs in ((4, 4), (6, 3), (3, 6)):
        layer = PoincareLinear(inputs, outputs, PoincareBall(0.1, dtype=dtype), dtype=dtype)
        n = min(inputs, outputs)
        for length in (0, 1e-12, 1e-3, 1, 9.9, 30, 50):
            direction = torch.randn(2, n, generator=generator)
            u = torch.zeros(2, inputs, dtype=dtype)
            u[:, :n] = direction / direction.norm(dim=1, keepdim=True) * length
            out = layer(u)
            torch.testing.assert_close(out[:, :n], u[:, :n], rtol=2e-6, atol=0)
            assert (out[:, n:] == 0).all()
        out.sum().backward()
        assert layer.weight.grad.isfinite().all()
        assert layer.bias.grad.isfinite().all()


def test_composition_saturates_where_the_fused_form_does_not():
    u = torch.full((1, 1), 30.0)
    assert float(logmap0(expmap0(u, 0.1), 0.1)) == pytest.approx(9.82, abs=0.01)
    assert float(poincare_linear_tangent(u, torch.full((1, 1), 0.5), None, 0.1)) == pytest.approx(
        30
    )


def test_beyond_the_limit_values_and_gradients_stay_finite(generator):
    u = (1e4 * torch.randn(5, 4, generator=generator)).requires_grad_()
    z = (30 * torch.randn(4, 3, generator=generator)).requires_grad_()
    r = (100 * torch.randn(3, generator=generator)).requires_grad_()
    out = poincare_linear_tangent(u, z, r, 1.0)
    first = torch.autograd.grad(out.square().sum(), (u, z, r), retain_graph=True)
    grads = torch.autograd.grad(out.square().sum(), (u, z, r), create_graph=True)
    assert all(x.abs().max() < 1e6 for x in first)
    assert out.isfinite().all()
    assert 20 < float(out.detach().norm(dim=-1).max()) < 22
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias, generator):
    u, z = randn(generator, 3, 4).requires_grad_(), randn(generator, 4, 5).requires_grad_()
    r = randn(generator, 5).requires_grad_() if bias else None
    c = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(poincare_linear_tangent, (u, z, r, c))
    assert gradgradcheck(poincare_linear_tangent, (u, z, r, c))
    assert gradcheck(lambda *a: poincare_linear_tangent(*a, "official"), (5 * u, z, r, c))
    images, kernel = randn(generator, 2, 2, 4, 3).requires_grad_(), randn(generator, 18, 2)
    kernel = (kernel / 3).requires_grad_()
    r = randn(generator, 2).requires_grad_() if bias else None

    def conv(*arguments):
        return poincare_conv2d(*arguments, 3, 2, 1)

    assert gradcheck(conv, (images, kernel, r, c))
    assert gradgradcheck(conv, (images[:1].detach().requires_grad_(), kernel, r, c))


def test_gradients_where_the_input_or_a_column_is_zero(generator):
    z = randn(generator, 4, 3)
    z[:, 1] = 0
    z.requires_grad_()
    for r in (torch.zeros(3, dtype=DOUBLE), randn(generator, 3)):
        u = torch.zeros(2, 4, dtype=DOUBLE, requires_grad=True)
        bias = r.requires_grad_()
        out = poincare_linear_tangent(u, z, bias, 0.7)
        assert (out[:, 1] == 0).all()
        grads = torch.autograd.grad(out.sum(), (u, z, bias), create_graph=True)
        assert all(x.isfinite().all() for x in grads)
        assert (grads[1][:, 1] == 0).all()
        assert torch.autograd.grad(grads[0].sum(), z)[0].isfinite().all()
    # At the origin, without bias, the layer is 2 Zᵀu.
    jacobian = torch.autograd.functional.jacobian(
        lambda u: poincare_linear_tangent(u, z.detach(), None, 0.7), torch.zeros(4, dtype=DOUBLE)
    )
    torch.testing.assert_close(jacobian, 2 * z.detach().mT)


GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 2), (2, 1), (0, 1), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (1, 2), (2, 3), (2, 1)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("c", [0.1, 1.0])
def test_convolution_is_unfold_and_composition(geometry, c, generator):
    k, stride, padding, dilation = geometry
    u, r = randn(generator, 2, 3, 6, 7), 0.2 * randn(generator, 4)
    z = randn(generator, 3 * k[0] * k[1], 4) / 3
    found = poincare_conv2d(u, z, r, c, k, stride, padding, dilation)
    exact = twins.conv(u, z, r, c, *geometry)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-10)
    low = poincare_conv2d(u.float(), z.float(), r.float(), c, k, stride, padding, dilation)
    torch.testing.assert_close(low.double(), exact, rtol=1e-4, atol=1e-5)


def test_identity_starts_of_a_convolution(generator):
    ball, u = PoincareBall(0.1, dtype=DOUBLE), randn(generator, 2, 3, 5, 5)
    center = PoincareConv2d(3, 7, 3, ball, padding=1, init="identity_center", dtype=DOUBLE)
    ratio = beta_ratio(3, 9)
    norms = center(u) / ratio
    shown = u[:, [0, 1, 2, 0, 1, 2, 0]]
    # Not an isometry of the patch, only of its centre: equal where the patch is its centre.
    alone = torch.zeros(1, 3, 1, 1, dtype=DOUBLE) + u[:1, :, :1, :1]
    out = PoincareConv2d(3, 3, 3, ball, padding=1, init="identity_center", dtype=DOUBLE)(alone)
    torch.testing.assert_close(out, ratio * alone)
    assert norms.shape == shown.shape
    official = PoincareConv2d(3, 11, 3, ball, padding=1, dtype=DOUBLE)
    for o in range(11):
        assert official.weight[:, o].nonzero().flatten().tolist() == [o]
        assert center.weight[:, o % 7].nonzero().flatten().tolist() == [9 * (o % 7 % 3) + 4]
    assert float(official.weight.detach().sum()) == 5.5
    wide = PoincareConv2d(1, 12, 3, ball, dtype=DOUBLE)
    assert (wide.weight[:, 9:] == 0).all()
    jittered = PoincareConv2d(1, 12, 3, ball, jitter=1e-4, generator=generator, dtype=DOUBLE)
    assert torch.equal(jittered.weight[:, :9], wide.weight[:, :9])
    assert 0 < jittered.weight[:, 9:].abs().max() < 1e-3


def test_normal_start_collapses_and_identity_does_not(generator):
    x = torch.rand(20, 64, generator=generator)
    for init, low, high in (("identity", 0.999, 1.001), ("normal", 1e-6, 0.3)):
        ball, h = PoincareBall(0.1), x
        for _ in range(2):
            h = PoincareLinear(64, 64, ball, init=init, generator=generator)(h)
        assert low < float(h.detach().norm() / x.norm()) < high
    layer = PoincareLinear(64, 32, PoincareBall(0.1), init="normal", generator=generator)
    assert float(layer.weight.detach().std()) == pytest.approx((2 * 64 * 32) ** -0.5, rel=0.1)


def test_spaces(generator):
    ball = PoincareBall(0.5, dtype=DOUBLE)
    tangent = PoincareLinear(4, 3, ball, init="normal", generator=generator, dtype=DOUBLE)
    points = PoincareLinear(4, 3, ball, init="normal", space="ball", dtype=DOUBLE)
    points.load_state_dict(tangent.state_dict())
    u = 0.3 * randn(generator, 5, 4)
    torch.testing.assert_close(points(expmap0(u, 0.5)), expmap0(tangent(u), 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_modules_compute_in_float32(dtype, generator):
    ball = PoincareBall(0.1)
    linear = PoincareLinear(8, 6, ball, init="normal", generator=generator)
    conv = PoincareConv2d(2, 3, 3, ball, init="normal", generator=generator)
    u, images = torch.randn(4, 8, generator=generator), torch.randn(2, 2, 5, 5, generator=generator)
    for layer, x in ((linear, u), (conv, images)):
        exact = layer(x)
        with torch.autocast("cpu", dtype):
            assert torch.equal(layer(x), exact)
        half = copy.deepcopy(layer).to(dtype)
        found = half(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.02)
        found.float().sum().backward()
        assert half.weight.grad.isfinite().all()


def test_learnable_curvature_gets_its_gradient(generator):
    ball = PoincareBall(0.3, learnable=True)
    net = nn.Sequential(
        PoincareConv2d(2, 3, 3, ball, generator=generator),
        nn.Flatten(),
        PoincareLinear(27, 4, ball, init="normal", generator=generator),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    assert len(list(net.parameters())) == 5
    x, before = torch.randn(4, 2, 5, 5, generator=generator), float(ball.c.detach())
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    assert 0 < float(ball.c.detach()) != before
    with torch.no_grad():
        ball.raw_c.fill_(-1e4)
    assert net(x).isfinite().all()


def test_state_repr_reset_and_meta(generator):
    ball = PoincareBall(0.1)
    layer = PoincareConv2d(2, 3, (3, 1), ball, stride=2, padding=(1, 0), init="normal",
                           generator=generator)  # fmt: skip
    other = PoincareConv2d(2, 3, (3, 1), PoincareBall(0.4), stride=2, padding=(1, 0))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 2, 6, 6, generator=generator)
    assert torch.equal(other(x), layer(x))
    assert "kernel_size=(3, 1), stride=(2, 2), padding=(1, 0)" in repr(layer)
    assert "init='normal'" in repr(layer)
    assert "4, 3, bias=False" in repr(PoincareLinear(4, 3, ball, bias=False))
    before = layer.weight.detach().clone()
    layer.reset_parameters(torch.Generator().manual_seed(1))
    assert not torch.equal(layer.weight, before)
    again = layer.weight.detach().clone()
    layer.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(layer.weight, again)
    empty = PoincareConv2d(2, 3, 3, PoincareBall(0.1, device="meta"), device="meta")
    assert empty(torch.empty(2, 2, 5, 5, device="meta")).shape == (2, 3, 3, 3)


def test_memory_of_a_layer():
    """What is kept for the backward pass: inputs, two tensors of outputs, and small ones."""
    layer = PoincareLinear(144, 16, PoincareBall(0.1), init="normal")
    u, kept = torch.randn(8192, 144, requires_grad=True), {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(u)
    assert sum(kept.values()) <= 6e6


def test_bad_input():
    ball = PoincareBall(0.1)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        PoincareLinear(2, 3, ball)(torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"x must be \[..., 2\]"):
        PoincareLinear(2, 3, ball)(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="inside the ball"):
        PoincareLinear(2, 3, ball, space="ball")(torch.full((1, 2), 9.0))
    with pytest.raises(ValueError, match=r"x must be \[batch, 2, height, width\]"):
        PoincareConv2d(2, 3, 3, ball)(torch.zeros(1, 3, 5, 5))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        PoincareConv2d(2, 3, 3, ball)(torch.zeros(1, 2, 2, 5))
    with pytest.raises(ValueError, match=r"C·9 = 18"):
        poincare_conv2d(torch.zeros(1, 3, 5, 5), torch.zeros(18, 3), None, 0.1, 3)
    with pytest.raises(ValueError, match=r"u must be \[..., 3\]"):
        poincare_linear_tangent(U, Z.mT, None, 1)
    with pytest.raises(ValueError, match="bias must be"):
        poincare_linear_tangent(U, Z, BIAS[:2], 1)
    with pytest.raises(ValueError, match="Z must be"):
        poincare_linear_tangent(U, Z[0], None, 1)
    with pytest.raises(ValueError, match="clip must be"):
        poincare_linear_tangent(U, Z, BIAS, 1, clip="no")
    with pytest.raises(ValueError, match=r"c must be positive.*pass c=1"):
        poincare_linear_tangent(U, Z, BIAS, -1)
    with pytest.raises(ValueError, match="in_f must be a positive integer"):
        PoincareLinear(0, 3, ball)
    with pytest.raises(ValueError, match="kernel_size"):
        PoincareConv2d(1, 3, 0, ball)
    with pytest.raises(ValueError, match="stride"):
        PoincareConv2d(1, 3, 3, ball, stride=(1, 1, 1))
    with pytest.raises(ValueError, match="padding"):
        PoincareConv2d(1, 3, 3, ball, padding=-1)
    with pytest.raises(ValueError, match="init must be one of"):
        PoincareLinear(2, 3, ball, init="zero")
    with pytest.raises(ValueError, match="space must be one of"):
        PoincareLinear(2, 3, ball, space="flat")
    with pytest.raises(ValueError, match="jitter"):
        PoincareLinear(2, 3, ball, jitter=-1)
    with pytest.raises(RuntimeError, match="PoincareLinear gave NaN"):
        PoincareLinear(2, 3, PoincareBall(0.1, debug=True))(torch.full((1, 2), math.nan))
    with pytest.raises(RuntimeError, match="PoincareConv2d gave NaN"):
        PoincareConv2d(2, 3, 1, PoincareBall(0.1, debug=True))(torch.full((1, 2, 1, 1), math.nan))

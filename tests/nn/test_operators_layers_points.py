"""Operators between functions on any points: attention, norms, finite rank."""

import copy
import math

import pytest
import torch
from operator_fields import rand, randn, seeded
from torch import nn

from stiefel.nn.operators import (
    DeepONet,
    FunctionNorm,
    IntegralAttention,
    LowRankIntegral,
    grid_coordinates,
    integral_attention,
    quadrature,
    quadrature_points,
)
from stiefel.nn.operators.attention import rotate

# --- attention ----------------------------------------------------------------------------------


def sheet_attention(weights, kind):
    q = torch.eye(2)
    k = torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 0]])
    v = torch.tensor([[1.0], [2], [3], [4]])
    return integral_attention(q, k, v, weights, kind)[:, 0], (q, k, v)


def test_attention_of_the_sheet():
    w = torch.tensor([0.05, 0.2, 0.45, 0.3])
    for weights, kind, expected in (
        (w, "softmax", [2.812852, 2.876745]),
        (None, "softmax", [2.177705, 2.5]),
        (w, "linear", [0.2, 1.75]),
    ):
        found, (q, k, v) = sheet_attention(weights, kind)
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
        if weights is not None:
            halves = torch.tensor([0.05, 0.2, 0.45, 0.15, 0.15])
            twice = (torch.cat((t, t[-1:])) for t in (k, v))
            split = integral_attention(q, *twice, halves, kind)[:, 0]
            torch.testing.assert_close(split, found)


def test_weight_of_one_point_is_not_a_row_of_zeros():
    # Weights belong to the keys: with one of nearly all weight, every query sees that value.
    q, k, v = (randn(2, 3, 4, seed=s) for s in range(3))
    w = torch.tensor([1 - 2e-12, 1e-12, 1e-12], dtype=torch.float64)
    torch.testing.assert_close(integral_attention(q, k, v, w), v[:, :1].expand(-1, 3, -1))


def attention_layer(**options):
    return IntegralAttention(8, 2, generator=seeded(), dtype=torch.float64, **options)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
@pytest.mark.parametrize("norm", ["points", "channels", "none"])
def test_attention_does_not_see_the_grid(kind, norm):
    layer = attention_layer(kind=kind, norm=norm)
    points = quadrature_points("gauss-legendre", 128, dtype=torch.float64)
    w = quadrature("gauss-legendre", 128, dtype=torch.float64)
    uniform = quadrature_points("uniform", 4000, dtype=torch.float64)

    def field(p):
        t = 2 * math.pi * p[:, 0]
        return torch.stack([torch.sin((i % 3 + 1) * t + i) for i in range(8)])[None]

    query = randn(1, 8, 5)
    coarse = layer(field(points), w, query)
    fine = layer(field(uniform), None, query)
    torch.testing.assert_close(coarse, fine, atol=2e-3, rtol=0)
    clustered = torch.cat((field(points), field(points[-1:])), -1)
    halves = torch.cat((w[:-1], w[-1:] / 2, w[-1:] / 2))
    torch.testing.assert_close(layer(clustered, halves, query), coarse)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_attention_over_grids_with_weights_of_each_sample(kind):
    layer = attention_layer(kind=kind)
    u, w = randn(2, 8, 3, 4), rand(2, 3, 4) + 0.1
    found = layer(u, w)
    assert found.shape == u.shape
    for i in range(2):
        torch.testing.assert_close(layer(u[i : i + 1], w[i]), found[i : i + 1])
    torch.testing.assert_close(layer(u.flatten(2), w.flatten(1)).view_as(u), found)
    torch.testing.assert_close(layer(u[:1], w[0].flatten()), found[:1])
    # A cross-attention from other points has their shape.
    assert layer(u, w, randn(2, 8, 7)).shape == (2, 8, 7)


def test_rotation_makes_products_depend_on_differences():
    q, k = randn(1, 2, 5, 8), randn(1, 2, 5, 8, seed=1)
    for ndim in (1, 2):
        places = rand(5, ndim, seed=2)
        product = rotate(q, places) @ rotate(k, places).mT
        moved = rotate(q, places + 0.3) @ rotate(k, places + 0.3).mT
        torch.testing.assert_close(product, moved)
        norms = rotate(q, places).norm(dim=-1)
        torch.testing.assert_close(norms, q.norm(dim=-1))
    one = rotate(torch.tensor([[[[1.0, 0, 0, 0]]]]), torch.tensor([[0.01]]))
    torch.testing.assert_close(one[0, 0, 0], torch.tensor([math.cos(0.64), 0, math.sin(0.64), 0]))
    layer = attention_layer()
    u, places = randn(1, 8, 5), rand(5, 2)
    shifted = layer(u, points=places + 0.5)
    torch.testing.assert_close(layer(u, points=places), shifted)
    assert float((shifted - layer(u)).detach().abs().max()) > 1e-3
    assert layer(u, None, u[..., :3], points=places, query_points=places[:3]).shape == (1, 8, 3)


def test_attention_start():
    layer = IntegralAttention(16, 1, generator=seeded())
    off = layer.to_q - torch.eye(16) / 4
    assert float(off.detach().abs().max()) <= 1 / 4 * math.sqrt(6 / 32) + 1e-6
    assert float(IntegralAttention(16, 4).to_q.detach().diagonal().mean().abs()) < 0.2
    again = IntegralAttention(16, 1, generator=seeded())
    assert torch.equal(layer.to_q, again.to_q)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_attention_derivatives_and_half_precision(kind):
    layer = attention_layer(kind=kind)
    u, w = randn(1, 8, 4).requires_grad_(), (rand(4) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(layer, (u, w), fast_mode=True)
    low = copy.deepcopy(layer).bfloat16()
    found = low(u.detach().bfloat16(), w.detach().bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), layer(u, w), atol=0.1, rtol=0.1)
    mixed = copy.deepcopy(layer).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = mixed(u.detach().float(), w.detach().float())
    torch.testing.assert_close(found.double(), layer(u, w), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.ones(1, 4, 5)), "u must have 8 channels"),
        (lambda m: m(torch.full((1, 8, 5), math.nan)), "u must be finite"),
        (lambda m: m(torch.ones(1, 8, 5), torch.ones(4)), "one entry per point"),
        (lambda m: m(torch.ones(1, 8, 5), torch.zeros(5)), "positive"),
        (lambda m: m(torch.ones(1, 8, 5), query=torch.ones(1, 4, 5)), "query must have"),
        (lambda m: m(torch.ones(1, 8, 5), query_points=torch.ones(5, 1)), "need query"),
        (
            lambda m: m(torch.ones(1, 8, 5), query=torch.ones(1, 8, 3), points=torch.ones(5, 1)),
            "query_points are missing",
        ),
        (lambda m: m(torch.ones(1, 8, 5), points=torch.ones(4, 1)), "points must be"),
        (lambda m: m(torch.ones(1, 8, 5), points=torch.ones(5, 3)), "multiple of 2 d"),
        (lambda _: IntegralAttention(8, 3), "multiple of heads"),
        (lambda _: IntegralAttention(8, 2, "cosine"), "softmax, linear"),
        (lambda _: IntegralAttention(8, 2, norm="batch"), "points, channels, none"),
        (
            lambda _: integral_attention(*torch.ones(3, 4, 2), torch.ones(3)),
            "one entry for each of the 4 points",
        ),
    ],
)
def test_attention_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(IntegralAttention(8, 2))


# --- norms --------------------------------------------------------------------------------------


def test_equal_weights_are_the_norms_of_torch():
    x = randn(4, 6, 5, 3)
    for kind, peer in (
        ("instance", nn.InstanceNorm2d(6, affine=True)),
        ("layer", nn.GroupNorm(1, 6)),
        ("batch", nn.BatchNorm2d(6)),
    ):
        ours = FunctionNorm(channels=6, kind=kind, dtype=torch.float64)
        with torch.no_grad():
            ours.scale.copy_(rand(6) + 0.5)
            ours.shift.copy_(randn(6))
            peer = peer.double()
            peer.weight.copy_(ours.scale)
            peer.bias.copy_(ours.shift)
        torch.testing.assert_close(ours(x), peer(x))
        torch.testing.assert_close(ours(x, torch.full((5, 3), 0.2)), peer(x))
        if kind == "batch":
            # Torch's running variance is n/(n − 1) times that; two calls were made of ours.
            assert ours.running_mean.abs().max() > 0
            ours.reset_parameters()
            ours(x)
            torch.testing.assert_close(ours.running_mean * 3 / 3, 0.1 * x.mean((0, 2, 3)))
            expected = 0.9 + 0.1 * x.var((0, 2, 3), correction=0)
            torch.testing.assert_close(ours.running_var, expected)
            mean, var = (r[:, None, None] for r in (ours.running_mean, ours.running_var))
            torch.testing.assert_close(ours.eval()(x), (x - mean) / (var + 1e-5).sqrt())


@pytest.mark.parametrize("kind", ["instance", "layer", "batch"])
def test_moments_are_integrals(kind):
    norm = FunctionNorm(channels=2, kind=kind, dtype=torch.float64)
    x, w = randn(3, 2, 6), rand(6) + 0.1
    found = norm(x, w)
    twice = norm(torch.cat((x, x[..., -1:]), -1), torch.cat((w[:-1], w[-1:] / 2, w[-1:] / 2)))
    torch.testing.assert_close(twice[..., :6], found)
    axes = {"instance": (2,), "layer": (1, 2), "batch": (0, 2)}[kind]
    share = (w / w.sum()).expand_as(x)
    count = share.sum(axes, keepdim=True)
    mean = (share * found).sum(axes, keepdim=True) / count
    assert float(mean.detach().abs().max()) < 1e-12
    var = (share * found**2).sum(axes, keepdim=True) / count
    torch.testing.assert_close(var, torch.ones_like(var), atol=1e-3, rtol=0)
    inside = FunctionNorm(w, kind="instance")
    assert inside.state_dict() == {}
    torch.testing.assert_close(inside(x), FunctionNorm()(x, w))
    assert torch.autograd.gradcheck(norm.eval(), (x.requires_grad_(),))


def test_norm_in_half_precision_and_refusals():
    x = randn(2, 3, 8)
    low = FunctionNorm()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), FunctionNorm()(x), atol=0.03, rtol=0.03)
    for call, message in (
        (lambda: FunctionNorm(torch.zeros(3)), "positive"),
        (lambda: FunctionNorm(kind="batch"), "channels is missing"),
        (lambda: FunctionNorm(kind="group"), "instance, layer, batch"),
        (lambda: FunctionNorm(eps=0), "eps"),
        (lambda: FunctionNorm(momentum=2), "momentum"),
        (lambda: FunctionNorm(channels=4)(x), "4, \\*grid"),
        (lambda: FunctionNorm(torch.ones(7))(x), "one entry per point"),
        (lambda: FunctionNorm()(x * math.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- finite rank --------------------------------------------------------------------------------


def test_low_rank_operator_is_its_double_sum():
    layer = LowRankIntegral(2, 3, 4, generator=seeded()).double()
    y, x, v, w = rand(9, 1), rand(5, 1, seed=1), randn(2, 2, 9), rand(9) + 0.1
    psi = layer.inward(y).view(9, 4, 2)
    phi = layer.outward(x).view(5, 4, 3)
    kernel = torch.einsum("xro,yri->oixy", phi, psi)
    expected = torch.einsum("oixy,biy,y->box", kernel, v, w)
    torch.testing.assert_close(layer(v, y, x, w), expected)
    each = (t.expand(2, -1, -1) for t in (y, x))
    torch.testing.assert_close(layer(v, *each, w.expand(2, -1)), expected)
    # Linear.
    torch.testing.assert_close(layer(3 * v, y, x, w), 3 * expected)


@pytest.mark.parametrize(
    "layer",
    [
        LowRankIntegral(2, 3, 4, ndim=2, generator=seeded()).double(),
        DeepONet(2, 3, ndim=2, sensors=5, basis=6, hidden=(16,), generator=seeded()).double(),
    ],
)
def test_finite_rank_operators_do_not_see_the_grid(layer):
    def field(p):
        t = 2 * math.pi * p
        return torch.stack((torch.sin(t[..., 0]) * torch.cos(t[..., 1]), torch.cos(t[..., 0])))[
            None
        ]

    queries = rand(7, 2)
    results = []
    for n in (40, 64):
        p = quadrature_points("gauss-legendre", (n, n), dtype=torch.float64)
        w = quadrature("gauss-legendre", (n, n), dtype=torch.float64)
        flat = field(p).flatten(2), p.flatten(0, 1)
        results.append(layer(*flat, queries, w.flatten()))
    torch.testing.assert_close(results[0], results[1], atol=5e-5, rtol=0)
    grid = field(grid_coordinates((6, 5), dtype=torch.float64).movedim(0, -1))
    assert layer(grid).shape == (1, 3, 6, 5)
    shape = {k: t.shape for k, t in layer.state_dict().items()}
    assert {k: t.shape for k, t in layer.state_dict().items()} == shape
    first = layer(grid)
    layer.reset_parameters(seeded(7))
    assert not torch.allclose(layer(grid), first)


def test_deeponet_is_its_formula_and_has_derivatives():
    layer = DeepONet(1, 2, sensors=3, basis=4, hidden=(5,), generator=seeded()).double()
    u, y, x, w = randn(2, 1, 6).requires_grad_(), rand(6, 1), rand(3, 1), rand(6) + 0.1
    inner = torch.einsum("bn,n,nm->bm", u[:, 0], w, layer.sensing(y))
    branch = layer.branch(inner[..., None])[..., 0].view(2, 2, 4)
    trunk = layer.trunk(x).view(3, 2, 4)
    expected = torch.einsum("bck,mck->bcm", branch, trunk) / 2 + layer.bias[:, None]
    torch.testing.assert_close(layer(u, y, x, w), expected)
    assert torch.autograd.gradcheck(lambda u: layer(u, y, x, w), (u,))


@pytest.mark.parametrize("make", [lambda: LowRankIntegral(2, 1, 3), lambda: DeepONet(2, 1)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(1, 1, 5)}, "u must have 2 channels"),
        ({"u": torch.full((1, 2, 5), math.nan)}, "u must be finite"),
        ({"points": torch.ones(4, 1)}, "points must be"),
        ({"points": torch.full((5, 1), math.nan)}, "points must be finite"),
        ({"queries": torch.ones(4, 2)}, "queries must be"),
        ({"weights": torch.ones(4)}, "one entry per point"),
        ({"weights": -torch.ones(5)}, "positive"),
    ],
)
def test_finite_rank_operators_refuse(make, change, message):
    arguments = {"u": torch.ones(1, 2, 5), "points": torch.rand(5, 1), **change}
    with pytest.raises(ValueError, match=message):
        make()(*(arguments.get(name) for name in ("u", "points", "queries", "weights")))
    with pytest.raises(ValueError, match="at least 1"):
        type(make())(0, 1, 3)

"""Graph operators: neighbours in a ball, and a kernel integrated over it."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_fields import rand, randn, seeded
from torch import nn

from stiefel.nn.operators import (
    KernelIntegral,
    SinusoidalEmbedding,
    quadrature,
    quadrature_points,
    radius_neighbors,
)

# --- neighbours ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(0, 20),
    d=st.integers(1, 3),
    radius=st.floats(0.01, 0.5),
    periodic=st.booleans(),
)
def test_neighbours_are_those_of_all_pairs(n, m, d, radius, periodic):
    y, x = rand(n, d), rand(m, d, seed=1)
    found = radius_neighbors(y, x, radius=radius, period=1.0 if periodic else None)
    apart = x[:, None] - y
    if periodic:
        apart = apart - apart.round()
    near = apart.norm(dim=-1) <= radius
    assert found.row_splits.tolist() == [0, *near.sum(1).cumsum(0).tolist()]
    assert torch.equal(torch.stack((found.rows(), found.index), 1), near.nonzero())


def test_neighbours_come_in_parts(monkeypatch):
    y = rand(50, 2)
    whole = radius_neighbors(y, radius=0.3)
    monkeypatch.setattr("stiefel.nn.operators.kernel_integral_neighbors._QUERIES", 7)
    parts = radius_neighbors(y, radius=0.3)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: radius_neighbors(rand(3, 2), radius=0), "radius"),
        (lambda: radius_neighbors(rand(3, 2), rand(3, 1), radius=1), "as many coordinates"),
        (lambda: radius_neighbors(rand(3, 2) * math.nan, radius=1), "points must be finite"),
        (lambda: radius_neighbors(rand(3, 2), radius=0.6, period=1), "half the period"),
        (lambda: radius_neighbors(rand(3, 2), radius=0.6, period=-1), "period"),
    ],
)
def test_neighbours_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- kernel integral ----------------------------------------------------------------------------

KERNELS = [
    {},
    {"kernel": "full"},
    {"use_values": True},
    {"embedding": None},
    {"reduction": "sum"},
    {"out_channels": 3},
    {"mlp": (7, 5)},
]


def graph_layer(**options):
    settings_ = {"in_channels": 3, "out_channels": 2, "radius": 0.4, "mlp": (6,), "ndim": 2}
    return KernelIntegral(**{**settings_, **options}, dtype=torch.float64, generator=seeded())


def summed(layer, v, y, x, w):
    """The sum over the ball, pair by pair."""
    gamma = layer.embedding or (lambda p: p)
    out = torch.zeros(len(x), layer.out_channels, dtype=torch.float64)
    width = layer.in_channels
    for i in range(len(x)):
        near = [j for j in range(len(y)) if float((x[i] - y[j]).norm()) <= layer.radius]
        total = torch.zeros(layer.out_channels if layer.kernel == "full" else width).double()
        for j in near:
            parts = [gamma(y[j : j + 1])[0], gamma(x[i : i + 1])[0]]
            hidden = torch.cat([*parts, v[:, j]] if layer.use_values else parts)
            for depth, part in enumerate(layer.layers):
                hidden = nn.functional.gelu(hidden) if depth else hidden
                hidden = part.weight @ hidden + part.bias
            term = v[:, j] * (1 if w is None else w[j])
            if layer.kernel == "full":
                total = total + hidden.view(layer.out_channels, width) @ term
            else:
                total = total + hidden * term
        if w is None and layer.reduction == "mean":
            total = total / max(1, len(near))
        if layer.projection is not None:
            total = layer.projection.weight @ total + layer.projection.bias
        out[i] = total
    return out.mT


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", KERNELS, ids=str)
def test_kernel_integral_is_its_sum(options, weighted):
    layer = graph_layer(**options)
    y, x, v = rand(12, 2), rand(5, 2, seed=1), randn(2, 3, 12)
    w = rand(12, seed=2) + 0.1 if weighted else None
    expected = torch.stack([summed(layer, s, y, x, w) for s in v])
    torch.testing.assert_close(layer(v, y, x, w), expected)
    neighbors = radius_neighbors(y, x, radius=layer.radius)
    torch.testing.assert_close(layer(v, y, x, w, neighbors), expected)
    # Points of each sample, and its weights.
    each = (t.expand(2, -1, -1) for t in (y, x))
    many = None if w is None else w.expand(2, -1)
    torch.testing.assert_close(layer(v, *each, many), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_pairs_in_parts_give_the_same_values_and_gradients(recompute):
    whole = graph_layer()
    parts = graph_layer(max_pairs=5, recompute=recompute)
    y, w = rand(20, 2), rand(20, seed=2) + 0.1
    results = []
    for layer in (whole, parts):
        v = randn(2, 3, 20).requires_grad_()
        out = layer(v, y, weights=w)
        results.append((out, *torch.autograd.grad(out.square().sum(), (v, *layer.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_kernel_integral_derivatives():
    layer = graph_layer(use_values=True)
    names = [name for name, _ in layer.named_parameters()]
    y, v, w = rand(5, 2), randn(1, 3, 5).requires_grad_(), (rand(5) + 0.1).requires_grad_()

    def run(v, w, *values):
        return torch.func.functional_call(
            layer, dict(zip(names, values, strict=True)), (v, y, None, w)
        )

    inputs = (v, w, *(p.detach()[..., :].requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_a_point_split_into_two_changes_nothing():
    layer = graph_layer()
    y, v, w = rand(10, 2), randn(1, 3, 10), rand(10) + 0.1
    twice = torch.cat((y, y[-1:])), torch.cat((v, v[..., -1:]), -1)
    halves = torch.cat((w[:-1], w[-1:] / 2, w[-1:] / 2))
    x = rand(4, 2, seed=1)
    torch.testing.assert_close(layer(twice[1], twice[0], x, halves), layer(v, y, x, w))


def test_kernel_integral_converges_on_finer_points():
    layer = KernelIntegral(1, 1, 0.25, (8,), embedding=None, generator=seeded()).double()
    x = rand(6, 1)

    def at(n):
        y = quadrature_points("uniform", n, dtype=torch.float64)
        w = quadrature("uniform", n, dtype=torch.float64)
        return layer(torch.sin(6 * y).mT[None], y, x, w)

    errors = [float((at(n) - at(8192)).detach().abs().max()) for n in (64, 512)]
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 2e-3


def test_queries_without_neighbours_give_zero_and_a_warning():
    layer = graph_layer(out_channels=3)
    x = torch.tensor([[0.5, 0.5], [9.0, 9.0], [-9.0, 0.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="2 of 3 queries have no point within radius 0.4"):
        found = layer(randn(1, 3, 10), rand(10, 2), x)
    assert bool((found[..., 1:] == 0).all())
    assert bool((found[..., 0] != 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.ones(1, 2, 10)}, "v must have 3 channels"),
        ({"v": torch.full((1, 3, 10), math.nan)}, "v must be finite"),
        ({"v": torch.ones(1, 3, 9)}, "as many as values"),
        ({"points": torch.rand(10, 3)}, "ndim of the layer"),
        ({"points": torch.rand(10, 2) * math.nan}, "points must be finite"),
        ({"queries": torch.rand(4, 1)}, "queries must be"),
        ({"points": torch.rand(2, 10, 2)}, "points must be"),
        ({"weights": torch.ones(9)}, "weights must be"),
        ({"weights": torch.zeros(10)}, "positive"),
        ({"neighbors": radius_neighbors(torch.rand(3, 2), radius=1)}, "one row per query"),
    ],
)
def test_kernel_integral_refuses(change, message):
    layer = KernelIntegral(3, 3, 2.0, (4,), ndim=2)
    arguments = {"v": torch.ones(1, 3, 10), "points": torch.rand(10, 2), **change}
    with pytest.raises(ValueError, match=message):
        layer(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0}, "radius"),
        ({"mlp": (0,)}, "mlp"),
        ({"kernel": "sparse"}, "diagonal, full"),
        ({"reduction": "max"}, "mean, sum"),
        ({"embedding": "nerf"}, "embedding"),
        ({"ndim": 0}, "ndim"),
        ({"max_pairs": 0}, "max_pairs"),
    ],
)
def test_kernel_integral_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        graph_layer(**options)


def test_embedding():
    embedding = SinusoidalEmbedding(3, 100.0)
    x = torch.tensor([[0.5, 2.0]])
    rates = [100 ** (-i / 3) for i in range(3)]
    expected = [f(p * r) for p in (0.5, 2.0) for r in rates for f in (math.sin, math.cos)]
    torch.testing.assert_close(embedding(x)[0], torch.tensor(expected))
    assert embedding.features(2) == 12
    with pytest.raises(ValueError, match="longest"):
        SinusoidalEmbedding(3, 0)


def test_sums_over_neighbours_are_numpys():
    # The whole operator with κ = 1 is a count of neighbours times the weight.
    layer = KernelIntegral(1, 1, 0.2, (2,), ndim=2, reduction="sum", embedding=None)
    with torch.no_grad():
        for part in layer.layers:
            part.weight.zero_()
        layer.layers[-1].bias.fill_(1)
    y = rand(30, 2).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = layer(torch.ones(1, 1, 30), y)[0, 0].detach()
    distances = np.linalg.norm(y[:, None].numpy() - y.numpy(), axis=-1)
    np.testing.assert_allclose(found, (distances <= 0.2).sum(1), rtol=1e-6)

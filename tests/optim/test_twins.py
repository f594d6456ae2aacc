"""Every class, step by step, against its slow twin written with loops in float64."""

import itertools
import math

import pytest
import torch
from law_table import assert_all_close, noise
from slow_twins import SlowMuon, SlowNorMuon, SlowRMNP
from torch import nn

from stiefel.linalg import as_table, orthogonalize
from stiefel.optim import (
    RMNP,
    Muon,
    NorMuon,
    normuon_direction,
    rmnp_direction,
)

NAMES = ("classic", "polar_express", "fitted", "fast")
SHAPES = ((4, 3), (3, 4), (5, 5), (1, 4), (4, 1), (24, 5))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}×{s[1]}")
LR = 0.02


def check_beside(optimizer, weight, twin, steps=4):
    for step in range(steps):
        weight.grad = noise(tuple(weight.shape), 50 + step)
        optimizer.step()
        twin.step(weight.grad)
        assert_all_close([weight.detach()], [twin.w], 1e-10)


@every_shape
@pytest.mark.parametrize("ns", NAMES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_its_slow_twin(shape, ns, nesterov):
    for scale, rescale in (("spectral", None), ("rms", None), ("dion", None), (None, "rms")):
        weight = nn.Parameter(noise(shape, 0))
        own = {"nesterov": nesterov, "ns": ns, "scale": scale, "rescale": rescale}
        twin = SlowMuon(weight.detach(), LR, 0.1, 0.9, **own)
        optimizer = Muon([weight], lr=LR, momentum=0.9, weight_decay=0.1, **own)
        check_beside(optimizer, weight, twin)


@every_shape
@pytest.mark.parametrize("ns", NAMES)
@pytest.mark.parametrize("corrected", [False, True])
def test_normuon_equals_its_slow_twin(shape, ns, corrected):
    for nesterov, reduce, (rescale, scale) in itertools.product(
        (False, True),
        ("rows", "long"),
        (("rms", None), ("preserve", "spectral"), ("preserve", "dion")),
    ):
        weight = nn.Parameter(noise(shape, 0))
        shared = {"nesterov": nesterov, "ns": ns, "rescale": rescale, "scale": scale}
        twin = SlowNorMuon(
            weight.detach(), LR, 0.1, (0.9, 0.8), 1e-6, reduce=reduce, corrected=corrected, **shared
        )
        optimizer = NorMuon(
            [weight],
            lr=LR,
            betas=(0.9, 0.8),
            eps=1e-6,
            reduce=reduce,
            bias_correction=corrected,
            **shared,
        )
        check_beside(optimizer, weight, twin)
        state = optimizer.state[weight]
        assert_all_close([state["second_moment"]], [torch.tensor(twin.v, dtype=torch.float64)])


@every_shape
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["spectral", "rms", None])
def test_rmnp_equals_its_slow_twin(shape, nesterov, scale):
    weight = nn.Parameter(noise(shape, 0))
    twin = SlowRMNP(weight.detach(), LR, 0.1, 0.9, nesterov, 1e-12, scale)
    own = {"momentum": 0.9, "nesterov": nesterov, "scale": scale, "weight_decay": 0.1}
    check_beside(RMNP([weight], lr=LR, **own), weight, twin)


@every_shape
def test_normuon_is_its_direction_and_the_size_rule(shape):
    weight = nn.Parameter(noise(shape, 0))
    optimizer = NorMuon([weight], lr=LR, weight_decay=0.0)
    momentum, v = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0], 1).double()
    for step in range(3):
        weight.grad = noise(shape, step)
        momentum = 0.95 * momentum + 0.05 * weight.grad
        direction, v = normuon_direction(orthogonalize(momentum, as_table("fitted")), v, 0.95, 1e-8)
        size = 0.2 * math.sqrt(shape[0] * shape[1]) / direction.norm()
        expected = weight.detach() - LR * size * direction
        optimizer.step()
        assert_all_close([weight.detach()], [expected], 1e-11)
    assert_all_close([optimizer.state[weight]["second_moment"]], [v[:, 0]], 1e-11)


@every_shape
def test_rmnp_is_its_direction_and_the_size_rule(shape):
    weight = nn.Parameter(noise(shape, 0))
    optimizer = RMNP([weight], lr=LR, nesterov=False)
    weight.grad = noise(shape, 1)
    size = math.sqrt(max(1.0, shape[0] / shape[1]))
    expected = weight.detach() - LR * size * rmnp_direction(0.05 * weight.grad)
    optimizer.step()
    assert_all_close([weight.detach()], [expected])

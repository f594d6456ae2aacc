"""The pure direction functions, and the invariants of the sheets."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_table import ROWS, assert_all_close, every_row, flat, noise, parameters, train
from torch import nn

from stiefel.linalg import as_table, haar, orthogonalize, polar
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
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LR = 0.02


@every_dtype
@every_shape
def test_normuon_direction(shape, dtype):
    o, v = noise((2, 3, *shape), 0, dtype), noise((2, 3, shape[0], 1), 1).square().float()
    v = v.double() if dtype == torch.float64 else v
    kept = o.clone(), v.clone()
    direction, new = normuon_direction(o, v, 0.9, 1e-3)
    assert torch.equal(o, kept[0])
    assert torch.equal(v, kept[1])
    assert direction.dtype == dtype
    assert new.dtype == v.dtype
    assert new.shape == v.shape
    mean = o.double().square().mean(-1, keepdim=True)
    moment = 0.9 * v.double() + 0.1 * mean
    expected = o.double() / (moment.sqrt() + 1e-3)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(direction.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(new.double(), moment, rtol=4 * torch.finfo(v.dtype).eps, atol=0)
    for i, j in itertools.product(range(2), range(3)):
        one, moment = normuon_direction(o[i, j], v[i, j], 0.9, 1e-3)
        assert torch.equal(one, direction[i, j])
        assert torch.equal(moment, new[i, j])


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_zero_rows_of_normuon(eps):
    o = noise((4, 3), 0)
    o[1] = 0
    direction, v = normuon_direction(o, torch.zeros(4, 1).double(), 0.9, eps)
    assert torch.isfinite(direction).all()
    assert not direction[1].any()
    assert v[1] == 0
    assert (direction[[0, 2, 3]].norm(dim=1) > 1).all()
    direction, v = normuon_direction(torch.zeros(4, 3).double(), v, 0.9, eps)
    assert not direction.any()


@every_dtype
@every_shape
def test_rmnp_direction(shape, dtype):
    u = noise((2, 3, *shape), 0, dtype)
    kept = u.clone()
    direction = rmnp_direction(u)
    assert torch.equal(u, kept)
    assert direction.dtype == dtype
    expected = u.double() / u.double().norm(dim=-1, keepdim=True)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(direction.double(), expected, rtol=tolerance, atol=0)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(rmnp_direction(u[i, j]), direction[i, j])


@given(exponent=st.floats(-37, 37), eps=st.sampled_from([0.0, 1e-38]))
@settings(max_examples=50, deadline=None)
def test_rows_of_any_size_become_unit(exponent, eps):
    """In float32 the squares of most of these underflow or overflow."""
    u = noise((4, 6), 0, torch.float32)
    scaled = u * 10.0**exponent
    unit = rmnp_direction(scaled, eps)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(4), rtol=1e-5, atol=0)
    torch.testing.assert_close(unit, rmnp_direction(u), rtol=1e-5, atol=1e-7)


def test_rows_are_independent_of_one_another():
    u = noise((4, 6), 0, torch.float32)
    mixed = u * torch.tensor([1e-20, 1.0, 1e20, 0.0])[:, None]
    unit = rmnp_direction(mixed, 0.0)
    torch.testing.assert_close(unit[:3], rmnp_direction(u)[:3])
    assert not unit[3].any()


def test_eps_is_the_smallest_norm_divided_by():
    u = torch.tensor([[3e-13, 4e-13], [3e-12, 4e-12], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.3, 0.4], [0.6, 0.8], [0.0, 0.0]], dtype=torch.float64)
    assert_all_close([rmnp_direction(u)], [expected])


# Invariants of the sheets


@every_row
def test_tiny_gradients_in_float32(row):
    optimizer = row(parameters(dtype=torch.float32), **({"eps": 0.0} if row.cls is RMNP else {}))
    twin = row(parameters(dtype=torch.float32))
    train(optimizer, 1, scale=1e-20)
    train(twin, 1)
    if row.scale_free:
        for p, q, old in zip(
            flat(optimizer), flat(twin), parameters(dtype=torch.float32), strict=True
        ):
            assert (p - q).norm() < 0.02 * (q - old).norm()
    assert all(torch.isfinite(p).all() for p in flat(optimizer))


@every_shape
@pytest.mark.parametrize("cls", [Muon, NorMuon])
def test_every_update_has_exactly_the_asked_root_mean_square(shape, cls):
    weight = nn.Parameter(noise(shape, 0))
    optimizer = cls([weight], lr=LR, weight_decay=0.0, rescale="rms")
    for step in range(4):
        old = weight.detach().clone()
        weight.grad = noise(shape, step)
        optimizer.step()
        expected = 0.2 * LR * math.sqrt(shape[0] * shape[1])
        assert float((weight.detach() - old).norm()) == pytest.approx(expected, rel=1e-12)


@every_shape
@pytest.mark.parametrize("scale", ["spectral", "rms", None])
def test_every_row_of_rmnp_has_the_asked_norm(shape, scale):
    rows, cols = shape
    weight = nn.Parameter(noise(shape, 0))
    optimizer = RMNP([weight], lr=LR, scale=scale)
    size = {"spectral": max(1, rows / cols) ** 0.5, "rms": 0.2 * cols**0.5, None: 1.0}[scale]
    for step in range(3):
        old = weight.detach().clone()
        weight.grad = noise(shape, step)
        optimizer.step()
        norms = (weight.detach() - old).norm(dim=1)
        assert_all_close([norms], [torch.full((rows,), LR * size, dtype=torch.float64)])


def test_scaling_one_row_changes_nothing_for_rmnp():
    a, b = parameters(((5, 4),)), parameters(((5, 4),))
    optimizers = RMNP(a), RMNP(b)
    for step in range(3):
        a[0].grad = noise((5, 4), step)
        b[0].grad = a[0].grad * torch.tensor([1.0, 1e-5, 1e5, 3.0, 1.0])[:, None]
        for optimizer in optimizers:
            optimizer.step()
    assert_all_close(b, a)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_directions_turn_with_the_columns(shape):
    """Right multiplication by an orthogonal matrix goes through, with the exact polar factor."""
    q = haar(shape[1], shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    v = w = torch.zeros(shape[0], 1, dtype=torch.float64)
    for step in range(3):
        g = noise(shape, step)
        a, v = normuon_direction(polar(g), v, 0.95, 1e-8)
        b, w = normuon_direction(polar(g @ q), w, 0.95, 1e-8)
        assert_all_close([b], [a @ q], 1e-10)
        assert_all_close([rmnp_direction(g @ q)], [rmnp_direction(g) @ q], 1e-10)


@pytest.mark.parametrize("row", [r for r in ROWS if r.turns], ids=lambda row: row.name)
def test_optimizers_turn_with_the_columns(row):
    """Statistics of columns cannot: there, a shape whose long side is the rows."""
    shape = (6, 4) if row.kwargs.get("reduce") == "long" else (4, 6)
    q = haar(shape[1], shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight, turned = nn.Parameter(noise(shape, 0)), nn.Parameter(noise(shape, 0) @ q)
    optimizers = row([weight]), row([turned])
    for step in range(3):
        weight.grad = noise(shape, step)
        turned.grad = weight.grad @ q
        for optimizer in optimizers:
            optimizer.step()
    assert_all_close([turned.detach()], [weight.detach() @ q], 1e-9)


def test_square_and_wide_matrices_leave_normuon_little_to_do():
    """With the exact polar factor their rows have norm one: Muon with the same size rule."""
    v = torch.zeros(4, 1, dtype=torch.float64)
    for step in range(3):
        o = polar(noise((4, 6), step))
        direction, v = normuon_direction(o, v, 0.95, 0.0)
        assert_all_close([direction / direction.norm()], [o / o.norm()])
    tall = polar(noise((6, 4), 0))
    direction, _ = normuon_direction(tall, torch.zeros(6, 1, dtype=torch.float64), 0.95, 0.0)
    assert (direction / direction.norm() - tall / tall.norm()).abs().max() > 0.01


@pytest.mark.parametrize("nesterov", [False, True])
def test_long_reduction_of_the_transpose_is_the_transpose(nesterov):
    a, b = nn.Parameter(noise((7, 4), 0)), nn.Parameter(noise((7, 4), 0).T.contiguous())
    own = {"reduce": "long", "nesterov": nesterov}
    optimizers = NorMuon([a], **own), NorMuon([b], **own)
    rows = NorMuon([nn.Parameter(b.detach().clone())], nesterov=nesterov)
    for step in range(3):
        a.grad = noise((7, 4), step)
        b.grad = a.grad.T.contiguous()
        flat(rows)[0].grad = b.grad
        for optimizer in (*optimizers, rows):
            optimizer.step()
    assert_all_close([b.detach().T], [a.detach()])
    state = [o.state[p]["second_moment"] for o, p in zip(optimizers, (a, b), strict=True)]
    assert_all_close(state[:1], state[1:])
    assert (flat(rows)[0] - b).abs().max() > 1e-6


def late_row_share(bias_correction):
    """Five neurons of eight inputs; the last is silent for ten steps. Its part of the update."""
    weight = nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    optimizer = NorMuon([weight], ns="classic", weight_decay=0.0, bias_correction=bias_correction)
    i = torch.arange(5, dtype=torch.float64)[:, None] + 1
    j = torch.arange(8, dtype=torch.float64) + 1
    for t in range(11):
        weight.grad = torch.cos(0.7 * i * j + 0.3 * t)
        if t < 10:
            weight.grad[4] = 0
        old = weight.detach().clone()
        optimizer.step()
        if t < 10:
            assert torch.equal(weight[4], old[4])
    update = weight.detach() - old
    return float(update[4].norm() / update.norm())


def test_a_late_row_takes_most_of_its_first_update():
    assert late_row_share(bias_correction=False) == pytest.approx(0.83, abs=0.01)
    assert late_row_share(bias_correction=True) == pytest.approx(1 / math.sqrt(5), abs=0.05)


def test_age_counts_from_the_first_active_step():
    weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = NorMuon([weight], bias_correction=True)
    for step in range(4):
        weight.grad = noise((3, 4), step)
        weight.grad[1] = 0
        if step < 2:
            weight.grad[2] = 0
        optimizer.step()
    assert optimizer.state[weight]["row_age"].tolist() == [4, 0, 2]


def test_silent_rows_keep_still_and_lose_their_statistics_slowly():
    weight = nn.Parameter(noise((3, 4), 0))
    optimizer = NorMuon([weight], betas=(0.0, 0.9), weight_decay=0.0)
    weight.grad = noise((3, 4), 1)
    optimizer.step()
    v, old = optimizer.state[weight]["second_moment"].clone(), weight.detach().clone()
    weight.grad = noise((3, 4), 2)
    weight.grad[1] = 0
    optimizer.step()
    assert torch.equal(weight[1], old[1])
    assert float(optimizer.state[weight]["second_moment"][1]) == pytest.approx(0.9 * float(v[1]))


# Polar factors in the precision that the classes take by default


@pytest.mark.parametrize("ns", NAMES)
@pytest.mark.parametrize("shape", [(4, 8), (8, 4), (2, 4), (16, 8), (6, 6)], ids=str)
def test_no_small_matrix_is_blown_up_in_bfloat16(ns, shape):
    """Every singular value ends below 1.3, the first guard, also for a few rows and columns."""
    x = noise((3000, *shape), 5, torch.bfloat16)
    sigma = torch.linalg.matrix_norm(orthogonalize(x, as_table(ns)).float(), 2)
    assert sigma.max() < 1.3


@pytest.mark.parametrize("ns", NAMES)
def test_few_active_neurons_are_not_blown_up_in_bfloat16(ns):
    """Four active rows and eight active inputs of a larger matrix, the rest silent."""
    x = torch.zeros(2000, 64, 192, dtype=torch.bfloat16)
    x[:, 3:7, 10:18] = noise((2000, 4, 8), 5, torch.bfloat16)
    o = orthogonalize(x, as_table(ns))[:, 3:7, 10:18].float()
    assert torch.linalg.matrix_norm(o, 2).max() < 1.3

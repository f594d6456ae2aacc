"""ARO in float64 against published values, its invariants, and what it must survive."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stiefel.linalg import haar, polar
from stiefel.optim.aro import ARO
from stiefel.optim.aro_update import aro_direction, aro_rotation, rotation_objective
from stiefel.optim.sinkhorn import row_map, sign_map, sinkhorn_normalize


def fixed_rotation(n):
    return haar(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gradient(rows, cols, t):
    i = torch.arange(rows, dtype=torch.float64)[:, None] + 1
    j = torch.arange(cols, dtype=torch.float64) + 1
    return torch.cos(0.7 * i * j + 0.3 * t)


def train(optimizer, gradients):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.to(p.dtype).clone()
        optimizer.step()
    return [p.detach() for p in params]


def zeros(*shape, dtype=torch.float64):
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def noise(shape, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def run(gradients, **settings):
    """Weight after these gradients, from zero."""
    weight = zeros(*gradients[0].shape, dtype=settings.pop("dtype", torch.float64))
    return train(ARO([weight], **{"lr": 0.01, **settings}), [[g] for g in gradients])[0]


THREE = [gradient(3, 5, t) for t in range(3)]
GOLDEN = {
    "sinkhorn": {
        0: [-0.0052180628, 0.0023391932, 0.0042400628, 0.0069293021, 0.0081030334],
        2: [0.0083653269, 0.0054447051, -0.0090480240, 0.0065048333, 0.0047462722],
    },
    "sign": {0: [-0.0066813319, -0.0003731034, 0.0049492443, 0.0072188323, 0.0072188323]},
    "row": {0: [-0.0046370806, 0.0022233180, 0.0048266053, 0.0073112348, 0.0064388353]},
}
BASES = tuple(GOLDEN)


def assert_exact(actual, expected, tolerance):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("qr", "tolerance"), [("qr", 6e-11), ("auto", 6e-11), ("scqr", 8e-9)])
def test_exact_values(base, qr, tolerance):
    weight = run(THREE, base=base, qr=qr)
    for row, values in GOLDEN[base].items():
        assert_exact(weight[row], values, tolerance)


@pytest.mark.parametrize("base", [*BASES, "adam"])
def test_tall_matrices_are_the_transpose_of_wide_ones(base):
    tall = run([g.mT for g in THREE], base=base)
    torch.testing.assert_close(tall, run(THREE, base=base).mT, atol=1e-15, rtol=0)


def reference(gradients, base, lr, decay, beta=0.95, rho=0.2, beta2=0.9):
    """The paper's lines, with exact QR."""
    m, n = gradients[0].shape
    momentum, v = torch.zeros(m, n, dtype=torch.float64), torch.zeros(m, n, dtype=torch.float64)
    r = torch.eye(m, dtype=torch.float64)
    weight = torch.zeros(m, n, dtype=torch.float64)
    for g in gradients:
        momentum = beta * momentum + (1 - beta) * g
        if base == "adam":
            ahead = beta2 * v + (1 - beta2) * (r.mT @ momentum).square()
            a = momentum @ (r.mT @ momentum / ahead.sqrt()).mT
            r = torch.linalg.qr(a)[0]
            v = beta2 * v + (1 - beta2) * (r.mT @ momentum).square()
            u = r @ (r.mT @ momentum / v.sqrt())
        else:
            a = momentum @ base(r.mT @ momentum).mT
            r = torch.linalg.qr(a)[0]
            u = r @ base(r.mT @ momentum)
        u = u * rho * (m * n) ** 0.5 / u.norm()
        weight = weight * (1 - lr * decay) - lr * u
    return weight


@pytest.mark.parametrize(
    ("base", "plain"),
    [
        ("sinkhorn", sinkhorn_normalize),
        ("sign", sign_map),
        ("row", lambda x: x / x.norm(dim=1, keepdim=True)),
        ("adam", "adam"),
        (torch.tanh, None),
    ],
    ids=["sinkhorn", "sign", "row", "adam", "callable"],
)
def test_it_is_the_algorithm(base, plain):
    gradients = noise((6, 11), 5)
    if plain is None:  # a function sees momentum of root mean square 1

        def plain(x):
            return torch.tanh(x * 66**0.5 / x.norm())

    weight = run(gradients, base=base, lr=0.03, weight_decay=0.4, beta2=0.9)
    expected = reference(gradients, plain, 0.03, 0.4)
    torch.testing.assert_close(weight, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("base", [*BASES, "adam"])
@given(exponent=st.floats(-7, 7))
@settings(max_examples=5, deadline=None)
def test_gradient_scale_changes_nothing(base, exponent):
    gradients = noise((6, 11), 4)
    scaled = [g * 3.7 * 10**exponent for g in gradients]
    expected = run(gradients, base=base)
    torch.testing.assert_close(run(scaled, base=base), expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e18, 1e36])
def test_any_gradient_scale_in_float32(base, scale):
    """Powers of two, as decimal factors round entries near zero across it."""
    gradients = noise((6, 11), 4)
    scale = 2.0 ** round(torch.tensor(scale).log2().item())
    scaled = run([g * scale for g in gradients], base=base, dtype=torch.float32)
    expected = run(gradients, base=base, dtype=torch.float32)
    torch.testing.assert_close(scaled, expected, atol=1e-6, rtol=0)


def test_sign_does_not_toss_coins():
    """RᵀA is triangular: with few columns RᵀM has exact zeros, whose computed sign is noise."""
    for seed in range(6):
        gradients = noise((6, 11), 5, seed)
        scaled = run([3.7 * g for g in gradients], base="sign")
        torch.testing.assert_close(scaled, run(gradients, base="sign"), atol=1e-12, rtol=0)


@pytest.mark.parametrize("base", ["sinkhorn", "row"])
def test_row_signs_and_column_permutations(base):
    gradients = noise((5, 9), 4)
    expected = run(gradients, base=base)
    signs = torch.tensor([1, -1, -1, 1, -1], dtype=torch.float64)[:, None]
    flipped = run([signs * g for g in gradients], base=base)
    torch.testing.assert_close(flipped, signs * expected, atol=1e-14, rtol=0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    permuted = run([g[:, order] for g in gradients], base=base)
    torch.testing.assert_close(permuted, expected[:, order], atol=1e-14, rtol=0)
    # Rows are ordered by QR: no such law.
    rows = run([g.flip(0) for g in gradients], base=base)
    assert (rows - expected.flip(0)).abs().max() > 1e-4


@pytest.mark.parametrize("base", [*BASES, "adam"])
@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (8, 3), (70, 90), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_update_has_the_root_mean_square(base, shape, dtype):
    weight = zeros(*shape, dtype=dtype)
    optimizer = ARO([weight], lr=1.0, base=base)
    for g in noise(shape, 3):
        before = weight.detach().clone()
        train(optimizer, [[g]])
        size = float((weight.detach() - before).double().square().mean().sqrt())
        assert size == pytest.approx(0.2, rel=1e-9 if dtype == torch.float64 else 2e-2)
    r = optimizer.state[weight]["rotation"]
    assert r.shape == (min(shape), min(shape))
    eye = torch.eye(min(shape), dtype=r.dtype)
    torch.testing.assert_close(r.mT @ r, eye, atol=1e-5, rtol=0)


def test_rms_none_leaves_the_update_as_it_is():
    weight = run(THREE[:1], rms=None, base="sign", rotation="identity")
    torch.testing.assert_close(weight, -0.01 * THREE[0].sign())


@pytest.mark.parametrize("base", [row_map, sign_map, sinkhorn_normalize], ids=lambda f: f.__name__)
def test_rotation_uses_the_old_r_and_direction_the_new(base):
    # Long rows: two rows of signs must not agree, or A loses rank and Q is not unique.
    m, old = noise((2, 5, 24), 1)[0], fixed_rotation(5).expand(2, 5, 5)
    m = m / m.square().mean((-2, -1), keepdim=True).sqrt()
    new = aro_rotation(m, old, base)
    a = m @ base(old.mT @ m).mT
    q = torch.linalg.qr(a)[0]
    torch.testing.assert_close(aro_direction(m, new, base), q @ base(q.mT @ m))
    for qr in ("qr", "scqr"):  # signs of columns are free and cancel
        r = aro_rotation(m, old, base, qr=qr)
        torch.testing.assert_close((r.mT @ q).abs(), torch.eye(5).double().expand(2, 5, 5))


def test_row_norm_with_constant_momentum_tends_to_muon():
    m = THREE[0][None]
    m = m / m.square().mean().sqrt()
    r, target, off = torch.eye(3, dtype=torch.float64)[None], polar(m), {}
    for step in range(1, 61):
        r = aro_rotation(m, r, row_map)
        off[step] = float((aro_direction(m, r, row_map) / 5**0.5 - target).norm())
    for step, value in {1: 0.361, 5: 0.0236, 20: 6.3e-6}.items():
        assert off[step] == pytest.approx(value, rel=0.02)
    assert off[60] < 1e-14


def test_a_rotation_equivariant_map_cancels_the_rotation():
    gradients = noise((5, 8), 3)
    weights = [run(gradients, base=polar, rotation=r) for r in ("aro", "eigen", "identity")]
    for weight in weights[1:]:
        torch.testing.assert_close(weight, weights[0], atol=1e-13, rtol=0)


@pytest.mark.parametrize("base", [row_map, sign_map], ids=lambda f: f.__name__)
def test_objective(base):
    m = noise((1, 16, 40), 1)[0]
    r = torch.eye(16, dtype=torch.float64)[None]
    # Freezing the inner R makes this a Procrustes problem, whose solution cannot be worse.
    values = [float(rotation_objective(m, r, base))]
    for _ in range(8):
        r = aro_rotation(m, r, base, policy="polar")
        values.append(float(rotation_objective(m, r, base)))
    assert all(b >= a - 1e-9 for a, b in pairwise(values))
    assert values[-1] > values[0] * 1.005
    if base is row_map:  # the eigenvectors are the worst rotation for rows
        least = 40**0.5 * float(torch.linalg.svdvals(m).sum())
        r = aro_rotation(m, r, base, policy="eigen")
        assert float(rotation_objective(m, r, base)) == pytest.approx(least)
        assert min(values) > least


# Momentum that spans less than the whole space


@pytest.mark.parametrize("base", [*BASES, "adam"])
@pytest.mark.parametrize("qr", ["qr", "scqr"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_momentum_moves_nothing(base, qr, dtype):
    weight = zeros(3, 5, dtype=dtype)
    optimizer = ARO([weight], lr=0.01, base=base, qr=qr)
    train(optimizer, [[torch.zeros(3, 5)]] * 2)
    assert not weight.detach().any()
    r = optimizer.state[weight]["rotation"]
    assert r.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(r, torch.eye(3, dtype=r.dtype))
    expected = run(THREE[:1], base=base, qr=qr, dtype=dtype)
    train(optimizer, [[THREE[0]]])
    if base != "adam":
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("policy", ["aro", "eigen", "polar", "identity"])
def test_zero_momentum_keeps_the_rotation(policy):
    m, r = noise((3, 4, 6), 1)[0], fixed_rotation(4).expand(3, 4, 4)
    m[1] = 0
    new = aro_rotation(m, r, row_map, policy=policy)
    assert torch.equal(new[1], r[1])
    assert torch.equal(new[0], r[0]) == (policy == "identity")


@pytest.mark.parametrize("base", [*BASES, "adam"])
@pytest.mark.parametrize("qr", ["qr", "scqr"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 4])
def test_updates_stay_in_the_space_of_deficient_momentum(base, qr, dtype, rank):
    """Rows of RᵀM that are rounding noise must not be blown up to norm √n."""
    left, right = noise((64, rank), 1)[0], noise((rank, 96), 4, seed=1)
    gradients = [left @ r for r in right]
    weight = run(gradients, base=base, qr=qr, dtype=dtype, product_dtype=torch.float32).double()
    inside = torch.linalg.qr(left)[0]
    outside = weight - inside @ (inside.mT @ weight)
    assert torch.isfinite(weight).all()
    assert weight.norm() > 0
    assert outside.norm() < 1e-3 * weight.norm()


@pytest.mark.parametrize("base", [*BASES, "adam"])
def test_dead_rows_and_columns_do_not_move(base):
    gradients = noise((6, 10), 4)
    for g in gradients:
        g[2], g[:, 7] = 0, 0
    weight = run(gradients, base=base)
    assert torch.isfinite(weight).all()
    assert not weight[:, 7].any()
    assert weight[2].norm() < 1e-12

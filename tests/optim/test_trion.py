"""Trion against its equations written out, Muon as its full-rank case, and its error feedback."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from stiefel.linalg import dct_matrix, haar, newton_schulz
from stiefel.optim import Muon
from stiefel.optim.columns import ColumnSelector
from stiefel.optim.trion import Trion, trion_direction

METHODS = ("fft", "matmul")
every_method = pytest.mark.parametrize("method", METHODS)


def noise(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def weights(*shapes, dtype=torch.float64):
    return [nn.Parameter(noise(shape, i, dtype)) for i, shape in enumerate(shapes)]


def train(optimizer, steps, start=0, scale=1.0):
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(start, start + steps):
        for i, p in enumerate(params):
            p.grad = (noise(p.shape, 100 * (step + 1) + i) * scale).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def reference(weight, gradients, *, rank, lr, mu, wd, scale, basis, norm=1):
    """The sheet's listing for R ≥ C, one line a line, with a matrix for everything."""
    n = weight.shape[1]
    d = dct_matrix(n, dtype=torch.float64)
    q = d.mT if basis == "dct2" else d
    m = torch.zeros_like(weight)
    for g in gradients:
        b = m + g
        s = b @ q
        chosen = torch.linalg.vector_norm(s, norm, dim=0).topk(rank).indices.sort().values
        low, p = s[:, chosen], q[:, chosen]
        m = b - (1 - mu) * low @ p.mT
        o = newton_schulz(low, 5, "classic")
        weight = weight * (1 - lr * wd) - lr * scale * (o @ p.mT)
    return weight, m, q


@every_method
@pytest.mark.parametrize("basis", ["dct2", "dct3"])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("shape", [(9, 6), (6, 6), (6, 9)], ids=str)
def test_it_is_the_listing_of_the_sheet(method, basis, norm, shape):
    settings = {"weight_decay": 0.3, "momentum": 0.8, "ns": "classic", "scale": "kj"}
    parameter = weights(shape)[0]
    start, wide = parameter.detach().clone(), shape[0] < shape[1]
    optimizer = Trion(
        [parameter], lr=0.1, rank=2, basis=basis, norm=norm, method=method, **settings
    )
    gradients = [noise(shape, 100 * (t + 1)) for t in range(4)]
    train(optimizer, 4)
    expected, momentum, q = reference(
        start.mT if wide else start,
        [g.mT if wide else g for g in gradients],
        rank=2,
        lr=0.1,
        mu=0.8,
        wd=0.3,
        scale=math.sqrt(max(1, shape[0] / shape[1])),
        basis=basis,
        norm=norm,
    )
    frame = momentum @ q
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(parameter.detach(), expected.mT if wide else expected, **close)
    kept = optimizer.state[parameter]["momentum_dct"]
    torch.testing.assert_close(kept, frame.mT if wide else frame, **close)


@every_method
@pytest.mark.parametrize(("shape", "dim"), [((8, 6), -1), ((6, 8), -2)])
def test_the_pure_function_is_the_class(method, shape, dim):
    parameter = weights(shape)[0]
    start = parameter.detach().clone()
    optimizer = Trion([parameter], lr=0.1, rank=3, scale="none", method=method)
    train(optimizer, 3)
    selector, momentum = ColumnSelector(6, 3, method=method), torch.zeros(shape).double()
    for t in range(3):
        gradient = noise(shape, 100 * (t + 1))
        before = gradient.clone(), momentum.clone()
        direction, new = trion_direction(gradient, momentum, selector, 0.95, dim=dim)
        assert torch.equal(gradient, before[0])
        assert torch.equal(momentum, before[1])
        momentum, start = new, start - 0.1 * direction
    torch.testing.assert_close(parameter.detach(), start)


@every_method
@pytest.mark.parametrize("shape", [(7, 5), (5, 5), (5, 7)], ids=str)
@pytest.mark.parametrize("ns", ["fitted", "fast", "classic", "polar_express"])
def test_full_rank_is_muon_without_nesterov(method, shape, ns):
    ours, muons = weights(shape), weights(shape)
    # Muon's mean is 1 − μ times Trion's sum, which published ε could tell apart.
    same = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2, "ns": ns, "eps": 0.0}
    train(Trion(ours, rank=5, method=method, scale="kj", **same), 4)
    train(Muon(muons, nesterov=False, scale="spectral", **same), 4)
    torch.testing.assert_close(ours[0], muons[0], rtol=0, atol=1e-9)


@every_method
@pytest.mark.parametrize("scale", ["none", "kimi"])
def test_transposing_the_problem_transposes_every_iterate(method, scale):
    for shape, sides in (((9, 6), ("auto", "auto")), ((6, 6), ("right", "left"))):
        one, other = weights(shape)[0], nn.Parameter(weights(shape)[0].detach().mT.contiguous())
        settings = {"rank": 2, "scale": scale, "method": method}
        optimizers = (
            Trion([one], side=sides[0], **settings),
            Trion([other], side=sides[1], **settings),
        )
        for t in range(4):
            one.grad = noise(shape, 100 * (t + 1))
            other.grad = one.grad.mT.contiguous()
            for optimizer in optimizers:
                optimizer.step()
            torch.testing.assert_close(one, other.mT, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_scale_of_gradients_does_not_matter(scale, dtype):
    shapes = ((9, 6), (6, 9))
    one, other = (Trion(weights(*shapes, dtype=dtype), rank=2) for _ in "ab")
    expected = train(one, 3)
    torch.testing.assert_close(train(other, 3, scale=scale), expected, rtol=0, atol=1e-6)


def test_the_side_that_is_asked_for_is_taken():
    n = 6
    for side, transform in (("right", lambda g: g @ dct_matrix(n).double().mT), ("left", None)):
        parameter = weights((4, n))[0]
        optimizer = Trion([parameter], rank=2, side=side)
        train(optimizer, 1)
        kept = optimizer.state[parameter]["momentum_dct"]
        g = parameter.grad
        frame = transform(g) if transform else dct_matrix(4).double() @ g
        changed = (kept - frame).abs().sum(0 if side == "right" else 1) > 1e-6
        assert int(changed.sum()) == 2


def test_what_is_left_out_waits_until_it_is_chosen():
    """Identity basis, rank 1: the weaker column gathers momentum until it is the larger."""
    parameter = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = Trion([parameter], lr=1.0, rank=1, momentum=0.5, basis=torch.eye, scale="none")
    gradient = torch.tensor([[2.0, 0.9]] * 3, dtype=torch.float64)
    # A row of B: 2, 3, 3.5, 3.75, 3.875 against 0.9, 1.8, 2.7, 3.6, 4.5.
    chosen = []
    for _ in range(4):
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        chosen.append(((parameter - before).abs().sum(0) > 0).tolist())
    assert chosen == [[True, False]] * 4
    momentum = optimizer.state[parameter]["momentum_dct"]
    torch.testing.assert_close(momentum[0].tolist(), [1.875, 3.6])
    before = parameter.detach().clone()
    optimizer.step()
    assert ((parameter - before).abs().sum(0) > 0).tolist() == [False, True]
    torch.testing.assert_close(momentum[0].tolist(), [3.875, 2.25])


def test_an_update_has_r_singular_values_near_one():
    parameter = nn.Parameter(torch.zeros(40, 24, dtype=torch.float64))
    optimizer = Trion([parameter], lr=1.0, rank=0.25, scale="none")
    parameter.grad = noise((40, 24), 5)
    optimizer.step()
    sigma = torch.linalg.svdvals(parameter.detach())
    assert ((sigma[:6] > 0.85) & (sigma[:6] < 1.15)).all()
    assert sigma[6:].max() < 1e-12


def test_a_random_basis_for_study():
    def rotation(n):
        return haar(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)

    ours, theirs = weights((7, 5)), weights((7, 5))
    same = {"lr": 0.05, "weight_decay": 0.0, "momentum": 0.9}
    train(Trion(ours, rank=5, basis=rotation, **same), 2)
    train(Muon(theirs, nesterov=False, **same), 2)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-8)
    parts = weights((7, 5))
    train(Trion(parts, rank=2, basis=rotation), 2)
    assert torch.linalg.matrix_rank(parts[0] - weights((7, 5))[0]) <= 4


@pytest.mark.parametrize(
    ("alias", "name"), [("kj", "spectral"), ("kimi", "rms"), ("none", None)], ids=str
)
def test_two_names_for_a_size(alias, name):
    one = train(Trion(weights((9, 4)), scale=alias), 2)
    assert torch.equal(one[0], train(Trion(weights((9, 4)), scale=name), 2)[0])


@pytest.mark.parametrize(
    ("scale", "size"),
    [("kj", math.sqrt(9 / 4)), ("kimi", 0.2 * 3), ("dion", 1.5), ("none", 1.0)],
)
def test_sizes(scale, size):
    zero = nn.Parameter(torch.zeros(9, 4, dtype=torch.float64))
    train(Trion([zero], lr=1.0, rank=1, scale=scale), 1)
    one = float(torch.linalg.matrix_norm(zero.detach(), 2))
    assert one == pytest.approx(size * 1.03675, rel=1e-4)  # the fitted image of σ₀ = 1


def test_steps_of_newton_schulz():
    results = {
        (ns, steps): train(Trion(weights((9, 4)), rank=2, ns=ns, ns_steps=steps), 1)[0]
        for ns in ("fast", "classic")
        for steps in (3, 4, 5)
    }
    assert torch.equal(results["fast", 4], results["fast", 5])
    assert not torch.equal(results["fast", 3], results["fast", 4])
    assert not torch.equal(results["classic", 4], results["classic", 5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_by_one_is_together(dtype):
    shapes = ((9, 6), (6, 9), (9, 6), (6, 6), (9, 6))
    together = train(Trion(weights(*shapes, dtype=dtype), rank=2), 3)
    alone = train(Trion(weights(*shapes, dtype=dtype), rank=2, foreach=False), 3)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12 if dtype.itemsize > 4 else 2e-2)


def test_blocks_experts_and_kernels():
    """Every matrix of a parameter is treated as a parameter of its own."""
    block, expert, kernel = noise((7, 4), 0), noise((2, 5, 4), 1), noise((5, 3, 2, 2), 2)
    params = [nn.Parameter(t.clone()) for t in (block, expert, kernel)]
    groups = [
        {"params": [params[0]], "blocks": (3, 4)},
        {"params": [params[1]], "view": "batch"},
        {"params": [params[2]]},
    ]
    whole = Trion(groups, rank=2)
    pieces = [
        nn.Parameter(t.clone())
        for t in (block[:3], block[3:], expert[0], expert[1], kernel.flatten(1))
    ]
    single = Trion(pieces, rank=2)
    for t in range(3):
        for p in params:
            p.grad = noise(p.shape, 10 * t + p.ndim)
        b, e, k = (p.grad for p in params)
        for p, g in zip(pieces, (b[:3], b[3:], e[0], e[1], k.flatten(1)), strict=True):
            p.grad = g.clone()
        whole.step()
        single.step()
    torch.testing.assert_close(params[0].detach(), torch.cat([p.detach() for p in pieces[:2]]))
    torch.testing.assert_close(params[1].detach(), torch.stack([p.detach() for p in pieces[2:4]]))
    torch.testing.assert_close(params[2].detach().flatten(1), pieces[4].detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_state_is_one_momentum_and_survives_a_file(dtype):
    through, stopped = (Trion(weights((9, 6), (6, 9), dtype=dtype), rank=2) for _ in "ab")
    expected = train(through, 5)
    halfway = train(stopped, 2)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for state in saved["state"].values():
        assert {k: (v.dtype, v.numel()) for k, v in state.items()} == {"momentum_dct": (dtype, 54)}
    settings = saved["param_groups"][0]
    assert not any(isinstance(v, torch.Tensor) for v in settings.values())
    resumed = Trion([nn.Parameter(p) for p in halfway], rank=0.9)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["rank"] == 2
    for p, q in zip(train(resumed, 3, start=2), expected, strict=True):
        assert torch.equal(p, q)


def test_a_momentum_in_another_frame_is_not_taken():
    muon = Muon(weights((6, 4)))
    train(muon, 2)
    resumed, fresh = Trion(weights((6, 4)), rank=2), Trion(weights((6, 4)), rank=2)
    state = copy.deepcopy(muon.state_dict())
    state["param_groups"] = fresh.state_dict()["param_groups"]
    with pytest.warns(UserWarning, match="no 'momentum_dct', so it is of another method"):
        resumed.load_state_dict(state)
    assert not resumed.state
    assert torch.equal(train(resumed, 2)[0], train(fresh, 2)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_huge_and_outlying_gradients(dtype):
    for fill in (0.0, 1e-30, 1e30):
        parameter = weights((9, 6), dtype=dtype)[0]
        before = parameter.detach().clone()
        optimizer = Trion([parameter], rank=2)
        gradient = torch.full((9, 6), fill, dtype=dtype)
        for outlier in (1.0, 1e4):
            gradient[0, 0] = fill * outlier
            parameter.grad = gradient
            optimizer.step()
        assert torch.isfinite(parameter).all()
        assert torch.equal(parameter, before) == (fill == 0)


def test_nothing_but_weights_and_state_changes():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        parameter = weights((6, 9), dtype=dtype)[0]
        optimizer = Trion([parameter], rank=2)
        parameter.grad = noise((6, 9), 3, dtype)
        before = parameter.grad.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, before)


def test_one_warning_for_too_large_a_rank():
    with pytest.warns(UserWarning, match="rank 7 is more than the width 4") as caught:
        optimizer = Trion(weights((9, 4), (4, 9), (8, 8)), rank=7)
    assert len([w for w in caught if "rank" in str(w.message)]) == 1
    train(optimizer, 1)
    own, full = weights((9, 4)), weights((9, 4))
    with pytest.warns(UserWarning, match="rank 7"):
        train(Trion(own, rank=7), 2)
    train(Trion(full, rank=4), 2)
    assert torch.equal(own[0], full[0])


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"lr": math.nan}, ValueError, "lr must be finite"),
        ({"lr": -1.0}, ValueError, "lr must be finite"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": 1.5}, ValueError, "rank must be a fraction"),
        ({"rank": True}, TypeError, "rank must be"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
        ({"scale": "muon"}, ValueError, "scale must be one of"),
        ({"ns_steps": 0}, ValueError, "ns_steps must be at least 1"),
        ({"ns_steps": True}, TypeError, "ns_steps must be an integer"),
        ({"norm": 3}, ValueError, "norm must be one of"),
        ({"side": "top"}, ValueError, "side must be one of"),
        ({"basis": "dct4"}, ValueError, "basis must be one of"),
        ({"basis": torch.eye(4)}, TypeError, "basis"),
        ({"basis": torch.eye, "method": "fft"}, ValueError, "method='fft' needs"),
        ({"method": "slow"}, ValueError, "method must be one of"),
        ({"ns": ((4.0, 9.0, 9.0),)}, ValueError, "coefficients send"),
        ({"ns": "best"}, ValueError, "ns must be one of"),
        ({"nonfinite": "hope"}, ValueError, "nonfinite must be one of"),
        ({"maximize": True}, ValueError, "maximize must be False"),
        ({"adamw_lr": -1.0}, ValueError, "lr must be finite"),
    ],
)
def test_bad_settings(setting, error, message):
    with pytest.raises(error, match=message):
        Trion(weights((6, 4)), **setting)


def test_bad_gradients_and_parameters():
    with pytest.raises(ValueError, match="no matrix"):
        Trion([nn.Parameter(torch.zeros(4))])
    parameter = weights((6, 4))[0]
    optimizer = Trion([parameter])
    before = parameter.detach().clone()
    parameter.grad = torch.full_like(parameter, math.nan)
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        optimizer.step()
    parameter.grad = noise((6, 4), 0).to_sparse()
    with pytest.raises(RuntimeError, match="Trion does not support sparse"):
        optimizer.step()
    assert torch.equal(parameter, before)
    assert not optimizer.state
    parameter.grad = torch.full_like(parameter, math.nan)
    optimizer = Trion([parameter], nonfinite="propagate")
    optimizer.step()
    assert parameter.isnan().any()

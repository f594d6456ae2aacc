"""ARO: which side is rotated, what shares a rotation, what is saved, what is refused."""

import copy
import io
from itertools import pairwise

import pytest
import torch
from test_aro import noise, run, train, zeros
from torch import nn

from stiefel.linalg.schulz import product_dtype
from stiefel.optim import split_parameters
from stiefel.optim.aro import ARO
from stiefel.optim.aro_layout import aro_param_groups
from stiefel.optim.aro_update import aro_direction, aro_rotation
from stiefel.optim.sinkhorn import row_map, sinkhorn_normalize


class Block(nn.Module):
    """Attention with fewer key and value heads, gated MLP."""

    def __init__(self, d=8, kv=4, hidden=12):
        super().__init__()
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)


class Model(nn.Module):
    def __init__(self, layers=2, vocabulary=30):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(8, vocabulary, bias=False)


def model_gradients(model, step, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def trained(model, groups, steps=3, **settings):
    optimizer = ARO(groups, lr=0.01, **settings)
    for step in range(steps):
        model_gradients(model, step)
        optimizer.step()
    return optimizer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().double()


# Orientation


def test_square_weights_are_oriented_by_name(model):
    before = copy.deepcopy(model)
    trained(model, aro_param_groups(model), steps=1)
    for name, columns in (("q_proj", True), ("o_proj", False)):
        weight = dict(model.named_parameters())[f"layers.0.{name}.weight"]
        old = dict(before.named_parameters())[f"layers.0.{name}.weight"]
        g = weight.grad.mT if columns else weight.grad
        expected = run([g])
        moved = (weight - old).detach()
        torch.testing.assert_close(moved.mT if columns else moved, expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize("side", ["rows", "cols"])
def test_orientation_by_word_and_by_function(side):
    gradients = noise((5, 5), 3)
    expected = run(gradients) if side == "rows" else run([g.mT for g in gradients]).mT
    torch.testing.assert_close(run(gradients, orient=side), expected, atol=1e-15, rtol=0)
    asked = []

    def choose(name, parameter):
        asked.append((name, tuple(parameter.shape)))
        return side == "rows"

    torch.testing.assert_close(run(gradients, orient=choose), expected, atol=1e-15, rtol=0)
    assert asked == [("", (5, 5))]
    assert (run(gradients, orient="rows") - run(gradients, orient="cols")).abs().max() > 1e-3


def test_rotating_the_longer_side_is_refused():
    message = r"orient='rows' rotates the longer side \(96 of 96×32\) of w: .*the other 64 dir"
    with pytest.raises(ValueError, match=message):
        ARO([("w", zeros(96, 32))], orient="rows")
    with pytest.raises(ValueError, match="rotates the longer side"):
        ARO([zeros(3, 5)], orient=lambda name, p: False)


def test_why_the_longer_side_is_refused():
    """Householder fills R with arbitrary directions there; this is that noise, unmasked."""
    tall = noise((96, 32), 1)[0]
    tall = tall / tall.square().mean().sqrt()
    inside = torch.linalg.qr(tall)[0]
    for oriented, least in ((tall.mT, 0.95), (tall, None)):
        r = torch.eye(oriented.shape[0], dtype=torch.float64)
        for _ in range(3):
            r = aro_rotation(oriented[None], r.view(1, *r.shape), row_map)[0]
        rotated = r.mT @ oriented
        u = r @ (rotated / rotated.norm(dim=1, keepdim=True))
        cosine = float((u * oriented).sum() / u.norm() / oriented.norm())
        if least is None:
            outside = u - inside @ (inside.mT @ u)
            assert float(outside.norm() / u.norm()) ** 2 == pytest.approx(2 / 3, abs=0.02)
            assert cosine < 0.6
            masked = aro_direction(oriented[None], r[None], row_map)[0]
            assert (masked - inside @ (inside.mT @ masked)).norm() < 1e-9
        else:
            assert cosine > least


# Shared rotations


def test_one_rotation_for_a_layer_is_the_formula(model):
    before = copy.deepcopy(model)
    optimizer = trained(model, aro_param_groups(model), share="layer")
    for layer in range(2):
        names = [f"layers.{layer}.{n}_proj.weight" for n in ("q", "k", "v", "o", "up", "down")]
        consumer = [True, True, True, False, True, False]
        momenta = [torch.zeros_like(dict(model.named_parameters())[n]) for n in names]
        momenta = [m.mT if c else m for m, c in zip(momenta, consumer, strict=True)]
        weights = [torch.zeros_like(m) for m in momenta]
        r = torch.eye(8, dtype=torch.float64)
        for step in range(3):
            model_gradients(model, step)
            grads = [dict(model.named_parameters())[n].grad for n in names]
            grads = [g.mT if c else g for g, c in zip(grads, consumer, strict=True)]
            momenta = [0.95 * m + 0.05 * g for m, g in zip(momenta, grads, strict=True)]
            cat = torch.cat(momenta, dim=1)
            r = torch.linalg.qr(cat @ sinkhorn_normalize(r.mT @ cat).mT)[0]
            for w, m in zip(weights, momenta, strict=True):
                u = r @ sinkhorn_normalize(r.mT @ m)
                w -= 0.01 * 0.2 * u.numel() ** 0.5 * u / u.norm()
        for name, w, c in zip(names, weights, consumer, strict=True):
            p = dict(model.named_parameters())[name]
            moved = (p - dict(before.named_parameters())[name]).detach()
            torch.testing.assert_close(moved.mT if c else moved, w, atol=1e-12, rtol=0)
        owners = [
            n for n in names if "rotation" in optimizer.state[dict(model.named_parameters())[n]]
        ]
        assert owners == names[:1]


@pytest.mark.parametrize("base", ["sinkhorn", "sign", "row", "adam"])
def test_lists_share_like_layers(model, base):
    twin = copy.deepcopy(model)
    trained(model, aro_param_groups(model), share="layer", base=base)
    sets = [list(layer.parameters()) for layer in twin.layers]
    trained(twin, aro_param_groups(twin), share=sets, base=base)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("base", ["sinkhorn", "adam"])
def test_a_set_of_one_is_no_set(base):
    weights, twins = [zeros(4, 6), zeros(6, 4)], [zeros(4, 6), zeros(6, 4)]
    gradients = [[a, b] for a, b in zip(noise((4, 6), 3), noise((6, 4), 3, 1), strict=True)]
    shared = train(ARO(weights, share=[[weights[0]], [weights[1]]], base=base), gradients)
    for a, b in zip(shared, train(ARO(twins, base=base), gradients), strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=0)


def test_the_owner_of_a_shared_rotation_may_be_silent():
    weights = [zeros(4, 6), zeros(4, 5)]
    a, b = noise((4, 6), 4), noise((4, 5), 4, 1)
    optimizer = ARO(weights, share=[weights])
    train(optimizer, [[None, b[0]], [None, b[1]]])
    alone = zeros(4, 5)
    expected = train(ARO([alone]), [[b[0]], [b[1]]])[0]
    torch.testing.assert_close(weights[1].detach(), expected, atol=1e-14, rtol=0)
    r = optimizer.state[weights[0]]["rotation"].clone()
    assert not torch.equal(r, torch.eye(4, dtype=torch.float64))
    assert not weights[0].detach().any()
    other = ARO(weights, share=[weights])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.state[weights[0]]["rotation"], r)
    train(other, [[a[2], b[2]]])
    assert weights[0].detach().any()


def test_sets_without_a_common_side_are_refused():
    a, b = zeros(4, 6), zeros(5, 7)
    with pytest.raises(ValueError, match="one side in common, got a 4×6, b 5×7"):
        ARO([("a", a), ("b", b)], share=[[a, b]])
    with pytest.raises(ValueError, match="share='layer' needs names"):
        ARO([a, b], share="layer")
    with pytest.raises(ValueError, match="share must be None, 'layer' or lists"):
        ARO([a], share="block")
    with pytest.raises(ValueError, match="more than one set"):
        ARO([a, b], share=[[a], [a]])
    with pytest.raises(ValueError, match="1 parameters in one group and 1 elsewhere"):
        ARO([{"params": [a]}, {"params": [b]}], share=[[a, b]])
    square, wide = zeros(4, 4), zeros(8, 4)
    with pytest.raises(ValueError, match="one side in common, got"):
        ARO([square, wide], share=[[square, wide]], orient="rows")


# Views, blocks, stacks


@pytest.mark.parametrize("base", ["sinkhorn", "adam"])
def test_blocks_and_stacks_are_matrices_of_their_own(base):
    parts = [noise((4, 6), 3), noise((2, 6), 3, 1)]
    expected = [run(part, base=base) for part in parts]
    gradients = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    weight = zeros(6, 6)
    group = {"params": [weight], "blocks": (4, 2)}
    train(ARO([group], lr=0.01, base=base), [[g] for g in gradients])
    torch.testing.assert_close(weight.detach(), torch.cat(expected), atol=1e-14, rtol=0)

    stack = zeros(2, 4, 6)
    group = {"params": [stack], "view": "batch"}
    train(ARO([group], lr=0.01, base=base), [[torch.stack([g, -g])] for g in parts[0]])
    both = torch.stack([expected[0], -expected[0]])
    torch.testing.assert_close(stack.detach(), both, atol=1e-14, rtol=0)


def test_stacks_give_what_single_matrices_give():
    gradients = [list(step) for step in zip(*(noise((7, 9), 3, s) for s in range(5)), strict=True)]
    together = train(ARO([zeros(7, 9) for _ in range(5)]), gradients)
    single = train(ARO([zeros(7, 9) for _ in range(5)], foreach=False), gradients)
    for a, b in zip(together, single, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=0)


def test_rotation_every_keeps_r_between():
    weight = zeros(4, 6)
    optimizer = ARO([weight], rotation_every=3)
    seen = []
    for g in noise((4, 6), 7):
        train(optimizer, [[g]])
        seen.append(optimizer.state[weight]["rotation"].clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changed == [False, False, True, False, False, True]
    assert optimizer.state[weight]["step"] == 7


def test_identity_is_the_normalised_momentum():
    g = noise((4, 6), 1)[0]
    torch.testing.assert_close(run([g], rotation="identity"), -0.002 * sinkhorn_normalize(g))


# Precision


@pytest.mark.parametrize("base", ["sinkhorn", "row", "adam"])
def test_bfloat16_products_follow_float32(base):
    gradients = noise((96, 128), 4)
    exact = run(gradients, base=base)
    # Adam's first steps divide by what they have just seen: nearly signs.
    for dtype, tolerance in (
        (torch.float32, 1e-3),
        (torch.bfloat16, 0.3 if base == "adam" else 0.1),
    ):
        weight = run(gradients, base=base, dtype=torch.float32, product_dtype=dtype)
        off = float((weight.double() - exact).norm() / exact.norm())
        assert off < tolerance
        assert (off > 1e-3) == (dtype == torch.bfloat16)


def test_precision_is_chosen_where_it_is_harmless():
    optimizer = ARO([zeros(4, 6)])
    native = product_dtype("cpu")
    cases = [
        ({}, 64, torch.float32, native),
        ({}, 32, torch.float32, torch.float32),
        ({}, 64, torch.float64, torch.float64),
        ({"base": "sign"}, 64, torch.float32, torch.float32),
        ({"base": torch.tanh}, 64, torch.bfloat16, torch.float32),
        ({"rotation": "eigen"}, 64, torch.float32, torch.float32),
        ({"base": "sign", "product_dtype": torch.bfloat16}, 8, torch.float32, torch.bfloat16),
    ]
    for settings, m, dtype, expected in cases:
        group = {**optimizer.param_groups[0], **settings}
        assert optimizer._precision(group, m, torch.zeros(1, dtype=dtype)) == expected
    signs = {**optimizer.param_groups[0], "base": "sign"}
    for m, expected in ((64, native), (32, torch.float32)):
        assert optimizer._precision(signs, m, torch.zeros(1), ahead=True) == expected


@pytest.mark.parametrize("rank", [1, 3])
def test_signs_of_low_rank_momentum_stay_in_its_column_space(rank):
    """Also where RᵀM of the old R is in bfloat16, whose noise has full rank."""
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(rank, 160, generator=generator, dtype=torch.float64)
    gradient = torch.randn(96, rank, generator=generator, dtype=torch.float64) @ low
    weight = zeros(96, 160, dtype=torch.float32)
    optimizer = ARO([weight], lr=1.0, base="sign")
    for _ in range(3):
        weight.data.zero_()
        train(optimizer, [[gradient.float()]])
    u = torch.linalg.svd(gradient)[0][:, :rank]
    step = weight.detach().double()
    assert float((step - u @ (u.mT @ step)).norm() / step.norm()) < 0.01


@pytest.mark.parametrize("base", ["sinkhorn", "row", "sign", "adam"])
def test_bfloat16_parameters_keep_float32_rotations(base):
    weight = zeros(8, 12, dtype=torch.bfloat16)
    optimizer = ARO([weight], lr=0.01, base=base)
    gradients = [g.bfloat16() for g in noise((8, 12), 4)]
    train(optimizer, [[g] for g in gradients])
    r = optimizer.state[weight]["rotation"]
    assert r.dtype == torch.float32
    torch.testing.assert_close(r.mT @ r, torch.eye(8), atol=1e-5, rtol=0)
    assert not torch.equal(r, r.bfloat16().float())
    assert optimizer.state[weight]["momentum_buffer"].dtype == torch.bfloat16
    other = ARO([weight], lr=0.01, base=base)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, value in optimizer.state[weight].items():
        assert torch.equal(other.state[weight][key], value)
        assert other.state[weight][key].dtype == value.dtype
    exact = run([g.double() for g in gradients], base=base)
    cosine = (weight.detach().double() * exact).sum() / weight.double().norm() / exact.norm()
    assert float(cosine.detach()) > (0.9 if base == "sign" else 0.98)


# State and settings


def test_functions_stay_out_of_saved_files():
    weight = zeros(4, 6)
    optimizer = ARO([weight], base=torch.tanh, orient=lambda name, p: True)
    first, second = noise((4, 6), 2)
    train(optimizer, [[first]])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = nn.Parameter(weight.detach().clone())
    resumed = ARO([twin], base=torch.tanh, orient=lambda name, p: True)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(train(resumed, [[second]])[0], train(optimizer, [[second]])[0])
    with pytest.raises(
        ValueError, match=r"base must keep shapes, got \(1, 6, 4\) for .* \(1, 4, 6\)"
    ):
        train(ARO([weight], base=lambda x: x.mT), [[first]])


def test_groups_of_a_model(model, capsys):
    hybrid = aro_param_groups(model)
    assert [(g["rule"], len(g["params"])) for g in hybrid] == [("matrix", 12), ("elementwise", 2)]
    assert [g["rule"] for g in hybrid] == [g["rule"] for g in split_parameters(model)]
    assert capsys.readouterr().out == ""
    full = aro_param_groups(model, "full", show=True)
    assert [(g["rule"], len(g["params"])) for g in full] == [("matrix", 14), ("elementwise", 0)]
    assert "30×8" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="the elementwise rule got no parameter"):
        optimizer = trained(model, full, steps=1)
    assert optimizer.state[model.embed.weight]["rotation"].shape == (8, 8)
    with pytest.raises(ValueError, match="mode must be 'hybrid' or 'full', got 'all'"):
        aro_param_groups(model, "all")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite(value):
    weight = zeros(3, 5)
    optimizer = ARO([weight])
    train(optimizer, [[g] for g in noise((3, 5), 2)])
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    weight.grad = torch.full((3, 5), value, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        optimizer.step()
    optimizer.param_groups[0]["nonfinite"] = "skip"
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step()
    for key, old in saved[0].items():
        assert torch.equal(optimizer.state[weight][key], old)
    optimizer.param_groups[0]["nonfinite"] = "propagate"
    optimizer.step()
    assert weight.isnan().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and ≥ 0"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\)"),
        ({"beta": -0.1}, r"beta must be in \[0, 1\)"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be finite"),
        ({"base": "polar"}, "base must be one of"),
        ({"rotation": "soap"}, "rotation must be one of"),
        ({"qr": "lq"}, "qr must be one of"),
        ({"orient": "left"}, "orient must be one of"),
        ({"sinkhorn_iters": 0}, "sinkhorn_iters must be a whole number ≥ 1, got 0"),
        ({"rotation_every": 0}, "rotation_every must be a whole number ≥ 1, got 0"),
        ({"sinkhorn_mode": "both"}, "sinkhorn_mode must be one of"),
        ({"rms": -0.2}, "rms must be finite and ≥ 0"),
        ({"product_dtype": torch.float16}, "product_dtype must be one of"),
        ({"nonfinite": "stop"}, "nonfinite must be one of"),
        ({"maximize": True}, "maximize must be False"),
        ({"adamw_lr": -1.0}, "lr must be finite"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        ARO([zeros(3, 5)], **settings)


def test_what_is_no_matrix_is_named():
    with pytest.raises(ValueError, match=r"'bias' has shape \(5,\), which is no matrix"):
        ARO([("bias", zeros(5))])
    weight = zeros(3, 5)
    weight.grad = torch.zeros(3, 5, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        ARO([weight]).step()

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stiefel.linalg import ptd_diagonalize
from stiefel.linalg.hippo import hippo_legs, legs_normal
from stiefel.nn import S5, S5Block, s5_init, ssm_param_groups
from stiefel.nn.s4d import seeded_linear

SETTINGS = (
    {},
    {"init": "ptd"},
    {"init": "ptd", "blocks": 2},
    {"disc": "bilinear", "clip_eigs": True},
    {"conj_sym": False, "blocks": 4},
    {"init": "ptd", "t": 0.01},
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer_and_input(batch=3, length=40, dtype=torch.float64, **settings):
    layer = S5(5, 16, generator=generator(), dtype=dtype, **settings)
    return layer, torch.randn(batch, length, 5, generator=generator(1), dtype=dtype)


def slowly(layer, u, rate=1.0):
    """The recurrence, one step and one discretisation formula at a time."""
    a, dt, b = layer.A, rate * layer.dt, torch.view_as_complex(layer.B)
    c = torch.view_as_complex(layer.C)
    if layer.disc == "zoh":
        step, inputs = torch.exp(a * dt), ((torch.exp(a * dt) - 1) / a)[:, None] * b
    else:
        step = (1 + a * dt / 2) / (1 - a * dt / 2)
        inputs = (dt / (1 - a * dt / 2))[:, None] * b
    outputs = []
    for direction in range(c.shape[0]):
        x, ys = torch.zeros(len(u), len(a), dtype=a.dtype), []
        for t in range(u.shape[1]) if direction == 0 else reversed(range(u.shape[1])):
            x = step * x + u[:, t].to(a.dtype) @ inputs.T
            ys.append(((layer.weights * x) @ c[direction].T).real)
        outputs.append(torch.stack(ys if direction == 0 else ys[::-1], dim=1))
    return sum(outputs) + layer.D * u


@pytest.mark.parametrize("settings", [*SETTINGS, {"bidirectional": True}])
def test_layer_is_the_recurrence_and_so_are_its_gradients(settings):
    layer, u = layer_and_input(**settings)
    torch.testing.assert_close(layer(u)[0], slowly(layer, u))
    torch.testing.assert_close(layer(u, rate=2.0)[0], slowly(layer, u, 2.0))
    found = []
    for function in (lambda: layer(u)[0], lambda: slowly(layer, u)):
        layer.zero_grad()
        function().square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("settings", SETTINGS)
def test_steps_and_parts_give_what_the_whole_gives(settings):
    layer, u = layer_and_input(dtype=torch.float32, **settings)
    layer.eval()
    with torch.no_grad():
        whole, end = layer(u)
        for frozen in (False, True):
            if frozen:
                layer.setup_step()
            state, outputs = None, []
            for t in range(u.shape[1]):
                y, state = layer.step(u[:, t], state)
                outputs.append(y)
            torch.testing.assert_close(torch.stack(outputs, 1), whole, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(state, end, atol=1e-5, rtol=1e-5)
        first, state = layer(u[:, :23])
        second, state = layer(u[:, 23:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, end, atol=1e-5, rtol=1e-5)
    assert state.shape == layer.initial_state(3).shape


@pytest.mark.parametrize("init", ["legs-normal", "ptd"])
def test_start_is_stable_at_every_size(init):
    for n in (*range(2, 34, 2), 64, 128, 256):
        layer = S5(2, n, init=init, generator=generator())
        assert float(layer.A.detach().real.max()) < 0
        # LegS + 0.1 P Pᵀ has real eigenvalues at order 2.
        assert layer.modes == n // 2 + (init == "ptd" and n == 2)
        assert float(layer.weights.sum()) == n
    layer = S5(4, 256, init=init, dt_max=0.1, generator=generator())
    with torch.no_grad():
        y, _ = layer(torch.randn(2, 2000, 4, generator=generator()))
    assert float(y.abs().max()) < 100


@pytest.mark.parametrize("init", ["legs-normal", "ptd"])
@pytest.mark.parametrize("conj_sym", [True, False])
def test_start_is_the_real_system_that_it_diagonalises(init, conj_sym):
    """C (sI - A)⁻¹ B of block-diagonal LegS (or its normal part) with the B and C drawn."""
    start = s5_init(3, 16, 2, init, conj_sym=conj_sym, generator=generator())
    g = generator()
    b = torch.randn(2, 8, 3, generator=g, dtype=torch.float64) / math.sqrt(3)
    c = torch.randn(1, 3, 2, 8, generator=g, dtype=torch.float64) / 4
    p = hippo_legs(8)[1] / math.sqrt(2)
    block = hippo_legs(8)[0] + (0.1 if init == "ptd" else 1.0) * torch.outer(p, p)
    for time in (0.0, 0.02, 0.4):
        power = torch.linalg.matrix_exp(block * time)
        exact = torch.einsum("hjn,nm,jmi->hi", c[0], power, b)
        c_t = start.weights * start.c[0]
        found = (c_t * (start.a * time).exp()) @ start.b
        torch.testing.assert_close(found.real, exact, atol=1e-10, rtol=0)
        if not conj_sym:
            assert float(found.imag.abs().max()) < 1e-10
    assert len(start.a) == (8 if conj_sym else 16)


def test_start_has_the_eigenvalues_of_its_matrix():
    found = s5_init(2, 8, init="legs-normal", generator=generator()).a
    torch.testing.assert_close(found, legs_normal(8)[0][4:])
    found = s5_init(2, 8, init="ptd", generator=generator()).a
    expected = ptd_diagonalize(hippo_legs(8)[0], low_rank="legs").eigenvalues[4:]
    torch.testing.assert_close(found, expected)
    # t = 0.01 leaves two real eigenvalues at order 8: weight 1, a mode each.
    real = s5_init(2, 8, init="ptd", t=0.01, generator=generator())
    assert real.weights.tolist() == [1, 1, 2, 2, 2]
    odd = s5_init(2, 9, conj_sym=False, generator=generator())
    assert len(odd.a) == 9


def test_step_sizes_and_clipping():
    layer = S5(4, 512, blocks=8, dt_min=1e-2, dt_max=1e-1, generator=generator())
    assert 1e-2 <= float(layer.dt.detach().min()) < 1.1e-2
    assert 0.9e-1 < float(layer.dt.detach().max()) <= 1e-1 * (1 + 1e-6)
    with torch.no_grad():
        layer.a_re.fill_(-20.0)
    assert float(layer.A.detach().real.max()) > -1e-8
    layer.clip_eigs = True
    assert float(layer.A.detach().real.max()) == pytest.approx(-1e-4)


def test_lengths_end_where_they_end():
    layer, u = layer_and_input()
    lengths = torch.tensor([40, 17, 1])
    padded = u.clone()
    padded[1, 17:], padded[2, 1:] = math.nan, math.inf
    y, ends = layer(padded, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, end = layer(u[row : row + 1, :length])
        torch.testing.assert_close(y[row, :length], alone[0])
        torch.testing.assert_close(ends[row], end[0])
        assert (y[row, length:] == 0).all()
    both, _ = layer_and_input(bidirectional=True)
    y, state = both(padded, lengths=lengths)
    assert state is None
    torch.testing.assert_close(y[1, :17], both(u[1:2, :17])[0][0])


def test_state_dict_moves_and_copies():
    layer, u = layer_and_input(init="ptd", dtype=torch.float32)
    other = S5(5, 16, generator=generator(9), dtype=torch.float32)
    assert not torch.equal(other(u)[0], layer(u)[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(u)[0], layer(u)[0])
    layer.setup_step()
    assert torch.equal(copy.deepcopy(layer)(u)[0], layer(u)[0])
    half = copy.deepcopy(layer).half()
    assert half.B.dtype == torch.float32
    y, _ = half(u.half())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), layer(u)[0], atol=1e-2, rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(u)[0], other(u)[0])
    assert layer.double()(u.double())[0].dtype == torch.float64
    assert S5(5, 16, device="meta")(u.to("meta"))[0].shape == u.shape


def test_what_setup_step_keeps_is_dropped_when_parameters_change():
    layer, u = layer_and_input()
    layer.eval().setup_step()
    before, _ = layer.step(u[:, 0])
    with torch.no_grad():
        layer.C.mul_(2.0)
    after, _ = layer.step(u[:, 0])
    torch.testing.assert_close(after, layer(u[:, :1])[0][:, 0])
    assert not torch.equal(before, after)
    doubled, _ = layer.step(u[:, 0], rate=2.0)
    torch.testing.assert_close(doubled, layer(u[:, :1], rate=2.0)[0][:, 0])


def test_seeds_decide_everything():
    state = torch.random.get_rng_state()
    one, two = (S5Block(4, 8, generator=generator(3)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_parameter_groups():
    block = S5Block(4, 8, generator=generator())
    rest, slow = ssm_param_groups(block, lr=1e-2, weight_decay=0.1)
    layer = block.layer
    assert {id(p) for p in slow["params"]} == {
        id(p) for p in (layer.log_dt, layer.a_re, layer.a_im, layer.B)
    }
    assert (slow["lr"], slow["weight_decay"]) == (1e-3, 0.0)
    assert (rest["lr"], rest["weight_decay"]) == (1e-2, 0.1)
    frozen = S5(4, 8, lr=0)
    assert [n for n, p in frozen.named_parameters() if p.requires_grad] == ["C", "D"]
    assert ssm_param_groups(S5(4, 8, lr=1e-4), lr=1e-2)[1]["lr"] == 1e-4


@pytest.mark.parametrize("prenorm", [True, False])
def test_block_is_its_formula(prenorm):
    block = S5Block(4, 8, prenorm=prenorm, generator=generator(), dtype=torch.float64)
    u = torch.randn(2, 30, 4, generator=generator(), dtype=torch.float64)
    y, state = block(u)
    z = torch.nn.functional.gelu(block.layer(block.norm(u) if prenorm else u)[0])
    exact = u + z * torch.sigmoid(block.gate(z))
    torch.testing.assert_close(y, exact if prenorm else block.norm(exact))
    steps, current = [], None
    for t in range(30):
        out, current = block.step(u[:, t], current)
        steps.append(out)
    torch.testing.assert_close(torch.stack(steps, 1), y)
    torch.testing.assert_close(current, state)
    lengths = torch.tensor([30, 12])
    padded = u.clone()
    padded[1, 12:] = math.nan
    short, _ = block(padded, lengths=lengths)
    torch.testing.assert_close(short[1, :12], y[1, :12])
    assert (short[1, 12:] == 0).all()


def test_block_drops_out_in_training_only():
    block = S5Block(4, 8, dropout=0.5, generator=generator())
    u = torch.randn(2, 30, 4, generator=generator())
    assert not torch.equal(block(u)[0], block(u)[0])
    block.eval()
    assert torch.equal(block(u)[0], block(u)[0])


def test_a_block_learns_to_remember():
    """Output u from three steps ago; silence would be wrong by 0.90."""
    g = generator()
    block = S5Block(4, 32, init="ptd", dt_min=0.1, dt_max=0.7, generator=g)
    head = seeded_linear(4, 4, g)
    u = torch.randn(16, 40, 4, generator=g)
    wanted = torch.nn.functional.pad(u[:, :-3], (0, 0, 3, 0))
    optimizer = torch.optim.AdamW(ssm_param_groups(torch.nn.ModuleList([block, head]), lr=2e-2))
    for _ in range(100):
        loss = (head(block(u)[0]) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7
    assert float(block.layer.A.detach().real.max()) < 0


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (ValueError, "must be even", {"d_state": 15}),
        (ValueError, "must be even", {"d_state": 6, "blocks": 2}),
        (ValueError, "blocks must divide", {"blocks": 3}),
        (ValueError, "blocks must be at least 1", {"blocks": 0}),
        (ValueError, "d_model must be at least 1", {"d_model": 0}),
        (ValueError, "init must be one of", {"init": "lin"}),
        (ValueError, "disc must be one of", {"disc": "euler"}),
        (ValueError, "dt_min ≤ dt_max", {"dt_min": 0.2}),
        (ValueError, "dt_min ≤ dt_max", {"dt_min": 0}),
        (ValueError, "t must be in", {"init": "ptd", "t": 2}),
        (ValueError, "lr must be", {"lr": -1.0}),
        (TypeError, "float32 or float64", {"dtype": torch.bfloat16}),
    ],
)
def test_bad_settings(error, match, settings):
    with pytest.raises(error, match=match):
        S5(**{"d_model": 4, "d_state": 16, **settings})


def test_bad_inputs():
    layer, u = layer_and_input()
    both, _ = layer_and_input(bidirectional=True)
    state = layer.initial_state(3)
    for call, error, match in (
        (lambda: layer(u.long()), TypeError, "floating-point"),
        (lambda: layer(u[..., :3]), ValueError, "5 channels"),
        (lambda: layer(u[:, :0]), ValueError, "at least one sample"),
        (lambda: layer(u * math.nan), ValueError, "finite"),
        (lambda: layer.step(u[:, 0] * math.inf), ValueError, "finite"),
        (lambda: layer(u, state[:2]), ValueError, "state must have shape"),
        (lambda: layer(u, state.real), TypeError, "state must be complex"),
        (lambda: layer(u, rate=0), ValueError, "rate must be positive"),
        (lambda: layer(u, lengths=torch.tensor([1, 2, 99])), ValueError, "lengths must be"),
        (lambda: both(u, state), ValueError, "bidirectional"),
        (lambda: both.step(u[:, 0]), ValueError, "bidirectional"),
        (lambda: both.setup_step(), ValueError, "bidirectional"),
        (lambda: S5Block(4, 8, dropout=1), ValueError, "dropout"),
        (lambda: S5Block(4, 8)(torch.full((1, 3, 4), math.nan)), ValueError, "finite"),
    ):
        with pytest.raises(error, match=match):
            call()
    with torch.no_grad():
        layer.a_im[0] = math.nan
    with pytest.raises(RuntimeError, match="a_im of S5"):
        layer(u)


def test_compiled_and_exported_layers_equal_eager_ones():
    script = Path(__file__).with_name("s5_compiled.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 5
    assert max(differences.values()) < 1e-5, differences

"""PROSE: sizes, masks, independence of queries, and what it refuses."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lemon_models import VOCAB, data, inputs, tiny

from stiefel.nn.lemon import PROSE, PolishTokenizer
from stiefel.nn.lemon.layers import sinusoids
from stiefel.nn.lemon.tokenizer import LAPTOP_OPERATORS, LAPTOP_VARIABLES


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_the_laptop_network_has_the_weights_of_the_sheet():
    tokenizer = PolishTokenizer(LAPTOP_VARIABLES, LAPTOP_OPERATORS)
    model = PROSE(32, len(tokenizer), 32, 4, (1, 1, 1, 2), ffn=64)
    assert sum(p.numel() for p in model.parameters()) == 82_688


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(dtype):
    model = tiny(channels=2).to(dtype)
    y = model(*inputs(channels=2, dtype=dtype))
    assert y.shape == (5, 3, 8, 2)
    assert y.dtype == dtype


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    a, b, c = tiny(0), tiny(0), tiny(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = inputs()
    assert torch.equal(a(*x), b(*x))
    assert not torch.allclose(a(*x), c(*x))


@pytest.mark.parametrize("head", ["grid", "points"])
def test_each_time_is_answered_independently_of_the_others(head):
    model = tiny(head=head)
    u, t_in, t_out, tokens = inputs()
    together = model(u, t_in, t_out, tokens)
    for i in range(3):
        close(model(u, t_in, t_out[i : i + 1], tokens), together[:, i : i + 1])


def test_times_may_differ_between_samples():
    model = tiny()
    u, t_in, t_out, tokens = inputs()
    shift = torch.arange(5.0)[:, None] / 10
    y = model(u, t_in + shift, t_out + shift, tokens)
    for i in range(5):
        alone = model(u[i : i + 1], t_in + i / 10, t_out + i / 10, tokens[i : i + 1])
        close(alone, y[i : i + 1])
    assert not torch.allclose(y[3], model(u, t_in, t_out, tokens)[3], atol=1e-3)


def test_padding_changes_nothing():
    model = tiny()
    u, t_in, t_out, tokens = inputs()
    y = model(u, t_in, t_out, tokens)
    close(model(u, t_in, t_out, torch.nn.functional.pad(tokens, (0, 11))), y)
    close(model(u[2:3], t_in, t_out, tokens[2:3, :5]), y[2:3])
    with torch.no_grad():
        model.token_embedding.weight[0] = 1e3
    close(model(u, t_in, t_out, tokens), y)
    # Without looking at values (as under compile) all padding is kept and masked.
    encoding, padding = model._encode(torch.nn.functional.pad(tokens, (0, 11)))
    wide = model(u, t_in, t_out, symbols=type(model.encode_symbols(tokens))(encoding, padding))
    close(wide, y)


def test_the_equation_matters():
    model = tiny()
    u, t_in, t_out, tokens = inputs()
    other = tokens.clone()
    other[3, 0] = other[3, 0] % (VOCAB - 1) + 1
    y, z = model(u, t_in, t_out, tokens), model(u, t_in, t_out, other)
    assert (y[3] - z[3]).abs().max() > 1e-3
    close(y[:3], z[:3])
    blind = tiny(use_symbols=False)
    close(blind(u, t_in, t_out), blind(u, t_in, t_out, tokens))
    assert "token_embedding.weight" not in dict(blind.named_parameters())


def test_equal_equations_are_encoded_once_and_can_be_reused():
    model = tiny()
    u, t_in, t_out, tokens = inputs()
    seen = []
    model.symbol_encoder.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    y = model(u, t_in, t_out, tokens)
    assert seen == [4]  # of five rows two are equal
    symbols = model.encode_symbols(tokens)
    close(model(u, t_in, t_out, symbols=symbols), y)
    assert len(seen) == 2
    rows, which = torch.unique(tokens, dim=0, return_inverse=True)
    close(model(u, t_in, t_out, rows, which), y)
    # The slow twin: every sample by itself.
    for i in range(5):
        close(model(u[i : i + 1], t_in, t_out, tokens[i : i + 1]), y[i : i + 1])


def test_a_fused_sequence_answers_any_number_of_questions():
    model = tiny()
    u, t_in, t_out, tokens = inputs()
    fused = model.encode(u, t_in, tokens)
    close(model.decode(fused, t_out), model(u, t_in, t_out, tokens))


def test_points_anywhere():
    model = tiny(head="points", period=2.0)
    u, t_in, t_out, tokens = inputs()
    grid = (torch.arange(8) + 0.5) / 4
    y = model(u, t_in, t_out, tokens)
    close(model(u, t_in, t_out, tokens, x_out=grid), y)
    close(model(u, t_in, t_out, tokens, x_out=grid[3:4]), y[:, :, 3:4])
    close(model(u, t_in, t_out, tokens, x_out=grid + 2), y, atol=1e-5)
    x = torch.rand(5, 11, generator=torch.Generator().manual_seed(0)) * 2
    z = model(u, t_in, t_out, tokens, x_out=x)
    assert z.shape == (5, 3, 11, 1)
    close(model(u[4:], t_in, t_out, tokens[4:], x_out=x[4]), z[4:])


def test_gradients():
    model = tiny(dim=4, heads=2, ffn=5, layers=(1, 1, 1, 1)).double()
    u, t_in, t_out, tokens = inputs(batch=3, length=6, dtype=torch.float64)
    u, tokens, t_out = u[:2], tokens[1:], t_out[:2]
    u.requires_grad_()
    t_out.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: model(a, t_in, b, tokens), (u, t_out))
    model(u, t_in, t_out, tokens).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_sinusoids():
    table = sinusoids(20, 7)
    assert table.shape == (20, 7)
    position = torch.arange(20, dtype=torch.float64)
    for i in range(7):
        wave = position * 10_000.0 ** (-(i // 2 * 2) / 7)
        expected = wave.cos() if i % 2 else wave.sin()
        torch.testing.assert_close(table[:, i], expected.float())


def test_state_round_trips(tmp_path):
    from safetensors.torch import load_file, save_file

    model, other = tiny(0), tiny(1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = inputs()
    assert torch.equal(model(*x), other(*x))
    assert torch.equal(copy.deepcopy(model)(*x), model(*x))


def test_compiled_and_exported_networks_equal_eager_ones():
    script = Path(__file__).with_name("lemon_compiled.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 2
    assert max(differences.values()) < 1e-4, differences


def test_autocast():
    model, x = tiny(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(*x)
    assert (y.float() - model(*x)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_x": 0}, ValueError, "n_x must be at least 1, got 0"),
        ({"vocab": True}, TypeError, "vocab must be a whole number"),
        ({"heads": 3}, ValueError, "multiple of heads, got 16 and 3"),
        ({"layers": (1, 1)}, ValueError, "four numbers"),
        ({"layers": (1, 0, 1, 1)}, ValueError, "layers must be at least 1"),
        ({"pad": VOCAB}, ValueError, "pad must be one of"),
        ({"head": "mesh"}, ValueError, "head must be one of grid, points"),
        ({"period": 0.0}, ValueError, "period must be finite"),
    ],
)
def test_settings_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        PROSE(**{"n_x": 8, "vocab": VOCAB, "dim": 16, "heads": 2, "layers": (1, 1, 1, 1)} | change)


def changed(u=None, t_in=None, t_out=None, tokens=None):
    x = inputs()
    return [b if a is None else a for a, b in zip((u, t_in, t_out, tokens), x, strict=True)]


def with_nan():
    u = inputs()[0]
    u[3, 1, 2] = float("nan")
    return u


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (changed(u=torch.randn(5, 4, 7, 1)), ValueError, "8 points and 1 channels.*got 7 and 1"),
        (changed(u=torch.randn(5, 3, 8, 1)), ValueError, "u has 3 times but t_in has 4"),
        (changed(u=torch.randn(0, 4, 8, 1)), ValueError, "at least one sample"),
        (changed(u=with_nan()), ValueError, "u must be finite.*first at index 3"),
        (changed(t_out=torch.zeros(0)), ValueError, r"t_out must have shape \[T\]"),
        (changed(t_out=torch.zeros(4, 2)), ValueError, "batch 5"),
        (changed(t_in=torch.tensor([0, 1, float("inf"), 2])), ValueError, "t_in must be finite"),
        (changed(tokens=torch.ones(5, 513, dtype=torch.long)), ValueError, "at most 512"),
        (changed(tokens=torch.full((5, 3), VOCAB)), ValueError, "must lie in 0..49, got 50..50"),
        (changed(tokens=torch.zeros(5, 3, dtype=torch.long)), ValueError, "row 0.*padding only"),
        (changed(tokens=torch.ones(5, 3)), TypeError, "tokens must be integers"),
        (changed(tokens=torch.ones(4, 3, dtype=torch.long)), ValueError, "4 equations"),
        ([*inputs()[:3]], ValueError, "tokens .* are needed"),
    ],
)
def test_inputs_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        tiny()(*arguments)


def test_other_refusals():
    u, t_in, t_out, tokens = inputs()
    with pytest.raises(ValueError, match="head='points'"):
        tiny()(u, t_in, t_out, tokens, x_out=torch.zeros(3))
    with pytest.raises(ValueError, match="x_out must have shape"):
        tiny(head="points")(u, t_in, t_out, tokens, x_out=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="encodes no equations"):
        tiny(use_symbols=False).encode_symbols(tokens)
    with pytest.raises(KeyError, match="uxz"):
        PolishTokenizer().encode("ut - uxz")


def test_a_row_of_padding_only_is_no_nan_where_it_cannot_be_refused():
    encoding, _ = tiny()._encode(torch.zeros(2, 4, dtype=torch.long))
    assert encoding.isfinite().all()


def test_data_fit_the_network():
    d = data()
    assert tiny()(*d.inputs).shape == d.target.shape

import copy
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.nn import S4D
from stiefel.nn._long_convolution import convolve, fast_length


def layer_and_input(length=60, batch=2, width=5, dtype=torch.float32, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    layer = S4D(width, 16, generator=g, dtype=dtype, **options)
    return layer, torch.randn(batch, length, width, generator=g, dtype=dtype)


def stepwise(layer, u, state=None):
    outputs = []
    for t in range(u.shape[1]):
        y, state = layer.step(u[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def plain_convolution(u, past, future=None):
    y = torch.zeros_like(u)
    length = u.shape[1]
    for t in range(length):
        for s in range(length):
            if s <= t:
                y[:, t] += past[:, t - s] * u[:, s]
            elif future is not None:
                y[:, t] += future[:, s - t - 1] * u[:, s]
    return y


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 20), both=st.booleans())
def test_convolution_is_its_sum(length, both):
    g = torch.Generator().manual_seed(length)
    u = torch.randn(2, length, 3, generator=g, dtype=torch.float64)
    past, future = torch.randn(2, 3, length, generator=g, dtype=torch.float64)
    future = future if both else None
    found = convolve(u, past, future)
    torch.testing.assert_close(found, plain_convolution(u, past, future))
    assert found.is_contiguous()


def test_convolution_in_slices_and_its_derivatives(monkeypatch):
    monkeypatch.setattr("stiefel.nn._long_convolution._SLICE", 2 * 16 * 2)
    g = torch.Generator().manual_seed(0)
    u, past, future = (
        torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 6, 2), (2, 6), (2, 6))
    )
    torch.testing.assert_close(convolve(u, past, future), plain_convolution(u, past, future))
    assert torch.autograd.gradcheck(convolve, (u, past, future))
    assert torch.autograd.gradgradcheck(convolve, (u[:3, :3], past[:, :3], future[:, :3]))
    assert torch.autograd.gradcheck(lambda k: convolve(u.detach(), k), (past,))
    assert torch.autograd.gradcheck(lambda x: convolve(x, past.detach()), (u,))


@pytest.mark.parametrize("least", [1, 2, 7, 127, 1999, 4097])
def test_transform_lengths_are_even_smooth_and_close(least):
    length = fast_length(least)
    rest = length
    for factor in (2, 3, 5):
        while rest % factor == 0:
            rest //= factor
    assert rest == 1
    assert length % 2 == 0
    assert least <= length <= max(2, 1.2 * least)


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["legs", "lin", "inv", "real"])
def test_convolution_recurrence_and_steps_agree(init, disc):
    layer, u = layer_and_input(length=200, init=init, disc=disc)
    with torch.no_grad():
        y, state = layer(u)
        steps, step_state = stepwise(layer, u)
        layer.mode = "recurrent"
        slow, slow_state = layer(u)
    for other in (steps, slow):
        torch.testing.assert_close(y, other, rtol=0, atol=1e-5)
    for other in (step_state, slow_state):
        torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-5)
    assert y.dtype == torch.float32
    assert state.dtype == torch.complex64
    assert state.shape == (2, 5, 8)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 79), min_size=1, max_size=3, unique=True))
def test_parts_with_state_are_the_whole(cuts):
    layer, u = layer_and_input(length=80, dtype=torch.float64)
    whole, end = layer(u)
    state, outputs = None, []
    for part in u.tensor_split(sorted(cuts), dim=1):
        y, state = layer(part, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    torch.testing.assert_close(state, end)


def test_states_carry_gradients():
    layer, u = layer_and_input(length=7, batch=1, width=2, dtype=torch.float64)
    u = u.requires_grad_()
    first = torch.randn(1, 2, 8, dtype=torch.complex128, requires_grad=True)

    def both(x, state):
        y, after = layer(x, state)
        return y, torch.view_as_real(after)

    assert torch.autograd.gradcheck(both, (u, first))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_of_both_modes_agree(bidirectional):
    layer, u = layer_and_input(length=9, dtype=torch.float64, bidirectional=bidirectional)
    found = {}
    for mode in ("conv", "recurrent"):
        layer.mode = mode
        layer.zero_grad()
        layer(u)[0].square().sum().backward()
        found[mode] = [p.grad.clone() for p in layer.parameters()]
    for left, right in zip(found["conv"], found["recurrent"], strict=True):
        torch.testing.assert_close(left, right)


def test_gradients_with_respect_to_parameters():
    layer, u = layer_and_input(length=6, batch=1, width=2, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def run(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), u)[0]

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("mode", ["conv", "recurrent"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_sequences_of_different_lengths_do_not_see_their_padding(bidirectional, mode):
    layer, u = layer_and_input(length=40, batch=3, bidirectional=bidirectional, mode=mode)
    lengths = torch.tensor([1, 40, 23])
    for i, length in enumerate(lengths):
        u[i, length:] = math.nan  # must not be looked at
    y, state = layer(u, lengths=lengths)
    for i, length in enumerate(lengths):
        alone, end = layer(u[i : i + 1, :length])
        torch.testing.assert_close(y[i, :length], alone[0], rtol=0, atol=1e-5)
        assert (y[i, length:] == 0).all()
        if not bidirectional:
            torch.testing.assert_close(state[i], end[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["conv", "recurrent"])
def test_lengths_and_a_state_go_together(mode):
    layer, u = layer_and_input(length=30, batch=2, dtype=torch.float64, mode=mode)
    _, first = layer(u[:, :10])
    lengths = torch.tensor([5, 20])
    _, state = layer(u[:, 10:], first, lengths=lengths)
    for i, length in enumerate(lengths):
        _, end = layer(u[i : i + 1, : 10 + length])
        torch.testing.assert_close(state[i], end[0])


def test_both_directions_are_two_one_sided_layers():
    layer, u = layer_and_input(length=12, dtype=torch.float64, bidirectional=True)
    flipped = copy.deepcopy(layer)
    flipped.kernel.C.data = layer.kernel.C.data.flip(0)
    assert layer.kernel.channels == 2
    past, future = layer.kernel(12)
    weights = past + torch.nn.functional.pad(layer.D[:, None], (0, 11))
    inner = plain_convolution(u, weights.detach(), future.detach())
    torch.testing.assert_close(layer(u)[0], layer._mixed(inner))
    assert layer(u)[1] is None
    assert (layer(u)[0] - flipped(u)[0]).abs().max() > 1e-3


def test_the_past_does_not_see_the_future():
    layer, u = layer_and_input(length=16, batch=1, dtype=torch.float64)
    u = u.requires_grad_()
    layer(u)[0][:, 6].sum().backward()
    seen = u.grad.abs().amax((0, 2))
    assert (seen[:7] > 0).all()
    assert seen[7:].max() < 1e-12 * seen[:7].max()


def test_the_state_space_part_is_linear_and_does_not_change_with_time():
    layer, u = layer_and_input(length=40, dtype=torch.float64, activation="none")
    layer.output = torch.nn.Linear(5, 10, bias=False, dtype=torch.float64)
    with torch.no_grad():
        # A gate of exactly σ(0) = 1/2: what is left is linear.
        layer.output.weight[5:] = 0
    v = torch.randn_like(u)
    torch.testing.assert_close(layer(2 * u + v)[0], 2 * layer(u)[0] + layer(v)[0])
    late = torch.cat([torch.zeros_like(u[:, :9]), u[:, :31]], dim=1)
    torch.testing.assert_close(layer(late)[0][:, 9:], layer(u)[0][:, :31])


def test_half_the_rate_of_an_input_held_twice_as_long():
    """ZOH is exact for steps of the input, so sampling them twice as often changes nothing."""
    layer, u = layer_and_input(length=20, dtype=torch.float64)
    fine, _ = layer(u.repeat_interleave(2, dim=1), rate=0.5)
    torch.testing.assert_close(fine[:, 1::2], layer(u)[0])


def test_layouts():
    layer, u = layer_and_input()
    turned, _ = layer_and_input(transposed=True)
    turned.load_state_dict(layer.state_dict())
    torch.testing.assert_close(turned(u.mT)[0].mT, layer(u)[0])


def test_state_dicts_fit_both_modes():
    convolving, u = layer_and_input()
    recurrent, _ = layer_and_input(seed=1, mode="recurrent")
    recurrent.setup_step()
    assert recurrent.state_dict().keys() == convolving.state_dict().keys()
    recurrent.load_state_dict(convolving.state_dict())
    torch.testing.assert_close(recurrent(u)[0], convolving(u)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(stepwise(recurrent, u)[0], convolving(u)[0], rtol=0, atol=1e-5)


def test_frozen_steps_follow_the_parameters():
    layer, u = layer_and_input(length=3)
    layer.eval().setup_step()
    kept = layer._frozen[1].log_a.data_ptr()
    assert layer._step_system(1.0).log_a.data_ptr() == kept
    assert layer._step_system(0.5).log_a.data_ptr() != kept
    layer(u)[0].sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    torch.testing.assert_close(stepwise(layer, u)[0], layer(u)[0], rtol=0, atol=1e-5)
    layer.setup_step()
    assert layer.train()._frozen is None


def test_a_step_costs_the_same_late_as_early():
    layer, u = layer_and_input(length=1, width=64)
    layer.eval().setup_step()
    with torch.no_grad():
        _, late = layer(torch.randn(2, 20_000, 64))
        early = layer.initial_state(2)
        assert late.shape == early.shape
        times = {}
        for _ in range(60):
            for name, state in (("early", early), ("late", late)):
                started = time.thread_time()
                layer.step(u[:, 0], state)
                times.setdefault(name, []).append(time.thread_time() - started)
    # The fastest quarter: other processes only ever add.
    early_time, late_time = (sum(sorted(t)[:15]) for t in (times["early"], times["late"]))
    assert late_time < 1.5 * early_time


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_around_the_kernel(dtype):
    layer, u = layer_and_input()
    exact = layer(u)[0]
    with torch.autocast("cpu", dtype=dtype):
        y, state = layer(u)
        torch.testing.assert_close(y, exact, rtol=0.05, atol=0.05)
        stepped, _ = layer.step(u[:, 0])
        torch.testing.assert_close(stepped, exact[:, 0], rtol=0.05, atol=0.05)
    assert state.dtype == torch.complex64
    half = copy.deepcopy(layer).to(dtype)
    y, state = half(u.to(dtype))
    assert y.dtype == dtype
    assert state.dtype == torch.complex64
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_compiled_and_exported_layers_equal_eager_ones():
    script = Path(__file__).with_name("s4d_compiled.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 6
    assert max(differences.values()) < 1e-5, differences


def test_dropout_activation_and_seeds():
    layer, u = layer_and_input(dropout=0.5)
    assert not torch.equal(layer(u)[0], layer(u)[0])
    layer.eval()
    assert torch.equal(layer(u)[0], layer(u)[0])
    same, _ = layer_and_input(dropout=0.5)
    assert torch.equal(same.eval()(u)[0], layer(u)[0])
    assert S4D(8, 4).output.weight.abs().max() <= 1 / math.sqrt(8)
    relu, _ = layer_and_input(activation="relu")
    assert not torch.equal(relu(u)[0], layer(u)[0])


def test_copies_and_moves():
    layer, u = layer_and_input()
    layer.setup_step()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(u)[0], layer(u)[0])
    empty = S4D(5, 16, device="meta")
    assert empty(torch.empty(2, 9, 5, device="meta"))[0].shape == (2, 9, 5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "gelu, relu, silu, tanh, none"),
        ({"dropout": 1.0}, ValueError, r"in \[0, 1\)"),
        ({"mode": "scan"}, ValueError, "conv, recurrent"),
        ({"channels": 3}, TypeError, "S4DKernel"),
        ({"d_state": 7}, ValueError, "even"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        S4D(4, **options)


def test_bad_inputs_are_refused():
    layer, u = layer_and_input()
    both, _ = layer_and_input(bidirectional=True)
    for bad, error, message in (
        (u[..., :4], ValueError, r"5 channels .* got shape \(2, 60, 4\)"),
        (u[:, :0], ValueError, "at least one sample"),
        (u.long(), TypeError, "int64"),
        (u + 0j, TypeError, "complex64"),
        (torch.full_like(u, math.nan), ValueError, "u must be finite"),
        (u.index_fill(1, torch.tensor([3]), math.inf), ValueError, "u must be finite"),
    ):
        with pytest.raises(error, match=message):
            layer(bad)
    for bad in (torch.tensor([0, 3]), torch.tensor([1, 61])):
        with pytest.raises(ValueError, match="from 1 to 60"):
            layer(u, lengths=bad)
    with pytest.raises(TypeError, match="lengths must be integers"):
        layer(u, lengths=torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"shape \(2, 5, 8\), got \(3, 5, 8\)"):
        layer(u, layer.initial_state(3))
    with pytest.raises(TypeError, match="state must be complex"):
        layer(u, layer.initial_state(2).real)
    with pytest.raises(ValueError, match="finite"):
        layer.step(u[:, 0] * math.nan)
    with pytest.raises(ValueError, match="no step"):
        both.step(u[:, 0])
    with pytest.raises(ValueError, match="no step"):
        both.setup_step()
    with pytest.raises(ValueError, match="no state"):
        both(u, both.initial_state(2))


def test_values_whose_sum_overflows_are_allowed():
    layer, u = layer_and_input(activation="none")
    layer(torch.full_like(u, 1e37))

import copy
import pickle
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from stiefel.nn.operators import convert, resample
from stiefel.nn.operators.converted_layers import extend, spread
from stiefel.nn.operators.taps import hat_taps, official_taps

DOUBLE = {"dtype": torch.float64}
CIRCLE = {"padding_mode": "circular"}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def start(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, **DOUBLE) / 3)
    return net.double()


class UNet(nn.Module):
    """One level down and up, with each kind of layer that counts points."""

    def __init__(self, conv=nn.Conv1d, up=nn.ConvTranspose1d, pool=nn.AvgPool1d):
        super().__init__()
        self.first = conv(1, 4, 5, padding=2, **CIRCLE)
        self.down = conv(4, 4, 3, stride=2, padding=1, **CIRCLE)
        self.middle = conv(4, 4, 3, padding=1, **CIRCLE)
        self.up = up(4, 4, 4, stride=2, padding=1)
        self.pool = pool(2)
        self.wide = nn.Upsample(scale_factor=2)
        self.last = conv(4, 1, 1)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        low = torch.tanh(self.middle(self.down(h)))
        return self.last(torch.cat((self.up(low) + self.wide(self.pool(h)),), 1) + h)


NETS = {
    "conv": (lambda: nn.Conv1d(2, 3, 5, padding=2, **CIRCLE), (2, 16)),
    "unet": (UNet, (1, 16)),
    "unet2": (lambda: UNet(nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d), (1, 8, 12)),
    "unet3": (lambda: UNet(nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d), (1, 4, 4, 8)),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, (3, 5), padding="same", groups=4, **CIRCLE),
            nn.BatchNorm2d(8),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 2, 3, padding=2, dilation=2, padding_mode="replicate"),
        ),
        (4, 8, 12),
    ),
    "norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 3, padding=1)),
        (2, 16),
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True])
def test_on_the_training_grid_nothing_changes(name, training):
    make, shape = NETS[name]
    net = start(make()).train(training)
    converted = convert(net, shape[1:], resample="linear")
    assert converted.training is training
    x = drawn(3, *shape)
    assert torch.equal(converted(x), copy.deepcopy(net)(x))
    given, found = net.state_dict(), converted.state_dict()
    assert list(given) == list(found)
    assert isinstance(converted, type(net))
    fresh = copy.deepcopy(net)
    fresh.load_state_dict(found)
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in converted.named_parameters()]
    assert not any(p is q for p in net.parameters() for q in converted.parameters())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("factor", [2, Fraction(1, 2)])
def test_other_grids(name, factor):
    make, shape = NETS[name]
    net = start(make()).eval()
    converted = convert(net, shape[1:])
    other = [int(n * factor) for n in shape[1:]]
    y = converted(drawn(3, shape[0], *other))
    assert y.shape[2:] == torch.Size(other)
    assert torch.equal(converted(drawn(3, *shape)), net(drawn(3, *shape)))
    if name != "groups":  # BatchNorm2d wants a batch
        torch.testing.assert_close(converted(drawn(3, shape[0], *other)[0]), y[0])


def test_taps_of_the_sheet():
    conv = nn.Conv1d(1, 1, 3, padding=1, bias=False, **CIRCLE, **DOUBLE)
    conv.weight.data = torch.tensor([[[1.0, 2.0, 4.0]]], **DOUBLE)
    expected = {
        16: [0.25, 0.5, 0.75, 1, 1.5, 2, 1],
        32: [0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 0.75,
             0.5, 0.25],
        4: [0.5, 4.5, 2],
    }  # fmt: skip
    converted = convert(conv, 8)
    for n, taps in expected.items():
        impulse = torch.zeros(1, 1, n, **DOUBLE)
        impulse[..., n // 2] = 1
        # A convolution layer correlates: its answer to an impulse is the kernel backwards.
        answer = converted(impulse).detach().flatten().flip(0).roll(1 - n // 2).roll(n // 2)
        reach = len(taps) // 2
        found = answer[n // 2 - reach : n // 2 + reach + 1]
        torch.testing.assert_close(found, torch.tensor(taps, **DOUBLE))
        assert float(answer.sum()) == pytest.approx(7, rel=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 3, Fraction(1, 2), Fraction(3, 2)]), min_size=2, max_size=2),
    st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    st.integers(1, 2),
    st.booleans(),
)
def test_running_means_are_the_taps(ratio, mode, dilation, grouped):
    """Against a plain convolution with the taps of the hat kernel."""
    conv = start(
        nn.Conv2d(
            2, 4, (3, 5), padding=(dilation, 2 * dilation), dilation=dilation,
            groups=2 if grouped else 1, padding_mode=mode,
        )
    )  # fmt: skip
    base = (12, 16)
    x = drawn(2, 2, *(int(n * r) for n, r in zip(base, ratio, strict=True)))
    taps = hat_taps(spread(conv.weight, (dilation, dilation)), [float(r) for r in ratio])
    ends = [(k // 2, k // 2) for k in taps.shape[2:]]
    slow = F.conv2d(extend(x, ends, mode), taps, conv.bias, groups=conv.groups)
    torch.testing.assert_close(convert(conv, base)(x), slow)


@pytest.mark.parametrize("mode", ["constant", "circular", "reflect", "replicate"])
def test_borders_are_torchs(mode):
    x = drawn(2, 3, 6, 7)
    found = extend(x, [(2, 3), (1, 4)], "zeros" if mode == "constant" else mode)
    assert torch.equal(found, F.pad(x, (1, 4, 2, 3), mode=mode))


def test_a_field_wider_than_the_circle_goes_around_it():
    conv = start(nn.Conv1d(1, 1, 9, padding=4, **CIRCLE))
    y = convert(conv, 16)(torch.ones(1, 1, 1, **DOUBLE))
    torch.testing.assert_close(y.flatten(), conv.weight.sum() + conv.bias)


def test_official_taps_are_offered():
    conv = start(nn.Conv1d(2, 2, 9, padding=4, **CIRCLE))
    x = drawn(1, 2, 32)
    taps = official_taps(conv.weight, 2)
    assert taps.shape[-1] == 17
    slow = F.conv1d(F.pad(x, (8, 8), mode="circular"), taps, conv.bias)
    torch.testing.assert_close(convert(conv, 16, interpolation="official")(x), slow)
    assert torch.equal(convert(conv, 16, interpolation="official")(x[..., ::2]), conv(x[..., ::2]))


@pytest.mark.parametrize("resampling", ["fourier", "linear"])
@pytest.mark.parametrize("n", [4, 8, 16, 32, 40])
def test_constants_stay_constant(n, resampling):
    net = start(UNet())
    net.up = nn.Upsample(scale_factor=2)
    net.last.bias.data.zero_()
    x = torch.full((1, 1, n), 0.7, **DOUBLE)
    y = convert(net, 16, resample=resampling)(x)
    expected = net(torch.full((1, 1, 16), 0.7, **DOUBLE)).mean()
    torch.testing.assert_close(y, expected.expand_as(y))


def wave(n, ends=0):
    x = torch.arange(n, **DOUBLE) / (n - ends)
    angle = 2 * torch.pi * x
    return (angle.sin() + 0.3 * (2 * angle + 1).cos())[None, None]


@torch.no_grad()
def gap(net, n, finest=1024):
    fine = net(wave(finest))[..., :: finest // n]
    return float((net(wave(n)) - fine).norm() / fine.norm())


def test_the_answer_settles_as_the_grid_is_refined():
    net = nn.Sequential(
        nn.Conv1d(1, 6, 5, padding=2, **CIRCLE), nn.Tanh(), nn.Conv1d(6, 1, 5, padding=2, **CIRCLE)
    )
    start(net)
    converted = convert(net, 32)
    found = [gap(converted, n) for n in (32, 64, 128, 256)]
    assert found[0] < 0.05
    # Hats are of second order.
    assert all(a / b > 3 for a, b in pairwise(found))
    assert gap(net, 128) > 20 * found[2]


def test_steps_over_points_run_at_the_base_grid():
    conv = start(nn.Conv1d(1, 2, 4, stride=2, padding=1, **CIRCLE))
    converted = convert(conv, 16)
    torch.testing.assert_close(converted(wave(64)), resample(conv(wave(16)), 32))
    torch.testing.assert_close(converted(wave(8)), resample(conv(wave(16)), 4))
    up = start(nn.ConvTranspose1d(1, 2, 3, stride=2, padding=1))
    found = convert(up, 8)(wave(32), output_size=(64,))
    torch.testing.assert_close(found, resample(up(wave(8), output_size=(16,)), 64))


def test_grids_with_both_ends():
    """r counts cells, and a resampled layer keeps the ends where they are."""
    conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="replicate", bias=False, **DOUBLE)
    conv.weight.data = torch.tensor([[[0.25, 0.5, 0.25]]], **DOUBLE)
    options = {"resample": "linear", "periodic": False}
    line = torch.linspace(0, 1, 33, **DOUBLE)[None, None]
    y = convert(conv, 17, **options)(line)
    assert y.shape == line.shape
    torch.testing.assert_close(y[..., 4:-4], line[..., 4:-4])
    pool = nn.Conv1d(1, 1, 1, stride=2, bias=False, **DOUBLE)
    pool.weight.data.fill_(1)
    halved = convert(pool, 17, **options)(line)
    torch.testing.assert_close(halved.flatten(), torch.linspace(0, 1, 17, **DOUBLE))


def test_gradients_reach_weights_and_input():
    conv = start(nn.Conv1d(1, 2, 3, padding=1, **CIRCLE))
    for n in (4, 16, 12):
        converted = convert(conv, 8)
        x = drawn(1, 1, n).requires_grad_()

        def call(x, weight, converted=converted):
            return torch.func.functional_call(converted, {"weight": weight}, (x,))

        assert torch.autograd.gradcheck(call, (x, converted.weight))


def test_taps_that_are_kept_follow_the_weight():
    conv = start(nn.Conv1d(1, 2, 3, padding=1, **CIRCLE)).eval()
    converted, x = convert(conv, 8), drawn(1, 1, 12)
    with torch.no_grad():
        first = converted(x)
        kept = converted._taps[1]
        assert torch.equal(converted(x), first)
        assert converted._taps[1] is kept
        converted.weight.mul_(2)
        torch.testing.assert_close(converted(x) - converted.bias[:, None],
                                   2 * (first - converted.bias[:, None]))  # fmt: skip
        converted(x)
        converted.weight.data.mul_(0)
        converted.eval()
        assert torch.equal(converted(x), converted.bias[:, None].expand(1, 2, 12))
    converted(x).sum().backward()
    converted(x).sum().backward()
    assert converted._taps is None
    assert "_taps" not in converted.state_dict()


def test_copies_and_pickles_are_networks_of_their_own():
    net = start(UNet())
    converted = convert(net, 16)
    x = drawn(1, 1, 32)
    expected = converted(x)
    kept = pickle.loads(pickle.dumps(converted))  # noqa: S301 - written on the line itself
    for other in (copy.deepcopy(converted), kept):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.first.weight.zero_()
        assert not torch.equal(other(x), expected)
        assert type(other.first) is type(converted.first)
    assert torch.equal(converted(x), expected)


def test_a_failed_call_leaves_no_trace():
    converted = convert(start(UNet()), 16)
    with pytest.raises(ValueError, match=r"layer 'down': .* whole multiples of \(16,\)"):
        converted(drawn(1, 1, 17))
    with pytest.raises(ValueError, match="1 grid axes"):
        converted(drawn(1, 1, 8, 8))
    with pytest.raises(RuntimeError, match="outside of its network"):
        converted.first(drawn(1, 1, 16))
    assert converted(drawn(1, 1, 32)).shape == (1, 1, 32)


def test_half_precision_and_autocast():
    net = start(UNet())
    x = drawn(1, 1, 32).float()
    full = convert(net.float(), 16).eval()
    expected = full(x).detach()
    half = convert(net.bfloat16(), 16).eval()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.detach().float(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(full(x).detach().float(), expected, rtol=0.1, atol=0.1)


def test_it_compiles():
    """In a process of its own, without the hook that checks types: Dynamo does not see through."""
    script = Path(__file__).with_name("operators_convert_compiled.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["ok"]


@pytest.mark.parametrize(
    ("module", "shape", "options", "error", "message"),
    [
        (nn.Conv1d(1, 1, 4, padding="same"), 16, {}, ValueError, "even"),
        (nn.Conv1d(1, 1, 3), 16, {}, ValueError, "does not keep the size"),
        (nn.Conv1d(1, 1, 3, padding=1), (16, 16), {}, ValueError, "has 2 axes"),
        (nn.Conv2d(1, 1, 3, padding=1), (16,), {}, ValueError, "convolution of 2"),
        (nn.Conv1d(1, 1, 3, padding=1), None, {}, ValueError, "base_shape is missing"),
        (nn.Conv1d(1, 1, 3, padding=1), 0, {}, ValueError, "base_shape"),
        (nn.Conv1d(1, 1, 3, padding=1), 1.5, {}, TypeError, "base_shape"),
        (nn.Conv1d(1, 1, 3, padding=1), 8, {"interpolation": "no"}, ValueError, "hat, official"),
        (nn.Conv1d(1, 1, 3, padding=1), 8, {"resample": "no"}, ValueError, "fourier, linear"),
        (nn.Conv1d(1, 1, 3, padding=1), 8, {"periodic": False}, ValueError, 'resample="linear"'),
        ("conv", 8, {}, TypeError, "module"),
    ],
)  # fmt: skip
def test_bad_arguments(module, shape, options, error, message):
    with pytest.raises(error, match=message):
        convert(module, shape, **options)


def test_converting_twice_is_refused():
    with pytest.raises(ValueError, match="converted already"):
        convert(convert(UNet(), 16), 16)


def test_values_that_are_not_finite_go_through_as_in_torch():
    conv = start(nn.Conv1d(1, 1, 3, padding=1, **CIRCLE))
    x = drawn(1, 1, 32)
    x[..., 3] = torch.nan
    found = convert(conv, 16)(x).isnan().flatten()
    assert found.any()
    assert not found.all()


def test_one_number_is_a_grid_of_all_axes():
    net = nn.Conv2d(1, 1, 3, padding=1, **CIRCLE)
    assert np.shape(convert(net, 8)._stiefel_grid.base_shape) == (2,)

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stiefel.nn.operators import SpectralConv, convert, discretization_error, resample
from stiefel.nn.operators.discretization_features import restrict

CIRCLE = {"padding": 2, "padding_mode": "circular"}
DOUBLE = {"dtype": torch.float64}


def wave(x):
    """Two harmonics, one channel, one to three axes."""
    angle = 2 * math.pi * sum((i + 1) * a for i, a in enumerate(x))
    return (angle.sin() + 0.3 * (2 * angle).cos())[None]


def smooth(channels=1, conv=nn.Conv1d):
    layer = conv(channels, channels, 5, groups=channels, bias=False, **CIRCLE)
    ndim = layer.weight.ndim - 2
    taps = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1])
    kernel = taps
    for _ in range(ndim - 1):
        kernel = kernel[..., None] * taps
    layer.weight.data = kernel.expand_as(layer.weight).clone()
    return layer.double()


def spectral():
    torch.manual_seed(0)
    return SpectralConv(1, 1, 8, **DOUBLE)


def test_a_spectral_convolution_does_not_know_its_grid():
    found = discretization_error(spectral(), wave, [16, 32, 64])
    assert found.finest == (64,)
    assert all(value < 1e-13 for value in found.table.values())
    assert found.layer is None
    assert found[64] == 0


def test_the_table_is_the_change_against_the_finest():
    conv = smooth()
    found = discretization_error(conv, wave, [32, 128, 64])
    x = {n: wave(torch.arange(n, **DOUBLE)[None] / n)[None] for n in (32, 64, 128)}
    for n in (32, 64):
        exact = conv(x[128])[..., :: 128 // n].detach()
        change = float((conv(x[n]).detach() - exact).norm() / exact.norm())
        assert found[n] == found[(n,)] == found.table[n,] == pytest.approx(change, rel=1e-12)
    assert found.layer == ""
    with pytest.raises(KeyError):
        found[16]


@pytest.mark.parametrize("place", [0, 2, 4])
def test_the_layer_that_is_tied_to_its_grid_is_named(place):
    """One plain convolution among converted ones."""
    layers = [convert(smooth(), 32), nn.Tanh(), convert(smooth(), 32), nn.Tanh(), spectral()]
    layers[place] = smooth()
    found = discretization_error(nn.Sequential(*layers), wave, [16, 32, 64, 128])
    assert found.layer == str(place)
    own = {row.name: row.worst for row in found.layers}
    assert own["1"] < 1e-12
    assert own["3"] < 1e-12
    assert own[str(place)] > 5 * max(v for n, v in own.items() if n not in ("", str(place)))
    assert f"→ {place} Conv1d" in str(found)


def test_own_errors_leave_out_what_came_before():
    net = nn.Sequential(smooth(), nn.Identity(), spectral())
    found = discretization_error(net, wave, [16, 64])
    rows = {row.name: row for row in found.layers}
    assert rows["1"].own[16,] == 0
    assert rows["1"].total[16,] == rows["0"].own[16,] == rows["0"].total[16,] > 0.1
    assert rows["2"].total[16,] == found[16]


class Upside(nn.Module):
    """Counts points in code of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = spectral(), spectral()

    def forward(self, x):
        return self.second(F.avg_pool1d(F.pad(self.first(x), (4, 4), mode="circular"), 9, 1))


def test_code_of_a_module_itself_is_named():
    found = discretization_error(nn.Sequential(spectral(), Upside()), wave, [16, 32, 64])
    assert found.layer == "1"
    assert discretization_error(Upside(), wave, [16, 64]).layer == ""


def test_code_is_named_before_layers_with_small_errors():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = convert(smooth(), 32)

        def forward(self, x):
            return self.layer(x) - x.roll(4, -1)

    found = discretization_error(nn.Sequential(Steps(), nn.Tanh()), wave, [32, 64, 128])
    rows = {row.name: row for row in found.layers}
    assert found.layer == "0"
    assert rows["0"].worst > 4 * rows["0.layer"].worst > 0.004
    assert not rows["0"].leaf


def test_the_first_of_several_is_named():
    """A first layer with less error than the second one, but more than half of it."""
    net = nn.Sequential(smooth(), nn.Identity(), smooth())
    with torch.no_grad():
        net[0].weight.copy_(0.8 * net[0].weight)
        net[0].weight[..., 2] += 0.2
    found = discretization_error(net, wave, [16, 64])
    first, second = (row.worst for row in found.layers if row.kind == "Conv1d")
    assert 0.5 * second < first < second
    assert found.layer == "0"


def test_conversion_makes_the_change_small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 8, 5, **CIRCLE), nn.GELU(), nn.Conv1d(8, 1, 5, **CIRCLE))
    plain = discretization_error(net, wave, [32, 64, 128, 256])
    converted = discretization_error(convert(net, 64), wave, [32, 64, 128, 256])
    assert plain[64] > 0.1
    assert converted[128] < converted[64] < 0.1 * plain[64]


@pytest.mark.parametrize("ndim", [2, 3])
def test_more_axes_and_grids_that_do_not_divide(ndim):
    conv = smooth(conv=(nn.Conv2d, nn.Conv3d)[ndim - 2])
    base = (8, 12, 18)[:ndim]
    shapes = [tuple(f * n // 2 for n in base) for f in (2, 3, 4)]
    converted = discretization_error(convert(conv, base), wave, shapes)
    plain = discretization_error(conv, wave, shapes)
    for shape in shapes[:2]:
        assert 0 < converted[shape] < 0.4 * plain[shape]


def test_points_of_a_grid_in_one_axis():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(1, 2).double()

        def forward(self, x):
            y = self.mix(x.flatten(2).mT)
            return y.mT.unflatten(2, x.shape[2:])

    found = discretization_error(Tokens(), wave, [(8, 4), (16, 8)])
    assert found[(8, 4)] < 1e-15
    assert {row.name: row.total for row in found.layers}["mix"][8, 4] < 1e-15


def test_both_ends_and_fields_given_as_tensors():
    torch.manual_seed(0)
    conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="replicate", **DOUBLE)
    net = convert(conv, 17, resample="linear", periodic=False)
    line = torch.linspace(0, 1, 65, **DOUBLE)
    called = discretization_error(net, lambda x: x**2, [17, 33, 65])
    field = discretization_error(net, (line**2)[None, None], [17, 33, 65])
    assert called.table == pytest.approx(field.table)
    other = discretization_error(net, lambda x: x**2, [17, 65], periodic=False)
    assert other[17] == pytest.approx(called[17])


def test_restriction_takes_common_points():
    x = torch.arange(12.0)
    assert torch.equal(restrict(x, [4], (12,), (4,), True), x[::3])
    assert torch.equal(restrict(x, [5], (12,), (5,), True)[None, None], resample(x[None, None], 5))
    assert torch.equal(restrict(torch.arange(9), [5], (9,), (5,), False), torch.arange(0, 9, 2))
    assert restrict(x, [4, 1], (12,), (4,), True) is None
    grid = torch.arange(32).reshape(8, 4)
    found = restrict(grid.flatten(), [8], (8, 4), (4, 2), True)
    assert torch.equal(found, grid[::2, ::2].flatten())


def test_mode_and_hooks_stay_as_they_were():
    net = nn.Sequential(nn.Dropout(0.5), smooth(), nn.BatchNorm1d(1).double()).train()
    net[1].eval()
    discretization_error(net, wave, [16, 32])
    assert [m.training for m in net] == [True, False, True]
    assert int(net[2].num_batches_tracked) == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_reports_as_data_and_pictures():
    found = discretization_error(nn.Sequential(smooth(), nn.Tanh()), wave, [16, 32, 64])
    data = json.loads(json.dumps(found.to_dict()))
    assert data["finest"] == "64"
    assert data["table"]["16"] == found[16]
    assert data["layer"] == "0"
    assert [row["name"] for row in data["layers"]] == ["", "0", "1"]
    assert len(str(found).splitlines()) == 5
    left, right = found.figure().axes
    drawn = dict(zip(*left.lines[0].get_data(), strict=True))
    assert drawn[16] == pytest.approx(found[16])
    assert [t.get_text() for t in right.get_yticklabels()] == ["0", "1"]
    assert found.plot().lines
    assert found.plot(left) is left


@pytest.mark.parametrize(
    ("function", "shapes", "error", "message"),
    [
        (wave, [16], ValueError, "at least two"),
        (wave, [16, (8, 8)], ValueError, "as many axes"),
        (wave, [16, 0], ValueError, "shapes"),
        (lambda x: x[0], [16, 32], ValueError, "function must return"),
        (lambda x: x.new_full(x.shape, torch.nan), [16, 32], ValueError, "finite"),
        (torch.zeros(1, 1, 30), [16, 32], ValueError, "finest"),
    ],
)
def test_bad_arguments(function, shapes, error, message):
    with pytest.raises(error, match=message):
        discretization_error(smooth(), function, shapes)


def test_a_network_that_fails_says_where():
    net = nn.Sequential(smooth(), nn.Linear(16, 16).double())
    with pytest.raises(RuntimeError, match=r"shape \(1, 1, 32\), in '1'"):
        discretization_error(net, wave, [16, 32])


def test_a_network_that_returns_no_field_is_refused():
    class Counts(nn.Module):
        def forward(self, x):
            return {"points": x.shape[-1]}

    with pytest.raises(ValueError, match="follows that of the input"):
        discretization_error(Counts(), wave, [16, 32])

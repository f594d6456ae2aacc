import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stiefel.nn import operators
from stiefel.nn.operators import ConversionError, SpectralConv, convert, report

CIRCLE = {"padding": 1, "padding_mode": "circular"}


class Transformer(nn.Module):
    """Patches, a table of positions, attention, a map back."""

    def __init__(self, table=(1, 16, 8), dim=8):
        super().__init__()
        self.patches = nn.Conv1d(1, dim, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(table))
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(dim, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )
        self.back = nn.ConvTranspose1d(dim, 1, 4, stride=4)

    def forward(self, x):
        return self.back(self.blocks(self.patches(x).mT + self.position).mT)


class Interpolating(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, **CIRCLE)

    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=2)


class OwnConv(nn.Conv1d):
    def forward(self, x):
        return super().forward(x).roll(1, -1)


BLOCKING = {
    "flattened": (
        nn.Sequential(nn.Conv1d(1, 3, 3, **CIRCLE), nn.Flatten(), nn.Linear(192, 10)), "2", "dense",
    ),
    "over the grid": (nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)), "0", "dense"),
    "after a level": (
        nn.ModuleDict({"conv": nn.Conv1d(1, 3, 4, stride=2, padding=1), "head": nn.Linear(96, 5)}),
        "head", "dense",
    ),
    "positions": (Transformer(), "", "position"),
    "positions of the grid": (Transformer((1, 64, 8)), "", r"position \(1, 64, 8\)"),
    "an embedding": (nn.ModuleDict({"table": nn.Embedding(64, 8)}), "table", "64 rows"),
    "a number per point": (nn.Sequential(nn.LayerNorm(64)), "0", "per point"),
    "valid": (nn.Sequential(nn.Conv1d(1, 1, 3)), "0", "padding"),
    "even": (nn.Sequential(nn.Conv1d(1, 1, 4, padding="same")), "0", "even"),
    "padding layer": (nn.Sequential(nn.CircularPad1d(1), nn.Conv1d(1, 1, 3)), "0", "pads"),
    "recurrence": (nn.ModuleDict({"rnn": nn.GRU(1, 4)}), "rnn", "steps"),
    "indices": (nn.Sequential(nn.MaxPool1d(2, return_indices=True)), "0", "indices"),
    "lazy": (nn.Sequential(nn.LazyConv1d(4, 3, **CIRCLE)), "0", "once before"),
    "own convolution": (nn.Sequential(OwnConv(1, 1, 3, **CIRCLE)), "0", "forward of its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKING)
def test_what_is_tied_to_the_grid_is_named(name):
    module, where, why = BLOCKING[name]
    rows = report(module, 64)
    assert where in [row.name for row in rows.blocking]
    with pytest.raises(ConversionError, match=why) as caught:
        convert(module, 64)
    assert isinstance(caught.value, ValueError)
    assert (where or "the module") in str(caught.value)
    assert caught.value.report == rows
    assert rows[where] in rows.unmapped


def test_a_network_that_can_be_converted():
    net = nn.Sequential(
        nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 3, **CIRCLE), nn.GELU(), nn.BatchNorm1d(4),
        nn.AvgPool1d(2), nn.Dropout(0.1), SpectralConv(4, 4, 8), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64),
    )  # fmt: skip
    rows = report(net, 64)
    assert [row.status for row in rows] == [
        "ok", "ok", "converted", "ok", "converted", "converted", "ok", "ok", "converted", "ok",
        "ok", "ok", "converted",
    ]  # fmt: skip
    assert all(row.reason for row in rows)
    assert rows.blocking == rows.unmapped == ()
    assert "length" in rows["1"].reason
    assert len(rows) == 13
    with pytest.raises(KeyError, match="'no'"):
        rows["no"]
    converted = convert(net, 64)
    after = report(converted)
    assert [row.status for row in after] == [row.status for row in rows]
    assert after["1"].kind == "FixedFieldConv1d"
    assert json.loads(json.dumps(rows.to_dict()))["layers"][1]["name"] == "0"
    lines = str(rows).splitlines()
    assert len(lines) == 14
    assert lines[1].startswith("(whole)")
    assert report(net).blocking == ()


def test_code_that_cannot_be_seen_is_told():
    rows = report(Interpolating(), 64)
    assert [row.name for row in rows.unmapped] == [""]
    assert "interpolate" in rows[""].reason
    assert report(convert(Interpolating(), 64)).unmapped[0].status == "unseen"


def test_channels_are_not_taken_for_the_grid():
    """As many channels as points: a dense layer on them is checked when it is called."""

    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.mix = nn.Conv1d(1, 64, 1), nn.Linear(64, 64)

        def forward(self, x):
            return self.mix(self.lift(x).mT).mT

    net = convert(Channels(), 64)
    x = torch.randn(2, 1, 128)
    assert net(x).shape == (2, 64, 128)
    net.forward = lambda x: net.mix(net.lift(x))
    with pytest.raises(ValueError, match="'mix' is a Linear over the grid: it has 64 inputs"):
        net(x)


def test_a_transformer_of_coordinates():
    class Coordinates(Transformer):
        def forward(self, x):
            tokens = self.patches(x).mT
            at = torch.arange(tokens.shape[1]) / tokens.shape[1]
            tokens = tokens + torch.sin(2 * torch.pi * at)[:, None]
            return self.back(self.blocks(tokens).mT)

    torch.manual_seed(0)
    net = Coordinates((1, 1, 1)).eval()
    converted = convert(net, 64)
    assert report(converted).blocking == ()
    t = torch.arange(256) / 256
    x = torch.sin(2 * torch.pi * t)[None, None]
    with torch.no_grad():
        assert torch.equal(converted(x[..., ::4]), net(x[..., ::4]))
        fine = converted(x)[..., ::4]
        assert float((fine - net(x[..., ::4])).norm() / fine.norm()) < 0.02


def test_bad_arguments():
    with pytest.raises(TypeError):
        report("net")
    with pytest.raises(ValueError, match="convolution of 1"):
        report(nn.Conv1d(1, 1, 3), (8, 8))
    assert "report" in operators.__all__

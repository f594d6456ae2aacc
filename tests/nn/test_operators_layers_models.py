"""Perceptrons of the channels, Fourier blocks and whole Fourier and U-shaped operators."""

import copy
import math
import warnings

import pytest
import torch
from operator_fields import jit_warning, seeded, smooth
from torch import nn

from stiefel.nn.operators import FNO, UNO, FNOBlock
from stiefel.nn.operators.point_wise import PointwiseLinear, PointwiseMLP


@pytest.mark.parametrize("activation", [nn.functional.gelu, torch.tanh])
@pytest.mark.parametrize("large", [0, 1e9])
def test_perceptron_is_a_stack_of_linear_layers(activation, large, monkeypatch):
    monkeypatch.setattr("stiefel.nn.operators.point_wise._LARGE", large)
    mlp = PointwiseMLP((3, 5, 4, 2), activation, dtype=torch.float64, generator=seeded())
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    flat = x.permute(0, 2, 3, 1)
    for i, layer in enumerate(mlp.layers):
        flat = nn.functional.linear(flat if i == 0 else activation(flat), layer.weight, layer.bias)
    torch.testing.assert_close(mlp(x), flat.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="3, \\*grid"):
        mlp(x[:, :2])
    with pytest.raises(ValueError, match="widths"):
        PointwiseMLP((3,))


@jit_warning
def test_perceptron_derivatives_of_both_orders(monkeypatch):
    monkeypatch.setattr("stiefel.nn.operators.point_wise._LARGE", 0)
    mlp = PointwiseMLP((2, 3, 2), dtype=torch.float64, generator=seeded())
    names = [name for name, _ in mlp.named_parameters()]
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(mlp, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *mlp.parameters())
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("large", [0, 1e9])
def test_block_is_its_formula(large, monkeypatch):
    monkeypatch.setattr("stiefel.nn.operators.point_wise._LARGE", large)
    block = FNOBlock(3, 3, (4, 4), dtype=torch.float64, generator=seeded())
    with torch.no_grad():
        block.gate.copy_(torch.tensor([0.5, 2, -1]))
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64, generator=seeded(1))
    gelu = nn.functional.gelu
    inner = gelu(block.spectral(x) + block.skip(x))
    expected = gelu(block.mlp(inner) + block.gate[:, None, None] * x)
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block(x, (8, 6)), expected)
    plain = FNOBlock(3, 4, 4, activation=None, channel_mlp_expansion=None, dtype=torch.float64)
    y = x[:, :, 0]
    torch.testing.assert_close(plain(y), plain.spectral(y) + plain.skip(y))
    assert "gate" not in plain.state_dict()
    with pytest.raises(ValueError, match="equal with a channel MLP"):
        FNOBlock(3, 4, 4)


def test_block_derivatives():
    block = FNOBlock(2, 2, 2, dtype=torch.float64, generator=seeded())
    names = [name for name, _ in block.named_parameters()]
    x = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *block.parameters()))


@pytest.mark.parametrize("ndim", [1, 2])
def test_operators_converge_as_the_grid_is_refined(ndim):
    models = [
        FNO(6, 2, 1, 8, n_layers=2, ndim=ndim, positional_embedding=None, generator=seeded()),
        UNO(6, 2, 1, 8, levels=2, ndim=ndim, generator=seeded()),
    ]
    for model in models:
        model = model.double()
        grids = (16, 32, 64)
        if isinstance(model, UNO):
            # Coordinates jump at the border of the box: leave them out here.
            with torch.no_grad():
                model.lifting.layers[0].weight[:, 2:] = 0
        ends = [
            model(smooth(n, 2, ndim=ndim))[(..., *(slice(None, None, n // 16),) * ndim)].detach()
            for n in grids
        ]
        errors = [float((y - ends[-1]).abs().max() / ends[-1].abs().max()) for y in ends[:-1]]
        assert errors[1] < 0.2 * errors[0] + 1e-9
        assert errors[1] < 1e-3


def test_models_take_any_grid_and_have_the_same_state():
    fno = FNO((8, 8), 1, 2, 8, n_layers=2, generator=seeded())
    assert fno(torch.randn(2, 1, 12, 17)).shape == (2, 2, 12, 17)
    assert fno(torch.randn(2, 1, 12, 17), (20, 16)).shape == (2, 2, 20, 16)
    uno = UNO((8, 8), 1, 2, 8, generator=seeded())
    for grid in ((15, 10), (9, 16)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer points than modes at the lowest level
            assert uno(torch.randn(2, 1, *grid)).shape == (2, 2, *grid)
    for model in (fno, uno):
        before = {k: v.shape for k, v in model.state_dict().items()}
        model(torch.randn(1, 1, 32, 32))
        assert {k: v.shape for k, v in model.state_dict().items()} == before
        first = next(model.parameters()).detach().clone()
        model.reset_parameters(seeded(5))
        assert not torch.equal(first, next(model.parameters()))


def test_output_on_another_grid_is_the_function_there():
    fno = FNO(6, 2, 1, 8, n_layers=1, positional_embedding=None, generator=seeded()).double()
    fine = fno(smooth(32, 2))
    torch.testing.assert_close(fno(smooth(16, 2), 32)[..., ::2], fine[..., ::2], atol=0.02, rtol=0)


@pytest.mark.parametrize("model", [FNO(4, 2, 1, 6, n_layers=2), UNO(4, 2, 1, 6, levels=2)])
def test_models_in_bfloat16_and_under_autocast(model):
    x = smooth(16, 2, dtype=torch.float32)
    expected = model(x)
    low = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    torch.testing.assert_close(mixed.float(), expected, atol=0.05, rtol=0.05)
    mixed.float().sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "n_layers"),
        ({"hidden_channels": 0}, "hidden_channels"),
        ({"positional_embedding": "table"}, "positional_embedding"),
        ({"lifting_channel_ratio": 0}, "lifting_channel_ratio"),
        ({"channel_mlp_expansion": -1}, "channel_mlp_expansion"),
        ({"n_modes": 0}, "n_modes"),
    ],
)
def test_model_settings_are_refused(options, message):
    settings_ = {"n_modes": 4, "in_channels": 1, "out_channels": 1, "hidden_channels": 4, **options}
    with pytest.raises(ValueError, match=message):
        FNO(**settings_)


def test_model_fields_are_refused():
    for model in (FNO(4, 1, 1, 4), UNO(4, 1, 1, 4)):
        with pytest.raises(ValueError, match="finite"):
            model(torch.full((1, 1, 8), math.nan))
        with pytest.raises(ValueError, match="channels"):
            model(torch.ones(1, 2, 8))
        with pytest.raises(ValueError, match="grid axes"):
            model(torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match="levels"):
        UNO(4, 1, 1, 4, levels=0)
    with pytest.raises(ValueError, match="in_channels"):
        PointwiseLinear(0, 1)

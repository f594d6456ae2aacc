import math

import pytest
import torch
from torch import nn

from stiefel.nn import OrthogonalConv2d, certified_lipschitz, conv_spectral_norm


def norm_of(layer, shape):
    """The largest singular value of a linear layer, from its action on unit vectors."""
    count = math.prod(shape)
    x = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    with torch.no_grad():
        y = layer.double()(x) - layer(torch.zeros_like(x))
    return float(torch.linalg.matrix_norm(y.flatten(1), 2))


torch.manual_seed(0)  # the layers below are drawn at import; how tight a bound is depends on them
EXACT = [
    nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(2, 4, 3, 2, padding=1, padding_mode="circular", groups=2),
    nn.Conv2d(2, 3, 3, padding=2, dilation=2, padding_mode="circular"),
    nn.Conv2d(2, 3, (1, 5), padding=(0, 2), padding_mode="circular"),
    nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"),
]
BOUNDED = [
    nn.Conv2d(2, 3, 3, padding=1),
    nn.Conv2d(2, 3, 3),
    nn.Conv2d(2, 4, 3, 2, padding=1),
    nn.Conv2d(2, 4, 4, padding="same"),
    nn.Conv2d(2, 4, 3, padding="valid", dilation=2),
]


@pytest.mark.parametrize("layer", EXACT, ids=str)
def test_circular_layers_exactly(layer):
    assert certified_lipschitz(layer, (2, 6, 6)) == pytest.approx(norm_of(layer, (2, 6, 6)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layer", BOUNDED, ids=str)
def test_other_borders_from_above(layer):
    bound, exact = certified_lipschitz(layer, (2, 6, 6)), norm_of(layer, (2, 6, 6))
    assert exact <= bound * (1 + 1e-12)
    assert bound <= 2 * exact


def test_a_chain(generator):
    class Absolute(nn.Module):
        def forward(self, x):
            return x.abs()

    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.LeakyReLU(2.0),
        nn.Sequential(OrthogonalConv2d(4, 8, 4, 2, generator=generator), Absolute(), nn.Dropout()),
        OrthogonalConv2d(8, 4, 3, method="cayley", generator=generator),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    found = certified_lipschitz(model, (1, 8, 8), known={Absolute: 1})
    first = float(conv_spectral_norm(model[0].weight.detach().double(), 8))
    last = float(torch.linalg.matrix_norm(model[5].weight.detach().double(), 2))
    assert found == pytest.approx(2 * first * last, rel=1e-5)
    assert model.training
    assert model[2][2].training
    model.eval()
    x, y = torch.randn(2, 50, 1, 8, 8, generator=generator)
    with torch.no_grad():
        moved = (model(x) - model(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert float(moved.max()) <= found
    with pytest.raises(TypeError, match=r"model\.2\.1 \(Absolute\) is not known"):
        certified_lipschitz(model, (1, 8, 8))


@pytest.mark.parametrize(
    ("model", "shape", "settings", "error", "message"),
    [
        (nn.BatchNorm2d(2), (2, 6, 6), {}, TypeError, "BatchNorm2d"),
        (nn.ConvTranspose2d(2, 2, 3), (2, 6, 6), {}, TypeError, "ConvTranspose2d"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 6, 6), {}, NotImplementedError,
         "pads by 'reflect'"),
        (nn.Conv2d(2, 2, 3, padding=2, padding_mode="circular"), (2, 6, 6), {}, ValueError,
         r"\(k - 1\)/2"),
        (nn.Conv2d(2, 2, 3, 2, padding=1, padding_mode="circular"), (2, 5, 6), {}, ValueError,
         "must divide"),
        (nn.ReLU(), (2,), {"known": {nn.ReLU: -1.0}}, ValueError, "known"),
        (nn.ReLU(), (2,), {"known": {nn.ReLU: math.inf}}, ValueError, "finite"),
    ],
)  # fmt: skip
def test_what_is_not_certified(model, shape, settings, error, message):
    with pytest.raises(error, match=message):
        certified_lipschitz(model, shape, **settings)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv1d(3, 2, 1)], ids=str)
def test_weights_that_are_not_finite(layer):
    nn.init.constant_(layer.weight, math.nan)
    shape = (3,) if isinstance(layer, nn.Linear) else (3, 4)
    with pytest.raises(ValueError, match="the weight of model must be finite"):
        certified_lipschitz(layer, shape)


def test_the_circle_holds_the_padding_too():
    """[1, 0, −1] on two pixels: 0 at both frequencies of that circle, yet zeros make it 1."""
    layer = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[1.0, 0, -1]]]))
    assert float(conv_spectral_norm(layer.weight.detach(), 2)) < 1e-6
    assert norm_of(layer, (1, 2)) == pytest.approx(1)
    assert certified_lipschitz(layer, (1, 2)) == pytest.approx(2)

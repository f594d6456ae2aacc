import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conv_twins import dense
from torch import nn
from torch.nn.utils import parametrize

from stiefel.linalg.block_conv import block_kernel, block_plan, cayley_columns, cayley_convolve
from stiefel.nn import (
    OrthogonalConv1d,
    OrthogonalConv2d,
    conv_singular_values,
    lorth,
    orthogonal_conv,
    orthogonalize_,
)

DOUBLE = {"dtype": torch.float64}
# in_ch, out_ch, kernel, stride, groups, method
LAYERS = [
    (3, 4, 3, 1, 1, "bcop"), (4, 3, 3, 1, 1, "bcop"), (1, 5, 3, 1, 1, "bcop"),
    (2, 8, 3, 2, 1, "bcop"), (2, 9, 5, 2, 1, "bcop"), (4, 3, 4, 2, 1, "bcop"),
    (4, 6, 2, 1, 2, "bcop"), (3, 2, (1, 3), (2, 1), 1, "bcop"), (4, 2, 2, 3, 1, "bcop"),
    (3, 4, 3, 1, 1, "cayley"), (4, 6, 3, 2, 2, "cayley"), (1, 9, 2, 2, 1, "cayley"),
    (3, 4, 3, 1, 1, "penalty"), (4, 6, 3, 2, 2, "penalty"),
]  # fmt: skip


def matrix_of(layer, image):
    """The linear part of a layer, from its action on unit vectors."""
    channels = layer.in_channels
    count = channels * math.prod(image)
    x = torch.eye(count, dtype=torch.float64).reshape(count, channels, *image)
    with torch.no_grad():
        return (layer(x) - layer(torch.zeros_like(x))).flatten(1).T


@pytest.mark.parametrize("settings", LAYERS)
def test_every_singular_value_of_the_layer_is_one(settings, generator):
    c, m, k, s, groups, method = settings
    layer = OrthogonalConv2d(c, m, k, s, groups, method=method, generator=generator, **DOUBLE)
    matrix = matrix_of(layer, (6, 6))
    values = torch.linalg.svdvals(matrix)
    assert float((values - 1).abs().max()) < 1e-13
    if method != "cayley":
        assert float(layer.lorth().detach()) < 1e-26
        exact = conv_singular_values(layer.weight.detach(), 6, s, groups)
        assert float((exact - 1).abs().max()) < 1e-13


def test_one_channel_is_more_than_a_shift(generator):
    """Factors sit on the side with more channels: all taps are in use."""
    for c, m, s in ((1, 5, 1), (1, 3, 2)):
        layer = OrthogonalConv2d(c, m, 5, s, generator=generator, **DOUBLE)
        taps = layer.weight.detach().square().sum((0, 1))
        assert int((taps > 1e-6).sum()) >= 16


@pytest.mark.parametrize("method", ["bcop", "cayley"])
def test_one_axis(method, generator):
    layer = OrthogonalConv1d(3, 7, 4, 2, method=method, generator=generator, **DOUBLE)
    values = torch.linalg.svdvals(matrix_of(layer, (10,)))
    assert float((values - 1).abs().max()) < 1e-13
    x = torch.randn(3, 10, generator=generator, **DOUBLE)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_the_layer_is_torchs_own(generator):
    layer = OrthogonalConv2d(3, 5, 3, 2, generator=generator)
    assert isinstance(layer, nn.Conv2d)
    plain = nn.Conv2d(3, 5, 3, 2, padding=1, padding_mode="circular")
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach() + 1})
    x = torch.randn(2, 3, 8, 6, generator=generator)
    torch.testing.assert_close(layer(x) + 1, plain(x))
    assert layer(x).shape == (2, 5, 4, 3)
    assert layer(x[0]).shape == (5, 4, 3)


def test_even_kernels_keep_the_size(generator):
    layer = OrthogonalConv2d(2, 3, (2, 4), bias=False, generator=generator, **DOUBLE)
    matrix = matrix_of(layer, (5, 6))
    torch.testing.assert_close(
        torch.linalg.svdvals(matrix),
        torch.linalg.svdvals(dense(layer.weight.detach(), (5, 6), 1)),
    )
    assert layer(torch.zeros(1, 2, 5, 6, **DOUBLE)).shape == (1, 3, 5, 6)


def test_without_padding_rows_stay_orthonormal(generator):
    layer = OrthogonalConv2d(4, 3, 3, padding_mode="valid", generator=generator, **DOUBLE)
    matrix = matrix_of(layer, (5, 6))
    assert matrix.shape == (3 * 3 * 4, 4 * 30)
    off = matrix @ matrix.T - torch.eye(len(matrix), **DOUBLE)
    assert float(off.abs().max()) < 1e-14


def test_training_keeps_the_layer_orthogonal(generator):
    """While it learns: here a shift by one pixel of both channels."""
    layer = OrthogonalConv2d(2, 2, 3, bias=False, generator=generator)
    before = layer.weight.detach().clone()
    x = torch.randn(8, 2, 6, 6, generator=generator)
    target = torch.roll(x, 1, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    first = (torch.nn.functional.conv2d(
        torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), before
    ) - target).square().mean()  # fmt: skip
    assert float(loss.detach()) < 0.7 * float(first)
    values = conv_singular_values(layer.weight.detach(), 8)
    assert float((values - 1).abs().max()) < 2e-6


@pytest.mark.parametrize(("m", "c", "k", "s"), [(2, 3, (3,), (1,)), (5, 2, (2, 3), (1, 2))])
def test_gradients_of_composed_kernels(m, c, k, s, generator):
    plan = block_plan(m, c, k, s)
    shapes = (plan.base_shape, plan.right_shape, plan.left_shape)
    factors = [torch.randn(1, *x, generator=generator, **DOUBLE).requires_grad_() for x in shapes]
    used = [x for x in factors if x.numel()]

    def kernel(*given):
        rest = iter(given)
        return block_kernel(plan, *(next(rest) if x.numel() else x for x in factors))

    assert torch.autograd.gradcheck(kernel, used)


@pytest.mark.parametrize(("m", "c", "s"), [(2, 3, 1), (5, 2, 2), (4, 4, 1)])
def test_gradients_of_cayley_layers(m, c, s, generator):
    x = torch.randn(1, c, 4, 4, generator=generator, **DOUBLE).requires_grad_()
    weight = torch.randn(m, c, 2, 2, generator=generator, **DOUBLE).requires_grad_()
    gain = torch.tensor(1.3, **DOUBLE).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: cayley_convolve(*a, (s, s)), (x, weight, gain))


def test_cayley_equations(generator):
    """The two blocks as the paper writes them, by solves."""
    w = torch.randn(3, 5, 2, dtype=torch.complex128, generator=generator)
    u, v, eye = w[:, :2], w[:, 2:], torch.eye(2, dtype=w.dtype)
    a = u - u.mH + v.mH @ v
    top = torch.linalg.solve(eye + a, eye - a)
    bottom = -2 * torch.linalg.solve((eye + a).mT, v.mT).mT
    torch.testing.assert_close(cayley_columns(w), torch.cat([top, bottom], 1))


def test_cayley_acts_as_a_convolution(generator):
    layer = OrthogonalConv2d(2, 3, 3, method="cayley", generator=generator, **DOUBLE)
    x = torch.randn(1, 2, 6, 6, generator=generator, **DOUBLE)
    torch.testing.assert_close(layer(x.roll((1, 2), (2, 3))), layer(x).roll((1, 2), (2, 3)))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(3, 4, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Conv2d(3, 2, 3, dilation=2),
        nn.ConvTranspose2d(6, 2, 3, stride=2),
        nn.ConvTranspose1d(2, 4, 3, groups=2),
    ],
    ids=lambda conv: f"{type(conv).__name__}-{conv.groups}",
)
def test_a_parametrisation_for_torchs_layers(conv, generator):
    twin = orthogonal_conv(copy.deepcopy(conv).double())
    assert orthogonal_conv(conv.double(), generator=generator) is conv
    assert float(lorth(conv.weight.detach(), conv.stride, conv.groups)) < 1e-26
    with parametrize.cached():
        assert conv.weight is conv.weight
    assert not torch.equal(twin.weight, conv.weight)
    twin.load_state_dict(conv.state_dict())
    assert torch.equal(twin.weight, conv.weight)
    assert torch.equal(copy.deepcopy(conv).weight, conv.weight)
    kernel = conv.weight.detach()
    parametrize.remove_parametrizations(conv, "weight")
    assert torch.equal(conv.weight, kernel)


def test_zeros_at_the_border_never_expand(generator):
    conv = orthogonal_conv(nn.Conv2d(3, 4, 3, padding=1, bias=False).double(), generator=generator)
    values = torch.linalg.svdvals(matrix_of(conv, (5, 5)))
    assert float(values.max()) <= 1 + 1e-13
    assert float(values.min()) < 0.99


def test_starts_and_dtypes(generator):
    state = torch.random.get_rng_state()
    one, two = (
        OrthogonalConv2d(3, 4, 3, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, OrthogonalConv2d(3, 4, 3, generator=generator).weight)
    half = OrthogonalConv2d(3, 4, 3, generator=generator, dtype=torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    # Rounding to 8 bits is all that is wrong.
    assert float(half.lorth().detach()) < 1e-3
    x = torch.randn(1, 3, 6, 6, generator=generator)
    for method in ("bcop", "cayley"):
        layer = OrthogonalConv2d(3, 4, 3, method=method, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            if method == "bcop":
                assert float(layer.lorth().detach()) < 1e-9
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_layers_without_numbers_yet():
    for method in ("bcop", "cayley", "penalty"):
        layer = OrthogonalConv2d(2, 3, 3, method=method, device="meta")
        assert layer(torch.empty(2, 2, 6, 6, device="meta")).shape == (2, 3, 6, 6)
    assert lorth(layer.weight).is_meta


def test_assigning_a_weight_is_refused(generator):
    layer = OrthogonalConv2d(3, 4, 3, generator=generator)
    with pytest.raises(RuntimeError, match="cannot be assigned"):
        layer.weight = torch.zeros(4, 3, 3, 3)
    with pytest.raises(ValueError, match="already has a parametrisation"):
        orthogonal_conv(layer)
    with pytest.raises(ValueError, match="parametrised"):
        orthogonalize_(layer)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((1, 10, 3, 4), {}, ValueError, "M ≤ C·∏min"),
        ((1, 17, 3, 4), {"method": "penalty"}, ValueError, "smallest L_orth is 7"),
        ((3, 4, 3), {"padding_mode": "valid"}, ValueError, "k = S"),
        ((3, 4, 3), {"padding_mode": "zeros"}, ValueError, "zeros at the border"),
        ((3, 4, 3), {"padding_mode": "reflect"}, ValueError, "circular, valid, got 'reflect'"),
        ((4, 3, 3), {"padding_mode": "valid", "method": "cayley"}, ValueError, "by FFT"),
        ((3, 4, 3), {"method": "soc"}, ValueError, "method must be one of bcop, cayley, penalty"),
        ((3, 4, 3, 0), {}, ValueError, "stride must be at least 1"),
        ((3, 4, (3, 3, 3)), {}, ValueError, "kernel_size must be one integer or 2"),
        ((3, 4, 3, 1, 2), {}, ValueError, "in_ch must be divisible by groups=2, got 3"),
        ((0, 4, 3), {}, ValueError, "in_ch must be at least 1"),
    ],
)
def test_layers_that_cannot_be(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        OrthogonalConv2d(*arguments, **settings)


def test_images_that_cannot_be(generator):
    layer = OrthogonalConv2d(3, 5, 3, 2, generator=generator)
    for shape, message in (
        ((1, 3, 5, 6), "divisible by stride"),
        ((1, 3, 2, 6), "at least the kernel's"),
        ((1, 4, 6, 6), r"\[batch, 3, n, n\]"),
        ((3, 6), r"\[batch, 3, n, n\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(torch.zeros(shape))
    cayley = OrthogonalConv2d(3, 5, 3, method="cayley", generator=generator)
    with pytest.raises(ValueError, match="input must be finite"):
        cayley(torch.full((1, 3, 4, 4), math.nan))
    with pytest.raises(ValueError, match="not its kernel"):
        cayley.lorth()


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (nn.Linear(2, 2), TypeError, "must be a convolution, got Linear"),
        (nn.ReLU(), TypeError, "got ReLU"),
        (nn.Conv3d(1, 1, 3), ValueError, "one or two axes, got Conv3d"),
        (nn.Conv2d(1, 10, 3, 4), ValueError, "smallest L_orth is 1"),
        (nn.Conv2d(2, 2, 3, 2, dilation=2), NotImplementedError, "dilation"),
        (nn.LazyConv2d(3, 3), ValueError, "lazy"),
    ],
)
def test_modules_that_cannot_be(module, error, message):
    with pytest.raises(error, match=message):
        orthogonal_conv(module)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(1, 6, 3), nn.Conv2d(4, 3, 3, 2), nn.Conv1d(2, 9, 4), nn.ConvTranspose1d(5, 2, 3),
     nn.Linear(4, 6)],
    ids=lambda conv: type(conv).__name__,
)  # fmt: skip
def test_kernels_orthogonalised_in_place(conv, generator):
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) / 4)
    before = conv.weight.detach().clone()
    reached = orthogonalize_(conv, tol=1e-10)
    assert reached <= 1e-10
    kernel = conv.weight.detach()
    kernel = kernel[..., None] if isinstance(conv, nn.Linear) else kernel
    stride = 1 if isinstance(conv, nn.Linear) else conv.stride
    assert float(lorth(kernel.double(), stride)) < 1e-9
    # It went no further than it had to: the kernel it came from is still there.
    after = kernel.reshape(before.shape)
    cosine = float((after * before).sum() / (after.norm() * before.norm()))
    assert cosine > 0.5


def test_orthogonalising_says_where_it_stops():
    conv = nn.Conv2d(2, 8, 3, 2).double()
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match="after 10 steps, above tol.*local minimum"):
        orthogonalize_(conv, steps=10, tol=1e-12)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        orthogonalize_(conv, steps=0)
    with pytest.raises(ValueError, match="M ≤ C"):
        orthogonalize_(nn.Conv2d(1, 10, 3, 4))


def test_compiled_and_exported_layers_equal_eager_ones():
    script = Path(__file__).with_name("orthogonal_conv_compiled.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 15
    assert max(differences.values()) < 1e-4, differences

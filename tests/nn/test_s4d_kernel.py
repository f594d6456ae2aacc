import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.nn import S4DKernel, s4d_init, vandermonde_kernel
from stiefel.nn._vandermonde import block_length, gather, multiply, powers
from stiefel.nn.s4d_init import discretize
from stiefel.nn.s4d_kernel import REAL_TRANSFORMS

EXACT = {
    ("lin", "zoh"): (
        0.180011974333, 0.143725935450, 0.114447148701, 0.093461965627, 0.081183455100,
    ),
    ("lin", "bilinear"): (
        0.180513955576, 0.144513079546, 0.115306363314, 0.094179077952, 0.081577177212,
    ),
    ("inv", "zoh"): (
        0.188379247158, 0.149260231100, 0.092247227087, 0.026529190607, -0.038315583594,
    ),
    ("inv", "bilinear"): (
        0.186556051952, 0.148827894056, 0.093490024710, 0.029258743526, -0.034688823644,
    ),
    ("legs", "zoh"): (
        0.173107210545, 0.126462686619, 0.094984510363, 0.081566412881, 0.085213365606,
    ),
    ("real", "zoh"): (
        0.190325163928, 0.172213329916, 0.155825064793, 0.140996349292, 0.127578772646,
    ),
}  # fmt: skip


def plain_kernel(a, b, c, dt, length, disc="zoh"):
    """The two lines of the paper: every power, then a sum over modes."""
    log_a, b_bar = discretize(a, b, dt, disc)
    table = torch.exp(log_a[..., None] * torch.arange(length, device=a.device))
    return 2 * torch.einsum("khn,hnl->khl", c * b_bar, table).real


def random_system(channels=3, modes=4, kernels=2, seed=0, dtype=torch.complex128):
    g = torch.Generator().manual_seed(seed)
    a, _ = s4d_init("lin", 2 * modes)
    b, c = (
        torch.randn(*shape, modes, generator=g, dtype=torch.complex128)
        for shape in ((channels,), (kernels, channels))
    )
    dt = 0.01 + 0.2 * torch.rand(channels, 1, generator=g, dtype=torch.float64)
    real = dtype.to_real()
    return a.expand(channels, -1).to(dtype), b.to(dtype), c.to(dtype), dt.to(real)


@pytest.mark.parametrize(("kind", "disc"), EXACT)
def test_exact_values(kind, disc):
    a, _ = s4d_init(kind, 4)
    a = a.flip(0) if kind == "inv" else a
    c = torch.tensor([[[1, 0.5j]]], dtype=torch.complex128)
    dt = torch.tensor([0.1], dtype=torch.float64)
    found = vandermonde_kernel(a[None], torch.ones_like(a)[None], c, dt, 5, disc)
    np.testing.assert_allclose(found.flatten().numpy(), EXACT[kind, disc], rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 200),
    modes=st.integers(1, 5),
    kernels=st.integers(1, 3),
    disc=st.sampled_from(["zoh", "bilinear"]),
)
def test_blocks_equal_the_plain_kernel(length, modes, kernels, disc):
    a, b, c, dt = random_system(2, modes, kernels, seed=length)
    found = vandermonde_kernel(a, b, c, dt, length, disc)
    torch.testing.assert_close(found, plain_kernel(a, b, c, dt, length, disc))


@pytest.mark.parametrize("kind", ["legs", "lin", "inv", "real"])
def test_single_precision_is_no_worse_than_the_plain_kernel(kind):
    a, b = (x[None] for x in s4d_init(kind, 64))
    g = torch.Generator().manual_seed(0)
    c = torch.randn(1, 8, 32, generator=g, dtype=torch.complex128)
    dt = torch.logspace(-3, -1, 8, dtype=torch.float64)[:, None]
    single = [x.to(torch.complex64) for x in (a, b, c)] + [dt.float()]
    # The same rounded parameters, in float64.
    rounded = [x.to(torch.complex128) for x in single[:3]] + [single[3].double()]
    exact = plain_kernel(rounded[0], rounded[1], rounded[2], rounded[3], 4096)
    fast = (vandermonde_kernel(*single, 4096) - exact).abs().max()
    plain = (plain_kernel(*single, 4096) - exact).abs().max()
    assert fast <= plain
    assert float(fast / exact.abs().max()) < 1e-6


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_sum_of_the_kernel_is_the_gain_at_rest(disc):
    a, _ = s4d_init("lin", 4)
    c = torch.tensor([[[1, 0.5j]]], dtype=torch.complex128)
    dt = torch.tensor([0.1], dtype=torch.float64)
    kernel = vandermonde_kernel(a[None], torch.ones_like(a)[None], c, dt, 2000, disc)
    assert float(kernel.sum()) == pytest.approx(3.689553807731, rel=1e-11)
    assert float(-2 * (c[0, 0] / a).sum().real) == pytest.approx(3.689553807731, rel=1e-11)


def test_coarser_sampling_adds_neighbours_under_zoh_only():
    a, b, c, dt = random_system()
    fine = {d: vandermonde_kernel(a, b, c, dt, 40, d) for d in ("zoh", "bilinear")}
    coarse = {d: vandermonde_kernel(a, b, c, dt, 20, d, rate=2) for d in ("zoh", "bilinear")}
    sums = {d: fine[d][..., ::2] + fine[d][..., 1::2] for d in fine}
    torch.testing.assert_close(coarse["zoh"], sums["zoh"])
    assert (coarse["bilinear"] - sums["bilinear"]).abs().max() > 1e-3


def test_gradients():
    a, b, c, dt = random_system(2, 2, 1)
    leaves = [x.clone().requires_grad_() for x in (a, b, c, dt)]
    assert torch.autograd.gradcheck(lambda *x: vandermonde_kernel(*x, 11), leaves)
    small = [x[..., :1, :1].clone().requires_grad_() for x in (a, b, c, dt)]
    assert torch.autograd.gradgradcheck(lambda *x: vandermonde_kernel(*x, 5), small)


def test_nothing_of_channels_times_modes_times_length_is_made():
    """Every tensor of forward and backward pass, as the dispatcher sees it."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel() * (2 if x.is_complex() else 1))
            return out

    kernel, length = S4DKernel(4, 64), 16_384
    with Watch():
        kernel(length).sum().backward()
    tables = 4 * 64 * block_length(length)
    assert largest <= max(tables, 4 * length)
    assert largest * 16 < 4 * 64 * length


@pytest.mark.parametrize("length", [1, 2, 3, 64, 65, 1000])
def test_tables_hold_the_powers(length):
    z = torch.tensor([[-0.1 + 2j, -0.3j]], dtype=torch.complex128)
    index = torch.arange(length, dtype=torch.float64)[:, None]
    expected = torch.exp(3 * index * z[:, None])
    torch.testing.assert_close(powers(z, length, 3, torch.complex128), expected)
    block = block_length(length)
    assert math.sqrt(length) <= block < 2 * math.sqrt(length) + 1
    assert block_length(length, least=40) <= 2 * max(length, block)


def test_gather_is_the_transpose_of_multiply():
    g = torch.Generator().manual_seed(0)
    z = torch.complex(-torch.rand(3, 4, generator=g), torch.randn(3, 4, generator=g)).to(
        torch.complex128
    )
    weights = torch.randn(2, 3, 4, dtype=torch.complex128, generator=g)
    u = torch.randn(2, 37, 3, dtype=torch.float64, generator=g)
    table = multiply(weights, z, 37, torch.complex128, block=16)
    end = gather(u.flip(1), z, torch.complex128, block=16)
    left, right = (table.mT * u).sum(), (weights * end).sum().real
    torch.testing.assert_close(left, right)


def test_module_and_function_agree_and_shapes_are_as_said():
    g = torch.Generator().manual_seed(0)
    module = S4DKernel(6, 8, channels=3, n_ssm=2, generator=g)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "log_dt": (6, 1), "a_re": (2, 4), "a_im": (2, 4), "B": (2, 4, 2), "C": (3, 6, 4, 2),
    }  # fmt: skip
    a = module.A.repeat(3, 1)
    b, c = (torch.view_as_complex(p.detach().double()) for p in (module.B, module.C))
    expected = plain_kernel(a, b.repeat(3, 1), c, module.dt, 50)
    assert module(50).shape == (3, 6, 50)
    assert module(50).dtype == torch.float32
    torch.testing.assert_close(module(50), expected.float(), rtol=1e-5, atol=1e-6)


def test_the_start_is_distributed_as_said():
    module = S4DKernel(2000, 8, generator=torch.Generator().manual_seed(0))
    dt = module.dt.detach()
    assert 1e-3 <= float(dt.min()) < 1.05e-3
    assert 0.095 < float(dt.max()) <= 0.1000001
    assert float(dt.log().mean()) == pytest.approx(math.log(1e-2), abs=0.1)
    assert float(module.C.detach().square().sum(-1).mean()) == pytest.approx(1.0, abs=0.05)
    again = S4DKernel(2000, 8, generator=torch.Generator().manual_seed(0))
    pairs = zip(module.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("transform", REAL_TRANSFORMS)
def test_every_real_transform_starts_at_the_same_diagonal(transform):
    module = S4DKernel(2, 8, init="inv", real_transform=transform, dtype=torch.float64)
    torch.testing.assert_close(module.A.detach(), s4d_init("inv", 8)[0].expand(2, -1))


def test_given_diagonal_and_random_start():
    a, b = s4d_init("lin", 4, scale_imag=3.0)
    module = S4DKernel(3, 4, init=(a, 2 * b), dtype=torch.float64)
    torch.testing.assert_close(module.A.detach(), a.expand(3, -1))
    assert (module.B[..., 0] == 2).all()
    drawn = S4DKernel(3, 4, init="random", generator=torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in drawn.a_im.tolist()}) == 3


def test_bandlimit_drops_modes_that_would_alias():
    module = S4DKernel(1, 8, init="lin", dt_min=0.2, dt_max=0.2, bandlimit=1.0, dtype=torch.float64)
    # dt Im A / 2π = 0, .1, .2, .3 stay below 1/2; at .4 per step three of four pass.
    assert (module.system().c[0, 0] != 0).all()
    module.log_dt.data.fill_(math.log(0.4))
    assert (module.system().c[0, 0] != 0).tolist() == [True, True, True, False]


def test_rate_is_a_factor_on_the_step():
    module = S4DKernel(2, 8, dtype=torch.float64)
    slow = module(30, rate=0.5)
    module.log_dt.data.add_(math.log(0.5))
    torch.testing.assert_close(module(30), slow)


def test_zero_rate_of_learning_freezes_and_hints_are_there():
    frozen = S4DKernel(2, 8, lr=0.0)
    trained = [name for name, p in frozen.named_parameters() if p.requires_grad]
    assert trained == ["C"]
    assert S4DKernel(2, 8, lr=2e-4).optim_hints["a_re"] == {"lr": 2e-4, "weight_decay": 0.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_never_reaches_the_kernel(dtype):
    module = S4DKernel(2, 8, generator=torch.Generator().manual_seed(0))
    before = module(20)
    module.to(dtype)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(20), before)
    assert {p.dtype for p in module.double().parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"d_state": 5}, ValueError, "even and at least 2"),
        ({"d_model": 0}, ValueError, "d_model must be at least 1"),
        ({"channels": 0}, ValueError, "channels must be at least 1"),
        ({"init": "hippo"}, ValueError, "one of legs, lin, inv, real, random"),
        ({"disc": "euler"}, ValueError, "one of zoh, bilinear"),
        ({"dt_min": 0.0}, ValueError, "0 < dt_min"),
        ({"dt_min": 0.2}, ValueError, "dt_min=0.2"),
        ({"dt_max": math.nan}, ValueError, "0 < dt_min"),
        ({"n_ssm": 3}, ValueError, "divide d_model = 4"),
        ({"bandlimit": 0.0}, ValueError, "bandlimit"),
        ({"lr": -1.0}, ValueError, "lr must be"),
        ({"real_transform": "square"}, ValueError, "one of exp, relu"),
        ({"real_transform": "sigmoid", "init": "real"}, ValueError, "sigmoid reaches -1 only"),
        ({"dtype": torch.bfloat16}, TypeError, "float32 or float64"),
        ({"init": (torch.zeros(3), torch.zeros(3))}, ValueError, "32 entries each"),
        ({"init": (torch.ones(32), torch.ones(32))}, ValueError, "Re A must be negative"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        S4DKernel(**{"d_model": 4, **settings})


def test_bad_calls_are_refused():
    module = S4DKernel(2, 8)
    for length in (0, -3):
        with pytest.raises(ValueError, match=f"at least 1, got {length}"):
            module(length)
    for rate in (0.0, math.inf):
        with pytest.raises(ValueError, match="rate must be positive"):
            module(4, rate=rate)
    with pytest.raises(ValueError, match="length L"):
        vandermonde_kernel(*random_system(), 0)


@pytest.mark.parametrize("name", ["log_dt", "a_re", "a_im", "B", "C"])
def test_a_parameter_that_blew_up_is_named(name):
    module = S4DKernel(2, 8)
    getattr(module, name).data.view(-1)[1] = math.nan
    with pytest.raises(RuntimeError, match=f"{name} of S4DKernel"):
        module(4)


def test_large_but_finite_parameters_are_no_blow_up():
    module = S4DKernel(2, 8)
    module.C.data.fill_(3e38)  # their sum is not finite
    module.system()


def test_an_unstable_diagonal_warns():
    module = S4DKernel(2, 8, real_transform="none")
    module(4)
    module.a_re.data[0, 0] = 0.0
    with pytest.warns(RuntimeWarning, match="unstable"):
        kernel = module(4)
    assert kernel.isfinite().all()

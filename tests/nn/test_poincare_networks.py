import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import poincare_twins as twins
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from stiefel.nn.poincare import (
    PoincareBall,
    PoincareBatchNorm2d,
    PoincareConv2d,
    PoincareResidualBlock,
    PoincareResNet,
    RiemannianHook,
    conformal_factor,
    dist,
    expmap,
    expmap0,
    frechet_mean,
    poincare_resnet20,
    poincare_resnet32,
    tangent_add,
    transp,
)
from stiefel.nn.poincare.operations import midpoint

DOUBLE = torch.float64


def norm(features=3, c=0.7, **settings):
    layer = PoincareBatchNorm2d(features, PoincareBall(c, dtype=DOUBLE), dtype=DOUBLE, **settings)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.copy_(torch.linspace(-0.3, 0.5, features))
    return layer


def images(g, *shape, spread=0.4):
    return spread * torch.randn(*shape, dtype=DOUBLE, generator=g) + 0.2


@pytest.mark.parametrize("mean", ["midpoint", "frechet"])
def test_batch_norm_is_points_transport_and_exponential_maps(mean, generator):
    layer, u = norm(mean=mean), images(generator, 4, 3, 2, 2)
    compute = midpoint if mean == "midpoint" else twins.karcher
    exact, mu, variance = twins.batch_norm(u, compute, layer.weight, layer.bias, 0.7)
    torch.testing.assert_close(layer(u), exact, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        expmap0(layer.running_mean * 10, 0.7), mu.detach(), rtol=1e-6, atol=1e-8
    )
    kept = 0.9 + 0.1 * variance.detach()
    torch.testing.assert_close(layer.running_var, kept, rtol=1e-6, atol=0)
    assert int(layer.num_batches_tracked) == 1


def test_batch_norm_gives_its_mean_and_variance(generator):
    layer, u = norm(5, mean="frechet"), images(generator, 6, 5, 3, 3)
    with torch.no_grad():
        out = layer(u).movedim(1, -1).flatten(0, 2)
    beta = expmap0(layer.bias.detach(), 0.7)
    torch.testing.assert_close(frechet_mean(expmap0(out, 0.7), 0.7), beta)
    rows = u.movedim(1, -1).flatten(0, 2)
    mu = frechet_mean(expmap0(rows, 0.7), 0.7)
    s = float(dist(expmap0(rows, 0.7), mu, 0.7).square().mean())
    found = float(dist(expmap0(out, 0.7), beta, 0.7).square().mean())
    assert found == pytest.approx(2 * s / (s + 1e-6), rel=1e-9)


@pytest.mark.parametrize("mean", ["midpoint", "frechet"])
def test_batch_norm_gradients(mean, generator):
    ball = PoincareBall(0.7, learnable=True, dtype=DOUBLE)
    layer = PoincareBatchNorm2d(2, ball, mean=mean, dtype=DOUBLE, track_running_stats=False)
    names = ("weight", "bias", "ball.raw_c")
    values = [torch.tensor(1.7, dtype=DOUBLE), torch.tensor([0.3, -0.2], dtype=DOUBLE),
              ball.raw_c.detach().clone()]  # fmt: skip

    def call(u, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), u)

    arguments = [x.requires_grad_() for x in (images(generator, 2, 2, 2, 1), *values)]
    assert gradcheck(call, arguments, atol=1e-6)
    with torch.no_grad():
        arguments[2].zero_()  # at the start beta is the origin
    assert gradcheck(call, arguments, atol=1e-6)
    if mean == "midpoint":
        assert gradgradcheck(call, arguments, atol=1e-5)


def test_batch_norm_statistics(generator):
    layer, u = norm(mean="midpoint", momentum=1), images(generator, 5, 3, 2, 2)
    trained = layer(u)
    layer.eval()
    torch.testing.assert_close(layer(u), trained)
    torch.testing.assert_close(layer(u[:1]), trained[:1])
    assert layer(u[:1, :, :1, :1]).shape == (1, 3, 1, 1)
    before = layer.running_mean.clone()
    layer(u + 1)
    assert torch.equal(layer.running_mean, before)
    layer.reset_running_stats()
    assert layer.running_mean.abs().max() == 0
    assert float(layer.running_var) == 1
    batch = norm(track_running_stats=False)
    assert set(batch.state_dict()) == {"weight", "bias", "ball.raw_c"}
    torch.testing.assert_close(batch.eval()(u), trained)
    other = norm()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.running_var, layer.running_var)
    assert "mean='midpoint'" in repr(layer)


def test_batch_norm_in_float32_far_from_the_origin(generator):
    """Points in float32 saturate at 9.82; tangent vectors go on."""
    ball = PoincareBall(0.1)
    for mean in ("midpoint", "frechet"):
        layer = PoincareBatchNorm2d(4, ball, mean=mean)
        for length in (0, 1e-6, 1, 8, 12, 1e4):
            u = (torch.randn(3, 4, 2, 2, generator=generator) + 1) * length
            u = u.requires_grad_()
            out = layer(u)
            (slope,) = torch.autograd.grad(out.square().sum(), u)
            assert out.isfinite().all()
            assert slope.isfinite().all()
            if 1 <= length < 9:
                spread = 4 * out.detach().square().sum(1).mean()
                assert float(spread) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("skip", ["fr", "rf"])
def test_residual_block_is_its_parts(skip, generator):
    ball, u = PoincareBall(0.3, dtype=DOUBLE), images(generator, 2, 3, 6, 6)
    for out_ch, stride in ((3, 1), (5, 2)):
        block = PoincareResidualBlock(
            3, out_ch, ball, stride, skip, generator=generator, dtype=DOUBLE
        )
        f = block.norm2(block.conv2(block.norm1(block.conv1(u)).relu()))
        x = block.shortcut(u)
        left, right = (f, x) if skip == "fr" else (x, f)
        exact = twins.tangent_sum(left.movedim(1, -1), right.movedim(1, -1), 0.3).movedim(-1, 1)
        torch.testing.assert_close(block(u), exact.relu(), rtol=1e-5, atol=1e-7)
        assert isinstance(block.shortcut, PoincareConv2d if stride == 2 else nn.Identity)
    assert f"skip='{skip}'" in repr(block)


def test_network_shapes_depths_and_seeds(generator):
    for make, blocks in ((poincare_resnet20, 9), (poincare_resnet32, 15)):
        model = make(7, generator=torch.Generator().manual_seed(1))
        assert sum(isinstance(m, PoincareResidualBlock) for m in model.modules()) == blocks
    assert model.c if hasattr(model, "c") else float(model.ball.c) == pytest.approx(0.1)
    small = PoincareResNet(4, (4, 6), (1, 2), in_ch=1, c=0.5, init="normal",
                           generator=torch.Generator().manual_seed(0))  # fmt: skip
    for side in (1, 8, 11):
        assert small(torch.randn(2, 1, side, side, generator=generator)).shape == (2, 4)
    small.eval()
    x = torch.randn(3, 1, 8, 8, generator=generator)
    torch.testing.assert_close(small(x)[:1], small(x[:1]))
    twin = PoincareResNet(4, (4, 6), (1, 2), in_ch=1, c=0.5)
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin.eval()(x), small(x))
    first = small.head.weight.detach().clone()
    small.reset_parameters(torch.Generator().manual_seed(0))
    assert small.head.weight.shape == first.shape
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(twin(x), twin(x.float()))
    half = copy.deepcopy(twin).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert float(half.ball.c) == pytest.approx(0.5, rel=1e-6)


def test_network_learns_its_curvature_and_its_task(generator):
    model = PoincareResNet(2, (4,), (1,), in_ch=1, learnable=True, generator=generator)
    x = torch.randn(40, 1, 6, 6, generator=generator)
    y = (x.mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before, losses = float(model.ball.c.detach()), []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert float(model.ball.c.detach()) != before


def test_compiled_layers_equal_eager_ones():
    script = Path(__file__).with_name("poincare_compiled.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert set(differences) == {"linear", "conv", "norm", "operations", "at zero"}
    assert max(differences.values()) < 1e-4, differences


def points(g, *shape):
    return expmap0(0.5 * torch.randn(*shape, dtype=DOUBLE, generator=g), 0.7)


def test_hook_makes_sgd_riemannian(generator):
    ball = PoincareBall(0.7, dtype=DOUBLE)
    start, target = points(generator, 6, 3), points(generator, 6, 3)
    point, plain = nn.Parameter(start.clone()), nn.Parameter(torch.ones(2, dtype=DOUBLE))
    optimizer = torch.optim.SGD([point, plain], lr=0.1, momentum=0.5)
    RiemannianHook(optimizer, [point], ball)
    x, momentum = start, torch.zeros_like(start)
    for _ in range(3):
        optimizer.zero_grad()
        (dist(point, target, 0.7).square().sum() + plain.sum()).backward()
        grad = point.grad.clone()
        optimizer.step()
        assert torch.equal(point.grad, grad)
        momentum = 0.5 * momentum + grad / conformal_factor(x, 0.7)[:, None] ** 2
        new = expmap(x, -0.1 * momentum, 0.7)
        momentum, x = transp(x, new, momentum, 0.7), new
        torch.testing.assert_close(point.detach(), x)
        torch.testing.assert_close(optimizer.state[point]["momentum_buffer"], momentum)
    assert float(plain[0].detach()) == pytest.approx(1 - 0.1 * (1 + 1.5 + 1.75))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_hook_keeps_points_inside_and_finds_the_mean(name, generator):
    ball, cloud = PoincareBall(0.7, dtype=DOUBLE), points(generator, 20, 3)
    point = nn.Parameter(points(generator, 1, 3))
    settings = {"weight_decay": 0.0} if name == "AdamW" else {}
    optimizer = getattr(torch.optim, name)([point], lr=0.05, **settings)
    RiemannianHook(optimizer, [point], ball)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    for _ in range(150):
        optimizer.zero_grad()
        dist(point, cloud, 0.7).square().mean().backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(point.detach()[0], frechet_mean(cloud, 0.7), rtol=0, atol=1e-2)
    with torch.no_grad():
        point.grad.fill_(1e9)
    optimizer.step()
    assert ball.conformal_factor(point.detach()).isfinite().all()


def test_hook_can_be_removed_and_refuses_what_cannot_be(generator):
    ball = PoincareBall(0.7)
    point, other = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(4, 2))
    optimizer = torch.optim.SGD([point], lr=1.0)
    hook = RiemannianHook(optimizer, [point], ball)
    optimizer.step()  # no gradients yet
    point.grad = torch.ones(4, 2)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(closure=lambda: 0.0)
    optimizer.step()
    assert point.detach().norm(dim=-1).max() < 0.5
    hook.remove()
    optimizer.step()
    assert float(point.detach().max()) < -1
    with pytest.raises(ValueError, match=r"points\[0\] is not a parameter"):
        RiemannianHook(optimizer, [other], ball)
    with pytest.raises(ValueError, match="at least one"):
        RiemannianHook(optimizer, [], ball)
    with pytest.raises(ValueError, match="inside the ball"):
        RiemannianHook(optimizer, [point], PoincareBall(10.0))
    with pytest.raises(TypeError, match="PoincareBall"):
        RiemannianHook(optimizer, [point], 1.0)
    with torch.no_grad():
        point.zero_()
    RiemannianHook(optimizer, [point], ball)
    point.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()


def test_bad_input():
    ball = PoincareBall(0.1)
    with pytest.raises(ValueError, match="at least two points"):
        PoincareBatchNorm2d(3, ball)(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match="at least two points"):
        PoincareBatchNorm2d(3, ball, track_running_stats=False).eval()(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"x must be \[batch, 3, height, width\]"):
        PoincareBatchNorm2d(3, ball)(torch.zeros(2, 4, 2, 2))
    with pytest.raises(TypeError, match="floating-point"):
        PoincareBatchNorm2d(3, ball)(torch.zeros(2, 3, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="mean must be one of"):
        PoincareBatchNorm2d(3, ball, mean="median")
    for bad in ({"eps": 0}, {"momentum": 0}, {"momentum": 2}):
        with pytest.raises(ValueError, match="eps must be positive and momentum"):
            PoincareBatchNorm2d(3, ball, **bad)
    debug = PoincareBall(0.1, debug=True)
    with pytest.raises(RuntimeError, match="PoincareBatchNorm2d gave NaN"):
        PoincareBatchNorm2d(3, debug)(torch.full((2, 3, 2, 2), math.nan))
    with pytest.raises(ValueError, match=r"share one curvature, got .*shortcut c=0\.2"):
        PoincareResidualBlock(3, 4, ball, shortcut=PoincareConv2d(3, 4, 1, PoincareBall(0.2)))
    with pytest.raises(ValueError, match="the shortcut gave"):
        PoincareResidualBlock(3, 4, ball, shortcut=nn.Identity())(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="skip must be one of"):
        PoincareResidualBlock(3, 3, ball, skip="xf")
    with pytest.raises(ValueError, match="channels and depths"):
        PoincareResNet(10, (8, 16), (1,))
    with pytest.raises(ValueError, match="c must be positive"):
        PoincareResNet(10, c=-0.1)
    with pytest.raises(ValueError, match=r"x must be \[batch, 3"):
        poincare_resnet20()(torch.zeros(1, 1, 8, 8))
    assert tangent_add(torch.zeros(2), torch.ones(2), 1).tolist() == [1, 1]

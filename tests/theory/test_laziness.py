import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stiefel.linalg import haar
from stiefel.theory import (
    CTRNN,
    LazinessProbe,
    kernel_alignment,
    representation_alignment,
    sign_similarity,
    tangent_kernel,
)

sys.path.insert(0, str(Path(__file__).parent))
from kernel_models import mlp
from test_tangent_kernel import W, X, normal, seeded, sheet_network

MOVE = 0.1 * torch.tensor([[1, 0, -1], [0, 1, 0], [1, 0, 0]], dtype=torch.float64)


def test_values_of_the_sheet():
    net = sheet_network()
    probe = LazinessProbe(net, X).snapshot()
    with torch.no_grad():
        net.h2h.weight += MOVE
    report = probe.compare()
    assert report["dW"] == pytest.approx(0.2, abs=1e-12)
    assert report["rel_dW"] == pytest.approx(0.2 / 1.2369316877, abs=1e-9)
    assert report["RA"] == pytest.approx(0.9996966692, abs=1e-10)
    assert report["KA"] == pytest.approx(0.9954247320, abs=1e-10)
    assert report["sign"] == 1.0
    assert math.isnan(report["loss"])
    assert report["KA_error"] == 0.0
    assert report["params"] == ("h2h.weight",)


def test_nothing_changed():
    report = LazinessProbe(sheet_network(), X).snapshot().compare()
    assert report["dW"] == report["rel_dW"] == 0.0
    assert report["RA"] == pytest.approx(1.0, abs=1e-12)
    assert report["KA"] == pytest.approx(1.0, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(2, 8),
    units=st.integers(1, 12),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-40, 0.3, 1e40]),
    center=st.booleans(),
)
def test_invariants(n, units, seed, scale, center):
    h1, h2 = normal(n, units, seed=seed), normal(n, units + 2, seed=seed + 1)
    value = representation_alignment(h1, h2, center)
    assert 0 <= float(value) <= 1 + 1e-12
    q = haar(units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turned = representation_alignment(scale * h1 @ q, h2, center)
    torch.testing.assert_close(turned, value, rtol=1e-9, atol=1e-12)
    k1, k2 = h1 @ h1.mT, h2 @ h2.mT
    torch.testing.assert_close(kernel_alignment(scale * k1, k2, center), value)
    torch.testing.assert_close(kernel_alignment(k2, k1, center), value)
    one = kernel_alignment(k1, scale * k1, center)
    assert float(one) == pytest.approx(1.0, abs=1e-12)
    reordered = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    again = representation_alignment(h1[reordered], h2[reordered], center)
    torch.testing.assert_close(again, value, rtol=1e-9, atol=1e-12)


def test_written_out_and_centred():
    h1, h2 = normal(9, 3), normal(9, 4, seed=1)
    k1, k2 = h1 @ h1.mT, h2 @ h2.mT
    plain = (k1 * k2).sum() / (k1.norm() * k2.norm())
    torch.testing.assert_close(kernel_alignment(k1, k2), plain)
    torch.testing.assert_close(representation_alignment(h1, h2), plain)
    c = torch.eye(9, dtype=torch.float64) - 1 / 9
    c1, c2 = c @ k1 @ c, c @ k2 @ c
    cka = (c1 * c2).sum() / (c1.norm() * c2.norm())
    torch.testing.assert_close(kernel_alignment(k1, k2, center=True), cka)
    torch.testing.assert_close(representation_alignment(h1, h2, center=True), cka)
    shifted = representation_alignment(h1 + 5, h2, center=True)
    torch.testing.assert_close(shifted, cka)


def test_batches_gradients_and_dtypes():
    h1, h2 = normal(2, 5, 3), normal(2, 5, 4, seed=1)
    values = representation_alignment(h1, h2)
    for i in range(2):
        torch.testing.assert_close(values[i], representation_alignment(h1[i], h2[i]))
    for samples in (2, 6):  # samples × samples, or units × units
        a, b = normal(samples, 3).requires_grad_(), normal(samples, 4, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(representation_alignment, (a, b))
    k = (h1 @ h1.mT).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda k: kernel_alignment(k, h2 @ h2.mT, True), k)
    for dtype in (torch.float32, torch.bfloat16):
        low = representation_alignment(h1.to(dtype), h2.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), values, rtol=0.02, atol=0.01)


def test_zeros_give_nan_and_a_warning():
    h = normal(4, 3)
    for dead, alive in ((torch.zeros(4, 3).double(), h), (h, torch.zeros(4, 3).double())):
        with pytest.warns(RuntimeWarning, match="is zero"):
            assert representation_alignment(dead, alive).isnan()
        with pytest.warns(RuntimeWarning, match="K[12] is zero"):
            assert kernel_alignment(dead @ dead.mT, alive @ alive.mT).isnan()
    with pytest.warns(RuntimeWarning, match="is zero"):
        assert representation_alignment(torch.zeros(9, 2), torch.ones(9, 2)).isnan()


def test_bad_kernels():
    k = torch.eye(3)
    with pytest.raises(ValueError, match="one size"):
        kernel_alignment(k, torch.eye(2))
    with pytest.raises(ValueError, match="square"):
        kernel_alignment(k[:2], k[:2])
    with pytest.raises(ValueError, match="K2 must be finite"):
        kernel_alignment(k, k * math.nan)
    with pytest.raises(TypeError, match="float64"):
        kernel_alignment(k, k.double())
    with pytest.raises(ValueError, match="same samples"):
        representation_alignment(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(TypeError, match="float64"):
        representation_alignment(k, k.double())
    with pytest.raises(ValueError, match="H1 must be finite"):
        representation_alignment(k * math.inf, k)


def test_sign_similarity_counts_zeros_as_equal():
    a = torch.tensor([[0.0, 1.0, -2.0, 0.0]])
    b = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    assert sign_similarity(a, b) == 0.5
    with pytest.raises(ValueError, match="must match"):
        sign_similarity(a, b[:, :2])


def test_report_of_a_training_run():
    net, x, y = seeded(mlp()), normal(20, 6), torch.arange(20) % 3
    net.train()
    probe = LazinessProbe(net, x, y).snapshot()
    start = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    report = probe.compare()
    assert net.training
    assert net[4].training
    start.eval(), net.eval()
    moved = [b - a for a, b in zip(start.parameters(), net.parameters(), strict=True)]
    total = math.sqrt(sum(float(m.detach().square().sum()) for m in moved))
    assert report["dW"] == pytest.approx(total)
    with torch.no_grad():
        h = [model[:5](x) for model in (start, net)]
        loss = nn.functional.cross_entropy(net(x), y)
    assert report["RA"] == pytest.approx(float(representation_alignment(*h)))
    assert report["sign"] == sign_similarity(*h)
    assert report["loss"] == pytest.approx(float(loss))
    kernels = [tangent_kernel(model, x) for model in (start, net)]
    assert report["KA"] == pytest.approx(float(kernel_alignment(*kernels)))
    assert 0 < report["KA"] < 0.999
    assert set(report["params"]) == {name for name, _ in net.named_parameters()}


def test_chosen_parameters_hidden_loss_and_estimate(generator):
    net, x = seeded(mlp()), normal(6, 6)
    probe = LazinessProbe(
        net,
        x,
        torch.zeros(6, 3, dtype=torch.float64),
        params=["2.weight"],
        hidden=lambda model, inputs: model[:1](inputs),
        loss=lambda prediction, target: (prediction - target).abs().max(),
        probes=8,
        generator=generator,
    ).snapshot()
    with torch.no_grad():
        net[2].weight += 0.3
    report = probe.compare()
    assert report["dW"] == pytest.approx(0.3 * 16)
    assert report["RA"] == pytest.approx(1.0)  # the first layer did not move
    assert report["KA_error"] > 0
    net.eval()
    assert report["loss"] == pytest.approx(float(net(x).detach().abs().max()))


def test_default_losses():
    net = sheet_network()
    everywhere = torch.tensor([[0, 1, 1], [0, -100, 0]])
    cross = nn.functional.cross_entropy
    with torch.no_grad():
        out = net(X)
    cases = (
        (everywhere, cross(out.flatten(0, 1), everywhere.flatten())),
        (everywhere[:, -1], cross(out[:, -1], everywhere[:, -1])),
        (torch.ones_like(out), (out - 1).square().mean()),
    )
    for targets, loss in cases:
        report = LazinessProbe(net, X, targets).snapshot().compare()
        assert report["loss"] == pytest.approx(float(loss))


def test_a_snapshot_is_a_copy_and_can_be_taken_again():
    net = sheet_network()
    probe = LazinessProbe(net, X)
    with pytest.raises(RuntimeError, match="call snapshot"):
        probe.compare()
    probe.snapshot()
    with torch.no_grad():
        net.h2h.weight += MOVE
    assert probe.compare()["dW"] > 0
    assert probe.snapshot().compare()["dW"] == 0


def test_dead_network_says_so():
    net = sheet_network()
    with torch.no_grad():
        net.i2h.weight.copy_(-net.i2h.weight.abs())
    probe = LazinessProbe(net, X.abs()).snapshot()
    with pytest.warns(RuntimeWarning, match="units dead"):
        report = probe.compare()
    assert math.isnan(report["RA"])
    assert math.isnan(report["KA"])
    assert report["sign"] == 1.0


def test_parameters_that_start_at_zero():
    net = seeded(CTRNN(2, 3, 1))
    with torch.no_grad():
        net.h2h.weight.zero_()
    probe = LazinessProbe(net, X).snapshot()
    with torch.no_grad():
        net.h2h.weight += 0.1
    with pytest.warns(RuntimeWarning, match="were zero"):
        report = probe.compare()
    assert math.isnan(report["rel_dW"])
    assert report["dW"] == pytest.approx(0.3)


def test_bad_probes():
    net = sheet_network()
    with pytest.raises(KeyError, match=r"no parameter 'h2h'.*h2h\.weight"):
        LazinessProbe(net, X, params=("h2h",))
    with pytest.raises(ValueError, match="readout"):
        LazinessProbe(net, X, readout="first")
    with pytest.raises(ValueError, match="must have a sample"):
        LazinessProbe(net, X[:0])
    with pytest.raises(ValueError, match="outputs are 1"):
        LazinessProbe(net, X, torch.zeros(1))
    with pytest.raises(ValueError, match="hidden must give"):
        LazinessProbe(net, X, hidden=lambda model, x: x.sum()).snapshot()
    with pytest.raises(ValueError, match="no Linear layer"):
        LazinessProbe(nn.Sequential(nn.LayerNorm(2)).double(), X).snapshot()


def test_explosions_name_the_step():
    net = sheet_network()
    probe = LazinessProbe(net, X, torch.zeros(2, 3, 2).double()).snapshot()
    watched = LazinessProbe(net, X, params=["h2o.weight"]).snapshot()
    with torch.no_grad():
        net.h2h.weight.fill_(1e300)
    with pytest.raises(FloatingPointError, match="from step 3 of 3"):
        probe.compare()
    with torch.no_grad():
        net.h2h.weight.copy_(W)
        net.h2o.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"h2o\.weight: the change is not finite"):
        watched.compare()
    with pytest.raises(FloatingPointError, match="not finite"):
        probe.compare()
    hidden = LazinessProbe(net, X, hidden=lambda model, x: torch.full((2, 3, 2), math.inf))
    with pytest.raises(FloatingPointError, match="from step 1 of 3"):
        hidden.snapshot()

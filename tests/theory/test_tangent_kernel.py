import copy
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stiefel.theory import (
    CTRNN,
    estimate_kernel_alignment,
    gradient_factors,
    kernel_alignment,
    tangent_kernel,
    tangent_kernel_alignment,
)
from stiefel.theory.layer_factors import LayersError

sys.path.insert(0, str(Path(__file__).parent))
from kernel_models import Cell, LargestTensor, Outside, Tied, mlp

W = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.2], [-0.6, 0.3, 0.7]], dtype=torch.float64)
X = torch.tensor([[[1, 0], [0, 1], [1, 1]], [[0.5, -0.5], [1, 0], [0, 0.5]]], dtype=torch.float64)
WEIGHTS = ["i2h.weight", "h2h.weight", "h2o.weight"]


def sheet_network(w=W):
    net = CTRNN(2, 3, 2, w0=w)
    with torch.no_grad():
        net.i2h.weight.copy_(
            torch.tensor([[0.3, -0.1], [0.2, 0.5], [-0.4, 0.6]], dtype=torch.float64)
        )
        net.h2o.weight.copy_(torch.tensor([[1, -1, 0.5], [0.2, 0.3, -0.7]], dtype=torch.float64))
    return net


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.double()


def gradients_one_by_one(model, x, names, readout):
    """The obvious twin: a backward pass for every row."""
    rows = []
    for b in range(len(x)):
        out = readout(model(x[b : b + 1])).flatten()
        for value in out:
            parts = torch.autograd.grad(
                value,
                [model.get_parameter(n) for n in names],
                retain_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )
            rows.append(torch.cat([p.flatten() for p in parts]))
    j = torch.stack(rows)
    return j @ j.mT


@pytest.mark.parametrize("method", ["auto", "rnn", "jvp", "jacrev"])
def test_values_of_the_sheet(method):
    kernel = torch.tensor(
        [
            [1.693775, -0.407115, 0.4718, -0.1686],
            [-0.407115, 0.486416, -0.07266, 0.135722],
            [0.4718, -0.07266, 0.5854, -0.04388],
            [-0.1686, 0.135722, -0.04388, 0.152608],
        ],
        dtype=torch.float64,
    )
    found = tangent_kernel(sheet_network(), X, method=method)
    torch.testing.assert_close(found, kernel, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "jvp", "jacrev"])
def test_alignment_of_the_sheet(method):
    net = sheet_network()
    before = copy.deepcopy(net.state_dict())
    move = 0.1 * torch.tensor([[1, 0, -1], [0, 1, 0], [1, 0, 0]], dtype=torch.float64)
    with torch.no_grad():
        net.h2h.weight += move
    found = tangent_kernel_alignment(net, before, X, method=method)
    assert found == pytest.approx(0.9954247320, abs=1e-10)


@settings(deadline=None, max_examples=12)
@given(
    steps=st.integers(1, 5),
    alpha=st.sampled_from([1, 0.4]),
    readout=st.sampled_from(["last", "all"]),
    names=st.lists(st.sampled_from(WEIGHTS), min_size=1, unique=True),
    block=st.sampled_from([1, 60, 2**19]),
)
def test_recurrent_kernel_is_that_of_the_gradients(steps, alpha, readout, names, block):
    net = seeded(CTRNN(2, 7, 2, alpha))
    x = normal(5, steps, 2)

    def pick(out):
        return out[:, -1] if readout == "last" else out

    truth = gradients_one_by_one(net, x, names, pick)
    saved, gradient_factors.BLOCK = gradient_factors.BLOCK, block
    try:
        found = tangent_kernel(net, x, names, "rnn", readout=readout)
    finally:
        gradient_factors.BLOCK = saved
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    assert torch.equal(found, found.mT)


def test_long_sequences_contract_the_other_way():
    net = seeded(CTRNN(1, 4, 2))
    with torch.no_grad():
        net.h2h.weight *= 0.3
    x = normal(3, 9, 1)
    truth = gradients_one_by_one(net, x, ["h2h.weight"], lambda out: out[:, -1])
    torch.testing.assert_close(tangent_kernel(net, x, method="rnn"), truth)


@pytest.mark.parametrize("names", [None, ["0.weight"], ["0.bias", "5.weight"], ["2.weight"]])
def test_feed_forward(names):
    net, x = seeded(mlp()), normal(5, 6)
    chosen = names or [n for n, _ in net.named_parameters()]
    net.eval()
    truth = gradients_one_by_one(net, x, chosen, lambda out: out)
    net.train()
    for method in ("auto", "layers", "jvp", "jacrev"):
        torch.testing.assert_close(tangent_kernel(net, x, names, method), truth)
    assert all(module.training for module in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("names", [None, ["h.weight"], ["i.bias", "h.weight"]])
def test_layers_called_at_every_step(names):
    net, x = seeded(Cell()), normal(4, 6, 5)
    torch.testing.assert_close(
        tangent_kernel(net, x, names, "layers"), tangent_kernel(net, x, names, "jacrev")
    )


def test_layers_on_sequences():
    net = seeded(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)))
    x = normal(4, 5, 3)
    for readout in ("last", "all", lambda out: out.mean(1)):
        torch.testing.assert_close(
            tangent_kernel(net, x, method="layers", readout=readout),
            tangent_kernel(net, x, method="jacrev", readout=readout),
        )


def test_shared_weights_count_once():
    net, x = seeded(Tied()), normal(4, 6)
    for names in (None, ["a.weight"], ["b.weight"], ["a.weight", "b.weight"]):
        torch.testing.assert_close(
            tangent_kernel(net, x, names, "layers"), tangent_kernel(net, x, names, "jacrev")
        )


def outside():
    return Outside(), ["a.weight"]


def batch_norm():
    return nn.Sequential(
        nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)
    ), ["0.weight"]


def attention():
    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    return model, ["self_attn.out_proj.weight"]


def norm_layer():
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)), None


@pytest.mark.parametrize("make", [outside, batch_norm, attention, norm_layer])
def test_where_layers_do_not_apply_products_do(make):
    model, names = make()
    model, x = seeded(model), normal(3, 2, 6) if make is attention else normal(4, 6)
    with pytest.raises(LayersError):
        tangent_kernel(model, x, names, "layers")
    torch.testing.assert_close(
        tangent_kernel(model, x, names), tangent_kernel(model, x, names, "jacrev")
    )


def test_whole_transformer_layer():
    model = seeded(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True))
    x = normal(2, 3, 4)
    torch.testing.assert_close(
        tangent_kernel(model, x, readout="last"),
        tangent_kernel(model, x, method="jacrev", readout="last"),
    )


@pytest.mark.parametrize("make", [lambda: seeded(CTRNN(3, 9, 2)), lambda: seeded(Cell())])
@pytest.mark.parametrize("block", [1, 2**19])
def test_streamed_alignment_is_that_of_the_kernels(make, block, monkeypatch):
    monkeypatch.setattr(gradient_factors, "BLOCK", block)
    net = make()
    x = normal(6, 4, next(iter(net.parameters())).shape[1])
    before = copy.deepcopy(net.state_dict())
    first = tangent_kernel(net, x)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p += 0.2 * normal(*p.shape, seed=i)
    truth = float(kernel_alignment(first, tangent_kernel(net, x)))
    assert truth < 0.99
    assert tangent_kernel_alignment(net, before, x) == pytest.approx(truth, rel=1e-10)
    again = tangent_kernel_alignment(net, net.state_dict(), x)
    assert again == pytest.approx(1.0, abs=1e-12)


def test_estimate_covers_the_exact_value():
    net, x = seeded(mlp()), normal(12, 6)
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p += 0.2 * normal(*p.shape, seed=i)
    exact = tangent_kernel_alignment(net, before, x)
    scores = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        value, error = estimate_kernel_alignment(net, before, x, probes=24, generator=generator)
        assert 0 < error < 0.1
        scores.append((value - exact) / error)
    assert max(map(abs, scores)) < 4
    assert 0.4 < math.sqrt(sum(s * s for s in scores) / len(scores)) < 2
    many = estimate_kernel_alignment(
        net, before, x, probes=400, generator=torch.Generator().manual_seed(1)
    )
    assert many.error < 0.01
    assert many.value == pytest.approx(exact, abs=4 * many.error)


def test_error_bar_of_two_probes_by_hand():
    net, x = seeded(mlp()), normal(5, 6)
    before = copy.deepcopy(net.state_dict())
    old = tangent_kernel(net, x)
    with torch.no_grad():
        net[0].weight += 0.3
    new = tangent_kernel(net, x)
    generator = torch.Generator().manual_seed(3)
    found = estimate_kernel_alignment(net, before, x, probes=2, generator=generator)
    generator.manual_seed(3)
    pairs = []
    for _ in range(2):
        v = 2.0 * torch.randint(2, (5, 3), generator=generator).double().flatten() - 1
        pairs.append((new @ v, old @ v))
    each = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs]
    assert found.error == pytest.approx(abs(each[0] - each[1]) / 2, rel=1e-9)
    sums = [sum(float(p @ q) for p, q in zip(u, v, strict=True)) for u, v in products(pairs)]
    assert found.value == pytest.approx(sums[0] / math.sqrt(sums[1] * sums[2]), rel=1e-9)


def products(pairs):
    """What the inner product and the two squared norms are sums over."""
    new, old = zip(*pairs, strict=True)
    return (new, old), (new, new), (old, old)


def test_float32_agrees():
    net, x = seeded(CTRNN(3, 20, 2)), normal(6, 5, 3)
    truth = tangent_kernel(net, x)
    found = tangent_kernel(net.float(), x.float())
    assert found.dtype == torch.float32
    assert (found.double() - truth).norm() < 1e-5 * truth.norm()


def test_dead_units_give_nan_and_a_warning():
    net = sheet_network()
    before = copy.deepcopy(net.state_dict())
    x = torch.zeros_like(X)
    with pytest.warns(RuntimeWarning, match="tangent kernel is zero"):
        assert math.isnan(tangent_kernel_alignment(net, before, x))
    assert (tangent_kernel(net, x) == 0).all()


def largest(work):
    with LargestTensor() as meter:
        work()
    return meter.numel


@pytest.mark.parametrize("readout", ["last", "all"])
def test_no_array_of_units_squared_by_samples(readout):
    n, samples = 256, 24
    net, x = CTRNN(3, n, 4).double(), normal(samples, 5, 3)
    before = copy.deepcopy(net.state_dict())
    budget = n**2 * samples
    assert largest(lambda: tangent_kernel(net, x, readout=readout)) < budget / 2
    if readout == "last":
        assert largest(lambda: tangent_kernel_alignment(net, before, x)) < budget / 4
        assert largest(lambda: tangent_kernel(net, x, method="jacrev")) >= 4 * budget  # 4 outputs


def test_no_such_array_for_feed_forward_nets():
    n, samples = 128, 32
    net, x = mlp(n).double(), normal(samples, 6)
    budget = n**2 * samples
    before = copy.deepcopy(net.state_dict())
    assert largest(lambda: tangent_kernel(net, x)) < budget / 4
    assert largest(lambda: tangent_kernel_alignment(net, before, x)) < budget / 4
    assert (
        largest(lambda: estimate_kernel_alignment(net, before, x, probes=2)) < budget / 4
    )  # functorch's tensors are seen as what they wrap
    assert largest(lambda: tangent_kernel(net, x, method="jacrev")) >= budget


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: CTRNN(8, 128, 10), (40, 8, 8)), (lambda: mlp(128, 64, 10), (48, 64))],
)
def test_at_least_ten_times_as_fast_as_jacrev(make, shape):
    """The bound of the project, with 128 hidden units."""
    net, x = make(), normal(*shape, dtype=torch.float32)
    seconds = {"auto": [], "jacrev": []}
    for method in ("auto", "jacrev") * 3:
        started = time.thread_time()
        tangent_kernel(net, x, method=method)
        seconds[method].append(time.thread_time() - started)
    assert min(seconds["jacrev"]) >= 10 * min(seconds["auto"])


def test_bad_input():
    net = sheet_network()
    with pytest.raises(KeyError, match=r"no parameter 'h2h'.*i2h\.weight, h2h\.weight, h2o"):
        tangent_kernel(net, X, ["h2h"])
    with pytest.raises(ValueError, match="at least one parameter"):
        tangent_kernel(net, X, [])
    with pytest.raises(ValueError, match="one of auto, rnn"):
        tangent_kernel(net, X, method="ntk")
    with pytest.raises(ValueError, match="readout must be"):
        tangent_kernel(net, X, readout="first")
    with pytest.raises(ValueError, match="at least one sample"):
        tangent_kernel(net, X[:0])
    with pytest.raises(ValueError, match="needs a CTRNN"):
        tangent_kernel(mlp(), torch.zeros(2, 6), method="rnn")
    with pytest.raises(ValueError, match="needs outputs"):
        tangent_kernel(mlp(), torch.zeros(2, 6), readout="last")
    with pytest.raises(ValueError, match="2 samples first"):
        tangent_kernel(mlp(), torch.zeros(2, 6), readout=lambda out: out[:1], method="jvp")
    with pytest.raises(ValueError, match="probes"):
        estimate_kernel_alignment(net, net.state_dict(), X, probes=1)


def test_bad_states():
    net = sheet_network()
    state = dict(net.state_dict())
    with pytest.raises(ValueError, match=r"h2h\.weight is \(2, 3\)"):
        tangent_kernel_alignment(net, {**state, "h2h.weight": W[:2]}, X)
    del state["i2h.weight"]
    with pytest.raises(KeyError, match=r"no 'i2h\.weight'"):
        tangent_kernel_alignment(net, state, X)


def test_not_finite():
    net = CTRNN(1, 2, 1, w0=1e30 * torch.ones(2, 2))
    with torch.no_grad():
        net.i2h.weight.fill_(1.0)
    with pytest.raises(FloatingPointError, match="from step 3 of 5"):
        tangent_kernel(net, torch.ones(2, 5, 1))
    model = mlp()
    x = torch.full((2, 6), math.nan)
    for method in ("layers", "jvp", "jacrev"):
        with pytest.raises((FloatingPointError, LayersError)):
            tangent_kernel(model, x, method=method)
    with pytest.raises(FloatingPointError):
        tangent_kernel(model, x)

"""Orthogonal and decoupled starts on modules, tensors, kernels, gates and shards."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from stiefel.init import decoupled_init_, orthogonal_init_
from stiefel.theory import mode_curve, task_modes


def error(matrix, gain=1.0):
    """Largest deviation of the singular values from the gain."""
    return float((torch.linalg.svdvals(matrix.detach().double()) - gain).abs().max())


def test_every_kind_of_layer(generator):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.twice = self.linear
            self.bilinear = nn.Bilinear(3, 4, 2)
            self.attention = nn.MultiheadAttention(8, 2)
            self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=5)
            self.embedding = nn.Embedding(5, 6)
            self.norm = nn.LayerNorm(6)
            self.own = nn.Parameter(torch.ones(3, 3))

    net = Odd()
    table, scale = net.embedding.weight.detach().clone(), net.norm.weight.detach().clone()
    assert orthogonal_init_(net, gain=1.5, generator=generator) is net
    assert error(net.linear.weight, 1.5) < 3e-6
    assert all(error(part, 1.5) < 3e-6 for part in net.bilinear.weight)
    assert all(error(part, 1.5) < 3e-6 for part in net.attention.in_proj_weight.split(8))
    for weight in (net.cross.q_proj_weight, net.cross.k_proj_weight, net.cross.v_proj_weight):
        assert error(weight, 1.5) < 3e-6
    assert error(net.attention.out_proj.weight, 1.5) < 3e-6
    for bias in (net.linear.bias, net.bilinear.bias, net.attention.in_proj_bias):
        assert not bias.any()
    assert torch.equal(net.embedding.weight, table)
    assert torch.equal(net.norm.weight, scale)
    assert net.own.eq(1).all()


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_gates_are_matrices_of_their_own(kind, generator):
    options = {"proj_size": 3} if kind is nn.LSTM else {}
    net = kind(4, 5, num_layers=2, bidirectional=True, **options)
    orthogonal_init_(net, generator=generator)
    for name, parameter in net.named_parameters():
        if "bias" in name:
            assert not parameter.any()
        elif "weight_hr" in name:
            assert error(parameter) < 2e-6
        else:
            assert all(error(gate) < 2e-6 for gate in parameter.split(5))
    relu = nn.RNN(4, 5, nonlinearity="relu")
    orthogonal_init_(relu)
    assert error(relu.weight_hh_l0, math.sqrt(2)) < 2e-6


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 5, 4),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.Conv3d(4, 2, (1, 2, 3)),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, groups=4),
    ],
)
def test_kernels_are_delta_orthogonal(layer, generator):
    orthogonal_init_(layer, generator=generator)
    weight = layer.weight.detach()
    centre = tuple(size // 2 for size in weight.shape[2:])
    tap = weight[(..., *centre)]
    assert all(error(group) < 2e-6 for group in tap.chunk(layer.groups))
    assert float(weight.square().sum()) == pytest.approx(float(tap.square().sum()))


def test_convolutions_keep_lengths(generator):
    layer = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
    orthogonal_init_(layer, generator=generator)
    x = torch.randn(2, 3, 7, 7, generator=generator)
    torch.testing.assert_close(layer(x).norm(dim=1), x.norm(dim=1))


def test_deep_products_have_all_singular_values_alike(generator):
    net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(64)])
    orthogonal_init_(net, gain=1.01, generator=generator)
    product = torch.eye(32, dtype=torch.float64)
    for layer in net:
        product = layer.weight.detach().double() @ product
    assert error(product, 1.01**64) < 1e-4
    for layer in net:
        nn.init.normal_(layer.weight, std=32**-0.5, generator=generator)
        product = layer.weight.detach().double() @ product
    values = torch.linalg.svdvals(product)
    assert float(values.median() / values[0]) < 1e-6


def test_edge_is_that_of_the_activation_found():
    def gain_of(*layers, **options):
        net = nn.Sequential(nn.Linear(5, 5), *layers)
        orthogonal_init_(net, **options)
        return float(torch.linalg.matrix_norm(net[0].weight.detach(), 2))

    assert gain_of() == pytest.approx(1)
    assert gain_of(nn.Tanh()) == pytest.approx(1)
    assert gain_of(nn.ReLU(), nn.Linear(5, 5), nn.ReLU()) == pytest.approx(math.sqrt(2))
    assert gain_of(nn.LeakyReLU(0.5)) == pytest.approx(math.sqrt(2 / 1.25))
    assert gain_of(nn.ReLU(), phi="tanh") == pytest.approx(1)
    assert gain_of(nn.ReLU(), gain=3) == pytest.approx(3)
    with pytest.raises(ValueError, match="several kinds were found \\(relu, tanh\\): pass phi"):
        gain_of(nn.ReLU(), nn.Tanh())
    assert gain_of(nn.ReLU(), nn.Tanh(), gain=1.2) == pytest.approx(1.2)
    with pytest.raises(ValueError, match="no edge of chaos"):
        gain_of(nn.GELU())


def test_tensors_and_stacks(generator):
    stack = torch.empty(2, 3, 6, 4, dtype=torch.float64)
    assert orthogonal_init_(stack, generator=generator) is stack
    assert all(error(m) < 1e-13 for m in stack.flatten(0, 1))
    several = [torch.empty(5, 5), torch.empty(5, 5), torch.empty(2, 7)]
    orthogonal_init_(iter(several), gain=2, generator=generator)
    assert all(error(m, 2) < 4e-6 for m in several)
    assert not torch.equal(several[0], several[1])
    column = torch.empty(6, 6).t()  # any memory layout
    orthogonal_init_(column, generator=generator)
    assert error(column) < 2e-6
    half = nn.Linear(16, 16).bfloat16()
    orthogonal_init_(half, generator=generator)
    assert error(half.weight) < 2e-2


def test_one_seed_one_start_and_no_graph():
    nets = [nn.Linear(6, 6) for _ in range(2)]
    for net in nets:
        orthogonal_init_(net, generator=torch.Generator().manual_seed(5))
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert nets[0].weight.is_leaf
    assert nets[0].weight.grad_fn is None
    torch.manual_seed(1)
    orthogonal_init_(nets[0])
    torch.manual_seed(1)
    orthogonal_init_(nets[1])
    assert torch.equal(nets[0].weight, nets[1].weight)


def test_what_is_refused():
    layer = nn.Linear(2, 2)
    for gain in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="gain must be positive"):
            orthogonal_init_(layer, gain=gain)
    with pytest.raises(ValueError, match="a number or 'edge'"):
        orthogonal_init_(layer, gain="chaos")
    with pytest.raises(ValueError, match="nothing to initialise"):
        orthogonal_init_(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="nothing to initialise"):
        orthogonal_init_([])
    with pytest.raises(ValueError, match=r"\[..., out, in\]"):
        orthogonal_init_(torch.empty(3))
    with pytest.raises(TypeError, match="floating point"):
        orthogonal_init_(torch.empty(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no shape yet"):
        orthogonal_init_(nn.LazyLinear(3))


# --- decoupled -----------------------------------------------------------------------------------


@pytest.fixture
def modes(generator):
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    y = x[:, :3] @ torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return task_modes(x, y)


def test_decoupled_networks_start_with_the_modes_of_the_task(modes, generator):
    layers = [nn.Linear(6, 5), nn.Linear(5, 8), nn.Linear(8, 4)]
    u0 = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)
    assert decoupled_init_(layers, modes, u0, generator=generator) is layers
    product = (layers[2].weight @ layers[1].weight @ layers[0].weight).detach().double()
    torch.testing.assert_close(product, modes.U * u0 @ modes.V.mT, rtol=0, atol=1e-6)
    assert not any(layer.bias.any() for layer in layers)


def test_a_trained_module_follows_the_closed_form(modes, generator):
    """Plain torch training on whitened data: nothing of the simulator is involved."""
    net = nn.Sequential(*[nn.Linear(*w, bias=False) for w in ((6, 7), (7, 7), (7, 4))]).double()
    decoupled_init_(list(net), modes, 0.1, generator=generator)
    x = torch.linalg.qr(torch.randn(50, 6, generator=generator, dtype=torch.float64))[0] * 50**0.5
    y = x @ (modes.U * modes.S @ modes.V.mT).mT
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    course = []
    for _ in range(150):
        product = net[2].weight @ net[1].weight @ net[0].weight
        course.append(modes.strengths(product.detach()))
        loss = (net(x) - y).square().sum() / 100
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    exact = mode_curve(torch.arange(150), modes.S, 0.1, 3, lr=0.01)
    worst = (torch.stack(course, 1) - exact).abs() / modes.S[:, None]
    assert float(worst.max()) < 0.05
    assert float(course[-1][0] / modes.S[0]) > 0.9


def test_decoupled_refusals(modes):
    with pytest.raises(ValueError, match="at least one"):
        decoupled_init_([], modes, 0.1)
    with pytest.raises(ValueError, match="layer 1 takes 4 inputs, but the one before gives 5"):
        decoupled_init_([nn.Linear(6, 5), nn.Linear(4, 4)], modes, 0.1)
    with pytest.raises(ValueError, match="from 6 to 5 neurons, the task from 6 inputs to 4"):
        decoupled_init_([nn.Linear(6, 5)], modes, 0.1)
    for u0 in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="u0 must be positive"):
            decoupled_init_([nn.Linear(6, 4)], modes, u0)
    with pytest.raises(ValueError, match="each of the 3 modes"):
        decoupled_init_([nn.Linear(6, 4)], modes, torch.tensor([0.1, 0.1]))


# --- shards --------------------------------------------------------------------------------------

SHARDED = """
    import os, sys
    import torch, torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from stiefel.init import orthogonal_init_
    from stiefel.theory import Covariances, task_modes

    rank = int(sys.argv[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group(
        "gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    net = torch.nn.Linear(6, 7, bias=False)
    net.weight = torch.nn.Parameter(distribute_tensor(torch.zeros(7, 6), mesh, [Shard(0)]))
    # Different generators: what counts is that of rank 0.
    orthogonal_init_(net, gain=2.0, generator=torch.Generator().manual_seed(rank))
    whole = net.weight.full_tensor().detach()
    twin = torch.nn.Linear(6, 7, bias=False)
    orthogonal_init_(twin, gain=2.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole, twin.weight), whole - twin.weight

    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(9)) + 4
    y = x @ torch.ones(3, 2)
    mine = slice(0, 15) if rank == 0 else slice(15, 40)
    seen = Covariances().update(x[mine], y[mine]).all_reduce()
    torch.testing.assert_close(task_modes(seen, center=True).S, task_modes(x, y, center=True).S)
    assert seen.count == 40
    dist.barrier()
    print("fine", flush=True)
    os._exit(0)  # gloo's threads abort now and then when the interpreter clears up
"""


def test_two_processes_hold_parts_of_one_orthogonal_matrix(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(textwrap.dedent(SHARDED), encoding="utf-8")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all("fine" in output for output in outputs), outputs

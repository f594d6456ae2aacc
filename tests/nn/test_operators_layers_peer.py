"""Values that neuraloperator 2.0.0 gave for the same weights and inputs.

Made by benchmarks/operators_peer.py, whose recipe this is: parameter number p is s sin(1.7 i + p),
i counting its entries, inputs are cos(0.9 i). There the package itself is asked, and every value
compared; here five of each and the root of the mean square, so that it need not be installed.
"""

import pytest
import torch

from stiefel.nn.operators import (
    FNO,
    DifferentialConv,
    FNOBlock,
    IntegralAttention,
    KernelIntegral,
    SpectralConv,
)

# Entries 0, 1, n // 3, n // 2, n - 1 of the flattened result, and its root mean square.
PEER = {
    "SpectralConv, 1-D": ([0.0399952, 0.2202015, -0.3048519, 0.4570861, -0.5332549], 0.2974559),
    "SpectralConv, 2-D": ([0.3852914, 0.3572804, -0.4215879, 0.3415186, -0.2721462], 0.2600404),
    "SpectralConv, 3-D": ([0.0381336, 0.4515874, -0.2793238, 0.4405919, -0.4183511], 0.4113561),
    "FNOBlock": ([0.1316582, 0.1279197, -0.0893923, 0.1173906, -0.1143473], 0.1307393),
    "FNO": ([0.7299841, 0.7303613, 0.7187419, 0.7294503, 0.7333639], 0.7264667),
    "KernelIntegral, linear": (
        [0.3600417, -0.4590072, 0.9776527, -0.2222565, 0.1166146],
        0.3972104,
    ),
    "KernelIntegral, nonlinear": (
        [0.4424917, -0.5027995, 0.9492048, -0.2594151, 0.0596536],
        0.4037835,
    ),
    "IntegralAttention, equal weights": (
        [-0.0935452, -0.4524146, -0.1094731, 0.0402755, -0.4011676],
        0.4451405,
    ),
    "DifferentialConv": ([0.1546555, 0.0310055, 0.5275015, -1.3952545, 0.2905407], 2.0098026),
}


def filled(module, size=0.3):
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            count = p.numel() * (2 if p.is_complex() else 1)
            values = size * torch.sin(1.7 * torch.arange(count, dtype=torch.float64) + number)
            values = torch.view_as_complex(values.view(-1, 2)) if p.is_complex() else values
            p.copy_(values.view(p.shape))
    return module


def sample(*shape):
    count = torch.Size(shape).numel()
    return torch.cos(0.9 * torch.arange(count, dtype=torch.float64)).view(shape).float()


def places(count):
    roots = torch.tensor([0.7548776662466927, 0.5698402909980532])
    return (torch.arange(1, count + 1)[:, None] * roots) % 1


def spectral(ndim):
    layer = filled(SpectralConv(2, 3, (6, 4, 4)[:ndim], bias=True))
    return layer(sample(2, 2, *(8, 10, 6)[:ndim]))


def graph(nonlinear):
    layer = filled(
        KernelIntegral(
            3, 3, 0.4, (6,), ndim=2, embedding=None, use_values=nonlinear, reduction="sum"
        )
    )
    weights = 0.1 + sample(30).abs()
    return layer(sample(1, 3, 30), places(30), places(40)[30:], weights).mT


OURS = {
    "SpectralConv, 1-D": lambda: spectral(1),
    "SpectralConv, 2-D": lambda: spectral(2),
    "SpectralConv, 3-D": lambda: spectral(3),
    "FNOBlock": lambda: filled(FNOBlock(4, 4, (4, 4)))(sample(2, 4, 8, 6)),
    "FNO": lambda: filled(FNO((4, 4), 2, 1, 6, n_layers=2), 0.6)(sample(2, 2, 8, 10)),
    "KernelIntegral, linear": lambda: graph(False),
    "KernelIntegral, nonlinear": lambda: graph(True),
    "IntegralAttention, equal weights": lambda: filled(
        IntegralAttention(8, 2, "linear", head_dim=3, norm="channels")
    )(sample(2, 8, 12)),
    "DifferentialConv": lambda: filled(DifferentialConv(2, 3, 3, base_spacing=1.0, ndim=2))(
        sample(2, 2, 8, 8)
    ),
}


@pytest.mark.parametrize("name", PEER)
def test_same_weights_give_the_values_of_the_peer(name):
    values, size = PEER[name]
    found = OURS[name]().detach().double().flatten()
    n = len(found)
    some = found[[0, 1, n // 3, n // 2, n - 1]]
    scale = max(1.0, size)
    torch.testing.assert_close(some, torch.tensor(values).double(), atol=1e-5 * scale, rtol=0)
    assert float(found.square().mean().sqrt()) == pytest.approx(size, abs=1e-5 * scale)


def test_every_pair_is_here():
    assert PEER.keys() == OURS.keys()

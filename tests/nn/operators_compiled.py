"""Compiled operator layers beside eager ones, in a process of its own: the type checker cannot be
traced.

Prints ``{case: largest difference}`` as JSON. The backend is aot_eager: it traces forward and
backward pass without needing a C++ compiler.
"""

import json

import torch

from stiefel.nn.operators import (
    FNO,
    UNO,
    DeepONet,
    DifferentialConv,
    FilteredActivation,
    FunctionNorm,
    IntegralAttention,
    LocalIntegralConv,
    LowRankIntegral,
    SpectralConv,
    relative_l2,
)

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)


def values_and_gradients(layer, function, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.abs().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def distance(left, right):
    pairs = zip(left, right, strict=True)
    return max(((a - b).abs().max() / (a.abs().max() + 1e-9)).item() for a, b in pairs)


def case(layer, *shape, dtype=torch.float32):
    torch.compiler.reset()
    x = torch.randn(*shape, generator=GENERATOR, dtype=dtype)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    return distance(values_and_gradients(layer, layer, x), values_and_gradients(layer, fast, x))


class Loss(torch.nn.Module):
    def forward(self, x):
        return relative_l2(x, x.detach() + 1)


print(
    json.dumps(
        {
            "spectral": case(
                SpectralConv(2, 3, (4, 4), bias=True, generator=GENERATOR), 2, 2, 8, 6
            ),
            "complex": case(
                SpectralConv(2, 2, 4, complex_data=True), 2, 2, 8, dtype=torch.complex64
            ),
            "matrix": case(SpectralConv(2, 3, 4), 2, 2, 32),
            "fno": case(FNO(4, 2, 1, 6, n_layers=2), 2, 2, 12),
            "uno": case(UNO(4, 2, 1, 6, levels=2), 2, 2, 12),
            "local": case(LocalIntegralConv(2, 3, 3, radius=0.25), 2, 2, 16),
            "differential": case(DifferentialConv(2, 3, 3, base_shape=8), 2, 2, 16),
            "softmax": case(IntegralAttention(4, 2), 2, 4, 6),
            "linear": case(IntegralAttention(4, 2, "linear"), 2, 4, 6),
            "norm": case(FunctionNorm(channels=2, kind="batch"), 2, 2, 6),
            "activation": case(FilteredActivation(), 2, 2, 6),
            "low rank": case(LowRankIntegral(2, 1, 3), 2, 2, 6),
            "deeponet": case(DeepONet(2, 1, hidden=(8,)), 2, 2, 6),
            "loss": case(Loss(), 2, 2, 6),
        }
    )
)

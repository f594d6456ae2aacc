"""Compiled Poincaré layers beside eager ones, in a process of its own: the type checker cannot be
traced.

Prints ``{case: largest relative difference}``. The backend is aot_eager: it traces forward and
backward pass without needing a C++ compiler.
"""

import json

import torch

from stiefel.nn.poincare import (
    PoincareBall,
    PoincareBatchNorm2d,
    PoincareConv2d,
    PoincareLinear,
)

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
BALL = PoincareBall(0.5, learnable=True)


def results(layer, function, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def difference(layer, x):
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    pairs = zip(results(layer, layer, x), results(layer, fast, x), strict=True)
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item() for a, b in pairs)


class Operations(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ball = BALL

    def forward(self, x):
        a, b = self.ball.expmap0(0.3 * x[0]), self.ball.expmap0(0.2 * x[1])
        moved = self.ball.expmap(a, self.ball.logmap(a, b) / 2)
        return self.ball.transp(a, moved, b) + self.ball.dist(a, b)[:, None] + self.ball.midpoint(a)


if __name__ == "__main__":
    images = torch.randn(3, 4, 5, 5, generator=G)
    norm = PoincareBatchNorm2d(4, BALL, track_running_stats=False)
    with torch.no_grad():
        norm.bias.copy_(torch.linspace(-0.5, 0.7, 4))
    linear = PoincareLinear(6, 5, BALL, init="normal", generator=G)
    cases = {
        "linear": difference(linear, torch.randn(7, 6, generator=G)),
        "at zero": difference(linear, torch.zeros(2, 6)),
        "conv": difference(PoincareConv2d(4, 3, 3, BALL, 2, 1, init="normal", generator=G), images),
        "norm": difference(norm, images),
        "operations": difference(Operations(), torch.randn(2, 6, 3, generator=G)),
    }
    print(json.dumps(cases))

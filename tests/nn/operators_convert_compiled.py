"""A converted network under torch.compile, grid by grid; prints "ok"."""

import torch
from torch import nn

from stiefel.nn.operators import convert

torch.set_num_threads(1)
torch.manual_seed(0)
CIRCLE = {"padding": 2, "padding_mode": "circular"}
net = nn.Sequential(
    nn.Conv1d(1, 4, 5, **CIRCLE), nn.Tanh(), nn.AvgPool1d(2), nn.Conv1d(4, 1, 5, **CIRCLE)
)
converted = convert(net, 16).eval()
compiled = torch.compile(converted, backend="eager", fullgraph=True, dynamic=False)
for n in (16, 32, 8, 48, 16):
    x = torch.randn(2, 1, n)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), converted(x))
    torch.testing.assert_close(compiled(x), converted(x))
print("ok")

"""Compiled and exported PROSE beside the eager one, in a process of its own: the type checker
cannot be traced.

Prints ``{case: largest difference}`` as JSON. The backend is aot_eager: it traces forward and
backward pass without needing a C++ compiler.
"""

import json

import torch
from lemon_models import inputs, tiny

from stiefel.nn.lemon import lora

torch.set_num_threads(1)


def values_and_gradients(model, function, arguments):
    model.zero_grad()
    y = function(*arguments)
    y.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [y.detach(), *grads]


def distance(left, right):
    pairs = zip(left, right, strict=True)
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-9)).item() for a, b in pairs)


differences = {}
arguments = inputs(batch=3, length=6)
model = tiny(layers=(1, 1, 1, 1), head="points")
lora(model, 2, targets="ffn")
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.1)
    p.requires_grad_()
whole = torch.compile(model, fullgraph=True, backend="aot_eager")
differences["compiled"] = distance(
    values_and_gradients(model, model, arguments), values_and_gradients(model, whole, arguments)
)
exported = torch.export.export(tiny(layers=(1, 1, 1, 1)), arguments).module()
differences["exported"] = distance(
    [tiny(layers=(1, 1, 1, 1))(*arguments)], [exported(*arguments)]
)  # fmt: skip
print(json.dumps(differences))

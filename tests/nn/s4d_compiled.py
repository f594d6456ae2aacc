"""Compiled and exported S4D beside eager ones, in a process of its own: the type checker cannot be
traced.

Prints ``{case: largest difference}`` as JSON. The backend is aot_eager: it traces forward and
backward pass without needing a C++ compiler.
"""

import json

import torch

from stiefel.nn import S4D, S4DModel

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)


def values_and_gradients(layer, function, u):
    layer.zero_grad()
    y = function(u)[0]
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in layer.parameters())]


def distance(left, right):
    pairs = zip(left, right, strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def compiled(**settings):
    layer = S4D(6, 8, generator=GENERATOR, **settings)
    u = torch.randn(3, 50, 6, generator=GENERATOR)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    return distance(values_and_gradients(layer, layer, u), values_and_gradients(layer, fast, u))


def compiled_step():
    layer = S4D(6, 8, generator=GENERATOR).eval()
    layer.setup_step()
    fast = torch.compile(layer.step, backend="aot_eager", fullgraph=True)
    u, state = torch.randn(3, 6, generator=GENERATOR), layer.initial_state(3)
    return distance([*layer.step(u, state)], [*fast(u, state)])


def exported(strict):
    model = S4DModel(2, 5, 6, 2, 8, generator=GENERATOR).eval()
    u = torch.randn(4, 30, 2, generator=GENERATOR)
    shapes = {"u": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(model, (u,), dynamic_shapes=shapes, strict=strict).module()
    return max(distance([model(x)], [program(x)]) for x in (u, u[:3]))


if __name__ == "__main__":
    cases = {
        "layer": compiled(),
        "bidirectional": compiled(bidirectional=True),
        "bilinear, bandlimit": compiled(disc="bilinear", bandlimit=1.0),
        "step": compiled_step(),
        "export": exported(strict=False),
        "strict export": exported(strict=True),
    }
    print(json.dumps(cases))

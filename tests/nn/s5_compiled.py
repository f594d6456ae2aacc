"""Compiled and exported S5 beside eager ones, in a process of its own: the type checker cannot be
traced.

Prints ``{case: largest difference}`` as JSON. The backend is aot_eager: it traces forward and
backward pass without needing a C++ compiler.
"""

import json

import torch

from stiefel.nn import S5, S5Block, associative_scan

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


def compiled(layer):
    u = torch.randn(3, 15, 6, generator=GENERATOR)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    return distance(values_and_gradients(layer, layer, u), values_and_gradients(layer, fast, u))


def compiled_step():
    layer = S5(6, 8, generator=GENERATOR).eval()
    fast = torch.compile(layer.step, backend="aot_eager", fullgraph=True)
    u, state = torch.randn(3, 6, generator=GENERATOR), layer.initial_state(3)
    return distance([*layer.step(u, state)], [*fast(u, state)])


def compiled_scan():
    a = torch.rand(2, 15, 4, generator=GENERATOR)
    b = torch.randn(2, 15, 4, generator=GENERATOR)
    fast = torch.compile(associative_scan, backend="aot_eager", fullgraph=True)
    return max(
        distance([associative_scan(a, b, reverse)], [fast(a, b, reverse)])
        for reverse in (False, True)
    )


def exported():
    layer = S5(6, 8, init="ptd", generator=GENERATOR).eval()
    u = torch.randn(4, 15, 6, generator=GENERATOR)
    shapes = {"u": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(layer, (u,), dynamic_shapes=shapes).module()
    return max(distance(layer(x), program(x)) for x in (u, u[:3]))


if __name__ == "__main__":
    cases = {
        "block": compiled(S5Block(6, 8, init="ptd", blocks=2, generator=GENERATOR)),
        "bidirectional, bilinear": compiled(
            S5(6, 8, disc="bilinear", bidirectional=True, generator=GENERATOR)
        ),
        "step": compiled_step(),
        "scan": compiled_scan(),
        "export": exported(),
    }
    print(json.dumps(cases))

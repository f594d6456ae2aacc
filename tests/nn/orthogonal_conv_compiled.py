"""Compiled and exported orthogonal convolutions beside eager ones, in a process of its own: the
type checker cannot be traced.

Prints ``{case: largest difference}`` as JSON. The backend is aot_eager: it traces forward and
backward pass without needing a C++ compiler.
"""

import json

import torch

from stiefel.nn import OrthogonalConv1d, OrthogonalConv2d, conv_singular_values, lorth
from stiefel.regularize import OrthogonalityPenalty

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)


def values_and_gradients(layer, function, x):
    layer.zero_grad()
    y = function(x)
    y.square().mul(torch.arange(y.numel()).reshape(y.shape) % 7).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in layer.parameters())]


def distance(left, right):
    pairs = zip(left, right, strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def compiled(layer, x):
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    return distance(values_and_gradients(layer, layer, x), values_and_gradients(layer, fast, x))


def exported(layer, x, strict):
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes, strict=strict).module()
    return max(distance([layer(y)], [program(y)]) for y in (x, x[:2]))


def functions():
    kernel = torch.randn(5, 4, 3, 3, generator=GENERATOR)
    found = 0.0
    for function in (lambda k: lorth(k, 2), lambda k: conv_singular_values(k, 6, 2)):
        fast = torch.compile(function, backend="aot_eager", fullgraph=True)
        found = max(found, distance([function(kernel)], [fast(kernel)]))
    return found


def penalty():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3, groups=2))
    rule = OrthogonalityPenalty(net)
    fast = torch.compile(rule.__call__, backend="aot_eager", fullgraph=True)
    return distance([rule()], [fast()])


if __name__ == "__main__":
    image = torch.randn(4, 4, 6, 8, generator=GENERATOR)
    cases = {"functions": functions(), "sum over layers": penalty()}
    for method in ("bcop", "cayley", "penalty"):
        layer = OrthogonalConv2d(4, 6, 3, method=method, generator=GENERATOR)
        cases[method] = compiled(layer, image)
        cases[f"{method}, stride 2"] = compiled(
            OrthogonalConv2d(4, 6, 3, 2, groups=2, method=method, generator=GENERATOR), image
        )
        for strict in (False, True):
            cases[f"{method}, export, strict={strict}"] = exported(layer, image, strict)
    layer = OrthogonalConv1d(6, 9, 4, generator=GENERATOR)
    cases["one axis"] = compiled(layer, image[:, 0])
    print(json.dumps(cases))

"""Compiled steps beside eager ones, in a process of its own: the type checker cannot be traced.

Prints ``{row: largest difference after three steps}`` as JSON.
"""

import json

import torch
from law_table import ONE_EACH, flat, parameters, set_gradients, train, values

torch.set_num_threads(1)


def groups():
    return [
        {"params": parameters(((6, 4),))},
        {"params": parameters(((4,),)), "rule": "elementwise"},
    ]


def largest_difference(row):
    eager, compiled = row(groups()), row(groups())
    step = torch.compile(compiled.step, backend="aot_eager")
    train(eager, 3)
    for t in range(3):
        set_gradients(flat(compiled), t)
        step()
    return max(
        float((p - q).abs().max()) for p, q in zip(values(eager), values(compiled), strict=True)
    )


if __name__ == "__main__":
    found = {}
    for row in ONE_EACH:  # each takes seconds to trace
        found[row.name] = largest_difference(row)
        torch.compiler.reset()
    print(json.dumps(found))

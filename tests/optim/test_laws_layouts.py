"""Laws of layout: how a matrix is stored, cut or stacked does not change what happens to it."""

import pytest
import torch
from law_table import (
    assert_all_close,
    every_row,
    flat,
    noise,
    parameters,
    rows_with,
    set_gradients,
    train,
    values,
)
from torch import nn

GRADIENT_STEPS = 3


def alone(row, stack, gradients, **overrides):
    """One optimizer for each matrix; ``gradients`` is a list of stacks over steps."""
    result = []
    for i, matrix in enumerate(stack):
        weight = nn.Parameter(matrix.detach().clone())
        optimizer = row([weight], **overrides)
        for gradient in gradients:
            weight.grad = gradient[i].clone()
            optimizer.step()
        result.append(weight.detach())
    return result


@every_row
def test_transposed_storage(row):
    weight = parameters(((4, 6),))[0]
    gradients = [noise((4, 6), step) for step in range(GRADIENT_STEPS)]
    expected = alone(row, [weight.mT], [[g.mT] for g in gradients])
    optimizer = row([{"params": [weight], "view": "transpose"}])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    assert_all_close([weight.mT], expected)


@every_row
def test_experts_are_matrices_of_their_own(row):
    weight = parameters(((3, 6, 4),))[0]
    gradients = [noise((3, 6, 4), step) for step in range(GRADIENT_STEPS)]
    expected = alone(row, weight, gradients)
    optimizer = row([{"params": [weight], "view": "batch"}])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    assert_all_close(list(weight), expected)


@rows_with("blocks view", (3, (4, 4, 4), (8, 2, 2), (1, 11)), ("flatten", "transpose"))
def test_blocks_are_matrices_of_their_own(row, blocks, view):
    """Fused QKV, grouped-query attention with fewer keys and values included."""
    sizes = [12 // blocks] * blocks if isinstance(blocks, int) else list(blocks)
    stored = (12, 5) if view == "flatten" else (5, 12)
    weight = parameters((stored,))[0]
    gradients = [noise(stored, step) for step in range(GRADIENT_STEPS)]

    def cut(tensor):
        return (tensor if view == "flatten" else tensor.mT).split(sizes)

    expected = alone(row, cut(weight), [cut(g) for g in gradients])
    optimizer = row([{"params": [weight], "blocks": blocks, "view": view}])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    assert_all_close(list(cut(weight)), expected)


def layouts(weight):
    """The same kernel, stored differently."""
    return {
        "channels_last": weight.to(memory_format=torch.channels_last),
        "out_last": weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "strided": torch.stack([weight, weight], -1)[..., 0],
    }


@every_row
@pytest.mark.parametrize("layout", ["channels_last", "out_last", "strided"])
@pytest.mark.parametrize("shape", [(6, 3, 2, 2), (24, 3, 2, 2)], ids=["wide", "tall"])
def test_kernels_in_any_memory_layout(row, layout, shape):
    weight = noise(shape, 0)
    stored = layouts(weight)[layout]
    assert stored.stride() != weight.stride()
    kernel = nn.Parameter(stored)
    assert kernel.stride() == stored.stride()
    gradients = [noise(shape, step) for step in range(GRADIENT_STEPS)]
    expected = alone(row, [weight.flatten(1)], [[g.flatten(1)] for g in gradients])
    optimizer = row([kernel])
    for gradient in gradients:
        kernel.grad = torch.empty_like(kernel).copy_(gradient)
        optimizer.step()
    assert_all_close([kernel.flatten(1)], expected)
    assert kernel.stride() == stored.stride()


@every_row
def test_gradients_in_another_layout_than_the_kernel(row):
    weight = noise((6, 3, 2, 2), 0)
    plain, last = nn.Parameter(weight.clone()), nn.Parameter(layouts(weight)["channels_last"])
    optimizers = row([plain]), row([last])
    for step in range(GRADIENT_STEPS):
        plain.grad = noise(weight.shape, step).to(memory_format=torch.channels_last)
        last.grad = noise(weight.shape, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_all_close([plain.contiguous()], [last.contiguous()])


@every_row
@pytest.mark.parametrize("order", ["plain to last", "last to plain"])
def test_state_moves_between_layouts(row, order):
    """A checkpoint of contiguous kernels goes on with channels-last ones, and the other way."""
    weight = noise((6, 3, 2, 2), 0)
    first, second = weight, layouts(weight)["channels_last"]
    if order == "last to plain":
        first, second = second, first
    kernel, moved = nn.Parameter(first.clone()), nn.Parameter(second.clone())
    through, resumed = row([kernel]), row([moved])
    train(through, 2)
    moved.data.copy_(kernel)
    resumed.load_state_dict(through.state_dict())
    state = {k: v.clone() for k, v in resumed.state[moved].items()}
    resumed.load_state_dict({**through.state_dict(), "state": {0: state}})
    train(through, 2, start=2)
    train(resumed, 2, start=2)
    assert_all_close([moved.contiguous()], [kernel.contiguous()])


@every_row
def test_views_without_contiguity(row):
    base = noise((4, 6), 0)
    strided = nn.Parameter(torch.stack([base, base], -1)[..., 0])
    transposed = nn.Parameter(base.mT.contiguous().mT)
    plain = nn.Parameter(base.clone())
    for p in (strided, transposed, plain):
        optimizer = row([p])
        train(optimizer, GRADIENT_STEPS)
    assert strided.stride() == (12, 2)
    assert transposed.stride() == (1, 4)
    assert_all_close([strided.contiguous(), transposed.contiguous()], [plain, plain])


@every_row
def test_size_is_that_of_the_flattened_kernel(row):
    """Taken from (kh, kw), as in two official files, the scale would be another."""
    kernel, flattened = nn.Parameter(noise((2, 3, 5, 2), 0)), nn.Parameter(noise((2, 3, 5, 2), 0))
    flattened = nn.Parameter(flattened.detach().flatten(1))
    optimizers = row([kernel]), row([flattened])
    for step in range(GRADIENT_STEPS):
        kernel.grad = noise((2, 3, 5, 2), step)
        flattened.grad = kernel.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert_all_close([kernel.flatten(1)], [flattened])


@every_row
def test_kinds_of_groups_do_not_disturb_one_another(row):
    def groups():
        return [
            {"params": parameters(((12, 5), (12, 5))), "blocks": 3},
            {"params": parameters(((3, 4, 5),), seed=1), "view": "batch"},
            {"params": parameters(((5, 4), (4, 5)), seed=2), "view": "transpose"},
            {"params": parameters(((4, 5, 1), (4, 5)), seed=3)},
            {"params": parameters(((4,),), seed=4), "rule": "elementwise"},
        ]

    together = row(groups())
    train(together, GRADIENT_STEPS)
    gradients = {}
    for step in range(GRADIENT_STEPS):
        set_gradients(flat(together), step)
        gradients[step] = [p.grad for p in flat(together)]
    index = 0
    for i, group in enumerate(groups()):
        if group.get("rule") == "elementwise":
            continue
        optimizer = row([group])
        count = len(group["params"])
        for step in range(GRADIENT_STEPS):
            for p, g in zip(group["params"], gradients[step][index : index + count], strict=True):
                p.grad = g
            optimizer.step()
        index += count
        assert_all_close(
            values(optimizer), [p.detach() for p in together.param_groups[i]["params"]]
        )

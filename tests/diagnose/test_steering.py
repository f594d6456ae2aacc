"""Hooks: what they add, where, to which shapes, and that they go."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from stiefel.diagnose.cylinder import ConceptCylinder
from stiefel.diagnose.steering import Steering, concept_differences, steer

D = 6


class Pair(NamedTuple):
    hidden: torch.Tensor
    cache: int


class Block(nn.Module):
    """Adds one; gives its output in the ways that blocks do."""

    def __init__(self, kind="tensor"):
        super().__init__()
        self.kind = kind
        self.seen = None

    def forward(self, hidden_states, scale=1.0):
        self.seen = hidden_states
        out = scale * hidden_states + 1
        return {
            "tensor": out,
            "tuple": (out, "cache"),
            "list": [out, "cache"],
            "named": Pair(out, 3),
            "mapping": {"hidden": out, "cache": 3},
            "none": ("cache", out),
        }[self.kind]


def head(output):
    if isinstance(output, torch.Tensor):
        return output
    return output["hidden"] if isinstance(output, dict) else output[0]


@pytest.fixture
def x():
    return torch.randn(2, 4, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def v():
    return torch.arange(1.0, D + 1)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "named", "mapping"])
def test_every_kind_of_output_is_rebuilt(kind, x, v):
    block = Block(kind)
    plain = block(x)
    with steer(block, v, scale=2.0):
        found = block(x)
    torch.testing.assert_close(head(found), head(plain) + 2 * v)
    assert type(found) is type(plain)
    if kind != "tensor":
        assert list(found)[1:] == list(plain)[1:]
    assert torch.equal(head(block(x)), head(plain))  # the hook has gone


@pytest.mark.parametrize("by_name", [False, True])
def test_input_is_steered_too(by_name, x, v):
    block = Block()
    with steer(block, v, site="input"):
        found = block(hidden_states=x, scale=2.0) if by_name else block(x, scale=2.0)
    torch.testing.assert_close(found, 2 * (x + v) + 1)


@pytest.mark.parametrize(
    ("positions", "changed"),
    [
        ("all", [1, 1, 1, 1]),
        ("prompt", [1, 1, 1, 1]),
        ("last", [0, 0, 0, 1]),
        ("generated", [0, 0, 0, 0]),
        (slice(1, 3), [0, 1, 1, 0]),
        (slice(-2, None), [0, 0, 1, 1]),
    ],
)
def test_positions_of_the_prompt(positions, changed, x, v):
    block = Block()
    with steer(block, v, positions):
        found = block(x)
    expected = x + 1 + torch.tensor(changed).float()[:, None] * v
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("positions", "steps"), [("all", 1), ("prompt", 0), ("last", 0), ("generated", 1)]
)
def test_steps_after_the_prompt(positions, steps, x, v):
    block = Block()
    with steer(block, v, positions):
        block(x)
        for _ in range(2):
            torch.testing.assert_close(block(x[:, :1]), x[:, :1] + 1 + steps * v)
        assert bool((block(x) != x + 1).any()) == (positions != "generated")  # another prompt


@pytest.mark.parametrize(
    ("mask", "last"),
    [([[1, 1, 0, 0], [1, 1, 1, 1]], [1, 3]), ([[0, 0, 1, 1], [0, 1, 1, 1]], [3, 3])],
)
def test_last_is_not_padding_on_either_side(mask, last, x, v):
    block = Block()
    with steer(block, v, "last", mask=torch.tensor(mask)):
        found = block(x) - x - 1
    for row, at in enumerate(last):
        assert (found[row].abs().sum(-1) > 1e-3).nonzero().flatten().tolist() == [at]
    with steer(block, v, mask=torch.tensor(mask)):
        found = block(x) - x - 1
    assert (found.abs().sum(-1) > 1e-3).int().tolist() == mask


def test_a_vector_for_each_row(x, v):
    block = Block()
    with steer(block, torch.stack([v, -v]), "last"):
        found = block(x) - x - 1
    torch.testing.assert_close(found[:, -1], torch.stack([v, -v]))


def test_nothing_in_place_and_gradients_flow(v):
    x = torch.randn(1, 3, D, requires_grad=True)
    vector = v.clone().requires_grad_()
    block, before = Block(), x.detach().clone()
    with steer(block, vector, "last"):
        block(x).square().sum().backward()
    assert torch.equal(x, before)
    out = before + 1
    out[:, -1] += v
    torch.testing.assert_close(x.grad, 2 * out)
    torch.testing.assert_close(vector.grad, 2 * out[0, -1])


def test_zero_changes_no_bit(x):
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 11))
    plain = model(x)
    for positions in ("all", "last"):
        with steer(model[0], torch.zeros(D), positions):
            assert torch.equal(model(x), plain)


def test_the_hook_goes_with_an_exception_and_cannot_be_doubled(x, v):
    block = Block()
    context = steer(block, v)
    with context, pytest.raises(RuntimeError, match="already on"):
        context.__enter__()
    with pytest.raises(TypeError, match="NoneType"), context:
        block(x, scale=None)
    assert not block._forward_hooks
    with context:  # used again
        torch.testing.assert_close(block(x), x + 1 + v)
    with steer(block, v), steer(block, v):
        torch.testing.assert_close(block(x), x + 1 + 2 * v)
    assert not block._forward_hooks


def test_half_precision_is_cast_and_overflow_refused(x, v):
    block = Block()
    with steer(block, v.double()):
        assert block(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"float16 must be finite"), steer(block, v * 1e5):
        block(x.half())
    assert not block._forward_hooks


def test_activations_without_positions(v):
    block = Block()
    with steer(block, v):
        torch.testing.assert_close(block(torch.zeros(3, D)), torch.ones(3, D) + v)
    with pytest.raises(ValueError, match="have no positions"), steer(block, v, "last"):
        block(torch.zeros(3, D))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vector": torch.ones(D).long()}, TypeError, "floating-point"),
        ({"vector": torch.full((D,), float("nan"))}, ValueError, "finite"),
        ({"vector": torch.ones(1, 1, D)}, ValueError, r"\[d\] or \[batch, d\]"),
        ({"positions": "first"}, ValueError, "got 'first'"),
        ({"scale": float("inf")}, ValueError, "scale"),
        ({"site": "middle"}, ValueError, "site"),
        ({"mask": torch.ones(3)}, TypeError, "mask"),
    ],
)
def test_bad_arguments(arguments, error, message, v):
    with pytest.raises(error, match=message):
        steer(Block(), **{"vector": v, **arguments})


@pytest.mark.parametrize(
    ("vector", "options", "kind", "message"),
    [
        (torch.ones(D + 1), {}, "tensor", "has width 7"),
        (torch.ones(3, D), {}, "tensor", "3 vectors for a batch of 2"),
        (torch.ones(D), {"mask": torch.ones(2, 5)}, "tensor", r"mask is \(2, 5\)"),
        (torch.ones(D), {"mask": torch.zeros(2, 4), "positions": "last"}, "tensor", "no last"),
        (torch.ones(D), {}, "none", "returned tuple"),
    ],
)
def test_what_does_not_fit_the_activations(vector, options, kind, message, x):
    block = Block(kind)
    with pytest.raises(ValueError, match=message), steer(block, vector, **options):
        block(x)
    assert not block._forward_hooks


def test_steering_by_axis_plane_and_sector(x):
    samples = torch.randn(9, D, generator=torch.Generator().manual_seed(1)) + 1
    cylinder, block = ConceptCylinder().fit(samples), Block()
    a = cylinder.axis_norm_
    steering = Steering(block, cylinder, positions="last", site="output")

    def added(context):
        with context:
            found = block(x) - x - 1
        assert float(found[:, :-1].detach().abs().max()) < 1e-6
        return found[:, -1]

    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(added(steering.axis(1.5))[0], 1.5 * samples.mean(0), **close)
    torch.testing.assert_close(
        added(steering.plane(samples[:2], 0.5, 0.25)),
        cylinder.steering_vector(samples[:2], 0.5 * a, 0.25), **close,
    )  # fmt: skip
    c = cylinder.transform(added(steering.sector(1.5, 1.0, phi=2.0)))
    for found, expected in ((c.h, 1.5 * a), (c.rho, a), (c.phi, 2.0)):
        torch.testing.assert_close(found, torch.full((2,), expected), **close)


# What a concept changes ---------------------------------------------------------------------------


class Toy(nn.Module):
    """Two blocks over an embedding; dropout tells training from evaluation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, D)
        self.blocks = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.drop = nn.Dropout(0.5)

    def forward(self, ids, twice=False):
        x = self.drop(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        return self.blocks[0](x) if twice else x


def encode(text):
    return torch.tensor([[ord(letter) % 50 for letter in text]])


@pytest.mark.parametrize("layer", [1, -1, "blocks.1"])
@pytest.mark.parametrize(("site", "position"), [("output", -1), ("input", -1), ("input", 0)])
def test_differences_are_those_of_the_activations(layer, site, position):
    model = Toy()
    model.drop.eval()
    pairs = [("abc", "abd"), ("xy", "longer text")]
    found = concept_differences(model, encode, pairs, layer=layer, site=site, position=position)

    def act(text):
        x = model.blocks[0](model.embed(encode(text)))
        return (model.blocks[1](x) if site == "output" else x)[0, position]

    expected = torch.stack([act(b) - act(a) for a, b in pairs])
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    assert model.training
    assert not model.drop.training  # each module has its own mode again
    assert not model.blocks[1]._forward_hooks


def test_inputs_may_be_arguments_or_keywords():
    model = Toy()
    pairs = [("ab", "cd")]
    plain = concept_differences(model, encode, pairs, layer=model.blocks[1])
    for wrap in (lambda t: {"ids": encode(t)}, lambda t: (encode(t), False)):
        assert torch.equal(concept_differences(model, wrap, pairs, layer=model.blocks[1]), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": []}, "pairs is empty"),
        ({"layer": "head"}, "no module 'head'"),
        ({"layer": 2}, "has 2, got layer 2"),
        ({"site": "middle"}, "site"),
        ({"position": 5}, "position 5"),
        ({"encode": lambda t: encode(t).repeat(2, 1)}, "one text"),
        ({"encode": lambda t: (encode(t), True), "layer": 0}, "ran 4 times for 2 texts"),
    ],
)
def test_bad_requests(options, message):
    model = Toy()
    arguments = {"encode": encode, "pairs": [("ab", "cd")], "layer": 1, **options}
    with pytest.raises(ValueError, match=message):
        concept_differences(model, **arguments)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nan_activations_are_refused():
    model = Toy()
    with torch.no_grad():
        model.embed.weight[3] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        concept_differences(model, lambda t: torch.tensor([[3]]), [("a", "b")], layer=0)

"""Name patterns, what they refuse, and how groups are described."""

import warnings

import pytest
import torch
from small_models import BLOCK_MATRICES, GPT, matrix_names
from torch import nn

from stiefel.optim import RMNP, Muon, NorMuon, describe_groups, split_parameters


def test_patterns():
    model = GPT()
    assert matrix_names(model, elementwise="up") == BLOCK_MATRICES - {
        "blocks.0.up.weight",
        "blocks.1.up.weight",
    }
    assert "tokens.weight" in matrix_names(model, matrix=["tokens"])
    assert "head.weight" in matrix_names(model, matrix=["head.weight"])
    only_first = matrix_names(model, elementwise=["blocks.1"])
    assert only_first == {n for n in BLOCK_MATRICES if n.startswith("blocks.0")}
    assert matrix_names(model, elementwise=["*.down.*", "blocks.?.attention.o*"]) == {
        n for n in BLOCK_MATRICES if "qkv" in n or "up" in n
    }
    # Whole parts of a name only: "ead" is no part of "head.weight".
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        split_parameters(model, elementwise=["ead"])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"head": "hed"},
        {"elementwise": ["nrom1"]},
        {"matrix": ["*.wieght"]},
        {"split": {"kqv": 3}},
        {"experts": ["expert"]},
    ],
    ids=str,
)
def test_patterns_that_match_nothing(kwargs):
    (argument,) = kwargs
    message = f"{argument}: pattern .* matches no trainable parameter; names look like tokens"
    with pytest.raises(ValueError, match=message):
        split_parameters(GPT(), **kwargs)


def test_refusals():
    model = GPT()
    with pytest.raises(ValueError, match="both as matrix and as elementwise"):
        split_parameters(model, matrix=["up"], elementwise=["blocks.1.up.weight"])
    with pytest.raises(ValueError, match="24 rows, not divisible into 5"):
        split_parameters(model, split={"qkv": 5})
    with pytest.raises(ValueError, match=r"blocks \(8, 8\) add up to 16"):
        split_parameters(model, split={"qkv": (8, 8)})
    with pytest.raises(ValueError, match=r"add up to 24"):
        split_parameters(model, split={"qkv": (24, 0)})
    with pytest.raises(ValueError, match=r"must have shape \(E, R, C\), got \(32, 8\)"):
        split_parameters(model, experts=["blocks.0.up.weight"])
    with pytest.raises(TypeError, match="model"):
        split_parameters(list(model.parameters()))


def test_groups_of_each_rule_are_there_even_if_empty():
    groups = split_parameters(nn.LayerNorm(4))
    assert [g["rule"] for g in groups] == ["matrix", "elementwise"]
    assert [len(g["params"]) for g in groups] == [0, 2]


@pytest.mark.parametrize("cls", [Muon, NorMuon, RMNP])
def test_flattened_models_warn(cls):
    """FSDP1 hands out one-dimensional pieces."""
    model = nn.ParameterList([nn.Parameter(torch.randn(120)) for _ in range(3)])
    with pytest.warns(UserWarning, match="flattened to one dimension, and no matrix is left"):
        optimizer = cls(split_parameters(model))
    model[0].grad = torch.ones(120)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(split_parameters(GPT()))


def test_description(capsys):
    model = GPT()
    text = describe_groups(split_parameters(model, split={"qkv": 3}))
    assert capsys.readouterr().out == text + "\n"
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["rule", "view", "blocks", "shape", "tensors", "numbers"]
    assert ["matrix", "flatten", "8×8", "2", "128"] in lines
    assert ["matrix", "flatten", "3", "24×8", "2", "384"] in lines
    assert ["elementwise", "11×8", "2", "176"] in lines
    total = sum(p.numel() for p in model.parameters())
    matrices = 2 * (24 * 8 + 8 * 8 + 2 * 32 * 8)
    assert text.splitlines()[-2:] == [
        f"matrix: {matrices:,} numbers in all",
        f"elementwise: {total - matrices:,} numbers in all",
    ]
    optimizer = Muon(split_parameters(model, split={"qkv": 3}))
    assert describe_groups(optimizer) == text


def test_description_of_scalars_and_plain_groups():
    groups = [
        {"params": [nn.Parameter(torch.zeros(2, 3))]},
        {"params": [nn.Parameter(torch.tensor(0.0))], "rule": "elementwise"},
    ]
    text = describe_groups(groups)
    assert [line.split() for line in text.splitlines()][1:3] == [
        ["matrix", "2×3", "1", "6"],
        ["elementwise", "scalar", "1", "1"],
    ]

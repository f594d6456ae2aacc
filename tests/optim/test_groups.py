"""Which parameters are matrices: every kind of module, and any model at random."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import BLOCK_MATRICES, GPT, check_partition, matrix_names, routes
from torch import nn

from stiefel.optim import RMNP, NorMuon, split_parameters


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        self.up = nn.Parameter(torch.randn(3, 16, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 16))


def test_perceptron():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    assert matrix_names(model) == {"0.weight", "2.weight"}
    assert matrix_names(model, head=None) == {"0.weight", "2.weight", "4.weight"}
    assert matrix_names(model, head="0") == {"2.weight", "4.weight"}
    assert matrix_names(model, head=["0", "4.weight"]) == {"2.weight"}
    check_partition(model, split_parameters(model))


def test_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.Conv2d(12, 12, 3, groups=12),  # depthwise
        nn.Conv2d(12, 24, 3, groups=12),  # depthwise, two rows a channel
        nn.Conv1d(24, 6, 1),
        nn.ConvTranspose2d(6, 5, 2),
        nn.ConvTranspose2d(5, 10, 2, groups=5),
        nn.Conv3d(10, 1, 2),  # one row
        nn.Flatten(),
        nn.Linear(7, 4),
    )
    found = routes(split_parameters(model))
    matrices = {n: r for n, r in found.items() if r[0] == "matrix"}
    assert matrices == {
        "0.weight": ("matrix", "flatten", None),
        "2.weight": ("matrix", "flatten", 4),
        "5.weight": ("matrix", "flatten", None),
        "6.weight": ("matrix", "flatten", None),
    }
    assert "0.weight" not in matrix_names(model, first_conv=False)
    assert "2.weight" in matrix_names(model, first_conv=False)
    check_partition(model, split_parameters(model))


def test_one_input_channel_is_no_depthwise_kernel():
    """The first convolution over grey images: (out, 1·kh·kw) is a full matrix."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2))
    assert matrix_names(model) == {"0.weight"}


def test_grouped_kernels_are_updated_group_by_group():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Linear(3, 2))
    before = model[0].weight.detach().clone()
    optimizer = RMNP(split_parameters(model), lr=1.0, scale="rms")
    model[0].weight.grad = torch.randn_like(model[0].weight)
    optimizer.step()
    moved = (before - model[0].weight).detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, torch.full((6,), 0.2 * 18**0.5))


def test_language_model_with_untied_head():
    model = GPT()
    assert matrix_names(model) == BLOCK_MATRICES
    assert matrix_names(model, head=None) == BLOCK_MATRICES | {"head.weight"}
    check_partition(model, split_parameters(model))


def test_language_model_with_tied_head():
    model = GPT(tied=True)
    assert matrix_names(model) == BLOCK_MATRICES
    assert matrix_names(model, head=None) == BLOCK_MATRICES
    check_partition(model, split_parameters(model, head=None))


def test_tied_head_that_is_registered_first():
    model = nn.Module()
    model.head, model.hidden = nn.Linear(8, 11, bias=False), nn.Linear(8, 8)
    model.tokens = nn.Embedding(11, 8)
    model.tokens.weight = model.head.weight
    assert matrix_names(model, head=None) == {"hidden.weight"}
    check_partition(model, split_parameters(model))


def test_fused_projections():
    model = GPT()
    found = routes(split_parameters(model, split={"qkv": 3, "up": [16, 16]}))
    for i in (0, 1):
        assert found[f"blocks.{i}.attention.qkv.weight"] == ("matrix", "flatten", 3)
        assert found[f"blocks.{i}.up.weight"] == ("matrix", "flatten", (16, 16))
        assert found[f"blocks.{i}.down.weight"] == ("matrix", "flatten", None)
        assert found[f"blocks.{i}.up.bias"] == ("elementwise", None, None)
    grouped = split_parameters(GPT(fused_rows=12), split={"*.qkv.weight": (8, 2, 2)})
    optimizer = NorMuon(grouped)
    blocks = [g["blocks"] for g in optimizer.param_groups if g["rule"] == "matrix"]
    assert blocks == [None, (8, 2, 2)]


def test_experts():
    model = Experts()
    assert matrix_names(model) == set()  # the gate is the last linear layer, hence the head
    found = routes(split_parameters(model, experts=["up", "down"], head=None))
    assert found == {
        "gate.weight": ("matrix", "flatten", None),
        "up": ("matrix", "batch", None),
        "down": ("matrix", "batch", None),
    }
    check_partition(model, split_parameters(model, experts=["up", "down"]))


def test_recurrent_networks():
    model = nn.ModuleDict(
        {"lstm": nn.LSTM(4, 6, bidirectional=True), "gru": nn.GRUCell(6, 5), "out": nn.Linear(5, 2)}
    )
    assert matrix_names(model) == {
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "lstm.weight_ih_l0_reverse",
        "lstm.weight_hh_l0_reverse",
        "gru.weight_ih",
        "gru.weight_hh",
    }
    found = routes(split_parameters(model, split={"lstm.*": 4, "gru.weight_*": 3}))
    assert found["lstm.weight_hh_l0"] == ("matrix", "flatten", 4)
    assert found["gru.weight_ih"] == ("matrix", "flatten", 3)


def test_multihead_attention():
    model = nn.ModuleDict(
        {
            "fused": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "apart": nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
            "out": nn.Linear(8, 3),
        }
    )
    assert matrix_names(model) == {
        "fused.in_proj_weight",
        "fused.out_proj.weight",
        "apart.q_proj_weight",
        "apart.k_proj_weight",
        "apart.v_proj_weight",
        "apart.out_proj.weight",
    }
    found = routes(split_parameters(model, split={"in_proj_weight": 3}))
    assert found["fused.in_proj_weight"] == ("matrix", "flatten", 3)
    check_partition(model, split_parameters(model))


def test_models_that_name_their_head():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.lm_head = nn.Linear(4, 9, bias=True)  # padded: not as wide as the vocabulary
            self.body = nn.Linear(4, 7)  # as wide by chance

        def get_output_embeddings(self):
            return self.lm_head

    assert matrix_names(Named()) == {"body.weight"}

    class Headless(Named):
        def get_output_embeddings(self):
            return None

    assert matrix_names(Headless()) == {"lm_head.weight"}


def test_input_major_weights_of_transformers():
    """GPT-2's Conv1D there stores (in, out)."""
    layer = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
    model = nn.ModuleDict({"c_attn": layer(), "last": nn.Linear(2, 2)})
    model["c_attn"].weight = nn.Parameter(torch.randn(4, 12))
    found = routes(split_parameters(model, split={"c_attn": 3}))
    assert found["c_attn.weight"] == ("matrix", "transpose", 3)
    with pytest.raises(ValueError, match="has 12 rows"):
        split_parameters(model, split={"c_attn": 5})


def test_frozen_scalar_and_odd_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(1.0))
            self.positions = nn.Parameter(torch.randn(5, 4))
            self.column = nn.Parameter(torch.randn(5, 1))
            self.cube = nn.Parameter(torch.randn(2, 3, 4))
            self.nothing = nn.Parameter(torch.randn(0, 4))
            self.field = nn.LayerNorm((3, 4))
            self.rms = nn.RMSNorm((3, 4))
            self.mixed = nn.Bilinear(2, 3, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.out = nn.Linear(4, 2)

    model = Odd()
    assert matrix_names(model) == {"positions"}
    groups = split_parameters(model)
    check_partition(model, groups)
    assert not any(name.startswith("frozen") for name in routes(groups))
    assert matrix_names(model, elementwise=["positions"]) == set()
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        split_parameters(model, matrix=["frozen"])


def test_embedding_bags_and_parametrized_weights():
    model = nn.ModuleDict(
        {"bag": nn.EmbeddingBag(9, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    )
    nn.utils.parametrizations.weight_norm(model["a"])
    nn.utils.parametrizations.spectral_norm(model["b"])
    assert matrix_names(model) == {
        "a.parametrizations.weight.original1",
        "b.parametrizations.weight.original",
    }


LAYERS = {
    "linear": lambda a, b: nn.Linear(a, b),
    "conv": lambda a, b: nn.Conv2d(a, b, 2),
    "grouped": lambda a, b: nn.Conv1d(2 * a, 2 * b, 2, groups=2),
    "transposed": lambda a, b: nn.ConvTranspose1d(a, b, 2),
    "embedding": lambda a, b: nn.Embedding(a, b),
    "lstm": lambda a, b: nn.LSTM(a, b),
    "attention": lambda a, b: nn.MultiheadAttention(2 * a, 2),
    "norm": lambda a, b: nn.LayerNorm((a, b)),
    "bilinear": lambda a, b: nn.Bilinear(a, b, 2),
    "free": lambda a, b: nn.ParameterList([nn.Parameter(torch.randn(a, b))]),
    "scalar": lambda a, b: nn.ParameterList([nn.Parameter(torch.tensor(1.0))]),
}


@given(
    layers=st.lists(
        st.tuples(st.sampled_from(sorted(LAYERS)), st.integers(1, 5), st.integers(1, 5)),
        min_size=1,
        max_size=5,
    ),
    frozen=st.integers(0, 5),
    tied=st.booleans(),
    head=st.sampled_from(["auto", None]),
    first_conv=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_model_is_partitioned_and_steps(layers, frozen, tied, head, first_conv):
    model = nn.ModuleList([LAYERS[kind](a, b) for kind, a, b in layers])
    if tied:
        model.append(model[0])
    if frozen < len(layers):
        model[frozen].requires_grad_(False)
    groups = split_parameters(model, head=head, first_conv=first_conv)
    check_partition(model, groups)
    for group in groups:
        for name, p in group["params"]:
            if group["rule"] == "matrix":
                assert p.ndim >= 2, name
                assert min(p.shape[0], p[0].numel()) > 1, name
            elif head is None and first_conv and p.ndim == 2 and min(p.shape) > 1:
                owner = model.get_submodule(name.rpartition(".")[0])
                assert isinstance(owner, nn.Embedding | nn.LayerNorm), name
    if not any(group["params"] for group in groups):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rule may get nothing here
        optimizer = NorMuon(groups, ns_dtype=torch.float32)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old) != p.requires_grad

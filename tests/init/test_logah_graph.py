"""The graph of a network: counts and distances of the sheet, roles, refusals."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from stiefel.init import OPS, gpt_graph, graph_from_module, sample_gpt, sample_vit, vit_graph
from stiefel.init.logah.graph import path_lengths
from stiefel.papers.logah_runs import GPT, architecture

transformers.logging.set_verbosity_error()


def reached(graph):
    return int((graph.A > 0).sum())


def meta(build):
    with torch.device("meta"):
        return build()


def gpt2(**changes):
    config = transformers.GPT2Config(n_embd=32, n_head=2, vocab_size=50, bos_token_id=0,
                                     eos_token_id=0, **changes)  # fmt: skip
    return meta(lambda: transformers.GPT2LMHeadModel(config))


def vit(**changes):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, **changes,
    )  # fmt: skip
    return meta(lambda: transformers.ViTForImageClassification(config))


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    return meta(lambda: transformers.LlamaForCausalLM(config))


class Convolutions(nn.Module):
    """Convolution, norm, depthwise convolution, group norm, a skip, a mean and a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gn, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        x = x + self.gn(self.depthwise(x))
        return self.head(x.mean((2, 3)))


def test_gpt_of_one_block_has_the_distances_of_the_sheet():
    _, graph = architecture(32, 1, 4)
    block = "ln linear bias msa linear bias sum ln linear bias linear bias sum"
    assert " ".join(n.op for n in graph.nodes) == f"input embed pos_enc sum {block} ln linear"
    expected = [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 3, 4, 5, 6, 7, 8, 4, 5, 6]
    assert graph.A[0].tolist() == expected
    assert graph.A.dtype == torch.int16
    assert torch.equal(graph.A, graph.A.triu(1))


def test_gpt_of_four_blocks():
    _, graph = architecture(64, 4, 4)
    assert len(graph) == 4 + 13 * 4 + 2 == 58
    assert int(graph.A.max()) == 17
    assert int(graph.A[0, -1]) == 12
    assert graph.names[-1] == "head.weight"
    # Few different pairs, so few biases of attention to compute.
    assert len(graph.pairs[0]) == 35


@pytest.mark.parametrize(
    ("model", "inputs", "nodes", "edges"),
    [
        (gpt2(n_layer=2, tie_word_embeddings=False), None, 32, 36),
        (gpt2(n_layer=2), None, 32, 37),
        (vit(), None, 42, 49),
        (llama(), None, 40, 54),
        (
            meta(lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2,
                enable_nested_tensor=False,
            )), torch.zeros(1, 4, 16), 27, 30,
        ),
        (meta(lambda: nn.LSTM(8, 8)), torch.zeros(4, 1, 8), 5, 4),
        (Convolutions(), torch.zeros(1, 3, 8, 8), 11, 11),
    ],
    ids=["gpt2", "gpt2-tied", "vit", "llama", "encoder", "lstm", "convolutions"],
)  # fmt: skip
def test_counts_of_the_sheet(model, inputs, nodes, edges):
    graph = graph_from_module(model, inputs)
    assert (len(graph), graph.edges) == (nodes, edges)
    owned = [name for node in graph.nodes for name in node.parameters]
    assert sorted(owned) == sorted(dict(model.named_parameters()))


def test_gpt2_pairs_and_longest_path():
    graph = graph_from_module(gpt2(n_layer=2, tie_word_embeddings=False))
    assert (reached(graph), int(graph.A.max())) == (495, 13)


@pytest.mark.parametrize("tied", [False, True])
def test_the_rule_for_gpt2_is_its_export(tied):
    rule = gpt_graph(2, 32, vocab_size=50, tie_word_embeddings=tied)
    graph = graph_from_module(gpt2(n_layer=2, tie_word_embeddings=tied))
    assert rule.nodes == graph.nodes
    assert list(rule.parameter_shapes.items()) == list(graph.parameter_shapes.items())
    assert torch.equal(rule.A, graph.A)
    assert rule.tied == graph.tied


class FusedViT(nn.Module):
    """A ViT with timm's names and operations."""

    class Block(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.norm1 = nn.LayerNorm(d)
            self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
            self.norm2 = nn.LayerNorm(d)
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})

        def forward(self, x):
            b, n, d = x.shape
            q, k, v = (
                self.attn["qkv"](self.norm1(x)).reshape(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
            )
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
            x = x + self.attn["proj"](y)
            return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))

    def __init__(self, d, depth, side, patch, classes):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, d))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, d, patch, patch)})
        self.blocks = nn.Sequential(*(self.Block(d) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, classes)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def test_the_rule_for_vit_is_its_export():
    model = meta(lambda: FusedViT(16, 2, 16, 4, 10))
    graph = graph_from_module(model, torch.zeros(1, 3, 16, 16))
    rule = vit_graph(2, 16, image_size=16, patch_size=4, num_labels=10)
    assert rule.nodes == graph.nodes
    assert list(rule.parameter_shapes.items()) == list(graph.parameter_shapes.items())
    assert torch.equal(rule.A, graph.A)


def test_refilling_is_exporting_again():
    wide, narrow = architecture(96, 3, 4)[1], architecture(32, 3, 4)[1]
    model, refilled = architecture(96, 3, 2)
    again = graph_from_module(model, torch.zeros(1, 8, dtype=torch.long))
    for graph in (wide, refilled):
        assert graph.nodes == again.nodes
        assert graph.parameter_shapes == again.parameter_shapes
        assert graph.shapes == again.shapes
    assert narrow.shapes != wide.shapes
    with pytest.raises(ValueError, match=r"another architecture .*blocks\.3"):
        wide.refill(GPT(32, 4, 4))


def test_mode_device_and_gradients_of_the_model_stay():
    model = Convolutions().train()
    model.bn.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph_from_module(model, torch.zeros(1, 3, 8, 8))
    assert (model.training, model.bn.training, model.conv.training) == (True, False, True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_heads_are_what_leaves_the_network():
    graph = graph_from_module(Convolutions(), torch.zeros(1, 3, 8, 8))
    assert {graph.names[i] for i in graph.heads} == {"head.weight", "head.bias"}
    tied = graph_from_module(gpt2(n_layer=1))
    assert tied.heads == frozenset()


def test_matrices_stored_as_in_out_are_told_from_linear_layers():
    graph = graph_from_module(gpt2(n_layer=1, tie_word_embeddings=False))
    turned = {n.parameters[0] for n in graph.nodes if n.transposed}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert turned == {f"transformer.h.0.{layer}.weight" for layer in layers}

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.turned = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))

        def forward(self, x):
            return x @ self.plain @ self.turned.T

    graph = graph_from_module(Product(), torch.zeros(2, 4))
    assert [n.transposed for n in graph.nodes] == [False, True, False]


def test_a_parameter_used_twice_joins_its_first_place():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    graph = graph_from_module(Twice(), torch.zeros(2, 4))
    assert [(n.op, n.parents) for n in graph.nodes] == [
        ("input", ()), ("linear", (0,)), ("sum", (1,)),
    ]  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_path_lengths_are_those_of_matrix_powers(data):
    n = data.draw(st.integers(2, 8))
    parents = [[]] + [
        sorted(data.draw(st.sets(st.integers(0, i - 1), max_size=3))) for i in range(1, n)
    ]
    adjacent = np.zeros((n, n), dtype=int)
    for i, ps in enumerate(parents):
        adjacent[ps, i] = 1
    lengths, power = np.zeros((n, n), dtype=int), np.eye(n, dtype=int)
    for k in range(1, n):
        power = (power @ adjacent > 0).astype(int)
        lengths = np.where((lengths == 0) & (power > 0), k, lengths)
    cut = data.draw(st.integers(1, n))
    expected = np.where(lengths <= cut, lengths, 0)
    assert path_lengths(parents, cut).tolist() == expected.tolist()


def test_cycles_are_refused():
    with pytest.raises(ValueError, match=r"cycle through nodes \[1, 2\]"):
        path_lengths([[], [0, 2], [1], [0]], 5)
    with pytest.raises(ValueError, match=r"cycle through nodes \[1\]"):
        path_lengths([[], [1]], 5)
    with pytest.raises(ValueError, match="max_path is 0"):
        path_lengths([[]], 0)


def test_bad_models_are_refused_by_name():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match=r"does not use \['idle.weight', 'idle.bias'\]"):
        graph_from_module(Unused(), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="Linear does not say what it takes: give example_inputs"):
        graph_from_module(nn.Linear(4, 4))
    whole = nn.Linear(4, 4)
    whole.steps = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)
    with pytest.raises(TypeError, match=r"parameter steps is torch.int64"):
        graph_from_module(whole, torch.zeros(1, 4))

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"Branching has no graph, torch.export refuses it"):
        graph_from_module(Branching(), torch.zeros(1, 4))


@pytest.mark.parametrize("sample", [sample_gpt, sample_vit])
def test_architectures_keep_the_published_ranges(sample):
    rng = np.random.default_rng(0)
    found = [sample(rng) for _ in range(25)]
    assert found == [sample(np.random.default_rng(0)), *found[1:]]
    for config in found:
        layers = config.get("n_layer") or config["num_hidden_layers"]
        width = config.get("n_embd") or config["hidden_size"]
        heads = config.get("n_head") or config["num_attention_heads"]
        assert 3 <= layers <= 9
        assert width % heads == 0
        low, high = {
            sample_gpt: [(176, 256), (128, 176), (72, 176)],
            sample_vit: [(384, 512), (256, 384), (128, 256)],
        }[sample][(layers > 3) + (layers > 5)]
        assert low <= width <= high
        build = gpt_graph if sample is sample_gpt else vit_graph
        shapes = build(**config).parameter_shapes.values()
        limit = 30_000_000 if sample is sample_gpt else 10_000_000
        assert sum(int(np.prod(s)) for s in shapes) <= limit
    assert len({str(c) for c in found}) > 8
    with pytest.raises(ValueError, match="limit is 10; the smallest architecture has"):
        sample(rng, limit=10)


def test_every_operation_has_a_name_of_its_own():
    assert len(set(OPS)) == len(OPS) == 21

"""The hypernetwork: sizes, invariances, filling models, files; its training."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from stiefel.init import (
    OPS,
    InitReport,
    LoGAH,
    LoGAHTrainer,
    NetGraph,
    gpt_graph,
    graph_from_module,
    vit_graph,
)
from stiefel.init.logah.graph import Node
from stiefel.init.logah.parts import parts
from stiefel.papers.logah_runs import GPT, architecture

transformers.logging.set_verbosity_error()

SMALL = {"hid": 16, "layers": 2, "heads": 4, "rank": 4}


def hypernetwork(seed=0, **changes):
    torch.manual_seed(seed)
    return LoGAH(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("name", "published", "core"),
    [("tiny", 2_540_380, 2_532_968), ("small", 21_412_794, 21_397_974),
     ("base", 78_231_892, 78_202_256), ("large", 289_423_316, 289_393_680)],
)  # fmt: skip
def test_sizes_of_the_paper(name, published, core):
    with torch.device("meta"):
        model = LoGAH.preset(name)
    rank, encoder = model.config["rank"], model.encoder
    total = sum(p.numel() for p in model.parameters())
    assert abs(total / published - 1) < 0.001
    # Exactly, but for tables of sizes and operations; the authors own an unused r x r layer.
    tables = (encoder.ops, encoder.channels, encoder.kernels)
    ours = total - sum(p.numel() for t in tables for p in t.parameters())
    assert ours + rank * rank + rank == core


@pytest.mark.parametrize("decoder", ["meanfield", "reshape", "tile"])
def test_predictions_fit_the_network(decoder):
    model = hypernetwork(decoder=decoder, max_width=512)
    net, graph = architecture(32, 2, 4)
    predicted = model.predict(graph)
    assert {n: tuple(t.shape) for n, t in predicted.items()} == graph.parameter_shapes
    for name, value in predicted.items():
        if name.endswith("bias"):
            assert value.abs().max() < 1
        elif value.ndim == 1:
            assert value.min() > 0
            assert value.max() < 2
    tokens = torch.randint(96, (2, 9))
    loss = torch.func.functional_call(net, predicted, (tokens,)).square().mean()
    loss.backward()
    gradients = [p.grad for p in model.decoder.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def permuted(graph, order):
    """The same graph, its nodes counted in another order."""
    place = {old: new for new, old in enumerate(order)}
    nodes = tuple(
        Node(n.op, tuple(sorted(place[p] for p in n.parents)), n.parameters, n.transposed)
        for n in (graph.nodes[i] for i in order)
    )
    index = torch.tensor(order)
    return NetGraph(nodes, graph.parameter_shapes, graph.A[index][:, index], graph.tied)


def test_the_order_of_nodes_does_not_matter():
    model = hypernetwork().double()
    _, graph = architecture(32, 2, 4)
    rest = np.random.default_rng(0).permutation(np.arange(1, len(graph))).tolist()
    expected, found = model.predict(graph), model.predict(permuted(graph, [0, *rest]))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_attention_bias_by_distinct_pairs_is_that_of_all_pairs():
    encoder = hypernetwork().double().encoder
    _, graph = architecture(32, 2, 4)
    there, back = graph.A.long() + 2, graph.A.T.long() + 2
    slow = encoder.edge(torch.cat([encoder.path(there), encoder.path(back)], -1)).permute(2, 0, 1)
    torch.testing.assert_close(encoder.pair_bias(graph), slow)


def test_rank_is_bounded():
    _, graph = architecture(32, 2, 4)
    for value in hypernetwork().predict(graph).values():
        if value.ndim == 2:
            assert torch.linalg.matrix_rank(value) <= 4


@pytest.mark.parametrize("decoder", ["meanfield", "reshape", "tile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_filling_is_predicting(decoder, dtype):
    model = hypernetwork(decoder=decoder, max_width=512)
    net = GPT(32, 2, 4).to(dtype)
    graph = architecture(32, 2, 4)[1]
    addresses = {n: p.data_ptr() for n, p in net.named_parameters()}
    assert model.init_(net, graph) is net
    for name, expected in model.predict(graph).items():
        found = net.get_parameter(name)
        assert (found.dtype, found.data_ptr()) == (dtype, addresses[name])
        tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(found.float(), expected.detach(), rtol=tolerance, atol=tolerance)


def gpt2(tied=True):
    config = transformers.GPT2Config(
        n_embd=32, n_head=2, n_layer=2, vocab_size=50, n_positions=16, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def test_gpt2_of_transformers_by_its_own_graph():
    model = hypernetwork()
    net, other = gpt2(), gpt2()
    model.init_(net)
    model.init_(other, gpt_graph(2, 32, vocab_size=50, n_positions=16))
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert net.lm_head.weight is net.transformer.wte.weight
    report = model.report(net)
    assert isinstance(report, InitReport)
    assert len(report.predicted) == len(dict(net.named_parameters()))
    assert report.tied == {"lm_head.weight": "transformer.wte.weight"}
    logits = net(torch.randint(50, (1, 8))).logits
    assert torch.isfinite(logits).all()


def test_matrices_stored_as_in_out_are_scaled_by_their_true_fan_in():
    """``Conv1D`` of transformers: the same weights as a linear layer's, turned."""
    model = hypernetwork()
    graph = gpt_graph(1, 32, vocab_size=50)
    part = {p.name: p for p in parts(graph)[0]}
    wide = part["transformer.h.0.mlp.c_fc.weight"]
    assert (wide.shape, wide.decoded_shape) == ((32, 128), (128, 32))
    assert (wide.fan_in(), wide.fan_in(stored=True)) == (32, 128)
    value = model.predict(graph)[wide.name]
    h = model.embed(graph)[wide.node][None]
    expected = model.decoder(h, (128, 32))[0].T * model.decoder.gain(32)
    torch.testing.assert_close(value, expected)


def test_class_token_stays_and_positions_become_a_grid():
    graph = vit_graph(1, 16, image_size=16, patch_size=4, num_labels=10)
    model = hypernetwork()
    predicted = model.predict(graph)
    assert set(graph.parameter_shapes) - set(predicted) == {"cls_token"}
    positions = predicted["pos_embed"]
    assert positions.shape == (1, 17, 16)
    assert (positions[0, 0] == 0).all()
    node = graph.names.index("pos_embed")
    grid = model.decoder(model.embed(graph)[node][None], (1, 16, 4, 4))[0]
    torch.testing.assert_close(positions[0, 1 + 4 * 2 + 3], grid[0, :, 2, 3])


def test_frozen_parameters_stay_and_are_named():
    net, graph = GPT(32, 2, 4), architecture(32, 2, 4)[1]
    net.wpe.weight.requires_grad_(False)
    before = net.wpe.weight.clone()
    model = hypernetwork()
    model.init_(net, graph)
    assert torch.equal(net.wpe.weight, before)
    assert model.report(net, graph).kept == ("wpe.weight",)


def test_vocabularies():
    graph = gpt_graph(1, 32, vocab_size=120, tie_word_embeddings=False)
    words = ("transformer.wte.weight", "lm_head.weight")
    message = r"wte.weight of shape \(120, 32\): 120 rows with a meaning each need table or"
    with pytest.raises(ValueError, match=message):
        hypernetwork().predict(graph)
    assert set(words) & set(hypernetwork(vocab="keep").predict(graph)) == set()
    tiled = hypernetwork(vocab="tile").predict(graph)[words[0]]
    assert torch.equal(tiled[96:], tiled[:24])
    assert not torch.equal(tiled[:96], tiled[24:])
    own = hypernetwork(vocabulary=120).predict(graph)[words[0]]
    assert len(torch.unique(own, dim=0)) == 120
    with pytest.raises(ValueError, match="120 rows needs max_width >= 120; it is 100"):
        hypernetwork(decoder="reshape", max_width=100).predict(graph)


def test_unknown_operations_are_named():
    graph = graph_from_module(nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8)), torch.zeros(1, 4))
    ops = [op for op in OPS if op not in ("rms_norm", "ln")]
    with pytest.warns(UserWarning, match=r"read as 'param': rms_norm \(at 1.weight\)"):
        hypernetwork(ops=ops).predict(graph)
    with pytest.raises(KeyError, match=r"rms_norm \(at 1.weight\)"):
        hypernetwork(ops=ops, strict=True).predict(graph)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hid": 18}, "hid is 18; it has to be a multiple of 4 and of heads = 4"),
        ({"hid": 0}, "hid is 0"),
        ({"layers": 0}, "layers is 0"),
        ({"decoder": "dense"}, "decoder is 'dense'; known are meanfield, reshape, tile"),
        ({"vocab": "all"}, "vocab is 'all'"),
        ({"norm": "l2"}, "norm is 'l2'"),
        ({"ops": ["input", "attention"]}, r"ops has \['attention'\]"),
        ({"ops": ["input", "sum", "sum"]}, "twice"),
        ({"ops": ["sum"]}, "has to hold 'input'"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    # Unchecked here, as beartype would be faster than the check that users meet.
    build = getattr(LoGAH.__init__, "__wrapped__", LoGAH.__init__)
    with pytest.raises(ValueError, match=message):
        build(LoGAH.__new__(LoGAH), **{**SMALL, **changes})
    with pytest.raises(ValueError, match="preset is 'huge'; known are tiny, small"):
        getattr(LoGAH.preset, "__wrapped__", LoGAH.preset.__func__)(LoGAH, "huge")


def test_a_model_without_memory_is_refused():
    net, graph = architecture(32, 2, 4)
    with pytest.raises(ValueError, match=r"wte.weight is on the meta device"):
        hypernetwork().init_(net, graph)
    with pytest.raises(ValueError, match="another architecture"):
        hypernetwork().init_(GPT(32, 3, 4), graph)


def test_std_norm_has_a_learned_factor():
    model = hypernetwork(norm="std")
    graph = architecture(32, 2, 4)[1]
    value = model.predict(graph)["blocks.0.up.weight"]
    assert value.std().item() == pytest.approx(np.exp(-3) / np.sqrt(32), rel=1e-4)
    value.sum().backward()
    assert model.log_gain.grad != 0


def test_files_keep_everything(tmp_path):
    model = hypernetwork(decoder="reshape", max_width=512, vocab="tile")
    path = tmp_path / "hyper.safetensors"
    model.save(path)
    graph = architecture(32, 2, 4)[1]
    code = (
        "import sys, torch; from stiefel.init import LoGAH\n"
        "from stiefel.papers.logah_runs import architecture\n"
        "w = LoGAH.load(sys.argv[1]).predict(architecture(32, 2, 4)[1])\n"
        "torch.save({n: t.detach() for n, t in w.items()}, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path / "w.pt")], check=True)
    found = torch.load(tmp_path / "w.pt", weights_only=True)
    for name, value in model.predict(graph).items():
        assert torch.equal(found[name], value.detach())
    assert LoGAH.load(path).config == model.config


def test_files_of_others_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        LoGAH.load(tmp_path / "none")
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"was not written by LoGAH.save"):
        LoGAH.load(other)
    save_file({"w": torch.zeros(2)}, other, {"stiefel.logah": '{"hid": 100000}'})
    with pytest.raises(ValueError, match=r"settings and tensors differ"):
        LoGAH.load(other)
    save_file({"w": torch.zeros(2)}, other, {"stiefel.logah": '{"width": 16}'})
    with pytest.raises(ValueError, match="is not a hypernetwork"):
        LoGAH.load(other)
    other.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00broken")
    with pytest.raises(ValueError, match="is not a hypernetwork"):
        LoGAH.load(other)


# Training -------------------------------------------------------------------------------------


def batches(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(96, (4, 17), generator=g) for _ in range(3)]


def loss(net, parameters, batch):
    logits = torch.func.functional_call(net, parameters, (batch[:, :-1],))
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def sample(rng):
    return architecture(int(rng.choice((16, 24))), int(rng.choice((1, 2))), 2)


def test_training_lowers_the_loss_and_repeats():
    runs = []
    for _ in range(2):
        model = hypernetwork()
        trainer = LoGAHTrainer(model, lr=1e-2, warmup=2, seed=3)
        runs.append((trainer.fit(sample, loss, batches(), 30, on_step=lambda *_: None), model))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for _, m in runs), strict=True))
    losses = runs[0][0]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.02


def test_a_step_is_adamw_on_loss_and_norms():
    """One step by hand: two architectures, norms not squared, clipped gradient."""
    model, twin = hypernetwork(), hypernetwork()
    fixed = [architecture(16, 1, 2), architecture(24, 2, 2)]
    order = iter(fixed)
    LoGAHTrainer(model, lr=1e-3, warmup=0, clip=0.1).fit(
        lambda rng: next(order), loss, batches()[:1], 1, meta_batch=2, gamma=0.01,
        on_step=lambda *_: None,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(twin.parameters(), 1e-3, weight_decay=1e-2)
    total = 0
    for net, graph in fixed:
        predicted = twin.predict(graph)
        total = total + loss(net, predicted, batches()[0])
        total = total + 0.01 * sum(torch.linalg.vector_norm(w) for w in predicted.values())
    (total / 2).backward()
    nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    optimizer.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_what_is_not_predicted_is_drawn():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.zeros(1, 1, 8)), nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(torch.cat([self.token.expand(len(x), -1, -1), x], 1))

    with torch.device("meta"):
        net = Tokens()
    graph, seen = graph_from_module(net, torch.zeros(1, 2, 8)), []

    def measure(net, parameters, batch):
        seen.append(parameters["token"])
        return torch.func.functional_call(net, parameters, (batch,)).square().mean()

    LoGAHTrainer(hypernetwork()).fit(
        lambda rng: (net, graph), measure, [torch.ones(2, 2, 8)], 2, on_step=lambda *_: None
    )
    assert seen[0].shape == (1, 1, 8)
    assert 0.005 < seen[0].std() < 0.04
    assert not torch.equal(*seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"steps": 0}, "steps is 0"), ({"steps": 1, "meta_batch": 0}, "meta_batch 0"),
     ({"steps": 1, "gamma": -1.0}, "gamma -1")],
)  # fmt: skip
def test_bad_training_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoGAHTrainer(hypernetwork()).fit(sample, loss, batches(), **arguments)


def test_empty_data_bad_rates_and_nan_are_refused():
    with pytest.raises(ValueError, match="data has no batches"):
        LoGAHTrainer(hypernetwork()).fit(sample, loss, [], 1)
    with pytest.raises(ValueError, match="lr is nan"):
        LoGAHTrainer(hypernetwork(), lr=float("nan"))
    with pytest.raises(ValueError, match="warmup is -1"):
        LoGAHTrainer(hypernetwork(), warmup=-1)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0, on a network of"):
        LoGAHTrainer(hypernetwork()).fit(sample, lambda *a: loss(*a) * float("nan"), batches(), 1)

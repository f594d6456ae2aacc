"""Names of the common families, and fused matrices taken apart."""

import pytest
import torch

from stiefel.diagnose import Rule, classify_name
from stiefel.diagnose.components import heads, is_matrix, split_fused

# fmt: off
NAMES = {
    # Llama, Mistral, Qwen, OLMo
    "model.layers.3.self_attn.q_proj.weight": ("q", 3),
    "model.layers.3.self_attn.k_proj.weight": ("k", 3),
    "model.layers.11.self_attn.v_proj.weight": ("v", 11),
    "model.layers.0.self_attn.o_proj.weight": ("o", 0),
    "model.layers.0.mlp.gate_proj.weight": ("gate", 0),
    "model.layers.0.mlp.up_proj.weight": ("up", 0),
    "model.layers.0.mlp.down_proj.weight": ("down", 0),
    "model.layers.0.input_layernorm.weight": ("norm", 0),
    "model.layers.0.self_attn.q_norm.weight": ("norm", 0),
    "model.layers.0.mlp.gate_up_proj.weight": ("gate_up", 0),
    "model.embed_tokens.weight": ("embedding", None),
    "lm_head.weight": ("unembedding", None),
    # Mixtral
    "model.layers.2.block_sparse_moe.gate.weight": ("router", 2),
    "model.layers.2.block_sparse_moe.experts.7.w1.weight": ("other", 2),
    # GPT-2
    "transformer.h.5.attn.c_attn.weight": ("qkv", 5),
    "transformer.h.5.attn.c_proj.weight": ("o", 5),
    "transformer.h.5.mlp.c_fc.weight": ("up", 5),
    "transformer.h.5.mlp.c_proj.weight": ("down", 5),
    "transformer.h.5.ln_1.weight": ("norm", 5),
    "transformer.wte.weight": ("embedding", None),
    "transformer.wpe.weight": ("position", None),
    # GPT-NeoX, Pythia
    "gpt_neox.layers.1.attention.query_key_value.weight": ("qkv", 1),
    "gpt_neox.layers.1.attention.dense.weight": ("o", 1),
    "gpt_neox.layers.1.mlp.dense_h_to_4h.weight": ("up", 1),
    "gpt_neox.layers.1.mlp.dense_4h_to_h.weight": ("down", 1),
    "gpt_neox.embed_in.weight": ("embedding", None),
    "embed_out.weight": ("unembedding", None),
    # BERT
    "bert.encoder.layer.4.attention.self.query.weight": ("q", 4),
    "encoder.layer.4.attention.self.key.weight": ("k", 4),
    "encoder.layer.4.attention.self.value.weight": ("v", 4),
    "encoder.layer.4.attention.output.dense.weight": ("o", 4),
    "encoder.layer.4.attention.output.LayerNorm.weight": ("norm", 4),
    "encoder.layer.4.intermediate.dense.weight": ("up", 4),
    "encoder.layer.4.output.dense.weight": ("down", 4),
    "embeddings.word_embeddings.weight": ("embedding", None),
    "embeddings.position_embeddings.weight": ("position", None),
    "embeddings.token_type_embeddings.weight": ("position", None),
    # ViT
    "vit.encoder.layer.0.attention.attention.query.weight": ("q", 0),
    "blocks.7.attn.qkv.weight": ("qkv", 7),
    "blocks.7.attn.proj.weight": ("o", 7),
    "blocks.7.mlp.fc1.weight": ("up", 7),
    "blocks.7.mlp.fc2.weight": ("down", 7),
    "patch_embed.proj.weight": ("conv", None),
    "pos_embed": ("position", None),
    # GGUF
    "blk.9.attn_q.weight": ("q", 9),
    "blk.9.attn_output.weight": ("o", 9),
    "blk.9.ffn_gate.weight": ("gate", 9),
    "blk.9.ffn_down.weight": ("down", 9),
    "token_embd.weight": ("embedding", None),
    # anything else
    "head.something.weight": ("other", None),
}
# fmt: on


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    assert tuple(classify_name(name)) == NAMES[name]


def test_own_rules_come_first():
    rule = Rule(r"mixer\.in", "up")
    assert classify_name("layers.2.mixer.in.weight", [rule]) == ("up", 2)
    assert classify_name("layers.2.q_proj.weight", [Rule("q_proj", "mine")]).kind == "mine"
    with pytest.raises(ValueError, match="not a regular expression"):
        classify_name("x", [Rule("(", "up")])


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def parts(name, kind, w, config, chunk=3):
    """What the pieces take out of a matrix that comes a few rows at a time."""
    pieces = split_fused(name, kind, w.shape, config)
    return {
        piece.kind: torch.cat(
            [piece.of(w[start : start + chunk], start) for start in range(0, len(w), chunk)]
        )
        for piece in pieces
    }


def test_gpt2_is_split_by_columns():
    w = draw(8, 24)
    found = parts("h.0.attn.c_attn.weight", "qkv", w, {})
    for i, kind in enumerate("qkv"):
        assert torch.equal(found[kind], w[:, 8 * i : 8 * i + 8])


def test_neox_is_split_by_head():
    w = draw(24, 8)  # two heads of four
    found = parts("layers.0.attention.query_key_value.weight", "qkv", w, {"num_attention_heads": 2})
    heads_ = w.view(2, 3, 4, 8)
    for i, kind in enumerate("qkv"):
        assert torch.equal(found[kind], heads_[:, i].reshape(8, 8))


def test_neox_agrees_with_transformers():
    """Through the module itself: zero the rows we call values and the attention's output is 0."""
    from transformers import GPTNeoXConfig, GPTNeoXModel

    config = GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16,
        vocab_size=11, use_parallel_residual=False, attention_bias=False,
    )  # fmt: skip
    model = GPTNeoXModel(config).eval()
    layer = model.layers[0].attention
    name = "layers.0.attention.query_key_value.weight"
    pieces = split_fused(name, "qkv", (48, 16), config.to_dict())
    rows = {piece.kind: piece.rows for piece in pieces}
    seen = []
    layer.dense.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        layer.query_key_value.weight[rows["v"]] = 0
        model(torch.arange(5)[None])
    assert float(seen[0].abs().max()) == 0


def test_rows_in_order():
    w = draw(24, 8)
    for name in ("blocks.0.attn.qkv.weight", "layer.in_proj_weight"):
        found = parts(name, "qkv", w, None)
        assert torch.equal(torch.cat([found[kind] for kind in "qkv"]), w)
        assert len(found["k"]) == 8
    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2}
    found = parts("layers.0.attn.qkv_proj.weight", "qkv", draw(16, 8), grouped)
    assert [len(found[kind]) for kind in "qkv"] == [8, 4, 4]
    found = parts("mlp.gate_up_proj.weight", "gate_up", draw(10, 4), None)
    assert torch.equal(torch.cat([found["gate"], found["up"]]), draw(10, 4))


@pytest.mark.parametrize(
    ("name", "kind", "shape", "config"),
    [
        ("query_key_value", "qkv", (24, 8), None),
        ("query_key_value", "qkv", (24, 8), {"num_attention_heads": 5}),
        ("qkv_proj", "qkv", (17, 8), {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ("qkv", "qkv", (20, 8), None),
        ("gate_up_proj", "gate_up", (11, 8), None),
        ("q_proj", "q", (8, 8), None),
        ("qkv", "qkv", (24,), None),
    ],
)
def test_what_does_not_fit_stays_whole(name, kind, shape, config):
    assert split_fused(name, kind, shape, config) is None


def test_heads_of_a_configuration():
    assert heads({"num_attention_heads": 9, "num_key_value_heads": 3}) == (9, 3)
    assert heads({"n_head": 12}) == (12, 12)
    assert heads({"text_config": {"num_attention_heads": 8}}) == (8, 8)
    for odd in (None, {}, {"num_attention_heads": "9"}, {"num_attention_heads": True}):
        assert heads(odd) is None
    assert heads({"num_attention_heads": 9, "num_key_value_heads": 2}) is None


def test_what_is_a_matrix():
    assert is_matrix("q", (3, 3))
    assert is_matrix("conv", (3, 3, 3, 3))
    for kind, shape in (("q", (3,)), ("norm", (3, 3)), ("position", (3, 3)), ("q", (0, 3))):
        assert not is_matrix(kind, shape)

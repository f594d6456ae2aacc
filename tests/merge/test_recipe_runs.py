"""Recipes in mergekit's schema, carried out: the numbers are those that the recipe asks for."""

import plan_models_on_disk as disk
import pytest
import torch
from safetensors.torch import load_file

from stiefel.linalg import orthogonality_error
from stiefel.merge import dare, merge, orthomerge, slerp, ties

LAYERS = 3
NAMES = ("base", "a", "b")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """What the three models on disk hold."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        disk.write(tmp_path / name, seed=seed, layers=LAYERS)
    return {name: load_file(tmp_path / name / "model.safetensors") for name in NAMES}


def run(text, out="out"):
    with open("recipe.yaml", "w") as file:
        file.write(text)
    merge("recipe.yaml", out, threads=1)
    return load_file(f"{out}/model.safetensors")


def t_of(name):
    """Relative depth, by the definition."""
    return int(name.split(".")[2]) / (LAYERS - 1) if ".layers." in name else 0.0


def test_gradients_and_filters_of_a_mean(models):
    merged = run("""
models:
  - model: a
    parameters:
      weight:
        - filter: self_attn
          value: [0, 1]
        - value: 0.25
  - model: b
    parameters: {weight: [1, 0.5, 3]}
merge_method: linear
parameters: {normalize: false}
""")
    for name, value in merged.items():
        t = t_of(name)
        first = t if "self_attn" in name else 0.25
        second = 1 + (0.5 - 1) * 2 * t if t <= 0.5 else 0.5 + (3 - 0.5) * (2 * t - 1)
        expected = first * models["a"][name] + second * models["b"][name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_slerp_over_slices(models):
    merged = run("""
slices:
  - sources:
      - {model: a, layer_range: [0, 3]}
      - {model: b, layer_range: [0, 3]}
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 1]}
    - {filter: mlp, value: [1, 0]}
    - value: 0.5
""")
    assert sorted(merged) == sorted(models["a"])
    for name, value in merged.items():
        t = t_of(name) if "self_attn" in name else 1 - t_of(name) if "mlp" in name else 0.5
        expected = slerp(models["a"][name], models["b"][name], t)
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_methods_on_differences(models, method):
    merged = run(f"""
models:
  - model: base
  - model: a
    parameters: {{weight: [0, 1], density: 0.5}}
  - model: b
    parameters: {{weight: 0.4, density: 0.5}}
merge_method: {method}
base_model: base
parameters: {{lambda: 0.7, int8_mask: true}}
seed: 5
""")
    for name, value in merged.items():
        base, a, b = (models[x][name] for x in NAMES)
        weights = [t_of(name), 0.4]
        if method == "task_arithmetic":
            expected = base + 0.7 * (weights[0] * (a - base) + weights[1] * (b - base))
        elif method == "ties":
            expected = ties(base, [a, b], weights, density=0.5, scale=0.7)
        else:
            signs = "sum" if method == "dare_ties" else None
            expected = dare(
                base, [a, b], weights, density=0.5, scale=0.7, seed=5, name=name, consensus=signs
            )
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_orthomerge(models):
    merged = run("""
models: [{model: a}, {model: b}]
merge_method: orthomerge
base_model: base
parameters: {residual: ta, residual_scale: 0.25, map: log}
""")
    expected = orthomerge(
        models["base"],
        [models["a"], models["b"]],
        residual="ta",
        residual_scale=0.25,
        map="log",
    )
    for name, value in merged.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


def test_stacked_layers(models):
    merged = run("""
slices:
  - sources: [{model: base, layer_range: [0, 2]}]
  - sources:
      - model: a
        layer_range: [1, 3]
        parameters: {scale: [{filter: q_proj, value: 0.0}, {value: 1.0}]}
merge_method: passthrough
""")
    norm = "input_layernorm.weight"
    assert torch.equal(merged[f"model.layers.1.{norm}"], models["base"][f"model.layers.1.{norm}"])
    assert torch.equal(merged[f"model.layers.3.{norm}"], models["a"][f"model.layers.2.{norm}"])
    assert not merged["model.layers.2.self_attn.q_proj.weight"].any()
    assert torch.equal(merged["lm_head.weight"], models["a"]["lm_head.weight"])


def test_rows_are_the_tokens_they_were(models, tmp_path):
    """A model whose vocabulary is in another order merges with itself to itself."""
    words = [f"w{i}" for i in range(10)]
    order = torch.tensor([3, 0, 1, 2, 9, 8, 7, 6, 5, 4])
    disk.write_tokenizer("base", words)
    held = dict(models["base"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = torch.cat([held[name][order], torch.full((1, 8), 99.0)])
    settings = disk.config(vocab=11)
    disk.write("a", held, settings, tokens=[*(words[i] for i in order), "new"])
    merged = run("""
models: [{model: base, parameters: {weight: 1}}, {model: a, parameters: {weight: 2}}]
merge_method: linear
base_model: base
""")
    for name, value in merged.items():
        torch.testing.assert_close(value, models["base"][name])
    merged = run(
        """
models: [{model: base, parameters: {weight: 1}}, {model: a, parameters: {weight: 2}}]
merge_method: linear
base_model: base
tokenizer_source: a
""",
        "out2",
    )
    torch.testing.assert_close(merged["lm_head.weight"], held["lm_head.weight"])


def test_what_is_no_rotation_can_be_left_out(models):
    """λ = 0 keeps every singular value of the base."""
    merged = run("""
models: [{model: a}, {model: b}]
merge_method: orthomerge
base_model: base
parameters: {residual: ta, residual_scale: 0}
""")
    name = "model.layers.1.self_attn.q_proj.weight"
    rotation = torch.linalg.solve(models["base"][name].double(), merged[name].double())
    assert orthogonality_error(rotation)[0] < 1e-3

"""Plans: from headers alone, every mismatch of the models found and named."""

import json

import plan_models_on_disk as disk
import pytest
import torch
from plan_models_on_disk import LINEAR, STACK, TIES, by_name, plan, problems

from stiefel.merge.plan_models import cached_snapshot


@pytest.fixture
def folder(tmp_path):
    """base, a and b: the same architecture, other numbers."""
    for seed, name in enumerate(("base", "a", "b")):
        disk.write(tmp_path / name, seed=seed)
    return tmp_path


def test_every_tensor_of_the_base_is_a_task_in_its_order(folder):
    made = plan(folder)
    held = disk.tensors()
    assert sorted(by_name(made)) == sorted(held)
    task = by_name(made)["model.layers.1.mlp.up_proj.weight"]
    assert (task.method, task.shape, task.dtype) == ("ties", (12, 8), torch.float32)
    assert (task.base.model, [ref.model for ref in task.sources]) == ("base", ["a", "b"])
    assert [made.models[ref.checkpoint].name for ref in task.sources] == ["a", "b"]
    assert task.parameters == {"lambda": 1.0, "normalize": True}
    assert task.source_parameters == (
        {"weight": 0.5, "density": 0.2},
        {"weight": 0.5, "density": 1.0},
    )
    assert made.warnings == ()
    assert made.recipe_text == TIES
    # Nothing changes in the configuration: it is copied byte for byte.
    assert made.config == disk.config()
    assert made.files_to_copy["config.json"] == folder / "base" / "config.json"


def test_gradients_run_over_the_layers_and_filters_pick_tensors(folder):
    text = TIES.replace("weight: 0.5, density", "weight: [0, 1], density").replace(
        "{weight: 0.5}", "{weight: [{filter: mlp, value: 2}, {value: [4, 8]}]}"
    )
    tasks = by_name(plan(folder, text))
    found = {
        name: [own["weight"] for own in task.source_parameters] for name, task in tasks.items()
    }
    assert found["model.embed_tokens.weight"] == [0, 4]
    assert found["lm_head.weight"] == [0, 4]  # outside the layers t is 0, as in mergekit
    assert found["model.layers.0.mlp.up_proj.weight"] == [0, 2]
    assert found["model.layers.1.mlp.up_proj.weight"] == [0.5, 2]
    assert found["model.layers.1.self_attn.q_proj.weight"] == [0.5, 6]
    assert found["model.layers.2.input_layernorm.weight"] == [1, 8]


def test_keeping_nothing_is_giving_no_weight(folder):
    task = plan(folder, TIES.replace("0.2", "0")).tasks[0]
    assert task.source_parameters[0] == {"weight": 0.0, "density": 1.0}


def test_a_weight_that_no_rule_gives_is_missed(folder):
    text = TIES.replace("{weight: 0.5}", "{weight: {filter: mlp, value: 1}}")
    assert "ties needs weight; none is set for " in problems(folder, text)


def test_weights_that_cancel_are_found(folder):
    text = LINEAR.replace("weight: 3", "weight: -1")
    assert "sum to zero" in problems(folder, text)
    assert plan(folder, text + "parameters: {normalize: false}\n")


def test_the_base_beside_the_models_of_a_mean(folder):
    """Only names and shapes come from it, unless a weight for all is set: then mergekit's rule."""
    text = LINEAR.replace("model: base", "model: b") + "base_model: base\n"
    task = plan(folder, text).tasks[0]
    assert [ref.model for ref in task.sources] == ["b", "a"]
    assert task.base is None
    made = plan(folder, text + "parameters: {weight: 5}\n")
    assert [ref.model for ref in made.tasks[0].sources] == ["base", "b", "a"]
    assert [own["weight"] for own in made.tasks[0].source_parameters] == [5, 1, 3]
    assert "takes part in the mean" in made.warnings[0]


def test_slerp_goes_from_the_base(folder):
    text = "models: [{model: a}, {model: base}]\nmerge_method: slerp\nbase_model: base\n"
    text += "parameters: {t: [0, 1]}\n"
    tasks = by_name(plan(folder, text))
    task = tasks["model.layers.1.mlp.up_proj.weight"]
    assert (task.base.model, task.sources[0].model, task.parameters) == ("base", "a", {"t": 0.5})


def test_orthomerge_has_its_settings(folder):
    text = TIES.replace("ties", "orthomerge").replace(", density: 0.2", "")
    text += "parameters: {variant: C, residual: ta, residual_scale: 0.2}\n"
    task = plan(folder, text).tasks[0]
    assert task.parameters == {
        "variant": "C", "residual": "ta", "residual_scale": 0.2, "map": "cayley", "density": 0.2,
        "intensity": 1.0,
    }  # fmt: skip
    assert task.source_parameters == ({"weight": 0.5}, {"weight": 0.5})


def test_layers_are_stacked(folder):
    settings = disk.config(3, layer_types=["x", "y", "z"])
    disk.write(folder / "base", settings=settings)
    disk.write(folder / "a", settings={**settings, "layer_types": ["u", "v", "w"]})
    made = plan(folder, STACK)
    tasks = by_name(made)
    assert len(tasks) == 3 + 4 * 3
    origin = {name: (task.sources[0].model, task.sources[0].tensor) for name, task in tasks.items()}
    assert origin["model.embed_tokens.weight"] == ("base", "model.embed_tokens.weight")
    assert origin["lm_head.weight"] == ("a", "lm_head.weight")
    assert origin["model.layers.1.input_layernorm.weight"] == (
        "base", "model.layers.1.input_layernorm.weight",
    )  # fmt: skip
    assert origin["model.layers.2.input_layernorm.weight"] == (
        "a", "model.layers.1.input_layernorm.weight",
    )  # fmt: skip
    scaled = tasks["model.layers.3.mlp.up_proj.weight"]
    assert (scaled.method, scaled.source_parameters) == ("linear", ({"weight": 0.5},))
    assert tasks["model.layers.3.input_layernorm.weight"].method == "copy"
    assert {task.dtype for task in made.tasks} == {torch.bfloat16}
    assert made.config["num_hidden_layers"] == 4
    assert made.config["layer_types"] == ["x", "y", "v", "w"]
    assert made.config["torch_dtype"] == "bfloat16"
    assert "dtype" not in made.config
    assert list(made.config) == list(settings)


def test_a_slice_has_its_own_gradient(folder):
    text = """slices:
  - sources: [{model: base, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]
    parameters: {t: 0.25}
  - sources: [{model: base, layer_range: [0, 3]}, {model: a, layer_range: [0, 3]}]
merge_method: slerp
base_model: base
parameters: {t: [0, 1]}
"""
    tasks = by_name(plan(folder, text))
    ts = [tasks[f"model.layers.{i}.input_layernorm.weight"].parameters["t"] for i in range(4)]
    assert ts == [0.25, 0, 0.5, 1]
    assert tasks["model.embed_tokens.weight"].parameters["t"] == 0.25
    assert tasks["lm_head.weight"].parameters["t"] == 0


def test_filters_of_a_model_are_for_its_own_layers(folder):
    """As in mergekit: what is stacked as layer 0 is layer 1 of the model it comes from."""
    text = """slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - model: a
        layer_range: [1, 3]
        parameters: {weight: [{filter: layers.1., value: 5}, {value: 1}]}
merge_method: task_arithmetic
base_model: base
"""
    tasks = by_name(plan(folder, text))
    weights = {n: task.source_parameters[0]["weight"] for n, task in tasks.items()}
    assert weights["model.layers.0.mlp.up_proj.weight"] == 5
    assert weights["model.layers.1.mlp.up_proj.weight"] == 1
    assert weights["model.embed_tokens.weight"] == 1


def test_ranges_end_with_the_model(folder):
    text = problems(folder, STACK.replace("[1, 3]", "[2, 4]"))
    assert "layer_range [2, 4] reaches beyond the 3 layers of a" in text
    assert "line 4: slices[1].sources[0]" in text


def test_a_slice_of_differences_holds_its_base(folder):
    text = """slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 1}}
merge_method: task_arithmetic
base_model: base
"""
    assert "base must be one of the sources" in problems(folder, text)


# Models that do not fit.


def rewrite(folder, change, **of_tensors):
    held = disk.tensors(**of_tensors)
    change(held)
    disk.write(folder, held)


def test_missing_tensors(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder / "a", lambda held: held.pop(name))
    assert f"a: 1 tensors are missing: {name}. allow_missing: base" in problems(folder)
    made = plan(folder, TIES + "allow_missing: base\n")
    task = by_name(made)[name]
    assert task.sources[0] == task.base
    assert "missing in a: as in base" in task.note
    assert "1 tensors are missing" in made.warnings[0]


def test_extra_tensors(folder):
    rewrite(folder / "a", lambda held: held.update({"value_head.weight": torch.ones(1, 8)}))
    assert "a: 1 tensors have no place in the output: value_head.weight" in problems(folder)
    made = plan(folder, TIES + "allow_extra: drop\n")
    assert "value_head.weight" not in by_name(made)
    assert "allow_extra: drop" in made.warnings[0]


def test_old_buffers_are_left_out(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder / "a", lambda held: held.update({name: torch.ones(4)}))
    made = plan(folder)
    assert "old buffer" in made.warnings[0]
    rewrite(folder / "base", lambda held: held.update({name: torch.ones(4)}))
    task = by_name(plan(folder))[name]
    assert [ref.model for ref in task.sources] == ["a", "base"]


def test_wrong_shapes(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder / "a", lambda held: held.update({name: torch.ones(12, 9)}))
    assert f"a: 1 tensors have another shape: {name} [12, 9] instead of [12, 8]" in problems(folder)
    task = by_name(plan(folder, TIES + "allow_shape: base\n"))[name]
    assert task.sources[0] == task.base


def test_integer_buffers_come_from_the_base(folder):
    for name in ("base", "a", "b"):
        rewrite(folder / name, lambda held: held.update({"model.steps": torch.arange(3)}))
    made = plan(folder, TIES + "dtype: bfloat16\n")
    task = by_name(made)["model.steps"]
    assert (task.method, task.dtype, task.base) == ("copy", torch.int64, None)
    assert task.sources[0].model == "base"
    assert "not floating point and are copied from base" in made.warnings[0]


def test_integers_where_the_base_has_numbers(folder):
    rewrite(folder / "a", lambda held: held.update({"model.norm.weight": torch.arange(8)}))
    assert "a: not floating point, but the base's are: model.norm.weight" in problems(folder)


def test_names_with_and_without_their_first_word(folder):
    disk.write(folder / "a", disk.tensors(1, prefix=""))
    task = by_name(plan(folder))["model.layers.1.mlp.up_proj.weight"]
    assert task.sources[0].tensor == "layers.1.mlp.up_proj.weight"
    disk.write(folder / "base", disk.tensors(1, prefix=""))
    task = by_name(plan(folder))["layers.1.mlp.up_proj.weight"]
    assert task.sources[1].tensor == "model.layers.1.mlp.up_proj.weight"


def test_layer_counts(folder):
    disk.write(folder / "a", layers=4)
    assert "a: has 4 layers, base has 3" in problems(folder)
    disk.write(folder / "a", settings=disk.config(4, model_type="gpt2"), layers=4)
    assert "a: has 4 layers of gpt2, base has 3 of llama" in problems(folder)
    disk.write(folder / "a", layers=4, settings=disk.config(5))
    assert "its configuration says 5 layers, its tensors make 4" in problems(folder)


def test_architectures_that_mean_other_things(folder):
    disk.write(folder / "a", settings=disk.config(num_attention_heads=4))
    assert "num_attention_heads is 4, of base 2" in problems(folder)
    disk.write(folder / "a", settings=disk.config(rope_theta=1e6))
    disk.write(folder / "base", settings=disk.config(rope_theta=1e4))
    assert "a: rope_theta is 1000000.0, of base 10000.0" in plan(folder).warnings[0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: disk.write(f, settings=disk.config(quantization_config={"quant_method": "gptq"})),
        lambda f: disk.write(f, {"model.layers.0.q.qweight": torch.ones(2, dtype=torch.int32)}),
        lambda f: disk.write(f, {"model.w": torch.ones(2).to(torch.float8_e4m3fn)}),
    ],
)
def test_quantised_weights_are_refused(folder, spoil):
    spoil(folder / "a")
    text = problems(folder)
    assert "line 2: a: its weights are quantised: " in text
    assert "gptq" in text.lower() or "float8_e4m3fn" in text


def test_models_that_are_not_there(folder):
    text = problems(folder, TIES.replace("model: a,", "model: aa,").replace("el: b,", "el: o/b,"))
    assert "line 2: aa: no model at " in text
    assert "line 3: o/b: no model at " in text
    assert "no model at" in problems(folder, TIES.replace("model: a,", "model: ~nobody-here/a,"))
    assert "(there is base)" in problems(folder, TIES.replace("model: b,", "model: bas,"))


def test_pickles_and_escapes_are_refused(folder):
    (folder / "a" / "model.safetensors").unlink()
    (folder / "a" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "pickle" in problems(folder)
    index = {"weight_map": {"x": "../base/model.safetensors"}}
    (folder / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "only files in the same folder" in problems(folder)


def test_all_problems_of_all_models_come_at_once(folder):
    rewrite(folder / "a", lambda held: held.pop("model.norm.weight"))
    rewrite(folder / "b", lambda held: held.update({"x": torch.ones(1)}))
    text = problems(folder)
    assert "model.norm.weight" in text
    assert "no place in the output: x" in text


def test_models_in_the_cache_of_the_hub(folder, monkeypatch):
    cache = folder / "cache"
    snapshot = cache / "models--owner--tune" / "snapshots" / "abc"
    disk.write(snapshot, seed=4)
    (cache / "models--owner--tune" / "refs").mkdir()
    (cache / "models--owner--tune" / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    made = plan(folder, TIES.replace("model: a,", "model: owner/tune,"))
    assert made.models[1].path == snapshot
    assert cached_snapshot("owner/tune", "abc") == snapshot
    for name, revision in (("owner/tune", "x"), ("owner/..", None), ("owner/tune", "../refs")):
        assert cached_snapshot(name, revision) is None
    made = problems(folder, TIES.replace("model: a,", "model: a@main,"))
    assert "@main is for models of the hub" in made

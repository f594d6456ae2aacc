"""Recipes of adapters: onto a base, or into one adapter."""

import json

import plan_models_on_disk as disk
import pytest
import torch
from safetensors.torch import load_file, save_file

from stiefel.merge.engine import merge
from stiefel.merge.plan import build_plan
from stiefel.merge.plan_adapters import build_adapter_plan, run_adapter_plan
from stiefel.merge.plan_report import adapter_json, adapter_lines, estimate_adapters
from stiefel.merge.recipe import parse_recipe
from stiefel.merge.recipe_errors import PlanError

MODULE = "model.layers.1.self_attn.q_proj"
LORA = """models:
  - {adapter: x, parameters: {weight: 1}}
  - {adapter: y, parameters: {weight: 3}}
merge_method: linear
"""
OFT = "models:\n  - adapter: x\n  - {adapter: y, parameters: {weight: 3}}\n"
OFT += "merge_method: orthomerge_oft\nparameters: {intensity: 0.5}\n"


def lora(folder, seed, rank=2, module=MODULE, width=8, **settings):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, width), (8, rank)))
    folder.mkdir(exist_ok=True)
    key = f"base_model.model.{module}"
    save_file(
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    content = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"],
        "base_model_name_or_path": "base", "peft_version": "0.21.2", **settings,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return 2 * b @ a


def oft(folder, seed, block=4, width=8, **settings):
    generator = torch.Generator().manual_seed(seed)
    v = 0.1 * torch.randn(width // block, block * (block - 1) // 2, generator=generator)
    folder.mkdir(exist_ok=True)
    key = f"base_model.model.{MODULE}.oft_R.weight"
    save_file({key: v}, folder / "adapter_model.safetensors")
    content = {
        "peft_type": "OFT", "oft_block_size": block, "r": 0, "target_modules": ["q_proj"],
        "block_share": False, "coft": False, "use_cayley_neumann": False,
        "base_model_name_or_path": "base", "peft_version": "0.21.2", **settings,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return v


@pytest.fixture
def folder(tmp_path):
    disk.write(tmp_path / "base", seed=0)
    return tmp_path


def plan(folder, text, **more):
    return build_adapter_plan(parse_recipe(text), folder, **more)


def problems(folder, text, **more):
    with pytest.raises(PlanError) as caught:
        plan(folder, text, **more)
    return str(caught.value)


def merged_update(folder):
    found = load_file(folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    a, b = (found[f"base_model.model.{MODULE}.lora_{x}.weight"] for x in "AB")
    return settings["lora_alpha"] / settings["r"] * b @ a


def test_adapters_on_a_base_are_models(folder):
    x, y = lora(folder / "x", 1), lora(folder / "y", 2, rank=3)
    text = LORA.replace("linear", "task_arithmetic") + "base_model: base\n"
    made = build_plan(parse_recipe(text), folder)
    assert [(m.name, m.adapter and m.adapter.name) for m in made.models] == [
        ("base", None), ("x", "x"), ("y", "y"),
    ]  # fmt: skip
    merge(made, folder / "out", threads=1)
    found = load_file(folder / "out" / "model.safetensors")[f"{MODULE}.weight"]
    base = disk.tensors(0)[f"{MODULE}.weight"]
    torch.testing.assert_close(found, base + x + 3 * y, atol=1e-5, rtol=1e-5)


def test_a_model_with_an_adapter(folder):
    x = lora(folder / "x", 1)
    text = "models: [{model: base+x, parameters: {weight: 1}}]\nmerge_method: linear\n"
    merge(build_plan(parse_recipe(text), folder), folder / "out", threads=1)
    found = load_file(folder / "out" / "model.safetensors")[f"{MODULE}.weight"]
    torch.testing.assert_close(found, disk.tensors(0)[f"{MODULE}.weight"] + x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("method", "more", "factors"),
    [
        ("linear", "", (0.25, 0.75)),
        ("linear", "parameters: {normalize: false}\n", (1, 3)),
        ("task_arithmetic", "parameters: {lambda: 0.5}\n", (0.5, 1.5)),
        ("task_arithmetic", "parameters: {lambda: 2, normalize: true}\n", (0.5, 1.5)),
    ],
)
def test_low_rank_adapters_alone_become_one(folder, method, more, factors):
    x, y = lora(folder / "x", 1), lora(folder / "y", 2, rank=3)
    made = plan(folder, LORA.replace("linear", method) + more)
    assert (made.kind, made.modules) == ("LORA", 1)
    assert made.weights == pytest.approx(factors)
    result = run_adapter_plan(made, folder / "out")
    assert list(result.modules) == [MODULE]
    expected = factors[0] * x + factors[1] * y
    torch.testing.assert_close(merged_update(folder / "out"), expected, atol=1e-5, rtol=1e-5)


def test_ties_of_low_rank_adapters(folder):
    for number, name in enumerate("xy"):
        lora(folder / name, number)
    text = LORA.replace("linear", "ties").replace("weight: 1", "weight: 1, density: 0.5")
    assert "must be one number above 0 for all adapters" in problems(folder, text)
    made = plan(folder, text.replace("weight: 3", "weight: 3, density: 0.5"))
    assert (made.density, made.weights) == (0.5, (1, 3))
    assert run_adapter_plan(made, folder / "out").modules[MODULE]["rank"] == 4
    text = LORA.replace("linear", "ties") + "parameters: {normalize: false}\n"
    assert "name the base_model for false" in problems(folder, text)


def test_what_adapters_will_take(folder):
    lora(folder / "x", 1)
    lora(folder / "y", 2)
    made = plan(folder, LORA)
    assert made.dense == ()
    memory, seconds = estimate_adapters(made)
    dense = plan(folder, LORA.replace("linear", "ties") + "parameters: {density: 0.5}\n")
    assert dense.dense == (64,)
    more, longer = estimate_adapters(dense)
    assert more - memory == 4 * 64 * 5
    assert longer - seconds == pytest.approx(2 * 64 * 2e-8)
    words = [word for word, _ in adapter_lines(dense)]
    assert words == ["read", "read", "merge", "write", "memory", "time"]
    assert adapter_json(dense)["peak_bytes"] == more


def test_rotations_become_one(folder):
    x, y = oft(folder / "x", 1), oft(folder / "y", 2)
    made = plan(folder, OFT)
    assert (made.kind, made.weights, made.intensity) == ("OFT", (1, 3), 0.5)
    result = run_adapter_plan(made, folder / "out")
    (found,) = load_file(folder / "out" / "adapter_model.safetensors").values()
    total = x + 3 * y
    length = (x.norm() + 3 * y.norm()) / 4
    torch.testing.assert_close(found, 0.5 * length * total / total.norm(), atol=1e-6, rtol=1e-5)
    assert result.modules[MODULE]["correction"] == pytest.approx(
        float(length / (total.norm() / 4)), rel=1e-5
    )


def test_the_base_of_rotations_has_no_effect(folder):
    for number, name in enumerate("xy"):
        oft(folder / name, number)
    made = plan(folder, OFT + "base_model: base\n")
    assert "base_model has no effect" in made.warnings[0]


def test_kinds_and_blocks_agree(folder):
    oft(folder / "x", 1)
    lora(folder / "y", 2)
    assert "y: is an LORA adapter; orthomerge_oft merges OFT adapters" in problems(folder, OFT)
    assert "orthomerge_oft merges OFT adapters" in problems(folder, LORA)
    oft(folder / "y", 2, block=2)
    assert "y: has oft_block_size 2, x has 4" in problems(folder, OFT)


def test_layers_of_other_widths_are_found_from_headers(folder):
    lora(folder / "x", 1)
    lora(folder / "y", 2, width=12)
    text = f"line 3: y: {MODULE} has shape [8, 12], in x [8, 8]"
    assert text in problems(folder, LORA)
    oft(folder / "x", 1)
    oft(folder / "y", 2, width=12)
    assert f"y: {MODULE} has shape [3, 6], in x [2, 6]" in problems(folder, OFT)


def test_settings_are_one_number_for_an_adapter(folder):
    for number, name in enumerate("xy"):
        lora(folder / name, number)
    assert "one number for an adapter" in problems(folder, LORA.replace("3", "[0, 3]"))
    filtered = LORA.replace("weight: 3", "weight: {filter: mlp, value: 1}")
    assert "one number for an adapter" in problems(folder, filtered)
    assert "linear needs weight" in problems(folder, LORA.replace("weight: 3", ""))
    assert "sum to zero" in problems(folder, LORA.replace("3", "-1"))
    for number, name in enumerate("xy"):
        oft(folder / name, number)
    text = OFT.replace("adapter: x", "{adapter: x, parameters: {weight: 0}}")
    assert "weights are all zero" in problems(folder, text.replace("3", "0"))


def test_adapters_of_other_modules_and_bases(folder):
    lora(folder / "x", 1)
    lora(folder / "y", 2, base_model_name_or_path="other")
    assert "different base models: base, other" in plan(folder, LORA).warnings[0]
    lora(folder / "y", 2, module="model.layers.9.self_attn.q_proj")
    text = LORA.replace("linear", "task_arithmetic") + "base_model: base\n"
    with pytest.raises(PlanError, match=r"layers\.9\.self_attn\.q_proj"):
        build_plan(parse_recipe(text), folder)


def test_places(folder):
    lora(folder / "x", 1)
    assert "y: no adapter at " in problems(folder, LORA)
    lora(folder / "y", 1)
    assert "would replace the input" in problems(folder, LORA, out=folder / "x")
    with pytest.raises(PlanError, match="write base\\+adapter"):
        build_plan(
            parse_recipe("models: [{model: x, parameters: {weight: 1}}]\nmerge_method: linear\n"),
            folder,
        )
    with pytest.raises(PlanError, match="build_adapter_plan"):
        build_plan(parse_recipe(LORA), folder)
    with pytest.raises(PlanError, match="build_plan"):
        build_adapter_plan(
            parse_recipe(
                "models: [{model: base, parameters: {weight: 1}}]\nmerge_method: linear\n"
            ),
            folder,
        )

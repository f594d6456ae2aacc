"""Checkpoints that transformers and PEFT wrote, merged by recipe, loaded there, logits compared."""

import json
import warnings

import pytest
import torch
from engine_models import contents, load

from stiefel.checkpoint import Checkpoint, CheckpointError
from stiefel.merge import dare, linear, merge, orthomerge, slerp, task_arithmetic, ties

transformers = pytest.importorskip("transformers")
pytest.importorskip("pydantic")
pytest.importorskip("yaml")

TOKENS = torch.arange(12).reshape(2, 6) * 5 % 64


def tiny(kind, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).to(dtype).eval()
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


def make(kind, folder, dtype=torch.float32):
    """A base and two fine-tunes of it, saved; returns their folders."""
    base = tiny(kind, 0, dtype)
    folders = []
    for seed, name in enumerate(("base", "math", "code")):
        model = tiny(kind, 0, dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter, start in zip(model.parameters(), base.parameters(), strict=True):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(start + (0.05 * noise if seed else 0.0))
        model.save_pretrained(folder / name, max_shard_size="4KB" if name == "code" else "1GB")
        folders.append(folder / name)
    return folders


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, [load(path) for path in make(request.param, folder)]


RECIPES = {
    "linear": "",
    "slerp": "parameters: {t: 0.3}",
    "task_arithmetic": "parameters: {lambda: 0.7}",
    "ties": "parameters: {density: 0.4, lambda: 0.7}",
    "dare_linear": "parameters: {density: 0.4}\nseed: 5",
    "dare_ties": "parameters: {density: 0.4}\nseed: 5",
    "orthomerge": "parameters: {residual: ta}",
}
WEIGHTS = [0.4, 0.9]


def recipe(method, folder, dtype="float32"):
    text = f"merge_method: {method}\ndtype: {dtype}\n{RECIPES[method]}\nmodels:\n"
    if method == "slerp":
        text += "  - model: base\n  - model: math\n"
    else:
        for name, weight in zip(("math", "code"), WEIGHTS, strict=True):
            text += f"  - model: {name}\n    parameters: {{weight: {weight}}}\n"
    if method != "linear":
        text += "base_model: base\n"
    file = folder / f"{method}-{dtype}.yaml"
    file.write_text(text)
    return file


def formula(method, base, experts, kind):
    if method == "linear":
        return linear(experts, WEIGHTS)
    if method == "slerp":
        return slerp(base, experts[0], 0.3)
    if method == "task_arithmetic":
        return task_arithmetic(base, experts, WEIGHTS, scale=0.7)
    if method == "ties":
        return ties(base, experts, WEIGHTS, density=0.4, scale=0.7)
    if method.startswith("dare"):
        consensus = "sum" if method == "dare_ties" else None
        return dare(base, experts, WEIGHTS, density=0.4, seed=5, consensus=consensus)
    # GPT-2 stores these as [in, out]; the rotation is of the input side.
    over = [n for n in base if kind == "gpt2" and ".c_" in n and n.endswith("weight")]
    turned = [{n: x.T if n in over else x for n, x in m.items()} for m in (base, *experts)]
    merged = orthomerge(turned[0], turned[1:], residual="ta", weights=WEIGHTS)
    return {n: x.T if n in over else x for n, x in merged.items()}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def loaded(folder):
    """The model, which takes every tensor of the folder and lacks none."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("method", RECIPES)
def test_logits_are_those_of_the_formula(family, method, tmp_path):
    kind, folder, (base, *experts) = family
    merge(recipe(method, folder), tmp_path / "out")
    wanted = tiny(kind, 0)
    state = formula(method, base, experts, kind)
    assert not wanted.load_state_dict(state, strict=False).unexpected_keys
    wanted.tie_weights()
    model = loaded(tmp_path / "out")
    assert torch.equal(logits(model), logits(wanted))
    assert not torch.allclose(logits(model), logits(tiny(kind, 0)))


def test_bfloat16_output(family, tmp_path):
    _, folder, (base, *experts) = family
    merge(recipe("ties", folder, "bfloat16"), tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    wanted = ties(base, experts, WEIGHTS, density=0.4, scale=0.7)
    result = load(tmp_path / "out")
    assert all(torch.equal(result[name], wanted[name].bfloat16()) for name in wanted)


def test_what_the_report_tells_of_rotations(family, tmp_path):
    _, folder, _ = family
    report = merge(recipe("orthomerge", folder), tmp_path / "out")
    turned = [entry for entry in report.tensors.values() if "rotations" in entry]
    assert len(turned) >= 8
    # Independent changes: their plain mean is too short.
    assert all(entry["correction"] > 1 for entry in turned)
    assert all(len(entry["residuals"]) == 2 for entry in report.tensors.values())


def test_shards_of_the_output(family, tmp_path):
    _, folder, _ = family
    merge(recipe("linear", folder), tmp_path / "one")
    merge(recipe("linear", folder), tmp_path / "many", shard_bytes=6000)
    assert len([name for name in contents(tmp_path / "many") if "-of-" in name]) > 2
    assert torch.equal(logits(loaded(tmp_path / "one")), logits(loaded(tmp_path / "many")))


@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_adapters_are_folded_in(kind, tmp_path):
    """base+adapter in a recipe is PEFT's merged model."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "down_proj"]
    config = (
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
        if kind == "lora"
        else peft.OFTConfig(oft_block_size=4, r=0, target_modules=targets, task_type="CAUSAL_LM")
    )
    folders = make("llama", tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = []
        for seed in (1, 2):
            model = peft.get_peft_model(loaded(folders[0]), config)
            torch.manual_seed(seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name or "oft_" in name:
                        parameter.normal_(0, 0.1)
            model.save_pretrained(tmp_path / f"a{seed}")
            merged.append(model.merge_and_unload().state_dict())
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "merge_method: task_arithmetic\nbase_model: m/base\nmodels:\n"
        "  - {model: m/base+a1, parameters: {weight: 0.5}}\n"
        "  - {model: m/base+a2, parameters: {weight: 1.0}}\n"
    )
    report = merge(file, tmp_path / "out", threads=2)
    base = load(folders[0])
    wanted = tiny("llama", 0)
    wanted.load_state_dict(task_arithmetic(base, [
        {name: model[name] for name in base} for model in merged
    ], [0.5, 1.0]))  # fmt: skip
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(wanted))
    assert any("adapter_model.safetensors" in entry["files"] for entry in report.inputs)


def test_adapters_alone_make_an_adapter(tmp_path):
    """Their exact sum, which PEFT loads."""
    peft = pytest.importorskip("peft")
    folders = make("llama", tmp_path / "m")
    for seed in (1, 2):
        config = peft.LoraConfig(r=2 + seed, target_modules=["q_proj"], task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(loaded(folders[0]), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.1)
        model.save_pretrained(tmp_path / f"a{seed}")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "merge_method: task_arithmetic\nmodels:\n"
        "  - {adapter: a1, parameters: {weight: 0.5}}\n"
        "  - {adapter: a2, parameters: {weight: 2.0}}\n"
    )
    report = merge(file, tmp_path / "out")
    assert len(report.tensors) == 2
    assert len(report.inputs[1]["files"]["adapter_model.safetensors"]) == 64
    weight = "base_model.model.model.layers.1.self_attn.q_proj.weight"

    def update(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = peft.PeftModel.from_pretrained(loaded(folders[0]), folder).merge_and_unload()
        name = weight.removeprefix("base_model.model.")
        return merged.state_dict()[name] - loaded(folders[0]).state_dict()[name]

    one, two, both = (update(tmp_path / name) for name in ("a1", "a2", "out"))
    torch.testing.assert_close(both, 0.5 * one + 2 * two, atol=1e-6, rtol=1e-4)
    # The report comes along, twice the same, and what a merge wrote is replaced.
    first = {entry.name: entry.read_bytes() for entry in (tmp_path / "out").iterdir()}
    assert sorted(first) == report.content["output"]["files"]
    assert json.loads(first["merge.json"]) == json.loads(json.dumps(report.content))
    assert first["stiefel_merge.yaml"].decode().endswith(file.read_text())
    merge(file, tmp_path / "out")
    assert {e.name: e.read_bytes() for e in (tmp_path / "out").iterdir()} == first
    assert sorted(e.name for e in tmp_path.iterdir()) == ["a1", "a2", "m", "out", "recipe.yaml"]
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(CheckpointError, match="holds files that no merge wrote"):
        merge(file, tmp_path / "out")


def test_resume_of_what_is_finished(family, tmp_path):
    _, folder, _ = family
    file = recipe("ties", folder)
    first = merge(file, tmp_path / "out")
    before = contents(tmp_path / "out")
    again = merge(file, tmp_path / "out", resume=True)
    assert again.resumed == len(first.tensors)
    assert again.content["tensors"].keys() == first.content["tensors"].keys()
    other = merge(recipe("linear", folder), tmp_path / "out", resume=True)
    assert other.resumed == 0
    assert contents(tmp_path / "out") != before


def test_tokenizer_and_generation_files_come_along(tmp_path):
    folders = make("gpt2", tmp_path)
    (folders[0] / "tokenizer_config.json").write_text("{}")
    merge(recipe("linear", tmp_path), tmp_path / "out")
    written = contents(tmp_path / "out")
    assert "generation_config.json" in written
    with Checkpoint(tmp_path / "out") as result, Checkpoint(folders[1]) as source:
        assert list(result.tensors) == list(source.tensors)
        assert result.config["n_embd"] == 16

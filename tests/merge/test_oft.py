import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stiefel.linalg import cayley
from stiefel.merge import Adapter, CancellationWarning, fold_oft, merge_oft_adapters
from stiefel.merge.adapter_rotation import skew_blocks
from stiefel.merge.lie_average import merge_coordinates

peft = pytest.importorskip("peft")

SIZE = 4


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) / 3

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()))


def tuned(path, seed, **options):
    """An OFT adapter as PEFT writes it, with random numbers; returns the adapted model."""
    chosen = {"target_modules": ["first", "second"], "use_cayley_neumann": False, **options}
    config = peft.OFTConfig(oft_block_size=SIZE, r=0, **chosen)
    model = peft.get_peft_model(Small(), config)
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "oft_R" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=g)
        elif "modules_to_save" in name:
            p.data = p.data + seed
    model.save_pretrained(str(path))
    return model.eval()


def triangles(path):
    return {
        key: value for key, value in load_file(path / "adapter_model.safetensors").items()
        if "oft_R" in key
    }  # fmt: skip


@pytest.mark.parametrize("terms", [None, 2, 3, 5, 7])
@pytest.mark.parametrize("share", [False, True])
def test_folding_agrees_with_peft(tmp_path, terms, share):
    options = {"use_cayley_neumann": terms is not None, "block_share": share}
    if terms is not None:
        options["num_cayley_neumann_terms"] = terms
    model = tuned(tmp_path, 1, **options)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(x)
    folded = Small()
    for name in ("first", "second"):
        stored = triangles(tmp_path)[f"base_model.model.{name}.oft_R.weight"]
        layer = getattr(folded, name)
        layer.weight.data = fold_oft(layer.weight.data, stored, neumann_terms=terms)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)
        merged = model.merge_and_unload()
    torch.testing.assert_close(folded.first.weight, merged.first.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_folding_equals_the_dense_product(dtype):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 12, generator=g, dtype=torch.float64)
    stored = 0.3 * torch.randn(3, 6, generator=g, dtype=torch.float64)
    dense = torch.block_diag(*cayley(skew_blocks(stored)))
    expected = weight @ dense  # the paper's own convention
    got = fold_oft(weight.to(dtype), stored.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype), rtol=2e-2 if dtype.itemsize == 2 else 1e-5,
                               atol=3e-2 if dtype.itemsize == 2 else 1e-5)  # fmt: skip
    if dtype == torch.float64:
        torch.testing.assert_close(torch.linalg.svdvals(got), torch.linalg.svdvals(weight))
        leaves = [weight.requires_grad_(), stored.requires_grad_()]
        assert torch.autograd.gradcheck(fold_oft, leaves)


def test_the_series_turns_the_other_way():
    g = torch.Generator().manual_seed(0)
    weight, stored = torch.randn(6, 8, generator=g), 0.02 * torch.randn(2, 6, generator=g)
    exact = fold_oft(weight, -stored)
    torch.testing.assert_close(fold_oft(weight, stored, neumann_terms=7), exact, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="do not fill"):
        fold_oft(weight, stored[:1].repeat(3, 1))


def test_merged_adapters_are_the_formula_and_load_in_peft(tmp_path):
    models = {seed: tuned(tmp_path / str(seed), seed) for seed in (1, 2, 3)}
    paths = [tmp_path / str(seed) for seed in models]
    weights = [1.0, 2.0, 0.5]
    corrections = merge_oft_adapters(paths, tmp_path / "out", weights=weights)
    stored = [triangles(p) for p in paths]
    merged = triangles(tmp_path / "out")
    for key, value in merged.items():
        expected = merge_coordinates([s[key] for s in stored], weights)
        torch.testing.assert_close(value, expected)
        plain = merge_coordinates([s[key] for s in stored], weights, correct=False)
        module = key.removeprefix("base_model.model.").removesuffix(".oft_R.weight")
        assert corrections[module] == pytest.approx(float(expected.norm() / plain.norm()), rel=1e-5)
    loaded = peft.PeftModel.from_pretrained(Small(), str(tmp_path / "out")).eval()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    folded = Small()
    for name in ("first", "second"):
        layer, key = getattr(folded, name), f"base_model.model.{name}.oft_R.weight"
        layer.weight.data = fold_oft(layer.weight.data, merged[key])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), folded(x), rtol=1e-5, atol=1e-5)
    # What a checkpoint merge does with the same folder.
    adapter = Adapter(tmp_path / "out")
    torch.testing.assert_close(
        adapter.fold("first.weight", Small().first.weight.data), folded.first.weight.data
    )
    settings = [json.loads((p / "adapter_config.json").read_text()) for p in paths[:1]]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == settings[0]


def test_one_adapter_and_copies_are_given_back(tmp_path):
    tuned(tmp_path / "a", 1)
    for count in (1, 3):
        merge_oft_adapters([tmp_path / "a"] * count, tmp_path / "out", overwrite=True)
        for key, value in triangles(tmp_path / "a").items():
            torch.testing.assert_close(triangles(tmp_path / "out")[key], value)
    with pytest.raises(FileExistsError, match="exists"):
        merge_oft_adapters([tmp_path / "a"], tmp_path / "out")
    double = merge_oft_adapters([tmp_path / "a"], tmp_path / "two", intensity=2)
    assert set(double.values()) == {1.0}
    for key, value in triangles(tmp_path / "a").items():
        torch.testing.assert_close(triangles(tmp_path / "two")[key], 2 * value)


def test_modules_and_heads_that_some_lack(tmp_path):
    tuned(tmp_path / "a", 1, target_modules=["first"], modules_to_save=["head"])
    tuned(tmp_path / "b", 2, target_modules=["first", "second"])
    merge_oft_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    a, b, out = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "b", "out"))
    second = "base_model.model.second.oft_R.weight"
    torch.testing.assert_close(out[second], b[second] / 2)  # one of two did not turn it
    heads = [k for k in a if "head" in k]
    assert heads
    assert all(torch.equal(out[k], a[k]) for k in heads)  # in one only: copied
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["first", "second"]
    assert config["modules_to_save"] == ["head"]
    peft.PeftModel.from_pretrained(Small(), str(tmp_path / "out"))
    tuned(tmp_path / "c", 3, modules_to_save=["head"])
    merge_oft_adapters(
        [tmp_path / "a", tmp_path / "c"], tmp_path / "out", weights=[1, 3], overwrite=True
    )
    c, out = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("c", "out"))
    for key in heads:
        torch.testing.assert_close(out[key], (a[key] + 3 * c[key]) / 4)


def test_conventions_are_brought_together(tmp_path):
    tuned(tmp_path / "a", 1)
    tuned(tmp_path / "b", 1, use_cayley_neumann=True)  # the same numbers turn the other way
    together = pytest.warns(UserWarning, match="brought to the convention")
    with together, pytest.warns(CancellationWarning):
        merge_oft_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not any(v.any() for v in triangles(tmp_path / "out").values())


def test_bounded_adapters_are_bounded_before(tmp_path):
    tuned(tmp_path / "a", 1, coft=True, eps=0.1)
    merge_oft_adapters([tmp_path / "a"], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["coft"] is False
    base = Small().first.weight.data
    torch.testing.assert_close(
        Adapter(tmp_path / "out").fold("first.weight", base),
        Adapter(tmp_path / "a").fold("first.weight", base),
    )


def rewrite(path, change):
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_what_does_not_fit_is_named(tmp_path):
    tuned(tmp_path / "a", 1)
    tuned(tmp_path / "b", 2)
    key = "base_model.model.first.oft_R.weight"
    with pytest.raises(ValueError, match="paths must not be empty"):
        merge_oft_adapters([], tmp_path / "out")
    with pytest.raises(ValueError, match="weights must have one entry"):
        merge_oft_adapters([tmp_path / "a"], tmp_path / "out", weights=[1, 2])

    def pair(change):
        tuned(tmp_path / "b", 2)
        rewrite(tmp_path / "b", change)
        return [tmp_path / "a", tmp_path / "b"]

    with pytest.raises(ValueError, match=r"first: blocks of .* only equal block sizes"):
        merge_oft_adapters(pair(lambda t: t.update({key: torch.zeros(1, 28)})), tmp_path / "out")
    with pytest.raises(ValueError, match="NaN or infinite"):
        merge_oft_adapters(pair(lambda t: t[key].fill_(torch.nan)), tmp_path / "out")
    tuned(tmp_path / "b", 2, block_share=True)
    with pytest.raises(ValueError, match=r"block_share is True in .*, but False"):
        merge_oft_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    model = peft.get_peft_model(Small(), peft.LoraConfig(r=2, target_modules=["first"]))
    model.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(TypeError, match="is a LORA adapter, not OFT"):
        merge_oft_adapters([tmp_path / "a", tmp_path / "lora"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tuned(tmp_path / "b", 2)
    file = tmp_path / "b" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "another"}))
    with pytest.warns(UserWarning, match="was made for 'another'"):
        merge_oft_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "out")

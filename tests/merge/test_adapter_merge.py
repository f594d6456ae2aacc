"""Merged adapters against the updates they should hold, through PEFT's own loading."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from stiefel.merge import Adapter, LowRank, merge_lora_adapters, ties
from stiefel.merge.adapter_factors import concatenate, factorize, reduce_rank
from stiefel.merge.adapter_files import rank_settings

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """Names of which one is the end of another, and every kind of layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(12, 10)
        self.inner = nn.ModuleDict({"q": nn.Linear(12, 9)})
        self.emb = nn.Embedding(13, 12)
        self.conv = nn.Conv2d(3, 5, 2)
        self.head = nn.Linear(9, 2)

    def forward(self, ids, image):
        x = self.emb(ids)
        return self.q(x), self.head(self.inner["q"](x)), self.conv(image)


def make(folder, seed, **settings):
    """A LoRA with random numbers in ``folder``; returns it as PEFT merges it: name → ΔW."""
    settings = {"r": 2, "target_modules": ["q", "emb", "conv"]} | settings
    base = {k: v.clone() for k, v in Net().state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = peft.get_peft_model(Net(), peft.LoraConfig(**settings))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(0.5 * torch.randn(p.shape, generator=generator))
        model.save_pretrained(str(folder))
        merged = model.merge_and_unload().state_dict()
    return {k: merged[k] - base[k] for k in base}


def loaded(folder):
    """ΔW of an adapter as PEFT loads and merges it; every warning is an error."""
    base = {k: v.clone() for k, v in Net().state_dict().items()}
    model = peft.PeftModel.from_pretrained(Net(), str(folder))
    stored = load_file(folder / "adapter_model.safetensors")
    with warnings.catch_warnings():
        # PEFT takes the bias of lora_bias for a factor that was not gathered.
        warnings.filterwarnings("ignore", "Adapter 'default': . LoRA tensor")
        own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(stored) <= set(own) | {k.replace("modules_to_save.", "") for k in own}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload().state_dict()
    return {k: merged[k] - base[k] for k in base}


@pytest.fixture
def two(tmp_path):
    """Two adapters of other ranks, scalings and modules, and their updates."""
    first = make(tmp_path / "a", 1, lora_alpha=3, rank_pattern={"inner.q": 3, "^q": 1})
    second = make(tmp_path / "b", 2, r=3, use_rslora=True, target_modules=["q", "conv"])
    return tmp_path, first, second


def close(found, wanted, tolerance=2e-6):
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("method", ["linear", "cat"])
@pytest.mark.parametrize("weights", [[1, 1], [0.5, -2.0], 0.3])
def test_sums_are_exact_and_load_in_peft(two, method, weights):
    folder, first, second = two
    report = merge_lora_adapters(
        [folder / "a", folder / "b"], folder / "out", weights, method=method
    )
    w = weights if isinstance(weights, list) else [weights] * 2
    close(loaded(folder / "out"), {k: w[0] * first[k] + w[1] * second[k] for k in first})
    ranks = {name: module.rank for name, module in report.modules.items()}
    assert ranks == {"conv": 5, "emb": 2, "inner.q": 6, "q": 4}
    assert report.error == 0


def test_pefts_own_linear_is_not_linear(tmp_path):
    """What is compared with: the same request, off by about its own size."""
    first, second = (make(tmp_path / n, s, target_modules=["q"]) for n, s in (("a", 1), ("b", 2)))
    wanted = first["q.weight"] + second["q.weight"]
    model = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "a"), adapter_name="a")
    model.load_adapter(str(tmp_path / "b"), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    theirs = model.merge_and_unload().state_dict()["q.weight"] - Net().state_dict()["q.weight"]
    merge_lora_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    ours = loaded(tmp_path / "out")["q.weight"]

    def error(x):
        return float((x - wanted).norm() / wanted.norm())

    assert error(theirs) > 0.5
    assert error(ours) < 1e-6


def test_a_smaller_rank_is_the_best_there_is(two):
    folder, first, second = two
    paths = [folder / "a", folder / "b"]
    report = merge_lora_adapters(paths, folder / "out", [1, 0.5], "linear", rank=2)
    found = loaded(folder / "out")
    for module, merged in report.modules.items():
        name = f"{module}.weight"
        wanted = (first[name] + 0.5 * second[name]).flatten(1)
        values = torch.linalg.svdvals(wanted)
        best = float(values[2:].norm() / values.norm())
        error = float((found[name].flatten(1) - wanted).norm() / wanted.norm())
        assert error == pytest.approx(best, abs=1e-5)
        assert merged.error == pytest.approx(best, abs=1e-5)
    default = merge_lora_adapters(paths, folder / "svd", [1, 0.5], "svd")
    assert {n: m.rank for n, m in default.modules.items()} == {
        "conv": 3, "emb": 2, "inner.q": 3, "q": 3,
    }  # fmt: skip


def test_linear_never_exceeds_the_rank_of_the_matrix(tmp_path):
    first = make(tmp_path / "a", 1, r=8, target_modules=["conv"])
    report = merge_lora_adapters([tmp_path / "a"] * 2, tmp_path / "out", [1, 2])
    assert report.modules["conv"].rank == 5
    close(loaded(tmp_path / "out"), {"conv.weight": 3 * first["conv.weight"]}, 5e-6)


def test_ties_and_dare_act_on_the_dense_updates(two):
    folder, first, second = two
    paths = [folder / "a", folder / "b"]
    report = merge_lora_adapters(paths, folder / "t", [1, 2], "ties", rank=12, density=0.4)
    deltas = [first["q.weight"], second["q.weight"]]
    wanted = ties(torch.zeros(10, 12), deltas, [1.0, 2.0], density=0.4)
    close(loaded(folder / "t"), {"q.weight": wanted}, 5e-6)
    assert report.error < 1e-5
    low = merge_lora_adapters(paths, folder / "l", [1, 2], "ties", density=0.4)
    error = float((loaded(folder / "l")["q.weight"] - wanted).norm() / wanted.norm())
    assert low.modules["q"].error == pytest.approx(error, rel=1e-4)
    assert low.modules["q"].rank == 4
    # With every entry kept, dare is the sum; with fewer the file follows the seed.
    merge_lora_adapters(paths, folder / "d1", [1, 2], "dare", rank=12, density=1.0)
    close(loaded(folder / "d1"), {k: first[k] + 2 * second[k] for k in first}, 5e-6)
    for name, seed in (("s0", 0), ("s0 again", 0), ("s1", 1)):
        merge_lora_adapters(paths, folder / name, [1, 2], "dare", rank=12, density=0.5, seed=seed)
    a, b, c = (
        (folder / n / "adapter_model.safetensors").read_bytes() for n in ("s0", "s0 again", "s1")
    )
    assert a == b
    assert a != c


def test_biases_and_saved_modules_are_merged_as_differences(tmp_path):
    settings = {"bias": "lora_only", "modules_to_save": ["head"], "target_modules": ["q"]}
    first = make(tmp_path / "a", 1, **settings, lora_bias=True)
    second = make(tmp_path / "b", 2, **settings, lora_bias=True)
    third = make(tmp_path / "c", 3, target_modules=["q"])
    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    paths, weights = [tmp_path / n for n in "abc"], [0.5, 2.0, 1.0]
    with pytest.raises(ValueError, match=r"base is needed.*head\.bias, head\.weight"):
        merge_lora_adapters(paths, tmp_path / "out", weights)
    for base in (tmp_path / "base.safetensors", Net().state_dict()):
        merge_lora_adapters(paths, tmp_path / "out", weights, base=base, overwrite=True)
        wanted = {k: 0.5 * first[k] + 2 * second[k] + third[k] for k in first}
        close(loaded(tmp_path / "out"), wanted, 1e-5)
    with pytest.raises(ValueError, match=r"the base lacks .*head\.weight"):
        merge_lora_adapters(paths, tmp_path / "x", weights, base={})


def test_rank_patterns_are_found_by_peft_whatever_the_names():
    from peft.utils.other import get_pattern_key

    ranks = {"q": 1, "a.q": 2, "b.a.q": 3, "b.a.q2": 3, "a+b.q": 4, "z": 3}
    found = rank_settings(ranks)
    for module, rank in ranks.items():
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            key = get_pattern_key(found[field].keys(), module)
            assert found[field].get(key, found[default]) == rank
    assert len(found["rank_pattern"]) == 3


def test_the_settings_of_the_first_adapter_stay(two):
    folder, *_ = two
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    config["of another tool"] = {"kept": True}
    (folder / "a" / "adapter_config.json").write_text(json.dumps(config))
    merge_lora_adapters([folder / "a"], folder / "same", 2.0)
    merged = Adapter(folder / "same").config
    assert merged["of another tool"] == {"kept": True}
    assert sorted(merged["target_modules"]) == sorted(config["target_modules"])
    merge_lora_adapters([folder / "a", folder / "b"], folder / "other")
    assert Adapter(folder / "other").config["target_modules"] == ["conv", "emb", "inner.q", "q"]


def test_half_precision_files_lose_nothing(two):
    folder, *_ = two
    paths = [folder / "a", folder / "b"]
    for path in paths:
        file = path / "adapter_model.safetensors"
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    wanted = sum(Adapter(p).low_rank("q").delta().double() for p in paths)
    merge_lora_adapters(paths, folder / "out")
    found = Adapter(folder / "out").low_rank("q")
    assert found.up.dtype == torch.float32
    torch.testing.assert_close(found.delta().double(), wanted, rtol=1e-6, atol=1e-6)
    merge_lora_adapters(paths, folder / "half", dtype=torch.float16)
    assert Adapter(folder / "half").low_rank("q").up.dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "mean"}, "method must be one of linear, cat"),
        ({"weights": [1.0]}, "2 paths need as many weights, got 1"),
        ({"weights": [1.0, float("nan")]}, "weights must be finite"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"method": "cat", "rank": 4}, "None for cat"),
        ({"method": "ties"}, "density is for ties and dare"),
        ({"density": 0.5}, "density is for ties and dare"),
        ({"method": "dare", "density": 1.5}, r"density must be in \(0, 1\]"),
        ({"paths": []}, "at least one folder"),
        ({"paths": "a"}, "at least one folder"),
    ],
)
def test_arguments_that_do_not_fit(two, arguments, message):
    folder, *_ = two
    call = {"paths": [folder / "a", folder / "b"], "out": folder / "out"} | arguments
    with pytest.raises(ValueError, match=message):
        merge_lora_adapters(**call)
    assert not (folder / "out").exists()


def test_adapters_that_cannot_be_added(two):
    folder, *_ = two
    make(folder / "dora", 3, use_dora=True, target_modules=["q"])
    with pytest.raises(ValueError, match=r"rescales the outputs of inner\.q, q \(DoRA\)"):
        merge_lora_adapters([folder / "a", folder / "dora"], folder / "out")
    model = peft.get_peft_model(Net(), peft.OFTConfig(oft_block_size=4, target_modules=["q"]))
    model.save_pretrained(str(folder / "oft"))
    with pytest.raises(TypeError, match="is an OFT adapter"):
        merge_lora_adapters([folder / "oft"], folder / "out")
    file = folder / "b" / "adapter_model.safetensors"
    key = "base_model.model.q.lora_A.weight"
    save_file(load_file(file) | {key: torch.ones(3, 11)}, file)
    with pytest.raises(ValueError, match=r"adapters of q have different shapes: \(10, 12\)"):
        merge_lora_adapters([folder / "a", folder / "b"], folder / "out")
    with pytest.raises(FileExistsError, match="give another folder"):
        merge_lora_adapters([folder / "a"], folder / "b")
    assert not (folder / "out").exists()
    assert not list(folder.glob(".*partial"))


def test_other_base_models_are_told(two):
    folder, *_ = two
    for name, base in (("a", "one/model"), ("b", "another/model")):
        path = folder / name / "adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": base}
        path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="different base models: another/model, one/model"):
        merge_lora_adapters([folder / "a", folder / "b"], folder / "out")


def test_an_interrupted_merge_leaves_what_was_there(two, monkeypatch):
    folder, *_ = two
    merge_lora_adapters([folder / "a"], folder / "out")
    before = (folder / "out" / "adapter_model.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        merge_lora_adapters([folder / "b"], folder / "out", overwrite=True)
    assert (folder / "out" / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "out"]


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 9),
    width=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    kept=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_the_small_core_gives_the_dense_svd(out, width, ranks, kept, seed):
    g = torch.Generator().manual_seed(seed)
    parts = [
        LowRank(
            torch.randn(out, r, generator=g, dtype=torch.float64),
            torch.randn(r, width, generator=g, dtype=torch.float64),
            0.5 + r,
        )
        for r in ranks
    ]
    weights = [1.0 + i for i in range(len(parts))]
    whole = concatenate(parts, weights)
    dense = sum(w * p.delta() for w, p in zip(weights, parts, strict=True))
    torch.testing.assert_close(whole.delta(), dense)
    assert whole.rank == sum(ranks)
    least, error = reduce_rank(whole, kept)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(least.delta(), (u[:, :kept] * s[:kept]) @ vh[:kept])
    assert error == pytest.approx(float(s[kept:].norm() / s.norm()), abs=1e-12)


def test_large_dense_updates_are_factorised_nearly_best(generator):
    left, right = (
        torch.randn(300, 40, generator=generator),
        torch.randn(40, 200, generator=generator),
    )
    matrix = left @ right + 0.5 * torch.randn(300, 200, generator=generator)
    up, down = factorize(matrix, 8, generator)
    assert up.shape == (300, 8)
    values = torch.linalg.svdvals(matrix)
    best = float(values[8:].norm())
    assert best <= float((matrix - up @ down).norm()) + 1e-3
    assert float((matrix - up @ down).norm()) < 1.005 * best
    up, down = factorize(matrix, 190, generator)
    error = float((matrix - up @ down).norm())
    assert error == pytest.approx(float(values[190:].norm()), rel=1e-3)


def test_factors_that_do_not_add_up():
    one = LowRank(torch.ones(3, 1), torch.ones(1, 2))
    with pytest.raises(ValueError, match="one weight a part"):
        concatenate([one], [1.0, 2.0])
    with pytest.raises(ValueError, match="must have one shape"):
        concatenate([one, LowRank(torch.ones(4, 1), torch.ones(1, 2))], [1.0, 2.0])
    for call in (
        lambda: reduce_rank(one, 0),
        lambda: factorize(torch.ones(2, 2), 0, torch.Generator()),
    ):
        with pytest.raises(ValueError, match="at least 1"):
            call()


def test_what_a_crash_left_beside_the_output_is_put_right(two):
    """A crash between two renames has the old output aside; it is neither lost nor in the way."""
    folder, *_ = two
    out = folder / "out"
    merge_lora_adapters([folder / "a", folder / "b"], out)
    aside = folder / ".out.stiefel-aside"
    out.rename(aside)
    with pytest.raises(FileExistsError):
        merge_lora_adapters([folder / "a"], out)
    assert out.is_dir()
    assert not aside.exists()
    (aside / "old").mkdir(parents=True)
    merge_lora_adapters([folder / "a"], out, overwrite=True)
    assert not aside.exists()
    assert sorted(Adapter(out).modules) == sorted(Adapter(folder / "a").modules)

"""Adapters that PEFT wrote: what is read, and that folding gives PEFT's own merged weights."""

import json
import math
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stiefel.merge import Adapter
from stiefel.merge.adapter_config import lay_out, lora_rank, lora_scaling
from stiefel.merge.adapter_rotation import (
    block_size,
    project_blocks,
    rotate_inputs,
    rotation_blocks,
    skew_blocks,
)

peft = pytest.importorskip("peft")
conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
# PEFT warns of the flag that it then sets itself.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")


class Zoo(nn.Module):
    """One layer of every kind that is adapted."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(11, 8)
        self.lin = nn.Linear(8, 6)
        self.square = nn.Linear(8, 8)
        self.turned = conv1d(6, 8)
        self.conv = nn.Conv2d(4, 6, 3)
        self.line = nn.Conv1d(4, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return x


def saved(folder, config, seed=1):
    """PEFT's merged tensors; the adapter, with random numbers, is saved in ``folder``."""
    base = {name: tensor.clone() for name, tensor in Zoo().state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = peft.get_peft_model(Zoo(), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    offset = 1.0 if "magnitude" in name else 0.0
                    p.copy_(0.2 * torch.randn(p.shape, generator=generator) + offset)
        model.save_pretrained(str(folder))
        merged = model.merge_and_unload().state_dict()
    return base, merged


LORA = {
    "plain": {"r": 2, "lora_alpha": 3, "target_modules": ["emb", "lin", "conv", "line"]},
    "rslora": {"r": 2, "use_rslora": True, "target_modules": ["lin", "square"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["lin", "square", "conv"],
        "rank_pattern": {"lin": 3, "^conv": 1},
        "alpha_pattern": {"squ.re": 7},
    },
    "turned": {"r": 2, "target_modules": ["turned"], "fan_in_fan_out": True},
    "dora": {"r": 2, "use_dora": True, "target_modules": ["emb", "lin", "square", "conv", "line"]},
    "biases": {
        "r": 2,
        "bias": "all",
        "lora_bias": True,
        "target_modules": ["lin", "conv"],
        "modules_to_save": ["head"],
    },
}
OFT = {
    "plain": {"oft_block_size": 4, "target_modules": ["lin", "conv", "square"]},
    "exact": {"oft_block_size": 4, "use_cayley_neumann": False, "target_modules": ["lin", "conv"]},
    "shared": {"oft_block_size": 2, "block_share": True, "target_modules": ["lin", "conv"]},
    "constrained": {"oft_block_size": 4, "coft": True, "eps": 0.3, "target_modules": ["lin"]},
    "blocks": {"r": 2, "oft_block_size": 0, "target_modules": ["lin", "emb"]},
    "saved": {
        "oft_block_size": 4,
        "bias": "oft_only",
        "target_modules": ["lin"],
        "modules_to_save": ["head"],
    },
} | {
    f"{n} terms": {
        "oft_block_size": 4, "num_cayley_neumann_terms": n, "target_modules": ["lin"],
    }
    for n in (1, 2, 3, 4, 7)
}  # fmt: skip
CASES = [(peft.LoraConfig, name, s) for name, s in LORA.items()] + [
    (peft.OFTConfig, name, s) for name, s in OFT.items()
]


@pytest.mark.parametrize(("kind", "name", "settings"), CASES, ids=lambda x: str(x)[:20])
def test_folding_is_what_peft_merges(tmp_path, kind, name, settings):
    base, merged = saved(tmp_path, kind(**settings))
    adapter = Adapter(tmp_path)
    changed = {n for n in base if not torch.equal(base[n], merged[n])}
    assert changed == set(adapter.tensors) - unchanged(adapter, base)
    for tensor in adapter.tensors:
        before = base[tensor].clone()
        folded = adapter.fold(tensor, base[tensor])
        torch.testing.assert_close(folded, merged[tensor], rtol=2e-6, atol=2e-6)
        assert torch.equal(base[tensor], before)
        assert folded.is_contiguous() or folded.ndim == 2


def unchanged(adapter, base):
    """Replaced by equal numbers (one Neumann term is the identity)."""
    return {n for n in adapter.tensors if torch.equal(adapter.fold(n, base[n]), base[n])}


def test_the_factors_are_the_update(tmp_path):
    base, merged = saved(tmp_path, peft.LoraConfig(**LORA["plain"]))
    adapter = Adapter(tmp_path)
    assert adapter.modules == ("conv", "emb", "lin", "line")
    assert (adapter.kind, adapter.replaced, adapter.unknown) == ("LORA", (), ())
    for module in adapter.modules:
        factors = adapter.low_rank(module)
        weight = f"{module}.weight"
        assert factors.shape == tuple(base[weight].shape)
        assert (factors.rank, factors.scaling) == (2, 1.5)
        torch.testing.assert_close(
            factors.delta(), merged[weight] - base[weight], rtol=1e-5, atol=1e-6
        )
    with pytest.raises(TypeError, match="no rotations"):
        adapter.rotation("lin")
    with pytest.raises(KeyError, match="does not adapt head"):
        adapter.low_rank("head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_folding_rounds_once(tmp_path, dtype):
    base, _ = saved(tmp_path, peft.LoraConfig(**LORA["plain"]))
    adapter = Adapter(tmp_path)
    weight = base["lin.weight"].to(dtype)
    folded = adapter.fold("lin.weight", weight)
    assert folded.dtype == dtype
    exact = weight.double() + adapter.low_rank("lin").delta().double()
    torch.testing.assert_close(folded.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert adapter.fold("lin.weight", weight, dtype=torch.float32).dtype == torch.float32


def test_a_square_turned_weight_follows_the_settings(tmp_path):
    saved(tmp_path, peft.LoraConfig(r=2, target_modules=["square"]))
    edit_config(tmp_path, fan_in_fan_out=True)
    adapter = Adapter(tmp_path)
    delta = adapter.low_rank("square").delta()
    torch.testing.assert_close(adapter.fold("square.weight", torch.zeros(8, 8)), delta.T)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def lora(tmp_path):
    saved(tmp_path, peft.LoraConfig(r=2, target_modules=["lin", "emb"]))
    return tmp_path


KEY = "base_model.model.lin.lora_A.weight"


def test_unknown_keys_are_named(lora):
    edit_tensors(lora, lambda t: t | {"base_model.model.lin.lora_C.weight": torch.ones(1)})
    edit_tensors(lora, lambda t: t | {"elsewhere": torch.ones(1)})
    with pytest.raises(ValueError, match=r"base_model\.model\.lin\.lora_C\.weight, elsewhere"):
        Adapter(lora)
    with pytest.warns(UserWarning, match="elsewhere"):
        assert len(Adapter(lora, unknown="warn").unknown) == 2
    with pytest.raises(ValueError, match="unknown must be"):
        Adapter(lora, unknown="ignore")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "VERA"}, "peft_type must be one of LORA, OFT, got 'VERA'"),
        ({"peft_type": "OFT", "oft_block_size": ...}, r"before 0\.14"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [3]}, "certain tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"r": 3}, "rank 2 in the file, 3 by r"),
    ],
)
def test_settings_that_cannot_be_taken(lora, changes, message):
    edit_config(lora, **changes)
    with pytest.raises(ValueError, match=message):
        Adapter(lora)


def test_files_that_are_not_there_or_not_read(lora, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        Adapter(empty)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Adapter(empty / "nothing")
    shutil.copy(lora / "adapter_config.json", empty)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        Adapter(empty)
    torch.save({}, empty / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin, a pickle"):
        Adapter(empty)
    (lora / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold an object"):
        Adapter(lora)
    (lora / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Adapter(lora)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != KEY}, r"lin has no lora_A\.weight"),
        (lambda t: t | {KEY: torch.ones(3, 8)}, "factors of lin do not fit"),
        (lambda t: t | {KEY: torch.ones(2, 8, 1, 1)}, "factors of lin do not fit"),
        (lambda t: {}, "changes nothing"),
    ],
)
def test_factors_that_do_not_fit(lora, change, message):
    edit_tensors(lora, change)
    with pytest.raises(ValueError, match=message):
        Adapter(lora)


def test_numbers_that_are_not_finite_are_named(lora):
    edit_tensors(lora, lambda t: t | {KEY: torch.full((2, 8), math.nan)})
    with pytest.raises(ValueError, match=rf"{KEY} of .* must be finite, but 16 of its 16"):
        Adapter(lora).fold("lin.weight", torch.zeros(6, 8))


def test_bases_that_do_not_fit(lora):
    adapter = Adapter(lora)
    with pytest.raises(ValueError, match=r"lin\.weight has shape \(6, 9\).*\(6, 8\) or \(8, 6\)"):
        adapter.fold("lin.weight", torch.zeros(6, 9))
    with pytest.raises(ValueError, match=r"emb\.weight has shape \(8, 11\)"):
        adapter.check_shape("emb.weight", (8, 11))
    with pytest.raises(TypeError, match="floating point"):
        adapter.fold("lin.weight", torch.zeros(6, 8, dtype=torch.int8))
    with pytest.raises(KeyError, match=r"does not change head\.weight"):
        adapter.fold("head.weight", torch.zeros(3, 6))
    with pytest.raises(KeyError, match=r"does not replace lin\.weight"):
        adapter.replacement("lin.weight")
    with pytest.raises(KeyError, match=r"has no lora_B\.bias"):
        adapter.tensor("lin", "lora_B.bias")


def test_a_rotation_has_to_fill_its_input(tmp_path):
    saved(tmp_path, peft.OFTConfig(oft_block_size=4, target_modules=["lin"]))
    adapter = Adapter(tmp_path)
    assert adapter.rotation("lin").shape == (2, 4, 4)
    with pytest.raises(ValueError, match="turns inputs in 2 blocks of 4"):
        adapter.check_shape("lin.weight", (6, 12))
    with pytest.raises(TypeError, match="no low-rank factors"):
        adapter.low_rank("lin")
    edit_config(tmp_path, peft_version=None)
    with pytest.warns(UserWarning, match=r"before 0\.18"):
        Adapter(tmp_path)


def test_names_are_found_with_and_without_a_first_component(lora):
    adapter = Adapter(lora)
    assert adapter.resolve(["lin.weight", "emb.weight", "x"]) == {
        "lin.weight": "lin.weight",
        "emb.weight": "emb.weight",
    }
    assert adapter.resolve(["model.lin.weight", "emb.weight"])["model.lin.weight"] == "lin.weight"
    with pytest.raises(KeyError, match=r"not there: emb\.weight$|not there: emb\.weight'$"):
        adapter.resolve(["lin.weight"])


def test_the_adapter_may_have_the_longer_names():
    settings = {"peft_type": "LORA", "modules_to_save": ["classifier"], "bias": "none"}
    keys = [
        "base_model.model.model.a.lora_A.weight",
        "base_model.model.classifier.original_module.dense.weight",
        "base_model.model.classifier.modules_to_save.dense.weight",
        "base_model.model.b.bias",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.classifier2.weight",
    ]
    found = lay_out(keys, settings)
    assert set(found.parts) == {"model.a"}
    assert set(found.replaced) == {"classifier.dense.weight", "model.embed_tokens.weight"}
    assert found.unknown == (keys[3], keys[5])


def test_patterns_are_looked_up_as_peft_does():
    from peft.utils.other import get_pattern_key

    patterns = {"k_proj": 3, "^a.q_proj": 4, r"layers\.[01]\..*": 5, "proj": 6}
    config = {"rank_pattern": patterns, "r": 2, "lora_alpha": 6}
    for module in ("k_proj", "a.k_proj", "b.a.q_proj", "a.q_proj", "m.layers.1.x", "xproj"):
        key = get_pattern_key(patterns.keys(), module)
        assert lora_rank(config, module) == patterns.get(key, 2)
        assert lora_scaling(config, module) == 6 / lora_rank(config, module)


def test_rotations_are_what_they_say(generator):
    v = 0.1 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    q = skew_blocks(v)
    assert torch.equal(q, -q.mT)
    assert torch.equal(q[1, 0, 1:], v[1, :3])
    assert float(q[1, 2, 3]) == float(v[1, 5])
    r, eye = rotation_blocks(v), torch.eye(4, dtype=v.dtype)
    torch.testing.assert_close(r, (eye - q) @ torch.linalg.inv(eye + q))
    torch.testing.assert_close(r @ r.mT, eye.expand(3, 4, 4))
    # The series turns the other way and approaches its limit.
    errors = [
        float((rotation_blocks(v, neumann_terms=t) - r.mT).abs().max()) for t in (2, 4, 6, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    dense = torch.block_diag(*r)
    torch.testing.assert_close(rotate_inputs(weight, r), weight @ dense.T)
    torch.testing.assert_close(rotate_inputs(weight, r, outputs=True), weight @ dense)
    torch.testing.assert_close(
        rotate_inputs(weight, r[:1]), weight @ torch.block_diag(*r[[0] * 3]).T
    )
    norms = torch.linalg.matrix_norm(skew_blocks(project_blocks(v, 0.2)))
    before = torch.linalg.matrix_norm(q)
    torch.testing.assert_close(norms, before.clamp(max=0.2 / 3**0.5))
    assert [block_size(n) for n in (1, 3, 6, 496)] == [2, 3, 4, 32]
    for bad in (0, 2, 4):
        with pytest.raises(ValueError, match="no block"):
            block_size(bad)
    with pytest.raises(ValueError, match="at least 1"):
        rotation_blocks(v, neumann_terms=0)
    with pytest.raises(ValueError, match="do not fill"):
        rotate_inputs(weight[:, :8], r)

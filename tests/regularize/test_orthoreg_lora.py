import copy

import peft
import pytest
import torch
from torch import nn

from stiefel.regularize import OrthoReg, orthoreg_loss


def adapted(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    settings = {"target_modules": ["0", "1", "2"], "r": 2, "lora_alpha": 3, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def move(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.5 * torch.randn(p.shape, generator=generator)


def change(layer, adapter="default"):
    """ΔW as PEFT itself computes it, kept in autograd's graph."""
    return layer.get_delta_weight(adapter)


def layers(model):
    return model.base_model.model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"1": 9}}])
@pytest.mark.parametrize("kind", [{}, {"power": 2}, {"target": "offdiag"}])
def test_layers_of_peft_against_their_dense_change(options, kind):
    model = adapted(**options)
    reg = OrthoReg(model, lam=0.5, **kind)
    move(model)
    loss = reg.loss()
    dense = 0.5 * sum(orthoreg_loss(change(layers(model)[i]), **kind) for i in range(3))
    torch.testing.assert_close(loss, dense)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mine = torch.autograd.grad(loss, parameters)
    other = torch.autograd.grad(dense, parameters)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert list(reg.updates) == [f"base_model.model.{i}.default" for i in range(3)]


def test_at_the_start_b_is_zero_and_so_is_the_gradient():
    model = adapted()
    reg = OrthoReg(model)
    assert list(reg.per_layer().values()) == pytest.approx([6**0.5, 8**0.5, 8**0.5])
    reg.loss().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_whole_matrices_beside_adapters():
    model = adapted(modules_to_save=["3"])
    reg = OrthoReg(model)
    start = copy.deepcopy(layers(model)[3].modules_to_save["default"].weight.detach())
    move(model)
    name = "base_model.model.3.modules_to_save.default.weight"
    delta = layers(model)[3].modules_to_save["default"].weight - start
    assert reg.per_layer()[name] == pytest.approx(orthoreg_loss(delta).item(), rel=1e-6)
    assert len(reg.updates) == 4


def test_only_active_adapters_that_train():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(target_modules=["1"], r=3, lora_alpha=1))
    model.set_adapter("second")
    reg = OrthoReg(model)
    assert list(reg.updates) == ["base_model.model.1.second"]
    move(model)
    expected = orthoreg_loss(change(layers(model)[1], "second")).item()
    assert reg.loss().item() == pytest.approx(expected, rel=1e-5)
    for p in layers(model)[1].parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable LoRA layer"):
        OrthoReg(model)


def test_patterns_reach_adapters():
    model = adapted()
    reg = OrthoReg(model, params=["*.[02].default"])
    assert list(reg.updates) == ["base_model.model.0.default", "base_model.model.2.default"]
    shapes = []
    OrthoReg(model, params=lambda name, b: shapes.append(tuple(b.shape)) or True)
    assert shapes == [(8, 2)] * 3


def test_convolutions_on_request_and_embeddings_never():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Conv2d(3, 5, 2), nn.Linear(4, 4))
    config = peft.LoraConfig(target_modules=["0", "1", "2"], r=2)
    model = peft.get_peft_model(model, config)
    reg = OrthoReg(model)
    assert list(reg.updates) == ["base_model.model.2.default"]
    assert [n for n in reg.skipped if "lora_embedding" in n]
    conv = OrthoReg(model, params=["*.1.default"])
    move(model)
    delta = change(layers(model)[1]).flatten(1)
    assert conv.loss().item() == pytest.approx(orthoreg_loss(delta).item(), rel=1e-5)


def test_variants_are_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"model.0.default is a variant of LoRA \(Dora"):
        OrthoReg(adapted(use_dora=True))


def test_factors_of_other_libraries_are_not_matrices():
    class Adapter(nn.Module):
        """As those that keep both factors as parameters of the layer."""

        def __init__(self):
            super().__init__()
            self.lora_A = nn.Parameter(torch.zeros(2, 6))
            self.lora_B = nn.Parameter(torch.zeros(8, 2))
            self.head = nn.Linear(3, 3)

    reg = OrthoReg(Adapter())
    assert list(reg.updates) == ["head.weight"]
    assert sorted(reg.skipped) == ["lora_A", "lora_B"]


def test_numbers_that_are_none_are_named():
    model = adapted()
    reg = OrthoReg(model)
    with torch.no_grad():
        layers(model)[1].lora_A["default"].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"ΔW of base_model.model.1.default holds NaN"):
        reg.loss()

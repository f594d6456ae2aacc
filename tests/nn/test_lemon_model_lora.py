"""Adapters: exact at the start, the same in every mode, exact when merged; fine-tuning."""

import copy

import pytest
import torch
from lemon_models import data, inputs, tiny
from torch import nn

from stiefel.nn.lemon import LoRALinear, evaluate, finetune, lora, merge_lora, pretrain
from stiefel.nn.lemon.low_rank import LowRank, adapters


def randomised(model, seed=0):
    """Every B away from 0."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LowRank):
            with torch.no_grad():
                module.B.normal_(generator=g)
    return model


def test_the_update_is_exactly_zero_at_the_start_and_a_has_the_right_size():
    linear = nn.Linear(500, 40)
    layer = LoRALinear(linear, 16, 5.0, torch.Generator().manual_seed(0))
    x = torch.randn(3, 500)
    assert torch.equal(layer(x), linear(x))
    assert (layer.lora.delta() == 0).all()
    assert layer.lora.A.std().item() == pytest.approx(0.25, abs=0.01)
    assert layer.weight is linear.weight


def test_the_update_is_alpha_a_b():
    layer = randomised(LoRALinear(nn.Linear(7, 4), 3, 0.5))
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = x @ layer.weight.mT + layer.bias + 0.5 * (x @ layer.lora.A) @ layer.lora.B
    torch.testing.assert_close(layer(x), expected)
    y = layer(x)
    torch.testing.assert_close(layer.lora(layer.weight), copy.deepcopy(layer).merged().weight)
    torch.testing.assert_close(layer.merged()(x), y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("targets", [None, "ffn", (r"^head\.", "qkv")])
def test_merging_changes_no_output_and_gives_the_model_back(targets):
    model, x = tiny().double(), inputs(dtype=torch.float64)
    before = {n: (p.shape, p.requires_grad) for n, p in model.named_parameters()}
    names = lora(model, 4, 2.0, targets)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora.{x}" for n in names for x in "AB"}
    randomised(model)
    y = model(*x)
    assert merge_lora(copy.deepcopy(model)) == names
    assert merge_lora(model) == names
    torch.testing.assert_close(model(*x), y)
    assert {n: (p.shape, p.requires_grad) for n, p in model.named_parameters()} == before
    with pytest.raises(ValueError, match="no adapters"):
        merge_lora(model)


@pytest.mark.parametrize("fused", [True, False])
def test_training_and_evaluation_agree_with_nonzero_updates(fused):
    """torch's encoder reads weights itself in evaluation; an adapter beside them would be idle."""
    if fused:
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu"),
            2,
        )
        x = (torch.randn(3, 5, 8, dtype=torch.float64),)
    else:
        model, x = tiny(), inputs(dtype=torch.float64)
    model = model.double()
    base = copy.deepcopy(model).train()(*x)
    names = lora(model, 2, generator=torch.Generator().manual_seed(0))
    assert any("out" in n for n in names)
    randomised(model)
    in_training = model.train()(*x)
    with torch.no_grad():
        in_evaluation = model.eval()(*x)
    torch.testing.assert_close(in_training, in_evaluation)
    assert (in_training - base).abs().max() > 1e-2
    # Each adapter by itself acts.
    for name, _ in adapters(model):
        alone = copy.deepcopy(model)
        for other, module in adapters(alone):
            if other != name:
                for part in module.modules():
                    if isinstance(part, LowRank):
                        nn.init.zeros_(part.B)
        with torch.no_grad():
            assert (alone(*x) - base).abs().max() > 1e-5, name
    merge_lora(model)
    with torch.no_grad():
        torch.testing.assert_close(model(*x), in_evaluation)
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_of_the_card_train_what_the_sheet_says():
    from stiefel.papers.lemon import LAPTOP
    from stiefel.papers.lemon_runs import LORA_TARGETS, network

    model = network({**LAPTOP, "seed": 0})
    lora(model, 8, 1.0, LORA_TARGETS)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6_672


def test_adapters_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora(model, 0)
    with pytest.raises(ValueError, match="alpha must be finite, above 0"):
        lora(model, 2, 0.0)
    with pytest.raises(ValueError, match=r"target 'haed' fits no nn\.Linear"):
        lora(model, 2, targets="haed")
    with pytest.raises(ValueError, match="empty sequence"):
        lora(model, 2, targets=())
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        lora(nn.Conv1d(1, 1, 1), 2)
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="'1' is shared"):
        lora(tied, 2)
    assert all(p.requires_grad for p in model.parameters())
    lora(model, 2)
    with pytest.raises(ValueError, match="has adapters already"):
        lora(model, 2)


def test_peft_adapts_prose():
    from peft import LoraConfig, get_peft_model

    model, x = tiny(), inputs()
    base = model(*x)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*(qkv|keys_values|ffn\.[02])")
    adapted = get_peft_model(copy.deepcopy(model), config)
    torch.testing.assert_close(adapted(*x), base)
    for name, p in adapted.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(p)
    in_training = adapted.train()(*x)
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(*x), in_training)
    assert (in_training - base).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(*x), in_training, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora", "head"])
def test_finetuning_learns_and_trains_what_it_says(method):
    model, d = tiny(), data()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = evaluate(model, d)
    report = finetune(model, d, 20, method, lr=1e-2, generator=torch.Generator().manual_seed(0))
    assert evaluate(model, d) < 0.8 * start
    assert len(report.losses) == report.steps == 20
    names = {n.replace(".lora", ""): p for n, p in model.named_parameters() if ".lora." not in n}
    moved = {n for n, p in names.items() if not torch.equal(p, before[n])}
    if method == "full":
        assert moved == set(before)
        assert report.trained == report.total == sum(p.numel() for p in model.parameters())
    elif method == "head":
        assert moved == {n for n in before if n.startswith("head.")}
        assert all(p.requires_grad for p in model.parameters())
    else:
        assert not moved
        assert report.trained < report.total
        again = finetune(model, d, 2, "lora")
        assert again.trained == report.trained
        merge_lora(model)


def test_finetuning_any_module():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=g)
    pair = (x, x.sum(1, keepdim=True))
    first = [p.detach().clone() for p in model[0].parameters()]
    report = finetune(model, pair, 60, "head", lr=3e-2, generator=g)
    assert report.losses[-1] < report.losses[0]
    assert all(torch.equal(p, q) for p, q in zip(first, model[0].parameters(), strict=True))
    report = finetune(model, pair, 100, lr=3e-2, generator=g)
    assert report.losses[-1] < 0.2
    finetune(model, pair, 2, "head", head=r"^0\.bias")
    with pytest.raises(ValueError, match=r"head 'x' fits no parameter"):
        finetune(model, pair, 2, "head", head="x")
    with pytest.raises(ValueError, match="pass head="):
        finetune(nn.Conv1d(1, 1, 1), pair, 2, "head")


def test_training_is_refused():
    model, d = tiny(), data()
    for change, words in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"method": "lorra"}, "method must be one of full, lora, head"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"lr": 0.0}, "lr must be finite, above 0"),
        ({"clip": -1.0}, "clip must be"),
        ({"warm_up": 1.5}, "at most 1"),
        ({"noise": -1.0}, "noise must be finite, at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            finetune(model, d, **change)
    with pytest.raises(ValueError, match="at least one sample"):
        finetune(model, (torch.zeros(0, 3), torch.zeros(0, 1)))
    with pytest.raises(ValueError, match="input 0 has 2 samples but target has 3"):
        finetune(model, (torch.zeros(2, 3), torch.zeros(3, 1)))
    with pytest.raises(ValueError, match="target must be finite"):
        finetune(model, (torch.zeros(1, 3), torch.full((1, 1), float("nan"))))
    # The method is looked at before any weight is frozen.
    assert all(p.requires_grad for p in model.parameters())
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        pretrain(model, d, 2)
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step"):
        pretrain(nn.Linear(1, 1), (torch.full((4, 1), 1e30), torch.full((4, 1), -1e30)), 50)

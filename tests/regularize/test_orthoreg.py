import copy
import math

import pytest
import torch
from torch import nn

from stiefel.regularize import OrthoReg, orthoreg_loss


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 6),
        nn.Linear(6, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 8),
        nn.Linear(8, 8, bias=False),
        nn.Linear(8, 3),
    )


LAYERS = ["1.weight", "3.weight", "4.weight", "5.weight"]


def move(model, scale=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator)


def by_hand(model, start, power=1, target="identity", names=LAYERS):
    now = dict(model.named_parameters())
    parts = [orthoreg_loss(now[n] - start[n], power, target=target) for n in names]
    return torch.stack(parts).sum()


@pytest.mark.parametrize("options", [{}, {"power": 2}, {"target": "offdiag"}])
def test_the_sum_over_layers_and_its_gradient(options):
    model = net()
    start = copy.deepcopy(model.state_dict())
    reg = OrthoReg(model, lam=0.7, **options)
    move(model)
    reg.loss().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert sorted(found) == LAYERS
    model.zero_grad()
    total = 0.7 * by_hand(model, start, **options)
    total.backward()
    torch.testing.assert_close(reg.loss(), total)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad)
    for name, value in reg.per_layer().items():
        one = by_hand(model, start, names=[name], **options)
        assert value == pytest.approx(one.item(), rel=1e-6)


def test_at_the_start_the_norms_are_those_of_the_identity_and_nothing_moves():
    model = net()
    reg = OrthoReg(model)
    expected = [math.sqrt(6), math.sqrt(8), math.sqrt(8), math.sqrt(3)]
    assert list(reg.per_layer().values()) == pytest.approx(expected)
    reg.loss().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert reg.skipped == {"0.weight": "an embedding"}


def test_descent_makes_the_change_orthonormal():
    """A change of any kind is drawn to unit singular values, whatever W0 is."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 9).double()
    start = layer.weight.detach().clone()
    reg = OrthoReg(layer, power=2, lam=1)
    move(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        reg.loss().backward()
        optimizer.step()
    values = torch.linalg.svdvals(layer.weight.detach() - start)
    torch.testing.assert_close(values, torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)


def test_many_small_layers_in_one_product_and_large_ones_alone():
    torch.manual_seed(0)
    sizes = [(5, 4)] * 3 + [(4, 5)] * 2 + [(70, 80)] * 2
    model = nn.ModuleList(nn.Linear(i, o) for o, i in sizes)
    start = copy.deepcopy(model.state_dict())
    reg = OrthoReg(model)
    move(model)
    names = [f"{i}.weight" for i in range(len(sizes))]
    torch.testing.assert_close(reg.loss(), by_hand(model, start, names=names))
    assert list(reg.per_layer()) == names


def test_every_kth_call_k_times_as_strong():
    model = net()
    plain, rare = OrthoReg(model), OrthoReg(model, every=3)
    move(model)
    found = []
    for _ in range(6):
        loss = rare.loss()
        loss.backward()
        found.append(loss.item())
    full = plain.loss().item()
    assert found == pytest.approx([3 * full, 0, 0, 3 * full, 0, 0], rel=1e-6)


def test_no_weight_no_work():
    model = net()
    reg = OrthoReg(model, lam=0)
    reg.loss().backward()
    assert all(p.grad is None for p in model.parameters())
    reg.lam = 2.0
    move(model)
    assert reg.loss().item() > 0


def test_choice_by_names_and_by_function():
    model = nn.Sequential(net(), nn.Conv2d(3, 4, 2))
    assert list(OrthoReg(model, params=["0.[34].*"]).updates) == ["0.3.weight", "0.4.weight"]
    reg = OrthoReg(model, params=["1.weight", "0.0.weight"])
    assert list(reg.updates) == ["0.0.weight", "1.weight"]
    start = model[1].weight.detach().clone()
    move(model)
    flat = (model[1].weight - start).flatten(1)
    assert reg.per_layer()["1.weight"] == pytest.approx(orthoreg_loss(flat).item())
    chosen = OrthoReg(model, params=lambda name, p: p.shape == (8, 8))
    assert list(chosen.updates) == ["0.3.weight", "0.4.weight"]
    assert chosen.skipped["0.5.weight"] == "not chosen"


def test_frozen_layers_stay_out_and_shared_ones_count_once():
    model = net()
    model[3].weight.requires_grad_(False)
    model[4].weight = model[1].weight = nn.Parameter(torch.zeros(8, 6))
    reg = OrthoReg(model)
    assert list(reg.updates) == ["1.weight", "5.weight"]
    assert reg.skipped == {"0.weight": "an embedding", "3.weight": "frozen"}
    tied = nn.Sequential(nn.Linear(6, 11, bias=False), nn.Embedding(11, 6), nn.Linear(6, 6))
    tied[0].weight = tied[1].weight
    assert list(OrthoReg(tied).updates) == ["2.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_references_from_elsewhere(dtype):
    """In any dtype, of any mapping; not copied."""
    model = net()
    reference = {n: p.detach().to(dtype) for n, p in model.named_parameters()}
    reg = OrthoReg(model, reference=reference)
    move(model)
    assert reg.updates["3.weight"].reference.data_ptr() == reference["3.weight"].data_ptr()
    start = {n: p.float() for n, p in reference.items()}
    torch.testing.assert_close(reg.loss(), by_hand(model, start))


def test_a_memory_mapped_reference(tmp_path):
    model = net()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    mapped = torch.load(tmp_path / "base.pt", mmap=True)
    start = copy.deepcopy(model.state_dict())
    reg = OrthoReg(model, reference=mapped)
    move(model)
    torch.testing.assert_close(reg.loss(), by_hand(model, start))


def test_half_models_and_autocast():
    model = net().bfloat16()
    start = {n: p.detach().float() for n, p in model.named_parameters()}
    reg = OrthoReg(model)
    move(model)
    now = {n: p.detach().float() for n, p in model.named_parameters()}
    expected = sum(orthoreg_loss(now[n] - start[n]) for n in LAYERS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = reg.loss()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)


def test_a_compiled_model_keeps_its_names():
    model = net()
    reference = dict(model.named_parameters())
    compiled = torch.compile(model, backend="eager")
    assert list(OrthoReg(compiled, reference=reference).updates) == LAYERS


def test_a_resumed_run_goes_on():
    model = net()
    reg = OrthoReg(model, lam=0.3, power=2, target="offdiag", every=2)
    reg.loss()
    move(model)
    other = OrthoReg(model)
    other.load_state_dict(copy.deepcopy(reg.state_dict()))
    assert (other.lam, other.power, other.target, other.every, other.calls) == (
        0.3, 2, "offdiag", 2, 1,
    )  # fmt: skip
    assert (other.loss().item(), reg.loss().item()) == (0, 0)
    torch.testing.assert_close(other.loss(), reg.loss())

    lean = reg.state_dict(reference=False)
    assert "reference" not in lean
    before = other.per_layer()
    other.load_state_dict(lean)
    assert other.per_layer() == before


def test_states_that_do_not_fit():
    model = net()
    reg = OrthoReg(model, lam=0.3)
    state = reg.state_dict()
    with pytest.raises(KeyError, match="calls"):
        reg.load_state_dict({k: v for k, v in state.items() if k != "calls"})
    with pytest.raises(ValueError, match=r"same layers; only one has \['1.weight'\]"):
        reg.load_state_dict({**state, "reference": dict.fromkeys(LAYERS[1:], 1)})
    wrong = {**state["reference"], "5.weight": torch.ones(3, 7)}
    with pytest.raises(ValueError, match=r"reference of 5.weight must have shape \(3, 8\)"):
        reg.load_state_dict({**state, "lam": 9.0, "reference": wrong})
    with pytest.raises(ValueError, match="lam ≥ 0"):
        reg.load_state_dict({**state, "lam": -1})
    assert reg.lam == 0.3


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lam": -1}, ValueError, "lam must be finite and at least 0, got -1"),
        ({"lam": math.nan}, ValueError, "lam must be finite"),
        ({"power": 3}, ValueError, "power must be 1"),
        ({"target": "zero"}, ValueError, "target must be one of identity, offdiag"),
        ({"every": 0}, ValueError, "every must be a whole number"),
        ({"params": "3d"}, ValueError, 'params must be "2d"'),
        ({"params": ["3.weight", "9.*"]}, ValueError, r"got \['9.\*'\], which match no matrix"),
        ({"params": []}, ValueError, "params must be patterns"),
        ({"params": ["*.bias"]}, ValueError, r"got \['\*.bias'\], which match no matrix"),
        ({"params": lambda n, p: False}, ValueError, "no trainable matrix that params chooses"),
        ({"reference": {"1.weight": torch.ones(8, 6)}}, ValueError, "reference has no '3.weight'"),
        (
            {"params": ["3.weight"], "reference": {"3.weight": torch.ones(8, 7)}},
            ValueError,
            r"reference\['3.weight'\] must have shape \(8, 8\), got \(8, 7\)",
        ),
        (
            {"params": ["3.weight"], "reference": {"3.weight": torch.ones(8, 8).int()}},
            TypeError,
            "must be real floating point, got torch.int32",
        ),
    ],
)
def test_what_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        OrthoReg(net(), **options)


def test_models_without_anything_to_penalise():
    with pytest.raises(ValueError, match="no trainable matrix 2d and no trainable LoRA layer"):
        OrthoReg(nn.LayerNorm(4))
    frozen = nn.Linear(4, 4).requires_grad_(False)
    frozen.register_buffer("packed", torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="quantised already: train LoRA adapters"):
        OrthoReg(frozen)

    class FullyShardedDataParallel(nn.Sequential):
        """Called as the wrapper that flattens parameters."""

    with pytest.raises(TypeError, match=r"use torch\.distributed.fsdp\.fully_shard"):
        OrthoReg(FullyShardedDataParallel(nn.Linear(2, 2)))


def test_numbers_that_are_none_are_named():
    model = net()
    reg = OrthoReg(model)
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
        model[5].weight[0, 0] = math.inf
    for call in (reg.loss, reg.per_layer):
        with pytest.raises(ValueError, match=r"ΔW of 3.weight, 5.weight holds NaN or infinities"):
            call()


def test_repr_says_which_penalty():
    text = "OrthoReg(4 layers, lam=1.0, power=1, target='identity', every=1)"
    assert repr(OrthoReg(net())) == text


def test_patterns_pass_over_vectors():
    assert list(OrthoReg(net(), params=["[34].*"]).updates) == ["3.weight", "4.weight"]

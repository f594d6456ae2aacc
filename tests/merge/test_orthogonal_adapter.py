"""Orthogonal adapters: the update, its gradients, merging, crosstalk, files, PEFT."""

import copy
import itertools
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from stiefel.merge import (
    LayerUpdate,
    OrthogonalAdapter,
    OrthogonalAdapters,
    Projection,
    add_orthogonal_adapters,
    crosstalk,
    export_peft,
    freeze_down_projections,
    load_orthogonal_adapters,
    merge_adapters,
    merge_lora_adapters,
    share_basis,
    shared_columns,
)

peft = pytest.importorskip("peft")
conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

TARGETS = ["emb", "lin", "turned", "conv"]


class Net(nn.Module):
    """Every kind of layer that is adapted, in a model that runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(30, 16)
        self.body = nn.ModuleDict({"lin": nn.Linear(16, 12), "turned": conv1d(10, 12)})
        self.conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)

    def forward(self, ids, image):
        x = self.body["lin"](self.emb(ids))
        return self.body["turned"](x.relu()), self.conv(image)


IDS = torch.arange(24).reshape(4, 6)
IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def trained(identity, seed=1, model=None, **options):
    """An adapter with random A on a model."""
    options = {"target_modules": TARGETS} | options
    handle = add_orthogonal_adapters(model or Net(), 3, adapter_id=identity, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for a in handle.parameters():
            a.copy_(torch.randn(a.shape, generator=generator))
    return handle


def dense(layer):
    """s A Bᵀ in [n, m], from the definition."""
    return layer.scaling * layer.a.detach() @ layer.projection.matrix(layer.a.dtype).T


@pytest.mark.parametrize("scheme", ["columns", "slots", "gaussian"])
def test_the_layer_is_base_plus_update(scheme):
    slot = {"slot": 2} if scheme == "slots" else {}
    before = [y.detach() for y in Net()(IDS, IMAGE)]
    handle = add_orthogonal_adapters(
        Net(), 3, adapter_id="a", scheme=scheme, alpha=4.5, target_modules=TARGETS, **slot
    )
    for y, wanted in zip(handle.model(IDS, IMAGE), before, strict=True):
        assert torch.equal(y, wanted)
    handle = trained("a", scheme=scheme, alpha=4.5, **slot)
    plain = Net()
    with torch.no_grad():
        for name, layer in handle.layers.items():
            assert layer.scaling == 1.5
            delta, weight = dense(layer), plain.get_submodule(name).weight
            turned = layer.kind in ("turned", "embedding")
            weight += (delta.T if turned else delta).reshape(weight.shape)
    for y, wanted in zip(handle.model(IDS, IMAGE), plain(IDS, IMAGE), strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("basis", ["dct", "qr"])
def test_b_is_orthonormal_and_stays(basis):
    handle = trained("a", basis=basis)
    optimizer = torch.optim.AdamW(handle.model.parameters(), lr=0.1, weight_decay=0.5)
    before = {n: m.down.clone() for n, m in handle.modules.items()}
    base = copy.deepcopy(Net().state_dict())
    loss = sum(y.square().mean() for y in handle.model(IDS, IMAGE))
    loss.backward()
    optimizer.step()
    for name, module in handle.modules.items():
        torch.testing.assert_close(module.B.T @ module.B, torch.eye(3), atol=1e-6, rtol=0)
        assert torch.equal(module.down, before[name])
        assert not module.down.requires_grad
        assert module.A.grad.abs().max() > 0
    assert [n for n, p in handle.model.named_parameters() if p.requires_grad] == [
        f"{n}.A" for n in ("emb", "body.lin", "body.turned", "conv")
    ]
    model = handle.detach()
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_are_those_of_the_formula():
    module = OrthogonalAdapter(nn.Linear(6, 5).double(), 2, adapter_id=0, alpha=3)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    a = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def call(x, a):
        return torch.func.functional_call(module, {"A": a}, (x,))

    assert module.A.dtype == module.down.dtype == torch.float64
    assert torch.autograd.gradcheck(call, (x, a))
    y = module.base(x) + 1.5 * x @ module.B @ a.T
    torch.testing.assert_close(call(x, a), y)
    conv = OrthogonalAdapter(nn.Conv2d(2, 3, 2).double(), 2, adapter_id=0)
    image = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    a = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, a: torch.func.functional_call(conv, {"A": a}, (x,)), (image, a)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_keep_b_exact(dtype):
    """Rounded columns are orthogonal to 1e-2 only, so B does not follow the model's dtype."""
    early = OrthogonalAdapter(nn.Linear(64, 8, dtype=dtype), 4, adapter_id=1)
    late = OrthogonalAdapter(nn.Linear(64, 8), 4, adapter_id=1).to(dtype)
    for module in (early, late):
        assert module.down.dtype == torch.float32
        torch.testing.assert_close(module.B.T @ module.B, torch.eye(4), atol=1e-6, rtol=0)
        with torch.no_grad():
            module.A.fill_(0.5)
        x = torch.randn(3, 64, dtype=dtype)
        y = module(x)
        assert y.dtype == dtype
        wanted = module.base(x).float() + x.float() @ module.B @ module.A.float().T
        torch.testing.assert_close(y.float(), wanted, rtol=0.03, atol=0.03)
    rounded = late.B.to(dtype).float()
    assert (rounded.T @ rounded - torch.eye(4)).abs().max() > 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            OrthogonalAdapter(nn.Linear(64, 8), 4, adapter_id=1)(torch.randn(2, 64))
            .isfinite()
            .all()
        )


def test_exact_crosstalk_of_the_sheet():
    """m = 8, plain basis: crosstalk 0.35082…, 0 for disjoint columns."""
    a1 = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    a2 = torch.tensor([[1, -1], [0, 2], [0.5, 0]])

    def handle(identity, a, columns):
        from stiefel.merge import shared_basis

        down = shared_basis(8, columns, seed=None, dtype=torch.float64).T
        layer = LayerUpdate(Projection(8, 2, identity), a, 2.0, down=down)
        return OrthogonalAdapters(identity, {"l": layer})

    one, two, three = handle(1, a1, [0, 3]), handle(2, a2, [3, 5]), handle(3, a2, [5, 6])
    assert crosstalk(one, two)["l"] == pytest.approx(0.3508232077228119, abs=1e-12)
    assert crosstalk(one, three)["l"] < 1e-15
    assert crosstalk(one, one)["l"] <= 1


@pytest.mark.parametrize("pair", [("columns", "columns"), ("gaussian", "columns")])
def test_crosstalk_is_that_of_the_dense_updates(pair):
    one, two = trained("a", 1, scheme=pair[0], alpha=6), trained("b", 2, scheme=pair[1])
    found = crosstalk(one, two)
    assert set(found) == {"emb", "body.lin", "body.turned", "conv"}
    for name, value in found.items():
        d1, d2 = (dense(h.layers[name]).double() for h in (one, two))
        wanted = float((d1 @ d2.T).norm() / (d1.norm() * d2.norm()))
        assert value == pytest.approx(wanted, abs=1e-7)
    zero = add_orthogonal_adapters(Net(), 3, adapter_id="z", target_modules=TARGETS)
    assert set(crosstalk(one, zero).values()) == {0.0}


def test_slots_do_not_meet():
    handles = [trained(i, i, scheme="slots", slot=i) for i in range(3)]
    for one, two in itertools.combinations(handles, 2):
        assert max(crosstalk(one, two).values()) < 1e-6
        assert set(shared_columns(one, two).values()) == {0}
    merged = merge_adapters(handles, 1.0)
    # On its own inputs an adapter does not notice the others.
    for name in ("body.lin", "conv"):
        b = handles[1].layers[name].projection.matrix()
        alone = dense(handles[1].layers[name])
        torch.testing.assert_close(merged.layers[name].delta().flatten(1) @ b, alone @ b,
                                   atol=1e-5, rtol=1e-5)  # fmt: skip


def test_shared_columns_are_counted():
    one, two = trained("a"), trained("b")
    for name, count in shared_columns(one, two).items():
        b1, b2 = (h.layers[name].projection.matrix(torch.float64) for h in (one, two))
        assert float((b1.T @ b2).square().sum()) == pytest.approx(count, abs=1e-10)
    assert shared_columns(one, trained("b", seed=3, basis="qr")) == {}
    assert shared_columns(one, trained("g", scheme="gaussian")) == {}
    # Another layer has other columns: one collision is not a collision everywhere.
    assert one.layers["emb"].projection.columns != one.layers["conv"].projection.columns


@settings(max_examples=15, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    n=st.integers(1, 6), m=st.integers(4, 12), seed=st.integers(0, 99),
)  # fmt: skip
def test_merging_is_the_dense_sum_in_any_order(ranks, n, m, seed):
    g = torch.Generator().manual_seed(seed)
    handles = [
        OrthogonalAdapters(
            i, {"l": LayerUpdate(Projection(m, r, i), torch.randn(n, r, generator=g), 0.5 + i)}
        )
        for i, r in enumerate(ranks)
    ]
    weights = [0.6 + i for i in range(len(ranks))]
    wanted = sum(w * dense(h.layers["l"]) for w, h in zip(weights, handles, strict=True))
    merged = merge_adapters(handles, weights)
    assert merged.layers["l"].rank == sum(ranks)
    torch.testing.assert_close(merged.layers["l"].delta(), wanted, atol=1e-5, rtol=1e-5)
    turned = merge_adapters(handles[::-1], weights[::-1])
    torch.testing.assert_close(turned.layers["l"].delta(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_folding_equals_the_adapter_and_the_concatenation(dtype):
    handles = [trained(name, i, Net().to(dtype)) for i, name in enumerate("ab")]
    image = IMAGE.to(dtype)
    with torch.no_grad():
        alone = handles[0].model(IDS, image)
    one = merge_adapters(handles[:1], 1)
    plain = one.fold_into(Net().to(dtype))
    tolerance = {torch.bfloat16: 0.15, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    for y, wanted in zip(plain(IDS, image), alone, strict=True):
        torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    both = merge_adapters(handles)
    expected = both.fold_into(Net().to(dtype)).state_dict()
    model = merge_adapters(handles, mode="fold")
    assert model is handles[0].model
    assert not handles[0].attached
    assert handles[1].attached
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])
        assert value.dtype == dtype
    elsewhere = merge_adapters(handles, 0.6, "fold", model=Net().to(dtype))
    assert torch.equal(elsewhere.conv.weight, model.conv.weight)


def test_merges_that_are_refused():
    one, two = trained("a"), trained("b")
    with pytest.raises(ValueError, match="at least one adapter"):
        merge_adapters([])
    with pytest.raises(ValueError, match="2 adapters need as many finite weights"):
        merge_adapters([one, two], [1.0])
    with pytest.raises(ValueError, match="finite weights"):
        merge_adapters([one, two], float("inf"))
    other = trained("b", seed=2)
    other_seed = add_orthogonal_adapters(Net(), 3, adapter_id="c", seed=5, target_modules=TARGETS)
    with pytest.raises(ValueError, match=r"'a' and 'c' have different seeds in .*, 0 and 5"):
        merge_adapters([one, other_seed])
    assert merge_adapters([one, other_seed], force=True).layers["emb"].rank == 6
    for options, field in (({"basis": "qr"}, "bases|basiss"), ({"scheme": "gaussian"}, "schemes")):
        with pytest.raises(ValueError, match=f"different ({field})"):
            merge_adapters([one, trained("d", **options)])
    with pytest.warns(UserWarning, match=r"same adapter_id twice: \['b'\]"):
        merge_adapters([two, other])
    slots = [trained(i, scheme="slots", slot=1) for i in "xy"]
    with pytest.raises(ValueError, match=r"slots of adapters 'x' and 'y' overlap"):
        merge_adapters(slots)
    assert merge_adapters(slots, force=True).layers["emb"].rank == 6
    with pytest.raises(ValueError, match="model is needed"):
        merge_adapters([OrthogonalAdapters("a", one.layers)], mode="fold")
    with torch.no_grad():
        next(two.parameters())[0, 0] = float("nan")
    for call in (lambda: merge_adapters([one, two]), lambda: crosstalk(one, two)):
        with pytest.raises(ValueError, match="A of emb must be finite"):
            call()
    wide = OrthogonalAdapters(
        "w", {"emb": LayerUpdate(Projection(31, 3, "w"), torch.ones(16, 3), 1.0)}
    )
    with pytest.raises(ValueError, match=r"layer emb have different shapes: .*16 × 30.*16 × 31"):
        merge_adapters([one, wide])


def test_folds_that_are_refused():
    handle = trained("a")
    merged = merge_adapters([handle])
    with pytest.raises(ValueError, match="carries adapter 'a'; detach it"):
        merged.fold_into(handle.model)
    with pytest.raises(ValueError, match="no layer"):
        merged.fold_into(nn.Linear(2, 2))
    model = Net()
    model.conv = nn.Conv2d(3, 5, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"conv must have a weight of shape \(5, 3, 3, 3\)"):
        merged.fold_into(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_putting_on_and_taking_off():
    model = Net()
    model.emb.weight.requires_grad_(False)
    one = trained("a", model=model)
    with pytest.raises(ValueError, match="carries an adapter"):
        trained("b", model=model)
    with torch.no_grad():
        wanted = model(IDS, IMAGE)[0]
    assert one.attached
    assert one.detach() is model
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 6
    with pytest.raises(ValueError, match="not on a model"):
        one.detach()
    two = trained("b", 2, model)
    with pytest.raises(ValueError, match="carries an adapter"):
        one.attach()
    two.detach()
    one.attach()
    assert torch.equal(model(IDS, IMAGE)[0], wanted)
    with pytest.raises(ValueError, match="has no model"):
        OrthogonalAdapters("x").attach()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": 13}, ValueError, r"r must be in 1\.\.12, the input's width of body\.turned"),
        ({"r": 0}, ValueError, r"r must be in 1\.\."),
        ({"scheme": "slots", "slot": 4}, ValueError, r"slot must be in 0\.\.3 for rank 3 of"),
        ({"scheme": "slots"}, ValueError, "slot is for scheme='slots'"),
        ({"slot": 0}, ValueError, "slot is for scheme='slots'"),
        ({"target_modules": ["lin", "nose"]}, ValueError, "nose match no layer.*conv"),
        ({"target_modules": "lin"}, ValueError, "lin match no layer"),
        ({"target_modules": []}, ValueError, "none given"),
        ({"target_modules": ["body"]}, TypeError, "body must be Linear.*ModuleDict"),
    ],
)
def test_adapters_that_cannot_be_made(arguments, error, message):
    model = Net()
    with pytest.raises(error, match=message):
        add_orthogonal_adapters(
            model, **({"r": 3, "adapter_id": "a", "target_modules": TARGETS} | arguments)
        )
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.conv) is nn.Conv2d


def test_layers_that_cannot_be_adapted():
    with pytest.raises(ValueError, match="2 groups"):
        OrthogonalAdapter(nn.Conv2d(4, 4, 3, groups=2), 1, adapter_id=0)
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="not quantised"):
        OrthogonalAdapter(quantised, 1, adapter_id=0)


def test_targets_by_expression():
    handle = add_orthogonal_adapters(Net(), 2, adapter_id=0, target_modules=r"body\.(lin|turned)")
    assert list(handle.layers) == ["body.lin", "body.turned"]


def test_state_dicts(tmp_path):
    handle = trained("a")
    state = handle.state_dict()
    assert set(state) == {f"{n}.A" for n in handle.layers}
    fresh = trained("a", 9)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.model(IDS, IMAGE)[1], handle.model(IDS, IMAGE)[1])
    with pytest.raises(KeyError, match=r"conv\.A"):
        fresh.load_state_dict({k: v for k, v in state.items() if k != "conv.A"})
    with pytest.raises(ValueError, match=r"conv\.A must be \(5, 3\)"):
        fresh.load_state_dict(state | {"conv.A": torch.ones(5, 2)})
    with pytest.raises(ValueError, match="must be finite"):
        fresh.load_state_dict(state | {"conv.A": torch.full((5, 3), torch.inf)})
    # The whole model's state dict says whose B it holds.
    whole = handle.model.state_dict()
    assert fresh.model.load_state_dict(whole).missing_keys == []
    half = {k: v.bfloat16() for k, v in whole.items()}
    fresh.model.load_state_dict(half)
    assert torch.equal(fresh.modules["conv"].down, handle.modules["conv"].down)
    with pytest.raises(RuntimeError, match=r"not the B of .*another seed"):
        trained("b").model.load_state_dict(whole)


def test_files_hold_half_and_give_everything_back(tmp_path):
    handle = trained("a", scheme="slots", slot=1, alpha=6)
    compact = handle.save(tmp_path / "compact")
    full = handle.export_peft(tmp_path / "full")
    tensors = load_file(compact / "orthogonal_adapter.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in handle.parameters())
    for folder in (compact, full):
        read = load_orthogonal_adapters(folder)
        assert read.metadata == handle.metadata
        assert crosstalk(read, handle) == crosstalk(handle, handle)
        model = Net()
        loaded = load_orthogonal_adapters(folder, model)
        assert loaded.attached
        for y, wanted in zip(model(IDS, IMAGE), handle.model(IDS, IMAGE), strict=True):
            assert torch.equal(y, wanted)
        merged = merge_adapters([read, trained("b", scheme="slots", slot=0)], mode="cat")
        assert merged.layers["conv"].rank == 6
    with pytest.raises(FileExistsError, match="overwrite=True"):
        handle.save(compact)
    handle.save(compact, overwrite=True)


def test_files_that_contradict_themselves(tmp_path):
    handle = trained("a")
    folder = handle.export_peft(tmp_path / "a")
    notes = folder / "orthogonal_adapter.json"
    content = json.loads(notes.read_text())
    wrong = copy.deepcopy(content)
    wrong["layers"]["conv"]["projection"]["seed"] = 4
    notes.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"conv: stored columns .* under seed 4"):
        load_orthogonal_adapters(folder)
    notes.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        load_orthogonal_adapters(folder)
    notes.write_text(json.dumps(content))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.conv.lora_A.weight"
    save_file(tensors | {key: tensors[key] + 0.01}, file)
    with pytest.raises(ValueError, match="down-projection of conv is not the shared one"):
        load_orthogonal_adapters(folder)
    with pytest.raises(FileNotFoundError, match="not an orthogonal adapter"):
        load_orthogonal_adapters(tmp_path)
    model = Net()
    model.body["lin"] = nn.Linear(16, 9)
    handle.save(tmp_path / "b")
    with pytest.raises(ValueError, match=r"body\.lin is linear 9 × 16 in the model"):
        load_orthogonal_adapters(tmp_path / "b", model)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("merge", [False, True])
def test_exports_load_in_peft_as_they_are(tmp_path, merge):
    handles = [trained("a", 1, alpha=6), trained("b", 2, alpha=6)]
    if merge:
        merged = merge_adapters(handles, [0.5, 2])
        merged.export_peft(tmp_path / "out", task_type=None)
        expected = merged.fold_into(Net())
    else:
        handles[0].export_peft(tmp_path / "out", base_model="some/base")
        expected = handles[0].model
    model = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "out"), is_trainable=True)
    with torch.no_grad():
        for y, wanted in zip(model(IDS, IMAGE), expected(IDS, IMAGE), strict=True):
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    assert freeze_down_projections(model) == 4
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 4
    assert all("_B" in n for n in trainable)
    with pytest.raises(ValueError, match="no LoRA layers of adapter 'other'"):
        freeze_down_projections(model, "other")


def test_exports_that_peft_would_run_otherwise(tmp_path):
    for options in ({"dilation": 2}, {"padding": 1, "padding_mode": "circular"}):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, **options))
        handle = add_orthogonal_adapters(model, 2, adapter_id=0, target_modules=["0"])
        image = torch.randn(1, 3, 9, 9)
        with torch.no_grad():
            next(handle.parameters()).fill_(1.0)
            wanted = model(image)
            merged = merge_adapters([handle], 1.0, "fold")
            torch.testing.assert_close(merged(image), wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"PEFT .* would run its factors without them"):
            export_peft(handle, tmp_path / "x")
    with pytest.raises(ValueError, match="no layers to export"):
        export_peft(OrthogonalAdapters("e"), tmp_path / "x")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_the_shared_basis_inside_peft(tmp_path):
    """Trained there, saved by PEFT, merged here: the sum of the same orthogonal adapters."""
    handles, paths = [], []
    for i, name in enumerate("ab"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=TARGETS))
        found = share_basis(model, adapter_id=name)
        handles.append(trained(name, i))
        assert found == {n: layer.projection for n, layer in handles[-1].layers.items()}
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert len(trainable) == 4
        assert all("_B" in n for n in trainable)
        with torch.no_grad():
            for n, p in trainable.items():
                layer = next(k for k in handles[-1].layers if f".{k}." in n)
                p.copy_(handles[-1].layers[layer].a.reshape(p.shape))
        with pytest.raises(ValueError, match="not zero: call share_basis before"):
            share_basis(model, adapter_id=name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.save_pretrained(str(tmp_path / name))
        paths.append(tmp_path / name)
    from stiefel.merge import Adapter

    report = merge_lora_adapters(paths, tmp_path / "sum", 0.6)
    ours = merge_adapters(handles, 0.6)
    scale = 8 / 3  # PEFT's lora_alpha is 8
    for name in report.modules:
        found = Adapter(tmp_path / "sum").low_rank(name).delta()
        torch.testing.assert_close(found, scale * ours.layers[name].delta(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no LoRA layers"):
        share_basis(Net(), adapter_id="a")


def test_optimizer_state_is_that_of_a_alone():
    handle = trained("a")
    optimizer = torch.optim.Adam(handle.parameters())
    sum(y.sum() for y in handle.model(IDS, IMAGE)).backward()
    optimizer.step()
    held = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    assert held == sum(len(layer.a) * 3 for layer in handle.layers.values())


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=16)).eval()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize(
    ("make", "targets"),
    [(gpt2, ["c_attn", "c_proj"]), (llama, ["q_proj", "k_proj", "down_proj", "embed_tokens"])],
)
def test_language_models(tmp_path, make, targets):
    """Square weights stored [in, out] among them: summed, exported, loaded, folded, equal."""
    from stiefel.merge import Adapter

    ids = torch.arange(12)[None]
    handles = []
    for i in range(2):
        options = {"scheme": "slots", "slot": i, "target_modules": targets}
        handles.append(trained(i, i, make(), **options))
    merged = merge_adapters(handles)
    merged.export_peft(tmp_path / "out", task_type="CAUSAL_LM")
    with torch.no_grad():
        wanted = merged.fold_into(make())(ids).logits
        model = peft.PeftModel.from_pretrained(make(), str(tmp_path / "out"))
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        adapter, folded = Adapter(tmp_path / "out"), make()
        state = folded.state_dict()
        for name, tensor in adapter.resolve(state).items():
            state[name] = adapter.fold(tensor, state[name])
        folded.load_state_dict(state)
        torch.testing.assert_close(folded(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        assert (make()(ids).logits - wanted).abs().max() > 0.1

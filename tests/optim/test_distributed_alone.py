"""One rank with DTensors, in this process: the same code with annotations checked, no messages."""

import copy

import distributed_jobs as jobs
import pytest
import torch
import torch.distributed as dist
from law_table import ROWS, every_row, same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from stiefel.optim import ARO, ROOT, Muon, NorMuon, distribution_plan
from stiefel.optim.distributed import pipeline, planner


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(tensor, mesh):
    return DTensor.from_local(tensor.clone(), mesh, [Shard(0)], run_check=False)


def build(row, mesh):
    params = jobs.named("p", [sharded(t, mesh) for t in jobs.initial()])
    return jobs.build(row, [params])


def train(optimizer, mesh, steps, start=0):
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(start, start + steps):
        for p, g in zip(params, jobs.gradients(step), strict=True):
            p.grad = sharded(g, mesh)
        optimizer.step()
    return [p.detach().to_local() for p in params]


@every_row
def test_one_rank_equals_plain_tensors_and_its_state_goes_both_ways(row, mesh):
    plain, expected = jobs.single(row, 2)
    optimizer = build(row, mesh)
    for mine, right in zip(train(optimizer, mesh, 2), expected, strict=True):
        assert jobs.distance(mine, right) <= 1e-6
    # Whole plain tensors into shards, and shards into plain tensors.
    state = copy.deepcopy(plain.state_dict())
    resumed = build(row, mesh)
    resumed.load_state_dict(state)
    shown = resumed.state_dict()["state"]
    for number, own in state["state"].items():
        for key, value in own.items():
            found = shown[number][key]
            assert same(found.to_local() if isinstance(found, DTensor) else found, value)


def test_every_row_is_there():
    assert len(ROWS) == len({row.name for row in ROWS})


def test_state_of_another_shape_is_refused(mesh):
    row = next(r for r in ROWS if r.cls is NorMuon)
    optimizer, other = build(row, mesh), jobs.single(row, 1)[0].state_dict()
    other["state"][0]["second_moment"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"'second_moment' of parameter 'p.0' has shape \(7,\)"):
        optimizer.load_state_dict(other)


def test_parameters_sharded_after_the_optimizer_was_made(mesh):
    """As accelerate does it: other lists of parameters in the groups."""
    weight, gradient = torch.randn(6, 4), torch.randn(6, 4)
    plain, later = Muon([nn.Parameter(weight.clone())]), Muon([nn.Parameter(weight.clone())])
    later.param_groups[0]["params"] = [nn.Parameter(sharded(weight, mesh))]
    for optimizer, grad in ((plain, gradient), (later, sharded(gradient, mesh))):
        optimizer.param_groups[0]["params"][0].grad = grad
        optimizer.step()
    p, q = (o.param_groups[0]["params"][0].detach() for o in (plain, later))
    assert jobs.distance(q.to_local(), p) <= 1e-6


def test_shared_rotations_and_their_idle_owners(mesh):
    """The rotation is with a parameter that has no gradient, as in one process."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 12, bias=False), nn.Linear(12, 6, bias=False)

    torch.manual_seed(0)
    model = nn.ModuleList([Layer(), Layer()])
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(sharded(p.detach(), mesh)))
    options = {"share": "layer", "product_dtype": torch.float32}
    plain = ARO(model.named_parameters(), **options)
    ours = ARO(twin.named_parameters(), **options)
    for step in range(4):
        for i, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            idle = i == 0 and step < 2
            p.grad, q.grad = (None, None) if idle else (grad, sharded(grad, mesh))
        plain.step()
        ours.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert jobs.distance(q.detach().to_local(), p.detach()) <= 1e-6
    plan = distribution_plan(ours)
    assert len(plan.assignments) == 4
    assert plan.bytes_sent == (0,)


def test_messages_are_under_way_while_matrices_are_updated(mesh, monkeypatch):
    """Of each round: the next gather starts before its update, the last scatter ends after it."""
    events, kinds = [], {}
    launch, update, apply_all = pipeline.launch, pipeline.Pipeline._update, pipeline._apply_all

    def launched(lane, message, *args, **kwargs):
        kind = "scatter" if "flag" in kwargs else "gather"
        number = sum(event[:2] == ("start", kind) for event in events)
        events.append(("start", kind, number))
        flight = launch(lane, message, *args, **kwargs)
        kinds[id(flight)] = number
        return flight

    def updated(*args):
        events.append(("update", "", sum(event[0] == "update" for event in events)))
        return update(*args)

    def applied(flight, *args):
        events.append(("end", "scatter", kinds[id(flight)]))
        return apply_all(flight, *args)

    monkeypatch.setattr(pipeline, "launch", launched)
    monkeypatch.setattr(pipeline.Pipeline, "_update", updated)
    monkeypatch.setattr(pipeline, "_apply_all", applied)
    monkeypatch.setattr(planner, "SMALLEST_ROUND", 1)
    optimizer = Muon([nn.Parameter(sharded(torch.randn(6, 4), mesh)) for _ in range(4)])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = sharded(torch.randn(6, 4), mesh)
    optimizer.step()
    order = {event: place for place, event in enumerate(events)}
    assert len(order) == len(events) == 4 * 4
    for k in range(4):
        assert order["update", "", k] < order["start", "scatter", k]
        if k < 3:
            assert order["start", "gather", k + 1] < order["update", "", k]
            assert order["update", "", k + 1] < order["end", "scatter", k]


def test_copies_go_on_alike(mesh):
    row = next(r for r in ROWS if r.cls is NorMuon)
    optimizer = build(row, mesh)
    train(optimizer, mesh, 2)
    twin = copy.deepcopy(optimizer)
    pairs = zip(train(optimizer, mesh, 2, 2), train(twin, mesh, 2, 2), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["muon-spectral", "rmnp-nesterov", "auon-paper", "dct-plain"])
def test_other_dtypes(mesh, dtype, name):
    row = next(r for r in ROWS if r.name == name)
    tensors = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    plain = row([nn.Parameter(tensors[0].to(dtype))], weight_decay=0.1)
    ours = row([nn.Parameter(sharded(tensors[0].to(dtype), mesh))], weight_decay=0.1)
    for tensor in tensors[1:]:
        plain.param_groups[0]["params"][0].grad = tensor.to(dtype)
        ours.param_groups[0]["params"][0].grad = sharded(tensor.to(dtype), mesh)
        plain.step()
        ours.step()
    p, q = (o.param_groups[0]["params"][0].detach() for o in (plain, ours))
    assert q.dtype == dtype
    # The update is rounded once more on its way: half a unit in the last place of each.
    far = jobs.distance(q.to_local().double(), p.double())
    assert far <= {torch.float64: 1e-14}.get(dtype, 2 * torch.finfo(dtype).eps)


def test_removed_outliers(mesh):
    row = next(r for r in ROWS if r.cls is ROOT)
    plain, _ = jobs.single(row, 2)
    optimizer = build(row, mesh)
    train(optimizer, mesh, 2)
    expected, found = plain.removed(), optimizer.removed()
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values)


def test_refusals(mesh):
    optimizer = Muon([nn.Parameter(torch.randn(4, 3))])
    optimizer.distribute()
    with pytest.raises(TypeError, match="cannot be copied; use its state_dict"):
        copy.deepcopy(optimizer)
    other = Muon([nn.Parameter(torch.randn(4, 3))])
    other.param_groups[0]["params"][0].grad = torch.randn(4, 3)
    other.step()
    with pytest.raises(RuntimeError, match="before the first step"):
        other.distribute()
    weight = nn.Parameter(sharded(torch.randn(4, 3), mesh))
    with pytest.raises(ValueError, match="world_size is for optimizers of plain parameters"):
        distribution_plan(Muon([weight]), 2)

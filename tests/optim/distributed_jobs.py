"""What ranks do in the tests of distributed optimizers; see :mod:`ranks`."""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from law_table import ROWS, noise
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from stiefel.optim import distribution_plan
from stiefel.optim.distributed import planner

# Settings of a group → shapes of its parameters. Rows, columns and matrices that four ranks cannot
# share equally, and fewer of them than ranks.
GROUPS = (
    ({"rule": "matrix"}, ((6, 4), (6, 4), (4, 6), (5, 5), (3, 2), (6, 3, 2, 2))),
    ({"rule": "matrix", "blocks": 3}, ((9, 5),)),
    ({"rule": "matrix", "blocks": (4, 1, 2)}, ((7, 5),)),
    ({"rule": "matrix", "view": "batch"}, ((3, 4, 5),)),
    ({"rule": "matrix", "view": "transpose", "blocks": 2}, ((5, 6),)),
    ({"rule": "elementwise"}, ((4,), (3, 7))),
)
SHAPES = tuple(shape for _, shapes in GROUPS for shape in shapes)
FLOAT32 = ("ns_dtype", "product_dtype")  # bfloat16 products depend on what is multiplied together


def layouts(world):
    """Name → (mesh, placements)."""
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("all",))
    if world == 2:
        return {
            "rows": (line, (Shard(0),)),
            "columns": (line, (Shard(1),)),
            "replicated": (line, (Replicate(),)),
        }
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    return {
        "rows": (line, (Shard(0),)),
        "fsdp x tp columns": (square, (Shard(0), Shard(1))),
        "fsdp x tp rows": (square, (_StridedShard(0, split_factor=2), Shard(0))),
        "hsdp": (square, (Replicate(), Shard(0))),
        "replicated": (square, (Replicate(), Replicate())),
        "tp rows alone": (square["inner"], (Shard(0),)),
        "tp columns alone": (square["inner"], (Shard(1),)),
    }


def place(whole, mesh, placements):
    """This rank's part of a tensor that all ranks have; vectors are cut by rows alone."""
    placements = [
        Shard(0) if isinstance(p, Shard) and p.dim >= whole.ndim else p for p in placements
    ]
    sizes, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    part = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    local = whole[part].reshape(sizes).clone()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def initial():
    return [noise(shape, i, torch.float32) for i, shape in enumerate(SHAPES)]


def gradients(step):
    return [noise(shape, 1000 + 100 * step + i, torch.float32) for i, shape in enumerate(SHAPES)]


def groups_of(params):
    """Parameter groups of as many sets of parameters as there are layouts."""
    made = [{**settings, "params": []} for settings, _ in GROUPS]
    numbers = [n for n, (_, shapes) in enumerate(GROUPS) for _ in shapes]
    for own in params:
        for number, (name, p) in zip(numbers, own, strict=True):
            made[number]["params"].append((name, p))
    return made


def build(row, params, **overrides):
    known = inspect.signature(row.cls).parameters
    exact = {key: torch.float32 for key in FLOAT32 if key in known}
    return row(groups_of(params), **exact, **overrides)


def named(prefix, tensors):
    return [(f"{prefix}.{i}", nn.Parameter(t)) for i, t in enumerate(tensors)]


def distance(actual, expected):
    """Largest difference of a parameter by its largest entry."""
    return float((actual - expected).abs().max() / expected.abs().max())


def local_distance(parameter, expected, where):
    """As :func:`distance`, of what this rank holds."""
    mine, right = parameter.detach().to_local(), place(expected, *where).to_local()
    assert mine.shape == right.shape
    return float((mine - right).abs().max() / expected.abs().max()) if mine.numel() else 0.0


def gathered(values):
    """The union of every rank's dictionary."""
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, values)
    return {key: value for own in every for key, value in own.items()}


def single(row, steps, start=0, optimizer=None):
    """One process's optimizer after some steps, and its parameters."""
    if optimizer is None:
        optimizer = build(row, [named("p", initial())])
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(start, start + steps):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
    return optimizer, [p.detach() for p in params]


def every_method_in_every_layout(rank, world, steps, rows):
    """(row, layout) → distance from one process after ``steps``.

    Each rank works out its share of what is expected, then compares what it holds of everything.
    """
    expected = gathered({row.name: single(row, steps)[1] for row in ROWS[rows][rank::world]})
    places = layouts(world)
    placed = [
        [[place(g, *where) for g in gradients(step)] for where in places.values()]
        for step in range(steps)
    ]
    found = {}
    for number, row in enumerate(ROWS[rows]):
        # Every other row in many rounds, one matrix in each.
        planner.SMALLEST_ROUND = 1 if number % 2 else 1 << 17
        params = [named(n, [place(w, *where) for w in initial()]) for n, where in places.items()]
        optimizer = build(row, params)
        for step in range(steps):
            for own, grads in zip(params, placed[step], strict=True):
                for (_, p), g in zip(own, grads, strict=True):
                    p.grad = g
            optimizer.step()
        for (layout, where), own in zip(places.items(), params, strict=True):
            pairs = zip(own, expected[row.name], strict=True)
            found[row.name, layout] = max(local_distance(p, e, where) for (_, p), e in pairs)
    return found


# Checkpoints


def holder(params):
    """A module that has the parameters, so that checkpoints know their names."""
    model = nn.Module()
    model.p = nn.ParameterList([p for _, p in params])
    return model


def saved(models):
    """What goes into a checkpoint, of row name → (model, optimizer)."""
    parts = {}
    for name, (model, optimizer) in models.items():
        weights, state = get_state_dict(model, optimizer)
        parts[name] = {"model": weights, "optimizer": state}
    return parts


def load(models, folder):
    parts = saved(models)
    dcp.load(parts, checkpoint_id=folder, no_dist=not dist.is_initialized())
    for name, (model, optimizer) in models.items():
        weights, state = parts[name]["model"], parts[name]["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


# Rows that differ in what is kept.
KEPT = tuple({(row.cls, row.first, row.extra): row for row in reversed(ROWS)}.values())


def built(rows, where):
    """Row name → (model, optimizer) on ranks, or on one process."""
    models = {}
    for row in rows:
        tensors = [t if where is None else place(t, *where) for t in initial()]
        params = named("p", tensors)
        models[row.name] = (holder(params), build(row, [params]))
    return models


def go_on(models, where, start, steps):
    for step in range(start, start + steps):
        grads = [g if where is None else place(g, *where) for g in gradients(step)]
        for model, optimizer in models.values():
            for p, g in zip(model.p, grads, strict=True):
                p.grad = g
            optimizer.step()


def train_and_save(rank, world, layout, source, target, start, steps):
    """Load, train, save."""
    where = layouts(world)[layout]
    models = built(KEPT, where)
    if source:
        load(models, source)
    go_on(models, where, start, steps)
    dcp.save(saved(models), checkpoint_id=target)


def state_shapes(rank, world):
    """Row name → parameter number → key → (shape, whether a DTensor) of state_dict()."""
    where = layouts(world)["rows"]
    models = built(KEPT, where)
    go_on(models, where, 0, 2)
    return {
        name: {
            number: {
                key: (tuple(v.shape), v.dtype, isinstance(v, DTensor)) for key, v in state.items()
            }
            for number, state in optimizer.state_dict()["state"].items()
        }
        for name, (_, optimizer) in models.items()
    }


# Traffic

TRAFFIC = ((24, 16), (24, 16), (16, 40), (31, 17))


class Counter:
    """Bytes handed to collectives for other ranks, by name of the collective."""

    def __init__(self):
        self.bytes = {}
        for name in ("all_to_all_single", "all_reduce", "all_gather", "broadcast", "barrier"):
            setattr(dist, name, self.counted(name, getattr(dist, name)))

    def counted(self, name, function):
        def call(*args, **kwargs):
            place = {"all_to_all_single": 1, "all_gather": 1, "all_reduce": 0, "broadcast": 0}
            tensor = args[place[name]] if name in place else torch.empty(0)
            size = tensor.numel() * tensor.element_size()
            if name == "broadcast":  # the source's, once to every other rank
                peers = dist.get_world_size(kwargs.get("group")) - 1
                size *= peers if args[1] == dist.get_rank() else 0
            self.bytes[name] = self.bytes.get(name, 0) + size
            return function(*args, **kwargs)

        return call


def traffic(rank, world, names):
    """Row name → layout → (bytes by collective in the third step, bytes sent by the plan)."""
    counter, found = Counter(), {}
    for row in (r for r in ROWS if r.name in names):
        for layout, where in layouts(world).items():
            tensors = [noise(s, i, torch.float32) for i, s in enumerate(TRAFFIC)]
            params = [nn.Parameter(place(t, *where)) for t in tensors]
            optimizer = row(params)
            for step in range(3):
                counter.bytes = {}
                for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
                    p.grad = place(noise(tuple(t.shape), 10 * step + i, torch.float32), *where)
                optimizer.step()
            plan = distribution_plan(optimizer)
            number = plan.ranks.index(rank)
            found[row.name, layout] = (
                dict(counter.bytes),
                plan.gather_bytes[number] + plan.scatter_bytes[number],
                plan.reduce_bytes[number],
                plan.minimum_bytes,
            )
    return found

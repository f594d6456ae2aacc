"""Real modules under FSDP2, tensor parallelism and DDP; see :mod:`ranks`."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from stiefel.optim import ARO, RMNP, AuON, NorMuon, split_parameters

BATCH, WIDTH, STEPS = 8, 12, 20


class Net(nn.Module):
    """An embedding, fused and convolved weights, two halves of a feed-forward layer, a head."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(10, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        h = self.tokens(x)
        h = h + self.conv(h.mT).mT
        q, k, v = self.qkv(h).chunk(3, -1)
        h = h + nn.functional.scaled_dot_product_attention(q, k, v) + self.frozen(h)
        return self.head(h + self.down(torch.relu(self.up(h))))


def net():
    torch.manual_seed(0)
    return Net()


def batch(step, rank=0, world=1):
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(10, (BATCH, 6), generator=generator)
    y = torch.randint(10, (BATCH, 6), generator=generator)
    return x[rank::world], y[rank::world]


def train(model, optimizer, rank=0, world=1, *, network=None, scaler=None, closure=False):
    """Losses of some steps with clipping and a schedule; this rank sees its part of each batch."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=STEPS + 1
    )
    network, losses = network or model, []
    for step in range(STEPS):
        x, y = batch(step, rank, world)

        def backward(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x).flatten(0, 1), y.flatten())
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            return loss

        if closure:
            loss = optimizer.step(backward)
        else:
            loss = backward()
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    if world > 1:
        dist.all_reduce(losses)
    return losses / world


def build(cls, model):
    options = {"ns_dtype": torch.float32} if cls is NorMuon else {}
    groups = split_parameters(model, split={"qkv": 3})
    return cls(groups, lr=0.02, weight_decay=0.1, adamw_lr=0.01, **options)


def furthest(model, reference):
    """Largest distance of a parameter from its reference, by the reference's largest entry."""
    far = 0.0
    with torch.no_grad():
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            assert whole.shape == q.shape, name
            far = max(far, float((whole - q).abs().max() / q.abs().max()))
    return far


def sharded(rank, world):
    """Name → (distance of parameters, of losses) from one process, on one mesh dimension."""
    found = {}
    for cls in (NorMuon, RMNP, AuON):
        reference = net()
        expected = train(reference, build(cls, reference))
        for name, options in {
            "plain": {},
            "scaled": {"scaler": torch.amp.GradScaler("cpu", init_scale=8.0)},
            "closure": {"closure": True},
        }.items():
            model = net()
            mesh = init_device_mesh("cpu", (world,))
            for layer in (model.qkv, model.up, model.down):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            losses = train(model, build(cls, model), rank, world, **options)
            gap = float((losses - expected).abs().max())
            found[cls.__name__, name] = (furthest(model, reference), gap)
    return found


def replicated(rank, world):
    """The same under DDP, every rank for itself and with the work spread."""
    found = {}
    for spread in (False, True):
        reference = net()
        expected = train(reference, build(NorMuon, reference))
        model = net()
        optimizer = build(NorMuon, model)
        if spread:
            optimizer.distribute()
        network = DistributedDataParallel(model, find_unused_parameters=True)
        losses = train(model, optimizer, rank, world, network=network)
        state = copy.deepcopy(optimizer.state_dict())
        rest = optimizer.state[model.qkv.weight]["second_moment"].numel()
        gap = float((losses - expected).abs().max())
        other = build(NorMuon, net())
        other.load_state_dict(state)  # one process takes what several have saved
        second = other.state_dict()["state"]
        same = all(
            torch.equal(second[n][k], v)
            for n, own in state["state"].items()
            for k, v in own.items()
        )
        again = build(NorMuon, net())  # and several what one has saved
        if spread:
            again.distribute()
        again.load_state_dict(other.state_dict())
        shown = again.state_dict()["state"]
        same = same and all(
            torch.equal(shown[n][k], v) for n, own in state["state"].items() for k, v in own.items()
        )
        found[spread] = (furthest(model, reference), gap, rest, same)
    return found


def two_dimensional(rank, world):
    """FSDP x tensor parallelism, as torch's own functions shard the weights."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("fsdp", "tp"))
    model = net()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["fsdp"])
    kinds = {str(tuple(p.placements)) for p in model.parameters()}
    optimizer = build(NorMuon, model)
    reference = net()
    twin = build(NorMuon, reference)
    for step in range(STEPS):  # no clipping: torch's wants all norms on one mesh
        parts = ((model, optimizer, rank // 2, world // 2), (reference, twin, 0, 1))
        for module, own, number, count in parts:
            x, y = batch(step, number, count)
            own.zero_grad()
            nn.functional.cross_entropy(module(x).flatten(0, 1), y.flatten()).backward()
            own.step()
    return furthest(model, reference), sorted(kinds)


def low_precision(rank, world):
    """dtype → distance from one process after three steps, by the largest entry."""
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        torch.manual_seed(0)
        weight = torch.randn(6, 4).to(dtype)
        p = nn.Parameter(weight.clone())
        q = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        optimizers = [NorMuon([own], ns_dtype=torch.float32) for own in (p, q)]
        for _ in range(3):
            p.grad = torch.randn(6, 4).to(dtype)
            q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        far = (q.detach().full_tensor() - p.detach()).abs().max() / p.detach().abs().max()
        found[str(dtype)] = float(far)
    return found


def shared_rotations(rank, world):
    """One rotation for the matrices of a layer, whose keeper has no gradient for two steps."""
    mesh = init_device_mesh("cpu", (world,))
    shapes = ((12, 6), (6, 12), (12, 6), (6, 12), (6, 6))
    names = ("0.up", "0.down", "1.up", "1.down", "2.w")
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in shapes]
    plain = [nn.Parameter(w.clone()) for w in weights]
    shards = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in weights]
    options = {"share": "layer", "product_dtype": torch.float32}
    optimizers = [ARO(list(zip(names, p, strict=True)), **options) for p in (plain, shards)]
    for step in range(5):
        for i, (p, q) in enumerate(zip(plain, shards, strict=True)):
            idle = i == 0 and step < 2
            grad = torch.randn(shapes[i])
            p.grad = None if idle else grad
            q.grad = None if idle else distribute_tensor(grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    keys = {n: sorted(state) for n, state in optimizers[1].state_dict()["state"].items()}
    far = [
        float((q.detach().full_tensor() - p.detach()).abs().max())
        for p, q in zip(plain, shards, strict=True)
    ]
    return max(far), keys


def partial_gradients(rank, world):
    """A gradient that is still a sum over ranks is summed before it is used."""
    mesh = init_device_mesh("cpu", (world,))
    found = []
    for placement in (Shard(0), Shard(1)):
        torch.manual_seed(0)
        weight, gradient = torch.randn(6, 4), torch.randn(6, 4)
        plain, p = (
            nn.Parameter(weight.clone()),
            nn.Parameter(distribute_tensor(weight, mesh, [placement])),
        )
        ours, theirs = NorMuon([p]), NorMuon([plain])
        for _ in range(3):
            plain.grad = gradient.clone()
            p.grad = DTensor.from_local(gradient / world, mesh, [Partial()])
            ours.step()
            theirs.step()
        found.append(float((p.detach().full_tensor() - plain.detach()).abs().max()))
    return found

"""OrthoReg on four processes over gloo against one process; run by test_orthoreg_sharded.py.

    python orthoreg_ranks.py FOLDER

Every rank writes what it found to FOLDER/RANK.json.
"""

import copy
import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from stiefel.regularize import OrthoReg

WORLD = 4
SHAPES = ((6, 4), (4, 6), (5, 5), (9, 2), (3, 8), (4, 3, 2, 2))


def noise(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Weights(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, values):
        super().__init__()
        for i, value in enumerate(values):
            self.register_parameter(f"w{i}", nn.Parameter(value))


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def difference(model, other):
    """Largest difference of gradients, over parameters."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((whole(p.grad) - q.grad).abs().max()) for p, q in pairs)


def layouts(found):
    line = init_device_mesh("cpu", (WORLD,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    cases = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "replicated": (line, [Replicate()]),
        "hsdp": (square, [Replicate(), Shard(0)]),
        "rows twice": (square, [Shard(0), Shard(0)]),
        "rows and columns": (square, [Shard(0), Shard(1)]),
    }
    starts = [noise(shape, i) for i, shape in enumerate(SHAPES)]
    ends = [w + 0.5 * noise(w.shape, 10 + i) for i, w in enumerate(starts)]
    for name, (mesh, placements) in cases.items():
        for options in ({}, {"power": 2}, {"target": "offdiag"}, {"sharded reference": False}):
            options = dict(options)
            cut = options.pop("sharded reference", True)
            plain = Weights([w.clone() for w in starts])
            model = Weights([distribute_tensor(w.clone(), mesh, placements) for w in starts])
            reference = None if cut else {f"w{i}": w for i, w in enumerate(starts)}
            pick = lambda name, p: True  # noqa: E731
            ours = OrthoReg(model, params=pick, reference=reference, **options)
            theirs = OrthoReg(plain, params=pick, **options)
            with torch.no_grad():
                for p, q, w in zip(model.parameters(), plain.parameters(), ends, strict=True):
                    p.copy_(distribute_tensor(w, mesh, placements))
                    q.copy_(w)
            mine, other = ours.loss(), theirs.loss()
            mine.backward()
            other.backward()
            case = f"{name} {options or cut}"
            found[case] = max(abs(float(mine - other)) / float(other), difference(model, plain))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 8))


def moved(model):
    """A few steps of the task alone, so that ΔW is not 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for seed in range(3):
        optimizer.zero_grad()
        model(noise((7, 6), seed)).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()


def gradients(model, reg, first):
    x = noise((7, 6), 99)
    if first:
        penalty = reg.loss()
        (0.1 * model(x).square().sum() + penalty).backward()
    else:
        (0.1 * model(x).square().sum() + reg.loss()).backward()


def wrapped(found):
    """FSDP2, built before and after the penalty, and DDP; the same batch on every rank."""
    plain = network()
    start = copy.deepcopy(plain.state_dict())
    theirs = OrthoReg(plain)
    moved(plain)
    end = copy.deepcopy(plain.state_dict())
    gradients(plain, theirs, False)

    mesh = init_device_mesh("cpu", (WORLD,))
    for early in (True, False):
        for first in (True, False):
            model = network()
            ours = OrthoReg(model) if early else None
            for layer in model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            ours = ours or OrthoReg(model, reference=start)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(distribute_tensor(end[name], p.device_mesh, p.placements))
            gradients(model, ours, first)
            found[f"fully_shard, early {early}, first {first}"] = difference(model, plain)

    model = fully_shard(network(), mesh=mesh, reshard_after_forward=False)
    ours = OrthoReg(model)
    model(noise((7, 6), 0))
    gathered = isinstance(model[0].weight, DTensor)
    penalised = all(isinstance(update.parameter(), DTensor) for update in ours.updates.values())
    found["shards are penalised where the model holds whole matrices"] = gathered + (not penalised)

    model = network()
    ours = OrthoReg(nn.parallel.DistributedDataParallel(model))
    model.load_state_dict(end)
    parallel = nn.parallel.DistributedDataParallel(model)
    gradients(parallel, ours, False)
    found["DDP"] = difference(model, plain)


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    found = {}
    layouts(found)
    wrapped(found)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads abort the interpreter's clearing up now and then


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=main, args=(r, sys.argv[1])) for r in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))

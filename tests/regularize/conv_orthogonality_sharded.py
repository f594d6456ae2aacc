"""Two ranks with sharded weights: the penalty and its gradients are those of one process."""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from stiefel.nn import lorth, orthogonalize_
from stiefel.regularize import OrthogonalityPenalty

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
whole = nn.Sequential(
    nn.Conv2d(2, 7, 3),  # 7 rows do not halve
    nn.Conv2d(7, 4, 3, stride=2),
    nn.Conv2d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(6, 2, 3),
    nn.Flatten(),
    nn.Linear(8, 5),
)
for placement in (Shard(0), Shard(1), Replicate()):
    parts = copy.deepcopy(whole)
    for module in parts:
        for name, p in list(module.named_parameters()):
            place = placement if p.ndim > 1 else Replicate()
            shared = distribute_tensor(p.detach(), mesh, [place])
            setattr(module, name, nn.Parameter(shared))
    for model in (whole, parts):
        model.zero_grad()
    expected, found = OrthogonalityPenalty(whole, lam=0.3), OrthogonalityPenalty(parts, lam=0.3)
    value = found()
    assert not isinstance(value, DTensor)
    torch.testing.assert_close(value, expected())
    value.backward()
    expected().backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None, name
            continue
        assert b.grad.placements == b.placements, name
        torch.testing.assert_close(b.grad.full_tensor(), a.grad)
    for a, b in zip(expected.report(), found.report(), strict=True):
        assert (a.name, a.case, a.feasible) == (b.name, b.case, b.feasible)
        assert abs(a.value - b.value) < 1e-6
    if placement == Shard(0):
        reached = orthogonalize_(parts[0], tol=1e-10)
        assert reached <= 1e-10
        assert parts[0].weight.placements == (placement,)
        assert float(lorth(parts[0].weight.full_tensor().detach().double())) < 1e-9
    with torch.no_grad():
        parts[5].weight.to_local()[:1] = float("nan")
    message = ""
    try:
        found()
    except ValueError as error:
        message = str(error)
    assert "the weight of 5 must be finite" in message, message
dist.barrier()
dist.destroy_process_group()
print("ok", flush=True)
os._exit(0)  # gloo's threads may outlive the interpreter's own clearing up

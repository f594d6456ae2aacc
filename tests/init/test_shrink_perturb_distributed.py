import os
import subprocess
import sys

SCRIPT = """
import copy, os, sys, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from stiefel.init import shrink_perturb_

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def net():
    torch.manual_seed(0)
    first = nn.Linear(5, 7)  # 7 rows do not halve
    return nn.Sequential(first, nn.LayerNorm(7), nn.Embedding(9, 7, padding_idx=0))


def refused(module, generator, word):
    try:
        shrink_perturb_(module, generator=generator)
    except ValueError as error:
        assert word in str(error), error
    else:
        raise AssertionError(f"not refused: {word}")


# Data parallel: equal on all ranks, or refused on all.
parallel = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2)))
before = [p.detach().clone() for p in parallel.parameters()]
refused(parallel, None, "generator must be given")
refused(parallel, seeded(rank), "seeded alike")
for p, old in zip(parallel.parameters(), before):
    assert torch.equal(p, old)
shrink_perturb_(parallel, generator=seeded(1))
for p, old in zip(parallel.parameters(), before):
    assert not torch.equal(p, old)
    both = [torch.empty_like(p) for _ in range(2)]
    dist.all_gather(both, p.detach())
    assert torch.equal(*both)
parallel(torch.ones(3, 5)).sum().backward()  # still attached

# Sharded: what each rank holds is its part of what one machine would have.
mesh = init_device_mesh("cpu", (2,))
for placement in (Shard(0), Shard(1), Replicate()):
    for options in ({}, {"noise": "gaussian"}, {"fresh": net}, {"shrink": 0, "perturb": 1}):
        whole, sharded = net(), net()
        for module in sharded.modules():
            for name, p in module._parameters.items():
                place = placement if p.ndim > 1 or placement.is_replicate() else Shard(0)
                shard = distribute_tensor(p.detach(), mesh, [place])
                module._parameters[name] = nn.Parameter(shard)
        shrink_perturb_(whole, generator=seeded(3), **options)
        shrink_perturb_(sharded, generator=seeded(3), **options)
        for (name, a), b in zip(whole.named_parameters(), sharded.parameters()):
            assert isinstance(b, DTensor)
            assert torch.equal(a, b.full_tensor()), (placement, options, name)
refused(sharded, None, "generator must be given")
dist.barrier()
dist.destroy_process_group()
print("ok", flush=True)
os._exit(0)  # gloo's threads may outlive the interpreter's own clearing up
"""


def test_two_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT, encoding="utf-8")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning:stiefel", script, str(rank), tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=120)
            assert rank.returncode == 0, err[-3000:]
            assert out.strip() == "ok"
    finally:
        for rank in ranks:
            rank.kill()

"""NorMuon on parameters that FSDP2 shards, with checkpoints for any number of processes.

torchrun --standalone --nproc-per-node 2 examples/fsdp2_train.py --steps 100 --out build/fsdp2

Without torchrun it is one process on the same batches, and the losses are the same.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_gpt2 import BATCH, arguments, evaluate, make_data, make_model
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stiefel.optim import NorMuon, describe_groups, split_parameters


def main() -> None:
    options = arguments("Train a tiny GPT-2 on several processes with FSDP2.", "transformers")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if BATCH % world:
        raise SystemExit(f"{BATCH} rows cannot be shared equally by {world} processes")
    model = make_model().to(device)
    train, held_out = make_data()

    if world > 1:
        mesh = init_device_mesh(device.type, (world,))  # starts gloo or NCCL
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:  # nobody to speak with, but checkpoints want a process group
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    # After sharding: the optimizer gets the DTensors. Routing goes by module types all the same.
    groups = split_parameters(model, split={"c_attn": 3})
    if rank == 0:
        describe_groups(groups)
    # In bfloat16 the products' rounding depends on which matrices are stacked, and that on the
    # number of processes. In float32 all runs have one curve; for speed leave ns_dtype out.
    optimizer = NorMuon(groups, lr=1e-2, adamw_lr=3e-3, ns_dtype=torch.float32)

    start = 0
    checkpoint = options.out / "checkpoint" if options.out else None
    if checkpoint and (checkpoint / ".metadata").exists():
        weights, moments = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": moments, "step": 0}
        dcp.load(saved, checkpoint_id=checkpoint)
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=saved["optimizer"]
        )
        start = saved["step"]
        if rank == 0:
            print(f"going on from step {start}")

    share = BATCH // world
    for step in range(start, options.steps):
        # The batch follows from the step; every process takes its share of it.
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(train), (BATCH,), generator=generator)
        rows = train.rows[chosen[rank * share : (rank + 1) * share]].to(device)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, options.steps // 4) == 0:
            mean = loss.detach() / world
            if world > 1:
                dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step + 1}: training loss {mean:.6f}")
        if checkpoint and step + 1 == options.steps // 2:
            weights, moments = get_state_dict(model, optimizer)
            parts = {"model": weights, "optimizer": moments, "step": step + 1}
            dcp.save(parts, checkpoint_id=checkpoint)
    final = evaluate(model, held_out)
    if rank == 0:
        print(f"held-out loss {final:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

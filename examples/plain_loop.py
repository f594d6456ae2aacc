"""A plain PyTorch loop with NorMuon, a schedule, clipping and checkpoints.

python examples/plain_loop.py --steps 100 --out build/plain
"""

from __future__ import annotations

import torch
from tiny_gpt2 import BATCH, arguments, evaluate, make_data, make_model

from stiefel.optim import NorMuon, describe_groups, split_parameters


def main() -> None:
    options = arguments("Train a tiny GPT-2 in a plain loop.", "transformers")
    model = make_model()
    train, held_out = make_data()

    # One optimizer for the whole model. c_attn holds query, key and value: three matrices.
    groups = split_parameters(model, split={"c_attn": 3})
    describe_groups(groups)
    optimizer = NorMuon(groups, lr=1e-2, adamw_lr=3e-3)
    # Every group keeps its own peak; the factor is common.
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.1, total_iters=options.steps
    )

    start = 0
    checkpoint = options.out / "checkpoint.pt" if options.out else None
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start = saved["step"]
        print(f"going on from step {start}")

    for step in range(start, options.steps):
        # The batch follows from the step, so a resumed run sees what an unbroken one sees.
        generator = torch.Generator().manual_seed(step)
        rows = train.rows[torch.randint(len(train), (BATCH,), generator=generator)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, options.steps // 4) == 0:
            print(f"step {step + 1}: training loss {loss:.3f}")
        if checkpoint and step + 1 == options.steps // 2:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**states, "step": step + 1}, checkpoint)
    print(f"held-out loss {evaluate(model, held_out):.6f}")


if __name__ == "__main__":
    main()

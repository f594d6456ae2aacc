"""The loop of accelerate with RMNP: prepare, save_state and load_state.

python examples/accelerate_loop.py --steps 100 --out build/accelerate
accelerate launch examples/accelerate_loop.py          (several devices, mixed precision)
"""

from __future__ import annotations

from itertools import islice

import torch
from tiny_gpt2 import BATCH, arguments, evaluate, make_data, make_model

from stiefel.optim import RMNP, split_parameters


def main() -> None:
    options = arguments("Train a tiny GPT-2 with accelerate.", "transformers", "accelerate")
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, set_seed

    set_seed(0)
    # With a sampler that has a seed of its own, a resumed run goes on in the same order.
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    accelerator = Accelerator(dataloader_config=order)
    model = make_model()
    train, held_out = make_data()
    optimizer = RMNP(split_parameters(model, split={"c_attn": 3}), lr=1e-2, adamw_lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.1, total_iters=options.steps
    )
    loader = torch.utils.data.DataLoader(train, batch_size=BATCH, shuffle=True)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    if options.steps > len(loader):
        raise SystemExit(f"--steps must be at most {len(loader)}, one pass over the text")

    start = 0
    folder = options.out / f"step-{options.steps // 2}" if options.out else None
    resumed = folder is not None and folder.exists()
    if resumed:
        accelerator.load_state(folder)
        start = options.steps // 2
        accelerator.print(f"going on from step {start}")

    batches = accelerator.skip_first_batches(loader, start) if resumed else loader
    for step, batch in enumerate(islice(batches, options.steps - start), start + 1):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 4) == 0:
            accelerator.print(f"step {step}: training loss {loss:.3f}")
        if folder is not None and step == options.steps // 2:
            accelerator.save_state(folder)
    accelerator.print(f"held-out loss {evaluate(model, held_out):.6f}")


if __name__ == "__main__":
    main()

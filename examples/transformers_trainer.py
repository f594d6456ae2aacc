"""transformers.Trainer with NorMuon, by its optimizer_cls_and_kwargs.

python examples/transformers_trainer.py --steps 100 --out build/trainer
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tiny_gpt2 import BATCH, arguments, evaluate, make_data, make_model

from stiefel.optim import NorMuon, trainer_optimizer


def main() -> None:
    options = arguments("Train a tiny GPT-2 with Trainer.", "transformers", "accelerate")
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    with tempfile.TemporaryDirectory() as spare:
        folder = options.out or Path(spare)
        training = TrainingArguments(
            output_dir=str(folder),
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            warmup_steps=options.steps // 10,
            lr_scheduler_type="linear",
            save_strategy="steps" if options.out else "no",
            save_steps=options.steps // 2,
            logging_steps=max(1, options.steps // 4),
            dataloader_pin_memory=torch.accelerator.is_available(),
            report_to="none",
            disable_tqdm=True,
        )
        train, held_out = make_data()
        trainer = Trainer(
            make_model(),
            training,
            train_dataset=train,
            # Rates stand here: learning_rate and weight_decay of TrainingArguments do nothing.
            optimizer_cls_and_kwargs=trainer_optimizer(
                NorMuon, lr=1e-2, adamw_lr=3e-3, routing={"split": {"c_attn": 3}}
            ),
        )
        last = get_last_checkpoint(str(folder)) if folder.exists() else None
        if last:
            print(f"going on from {Path(last).name}")
        trainer.train(resume_from_checkpoint=last)
        print(f"held-out loss {evaluate(trainer.model, held_out):.6f}")


if __name__ == "__main__":
    main()

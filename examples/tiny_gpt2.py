"""What the training examples share: a small GPT-2 made on the spot, and text to train it on."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from stiefel.data import python_source

CONTEXT = 64
BATCH = 16


def arguments(description: str, *needed: str) -> argparse.Namespace:
    """Command line of an example, which needs these packages."""
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise SystemExit(
            f"This example needs {' and '.join(missing)}. Install with: "
            'pip install "stiefel[train]" (from a checkout: pip install -e ".[train]")'
        )
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps, at least 2")
    parser.add_argument(
        "--out", type=Path, help="folder for a checkpoint; a run found there goes on"
    )
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    torch.set_num_threads(1)  # the model is too small for more
    return options


def make_model() -> nn.Module:
    """GPT-2 on bytes: two blocks of width 64, random weights, nothing downloaded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=CONTEXT,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    model.loss_type = "ForCausalLM"  # what it would choose anyway, after a warning
    return model


class Windows(torch.utils.data.Dataset):
    """Stretches of ``CONTEXT`` bytes of Python's standard library, back to back."""

    def __init__(self, tokens: Tensor) -> None:
        self.rows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT).long()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # The model shifts the labels itself, so the first is never predicted. It is marked, as
        # Trainer divides the loss by the number of labels.
        labels = self.rows[index].clone()
        labels[0] = -100
        return {"input_ids": self.rows[index], "labels": labels}


def make_data() -> tuple[Windows, Windows]:
    """Windows to train on, and 64 to measure on, spread over the held-out text."""
    text = python_source()
    held_out = Windows(text.validation)
    held_out.rows = held_out.rows[:: len(held_out) // 64][:64]
    return Windows(text.train), held_out


@torch.no_grad()
def evaluate(model: nn.Module, data: Windows) -> float:
    """Mean loss in nats per byte."""
    device = next(model.parameters()).device
    model.eval()
    rows = data.rows.to(device)
    loss = float(model(input_ids=rows, labels=rows).loss)
    model.train()
    return loss

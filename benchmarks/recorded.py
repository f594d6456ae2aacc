"""Momentum recorded while a small language model trains: what orthogonalisers really meet."""

from __future__ import annotations

import torch
from torch import Tensor

from stiefel.optim import Muon
from stiefel.papers.byte_gpt import GPT, GPTSize, next_token_loss, text, windows


def record(
    steps: tuple[int, ...] = (10, 50, 100), *, width: int = 96, blocks: int = 3, seed: int = 0
) -> dict[tuple[int, tuple[int, int]], Tensor]:
    """Nesterov momentum of every block matrix at these steps.

    Returns:
        ``{(step, (R, C)): stack of shape (n, R, C)}`` in float32.
    """
    data, size = text(2_000_000), GPTSize(width=width, blocks=blocks)
    model = GPT(size, seed)
    matrices = list(model.matrices().values())
    groups = [
        {"params": matrices, "rule": "matrix"},
        {"params": model.others(), "rule": "elementwise"},
    ]
    optimizer = Muon(groups, lr=1e-2, scale="rms", weight_decay=0.0, ns="classic", adamw_lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    length = size.context + 1
    found: dict[tuple[int, tuple[int, int]], list[Tensor]] = {}
    for step in range(1, max(steps) + 1):
        starts = torch.randint(len(data.train) - length, (16,), generator=generator)
        next_token_loss(model, windows(data.train, starts.tolist(), length)).backward()
        optimizer.step()
        if step in steps:
            for p in matrices:
                assert p.grad is not None
                u = torch.lerp(p.grad, optimizer.state[p]["momentum_buffer"], 0.95)
                found.setdefault((step, (p.shape[0], p.shape[1])), []).append(u)
        optimizer.zero_grad()
    return {key: torch.stack(value) for key, value in found.items()}

"""Small language models trained on the spot, whose weights are then looked at.

Python's own source as bytes or as words and signs; the GPT of :mod:`stiefel.optim.small_gpt` with
all matrices N(0, 0.02²), AdamW at a constant rate.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.data import MissingDataError, python_source
from stiefel.diagnose import cosine_moments, weibull_fit
from stiefel.optim.small_gpt import GPT, GPTSize, next_token_loss, windows
from stiefel.papers.paper import UnavailableError

Report = Callable[[float, str], None]
STD = 0.02
BETAS = (0.9, 0.95)
WIDTH, BLOCKS, HEADS, CONTEXT, BATCH = 64, 2, 4, 32, 16
KINDS = ("q", "k", "v", "o", "up", "down")
WORDS = re.compile(r"\w+|\s+|[^\w\s]")


def build(vocabulary: int, seed: int, *, tied: bool = False) -> GPT:
    """The model, every matrix drawn from N(0, 0.02²); ``tied``: the head is the embedding."""
    model = GPT(GPTSize(WIDTH, BLOCKS, HEADS, CONTEXT, vocabulary), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, STD, generator=generator)
    if tied:
        model.head.weight = model.tokens.weight
    return model


def train(
    model: GPT,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
    *,
    clip: float | None = None,
    report: Report | None = None,
) -> float:
    """Next-token training on random windows; the mean loss of the last tenth of the steps."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    starts = torch.randint(len(tokens) - CONTEXT, (steps, BATCH), generator=generator)
    losses = []
    for step in range(steps):
        loss = next_token_loss(model, windows(tokens, starts[step].tolist(), CONTEXT + 1))
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
        if report is not None and step % 50 == 0:
            report(step / steps, f"loss {losses[-1]:.2f}")
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@cache
def text(limit: int) -> bytes:
    """Python's source, read once a process.

    Raises:
        UnavailableError: this Python comes without it.
    """
    try:
        data = python_source(limit)
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    return bytes(torch.cat([data.train, data.validation]).numpy())


@cache
def words(limit: int, vocabulary: int) -> Tensor:
    """The source as words, spaces and signs; the most frequent ones, and one token for the rest."""
    pieces = WORDS.findall(text(limit).decode("utf-8", errors="replace"))
    common = [piece for piece, _ in Counter(pieces).most_common(vocabulary - 1)]
    numbers = {piece: i for i, piece in enumerate(common)}
    return torch.tensor([numbers.get(piece, vocabulary - 1) for piece in pieces])


def clocked(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """One run at rate ``lr`` with weight decay ``clock``/lr on the matrices of the blocks.

    Returns:
        By kind the median k and λ over the blocks at the end, every matrix's k and standard
        deviation over that at the start, and the last loss.
    """
    seed, lr = int(config["seed"]), float(config["lr"])
    model = build(256, seed)
    start = {name: float(w.detach().std()) for name, w in model.matrices().items()}
    tokens = torch.frombuffer(bytearray(text(int(config["limit"]))), dtype=torch.uint8)
    groups = [
        {"params": list(model.matrices().values()), "weight_decay": float(config["clock"]) / lr},
        {"params": model.others(), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, foreach=True)
    loss = train(model, tokens, optimizer, int(config["steps"]), seed, report=report)
    result: dict[str, Any] = {"loss": loss, "k": {}, "lam": {}, "all_k": {}, "growth": {}}
    for kind in KINDS:
        weights = [(n, w) for n, w in model.matrices().items() if n.split(".")[1] == kind]
        fits = [weibull_fit(w, method="exact") for _, w in weights]
        result["all_k"][kind] = [fit.k for fit in fits]
        result["growth"][kind] = [float(w.detach().std()) / start[n] for n, w in weights]
        for name in ("k", "lam"):
            values = torch.tensor([getattr(fit, name) for fit in fits], dtype=torch.float64)
            result[name][kind] = float(values.quantile(0.5))
    return result


def tying(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """One run with the head tied to the embedding or not; how their rows lie afterwards.

    Returns:
        ``start``, ``embedding`` and ``head``: ``[μ, σ, ε]`` of their cosines; the last loss.
    """
    seed = int(config["seed"])
    tokens = words(int(config["limit"]), int(config["vocabulary"]))
    model = build(int(config["vocabulary"]), seed, tied=bool(config["tied"]))

    def overlaps(weight: Tensor) -> list[float]:
        stats = cosine_moments(weight)
        return [stats.mean, stats.std, stats.eps]

    result: dict[str, Any] = {"start": overlaps(model.tokens.weight)}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, weight_decay=0.1, betas=BETAS, foreach=True
    )
    result["loss"] = train(
        model, tokens, optimizer, int(config["steps"]), seed, clip=1.0, report=report
    )
    result["embedding"] = overlaps(model.tokens.weight)
    result["head"] = overlaps(model.head.weight)
    return result

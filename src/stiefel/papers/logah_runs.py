"""Hypernetworks on small GPTs, and what the networks do that they start.

Training and target architectures, sizes and schedules are the sheet's second prototype: source
code as text, a target that is wider and deeper than all that the hypernetworks have seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stiefel.data import MissingDataError, python_source
from stiefel.init import LoGAH, LoGAHTrainer, NetGraph, graph_from_module
from stiefel.papers.paper import Scale, UnavailableError

Report = Callable[[float, str], None]

CONTEXT, VOCABULARY = 64, 96
WIDTHS, DEPTHS = range(32, 97, 8), (2, 3, 4)
# What is started: name → (width, blocks, heads).
TARGETS = {"96x4": (96, 4, 4), "128x5": (128, 5, 4), "256x8": (256, 8, 4)}
HYPERNETWORKS: dict[str, dict[str, Any]] = {
    "meanfield": {"decoder": "meanfield"},
    "tile": {"decoder": "tile", "tile": 24},
}
# Trained on from each start; of GPT-2's only the first loss is looked at.
STARTS = ("meanfield", "tile", "default", "gpt2")
TRAINED = "128x5"


class Block(nn.Module):
    """Pre-norm attention and GELU perceptron, all with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] in and out."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    """Decoder with learned positions and an untied head without bias."""

    def __init__(self, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.lnf, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Integers [batch, time] → logits [batch, time, vocabulary]."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.lnf(x))


def gpt2_start(model: GPT, generator: torch.Generator) -> None:
    """N(0, 0.02²), what writes into the residual stream divided by sqrt(2 · blocks)."""
    narrow = 0.02 / math.sqrt(2 * len(model.blocks))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                p.normal_(0, narrow if residual else 0.02, generator=generator)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1.0)


@cache
def _graph_of_depth(blocks: int) -> NetGraph:
    with torch.device("meta"):
        tokens = torch.zeros(1, 8, dtype=torch.long)
        return graph_from_module(GPT(WIDTHS[0], blocks, 4), tokens)


def architecture(width: int, blocks: int, heads: int) -> tuple[GPT, NetGraph]:
    """A network on the ``meta`` device and its graph."""
    with torch.device("meta"):
        model = GPT(width, blocks, heads)
    return model, _graph_of_depth(blocks).refill(model)


@cache
def corpus() -> tuple[Tensor, Tensor, str]:
    """A million bytes of source code as indices of the 96 commonest bytes: training, validation.

    Raises:
        UnavailableError: this Python has no standard library in files.
    """
    try:
        text = python_source(1_000_000)
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    counts = torch.bincount(text.train.long(), minlength=256)
    order = counts.argsort(descending=True, stable=True)
    index = torch.full((256,), VOCABULARY - 1)
    # Bytes beyond the 95 commonest share the last index.
    index[order[: VOCABULARY - 1]] = torch.arange(VOCABULARY - 1)
    return index[text.train.long()], index[text.validation.long()], text.sha256


def windows(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random windows of CONTEXT + 1 tokens."""
    starts = torch.randint(len(tokens) - CONTEXT, (count, 1), generator=generator)
    return tokens[starts + torch.arange(CONTEXT + 1)]


def next_token_loss(logits: Tensor, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@cache
def validation_batches() -> list[Tensor]:
    """Four fixed batches of 32 windows."""
    generator = torch.Generator().manual_seed(12345)
    return [windows(corpus()[1], 32, generator) for _ in range(4)]


@torch.no_grad()
def validation_loss(model: GPT) -> float:
    """Mean over the fixed batches."""
    losses = [next_token_loss(model(b[:, :-1]), b) for b in validation_batches()]
    return float(torch.stack(losses).mean())


def settings(scale: Scale) -> dict[str, Any]:
    """Steps at this scale.

    Raises:
        UnavailableError: the paper's scale needs images or WikiText, and an accelerator.
    """
    if scale is Scale.PAPER:
        raise UnavailableError(
            "LoGAH at the paper's scale trains on CIFAR, ImageNet or WikiText-103 for 300 epochs "
            "on a GPU; none of these data sets comes with a package. stiefel.init.LoGAHTrainer "
            "with sample_gpt or sample_vit is the same training on data of your own."
        )
    if scale is Scale.SMOKE:
        return {"hyper_steps": 6, "hid": 16, "measured": [0, 2, 4, 6]}
    return {"hyper_steps": 700, "hid": 32, "measured": [0, 10, 25, 50, 100, 200]}


def configs(scale: Scale, seed: int) -> list[dict[str, Any]]:
    """One for each start: how far it is followed differs."""
    common = settings(scale)
    measured = common["measured"]
    lengths = {"gpt2": 1, "tile": len(measured) - 1}
    return [
        {**common, "start": start, "seed": seed, "measured": measured[: lengths.get(start)]}
        for start in STARTS
    ]


def hypernetwork(name: str, seed: int, hid: int) -> LoGAH:
    """An untrained hypernetwork."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoGAH(hid, layers=2, heads=8, rank=32, table=VOCABULARY, **HYPERNETWORKS[name])


def trained(config: Mapping[str, Any], report: Report) -> tuple[LoGAH, dict[str, float]]:
    """A hypernetwork after its training, with what that cost."""
    name, seed, steps = config["start"], config["seed"], config["hyper_steps"]
    model = hypernetwork(name, seed, config["hid"])
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens = corpus()[0]

    class Batches:
        def __iter__(self) -> Any:
            while True:
                yield windows(tokens, 8, generator)

    def sample(rng: np.random.Generator) -> tuple[GPT, NetGraph]:
        return architecture(
            int(rng.choice(WIDTHS)), int(rng.choice(DEPTHS)), int(rng.choice((2, 4)))
        )

    def loss(net: nn.Module, parameters: dict[str, Tensor], batch: Tensor) -> Tensor:
        logits = torch.func.functional_call(net, parameters, (batch[:, :-1],))
        return next_token_loss(logits, batch)

    started = time.process_time()
    trainer = LoGAHTrainer(model, lr=3e-3, warmup=50, seed=seed)
    losses = trainer.fit(
        sample, loss, Batches(), steps,
        on_step=lambda step, value: report((step + 1) / steps, f"{name} {value:.2f}"),
    )  # fmt: skip
    last = losses[-max(1, steps // 10) :]
    return model, {
        "seconds": time.process_time() - started,
        "training_loss": sum(last) / len(last),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def run(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """One start: losses of the targets at step 0, and of 128x5 in training.

    Args:
        config: ``start`` (a hypernetwork or a random start), ``seed``, and what :func:`settings`
            gives.
        report: Told the fraction done.

    Returns:
        ``first`` (loss at step 0 by target), ``losses`` (of 128x5 at each of ``measured``),
        ``seconds`` (CPU) of its training, and for hypernetworks ``hyper`` (cost).
    """
    start, seed = config["start"], config["seed"]
    found: dict[str, Any] = {"sha256": corpus()[2]}
    source: LoGAH | None = None
    if start in HYPERNETWORKS:
        source, found["hyper"] = trained(config, lambda f, text: report(0.7 * f, text))
    found["first"] = {}
    begin = None
    for name, size in TARGETS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2000 + seed)
            model = GPT(*size)
        if source is not None:
            source.init_(model, architecture(*size)[1])
        elif start == "gpt2":
            gpt2_start(model, torch.Generator().manual_seed(2000 + seed))
        found["first"][name] = validation_loss(model)
        if name == TRAINED:
            begin = model
    assert begin is not None  # noqa: S101 - one of the targets
    started = time.process_time()
    found["losses"] = finetune(begin, config, seed, report)
    found["seconds"] = time.process_time() - started
    return found


def finetune(model: GPT, config: Mapping[str, Any], seed: int, report: Report) -> list[float]:
    """Train as any network is trained; validation losses at the steps ``measured``."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(3000 + seed)
    tokens, losses, steps = corpus()[0], [], max(config["measured"])
    for step in range(steps + 1):
        if step in config["measured"]:
            losses.append(validation_loss(model))
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 10)
        batch = windows(tokens, 8, generator)
        next_token_loss(model(batch[:, :-1]), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        report(0.7 + 0.3 * (step + 1) / steps, f"loss {losses[-1]:.2f}")
    return losses

"""The small byte-level GPT that the optimizer papers are raced on, and one training run of it.

Three blocks of width 96 on 2 MB of Python source; 200 steps take a few seconds on one core. The
initialisation is the one under which AdamW does best: with a weak one AdamW sits on a plateau for
half of the run and every other method looks spectacular.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from stiefel.data import MissingDataError, Text, python_source
from stiefel.papers.paper import UnavailableError
from stiefel.papers.probes import MOMENTUM, PROBES

Report = Callable[[float, str], None]

# Everything that is not a block matrix is AdamW's, at this rate, whatever the method.
ELEMENTWISE_LR = 3e-3
ADAMW_BETAS = (0.9, 0.95)
EMBEDDING_STD = 0.5
HEAD_STD = 0.02
# NorMuon's second beta.
SECOND = 0.95


@dataclass(frozen=True)
class GPTSize:
    """Dimensions of a model."""

    width: int = 96
    blocks: int = 3
    heads: int = 4
    context: int = 64
    vocabulary: int = 256


def project(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for ``x`` [batch, time, in] and ``weight`` [out, in].

    On a CPU it is written as a 1 × 1 convolution of the channels-last image [batch, 1, time]: that
    goes to oneDNN, which uses the full vector width on every CPU. ``F.linear`` in float32 goes to
    MKL, which takes half of it on CPUs of other makers: twice the time for the same product.
    """
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight)
    batch, length, channels = x.shape
    image = x.reshape(batch, 1, length, channels).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight[:, :, None, None])
    return out.permute(0, 2, 3, 1).reshape(batch, length, weight.shape[0])


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer without bias and without numbers in it yet; ``GPT`` draws them all."""
    return cast(nn.Linear, skip_init(nn.Linear, inputs, outputs, bias=False))


def _embedding(count: int, width: int) -> nn.Embedding:
    return cast(nn.Embedding, skip_init(nn.Embedding, count, width))


class Block(nn.Module):
    """Pre-norm attention and GELU MLP. Query, key and value keep matrices of their own."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.q, self.k, self.v, self.o = (_linear(width, width) for _ in range(4))
        self.up = _linear(width, 4 * width)
        self.down = _linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [batch, time, width]; same shape out."""
        batch, length, width = x.shape
        # One wide product is faster than three; the optimizer still sees three matrices.
        qkv = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        y = project(F.rms_norm(x, (width,)), qkv)
        q, k, v = y.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + project(mixed.transpose(1, 2).reshape(batch, length, width), self.o.weight)
        y = F.gelu(project(F.rms_norm(x, (width,)), self.up.weight))
        return x + project(y, self.down.weight)


class GPT(nn.Module):
    """Decoder with learned positions, RMS norms without gain, no biases, untied head."""

    def __init__(self, size: GPTSize, seed: int) -> None:
        """Draw all weights from one generator seeded with ``seed``.

        Block matrices are N(0, 1/fan_in), the two that write into the residual stream divided by
        sqrt(2 · blocks); embeddings N(0, 0.5²); head N(0, 0.02²).
        """
        super().__init__()
        self.tokens = _embedding(size.vocabulary, size.width)
        self.positions = _embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.head = _linear(size.width, size.vocabulary)

        generator = torch.Generator().manual_seed(seed)
        stds = {"tokens": EMBEDDING_STD, "positions": EMBEDDING_STD, "head": HEAD_STD}
        with torch.no_grad():
            for name, weight in self.named_parameters():
                *_, layer, _ = name.split(".")
                std = stds.get(layer, weight.shape[1] ** -0.5)
                if layer in ("o", "down"):
                    std /= math.sqrt(2 * size.blocks)
                weight.normal_(0.0, std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens``: integers [batch, time]; logits [batch, time, vocabulary] out."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return project(F.rms_norm(x, x.shape[-1:]), self.head.weight)

    def matrices(self) -> dict[str, nn.Parameter]:
        """The weights of the blocks by name: what a matrix optimizer is given."""
        return dict(self.blocks.named_parameters())

    def others(self) -> list[nn.Parameter]:
        """Embeddings and head: what AdamW is given whatever the method."""
        layers = (self.tokens, self.positions, self.head)
        return [layer.get_parameter("weight") for layer in layers]


def build_optimizer(model: GPT, method: str, lr: float) -> torch.optim.Optimizer:
    """The optimizer of one method, without weight decay; matrices at ``lr``, the rest at 3e-3.

    Raises:
        ValueError: unknown method.
    """
    matrices, others = list(model.matrices().values()), model.others()
    if method == "adamw":
        groups = [{"params": matrices}, {"params": others, "lr": ELEMENTWISE_LR}]
        return torch.optim.AdamW(groups, lr=lr, betas=ADAMW_BETAS, weight_decay=0.0, fused=True)
    from stiefel.optim import RMNP, Muon, NorMuon

    groups = [
        {"params": matrices, "rule": "matrix"},
        {"params": others, "rule": "elementwise"},
    ]
    common: dict[str, Any] = {
        "lr": lr,
        "nesterov": True,
        "weight_decay": 0.0,
        "adamw_lr": ELEMENTWISE_LR,
        "adamw_betas": ADAMW_BETAS,
    }
    if method == "rmnp":
        return RMNP(groups, momentum=MOMENTUM, **common)
    common["ns"] = "classic"  # the papers' polynomial, for all that orthogonalise
    if method == "muon":
        return Muon(groups, momentum=MOMENTUM, scale="rms", **common)
    if method == "muon-exact-rms":
        return Muon(groups, momentum=MOMENTUM, scale=None, rescale="rms", **common)
    if method == "normuon":
        return NorMuon(groups, betas=(MOMENTUM, SECOND), rescale="rms", **common)
    raise ValueError(f"method must be adamw, muon, muon-exact-rms, normuon or rmnp; got {method!r}")


def rate_factor(step: int, steps: int, warmup: int, schedule: str = "linear") -> float:
    """What the peak rate is multiplied with at ``step`` (from 0).

    ``linear``: warm-up, constant to half of the run, then down to 0.1 in a line. ``cosine``:
    warm-up, then half a cosine down to 0.01.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule == "linear":
        half = steps // 2
        fall = 1.0 if step < half else 1.0 - 0.9 * (step + 1 - half) / (steps - half)
        return min(fall, (step + 1) / warmup)
    if schedule == "cosine":
        if step < warmup:
            return (step + 1) / warmup
        way = (step + 1 - warmup) / (steps - warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * way)) / 2
    raise ValueError(f"schedule must be linear or cosine, got {schedule!r}")


def fit(
    model: GPT,
    config: Mapping[str, Any],
    backward: Callable[[int], None],
    evaluate: Callable[[str], float],
    report: Report,
) -> dict[str, Any]:
    """Train ``model`` as ``config`` says.

    Args:
        model: Changed in place.
        config: ``method``, ``lr``, ``steps``, ``warmup``, ``every`` (steps between evaluations),
            ``schedule``, ``clip`` (largest gradient norm, or None).
        backward: Computes the gradients of the step with this number.
        evaluate: Mean loss on the windows called ``"report"`` or ``"select"``.
        report: Told the fraction done and the loss.

    Returns:
        ``steps`` and ``losses`` (nats, reporting windows), ``final`` (the last of them), ``select``
        (loss at the end on the windows that choose rates), ``probes`` (see
        :mod:`stiefel.papers.probes`), ``seconds``. A run that leaves the finite numbers stops
        there, with ``final`` and ``select`` None.
    """
    started = time.thread_time()
    optimizer = build_optimizer(model, config["method"], config["lr"])
    peaks = [group["lr"] for group in optimizer.param_groups]
    probe = PROBES.get(config["method"])
    at, losses, probes, finite = [], [], [], True
    for step in range(config["steps"]):
        factor = rate_factor(step, config["steps"], config["warmup"], config["schedule"])
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        backward(step)
        if config["clip"] is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
        looked = probe is not None and step + 1 in probe.steps(config["steps"])
        before = {n: p.detach().clone() for n, p in model.matrices().items()} if looked else {}
        try:
            optimizer.step()
        except FloatingPointError:  # ours refuse gradients that are not finite
            finite = False
            break
        if probe is not None and looked:
            probes.append({"step": step + 1, **probe.measure(model, optimizer, before)})
        optimizer.zero_grad()
        if (step + 1) % config["every"] == 0 or step + 1 == config["steps"]:
            loss = evaluate("report")
            finite = math.isfinite(loss)
            if not finite:
                break
            at.append(step + 1)
            losses.append(loss)
            report((step + 1) / config["steps"], f"{config['method']} loss {loss:.3f}")
    return {
        "steps": at,
        "losses": losses,
        "final": losses[-1] if finite else None,
        "select": evaluate("select") if finite else None,
        "probes": probes,
        "seconds": time.thread_time() - started,
    }


@cache
def text(limit: int) -> Text:
    """The text of the race, read once a process.

    Raises:
        UnavailableError: this Python comes without its source.
    """
    try:
        return python_source(limit)
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error


def windows(tokens: Tensor, starts: Iterable[int], length: int) -> Tensor:
    """Rows of ``length`` tokens from each start, as int64 [starts, length]."""
    rows = torch.as_tensor(list(starts))[:, None] + torch.arange(length)
    return tokens[rows].long()


def next_token_loss(model: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting ``rows[:, 1:]`` from what stands before."""
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """One run on Python's source, fully determined by ``config`` (see :mod:`.race`)."""
    data = text(config["limit"])
    size = GPTSize(config["width"], config["blocks"], config["heads"], config["context"])
    length, batch = size.context + 1, config["batch"]
    model = GPT(size, config["seed"])

    generator = torch.Generator().manual_seed(1_000_000 + config["seed"])
    starts = torch.randint(
        len(data.train) - length + 1, (config["steps"], batch), generator=generator
    )
    # Every other window of the validation text chooses rates; those between are reported.
    count = 2 * config["windows"]
    spread = torch.linspace(0, len(data.validation) - length, count).long().tolist()
    held_out = {
        name: windows(data.validation, spread[offset::2], length).split(batch)
        for offset, name in enumerate(("report", "select"))
    }

    def backward(step: int) -> None:
        next_token_loss(model, windows(data.train, starts[step].tolist(), length)).backward()

    def evaluate(which: str) -> float:
        with torch.inference_mode():
            parts = [next_token_loss(model, rows) * len(rows) for rows in held_out[which]]
            return float(sum(parts)) / config["windows"]

    return fit(model, config, backward, evaluate, report)

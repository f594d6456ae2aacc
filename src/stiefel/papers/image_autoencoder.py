"""Small autoencoders on the lines of a photograph: layers whose gradients are smooth signals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stiefel.data import MissingDataError, Picture, photograph
from stiefel.linalg import haar
from stiefel.optim import DCTAdamW
from stiefel.papers.low_rank_adamw import LowRankAdamW
from stiefel.papers.paper import UnavailableError

Report = Callable[[float, str], None]

# A window of WIDTH pixels of one line starts every STRIDE pixels.
WIDTH, STRIDE, WINDOWS = 128, 32, 16
HIDDEN = 256
TRAIN_SHARE = 0.8
NOISE = 0.1
# The autoencoder whose gradient is looked at: every third line, this SGD, this many steps.
PLAIN = {"lines": 3, "lr": 0.02, "momentum": 0.9, "steps": 60}


@cache
def picture() -> Picture:
    """The photograph, read once a process.

    Raises:
        UnavailableError: it is not on this machine.
    """
    try:
        return photograph()
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error


@cache
def lines() -> Tensor:
    """Grey windows [line, window, pixel] of the photograph, minus their mean, float32.

    Grey is the mean of red, green and blue over 255.
    """
    grey = picture().pixels.double().mean(-1) / 255
    windows = grey.unfold(1, WIDTH, STRIDE)[:, :WINDOWS]
    return (windows - windows.mean()).float()


def split() -> tuple[Tensor, Tensor]:
    """Training windows [count, 128] and test windows [line, 16, 128].

    The upper 80 % of the lines and those below: windows of one line overlap.
    """
    rows = lines()
    cut = int(TRAIN_SHARE * len(rows))
    return rows[:cut].flatten(0, 1), rows[cut:]


def build_optimizer(config: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of ``config["method"]``; low-rank ones without error feedback.

    ``adamw`` is full rank; ``dct`` and ``random-basis`` select columns of the DCT-II and of a
    random orthogonal basis; ``svd`` and ``random-columns`` are those of :class:`LowRankAdamW`.

    Raises:
        ValueError: unknown method.
    """
    method, lr = config["method"], config["lr"]
    weights = list(model.parameters())
    if method == "adamw":
        return torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, foreach=True)
    rank = config["rank"]
    if method in ("dct", "random-basis"):
        generator = torch.Generator().manual_seed(config["seed"])
        basis = "dct2" if method == "dct" else lambda n: haar(n, generator=generator)
        # "auto" would measure what is faster, and so round one way or the other.
        return DCTAdamW(weights, lr=lr, rank=rank, rotate=True, basis=basis, method="matmul")
    if method in ("svd", "random-columns"):
        groups = [{"params": weights, "rule": "matrix"}]
        return LowRankAdamW(groups, lr=lr, rank=rank, subspace=method)
    raise ValueError(
        f"method must be adamw, dct, random-basis, svd or random-columns; got {method!r}"
    )


def train(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train a denoising autoencoder 128 → 256 → 128, ReLU, no biases.

    Args:
        config: ``method``, ``rank``, ``lr``, ``seed`` (weights, batches, noise), ``steps``,
            ``batch``.
        report: Told the fraction done.

    Returns:
        ``final`` and ``select``: squared error on noisy test windows over the squared norm of the
        clean ones, on every other line of the test part (to report) and on those between (to
        choose rates), both None after a divergence; ``steps``; ``milliseconds``: median CPU time
        of an optimizer step.
    """
    training, test = split()
    generator = torch.Generator().manual_seed(config["seed"])
    model = nn.Sequential(
        nn.Linear(WIDTH, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, WIDTH, bias=False)
    )
    with torch.no_grad():
        for weight in model.parameters():  # as nn.Linear does, from a generator of our own
            bound = weight.shape[1] ** -0.5
            weight.uniform_(-bound, bound, generator=generator)
    optimizer = build_optimizer(config, model)

    def noisy(x: Tensor) -> Tensor:
        return x + NOISE * torch.randn(x.shape, generator=generator)

    held_out = noisy(test)
    times = []
    for step in range(config["steps"]):
        x = training[torch.randint(len(training), (config["batch"],), generator=generator)]
        optimizer.zero_grad()
        loss = F.mse_loss(model(noisy(x)), x)
        loss.backward()
        start = time.thread_time()
        optimizer.step()
        times.append(time.thread_time() - start)
        report((step + 1) / config["steps"], f"{config['method']} loss {loss.item():.4f}")
    errors: dict[str, float | None] = {}
    with torch.inference_mode():
        for offset, name in enumerate(("final", "select")):
            clean = test[offset::2]
            wrong = (model(held_out[offset::2]) - clean).square().sum()
            error = float(wrong / clean.square().sum())
            errors[name] = error if math.isfinite(error) else None
    return {**errors, "steps": [config["steps"]], "milliseconds": 1e3 * median(times)}


def first_gradient(seed: int, steps: int) -> Tensor:
    """Gradient [256, 128] of the first layer of a plain autoencoder in step ``steps``.

    128 → 256 → 128 with ReLU and biases, full batch, SGD with momentum 0.9 at rate 0.02, on every
    third line; ``seed`` draws the weights.
    """
    x = lines()[:: int(PLAIN["lines"])].flatten(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=PLAIN["lr"], momentum=PLAIN["momentum"])
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None  # noqa: S101 - steps ≥ 1
    return gradient.detach()

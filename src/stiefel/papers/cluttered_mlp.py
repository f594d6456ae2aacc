"""Many small networks trained at once on cluttered digits that arrive in rounds.

All networks of one seed are one stack of ``[network, in, out]`` weights: a step is three
``baddbmm`` for all. Who has fitted the round leaves the stack until the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stiefel.data import MissingDataError, cluttered_digits
from stiefel.init import gradient_balance, shrink_perturb
from stiefel.papers.paper import UnavailableError

Report = Callable[[float, str], None]
Stack = dict[str, Tensor]
Data = tuple[Tensor, Tensor]

SIZES = (144, 100, 100, 10)
LR = 1e-3
BATCH = 64
TARGET = 0.99


def load(config: Mapping[str, Any], count: int) -> tuple[Data, Data, list[str]]:
    """One data set of ``count`` images a replicate: [replicate, sample, pixel] and classes.

    Returns:
        Standardised training part, test part, and the checksum of each data set.

    Raises:
        UnavailableError: scikit-learn or Pillow is not installed.
    """
    first, replicates = config["seed"] * config["replicates"], config["replicates"]
    try:
        tasks = [cluttered_digits(count, seed=first + r) for r in range(replicates)]
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    train, test = (
        (
            torch.stack([(getattr(t, f"{part}_x") - 0.5) * 4 for t in tasks]),
            torch.stack([getattr(t, f"{part}_y") for t in tasks]),
        )
        for part in ("train", "test")
    )
    return train, test, [task.sha256 for task in tasks]


def fresh_stack(count: int, generator: torch.Generator) -> Stack:
    """``count`` networks as ``nn.Linear`` starts them: U(±1/√in), biases included."""
    stack = {}
    for layer, (inputs, outputs) in enumerate(pairwise(SIZES)):
        bound = 1 / math.sqrt(inputs)
        for name, rows in (("weight", inputs), ("bias", 1)):
            empty = torch.empty(count, rows, outputs)
            stack[f"{layer}.{name}"] = empty.uniform_(-bound, bound, generator=generator)
    return stack


def forward(stack: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Logits [network, sample, class] of inputs [network, sample, pixel]."""
    layers = len(SIZES) - 1
    for layer in range(layers):
        x = torch.baddbmm(stack[f"{layer}.bias"], x, stack[f"{layer}.weight"])
        if layer < layers - 1:
            x = x.relu()
    return x


def take(stack: Mapping[str, Tensor], networks: Tensor | Sequence[int]) -> Stack:
    """A copy of some networks of the stack."""
    rows = torch.as_tensor(networks)
    return {name: tensor.detach()[rows].clone() for name, tensor in stack.items()}


def accuracy(stack: Mapping[str, Tensor], data: Data, replicate: Tensor) -> Tensor:
    """Share of right answers of every network on its replicate's data, in percent."""
    x, y = (part[replicate] for part in data)
    with torch.no_grad():
        logits = forward(stack, x)
    return 100 * (logits.argmax(-1) == y).double().mean(-1)


def _optimizer(stack: Stack) -> torch.optim.Adam:
    return torch.optim.Adam(stack.values(), lr=LR, fused=True)


def train(
    stack: Stack,
    data: Data,
    replicate: Tensor,
    generator: torch.Generator,
    *,
    max_epochs: int,
) -> tuple[Stack, Tensor]:
    """Train every network until its running accuracy of an epoch is 99 %; new Adam moments.

    Args:
        stack: The networks; not changed.
        data: Inputs [replicate, sample, pixel] and classes [replicate, sample].
        replicate: [network]; networks of one replicate see the same batches in the same order.
        generator: Of the order.
        max_epochs: Training ends here whatever the accuracy.

    Returns:
        The trained networks and the number of gradient steps of each.
    """
    x, y = data
    done, steps = take(stack, range(len(replicate))), torch.zeros(len(replicate), dtype=torch.int64)
    active = torch.arange(len(replicate))
    live = {name: tensor.requires_grad_() for name, tensor in take(stack, active).items()}
    optimizer = _optimizer(live)
    replicates, samples = y.shape
    for _ in range(max_epochs):
        orders = [torch.randperm(samples, generator=generator) for _ in range(replicates)]
        order, which = torch.stack(orders), replicate[active, None]
        right = torch.zeros(len(active), dtype=torch.int64)
        for batch in order.split(BATCH, dim=1):
            picked = batch[replicate[active]]
            inputs, classes = x[which, picked], y[which, picked]
            logits = forward(live, inputs)
            # Summed over networks: each gets the gradient of its own mean over the batch.
            loss = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="sum")
            (loss / batch.shape[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            right += (logits.detach().argmax(-1) == classes).sum(-1)
        steps[active] += math.ceil(samples / BATCH)
        fitted = right >= TARGET * samples
        if bool(fitted.any()):
            for name, tensor in live.items():
                done[name][active[fitted]] = tensor.detach()[fitted]
            active = active[~fitted]
            if not len(active):
                return done, steps
            live, optimizer = _without(live, optimizer, ~fitted)
    for name, tensor in live.items():
        done[name][active] = tensor.detach()
    return done, steps


def _without(
    live: Stack, optimizer: torch.optim.Adam, kept: Tensor
) -> tuple[Stack, torch.optim.Adam]:
    """The networks that go on, with their moments: Adam works on each number by itself."""
    smaller = {name: tensor.requires_grad_() for name, tensor in take(live, kept).items()}
    following = _optimizer(smaller)
    for old, new in zip(live.values(), smaller.values(), strict=True):
        state = optimizer.state[old]
        following.state[new] = {
            "step": state["step"].clone(),
            "exp_avg": state["exp_avg"][kept],
            "exp_avg_sq": state["exp_avg_sq"][kept],
        }
    return smaller, following


def mix(old: Stack, fresh: Stack, starts: Sequence[tuple[float, float]]) -> Stack:
    """Every network's own (shrink, perturb): the start of a round."""
    mixed = []
    for i, (shrink, perturb) in enumerate(starts):
        one, other = ({k: v[i] for k, v in s.items()} for s in (old, fresh))
        mixed.append(shrink_perturb(one, other, shrink, perturb))
    return {name: torch.stack([one[name] for one in mixed]) for name in old}


def online(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Rounds of more and more data for every start: accuracies and steps after each round.

    ``config``: ``starts`` (list of [shrink, perturb, replicates]), ``rounds``, ``round_size``,
    ``max_epochs``, ``seed``, ``replicates`` (the most that a start has). Replicates differ in
    data, initial weights, noise and order; the starts of one replicate share all four.

    Returns:
        ``accuracy``: [start][replicate][round], percent on the test part; ``steps``:
        [start][replicate], over all rounds; ``sha256`` of each replicate's data.
    """
    rounds, size, replicates = (config[k] for k in ("rounds", "round_size", "replicates"))
    (x, y), test, sha256 = load(config, rounds * size * 3 // 2)
    generator = torch.Generator().manual_seed(config["seed"])
    starts, replicate = [], []
    for shrink, perturb, count in config["starts"]:
        starts += [(shrink, perturb)] * count
        replicate += range(count)
    rows = torch.tensor(replicate)
    stack = take(fresh_stack(replicates, generator), rows)
    accuracies, steps = [], torch.zeros(len(rows), dtype=torch.int64)
    for turn in range(rounds):
        if turn:
            stack = mix(stack, take(fresh_stack(replicates, generator), rows), starts)
        seen = (turn + 1) * size
        data = x[:, :seen], y[:, :seen]
        stack, used = train(stack, data, rows, generator, max_epochs=config["max_epochs"])
        steps += used
        accuracies.append(accuracy(stack, test, rows))
        report((turn + 1) * (turn + 2) / (rounds * (rounds + 1)), f"{seen} images")
    counts = [count for _, _, count in config["starts"]]
    return {
        "accuracy": [part.tolist() for part in torch.stack(accuracies, dim=1).split(counts)],
        "steps": [part.tolist() for part in steps.split(counts)],
        "sha256": sha256,
    }


def module(stack: Mapping[str, Tensor], network: int) -> nn.Sequential:
    """One network of the stack as an ordinary module."""
    layers: list[nn.Module] = []
    for layer, (inputs, outputs) in enumerate(pairwise(SIZES)):
        linear = nn.Linear(inputs, outputs)
        with torch.no_grad():
            linear.weight.copy_(stack[f"{layer}.weight"][network].mT)
            linear.bias.copy_(stack[f"{layer}.bias"][network, 0])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def balance(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Gradient of new against old data right after each start, before any training.

    A network fits the first half of ``2 · half`` images; the second half is new. ``config``:
    ``starts`` (list of [shrink, perturb]), ``half``, ``replicates``, ``max_epochs``, ``seed``.

    Returns:
        ``ratio``: [start], ||g_new|| / ||g_old||, mean over replicates; ``old``: [start], percent
        of the old images that are still right.
    """
    half, replicates = config["half"], config["replicates"]
    (x, y), _, _ = load(config, 3 * half)
    old, new = (x[:, :half], y[:, :half]), (x[:, half:], y[:, half:])
    generator = torch.Generator().manual_seed(config["seed"])
    rows = torch.arange(replicates)
    start = fresh_stack(replicates, generator)
    stack, _ = train(start, old, rows, generator, max_epochs=config["max_epochs"])
    fresh = fresh_stack(replicates, generator)
    ratios, kept = [], []
    for shrink, perturb in config["starts"]:
        mixed = mix(stack, fresh, [(shrink, perturb)] * replicates)
        values = [
            gradient_balance(
                module(mixed, r), F.cross_entropy, (old[0][r], old[1][r]), (new[0][r], new[1][r])
            )
            for r in range(replicates)
        ]
        ratios.append(fmean(values))
        kept.append(float(accuracy(mixed, old, rows).mean()))
    report(1.0, f"{half} images")
    return {"ratio": ratios, "old": kept}


def logistic(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The convex control: multinomial logistic regression, fresh and warm, over the same rounds.

    ``config``: ``rounds``, ``round_size``, ``seed``, ``replicates``, ``iterations``.

    Returns:
        ``fresh`` and ``warm``: test accuracy after each round, percent, on the first replicate.
    """
    from sklearn.linear_model import LogisticRegression

    rounds, size = config["rounds"], config["round_size"]
    train_part, test_part, _ = load(config, rounds * size * 3 // 2)
    (x, y), (test_x, test_y) = ([t[0].numpy() for t in part] for part in (train_part, test_part))
    result: dict[str, list[float]] = {"fresh": [], "warm": []}
    for name, scores in result.items():
        model = LogisticRegression(max_iter=config["iterations"], warm_start=name == "warm")
        for turn in range(rounds):
            seen = (turn + 1) * size
            model.fit(x[:seen], y[:seen])
            scores.append(100 * float(model.score(test_x, test_y)))
    report(1.0, "logistic regression")
    return result

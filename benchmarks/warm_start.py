"""Shrink-perturb against copying a model and against the official loop; the batched trainer.

    python benchmarks/warm_start.py --json build/warm_start.json

CPU times of one thread, candidates in turn, median over rounds: only ratios mean something.
Memory is what ``torch`` allocates beyond what was there before.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import SHORT, in_turn
from torch import nn
from torch.profiler import ProfilerActivity, profile

from stiefel.init import shrink_perturb_
from stiefel.papers import cluttered_mlp

WIDTH, LAYERS = 4096, 6
BLOCKS = 55
"""Of four tensors each: the 220 tensors of the second comparison."""


def large() -> nn.Sequential:
    """100.7 million parameters in 12 tensors."""
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])


def many(inputs: int = 512) -> nn.Sequential:
    """220 tensors, of 7.3 (``inputs`` 512) or 1.0 million (64) parameters."""
    pairs = [[nn.Linear(inputs, 256), nn.LayerNorm(256)] for _ in range(BLOCKS)]
    return nn.Sequential(*[layer for pair in pairs for layer in pair])


def official(module: nn.Module, fresh: nn.Module, shrink: float, perturb: float) -> None:
    """Tensor by tensor, each mixed out of place and copied once more, as the authors' code does."""
    for p, q in zip(module.parameters(), fresh.parameters(), strict=True):
        p.data = copy.deepcopy(shrink * p.data + perturb * q.data)


def peak_bytes(task: Callable[[], object]) -> int:
    """Most memory that ``task`` held at one time beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        task()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def against_copying(rounds: int) -> list[dict]:
    """Every mode on 100 million parameters, ratio to ``copy.deepcopy``; bound 2."""
    model, fresh, room = large(), large(), large()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)

    def into() -> None:
        with torch.no_grad():
            for p, q in zip(room.parameters(), model.parameters(), strict=True):
                p.copy_(q)

    modes: dict[str, Callable[[], object]] = {
        "copy.deepcopy(model)": lambda: copy.deepcopy(model),
        "copy_ into memory that is there": into,
        "shrink only": lambda: shrink_perturb_(model, 0.9, 0.0),
        "noise='init' (default)": lambda: shrink_perturb_(model, 0.9, 0.1),
        "noise='gaussian'": lambda: shrink_perturb_(model, 0.9, 0.01, noise="gaussian"),
        "fresh=network": lambda: shrink_perturb_(model, 0.9, 0.1, fresh=fresh),
        "noise='init', optimizer": lambda: shrink_perturb_(model, 0.9, 0.1, optimizer=optimizer),
        "official loop, network given": lambda: official(model, fresh, 0.9, 0.1),
        "official loop and new network": lambda: official(model, large(), 0.9, 0.1),
    }
    seconds = in_turn(modes, rounds, fill=SHORT)
    layer = 4 * (WIDTH * WIDTH + WIDTH)
    return [
        {
            "mode": name,
            "seconds": seconds[name],
            "to_deepcopy": seconds[name] / seconds["copy.deepcopy(model)"],
            "to_copy_": seconds[name] / seconds["copy_ into memory that is there"],
            "bound": 2.0 if "shrink" in name or "noise" in name or "fresh" in name else None,
            "peak_mb": peak_bytes(task) / 1e6,
            "largest_module_mb": layer / 1e6,
        }
        for name, task in modes.items()
    ]


def against_the_loop(rounds: int, inputs: int) -> list[dict]:
    """220 tensors: how many times faster than the official loop; bound 5.

    ``fresh=network`` against the loop alone; what draws noise against the loop and the making of
    the network that it needs.
    """
    model, fresh = many(inputs), many(inputs)
    tasks: dict[str, Callable[[], object]] = {
        "official loop, network given": lambda: official(model, fresh, 0.9, 0.1),
        "official loop and new network": lambda: official(model, many(inputs), 0.9, 0.1),
        "fresh=network": lambda: shrink_perturb_(model, 0.9, 0.1, fresh=fresh),
        "noise='init' (default)": lambda: shrink_perturb_(model, 0.9, 0.1),
        "noise='gaussian'": lambda: shrink_perturb_(model, 0.9, 0.01, noise="gaussian"),
    }
    seconds = in_turn(tasks, 3 * rounds, fill=SHORT)
    given, new = (seconds[name] for name in list(tasks)[:2])
    return [
        {
            "millions": sum(p.numel() for p in model.parameters()) / 1e6,
            "mode": name,
            "ms": 1e3 * seconds[name],
            "faster_than_loop": (given if name == "fresh=network" else new) / seconds[name],
            "bound": 5.0,
        }
        for name in list(tasks)[2:]
    ]


def training(rounds: int) -> dict[str, float]:
    """Sixteen networks for three epochs on 500 images: one stack against one by one; aim 5."""
    count = 16
    config = {"seed": 0, "replicates": 1}
    (x, y), _, _ = cluttered_mlp.load(config, 750)
    stack = cluttered_mlp.fresh_stack(count, torch.Generator().manual_seed(0))
    rows = torch.zeros(count, dtype=torch.int64)

    def batched() -> None:
        cluttered_mlp.train(stack, (x, y), rows, torch.Generator().manual_seed(1), max_epochs=3)

    def one_by_one() -> None:
        for i in range(count):
            net = cluttered_mlp.module(stack, i)
            optimizer = torch.optim.Adam(net.parameters(), lr=cluttered_mlp.LR)
            for _ in range(3):
                for batch in torch.randperm(len(y[0])).split(cluttered_mlp.BATCH):
                    optimizer.zero_grad()
                    F.cross_entropy(net(x[0][batch]), y[0][batch]).backward()
                    optimizer.step()

    seconds = in_turn({"batched": batched, "one by one": one_by_one}, rounds, fill=SHORT)
    return {**seconds, "ratio": seconds["one by one"] / seconds["batched"]}


def show(console: Console, title: str, rows: list[dict]) -> None:
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v or "–") for v in row.values()]
        table.add_row(*cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    torch.set_num_threads(1)
    console = Console()
    if not importlib.util.find_spec("renate"):
        # Its ShrinkAndPerturb works only inside its own trainer, so there is nothing to call here.
        console.print("renate is left out: its re-initialisation runs inside its trainer only")
    result = {
        "torch": torch.__version__,
        "rounds": options.rounds,
        "large": against_copying(options.rounds),
        "many": against_the_loop(options.rounds, 512) + against_the_loop(options.rounds, 64),
        "training": training(options.rounds),
    }
    show(console, "100.7 million parameters, one thread", result["large"])
    show(console, "220 tensors against the official loop", result["many"])
    show(console, "Sixteen networks, three epochs (aim: ratio 5)", [result["training"]])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()

"""Tangent kernels and stacked training against the obvious ways.

    python benchmarks/rich_lazy.py [--json FILE] [--rounds 5]

CPU times of one thread, candidates in turn, median over rounds: only the ratios mean something.
Memory is the size of the largest tensor that any operation gives.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stiefel.papers.rich_lazy_runs import Start, initial_stack, train
from stiefel.theory import (
    CTRNN,
    estimate_kernel_alignment,
    kernel_alignment,
    tangent_kernel,
    tangent_kernel_alignment,
    two_alternative,
)

BOUND = 10.0
# Hidden units, samples, outputs, steps.
RECURRENT = ((100, 40, 10, 8), (100, 40, 3, 8), (100, 40, 10, 28), (300, 40, 10, 8))
FEED_FORWARD = ((100, 64, 10), (256, 64, 10), (512, 64, 10))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.bytes = max(self.bytes, item.untyped_storage().nbytes())
        return result


def seconds(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU time of each, in turn; the first round, which warms up, does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, work in candidates.items():
            started = time.thread_time()
            work()
            if number:
                times[name].append(time.thread_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def megabytes(work: Callable[[], object]) -> float:
    with LargestTensor() as meter:
        work()
    return meter.bytes / 1e6


def moved(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The model's state; then every parameter takes a random step of a fifth of its size."""
    before = copy.deepcopy(dict(model.state_dict()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * p.std() * torch.randn(p.shape, generator=generator)
    return before


def alignment_row(name: str, model: nn.Module, x: Tensor, rounds: int) -> dict:
    """Kernel alignment before and after: ours against two kernels by ``torch.func.jacrev``."""
    before = moved(model, 1)
    other = copy.deepcopy(model)
    other.load_state_dict(before)

    def obvious() -> float:
        kernels = [tangent_kernel(m, x, method="jacrev") for m in (other, model)]
        return float(kernel_alignment(*kernels))

    def ours() -> float:
        return tangent_kernel_alignment(model, before, x)

    times = seconds({"ours": ours, "jacrev": obvious}, rounds)
    return {
        "case": name,
        "milliseconds": 1e3 * times["ours"],
        "jacrev_milliseconds": 1e3 * times["jacrev"],
        "ratio": times["jacrev"] / times["ours"],
        "bound": BOUND,
        "largest_mb": megabytes(ours),
        "jacrev_largest_mb": megabytes(obvious),
        "difference": abs(ours() - obvious()),
    }


def kernels(rounds: int) -> list[dict]:
    rows = []
    generator = torch.Generator().manual_seed(0)
    for n, samples, outputs, steps in RECURRENT:
        net = CTRNN(8, n, outputs, generator=generator)
        x = torch.randn(samples, steps, 8, generator=generator)
        name = f"recurrent, {n} units, {samples} × {outputs} rows, {steps} steps"
        rows.append(alignment_row(name, net, x, rounds))
    for n, samples, outputs in FEED_FORWARD:
        sizes = (nn.Linear(64, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, outputs))
        x = torch.randn(samples, 64, generator=generator)
        name = f"three layers, {n} units, {samples} × {outputs} rows"
        rows.append(alignment_row(name, nn.Sequential(*sizes), x, rounds))
    return rows


def estimates(rounds: int) -> dict:
    """A net too big for its Jacobian: 12.6 million parameters, 128 × 10 rows."""
    net = nn.Sequential(nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 4096), nn.GELU())
    net.append(nn.Linear(4096, 512)).append(nn.LayerNorm(512)).append(nn.Linear(512, 10))
    x = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0))
    before = moved(net, 2)
    generator = torch.Generator().manual_seed(0)

    def work() -> object:
        return estimate_kernel_alignment(net, before, x, probes=8, generator=generator)

    value, error = estimate_kernel_alignment(net, before, x, probes=8, generator=generator)
    parameters = sum(p.numel() for p in net.parameters())
    return {
        "parameters": parameters,
        "seconds": seconds({"estimate": work}, rounds)["estimate"],
        "value": value,
        "error": error,
        "largest_mb": megabytes(work),
        "jacobian_mb": 4e-6 * parameters * 128 * 10,
    }


def stacked(rounds: int) -> dict:
    """60 steps of 24 networks of 100 units, in one stack and one by one with torch.optim.SGD."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    stack = initial_stack((3, 100, 3), [Start(r) for r in (1, 10, 30, 100)], generators)
    trials = [two_alternative(32, generators[0]) for _ in range(60)]
    nets = [stack.network(index) for index in range(24)]

    def one_by_one() -> None:
        for original in nets:
            net = copy.deepcopy(original)
            optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
            for batch in trials:
                optimizer.zero_grad()
                batch.loss(net(batch.inputs)).backward()
                optimizer.step()

    def together() -> None:
        train(stack, lambda step: trials[step], lr=0.01, stop_at=[0.0] * 24, steps=60)

    times = seconds({"stack": together, "one by one": one_by_one}, rounds)
    return {**times, "ratio": times["one by one"] / times["stack"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, in forward mode
    console = Console()
    result = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "rounds": options.rounds,
        "kernels": kernels(options.rounds),
        "estimate": estimates(options.rounds),
        "stack": stacked(options.rounds),
    }
    show = Table(title="Tangent-kernel alignment, before and after (neural-tangents needs JAX)")
    for heading in ("", "ours ms", "jacrev ms", "ratio", "bound", "largest MB", "jacrev MB"):
        show.add_column(heading, justify="left" if not heading else "right")
    for row in result["kernels"]:
        show.add_row(
            row["case"],
            f"{row['milliseconds']:.2f}",
            f"{row['jacrev_milliseconds']:.0f}",
            f"{row['ratio']:.1f}",
            f"≥ {row['bound']:.0f}",
            f"{row['largest_mb']:.2f}",
            f"{row['jacrev_largest_mb']:.1f}",
        )
    console.print(show)
    e, s = result["estimate"], result["stack"]
    console.print(
        f"Estimate, {e['parameters'] / 1e6:.1f} million parameters: {e['value']:.4f} ± "
        f"{e['error']:.4f} in {e['seconds']:.2f} s, largest tensor {e['largest_mb']:.0f} MB; "
        f"the Jacobian would be {e['jacobian_mb'] / 1e3:.0f} GB."
    )
    console.print(
        f"24 networks in one stack: {s['stack']:.2f} s, one by one {s['one by one']:.2f} s, "
        f"ratio {s['ratio']:.1f}."
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

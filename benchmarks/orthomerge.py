"""OrthoMerge and OFT folding: time and memory, each beside its bound.

    python benchmarks/orthomerge.py --json build/orthomerge.json

Times are CPU times of one thread, candidates in turn, median over rounds: on a shared machine only
the ratios mean something. ``--width 1024`` makes a short run; the bounds are those of 4,096.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from layers import row
from rich.console import Console
from rich.table import Table as RichTable
from timing import in_turn
from torch import Tensor

from stiefel.linalg import cayley, procrustes_rotation
from stiefel.merge import OrthoSettings, fold_oft, orthomerge_tensor
from stiefel.merge.adapter_rotation import skew_blocks

BLOCK = 32
# Matrices of a layer of a 7 B model (Llama 2), [out, in], and how many layers there are.
SHAPES_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
LAYERS_7B = 32


def triangles(width: int, seed: int = 0) -> Tensor:
    """Numbers of an OFT adapter with blocks of 32."""
    draw = torch.Generator().manual_seed(seed)
    shape = (width // BLOCK, BLOCK * (BLOCK - 1) // 2)
    return 0.02 * torch.randn(shape, generator=draw)


def experts(rows: int, width: int, count: int) -> tuple[Tensor, list[Tensor]]:
    """A Gaussian base and experts 2 % away from it."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(rows, width, generator=draw) / width**0.5
    noise = (torch.randn(rows, width, generator=draw) / width**0.5 for _ in range(count))
    return base, [base + 0.02 * n for n in noise]


def folding(rounds: int, width: int) -> list[dict]:
    """Blocks against the dense block-diagonal product that PEFT 0.21 makes."""
    weight, stored = experts(width, width, 0)[0], triangles(width)

    def dense() -> Tensor:
        return weight @ torch.block_diag(*cayley(skew_blocks(stored)))

    error = float((fold_oft(weight, stored) - dense()).abs().max())
    assert error < 1e-4, error
    times = in_turn({"ours": lambda: fold_oft(weight, stored), "peer": dense}, rounds)
    what = f"OFT, blocks of {BLOCK}, on {width}² / dense block_diag"
    return [row(what, 1e3 * times["ours"], 1e3 * times["peer"],
                times["peer"] / times["ours"], "≥ 10")]  # fmt: skip


def merging(rounds: int, width: int) -> list[dict]:
    """Two experts of a square layer, residual by TIES, against one float32 SVD of the base."""
    base, tuned = experts(width, width, 2)
    tasks: dict[str, Callable[[], object]] = {
        "svd": lambda: torch.linalg.svd(base),
        "ties": lambda: orthomerge_tensor(base, tuned),
        "ta": lambda: orthomerge_tensor(base, tuned, OrthoSettings(residual="ta")),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):  # no warm-up round: a call takes longer than all caches last
        for name, task in tasks.items():
            start = time.thread_time()
            task()
            seconds[name].append(time.thread_time() - start)
    middle = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    return [
        row(f"OrthoMerge + {name}, {width}², 2 experts / one float32 SVD", middle[key],
            middle["svd"], middle[key] / middle["svd"], "≤ 3", "s")
        for key, name in (("ties", "TIES"), ("ta", "sum"))
    ]  # fmt: skip


def wide(rounds: int) -> list[dict]:
    """The small form for wide matrices against the dense one: 64 × 2,048, two experts."""
    base, tuned = experts(64, 2048, 2)

    def dense() -> None:
        for w in tuned:
            source, target = base.double(), w.double()
            u, _, vh = torch.linalg.svd(source.mT @ target)
            u @ vh

    ours = OrthoSettings(residual="ta")
    tasks = {"ours": lambda: orthomerge_tensor(base, tuned, ours), "peer": dense}
    times = in_turn(tasks, rounds)
    return [row("OrthoMerge, 64 × 2,048 / its dense SVDs alone", 1e3 * times["ours"],
                1e3 * times["peer"], times["peer"] / times["ours"], "≥ 10")]  # fmt: skip


def accuracy() -> list[dict]:
    """Error of the rotation by Newton's iteration, float32 inputs, against a float32 SVD's."""
    base, (tuned, _) = experts(1024, 1024, 2)
    exact = procrustes_rotation(base.double(), tuned.double())
    u, _, vh = torch.linalg.svd(base.mT @ tuned)
    rotations = (procrustes_rotation(base, tuned, polar="newton"), u @ vh)
    errors = [float((r.double() - exact).norm()) for r in rotations]
    what = "rotation by Newton, 1,024²: error / that of a float32 SVD"
    return [row(what, *errors, errors[0] / errors[1], "≤ 0.1", "abs")]


def stream_7b(layers: int) -> tuple[float, float]:
    """Fold an OFT adapter into all layers of a 7 B model's shapes, one bfloat16 tensor at a time.

    Returns the peak resident memory in MB and the CPU seconds.
    """
    torch.set_num_threads(1)
    start = time.process_time()
    for _ in range(layers):
        for rows, width in SHAPES_7B:
            weight = torch.empty(rows, width, dtype=torch.bfloat16).fill_(0.02)
            fold_oft(weight, triangles(width))
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3), seconds


def memory(layers: int) -> list[dict]:
    """Peak memory of :func:`stream_7b` in a process of its own."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit this process's peak
    with spawn.Pool(1) as pool:
        megabytes, seconds = pool.apply(stream_7b, (layers,))
    note = f"OFT of {layers} of {LAYERS_7B} layers of a 7 B model, peak memory / 4 GB"
    print(f"{note}: {seconds:.1f} CPU s")
    return [row(note, megabytes, 4000, megabytes / 4000, "≤ 1", "MB")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=4096, help="of the square layer")
    parser.add_argument("--merges", type=int, default=3, help="rounds of the long merges")
    parser.add_argument("--layers", type=int, default=LAYERS_7B)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        *folding(args.rounds, args.width),
        *wide(args.rounds),
        *accuracy(),
        *memory(args.layers),
        *merging(args.merges, args.width),
    ]
    table = RichTable("what", "ours", "peer", "unit", "ratio", "bound", "met")
    for r in rows:
        values = (f"{r[k]:.3g}" for k in ("ours", "peer"))
        table.add_row(r["what"], *values, r["unit"], f"{r['ratio']:.3g}", r["bound"], r["met"])
    Console().print(table)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(r["met"] == "yes" for r in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

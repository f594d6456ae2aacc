"""Diagnosis of weights and embeddings against what one would use instead, in one run.

    python benchmarks/diagnose.py [--json FILE] [--full]

CPU time, one thread, candidates in turn. ``--full`` adds the embedding of 150,000 × 4,096 and the
tensor of 10⁸ entries, which take minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import in_turn

from stiefel.diagnose import CosineMoments, cosine_moments, diagnose, weibull_fit

ROUNDS = 5
NPM = importlib.util.find_spec("npm_weibull") is not None


def model(parameters: int) -> dict[str, torch.Tensor]:
    """Matrices of a decoder of width 768, Student-t so that k is not all the same."""
    generator = torch.Generator().manual_seed(0)
    state, count, block = {}, 0, 0
    while count < parameters:
        for kind, shape in {
            "self_attn.q_proj": (768, 768), "self_attn.o_proj": (768, 768),
            "mlp.up_proj": (3072, 768), "mlp.down_proj": (768, 3072),
        }.items():  # fmt: skip
            w = torch.randn(shape, generator=generator)
            w *= 0.02 * (1 + 0.1 * block * torch.rand(shape, generator=generator) ** 4)
            state[f"model.layers.{block}.{kind}.weight"] = w
            count += w.numel()
        block += 1
    return state


def weibull(parameters: int) -> list[dict[str, Any]]:
    """All matrices of a model, by the histogram of bits and by the official package."""
    state = model(parameters)
    tasks: dict[str, Any] = {
        "ours": lambda: [weibull_fit(w, method="bits") for w in state.values()]
    }
    if NPM:
        import npm_weibull

        def official() -> list[dict[str, Any]]:
            return [
                npm_weibull.weibull_fit(npm_weibull.extract_to_histogram(w.numpy()))
                for w in state.values()
            ]

        tasks["npm"] = official
    times = in_turn(tasks, ROUNDS)
    exact = [weibull_fit(w, method="exact").k for w in list(state.values())[:8]]
    bits = [weibull_fit(w, method="bits").k for w in list(state.values())[:8]]
    gap = max(abs(a - b) for a, b in zip(exact, bits, strict=True))
    total = sum(w.numel() for w in state.values())
    rows = [
        {
            "what": f"k by bits against the sorted fit, largest difference, {total / 1e6:.0f} M",
            "ratio": gap,
            "bound": "<= 0.001",
            "note": f"{1e9 * times['ours'] / total:.2f} ns an entry",
        }
    ]
    if NPM:
        theirs = [weibull_fit(w, method="npm").k for w in list(state.values())[:8]]
        worst = max(abs(a - b) for a, b in zip(theirs, bits, strict=True))
        rows.append(
            {
                "what": f"Weibull of {total / 1e6:.0f} M parameters, to npm-weibull-py",
                "ratio": times["npm"] / times["ours"],
                "bound": ">= 10",
                "note": f"CPU time of one thread; largest difference of k {worst:.1e}",
            }
        )
        walls: dict[str, list[float]] = {"ours": [], "npm": []}
        both = {"ours": lambda: diagnose(state, threads=2), "npm": tasks["npm"]}
        for _ in range(ROUNDS):
            for name, task in both.items():
                start = time.perf_counter()
                task()
                walls[name].append(time.perf_counter() - start)
        rows.append(
            {
                "what": "the whole report on two threads, wall clock, to npm-weibull-py",
                "ratio": statistics.median(walls["npm"]) / statistics.median(walls["ours"]),
                "bound": ">= 10",
                "note": "needs two idle cores",
            }
        )
    else:
        rows.append({"what": "npm-weibull-py is not installed", "ratio": None, "bound": ">= 10"})
    return rows


def tiled(e: np.ndarray, tile: int = 4096) -> tuple[float, float]:
    """Mean and spread of all pairs, as one would write it in NumPy without the k × k matrix."""
    u = e / np.linalg.norm(e, axis=1, keepdims=True)
    total = square = 0.0
    for i in range(0, len(u), tile):
        for j in range(i, len(u), tile):
            cosines = u[i : i + tile] @ u[j : j + tile].T
            if i == j:
                cosines = cosines[np.triu_indices(len(cosines), 1)]
            total += cosines.sum(dtype=np.float64)
            square += np.square(cosines).sum(dtype=np.float64)
    pairs = len(u) * (len(u) - 1) / 2
    mean = total / pairs
    return mean, float(np.sqrt((square / pairs - mean**2) * pairs / (pairs - 1)))


def capacity() -> list[dict[str, Any]]:
    """Moments of 50,000 × 768 against tiles in NumPy; one round of the latter is enough."""
    e = torch.randn(50_000, 768, generator=torch.Generator().manual_seed(0)) + 0.02
    stats = cosine_moments(e)
    start = time.process_time()
    mean, std = tiled(e.numpy())
    theirs = time.process_time() - start
    ours = in_turn({"ours": lambda: cosine_moments(e)}, ROUNDS)["ours"]
    gap = max(abs(stats.mean - mean), abs(stats.std - std))
    return [
        {
            "what": "moments of 50,000 × 768, to tiles in NumPy",
            "ratio": theirs / ours,
            "bound": ">= 5",
            "note": f"largest difference {gap:.1e}",
        }
    ]


def full() -> list[dict[str, Any]]:
    """150,000 × 4,096 from a stream of rows, and a tensor of 10⁸ entries through ``diagnose``."""
    generator = torch.Generator().manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.time()
    moments = CosineMoments(4096)
    for _ in range(0, 150_000, 3000):
        moments.update(torch.randn(3000, 4096, generator=generator))
    excess = moments.stats().excess
    seconds = time.time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    w = torch.randn(10_000, 10_000, generator=generator)
    exact = weibull_fit(w, method="exact").k
    start = time.thread_time()
    (row,) = diagnose({"x.up_proj.weight": w}).matrices
    return [
        {
            "what": "150,000 × 4,096 simulated embedding, wall seconds",
            "ratio": seconds,
            "bound": "<= 300",
            "note": f"memory grew by {grown:.0f} MB (limit 2,000); excess {excess:.4f}",
        },
        {
            "what": "10⁸ entries, one pass: difference of k to the sorted fit",
            "ratio": abs((row.k or 0.0) - exact),
            "bound": "<= 0.001",
            "note": f"{time.thread_time() - start:.2f} CPU s",
        },
    ]


def main() -> None:
    """Run all and print each figure beside its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--parameters", type=int, default=100_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*weibull(arguments.parameters), *capacity(), *(full() if arguments.full else [])]
    for row in rows:
        value = "–" if row["ratio"] is None else f"{row['ratio']:.4g}"
        note = f"   {row['note']}" if "note" in row else ""
        print(f"{row['what']:<66} {value:>9}  ({row['bound']}){note}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

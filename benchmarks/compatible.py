"""λ-orthogonality and retrieval against what one would use instead, in one run.

    python benchmarks/compatible.py [--json FILE] [--items N]

CPU time, one thread, candidates in turn. Search is exact on both sides: the same neighbours.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import in_turn

from stiefel.linalg import cayley, lambda_orthogonality
from stiefel.merge import CosineIndex, OrthogonalMap, retrieval_metrics

ROUNDS = 5


def embeddings(items: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of 500 classes, as spread as their centres."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(500, (items,), generator=g)
    x = torch.randn(500, width, generator=g)[labels] + torch.randn(items, width, generator=g)
    return x, labels


def search(items: int) -> list[dict[str, Any]]:
    """Map and search, 1,024 queries at a time against the whole gallery."""
    from sklearn.neighbors import NearestNeighbors

    x, _ = embeddings(items, 512)
    layer = OrthogonalMap(512, "lambda").requires_grad_(False)
    mapped = layer(x)
    unit = torch.nn.functional.normalize(mapped).numpy()
    queries, rows = x[:4096], torch.arange(4096)
    indices = {
        metric: NearestNeighbors(n_neighbors=6, algorithm="brute", metric=metric).fit(unit)
        for metric in ("euclidean", "cosine")
    }

    def peer(metric: str) -> Any:
        q = queries.numpy() @ layer.free.numpy().T
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        return indices[metric].kneighbors(q)

    index = CosineIndex(mapped)
    ours = index.search(layer(queries), 5, exclude=rows)[1]
    theirs = torch.from_numpy(peer("euclidean")[1][:, 1:])
    same = float((ours == theirs).double().mean())
    times = in_turn(
        {
            "ours": lambda: index.search(layer(queries), 5, exclude=rows),
            "euclidean": lambda: peer("euclidean"),
            "cosine": lambda: peer("cosine"),
        },
        ROUNDS,
    )
    return [
        {
            "what": f"transform + 5 neighbours, {items:,} × 512, scikit-learn {metric}",
            "ratio": times[metric] / times["ours"],
            "bound": ">= 3",
            "note": f"{100 * same:.2f} % of the neighbours alike",
        }
        for metric in ("euclidean", "cosine")
    ]


def maps() -> list[dict[str, Any]]:
    """Forward and backward of the map's constraint at n = 512."""
    n = 512
    g = torch.Generator().manual_seed(0)
    half = (0.01 * torch.randn(n, n, generator=g)).requires_grad_()
    w = (torch.eye(n) + 0.01 * torch.randn(n, n, generator=g)).requires_grad_()

    def run(function: Any, x: torch.Tensor) -> None:
        (grad,) = torch.autograd.grad(function(x), x)
        assert math.isfinite(float(grad.sum()))

    times = in_turn(
        {
            "exp": lambda: run(lambda p: torch.matrix_exp(p - p.T).square().sum(), half),
            "cayley": lambda: run(lambda p: cayley(p - p.T).square().sum(), half),
            "lambda": lambda: run(lambda p: lambda_orthogonality(p, 2.0), w),
        },
        ROUNDS,
    )
    return [
        {
            "what": "penalty L_λ, n = 512, forward + backward, to torch.matrix_exp",
            "ratio": times["exp"] / times["lambda"],
            "bound": ">= 20",
        },
        {
            "what": "strict map by Cayley, n = 512, to torch.matrix_exp",
            "ratio": times["exp"] / times["cayley"],
            "bound": ">= 5",
        },
    ]


def evaluation() -> list[dict[str, Any]]:
    """CMC and mAP of 10,000 × 10,000 × 128."""
    x, y = embeddings(10_000, 128)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    retrieval_metrics(x, x, y, y, exclude_self=True)
    seconds = time.thread_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [
        {
            "what": "CMC and mAP, 10,000 × 10,000 × 128, CPU seconds",
            "ratio": seconds,
            "bound": "<= 10",
            "note": f"peak memory grew by {grown:.0f} MB (limit 1,000)",
        }
    ]


def main() -> None:
    """Run all and print each figure beside its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--items", type=int, default=50_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*evaluation(), *maps(), *search(arguments.items)]
    for row in rows:
        note = f"   {row['note']}" if "note" in row else ""
        print(f"{row['what']:<70} {row['ratio']:8.2f}  ({row['bound']}){note}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

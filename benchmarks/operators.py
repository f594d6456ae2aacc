"""Neural operators against the package neuraloperator: agreement, time, memory, cost per point.

    python benchmarks/operators.py --json build/operators.json

Times are CPU times of one thread, candidates in turn, median over rounds: on a shared machine only
the ratios mean something. Exits with 1 if a layer with the weights of its peer differs from it by
more than 1e-5. Without the peer the rest runs. The cost per point is also drawn, to
build/operators_scaling.svg.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from layers import row, speed, squares
from operators_peer import PAIRS, has_peer
from run import peak_bytes
from timing import SHORT, in_turn, run_sections
from torch import nn

from stiefel.nn.operators import (
    FNO,
    FNOBlock,
    IntegralAttention,
    KernelIntegral,
    LocalIntegralConv,
    SpectralConv,
    quadrature,
    radius_neighbors,
)

AGREEMENT = 1e-5
POINTS = (1_000, 3_000, 10_000, 30_000, 100_000)
FIGURE = Path("build/operators_scaling.svg")
_disagreements: list[str] = []


def agreement(rounds: int) -> list[dict]:
    """Largest difference from the peer with its weights, over the largest value where above 1."""
    found = []
    for name, pair in PAIRS.items() if has_peer() else ():
        ours, peer = (y.detach() for y in pair())
        scale = max(1.0, float(peer.abs().max()))
        error = float((ours - peer).abs().max()) / scale
        found.append(row(f"{name}: difference", error, AGREEMENT, error / AGREEMENT, "≤ 1", "abs"))
        if not error <= AGREEMENT:
            _disagreements.append(name)
    return found


def contest(
    what: str, ours: Callable[[], object], peer: Callable[[], object], rounds: int, bound: str
) -> list[dict]:
    """Time and memory of two training steps."""
    seconds = in_turn({"ours": ours, "peer": peer}, rounds, fill=SHORT)
    mine, his = (peak_bytes(task) / 1e6 for task in (ours, peer))
    return [
        speed(f"{what} / neuraloperator", seconds, bound),
        row("its peak memory", mine, his, mine / his, "≤ 1", "MB"),
    ]


def blocks(rounds: int) -> list[dict]:
    """One Fourier block, width 32, 16 modes per axis, batch 8, forward and backward."""
    if not has_peer():
        return []
    from neuralop.layers.fno_block import FNOBlocks
    from neuralop.layers.spectral_convolution import SpectralConv as Peer

    found = []
    x = torch.randn(25, 32, 512, requires_grad=True)
    line, peer_line = SpectralConv(32, 32, 32, bias=True), Peer(32, 32, (32,))
    found += contest(
        "SpectralConv, 1-D, N = 512",
        lambda x=x: squares(line(x)),
        lambda x=x: squares(peer_line(x)),
        rounds,
        "≥ 1.3",
    )
    for n in (64, 128):
        x = torch.randn(8, 32, n, n, requires_grad=True)
        ours, peer = FNOBlock(32, 32, (16, 16)), FNOBlocks(32, 32, (16, 16), n_layers=2)
        found += contest(
            f"FNOBlock, {n}²",
            lambda x=x, m=ours: squares(m(x)),
            lambda x=x, m=peer: squares(m(x, 0)),
            rounds,
            "≥ 1.2",
        )
        spectral, conv = SpectralConv(32, 32, (16, 16), bias=True), Peer(32, 32, (16, 16))
        found += contest(
            f"SpectralConv, {n}²",
            lambda x=x, m=spectral: squares(m(x)),
            lambda x=x, m=conv: squares(m(x)),
            rounds,
            "≥ 1.2",
        )
    return found


def models(rounds: int) -> list[dict]:
    """Whole FNOs of width 32 and 4 blocks, forward and backward."""
    if not has_peer():
        return []
    from neuralop.models import FNO as Peer

    found = []
    for batch, modes, n, bound in (
        (25, (32,), 64, "≥ 1"),
        (25, (32,), 512, "≥ 1.3"),
        (8, (16, 16), 64, "≥ 1.2"),
        (8, (16, 16), 128, "≥ 1.2"),
    ):
        x = torch.randn(batch, 1, *(n,) * len(modes))
        ours, peer = FNO(modes, 1, 1, 32), Peer(modes, 1, 1, 32)
        found += contest(
            f"FNO, {len(modes)}-D, N = {n}",
            lambda x=x, m=ours: squares(m(x)),
            lambda x=x, m=peer: squares(m(x)),
            rounds,
            bound,
        )
    return found


def local_tasks() -> dict[int, Callable[[], object]]:
    """A kernel of fixed length on finer and finer grids."""
    layer = LocalIntegralConv(16, 16, 9, base_spacing=1 / 250)
    fields = {250 * (n // 250): torch.randn(1, 16, 250 * (n // 250)) for n in POINTS}
    return {n: lambda x=x: squares(layer(x)) for n, x in fields.items()}


def graph_tasks() -> dict[int, Callable[[], object]]:
    """About 20 neighbours for each point, searched and integrated."""
    tasks = {}
    for n in POINTS:
        radius = (20 / (torch.pi * n)) ** 0.5
        layer = KernelIntegral(16, 16, radius, (16,), ndim=2, period=1.0, recompute=True)
        y, v = torch.rand(n, 2), torch.randn(1, 16, n)
        weights = torch.full((n,), 1 / n)
        tasks[n] = lambda m=layer, y=y, v=v, w=weights: squares(m(v, y, weights=w))
    return tasks


def search_tasks() -> dict[int, Callable[[], object]]:
    """The search alone."""
    tasks = {}
    for n in POINTS:
        y, radius = torch.rand(n, 2), (20 / (torch.pi * n)) ** 0.5
        tasks[n] = lambda y=y, r=radius: radius_neighbors(y, radius=r, period=1.0)
    return tasks


def scaling(rounds: int) -> list[dict]:
    """CPU time per point from 1,000 to 100,000 points, forward and backward."""
    found, curves = [], {}
    for name, tasks in (
        ("LocalIntegralConv, fixed length", local_tasks()),
        ("KernelIntegral, 20 neighbours", graph_tasks()),
        ("search of neighbours", search_tasks()),
    ):
        seconds = in_turn({str(n): task for n, task in tasks.items()}, rounds, fill=SHORT)
        curves[name] = {n: seconds[str(n)] for n in tasks}
        each = [1e6 * s / n for n, s in curves[name].items()]
        what = f"{name}: µs per point at 100,000 / at 1,000"
        found.append(row(what, each[-1], each[0], each[-1] / each[0], "≤ 2", "µs"))
    draw(curves)
    return found


def draw(curves: dict[str, dict[int, float]]) -> None:
    """Seconds over points, log–log, with a line of slope 1."""
    if not importlib.util.find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.loglog(list(curve), list(curve.values()), "o-", label=name)
    ends = [POINTS[0], POINTS[-1]]
    axes.loglog(ends, [2e-6 * n for n in ends], "k:", label="linear")
    axes.set(xlabel="points", ylabel="CPU seconds")
    axes.legend(fontsize="small")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE)


def graph(rounds: int) -> list[dict]:
    """KernelIntegral against the peer's transform, 1,000 points, about 20 neighbours."""
    if not has_peer():
        return []
    from neuralop.layers.integral_transform import IntegralTransform
    from neuralop.layers.neighbor_search import NeighborSearch

    n, radius = 1_000, (20 / (torch.pi * 1_000)) ** 0.5
    y, v, w = torch.rand(n, 2), torch.randn(1, 16, n), quadrature("monte-carlo", n)
    ours = KernelIntegral(16, 16, radius, (64, 64), ndim=2, embedding=None)
    peer = IntegralTransform(channel_mlp_layers=[4, 64, 64, 16], use_torch_scatter=False)
    search = NeighborSearch(use_open3d=False)

    def theirs() -> None:
        found = search(y, y, radius)
        found["weights"] = w[found["neighbors_index"]]
        squares(peer(y, found, y, v.mT))

    return contest(
        "KernelIntegral with its search, 1,000 points",
        lambda: squares(ours(v, y, weights=w)), theirs, rounds, "≥ 1",
    )  # fmt: skip


def attention(rounds: int) -> list[dict]:
    """Softmax attention with weights against the sum written out, 1,024 points."""
    layer, u = IntegralAttention(32, 4), torch.randn(4, 32, 1024)
    w = quadrature("monte-carlo", 1024)

    def plain() -> None:
        tokens = u.mT
        q, k, v = (
            (tokens @ p.mT).unflatten(-1, (4, 8)).transpose(1, 2)
            for p in (layer.to_q, layer.to_k, layer.to_v)
        )
        kernel = w * torch.exp(q @ k.mT / 8**0.5)
        y = (kernel @ v / kernel.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
        squares(nn.functional.linear(y, layer.to_out, layer.bias))

    tasks = {"ours": lambda: squares(layer(u, w)), "peer": plain}
    mine, his = (peak_bytes(task) / 1e6 for task in tasks.values())
    return [
        speed("IntegralAttention, 1,024 points / written out", in_turn(tasks, rounds), "≥ 1"),
        row("its peak memory", mine, his, mine / his, "≤ 1", "MB"),
    ]


def start(rounds: int) -> list[dict]:
    """Seconds of ``import stiefel.nn.operators`` beyond torch."""
    code = (
        "import time, torch, numpy; t = time.process_time(); "
        "import stiefel.nn.operators; print(time.process_time() - t)"
    )
    seconds = sorted(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(rounds)
    )[rounds // 2]
    return [row("import beyond torch / 0.3 s", 1e3 * seconds, 300.0, seconds / 0.3, "≤ 1")]


SECTIONS: dict[str, Callable[[int], list[dict]]] = {
    "agreement": agreement,
    "blocks": blocks,
    "models": models,
    "scaling": scaling,
    "graph": graph,
    "attention": attention,
    "start": start,
}
PEERS = {"neuralop": "pip install --no-deps neuraloperator==2.0.0 and what its import asks for"}


if __name__ == "__main__":
    run_sections(
        "Neural operators", __doc__.split("\n")[0], SECTIONS, PEERS, Path("build/operators.json")
    )
    if _disagreements:
        sys.exit(f"differ from neuraloperator: {', '.join(_disagreements)}")

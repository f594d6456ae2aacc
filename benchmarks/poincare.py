"""Poincaré layers against HypLL, plain autograd and Karcher's iteration: time, memory, outputs.

    python benchmarks/poincare.py --json build/poincare.json

Times are CPU times of one thread, candidates in turn, median over rounds: on a shared machine only
the ratios mean something. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from timing import SHORT, in_turn, run_sections
from torch import Tensor, nn

from stiefel.nn.poincare import (
    PoincareBall,
    PoincareBatchNorm2d,
    PoincareConv2d,
    PoincareLinear,
    expmap0,
    frechet_mean,
    midpoint,
    tangent_add,
)

C = 0.1
# Allocations this large teach the C library to keep freed memory, as it does in any training loop;
# without, a benchmark of half-megabyte tensors measures page faults.
WARM = 7_500_000


def row(what: str, ours: float, peer: float, ratio: float, bound: str, unit: str = "ms") -> dict:
    """One line of the result; ``bound`` is ``"≥ 10"`` or ``"≤ 0.5"``, of the ratio, or ``"–"``."""
    met = "–"
    if bound != "–":
        relation, limit = bound.split()
        good = ratio >= float(limit) if relation == "≥" else ratio <= float(limit)
        met = "yes" if good else "NO"
    return {
        "what": what, "ours": ours, "peer": peer, "unit": unit,
        "ratio": ratio, "bound": bound, "met": met,
    }  # fmt: skip


def speed(what: str, seconds: dict[str, float], bound: str) -> dict:
    """Peer's time over ours, from ``{"ours": …, "peer": …}``."""
    ours, peer = seconds["ours"], seconds["peer"]
    return row(what, 1e3 * ours, 1e3 * peer, peer / ours, bound)


def squares(y: Tensor) -> None:
    """A backward pass from the sum of squares."""
    y.square().sum().backward()


def saved(forward: Callable[[], object]) -> float:
    """Megabytes that a forward pass keeps for the backward pass, each storage once."""
    sizes, alive = {}, []

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive.append(forward())
    return sum(sizes.values()) / 1e6


class HypLL:
    """The peer's layers with our numbers, from tangent vectors to tangent vectors."""

    def __init__(self, ball: PoincareBall) -> None:
        from hypll.manifolds.poincare_ball import Curvature
        from hypll.manifolds.poincare_ball import PoincareBall as Ball

        self.ball = Ball(Curvature(float(ball.raw_c)))

    def points(self, u: Tensor) -> object:
        """Points of tangent vectors, channels in dimension 1."""
        from hypll.tensors import TangentTensor

        return self.ball.expmap(TangentTensor(u, manifold=self.ball, man_dim=1))

    def tangent(self, module: nn.Module, u: Tensor) -> Tensor:
        """The module between exp₀ and log₀."""
        return self.ball.logmap(None, module(self.points(u))).tensor

    def alone(self, module: nn.Module, points: object) -> Callable[[], None]:
        """Forward and backward of the module only, from points that are there."""
        from hypll.tensors import ManifoldTensor

        def run() -> None:
            x = points.tensor.detach().requires_grad_()  # type: ignore[attr-defined]
            squares(module(ManifoldTensor(x, manifold=self.ball, man_dim=1)).tensor)

        return run


def convolution(rounds: int) -> list[dict]:
    """16→16, 3 × 3, padding 1, float32, forward and backward, three sizes."""
    if not importlib.util.find_spec("hypll"):
        return []
    from hypll.nn import HConvolution2d

    torch.manual_seed(0)
    ball, found = PoincareBall(C), []
    peer = HypLL(ball)
    conv = PoincareConv2d(16, 16, 3, ball, padding=1, init="normal")
    theirs = HConvolution2d(16, 16, 3, peer.ball, padding=1)
    with torch.no_grad():
        conv.bias.normal_(0, 0.1)
        theirs.weights.tensor.copy_(conv.weight)
        theirs.bias.copy_(conv.bias)
    for batch, side in ((32, 8), (16, 32), (16, 64)):
        u = torch.randn(batch, 16, side, side).requires_grad_()
        shape = f"16→16, k = 3, batch {batch}, {side} × {side}"
        tasks = {
            "ours": lambda u=u: squares(conv(u)),
            "peer": lambda u=u: squares(peer.tangent(theirs, u)),
            "alone": peer.alone(theirs, peer.points(u.detach())),
        }
        seconds = in_turn(tasks, rounds, fill=SHORT)
        found.append(speed(f"convolution {shape} / HypLL", seconds, "≥ 10"))
        alone = {"ours": seconds["ours"], "peer": seconds["alone"]}
        found.append(speed("the same / HypLL's layer without exp₀ and log₀", alone, "–"))
        ours, other = saved(lambda u=u: conv(u)), saved(lambda u=u: peer.tangent(theirs, u))
        found.append(row("its saved activations", ours, other, ours / other, "≤ 0.5", "MB"))
        with torch.no_grad():
            gap = float((conv(u) - peer.tangent(theirs, u)).abs().max())
        found.append(row("largest difference of outputs", gap, 0.0, gap, "≤ 1e-5", "abs"))
    plain = nn.Conv2d(16, 16, 3, padding=1)
    u = torch.randn(32, 16, 8, 8).requires_grad_()
    tasks = {"ours": lambda: squares(conv(u)), "peer": lambda: squares(plain(u))}
    found.append(
        speed("convolution, batch 32, 8 × 8 / Euclidean", in_turn(tasks, rounds, fill=SHORT), "–")
    )
    return found


def composed(u: Tensor, z: Tensor, r: Tensor) -> Tensor:
    """The layer as the paper writes it, under plain autograd."""
    root = C**0.5
    n = u.norm(dim=-1, keepdim=True).clamp_min(1e-15)
    x = torch.tanh(root * n) * u / (root * n)
    lam = 2 / (1 - C * x.square().sum(-1, keepdim=True))
    size = z.norm(dim=0).clamp_min(1e-15)
    inner = lam * (root * x @ (z / size)) * torch.cosh(2 * root * r)
    v = 2 * size / root * torch.asinh(inner - (lam - 1) * torch.sinh(2 * root * r))
    w = torch.sinh(root * v) / root
    y = w / (1 + (1 + C * w.square().sum(-1, keepdim=True)).sqrt())
    m = y.norm(dim=-1, keepdim=True).clamp_min(1e-15)
    return torch.atanh(root * m) * y / (root * m)


def linear(rounds: int) -> list[dict]:
    """8,192 vectors, 144→16, float32, forward and backward."""
    torch.manual_seed(0)
    layer = PoincareLinear(144, 16, PoincareBall(C), init="normal")
    u = (0.3 * torch.randn(8192, 144)).requires_grad_()
    tasks = {
        "ours": lambda: squares(layer(u)),
        "peer": lambda: squares(composed(u, layer.weight, layer.bias)),
    }
    found = [speed("linear 8,192 × 144→16 / composed", in_turn(tasks, rounds), "≥ 3.7")]
    ours = saved(lambda: layer(u))
    found.append(row("its saved activations / 6 MB", ours, 6.0, ours / 6.0, "≤ 1", "MB"))
    with torch.no_grad():
        gap = float((layer(u) - composed(u, layer.weight, layer.bias)).abs().max())
    found.append(row("largest difference of outputs", gap, 0.0, gap, "≤ 1e-5", "abs"))
    if importlib.util.find_spec("hypll"):
        from hypll.nn import HLinear

        peer = HypLL(layer.ball)
        theirs = HLinear(144, 16, peer.ball)
        with torch.no_grad():
            theirs.z.tensor.copy_(layer.weight)
        tasks["peer"] = lambda: squares(peer.tangent(theirs, u))
        found.append(speed("linear 8,192 × 144→16 / HypLL", in_turn(tasks, rounds), "–"))
    return found


def batch_norm(rounds: int) -> list[dict]:
    """16 channels, float32, forward and backward: both means at 8 × 8, the midpoint at 32 × 32."""
    if not importlib.util.find_spec("hypll"):
        return []
    from hypll.nn import HBatchNorm2d

    torch.manual_seed(0)
    ball, found = PoincareBall(C), []
    peer = HypLL(ball)
    for mean, bound, side in (("midpoint", "≥ 3", 8), ("midpoint", "≥ 3", 32), ("frechet", "–", 8)):
        u = torch.randn(32, 16, side, side).requires_grad_()
        norm = PoincareBatchNorm2d(16, ball, mean)
        theirs = HBatchNorm2d(16, peer.ball, use_midpoint=mean == "midpoint")
        tasks = {
            "ours": lambda norm=norm, u=u: squares(norm(u)),
            "peer": lambda theirs=theirs, u=u: squares(peer.tangent(theirs, u)),
            "alone": peer.alone(theirs, peer.points(u.detach())),
        }
        seconds = in_turn(tasks, rounds, fill=SHORT)
        found.append(
            speed(f"batch norm, {mean}, batch 32, {side} × {side} / HypLL", seconds, bound)
        )
        alone = {"ours": seconds["ours"], "peer": seconds["alone"]}
        found.append(speed("the same / HypLL's layer without exp₀ and log₀", alone, "–"))
        ours = saved(lambda norm=norm, u=u: norm(u))
        other = saved(lambda theirs=theirs, u=u: peer.tangent(theirs, u))
        found.append(row("its saved activations", ours, other, ours / other, "–", "MB"))
        with torch.no_grad():
            gap = float((norm(u) - peer.tangent(theirs, u)).abs().max())
        found.append(row("largest difference of outputs", gap, 0.0, gap, "≤ 1e-5", "abs"))
    return found


def karcher(u: Tensor) -> Tensor:
    """log₀ of the Fréchet mean by the usual iteration, to 1e-6."""
    mean = torch.zeros(1, u.shape[1], dtype=u.dtype)
    for _ in range(1000):
        step = tangent_add(-mean, u, C).mean(0, keepdim=True)
        mean = tangent_add(mean, step, C)
        if float(step.norm()) < 1e-6:
            break
    return mean


def means(rounds: int) -> list[dict]:
    """1,000 points in dimension 16, mean distance from the origin 0.1 to 2."""
    generator, found = torch.Generator().manual_seed(0), []
    for radius in (0.1, 0.4, 1.0, 2.0):
        u = torch.randn(1000, 16, generator=generator, dtype=torch.float64)
        u *= radius / 2 / u.norm(dim=1).mean()
        points = expmap0(u, C)
        tasks = {
            "ours": lambda p=points: midpoint(p, C),
            "peer": lambda u=u: karcher(u),
            "newton": lambda p=points: frechet_mean(p, C),
        }
        seconds = in_turn(tasks, rounds, fill=SHORT)
        found.append(speed(f"midpoint, radius {radius:g} / Karcher's iteration", seconds, "–"))
        newton = {"ours": seconds["newton"], "peer": seconds["peer"]}
        found.append(speed("Fréchet mean by Newton / Karcher's iteration", newton, "–"))
    return found


SECTIONS: dict[str, Callable[[int], list[dict]]] = {
    "convolution": convolution,
    "linear": linear,
    "batch_norm": batch_norm,
    "means": means,
}
PEERS = {"hypll": "pip install --no-deps hypll"}


if __name__ == "__main__":
    torch.zeros(WARM)
    description = __doc__.split("\n")[0]
    output = Path("build/poincare.json")
    run_sections("Poincaré layers", description, SECTIONS, PEERS, output, rounds=9)

"""S5, its scan and the PTD start against what people would otherwise use, each beside its bound.

    python benchmarks/state_spaces.py --json build/state_spaces.json

Times are CPU times of one thread, candidates in turn, median over rounds: on a shared machine only
the ratios mean something. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from layers import row, speed, squares
from run import peak_bytes
from timing import SHORT, in_turn, run_sections
from torch import Tensor, nn

from stiefel.nn import S4D, S5, associative_scan, hippo_ptd

BATCH, STATES = 4, 64


def scan_parts(length: int) -> tuple[Tensor, Tensor]:
    """Factors ``[64]`` inside the unit circle and drives ``[4, length, 64]``, complex64."""
    g = torch.Generator().manual_seed(0)
    decay, turn = torch.rand(STATES, generator=g), torch.randn(STATES, generator=g)
    b = torch.randn(BATCH, length, STATES, dtype=torch.complex64, generator=g)
    return torch.exp(torch.complex(-0.05 * decay, turn)).requires_grad_(), b.requires_grad_()


def loop(a: Tensor, b: Tensor) -> Tensor:
    """One step after the other."""
    x, states = torch.zeros_like(b[:, 0]), []
    for k in range(b.shape[1]):
        x = a * x + b[:, k]
        states.append(x)
    return torch.stack(states, dim=1)


def doubling(a: Tensor, b: Tensor) -> Tensor:
    """Hillis and Steele, left to autograd."""
    x, step = b, 1
    while step < b.shape[1]:
        x = x + a * nn.functional.pad(x[:, :-step], (0, 0, step, 0))
        a, step = a * a, 2 * step
    return x


def convolution(a: Tensor, b: Tensor) -> Tensor:
    """The same states by FFT: a kernel of powers of a, complex, twice the length."""
    length = b.shape[1]
    kernel = torch.exp(torch.log(a) * torch.arange(length)[:, None])
    size = 2 * length
    product = torch.fft.fft(b, n=size, dim=1) * torch.fft.fft(kernel, n=size, dim=0)
    return torch.fft.ifft(product, dim=1)[:, :length]


def both(scan: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> None:
    """Forward and backward."""
    squares(torch.view_as_real(scan(a, b)))


def scans(rounds: int) -> list[dict]:
    """Loop, FFT and plain doubling at 1,024 and 4,096 steps; batch 4, 64 states, complex64."""
    found = []
    for length in (1024, 4096):
        a, b = scan_parts(length)
        with torch.no_grad():
            forward = in_turn(
                {
                    "ours": lambda a=a, b=b: associative_scan(a, b),
                    "loop": lambda a=a, b=b: loop(a, b),
                    "fft": lambda a=a, b=b: convolution(a, b),
                },
                rounds,
                fill=SHORT,
            )
        tasks = {
            name: lambda f=f, a=a, b=b: both(f, a, b)
            for name, f in (
                ("ours", associative_scan),
                ("loop", loop),
                ("fft", convolution),
                ("doubling", doubling),
            )
        }
        backward = in_turn(tasks, rounds, fill=SHORT)
        for what, seconds, bound in (
            ("forward", forward, "≥ 3" if length == 4096 else "≥ 1"),
            ("forward and backward", backward, "≥ 10"),
        ):
            pair = {"ours": seconds["ours"], "peer": seconds["loop"]}
            found.append(speed(f"scan, L = {length}, {what} / loop", pair, bound))
            ours, peer = (1e3 * seconds[n] for n in ("ours", "fft"))
            found.append(
                row(f"scan, L = {length}, {what} / FFT convolution", ours, peer, ours / peer, "≤ 2")
            )
        pair = {"ours": backward["ours"], "peer": backward["doubling"]}
        found.append(speed(f"scan, L = {length}, both / doubling by autograd", pair, "≥ 1"))
    a, b = scan_parts(4096)
    ours, peer = (peak_bytes(lambda f=f: both(f, a, b)) / 1e6 for f in (associative_scan, doubling))
    found.append(
        row("its peak memory / doubling by autograd", ours, peer, ours / peer, "≤ 0.5", "MB")
    )
    return found


def s5_pytorch(rounds: int) -> list[dict]:
    """S5 and S4D beside s5-pytorch: same width and state, batch 4, forward and backward.

    s5-pytorch keeps every eigenvalue where ours keep one of each pair; the rows "all modes" are
    with ``conj_sym=False``.
    """
    if not importlib.util.find_spec("s5"):
        return []
    import s5

    found = []
    for width, state in ((64, 64), (32, 32)):
        torch.manual_seed(0)
        peer = s5.S5(width, state)
        layers: dict[str, nn.Module] = {
            "S5": S5(width, state),
            "S5, all modes": S5(width, state, conj_sym=False),
            "S4D": S4D(width, state),
        }
        for length in (1024, 4096):
            u = torch.randn(BATCH, length, width)
            tasks = {n: lambda m=m, u=u: squares(m(u)[0]) for n, m in layers.items()}
            seconds = in_turn({**tasks, "peer": lambda u=u, m=peer: squares(m(u))}, rounds)
            for name in layers:
                pair = {"ours": seconds[name], "peer": seconds["peer"]}
                what = f"{name}, H = {width}, N = {state}, L = {length} / s5-pytorch"
                found.append(speed(what, pair, "≥ 1"))
    return found


def mambapy(rounds: int) -> list[dict]:
    """S5 beside mambapy's block: same width and state, inner width not expanded; batch 4."""
    if not importlib.util.find_spec("mambapy"):
        return []
    from mambapy.mamba import MambaBlock, MambaConfig

    torch.manual_seed(0)
    width, state = 32, 16
    peer = MambaBlock(MambaConfig(d_model=width, n_layers=1, d_state=state, expand_factor=1))
    layer, found = S5(width, state), []
    for length in (1024, 4096):
        u = torch.randn(BATCH, length, width)
        tasks = {
            "ours": lambda u=u: squares(layer(u)[0]),
            "peer": lambda u=u: squares(peer(u)),
        }
        found.append(
            speed(f"S5, H = 32, N = 16, L = {length} / mambapy", in_turn(tasks, rounds), "≥ 1")
        )
    return found


def steps(rounds: int) -> list[dict]:
    """One step after 100,000 samples against one after none; batch 8, 64 channels and states."""
    layer, u = S5(64, 64).eval(), torch.randn(8, 64)
    layer.setup_step()
    with torch.no_grad():
        _, late = layer(torch.randn(8, 100_000, 64))
    early = layer.initial_state(8)

    def run(state: Tensor) -> None:
        with torch.no_grad():
            for _ in range(50):
                layer.step(u, state)

    seconds = in_turn({"ours": lambda: run(late), "peer": lambda: run(early)}, rounds)
    ours, peer = (1e3 * seconds[n] / 50 for n in ("ours", "peer"))
    return [row("S5 step after 100,000 samples / after none", ours, peer, ours / peer, "≤ 1.2")]


def start(rounds: int) -> list[dict]:
    """PTD of LegS at order 64 against 50 ms."""
    seconds = in_turn({"ours": lambda: hippo_ptd(64)}, rounds, fill=SHORT)["ours"]
    return [row("hippo_ptd(64) / 50 ms", 1e3 * seconds, 50.0, seconds / 0.05, "≤ 1")]


SECTIONS: dict[str, Callable[[int], list[dict]]] = {
    "scans": scans,
    "s5_pytorch": s5_pytorch,
    "mambapy": mambapy,
    "steps": steps,
    "start": start,
}
PEERS = {
    "s5": "pip install --no-deps s5-pytorch einops",
    "mambapy": "pip install --no-deps mambapy",
}


if __name__ == "__main__":
    run_sections(
        "State spaces", __doc__.split("\n")[0], SECTIONS, PEERS, Path("build/state_spaces.json")
    )

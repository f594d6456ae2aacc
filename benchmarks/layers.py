"""Layers against what people would otherwise use: time, memory, error, each beside its bound.

    python benchmarks/layers.py --json build/layers.json

Times are CPU times of one thread, candidates in turn, median over rounds: on a shared machine only
the ratios mean something. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from run import peak_bytes
from timing import in_turn, run_sections
from torch import Tensor, nn

from stiefel.nn import (
    S4D,
    OrthogonalConv2d,
    S4DBlock,
    conv_singular_values,
    lorth,
    s4d_init,
    vandermonde_kernel,
)


def row(what: str, ours: float, peer: float, ratio: float, bound: str, unit: str = "ms") -> dict:
    """One line of the result; ``bound`` is ``"≥ 10"`` or ``"≤ 0.25"``, of the ratio."""
    relation, limit = bound.split()
    met = ratio >= float(limit) if relation == "≥" else ratio <= float(limit)
    return {
        "what": what, "ours": ours, "peer": peer, "unit": unit,
        "ratio": ratio, "bound": bound, "met": "yes" if met else "NO",
    }  # fmt: skip


def speed(what: str, seconds: dict[str, float], bound: str) -> dict:
    """Peer's time over ours, from ``{"ours": …, "peer": …}``."""
    ours, peer = seconds["ours"], seconds["peer"]
    return row(what, 1e3 * ours, 1e3 * peer, peer / ours, bound)


def squares(y: Tensor) -> None:
    """A backward pass from the sum of squares."""
    y.square().sum().backward()


def kernel_parts(channels: int, state: int) -> list[Tensor]:
    """A, B, C, dt in float32, Lin start, random step sizes."""
    g = torch.Generator().manual_seed(0)
    a = s4d_init("lin", state)[0].to(torch.complex64).repeat(channels, 1)
    b, c = (torch.randn(a.shape, dtype=a.dtype, generator=g) for _ in range(2))
    dt = 1e-3 * 100 ** torch.rand(channels, 1, generator=g)
    return [x.requires_grad_() for x in (a, b, c, dt)]


def plain(parts: list[Tensor], length: int) -> Tensor:
    """The two lines of the paper, ZOH."""
    a, b, c, dt = parts
    table = torch.exp((dt * a)[..., None] * torch.arange(length))
    return 2 * torch.einsum("hn,hnl->hl", c * b * (torch.exp(dt * a) - 1) / a, table).real


def blocks(parts: list[Tensor], length: int) -> Tensor:
    """Ours."""
    a, b, c, dt = parts
    return vandermonde_kernel(a, b, c[None], dt, length)[0]


def s4d_kernel(rounds: int) -> list[dict]:
    """256 channels, N = 64, L = 4,096; memory at L = 16,384 with 64 channels."""
    parts = kernel_parts(256, 64)

    def forward(make: Callable) -> None:
        with torch.no_grad():
            make(parts, 4096)

    found = []
    for name, run in (
        ("forward", forward),
        ("forward and backward", lambda make: squares(make(parts, 4096))),
    ):
        tasks = {"ours": lambda run=run: run(blocks), "peer": lambda run=run: run(plain)}
        found.append(
            speed(f"S4D kernel, {name} / two-line Vandermonde", in_turn(tasks, rounds), "≥ 10")
        )
    small = [x.detach()[:32] for x in parts]
    exact = plain(
        [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in small], 4096
    )
    errors = {
        n: float((f(small, 4096) - exact).abs().max()) for n, f in (("o", blocks), ("p", plain))
    }
    found.append(
        row(
            "its error in float32",
            errors["o"],
            errors["p"],
            errors["o"] / errors["p"],
            "≤ 1",
            "abs",
        )
    )
    parts = kernel_parts(64, 64)
    ours, peer = (peak_bytes(lambda f=f: squares(f(parts, 16_384))) / 1e6 for f in (blocks, plain))
    found.append(
        row("its peak memory, L = 16,384, 64 channels", ours, peer, ours / peer, "≤ 0.25", "MB")
    )
    return found


def s4d_block(rounds: int) -> list[dict]:
    """The whole block against a GRU of the same width, forward and backward, batch 32."""
    torch.manual_seed(0)
    gru, block = nn.GRU(32, 32, batch_first=True), S4DBlock(32, 64)
    found = []
    for length, bound in ((64, "≥ 1.3"), (256, "≥ 1.3"), (1024, "≥ 1.5")):
        u = torch.randn(32, length, 32)
        tasks = {
            "ours": lambda u=u: squares(block(u, return_state=False)[0]),
            "peer": lambda u=u: squares(gru(u)[0]),
        }
        found.append(
            speed(f"S4D block, L = {length} / torch.nn.GRU", in_turn(tasks, rounds), bound)
        )
    return found


def s4d_step(rounds: int) -> list[dict]:
    """One step after 100,000 samples against one after none; batch 8, 64 channels."""
    layer, u = S4D(64, 64).eval(), torch.randn(8, 64)
    layer.setup_step()
    with torch.no_grad():
        _, late = layer(torch.randn(8, 100_000, 64))
    early = layer.initial_state(8)

    def steps(state: Tensor) -> None:
        with torch.no_grad():
            for _ in range(50):
                layer.step(u, state)

    seconds = in_turn({"ours": lambda: steps(late), "peer": lambda: steps(early)}, rounds)
    ours, peer = (1e3 * seconds[n] / 50 for n in ("ours", "peer"))
    return [row("S4D step after 100,000 samples / after none", ours, peer, ours / peer, "≤ 1.2")]


def s4d_mambapy(rounds: int) -> list[dict]:
    """S4D against mambapy's block: same width and state, inner width not expanded; batch 4."""
    if not importlib.util.find_spec("mambapy"):
        return []
    from mambapy.mamba import MambaBlock, MambaConfig

    torch.manual_seed(0)
    width, state = 32, 16
    mamba = MambaBlock(MambaConfig(d_model=width, n_layers=1, d_state=state, expand_factor=1))
    layer, found = S4D(width, state), []
    for length in (1024, 4096):
        u = torch.randn(4, length, width)
        tasks = {
            "ours": lambda u=u: squares(layer(u, return_state=False)[0]),
            "peer": lambda u=u: squares(mamba(u)),
        }
        found.append(speed(f"S4D layer, L = {length} / mambapy", in_turn(tasks, rounds), "≥ 1"))
    return found


def conv_spectrum(rounds: int) -> list[dict]:
    """FFT singular values against a dense SVD; at 65,536² that is out of reach, so scaled by n³."""
    generator = torch.Generator().manual_seed(0)
    kernels = {c: torch.randn(c, c, 3, 3, generator=generator) / (3 * c**0.5) for c in (16, 32, 64)}
    tasks: dict[str, Callable[[], object]] = {"64": lambda: conv_singular_values(kernels[64], 32)}
    for c in (16, 32):
        unit = torch.eye(64 * c).reshape(-1, c, 8, 8)
        padded = nn.functional.pad(unit, (1, 1, 1, 1), mode="circular")
        matrix = nn.functional.conv2d(padded, kernels[c]).flatten(1)
        tasks[f"{c}"] = lambda c=c: conv_singular_values(kernels[c], 8)
        tasks[f"dense {c}"] = lambda matrix=matrix: torch.linalg.svdvals(matrix)
    seconds = in_turn(tasks, rounds)
    found = [
        speed(
            f"singular values, {c}→{c}, k = 3, 8 × 8 / dense SVD of {64 * c}²",
            {"ours": seconds[f"{c}"], "peer": seconds[f"dense {c}"]},
            f"≥ {bound}",
        )
        for c, bound in ((16, 100), (32, 50))
    ]
    scaled = seconds["dense 32"] * (65_536 / 2_048) ** 3
    found.append(
        speed(
            "singular values, 64→64, k = 3, 32 × 32 / dense SVD of 2,048² times 32³",
            {"ours": seconds["64"], "peer": scaled},
            "≥ 50",
        )
    )
    return found


def conv_penalty(rounds: int) -> list[dict]:
    """L_orth against the convolution itself on a batch of 32, and the choice of the side."""
    torch.manual_seed(0)
    found, batch = [], torch.randn(32, 64, 32, 32)
    with torch.no_grad():
        conv = nn.Conv2d(64, 64, 3, padding=1)
        seconds = in_turn({"ours": lambda: lorth(conv.weight), "peer": lambda: conv(batch)}, rounds)
    ours, peer = (1e3 * seconds[n] for n in ("ours", "peer"))
    found.append(
        row("L_orth, 64→64, k = 3, forward / its convolution", ours, peer, ours / peer, "≤ 1.5")
    )
    conv = nn.Conv2d(64, 128, 3, padding=1)
    tasks = {
        "ours": lambda: lorth(conv.weight).backward(),
        "peer": lambda: squares(conv(batch)),
    }
    seconds = in_turn(tasks, rounds)
    ours, peer = (1e3 * seconds[n] for n in ("ours", "peer"))
    found.append(
        row("its training step, 64→128 / the layer's, batch 32", ours, peer, ours / peer, "≤ 0.1")
    )
    kernel = (torch.randn(512, 64, 3, 3) / 24).requires_grad_()

    def definition() -> None:
        a = nn.functional.conv2d(kernel, kernel, padding=2)
        (a.square().sum() - 2 * kernel.square().sum() + 64).backward()

    tasks = {"ours": lambda: lorth(kernel).backward(), "peer": definition}
    what = "L_orth, 64→512, forward and backward / conv2d(K, K) on 512"
    found.append(speed(what, in_turn(tasks, rounds), "≥ 4"))
    return found


def orthogonal_layers(rounds: int) -> list[dict]:
    """Training steps of orthogonal layers: same shapes, batch, optimizer; errors in float64.

    deel-torchlip's layer is 1-Lipschitz, not orthogonal, and orthogonium's SOC (a cut-off series,
    kernels of 7 × 7) is off by some 5e-3: their times are shown without a bound.
    """
    keep_memory()
    peers: dict[str, Callable[..., nn.Module]] = {}
    if importlib.util.find_spec("orthogonium"):
        from orthogonium.layers.conv.adaptiveSOC.ortho_conv import AdaptiveSOCConv2d
        from orthogonium.layers.conv.AOC.ortho_conv import AdaptiveOrthoConv2d

        peers["orthogonium"] = lambda c, m, s: AdaptiveOrthoConv2d(c, m, 3, s, padding=1)
        peers["orthogonium SOC"] = lambda c, m, s: AdaptiveSOCConv2d(c, m, 3, s, padding=3)
    if importlib.util.find_spec("deel"):
        from deel.torchlip import SpectralConv2d

        peers["deel-torchlip"] = lambda c, m, s: SpectralConv2d(
            c, m, 3, s, padding=1, padding_mode="circular"
        )
    found = []
    for c, m, s, n, batch in (
        (16, 32, 1, 16, 16), (64, 64, 1, 16, 16), (64, 128, 2, 16, 16), (64, 64, 1, 32, 16),
    ):  # fmt: skip
        torch.manual_seed(0)
        layers = {"ours": OrthogonalConv2d(c, m, 3, s)}
        # SOC's own padding goes with its 7 × 7 kernel, at stride 1.
        chosen = {name: make for name, make in peers.items() if s == 1 or "SOC" not in name}
        layers |= {name: make(c, m, s) for name, make in chosen.items()}
        x = torch.randn(batch, c, n, n)
        tasks = {name: _training_step(layer, x) for name, layer in layers.items()}
        for task in tasks.values():
            task()
        seconds = in_turn(tasks, max(rounds, 15))
        errors = {}
        for name, layer in layers.items():
            with torch.no_grad():
                values = conv_singular_values(layer.weight.double(), 8, s)
            errors[name] = float((values - 1).abs().max())
        shape = f"{c}→{m}, k = 3, S = {s}, {n} × {n}, batch {batch}"
        for peer in chosen:
            equal = peer == "orthogonium"
            pair = {"ours": seconds["ours"], "peer": seconds[peer]}
            what = f"orthogonal layer, {shape} / {peer}" + ("" if equal else " (no bound)")
            found.append(speed(what, pair, "≥ 1" if equal else "≥ 0"))
            ours, theirs = errors["ours"], errors[peer]
            found.append(row("its max |σ − 1|", ours, theirs, ours / theirs, "≤ 1.5", "abs"))
    return found


def keep_memory() -> None:
    """Have glibc keep blocks that are freed, where it is the allocator.

    Else it hands those of a batch back and takes them anew, thousands of page faults a step, which
    hit one candidate or the other by chance: up to a fifth of the time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another system, another allocator
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(trim_threshold, 1 << 30)
    mallopt(mmap_threshold, 32 << 20)  # the most that it takes


def _training_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()

    return step


SECTIONS: dict[str, Callable[[int], list[dict]]] = {
    "s4d_kernel": s4d_kernel,
    "s4d_block": s4d_block,
    "s4d_step": s4d_step,
    "s4d_mambapy": s4d_mambapy,
    "conv_spectrum": conv_spectrum,
    "conv_penalty": conv_penalty,
    "orthogonal_layers": orthogonal_layers,
}
PEERS = {
    "mambapy": "pip install --no-deps mambapy",
    "orthogonium": "pip install --no-deps orthogonium",
    "deel": "pip install --no-deps deel-torchlip",
}


if __name__ == "__main__":
    about = __doc__.split("\n")[0]
    run_sections("Layers", about, SECTIONS, PEERS, Path("build/layers.json"))

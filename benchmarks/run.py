"""Ours against peers in one run: step time, state, peak memory, orthogonality error.

    make bench            # or: python benchmarks/run.py --json build/bench.json

Times are CPU times of one thread, all candidates in turn, median over rounds: on a shared machine
only the ratios mean something. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from recorded import record
from rich.console import Console
from rich.table import Table as RichTable
from timing import in_turn
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from stiefel.linalg import orthogonality_error
from stiefel.linalg.coefficients import NAMES, scalar_image, table
from stiefel.linalg.polar import newton_schulz
from stiefel.linalg.schulz import normalize_into, orthogonalize, product_dtype
from stiefel.optim import (
    ARO,
    RMNP,
    ROOT,
    AuON,
    DCTAdamW,
    HybridAuON,
    Muon,
    NorMuon,
    Trion,
    rmnp_direction,
)
from stiefel.optim.columns import ColumnSelector

WIDTH = 384
SHAPES = ((WIDTH, WIDTH),) * 24 + ((4 * WIDTH, WIDTH),) * 6 + ((WIDTH, 4 * WIDTH),) * 6
LARGEST_STACK = 6 * 1536 * 384 * 4  # bytes, float32


def parameters() -> list[nn.Parameter]:
    """Six layers of width 384: 10.6 million numbers with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in SHAPES:
        parameter = nn.Parameter(0.05 * torch.randn(shape, generator=generator))
        parameter.grad = torch.randn(shape, generator=generator)
        params.append(parameter)
    return params


def candidates() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """Name → optimizer on given parameters."""
    found: dict[str, Callable] = {
        "torch.optim.AdamW(fused=True)": lambda p: torch.optim.AdamW(p, fused=True),
        "torch.optim.AdamW(foreach=True)": lambda p: torch.optim.AdamW(p, foreach=True),
        "torch.optim.Muon": lambda p: torch.optim.Muon(p),
        "stiefel Muon": lambda p: Muon(p),
        "stiefel Muon ns=fast": lambda p: Muon(p, ns="fast"),
        "stiefel Muon ns=classic": lambda p: Muon(p, ns="classic"),
        "stiefel Muon ns=polar_express": lambda p: Muon(p, ns="polar_express"),
        "stiefel NorMuon": lambda p: NorMuon(p),
        "stiefel NorMuon nesterov": lambda p: NorMuon(p, nesterov=True),
        "stiefel NorMuon ns=fast": lambda p: NorMuon(p, ns="fast"),
        "stiefel ROOT": lambda p: ROOT(p),
        "stiefel ROOT sampled": lambda p: ROOT(p, quantile_mode="sampled"),
        "stiefel ARO": lambda p: ARO(p),
        "stiefel ARO base=sign": lambda p: ARO(p, base="sign"),
        "stiefel ARO qr=scqr": lambda p: ARO(p, qr="scqr"),
        "stiefel HybridAuON": lambda p: HybridAuON(p),
        "stiefel Trion rank=1/4": lambda p: Trion(p),
        "stiefel DCTAdamW rank=1/4": lambda p: DCTAdamW(p),
        "stiefel DCTAdamW every 200 steps": lambda p: DCTAdamW(p, update_gap=200),
        "stiefel DCTAdamW 8-bit feedback": lambda p: DCTAdamW(p, error_feedback=8),
        "stiefel AuON": lambda p: AuON(p),
        "stiefel RMNP": lambda p: RMNP(p),
        "stiefel RMNP weight_decay=0.1": lambda p: RMNP(p, weight_decay=0.1),
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer as peer

        def grouped(cls: type) -> Callable:
            return lambda p: cls([{"params": p, "use_muon": True}])

        found["pytorch_optimizer Muon"] = grouped(peer.Muon)

        def galore(gap: int) -> Callable:
            settings = {"rank": WIDTH // 4, "update_proj_gap": gap, "scale": 1.0}
            return lambda p: peer.GaLore([{"params": p, "projection_type": "std", **settings}])

        found["pytorch_optimizer NorMuon"] = grouped(peer.NorMuon)
        found["pytorch_optimizer GaLore rank=1/4, SVD every step"] = galore(1)
        # The median is that of a step without SVD.
        found["pytorch_optimizer GaLore rank=1/4, every 200"] = galore(200)
    return found


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


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, in objects that it keeps there as well."""
    values = [v for s in optimizer.state.values() for v in s.values()]
    values += [v for held in values if hasattr(held, "__dict__") for v in vars(held).values()]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def steps(rounds: int) -> list[dict]:
    """Step time, state and scratch memory of every optimizer."""
    optimizers = {name: make(parameters()) for name, make in candidates().items()}
    seconds = in_turn({name: o.step for name, o in optimizers.items()}, rounds)
    adamw_state = state_bytes(optimizers["torch.optim.AdamW(foreach=True)"])
    rows = []
    for name, optimizer in optimizers.items():
        # A fresh one: scratch that is kept between steps counts as well.
        fresh = candidates()[name](parameters())
        scratch = peak_bytes(fresh.step) - state_bytes(fresh)
        rows.append(
            {
                "optimizer": name,
                "ms": 1e3 * seconds[name],
                "to_muon": seconds[name] / seconds["torch.optim.Muon"],
                "to_adamw": seconds[name] / seconds["torch.optim.AdamW(foreach=True)"],
                "state_mb": state_bytes(optimizer) / 1e6,
                "state_to_adamw": state_bytes(optimizer) / adamw_state,
                "scratch_in_stacks": max(scratch, 0) / LARGEST_STACK,
            }
        )
    return rows


def errors() -> list[dict]:
    """Mean (σ − 1)² of every table, relative to classic, as it runs (products in bfloat16)."""
    generator = torch.Generator().manual_seed(0)
    stacks = {
        f"Gaussian {m}×{n}": torch.randn(1, m, n, generator=generator)
        for m, n in ((384, 384), (384, 1536))
    }
    for (step, (rows, cols)), stack in record().items():
        stacks[f"recorded step {step}, {rows}×{cols}"] = stack
    rows = []
    for source, stack in stacks.items():
        row: dict = {"spectrum": source}
        for name in NAMES:
            rule = table(name)
            out = orthogonalize(stack, rule, dtype=product_dtype("cpu"))
            row[name] = float(orthogonality_error(out)[1].median())
            row[f"{name}_sigma_max"] = float(torch.linalg.svdvals(out).max())
            sigma = torch.linalg.svdvals(stack.double())
            sigma /= rule.safety * sigma.norm(dim=-1, keepdim=True)
            image = torch.from_numpy(scalar_image(sigma.numpy(), rule.triples))
            row[f"{name}_float64"] = float((image - 1).square().mean(-1).median())
        rows.append(row)
    return rows


def preconditioning(rounds: int) -> dict[str, float]:
    """Time of Newton–Schulz against row normalisation, products in the native type and float32."""
    matrices = [p.detach() for p in parameters()]

    def schulz(dtype: torch.dtype) -> None:
        for x in matrices:
            newton_schulz(x.to(dtype))

    seconds = in_turn(
        {
            "newton_schulz native": lambda: schulz(product_dtype("cpu")),
            "newton_schulz float32": lambda: schulz(torch.float32),
            "row normalisation": lambda: [rmnp_direction(x) for x in matrices],
            "functional.normalize": lambda: [nn.functional.normalize(x, dim=-1) for x in matrices],
        },
        rounds,
    )
    return {name: 1e3 * value for name, value in seconds.items()}


def engine(rounds: int) -> dict[str, float]:
    """The orthogonaliser alone against the plain loop with the same triples, CPU ms."""
    stacks = [torch.randn(24, 384, 384), torch.randn(6, 384, 1536), torch.randn(6, 1536, 384)]
    dtype = product_dtype("cpu")

    def plain(name: str) -> None:
        rule = table(name)
        for stack in stacks:
            for x in stack:
                work = torch.empty(x.shape, dtype=dtype)
                normalize_into(work, x, rule)
                newton_schulz(work, rule.steps, name)

    tasks: dict[str, Callable[[], object]] = {}
    for name in ("fitted", "fast"):
        tasks[f"plain {name}"] = lambda name=name: plain(name)
        tasks[f"fast algorithm {name}"] = lambda name=name: [
            orthogonalize(s, table(name), dtype=dtype) for s in stacks
        ]
    return {name: 1e3 * value for name, value in in_turn(tasks, rounds).items()}


def projection(rounds: int) -> list[dict]:
    """Finding a subspace and the coordinates in it: DCT columns, an SVD, one power iteration."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n, share in ((512, 4), (512, 2), (1024, 4), (1024, 2)):
        gradient = torch.randn(n, n, generator=generator)
        rank = n // share
        before = torch.linalg.qr(torch.randn(n, rank, generator=generator))[0]
        selector = ColumnSelector(n, rank)

        def svd(g: Tensor = gradient, r: int = rank) -> Tensor:
            return g @ torch.linalg.svd(g, full_matrices=False).Vh[:r].mT

        def power(g: Tensor = gradient, q: Tensor = before) -> Tensor:
            # Dion's: two products and one QR, the least that a step can take.
            return g.mT @ torch.linalg.qr(g @ q)[0]

        tasks: dict[str, Callable[[], object]] = {
            "dct": lambda g=gradient, s=selector: s.select(g),
            "power": power,
        }
        seconds = in_turn(tasks, rounds) | in_turn({"svd": svd}, 5)
        rows.append(
            {
                "gradient": f"{n}×{n}, rank {rank}",
                "dct_ms": 1e3 * seconds["dct"],
                "svd_ms": 1e3 * seconds["svd"],
                "power_ms": 1e3 * seconds["power"],
                "svd_to_dct, ≥ 10": seconds["svd"] / seconds["dct"],
                "power_to_dct, ≥ 2": seconds["power"] / seconds["dct"],
            }
        )
    return rows


def show(console: Console, title: str, rows: list[dict]) -> None:
    """Print rows as a table."""
    shown = RichTable(title=title, title_justify="left")
    keys = [k for k in rows[0] if not k.endswith(("_float64", "_sigma_max"))]
    for key in keys:
        shown.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        shown.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in map(row.get, keys)))
    console.print(shown)


def main() -> None:
    """Run all, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds per timing, at least 5")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--only", choices=("steps", "errors", "engine", "projection"), default=None)
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # empty elementwise groups: on purpose here
    console = Console()
    result: dict = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "products": str(product_dtype("cpu")),
        "rounds": options.rounds,
    }
    if not importlib.util.find_spec("pytorch_optimizer"):
        console.print('pytorch_optimizer is left out; for it: pip install "stiefel[bench]"')
    if options.only in (None, "steps"):
        result["steps"] = steps(options.rounds)
        show(console, "One step, 36 matrices of 10.6 million numbers", result["steps"])
        result["preconditioning_ms"] = preconditioning(options.rounds)
        show(console, "Preconditioning alone, ms", [result["preconditioning_ms"]])
    if options.only in (None, "engine"):
        result["engine_ms"] = engine(options.rounds)
        show(console, "Orthogonalising alone, ms", [result["engine_ms"]])
    if options.only in (None, "projection"):
        result["projection"] = projection(options.rounds)
        show(console, "A subspace and the coordinates in it", result["projection"])
    if options.only in (None, "errors"):
        result["errors"] = errors()
        show(console, "Mean (σ − 1)² after orthogonalising", result["errors"])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()

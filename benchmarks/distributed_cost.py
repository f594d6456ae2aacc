"""What an optimizer step costs on 8 to 1,024 ranks: time, traffic and memory of every method.

    python benchmarks/distributed_cost.py --model llama-7b --tflops 300 --gbps 400
    python benchmarks/distributed_cost.py --shapes model.safetensors --ranks 64,512
    python benchmarks/distributed_cost.py --check      # the model against gloo on this machine

No process is started but by --check: owners, rounds, bytes and FLOPs are from the planner that the
optimizers use. The defaults are no measurements: an H100 at two fifths of its peak rate in bfloat16
and three quarters of its memory's, with a 400 Gbit/s adapter of its own. State yours.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from distributed_check import CLOCKS, check, measured_speed
from distributed_machine import METHODS, Machine
from distributed_model import Cost, cost
from distributed_shapes import ELEMENTWISE, PRESETS, Model, named, read_model
from rich.console import Console
from rich.table import Table

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
WITHIN = 0.3  # how far a predicted time may be from the measured one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    source = made.add_mutually_exclusive_group()
    source.add_argument("--model", choices=sorted(PRESETS), default="gpt2-small")
    source.add_argument("--shapes", help="JSON of name → shape, as text or file, or *.safetensors")
    made.add_argument("--elementwise", default=ELEMENTWISE, help="names in --shapes for AdamW")
    made.add_argument("--ranks", type=comma_list, default=[str(r) for r in RANKS])
    made.add_argument("--methods", type=comma_list, default=list(METHODS))
    made.add_argument("--layout", choices=("fsdp", "ddp"), default="fsdp")
    made.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    made.add_argument("--tflops", default="400", help="of each rank's products, or 'measured'")
    made.add_argument("--device", default="cpu", help="of --tflops measured")
    made.add_argument("--gbs", type=float, default=2500, help="GB/s of memory")
    made.add_argument("--gbps", type=float, default=400, help="Gbit/s of link per rank, each way")
    made.add_argument("--us", type=float, default=20, help="latency of a collective")
    made.add_argument("--message-us", type=float, default=0.5, help="for each of its messages")
    made.add_argument("--launch-us", type=float, default=4, help="to start a kernel")
    made.add_argument("--host-us", type=float, default=30, help="of Python for every parameter")
    made.add_argument("--check", action="store_true", help="compare with 2 and 4 gloo processes")
    made.add_argument("--rounds", type=int, default=9, help="of measuring, at least 5")
    made.add_argument("--json", type=Path, help="where to write all figures")
    return made


def settle(options: argparse.Namespace, made: argparse.ArgumentParser) -> tuple[Model, list[int]]:
    """The model and the numbers of ranks, or a refusal."""
    try:
        ranks = [int(text) for text in options.ranks]
    except ValueError:
        made.error(f"--ranks must be numbers between commas, got {','.join(options.ranks)}")
    if not ranks or min(ranks) < 1:
        made.error(f"--ranks must be at least 1, got {','.join(options.ranks)}")
    if unknown := sorted(set(options.methods) - METHODS.keys()):
        made.error(f"--methods has {', '.join(unknown)}; there are {', '.join(METHODS)}")
    for key in ("gbs", "gbps"):
        if not getattr(options, key) > 0:
            made.error(f"--{key} must be above 0, got {getattr(options, key)}")
    for key in ("us", "message_us", "launch_us", "host_us"):
        if not getattr(options, key) >= 0:
            made.error(f"--{key.replace('_', '-')} must be at least 0, got {getattr(options, key)}")
    if options.rounds < 5:
        made.error(f"--rounds must be at least 5, got {options.rounds}")
    try:
        torch.device(options.device)
    except RuntimeError:
        made.error(f"--device must be one of torch's, such as cpu or cuda, got {options.device}")
    if options.tflops != "measured":
        try:
            valid = float(options.tflops) > 0
        except ValueError:
            valid = False
        if not valid:
            made.error(f"--tflops must be above 0 or 'measured', got {options.tflops}")
    try:
        if options.shapes:
            return read_model(options.shapes, options.elementwise), ranks
    except (ValueError, OSError) as error:
        made.error(f"--shapes: {error}")
    return named(options.model), ranks


def machine_for(options: argparse.Namespace, model: Model, method: str) -> Machine:
    """What the command line says of every rank."""
    if options.tflops == "measured":
        device = torch.device(options.device)
        tflops = measured_speed(model, method, DTYPES[options.dtype], options.rounds, device)
    else:
        tflops = float(options.tflops)
    return Machine(
        tflops,
        options.gbs,
        options.gbps,
        options.us,
        options.message_us,
        options.launch_us,
        options.host_us,
    )


def show(console: Console, title: str, costs: list[Cost]) -> None:
    """Print the costs of all methods on one number of ranks."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for heading in (
        "step, ms", "messages, ms", "hidden", "sent, MB: most", "mean", "GFLOP: most", "imbalance",
        "memory, MB", "state", "scratch",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for c in costs:
        table.add_row(
            c.method,
            f"{1e3 * c.seconds:.2f}",
            f"{1e3 * c.communicating:.2f}",
            f"{c.hidden:.0%}" if c.communicating else "–",
            f"{c.sent / 1e6:.1f}",
            f"{c.sent_mean / 1e6:.1f}",
            f"{c.flops / 1e9:.1f}",
            f"{c.imbalance:.2f}",
            f"{c.memory / 1e6:.0f}",
            f"{c.state / 1e6:.0f}",
            f"{c.scratch / 1e6:.0f}",
        )
    console.print(table)


def simulate(console: Console, options: argparse.Namespace, model: Model, ranks: list[int]) -> Any:
    """Print and return the costs of all methods on all numbers of ranks."""
    machines = {m: machine_for(options, model, m) for m in options.methods}
    rows: list[dict[str, Any]] = []
    console.print(
        f"{model.name}: {model.numel(True):,} numbers in matrices, {model.numel(False):,} "
        f"elsewhere, {options.dtype}, {options.layout}; {options.gbps:g} Gbit/s"
    )
    if options.tflops == "measured":
        speeds = ", ".join(f"{m} {1e3 * machines[m].tflops:.3g}" for m in options.methods)
        console.print(f"measured on this machine, GFLOP/s: {speeds}")
    for world in ranks:
        start = time.perf_counter()
        costs = [
            cost(
                model,
                method,
                world,
                machines[method],
                dtype=DTYPES[options.dtype],
                replicated=options.layout == "ddp",
            )
            for method in options.methods
        ]
        show(console, f"{world} ranks", costs)
        taken = time.perf_counter() - start
        rows += [asdict(c) | {"memory": c.memory, "planning_seconds": taken} for c in costs]
    return rows


def show_check(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print what was predicted beside what was measured."""
    table = Table(title="One step over gloo: model and measurement", title_justify="left")
    for heading in (
        "method", "ranks", "wall, ms: model", "measured", "ratio", "CPU, ms: model", "measured",
        "ratio", "kB sent: plan", "counted", "MFLOP: plan", "in products",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        cells = [row["method"], str(row["ranks"])]
        for clock in CLOCKS:
            found = row[clock]
            inside = "" if abs(found["ratio"] - 1) <= WITHIN else " NO"
            cells += [f"{1e3 * found[key]:.1f}" for key in ("predicted", "measured")]
            cells.append(f"{found['ratio']:.2f}{inside}")
        cells += [f"{row[key] / 1e3:.1f}" for key in ("sent_plan", "sent_counted")]
        cells += [f"{row[key] / 1e6:.0f}" for key in ("flops_plan", "flops_counted")]
        table.add_row(*cells)
    console.print(table)
    for clock in CLOCKS:
        inside = sum(abs(row[clock]["ratio"] - 1) <= WITHIN for row in rows)
        console.print(f"{clock}: {inside} of {len(rows)} ratios within {WITHIN:.0%} of 1")


def main(arguments: list[str] | None = None) -> None:
    """Simulate, or check the simulation."""
    made = parser()
    options = made.parse_args(arguments)
    model, ranks = settle(options, made)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 140)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    if options.check:
        result["check"] = check(options.methods, options.rounds)
        show_check(console, result["check"])
    else:
        result["costs"] = simulate(console, options, model, ranks)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()

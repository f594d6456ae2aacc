"""`stiefel merge` against mergekit 0.1.5: CPU time and peak memory from a cold start.

    python benchmarks/merge.py --mergekit PATH/TO/mergekit-yaml [--large] [--json FILE]

Random Llama checkpoints in bfloat16 (112 million parameters, three shards; the largest tensor has
49 MB) are merged by both programs in turn, each in a process of its own with one thread, import
included. mergekit belongs into an environment with the same torch. ``--large`` adds 1.13 billion
parameters, where only the largest tensor may decide the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from string import Template

import torch
from merge_models import LARGE, SMALL, make
from rich.console import Console
from rich.table import Table

from stiefel.checkpoint import Checkpoint

BOUNDS = {"linear": (0.5, 0.65), "ties": (0.4, 0.55)}
"""CPU time and peak memory relative to mergekit's."""
TWO = """models:
  - {model: $a, parameters: {weight: $w, density: $density}}
  - {model: $b, parameters: {weight: $v, density: $density}}
merge_method: $method
base_model: $base
dtype: bfloat16
"""
RECIPES = {
    "linear": "models:\n  - {model: $a, parameters: {weight: 0.4}}\n"
    "  - {model: $b, parameters: {weight: 0.6}}\nmerge_method: linear\ndtype: bfloat16\n",
    "slerp": "models:\n  - model: $base\n  - model: $a\nmerge_method: slerp\nbase_model: $base\n"
    "parameters: {t: 0.4}\ndtype: bfloat16\n",
    "task_arithmetic": TWO.replace(", density: $density", ""),
    "ties": TWO + "parameters: {normalize: true, lambda: 1.0}\n",
    "dare_linear": TWO,
}
OURS = [sys.executable, "-m", "stiefel", "merge"]


# The peak of a new process begins with that of the process it is forked from, so a small one
# stands between: it starts the command, waits, and prints what the system counted.
LAUNCH = """
import os, sys
process = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[
    (os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(process, 0)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def cost(command: list[str]) -> tuple[float, float]:
    """CPU seconds and peak resident megabytes of a command."""
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCH, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    seconds, peak = run.stdout.split()[-2:]
    return float(seconds), float(peak)


def commands(recipe: Path, out: Path, mergekit: str | None) -> dict[str, list[str]]:
    found = {"stiefel": [*OURS, str(recipe), "--out", str(out / "stiefel"), "--threads", "1"]}
    if mergekit:
        place = str(out / "mergekit")
        quiet = ["--quiet", "-j", "1", "--no-copy-tokenizer"]
        found["mergekit"] = [mergekit, str(recipe), place, *quiet]
    return found


def measure(
    folder: Path, method: str, mergekit: str | None, rounds: int
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Median cost of each program, and how well the last outputs agree."""
    recipe = folder / f"{method}.yaml"
    places = {name: folder / file for name, file in (("base", "m0"), ("a", "m1"), ("b", "m2"))}
    settings = {"w": 0.5, "v": 0.5, "density": 0.2, "method": method}
    recipe.write_text(Template(RECIPES[method]).substitute(places | settings))
    out = folder / "out"
    samples: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name, command in commands(recipe, out, mergekit).items():
            samples.setdefault(name, []).append(cost(command))
    medians = {
        name: (statistics.median(s[0] for s in each), statistics.median(s[1] for s in each))
        for name, each in samples.items()
    }
    return medians, agreement(folder, method, out)


def agreement(folder: Path, method: str, out: Path) -> dict[str, float]:
    """Part of the entries that equal mergekit's, and a float32 computation by plain formulas."""
    found: dict[str, float] = {}
    with Checkpoint(out / "stiefel") as ours:
        if (out / "mergekit").exists():
            with Checkpoint(out / "mergekit") as theirs:
                found["equal to mergekit"] = equal_part(ours, theirs.read)
                if method in BOUNDS:
                    found["mergekit equal to float32"] = against_formula(folder, method, theirs)
        if method in BOUNDS:
            found["equal to float32"] = against_formula(folder, method, ours)
    return found


def equal_part(ours: Checkpoint, other) -> float:
    same = total = 0
    for name, info in ours.tensors.items():
        same += int((ours.read(name) == other(name)).sum())
        total += info.numel
    return same / total


def against_formula(folder: Path, method: str, ours: Checkpoint) -> float:
    base, first, second = (Checkpoint(folder / f"m{seed}") for seed in range(3))

    def formula(name: str) -> torch.Tensor:
        a, b = first.read(name).float(), second.read(name).float()
        if method == "linear":
            weights = torch.tensor([0.4, 0.6])
            total = torch.zeros_like(a).addcmul_(a, weights[0]).addcmul_(b, weights[1])
            return (total / weights.sum()).bfloat16()
        return ties_formula(base.read(name).float(), (a, b)).bfloat16()

    return equal_part(ours, formula)


def ties_formula(base: torch.Tensor, models: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """TIES of weights 1/2 and density 0.2 in float32, by sorting."""
    deltas = []
    for model in models:
        delta = (model - base).flatten()
        order = torch.argsort(delta.abs(), descending=True, stable=True)
        delta[order[max(1, int(0.2 * delta.numel())) :]] = 0
        deltas.append(0.5 * delta.view_as(base))
    stacked = torch.stack(deltas)
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    kept = stacked * (stacked.sign() == sign)
    divisor = 0.5 * (kept != 0).sum(0)
    return base + kept.sum(0) / torch.where(divisor == 0, 1.0, divisor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", help="the program mergekit-yaml of mergekit 0.1.5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--large", action="store_true", help="1.13 billion parameters as well")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    mergekit = options.mergekit or shutil.which("mergekit-yaml")
    console = Console()
    if mergekit is None:
        console.print("mergekit-yaml is not installed: --mergekit names one; ours alone is timed")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for label, size in (("112 M", SMALL), *((("1.13 B", LARGE),) if options.large else ())):
            folder = (options.folder or Path(temporary)) / label.replace(" ", "")
            folder.mkdir(parents=True, exist_ok=True)
            for seed in range(3):
                make(folder / f"m{seed}", size, seed)
            methods = options.methods if size is SMALL else ["linear", "ties"]
            for method in methods:
                rounds = options.rounds if size is SMALL else 1
                medians, agree = measure(folder, method, mergekit, rounds)
                rows.append({"size": label, "method": method, "cost": medians, **agree})
                console.print(line(rows[-1]))
    show(console, rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def line(row: dict) -> str:
    agree = [f"{k} {100 * v:.4f} %" for k, v in row.items() if isinstance(v, float)]
    return f"{row['size']} {row['method']}: {', '.join(agree) or 'done'}"


def show(console: Console, rows: list[dict]) -> None:
    table = Table("model", "method", "program", "CPU s", "ratio", "peak MB", "ratio")
    for row in rows:
        theirs = row["cost"].get("mergekit")
        for name, (seconds, peak) in row["cost"].items():
            ratios = ["", ""]
            if name == "stiefel" and theirs:
                bounds = (
                    BOUNDS.get(row["method"], (None, None)) if "M" in row["size"] else (None,) * 2
                )
                for i, (value, bound) in enumerate(zip((seconds, peak), bounds, strict=True)):
                    ratio = value / theirs[i]
                    ratios[i] = f"{ratio:.2f}" + (f" (bound {bound})" if bound else "")
            table.add_row(
                row["size"], row["method"], name, f"{seconds:.2f}", ratios[0], f"{peak:.0f}",
                ratios[1],
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()

"""Permutation ensembles: batched training against modules, closed form against linear algebra.

    python benchmarks/permutation.py [--json FILE] [--peer PYTHON]

CPU times of one thread, candidates in turn, median over rounds. ``--peer``: an interpreter that
has neural-tangents (see permutation_peer.py); without it that peer is left out and named.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from run import in_turn
from torch import Tensor, nn

from stiefel.theory import PermutationEnsemble, ensemble_size, permutation_moments
from stiefel.theory import permutation_training as training
from stiefel.theory.permutation import auto_step

BITS, WIDTH, MEMBERS = 8, 200, 1000
PERM = tuple(range(BITS - 1, -1, -1))
# Modules trained one by one in each round; their time is scaled up to all members.
SAMPLE = 25
DENSE_BITS, DENSE_ONES = 1000, 10


class Net(nn.Module):
    """One member as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(WIDTH, BITS))
        self.second = nn.Parameter(torch.randn(BITS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(x @ self.first.T * BITS**-0.5)
        return hidden @ self.second.T * WIDTH**-0.5


def train_modules(steps: int, count: int, both: bool) -> None:
    """``count`` modules, one after the other, by plain SGD."""
    eye = torch.eye(BITS)
    targets = eye[:, list(PERM)]
    for _ in range(count):
        net = Net()
        net.first.requires_grad_(both)
        lr = auto_step(BITS, "ntk" if both else "last_layer")
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = 0.5 * (net(eye) - targets).square().sum()
            loss.backward()
            optimizer.step()


def steps_taken() -> int:
    """Steps that the batch takes until every member is within 3e-7: the modules get as many."""
    most = 0
    error = math.inf
    while error > training.TRAINED:
        most += 5
        ensemble = PermutationEnsemble(BITS, 32, WIDTH)
        ensemble._draw(slice(0, 32))
        targets = torch.eye(BITS)[:, list(PERM)]
        step = auto_step(BITS, "ntk")
        error = training.descend(ensemble.hidden, ensemble.readout, targets, most, step)
    return most


def dense(k: int, ones: int) -> tuple[float, float, float]:
    """Both means and the variance by kernels and one k × k solve."""
    eye = torch.eye(k, dtype=torch.float64)
    x = torch.zeros(1, k, dtype=torch.float64)
    x[0, :ones] = ones**-0.5

    def kernels(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rho = (a @ b.mT).clamp(-1, 1)
        rest = math.pi - rho.acos()
        start = ((1 - rho.square()).sqrt() + rest * rho) / (2 * math.pi * k)
        return start + rest * rho / (2 * math.pi * k), start

    (theta, start), (theta_x, start_x) = kernels(eye, eye), kernels(eye, x)
    a = torch.linalg.solve(theta, theta_x)
    var = 0.5 / k + a.mT @ start @ a - 2 * a.mT @ start_x
    return float(a[0]), float(a[-1]), float(var)


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and ratios of everything."""
    steps = steps_taken()
    seconds = in_turn(
        {
            "batch": lambda: PermutationEnsemble(BITS, MEMBERS, WIDTH).fit(PERM),
            "modules": lambda: train_modules(steps, SAMPLE, True),
            "batch last": lambda: PermutationEnsemble(BITS, MEMBERS, WIDTH, "last_layer").fit(PERM),
            "modules last": lambda: train_modules(steps, SAMPLE, False),
        },
        rounds,
    )
    scale = MEMBERS / SAMPLE
    result = {
        "training, both layers": {
            "batch_s": seconds["batch"],
            "one_by_one_s": scale * seconds["modules"],
            "steps": steps,
            "ratio": scale * seconds["modules"] / seconds["batch"],
            "at_least": 20,
        },
        "training, last layer (solved against as many steps)": {
            "batch_s": seconds["batch last"],
            "one_by_one_s": scale * seconds["modules last"],
            "steps": steps,
            "ratio": scale * seconds["modules last"] / seconds["batch last"],
            "at_least": 20,
        },
    }
    repeat = 200
    counts = torch.arange(1, DENSE_BITS + 1)
    seconds = in_turn(
        {
            "one": lambda: [permutation_moments(DENSE_BITS, DENSE_ONES) for _ in range(repeat)],
            "all": lambda: [permutation_moments(DENSE_BITS, counts) for _ in range(repeat)],
            "dense": lambda: dense(DENSE_BITS, DENSE_ONES),
        },
        rounds,
    )
    for name, calls in (("one", 1), ("all", DENSE_BITS)):
        each = seconds[name] / repeat / calls
        result[f"closed form at k = {DENSE_BITS}, {calls} counts a call"] = {
            "closed_us_per_count": 1e6 * each,
            "dense_ms": 1e3 * seconds["dense"],
            "ratio": seconds["dense"] / each,
            "at_least": 1000,
        }
    seconds = in_turn(
        {
            "every k": lambda: [ensemble_size(k, n_ones="all") for k in range(2, 1025)],
            "powers": lambda: [ensemble_size(2**i, n_ones="all") for i in range(1, 11)],
        },
        rounds,
    )
    result["N for all inputs, k to 1024"] = {
        "every_k_s": seconds["every k"],
        "powers_of_2_s": seconds["powers"],
        "ratio": 1 / seconds["every k"],
        "at_least": 1,  # second
    }
    return result


def peer(python: str, rounds: int, closed_us: float) -> dict[str, float]:
    """neural-tangents in its own interpreter, and a check that it gives the same numbers."""
    command = [python, str(Path(__file__).with_name("permutation_peer.py"))]
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    run = subprocess.run(
        [*command, str(DENSE_BITS), str(DENSE_ONES), str(rounds)],
        capture_output=True,
        text=True,
        check=True,
        env={"XLA_FLAGS": flags, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"},
    )
    found = json.loads(run.stdout.splitlines()[-1])
    ours = [float(v) for v in permutation_moments(DENSE_BITS, DENSE_ONES)]
    return {
        "whole_ms": 1e3 * found["whole_seconds"],
        "query_ms": 1e3 * found["query_seconds"],
        "largest_difference": max(abs(a - b) for a, b in zip(ours, found["moments"], strict=True)),
        "ratio": 1e6 * found["whole_seconds"] / closed_us,
        "query_ratio": 1e6 * found["query_seconds"] / closed_us,
        "at_least": 1000,
    }


def main() -> None:
    """Measure, print each ratio beside its bound, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds per timing, at least 5")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--peer", default=None, help="interpreter that has neural-tangents")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    torch.set_num_threads(1)
    console = Console()
    rows = measure(options.rounds)
    single = rows[f"closed form at k = {DENSE_BITS}, 1 counts a call"]["closed_us_per_count"]
    if options.peer is None:
        console.print(
            "neural-tangents is left out; for it: --peer PYTHON (see permutation_peer.py)"
        )
    else:
        rows["closed form, one count, against neural-tangents"] = peer(
            options.peer, options.rounds, single
        )
    for name, row in rows.items():
        met = "met" if row["ratio"] >= row["at_least"] else "NOT met"
        rest = ", ".join(
            f"{key} {value:.4g}" for key, value in row.items() if key not in ("ratio", "at_least")
        )
        console.print(
            f"{name}: ratio {row['ratio']:.4g}, bound {row['at_least']}: {met} ({rest})",
            highlight=False,
        )
    if options.json is not None:
        report = {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "rounds": options.rounds,
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()

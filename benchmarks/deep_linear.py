"""Deep linear dynamics: closed forms against an ODE solver, orthogonal starts against torch's.

    python benchmarks/deep_linear.py [--json build/deep_linear.json]

CPU times of one thread, candidates in turn, median over rounds: only the ratios mean something.
Every ratio is printed beside the bound it is held against. The ODE solver gets, for every method,
the pair of rtol and atol with which it is fastest among those whose curves, measured against the
closed form, are within 1e-6 of their strengths. Peers: RK45, scipy's default, and the fastest.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.integrate import solve_ivp
from timing import in_turn
from torch import Tensor, nn

from stiefel.init import orthogonal_init_
from stiefel.theory import DeepLinearSimulator, mode_curve, mode_time, task_modes

ACCURACY = 1e-6
START = 1e-4
METHODS = ("RK45", "DOP853", "LSODA")
TOLERANCES = (1e-5, 3e-6, 1e-6, 3e-7, 1e-7, 3e-8, 1e-8, 3e-9, 1e-9, 3e-10, 1e-10)
# atol = rtol × start × one of these.
ABSOLUTE = (1.0, 100.0)
SWEEP_SECONDS = 25.0
STACKS = ((256, 32, 32), (48, 128, 128), (16, 256, 256), (6, 512, 512), (6, 1024, 256))


def solver(
    s: float, depth: int, method: str, rtol: float, atol: float, t: np.ndarray
) -> np.ndarray:
    """One mode by scipy, as its equation is written."""
    p = 2 - 2 / depth
    return solve_ivp(
        lambda _, u: depth * np.abs(u) ** p * (s - u),
        (0.0, t[-1]),
        [START],
        method,
        t_eval=t,
        rtol=rtol,
        atol=atol,
    ).y[0]


def sampled_seconds(
    strengths: np.ndarray, t: np.ndarray, depth: int, method: str
) -> tuple[float, float, float] | None:
    """(seconds for all modes, rtol, error) from ten modes of all; None if never accurate.

    Every accurate setting is timed once, the fastest of them three times unless that takes long:
    explicit methods take 330 s for a thousand stiff modes, and none of their settings helps.
    """
    chosen = strengths[:: max(1, len(strengths) // 10)]
    exact = mode_curve(t, chosen, START, depth).numpy()

    def run(rtol: float, atol: float) -> tuple[float, float]:
        start = time.thread_time()
        found = [solver(float(s), depth, method, rtol, atol, t) for s in chosen]
        seconds = (time.thread_time() - start) * len(strengths) / len(chosen)
        return seconds, float((np.abs(np.stack(found) - exact) / chosen[:, None]).max())

    accurate, started = [], time.thread_time()
    for factor in ABSOLUTE:
        for rtol in TOLERANCES:  # the first that is accurate is the loosest
            if time.thread_time() - started > SWEEP_SECONDS:
                break
            seconds, error = run(rtol, rtol * START * factor)
            if error <= ACCURACY:
                accurate.append((seconds, rtol, error, factor))
                break
    if not accurate:
        return None
    seconds, rtol, error, factor = min(accurate)
    if time.thread_time() - started > SWEEP_SECONDS:
        return seconds, rtol, error
    again = [run(rtol, rtol * START * factor)[0] for _ in range(2)]
    return statistics.median([seconds, *again]), rtol, error


def one_system(strengths: np.ndarray, t: np.ndarray, depth: int) -> float:
    """CPU seconds of one call for all modes as one system (RK45 at 1e-7)."""
    p = 2 - 2 / depth
    start = time.thread_time()
    solve_ivp(
        lambda _, u: depth * np.abs(u) ** p * (strengths - u),
        (0.0, t[-1]),
        np.full(len(strengths), START),
        "RK45",
        t_eval=t,
        rtol=1e-7,
        atol=1e-7 * START,
    )
    return time.thread_time() - start


def spectra(modes: int) -> dict[str, np.ndarray]:
    """Strengths of tasks: alike, and falling over two and three decades as those of data do."""
    return {
        "0.5 to 4": np.linspace(0.5, 4.0, modes),
        "2 decades": np.logspace(-2, 0, modes),
        "3 decades": np.logspace(-3, 0, modes),
    }


def curves(rounds: int, modes: int, times: int) -> list[dict]:
    """The closed form against ``solve_ivp``; times long enough that the weakest mode is learned."""
    rows = []
    for depth in (2, 5):
        for name, strengths in spectra(modes).items():
            weakest = float(strengths[0])
            end = 1.1 * float(mode_time(weakest, START, 0.95 * weakest, depth))
            t = np.linspace(0.0, end, times)
            steps = torch.from_numpy(t)
            s64 = torch.from_numpy(strengths)
            s32, t32 = s64.float(), steps.float()
            out64 = torch.zeros(modes, times, dtype=torch.float64)
            out32 = torch.zeros(modes, times)
            ours = in_turn(
                {
                    "float64": lambda s=s64, t=steps, d=depth: mode_curve(t, s, START, d),
                    "float64 out": lambda s=s64, t=steps, d=depth, o=out64: mode_curve(
                        t, s, START, d, out=o
                    ),
                    "float32": lambda s=s32, t=t32, d=depth: mode_curve(t, s, START, d),
                    "float32 out": lambda s=s32, t=t32, d=depth, o=out32: mode_curve(
                        t, s, START, d, out=o
                    ),
                },
                rounds,
            )
            found = {m: sampled_seconds(strengths, t, depth, m) for m in METHODS}
            accurate = {m: f[0] for m, f in found.items() if f is not None}
            best = min(accurate, key=accurate.__getitem__)
            default = accurate.get("RK45", math.nan)
            exact = mode_curve(t32.double(), s32.double(), START, depth)
            mode_curve(t32, s32, START, depth, out=out32)
            row = {
                "depth": depth,
                "strengths": name,
                "modes × times": f"{modes} × {times}",
                "RK45 s": default,
                "best s": accurate[best],
                "best": best,
                "float32 error": float(((out32 - exact) / s32[:, None].double()).abs().max()),
            }
            for kind, seconds in ours.items():
                row |= {
                    f"{kind} ms": 1e3 * seconds,
                    f"RK45 / {kind}": default / seconds,
                    f"best / {kind}": accurate[best] / seconds,
                }
            row["one system / float64"] = one_system(strengths, t, depth) / ours["float64"]
            rows.append(row | {"bound": 1000})
    return rows


def by_kind(row: dict) -> list[dict]:
    """A row of :func:`curves` as a table: what was asked for down, times and ratios across."""
    return [
        {
            "modes × times": row["modes × times"],
            "ours": kind,
            "ms": row[f"{kind} ms"],
            "RK45 s": row["RK45 s"],
            "RK45 / ours": row[f"RK45 / {kind}"],
            "best s": row["best s"],
            "best": row["best"],
            "best / ours": row[f"best / {kind}"],
            "bound": row["bound"],
            "one system / float64": row["one system / float64"],
        }
        for kind in ("float64", "float64 out", "float32", "float32 out")
    ]


def starts(rounds: int) -> list[dict]:
    """Stacks of orthogonal weights against one call of torch's function for each."""
    rows = []
    for shape in STACKS:
        stack = torch.empty(shape)

        def torch_each(stack: Tensor = stack) -> None:
            for weight in stack:
                nn.init.orthogonal_(weight)

        seconds = in_turn(
            {
                "torch": torch_each,
                "stack": lambda stack=stack: orthogonal_init_(stack, gain=1.0),
                "list": lambda stack=stack: orthogonal_init_(list(stack), gain=1.0),
            },
            rounds,
        )
        errors = {}
        for name, fill in (("torch", torch_each), ("ours", partial(orthogonal_init_, stack, 1.0))):
            fill()
            gram = stack.double().mT @ stack.double()
            errors[name] = float((gram - torch.eye(shape[-1])).abs().max())
        rows.append(
            {
                "stack": "×".join(map(str, shape)),
                "torch ms": 1e3 * seconds["torch"],
                "ours ms": 1e3 * seconds["stack"],
                "ratio": seconds["torch"] / seconds["stack"],
                "ratio, list of weights": seconds["torch"] / seconds["list"],
                "bound": 1.5,
                "max|QᵀQ−I| torch": errors["torch"],
                "max|QᵀQ−I| ours": errors["ours"],
            }
        )
    return rows


def simulation(rounds: int) -> list[dict]:
    """Covariances and all rates at once, against autograd on the data rate by rate."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1797, 40, generator=generator)
    y = torch.randn(1797, 10, generator=generator) + x[:, :10]
    modes = task_modes(x, y)
    seen, rates, steps = modes.transform(x).float(), [0.01 * 0.7**k for k in range(11)], 10
    widths = [40, 48, 48, 48, 10]
    simulator = DeepLinearSimulator(widths, modes=modes, dtype=torch.float32)

    def autograd() -> None:
        for rate in rates:
            layers = [nn.Parameter(w[0].clone()) for w in simulator.weights]
            optimizer = torch.optim.SGD(layers, lr=rate)
            for _ in range(steps):
                out = seen
                for layer in layers:
                    out = out @ layer.mT
                loss = (y - out).square().sum() / (2 * len(y))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    seconds = in_turn(
        {"autograd": autograd, "simulator": lambda: simulator.run(rates, steps, "excess")}, rounds
    )
    return [
        {
            "11 rates, 10 steps, 4 layers of 48, 1797 examples": "sweep",
            "autograd ms": 1e3 * seconds["autograd"],
            "simulator ms": 1e3 * seconds["simulator"],
            "ratio": seconds["autograd"] / seconds["simulator"],
        }
    ]


def show(console: Console, title: str, rows: list[dict]) -> None:
    """Print rows as a table."""
    shown = Table(title=title, title_justify="left")
    for key in rows[0]:
        shown.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        shown.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in row.values()))
    console.print(shown)


def main() -> None:
    """Run all, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds per timing, at least 5")
    parser.add_argument("--json", type=Path, default=Path("build/deep_linear.json"))
    parser.add_argument("--only", choices=("curves", "starts", "simulation"), default=None)
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    torch.set_num_threads(1)
    console = Console(width=200)
    result: dict = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "rounds": options.rounds,
    }
    if options.only in (None, "curves"):
        result["curves"] = curves(options.rounds, 1000, 10_000)
        for row in result["curves"]:
            title = f"Closed form against scipy.integrate.solve_ivp at 1e-6, depth {row['depth']}"
            show(console, f"{title}, {row['strengths']}", by_kind(row))
    if options.only in (None, "starts"):
        result["starts"] = starts(options.rounds)
        show(console, "Orthogonal starts", result["starts"])
    if options.only in (None, "simulation"):
        result["simulation"] = simulation(options.rounds)
        show(console, "Gradient descent without the data", result["simulation"])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()

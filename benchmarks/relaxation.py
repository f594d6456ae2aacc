"""Bandits' overhead, sweeps against pyamg, and iterations saved, each beside its bound.

    python benchmarks/relaxation.py --json build/relaxation.json

Times are CPU times of one thread, candidates in turn, median over rounds: on a shared machine only
the ratios mean something. A peer that is not installed is left out and named.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timing import SHORT, in_turn, run_sections

from stiefel.numerics import (
    BinnedTsallisINF,
    ChebCB,
    GridOperator,
    TsallisINF,
    sor_solve,
)
from stiefel.papers.learned_sor_runs import heat as heat_run

LATE = 5000
SWEEPS = 41


def row(what: str, ours: float, peer: float | str, ratio: float, bound: str, unit: str) -> dict:
    """One line of the result; ``bound`` is ``"≥ 20"`` or ``"≤ 0.25"``, of the ratio."""
    relation, limit = bound.split()
    met = ratio >= float(limit) if relation == "≥" else ratio <= float(limit)
    return {
        "what": what, "ours": ours, "peer": peer, "unit": unit,
        "ratio": ratio, "bound": bound, "met": "yes" if met else "NO",
    }  # fmt: skip


def played(bandit: Any, rounds: int, rng: np.random.Generator) -> Any:
    """A bandit after so many rounds of costs that depend on the context, as in a heat equation."""
    for c in rng.random(rounds):
        omega = bandit.predict(c)
        bandit.update(round(10 + 200 * (omega - 1.1 - 0.7 * c) ** 2 + 3 * rng.random()))
    return bandit


def overhead(rounds: int) -> list[dict]:
    """predict and update of twenty ω after 5,000 rounds, and over the first 500."""
    found = []
    for make in (TsallisINF, BinnedTsallisINF, ChebCB):
        bandit = played(make(random_state=0), LATE, np.random.default_rng(1))
        rng = np.random.default_rng(2)
        seconds = in_turn({"late": lambda b=bandit, r=rng: played(b, 100, r)}, rounds, fill=SHORT)
        first = in_turn({"all": lambda m=make, r=rng: played(m(random_state=0), 500, r)}, rounds)
        for name, value in (
            ("after 5,000 rounds", seconds["late"] / 100),
            ("mean of the first 500", first["all"] / 500),
        ):
            micro = 1e6 * value
            what = f"{make.__name__}, predict and update, {name}"
            found.append(row(what, micro, "–", micro, "≤ 100", "µs"))
    return found


def sweeps(rounds: int) -> list[dict]:
    """One SOR sweep with its residual against pyamg's without one."""
    if not importlib.util.find_spec("pyamg"):
        return []
    from pyamg.relaxation.relaxation import sor

    found = []
    for shape, bound in (((24, 24), 0), ((99, 99), 1), ((199, 199), 1), ((40, 40, 40), 1)):
        grid = GridOperator(shape, 2.0 * len(shape), [-1.0] * len(shape))
        edges = [[s - (a == i) for i, s in enumerate(shape)] for a in range(len(shape))]
        varied = GridOperator(shape, 2.0 * len(shape), [np.full(e, -1.0) for e in edges])
        matrix, b, x = grid.to_csr(), np.ones(grid.size), np.zeros(grid.size)
        candidates = {
            "red-black": (grid, "red-black"),
            "red-black, couplings as arrays": (varied, "red-black"),
            "red-black, CSR": (matrix, "red-black"),
            "natural, SuperLU": (matrix, "natural"),
        }
        tasks: dict[str, Callable[[], object]] = {
            "peer": lambda a=matrix, x=x, b=b: sor(a, x, b, 1.5, iterations=SWEEPS - 1)
        }
        for name, (a, order) in candidates.items():
            for count in (1, SWEEPS):
                tasks[f"{name} {count}"] = lambda a=a, b=b, order=order, count=count: sor_solve(
                    a, b, tol=1e-300, maxiter=count, ordering=order
                )
        seconds = in_turn(tasks, rounds)
        peer = 1e3 * seconds["peer"] / (SWEEPS - 1)
        for name in candidates:
            ours = 1e3 * (seconds[f"{name} {SWEEPS}"] - seconds[f"{name} 1"]) / (SWEEPS - 1)
            # The bound is on grids of 10⁴ and more; the other rows are for comparison.
            wanted = bound if name.startswith("red-black") else 0
            what = f"sweep, {' × '.join(map(str, shape))}, {name} / pyamg"
            found.append(row(what, ours, peer, peer / ours, f"≥ {wanted}", "ms"))
    return found


class Timed:
    """A bandit with a clock: its own seconds, and those between being asked and being told."""

    def __init__(self, bandit: Any) -> None:
        self.bandit, self.asking, self.solving, self.mark = bandit, 0.0, 0.0, 0.0

    def predict(self, context: float) -> float:
        start = time.thread_time()
        omega = self.bandit.predict(context)
        self.mark = time.thread_time()
        self.asking += self.mark - start
        return omega

    def update(self, loss: float) -> None:
        start = time.thread_time()
        self.solving += start - self.mark
        self.bandit.update(loss)
        self.asking += time.thread_time() - start


def heat_counts(nx: int, steps: int, policy: Any) -> int:
    """Iterations of the heat equation of the card."""
    config = {"nx": nx, "steps": steps, "policy": policy, "seed": 0}
    return sum(heat_run(config, lambda fraction, message: None)["counts"])


def heat(rounds: int) -> list[dict]:
    """The heat equation of the card: the bandit's part of the time, and iterations."""
    found = []
    # The bandit's time is that of any size; only a large system is asked for 1 %. ChebCB's first
    # rounds are its slowest, since every new largest cost moves the bounds of all fits.
    for nx, steps, bound in ((25, 200, "≤ 1"), (100, 100, "≤ 1"), (200, 40, "≤ 0.01")):
        for make in (TsallisINF, ChebCB):
            shares, solves = [], []
            for seed in range(rounds):
                clock = Timed(make(random_state=seed) if make is TsallisINF else
                              ChebCB(low=0, high=10, random_state=seed))  # fmt: skip
                heat_counts(nx, steps, clock)
                shares.append(clock.asking / clock.solving)
                solves.append(1e3 * clock.solving / steps)
            share = statistics.median(shares)
            what = f"heat, n = {(nx - 1) ** 2:,}, first {steps} steps: {make.__name__} / solving"
            note = " (no bound)" if bound == "≤ 1" else ""
            found.append(row(what + note, share, statistics.median(solves), share, bound, "/ ms"))
    fixed = {w: heat_counts(25, 5000, w) for w in (1, 1.3, 1.5, 1.75, 1.95)}
    best = min(fixed.values())
    totals = [
        heat_counts(25, 5000, ChebCB(low=0, high=10, random_state=seed)) for seed in range(rounds)
    ]
    mean = statistics.fmean(totals)
    for bound in ("≤ 0.92", "≤ 0.8"):
        what = "heat equation, 5,000 steps: ChebCB / best of five fixed ω"
        found.append(row(what, mean, best, mean / best, bound, "iterations"))
    return found


SECTIONS: dict[str, Callable[[int], list[dict]]] = {
    "overhead": overhead,
    "sweeps": sweeps,
    "heat": heat,
}
PEERS = {"pyamg": "pip install --no-deps pyamg"}


if __name__ == "__main__":
    description = __doc__.split("\n")[0]
    output = Path("build/relaxation.json")
    run_sections("Relaxation", description, SECTIONS, PEERS, output)

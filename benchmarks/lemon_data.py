"""Data of differential equations: time against one solve_ivp call a trajectory, orders of solvers.

    python benchmarks/lemon_data.py --json build/lemon_data.json

Both sides have 128 points, 64 times, float64, the same Fourier right-hand side (or, as in the
authors' generator, a Python loop over cells). "as called": ``solve_ivp`` with its defaults, ours
with the fewest steps that are at least as exact. "tuned": the fastest of 24 methods and tolerances
that reaches the error named, which nobody who writes the loop searches for. Times are CPU times of
one thread, candidates in turn, median over rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.integrate import solve_ivp
from timing import in_turn, run_sections
from torch import Tensor

from stiefel.nn.lemon import pde
from stiefel.nn.lemon.pde import initial
from stiefel.nn.lemon.pde.degenerate import porous_medium
from stiefel.nn.lemon.pde.grid import Grid, centres
from stiefel.nn.lemon.pde.shock import FLUXES, finite_volume

POINTS, TIMES, OURS, THEIRS, LOOPED = 128, 64, 256, 4, 1
EPS, C1 = 0.03, 3e-3
NU = 0.00955
METHODS = [
    (method, rtol)
    for rtol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    for method in ("RK23", "RK45", "DOP853", "LSODA")
]

Rhs = Callable[[float, np.ndarray], np.ndarray]


def row(what: str, ours: float, peer: float, ratio: float, bound: str, unit: str) -> dict:
    """One line of the result; ``bound`` is ``"≥ 10"``, of the ratio."""
    met = ratio >= float(bound.split()[1])
    return {
        "what": what, "ours": ours, "peer": peer, "unit": unit,
        "ratio": ratio, "bound": bound, "met": "yes" if met else "NO",
    }  # fmt: skip


def start(n: int) -> Tensor:
    """Sums of two sines, float64."""
    return initial.sines(centres(POINTS), n, 2, torch.Generator().manual_seed(0), rough=0)


def fourier_heat() -> Rhs:
    """Right-hand side by FFT, vectorised over the points."""
    squared = (np.pi * np.arange(POINTS // 2 + 1)) ** 2
    return lambda t, u: np.fft.irfft(-C1 * squared * np.fft.rfft(u), POINTS)


def fourier_burgers() -> Rhs:
    """The same with the 2/3 rule, as ours."""
    k = np.pi * np.arange(POINTS // 2 + 1)
    outward = -0.5j * k * (np.arange(POINTS // 2 + 1) < POINTS / 3)
    return lambda t, u: np.fft.irfft(
        outward * np.fft.rfft(u * u) - NU * k * k * np.fft.rfft(u), POINTS
    )


def looped_heat() -> Rhs:
    """A Python loop over the cells, as in the authors' generator."""
    dx = 2 / POINTS

    def rhs(t: float, u: np.ndarray) -> np.ndarray:
        change = np.zeros_like(u)
        for i in range(POINTS):
            change[i] = C1 * (u[i - 1] - 2 * u[i] + u[(i + 1) % POINTS]) / dx**2
        return change

    return rhs


def looped_burgers() -> Rhs:
    """A Python loop over the cells, central differences."""
    dx = 2 / POINTS

    def rhs(t: float, u: np.ndarray) -> np.ndarray:
        change = np.zeros_like(u)
        for i in range(POINTS):
            left, here, right = u[i - 1], u[i], u[(i + 1) % POINTS]
            change[i] = -(right**2 - left**2) / (4 * dx)
            change[i] += NU * (left - 2 * here + right) / dx**2
        return change

    return rhs


def one_by_one(
    rhs: Rhs, u0: Tensor, method: str = "RK45", rtol: float = 1e-3, atol: float = 1e-6
) -> Tensor:
    """One call of solve_ivp for each trajectory."""
    times = np.arange(TIMES) * (2 / TIMES)
    solved = [
        solve_ivp(rhs, (0, 2), u.numpy(), method, times, rtol=rtol, atol=atol).y.T for u in u0
    ]
    return torch.from_numpy(np.stack(solved))


def error(u: Tensor, exact: Tensor) -> float:
    """Relative, over all samples, times and points."""
    return float((u - exact).norm() / exact.norm())


def fastest(tasks: dict[str, Callable[[], Tensor]], exact: Tensor, target: float) -> str:
    """Name of the cheapest task whose result is exact enough."""
    good = {name: t for name, t in tasks.items() if error(t()[: len(exact)], exact) <= target}
    times = in_turn(good, 1)
    return min(times, key=times.__getitem__)


def against_scipy(
    family: str, parameters: dict[str, float], rhs: Rhs, looped: Rhs, steps: tuple[float, ...],
    rounds: int,
) -> list[dict]:  # fmt: skip
    """Milliseconds per trajectory at equal accuracy, and against the authors' kind of loop."""
    u0, rows = start(OURS), []
    exact = pde.solve(family, u0[:THEIRS], parameters, nt=TIMES, steps=8)
    ours = {
        f"{s:.3g} × our steps": lambda s=s: pde.solve(family, u0, parameters, nt=TIMES, steps=s)
        for s in steps
    }
    default = error(one_by_one(rhs, u0[:THEIRS]), exact)
    mine = fastest(ours, exact, default)
    called = {
        "ours": ours[mine],
        "fft": lambda: one_by_one(rhs, u0[:THEIRS]),
        "loop": lambda: one_by_one(looped, u0[:LOOPED]),
    }
    seconds = in_turn(called, rounds, fill=0.05)
    a = 1e3 * seconds["ours"] / OURS
    for name, n, how in (("fft", THEIRS, "FFT"), ("loop", LOOPED, "loop over cells")):
        b = 1e3 * seconds[name] / n
        what = f"{family}, as called (error {default:.0e}): {mine}; {how}"
        rows.append(row(what, a, b, b / a, "≥ 100", "ms"))
    peers = {
        f"{m}, rtol {r:.0e}": lambda m=m, r=r: one_by_one(rhs, u0[:THEIRS], m, r, r * 1e-2)
        for m, r in METHODS
    }
    for target in (1e-3, 1e-6):
        mine, their = fastest(ours, exact, target), fastest(peers, exact, target)
        seconds = in_turn({"ours": ours[mine], "peer": peers[their]}, rounds, fill=0.05)
        a, b = 1e3 * seconds["ours"] / OURS, 1e3 * seconds["peer"] / THEIRS
        what = f"{family}, tuned (error ≤ {target:.0e}): {mine}; {their}, FFT"
        rows.append(row(what, a, b, b / a, "≥ 100", "ms"))
    return rows


def heat(rounds: int) -> list[dict]:
    """Exact in Fourier space."""
    return against_scipy("heat", {"c1": C1}, fourier_heat(), looped_heat(), (1.0,), rounds)


def burgers(rounds: int) -> list[dict]:
    """Integrating factor with RK4."""
    return against_scipy(
        "burgers",
        {"eps": EPS},
        fourier_burgers(),
        looped_burgers(),
        (1 / 6, 1 / 3, 1 / 2, 2 / 3, 1.0),
        rounds,
    )


def smooth(x: Tensor) -> Tensor:
    """Between .1 and .9."""
    return 0.5 + 0.3 * torch.sin(math.pi * x + 0.4) + 0.1 * torch.cos(2 * math.pi * x)


def orders(_: int) -> list[dict]:
    """Observed orders: in time against finer steps, in space against exact solutions."""
    x = centres(POINTS)
    u0, rows = smooth(x)[None], []
    in_time = [
        ("burgers", {"eps": 0.1}, 3.5), ("cubic_flux", {"eps": 0.1}, 3.5),
        ("sin_flux", {"eps": 0.1}, 3.5), ("cos_flux", {"eps": 0.1}, 3.5),
        ("logistic", {"rho": 8.0}, 3.5), ("square_logistic", {"rho": 8.0}, 3.5),
        ("bistable", {"rho": 8.0}, 3.5), ("kdv", {}, 3.5), ("sine_gordon", {}, 1.9),
        ("fokker_planck", {}, 3.5),
    ]  # fmt: skip
    for family, q, least in in_time:
        base = 0.25 if least > 3 else 1.0
        fine = pde.solve(family, u0, q, nt=8, steps=8 * base)
        coarse, half = (
            error(pde.solve(family, u0, q, nt=8, steps=s * base), fine) for s in (1 / 2, 1)
        )
        what = f"{family}: order in time"
        rows.append(row(what, half, coarse, math.log2(coarse / half), f"≥ {least}", "error"))
    for family in FLUXES:
        errors = [characteristics(family, cells) for cells in (128, 256)]
        what = f"inviscid_{family}: order in cells, before the shock"
        rows.append(row(what, errors[1], errors[0], math.log2(errors[0] / errors[1]),
                        "≥ 1.8", "error"))  # fmt: skip
        errors = [shock(family, cells) for cells in (64, 256)]
        what = f"inviscid_{family}: order in cells, with a shock"
        rows.append(row(what, errors[1], errors[0], math.log(errors[0] / errors[1], 4),
                        "≥ 0.8", "error"))  # fmt: skip
    for m in (2.0, 3.0, 4.0):
        errors = [barenblatt(m, cells) for cells in (64, 256)]
        what = f"porous_medium, m = {m:.0f}: order in cells, free boundary (Barenblatt)"
        rows.append(row(what, errors[1], errors[0], math.log(errors[0] / errors[1], 4),
                        "≥ 0.8", "error"))  # fmt: skip
    return rows


def characteristics(family: str, cells: int, time: float = 0.3) -> float:
    """Mean error of a smooth solution, u = u₀(x − f′(u) t)."""
    x, flux = centres(cells), FLUXES[family]
    exact = smooth(x)
    for _ in range(200):
        exact = smooth(x - flux.speed(exact) * time)
    times = torch.tensor([0.0, time], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    u = finite_volume(smooth(x)[None], flux, one, times)[0, 1]
    return float((u - exact).abs().mean())


def shock(family: str, cells: int, time: float = 0.8) -> float:
    """Mean error of a shock of the speed of Rankine and Hugoniot, over several first places."""
    x, flux = centres(cells), FLUXES[family]
    high, low = torch.tensor([0.9, 0.2], dtype=torch.float64)
    left, right = (high, low) if flux.convex else (low, high)
    speed = (flux.value(left) - flux.value(right)) / (left - right)
    place = torch.linspace(0.6, 0.7, 16, dtype=torch.float64)[:, None]
    ones = torch.ones(16, 1, dtype=torch.float64)
    times = torch.tensor([0.0, time], dtype=torch.float64)
    # Averages over the cells: the first place lies inside one.
    share = ((place - x) * cells / 2 + 0.5).clamp(0, 1)
    final = ((place + speed * time - x) * cells / 2 + 0.5).clamp(0, 1)
    u = finite_volume(right + (left - right) * share, flux, ones, times, periodic=False)[:, 1]
    return float((u - right - (left - right) * final).abs().mean())


def barenblatt(m: float, cells: int) -> float:
    """Relative mean error of the spreading profile."""
    alpha = 1 / (m + 1)
    x = centres(cells)

    def exact(time: float) -> Tensor:
        profile = 0.05 - alpha * (m - 1) / (2 * m) * (x - 1) ** 2 / time ** (2 * alpha)
        return time**-alpha * profile.clamp_min(0) ** (1 / (m - 1))

    times = torch.tensor([0.0, 0.05, 0.1], dtype=torch.float64)
    power = torch.full((1, 1), m, dtype=torch.float64)
    u = porous_medium(exact(0.1)[None], power, times)[0, -1]
    return float((u - exact(0.2)).abs().mean() / exact(0.2).mean())


def exact_ones(_: int) -> list[dict]:
    """Largest errors against closed forms; the ratio is the error allowed over the error."""
    x, rows = centres(POINTS), []
    t = torch.arange(TIMES, dtype=torch.float64)[:, None] / TIMES

    def add(what: str, u: Tensor, exact: Tensor, allowed: float) -> None:
        seen = max(float((u - exact).abs().max()), 1e-17)
        rows.append(row(what, seen, allowed, allowed / seen, "≥ 1", "error"))

    pi = math.pi
    add("advection: u₀(x − βt)", pde.solve("advection", smooth(x)[None])[0], smooth(x - t), 1e-10)
    add(
        "heat: mode 3 decays",
        pde.solve("heat", torch.sin(3 * pi * x)[None])[0],
        torch.exp(-3e-3 * (3 * pi) ** 2 * 2 * t) * torch.sin(3 * pi * x),
        1e-10,
    )
    add(
        "linear_reaction: mode 3",
        pde.solve("linear_reaction", torch.sin(3 * pi * x)[None])[0],
        torch.exp((0.1 - 3e-3 * (3 * pi) ** 2) * 2 * t) * torch.sin(3 * pi * x),
        1e-10,
    )
    add(
        "wave: standing wave 3",
        pde.solve("wave", torch.cos(3 * pi * x)[None])[0],
        torch.cos(1.5 * pi * t) * torch.cos(3 * pi * x),
        1e-10,
    )
    swing = math.sqrt((3 * pi) ** 2 + 0.01)
    add(
        "klein_gordon: standing wave 3",
        pde.solve("klein_gordon", torch.cos(3 * pi * x)[None])[0],
        torch.cos(swing * t) * torch.cos(3 * pi * x),
        1e-10,
    )
    nu, a = 0.0955, 0.8

    def cole_hopf(time: Tensor) -> Tensor:
        decayed = a * torch.exp(-nu * pi**2 * time)
        return 2 * nu * pi * decayed * torch.sin(pi * x) / (1 + decayed * torch.cos(pi * x))

    add(
        "burgers: Cole–Hopf",
        pde.solve("burgers", cole_hopf(t[:1]), {"eps": 0.3})[0],
        cole_hopf(2 * t),
        1e-8,
    )
    fine = torch.arange(256, dtype=torch.float64) / 128

    def soliton(time: Tensor) -> Tensor:
        z = torch.remainder(fine - 0.6 - time / 3 + 1, 2) - 1
        return 1 / torch.cosh(math.sqrt(1 / 12) / 0.022 * z) ** 2

    add("kdv: soliton, 256 points", pde.solve("kdv", soliton(t[:1]))[0], soliton(t), 1e-6)
    q = pde.FAMILIES["fokker_planck"].at_centres()
    rest = torch.exp(-q["a"] / (q["D"] * pi) * torch.cos(pi * Grid(POINTS).x))[None]
    add(
        "fokker_planck: Boltzmann at rest",
        pde.solve("fokker_planck", rest)[0],
        rest.expand(TIMES, -1),
        1e-7,
    )
    uniform = torch.full((1, POINTS), 0.3, dtype=torch.float64)
    grown = 0.3 * torch.exp(2 * t) / (0.7 + 0.3 * torch.exp(2 * t))
    add("logistic: uniform", pde.solve("logistic", uniform)[0], grown.expand(-1, POINTS), 1e-7)
    return rows  # fmt: skip


def main() -> None:
    """All sections, or one."""
    run_sections(
        "Data of differential equations",
        __doc__ or "",
        {"heat": heat, "burgers": burgers, "exact": exact_ones, "orders": orders},
        {"scipy": "it comes with stiefel"},
        Path("build/lemon_data.json"),
        about={"points": POINTS, "times": TIMES, "trajectories": OURS},
    )


if __name__ == "__main__":
    main()

"""Line solves, compact derivatives, masses and sum factorisation, each beside its bound.

    python benchmarks/tensor_product_lines.py --json build/tensor_product_lines.json

Times are CPU times of one thread, candidates in turn, median over rounds: on a shared machine only
the ratios mean something. Peers are SciPy's, so that none is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from timing import SHORT, in_turn, run_sections

from stiefel.numerics.tensor_product import (
    ADIHeat,
    BandedLineSolver,
    MassInverse,
    bspline_matrices,
    compact_derivative,
    grid1d,
    sum_factorize,
)

F64 = torch.float64


def row(what: str, ours: float, peer: float, ratio: float, bound: str, unit: str = "ms") -> dict:
    """One line of the result; ``bound`` is ``"≥ 10"`` or ``"≤ 1"``, of the ratio, or ``"–"``."""
    met = "–"
    if bound != "–":
        relation, limit = bound.split()
        good = ratio >= float(limit) if relation == "≥" else ratio <= float(limit)
        met = "yes" if good else "NO"
    return {
        "what": what, "ours": ours, "peer": peer, "unit": unit,
        "ratio": ratio, "bound": bound, "met": met,
    }  # fmt: skip


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0))


def thomas(bands: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The recursion point by point, vectorised over lines: what the blocks are measured against."""
    upper, diagonal, lower = bands.tolist()
    n = len(diagonal)
    pivots, factors = [diagonal[0]], [0.0]
    for i in range(1, n):
        factors.append(lower[i - 1] / pivots[-1])
        pivots.append(diagonal[i] - factors[-1] * upper[i])

    def solve(F: torch.Tensor) -> torch.Tensor:
        x = F.clone()
        for i in range(1, n):
            x[i].sub_(x[i - 1], alpha=factors[i])
        x[n - 1].div_(pivots[n - 1])
        for i in range(n - 2, -1, -1):
            x[i].sub_(x[i + 1], alpha=upper[i + 1]).div_(pivots[i])
        return x

    return solve


def lines(rounds: int) -> list[dict]:
    """64 to 1,024 points, 4,096 right-hand sides. The sheet: .368 s, .0114, .0149 and .0130."""
    found = []
    for n in (64, 128, 256, 1024):
        bands = torch.full((3, n), 0.25, dtype=F64)
        bands[1] = 1.0
        F = random(n, 4096)
        ab, f = bands.numpy(), F.numpy()
        point = thomas(bands)
        solvers = {m: BandedLineSolver(bands, method=m) for m in ("auto", "dense", "block")}
        expected = scipy.linalg.solve_banded((1, 1), ab, f)
        for candidate in (point, *(lambda F, s=s: s.solve(F, 0) for s in solvers.values())):
            assert np.allclose(candidate(F).numpy(), expected, rtol=0, atol=1e-12)

        def one_by_one(ab: np.ndarray = ab, f: np.ndarray = f) -> None:
            for column in f.T:
                scipy.linalg.solve_banded((1, 1), ab, column)

        tasks: dict[str, Callable[[], object]] = {
            "one call": lambda ab=ab, f=f: scipy.linalg.solve_banded((1, 1), ab, f),
            "thomas": lambda F=F, point=point: point(F),
            **{m: lambda F=F, s=s: s.solve(F, 0) for m, s in solvers.items()},
        }
        if n == 64:
            tasks["loop"] = one_by_one
        ms = {name: 1e3 * s for name, s in in_turn(tasks, rounds, fill=SHORT).items()}
        name = f"line solve, {n} × 4,096"
        if n == 64:
            ratio = ms["loop"] / ms["auto"]
            found.append(
                row(f"{name} / loop of solve_banded", ms["auto"], ms["loop"], ratio, "≥ 10")
            )
        for peer, bound in (("one call", "≥ 1"), ("thomas", "–"), ("dense", "–"), ("block", "–")):
            title = {"one call": "one solve_banded", "thomas": "Thomas by points"}.get(peer, peer)
            found.append(
                row(f"{name} / {title}", ms["auto"], ms[peer], ms[peer] / ms["auto"], bound)
            )
    return found


def compact(rounds: int) -> list[dict]:
    """First derivatives of fourth order along the middle axis, against central differences."""
    found = []
    for n in (64, 256):
        U = random(64, n, 64)
        h = 1 / (n - 1)
        alpha = np.full((3, n), 0.25)
        alpha[1] = 1.0
        alpha[0, 1] = alpha[2, -2] = 3.0

        def peer(U: torch.Tensor = U, h: float = h, alpha: np.ndarray = alpha) -> np.ndarray:
            """NumPy and SciPy as one would write it: stencil, ends, one call of solve_banded."""
            u = np.moveaxis(U.numpy(), 1, 0)
            f = np.empty_like(u)
            f[1:-1] = 0.75 / h * (u[2:] - u[:-2])
            f[0] = (-17 / 6 * u[0] + 1.5 * u[1] + 1.5 * u[2] - u[3] / 6) / h
            f[-1] = (17 / 6 * u[-1] - 1.5 * u[-2] - 1.5 * u[-3] + u[-4] / 6) / h
            x = scipy.linalg.solve_banded((1, 1), alpha, f.reshape(len(f), -1))
            return np.moveaxis(x.reshape(f.shape), 0, 1)

        ours = compact_derivative(U, 1, h).numpy()
        assert np.allclose(peer(), ours, rtol=0, atol=1e-10 * abs(ours).max())
        tasks = {"ours": lambda U=U, h=h: compact_derivative(U, 1, h), "peer": peer}
        ms = {name: 1e3 * s for name, s in in_turn(tasks, rounds).items()}
        what = f"compact derivative, 64 × {n} × 64 / SciPy"
        found.append(row(what, ms["ours"], ms["peer"], ms["peer"] / ms["ours"], "≥ 1"))
    return found


def masses(rounds: int) -> list[dict]:
    """64³ B-splines of degree 3, and 160³ where bands matter. The sheet: .079 s and .035 s."""
    found = []
    for n in (64, 160):
        M = bspline_matrices(n - 3, 3)[2]
        F = random(n, n, n)
        bands = np.zeros((4, n))
        for k in range(4):
            bands[k, : n - k] = np.diagonal(M.numpy(), -k)
        factor = scipy.linalg.cholesky_banded(bands, lower=True), True

        def banded_cholesky(F: torch.Tensor = F, factor: tuple = factor) -> np.ndarray:
            x = F.numpy()
            for axis in range(3):
                y = np.moveaxis(x, axis, 0)
                z = scipy.linalg.cho_solve_banded(factor, y.reshape(len(y), -1))
                x = np.moveaxis(z.reshape(y.shape), 0, axis)
            return x

        solvers = {m: MassInverse([M] * 3, m) for m in ("auto", "gemm", "banded")}
        expected = banded_cholesky()
        error = max(abs(s.solve(F).numpy() - expected).max() for s in solvers.values())
        assert error < 1e-13 * abs(expected).max()
        tasks: dict[str, Callable[[], object]] = {"peer": banded_cholesky}
        tasks |= {m: lambda s=s, F=F: s.solve(F) for m, s in solvers.items()}
        ms = {name: 1e3 * s for name, s in in_turn(tasks, rounds).items()}
        for m in solvers:
            what = f"mass inverse, {n}³, degree 3, {m} / banded Cholesky of SciPy"
            bound = "≥ 2" if m == "auto" else "–"
            found.append(row(what, ms[m], ms["peer"], ms["peer"] / ms[m], bound))
    return found


def sums(rounds: int) -> list[dict]:
    """256 elements, degree p, p + 2 points. The sheet: dense wins to p = 5, even at 6, 10× at 8."""
    found = []
    for p in range(1, 9):
        A = random(p + 2, p + 1)
        c = random(256, p + 1, p + 1, p + 1)
        ways = ("auto", "dense", "factorized")
        tasks = {m: lambda m=m, A=A, c=c: sum_factorize([A] * 3, c, m) for m in ways}
        ms = {name: 1e3 * s for name, s in in_turn(tasks, rounds, fill=SHORT).items()}
        what = f"sum factorisation, p = {p}, factorised / dense"
        ratio = ms["dense"] / ms["factorized"]
        found.append(row(what, ms["factorized"], ms["dense"], ratio, "≥ 3" if p == 8 else "–"))
        best = min(ms["dense"], ms["factorized"])
        what = f"sum factorisation, p = {p}, chosen / better of the two"
        found.append(row(what, ms["auto"], best, ms["auto"] / best, "≤ 1.3"))
    return found


def heat(rounds: int) -> list[dict]:
    """One ADI step at 64³ against one conjugate-gradient solve of Crank–Nicolson's system."""
    from scipy.sparse.linalg import LinearOperator, cg

    axes = [grid1d(64)] * 3
    dt = 1e-3
    stepper = ADIHeat(axes, dt)
    U = random(64, 64, 64)
    w = dt / 2 * 65**2

    def implicit(v: np.ndarray) -> np.ndarray:
        u = v.reshape(64, 64, 64)
        out = (1 + 6 * w) * u
        for axis in range(3):
            a, b = np.moveaxis(out, axis, 0), np.moveaxis(u, axis, 0)
            a[1:] -= w * b[:-1]
            a[:-1] -= w * b[1:]
        return out.reshape(-1)

    A = LinearOperator((64**3, 64**3), implicit, dtype=np.float64)
    b = (2 * U - torch.from_numpy(implicit(U.numpy()).reshape(64, 64, 64))).numpy().reshape(-1)
    tasks = {"ours": lambda: stepper.step(U), "peer": lambda: cg(A, b, rtol=1e-6)}
    ms = {name: 1e3 * s for name, s in in_turn(tasks, rounds).items()}
    what = "heat step, 64³, k/h² = 4.2, ADI / Crank–Nicolson by CG to 1e-6"
    return [row(what, ms["ours"], ms["peer"], ms["peer"] / ms["ours"], "≥ 1")]


def main() -> None:
    run_sections(
        "Lines of tensor-product grids",
        __doc__ or "",
        {"lines": lines, "compact": compact, "masses": masses, "sums": sums, "heat": heat},
        {},
        Path("build/tensor_product_lines.json"),
        about={"threads": 1, "precision": "float64"},
    )


if __name__ == "__main__":
    main()

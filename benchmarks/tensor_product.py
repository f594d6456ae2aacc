"""Tensor-product solvers against multigrid, sparse LU and cosine transforms, beside their bounds.

    python benchmarks/tensor_product.py --json build/tensor_product.json

Times are CPU times of one thread, candidates in turn, median over rounds: on a shared machine only
the ratios mean something. A peer that is not installed is left out and named.
"""

from __future__ import annotations

import importlib.util
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import peak_bytes
from tensor_product_lines import compact, heat, lines, masses, sums
from timing import SHORT, in_turn, run_sections

from stiefel.data import photograph
from stiefel.numerics.tensor_product import FastDiagonalization, grid1d
from stiefel.papers.tensor_product_pde_runs import cube, field, iterations

SIZES = (64, 96)
SCALING = (16, 32, 48, 64, 96, 128)


def row(what: str, ours: float, peer: float | str, ratio: float, bound: str, unit: str) -> dict:
    """One line of the result; ``bound`` is ``"≥ 20"`` or ``"≤ 0.25"``, of the ratio."""
    relation, limit = bound.split()
    met = ratio >= float(limit) if relation == "≥" else ratio <= float(limit)
    return {
        "what": what, "ours": ours, "peer": peer, "unit": unit,
        "ratio": ratio, "bound": bound, "met": "yes" if met else "NO",
    }  # fmt: skip


def faster(what: str, ours: float, peer: float, bound: str) -> dict:
    return row(what, 1e3 * ours, 1e3 * peer, peer / ours, bound, "ms")


def poisson(rounds: int) -> list[dict]:
    """64³ and 96³: multigrid, conjugate gradients, and how well the system is solved."""
    from scipy.sparse.linalg import cg

    found = []
    for n in SIZES:
        F, matrix = field((n, n, n), 0), cube(n)
        b = F.numpy().ravel()
        solver = FastDiagonalization([grid1d(n)] * 3)
        tasks: dict[str, Callable[[], Any]] = {
            "ours": lambda s=solver, f=F: s.solve(f),
            "set-up": lambda n=n: FastDiagonalization([grid1d(n)] * 3),
            "CG": lambda a=matrix, b=b: cg(a, b, rtol=1e-10, atol=0.0),
        }
        if importlib.util.find_spec("pyamg"):
            import pyamg

            grids = pyamg.ruge_stuben_solver(matrix)
            tasks["multigrid set-up"] = lambda a=matrix: pyamg.ruge_stuben_solver(a)
            tasks["multigrid"] = lambda g=grids, b=b: g.solve(b, tol=1e-10, accel="cg")
        seconds = in_turn(tasks, rounds)
        ours, what = seconds["ours"], f"{n}³ Poisson, float64"
        if "multigrid" in tasks:
            peer = seconds["multigrid"]
            both = seconds["multigrid set-up"] + peer
            found.append(faster(f"{what} / PyAMG set-up and solve", ours, both, "≥ 50"))
            found.append(faster(f"{what} / PyAMG solve", ours, peer, "≥ 10"))
            found.append(
                faster(f"{what}, set-up too / PyAMG", ours + seconds["set-up"], both, "≥ 20")
            )
        found.append(faster(f"{what} / SciPy's CG (no bound)", ours, seconds["CG"], "≥ 0"))
        found.append(row(f"{what}, seconds", ours, "–", ours, "≤ 2", "s"))
        residual = np.linalg.norm(matrix @ solver.solve(F).numpy().ravel() - b) / np.linalg.norm(b)
        found.append(row(f"{what}, relative residual", residual, "–", residual, "≤ 1e-12", "abs"))
    return found


def memory(rounds: int) -> list[dict]:
    """Peak beyond the right-hand side: ours by torch's account, PyAMG's by Python's."""
    found = []
    for n in SIZES:
        F, matrix = field((n, n, n), 0), cube(n)
        solver = FastDiagonalization([grid1d(n)] * 3)
        solver.solve(F)
        ours = peak_bytes(lambda s=solver, f=F: s.solve(f)) + 24 * n * (n + 1)
        fields = ours / F.nbytes
        found.append(row(f"{n}³, fields held at once", fields, "–", fields, "≤ 6", "fields"))
        if importlib.util.find_spec("pyamg"):
            import pyamg

            b = F.numpy().ravel()
            tracemalloc.start()
            pyamg.ruge_stuben_solver(matrix).solve(b, tol=1e-10, accel="cg")
            peer = tracemalloc.get_traced_memory()[1] + matrix.data.nbytes + matrix.indices.nbytes
            tracemalloc.stop()
            what = f"{n}³, peak memory / PyAMG set-up and solve, its matrix too"
            found.append(row(what, ours / 2**20, peer / 2**20, peer / ours, "≥ 3", "MiB"))
    return found


def direct(rounds: int) -> list[dict]:
    """24³: SuperLU, with both orderings."""
    from scipy.sparse.linalg import spsolve

    n = 24
    F, matrix = field((n, n, n), 0), cube(n).tocsc()
    solver = FastDiagonalization([grid1d(n)] * 3)
    ours = in_turn({"ours": lambda: solver.solve(F)}, rounds, fill=SHORT)["ours"]
    tasks = {
        name: lambda name=name: spsolve(matrix, F.numpy().ravel(), permc_spec=name)
        for name in ("COLAMD", "MMD_AT_PLUS_A")
    }
    seconds = in_turn(tasks, rounds)
    return [
        faster(f"{n}³ Poisson / spsolve, {name}", ours, seconds[name], "≥ 100") for name in tasks
    ]


def scaling(rounds: int) -> list[dict]:
    """Time against N from 16³ to 128³."""
    tasks, fields = {}, {}
    for n in SCALING:
        solver, fields[n] = FastDiagonalization([grid1d(n)] * 3), field((n, n, n), 0)
        tasks[f"{n}"] = lambda s=solver, f=fields[n]: s.solve(f)
    seconds = in_turn(tasks, rounds, fill=SHORT)
    logs = [np.log([n**3 for n in SCALING]), np.log([seconds[f"{n}"] for n in SCALING])]
    exponent = float(np.polyfit(*logs, 1)[0])
    return [row("exponent of N, 16³ to 128³", exponent, "–", exponent, "≤ 1.3333", "–")] + [
        row(f"{n}³ (no bound)", 1e3 * seconds[f"{n}"], "–", 1e9 * seconds[f"{n}"] / n**3, "≥ 0",
            "ms, ns a point") for n in SCALING
    ]  # fmt: skip


def precision(rounds: int) -> list[dict]:
    """float32 with its refinement and without, transforms, and the operator against CSR."""
    found = []
    for n in (64, 96, 127):
        axes, F = [grid1d(n)] * 3, field((n, n, n), 0)
        narrow, matrix, b = F.float(), cube(n), F.numpy().ravel()
        solver = FastDiagonalization(axes, method="gemm")
        sines = FastDiagonalization(axes, method="transform")
        quick = FastDiagonalization(axes, refine=False, method="gemm")
        seconds = in_turn(
            {
                "ours": lambda s=solver, f=F: s.solve(f),
                "sines": lambda s=sines, f=F: s.solve(f),
                "float32": lambda s=quick, f=narrow: s.solve(f),
                "refined": lambda s=solver, f=narrow: s.solve(f),
                "apply": lambda s=solver, f=F: s.apply(f),
                "CSR": lambda a=matrix, b=b: a @ b,
            },
            rounds,
            fill=SHORT,
        )
        for name, what in (
            ("sines", "sine transforms / GEMM"),
            ("float32", "float32 / float64"),
            ("refined", "float32 refined / float64"),
        ):
            what = f"{n}³, {what} (no bound)"
            found.append(faster(what, seconds[name], seconds["ours"], "≥ 0"))
        what = f"{n}³, operator / CSR product"
        found.append(faster(what, seconds["apply"], seconds["CSR"], "≥ 1"))
    return found


def picture(rounds: int) -> list[dict]:
    """A photograph from its Laplacian, three channels: SciPy's cosine transforms."""
    import scipy.fft

    pixels = (photograph("china").pixels.movedim(2, 0).double() / 255).contiguous()
    axes = [grid1d(n, n, "neumann") for n in pixels.shape[1:]]
    solver = FastDiagonalization(axes)
    laplacian = solver.apply(pixels)
    values, total = laplacian.numpy(), axes[0].eigenvalues[:, None] + axes[1].eigenvalues
    inverse = np.divide(1, total.numpy(), where=total.numpy() > 0, out=np.zeros(total.shape))

    def cosines() -> np.ndarray:
        hat = scipy.fft.dctn(values, axes=(1, 2), norm="ortho") * inverse
        return scipy.fft.idctn(hat, axes=(1, 2), norm="ortho")

    again = solver.solve(laplacian) + pixels.mean((1, 2), keepdim=True)
    error = float((again - pixels).abs().max())
    seconds = in_turn({"ours": lambda: solver.solve(laplacian), "peer": cosines}, rounds)
    what = "photograph, 3 channels / SciPy's DCT-II (no bound)"
    return [
        faster(what, seconds["ours"], seconds["peer"], "≥ 0"),
        row("photograph, largest error", error, "–", error, "≤ 1e-10", "abs"),
    ]


def preconditioner(rounds: int) -> list[dict]:
    """CG iterations on -∇·(a ∇u): from 15³ to 63³ they should stay."""
    found = []
    for ratio in (3.0, 10.0, 100.0):
        counts = iterations((15, 63), ratio, 0)
        few, plain = counts["preconditioned"], counts["plain"]
        what = f"CG iterations, max a / min a = {ratio:g}, 63³ / 15³"
        found.append(row(what, few[1], few[0], few[1] / few[0], "≤ 1.25", "iterations"))
        what = f"plain CG, max a / min a = {ratio:g}, 63³ (no bound)"
        found.append(row(what, few[1], plain[1], plain[1] / few[1], "≥ 0", "iterations"))
    return found


SECTIONS: dict[str, Callable[[int], list[dict]]] = {
    "poisson": poisson,
    "memory": memory,
    "direct": direct,
    "scaling": scaling,
    "precision": precision,
    "picture": picture,
    "preconditioner": preconditioner,
    "lines": lines,
    "compact": compact,
    "masses": masses,
    "sums": sums,
    "heat": heat,
}
PEERS = {"pyamg": "pip install --no-deps pyamg"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    about = __doc__.split("\n")[0]
    run_sections("Tensor products", about, SECTIONS, PEERS, Path("build/tensor_product.json"))

"""What the card of tensor-product solvers measures: against assembled matrices, orders, a picture.

Times are CPU seconds of one thread, medians of repeats. PyAMG, where it is installed, is the
multigrid that ours is held against; SciPy's conjugate gradients take its place otherwise.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stiefel.data import photograph
from stiefel.numerics import GridOperator
from stiefel.numerics.tensor_product import (
    ADIHeat,
    DiffusionOperator,
    FastDiagonalization,
    axis_apply,
    compact_derivative,
    grid1d,
    poisson_solve,
)

REPEATS = 5
# A sample of a short task is filled to so many seconds.
FILL = 0.02
# Tolerance of the iterative solvers when they are timed, and when they are compared with.
TIMED, EXACT = 1e-10, 1e-12
COMPACT = {"fd2": 2, "compact4": 4, "compact6": 6}
DEGREES = (1, 2, 3, 4)
# What is refined, and the order that it should have.
NOMINAL = {
    **COMPACT,
    **{f"bspline{p}": p + 1 for p in DEGREES},
    **{f"d{deriv} {order}": order for deriv in (1, 2) for order in (4, 6)},
    "d1 4 open": 4,
    "adi": 2,
}


def field(shape: Sequence[int], seed: int) -> Tensor:
    """A standard normal right-hand side in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def seconds(task: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median CPU seconds of this thread; short tasks are repeated to fill a sample."""
    task()  # tables, caches
    start = time.thread_time()
    task()
    count = max(1, round(FILL / max(time.thread_time() - start, 1e-6)))
    found = []
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(count):
            task()
        found.append((time.thread_time() - start) / count)
    return median(found)


def once(task: Callable[[], Any]) -> tuple[Any, float]:
    """What a long task returns, and its CPU seconds."""
    start = time.thread_time()
    result = task()
    return result, time.thread_time() - start


def peak_bytes(task: Callable[[], object]) -> int:
    """Most memory that torch held for ``task`` at one time beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile

    task()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        task()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():  # pyrefly: ignore
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def cube(n: int) -> Any:
    """The 7-point matrix of -∇² on n³ interior points of the unit cube, CSR."""
    w = float(n + 1) ** 2
    return GridOperator((n,) * 3, 6 * w, (-w,) * 3).to_csr()


def relative(x: Any, y: Any) -> float:
    """‖x - y‖ / ‖y‖ of arrays."""
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def against_direct(n: int, seed: int) -> dict[str, float]:
    """SciPy's ``spsolve`` on the assembled matrix: time, difference, residual."""
    from scipy.sparse.linalg import spsolve

    F, matrix = field((n, n, n), seed), cube(n).tocsc()
    solver = FastDiagonalization([grid1d(n)] * 3)
    found = solver.solve(F).numpy().ravel()
    expected, peer = once(lambda: spsolve(matrix, F.numpy().ravel()))
    return {
        "ours": seconds(lambda: solver.solve(F)),
        "peer": peer,
        "difference": relative(found, expected),
        "residual": relative(matrix @ found, F.numpy().ravel()),
    }


def against_iterative(n: int, seed: int, *, exact: bool) -> dict[str, Any]:
    """PyAMG (or CG) on the assembled matrix: set-up, solve, memory; CG's error if ``exact``."""
    from scipy.sparse.linalg import cg

    F, matrix = field((n, n, n), seed), cube(n)
    b = F.numpy().ravel()
    solver = FastDiagonalization([grid1d(n)] * 3)
    found = solver.solve(F).numpy().ravel()
    result: dict[str, Any] = {
        "ours": seconds(lambda: solver.solve(F)),
        "ours bytes": float(peak_bytes(lambda: solver.solve(F))),
        "tables bytes": 8.0 * 3 * n * (n + 1),
        "residual": relative(matrix @ found, b),
    }

    def conjugate_gradients(rtol: float) -> Any:
        x, failed = cg(matrix, b, rtol=rtol, atol=0.0, maxiter=20 * n)
        if failed:
            raise RuntimeError(f"conjugate gradients did not converge on {n}³ points: {failed}")
        return x

    if exact:
        result["difference"] = relative(found, conjugate_gradients(EXACT))
    if importlib.util.find_spec("pyamg"):
        import pyamg  # pyrefly: ignore

        grids, result["setup"] = once(lambda: pyamg.ruge_stuben_solver(matrix))
        _, result["solve"] = once(lambda: grids.solve(b, tol=TIMED, accel="cg"))
        parts = [getattr(g, k) for g in grids.levels for k in "APR" if hasattr(g, k)]
        result["peer bytes"] = float(sum(p.data.nbytes + p.indices.nbytes for p in parts))
        result["peer"] = f"PyAMG {pyamg.__version__}, Ruge–Stüben with CG"
    else:
        _, result["solve"] = once(lambda: conjugate_gradients(TIMED))
        result["setup"] = 0.0
        result["peer bytes"] = float(matrix.data.nbytes + matrix.indices.nbytes + 5 * b.nbytes)
        result["peer"] = "SciPy's CG (pyamg is not installed)"
    return result


def scaling(sizes: Sequence[int], seed: int) -> dict[str, Any]:
    """Seconds of a solve on n³ points, and the exponent of N that fits them best."""
    times = []
    for n in sizes:
        F, solver = field((n, n, n), seed), FastDiagonalization([grid1d(n)] * 3)
        times.append(seconds(lambda s=solver, f=F: s.solve(f)))
    logs = np.log([n**3 for n in sizes]), np.log(times)
    return {"times": times, "exponent": float(np.polyfit(*logs, 1)[0])}


def observed(errors: Sequence[float]) -> float:
    """Order from the two finest of grids whose spacing halves."""
    return math.log2(errors[-2] / errors[-1])


def orders(sizes: Mapping[str, Sequence[int]], seed: int) -> dict[str, list[float]]:
    """Errors on refined grids of everything that has an order; name to errors, coarse to fine.

    The box has three lengths drawn from the seed, and exact solutions with up to four half-waves
    along an axis; derivatives have a random phase.
    """
    rng = np.random.default_rng(seed)
    lengths = [float(x) for x in rng.uniform(0.8, 1.25, 3)]
    phase = float(rng.uniform(0, 2 * math.pi))
    found: dict[str, list[float]] = {}
    for scheme in COMPACT:
        found[scheme] = [_difference_error(n, scheme, lengths) for n in sizes["grids"]]
    for degree in DEGREES:
        found[f"bspline{degree}"] = [_spline_error(e, degree, lengths) for e in sizes["elements"]]
    for deriv in (1, 2):
        for order in (4, 6):
            found[f"d{deriv} {order}"] = [
                _derivative_error(n, order, deriv, phase) for n in sizes["lines"]
            ]
    found["d1 4 open"] = [_open_error(n + 1) for n in sizes["lines"]]
    found["adi"] = [_heat_error(steps, lengths) for steps in sizes["steps"]]
    return found


def _waves(axes: Sequence[Tensor], lengths: Sequence[float], modes: Sequence[int]) -> Tensor:
    parts = [torch.sin(m * math.pi * x / L) for x, L, m in zip(axes, lengths, modes, strict=True)]
    return torch.einsum("i,j,k->ijk", *parts)


def _rate(lengths: Sequence[float], modes: Sequence[int]) -> float:
    """Eigenvalue of -∇² for sines."""
    return sum((m * math.pi / L) ** 2 for m, L in zip(modes, lengths, strict=True))


def _difference_error(n: int, scheme: str, lengths: Sequence[float]) -> float:
    """u = s(1)s(2)s(3) + s(4)s(1)s(2), s(k) the k-th sine of an axis: max |u_h - u|."""
    points = [grid1d(n, L).points for L in lengths]
    exact, f = (torch.zeros(n, n, n, dtype=torch.float64) for _ in range(2))
    for modes in ((1, 2, 3), (4, 1, 2)):
        u = _waves(points, lengths, modes)
        exact += u
        f += _rate(lengths, modes) * u
    return float((poisson_solve(f, lengths, scheme=scheme) - exact).abs().max())


def _spline_error(
    elements: int, degree: int, lengths: Sequence[float], points: int | None = None
) -> float:
    """L2 error of Galerkin's method for sin πx sin 2πy sin 3πz.

    Degree + 3 Gauss points unless told: at degree + 1 of them the error is smaller than it is
    elsewhere (a fifth for degree 1).
    """
    from stiefel.numerics.tensor_product.bsplines import bspline_values, gauss_points

    modes = (1, 2, 3)
    rules = [gauss_points(elements, points or degree + 3, L) for L in lengths]
    values = [
        bspline_values(x, elements, degree, L)[:, 1:-1]
        for (x, _), L in zip(rules, lengths, strict=True)
    ]
    exact = _waves([x for x, _ in rules], lengths, modes)
    weights = torch.einsum("i,j,k->ijk", *[w for _, w in rules])
    load = axis_apply([B.mT.contiguous() for B in values], weights * exact)
    load = load * _rate(lengths, modes)
    coefficients = poisson_solve(load, lengths, scheme=("bspline", degree))
    error = axis_apply(values, coefficients) - exact
    return float((weights * error**2).sum().sqrt())


def _derivative_error(n: int, order: int, deriv: int, phase: float) -> float:
    """exp(sin(x + φ)) on a ring, max error."""
    x = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n) + phase
    f = x.sin().exp()
    exact = x.cos() * f if deriv == 1 else (x.cos() ** 2 - x.sin()) * f
    found = compact_derivative(f, 0, 2 * math.pi / n, order, deriv, "periodic")
    return float((found - exact).abs().max())


def _open_error(n: int) -> float:
    """exp(sin 3x) on [0, 1] with both ends open, order 4, max error of the derivative."""
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    f = (3 * x).sin().exp()
    found = compact_derivative(f, 0, 1 / (n - 1), 4, 1, "open")
    return float((found - 3 * (3 * x).cos() * f).abs().max())


def _heat_error(steps: int, lengths: Sequence[float]) -> float:
    """Mode (1, 2, 3) of the discrete heat equation until t = 0.02: error of ADI in time alone."""
    n, end, modes = 31, 0.02, (1, 2, 3)
    axes = [grid1d(n, L) for L in lengths]
    u = start = _waves([a.points for a in axes], lengths, modes)
    rate = sum(float(a.eigenvalues[m - 1]) for a, m in zip(axes, modes, strict=True))
    stepper = ADIHeat(axes, end / steps)
    for _ in range(steps):
        u = stepper.step(u)
    return float((u - math.exp(-rate * end) * start).abs().max())


def picture(channel: int, stride: int = 1) -> dict[str, Any]:
    """One channel of a photograph from the Laplacian of its pixels: error, time, spsolve's time.

    Zero flux through the edges; the mean is put back. Every ``stride``-th pixel.
    """
    from scipy.sparse.linalg import spsolve

    photo = photograph("china")
    pixels = (photo.pixels[::stride, ::stride, channel].double() / 255).contiguous()
    axes = [grid1d(n, n, "neumann") for n in pixels.shape]
    solver = FastDiagonalization(axes)
    laplacian = solver.apply(pixels)
    found = solver.solve(laplacian) + pixels.mean()
    degree = np.full(pixels.shape, 4.0)
    for edge in (degree[0], degree[-1], degree[:, 0], degree[:, -1]):
        edge -= 1
    degree[0, 0] += 1  # pins the free constant: this pixel becomes zero
    matrix = GridOperator(pixels.shape, degree, (-1.0, -1.0)).to_csr().tocsc()
    peer, peer_seconds = once(lambda: spsolve(matrix, laplacian.numpy().ravel()))
    again = peer.reshape(pixels.shape) + float(pixels[0, 0])
    return {
        "error": float((found - pixels).abs().max()),
        "peer error": float(np.abs(again - pixels.numpy()).max()),
        "ours": seconds(lambda: solver.solve(laplacian)),
        "peer": peer_seconds,
        "sha256": photo.sha256,
    }


def iterations(sizes: Sequence[int], ratio: float, seed: int) -> dict[str, list[int]]:
    """CG on -∇·(a ∇u), max a / min a = ``ratio``: with the direct solver inside, and plain."""

    def coefficient(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        wave = (2 * math.pi * x).sin() * (3 * math.pi * y).sin() * (2 * math.pi * z).cos()
        return (math.log(ratio) / 2 * wave).exp()

    counts: dict[str, list[int]] = {"preconditioned": [], "plain": []}
    for n in sizes:
        operator = DiffusionOperator.from_function(coefficient, [grid1d(n)] * 3)
        for name in counts:
            result = operator.solve(field((n, n, n), seed), preconditioned=name != "plain")
            counts[name].append(int(result.iterations))
    return counts


def on_accelerator(sizes: Sequence[int], seed: int) -> dict[str, float]:
    """Seconds, residual and fields held at once on a CUDA device, float64 and refined float32."""
    found: dict[str, float] = {}
    for n in sizes:
        solver = FastDiagonalization([grid1d(n)] * 3)
        F = field((n, n, n), seed).cuda()
        wide = _timed_solve(solver, F, f"accelerator_{n}_float64", found)
        residual = torch.linalg.vector_norm(solver.apply(wide) - F)
        found[f"accelerator_{n}_residual"] = float(residual / torch.linalg.vector_norm(F))
        del residual
        narrow = _timed_solve(solver, F.float(), f"accelerator_{n}_float32", found)
        difference = torch.linalg.vector_norm(narrow.double() - wide)
        found[f"accelerator_{n}_difference"] = float(difference / torch.linalg.vector_norm(wide))
        del F, wide, narrow
    return found


def _timed_solve(
    solver: FastDiagonalization, F: Tensor, label: str, found: dict[str, float]
) -> Tensor:
    """The solution; wall seconds and peak memory, in fields of doubles, go into ``found``."""
    u = solver.solve(F)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(REPEATS):
        solver.solve(F)
    torch.cuda.synchronize()
    found[f"{label}_seconds"] = (time.perf_counter() - start) / REPEATS
    found[f"{label}_peak_fields"] = (torch.cuda.max_memory_allocated() - held) / (8 * F.numel())
    return u

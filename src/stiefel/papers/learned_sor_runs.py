"""The experiments behind the card of learned SOR: shifts, a heat equation, photographs.

Each returns iteration counts system by system. Policies are the bandits by name, a number for a
fixed ω, ``"cg"`` for conjugate gradients alone and ``"instance"`` for the best ω of theory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from stiefel.data import photograph
from stiefel.numerics import GridOperator, RelaxedSolver, SolveResult, optimal_omega, sor_solve

Report = Callable[[float, str], None]

# Shifts c = −0.15 + 0.6 Beta of the Laplacian on 10 × 10 interior points.
SHIFTS = {"high": (0.5, 1.5), "low": (2.0, 6.0)}
SIDE, LOW, HIGH = 10, -0.15, 0.65
RADIUS = 10.0  # of the right-hand sides, rejection
DT = 1e-3
DIFFUSION = 10.0
PICTURES, PATCH = ("china", "flower"), 24
CONTRAST, LEAST_WEIGHT = 20.0, 1e-3
PATCH_TOL, PATCH_CAP = 1e-6, 3000
# Bandits draw from streams of their own, not from those that make the systems.
BANDIT_SEED = 10_000


def solver(method: str, config: Mapping[str, Any], **options: Any) -> RelaxedSolver:
    """A :class:`RelaxedSolver` with the policy of an experiment; run r of a bandit is stream r."""
    stream = BANDIT_SEED * (1 + config.get("run", 0)) + config["seed"]
    return RelaxedSolver(method, config["policy"], random_state=stream, **options)


def shifts(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Counts of one policy on ``count`` shifted Laplacians; config: kind, policy, every, …

    ``every`` > 1 solves every so many systems only.
    """
    import scipy.sparse as sp

    rng = np.random.default_rng(config["seed"])
    laplacian = GridOperator((SIDE, SIDE), 4.0, (-1.0, -1.0)).to_csr()
    places = laplacian.indices == np.repeat(np.arange(SIDE**2), np.diff(laplacian.indptr))
    policy, count = config["policy"], config["count"]
    relax = None
    if policy != "instance":
        relax = solver("sor", config, low=LOW, high=HIGH)
    contexts, omegas, counts = [], [], []
    for t in range(count):
        c = -0.15 + 0.6 * rng.beta(*SHIFTS[config["kind"]])
        b = rng.standard_normal(SIDE**2)
        while np.linalg.norm(b) > RADIUS:
            b = rng.standard_normal(SIDE**2)
        if t % config["every"]:
            continue
        data = laplacian.data + c * places
        A = sp.csr_matrix((data, laplacian.indices, laplacian.indptr), shape=laplacian.shape)
        if relax is None:
            omega = optimal_omega(4 * np.cos(np.pi / (SIDE + 1)) / (4 + c))
            cost = sor_solve(A, b, omega=omega).iterations
        else:
            relax.solve(A, b, context=c)
            omega, cost = relax.history_[-1]
        contexts.append(c)
        omegas.append(omega)
        counts.append(int(cost))
        if t % 200 == 0:
            report(t / count, f"shifts, {policy}: {np.mean(counts):.0f} iterations")
    return {"contexts": contexts, "omegas": omegas, "counts": counts}


def diffusion(t: float) -> float:
    """κ(t) of the heat equation, 0 to 10."""
    return max(0.1 * np.sin(2 * np.pi * t), -DIFFUSION * np.sin(2 * np.pi * t))


def heat(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Counts of one policy on Crank–Nicolson steps of a heated square; config: nx, steps, …"""
    import scipy.sparse as sp

    nx, steps, policy = config["nx"], config["steps"], config["policy"]
    x, y = np.meshgrid(*2 * [np.arange(1, nx) / nx], indexing="ij")

    def bump(x0: float, y0: float, radius: float) -> np.ndarray:
        s = np.minimum(1, ((x - x0) ** 2 + (y - y0) ** 2) / radius**2)
        return np.where(s < 1, np.exp(1 - 1 / np.maximum(1 - s, 1e-12)), 0).ravel()

    laplacian = -GridOperator(x.shape, 4.0, (-1.0, -1.0)).to_csr() * nx**2
    rows = np.repeat(np.arange(laplacian.shape[0]), np.diff(laplacian.indptr))
    identity = (laplacian.indices == rows).astype(float)
    step_solver: Callable[[Any, np.ndarray, np.ndarray, float], tuple[np.ndarray, int]]
    if policy == "cg":
        step_solver = _conjugate_gradients
    else:
        relax = solver("ssor-cg", config, low=0, high=DIFFUSION, bins=6)

        def step_solver(A: Any, b: np.ndarray, start: np.ndarray, context: float) -> Any:
            found: SolveResult = relax.solve(A, b, start, context)
            return found.x, found.iterations

    u, counts = bump(0.5, 0.5, 0.25), []
    for step in range(steps):
        t = step * DT
        middle = t + DT / 2
        weight = 0.5 * DT * diffusion(middle)
        data = identity - weight * laplacian.data
        A = sp.csr_matrix((data, laplacian.indices, laplacian.indptr), shape=laplacian.shape)
        angle = 16 * np.pi * middle
        source = 32 * bump(0.5 + np.cos(angle) / 4, 0.5 + np.sin(angle) / 4, 0.125)
        u, count = step_solver(
            A, u + weight * (laplacian @ u) + DT * source, u, float(diffusion(t))
        )
        counts.append(int(count))
        if step % 500 == 0:
            report(step / steps, f"heat, {policy}: {sum(counts)} iterations")
    return {"counts": counts, "energy": float(u @ u)}


def _conjugate_gradients(
    A: Any, b: np.ndarray, start: np.ndarray, context: float
) -> tuple[np.ndarray, int]:
    """SciPy's, with the stopping rule of ours."""
    from scipy.sparse.linalg import cg

    counts: list[int] = []
    x, failed = cg(A, b, start, rtol=1e-8, atol=0.0, callback=lambda _: counts.append(1))
    if failed:
        raise RuntimeError(f"conjugate gradients did not converge: {failed}")
    return x, len(counts)


def grey_pictures() -> tuple[list[np.ndarray], str]:
    """Every second pixel of the two photographs, grey, 0 to 1; a checksum of both."""
    digest, pictures = hashlib.sha256(), []
    for name in PICTURES:
        pixels = photograph(name).pixels.numpy()
        digest.update(pixels.tobytes())
        pictures.append(pixels.mean(2)[::2, ::2] / 255)
    return pictures, digest.hexdigest()


def smoothing_system(patch: np.ndarray, c: float) -> GridOperator:
    """Edge-aware smoothing: Laplacian with weights exp(−20 (Δf)²) + 1e-3, plus c."""
    diag = np.full(patch.shape, c)
    couplings = []
    for axis in (0, 1):
        weight = np.exp(-CONTRAST * np.diff(patch, axis=axis) ** 2) + LEAST_WEIGHT
        for side in ((0, 1), (1, 0)):
            diag += np.pad(weight, [side if a == axis else (0, 0) for a in (0, 1)])
        couplings.append(-weight)
    return GridOperator(patch.shape, diag, couplings)


def patches(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Counts of one policy on ``count`` patches, each with a random data term c."""
    rng = np.random.default_rng(config["seed"])
    pictures, digest = grey_pictures()
    policy, count = config["policy"], config["count"]
    relax = solver("sor", config, low=-2, high=0, tol=PATCH_TOL, maxiter=PATCH_CAP)
    contexts = []
    for t in range(count):
        picture = pictures[rng.integers(len(pictures))]
        top, left = (rng.integers(n - PATCH + 1) for n in picture.shape)
        patch = picture[top : top + PATCH, left : left + PATCH]
        contexts.append(float(rng.uniform(-2, 0)))
        c = 10 ** contexts[-1]
        f = patch.ravel()
        relax.solve(smoothing_system(patch, c), c * f, f, contexts[-1])
        if t % 50 == 0:
            report(t / count, f"patches, {policy}")
    omegas, counts = zip(*relax.history_, strict=True)
    return {
        "contexts": contexts,
        "omegas": list(omegas),
        "counts": [int(c) for c in counts],
        "sha256": digest,
    }

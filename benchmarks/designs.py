"""Determinantal designs against DPPy and a plain QR: time, memory and law, beside their bounds.

    python benchmarks/designs.py --json build/designs.json

Times are CPU times of one thread, candidates in turn, median over rounds: on a shared machine only
the ratios mean something. A peer that is not installed is left out and named.
"""

from __future__ import annotations

import importlib.util
import tracemalloc
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import chi2, chi2_contingency
from timing import SHORT, in_turn, run_sections

from stiefel.numerics import LegendreDPP, fit_basis, orthonormal_polynomials, sample_dpp

N, M = 20_000, 40
TOGETHER = 100
# The joint law is compared where every set of points can be counted.
SMALL, SMALL_M = 9, 3
MANY, MANY_M = 1_000_000, 20


def row(
    what: str, ours: float, peer: float | str, ratio: float, bound: str, unit: str = "ms"
) -> dict:
    """One line of the result; ``bound`` is ``"≥ 20"`` or ``"≤ 0.25"``, of the ratio."""
    relation, limit = bound.split()
    met = ratio >= float(limit) if relation == "≥" else ratio <= float(limit)
    return {
        "what": what, "ours": ours, "peer": peer, "unit": unit,
        "ratio": ratio, "bound": bound, "met": "yes" if met else "NO",
    }  # fmt: skip


def draws(rounds: int) -> list[dict]:
    """One draw at a time, a hundred together, Gram–Schmidt; each against one of DPPy's draws."""
    if not importlib.util.find_spec("dppy"):
        return []
    from dppy.finite_dpps import FiniteDPP

    basis = fit_basis(orthonormal_polynomials(np.linspace(-1, 1, N), M))
    peer = FiniteDPP("correlation", projection=True, K_eig_dec=(np.ones(M), basis.Q))
    rng, state = np.random.default_rng(0), np.random.RandomState(0)
    # DPPy keeps one random state and all samples; it is asked for one at a time, as its users do.
    peer_draw = {"peer": lambda: peer.sample_exact(mode="GS", random_state=state)}
    ours: dict[str, Callable[[], object]] = {
        "one": lambda: sample_dpp(basis, generator=rng),
        "hundred": lambda: sample_dpp(basis, TOGETHER, generator=rng),
        "schmidt": lambda: sample_dpp(basis, 10, generator=rng, sampler="gram-schmidt"),
    }
    slow = in_turn(peer_draw | {"ours": ours["one"]}, rounds)["peer"]
    fast = in_turn(ours, rounds, fill=SHORT)
    size = f"N = {N:,}, m = {M}"
    return [
        row(f"DPP draw, {size} / DPPy", 1e3 * s, 1e3 * slow, slow / s, bound)
        for s, size, bound in (
            (fast["one"], size, "≥ 20"),
            (fast["hundred"] / TOGETHER, f"{size}, {TOGETHER} together", "≥ 20"),
            (fast["schmidt"] / 10, f"{size}, gram-schmidt, 10 together", "≥ 1"),
        )
    ]


def law(rounds: int) -> list[dict]:
    """χ² of sets of three of nine: ours against the exact law, and against DPPy's draws.

    And of the m points of a large draw against the leverages, in 50 cells of equal chance.
    """
    rng = np.random.default_rng(0)
    basis = fit_basis(rng.standard_normal((SMALL, SMALL_M)), rng.random(SMALL) + 0.5)
    sets = np.array(list(combinations(range(SMALL), SMALL_M)))
    chance = np.linalg.det(basis.Q[sets]) ** 2
    code = {tuple(s): k for k, s in enumerate(sets)}

    def counts(points: np.ndarray) -> np.ndarray:
        return np.bincount([code[tuple(p)] for p in np.sort(points, 1)], minlength=len(sets))

    def merged(values: np.ndarray, rare: np.ndarray) -> np.ndarray:
        return np.append(values[~rare], values[rare].sum())

    found = []
    for sampler in ("rejection", "gram-schmidt"):
        seen = counts(sample_dpp(basis, 20_000, generator=rng, sampler=sampler))
        rare = 20_000 * chance < 5
        s, e = merged(seen, rare), merged(20_000 * chance, rare)
        p = float(chi2.sf(np.sum((s - e) ** 2 / e), len(e) - 1))
        what = f"p of χ² against the exact law, {SMALL_M} of {SMALL}, {sampler}"
        found.append(row(what, p, "–", p, "≥ 0.001", "p"))
    if importlib.util.find_spec("dppy"):
        from dppy.finite_dpps import FiniteDPP

        peer = FiniteDPP("correlation", projection=True, K_eig_dec=(np.ones(SMALL_M), basis.Q))
        state, size = np.random.RandomState(1), 5000
        theirs = counts(
            np.array([peer.sample_exact(mode="GS", random_state=state) for _ in range(size)])
        )
        rare = size * chance < 10
        ours = counts(sample_dpp(basis, size, generator=rng))
        p = float(chi2_contingency(np.stack([merged(ours, rare), merged(theirs, rare)])).pvalue)
        what = f"p of χ² against {size:,} draws of DPPy, {SMALL_M} of {SMALL}"
        found.append(row(what, p, "–", p, "≥ 0.001", "p"))
    large = fit_basis(orthonormal_polynomials(np.linspace(-1, 1, N), M))
    points = sample_dpp(large, 5000, generator=rng)
    # One point of each draw, in a random place: points of one draw are not independent.
    one = points[np.arange(5000), rng.integers(M, size=5000)]
    cells = np.minimum((large.cumulative[one] / M * 50).astype(int), 49)
    p = float(chi2.sf(np.sum((np.bincount(cells, minlength=50) - 100.0) ** 2 / 100), 49))
    found.append(row(f"p of χ² of single points, N = {N:,}, m = {M}", p, "–", p, "≥ 0.001", "p"))
    return found


def streaming(rounds: int) -> list[dict]:
    """QR of a million rows that are computed when asked for, against NumPy's on all of them."""

    def features(index: np.ndarray) -> np.ndarray:
        return orthonormal_polynomials(2 * index / (MANY - 1) - 1, MANY_M)

    def ours() -> object:
        return fit_basis(features, size=MANY, keep=False).cumulative

    def peer() -> object:
        q = np.linalg.qr(features(np.arange(MANY)) / MANY**0.5)[0]
        return np.cumsum(np.einsum("ij,ij->i", q, q))

    peaks = {}
    for name, task in (("ours", ours), ("peer", peer)):
        tracemalloc.start()
        task()
        peaks[name] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    seconds = in_turn({"ours": ours, "peer": peer}, rounds)
    error = float(np.abs(np.asarray(ours()) - np.asarray(peer())).max())
    what = f"leverages of {MANY:,} × {MANY_M}, streamed / numpy.linalg.qr"
    mine, theirs = seconds["ours"], seconds["peer"]
    return [
        row(f"{what}: peak memory", peaks["ours"], peaks["peer"], peaks["ours"] / peaks["peer"],
            "≤ 0.25", "MB"),
        row(f"{what}: time (no bound)", 1e3 * mine, 1e3 * theirs, theirs / mine, "≥ 0"),
        row("largest difference of running sums", error, "–", error, "≤ 1e-9", "abs"),
    ]  # fmt: skip


def line(rounds: int) -> list[dict]:
    """The tridiagonal draw on an interval against the candidates, m = 40 (no bound)."""
    basis = fit_basis(orthonormal_polynomials(np.linspace(-1, 1, N), M))
    dpp, rng = LegendreDPP(M), np.random.default_rng(0)
    tasks: dict[str, Callable[[], object]] = {
        "ours": lambda: dpp.sample(1, rng),
        "peer": lambda: sample_dpp(basis, generator=rng),
    }
    seconds = in_turn(tasks, rounds, fill=SHORT)
    ours, peer = seconds["ours"], seconds["peer"]
    what = f"Legendre draw without candidates / from {N:,} (no bound)"
    return [row(what, 1e3 * ours, 1e3 * peer, peer / ours, "≥ 0")]


SECTIONS: dict[str, Callable[[int], list[dict]]] = {
    "draws": draws,
    "law": law,
    "streaming": streaming,
    "line": line,
}
PEERS = {"dppy": "pip install --no-deps dppy"}


if __name__ == "__main__":
    description = __doc__.split("\n")[0]
    output = Path("build/designs.json")
    run_sections("Designs", description, SECTIONS, PEERS, output)

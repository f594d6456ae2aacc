"""Sampled linear algebra against randomized_svd and the exact Gram matrix, bounds beside ratios.

    python benchmarks/sampled.py [--json FILE] [--only SECTION]

CPU times of one thread, candidates in turn, median over rounds: on a shared machine only the
ratios mean something.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from scipy.sparse.linalg import svds
from sklearn.utils.extmath import randomized_svd
from timing import SHORT, in_turn, run_sections

from stiefel.numerics.sampled import SampledMatrix, lowrank, recommend, sketch, threshold
from stiefel.papers.dequantized_linear_algebra_runs import Exact, identifiers, patches

SIZES = (2_500, 25_000, 250_000)
K, R, C = 10, 200, 100
UPDATES = (1_000, 1_000_000)


def row(
    what: str, ours: float, peer: float | str, ratio: float | str, bound: str = "", unit: str = "ms"
) -> dict:
    """One line of the result; ``bound`` is of the ratio, like ``"≥ 500"``, or empty."""
    met = ""
    if bound and not isinstance(ratio, str):
        relation, limit = bound.split()
        met = (
            "yes" if (ratio >= float(limit) if relation == "≥" else ratio <= float(limit)) else "NO"
        )
    return {
        "what": what, "ours": ours, "peer": peer, "unit": unit,
        "ratio": ratio, "bound": bound, "met": met,
    }  # fmt: skip


def rows_of_patches() -> np.ndarray:
    rng = np.random.default_rng(0)
    P, _ = patches(SIZES[-1], rng)
    return P


def build(rounds: int) -> list[dict]:
    """Building against the row norms alone, in memory and from a file."""
    P, lines = rows_of_patches(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.npy"
        np.save(path, P.astype(np.float32))
        narrow = np.load(path, mmap_mode="r")
        for name, a in (("float64", P), ("float32, memory-mapped", narrow)):
            found = in_turn(
                {
                    "ours": lambda a=a: SampledMatrix(a),
                    "norms": lambda a=a: np.einsum("ij,ij->i", a, a),
                },
                rounds,
            )
            lines.append(
                row(
                    f"build, 250,000 × 192 {name} / einsum of row norms",
                    1e3 * found["ours"], 1e3 * found["norms"], found["ours"] / found["norms"],
                    "≤ 3" if name == "float64" else "",
                )
            )  # fmt: skip
    T, _ = identifiers()
    found = in_turn({"ours": lambda: SampledMatrix(T), "norms": lambda: T.multiply(T).sum(axis=1)},
                    rounds, fill=SHORT)  # fmt: skip
    size = f"{T.shape[0]} × {T.shape[1]}"
    lines.append(
        row(f"build, CSR {size} / row norms by SciPy", 1e3 * found["ours"], 1e3 * found["norms"],
            found["ours"] / found["norms"])
    )  # fmt: skip
    return lines


def queries(rounds: int) -> list[dict]:
    """A query of ten directions at three sizes, against what reads every entry."""
    P, rng = rows_of_patches(), np.random.default_rng(0)
    parts = {n: np.ascontiguousarray(P[:n]) for n in SIZES}
    built = {n: SampledMatrix(a) for n, a in parts.items()}
    ours = in_turn(
        {str(n): lambda A=A: lowrank(A, K, R, C, generator=rng) for n, A in built.items()},
        rounds, fill=SHORT,
    )  # fmt: skip
    largest, A = parts[SIZES[-1]], built[SIZES[-1]]
    peers = in_turn(
        {
            "randomized_svd": lambda: randomized_svd(largest, K, random_state=0),
            "eigh(AᵀA)": lambda: np.linalg.eigh(largest.T @ largest),
            "build": lambda: SampledMatrix(largest),
        },
        rounds,
    )
    peers["svds"] = in_turn({"s": lambda: svds(largest, K, random_state=0)}, 5)["s"]
    query, size = ours[str(SIZES[-1])], "250,000 × 192, k = 10"
    both = query + peers["build"]
    lines = [
        row(f"query, {size} / randomized_svd", 1e3 * query, 1e3 * peers["randomized_svd"],
            peers["randomized_svd"] / query, "≥ 500"),
        row(f"build + query, {size} / randomized_svd", 1e3 * both, 1e3 * peers["randomized_svd"],
            peers["randomized_svd"] / both, "≥ 10"),
        row(f"build + query, {size} / eigh(AᵀA)", 1e3 * both, 1e3 * peers["eigh(AᵀA)"],
            peers["eigh(AᵀA)"] / both),
        row(f"query, {size} / scipy svds", 1e3 * query, 1e3 * peers["svds"],
            peers["svds"] / query),
        row("query, 250,000 rows / 2,500 rows", 1e3 * query, 1e3 * ours[str(SIZES[0])],
            query / ours[str(SIZES[0])], "≤ 1.5"),
    ]  # fmt: skip
    means = {}
    for n in (SIZES[0], SIZES[-1]):
        exact = Exact(parts[n])
        means[n] = float(
            np.mean([exact.residual(lowrank(built[n], K, R, C, generator=rng).V)
                     for _ in range(30)])
        )  # fmt: skip
    V = randomized_svd(largest, K, random_state=0)[2].T
    exact = Exact(largest)
    uniform = [exact.residual(lowrank(A, K, sketch_of=sketch(A, R, C, rng, sampling="uniform")).V)
               for _ in range(30)]  # fmt: skip
    ratio = means[SIZES[-1]]
    lines += [
        row("residual / best rank 10, 250,000 rows", ratio, exact.residual(V), ratio, "≤ 1.12",
            "ratio; peer randomized_svd"),
        row("  beside uniform rows", ratio, float(np.mean(uniform)), ratio / np.mean(uniform),
            "≤ 1", "ratio"),
        row("  difference from 2,500 rows", ratio, means[SIZES[0]],
            abs(ratio - means[SIZES[0]]), "≤ 0.03", "ratio, difference"),
    ]  # fmt: skip
    return lines


def dynamic(rounds: int) -> list[dict]:
    """One changed row among a thousand and among a million; a thousand changed at once."""
    rng, lines = np.random.default_rng(0), []
    built = {n: SampledMatrix(rng.standard_normal((n, 8))) for n in UPDATES}
    value = rng.standard_normal(8)
    for A in built.values():
        A.update_row(0, value)  # the first change makes room
    found = in_turn(
        {str(n): lambda A=A, n=n: A.update_row(int(rng.integers(n)), value)
         for n, A in built.items()},
        rounds, fill=SHORT,
    )  # fmt: skip
    small, large = (found[str(n)] for n in UPDATES)
    lines.append(
        row("update of one row, 1,000,000 rows / 1,000 rows", 1e6 * large, 1e6 * small,
            large / small, unit="µs")
    )  # fmt: skip
    many = rng.standard_normal((1000, 8))
    A = built[UPDATES[-1]]
    batch = in_turn({"b": lambda: A.update_row(rng.permutation(1_000_000)[:1000], many),
                     "p": lambda: rng.permutation(1_000_000)[:1000]}, rounds)  # fmt: skip
    each = (batch["b"] - batch["p"]) / 1000
    lines.append(
        row("update, one of 1,000 together / alone", 1e6 * each, 1e6 * large, each / large,
            unit="µs")
    )  # fmt: skip
    return lines


def recommendations(rounds: int) -> list[dict]:
    """A thresholded row of log counts: dense, and ten draws from it by rejection."""
    T, _ = identifiers()
    T.data = np.log1p(T.data)
    A, rng = SampledMatrix(T), np.random.default_rng(0)
    dense = T.toarray()
    sigma = np.linalg.svd(dense, compute_uv=False)
    middle = float(np.sqrt(sigma[K - 1] * sigma[K]))
    function = threshold(sketch(A, 400, 400, rng), middle)
    found = in_turn(
        {
            "once": lambda: threshold(sketch(A, 400, 400, rng), middle),
            "row": lambda: recommend(A, 0, middle, function=function).row,
            "draws": lambda: recommend(A, 0, middle, function=function).sample(10, rng),
            "svd": lambda: randomized_svd(T, 2 * K, random_state=0),
        },
        rounds, fill=SHORT,
    )  # fmt: skip
    return [
        row("sketch and ramp, 400 rows / randomized_svd", 1e3 * found["once"], 1e3 * found["svd"],
            found["svd"] / found["once"]),
        row("  then a user's row", 1e3 * found["row"], "", ""),
        row("  or ten draws from it", 1e3 * found["draws"], "", ""),
    ]  # fmt: skip


if __name__ == "__main__":
    run_sections(
        "Sampled linear algebra",
        __doc__.split("\n")[0],
        {"build": build, "queries": queries, "dynamic": dynamic, "recommend": recommendations},
        {"sklearn": "pip install scikit-learn"},
        Path("build/sampled.json"),
    )

"""The experiments behind the card of sampled linear algebra, on patches, identifiers and digits.

The photograph and the digits come with scikit-learn, identifiers from Python's standard library.
The paper scale reads ``ratings.csv`` (MovieLens: user, item, rating, time) and ``rows.npy`` (any
tall float array, memory-mapped) from the folder in ``STIEFEL_DATA``.
"""

from __future__ import annotations

import hashlib
import os
import re
import statistics
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stiefel.data import MissingDataError, photograph, table
from stiefel.numerics.sampled import (
    SampledMatrix,
    centroid_distance,
    gram_error_rms,
    lowrank,
    lowrank_solve,
    recommend,
    sketch,
    threshold,
)
from stiefel.papers.paper import UnavailableError

VARIABLE, RATINGS, TALL = "STIEFEL_DATA", "ratings.csv", "rows.npy"
SAMPLINGS = ("l2", "uniform")
K = 10
WORDS = 2000
_WORD = re.compile(r"[A-Za-z_]{3,}")


def patches(
    count: int, rng: np.random.Generator, *, centred: bool = True
) -> tuple[np.ndarray, str]:
    """8 × 8 colour patches of the photograph, one a row, and its checksum.

    All of them, in order, if there are no more than ``count``, else that many, any.

    Raises:
        UnavailableError: the photograph is not on this machine.
    """
    try:
        picture = photograph("china")
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    rows = np.lib.stride_tricks.sliding_window_view(picture.pixels.numpy(), (8, 8, 3))
    rows = rows.reshape(-1, 192)
    if count < len(rows):
        rows = rows[rng.permutation(len(rows))[:count]]
    rows = rows.astype(np.float64)
    if centred:
        rows -= rows.mean(axis=1, keepdims=True)
    return rows, picture.sha256


def identifiers(folder: Path | None = None, limit: int | None = None) -> tuple[Any, str]:
    """Counts of the 2,000 commonest names in files of the standard library, CSR; a checksum.

    Rows are the files, tests left out, in order of their paths; a name is three or more letters
    and underscores.

    Raises:
        UnavailableError: this Python has no standard library in files.
    """
    from scipy.sparse import csr_array

    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    left_out = {"site-packages", "test", "tests", "idle_test"}
    files = sorted(p for p in folder.rglob("*.py") if not left_out & set(p.parts))[:limit]
    counted = [Counter(_WORD.findall(p.read_text("utf-8", "replace"))) for p in files]
    total: Counter[str] = Counter()
    for words in counted:
        total.update(words)
    if len(total) < 2 * K:
        raise UnavailableError(f"{folder} holds no source files of a standard library")
    kept = {w: j for j, (w, _) in enumerate(sorted(total.items(), key=lambda i: (-i[1], i[0])))}
    kept = {w: j for w, j in kept.items() if j < WORDS}
    entries = [(i, kept[w], n) for i, c in enumerate(counted) for w, n in c.items() if w in kept]
    rows, columns, values = (np.array(v) for v in zip(*entries, strict=True))
    found = csr_array((values.astype(np.float64), (rows, columns)), shape=(len(files), len(kept)))
    found.sum_duplicates()
    digest = hashlib.sha256(found.data.tobytes() + found.indices.tobytes()).hexdigest()
    return found, digest


class Exact:
    """What is known of a matrix once it was read whole: the reference of every error."""

    def __init__(self, A: Any) -> None:
        self._tall = A.shape[0] >= A.shape[1]
        gram = A.T @ A if self._tall else A @ A.T
        gram = gram.toarray() if hasattr(gram, "toarray") else gram
        self.gram, self._A = (gram, None) if self._tall else (None, A)
        self.values = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
        self.fro2 = float(np.trace(gram))
        self.best = self.fro2 - float(self.values[:K].sum())

    def residual(self, V: np.ndarray) -> float:
        """‖A − A V Vᵀ‖_F² over that of the best rank 10."""
        kept = np.sum(V * (self.gram @ V)) if self._tall else np.sum(np.square(self._A @ V))
        return (self.fro2 - float(kept)) / self.best

    def gram_error(self, R: np.ndarray) -> float:
        """‖RᵀR − AᵀA‖_F / ‖A‖_F²."""
        return float(np.linalg.norm(R.T @ R - self.gram)) / self.fro2

    def identity(self, r: int) -> float:
        """What theory says of that, root mean square over draws."""
        return gram_error_rms(self.fro2, float(np.sum(self.values**2)), r) / self.fro2


def residuals(
    A: SampledMatrix, exact: Exact, rows: Sequence[int], draws: int, rng: np.random.Generator
) -> dict[str, list[float]]:
    """Mean residual ratio for every r with c = r/2, rows drawn by length and uniformly."""
    return {
        sampling: [
            statistics.fmean(
                exact.residual(lowrank(A, K, sketch_of=_drawn(A, r, sampling, rng)).V)
                for _ in range(draws)
            )
            for r in rows
        ]
        for sampling in SAMPLINGS
    }


def _drawn(A: SampledMatrix, r: int, sampling: str, rng: np.random.Generator) -> Any:
    return sketch(A, r, r // 2, rng, sampling=sampling)


def gram_errors(
    A: SampledMatrix, exact: Exact, rows: Sequence[int], draws: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Root mean square Gram error for every r beside the identity, and the slope of its fit."""
    measured = []
    for r in rows:
        errors = [exact.gram_error(sketch(A, r, A.shape[1], rng).R) for _ in range(draws)]
        measured.append(float(np.sqrt(np.mean(np.square(errors)))))
    identity = [exact.identity(r) for r in rows]
    slope = float(np.polyfit(np.log(rows), np.log(measured), 1)[0])
    off = max(abs(m / i - 1) for m, i in zip(measured, identity, strict=True))
    return {"measured": measured, "identity": identity, "slope": slope, "off": off}


def timed(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, in turn, after one call that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def speed(P: np.ndarray, config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Queries of subsets of growing size; at the largest, build and randomized_svd as well."""
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    order = rng.permutation(len(P))
    r, c, found = config["r"], config["c"], {}
    subsets = {n: np.ascontiguousarray(P[order[:n]]) for n in config["sizes"]}
    built = {n: SampledMatrix(a) for n, a in subsets.items()}
    queries = {
        str(n): lambda A=A: [lowrank(A, K, r, c, generator=rng) for _ in range(config["repeats"])]
        for n, A in built.items()
    }
    with threadpool_limits(1):
        seconds = timed(queries, config["rounds"])
        found["query"] = [seconds[str(n)] / config["repeats"] for n in subsets]
        found["svd"] = []
        for a in subsets.values():
            task = {"svd": lambda a=a: randomized_svd(a, K, random_state=0)}
            found["svd"].append(timed(task, config["svd_rounds"])["svd"])
        largest = subsets[max(subsets)]
        rest = timed(
            {
                "build": lambda: SampledMatrix(largest),
                "norms": lambda: np.einsum("ij,ij->i", largest, largest),
                "gram": lambda: np.linalg.eigh(largest.T @ largest),
            },
            config["rounds"],
        )
        found |= rest
    found["residual"] = []
    for n, A in built.items():
        exact = Exact(subsets[n])
        ratios = [exact.residual(lowrank(A, K, r, c, generator=rng).V)
                  for _ in range(config["draws"])]  # fmt: skip
        found["residual"].append(statistics.fmean(ratios))
        if n == max(built):
            V = randomized_svd(subsets[n], K, random_state=0)[2].T
            found["svd_residual"] = exact.residual(V)
    return found


def regression(config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, float]:
    """R² of predicting the centre of 7 × 7 grey patches from the 48 around, rank 10 and 20."""
    grey = photograph("china").pixels.numpy().mean(axis=2)
    rows = np.lib.stride_tricks.sliding_window_view(grey, (7, 7)).reshape(-1, 49)
    rows = rows[:: config["regression_step"]]
    X = np.delete(rows, 24, axis=1)
    mean = X.mean(axis=1)
    X, y = X - mean[:, None], rows[:, 24] - mean
    gram, image, total = X.T @ X, X.T @ y, float(y @ y)

    def r2(x: np.ndarray) -> float:
        return float(2 * x @ image - x @ gram @ x) / total

    values, vectors = np.linalg.eigh(gram)
    A = SampledMatrix(X)
    found = {"regression_r2_full": r2(np.linalg.solve(gram, image))}
    for k in (10, 20):
        V = vectors[:, -k:]
        found[f"regression_r2_exact_{k}"] = r2(V @ ((V.T @ image) / values[-k:]))
        for sampling in SAMPLINGS:
            drawn = [sketch(A, 500, generator=rng, sampling=sampling)
                     for _ in range(config["draws"])]  # fmt: skip
            scores = [r2(lowrank_solve(A, y, k, sketch_of=s).x) for s in drawn]
            found[f"regression_r2_{sampling}_{k}"] = statistics.fmean(scores)
    return found


def ramps(config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, float]:
    """‖A (X − P)‖_F / ‖A‖_F of digits, P the ramp at σ₁₀ and X its sampled one."""
    X = table("digits").x.numpy()
    values, vectors = np.linalg.eigh(X.T @ X)
    values = np.maximum(values, 0.0)
    sigma, A, found = float(np.sqrt(values[-K])), SampledMatrix(X), {}
    for r in config["ramp_rows"]:
        errors = []
        for _ in range(config["draws"]):
            function = threshold(sketch(A, r, generator=rng), sigma)
            weights = np.clip((values / sigma**2 - 0.7) / 0.6, 0, 1)
            exact = (vectors * weights) @ vectors.T
            errors.append(np.linalg.norm(X @ (function.matmul(np.eye(64)) - exact)))
        found[f"ramp_error_{r}"] = float(np.mean(errors) / np.sqrt(A.fro2))
        found[f"ramp_bound_to_trivial_{r}"] = function.bound / function.guarantee.trivial
    return found


def recommendations(
    T: Any, config: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, float]:
    """Thresholded rows of log counts: error, laws of the rows, and how many draws are accepted."""
    logs = T.copy()
    logs.data = np.log1p(logs.data)
    dense = logs.toarray()
    U, sigma, Vh = np.linalg.svd(dense, full_matrices=False)
    middle = float(np.sqrt(sigma[K - 1] * sigma[K]))
    exact = (U * sigma * np.clip((sigma**2 / middle**2 - 0.7) / 0.6, 0, 1)) @ Vh
    A, found = SampledMatrix(logs), {}
    for r in config["recommend_rows"]:
        function = threshold(sketch(A, r, r, rng), middle)
        ours = function.rmatmul(dense)
        found[f"recommend_error_{r}"] = float(np.linalg.norm(ours - exact) / np.linalg.norm(dense))
        laws = [np.square(a) / np.maximum(np.square(a).sum(1, keepdims=True), 1e-300)
                for a in (ours, exact)]  # fmt: skip
        kept = (np.linalg.norm(exact, axis=1) > 0) & (np.linalg.norm(ours, axis=1) > 0)
        variation = np.abs(laws[0] - laws[1])[kept].sum(1) / 2
        found[f"recommend_variation_{r}"] = float(variation.mean())
        one = recommend(A, 0, middle, function=function)
        one.sample(config["accepted"], rng)
        found[f"recommend_acceptance_{r}"] = one.vector.acceptance
        found[f"recommend_one_over_phi_{r}"] = 1 / one.phi
        found[f"recommend_bound_to_trivial_{r}"] = function.bound / function.guarantee.trivial
    return found


def learners(config: Mapping[str, Any], seed: int, rng: np.random.Generator) -> dict[str, float]:
    """Digits: accuracy on the second half beside exact methods; distance to a class mean."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import RidgeClassifier
    from sklearn.neighbors import NearestCentroid

    from stiefel.numerics.sampled import (
        SampledDiscriminantAnalysis,
        SampledNearestCentroid,
        SampledSVC,
    )

    digits = table("digits")
    X, y = digits.x.numpy(), digits.y.numpy()
    # Pixels that are never written on have no scatter.
    X = X[:, X[:900].std(axis=0) > 0]
    found = {}
    for name, model in {
        "accuracy_svm": SampledSVC(n_rows=500, random_state=seed),
        "accuracy_svm_exact": RidgeClassifier(alpha=1.0),
        "accuracy_discriminant": SampledDiscriminantAnalysis(n_rows=500, random_state=seed),
        "accuracy_discriminant_exact": LinearDiscriminantAnalysis(),
        "accuracy_centroid": SampledNearestCentroid(random_state=seed),
        "accuracy_centroid_exact": NearestCentroid(),
    }.items():
        found[name] = float(model.fit(X[:900], y[:900]).score(X[900:], y[900:]))
    p, Q = X[0], SampledMatrix(X[y == 3])
    true = float(np.square(p - X[y == 3].mean(axis=0)).sum())
    distances = [centroid_distance(p, Q, 200, rng) for _ in range(20 * config["draws"])]
    found["distance_exact"] = true
    found["distance_mean"] = statistics.fmean(distances)
    found["distance_deviation"] = statistics.stdev(distances)
    found["distance_bound_to_trivial"] = distances[0].bound / distances[0].guarantee.trivial
    return found


def files() -> tuple[Path, Path]:
    """Where the data of the paper scale are.

    Raises:
        UnavailableError: the variable is not set, or a file is not there; names all that is.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise UnavailableError(
            f"the paper scale needs {RATINGS} (MovieLens ratings) and {TALL} (a float array of "
            f"about 10⁷ rows): set {VARIABLE} to a folder with them"
        )
    paths = Path(folder) / RATINGS, Path(folder) / TALL
    missing = [str(p) for p in paths if not p.is_file()]
    if missing:
        raise UnavailableError(f"the paper scale needs {' and '.join(missing)}")
    return paths


def ratings(path: Path) -> Any:
    """Users by items, CSR; items and users numbered as they come in order of their own numbers."""
    from scipy.sparse import csr_array

    columns = np.loadtxt(path, delimiter=",", skiprows=1, usecols=(0, 1, 2), ndmin=2)
    users, items = (np.unique(columns[:, j], return_inverse=True)[1] for j in (0, 1))
    found = csr_array((columns[:, 2], (users, items)))
    found.sum_duplicates()
    return found


def large(config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, float]:
    """Paper scale: a memory-mapped array and a ratings matrix; build, query, updates."""
    from threadpoolctl import threadpool_limits

    ratings_file, tall_file = files()
    tall = np.load(tall_file, mmap_mode="r")
    found = {}
    with threadpool_limits(1):
        for name, a in (("tall", tall), ("ratings", ratings(ratings_file))):
            start = time.perf_counter()
            A = SampledMatrix(a)
            found[f"{name}_build_seconds"] = time.perf_counter() - start
            start = time.perf_counter()
            result = lowrank(A, config["k"], config["r"], generator=rng)
            found[f"{name}_query_seconds"] = time.perf_counter() - start
            found[f"{name}_bound_to_trivial"] = result.bound / result.guarantee.trivial
            index = rng.permutation(A.shape[0])[: config["updates"]]
            values = A.rows(index) * 0.5
            start = time.perf_counter()
            for i, row in zip(index, values, strict=True):
                A.update_row(int(i), row)
            found[f"{name}_updates_per_seconds"] = len(index) / (time.perf_counter() - start)
        one = recommend(A, 0, float(result.sigma[-1]), r=config["r"], generator=rng)
        one.sample(config["accepted"], rng)
        found["ratings_acceptance"] = one.vector.acceptance
    return found

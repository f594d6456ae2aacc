"""What a whole model's weights tell: one row per matrix, medians per kind, what stands out.

Tensors are read a few megabytes at a time and counted; no tensor is ever held whole, but embeddings
while their histogram of overlaps is drawn from a sample of rows.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stiefel.checkpoint import CheckpointError
from stiefel.diagnose.capacity import CosineMoments, capacity
from stiefel.diagnose.components import (
    EMBEDDINGS,
    Piece,
    Rule,
    classify_name,
    heads,
    is_matrix,
    split_fused,
)
from stiefel.diagnose.findings import findings, summarise
from stiefel.diagnose.magnitudes import MagnitudeCounts
from stiefel.diagnose.overlaps import overlap_histogram
from stiefel.diagnose.readings import attention_kind, classify_k, compare_to_reference
from stiefel.diagnose.report_rows import EmbeddingRow, MatrixRow, Report, Summary
from stiefel.diagnose.sources import Source, open_source
from stiefel.diagnose.weibull import TRIM, fit_magnitudes, half_normal_anchor

SAMPLE_ROWS = 8192
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Progress = Callable[[float, str], None]


def diagnose(
    source: str | Path | nn.Module | Mapping[str, Tensor],
    *,
    split_qkv: bool = True,
    rules: Iterable[Rule] = (),
    trim: float | int = TRIM,
    sample_rows: int = SAMPLE_ROWS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Fit every matrix of a model and measure its embeddings.

    Args:
        source: A folder or file of safetensors, a module, or a state dict.
        split_qkv: Take fused projections apart where their layout is known.
        rules: Own rules from names to kinds, searched first.
        trim: Part of the mass that the Weibull line goes through.
        sample_rows: Rows of an embedding whose overlaps are drawn as a histogram.
        threads: How many tensors are counted at a time; None: as many as there are cores, up to 4.
        progress: Called with the part done (by bytes) and the tensor at hand.

    Raises:
        CheckpointError: the files as a whole cannot be read; a single bad tensor is told under
            ``problems`` instead.
        ValueError: trim outside (0, 1], no tensor at all.
    """
    anchor = half_normal_anchor(trim)
    with open_source(source) as tensors:
        total = sum(tensors.nbytes(name) for name in tensors.names) or 1
        if not tensors.names:
            raise ValueError(f"{tensors.label} has no tensors")
        look = partial(
            _analyse, tensors, rules=tuple(rules), split=split_qkv, trim=trim, sample=sample_rows
        )
        matrices: list[MatrixRow] = []
        embeddings: list[EmbeddingRow] = []
        problems: dict[str, str] = {}
        skipped, done = 0, 0
        # Counting is one thread's work and leaves the interpreter free. Ten names ahead at most, so
        # that an interruption is answered soon.
        with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1)) as pool:
            for name, found in zip(tensors.names, _ahead(pool, look, tensors.names), strict=True):
                if progress is not None:
                    progress(done / total, name)
                done += tensors.nbytes(name)
                matrices += found.rows
                embeddings += found.embeddings
                skipped += found.skipped
                if found.problem:
                    problems[name] = found.problem
        if progress is not None:
            progress(1.0, "")
        summary = summarise(matrices)
        return Report(
            source=tensors.label,
            model=_model(tensors),
            anchor=anchor._asdict(),
            matrices=matrices,
            embeddings=embeddings,
            summary=summary,
            neighbours=_neighbours(summary),
            findings=findings(matrices, embeddings, problems),
            problems=problems,
            skipped=skipped,
        )


class _Found(NamedTuple):
    """What one tensor gave."""

    rows: list[MatrixRow]
    embeddings: list[EmbeddingRow]
    problem: str = ""
    skipped: bool = False


def _ahead(
    pool: ThreadPoolExecutor, look: Callable[[str], _Found], names: list[str], most: int = 10
) -> Iterator[_Found]:
    """``map`` in order that never has more than ``most`` calls waiting."""
    waiting: deque[Future[_Found]] = deque()
    try:
        for name in names:
            waiting.append(pool.submit(look, name))
            if len(waiting) == most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _analyse(
    tensors: Source,
    name: str,
    *,
    rules: tuple[Rule, ...],
    split: bool,
    trim: float | int,
    sample: int,
) -> _Found:
    component = classify_name(name, rules)
    shape, dtype = tensors.shape(name), tensors.dtype(name)
    if not is_matrix(component.kind, shape):
        return _Found([], [], skipped=True)
    if dtype not in _FLOATS:
        if not dtype.is_floating_point:
            return _Found([], [], skipped=True)
        kind = str(dtype).removeprefix("torch.")
        return _Found([], [], f"{kind} is quantised; dequantise it first")
    pieces = [Piece(component.kind)]
    if split:
        pieces = split_fused(name, component.kind, shape, tensors.config) or pieces
    try:
        rows = _fit(tensors, name, pieces, component.block, trim)
        spaces = []
        tall = len(shape) == 2 and shape[0] > shape[1]
        if component.kind in EMBEDDINGS and tall and not any(row.nonfinite for row in rows):
            spaces.append(_embedding(tensors, name, component.kind, sample))
    except (CheckpointError, ValueError) as error:
        return _Found([], [], str(error))
    return _Found(rows, spaces)


def _fit(
    tensors: Source, name: str, pieces: list[Piece], block: int | None, trim: float | int
) -> list[MatrixRow]:
    dtype, shape = tensors.dtype(name), tensors.shape(name)
    counts = [MagnitudeCounts.empty(dtype) for _ in pieces]
    start = 0
    for chunk in tensors.chunks(name):
        for piece, count in zip(pieces, counts, strict=True):
            count.update(piece.of(chunk, start))
        start += len(chunk)
    rows = []
    for piece, count in zip(pieces, counts, strict=True):
        fit = fit_magnitudes(count, trim=trim, nonfinite="drop")
        values, mass = count.bins()
        rms = float(((values**2 * mass).sum() / max(count.total - count.nonfinite, 1)).sqrt())
        rows.append(
            MatrixRow(
                name=name if len(pieces) == 1 else f"{name}[{piece.kind}]",
                kind=piece.kind,
                block=block,
                shape=tuple(shape),
                dtype=str(dtype).removeprefix("torch."),
                n=fit.n,
                k=fit.k if fit.ok else None,
                se_k=fit.se_k if fit.ok else None,
                lam=fit.lam if fit.ok else None,
                r2=fit.r2 if fit.ok else None,
                ks=fit.ks if fit.ok else None,
                lam_over_rms=fit.lam / rms if fit.ok else None,
                zero_fraction=fit.zero_fraction,
                nonfinite=count.nonfinite,
                label=classify_k(fit.k, fit.r2, se=fit.se_k) if fit.ok else "no_fit",
                reason=fit.reason,
            )
        )
    return rows


def _embedding(tensors: Source, name: str, kind: str, sample_rows: int) -> EmbeddingRow:
    height, width = tensors.shape(name)
    moments = CosineMoments(width)
    drawn = torch.randperm(height, generator=torch.Generator().manual_seed(0))[:sample_rows]
    drawn = drawn.sort().values
    sample, start = [], 0
    for chunk in tensors.chunks(name):
        moments.update(chunk)
        inside = drawn[(drawn >= start) & (drawn < start + len(chunk))] - start
        sample.append(chunk[inside].float())
        start += len(chunk)
    stats = moments.stats()
    overlaps = overlap_histogram(torch.cat(sample), sample=None)
    return EmbeddingRow(
        name=name,
        kind=kind,
        rows=height,
        width=width,
        dropped_rows=stats.dropped_rows,
        mean=stats.mean,
        std=stats.std,
        eps=stats.eps,
        excess=stats.excess,
        orthogonality_class=stats.orthogonality_class,
        capacity=capacity(width, stats.eps) if 0 < stats.eps < 0.1 else None,
        histogram=overlaps.counts.tolist(),
        sampled_rows=overlaps.rows,
        above=overlaps.above(stats.eps),
        largest=overlaps.largest,
        close_rows=overlaps.close_rows,
    )


def _neighbours(summary: Mapping[str, Summary]) -> list[dict[str, Any]]:
    nearest = compare_to_reference({kind: row.k for kind, row in summary.items()})[:3]
    return [
        {
            "name": found.reference.name,
            "attention": found.reference.attention,
            "distance": found.distance,
            "kinds": list(found.kinds),
        }
        for found in nearest
    ]


def _model(tensors: Source) -> dict[str, Any]:
    config = tensors.config or {}
    counts = heads(config)
    parameters = sum(math.prod(tensors.shape(name)) for name in tensors.names)
    return {
        "type": config.get("model_type") if isinstance(config.get("model_type"), str) else None,
        "parameters": parameters,
        "tensors": len(tensors.names),
        "bytes": sum(tensors.nbytes(name) for name in tensors.names),
        "attention": attention_kind(*counts) if counts else None,
        "tied": bool(config.get("tie_word_embeddings", False)),
    }

"""Medians per kind of component, and what stands out, a sentence each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping

from stiefel.diagnose.components import FEED_FORWARD
from stiefel.diagnose.report_rows import EmbeddingRow, Finding, MatrixRow, Summary

# What is worth a sentence.
ZERO_LIMIT, R2_LIMIT, OUTLIER_Z = 0.01, 0.95, 5.0


def summarise(matrices: Iterable[MatrixRow]) -> dict[str, Summary]:
    """Median and range of k and median of λ, by kind, and ``ffn`` over the feed-forward ones."""
    groups: dict[str, list[MatrixRow]] = {}
    for row in matrices:
        if row.k is not None:
            groups.setdefault(row.kind, []).append(row)
            if row.kind in FEED_FORWARD:
                groups.setdefault("ffn", []).append(row)
    return {kind: _summary(rows) for kind, rows in groups.items()}


def _summary(rows: list[MatrixRow]) -> Summary:
    low = min(rows, key=lambda row: row.k or 0.0)
    high = max(rows, key=lambda row: row.k or 0.0)
    return Summary(
        count=len(rows),
        k=statistics.median(row.k for row in rows if row.k is not None),
        k_min=low.k or 0.0,
        k_max=high.k or 0.0,
        block_min=low.block,
        block_max=high.block,
        lam=statistics.median(row.lam for row in rows if row.lam is not None),
    )


def findings(
    matrices: list[MatrixRow], embeddings: list[EmbeddingRow], problems: Mapping[str, str]
) -> list[Finding]:
    """What stands out, a sentence each; what points to damage first."""
    found = [Finding(name, text, serious=True) for name, text in problems.items()]
    for row in matrices:
        if row.nonfinite:
            text = f"{row.nonfinite:,} entries are NaN or infinite; they were left out."
            found.append(Finding(row.name, text, serious=True))
        if row.n == 0 and row.zero_fraction == 1:
            found.append(Finding(row.name, "All entries are zero.", serious=True))
        elif row.zero_fraction > ZERO_LIMIT:
            text = f"{row.zero_fraction:.1%} of the entries are exactly zero: pruned or never used."
            found.append(Finding(row.name, text))
        elif row.k is None:
            found.append(Finding(row.name, f"No fit: {row.reason}."))
        if row.r2 is not None and row.r2 < R2_LIMIT:
            text = (
                f"No Weibull line (R² {row.r2:.3f}): quantised to few levels, or a mixture of "
                "parts that were trained differently."
            )
            found.append(Finding(row.name, text))
    found += _outliers(matrices)
    for row in embeddings:
        if row.close_rows:
            text = (
                f"{row.close_rows:,} of {row.sampled_rows:,} sampled rows nearly equal another "
                "one: reserved or never trained tokens."
            )
            found.append(Finding(row.name, text))
        if row.mean > 0.2:
            text = (
                f"The rows share a direction (mean cosine {row.mean:.3f}); with tied embeddings "
                "that is usual."
            )
            found.append(Finding(row.name, text))
    return sorted(found, key=lambda finding: not finding.serious)


def _outliers(matrices: list[MatrixRow]) -> Iterator[Finding]:
    """Blocks whose k is far from the others of their kind, by the median absolute deviation."""
    kinds: dict[str, list[MatrixRow]] = {}
    for row in matrices:
        if row.k is not None and row.block is not None:
            kinds.setdefault(row.kind, []).append(row)
    for kind, rows in kinds.items():
        if len(rows) < 6:
            continue
        middle = statistics.median(row.k for row in rows if row.k is not None)
        away = [abs((row.k or 0.0) - middle) for row in rows]
        # 1.4826 makes it the standard deviation of a Gaussian; never below a fit's own error.
        scale = max(1.4826 * statistics.median(away), max(row.se_k or 0.0 for row in rows))
        for row, distance in zip(rows, away, strict=True):
            if distance > OUTLIER_Z * scale and distance > 0.01 * middle:
                text = (
                    f"k = {row.k:.3f} in block {row.block}, where {kind} has {middle:.3f} in the "
                    f"middle of the model ({distance / scale:.0f} robust deviations away)."
                )
                yield Finding(row.name, text)

"""Two real checkpoints nobody tuned the claim on: medians of k per kind of matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stiefel.data import MissingDataError, pretrained
from stiefel.diagnose import diagnose

Report = Callable[[float, str], None]


def medians(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Fit every matrix of the package ``name``.

    Returns:
        ``missing``: why the weights are not here, or None; ``k``: median by kind, and ``ffn`` over
        the feed-forward matrices; ``blocks``: k by kind and block; ``least_r2``.
    """
    try:
        weights = pretrained(str(config["name"]))
    except MissingDataError as error:
        return {"missing": str(error), "k": {}, "blocks": {}, "least_r2": None}
    found = diagnose(weights, progress=lambda part, name: report(part, str(config["name"])))
    rows = [row for row in found.matrices if row.k is not None and row.block is not None]
    blocks: dict[str, list[list[float]]] = {}
    for row in rows:
        blocks.setdefault(row.kind, []).append([float(row.block or 0), row.k or 0.0])
    return {
        "missing": None,
        "k": {kind: summary.k for kind, summary in found.summary.items()},
        "blocks": {kind: sorted(pairs) for kind, pairs in blocks.items()},
        "least_r2": min(row.r2 for row in rows if row.r2 is not None),
    }

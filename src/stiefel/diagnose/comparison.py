"""Two models side by side, and one model along its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stiefel.diagnose.readings import growth
from stiefel.diagnose.report_rows import Report, plain


@dataclass(frozen=True)
class Change:
    """How a matrix differs between two models.

    Attributes:
        name, kind, block: Of the matrix.
        k: Of the first and of the second.
        lam_ratio: λ of the second over that of the first.
        errors: |Δk| over its standard error.
    """

    name: str
    kind: str
    block: int | None
    k: tuple[float, float]
    lam_ratio: float
    errors: float


@dataclass(frozen=True)
class Comparison:
    """What differs between two reports, and what only one of them has.

    Attributes:
        changes: Matrices of both with a fit, the largest change of k first.
        only_first, only_second: Names that the other lacks.
        embeddings: ε of both, by name.
    """

    changes: list[Change]
    only_first: list[str]
    only_second: list[str]
    embeddings: dict[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return plain(asdict(self))


def compare(first: Report, second: Report) -> Comparison:
    """Match the matrices of two reports by name."""
    left, right = ({row.name: row for row in report.matrices} for report in (first, second))
    changes = []
    for name, a in left.items():
        b = right.get(name)
        if b is None or a.k is None or b.k is None or a.lam is None or b.lam is None:
            continue
        error = ((a.se_k or 0.0) ** 2 + (b.se_k or 0.0) ** 2) ** 0.5
        changes.append(
            Change(name, a.kind, a.block, (a.k, b.k), b.lam / a.lam, abs(b.k - a.k) / error)
        )
    spaces = [{row.name: row.eps for row in report.embeddings} for report in (first, second)]
    return Comparison(
        changes=sorted(changes, key=lambda change: -abs(change.k[1] - change.k[0])),
        only_first=[name for name in left if name not in right],
        only_second=[name for name in right if name not in left],
        embeddings={n: (spaces[0][n], spaces[1][n]) for n in spaces[0] if n in spaces[1]},
    )


@dataclass(frozen=True)
class Trajectory:
    """Median k and λ by kind along the checkpoints of a run.

    Attributes:
        sources: In order.
        k, lam: By kind, one number per checkpoint; None where a checkpoint has no such matrix.
        attribution: By kind: what made the scale grow, see :func:`~stiefel.diagnose.growth`.
    """

    sources: list[str]
    k: dict[str, list[float | None]]
    lam: dict[str, list[float | None]]
    attribution: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return plain(asdict(self))


def trajectory(reports: Sequence[Report]) -> Trajectory:
    """Growth of λ, and drift of k, over the reports of a run in order.

    Raises:
        ValueError: fewer than two reports.
    """
    if len(reports) < 2:
        raise ValueError(f"a run needs two checkpoints or more, got {len(reports)}")
    kinds = dict.fromkeys(kind for report in reports for kind in report.summary)
    k: dict[str, list[float | None]] = {}
    lam: dict[str, list[float | None]] = {}
    states = {}
    for kind in kinds:
        found = [report.summary.get(kind) for report in reports]
        k[kind] = [None if row is None else row.k for row in found]
        lam[kind] = [None if row is None else row.lam for row in found]
        whole = [row for row in found if row is not None]
        if len(whole) == len(reports):
            states[kind] = growth([row.k for row in whole], [row.lam for row in whole]).state
    return Trajectory([report.source for report in reports], k, lam, states)

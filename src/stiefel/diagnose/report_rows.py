"""The rows and sentences that a diagnosis is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class MatrixRow:
    """The fit of one matrix, or of one part of a fused one.

    Attributes:
        name: Of the tensor; a part of a fused one has ``[q]`` behind it.
        kind, block: See :class:`~stiefel.diagnose.components.Component`.
        shape, dtype: As stored.
        n: Finite non-zero entries.
        k, se_k, lam, r2, ks: See :class:`~stiefel.diagnose.WeibullFit`; None without a fit.
        lam_over_rms: λ over the root mean square of the entries.
        zero_fraction: Part of the entries that is 0.
        nonfinite: NaN and infinities.
        label: Class of k, see :func:`~stiefel.diagnose.classify_k`.
        reason: Why there is no fit; empty if there is.
    """

    name: str
    kind: str
    block: int | None
    shape: tuple[int, ...]
    dtype: str
    n: int
    k: float | None
    se_k: float | None
    lam: float | None
    r2: float | None
    ks: float | None
    lam_over_rms: float | None
    zero_fraction: float
    nonfinite: int
    label: str
    reason: str


@dataclass(frozen=True)
class EmbeddingRow:
    """How the rows of an embedding lie to one another.

    Attributes:
        name: Of the tensor.
        kind: ``"embedding"`` or ``"unembedding"``.
        rows, width: V and d.
        dropped_rows: Rows of zeros.
        mean, std, eps: Of the cosines of all pairs, exact; ε = μ + 2σ.
        excess: ε over 2/√d, what random rows have.
        orthogonality_class: 2 nearly orthogonal, 1 not, None between.
        capacity: Directions that fit at this ε; None where it is indeterminate (ε ≥ 0.1).
        histogram: Counts of cosines of a sample's pairs in equal bins over [−1, 1].
        sampled_rows: Rows of that sample.
        above: Part of the sample's pairs above ε.
        largest: Largest |cosine| in the sample.
        close_rows: Rows of the sample that nearly equal another one.
    """

    name: str
    kind: str
    rows: int
    width: int
    dropped_rows: int
    mean: float
    std: float
    eps: float
    excess: float
    orthogonality_class: int | None
    capacity: float | None
    histogram: list[int]
    sampled_rows: int
    above: float
    largest: float
    close_rows: int


@dataclass(frozen=True)
class Finding:
    """Something unusual, in a sentence.

    Attributes:
        tensor: What it is about; empty: the whole model.
        text: The sentence.
        serious: Whether the model is probably damaged.
    """

    tensor: str
    text: str
    serious: bool = False


@dataclass(frozen=True)
class Summary:
    """One kind over all blocks.

    Attributes:
        count: Matrices with a fit.
        k, k_min, k_max: Median and range.
        block_min, block_max: Blocks where the range ends.
        lam: Median λ.
    """

    count: int
    k: float
    k_min: float
    k_max: float
    block_min: int | None
    block_max: int | None
    lam: float


@dataclass(frozen=True)
class Report:
    """All that was found; :meth:`to_json` has it as plain values."""

    source: str
    model: dict[str, Any]
    anchor: dict[str, float]
    matrices: list[MatrixRow]
    embeddings: list[EmbeddingRow]
    summary: dict[str, Summary]
    neighbours: list[dict[str, Any]]
    findings: list[Finding]
    problems: dict[str, str] = field(default_factory=dict)
    """Tensors that could not be analysed, and why."""
    skipped: int = 0
    """Tensors of one dimension, norms, positions and integer buffers."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN and infinities are None."""
        return plain(asdict(self))

    @property
    def serious(self) -> bool:
        """Whether anything points to damage."""
        return bool(self.problems) or any(finding.serious for finding in self.findings)


def plain(value: Any) -> Any:
    """Values that JSON has words for: lists for tuples, None for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value

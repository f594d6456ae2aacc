"""What a merge did to a model, layer by layer: rotation, rest, and spread of the neurons.

For each weight matrix W of an expert or of the result, against the base's W0 ``[out, in]``:

- the rotation R of the input side that comes nearest, R = argmin ||W0 R - W|| (Procrustes), by its
  angles in degrees: 0 where W is W0, and the same for all blocks of an OFT adapter;
- the rest that is no rotation, ||W - W0 R|| / ||W0||;
- the hyperspherical energy of the rows, the mean of ||ŵᵢ - ŵⱼ||⁻¹ over pairs of directions: a
  rotation leaves it as it is, while averaging of weights changes it.

Source: OrthoMerge, arXiv 2602.05943; hyperspherical energy after arXiv 1805.09298.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.checkpoint import Checkpoint
from stiefel.linalg import procrustes_rotation, skew
from stiefel.linalg.procrustes import FLOAT64_UP_TO
from stiefel.merge.engine_inputs import Inputs, Reader
from stiefel.merge.engine_rotation import stored_in_out
from stiefel.merge.plan_layers import find_layers, has_vocabulary_rows
from stiefel.merge.plan_types import MergePlan, TensorRef, TensorTask

MAX_SIDE = 4096
"""Longest input side of a matrix whose rotation is computed."""
_SECONDS_PER_CUBE = {False: 6e-10, True: 3e-10}
"""CPU seconds of one comparison per cube of the input side, up to 2,048 inputs and above
(measured: 5 s and 19 s at 2048 and 4096)."""
ENERGY_ROWS = 1024
"""Rows, evenly spaced, from which the energy of larger matrices is estimated."""


@dataclass(frozen=True)
class Change:
    """One matrix against the base's."""

    angle_max: float | None
    """Largest angle of the nearest rotation, degrees; None for matrices beyond the limit."""
    angle_mean: float | None
    """Mean over the planes of the rotation, degrees."""
    residual: float | None
    """||W - W0 R|| / ||W0||."""
    difference: float
    """||W - W0|| / ||W0||."""
    energy: float
    """Mean inverse distance of directions of rows; infinity where two rows are parallel."""


@dataclass(frozen=True)
class Explained:
    """One weight matrix of the merge."""

    name: str
    layer: int | None
    shape: tuple[int, ...]
    energy: float
    """Of the base."""
    experts: dict[str, Change]
    merged: Change | None = None
    """None before the merge."""


@dataclass(frozen=True)
class Explanation:
    """All matrices of a merge."""

    reference: str
    """Name of the model against which all is measured."""
    matrices: tuple[Explained, ...]
    skipped: int
    """Matrices beyond the limit, of which only differences and energies are known."""
    notes: tuple[str, ...] = field(default=())

    def layers(self) -> list[dict[str, Any]]:
        """A row a layer, in order; ``layer`` None holds what is outside the layers.

        Angles are the largest, energies the mean, and ``residual`` and ``difference`` the root of
        the mean square over the layer's matrices.
        """
        groups: dict[int | None, list[Explained]] = {}
        for matrix in self.matrices:
            groups.setdefault(matrix.layer, []).append(matrix)
        ordered = sorted(groups.items(), key=lambda item: (item[0] is None, item[0] or 0))
        return [_row(layer, group) for layer, group in ordered]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it; an infinite energy is null."""
        return {
            "reference": self.reference,
            "skipped": self.skipped,
            "notes": list(self.notes),
            "layers": [_finite(row) for row in self.layers()],
            "matrices": [_finite(asdict(matrix)) for matrix in self.matrices],
        }


def rotation_angles(r: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Angles of a rotation in radians, in [0, π], ascending; each plane twice, and a 0 if n is odd.

    cos θ are the eigenvalues of (R + Rᵀ)/2; below 1e-4 rad, where the cosine has no digits left,
    an angle may be off by 1e-8 in float64. In float32, where that begins at 3°, angles that are all
    below 45° come from sin² θ, the eigenvalues of -((R - Rᵀ)/2)².
    """
    cosines = torch.linalg.eigvalsh((r + r.mT) / 2).clamp(-1, 1)
    if r.dtype == torch.float64 or len(cosines) == 0 or float(cosines[0]) < 0.5**0.5:
        return cosines.acos().flip(0)
    turn = skew(r)
    return torch.linalg.eigvalsh(turn.mT @ turn).clamp(0, 1).sqrt().asin()


def hyperspherical_energy(w: Float[Tensor, "rows n"], rows: int = ENERGY_ROWS) -> float:
    """Mean of ||ŵᵢ - ŵⱼ||⁻¹ over pairs i ≠ j of normalised rows; NaN with fewer than two.

    Of more than ``rows`` rows, as many evenly spaced ones are taken. Zero rows have no direction
    and are left out. Two rows of the same direction make it infinite.
    """
    if len(w) > rows:
        w = w[torch.linspace(0, len(w) - 1, rows, dtype=torch.float64).round().long()]
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    kept = norm[:, 0] > 0
    unit = w[kept] / norm[kept]
    if len(unit) < 2:
        return math.nan
    # Differences rather than 2 - 2 cos: near neighbours are what the sum is about.
    distances = torch.pdist(unit)
    return float(distances.reciprocal().mean())


def compare(
    base: Float[Tensor, "out in"], other: Float[Tensor, "out in"], max_side: int = MAX_SIDE
) -> Change:
    """The change from one matrix to another; see the module.

    Computed in float64; rotations of more than 2,048 inputs by Newton's iteration in float32, which
    gives angles to 0.01° and the rest to 1e-6.
    """
    w0, w = base.double(), other.double()
    size = float(torch.linalg.matrix_norm(w0))
    scale = 1 / size if size > 0 else math.inf
    difference = float(torch.linalg.matrix_norm(w - w0))
    relative = difference * scale if difference > 0 else 0.0
    energy = hyperspherical_energy(w)
    if w.shape[1] > max_side:
        return Change(None, None, None, relative, energy)
    if difference == 0:
        return Change(0.0, 0.0, 0.0, 0.0, energy)
    if w.shape[1] <= FLOAT64_UP_TO:
        rotation = procrustes_rotation(w0, w)
    else:
        w0, w = w0.float(), w.float()
        rotation = procrustes_rotation(w0, w, polar="newton")
    angles = rotation_angles(rotation).rad2deg()
    rest = float(torch.linalg.matrix_norm(w - w0 @ rotation)) * scale
    return Change(float(angles.max()), float(angles.mean()), rest, relative, energy)


def explain(
    plan: MergePlan,
    merged: str | Path | None = None,
    *,
    max_side: int = MAX_SIDE,
    on_progress: Callable[[float, str], None] | None = None,
) -> Explanation:
    """Compare every weight matrix of the inputs, and of the result, with the base.

    Where the method has no base, the first model stands for it. Embeddings and heads (rows are
    tokens, not neurons) and tensors that are copied are left out. One matrix at a time is in
    memory.

    Args:
        plan: of the merge.
        merged: folder of the result; None: only the inputs.
        max_side: of larger matrices the rotation is left out; see :data:`MAX_SIDE`.
        on_progress: is told the fraction done and the tensor at hand.

    Raises:
        CheckpointError: files that cannot be read any more.
        ValueError: NaN or infinities, named; or nothing to compare.
    """
    tasks = matrices_of(plan)
    layers = find_layers((task.name for task in plan.tasks), plan.config)
    done, whole = 0, sum(task.nbytes for task in tasks)
    inputs = Inputs(plan.models)
    output = None if merged is None else Checkpoint(merged)
    matrices = []
    try:
        for task in tasks:
            if on_progress is not None:
                on_progress(done / whole, task.name)
            place = layers.split(task.name)
            layer = None if place is None else place[0]
            # The plan has no configuration where the output's is a copy.
            config = inputs.checkpoint(task.base or task.sources[0]).config
            one = _One(task, inputs, output, layer, max_side, stored_in_out(task, config))
            matrices.append(one.explained())
            done += task.nbytes
    finally:
        inputs.close()
        if output is not None:
            output.close()
    skipped = sum(1 for m in matrices if m.shape[1] > max_side)
    notes = []
    if skipped:
        notes.append(
            f"{skipped} of {len(matrices)} matrices have more than {max_side} inputs: their "
            "rotations are left out; --explain-size (max_side) sets the limit"
        )
    reference = _reference(tasks[0])
    return Explanation(reference.model, tuple(matrices), skipped, tuple(notes))


def matrices_of(plan: MergePlan) -> list[TensorTask]:
    """The tasks that :func:`explain` looks at.

    Raises:
        ValueError: there is none.
    """
    tasks = [task for task in plan.tasks if _is_matrix(task)]
    if not tasks:
        raise ValueError(
            "there is nothing to explain: no weight matrix is merged from several models"
        )
    return tasks


def seconds_to_explain(plan: MergePlan, merged: bool = True, max_side: int = MAX_SIDE) -> float:
    """Estimate of the CPU seconds that :func:`explain` takes for its rotations."""
    total = 0.0
    for task in matrices_of(plan):
        side = task.shape[1]
        if side <= max_side:
            experts = len(task.sources) - (task.base is None)
            total += (experts + merged) * _SECONDS_PER_CUBE[side > FLOAT64_UP_TO] * side**3
    return total


def _is_matrix(task: TensorTask) -> bool:
    count = len(task.sources) + (task.base is not None)
    plain = len(task.shape) == 2 and min(task.shape) > 1 and task.method != "copy"
    return plain and count > 1 and not has_vocabulary_rows(task.name)


def _reference(task: TensorTask) -> TensorRef:
    return task.base if task.base is not None else task.sources[0]


@dataclass(frozen=True)
class _One:
    """One matrix at work."""

    task: TensorTask
    inputs: Inputs
    output: Checkpoint | None
    layer: int | None
    max_side: int
    turned_over: bool
    """Stored ``[in, out]``."""

    def explained(self) -> Explained:
        """All comparisons of this matrix."""
        reference = _reference(self.task)
        base = self._read(reference)
        experts = {
            ref.model: compare(base, self._read(ref), self.max_side)
            for ref in self.task.sources
            if ref is not reference
        }
        merged = None
        if self.output is not None:
            result = self.output.read(self.task.name)
            if tuple(result.shape) != self.task.shape:
                raise ValueError(f"{self.output.path} is not the result of this plan")
            result = self._matrix(result, self.task.name, str(self.output.path))
            merged = compare(base, result, self.max_side)
        energy = hyperspherical_energy(base)
        shape = (base.shape[0], base.shape[1])
        return Explained(self.task.name, self.layer, shape, energy, experts, merged)

    def _read(self, ref: TensorRef) -> Tensor:
        reader = Reader(self.inputs, ref, self.task.shape)
        return self._matrix(reader.whole(), ref.tensor, ref.model)

    def _matrix(self, tensor: Tensor, name: str, where: str) -> Tensor:
        tensor = tensor.double()
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} of {where} has NaN or infinities")
        return tensor.mT.contiguous() if self.turned_over else tensor


def _row(layer: int | None, group: Sequence[Explained]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "layer": layer,
        "matrices": len(group),
        "energy_before": _mean(m.energy for m in group),
    }
    names = list(dict.fromkeys(name for m in group for name in m.experts))
    row["experts"] = {
        name: _summary([m.experts[name] for m in group if name in m.experts]) for name in names
    }
    changes = [m.merged for m in group if m.merged is not None]
    row["merged"] = _summary(changes) if changes else None
    return row


def _summary(changes: Sequence[Change]) -> dict[str, float | None]:
    known = [c for c in changes if c.angle_max is not None]
    return {
        "angle_max": max((c.angle_max for c in known if c.angle_max is not None), default=None),
        "angle_mean": _mean(c.angle_mean for c in known) if known else None,
        "residual": _root(c.residual for c in known) if known else None,
        "difference": _root(c.difference for c in changes),
        "energy": _mean(c.energy for c in changes),
    }


def _mean(values: Iterator[float | None] | Any) -> float:
    found = [value for value in values if value is not None and not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan


def _root(values: Iterator[float | None] | Any) -> float:
    found = [value for value in values if value is not None]
    return math.sqrt(sum(value * value for value in found) / len(found)) if found else math.nan


def _finite(value: Any) -> Any:
    """``value`` with null where JSON has no number."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

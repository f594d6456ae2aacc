"""OrthoMerge: rotations averaged in their Lie algebra, the rest merged by an additive method.

arXiv 2602.05943, Orthogonal-Residual Decoupling. Per weight matrix ``[out, in]`` with base W0 and
experts Wᵢ = W0 Rᵢ + ρᵢ: W = W0 R_m + λ · merge(ρ₁ … ρ_N). Every tensor is on its own, so a
checkpoint can be streamed: :func:`orthomerge_tensor` is what an engine calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.merge.arithmetic import (
    Number,
    check_tensors,
    each_tensor,
    is_mapping,
    model_names,
)
from stiefel.merge.lie_average import check_rotation_weights
from stiefel.merge.prepared import OrthoReport, OrthoSettings, PreparedTensor, is_turned
from stiefel.merge.residual import Custom
from stiefel.merge.ties import Cut, ties_threshold


@torch.no_grad()
def orthomerge_tensor(
    base: Float[Tensor, "*shape"],
    experts: Sequence[Float[Tensor, "*shape"]],
    settings: OrthoSettings | None = None,
    *,
    weights: Sequence[Number] | None = None,
    name: str = "",
    turn: bool | None = None,
    out: Tensor | None = None,
) -> tuple[Float[Tensor, "*shape"], OrthoReport]:
    """:func:`orthomerge` of one tensor, and what happened to it.

    Args:
        base, experts: one shape, any floating types.
        settings: see :func:`orthomerge`; its defaults if None.
        name: for messages, for DARE's random numbers and for the rule what is turned.
        turn: rotate it; by default :func:`is_turned` of name and shape (a matrix without a name is
            turned). Other shapes than matrices cannot be.
        out: where the result goes; by default new, of base's dtype.

    Raises: as :func:`orthomerge`.
    """
    if len(experts) == 0:
        raise ValueError("experts must not be empty")
    check_tensors([base, *experts], _names(len(experts)), name)
    if turn is None:
        turn = is_turned(name or "weight", base)
    elif turn and base.ndim != 2:
        raise ValueError(f"only matrices can be turned, {name!r} has shape {tuple(base.shape)}")
    prepared = PreparedTensor(
        base, experts, check_rotation_weights(weights, len(experts)),
        settings or OrthoSettings(), name=name, turn=turn,
    )  # fmt: skip
    return prepared.finish(out=out)


@torch.no_grad()
def orthomerge(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    *,
    variant: str = "G",
    residual: str | Custom = "ties",
    residual_scale: Number | None = None,
    weights: Sequence[Number] | None = None,
    map: str = "cayley",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
    intensity: Number = 1.0,
    correct: bool = True,
    density: Number = 0.2,
    threshold: str = "tensor",
    polar: str = "auto",
) -> dict[str, Tensor]:
    """Merge fine-tuned models: W0 R_m + λ · merge(ρ) for every weight matrix.

    Rᵢ is the rotation of the input side that brings the base nearest to expert i (Procrustes, of
    all optimal ones the closest to the identity), R_m their mean by
    :func:`stiefel.merge.merge_rotations`, ρᵢ = Wᵢ - W0 Rᵢ. Tensors that are not turned (vectors,
    norms, convolutions) are base + λ · merge(Wᵢ - base).

    Args:
        base, experts: state dicts with the same names and shapes, any floating types.
        variant: ``"G"`` extracts the rotation to the whole expert. ``"C"`` to the base with only
            those rows changed whose change points against the mean of all experts.
        residual: ``"ties"``, ``"ta"`` (sum), ``"dare"``, ``"tsvm"``, or a function from the list of
            residuals to the merged one.
        residual_scale: λ; by default 1 for TIES and TSV-M, 1 / Σ weights for sum and DARE.
        weights: not negative, one an expert; they weigh rotations and residuals alike.
        map: Lie coordinates: ``"cayley"`` (the paper) or ``"log"``.
        include, exclude: turn only matrices whose name contains one of ``include``, and none whose
            name contains one of ``exclude``. By default all of :func:`is_turned`.
        generator: draws DARE's seed; by default 0.
        intensity: factor of the merged coordinate.
        correct: False takes the plain mean of the coordinates.
        density: share of entries that TIES or DARE keep.
        threshold: TIES keeps the largest entries of each ``"tensor"`` (as mergekit does) or of the
            whole ``"model"`` (the official code; keeps all residuals in memory).
        polar: how rotations are found, see :func:`stiefel.linalg.procrustes_rotation`; ``"auto"``
            takes Newton's iteration above a width of 2,048.

    Returns:
        Tensors of base's dtypes, in base's order. Computed in float64 for tensors of up to four
        million entries and for rotations up to a width of 2,048, otherwise in float32.

    Raises:
        ValueError: no experts; names or shapes differ; NaN or infinities; bad options.
        TypeError: integer tensors that differ between models.

    Warns:
        CancellationWarning: rotations that cancel. HalfTurnWarning: a turn by almost π.

    Source: arXiv 2602.05943 (variants, residual methods and constants from the official code).
    """
    is_mapping(experts, base)
    if threshold not in ("tensor", "model"):
        raise ValueError(f"threshold must be 'tensor' or 'model', got {threshold!r}")
    settings = OrthoSettings(
        variant, residual, residual_scale, map, intensity, correct, polar, density, _seed(generator)
    )
    found = check_rotation_weights(weights, len(experts))
    names = _names(len(experts))

    def prepare(name: str, tensors: Sequence[Tensor]) -> PreparedTensor:
        check_tensors(tensors, names, name)
        turn = _is_chosen(name, tensors[0], include, exclude)
        return PreparedTensor(tensors[0], tensors[1:], found, settings, name=name, turn=turn)

    if residual != "ties" or threshold == "tensor":
        return each_tensor([base, *experts], names, lambda name, xs: prepare(name, xs).finish()[0])
    kept: dict[str, PreparedTensor] = {}

    def keep(name: str, tensors: Sequence[Tensor]) -> Tensor:
        kept[name] = prepare(name, tensors)
        kept[name].whole_residuals()
        return tensors[0]

    result = each_tensor([base, *experts], names, keep)
    cuts = _shared_cuts(list(kept.values()), len(experts), density)
    return {name: kept[name].finish(cuts)[0] if name in kept else x for name, x in result.items()}


def _seed(generator: torch.Generator | None) -> int:
    """A number drawn from a generator; 0 without one."""
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _is_chosen(
    name: str, tensor: Tensor, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> bool:
    """Whether a tensor is turned, by what the caller says or else by :func:`is_turned`."""
    if any(part in name for part in exclude or ()):
        return False
    if include is None:
        return is_turned(name, tensor)
    return tensor.ndim == 2 and any(part in name for part in include)


def _shared_cuts(
    prepared: Sequence[PreparedTensor], count: int, density: Number
) -> list[Cut | None]:
    """One TIES limit an expert for all tensors together."""

    def pairs(expert: int) -> Iterator[tuple[Tensor, None]]:
        for tensor in prepared:
            yield from tensor.pairs(expert)

    return [ties_threshold(lambda i=i: pairs(i), density, torch.float64) for i in range(count)]


def _names(count: int) -> list[str]:
    return ["base", *(name.replace("models", "experts") for name in model_names(count, False))]

"""Before a step changes anything: what is wrong on any rank is known to all of them."""

from __future__ import annotations

import zlib
from typing import Any

from torch import Tensor

from stiefel.optim.base import MatrixOptimizer
from stiefel.optim.distributed.exchange import (
    BAD_GRADIENT,
    FAILED,
    FINE,
    agree_mask,
    exchange_objects,
    exchange_status,
    raise_together,
)
from stiefel.optim.distributed.geometry import is_dtensor, own
from stiefel.optim.distributed.placing import Ring
from stiefel.optim.gradients import bad_gradient, nonfinite

Work = list[tuple[dict[str, Any], list[Tensor]]]


def find_failures(optimizer: MatrixOptimizer, work: Work) -> tuple[dict[int, Tensor], list[Tensor]]:
    """What this rank holds of every gradient, and the parameters to be skipped for theirs.

    Raises:
        RuntimeError: a sparse or complex gradient, a plain gradient of a DTensor.
        FloatingPointError: NaN or Inf where the group says ``nonfinite="raise"``.
    """
    optimizer._check_kinds(work)
    grads: dict[int, Tensor] = {}
    bad: list[Tensor] = []
    for group, params in work:
        for p in params:
            grad: Any = p.grad
            if is_dtensor(p) and not (is_dtensor(grad) and grad.device_mesh == p.device_mesh):  # pyrefly: ignore
                raise RuntimeError(
                    f"the gradient of {optimizer._name(group, p)} is no DTensor on its mesh"
                )
            if grad.dtype != p.dtype or grad.shape != p.shape:
                raise RuntimeError(
                    f"the gradient of {optimizer._name(group, p)} has shape {tuple(grad.shape)} "
                    f"and dtype {grad.dtype}, the parameter {tuple(p.shape)} and {p.dtype}"
                )
            grads[id(p)] = own(grad)
        if group["nonfinite"] == "propagate":
            continue
        held = [p for p in params if grads[id(p)].numel()]
        found = nonfinite(held, [grads[id(p)] for p in held])
        if found and group["nonfinite"] == "raise":
            raise FloatingPointError(bad_gradient(optimizer._name(group, found[0])))
        bad += found
    return grads, bad


def agree(
    optimizer: MatrixOptimizer,
    rings: list[Ring],
    work: Work,
    bad: list[Tensor],
    failure: BaseException | None,
) -> list[Tensor]:
    """Tell and hear; returns the parameters that are bad on any rank.

    Raises:
        BaseException: this rank's ``failure``.
        RuntimeError: another rank's, which it names; ranks that disagree on which parameters have
            gradients.
        ValueError: ranks that have other parameters; it names the first difference.
    """
    name = type(optimizer).__name__
    active = {id(p) for _, params in work for p in params}
    ids = {id(p) for p in bad}
    for ring in rings:
        flags = bytes(id(p) in active for _, p in ring.params)
        code = FAILED if failure is not None else BAD_GRADIENT if bad else FINE
        every = exchange_status(ring.lane, (code, ring.word, zlib.crc32(flags)))
        codes, words, actives = zip(*every, strict=True)
        if FAILED in codes:
            raise_together(ring.lane, name, failure)
        if len(set(words)) > 1:
            _raise_difference(ring)
        if len(set(actives)) > 1:
            _raise_inactive(ring, list(map(bool, flags)))
        if BAD_GRADIENT in codes:
            mask = agree_mask(ring.lane, [id(p) in ids for _, p in ring.params])
            found = [p for (_, p), hit in zip(ring.params, mask, strict=True) if hit]
            bad = bad + [p for p in found if id(p) not in ids]
            ids |= {id(p) for p in found}
    return bad


def _raise_difference(ring: Ring) -> None:
    """Ranks do not have the same parameters: say where they differ first."""
    ranks, every = ring.lane.ranks, exchange_objects(ring.lane, ring.descriptions)
    for i in range(1, len(every)):
        for a, b in zip(every[0], every[i], strict=False):
            if a != b:
                raise ValueError(
                    f"ranks disagree about a parameter. Rank {ranks[0]} has {a}; rank {ranks[i]} "
                    f"has {b}"
                )
        if len(every[0]) != len(every[i]):
            raise ValueError(
                f"rank {ranks[0]} has {len(every[0])} parameters in the optimizer, rank {ranks[i]} "
                f"has {len(every[i])}"
            )
    raise RuntimeError("ranks disagree about their parameters, whose descriptions are equal")


def _raise_inactive(ring: Ring, mine: list[bool]) -> None:
    """Some ranks have gradients where others have none: say for which parameter."""
    ranks, every = ring.lane.ranks, exchange_objects(ring.lane, mine)
    for name, column in zip(ring.descriptions, zip(*every, strict=True), strict=True):
        if len(set(column)) > 1:
            raise RuntimeError(
                f"rank {ranks[column.index(True)]} has a gradient for {name}, "
                f"rank {ranks[column.index(False)]} has none"
            )
    raise RuntimeError("ranks disagree about which parameters have gradients")

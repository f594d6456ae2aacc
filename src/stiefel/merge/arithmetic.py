"""What the additive methods share: blocks, weighted differences, sign election, checks.

Everything is computed in float32 (float64 where an input is float64) in blocks that stay in a
processor's cache, and rounded once into the output: no copy of a tensor in float32 is ever made.
All of it is elementwise, so rows can be handed over in any portions without changing a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

# Elements of a block: a few float32 buffers of this size fit a second-level cache.
BLOCK = 1 << 15

Number = int | float

Prepare = Callable[[int, Tensor, int], None]
"""``prepare(model, delta, start)`` changes a block of differences in place; ``start`` is the
position of its first entry in the portion of rows at hand."""


def work_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if one of them is, else float32."""
    wide = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def blocks(numel: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Start and stop of every block."""
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


def mix_rows(
    base: Tensor,
    sources: Sequence[Tensor],
    weights: Sequence[Number],
    *,
    prepare: Prepare | None = None,
    consensus: bool = False,
    normalize: bool = False,
    scale: Number = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """base + scale · mix of weighted differences, for one portion of rows.

    Without ``consensus`` the mix is Σ wᵢ δᵢ, divided by Σ wᵢ if ``normalize``. With it, per entry
    the elected sign is that of Σ wᵢ δᵢ (0 counts as +), only wᵢ δᵢ of that sign are summed, and
    ``normalize`` divides by the Σ wᵢ of those.

    Args:
        base, sources: one shape; any real floating-point types.
        prepare: what happens to δᵢ = sourceᵢ - base before it is weighted.
        out: where the result goes, of the same shape and contiguous; by default new, of base's
            dtype. May be ``base`` itself.
    """
    dtype = work_dtype([base, *sources])
    if out is None:
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
    flat_out, flat_base = out.view(-1), base.reshape(-1)
    flats = [x.reshape(-1) for x in sources]
    size = min(BLOCK, flat_base.numel())
    origin, total, divisor, flip = torch.empty(4, size, dtype=dtype, device=base.device)
    deltas = torch.empty(len(sources), size, dtype=dtype, device=base.device)
    divide = sum_of_weights(weights, dtype, base.device) if normalize and not consensus else None
    for start, stop in blocks(flat_base.numel()):
        n = stop - start
        start_value, mixed = origin[:n], total[:n].zero_()
        start_value.copy_(flat_base[start:stop])
        parts = []
        for i, (flat, weight) in enumerate(zip(flats, weights, strict=True)):
            delta = deltas[i, :n].copy_(flat[start:stop]).sub_(start_value)
            if prepare is not None:
                prepare(i, delta, start)
            mixed.add_(delta.mul_(weight))
            parts.append(delta)
        if consensus:
            _elect(parts, weights, mixed, flip[:n], divisor[:n], normalize)
        elif divide is not None:
            mixed.div_(divide)
        if scale != 1:
            mixed.mul_(scale)
        flat_out[start:stop].copy_(start_value.add_(mixed))
    return out


def _elect(
    parts: Sequence[Tensor],
    weights: Sequence[Number],
    mixed: Tensor,
    flip: Tensor,
    divisor: Tensor,
    normalize: bool,
) -> None:
    """Replace ``mixed``, the sum of ``parts``, by the sum of those entries that have its sign."""
    flip.fill_(1).copysign_(mixed)  # a sum that began at +0 is never -0
    mixed.zero_()
    divisor.zero_()
    for part, weight in zip(parts, weights, strict=True):
        part.mul_(flip).clamp_(min=0)
        mixed.add_(part)
        if normalize:
            divisor.add_(part.sign_(), alpha=weight)
    if normalize:
        if min(weights) > 0:  # the divisor is zero only where the sum is: any number will do
            divisor.clamp_(min=torch.finfo(divisor.dtype).tiny)
        else:
            divisor.add_(divisor == 0)
        mixed.div_(divisor)
    mixed.mul_(flip)


def sum_of_weights(weights: Sequence[Number], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Σ wᵢ, added up in ``dtype`` as the entries are; 1 where it is practically zero."""
    total = torch.tensor(list(weights), dtype=dtype, device=device).sum()
    return total if bool(total.abs() >= 1e-8) else torch.ones_like(total)


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite; several times as fast as ``isfinite`` on half types."""
    flat = x.reshape(-1)
    scratch = torch.empty(min(BLOCK, flat.numel()), dtype=work_dtype([x]), device=x.device)
    return all(
        float(scratch[: stop - start].copy_(flat[start:stop]).mul_(0).sum()) == 0
        for start, stop in blocks(flat.numel())
    )


def check_weights(weights: Sequence[Number] | None, count: int) -> list[float]:
    """One finite weight a model; all 1 by default."""
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ValueError(f"weights must have one entry a model, got {len(weights)} for {count}")
    found = [float(w) for w in weights]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"weights must be finite, got {found}")
    return found


def check_densities(density: Number | Sequence[Number], count: int) -> list[float]:
    """One share in (0, 1] a model; a single number stands for all."""
    found = [float(d) for d in density] if isinstance(density, Sequence) else [float(density)]
    if not isinstance(density, Sequence):
        found *= count
    if len(found) != count:
        raise ValueError(f"density must be a number or one a model, got {len(found)} for {count}")
    for value in found:
        if not 0 < value <= 1:
            raise ValueError(f"density must be in (0, 1], got {value}")
    return found


def check_tensors(tensors: Sequence[Tensor], names: Sequence[str], tensor: str = "") -> None:
    """Raise unless all are real floating point, of one shape and device, and finite.

    ``names`` says which model each is of, ``tensor`` which one of its tensors.
    """
    where = f" of {tensor!r}" if tensor else ""
    first = tensors[0]
    for x, name in zip(tensors, names, strict=True):
        if not x.is_floating_point():
            raise TypeError(f"{name}{where} must be real floating point, got {x.dtype}")
        if x.shape != first.shape:
            raise ValueError(
                f"{name}{where} has shape {tuple(x.shape)}, but {names[0]} has {tuple(first.shape)}"
            )
        if x.device != first.device:
            raise ValueError(f"{name}{where} is on {x.device}, but {names[0]} on {first.device}")
        if not all_finite(x):
            raise ValueError(
                f"{name}{where} must be finite, but {int((~x.isfinite()).sum())} of its "
                f"{x.numel()} entries are NaN or infinite"
            )


def model_names(count: int, with_base: bool) -> list[str]:
    """``base``, ``models[0]``, …: how messages call the arguments."""
    return ["base"] * with_base + [f"models[{i}]" for i in range(count)]


def is_mapping(models: Sequence[object], base: object = None) -> bool:
    """Whether state dicts came (True) or tensors (False).

    Raises:
        ValueError: no models.
        TypeError: a mixture, or something else.
    """
    if len(models) == 0:
        raise ValueError("models must not be empty")
    given = [*models] if base is None else [base, *models]
    if all(isinstance(m, Mapping) for m in given):
        return True
    if all(isinstance(m, Tensor) for m in given):
        return False
    kinds = ", ".join(sorted({type(m).__name__ for m in given}))
    raise TypeError(f"models must be all tensors or all mappings of names to tensors, got {kinds}")


def each_tensor(
    dicts: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    merge: Callable[[str, list[Tensor]], Tensor],
) -> dict[str, Tensor]:
    """``merge(name, tensors)`` for every name, in the order of the first mapping.

    Integer and Boolean tensors that are the same everywhere are copied.

    Raises:
        ValueError: names that one has and another lacks.
        TypeError: integer or Boolean tensors that differ.
    """
    check_keys(dicts, names)
    result = {}
    for key in dicts[0]:
        tensors = [d[key] for d in dicts]
        if any(x.is_floating_point() for x in tensors):
            result[key] = merge(key, tensors)
            continue
        if not all(torch.equal(x, tensors[0]) for x in tensors):
            raise TypeError(
                f"{key!r} is {tensors[0].dtype} and differs between models: "
                "only floating-point tensors can be merged"
            )
        result[key] = tensors[0].clone()
    return result


def check_keys(dicts: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """Raise ``ValueError`` unless all mappings have the same names."""
    expected = set(dicts[0])
    for d, name in zip(dicts, names, strict=True):
        missing, extra = sorted(expected - set(d)), sorted(set(d) - expected)
        if missing or extra:
            parts = [
                f"{what} {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}"
                for what, keys in (("lacks", missing), ("has in addition", extra))
                if keys
            ]
            raise ValueError(f"{name} does not match {names[0]}: it {' and '.join(parts)}")

"""Linear averages, spherical interpolation and task arithmetic of tensors and state dicts.

The ``…_rows`` functions work on any portion of rows and give the same bits as the whole tensor:
a program that streams checkpoints calls them. Conventions are those of mergekit 0.1.5; sums are
in float32 (float64 where an input is float64) and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stiefel.merge.arithmetic import (
    BLOCK,
    Number,
    blocks,
    check_tensors,
    check_weights,
    each_tensor,
    is_mapping,
    mix_rows,
    model_names,
    work_dtype,
)

# mergekit: above this |cosine| the two tensors count as parallel and a straight line is taken.
PARALLEL = 0.9995
# mergekit: norms up to this count as zero and are not divided by.
ZERO_NORM = 1e-8

Models = Sequence[Tensor] | Sequence[Mapping[str, Tensor]]
Model = Tensor | Mapping[str, Tensor]


@torch.no_grad()
def linear(
    models: Models, weights: Sequence[Number] | None = None, *, normalize: bool = True
) -> Tensor | dict[str, Tensor]:
    """Σ wᵢ Wᵢ, divided by Σ wᵢ if ``normalize``.

    Args:
        models: tensors of one shape, or state dicts with the same names.
        weights: one a model; 1 by default.

    Returns:
        Of the first model's dtype. Not differentiable.

    Raises:
        ValueError: no models, shapes or names differ, weights that sum to zero, NaN or infinities.
        TypeError: not floating point.

    Source: Wortsman et al., "Model soups", arXiv 2203.05482.
    """
    dicts = is_mapping(models)
    names = model_names(len(models), with_base=False)
    found = check_weights(weights, len(models))
    if normalize and sum(found) == 0:
        raise ValueError(f"weights must not sum to zero where they are normalised, got {found}")

    def merge(name: str, tensors: Sequence[Tensor]) -> Tensor:
        check_tensors(tensors, names, name)
        return linear_rows(tensors, found, normalize=normalize)

    if dicts:
        return each_tensor(models, names, merge)  # pyrefly: ignore
    return merge("", models)  # pyrefly: ignore


def linear_rows(
    sources: Sequence[Tensor],
    weights: Sequence[Number],
    *,
    normalize: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`linear` of one portion of rows, without its checks.

    ``out``: contiguous, of the sources' shape and any floating dtype; by default new, of the first
    source's. May be one of the sources itself.
    """
    dtype, device = work_dtype(sources), sources[0].device
    if out is None:
        out = torch.empty_like(sources[0], memory_format=torch.contiguous_format)
    flat_out = out.view(-1)
    flats = [x.reshape(-1) for x in sources]
    factors = torch.tensor(list(weights), dtype=dtype, device=device).unbind()
    divisor = torch.stack(factors).sum()
    scratch = torch.empty(min(BLOCK, flat_out.numel()), dtype=dtype, device=device)
    for start, stop in blocks(flat_out.numel()):
        total = scratch[: stop - start].zero_()
        for flat, factor in zip(flats, factors, strict=True):
            total.addcmul_(flat[start:stop], factor)
        if normalize:
            total.div_(divisor)
        flat_out[start:stop].copy_(total)
    return out


@torch.no_grad()
def slerp(a: Model, b: Model, t: Number) -> Tensor | dict[str, Tensor]:
    """Along the great circle from ``a`` (t = 0) to ``b`` (t = 1), each tensor as one vector.

    sin((1-t)θ)/sin θ · a + sin(tθ)/sin θ · b with θ the angle between them; a straight line where
    they are parallel (|cos θ| > 0.9995) or one is zero. Norms are not interpolated separately.

    Raises:
        ValueError: shapes or names differ, ``t`` not finite, NaN or infinities.
        TypeError: not floating point.

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    if not math.isfinite(t):
        raise ValueError(f"t must be finite, got {t}")
    names = ["a", "b"]

    def merge(name: str, tensors: Sequence[Tensor]) -> Tensor:
        check_tensors(tensors, names, name)
        factors = slerp_coefficients(t, slerp_moments([(tensors[0], tensors[1])]))
        return linear_rows(tensors, factors, normalize=False)

    if is_mapping([a, b]):
        return each_tensor([a, b], names, merge)  # pyrefly: ignore
    return merge("", [a, b])  # pyrefly: ignore


def slerp_moments(chunks: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
    """‖a‖², ‖b‖² and ⟨a, b⟩ of two tensors that come in portions of whole rows.

    Rows are summed in float64 and added up exactly: no portioning changes the result.
    """
    sums: list[Tensor] = []
    for a, b in chunks:
        x, y = (v.reshape(v.shape[0], -1) if v.ndim > 1 else v.reshape(1, -1) for v in (a, b))
        # In place: small results that stay between large ones that go would scatter the heap.
        step = max(1, BLOCK // max(1, x.shape[1]))
        scratch = x.new_empty(3, min(step, len(x)), x.shape[1], dtype=torch.float64)
        found = x.new_empty(3, len(x), dtype=torch.float64)
        for start in range(0, len(x), step):
            stop = min(start + step, len(x))
            left, right, product = scratch[:, : stop - start]
            left.copy_(x[start:stop])
            right.copy_(y[start:stop])
            for row, one, other in zip(
                found, (left, right, left), (left, right, right), strict=True
            ):
                torch.mul(one, other, out=product)
                torch.sum(product, 1, out=row[start:stop])
        sums.append(found)
    if not sums:
        return 0.0, 0.0, 0.0
    return tuple(math.fsum(row) for row in torch.cat(sums, 1).tolist())  # pyrefly: ignore


def slerp_coefficients(t: Number, moments: tuple[float, float, float]) -> tuple[float, float]:
    """What ``a`` and ``b`` are multiplied by, from :func:`slerp_moments`."""
    norm_a, norm_b = math.sqrt(moments[0]), math.sqrt(moments[1])
    product = (norm_a if norm_a > ZERO_NORM else 1.0) * (norm_b if norm_b > ZERO_NORM else 1.0)
    cosine = moments[2] / product
    if abs(cosine) > PARALLEL or min(norm_a, norm_b) <= ZERO_NORM:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@torch.no_grad()
def task_arithmetic(
    base: Model,
    models: Models,
    weights: Sequence[Number] | None = None,
    *,
    scale: Number = 1.0,
    normalize: bool = False,
) -> Tensor | dict[str, Tensor]:
    """base + scale · Σ wᵢ (Wᵢ - base); ``normalize`` divides the sum by Σ wᵢ.

    Negative weights unlearn. Arguments, result and errors as in :func:`linear`.

    Source: Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089.
    """
    names = model_names(len(models), with_base=True)
    found = check_weights(weights, len(models))
    check_scale(scale)

    def merge(name: str, tensors: Sequence[Tensor]) -> Tensor:
        check_tensors(tensors, names, name)
        return task_arithmetic_rows(
            tensors[0], tensors[1:], found, scale=scale, normalize=normalize
        )

    if is_mapping(models, base):
        return each_tensor([base, *models], names, merge)  # pyrefly: ignore
    return merge("", [base, *models])  # pyrefly: ignore


def task_arithmetic_rows(
    base: Tensor,
    sources: Sequence[Tensor],
    weights: Sequence[Number],
    *,
    scale: Number = 1.0,
    normalize: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The formula for one portion of rows, without checks; ``out`` as in :func:`linear_rows`."""
    return mix_rows(base, sources, weights, scale=scale, normalize=normalize, out=out)


def check_scale(scale: Number) -> None:
    """Raise ``ValueError`` unless the factor is finite."""
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")

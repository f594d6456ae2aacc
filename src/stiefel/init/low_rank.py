"""Initial weights of a chosen rank, spectrum or direction at a fixed size.

"How connectivity structure shapes rich and lazy learning in neural circuits" (arXiv 2310.08513):
among initial weights of one Frobenius norm, those of low rank change more in training, except
where they are aligned with the task.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg import haar, polar
from stiefel.linalg._checks import check_finite, check_matrix, compute_dtype, in_batch

# Section 4 of the paper and the authors' script: standard deviation g / √n, chaotic above 1.
GAIN = 1.25


def low_rank_init(
    shape_or_W: Float[Tensor, "*batch m n"] | Sequence[int],
    rank: int,
    *,
    gain: float | int = GAIN,
    norm: str | float | int = "fro",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "*batch m n"]:
    """The best rank-``rank`` approximation of a Gaussian matrix (or of yours), rescaled.

    W_r = U_r Σ_r V_rᵀ · ‖W‖ / ‖W_r‖. To compare ranks, truncate the same matrix: pass it, or a
    generator of the same seed.

    With ``norm="fro"`` the largest singular value grows as the rank falls, like √(n / rank): a
    rank-1 recurrent matrix may explode over more than about 20 steps. ``"spectral"`` avoids it.

    Args:
        shape_or_W: ``[..., m, n]``, a shape to fill with gain · N(0, 1) / √n, or matrices.
        rank: 1 to min(m, n).
        gain: Of the Gaussian; not used where matrices are given.
        norm: What stays as it was: ``"fro"`` the Frobenius norm, ``"spectral"`` the largest
            singular value; a number is the Frobenius norm of the result.
        generator: Source of the Gaussian.
        dtype, device: Of the result; torch's default and the generator's. Given matrices keep
            their own.

    Differentiable in a given W with distinct singular values.

    Raises:
        ValueError: ``rank`` is out of range or above the rank of W; ``norm`` is not one of these
            or not positive; W is not finite or not a matrix; ``gain`` is not positive.
        TypeError: W is not real floating point.

    Source: arXiv 2310.08513, section 4, initialisation by truncated SVD.
    """
    matrix = _matrix(shape_or_W, gain, generator, dtype, device)
    m, n = matrix.shape[-2:]
    rank = operator.index(rank)
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank must be in 1..{min(m, n)} for matrices of {m} × {n}, got {rank}")
    _check_norm(norm)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    tolerance = max(m, n) * torch.finfo(matrix.dtype).eps
    low = ~(s.detach()[..., rank - 1] > tolerance * s.detach()[..., 0])
    if bool(low.any()):
        raise ValueError(f"W has a rank below the rank {rank} asked for{in_batch(low)}")
    kept = s[..., :rank]
    size = torch.linalg.vector_norm(kept, dim=-1)
    if norm == "fro":
        factor = torch.linalg.vector_norm(s, dim=-1) / size
    elif norm == "spectral":
        factor = torch.ones_like(size)
    else:
        factor = float(norm) / size
    result = (u[..., :rank] * (kept * factor[..., None])[..., None, :]) @ vh[..., :rank, :]
    return result.to(_result_dtype(shape_or_W, dtype))


def spectrum_init(
    shape: Sequence[int],
    singular_values: Float[Tensor, "*batch r"] | Sequence[float | int],
    *,
    norm: str | float | int | None = None,
    gain: float | int = GAIN,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "*batch m n"]:
    """Random matrices U diag(s) Vᵀ of given singular values, U and V Haar-distributed.

    Args:
        shape: ``(m, n)``.
        singular_values: ``[..., r]`` with r ≤ min(m, n), in any order, non-negative; every
            leading index gives a matrix of its own.
        norm: None keeps the values. ``"fro"`` and ``"spectral"`` scale them to the expected
            Frobenius norm gain · √m or largest singular value gain · (1 + √(m / n)) of a matrix
            of gain · N(0, 1) / √n; a number is the Frobenius norm.
        gain: Used by ``"fro"`` and ``"spectral"``.
        generator: Source of U and V.
        dtype, device: Of the result; those of a tensor of singular values, or torch's default
            and the generator's.

    Differentiable in the singular values.

    Raises:
        ValueError: too many values, a negative or non-finite one, none above zero; ``shape`` is
            not two positive integers; ``norm`` or ``gain`` out of range.
    """
    m, n = _two_sizes(shape)
    _check_gain(gain)
    if norm is not None:
        _check_norm(norm)
    given = isinstance(singular_values, Tensor)
    if device is None and not given and generator is not None:
        device = generator.device
    dtype = dtype or (singular_values.dtype if given else torch.get_default_dtype())
    values = torch.as_tensor(singular_values, dtype=compute_dtype(dtype), device=device)
    if values.ndim < 1 or not 1 <= values.shape[-1] <= min(m, n):
        raise ValueError(
            f"singular_values must be 1 to {min(m, n)} numbers for a {m} × {n} matrix, "
            f"got shape {tuple(values.shape)}"
        )
    check_finite(values, "singular_values")
    bad = (values < 0).any(-1) | ~(values > 0).any(-1)
    if bool(bad.any()):
        raise ValueError(f"singular_values must be at least 0 with one above 0{in_batch(bad)}")
    r = values.shape[-1]
    count = math.prod(values.shape[:-1])
    options = {"dtype": values.dtype, "device": values.device}
    # Drawn where the generator is, so that the same seed gives the same matrix on every device.
    where = {"dtype": values.dtype, "generator": generator}
    left = torch.stack([haar(m, r, **where) for _ in range(count)]).to(**options)
    right = torch.stack([haar(r, n, **where) for _ in range(count)]).to(**options)
    target = _expected_size(norm, gain, m, n)
    if norm == "spectral":
        values = values * (target / values.amax(-1, keepdim=True))
    elif norm is not None:
        values = values * (target / torch.linalg.vector_norm(values, dim=-1, keepdim=True))
    result = (left * values.reshape(count, 1, r)) @ right
    return result.reshape(*values.shape[:-1], m, n).to(dtype)


def aligned_init(
    shape: Sequence[int],
    directions: Float[Tensor, "*r n"],
    outputs: Float[Tensor, "*s m"] | None = None,
    *,
    norm: str | float | int = "fro",
    gain: float | int = GAIN,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "rows columns"]:
    """Low-rank weights that see only the directions that a task needs: σ Σ_i u_i d_iᵀ.

    One direction gives the rank-1 matrix σ u d̂ᵀ of the paper's proposition 1, the laziest of all.
    Several directions, and several outputs, are first replaced by the closest orthonormal ones,
    so that all r singular values are equal; directions that are orthogonal already stay.

    Args:
        shape: ``(m, n)``.
        directions: ``[n]`` or ``[r, n]``, linearly independent, of any length.
        outputs: ``[m]`` or ``[r, m]``: where the activity goes, one for each direction; random
            orthonormal vectors by default.
        norm: The Frobenius norm as a number; ``"fro"`` or ``"spectral"``: the expected Frobenius
            norm gain · √m or largest singular value gain · (1 + √(m / n)) of gain · N(0, 1) / √n.
        gain: Used by ``"fro"`` and ``"spectral"``.
        generator: Source of random outputs.

    The result has the dtype and device of ``directions``.

    Raises:
        ValueError: directions are not of length n, outputs not of length m or not as many as the
            directions; one of them is zero or not finite, or they are linearly dependent; more
            than min(m, n) of them; ``shape``, ``norm`` or ``gain`` out of range.

    Source: arXiv 2310.08513, proposition 1 (weights aligned with the task).
    """
    m, n = _two_sizes(shape)
    _check_gain(gain)
    _check_norm(norm)
    work = compute_dtype(directions.dtype)
    inner = _orthonormal(directions.to(work), n, min(m, n), "directions")
    r = inner.shape[0]
    if outputs is None:
        outer = haar(m, r, generator=generator, dtype=work).to(inner.device).mT
    else:
        outer = _orthonormal(outputs.to(inner), m, min(m, n), "outputs")
        if outer.shape[0] != r:
            raise ValueError(f"outputs must be {r}, as many as directions, got {outer.shape[0]}")
    size = _expected_size(norm, gain, m, n)
    scale = size if norm == "spectral" else size / math.sqrt(r)
    return (scale * (outer.mT @ inner)).to(directions.dtype)


def _matrix(
    shape_or_W: Tensor | Sequence[int],
    gain: float | int,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    """The matrix to truncate: the given one or a Gaussian."""
    if isinstance(shape_or_W, Tensor):
        check_matrix(shape_or_W, "shape_or_W")
        check_finite(shape_or_W, "shape_or_W")
        if dtype is not None or device is not None:
            raise ValueError("dtype and device go with a shape; a given W keeps its own")
        return shape_or_W.to(compute_dtype(shape_or_W.dtype))
    sizes = [operator.index(size) for size in shape_or_W]
    if len(sizes) < 2 or min(sizes[-2:]) < 1 or min(sizes) < 0:
        raise ValueError(f"shape_or_W must be [..., m, n] with m, n ≥ 1, got {tuple(sizes)}")
    _check_gain(gain)
    dtype = dtype or torch.get_default_dtype()
    if device is None and generator is not None:
        device = generator.device
    options = {"dtype": compute_dtype(dtype), "device": device}
    return torch.randn(sizes, generator=generator, **options) * (gain / math.sqrt(sizes[-1]))


def _result_dtype(shape_or_W: Tensor | Sequence[int], dtype: torch.dtype | None) -> torch.dtype:
    if isinstance(shape_or_W, Tensor):
        return shape_or_W.dtype
    return dtype or torch.get_default_dtype()


def _two_sizes(shape: Sequence[int]) -> tuple[int, int]:
    sizes = tuple(operator.index(size) for size in shape)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"shape must be two positive integers (m, n), got {sizes}")
    return sizes[0], sizes[1]


def _check_gain(gain: float | int) -> None:
    if not (gain > 0 and math.isfinite(gain)):
        raise ValueError(f"gain must be positive and finite, got {gain}")


def _check_norm(norm: str | float | int) -> None:
    if norm in ("fro", "spectral"):
        return
    if isinstance(norm, str) or not (norm > 0 and math.isfinite(norm)):
        raise ValueError(f"norm must be 'fro', 'spectral' or a positive number, got {norm!r}")


def _expected_size(norm: str | float | int | None, gain: float | int, m: int, n: int) -> float:
    """Norm to reach: of a Gaussian matrix of this gain, or the number given."""
    if norm == "spectral":
        return gain * (1 + math.sqrt(m / n))
    return gain * math.sqrt(m) if norm in ("fro", None) else float(norm)


def _orthonormal(vectors: Tensor, length: int, most: int, name: str) -> Tensor:
    """The closest orthonormal rows to one or several vectors."""
    rows = vectors[None] if vectors.ndim == 1 else vectors
    if rows.ndim != 2 or rows.shape[-1] != length:
        raise ValueError(
            f"{name} must have shape [{length}] or [r, {length}], got {tuple(vectors.shape)}"
        )
    if not 1 <= rows.shape[0] <= most:
        raise ValueError(f"{name} must be 1 to {most} vectors, got {rows.shape[0]}")
    check_finite(rows, name)
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    if bool((lengths == 0).any()):
        raise ValueError(
            f"{name} must not be zero, but number {int((lengths == 0).nonzero()[0, 0])} is"
        )
    unit = rows / lengths
    s = torch.linalg.svdvals(unit.detach())
    if not bool(s[-1] > length * torch.finfo(s.dtype).eps * s[0]):
        raise ValueError(f"{name} must be linearly independent, got {rows.shape[0]} of lower rank")
    return polar(unit)

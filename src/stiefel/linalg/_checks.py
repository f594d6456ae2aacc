"""Argument checks that the functions of ``stiefel.linalg`` share.

Each check raises before any work is done and names the argument, what came and what is allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_TYPES = (torch.bfloat16, torch.float16)

# OrthoMerge sheet, "Traps and errors": ||Q + Qᵀ|| above this part of ||Q|| is not skew.
SKEW_TOLERANCE = 1e-4
# Largest |RᵀR - I| of a rotation, rounded to float32 or better and to a half type.
ORTHOGONAL_TOLERANCE = 1e-3
ORTHOGONAL_TOLERANCE_HALF = 5e-2


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision the work is done in: float32 for the half types, otherwise ``dtype`` itself."""
    return torch.float32 if dtype in HALF_TYPES else dtype


def check_floating(x: Tensor, name: str) -> None:
    """Raise ``TypeError`` unless ``x`` is real floating point."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a real floating-point tensor, got {x.dtype}")


def check_matrix(x: Tensor, name: str) -> None:
    """Raise unless ``x`` is floating point (``TypeError``), ``[..., m, n]`` (``ValueError``)."""
    check_floating(x, name)
    if x.ndim < 2:
        raise ValueError(
            f"{name} must have at least two dimensions [..., m, n], got shape {tuple(x.shape)}"
        )


def check_square(x: Tensor, name: str) -> None:
    """Raise unless ``x`` is floating point (``TypeError``), ``[..., n, n]`` (``ValueError``)."""
    check_matrix(x, name)
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name} must be square [..., n, n], got shape {tuple(x.shape)}")


def check_finite(x: Tensor, name: str) -> None:
    """Raise ``ValueError`` if ``x`` holds a NaN or an infinity."""
    finite = x.detach().isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"{name} must be finite, but {int((~finite).sum())} of its {x.numel()} entries "
            "are NaN or infinite"
        )


def first_true(bad: Tensor) -> tuple[int, ...]:
    """Index of the first ``True``; ``()`` for a tensor without dimensions."""
    return tuple(int(i) for i in bad.nonzero()[0])


def in_batch(bad: Tensor) -> str:
    """Which matrix is the first bad one: ``" (matrix (1, 0) of the batch)"``; empty if only one."""
    index = first_true(bad)
    return f" (matrix {index} of the batch)" if index else ""


def check_pair(a: Tensor, a_name: str, b: Tensor, b_name: str) -> None:
    """Raise unless both are matrices of one size (``ValueError``) and one dtype (``TypeError``)."""
    check_matrix(a, a_name)
    check_matrix(b, b_name)
    if a.shape[-2:] != b.shape[-2:]:
        raise ValueError(
            f"{a_name} and {b_name} must be matrices of one size, got shapes "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.dtype != b.dtype:
        raise TypeError(f"{a_name} is {a.dtype} but {b_name} is {b.dtype}")


def check_skew(q: Tensor, name: str) -> None:
    """Raise unless ``q`` is square, finite and skew: ||q + qᵀ|| ≤ 1e-4 ||q|| (``ValueError``)."""
    check_square(q, name)
    check_finite(q, name)
    if q.numel() == 0:
        return
    work = q.detach().to(compute_dtype(q.dtype))
    # Scaled by the largest entry, so that no square overflows or vanishes.
    largest = work.abs().amax((-2, -1), keepdim=True)
    unit = work / torch.where(largest > 0, largest, 1.0)
    symmetric = torch.linalg.matrix_norm(unit + unit.mT)
    size = torch.linalg.matrix_norm(unit)
    bad = symmetric > SKEW_TOLERANCE * size
    if bool(bad.any()):
        where = first_true(bad)
        raise ValueError(
            f"{name} must be skew-symmetric{in_batch(bad)}: ||{name} + {name}ᵀ|| is "
            f"{float(symmetric[where] / size[where]):.1e} of ||{name}||, "
            f"at most {SKEW_TOLERANCE:.0e} is allowed"
        )


def check_orthogonal(r: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless ``r`` is square, finite and orthogonal up to its rounding."""
    check_square(r, name)
    check_finite(r, name)
    if r.numel() == 0:
        return
    work = r.detach().to(compute_dtype(r.dtype))
    eye = torch.eye(r.shape[-1], dtype=work.dtype, device=r.device)
    error = (work.mT @ work - eye).abs().amax((-2, -1))
    allowed = ORTHOGONAL_TOLERANCE_HALF if r.dtype in HALF_TYPES else ORTHOGONAL_TOLERANCE
    bad = ~(error <= allowed)
    if bool(bad.any()):
        where = first_true(bad)
        raise ValueError(
            f"{name} must be orthogonal{in_batch(bad)}: the largest entry of "
            f"|{name}ᵀ{name} - I| is {float(error[where]):.1e}, at most {allowed:.0e} is allowed"
        )

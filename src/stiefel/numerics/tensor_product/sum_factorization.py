"""Sum factorisation: values at q^d points from (p + 1)^d coefficients by d small matrix products.

    values = (A_1 ⊗ … ⊗ A_d) coefficients

costs O(p^{d+1}) per element axis by axis, O(p^{2d}) with the big matrix. For low degrees one large
GEMM is faster all the same, so both are timed at first use and the choice is kept. Part of
arXiv 2606.25148.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from jaxtyping import Num
from torch import Tensor

from stiefel.numerics.tensor_product.axis_apply import MAX_AXES, apply_axes
from stiefel.numerics.tensor_product.checks import (
    check_choice,
    check_field,
    check_matrix,
    hidden,
    real_dtype,
)

METHODS = ("auto", "dense", "factorized")
LARGEST_DENSE = 2**22
"""Entries of the largest Kronecker matrix that is tried (32 MiB in float64)."""
_TIMED_ELEMENTS = 256
_ROUNDS = 5

Key = tuple[tuple[tuple[int, int], ...], int, torch.dtype, torch.dtype, torch.device]
_choices: dict[Key, str] = {}


def sum_factorize(
    mats: Sequence[Num[Tensor, "_ _"]], coeffs: Num[Tensor, "*grid"], method: str = "auto"
) -> Num[Tensor, "*points"]:
    """(A_1 ⊗ … ⊗ A_d) applied to the coefficients of every element.

    Args:
        mats: For each of d = 1 to 4 axes ``(q_i, p_i + 1)``: 1-D functions (columns) at 1-D points
            (rows). For a derivative along one axis put the functions' derivatives there.
        coeffs: ``(*elements, p_1 + 1, …, p_d + 1)``; every axis before the last d is a batch.
        method: ``"factorized"`` (d products, one per axis), ``"dense"`` (one product with the
            Kronecker matrix) or ``"auto"``: both are timed the first time that these sizes,
            type and number of elements (to a power of two) come on this device; the faster is
            remembered, see :func:`sum_factorization_choices`. It changes rounding only.

    Returns:
        Values ``(*elements, q_1, …, q_d)``; differentiable in ``coeffs`` and ``mats``.

    Raises:
        ValueError: no or more than four matrices, sizes that do not fit (names the axis), a NaN;
            ``"dense"`` with a matrix of more than 2²² entries.
        TypeError: integers or half precision, precisions that differ.
    """
    check_choice(method, "method", METHODS)
    if not 1 <= len(mats) <= MAX_AXES:
        raise ValueError(f"mats must have 1 to {MAX_AXES} entries, one per axis, got {len(mats)}")
    for axis, A in enumerate(mats):
        check_matrix(A, f"mats[{axis}]")
        if real_dtype(A.dtype) != real_dtype(coeffs.dtype):
            raise TypeError(
                f"mats[{axis}] is {A.dtype} but coeffs is {coeffs.dtype}: convert one to the "
                "precision of the other"
            )
    check_field(coeffs, [A.shape[1] for A in mats], "coeffs")
    entries = math.prod(A.numel() for A in mats)
    if method == "dense" and entries > LARGEST_DENSE:
        raise ValueError(
            f"method 'dense' would need a matrix of {entries} entries, at most {LARGEST_DENSE} are "
            "allowed; use 'factorized'"
        )
    if method == "auto":
        method = _choose(mats, coeffs, entries)
    return (_dense if method == "dense" else apply_axes)(mats, coeffs)


def sum_factorize_transpose(
    mats: Sequence[Num[Tensor, "_ _"]], values: Num[Tensor, "*points"], method: str = "auto"
) -> Num[Tensor, "*grid"]:
    """(A_1 ⊗ … ⊗ A_d)ᵀ applied to values at points: integration against the functions.

    Args:
        mats: As for :func:`sum_factorize`, ``(q_i, p_i + 1)``; not conjugated.
        values: ``(*elements, q_1, …, q_d)``, quadrature weights multiplied in.
        method: As there.

    Returns:
        ``(*elements, p_1 + 1, …, p_d + 1)``.

    Raises:
        ValueError, TypeError: as :func:`sum_factorize`.
    """
    for axis, A in enumerate(mats):
        check_matrix(A, f"mats[{axis}]")
    return sum_factorize([A.mT for A in mats], values, method)


def sum_factorization_choices() -> dict[str, str]:
    """What was measured so far: ``"256 x (6, 5)(6, 5)(6, 5) float64 cpu"`` → ``"dense"``, …"""
    return {
        f"{elements} x {''.join(map(str, shapes))} {str(dtype).removeprefix('torch.')} {device}": v
        for (shapes, elements, _, dtype, device), v in _choices.items()
    }


def forget_choices() -> None:
    """Measure again, as after a change of the number of threads."""
    _choices.clear()


def _dense(mats: Sequence[Tensor], coeffs: Tensor) -> Tensor:
    """One product: every element is a row."""
    d = len(mats)
    kind = reduce(torch.promote_types, (A.dtype for A in mats), coeffs.dtype)
    big = reduce(torch.kron, (A.contiguous() for A in mats)).to(kind)
    rows = coeffs.reshape(-1, big.shape[1]).to(kind)
    return (rows @ big.mT).reshape(*coeffs.shape[:-d], *(A.shape[0] for A in mats))


def _choose(mats: Sequence[Tensor], coeffs: Tensor, entries: int) -> str:
    """The faster of the two for this kind of call, from memory or measured now."""
    elements = coeffs.numel() // math.prod(A.shape[1] for A in mats)
    if len(mats) == 1 or entries > LARGEST_DENSE or hidden(coeffs):
        return "factorized"
    shapes = tuple((A.shape[0], A.shape[1]) for A in mats)
    bucket = 1 << (elements - 1).bit_length()
    kind = reduce(torch.promote_types, (A.dtype for A in mats))
    key = shapes, bucket, kind, coeffs.dtype, coeffs.device
    if key not in _choices:
        few = min(bucket, _TIMED_ELEMENTS)
        sample = torch.ones(few, *(n for _, n in shapes), dtype=coeffs.dtype, device=coeffs.device)
        plain = [A.detach() for A in mats]
        with torch.no_grad():
            times = _in_turn([lambda f=f: f(plain, sample) for f in (_dense, apply_axes)], coeffs)
        _choices[key] = "dense" if times[0] < times[1] else "factorized"
    return _choices[key]


def _in_turn(tasks: Sequence[Callable[[], Tensor]], x: Tensor) -> list[float]:
    """Median seconds of each, after one call that warms up."""

    def clock() -> float:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter()

    for task in tasks:
        task()
    times: list[list[float]] = [[] for _ in tasks]
    for _ in range(_ROUNDS):
        for found, task in zip(times, tasks, strict=True):
            start = clock()
            task()
            found.append(clock() - start)
    return [statistics.median(found) for found in times]

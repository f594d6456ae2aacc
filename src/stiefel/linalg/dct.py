"""Orthonormal discrete cosine transforms (DCT-II and its inverse, the DCT-III).

Basis (arXiv 2505.17967, section on the DCT basis), orthogonal for every n:

    D[i, j] = c_i √(2/n) cos(π i (2j + 1) / (2n)),   c_0 = 1/√2, c_i = 1 otherwise.

The fast form is Makhoul's (1980): one real FFT of length n instead of 2n, O(n log n) a row.
"""

from __future__ import annotations

import math
import operator
import threading
from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import check_floating, compute_dtype

DCTType = Literal[2, 3]

# Plans kept; a plan is 5n numbers, so this bounds the cache at a few MB for ordinary widths.
_MAX_PLANS = 64


class _Plan(NamedTuple):
    """What a transform of one length needs, on one device in one precision."""

    order: Tensor  # [n] evens ascending, then odds descending
    inverse_order: Tensor  # [n] its inverse
    twiddle: Tensor  # [n//2 + 1] complex: 2 exp(-iπk/2n) s_k
    inverse_twiddle: Tensor  # [n//2 + 1] complex: exp(iπk/2n) / (2 s_k)


_plans: OrderedDict[tuple[int, torch.dtype, torch.device], _Plan] = OrderedDict()
_plans_lock = threading.Lock()


def _build_plan(n: int, dtype: torch.dtype, device: torch.device) -> _Plan:
    index = torch.arange(n, device="cpu")
    order = torch.cat([index[::2], index[1::2].flip(0)])
    angle = torch.arange(n // 2 + 1, dtype=torch.float64, device="cpu") * (math.pi / (2 * n))
    scale = torch.full_like(angle, math.sqrt(1 / (2 * n)))
    scale[0] = math.sqrt(1 / (4 * n))
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    return _Plan(
        order.to(device),
        order.argsort().to(device),
        torch.polar(2 * scale, -angle).to(device, complex_dtype),
        torch.polar(0.5 / scale, angle).to(device, complex_dtype),
    )


def _plan(x: Tensor) -> _Plan:
    n, dtype, device = x.shape[-1], x.dtype, x.device
    if type(x) is not Tensor or torch.compiler.is_compiling():
        # A tracer's fake tensors must not end up in the cache; the compiler folds the plan itself.
        return _build_plan(n, dtype, device)
    key = (n, dtype, device)
    with _plans_lock:
        plan = _plans.get(key)
        if plan is None:
            # A plan made under inference_mode could never be used with autograd afterwards.
            with torch.inference_mode(False):
                plan = _plans[key] = _build_plan(n, dtype, device)
            if len(_plans) > _MAX_PLANS:
                _plans.popitem(last=False)
        else:
            _plans.move_to_end(key)
    return plan


def _dct2_torch(x: Tensor) -> Tensor:
    """DCT-II along the last dimension; differentiable to any order, on any device."""
    n = x.shape[-1]
    plan = _plan(x)
    z = torch.fft.rfft(x.index_select(-1, plan.order)) * plan.twiddle
    # y_k = Re Z_k up to k = n//2; the FFT's symmetry gives the rest as y_{n-k} = -Im Z_k.
    return torch.cat([z.real, -z.imag[..., 1 : n - n // 2].flip(-1)], dim=-1)


def _dct3_torch(y: Tensor) -> Tensor:
    """DCT-III along the last dimension, the exact inverse and transpose of ``_dct2_torch``."""
    n = y.shape[-1]
    plan = _plan(y)
    # V_k = exp(iπk/2n) (y_k - i y_{n-k}) / (2 s_k) with y_n = 0.
    mirrored = y[..., n - n // 2 :].flip(-1)
    imaginary = torch.cat([torch.zeros_like(y[..., :1]), -mirrored], dim=-1)
    v = torch.complex(y[..., : n // 2 + 1].contiguous(), imaginary) * plan.inverse_twiddle
    return torch.fft.irfft(v, n=n).index_select(-1, plan.inverse_order)


def _scipy_may_run(x: Tensor) -> bool:
    """Whether nothing is watching the operations on ``x`` (autograd, a tracer, a transform)."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and torch.autograd.forward_ad._current_level < 0
    )


def _transform(x: Tensor, dim: int, kind: int) -> Tensor:
    check_floating(x, "x")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(f"dim must be in [{-x.ndim}, {x.ndim - 1}] for {x.ndim}-D x, got {dim}")
    work = x.to(compute_dtype(x.dtype))
    if x.numel() == 0:
        return work.clone().to(x.dtype)
    if _scipy_may_run(work):
        out = _scipy(work.detach().resolve_neg(), dim, kind, overwrite=work is not x)
        return out.to(x.dtype).contiguous()
    along_last = work.movedim(dim, -1)
    out = _dct2_torch(along_last) if kind == 2 else _dct3_torch(along_last)
    return out.movedim(-1, dim).to(x.dtype)


def _scipy(x: Tensor, dim: int, kind: int, *, overwrite: bool) -> Tensor:
    """The same numbers, about three times faster than the FFT route; may destroy ``x`` if told.

    The result need not be contiguous.
    """
    import scipy.fft  # kept out of module import

    if x.ndim > 1 and dim in (-2, x.ndim - 2) and x.stride(dim) * x.element_size() % 512 == 0:
        # Columns at such strides share few cache sets: 2.5 times faster in rows of another length.
        shape = (*x.shape[:-1], x.shape[-1] + 64 // x.element_size())
        x = x.new_empty(shape)[..., : x.shape[-1]].copy_(x)
        overwrite = True
    return torch.from_numpy(
        scipy.fft.dct(
            x.numpy(),
            type=kind,
            axis=dim,
            norm="ortho",
            overwrite_x=overwrite,
            workers=torch.get_num_threads(),
        )
    )


def dct_(x: Float[Tensor, "*shape"], *, dim: int = -1, type: int = 2) -> Float[Tensor, "*shape"]:
    """:func:`dct` of float32 or float64 scratch memory: may destroy ``x``, saves copies.

    The result lies in ``x`` or elsewhere and need not be contiguous; the numbers are those of
    :func:`dct`. Unlike there nothing is checked.
    """
    if _scipy_may_run(x) and x.numel():
        return _scipy(x, dim, type, overwrite=True)
    return _transform(x, dim, type)


def _check_type(type_: int) -> None:
    if type_ not in (2, 3):
        raise ValueError(f"type must be 2 or 3, got {type_!r}")


def dct(x: Float[Tensor, "*shape"], *, dim: int = -1, type: int = 2) -> Float[Tensor, "*shape"]:
    """Orthonormal discrete cosine transform along one dimension; the shape stays.

    ``dct(x) == x @ dct_matrix(n).mT`` for ``x[..., n]``, in O(n log n) a row. bfloat16 and
    float16 are transformed in float32 and rounded once at the end. Differentiable to any order;
    works under ``torch.compile`` and ``torch.func``. NaN and infinities propagate along ``dim``.

    Args:
        x: real floating-point tensor with at least one dimension; not modified.
        dim: the dimension to transform.
        type: 2 for the DCT-II (frequencies of a signal), 3 for its inverse, the DCT-III.

    Raises:
        TypeError: ``x`` is an integer, boolean or complex tensor.
        ValueError: ``x`` is a scalar, or ``type`` is not 2 or 3.
        IndexError: ``dim`` is out of range.

    Source: arXiv 2505.17967, fast transform; Makhoul, "A fast cosine transform in one and two
    dimensions", IEEE Trans. ASSP 28 (1980).
    """
    _check_type(type)
    return _transform(x, dim, type)


def idct(x: Float[Tensor, "*shape"], *, dim: int = -1, type: int = 2) -> Float[Tensor, "*shape"]:
    """Inverse of :func:`dct` with the same ``type``: ``idct(dct(x, type=t), type=t) == x``.

    The transforms are orthonormal, so the inverse of type 2 is type 3 and the reverse. Shapes,
    precision, gradients, treatment of NaN and errors are those of :func:`dct`.
    """
    _check_type(type)
    return _transform(x, dim, 5 - type)


def dct_matrix(
    n: int,
    *,
    type: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "n n"]:
    """The orthogonal matrix of :func:`dct`: ``dct(v, type=t) == dct_matrix(n, type=t) @ v``.

    For ``type=2`` row i is the cosine of frequency i (module docstring); ``type=3`` is the
    transpose. Angles are reduced as integers, i(2j + 1) mod 4n, and the cosines taken in
    float64 and rounded last, so D Dᵀ - I stays at the rounding error of one entry for any n
    (float32 cosines of large arguments lose four digits at n = 4096).

    Raises:
        ValueError: ``n`` is negative or ``type`` is not 2 or 3.
        TypeError: ``dtype`` is not real floating point, or ``n`` not an integer.

    Source: arXiv 2505.17967, definition of the DCT basis.
    """
    _check_type(type)
    n = operator.index(n)
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be real floating point, got {dtype}")
    if n == 0:
        return torch.empty(0, 0, dtype=dtype, device=device)
    # Only 4n different angles occur, so 4n cosines are enough.
    turn = torch.arange(4 * n, dtype=torch.float64, device="cpu") * (math.pi / (2 * n))
    cosines = (turn.cos() * math.sqrt(2 / n)).to(dtype=dtype).to(device=device)
    index = torch.arange(n, device=cosines.device)
    matrix = cosines[(index[:, None] * (2 * index + 1)) % (4 * n)]
    matrix[0] = math.sqrt(1 / n)
    return matrix if type == 2 else matrix.mT.contiguous()

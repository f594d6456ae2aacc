"""Arguments that the closed forms of deep linear networks share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Reals = Tensor | np.ndarray | np.generic | Sequence[float | int] | float | int


def as_reals(**values: Reals) -> tuple[Tensor, ...]:
    """All arguments as finite tensors of one real dtype and on one device.

    The dtype is the widest of the floating-point tensors among them, float64 if there is none:
    numbers, arrays and integers do not lower it. Half types count as float32.

    Raises:
        TypeError: complex or boolean values.
        ValueError: NaN or infinity; the message names the argument.
    """
    dtype, device = None, None
    for value in values.values():
        if isinstance(value, Tensor):
            if value.is_floating_point():
                dtype = value.dtype if dtype is None else torch.promote_types(dtype, value.dtype)
            if value.ndim or device is None:  # like torch: tensors without dimensions follow
                device = value.device
    dtype = torch.float64 if dtype is None else torch.promote_types(dtype, torch.float32)
    result = []
    for name, value in values.items():
        # NumPy reads numbers and lists as float64, torch as float32.
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        if tensor.is_complex() or tensor.dtype is torch.bool:
            raise TypeError(f"{name} must be real numbers, got {tensor.dtype}")
        tensor = tensor.to(device=device, dtype=dtype)
        # One pass; a sum that is not finite may also be one that overflowed.
        if not math.isfinite(float(tensor.detach().sum())):
            _check_finite(tensor.detach(), name)
        result.append(tensor)
    return tuple(result)


def _check_finite(value: Tensor, name: str) -> None:
    bad = ~value.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"{name} must be finite, but {int(bad.sum())} of its {value.numel()} entries "
            "are NaN or infinite"
        )


def check_at_least(value: Tensor, name: str, bound: float | int, *, strictly: bool = False) -> None:
    """Raise ``ValueError`` unless all entries are ≥ ``bound`` (``strictly``: > ``bound``)."""
    least = float(value.detach().min()) if value.numel() else math.inf
    if least < bound or (strictly and least == bound):
        relation = ">" if strictly else "≥"
        raise ValueError(f"{name} must be {relation} {bound:g}, got {least:g}")


def check_depth(depth: float | int, *, infinite: bool = True) -> float:
    """The number of weight layers: a whole number ≥ 1, or infinity where that is allowed.

    Raises:
        ValueError: anything else.
    """
    deep = infinite and depth == math.inf
    if not deep and not (math.isfinite(depth) and depth >= 1 and depth == int(depth)):
        allowed = "a whole number ≥ 1" + (" or math.inf" if infinite else "")
        raise ValueError(f"depth counts weight layers and must be {allowed}, got {depth}")
    return float(depth)

"""Argument checks that the model, its trainers and its adapters share.

Each names the argument, what came and what is allowed. Values are looked at only where they are
there to be seen: not while compiling or exporting, nor inside ``torch.func.vmap``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible(*tensors: Tensor) -> bool:
    """Whether code may depend on the values of ``tensors``."""
    return not torch.compiler.is_compiling() and not any(
        x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors
    )


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise unless ``value`` is a whole number (``TypeError``) ≥ ``least`` (``ValueError``)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(
    name: str,
    value: float | int,
    low: float = 0.0,
    high: float = math.inf,
    *,
    open_low: bool = True,
) -> None:
    """Raise ``ValueError`` unless low < value ≤ high (low ≤ value if not ``open_low``), finite."""
    if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
        left = "above" if open_low else "at least"
        right = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} must be finite, {left} {low:g}{right}, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_finite(name: str, x: Tensor) -> None:
    """Raise ``ValueError`` if a sample of ``x`` (leading dimension) holds NaN or infinities."""
    if not visible(x) or bool(torch.isfinite(x).all()):
        return
    bad = (~torch.isfinite(x)).flatten(1).any(1) if x.ndim > 1 else ~torch.isfinite(x)
    first = int(bad.nonzero()[0])
    raise ValueError(
        f"{name} must be finite, but {int(bad.sum())} of its {len(bad)} samples hold NaN or "
        f"infinities, the first at index {first}"
    )


def check_fields(u: Tensor, n_x: int, channels: int, name: str = "u") -> None:
    """Raise unless u is real floating point, finite, ``[batch, times, n_x, channels]``, not empty.

    Raises:
        TypeError: not floating point.
        ValueError: shape or values.
    """
    if not u.is_floating_point():
        raise TypeError(f"{name} must be a real floating-point tensor, got {u.dtype}")
    if u.ndim != 4:
        raise ValueError(
            f"{name} must have shape [batch, times, n_x, channels], got {tuple(u.shape)}"
        )
    if u.shape[2] != n_x or u.shape[3] != channels:
        raise ValueError(
            f"{name} must have {n_x} points and {channels} channels a time "
            f"(PROSE(n_x={n_x}, channels={channels})), got {u.shape[2]} and {u.shape[3]}"
        )
    if u.shape[0] == 0 or u.shape[1] == 0:
        raise ValueError(f"{name} needs at least one sample and one time, got {tuple(u.shape)}")
    check_finite(name, u)


def times(t: Tensor, batch: int, name: str, like: Tensor) -> Tensor:
    """t as ``[batch, T]`` in the dtype and on the device of ``like``.

    Raises:
        ValueError: t is neither ``[T]`` nor ``[batch, T]``, is empty, or holds NaN or infinities.
    """
    if t.ndim not in (1, 2) or (t.ndim == 2 and t.shape[0] != batch) or t.shape[-1] == 0:
        raise ValueError(
            f"{name} must have shape [T] or [batch, T] with batch {batch} and T ≥ 1, "
            f"got {tuple(t.shape)}"
        )
    check_finite(name, t.to(like.dtype))
    return t.to(device=like.device, dtype=like.dtype).expand(batch, t.shape[-1])


def check_tokens(tokens: Tensor, vocab: int, max_len: int, pad: int) -> None:
    """Raise unless tokens are integers ``[rows, L]`` below ``vocab``, L ≤ max_len, no row all PAD.

    Raises:
        TypeError: not an integer tensor.
        ValueError: shape, length or range.
    """
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must have shape [batch, L] with L ≥ 1, got {tuple(tokens.shape)}")
    if tokens.shape[1] > max_len:
        raise ValueError(
            f"tokens are {tokens.shape[1]} long, at most {max_len} are allowed; build the model "
            f"with max_len={tokens.shape[1]} or shorten the equation"
        )
    if not visible(tokens) or tokens.numel() == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"tokens must lie in 0..{vocab - 1}, got {low}..{high}")
    empty = (tokens == pad).all(1)
    if bool(empty.any()):
        raise ValueError(
            f"row {int(empty.nonzero()[0])} of tokens is padding only: every sample needs its "
            "equation; a model without equations has use_symbols=False"
        )

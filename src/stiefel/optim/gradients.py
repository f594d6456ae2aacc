"""What gradients must be before anything is changed by them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None  # noqa: S101 - only for the type checker
    return parameter.grad


def check_kind(optimizer: str, name: str, grad: Tensor) -> None:
    """Refuse gradients that no rule can use.

    Raises:
        RuntimeError: ``grad`` is sparse or complex; ``optimizer`` and ``name`` (of the parameter)
            are for the message.
    """
    if grad.layout != torch.strided:
        kind, what = "sparse", f"layout {grad.layout}"
    elif grad.is_complex():
        kind, what = "complex", f"dtype {grad.dtype}"
    else:
        return
    raise RuntimeError(
        f"{optimizer} does not support {kind} gradients, got one of {what} for {name}"
    )


def nonfinite(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Those parameters whose gradients are not finite."""
    if not grads or _all_finite(grads):
        return []
    pairs = zip(params, grads, strict=True)
    return [p for p, grad in pairs if not bool(torch.isfinite(grad).all())]


def bad_gradient(name: str) -> str:
    """What is said of a parameter with such a gradient where that is an error."""
    return (
        f"NaN or Inf in the gradient of {name}; nothing was updated. "
        "nonfinite='skip' leaves such parameters as they are for this step"
    )


def _all_finite(grads: Sequence[Tensor]) -> bool:
    """Whether all gradients are finite, by one reduction and one look at the result."""
    norms = torch._foreach_norm(list(grads))
    device = norms[0].device
    total = torch.stack([n.to(device, torch.float32) for n in norms]).sum()
    # A sum of squares may overflow without any Inf: the caller then looks at each gradient.
    return math.isfinite(float(total))

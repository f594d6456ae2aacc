"""Lipschitz constants of chains of layers, from exact norms of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.linalg.conv_penalty import check_kernel
from stiefel.linalg.conv_spectrum import conv_spectral_norm
from stiefel.nn.orthogonal_conv import _OrthogonalConv

# Lipschitz constant 1 in the Euclidean norm, in evaluation mode.
NON_EXPANSIVE = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardtanh, nn.Softsign, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
)  # fmt: skip


@torch.no_grad()
def certified_lipschitz(
    model: nn.Module,
    input_size: Iterable[int],
    known: Mapping[type[nn.Module], float | int] | None = None,
) -> float:
    """Product of the largest singular values of a chain of layers, computed in float64.

    An upper bound of ‖f(x) − f(y)‖₂ / ‖x − y‖₂ in evaluation mode. Convolutions with circular
    padding of (k − 1)/2 are exact; with zeros or none, the norm on a circle that holds image and
    padding bounds theirs.

    Args:
        model: One layer or an ``nn.Sequential``, nested as well: convolutions of one or two axes
            (not transposed), ``nn.Linear``, and layers that do not expand (ReLU, Flatten, …).
        input_size: Shape of one sample, without batch: ``(C, H, W)``.
        known: Lipschitz constants of further kinds of modules.

    Raises:
        TypeError: a module that is not a chain, or of unknown constant: name it in ``known``.
        ValueError: a constant that is negative or not finite, sizes that do not fit, NaN or Inf in
            a weight, circular padding other than (k − 1)/2 or a size not divisible by the stride.
        NotImplementedError: another padding than circular or zeros.
    """
    constants = dict(known or {})
    for kind, value in constants.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"known[{kind.__name__}] must be finite and at least 0, got {value}")
    x = torch.zeros(1, *input_size, device=next(iter(model.parameters()), torch.zeros(())).device)
    total, training = 1.0, {m: m.training for m in model.modules()}
    model.eval()
    try:
        for name, module in _chain(model, "model", constants):
            total *= _constant(module, name, x, constants)
            dtype = next((p.dtype for p in module.parameters()), x.dtype)
            x = module(x.to(dtype))
    finally:
        for module, mode in training.items():
            module.training = mode
    return total


def _chain(
    module: nn.Module, name: str, known: Mapping[type[nn.Module], float | int]
) -> Iterable[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential) and type(module) not in known:
        for key, child in module.named_children():
            yield from _chain(child, f"{name}.{key}", known)
    else:
        yield name, module


def _constant(
    module: nn.Module, name: str, x: Tensor, known: Mapping[type[nn.Module], float | int]
) -> float:
    if type(module) in known:
        return float(known[type(module)])
    if isinstance(module, _OrthogonalConv) and module.method == "cayley":
        return 1.0
    if isinstance(module, nn.Linear):
        check_kernel(module.weight[..., None], name=f"the weight of {name}")
        return float(torch.linalg.matrix_norm(module.weight.double(), 2))
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return _convolution_norm(module, name, tuple(x.shape[2:]))
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, NON_EXPANSIVE):
        return 1.0
    raise TypeError(
        f"the Lipschitz constant of {name} ({type(module).__name__}) is not known, or it is not a "
        "chain: pass known={…} for this kind of module"
    )


def _convolution_norm(module: nn.Conv1d | nn.Conv2d, name: str, image: tuple[int, ...]) -> float:
    weight, stride = module.weight.double(), tuple(module.stride)
    check_kernel(weight, module.groups, f"the weight of {name}")
    weight = _dilated(weight, tuple(module.dilation))
    if module.padding_mode not in ("circular", "zeros"):
        raise NotImplementedError(
            f"{name} pads by {module.padding_mode!r}; circular and zeros are known"
        )
    pads = _pads(module, weight)
    if isinstance(module, _OrthogonalConv):
        circular = module.boundary == "circular"
    else:
        circular = module.padding_mode == "circular" and any(pads)
        if circular and any(2 * p != k - 1 for p, k in zip(pads, weight.shape[2:], strict=True)):
            raise ValueError(f"{name} must pad circularly by (k - 1)/2, got {module.padding}")
    if circular:
        if any(n % s for n, s in zip(image, stride, strict=True)):
            raise ValueError(f"the stride {stride} of {name} must divide its input, got {image}")
        return float(conv_spectral_norm(weight, image, stride, module.groups))
    # Rows of the circular layer that do not wrap, on pixels some of which are zeros.
    grid = [n + 2 * p for n, p in zip(image, pads, strict=True)]
    grid = [-(-n // s) * s for n, s in zip(grid, stride, strict=True)]
    return float(conv_spectral_norm(weight, grid, stride, module.groups))


def _pads(module: nn.Conv1d | nn.Conv2d, weight: Tensor) -> tuple[int, ...]:
    """Pixels added at each end of every axis; the larger number where they differ."""
    padding: Any = module.padding
    if padding == "valid":
        return (0,) * (weight.ndim - 2)
    if padding == "same":
        return tuple(k // 2 for k in weight.shape[2:])
    return tuple(padding)


def _dilated(weight: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """The same kernel with its gaps written out as zeros."""
    sizes = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    spread = weight.new_zeros(*weight.shape[:2], *sizes)
    spread[(..., *(slice(None, None, d) for d in dilation))] = weight
    return spread

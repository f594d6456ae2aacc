"""The kernel of a layer and the numbers that its orthogonality depends on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_UNCOVERED = (nn.Conv3d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerKernel:
    """What :func:`stiefel.nn.lorth` needs to know of a layer; the weight is read at each call.

    Attributes:
        module: A convolution, a transposed one, or ``nn.Linear`` (a kernel of one tap).
        out_ch, in_ch: M and C of one group, of the layer itself; of its transpose for a transposed
            convolution, whose weight is laid out that way and whose matrix is the transpose.
        kernel_size, stride: One per axis.
        groups: Number of groups.
    """

    module: nn.Module
    out_ch: int
    in_ch: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int

    @property
    def overlaps(self) -> bool:
        """Whether patches overlap: else the kernel is a matrix, without local minima."""
        return any(k > s for k, s in zip(self.kernel_size, self.stride, strict=True))

    def weight(self) -> Tensor:
        """The kernel ``[M, C/groups, *k]`` as it is now.

        Of a DTensor (as ``fully_shard`` leaves it) the whole kernel on every rank, which is a
        collective; its gradient goes back into the shards.
        """
        weight: Any = self.module.weight
        if _is_dtensor(weight):
            weight = weight.full_tensor()
        return weight[..., None] if isinstance(self.module, nn.Linear) else weight

    def assign(self, kernel: Tensor) -> None:
        """Write a kernel ``[M, C/groups, *k]`` into the layer's weight; rank 0's into a DTensor."""
        weight: Any = self.module.weight
        kernel = kernel.reshape(weight.shape).to(weight.dtype)
        if _is_dtensor(weight):
            from torch.distributed.tensor import distribute_tensor

            kernel = distribute_tensor(kernel, weight.device_mesh, weight.placements)
        weight.copy_(kernel)


def _is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor; never imports what nobody has imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def layer_kernel(module: nn.Module, name: str = "layer") -> LayerKernel:
    """The kernel of a convolution or linear layer.

    Raises:
        TypeError: another kind of module; a weight that is not real floating point.
        ValueError: a convolution of three axes; a lazy one that has not seen its input.
        NotImplementedError: dilation and stride both above 1 on an axis with more than one tap.
    """
    if isinstance(module, _UNCOVERED):
        raise ValueError(f"{name} must have one or two axes, got {type(module).__name__}")
    if not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        raise TypeError(f"{name} must be a convolution or nn.Linear, got {type(module).__name__}")
    weight = module.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name} is lazy: run it once, so that its weight has a shape")
    if not weight.is_floating_point():
        raise TypeError(f"{name} must have a real floating-point weight, got {weight.dtype}")
    if isinstance(module, nn.Linear):
        return LayerKernel(module, weight.shape[0], weight.shape[1], (1,), (1,), 1)
    kernel, stride = tuple(module.kernel_size), tuple(module.stride)
    for k, s, gap in zip(kernel, stride, module.dilation, strict=True):
        if k > 1 and s > 1 and gap > 1:
            raise NotImplementedError(
                f"{name} has stride {stride} and dilation {tuple(module.dilation)}: L_orth of "
                "dilated kernels is known for stride 1"
            )
    m = weight.shape[0] // module.groups
    return LayerKernel(module, m, weight.shape[1], kernel, stride, module.groups)


def is_exact(module: nn.Module) -> bool:
    """Whether the layer is orthogonal by construction, so that a penalty has nothing to do."""
    if getattr(module, "exactly_orthogonal", False):
        return True
    if not torch.nn.utils.parametrize.is_parametrized(module, "weight"):
        return False
    steps = module.parametrizations["weight"]  # pyrefly: ignore
    return bool(getattr(steps[-1], "exactly_orthogonal", False))

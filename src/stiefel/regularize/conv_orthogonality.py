"""Σ L_orth over the layers of a model: the penalty of arXiv 2108.05623, for any model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stiefel.linalg.conv_geometry import Case, conv_orth_case, orthogonal_conv_exists
from stiefel.linalg.conv_penalty import check_kernel, lorth, lorth_sigma_bounds, lorth_stack
from stiefel.regularize.layer_kernels import CONVOLUTIONS, LayerKernel, is_exact, layer_kernel

ON_INFEASIBLE = ("error", "warn", "skip")


class LayerReport(NamedTuple):
    """One line of :meth:`OrthogonalityPenalty.report`.

    Attributes:
        name: Of the module in the model.
        case: ``"RO"``, ``"CO"`` or ``"square"``.
        feasible: Whether an orthogonal kernel exists.
        value: L_orth now.
        sigma_low, sigma_high: Between them lie all singular values, at any image size.
    """

    name: str
    case: Case
    feasible: bool
    value: float
    sigma_low: float
    sigma_high: float


class OrthogonalityPenalty:
    """λ Σ L_orth(K), to be added to a loss; zero if and only if every layer is orthogonal.

    Convolutions of one and two axes, transposed ones, and (``dense``) ``nn.Linear``, for which it
    is ‖WWᵀ − I‖²_F on the smaller side. Layers of one shape are computed together. Layers that are
    orthogonal by construction are left out. λ trades accuracy for orthogonality: the paper goes
    from 1e-3 to 10.

    Padding does not enter. With circular padding L_orth = 0 makes the layer orthogonal; padded with
    zeros its singular values are at most 1, but those of the border are below.

    Weights that ranks share as DTensors (FSDP2) are gathered for it: all ranks must call, and each
    gets the whole value and the gradient of its own shard.

    Args:
        model: Where the layers are; weights are read at each call.
        lam: λ ≥ 0.
        dense: Include linear layers.
        include: Names of modules, or a function of ``(name, module)``; None takes all.
        on_infeasible: For layers whose numbers allow no orthogonal kernel: ``"error"``, ``"warn"``
            (and penalise them; the smallest value is above 0), ``"skip"``.

    Warns:
        UserWarning: M = C·∏S with overlapping patches, where optimisation may stop in a local
            minimum; infeasible layers under ``"warn"``.

    Raises:
        ValueError: λ negative or not finite, an unknown name in ``include``, an infeasible layer
            under ``"error"``, a convolution of three axes, no layer at all.
        TypeError: a weight is not real floating point.
        NotImplementedError: stride and dilation both above 1.
    """

    def __init__(
        self,
        model: nn.Module,
        lam: float | int = 0.1,
        dense: bool = True,
        include: Collection[str] | Callable[[str, nn.Module], bool] | None = None,
        on_infeasible: str = "error",
    ) -> None:
        if not 0 <= lam < float("inf"):
            raise ValueError(f"lam must be finite and at least 0, got {lam}")
        if on_infeasible not in ON_INFEASIBLE:
            raise ValueError(
                f"on_infeasible must be one of {', '.join(ON_INFEASIBLE)}, got {on_infeasible!r}"
            )
        self.lam = lam
        self.layers: dict[str, LayerKernel] = {}
        square = []
        for name, module in _chosen(model, dense, include).items():
            layer = layer_kernel(module, name)
            sizes = (layer.out_ch, layer.in_ch, layer.kernel_size, layer.stride)
            report = orthogonal_conv_exists(*sizes, dim=len(layer.stride))
            if not report:
                message = f"{name}: {report.reason}; the smallest L_orth is {report.minimum:g}"
                if on_infeasible == "error":
                    raise ValueError(message)
                if on_infeasible == "skip":
                    continue
                warnings.warn(message, UserWarning, stacklevel=2)
            if report.case == "square" and layer.overlaps:
                square.append(name)
            self.layers[name] = layer
        if not self.layers:
            raise ValueError("model has no layer for the penalty")
        if square:
            warnings.warn(
                f"M = C·∏S in {', '.join(square)}: optimisation may stop in a local minimum "
                "(stiefel.nn.OrthogonalConv2d is orthogonal by construction)",
                UserWarning,
                stacklevel=2,
            )

    def __call__(self) -> Float[Tensor, ""]:
        """λ Σ L_orth of the weights as they are, differentiable.

        Raises:
            ValueError: a weight holds NaN or infinities (not checked in compiled code).
        """
        stacks: dict[tuple, list[Tensor]] = {}
        for layer in self.layers.values():
            weight = layer.weight()
            kernels = weight.reshape(layer.groups, -1, *weight.shape[1:])
            key = (kernels.shape[1:], layer.stride, weight.dtype, weight.device)
            stacks.setdefault(key, []).append(kernels)
        parts = [lorth_stack(torch.cat(x), stride).sum() for (_, stride, *_), x in stacks.items()]
        total = self.lam * torch.stack([p.to(parts[0]) for p in parts]).sum()
        if not torch.compiler.is_compiling() and not bool(total.isfinite()):
            for name, layer in self.layers.items():
                check_kernel(layer.weight(), layer.groups, f"the weight of {name}")
        return total

    @torch.no_grad()
    def report(self) -> list[LayerReport]:
        """One line per layer: its case, L_orth, and the bounds on its singular values.

        Raises:
            ValueError: a weight holds NaN or infinities.
        """
        lines = []
        for name, layer in self.layers.items():
            weight, dim = layer.weight().double(), len(layer.stride)
            sizes = (layer.out_ch, layer.in_ch, layer.kernel_size, layer.stride)
            low, high = lorth_sigma_bounds(weight, layer.stride, layer.groups)
            lines.append(
                LayerReport(
                    name,
                    conv_orth_case(*sizes, dim=dim),
                    bool(orthogonal_conv_exists(*sizes, dim=dim)),
                    float(lorth(weight, layer.stride, layer.groups)),
                    float(low),
                    float(high),
                )
            )
        return lines


def _chosen(
    model: nn.Module,
    dense: bool,
    include: Collection[str] | Callable[[str, nn.Module], bool] | None,
) -> dict[str, nn.Module]:
    """The modules that the penalty is about, by name."""
    kinds = (*CONVOLUTIONS, nn.Conv3d, nn.ConvTranspose3d, *((nn.Linear,) if dense else ()))
    found = {n or "model": m for n, m in model.named_modules() if isinstance(m, kinds)}
    if callable(include):
        found = {n: m for n, m in found.items() if include(n, m)}
    elif include is not None:
        unknown = sorted(set(include) - set(found))
        if unknown:
            raise ValueError(
                f"include must name convolutions or linear layers of the model, got {unknown}"
            )
        found = {n: m for n, m in found.items() if n in include}
    return {n: m for n, m in found.items() if not is_exact(m)}

"""LoRA for any ``nn.Module``, with the scale of LeMON: W + α A B, α as it is and not α/r.

A plain linear map becomes :class:`LoRALinear`, which never forms the product A B. Where a fused
block of torch reads ``.weight`` itself (``nn.TransformerEncoderLayer``, ``nn.MultiheadAttention``),
replacing the layer would do nothing, in evaluation or at all; there the weight is parametrised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stiefel.nn.lemon.checks import check_count, check_number

# Blocks whose forward reads the weights of the linear maps inside.
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_FROZEN = "_frozen_by_lora"


class LowRank(nn.Module):
    """α A B with A ``[in, r]`` ~ N(0, 1/r) and B ``[r, out]`` = 0: exactly 0 at the start."""

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        rank: int,
        alpha: float | int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        outside, inside = weight.shape
        a = torch.randn(inside, rank, generator=generator) / math.sqrt(rank)
        self.A = nn.Parameter(a.to(device=weight.device, dtype=weight.dtype))
        self.B = nn.Parameter(weight.new_zeros(rank, outside))
        self.alpha = float(alpha)

    def delta(self) -> Float[Tensor, "out in"]:
        """What is added to a weight ``[out, in]``."""
        return self.alpha * (self.A @ self.B).mT

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """As a parametrisation: the weight with its update."""
        return weight + self.delta()


class LoRALinear(nn.Linear):
    """A linear map with a low-rank update, ``x Wᵀ + b + α (x A) B``; W and b are those given."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | int,
        generator: torch.Generator | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora = LowRank(linear.weight.detach(), rank, alpha, generator)
        self.train(linear.training)

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """``[..., in]`` to ``[..., out]``."""
        update = (input @ self.lora.A) @ self.lora.B
        return super().forward(input) + self.lora.alpha * update

    def merged(self) -> nn.Linear:
        """A plain linear map with the update added to W in place."""
        with torch.no_grad():
            self.weight += self.lora.delta()
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)


def lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float | int = 1.0,
    targets: str | Sequence[str] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[str, ...]:
    """Put adapters on linear maps of ``model`` in place and freeze every other weight.

    Args:
        model: Any module.
        rank: r, at least 1.
        alpha: Scale of the update, not divided by r.
        targets: Regular expressions searched for in the names of ``nn.Linear`` modules; all linear
            maps if None.
        generator: For A.

    Returns:
        Names of the adapted modules.

    Raises:
        TypeError, ValueError: rank or alpha out of range; a target that fits no linear map;
            adapters that are there already; a weight that two modules share.
    """
    check_count("rank", rank)
    check_number("alpha", alpha)
    if next(adapters(model), None) is not None:
        raise ValueError("model has adapters already; merge_lora(model) first")
    chosen = _targets(model, targets)
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, linear in chosen.items():
        if owners[id(linear.weight)] > 1:
            raise ValueError(
                f"the weight of {name!r} is shared with another module, an update would change "
                "both; choose targets without it"
            )
    frozen = [name for name, p in model.named_parameters() if p.requires_grad]
    object.__setattr__(model, _FROZEN, [model.get_parameter(name) for name in frozen])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, linear in chosen.items():
        if _reads_weight(model, name):
            update = LowRank(linear.weight.detach(), rank, alpha, generator)
            parametrize.register_parametrization(linear, "weight", update)
        else:
            _replace(model, name, LoRALinear(linear, rank, alpha, generator))
    return tuple(chosen)


def merge_lora(model: nn.Module) -> tuple[str, ...]:
    """Add every update to its weight, take the adapters out, train again what trained before.

    Returns:
        Names of the modules that had one.

    Raises:
        ValueError: there are no adapters.
    """
    found = dict(adapters(model))
    if not found:
        raise ValueError("model has no adapters of lora()")
    for name, module in found.items():
        if isinstance(module, LoRALinear):
            _replace(model, name, module.merged())
        else:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    for parameter in getattr(model, _FROZEN, list(model.parameters())):
        parameter.requires_grad_(True)
    if hasattr(model, _FROZEN):
        delattr(model, _FROZEN)
    return tuple(found)


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that carry an update of :func:`lora`, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module
        elif parametrize.is_parametrized(module, "weight"):
            chain: Any = module.parametrizations["weight"]  # pyrefly: ignore
            if any(isinstance(step, LowRank) for step in chain):
                yield name, module


def _targets(model: nn.Module, targets: str | Sequence[str] | None) -> dict[str, nn.Linear]:
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not linear:
        raise ValueError("model has no nn.Linear to put an adapter on")
    if targets is None:
        return linear
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen: dict[str, nn.Linear] = {}
    for pattern in patterns:
        found = {n: m for n, m in linear.items() if re.search(pattern, n)}
        if not found:
            some = ", ".join(list(linear)[:6])
            raise ValueError(f"target {pattern!r} fits no nn.Linear; there are {some}, …")
        chosen |= found
    if not chosen:
        raise ValueError("targets must name at least one nn.Linear, got an empty sequence")
    return {n: m for n, m in linear.items() if n in chosen}


def _reads_weight(model: nn.Module, name: str) -> bool:
    """Whether a block around this module uses its weight without calling it."""
    parts = name.split(".")
    return any(
        isinstance(model.get_submodule(".".join(parts[:i])), FUSED) for i in range(len(parts))
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)

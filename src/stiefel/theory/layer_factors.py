"""Gradient factors of the Linear layers of any module, caught by hooks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stiefel.theory.gradient_factors import Factors


class LayersError(ValueError):
    """The kernel is not a sum over calls of Linear layers with one row a sample."""


@dataclass(frozen=True)
class _Call:
    """One call of a Linear layer."""

    module: nn.Linear
    features: Tensor
    """``[samples, steps, n]``."""
    output: Tensor
    """As the layer gave it: what gradients are taken at."""


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter to the first name of the same parameter."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def layer_factors(
    model: nn.Module,
    state: Mapping[str, Tensor],
    x: Tensor,
    names: Sequence[str],
    readout: Callable[[Tensor], Tensor],
) -> list[Factors]:
    """Factors of the gradient with respect to weights and biases of Linear layers.

    A layer that is called several times (recurrence, sharing), or on sequences, has a step for
    each call and position. One backward pass an output, down to activations only. A last backward
    pass with random weights checks the factors against autograd's own gradient.

    Args:
        model: In the mode (train or eval) that it is to be measured in.
        state: Parameters and buffers to use in place of the model's.
        x: Its input, samples first.
        names: Parameters, by their first names.
        readout: Model output to ``[samples, ...]``.

    Raises:
        LayersError: a parameter is not of a Linear layer, a layer is not called with samples
            first, or the factors do not give the gradient: the parameter is used outside the
            layer's call, or samples of a batch influence one another.
    """
    layers = _linear_layers(model, names)
    leaves = {name: state[name].detach().requires_grad_() for name in names}
    calls: list[_Call] = []

    def catch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        features = inputs[0].detach()
        if features.ndim < 2 or features.shape[0] != len(x):
            raise LayersError(
                f"a Linear layer was given {tuple(features.shape)}, not {len(x)} samples first"
            )
        calls.append(_Call(module, features.reshape(len(x), -1, features.shape[-1]), output))  # pyrefly: ignore
        # In-place activations must not overwrite what gradients are taken at.
        return output.clone()

    handles = [layer.register_forward_hook(catch) for layer in layers]
    with torch.enable_grad():
        try:
            outputs = torch.func.functional_call(model, {**state, **leaves}, (x,))
        finally:
            for handle in handles:
                handle.remove()
        outputs = readout(outputs).flatten(1)
        if not calls:
            raise LayersError("no Linear layer with one of these parameters was called")
        factors, of_name = _collect(calls, _deltas(calls, outputs), layers, names)
        _check(outputs, leaves, of_name)
    return factors


def _linear_layers(model: nn.Module, names: Sequence[str]) -> dict[nn.Linear, dict[str, str]]:
    """Linear layers with a wanted parameter; of each, attribute (weight, bias) to name."""
    canonical, wanted = canonical_names(model), set(names)
    layers: dict[nn.Linear, dict[str, str]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            own = {
                key: canonical[f"{prefix}.{key}" if prefix else key]
                for key, _ in module.named_parameters(recurse=False)
            }
            own = {key: name for key, name in own.items() if name in wanted}
            if own:
                layers[module] = own
    missing = wanted - {name for own in layers.values() for name in own.values()}
    if missing:
        raise LayersError(f"not of a Linear layer: {', '.join(sorted(missing))}")
    return layers


def _deltas(calls: Sequence[_Call], outputs: Tensor) -> list[Tensor]:
    """Of each call ∂o[b, k]/∂(layer output) as ``[samples, outputs, steps, m]``."""
    samples, k = outputs.shape
    deltas = []
    for call in calls:
        m = call.output.shape[-1]
        deltas.append(call.output.new_zeros(samples, k, call.features.shape[1], m))
    targets = [call.output for call in calls]
    for unit in range(k):
        # Samples are independent: the sum's gradient holds each sample's own (checked later).
        gradients = torch.autograd.grad(
            outputs[:, unit].sum(), targets, retain_graph=True, allow_unused=True
        )
        for place, gradient in zip(deltas, gradients, strict=True):
            if gradient is not None:
                place[:, unit] = gradient.reshape(place[:, unit].shape)
    return deltas


def _collect(
    calls: Sequence[_Call],
    deltas: Sequence[Tensor],
    layers: Mapping[nn.Linear, Mapping[str, str]],
    names: Sequence[str],
) -> tuple[list[Factors], dict[str, Factors]]:
    """Factors to sum over, and the factors of each parameter alone."""
    parts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for index, call in enumerate(calls):
        ones = call.features.new_ones(*call.features.shape[:2], 1)
        for key, name in layers[call.module].items():
            parts[name].append((index, call.features if key == "weight" else ones))
    together: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in names:
        if name not in parts:
            raise LayersError(f"the layer of {name} was not called")
        together[tuple(index for index, _ in parts[name])].append(name)
    factors, of_name = [], {}
    for indices, members in together.items():
        joined = torch.cat([deltas[i] for i in indices], dim=2)
        features = [torch.cat([part for _, part in parts[name]], dim=1) for name in members]
        # A layer's weight and bias have the same deltas: one more feature that is always 1.
        factors.append(Factors(joined, torch.cat(features, dim=-1)))
        of_name |= {n: Factors(joined, f) for n, f in zip(members, features, strict=True)}
    return factors, of_name


def _check(outputs: Tensor, leaves: Mapping[str, Tensor], of_name: Mapping[str, Factors]) -> None:
    """Compare the gradient of a random sum of all outputs with autograd's."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    truth = torch.autograd.grad((weights * outputs).sum(), list(leaves.values()), allow_unused=True)
    tolerance = torch.finfo(outputs.dtype).eps ** 0.5
    for (name, leaf), gradient in zip(leaves.items(), truth, strict=True):
        factors = of_name[name]
        # [b, k] with [b, k, t, m] to [b t, m], then over the steps of all samples at once.
        summed = torch.einsum("bk,bktm->btm", weights, factors.deltas).flatten(0, 1)
        ours = (summed.mT @ factors.features.flatten(0, 1)).reshape(leaf.shape)
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        error = torch.linalg.vector_norm(ours - gradient)
        size = torch.linalg.vector_norm(gradient) + torch.linalg.vector_norm(ours)
        if not bool(error <= tolerance * size):
            raise LayersError(
                f"the gradient of {name} is not that of its Linear layer (off by "
                f"{float(error / size):.1e}): it is used elsewhere too, or samples of a batch "
                'influence one another; use method="jvp"'
            )

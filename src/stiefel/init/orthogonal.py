"""Random orthogonal and decoupled initial weights.

Saxe, McClelland and Ganguli, arXiv 1312.6120: with orthogonal layers every singular value of the
whole network is gain^D, so learning time does not grow with depth; with scaled Gaussian layers
lengths are kept on average only, and all but a few directions die out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stiefel.linalg.decoupled import decoupled_factors
from stiefel.linalg.gaussian_map import Activation, critical_gain
from stiefel.linalg.orthonormal_stack import orthonormal_stack

# Numbers that are drawn at one time: 64 MiB in float32.
_CHUNK = 1 << 24

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "linear",
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Softplus: "softplus",
    nn.Sigmoid: "sigmoid",
    nn.Softsign: "softsign",
    nn.Hardtanh: "hardtanh",
}
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, *_CONVOLUTIONS)


@runtime_checkable
class Modes(Protocol):
    """What :func:`decoupled_init_` needs of a task; ``stiefel.theory.task_modes`` makes it."""

    @property
    def U(self) -> Tensor:
        """Output side ``[N_out, modes]``, orthonormal columns, strongest first."""
        ...

    @property
    def V(self) -> Tensor:
        """Input side ``[N_in, modes]``, orthonormal columns."""
        ...


class _Slot:
    """Matrices ``[count, out, in]`` that live in one parameter, and the factor on them."""

    def __init__(self, parameter: Tensor, shape: tuple[int, int, int], gain: float, centre: int):
        self.parameter, self.shape, self.gain, self.centre = parameter, shape, gain, centre

    def write(self, stack: Tensor) -> None:
        """Put ``[count, out, in]`` in place; taps of a kernel other than the centre become 0."""
        count, rows, columns = self.shape
        taps = self.parameter.numel() // max(count * rows * columns, 1)
        if taps > 1:
            kernel = stack.new_zeros(count * rows, columns, taps)
            kernel[:, :, self.centre] = stack.reshape(count * rows, columns)
            stack = kernel
        whole = stack.reshape(self.parameter.shape)
        if _is_distributed(self.parameter):
            from torch.distributed.tensor import distribute_tensor

            # The QR of a shard is no shard of a QR: rank 0's whole matrix is cut and sent out.
            mesh = self.parameter.device_mesh  # pyrefly: ignore
            placements = self.parameter.placements  # pyrefly: ignore
            whole = distribute_tensor(whole.to(mesh.device_type), mesh, placements)
        self.parameter.copy_(whole)


def orthogonal_init_(
    module: nn.Module | Tensor | Iterable[Tensor],
    gain: float | int | str = "edge",
    haar: bool = True,
    *,
    phi: Activation | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module | Tensor | Iterable[Tensor]:
    """Set weights to random (semi-)orthogonal matrices times a gain, in place.

    All weights of one shape are made as one stack, by reflections: about twice as fast as
    ``torch.nn.init.orthogonal_`` on each, and as accurate.

    Args:
        module: A module, with all modules in it; or a weight ``[out, in]``, a stack of weights
            ``[..., out, in]``, or several of either. In modules:

            - ``Linear``, ``Bilinear``: the whole weight (of ``Bilinear`` each slice);
            - convolutions: the tap in the centre is orthogonal and all others are 0
              ("delta-orthogonal"), for each group; a convolution with stride 1 then keeps lengths;
            - ``RNN``, ``LSTM``, ``GRU``: each gate's block of every weight;
            - ``MultiheadAttention``: query, key and value each.

            Their biases become 0. Embeddings, normalisations and parameters that a module holds
            itself are left alone; a parameter in two modules is set once.
        gain: Singular value of every matrix, > 0, or ``"edge"``: the edge of chaos of the
            activation (:func:`critical_gain`). Slightly above it also works for tanh (1 to 1.1).
        haar: Draw from the uniform distribution. False leaves the signs of LAPACK's QR.
        phi: The activation that ``"edge"`` is for: a name, a module or a function. Where None it is
            the one kind of activation module found in ``module``; without any, linear. Recurrent
            modules know their own.
        generator: Of the numbers. The default one of the weight's device if None; for DTensors
            always on the CPU.

    Returns:
        ``module``, as it came.

    Rectangular weights are isometries from their narrow side only. DTensors are initialised whole
    and then distributed, from rank 0: every process must call this.

    Raises:
        ValueError: a gain that is not positive and finite, activations of several kinds (pass
            ``phi``), an activation without an edge of chaos, a tensor with fewer than two
            dimensions, nothing to initialise, lazy weights without a shape yet.
        TypeError: weights that are not real floating point.

    Source: arXiv 1312.6120, sections 3 and 4. Convolutions: Xiao et al., arXiv 1806.05393.
    """
    if isinstance(gain, str) and gain != "edge":
        raise ValueError(f"gain must be a number or 'edge', got {gain!r}")
    if not isinstance(gain, str) and not (gain > 0 and math.isfinite(gain)):
        raise ValueError(f"gain must be positive and finite, got {gain}")
    if isinstance(module, nn.Module):
        slots = _slots_of_module(module, gain, phi)
    else:
        tensors = [module] if isinstance(module, Tensor) else list(module)
        if not isinstance(module, Tensor):
            module = tensors  # an iterator would come back empty
        factor = critical_gain(phi or "linear") if isinstance(gain, str) else float(gain)
        slots = [_Slot(t, _stack_shape(t), factor, 0) for t in tensors]
    if not slots:
        raise ValueError(
            "there is nothing to initialise: no linear, convolutional or recurrent "
            "layer, and no tensor, was given"
        )
    groups: dict[tuple, list[_Slot]] = {}
    for slot in slots:
        weight = slot.parameter
        if not weight.is_floating_point():
            raise TypeError(f"weights must be real floating point, got {weight.dtype}")
        device = torch.device("cpu") if _is_distributed(weight) else weight.device
        key = (*slot.shape[1:], weight.dtype, device, slot.gain)
        groups.setdefault(key, []).append(slot)
    with torch.no_grad():
        for (rows, columns, dtype, device, factor), members in groups.items():
            place = device if generator is None else generator.device
            options = {"generator": generator, "dtype": dtype, "device": place}
            for batch in _batches(members, rows * columns):
                counts = [slot.shape[0] for slot in batch]
                stack = orthonormal_stack(sum(counts), rows, columns, haar=haar, **options)
                stack = stack.mul_(factor).to(device)
                for slot, part in zip(batch, stack.split(counts), strict=True):
                    slot.write(part)
    return module


def decoupled_init_(
    layers: Sequence[nn.Linear],
    modes: Modes,
    u0: float | int | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Sequence[nn.Linear]:
    """Start a deep linear network with every mode of a task at strength ``u0``, apart from others.

    W_l = R_{l+1} · diag(u0^{1/D}) · R_lᵀ: the input and output sides are those of the task, the
    bases between them random. Each mode then follows ``stiefel.theory.mode_curve`` as the
    learning rate goes to 0. It depends on the data, unlike :func:`orthogonal_init_`.

    Args:
        layers: The D linear layers in order; their biases become 0. Hidden widths may differ; the
            smallest one bounds the number of modes that exist (those beyond stay at 0).
        modes: U and V of the task, as ``stiefel.theory.task_modes`` gives them. Feed the network
            ``modes.transform(x)`` where the task was whitened.
        u0: Strength of all modes, or one for each ``[modes]``, > 0.
        generator: Of the random bases.

    Returns:
        ``layers``.

    Raises:
        ValueError: no layers, widths that do not fit one another or the task, u0 ≤ 0 or not finite.

    Source: arXiv 1312.6120, section 1.1 and the appendix on decoupled initial conditions.
    """
    if not layers:
        raise ValueError("layers must hold at least one linear layer")
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    for k, layer in enumerate(layers):
        if layer.in_features != widths[k]:
            raise ValueError(
                f"layer {k} takes {layer.in_features} inputs, but the one before gives {widths[k]}"
            )
    if (widths[0], widths[-1]) != (modes.V.shape[0], modes.U.shape[0]):
        raise ValueError(
            f"the layers go from {widths[0]} to {widths[-1]} neurons, the task from "
            f"{modes.V.shape[0]} inputs to {modes.U.shape[0]} outputs"
        )
    start = torch.as_tensor(u0, dtype=torch.float64)
    if not bool((start.isfinite() & (start > 0)).all()):
        raise ValueError(f"u0 must be positive and finite, got {u0}")
    if start.ndim and start.shape != (modes.U.shape[1],):
        raise ValueError(
            f"u0 must be a number or one for each of the {modes.U.shape[1]} modes, "
            f"got shape {tuple(start.shape)}"
        )
    left, right = modes.U.detach().double(), modes.V.detach().double()
    factors = decoupled_factors(
        left, right, widths[1:-1], start.to(left.device) ** (1 / len(layers)), generator=generator
    )
    with torch.no_grad():
        for layer, factor in zip(layers, factors, strict=True):
            layer.weight.copy_(factor[0])
            if layer.bias is not None:
                layer.bias.zero_()
    return layers


def _slots_of_module(
    module: nn.Module, gain: float | int | str, phi: Activation | None
) -> list[_Slot]:
    slots: list[_Slot] = []
    seen: set[int] = set()
    shared = None  # of all layers but recurrent ones; looked for when the first needs it
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            own = (
                (layer.nonlinearity if isinstance(layer, nn.RNN) else "tanh")
                if phi is None
                else phi
            )
            factor = critical_gain(own) if isinstance(gain, str) else float(gain)
        elif isinstance(layer, _LAYERS):
            if shared is None:
                shared = _edge(module, phi) if isinstance(gain, str) else float(gain)
            factor = shared
        else:
            continue
        for parameter, shape, centre in _weights(layer):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            slots.append(_Slot(parameter, shape, factor, centre))
        for name, parameter in layer.named_parameters(recurse=False):
            if "bias" in name:
                with torch.no_grad():
                    parameter.zero_()
    return slots


def _weights(layer: nn.Module) -> list[tuple[Tensor, tuple[int, int, int], int]]:
    """Weights of one layer as stacks of matrices, with the index of a kernel's centre."""
    found: list[tuple[Tensor, tuple[int, int, int], int]] = []
    for name, parameter in layer.named_parameters(recurse=False):
        if "weight" not in name:
            continue
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{type(layer).__name__} has no shape yet: run the model once first")
        rows, columns = parameter.shape[:2]
        if isinstance(layer, nn.RNNBase):
            gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
            # The projection of an LSTM is one matrix without gates.
            gates = 1 if "weight_hr" in name else gates
            found.append((parameter, (gates, rows // gates, columns), 0))
        elif name == "in_proj_weight":
            found.append((parameter, (3, rows // 3, columns), 0))
        elif isinstance(layer, nn.Bilinear):
            found.append((parameter, (rows, columns, parameter.shape[2]), 0))
        elif isinstance(layer, _CONVOLUTIONS):
            groups = layer.groups
            centre = 0
            for size in parameter.shape[2:]:
                centre = centre * size + size // 2
            found.append((parameter, (groups, rows // groups, columns), centre))
        else:
            found.append((parameter, (1, rows, columns), 0))
    return found


def _edge(module: nn.Module, phi: Activation | None) -> float:
    """Critical gain of ``phi``, or of the one activation that is found in the module."""
    if phi is not None:
        return critical_gain(phi)
    kinds: dict[str, nn.Module] = {}
    for layer in module.modules():
        if type(layer) in _ACTIVATIONS and not isinstance(layer, nn.Identity):
            kinds.setdefault(_ACTIVATIONS[type(layer)], layer)
    if len(kinds) > 1:
        raise ValueError(
            f"activations of several kinds were found ({', '.join(sorted(kinds))}): "
            "pass phi, or a number as gain"
        )
    # The module itself: a leaky ReLU has its own slope.
    return critical_gain(next(iter(kinds.values())) if kinds else "linear")


def _is_distributed(tensor: Tensor) -> bool:
    """Whether this is a DTensor, without importing what defines it: that takes long."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def _stack_shape(tensor: Tensor) -> tuple[int, int, int]:
    if tensor.ndim < 2:
        raise ValueError(f"weights must be [..., out, in], got shape {tuple(tensor.shape)}")
    rows, columns = tensor.shape[-2:]
    return (math.prod(tensor.shape[:-2]), rows, columns)


def _batches(slots: list[_Slot], size: int) -> Iterable[list[_Slot]]:
    """Slots together as long as their matrices fit into one chunk; at least one at a time."""
    batch, used = [], 0
    for slot in slots:
        need = slot.shape[0] * size
        if batch and used + need > _CHUNK:
            yield batch
            batch, used = [], 0
        batch.append(slot)
        used += need
    if batch:
        yield batch

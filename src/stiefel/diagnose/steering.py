"""Adding a vector to a module's activations, and collecting what a concept changes in them.

Works on any ``nn.Module`` whose input or output is ``[batch, sequence, d]``, or a tuple that begins
with it, as transformer blocks return.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stiefel.linalg._checks import check_finite, check_floating

if TYPE_CHECKING:
    from stiefel.diagnose.cylinder import ConceptCylinder

NAMED = ("all", "prompt", "last", "generated")
SITES = ("input", "output")


class steer(contextlib.AbstractContextManager):
    """Add ``scale · vector`` to the activations of ``module`` while the ``with`` block runs.

    Nothing is changed in place, gradients flow to the activations and to the vector, and the hook
    goes when the block is left, by an exception too.

    With a key-value cache a model is first called with the prompt, then once for every token that
    it generates. A call with one position that is not the first in the block counts as such a step.

    Args:
        module: A block, or any module that takes or gives ``[batch, sequence, d]``.
        vector: ``[d]``, or ``[batch, d]`` with one for each row.
        positions: ``"all"``: every position of every call. ``"prompt"``: every position of the
            prompt. ``"last"``: the last position of the prompt that is not padding.
            ``"generated"``: only the steps after the prompt. A slice: these of the prompt.
        scale: Factor of the vector.
        site: Add to the module's output or to its input.
        mask: ``[batch, sequence]`` of the prompt, not 0 where a token is not padding. Padding is
            left alone; needed for ``"last"`` under right padding.

    Raises:
        TypeError: vector or mask of a wrong kind.
        ValueError: an unknown position or site, NaN or infinite numbers. When the module is called:
            shapes that do not fit, a row of padding only, a vector that overflows the activations'
            dtype, or activations that are not found.
        RuntimeError: entered twice at once.
    """

    def __init__(
        self,
        module: nn.Module,
        vector: Tensor,
        positions: str | slice = "all",
        scale: float | int = 1.0,
        *,
        site: str = "output",
        mask: Tensor | None = None,
    ) -> None:
        check_floating(vector, "vector")
        check_finite(vector, "vector")
        if vector.ndim not in (1, 2):
            raise ValueError(f"vector must be [d] or [batch, d], got shape {tuple(vector.shape)}")
        if not isinstance(positions, slice) and positions not in NAMED:
            raise ValueError(
                f"positions must be one of {', '.join(NAMED)} or a slice, got {positions!r}"
            )
        if site not in SITES:
            raise ValueError(f"site must be input or output, got {site!r}")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise TypeError("mask must be a tensor [batch, sequence]")
        self.module, self.vector, self.positions = module, vector, positions
        self.scale, self.site, self.mask = scale, site, mask
        self._handle: Any = None
        self._called = False

    def __enter__(self) -> steer:
        if self._handle is not None:
            raise RuntimeError("this steering is already on; make another for a second one")
        self._called = False
        self._handle = _hook(self.module, self.site, self._add)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.remove()
        self._handle = None

    def _add(self, hidden: Tensor) -> Tensor:
        vector = self._delta(hidden)
        if hidden.ndim != 3:
            if self.positions != "all" or self.mask is not None or vector.ndim != 1:
                raise ValueError(
                    f"activations of shape {tuple(hidden.shape)} have no positions: only "
                    "positions='all' with one vector, without a mask, can steer them"
                )
            return hidden + vector
        if vector.ndim == 2:
            if len(vector) != len(hidden):
                raise ValueError(
                    f"there are {len(vector)} vectors for a batch of {len(hidden)}; give one, "
                    "or one a row"
                )
            vector = vector[:, None]
        step = self._called and hidden.shape[1] == 1
        self._called = True
        if step or self.positions == "generated":
            steered = step and self.positions in ("all", "generated")
            return hidden + vector if steered else hidden
        chosen = self._chosen(hidden)
        return hidden + vector if chosen is None else torch.where(chosen, hidden + vector, hidden)

    def _delta(self, hidden: Tensor) -> Tensor:
        if not hidden.is_floating_point() or hidden.shape[-1] != self.vector.shape[-1]:
            raise ValueError(
                f"the vector has width {self.vector.shape[-1]}, the activations are "
                f"{hidden.dtype} of shape {tuple(hidden.shape)}"
            )
        vector = (self.scale * self.vector).to(device=hidden.device, dtype=hidden.dtype)
        check_finite(vector, f"the vector in {hidden.dtype}")
        return vector

    def _chosen(self, hidden: Tensor) -> Tensor | None:
        """``[batch or 1, sequence, 1]`` of a prompt; None for all positions."""
        batch, length = hidden.shape[:2]
        at = torch.arange(length, device=hidden.device)
        real = None
        if self.mask is not None:
            real = self.mask.to(hidden.device) != 0
            if real.shape != (batch, length):
                raise ValueError(
                    f"mask is {tuple(real.shape)}, the activations have batch and sequence "
                    f"{(batch, length)}"
                )
        if self.positions == "last":
            if real is None:
                return (at == length - 1)[None, :, None]
            if not bool(real.any(1).all()):
                raise ValueError("mask has a row without a token: it has no last position")
            last = torch.where(real, at, -1).amax(1, keepdim=True)
            return (at == last)[..., None]
        if isinstance(self.positions, slice):
            inside = torch.zeros(length, dtype=torch.bool, device=hidden.device)
            inside[self.positions] = True
            return (inside if real is None else inside & real)[..., None]
        return None if real is None else real[..., None]


class Steering:
    """A cylinder at the module that it was measured at: steer along the axis, a plane, a sector.

    Each method returns a context manager (:class:`steer`); strengths are in units of ‖a‖, the
    length of the mean difference.

    >>> import torch
    >>> from stiefel.diagnose.cylinder import ConceptCylinder, Steering
    >>> block, g = torch.nn.Linear(8, 8), torch.Generator().manual_seed(0)
    >>> cylinder = ConceptCylinder().fit(torch.randn(20, 8, generator=g) + 1)
    >>> with Steering(block, cylinder, positions="last").sector(1.5, 1.0, phi=0.8):
    ...     out = block(torch.randn(2, 5, 8))

    Args:
        module: Where the activations were taken.
        cylinder: Fitted on differences of these activations.
        positions, site, mask: As in :class:`steer`.
    """

    def __init__(
        self,
        module: nn.Module,
        cylinder: ConceptCylinder,
        *,
        positions: str | slice = "all",
        site: str = "output",
        mask: Tensor | None = None,
    ) -> None:
        self.module, self.cylinder = module, cylinder
        self.positions, self.site, self.mask = positions, site, mask

    def axis(self, strength: float | int = 1.0) -> steer:
        """Add strength · a."""
        return self._steer(self.cylinder.compose(strength * self.cylinder.axis_norm_, 0.0, 0.0))

    def plane(self, d: Tensor, strength: float | int = 1.0, penalty: float | int = 0.0) -> steer:
        """Add the penalised vector of sample(s) d, ``[d]`` or ``[batch, d]``, at this length."""
        length = strength * self.cylinder.axis_norm_
        return self._steer(self.cylinder.steering_vector(d, length, penalty))

    def sector(
        self, axis_strength: float | int = 1.5, radius: float | int = 1.0, *, phi: float | int
    ) -> steer:
        """Add axis_strength · a and radius · ‖a‖ at the angle phi (radians) of the plane."""
        norm = self.cylinder.axis_norm_
        return self._steer(self.cylinder.compose(axis_strength * norm, radius * norm, phi))

    def _steer(self, vector: Tensor) -> steer:
        return steer(self.module, vector, self.positions, site=self.site, mask=self.mask)


def concept_differences(
    model: nn.Module,
    encode: Callable[[str], Any],
    pairs: Sequence[tuple[str, str]],
    *,
    layer: nn.Module | str | int,
    position: int = -1,
    site: str = "output",
) -> Float[Tensor, "n d"]:
    """What a concept adds to the residual stream: activation with it minus activation without.

    Args:
        model: Called without gradients, in evaluation mode, on one text at a time.
        encode: Text to the model's input: a tensor, a tuple of arguments or a mapping of keywords.
        pairs: (text without the concept, text with it).
        layer: The module to look at, its name in ``model``, or the number of a block in the model's
            longest ``nn.ModuleList``.
        position: Of the token whose activation counts; -1 for the last.
        site: The module's output or input. The authors take the output and steer the input.

    Returns:
        One difference a pair, float32 or wider, on the model's device.

    Raises:
        ValueError: no pairs, an unknown layer or site, a text shorter than ``position``, an
            activation that is NaN or infinite, or a batch other than one text.
    """
    if not pairs:
        raise ValueError("pairs is empty")
    if site not in SITES:
        raise ValueError(f"site must be input or output, got {site!r}")
    module = _module(model, layer)
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> None:
        if (
            hidden.ndim != 3
            or len(hidden) != 1
            or not -hidden.shape[1] <= position < hidden.shape[1]
        ):
            raise ValueError(
                f"position {position} of one text is wanted, the activations have shape "
                f"{tuple(hidden.shape)}"
            )
        check_finite(hidden[0, position], "the activation")
        wide = torch.promote_types(hidden.dtype, torch.float32)
        seen.append(hidden[0, position].detach().to(wide))

    handle = _hook(module, site, keep)
    try:
        with _evaluating(model), torch.no_grad():
            for pair in pairs:
                for text in pair:
                    _call(model, encode(text))
    finally:
        handle.remove()
    if len(seen) != 2 * len(pairs):
        raise ValueError(
            f"layer ran {len(seen)} times for {2 * len(pairs)} texts; it must run once"
        )
    activations = torch.stack(seen)
    return activations[1::2] - activations[0::2]


def _module(model: nn.Module, layer: nn.Module | str | int) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    if isinstance(layer, str):
        named = dict(model.named_modules())
        if layer not in named:
            raise ValueError(f"the model has no module {layer!r}")
        return named[layer]
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    blocks = max(lists, key=len, default=nn.ModuleList())
    if not -len(blocks) <= layer < len(blocks):
        raise ValueError(f"the model's longest list of blocks has {len(blocks)}, got layer {layer}")
    return blocks[layer]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, tuple):
        model(*inputs)
    else:
        model(inputs)


def _hook(module: nn.Module, site: str, change: Callable[[Tensor], Tensor | None]) -> Any:
    """Pass the activations at ``site`` through ``change``; None leaves them. Returns the handle."""

    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        hidden, rebuild = _first(output)
        changed = change(hidden)
        return None if changed is None else rebuild(changed)

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            changed = change(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
        name = "hidden_states" if isinstance(kwargs.get("hidden_states"), Tensor) else name
        if name is None:
            raise ValueError("the module was called without a tensor: there is nothing to steer")
        changed = change(kwargs[name])
        return None if changed is None else (args, {**kwargs, name: changed})

    if site == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


def _first(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The activations at the head of a block's output, and how to put others there."""
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        if hasattr(output, "_fields"):  # a named tuple
            return output[0], lambda hidden: type(output)(hidden, *output[1:])
        return output[0], lambda hidden: type(output)([hidden, *output[1:]])
    if isinstance(output, Mapping):
        name = next((name for name, value in output.items() if isinstance(value, Tensor)), None)
        if name is not None:
            return output[name], lambda hidden: type(output)(**{**output, name: hidden})
    raise ValueError(
        f"the module returned {type(output).__name__}, not a tensor or a tuple that begins with one"
    )

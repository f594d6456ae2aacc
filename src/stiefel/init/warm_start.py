"""Shrink and perturb: start the next training from old weights, made small and a little noisy.

Jordan T. Ash and Ryan P. Adams, "On Warm-Starting Neural Network Training", arXiv 1910.08475.
Before each round of training every learnable tensor becomes θ ← λ θ + p. In the paper p is
Gaussian of one size; in the authors' code, and by default here, it is a fraction of a fresh
initialisation, so that every tensor gets noise on the scale of its own initialiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stiefel.init.shrink_perturb_noise import (
    EXACT,
    SMALL_CPU,
    Law,
    Together,
    blend_,
    blend_law_,
    drawn,
    initial_laws,
    pieces,
    seed_from,
    whole_draw,
)
from stiefel.init.shrink_perturb_state import (
    PERTURB,
    SHRINK,
    check_mixture,
    check_same_entries,
)

BUFFER_RULES = ("reset", "keep", "lerp")
NOISES = ("init", "gaussian")
PLAIN = (nn.Parameter, Tensor)

M = TypeVar("M", bound=nn.Module)
Names = str | Iterable[str] | Callable[[str, Tensor], bool]


@torch.no_grad()
def shrink_perturb_(
    module: M,
    shrink: float | int = SHRINK,
    perturb: float | int = PERTURB,
    *,
    noise: str = "init",
    fresh: nn.Module | Callable[[], nn.Module] | None = None,
    generator: torch.Generator | None = None,
    include: Names | None = None,
    exclude: Names | None = None,
    buffers: str = "reset",
    optimizer: torch.optim.Optimizer | None = None,
) -> M:
    """θ ← shrink · θ + perturb · noise for every parameter of ``module``, in place.

    Parameters keep their identity, so optimizers and wrappers stay attached. A tied parameter is
    mixed once. ``shrink=0`` copies the noise, NaN or not; ``(1, 0)`` changes nothing at all.

    No second model is made: noise is drawn in pieces of 65,536 numbers, for a layer that is not
    initialised by one plain draw a tensor a layer at a time (:mod:`.shrink_perturb_noise`).

    On every rank of a distributed run call it with generators seeded alike: this is checked for
    modules in ``DistributedDataParallel`` and for DTensor parameters. A sharded parameter gets
    the same noise as it would unsharded, whatever the mesh, drawn one parameter at a time.

    Args:
        module: Its parameters are real or complex floating point.
        shrink: λ, in [0, 1].
        perturb: Factor of the noise; with ``noise="gaussian"`` its standard deviation σ.
        noise: ``"init"``: a fresh initialisation, by each layer's own ``reset_parameters`` or
            taken from ``fresh``. ``"gaussian"``: standard normal, the paper's form.
        fresh: A newly made network of the same shapes, or a function that makes one (then it is
            held for the time of the call).
        generator: Of the noise; on any device. None: torch's global ones.
        include: Parameters to mix: a name, names, glob patterns (``"head.*"``) or a function of
            name and parameter. None: all with ``requires_grad``. Frozen ones only if named here.
        exclude: Parameters to leave alone, in the same forms.
        buffers: Normalisation statistics measured on the old weights do not fit the shrunk ones.
            ``"reset"``: statistics start anew (from ``fresh``: all buffers are its). ``"keep"``.
            ``"lerp"``: shrink · old + (1 − shrink) · new for floating-point ones. Buffers of
            layers with no mixed parameter and no statistics stay.
        optimizer: Its state of the mixed parameters (momenta, moments, step counts) is dropped,
            with their gradients, as both belong to the old weights. Rates and groups stay.

    Returns:
        ``module``.

    Raises:
        ValueError: ``shrink`` outside [0, 1], ``perturb`` negative or not finite, an unknown
            word, a pattern that matches nothing, nothing to mix, ``fresh`` with other names or
            shapes or sharing tensors, an optimizer of other parameters, ranks that differ.
        TypeError: integer parameters, or a module that owns parameters and cannot reset them.

    Source: arXiv 1910.08475, section 4; the form of noise is that of the authors' code.
    """
    check_mixture(shrink, perturb)
    _check_word("noise", noise, NOISES)
    _check_word("buffers", buffers, BUFFER_RULES)
    if fresh is not None and noise == "gaussian":
        raise ValueError("fresh gives the noise of noise='init'; noise='gaussian' needs none")
    known, buffers_there = _entries(module)
    chosen = _chosen(module, known, include, exclude)
    if optimizer is not None:
        _check_owner(optimizer, chosen)
    network = None if fresh is None else _fresh_network(known, buffers_there, fresh)
    sources: dict[int, Law | nn.Module] = {}
    if network is None and noise == "gaussian":
        sources = {id(p): Law("normal", 0.0, 1.0) for p in chosen.values()}
    elif network is None and perturb != 0:
        sources |= initial_laws(module, {id(p): name for name, p in chosen.items()})
    if network is None and perturb != 0:
        _check_ranks(module, chosen, generator)

    if (shrink, perturb) != (1, 0):
        if network is None or perturb == 0:
            _mix(chosen, sources, float(shrink), float(perturb), _Generators(generator))
        else:
            _mix_network(chosen, network.parameters, float(shrink), float(perturb))
        if buffers != "keep":
            _renew_buffers(module, network, float(shrink) if buffers == "lerp" else 0.0)
    if optimizer is not None:
        for p in chosen.values():
            optimizer.state.pop(p, None)
            p.grad = None
    return module


def _check_word(name: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {word!r}")


def _matcher(argument: str, names: Names, known: Iterable[str]) -> Callable[[str, Tensor], bool]:
    if callable(names):
        return names  # pyrefly: ignore
    patterns = [names] if isinstance(names, str) else list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"{argument} has {pattern!r}, which matches no parameter")
    return lambda name, _: any(fnmatchcase(name, pattern) for pattern in patterns)


def _chosen(
    module: nn.Module,
    known: dict[str, nn.Parameter],
    include: Names | None,
    exclude: Names | None,
) -> dict[str, nn.Parameter]:
    """The parameters to mix, each once, by their first name."""
    if not known:
        raise ValueError(f"{type(module).__name__} has no parameters to shrink")
    included = excluded = None
    if include is not None:
        included = _matcher("include", include, known)
    if exclude is not None:
        excluded = _matcher("exclude", exclude, known)
    # A tied parameter has several names: any of them may be meant.
    left_out = {id(p) for name, p in known.items() if excluded and excluded(name, p)}
    chosen: dict[int, tuple[str, nn.Parameter]] = {}
    for name, p in known.items():
        if id(p) in left_out or id(p) in chosen:
            continue
        if included is not None and not included(name, p):
            continue
        if nn.parameter.is_lazy(p):
            raise ValueError(f"{name} is not initialised yet: run the lazy module once")
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(f"{name} is {p.dtype}; only floating point can be shrunk: exclude it")
        if p.requires_grad or included is not None:
            chosen[id(p)] = (name, p)
    if not chosen:
        raise ValueError("there is nothing to shrink: every parameter is frozen or left out")
    if included is not None:  # perhaps found by a later name of a tied one
        first_names = {id(p): name for name, p in reversed(known.items())}
        return {first_names[key]: p for key, (_, p) in chosen.items()}
    return dict(chosen.values())


def _check_owner(optimizer: torch.optim.Optimizer, chosen: Mapping[str, nn.Parameter]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in chosen.values()):
        raise ValueError("optimizer holds none of the parameters that are mixed")


def _entries(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters by all of their names and buffers by their first, in one walk."""
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    for path, m in module.named_modules(remove_duplicate=False):
        prefix = path + "." if path else ""
        for name, p in m._parameters.items():
            if p is not None:
                parameters[prefix + name] = p
        for name, b in m._buffers.items():
            if b is not None:
                buffers[prefix + name] = b
    if buffers:
        first = {id(b): name for name, b in reversed(buffers.items())}
        buffers = {name: b for name, b in buffers.items() if first[id(b)] == name}
    return parameters, buffers


class _Network(NamedTuple):
    """What a fresh network holds, by name, and the buffers that it renews."""

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    old_buffers: dict[str, Tensor]


def _fresh_network(
    known: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    fresh: nn.Module | Callable[[], nn.Module],
) -> _Network:
    """The network to take noise from, checked against the entries of the module."""
    network = fresh if isinstance(fresh, nn.Module) else fresh()
    if not isinstance(network, nn.Module):
        raise TypeError(f"fresh must be or make an nn.Module, got {type(network).__name__}")
    theirs, new = _entries(network)
    check_same_entries(known, theirs)
    check_same_entries(buffers, new)
    # The memory of nothing, at 0, may be shared.
    held = {_local(p).data_ptr() for p in theirs.values()} - {0}
    for name, p in known.items():
        if _local(p).data_ptr() in held:
            raise ValueError(f"fresh shares {name} with module: it must be a new network")
    return _Network(theirs, new, buffers)


class _Generators:
    """One generator a device, all seeded by the one that was given."""

    def __init__(self, given: torch.Generator | None) -> None:
        self.given = given
        self._others: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator | None:
        if self.given is None or self.given.device.type == device.type:
            return self.given
        if device not in self._others:
            self._others[device] = torch.Generator(device).manual_seed(seed_from(self.given))
        return self._others[device]


def _mix(
    chosen: Mapping[str, nn.Parameter],
    sources: dict[int, Law | nn.Module],
    shrink: float,
    perturb: float,
    generators: _Generators,
) -> None:
    rooms: dict[tuple[Any, ...], Tensor] = {}
    # First what its module draws: if that goes wrong nothing is mixed yet.
    for p in sorted(chosen.values(), key=lambda p: not isinstance(sources.get(id(p)), nn.Module)):
        if perturb and id(p) not in sources:
            continue  # mixed with its module
        source = sources.pop(id(p)) if perturb else None
        x = p.detach()
        if source is None:
            blend_(_local(x), _local(x), shrink, 0.0)
        elif isinstance(source, Law):
            generator = generators.on(x.device)
            if _is_sharded(x):
                blend_(_local(x), _shard(whole_draw(x, source, generator), x), shrink, perturb)
            else:
                blend_law_(x, source, shrink, perturb, generator, rooms)
        else:
            _mix_module(p, source, chosen, sources, shrink, perturb, generators)


def _mix_network(
    chosen: Mapping[str, nn.Parameter],
    fresh: Mapping[str, Tensor],
    shrink: float,
    perturb: float,
) -> None:
    """x ← shrink · x + perturb · fresh; small ones together, large ones in pieces."""
    together: dict[tuple[Any, ...], Together] = {}
    for name, p in chosen.items():
        x, other = _local(p), fresh[name]
        other = _shard(other, p) if x is not p else _local(other)
        device, dtype = x.device, x.dtype
        alike = dtype is other.dtype and device == other.device
        if alike and dtype in EXACT and (x.numel() <= SMALL_CPU or device.type != "cpu"):
            kind = together.get((device, dtype))
            if kind is None:
                kind = together[device, dtype] = Together(shrink, perturb)
            kind.add(x, other)
        elif alike and x.stride() == other.stride():
            for ours, theirs in zip(pieces(x.detach()), pieces(other.detach()), strict=True):
                blend_(ours, theirs, shrink, perturb)
        else:
            blend_(x, other.to(x.device), shrink, perturb)
    for kind in together.values():
        kind.mix()


def _mix_module(
    first: nn.Parameter,
    owner: nn.Module,
    chosen: Mapping[str, nn.Parameter],
    sources: dict[int, Law | nn.Module],
    shrink: float,
    perturb: float,
    generators: _Generators,
) -> None:
    """All that one module has to draw itself: ``first``, and what still waits in ``sources``."""
    values = drawn(owner, generators.on(first.device))
    names = {id(p): name for name, p in chosen.items()}
    waiting = [p for p in owner.parameters() if p is first or sources.get(id(p)) is owner]
    for p in waiting:
        if bool(values[id(p)].isnan().any()):
            raise ValueError(
                f"reset_parameters of {type(owner).__name__} leaves entries of {names[id(p)]} "
                "unset or NaN"
            )
    for p in waiting:
        sources.pop(id(p), None)
        x, value = p.detach(), values.pop(id(p))
        blend_(_local(x), _shard(value, x) if _is_sharded(x) else value, shrink, perturb)


def _renew_buffers(module: nn.Module, network: _Network | None, old: float) -> None:
    """Buffers become ``old`` · themselves + (1 − old) · new; integers are taken over as new."""
    if network is not None:
        for name, b in network.old_buffers.items():
            _renew(b, network.buffers[name], old)
        return
    for m in module.modules():
        if callable(getattr(m, "reset_running_stats", None)):
            before = {name: b.clone() for name, b in m._buffers.items() if b is not None}
            m.reset_running_stats()  # pyrefly: ignore
            for name, kept in (before if old else {}).items():
                b = m._buffers[name]
                if b is not None and b.is_floating_point():
                    b.mul_(1 - old).add_(kept, alpha=old)


def _renew(buffer: Tensor, fresh: Tensor, old: float) -> None:
    if old and buffer.is_floating_point():
        buffer.mul_(old).add_(fresh.to(buffer), alpha=1 - old)
    else:
        buffer.copy_(fresh)


def _is_sharded(x: Tensor) -> bool:
    return type(x) not in PLAIN and hasattr(x, "device_mesh") and hasattr(x, "placements")


def _local(x: Tensor) -> Tensor:
    return x.to_local() if _is_sharded(x) else x  # pyrefly: ignore


def _shard(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a global tensor that every rank holds: nothing is sent."""
    if _is_sharded(value):
        return _local(value)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # pyrefly: ignore
    return distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()


def _check_ranks(
    module: nn.Module, chosen: Mapping[str, Tensor], generator: torch.Generator | None
) -> None:
    """Raise on every rank unless all draw the same numbers; one small exchange."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return
    parallel = any(isinstance(m, DistributedDataParallel) for m in module.modules())
    if not parallel and not any(_is_sharded(p) for p in chosen.values()):
        return
    state = None if generator is None else generator.get_state().numpy().tobytes()
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    if None in states:
        raise ValueError(
            "on several ranks generator must be given, seeded alike on each: "
            "torch.Generator().manual_seed(seed)"
        )
    if len(set(states)) > 1:
        raise ValueError("generator must be seeded alike on every rank; the states differ")

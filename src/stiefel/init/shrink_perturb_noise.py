"""Noise on the scale of each tensor's own initialiser, without a second model.

``reset_parameters`` of nearly every layer ends in one ``uniform_``, ``normal_`` or ``fill_`` a
tensor. Run on the meta device it allocates nothing, and tells which: then the noise is drawn in
pieces that stay in the cache and mixed in at once. Only a layer that does something else (draws a
truncated normal, zeroes a padding row) is drawn for real, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Numbers drawn at a time. 256 kB of float32 stay in a core's second-level cache; an accelerator
# wants few launches. A multiple of 16, the block of torch's vectorised normal numbers, so that a
# tensor gets the same numbers in pieces as in one draw.
PIECE_CPU = 1 << 16
PIECE_ACCELERATOR = 1 << 24
# Tensors of up to so many numbers are mixed by one call for many; as many at a time as stay in the
# last-level cache, for the list is gone through twice.
SMALL_CPU, LIST_CPU = 4 * PIECE_CPU, 16 * PIECE_CPU
# Types that are mixed in themselves; all others are mixed in float32 and rounded once.
EXACT = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_IS_META = Tensor.is_meta.__get__  # pyrefly: ignore


@dataclass(frozen=True)
class Law:
    """How one tensor starts: every entry drawn alike."""

    kind: Literal["constant", "uniform", "normal"]
    first: float
    """Value, lower end, mean."""
    second: float = 0.0
    """Upper end or standard deviation."""

    def draw_(self, buffer: Tensor, generator: torch.Generator | None) -> Tensor:
        """Fill ``buffer``."""
        if self.kind == "uniform":
            return buffer.uniform_(self.first, self.second, generator=generator)
        if self.kind == "normal":
            return buffer.normal_(self.first, self.second, generator=generator)
        return buffer.fill_(self.first)


class _Recorder(TorchDispatchMode):
    """Notes the last thing that was written to each watched tensor."""

    def __init__(self, watched: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.laws: dict[str, Law | None] = {}
        self._names = {StorageWeakRef(t.untyped_storage()): n for n, t in watched.items()}
        self._sizes = {name: tensor.numel() for name, tensor in watched.items()}

    def name_of(self, tensor: Tensor) -> str:
        """Which watched tensor's memory this is; empty if none's."""
        return self._names.get(StorageWeakRef(tensor.untyped_storage()), "")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        for spec, value in zip(func._schema.arguments, args, strict=False):
            written = spec.alias_info is not None and spec.alias_info.is_write
            if written and isinstance(value, Tensor):
                name = self.name_of(value)
                if name:
                    whole = value.numel() == self._sizes[name]
                    law = self.laws[name] = _law(func, args, kwargs) if whole else None
                    if law is not None:
                        return value  # nothing to compute on meta
        return func(*args, **kwargs)


class _MetaWatch(TorchFunctionMode):
    """Notes who is asked whether it is on meta: torch's orthogonal_ and trunc_normal_ then skip
    it, so that what they would have written is not seen."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func == _IS_META:  # a new wrapper each time
            name = self._recorder.name_of(args[0])
            if name:
                self._recorder.laws[name] = None
        return func(*args, **(kwargs or {}))


def _law(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Law | None:
    """The law that an in-place operator on a whole tensor leaves behind; None if unknown."""
    aten = torch.ops.aten
    if func is aten.zero_.default:
        return Law("constant", 0.0)
    if func is aten.fill_.Scalar:
        return Law("constant", float(args[1]))
    for operator, kind, names, defaults in (
        (aten.uniform_.default, "uniform", ("from", "to"), (0.0, 1.0)),
        (aten.normal_.default, "normal", ("mean", "std"), (0.0, 1.0)),
    ):
        if func is operator:
            given = dict(zip(names, args[1:], strict=False)) | {
                key: value for key, value in kwargs.items() if key in names
            }
            ends = [float(given.get(n, d)) for n, d in zip(names, defaults, strict=True)]
            return Law(kind, *ends)  # pyrefly: ignore
    return None


def _reset_of(module: nn.Module) -> Any:
    # torch's own attention and Transformer spell it with an underscore.
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(getattr(module, name, None)):
            return name
    return None


def _shadow(module: nn.Module, new: dict[int, nn.Parameter]) -> nn.Module:
    """``module`` with other tensors behind the same structure; the original is not touched.

    ``new`` maps the identity of each parameter to what stands for it.
    """
    shadow = module.__new__(type(module))
    shadow.__dict__ = dict(module.__dict__)
    on_meta = any(p.is_meta for p in new.values())
    shadow.__dict__["_parameters"] = {
        name: p if p is None else new[id(p)] for name, p in module._parameters.items()
    }
    shadow.__dict__["_buffers"] = {
        name: b if b is None else torch.empty_like(b, device="meta") if on_meta else b.clone()
        for name, b in module._buffers.items()
    }
    shadow.__dict__["_modules"] = {
        name: m if m is None else _shadow(m, new) for name, m in module._modules.items()
    }
    return shadow


def _stand_ins(module: nn.Module, *, meta: bool) -> dict[int, nn.Parameter]:
    """An empty parameter of the global shape for each of the module's; NaN unless on meta."""
    stand_ins = {}
    for p in module.parameters():
        device = torch.device("meta") if meta else p.device
        # `p.shape` is the global one of a sharded parameter.
        empty = torch.empty(p.shape, dtype=p.dtype, device=device)
        if not meta:
            empty.fill_(torch.nan)
        stand_ins[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
    return stand_ins


def initial_laws(root: nn.Module, wanted: Mapping[int, str]) -> dict[int, Law | nn.Module]:
    """For each wanted parameter how it starts, or the module that must be asked to draw it.

    ``wanted`` maps identities of parameters to their names.

    Raises:
        TypeError: a module owns a wanted parameter and cannot reset it.
    """
    laws: dict[int, Law | nn.Module] = {}
    recorded: dict[tuple[Any, ...], dict[str, Law | None] | None] = {}
    # Children first: what a parent's reset does to them afterwards counts.
    for name, module in reversed(list(root.named_modules())):
        owned = {id(p): key for key, p in module._parameters.items() if id(p) in wanted}
        if not owned:
            continue
        where = f"{name or 'the module itself'} ({type(module).__name__})"
        reset = _reset_of(module)
        if reset is None:
            raise TypeError(
                f"{where} owns {', '.join(owned.values())} but has no reset_parameters: pass "
                "fresh (a new network, or a function that makes one), noise='gaussian', or "
                "exclude these parameters"
            )
        found = _recorded_once(module, reset, recorded)
        if found is None:
            laws |= dict.fromkeys(owned, module)
            continue
        for key, law in found.items():
            if key in wanted:
                laws[key] = module if law is None else law
        for key, parameter in owned.items():
            if key not in laws:
                raise TypeError(f"reset_parameters of {where} leaves {parameter} as it is")
    return laws


def _recorded_once(
    module: nn.Module,
    reset: str,
    before: dict[tuple[Any, ...], dict[str, Law | None] | None],
) -> dict[int, Law | None] | None:
    """As :func:`_recorded`, but once for equal layers of torch's own; noted in ``before``."""
    key = _description(module)
    if key is None:
        return _recorded(module, reset)
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if key not in before:
        found = _recorded(module, reset)
        if found is not None:
            names = {id(p): name for name, p in parameters.items()}
            before[key] = {names[i]: law for i, law in found.items()}
        else:
            before[key] = None
    laws = before[key]
    return None if laws is None else {id(parameters[name]): law for name, law in laws.items()}


def _description(module: nn.Module) -> tuple[Any, ...] | None:
    """What the reset of a childless layer of ``torch.nn`` can depend on; None of any other.

    Somebody else's reset may look at what is not in the layer, so it is run each time.
    """
    kind = type(module)
    if module._modules or not kind.__module__.startswith("torch.nn.modules."):
        return None
    settings = [
        (name, value)
        for name, value in module.__dict__.items()
        if name[0] != "_" and name != "training"
    ]
    if not all(_is_simple(value) for _, value in settings):
        return None
    shapes = [
        (name, None if p is None else (p.shape, p.dtype)) for name, p in module._parameters.items()
    ]
    held = [id(p) for p in module._parameters.values() if p is not None]
    if len(set(held)) < len(held):
        return None
    return kind, tuple(settings), tuple(shapes)


def _is_simple(value: object) -> bool:
    if type(value) is tuple:
        return all(_is_simple(entry) for entry in value)
    return value is None or type(value) in (bool, int, float, str)


def _recorded(module: nn.Module, reset: str) -> dict[int, Law | None] | None:
    """What ``reset`` writes, by identity of the parameter; None if it cannot run on meta."""
    stand_ins = _stand_ins(module, meta=True)
    recorder = _Recorder({str(key): p for key, p in stand_ins.items()})
    shadow = _shadow(module, stand_ins)
    try:
        with torch.no_grad(), recorder, _MetaWatch(recorder):
            getattr(shadow, reset)()
    except (RuntimeError, NotImplementedError):  # it looks at values: then it is run for real
        return None
    return {int(key): law for key, law in recorder.laws.items()}


def drawn(module: nn.Module, generator: torch.Generator | None) -> dict[int, Tensor]:
    """Fresh values of a module's parameters by its own reset, by identity of the parameter.

    Raises:
        ValueError: the reset left NaN, or left an entry as it was.
    """
    stand_ins = _stand_ins(module, meta=False)
    shadow = _shadow(module, stand_ins)
    devices = {p.device.index for p in stand_ins.values() if p.device.type == "cuda"}
    context: Any = nullcontext()
    if generator is not None:  # resets draw from torch's global generator: lend it a seed
        context = torch.random.fork_rng(devices=sorted(devices))
    seed = None if generator is None else seed_from(generator)
    with torch.no_grad(), context:
        if seed is not None:
            torch.manual_seed(seed)
        getattr(shadow, _reset_of(module))()
    return {key: p.detach() for key, p in stand_ins.items()}


def seed_from(generator: torch.Generator) -> int:
    """The next 62 bits of a generator."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views that make up ``tensor``, each of about as many numbers as are drawn at a time."""
    size = PIECE_CPU if tensor.device.type == "cpu" else PIECE_ACCELERATOR
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        yield from (flat,) if tensor.numel() <= size else flat.split(size)
    else:
        yield from tensor.split(max(1, size * len(tensor) // tensor.numel()))


def blend_(x: Tensor, noise: Tensor, shrink: float | int, perturb: float | int) -> None:
    """x ← shrink · x + perturb · noise in place; with shrink = 0 nothing of x is left, NaN too."""
    if perturb == 0:
        if shrink == 0:
            x.zero_()
        elif shrink != 1:
            x.mul_(shrink)
    elif x.dtype not in EXACT:
        wide = noise.to(torch.float32) * perturb
        x.copy_(wide if shrink == 0 else wide.add_(x.to(torch.float32), alpha=shrink))
    elif shrink == 0:
        x.copy_(noise).mul_(perturb)
    else:
        x.mul_(shrink).add_(noise, alpha=perturb)


class Together:
    """Tensors of one device and type, all of :data:`EXACT`, mixed by one call for many."""

    def __init__(self, shrink: float, perturb: float) -> None:
        self._shrink, self._perturb = shrink, perturb
        self._ours: list[Tensor] = []
        self._theirs: list[Tensor] = []
        self._room = LIST_CPU

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Put a pair aside, and mix what is there when that is enough."""
        self._ours.append(ours)
        self._theirs.append(theirs)
        self._room -= ours.numel()
        if self._room < 0 and ours.device.type == "cpu":
            self.mix()

    def mix(self) -> None:
        """As :func:`blend_` of every pair."""
        if self._ours and self._shrink == 0:
            torch._foreach_copy_(self._ours, self._theirs)
            self._times(self._perturb)
        elif self._ours:
            self._times(self._shrink)
            torch._foreach_add_(self._ours, self._theirs, alpha=self._perturb)
        self._ours, self._theirs, self._room = [], [], LIST_CPU

    def _times(self, factor: float) -> None:
        if self._ours[0].device.type == "cpu":  # there a number is made a tensor for each of them
            torch._foreach_mul_(self._ours, torch.tensor(factor, dtype=self._ours[0].dtype))
        else:
            torch._foreach_mul_(self._ours, factor)


def blend_law_(
    x: Tensor,
    law: Law,
    shrink: float,
    perturb: float,
    generator: torch.Generator | None,
    rooms: dict[tuple[Any, ...], Tensor],
) -> None:
    """x ← shrink · x + perturb · (a draw of ``law``), piece by piece in place.

    ``rooms`` keeps the piece's memory of each device and type for the next tensor.
    """
    if perturb == 0 or (law.kind == "constant" and shrink != 0 and law.first == 0):
        blend_(x, x, shrink, 0.0)
        return
    dtype = x.dtype if x.dtype in EXACT else torch.float32
    if law.kind == "constant" and dtype == x.dtype:
        value = perturb * law.first
        x.fill_(value) if shrink == 0 else x.mul_(shrink).add_(value)
        return
    place = (x.device, dtype)
    for piece in pieces(x):
        buffer = rooms.get(place)
        if buffer is None or buffer.numel() < piece.numel():
            buffer = rooms[place] = torch.empty(piece.numel(), dtype=dtype, device=x.device)
        noise = law.draw_(buffer[: piece.numel()], generator).view(piece.shape)
        blend_(piece, noise, shrink, perturb)


def whole_draw(x: Tensor, law: Law, generator: torch.Generator | None) -> Tensor:
    """The noise of the whole (global) tensor, the same numbers as :func:`blend_law_` draws."""
    dtype = x.dtype if x.dtype in EXACT else torch.float32
    noise = torch.empty(x.shape, dtype=dtype, device=x.device)
    for piece in pieces(noise):
        law.draw_(piece, generator)
    return noise

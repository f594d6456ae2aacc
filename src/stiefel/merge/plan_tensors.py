"""From models to tasks: which tensors of which models make each output tensor, and how."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stiefel.checkpoint import TensorInfo
from stiefel.merge.plan_layers import (
    depth,
    has_vocabulary_rows,
    is_head,
    match_names,
    stands_before,
)
from stiefel.merge.plan_models import Model
from stiefel.merge.plan_types import TensorRef, TensorTask
from stiefel.merge.plan_vocabulary import Alignment
from stiefel.merge.recipe_errors import Problem, shown
from stiefel.merge.recipe_settings import Settings, resolve
from stiefel.merge.recipe_types import OutputSlice, Recipe, Source

_NAMED = 8  # tensors in one message
# Buffers that old checkpoints hold and no program loads any more.
_IGNORED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", ".attention.masked_bias")
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Member:
    """A model in one slice of the output."""

    source: Source | None
    """None: the base, where the recipe does not list it."""
    model: Model
    start: int
    """Its layer that stands first."""
    is_base: bool
    merged: bool = True
    """False: a base that only gives names, shapes and what others lack."""


@dataclass(frozen=True)
class Part:
    """One slice of the output, with its models."""

    slice: OutputSlice
    members: tuple[Member, ...]
    first: int
    """Output layer that it starts with."""
    count: int

    @property
    def base(self) -> Member | None:
        """The member that is the base."""
        return next((m for m in self.members if m.is_base), None)

    @property
    def leader(self) -> Member:
        """Whose names and shapes the output has: the base, else the first."""
        return self.base or self.members[0]


@dataclass(frozen=True)
class Slot:
    """One tensor of the output, and what it is called in each model."""

    name: str
    part: Part
    t: float
    leader: str
    """Its name in the leader."""
    own: tuple[str | None, ...]
    """Its name in each member; None where it is missing."""


class Tasks:
    """Makes the tasks; what is wrong gathers in :attr:`problems`, what is odd in :attr:`notes`."""

    def __init__(
        self,
        recipe: Recipe,
        parts: Sequence[Part],
        alignment: Alignment,
        *,
        untie: bool,
        drop_head: bool,
    ) -> None:
        self.recipe = recipe
        self.parts = tuple(parts)
        self.alignment = alignment
        self.untie = untie
        self.drop_head = drop_head
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self._odd: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._used: dict[int, set[str]] = defaultdict(set)

    def make(self) -> tuple[TensorTask, ...]:
        """All tasks, in the order of the leader's tensors."""
        tasks = [task for slot in self._slots() if (task := self._task(slot)) is not None]
        self._report()
        return tuple(tasks)

    # Names.

    def _slots(self) -> Iterator[Slot]:
        if not self.recipe.stacked:
            yield from self._whole(self.parts[0])
            return
        first, last = self.parts[0], self.parts[-1]
        yield from self._outside(first, before=True)
        for part in self.parts:
            yield from self._inside(part)
        yield from self._outside(last, before=False)

    def _whole(self, part: Part) -> Iterator[Slot]:
        leader = part.leader.model
        names = list(leader.tensors)
        if self.untie and leader.head is None:
            names.append(self._new_head(part))
        maps = [self._match(names, member.model) for member in part.members]
        for name in names:
            if is_head(name) and self.drop_head:
                continue
            place = leader.layers.split(name)
            t = 0.0 if place is None else depth(place[0], leader.layers.count)
            yield Slot(name, part, t, name, tuple(m.get(name) for m in maps))
        for member, found in zip(part.members, maps, strict=True):
            self._used[member.model.number] |= set(found.values())

    def _match(self, names: Sequence[str], model: Model) -> dict[str, str]:
        found = match_names(names, model.tensors)
        if model.is_tied and model.head is not None:  # a copy that no program reads
            found = {name: own for name, own in found.items() if own != model.head}
            self._used[model.number].add(model.head)
        if model.embedding is not None:
            for name in names:
                if is_head(name) and name not in found and not self.drop_head:
                    found[name] = model.embedding
        if self.drop_head and model.head is not None:
            self._used[model.number].add(model.head)
        return found

    def _new_head(self, part: Part) -> str:
        heads = [m.model.head for m in part.members if m.model.head and not m.model.is_tied]
        return heads[0] if heads else "lm_head.weight"

    def _inside(self, part: Part) -> Iterator[Slot]:
        leader = part.leader
        template = self.parts[0].leader.model.layers
        for index in range(part.count):
            layer = leader.start + index
            for rest in leader.model.layers.inside[layer]:
                own = []
                for member in part.members:
                    name = member.model.layers.name(member.start + index, rest)
                    self._used[member.model.number].add(name)
                    own.append(name if name in member.model.tensors else None)
                yield Slot(
                    template.name(part.first + index, rest),
                    part,
                    depth(index, part.count),
                    leader.model.layers.name(layer, rest),
                    tuple(own),
                )
            for member in part.members:
                rests = member.model.layers.inside[member.start + index]
                for rest in set(rests) - set(leader.model.layers.inside[layer]):
                    name = member.model.layers.name(member.start + index, rest)
                    self._odd["extra", member.model.name].append(name)

    def _outside(self, part: Part, before: bool) -> Iterator[Slot]:
        model = part.leader.model
        names = [name for name in model.tensors if model.layers.split(name) is None]
        names = [name for name in names if stands_before(name) == before]
        if not before and self.untie and model.head is None:
            names.append(self._new_head(part))
        maps = [self._match(names, member.model) for member in part.members]
        for name in names:
            if not (is_head(name) and self.drop_head):
                yield Slot(name, part, 0.0, name, tuple(m.get(name) for m in maps))

    # One tensor.

    def _task(self, slot: Slot) -> TensorTask | None:
        part = slot.part
        leading = self._info(part.leader.model, slot.leader)
        if leading is None:
            return None
        own_dtype = leading.dtype
        shape = self.alignment.shape(part.leader.model, slot.name, leading.shape)
        if not own_dtype.is_floating_point:
            note = "not floating point: as in the base"
            ref = self._ref(slot, part.leader, slot.leader)
            if any(m is not part.leader for m in part.members):
                self._odd["integer", part.leader.model.name].append(slot.name)
            return TensorTask(slot.name, own_dtype, shape, "copy", None, (ref,), note=note)
        dtype = DTYPES[self.recipe.dtype] if self.recipe.dtype else own_dtype
        base, sources, notes = self._refs(slot, shape)
        method, shared, each = self._settings(slot, [member for member, _ in sources])
        if method == "":
            return None
        return TensorTask(
            slot.name,
            dtype,
            shape,
            method,
            base,
            tuple(ref for _, ref in sources),
            shared,
            tuple(each),
            "; ".join(notes),
        )

    def _info(self, model: Model, name: str) -> TensorInfo | None:
        info = model.tensors.get(name)
        if info is None and is_head(name) and model.embedding is not None:
            return model.tensors[model.embedding]
        return info

    def _refs(
        self, slot: Slot, shape: tuple[int, ...]
    ) -> tuple[TensorRef | None, list[tuple[Member, TensorRef]], list[str]]:
        """The base's tensor, if the method wants one, and each source's."""
        part, method = slot.part, self.recipe.method
        wants_base = method.base == "required"
        base = part.base if wants_base else None
        base_ref = self._ref(slot, base, slot.leader) if base is not None else None
        sources, notes = [], []
        for member, own in zip(part.members, slot.own, strict=True):
            if member is base or not member.merged:
                continue
            if own is None and slot.name.endswith(_IGNORED):
                sources.append((member, self._ref(slot, part.leader, slot.leader)))
                continue
            if own is None:
                self._odd["missing", member.model.name].append(slot.name)
                notes.append(f"missing in {member.model.name}: as in {part.leader.model.name}")
                sources.append((member, self._ref(slot, part.leader, slot.leader)))
                continue
            found = member.model.tensors[own]
            if not found.dtype.is_floating_point:
                self._odd["dtype", member.model.name].append(f"{own} ({found.dtype})")
            if self.alignment.shape(member.model, slot.name, found.shape) != shape:
                self._odd["shape", member.model.name].append(
                    f"{own} {list(found.shape)} instead of {list(shape)}"
                )
                notes.append(f"other shape in {member.model.name}: base taken")
                sources.append((member, self._ref(slot, part.leader, slot.leader)))
                continue
            if is_head(slot.name) and not is_head(own):
                notes.append(f"tied in {member.model.name}: its embedding")
            sources.append((member, self._ref(slot, member, own)))
        return base_ref, sources, notes

    def _ref(self, slot: Slot, member: Member, own: str) -> TensorRef:
        model = member.model
        if own not in model.tensors and is_head(own) and model.embedding is not None:
            own = model.embedding
        rows = self.alignment.rows(model) if has_vocabulary_rows(slot.name) else None
        fallback = None
        if rows is not None and bool((rows < 0).any()):
            leader = slot.part.leader
            if member is not leader:
                fallback = self._ref(slot, leader, slot.leader)
            elif self.alignment.giver is not None and self.alignment.giver is not model:
                giver = self.alignment.giver
                there = match_names([slot.leader], giver.tensors).get(slot.leader)
                there = there or (giver.embedding if is_head(slot.leader) else None)
                if there is not None:
                    fallback = TensorRef(giver.name, there, giver.number)
            else:
                fallback = self._first_with_all(slot, member)
        return TensorRef(model.name, own, model.number, rows, fallback)

    def _first_with_all(self, slot: Slot, leader: Member) -> TensorRef | None:
        """For tokens that the leader lacks (a union): the models that have them, in turn."""
        found: TensorRef | None = None
        for member, own in reversed(list(zip(slot.part.members, slot.own, strict=True))):
            if member is not leader and own is not None:
                rows = self.alignment.rows(member.model)
                found = TensorRef(member.model.name, own, member.model.number, rows, found)
        return found

    # Settings.

    def _settings(
        self, slot: Slot, members: Sequence[Member]
    ) -> tuple[str, Mapping[str, Any], list[Mapping[str, Any]]]:
        """Method and its parameters for this tensor: shared ones, and one mapping a source."""
        method, part = self.recipe.method, slot.part
        outer: tuple[Settings, ...] = (part.slice.parameters, self.recipe.parameters)
        shared: dict[str, Any] = {}
        each: list[Mapping[str, Any]] = []
        name = ""
        try:
            for parameter in method.parameters:
                if not parameter.each:
                    name = parameter.name
                    shared[name] = resolve(parameter, outer, slot.name, slot.t)
            owns = {id(m): own for m, own in zip(part.members, slot.own, strict=True)}
            for member in members:
                inner = () if member.source is None else (member.source.parameters,)
                # Filters of a model's parameters are for its own names: layers have other numbers
                # there than in a stacked output.
                tensor = owns[id(member)] if self.recipe.stacked else None
                own: dict[str, Any] = {}
                for parameter in method.parameters:
                    if parameter.each:
                        name = parameter.name
                        places = (*inner, *outer)
                        own[name] = resolve(parameter, places, tensor or slot.name, slot.t)
                each.append(own)
        except LookupError:
            self._odd[f"parameter {name}", method.name].append(slot.name)
            return "", {}, []
        # What is only there to be accepted does not reach the method.
        idle = {"int8_mask"} | {p.name for p in method.parameters if p.only is not None}
        shared = {k: value for k, value in shared.items() if value is not None and k not in idle}
        if method.name == "passthrough":
            scale = each[0].get("scale")
            if scale in (None, 1.0):
                return "copy", {}, [{}]
            return "linear", {"normalize": False}, [{"weight": scale}]
        if method.name == "linear" and shared.get("normalize"):
            self._check_sum(slot, each)
        return method.name, shared, [_without_zero_density(own) for own in each]

    def _check_sum(self, slot: Slot, each: Sequence[Mapping[str, Any]]) -> None:
        weights = [own["weight"] for own in each]
        if abs(sum(weights)) <= 1e-8 * max(1.0, *(abs(w) for w in weights)):
            self._odd["sum", self.recipe.method.name].append(slot.name)

    # Messages.

    def _report(self) -> None:
        for model in {m.model.number: m.model for p in self.parts for m in p.members}.values():
            self._find_extra(model)
        policies = self.recipe.policies
        said = {
            "missing": (policies.missing, "are missing", "allow_missing: base takes the base's"),
            "extra": (policies.extra, "have no place in the output", "allow_extra: drop"),
            "shape": (policies.shape, "have another shape", "allow_shape: base takes the base's"),
        }
        for (kind, where), names in self._odd.items():
            listed = _listed(names)
            if kind in said:
                policy, what, way_out = said[kind]
                text = f"{len(names)} tensors {what}: {listed}"
                if policy == "error":
                    self.problems.append(Problem(f"{text}. {way_out}", where))
                else:
                    self.notes.append(f"{where}: {text}; allow_{kind}: {policy}")
            elif kind == "integer":
                text = f"{len(names)} tensors are not floating point and are copied from {where}"
                self.notes.append(f"{text}: {listed}")
            elif kind == "dtype":
                text = f"not floating point, but the base's are: {listed}"
                self.problems.append(Problem(text, where))
            elif kind == "sum":
                text = f"the weights sum to zero for {listed}; normalize: false adds them up"
                self.problems.append(Problem(text, "parameters.weight"))
            else:
                text = f"{where} needs {kind.removeprefix('parameter ')}; none is set for {listed}"
                self.problems.append(Problem(text))

    def _find_extra(self, model: Model) -> None:
        if self.recipe.stacked:
            return  # layers that no slice takes are no mistake
        for name in model.tensors:
            if name in self._used[model.number]:
                continue
            if name.endswith(_IGNORED):
                self.notes.append(f"{model.name}: {shown(name)} is an old buffer and is left out")
            else:
                self._odd["extra", model.name].append(name)


def _without_zero_density(own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keeping nothing of a difference is giving it no weight."""
    if own.get("density") == 0:
        return {**own, "density": 1.0, "weight": 0.0}
    return own


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(shown(name).strip("'") for name in names[:_NAMED])
    return text if len(names) <= _NAMED else f"{text} and {len(names) - _NAMED} more"

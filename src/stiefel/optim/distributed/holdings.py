"""The state of sharded parameters, and the method itself at work on whole matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stiefel.optim.base import MatrixOptimizer
from stiefel.optim.distributed.exchange import Lane
from stiefel.optim.distributed.geometry import is_dtensor
from stiefel.optim.distributed.owned import (
    Form,
    as_dtensor,
    collect,
    everything,
    keep,
    pieces,
    shard_like,
)
from stiefel.optim.distributed.placing import Lanes
from stiefel.optim.distributed.planner import Entry


class Holdings:
    """Momenta with the shards, everything else with the owners, whole in ``state_dict()``.

    Scalars of the state count steps; every rank has them.
    """

    def __init__(self, optimizer: MatrixOptimizer, places: Lanes) -> None:
        self._optimizer = optimizer
        self._places = places
        self._forms: dict[int, Form] = {}
        self._worker: Any = None
        self.owner_has_momentum = optimizer._sends == "gradient"
        """Whether momentum is the owner's, if there is any; else it is with the shards."""
        whole = self.owner_has_momentum and optimizer._has_momentum
        self._parameter_shaped = optimizer._first_state if whole else ""

    def momentum(self, parameter: Tensor) -> Tensor:
        """The momentum that is with the shards."""
        return self._optimizer.state[parameter][self._optimizer._first_state]

    def begin(self, group: dict[str, Any], parameter: Tensor) -> None:
        """Make the state of a parameter that has none: all of it, or nothing if that fails."""
        optimizer, first = self._optimizer, self._optimizer._first_state
        if first in optimizer.state[parameter]:
            return
        fresh: dict[str, Tensor] = {}
        if optimizer._has_momentum and not self.owner_has_momentum:
            fresh[first] = torch.zeros_like(parameter)
        if optimizer._sends != "nothing":
            fresh |= self._kept(group, parameter)
        optimizer.state[parameter] = {**fresh, **optimizer.state[parameter]}

    def _kept(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """What this rank keeps of a parameter as an owner, at the start."""
        entries, lane = self._places.entries[id(parameter)], self._places.lane_of[id(parameter)]
        forms = [self.form(group, e) for e in entries]
        made: dict[str, list[Tensor]] = {key: [] for key in _keys(forms)}
        for entry in entries:
            mine = entry.owner == lane.me
            for key, value in self._extra(group, entry, lane.device).items() if mine else ():
                made[key].append(value)
        kept = {}
        for key, values in made.items():
            shape, dtype = next(form[key] for form in forms if key in form)
            if not shape:
                kept[key] = torch.zeros((), dtype=dtype)
            elif values:
                kept[key] = torch.cat([v.flatten() for v in values])
            else:
                kept[key] = torch.empty(0, dtype=dtype, device=lane.device)
        return kept

    def begin_teams(self, lane: Lane, entries: Sequence[Entry]) -> None:
        """Make, on every rank, what idle parameters keep for the teams of ``entries``."""
        groups = self._optimizer.param_groups
        teams = {(e.group, e.team) for e in entries if e.team is not None}
        for entry in lane.entries if teams else ():
            if (entry.group, entry.team) in teams:
                form = self.form(groups[entry.group], entry)
                if any(shape for shape, _ in form.values()):
                    self.begin(groups[entry.group], entry.parameter)

    def idle_members(self, lane: Lane, active: Sequence[Entry]) -> list[Entry]:
        """Members of the same teams that have state but take no part in this step."""
        teams = {e.team for e in active if e.team is not None}
        known = {id(e) for e in active}
        return [
            e
            for e in (lane.entries if teams else ())
            if e.group == active[0].group
            and e.team in teams
            and id(e) not in known
            and self._optimizer._first_state in self._optimizer.state.get(e.parameter, {})
        ]

    def count(self, parameters: Sequence[Tensor]) -> None:
        """One more step."""
        for parameter in parameters:
            state = self._optimizer.state[parameter]
            if "step" in state:
                state["step"] += 1

    def views(self, lane: Lane, group: dict[str, Any], entry: Entry) -> dict[str, Tensor]:
        """What this rank keeps for a matrix that it owns."""
        state = self._optimizer.state[entry.parameter]
        entries = [e for e in self._places.entries[id(entry.parameter)] if e.owner == lane.me]
        forms = [self.form(group, e) for e in entries]
        found = {}
        for key, (shape, _) in self.form(group, entry).items():
            if not shape:
                found[key] = state[key].clone()  # counted once for all matrices: see `count`
                continue
            holders = [e for e, f in zip(entries, forms, strict=True) if key in f]
            found[key] = pieces(state[key], key, forms)[holders.index(entry)]
        return found

    def form(self, group: dict[str, Any], entry: Entry) -> Form:
        """Names, shapes and dtypes of what a matrix's owner keeps for it; makes nothing."""
        if id(entry) not in self._forms:
            made = self._extra(group, entry, torch.device("meta"))
            self._forms[id(entry)] = {k: (tuple(v.shape), v.dtype) for k, v in made.items()}
        return self._forms[id(entry)]

    def _extra(
        self, group: dict[str, Any], entry: Entry, device: torch.device
    ) -> dict[str, Tensor]:
        """What a matrix's owner keeps for it, as the method itself makes it."""
        rows, cols = entry.matrix.rows, entry.matrix.cols
        like = torch.empty((), dtype=entry.parameter.dtype, device=device).expand(rows, cols)
        worker = self.work_with(group, [(entry, like)])
        made = worker._extra_state(worker.param_groups[0], [(rows, cols)], like)
        if self._parameter_shaped:
            zeros = torch.zeros(rows, cols, dtype=like.dtype, device=device)
            made = {self._parameter_shaped: zeros, **made}
        return made

    def work_with(
        self, group: dict[str, Any], stand_ins: Sequence[tuple[Entry, Tensor]]
    ) -> MatrixOptimizer:
        """The optimizer itself, with plain matrices in place of its parameters and no state.

        Good until the next call.
        """
        if self._worker is None:
            self._worker = object.__new__(type(self._optimizer))
        worker = self._worker
        worker.__dict__.update(self._optimizer.__dict__)
        worker.state = defaultdict(dict)
        own = {"params": [t for _, t in stand_ins], "view": "flatten", "blocks": None}
        names = {"param_names": [e.name for e, _ in stand_ins]}
        worker.param_groups = [{**group, **own, **names, "weight_decay": 0.0}]
        triples = [(e.parameter, e.index, t) for e, t in stand_ins]
        self._optimizer._stand_in(worker, group, triples)
        return worker

    # state_dict and load_state_dict

    @contextmanager
    def exposed(self) -> Iterator[None]:
        """While it is open, the optimizer's state is that of one process, in DTensors.

        A collective: owners send what they keep to all.
        """
        optimizer, first = self._optimizer, self._parameter_shaped
        kept = optimizer.state
        optimizer.state = defaultdict(dict, {p: dict(s) for p, s in kept.items()})
        try:
            for parameter, state, lane, entries, forms in self._owned(optimizer.state):
                for key in _keys(forms):
                    if key not in state or not state[key].ndim:
                        continue
                    whole = collect(lane, entries, forms, key, first, state[key])
                    if is_dtensor(parameter):
                        placements = parameter.placements if key == first else None  # pyrefly: ignore
                        whole = as_dtensor(whole, parameter, placements)
                    state[key] = whole
            yield
        finally:
            optimizer.state = kept

    def adopt(self) -> None:
        """Take what load_state_dict has left in the optimizer's state: whole tensors of all kinds.

        A collective where they are DTensors; plain ones, as one process saves them, are cut.
        """
        optimizer, first = self._optimizer, self._parameter_shaped
        for _, state, lane, entries, forms in self._owned(optimizer.state):
            for key in _keys(forms):
                if key in state:
                    whole = everything(state[key])
                    cut = keep(lane, entries, forms, key, first, whole) if whole.ndim else whole
                    state[key] = cut
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p not in optimizer.state or not self._places.involves(p):
                    continue
                state = optimizer.state[p]
                shared: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
                if group["rule"] == "matrix":
                    shared = () if self.owner_has_momentum else (optimizer._first_state,)
                for key in shared:
                    if key in state:
                        state[key] = shard_like(state[key], p)
                if "step" in state:
                    state["step"] = everything(state["step"])

    def _owned(self, states: Any) -> Iterator[tuple[Any, ...]]:
        """Parameter, state, lane, entries and their forms wherever owners keep something."""
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                known = p in states and id(p) in self._places.entries
                if known and self._optimizer._sends != "nothing":
                    entries = self._places.entries[id(p)]
                    forms = [self.form(group, e) for e in entries]
                    yield p, states[p], self._places.lane_of[id(p)], entries, forms


def _keys(forms: Sequence[Form]) -> list[str]:
    return sorted({key for form in forms for key in form})

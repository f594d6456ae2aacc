"""Which side of every weight ARO rotates, and which weights share a rotation."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stiefel.optim.groups import describe_groups, split_parameters

Orient = str | Callable[[str, Tensor], bool]
Share = None | str | Sequence[Sequence[Any]]

# How common models name what reads the residual stream (d on the input side) and what writes it.
# Only square weights need it: of others the shorter side is the stream's.
_CONSUMERS = re.compile(
    r"q|k|v|qkv|[qkv]_proj|query|key|value|query_key_value|w[qkv]|in_proj|c_attn|c_fc|"
    r"gate|up|gate_proj|up_proj|fc1|w1|w3"
)


@dataclass(frozen=True)
class Entry:
    """A parameter as the layout sees it."""

    name: str | None
    parameter: Tensor
    sizes: tuple[tuple[int, int], ...]
    """(R, C) of each matrix it holds."""


@dataclass(frozen=True)
class Slot:
    """One matrix of a parameter."""

    columns: bool
    """The columns of the weight are the rotated side: ARO sees the transpose."""
    m: int
    """Length of the rotated side."""
    team: int | None
    """Number of the set that shares a rotation, or None."""
    owns: bool
    """Whether the rotation is in this matrix's own state."""


def layout(entries: Sequence[Entry], orient: Orient, share: Share) -> list[tuple[Slot, ...]]:
    """Slots of every entry's matrices.

    Raises:
        ValueError: an explicit orientation whose rotated side is the longer one; matrices that
            share a rotation without a common side; ``share="layer"`` without names.
    """
    teams = _teams(entries, share)
    sides = {
        team: _common_side([e for e, t in zip(entries, teams, strict=True) if t == team], orient)
        for team in dict.fromkeys(teams)
        if team is not None
    }
    seen: set[Hashable] = set()
    slots = []
    for entry, team in zip(entries, teams, strict=True):
        own = []
        for rows, cols in entry.sizes:
            side = None if team is None else sides[team]
            columns = _rotates_columns(entry, rows, cols, orient, side)
            m = cols if columns else rows
            own.append(Slot(columns, m, team, team is None or team not in seen))
            if team is not None:
                seen.add(team)
        slots.append(tuple(own))
    return slots


def share_indices(params: Sequence[Tensor], share: Any) -> Any:
    """``share`` with its parameters replaced by their numbers in a group; other groups' left out.

    Raises:
        ValueError: not None, ``"layer"`` or lists; a set across groups; a parameter in two sets.
    """
    if share is None or share == "layer":
        return share
    if isinstance(share, str):
        raise ValueError(f"share must be None, 'layer' or lists of parameters, got {share!r}")
    numbers = {id(p): i for i, p in enumerate(params)}
    sets = []
    for members in share:
        own = [i if isinstance(i, int) else numbers.get(id(i)) for i in members]
        present = tuple(i for i in own if i is not None)
        if present and len(present) < len(own):
            raise ValueError(
                f"a set of share has {len(present)} parameters in one group and "
                f"{len(own) - len(present)} elsewhere; all must be in one matrix group"
            )
        if present:
            sets.append(present)
    every = [i for own in sets for i in own]
    if len(set(every)) < len(every):
        raise ValueError("a parameter is in more than one set of share")
    return tuple(sets)


def _rotates_columns(entry: Entry, rows: int, cols: int, orient: Orient, side: int | None) -> bool:
    if orient == "auto":
        if side is not None and rows != cols:
            return cols == side
        return cols < rows if rows != cols else _is_consumer(entry.name)
    columns = orient == "cols" if isinstance(orient, str) else not _asked(entry, orient)
    m, n = (cols, rows) if columns else (rows, cols)
    if m > n and side is None:
        raise ValueError(
            f"orient={orient!r} rotates the longer side ({m} of {rows}×{cols}) of "
            f"{entry.name or 'a parameter'}: its momentum has rank {n} at most, and the other "
            f"{m - n} directions would be rounding noise. Use orient='auto'"
        )
    return columns


def _asked(entry: Entry, orient: Callable[[str, Tensor], bool]) -> bool:
    return bool(orient(entry.name or "", entry.parameter))


def _is_consumer(name: str | None) -> bool:
    last = re.sub(r"[._]?weight$", "", name or "").split(".")[-1]
    return _CONSUMERS.fullmatch(last) is not None


def _teams(entries: Sequence[Entry], share: Share) -> list[int | None]:
    if share is None:
        return [None] * len(entries)
    if share != "layer":
        owner = {index: team for team, members in enumerate(share) for index in members}
        return [owner.get(index) for index in range(len(entries))]
    keys: list[str | None] = []
    for entry in entries:
        if entry.name is None:
            raise ValueError(
                "share='layer' needs names to tell layers apart; pass (name, parameter) pairs, as "
                "split_parameters(model) gives them"
            )
        found = re.match(r"(?:.*?\.)??\d+(?=\.)", entry.name)
        keys.append(found[0] if found else None)
    numbers = {key: i for i, key in enumerate(dict.fromkeys(k for k in keys if k is not None))}
    return [None if key is None else numbers[key] for key in keys]


def _common_side(members: Sequence[Entry], orient: Orient) -> int:
    """The shortest length that every matrix of the set has on one side, or on the side asked."""
    sizes = [size for entry in members for size in entry.sizes]
    if orient == "auto":
        common = set.intersection(*({rows, cols} for rows, cols in sizes))
    else:
        common = set.intersection(
            *(
                {cols if _rotates_columns(entry, rows, cols, orient, -1) else rows}
                for entry in members
                for rows, cols in entry.sizes
            )
        )
    if not common:
        shapes = ", ".join(
            f"{entry.name or 'parameter'} {rows}×{cols}"
            for entry in members
            for rows, cols in entry.sizes
        )
        raise ValueError(
            f"matrices that share a rotation must have one side in common, got {shapes}"
        )
    side = min(common)
    width = sum(rows * cols // side for rows, cols in sizes)
    if width < side:
        raise ValueError(
            f"the shared side has {side} rows but all matrices together only {width} columns"
        )
    return side


def aro_param_groups(
    model: nn.Module, mode: str = "hybrid", *, show: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Groups for :class:`ARO`, with names, so that roles and layers can be told from them.

    Args:
        model: Any module.
        mode: ``"hybrid"``: hidden matrices by ARO, the rest by AdamW. ``"full"``: embeddings and
            heads by ARO too (rotated on their d_model side), which pays with long training.
        show: Print what went where.
        **options: Of :func:`split_parameters`.

    Raises:
        ValueError: an unknown mode; what :func:`split_parameters` refuses.
    """
    if mode not in ("hybrid", "full"):
        raise ValueError(f"mode must be 'hybrid' or 'full', got {mode!r}")
    groups = split_parameters(model, **options)
    if mode == "full":
        ours = {
            id(module.weight)
            for module in model.modules()
            if isinstance(module, nn.Embedding | nn.Linear)
        }
        names = [
            name
            for group in groups
            if group["rule"] == "elementwise"
            for name, p in group["params"]
            if id(p) in ours
        ]
        options["matrix"] = [*options.get("matrix", ()), *names]
        groups = split_parameters(model, **options)
    if show:
        describe_groups(groups)
    return groups

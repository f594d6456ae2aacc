"""Messages between ranks: rounds of uneven all-to-alls, and one status word before each step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stiefel.optim.distributed.geometry import Piece
from stiefel.optim.distributed.planner import Entry, make_rounds

FINE, FAILED, BAD_GRADIENT = 0, 1, 2


@dataclass(eq=False)
class Lane:
    """Parameters of one dtype on one set of ranks."""

    ranks: tuple[int, ...]
    group: Any
    """Process group; None for a single rank."""
    me: int
    """This rank's number within it."""
    dtype: torch.dtype
    device: torch.device
    entries: list[Entry] = field(default_factory=list)

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return len(self.ranks)


@dataclass(frozen=True)
class Item:
    """A piece of a matrix on its way."""

    entry: Entry
    piece: Piece


@dataclass
class Message:
    """One all-to-all: what goes to and comes from every rank, in this order in the buffers."""

    outgoing: list[list[Item]]
    incoming: list[list[Item]]

    @property
    def splits(self) -> tuple[list[int], list[int]]:
        """Numbers to and from every rank."""
        return (
            [sum(i.piece.numel for i in items) for items in self.outgoing],
            [sum(i.piece.numel for i in items) for items in self.incoming],
        )


@dataclass
class Round:
    """What this rank updates, and the messages before and after."""

    mine: list[Entry]
    gather: Message
    scatter: Message


def schedule(lane: Lane, entries: Sequence[Entry]) -> list[Round]:
    """The rounds of a step that updates ``entries``, as this rank sees them."""
    ranks, me = range(lane.world), lane.me
    result = []
    for owners in make_rounds(entries, lane.world):
        mine = owners[me]
        away = [[Item(e, e.piece_of(me)) for e in owners[o]] if o != me else [] for o in ranks]
        ours = [[Item(e, e.piece_of(r)) for e in mine] if r != me else [] for r in ranks]
        gather = Message(
            [[i for i in items if i.piece.numel and i.entry.sends(me)] for items in away],
            [[i for i in ours[r] if i.piece.numel and i.entry.sends(r)] for r in ranks],
        )
        scatter = Message(
            [[i for i in items if i.piece.numel] for items in ours],
            [[i for i in items if i.piece.numel] for items in away],
        )
        result.append(Round(mine, gather, scatter))
    return result


@dataclass
class Flight:
    """A message under way."""

    message: Message
    segments: list[Tensor]
    """What comes from every rank."""
    flagged: bool
    """Whether the last number of a segment says that its sender has failed."""
    works: Sequence[Any]
    sent: Tensor
    """Kept alive until it has gone out."""

    def land(self) -> list[tuple[Item, Tensor]]:
        """Wait; returns every piece with its numbers."""
        for work in self.works:
            work.wait()
        found = []
        for items, segment in zip(self.message.incoming, self.segments, strict=True):
            place = 0
            for item in items:
                count = item.piece.numel
                found.append((item, segment[place : place + count].view(item.piece.shape)))
                place += count
        return found

    def release(self) -> None:
        """Let the received numbers go."""
        self.segments = []

    def failed(self) -> bool:
        """Whether a sender said that it has failed; only after :meth:`land`."""
        flags = [segment[-1:] for segment in self.segments if self.flagged and len(segment)]
        return bool(flags) and bool((torch.cat(flags) != 0).any())


def launch(
    lane: Lane,
    message: Message,
    fill: Callable[[Item, Tensor], None],
    *,
    flag: Callable[[], bool] | None = None,
    silent: bool = False,
) -> Flight:
    """Pack and start an all-to-all.

    Args:
        fill: Writes a piece's numbers into its part of the buffer. It must not raise.
        flag: Adds a number for every other rank: not 0 if this is true when all is packed.
        silent: No rank has anything to send.
    """
    send, receive = message.splits
    if flag is not None:
        for rank in range(lane.world):
            if rank != lane.me:
                send[rank] += 1
                receive[rank] += 1
    out = torch.empty(sum(send), dtype=lane.dtype, device=lane.device)
    into = torch.empty(sum(receive), dtype=lane.dtype, device=lane.device)
    segments = out.split(send)
    for items, segment in zip(message.outgoing, segments, strict=True):
        place = 0
        for item in items:
            fill(item, segment[place : place + item.piece.numel].view(item.piece.shape))
            place += item.piece.numel
    if flag is not None:
        word = 1.0 if flag() else 0.0
        for segment in segments:
            segment[-1:] = word  # of one's own segment, which is empty, nothing
    works = []
    if lane.world > 1 and not silent:
        work = dist.all_to_all_single(into, out, receive, send, group=lane.group, async_op=True)
        works.append(work)
    return Flight(message, list(into.split(receive)), flag is not None, works, out)


def launch_copies(
    lane: Lane,
    message: Message,
    fill: Callable[[Item, Tensor], None],
    *,
    flag: Callable[[], bool] | None = None,
) -> Flight:
    """As :func:`launch`, where every rank sends the same to all others: one broadcast each.

    In an all-to-all an owner would hold as many copies of its updates as there are ranks.
    """
    extra = 1 if flag is not None else 0
    other = (lane.me + 1) % lane.world
    sizes = [count + extra for count in message.splits[1]]
    sizes[lane.me] = sum(i.piece.numel for i in message.outgoing[other]) + extra
    buffers = [torch.empty(n, dtype=lane.dtype, device=lane.device) for n in sizes]
    out, place = buffers[lane.me], 0
    for item in message.outgoing[other]:
        fill(item, out[place : place + item.piece.numel].view(item.piece.shape))
        place += item.piece.numel
    if flag is not None:
        out[-1:] = 1.0 if flag() else 0.0
    works = [
        dist.broadcast(buffer, source, group=lane.group, async_op=True)
        for source, buffer in zip(lane.ranks, buffers, strict=True)
        if len(buffer)
    ]
    buffers[lane.me] = out[:0]
    return Flight(message, buffers, flag is not None, works, out)


def sum_over(lane: Lane, values: list[Tensor]) -> list[Tensor]:
    """Sums over the ranks of tensors that are of equal shapes on all of them: one all-reduce."""
    if lane.world == 1 or not values:
        return values
    flat = torch.cat([v.flatten() for v in values])
    dist.all_reduce(flat, group=lane.group)
    parts = flat.split([v.numel() for v in values])
    return [part.view(v.shape) for part, v in zip(parts, values, strict=True)]


# Agreement


def signature(description: Any) -> int:
    """A number that tells descriptions apart, the same in every process."""
    digest = hashlib.blake2b(repr(description).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def exchange_status(lane: Lane, words: Sequence[int]) -> list[list[int]]:
    """Every rank's words, by rank."""
    mine = torch.tensor(words, dtype=torch.int64, device=lane.device)
    every = [torch.empty_like(mine) for _ in range(lane.world)]
    dist.all_gather(every, mine, group=lane.group)
    return torch.stack(every).tolist()


def exchange_objects(lane: Lane, value: Any) -> list[Any]:
    """Every rank's value: for what is about to be an error, so that it can say more."""
    every: list[Any] = [None] * lane.world
    dist.all_gather_object(every, value, group=lane.group)
    return every


def raise_together(lane: Lane, name: str, failure: BaseException | None) -> None:
    """Raise on every rank what one of them has met.

    Raises:
        BaseException: ``failure`` itself on the rank that has one.
        RuntimeError: elsewhere; it names the rank and repeats its message.
    """
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    found = exchange_objects(lane, text)
    if failure is not None:
        raise failure
    rank, message = next((lane.ranks[i], m) for i, m in enumerate(found) if m is not None)
    raise RuntimeError(f"rank {rank} failed in {name}.step() with {message}")


def agree_mask(lane: Lane, mask: Sequence[bool]) -> list[bool]:
    """Positions that are true on any rank."""
    flags = torch.tensor(mask, dtype=torch.uint8, device=lane.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=lane.group)
    return flags.bool().tolist()


# Without any collective: a note in the process group's key-value store


class Notes:
    """How ranks whose steps send nothing learn of a failure: at their next step, from the store."""

    _made = 0

    def __init__(self) -> None:
        self._key = f"stiefel/failure/{Notes._made}"
        Notes._made += 1
        self._steps = 0

    def check(self, name: str) -> None:
        """Begin a step.

        Raises:
            RuntimeError: another rank failed in this step or in the one before.
        """
        self._steps += 1
        store = self._store()
        for step in (self._steps - 1, self._steps):
            key = f"{self._key}/{step}"
            if store.check([key]):
                rank, message = store.get(key).decode().split(":", 1)
                if int(rank) != dist.get_rank():
                    raise RuntimeError(f"rank {rank} failed in {name}.step() with {message}")

    def leave(self, failure: BaseException) -> None:
        """Tell the other ranks."""
        text = f"{dist.get_rank()}:{type(failure).__name__}: {failure}"
        self._store().set(f"{self._key}/{self._steps}", text)

    @staticmethod
    def _store() -> Any:
        return dist.distributed_c10d._get_default_store()

"""How far a merge is, and how long the rest will take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

SECONDS_BETWEEN = 0.2


@dataclass(frozen=True)
class MergeProgress:
    """What a progress callback is told."""

    done: int
    """Tensors that are written."""
    total: int
    tensor: str
    """The last one that was worked on."""
    fraction: float
    """Of the estimated work, 0 to 1."""
    seconds: float
    """Since the start of this run."""
    remaining: float | None
    """Seconds to come; None while there is nothing to go by."""


class Meter:
    """Counts work from several threads and calls back from the one that is due.

    Args:
        callback: Told at most every 0.2 s, and at the end; None counts only.
        total: Tensors of the merge.
        work: Estimated work of them, in any unit.
        done, finished: Tensors and work that an earlier run did.
    """

    def __init__(
        self,
        callback: Callable[[MergeProgress], None] | None,
        total: int,
        work: float | int,
        done: int = 0,
        finished: float | int = 0.0,
    ) -> None:
        self._callback = callback
        self._total = total
        self._work = max(work, 1e-9)
        self._done = done
        self._earlier = finished
        self._finished = finished
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._last = -float("inf")

    def add(self, work: float | int, tensor: str, *, whole: bool = False) -> None:
        """``work`` more is done, on ``tensor``, which is now ``whole`` or not."""
        with self._lock:
            self._finished = min(self._finished + work, self._work)
            self._done += whole
            now = time.monotonic()
            last = whole and self._done == self._total
            if self._callback is None or (now - self._last < SECONDS_BETWEEN and not last):
                return
            self._last = now
            # Within the lock: callers see numbers that never go back.
            self._callback(self._state(tensor, now - self._start))

    def _state(self, tensor: str, seconds: float) -> MergeProgress:
        here = self._finished - self._earlier
        remaining = None
        if here > 0 and seconds > 0:
            remaining = max(0.0, (self._work - self._finished) * seconds / here)
        fraction = self._finished / self._work
        return MergeProgress(self._done, self._total, tensor, fraction, seconds, remaining)

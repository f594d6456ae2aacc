"""Methods and machines as the cost model of distributed steps sees them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stiefel.optim import ARO, RMNP, ROOT, AuON, DCTAdamW, HybridAuON, Muon, NorMuon, Trion
from stiefel.optim.distributed.planner import Entry

Array = NDArray[np.float64]

# Passes over memory, reads and writes together, in numbers per number of the tensor in question.
CHECK = 1  # is the gradient finite
ADAMW = 7  # parameter, gradient, two means in; parameter and means out
ADVANCE = 3  # momentum and gradient in, momentum out
PACK = 2  # one in, one out
ZERO = 1
APPLY = 5  # decay in and out; parameter and update in, parameter out
# Kernels per piece of a matrix: to pack it for its owner, to put it in place there, to pack the
# update, to decay and to add.
SCATTER_KERNELS = 2


@dataclass(frozen=True)
class Method:
    """A column of the table."""

    make: Callable[[Any], Any]
    """Groups → optimizer."""
    passes: float
    """Over memory in one update of a matrix that is at hand: a floor under its time."""
    workspace: float
    """Numbers of scratch per number of the largest matrix (or shard), measured on squares."""
    matrices: bool = True
    """Whether matrices have a rule of their own, else all goes to AdamW."""

    def optimizer(self, params: Any) -> Any:
        """The optimizer of these parameters or groups."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # groups of one rule: on purpose
            return self.make(params)


METHODS: Mapping[str, Method] = {
    "AdamW": Method(lambda g: RMNP(g), ADAMW, 0.0, matrices=False),
    "Muon": Method(lambda g: Muon(g), 12, 4.2),
    "NorMuon": Method(lambda g: NorMuon(g), 16, 4.2),
    "ROOT": Method(lambda g: ROOT(g), 20, 5.2),
    "ARO": Method(lambda g: ARO(g), 40, 4.7),
    "HybridAuON": Method(lambda g: HybridAuON(g), 12, 4.2),
    "Trion": Method(lambda g: Trion(g), 16, 2.1),
    "DCTAdamW": Method(lambda g: DCTAdamW(g), 16, 2.3),
    "AuON": Method(lambda g: AuON(g), 10, 1.0),
    "RMNP": Method(lambda g: RMNP(g), 8, 1.0),
}


@dataclass(frozen=True)
class Machine:
    """What every rank has. Ranks of one node and of several are not told apart."""

    tflops: float
    """10¹² floating-point operations a second, in the products of an update."""
    gbs: float
    """10⁹ bytes of memory a second, reads and writes together."""
    gbps: float
    """10⁹ bits a second over the link, each way at once."""
    us: float
    """Microseconds until a collective moves anything."""
    message_us: float = 0.5
    """Microseconds for every message of it."""
    launch_us: float = 4.0
    """Microseconds to start a kernel."""
    host_us: float = 30.0
    """Microseconds of Python for every matrix and other parameter."""
    fresh_gbs: float = inf
    """10⁹ bytes a second of memory new from the system: a GPU's allocator keeps what it has."""
    updates: Mapping[tuple[str, int, int], float] = field(default_factory=dict)
    """Seconds of one update, where they are known, by method, rows and columns."""
    slowdown: float = 1.0
    """How much longer all ranks' work takes at once than one's alone: above 1 they share cores."""
    overlaps: bool = True
    """Whether messages go on while a rank computes."""

    def update(self, method: str, entry: Entry) -> float:
        """Seconds of one update of a matrix at hand."""
        rows, cols = entry.matrix.rows, entry.matrix.cols
        known = self.updates.get((method, rows, cols))
        if known is not None:
            return known
        size = entry.parameter.dtype.itemsize * rows * cols
        return max(entry.flops / (1e12 * self.tflops), self.passes(METHODS[method].passes, size))

    def passes(self, count: float, size: Any) -> Any:
        """Seconds of passes over so many bytes."""
        return count * size / (1e9 * self.gbs)

    def fresh(self, size: Any) -> Any:
        """Seconds of buffers of so many bytes, for the first touch alone."""
        return size / (1e9 * self.fresh_gbs)

    def transfer(self, messages: Array, size: Array) -> Array:
        """Seconds of a collective, by rank."""
        return 1e-6 * (self.us + self.message_us * messages) + 8 * size / (1e9 * self.gbps)

    def spread(self, seconds: Array) -> Array:
        """Work that ranks do at once: where they share cores, no less than all of it takes."""
        longest = seconds.max(initial=0.0)
        if longest <= 0 or self.slowdown <= 1:
            return seconds
        together = seconds.mean() * self.slowdown
        return seconds * max(1.0, together / longest)

"""One step where parameters are DTensors, or where replicated ones have their work spread."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from stiefel.optim.base import MatrixOptimizer
from stiefel.optim.distributed.agreement import agree, find_failures
from stiefel.optim.distributed.exchange import Lane, Notes, sum_over
from stiefel.optim.distributed.geometry import is_dtensor, own
from stiefel.optim.distributed.holdings import Holdings
from stiefel.optim.distributed.pipeline import Pipeline
from stiefel.optim.distributed.placing import Lanes
from stiefel.optim.distributed.planner import Entry
from stiefel.optim.distributed.shards import Shard
from stiefel.optim.elementwise import adamw_state, update_elementwise

Work = list[tuple[dict[str, Any], list[Tensor]]]


class Engine:
    """What a :class:`MatrixOptimizer` does with parameters that several ranks hold."""

    def __init__(self, optimizer: MatrixOptimizer, process_group: Any = None) -> None:
        """``process_group``: over whose ranks the work on plain parameters is spread, if any."""
        self._optimizer = optimizer
        self.places = Lanes(optimizer, process_group)
        self.holdings = Holdings(optimizer, self.places)
        self._pipeline = Pipeline(optimizer, self.holdings)
        self._notes: Notes | None = None

    def step(self, work: Work) -> None:
        """Update all parameters of ``work``, sharded or not.

        Raises:
            BaseException: as :meth:`MatrixOptimizer.step`; another rank's failure as RuntimeError.
            ValueError: ranks with other parameters, naming the first that differs.
        """
        optimizer = self._optimizer
        lanes = self.places.update()
        grads, bad = self._agree(work)
        self._skip(work, bad)
        self._redistribute(work, grads)
        failure: Exception | None = None
        try:
            self._work_alone(work, grads)
        except Exception as error:  # the others, who wait for this rank, must hear of it
            if optimizer._sends == "nothing" or not lanes:
                raise
            failure = error
        matrices = [p for group, params in work if group["rule"] == "matrix" for p in params]
        active = set(map(id, matrices))
        for lane in lanes:
            entries = [e for e in lane.entries if id(e.parameter) in active]
            if entries and optimizer._sends == "nothing":
                self._update_shards(lane, entries, grads)
            elif entries:
                self._pipeline.run(lane, entries, grads, failure)
        if failure is not None:
            raise failure

    def _work_alone(self, work: Work, grads: dict[int, Tensor]) -> None:
        """What takes no messages: elementwise rules, plain parameters, state of new ones."""
        optimizer = self._optimizer
        for group, params in work:
            shared = [p for p in params if self.places.involves(p)]
            plain = [p for p in params if not self.places.involves(p)]
            if group["rule"] == "elementwise":
                self._elementwise(group, shared, grads)
                if plain:
                    optimizer._adamw(group, plain)
                continue
            for p in shared:
                self.holdings.begin(group, p)
            if plain:
                optimizer._update_group(group, plain)

    def _agree(self, work: Work) -> tuple[dict[int, Tensor], list[Tensor]]:
        """This rank's shards of gradients, and what is to be skipped on every rank."""
        optimizer, rings = self._optimizer, self.places.speaking()
        if not rings and self.places.shared:
            self._notes = self._notes or Notes()
            self._notes.check(type(optimizer).__name__)
        failure: Exception | None = None
        grads: dict[int, Tensor] = {}
        bad: list[Tensor] = []
        try:
            grads, bad = find_failures(optimizer, work)
        except Exception as error:
            if not rings:
                if self._notes is not None:
                    self._notes.leave(error)
                raise
            failure = error
        if rings:
            bad = agree(optimizer, rings, work, bad, failure)
        return grads, bad

    def _skip(self, work: Work, bad: list[Tensor]) -> None:
        """Leave bad gradients' parameters as they are, on every rank, with a warning."""
        ids = {id(p) for p in bad}
        for group, params in work if ids else ():
            for p in params:
                if id(p) in ids:
                    message = f"NaN or Inf in the gradient of {self._optimizer._name(group, p)}"
                    warnings.warn(f"{message}: skipped", RuntimeWarning, stacklevel=5)
            params[:] = [p for p in params if id(p) not in ids]

    def _redistribute(self, work: Work, grads: dict[int, Tensor]) -> None:
        """Bring gradients to the placements of their parameters: partial sums for instance."""
        for _, params in work:
            for p in params:
                grad: Any = p.grad
                if is_dtensor(p) and grad.placements != p.placements:  # pyrefly: ignore
                    grads[id(p)] = own(grad.redistribute(placements=p.placements))  # pyrefly: ignore

    def _elementwise(
        self, group: dict[str, Any], params: list[Tensor], grads: dict[int, Tensor]
    ) -> None:
        """AdamW on what this rank holds."""
        *columns, fused = adamw_state(self._optimizer.state, params)
        rows = []
        for p, *state in zip(params, *columns, strict=True):
            if own(p).numel():
                rows.append((own(p), grads[id(p)], *map(own, state)))
            else:  # a rank whose shard is empty counts too
                state[-1] += 1
        if rows:
            own_params, own_grads, means, squares, steps = map(list, zip(*rows, strict=True))
            update_elementwise(group, own_params, own_grads, means, squares, steps, fused)

    def _update_shards(self, lane: Lane, entries: list[Entry], grads: dict[int, Tensor]) -> None:
        """Methods that send nothing, or sums: each rank updates what it holds."""
        for i in dict.fromkeys(e.group for e in entries):
            shards = [
                Shard.of(
                    e,
                    lane.me,
                    own(e.parameter),
                    grads[id(e.parameter)],
                    own(self.holdings.momentum(e.parameter)),
                )
                for e in entries
                if e.group == i
            ]
            self._optimizer._update_shards(
                self._optimizer.param_groups[i], shards, lambda values: sum_over(lane, values)
            )

    @contextmanager
    def exposed(self) -> Iterator[None]:
        """While it is open, the optimizer's state is that of one process, in DTensors."""
        self.places.update()
        with self.holdings.exposed():
            yield

    def adopt(self) -> None:
        """Take what load_state_dict has left in the optimizer's state."""
        self.places.update()
        self.holdings.adopt()
